"""LinFusion: recorded outputs of the published code, attaching and detaching, files, what diffusers does to UNets."""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_diffusion as tiny
import torch
import torch.nn.functional as F
from diffusers import (
    AutoModel,
    ControlNetModel,
    DiffusionPipeline,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models import attention_processor as processors
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from parity.weights import state_dict
from peft import LoraConfig
from zoo.backbones import _linfusion_layer
from zoo.backbones.linfusion import LinearSelfAttention, LinearUNet2DConditionModel, LinFusion

import zoo.diffusion  # noqa: F401  lets diffusers load linear models
from zoo.tools._unet_rows import unet_config

PARITY = Path(__file__).parent / 'parity'


def recorded():
    """The case's teacher UNet, tensors of the linear layers, inputs and recorded arrays."""
    manifest, arrays = json.loads((PARITY / 'linfusion_tiny.json').read_text()), np.load(PARITY / 'linfusion_tiny.npz')
    weights = state_dict(manifest, arrays)
    part = lambda name: {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}  # noqa: E731
    unet = UNet2DConditionModel(**manifest['unet_config']).eval()
    unet.load_state_dict(part('unet/'))
    inputs = {}
    for name, spec in manifest['inputs'].items():
        rng = np.random.RandomState(spec['seed'])
        inputs[name] = (
            torch.from_numpy(rng.randint(0, spec['high'], size=spec['shape']))
            if spec['kind'] == 'int'
            else torch.from_numpy(rng.standard_normal(size=spec['shape']).astype(np.float32))
        )
    out = {k.removeprefix('out/'): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith('out/')}
    return manifest, unet, part('linfusion/'), inputs, out


def keep_outputs(layers):
    """Outputs of the layers, filled at every forward pass."""
    kept = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, y, name=name: kept.update({name: y}))
    return kept


def test_matches_the_published_code():
    """Outputs at two sizes, the three losses of distillation, the layers' outputs and every gradient's norm."""
    manifest, unet, weights, inputs, out = recorded()
    assert sum(p.numel() for p in unet.parameters()) == manifest['params_unet_teacher']
    run = lambda size: unet(inputs[f'latents_{size}'], inputs['timestep'], inputs['encoder_hidden_states']).sample  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, out[b], rtol=1e-5, atol=1e-5)  # noqa: E731
    unet.requires_grad_(False)
    linear = LinFusion.attach(unet, weights)
    assert sum(p.numel() for p in linear.parameters()) == manifest['params']
    assert sum(p.numel() for p in unet.parameters()) == manifest['params_unet_student']
    assert linear.config.modules_list == manifest['linfusion_config']['modules_list']
    with torch.no_grad(), linear.teacher() as softmax:
        taught = keep_outputs({name: softmax.get_submodule(name) for name in linear.layers})
        close(run('24x16'), 'teacher_24x16')
        close(target := run('16x16'), 'teacher_16x16')
    with torch.no_grad():
        close(run('24x16'), 'noise_pred_24x16')
    learnt = keep_outputs(linear.layers)
    found = run('16x16')
    close(found, 'noise_pred_16x16')
    layers = list(linear.layers)
    features = torch.stack([F.mse_loss(learnt[n], taught[n]) for n in layers])
    noise, distilled = F.mse_loss(found, inputs['target']), F.mse_loss(found, target)
    loss = noise + 0.5 * distilled + 0.5 * features.mean()
    close(torch.stack([loss, noise, distilled, features.mean()]), 'loss')
    close(features, 'feat_mse')
    close(torch.stack([learnt[n].std() for n in layers]), 'attn_std')
    close(learnt[layers[0]][:, ::4], 'attn0')
    loss.backward()
    parameters = dict(linear.named_parameters())
    norms = torch.stack([parameters[k].grad.norm() for k in weights])
    close(norms, 'grad_norm')
    close(parameters['0.to_q.weight'].grad, 'grad_to_q_0')
    assert all(p.grad is None for n, p in unet.named_parameters() if 'attn1' not in n)


@pytest.fixture(scope='module')
def plain():
    """A UNet that tests copy."""
    return tiny.unet()


def attached(plain, **options):
    model = copy.deepcopy(plain)
    return model, LinFusion.attach(model, **{'init': 'random'} | options)


# --------------------------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize('mid_dim', [None, -1, 3])
def test_the_layer_against_its_formula(mid_dim):
    """In fp64, term by term, at an odd number of tokens; the published case has one width of the MLPs only."""
    layer, x = LinearSelfAttention(24, 3, mid_dim).double(), torch.randn(2, 35, 24).double()
    p = layer.state_dict()

    def mlp(name):
        if mid_dim == -1:
            return x
        h = x @ p[f'{name}.0.weight'].T + p[f'{name}.0.bias']
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * p[f'{name}.1.weight'] + p[f'{name}.1.bias']
        return torch.where(h > 0, h, 0.01 * h) @ p[f'{name}.3.weight'].T + p[f'{name}.3.bias']

    split = lambda y: y.reshape(2, 35, 3, 8).transpose(1, 2)  # noqa: E731
    phi = lambda y: split(torch.where(y > 0, y + 1, y.exp()))  # noqa: E731
    q, k = phi((x + mlp('to_q_')) @ p['to_q.weight'].T), phi((x + mlp('to_k_')) @ p['to_k.weight'].T)
    scores = q @ k.mT / 35
    o = scores @ split(x @ p['to_v.weight'].T) / (scores.sum(-1, keepdim=True) + 1e-4)
    expected = o.transpose(1, 2).reshape(2, 35, 24) @ p['to_out.0.weight'].T + p['to_out.0.bias']
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(encoder_hidden_states=torch.zeros(2, 3, 8)), 'encoder_hidden_states'),
        (dict(attention_mask=torch.zeros(2, 1, 4)), 'attention_mask'),
        (dict(hidden_states=torch.zeros(2, 8, 2, 2)), r'\(2, 8, 2, 2\)'),
    ],
)
def test_what_the_layer_refuses(arguments, words):
    layer = LinearSelfAttention(8, 2)
    with pytest.raises(ValueError, match=words):
        layer(**dict(hidden_states=torch.zeros(2, 4, 8)) | arguments)


def test_a_mask_given_to_the_unet_is_refused(plain):
    model, _ = attached(plain)
    with pytest.raises(ValueError, match='attention_mask'):
        tiny.step(model, attention_mask=torch.ones(2, 64))


# --------------------------------------------------------------------------------------------------------------------
# Attaching and detaching


def test_detach_restores_the_teacher(plain):
    model, keys, config = copy.deepcopy(plain), list(plain.state_dict()), dict(plain.config)
    before = tiny.step(model, (7, 9))
    linear = LinFusion.attach(model, init='random')
    assert type(model) is LinearUNet2DConditionModel and LinFusion.of(model) is linear and linear.model is model
    assert len(linear.layers) == 7 and list(linear.layers)[-1].startswith('mid_block')
    changed = tiny.step(model, (7, 9))
    assert (changed - before).abs().max() > 0.01
    with linear.teacher():
        assert torch.equal(tiny.step(model, (7, 9)), before)
    assert torch.equal(tiny.step(model, (7, 9)), changed)
    linear.detach()
    assert type(model) is UNet2DConditionModel and dict(model.config) == config and LinFusion.of(model) is None
    assert list(model.state_dict()) == keys and torch.equal(tiny.step(model, (7, 9)), before)
    linear.mount(model)
    assert torch.equal(tiny.step(model, (7, 9)), changed)
    model.double(), linear.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (tiny.step(model, (7, 9)) - before).abs().max() < 1e-5


def test_init_teacher_is_linear_attention_with_its_projections(plain):
    model, linear = attached(plain, init='teacher', projection_mid_dim='div:4')
    name, layer = next(iter(linear.layers.items()))
    teacher, x = plain.get_submodule(name), torch.randn(1, 50, 32)
    assert layer.to_q_[0].weight.shape == (8, 32)
    q, k, v = (getattr(teacher, f'to_{part}')(x).unflatten(-1, (2, 16)).transpose(1, 2) for part in 'qkv')
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT / 50
    o = scores @ v / (scores.sum(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(layer(x), teacher.to_out[0](o.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-6)
    tiny_loss = layer(x).square().mean()
    tiny_loss.backward()
    assert layer.to_q_[3].weight.grad.abs().max() > 0 and layer.to_k_[3].bias.grad.abs().max() > 0


def test_what_cannot_be_attached(plain):
    lora = copy.deepcopy(plain)
    lora.add_adapter(LoraConfig(target_modules=['to_q', 'to_v']), 'style')
    only_cross = tiny.unet(only_cross_attention=True)
    sizes = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16)
    joint = SD3Transformer2DModel(sample_size=8, num_layers=1, pooled_projection_dim=16, **sizes)
    twice, _ = attached(plain)
    custom = copy.deepcopy(plain)
    custom.set_attn_processor(processors.PAGIdentitySelfAttnProcessor2_0())
    for model, words in [
        (lora, 'LoRA layers.*unload_lora_weights'),
        (only_cross, 'attends to the text'),
        (joint, 'SD3Transformer2DModel: its attention is joint'),
        (twice, 'linear already'),
        (custom, 'PAGIdentitySelfAttnProcessor2_0 does more'),
        (torch.compile(plain), 'compiled'),
        (torch.nn.Linear(2, 2), 'Linear: it is none of'),
    ]:
        with pytest.raises(ValueError, match=words):
            LinFusion.attach(model)
    assert not any(isinstance(m, LinearSelfAttention) for m in lora.modules())
    for options, words in [
        (dict(init='zeros'), 'init'),
        (dict(projection_mid_dim='div:0'), 'projection_mid_dim'),
        (dict(projection_mid_dim=2.5), 'projection_mid_dim'),
    ]:
        with pytest.raises(ValueError, match=words):
            LinFusion.attach(plain, **options)
    assert type(plain) is UNet2DConditionModel


def test_the_teacher_has_the_dtype_of_the_model(plain, tmp_path):
    """What is trained may be fp32 in a model that is not."""
    model = copy.deepcopy(plain).to(torch.bfloat16)
    before = tiny.step(model)
    linear = LinFusion.attach(model)
    linear.float()
    with linear.teacher():
        assert torch.equal(tiny.step(model), before)
        with pytest.raises(ValueError, match='softmax layers are in place'):
            model.save_pretrained(tmp_path)
    linear.detach()
    assert torch.equal(tiny.step(model), before) and not list(tmp_path.iterdir())


def test_without_the_teacher(plain):
    model, linear = attached(plain, keep_teacher=False)
    for use in (linear.detach, lambda: linear.teacher().__enter__()):
        with pytest.raises(ValueError, match='keep_teacher'):
            use()


# --------------------------------------------------------------------------------------------------------------------
# Published sizes and files

SD21 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)


@pytest.mark.parametrize(
    'config, rule, repository, sizes, places',
    [
        (
            'sd15',
            None,
            '1-5',
            (859_520_964, 99_235_520, 909_182_404),
            {0: 'down_blocks.0', 6: 'up_blocks.1', 15: 'mid'},
        ),
        (SD21, None, '2-1', (865_910_724, 99_235_520, 915_572_164), {5: 'down_blocks.2', 12: 'up_blocks.3'}),
        ('sdxl', 'div:16', 'XL', (2_567_463_684, 435_480_800, 2_593_261_284), {24: 'up_blocks.0', 60: 'mid_block'}),
    ],
)
def test_published_sizes(config, rule, repository, sizes, places, monkeypatch):
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    if isinstance(config, str):  # those that `zoo bench unet` measures
        config, published = unet_config(config, quick=False)
        assert published == rule
    with torch.device('meta'):
        model = UNet2DConditionModel(**config)
        before = count(model)
        linear = LinFusion.attach(model, projection_mid_dim=rule)
    assert (before, count(linear), count(model)) == sizes
    names = list(linear.layers)
    assert all(names[i].startswith(start) for i, start in places.items())
    with_mlps = re.fullmatch('(.*)0.to_q_.3.bias', list(linear.state_dict())[-8]) is None
    assert with_mlps and len(linear.state_dict()) == 17 * len(names)
    entry = linear.config.modules_list[0]
    assert entry['projection_mid_dim'] == (None if rule is None else entry['dim_n'] // 16)
    linear.detach()
    asked = []
    monkeypatch.setattr(LinFusion, 'load_config', lambda name: asked.append(name) or {'modules_list': []})
    with pytest.raises(ValueError, match='0 self-attention layers'):
        LinFusion.attach(model, 'auto')
    assert asked == [f'Yuanshi/LinFusion-{repository}']


def test_no_published_weights_for_other_models(plain):
    with pytest.raises(ValueError, match='no published LinFusion weights'):
        LinFusion.attach(copy.deepcopy(plain), 'auto')


@pytest.fixture(scope='module')
def saved(plain, tmp_path_factory):
    """A folder in the published layout, with the outputs of the UNet that it makes."""
    folder = tmp_path_factory.mktemp('linfusion')
    model, linear = attached(plain, projection_mid_dim='div:4')
    linear.save_pretrained(folder)
    return folder, tiny.step(model)


def test_files_of_the_published_layout(plain, saved, tmp_path):
    folder, expected = saved
    assert {p.name for p in folder.iterdir()} == {'config.json', 'diffusion_pytorch_model.safetensors'}
    config = json.loads((folder / 'config.json').read_text())
    assert config['_class_name'] == 'LinFusion' and config['modules_list'][0] == {
        'module_name': 'down_blocks.0.attentions.0.transformer_blocks.0.attn1',
        'dim_n': 32,
        'heads': 2,
        'projection_mid_dim': 8,
    }
    file = folder / 'diffusion_pytorch_model.safetensors'
    tensors = safetensors.torch.load_file(file)
    torch.save(tensors, tmp_path / 'weights.pt')
    for weights in (folder, str(folder), file, tmp_path / 'weights.pt', tensors):
        model = copy.deepcopy(plain)
        LinFusion.attach(model, weights)
        assert torch.equal(tiny.step(model), expected)
    model = copy.deepcopy(plain).to(torch.float16)
    assert {p.dtype for p in LinFusion.attach(model, folder).parameters()} == {torch.float16}
    loaded = LinFusion.from_pretrained(folder)
    loaded.mount(model := copy.deepcopy(plain))
    assert torch.equal(tiny.step(model), expected)
    with pytest.raises(ValueError, match='in a model already'):
        loaded.mount(copy.deepcopy(plain))


def test_older_form_of_the_config(plain, tmp_path):
    model, linear = attached(plain)
    expected = tiny.step(model)
    linear.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['_class_name'] = 'StableMamba'
    config['modules_list'] = [[e['module_name'], e['dim_n'], e['heads']] for e in config['modules_list']]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    found = LinFusion.attach(model := copy.deepcopy(plain), tmp_path)
    assert torch.equal(tiny.step(model), expected) and found.config.modules_list == linear.config.modules_list
    short = [{k: e[k] for k in ('module_name', 'dim_n', 'heads')} for e in linear.config.modules_list]
    assert LinFusion(short).config.modules_list == linear.config.modules_list
    assert LinFusion.from_config(linear.config).config.modules_list == linear.config.modules_list


def test_weights_of_another_model(plain, saved, tmp_path):
    folder, _ = saved
    tensors = safetensors.torch.load_file(folder / 'diffusion_pytorch_model.safetensors')
    for model, words in [
        (tiny.unet(layers_per_block=2), '7 self-attention layers, the model has 11'),
        (tiny.unet(attention_head_dim=4), 'number of heads 2 does not fit'),
        (tiny.unet(block_out_channels=(32, 96)), 'width 64 does not fit'),
    ]:
        with pytest.raises(ValueError, match=words):
            LinFusion.attach(model, folder)
        assert type(model) is UNet2DConditionModel
    lacking = {k: v for k, v in tensors.items() if k != '3.to_v.weight'}
    for weights, words in [
        (lacking, '3.to_v.weight'),
        ({k: v for k, v in tensors.items() if k[0] != '6'}, 'found 6 layers'),
        ({'mid_block.attn1.to_q.weight': torch.zeros(1)}, 'found 1 layers such as'),
        ({k: v[:8] for k, v in tensors.items()}, 'size mismatch'),
        ('no/such/folder', 'is no folder'),
        ('nothing', 'is no folder'),
    ]:
        with pytest.raises(ValueError, match=words):
            LinFusion.attach(copy.deepcopy(plain), weights)
    damaged = tmp_path / 'damaged.safetensors'
    damaged.write_bytes(b'{}')
    (tmp_path / 'list.pt').write_bytes(b'?')
    tiny.unet().save_pretrained(tmp_path / 'unet')
    for weights, words in [
        (damaged, 'cannot read weights from .*damaged.safetensors'),
        (tmp_path / 'list.pt', 'cannot read weights from .*list.pt'),
        (tmp_path / 'unet', 'is a whole model: load it with UNet2DConditionModel'),
    ]:
        with pytest.raises(ValueError, match=words):
            LinFusion.attach(copy.deepcopy(plain), weights)
    with pytest.raises(OSError, match='the folder cannot be read: .*config.json'):
        LinFusion.attach(copy.deepcopy(plain), tmp_path)
    LinFusion.attach(copy.deepcopy(plain), folder, projection_mid_dim='div:4')
    with pytest.raises(ValueError, match='projection_mid_dim 16 in down_blocks.1.*, not 8'):
        LinFusion.attach(copy.deepcopy(plain), folder, projection_mid_dim=8)
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    safetensors.torch.save_file(lacking, tmp_path / 'diffusion_pytorch_model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='damaged: missing'):
        LinFusion.attach(copy.deepcopy(plain), tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# A saved linear model is never read back into softmax layers


def test_an_attached_unet_saves_and_loads(plain, tmp_path):
    model, linear = attached(plain, projection_mid_dim='div:4')
    expected = tiny.step(model)
    model.save_pretrained(tmp_path)
    for load in (LinearUNet2DConditionModel.from_pretrained, AutoModel.from_pretrained):
        loaded = load(str(tmp_path))
        assert type(loaded) is LinearUNet2DConditionModel and torch.equal(tiny.step(loaded), expected)
        assert LinFusion.of(loaded).config.modules_list == linear.config.modules_list
    with pytest.raises(ValueError, match='UNetMidBlock2DCrossAttn .*linear: import zoo.diffusion.*LinearUNet2DCond'):
        UNet2DConditionModel.from_pretrained(tmp_path)
    assert model.config.mid_block_type == loaded.config.mid_block_type == 'UNetMidBlock2DCrossAttn'
    linear.detach()
    model.save_pretrained(tmp_path / 'plain')
    assert torch.equal(tiny.step(UNet2DConditionModel.from_pretrained(tmp_path / 'plain')), tiny.step(plain))
    with pytest.raises(ValueError, match='holds softmax layers'):
        LinearUNet2DConditionModel.from_pretrained(tmp_path / 'plain')


def test_pipelines_save_and_load(tmp_path, monkeypatch):
    pipe = tiny.pipeline()
    linear = LinFusion.attach(pipe, init='random')
    assert linear.model is pipe.unet and LinFusion.of(pipe) is linear
    expected = tiny.step(pipe.unet)
    pipe.save_pretrained(tmp_path / 'linear')
    loaded = DiffusionPipeline.from_pretrained(tmp_path / 'linear')
    assert torch.equal(tiny.step(loaded.unet), expected)
    with monkeypatch.context() as patch:  # a process that has not imported zoo.diffusion
        patch.delitem(sys.modules, 'zoo.backbones.linfusion')
        patch.delitem(LOADABLE_CLASSES, 'zoo.backbones.linfusion')
        try:  # older releases of diffusers import the module themselves
            loaded = DiffusionPipeline.from_pretrained(tmp_path / 'linear')
            assert type(loaded.unet).__name__ == 'LinearUNet2DConditionModel'
        except ValueError as error:
            assert 'import zoo.backbones.linfusion' in str(error)
    linear.detach()
    assert pipe.config.unet == ('diffusers', 'UNet2DConditionModel')
    LinFusion.attach(pipe.unet)  # behind the pipeline's back: its file names the plain class, which refuses the weights
    pipe.save_pretrained(tmp_path / 'behind')
    with pytest.raises(ValueError, match='import zoo.diffusion'):
        DiffusionPipeline.from_pretrained(tmp_path / 'behind')


def test_from_scratch(plain):
    model = LinearUNet2DConditionModel(**tiny.UNET, projection_mid_dim=-1)
    assert len(LinFusion.of(model).layers) == 7 and model.config.modules_list[0]['projection_mid_dim'] == -1
    assert not any('to_q_' in k for k in model.state_dict())
    again = LinearUNet2DConditionModel.from_config(model.config)
    assert list(again.state_dict()) == list(model.state_dict())
    again = AutoModel.from_config({**dict(plain.config), '_class_name': 'LinearUNet2DConditionModel'})
    assert type(again) is LinearUNet2DConditionModel
    assert 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q_.3.bias' in again.state_dict()
    latents, t, text = tiny.inputs()
    model(latents, t, text).sample.sum().backward()
    assert all(p.grad is not None for p in LinFusion.of(model).parameters())


# --------------------------------------------------------------------------------------------------------------------
# What diffusers does to UNets


def test_it_survives_processors_and_slices(plain):
    model, linear = attached(plain)
    expected = tiny.step(model)
    keys = list(model.state_dict())

    class Mine(processors.AttnProcessor):
        pass

    for change in (
        lambda: model.set_attn_processor(processors.AttnProcessor()),
        lambda: model.set_attn_processor({n: processors.AttnProcessor2_0() for n in model.attn_processors}),
        model.set_default_attn_processor,
        lambda: model.set_attention_slice('auto'),
        lambda: model.set_attention_slice(None),
        lambda: model.set_attn_processor(Mine()),
        model.enable_gradient_checkpointing,
        lambda: model.to(memory_format=torch.channels_last),
    ):
        change()
        torch.testing.assert_close(tiny.step(model), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys and len(model.attn_processors) == 14


def test_processors_with_no_effect_say_so_once(plain, monkeypatch):
    """Attention control by processors (PAG, reference-only) works on softmax maps that are not there."""
    model, linear = attached(plain)
    said = []
    monkeypatch.setattr(_linfusion_layer.logger, 'warning', said.append)

    class Mine:
        def __call__(self, attn, hidden_states, *_, **__):
            return torch.zeros_like(hidden_states)

    expected = tiny.step(model)
    first, *others = linear.layers.values()
    first.processor = Mine()  # as the pipelines of PAG and SAG do
    assert len(said) == 1
    for layer in others:
        layer.set_processor(Mine())
    assert torch.equal(tiny.step(model), expected)
    assert len(said) == 1 and 'Mine has no effect' in said[0]
    linear.detach()  # there it has one, and is kept
    assert (tiny.step(model) - tiny.step(plain)).abs().max() > 1e-3


def test_copies_are_their_own(plain):
    model, linear = attached(plain)
    expected, before = tiny.step(model), tiny.step(plain)
    other = copy.deepcopy(model)
    twin = LinFusion.of(other)
    assert twin is not linear and twin.model is other
    assert all(twin.layers[n] is other.get_submodule(n) is not linear.layers[n] for n in linear.layers)
    with torch.no_grad():
        [p.add_(1) for p in twin.parameters()]
    assert torch.equal(tiny.step(model), expected) and not torch.equal(tiny.step(other), expected)
    twin.detach()
    assert torch.equal(tiny.step(other), before) and torch.equal(tiny.step(model), expected)
    pipe = tiny.pipeline()
    LinFusion.attach(pipe)
    assert LinFusion.of(copy.deepcopy(pipe.unet)).model is not pipe.unet


def test_lora_after_attaching(plain, tmp_path):
    model, linear = attached(plain)
    expected = tiny.step(model)
    model.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_k', 'to_v', 'to_out.0'], init_lora_weights=False))
    assert all(hasattr(layer.to_q, 'base_layer') for layer in linear.layers.values())
    assert (tiny.step(model) - expected).abs().max() > 1e-3
    for lost in (linear.detach, lambda: linear.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match='LoRA'):
            lost()
    assert not list(tmp_path.iterdir())
    model.unload_lora()
    assert torch.equal(tiny.step(model), expected)
    linear.save_pretrained(tmp_path), linear.detach()
    assert torch.equal(tiny.step(model), tiny.step(plain))


def test_ip_adapter_before_attaching(plain):
    """It marks the UNet by an attribute of the config that the config's entries do not show."""
    model = copy.deepcopy(plain)
    given = tiny.load_ip_adapter(model)
    before = tiny.step(model, **given)
    linear = LinFusion.attach(model, init='random')
    later, state = attached(plain)[0], linear.state_dict()
    LinFusion.of(later).load_state_dict(state)
    assert torch.equal(tiny.step(model, **given), tiny.step(later, **tiny.load_ip_adapter(later)))
    linear.detach()
    assert torch.equal(tiny.step(model, **given), before)


def test_ip_adapter(plain):
    model, linear = attached(plain)
    expected = tiny.step(model)
    given = tiny.load_ip_adapter(model)
    assert (tiny.step(model, **given) - expected).abs().max() > 1e-3
    attn1 = [p for n, p in model.attn_processors.items() if 'attn1' in n]
    assert all(type(p) is processors.AttnProcessor2_0 for p in attn1) and len(attn1) == 7
    masks = [torch.ones(1, 1, 8, 8)]
    masked = tiny.step(model, **given, cross_attention_kwargs={'ip_adapter_masks': masks, 'scale': 1.0})
    torch.testing.assert_close(masked, tiny.step(model, **given), rtol=1e-4, atol=1e-4)


def test_controlnet(plain):
    model, _ = attached(plain)
    net = ControlNetModel.from_unet(model, load_weights_from_unet=False, conditioning_channels=3)
    latents, t, text = tiny.inputs()
    with torch.no_grad():
        for p in net.controlnet_down_blocks.parameters():
            p.fill_(0.05)
        down, mid = net(latents, t, text, controlnet_cond=torch.rand(2, 3, 64, 64), return_dict=False)
        found = model(latents, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert (found - tiny.step(model)).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match='to_q_'):  # half a copy would be worse
        ControlNetModel.from_unet(model)


@pytest.mark.parametrize('backend', [pytest.param('eager', marks=pytest.mark.slow), 'aot_eager'])
def test_compiles_in_one_graph(backend):
    """One level only: each block of a UNet costs the compiler seconds."""
    one = {k: v[:1] for k, v in tiny.UNET.items() if k.endswith('block_types') or k == 'block_out_channels'}
    model = tiny.unet(**one, attention_head_dim=2)
    LinFusion.attach(model, init='random')
    expected = tiny.step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(tiny.step(compiled), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiles_for_other_sizes(plain):
    model, _ = attached(plain)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in ((8, 8), (6, 10), (7, 9)):
        torch.testing.assert_close(tiny.step(compiled, size), tiny.step(model, size), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
