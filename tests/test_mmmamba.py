"""mmMamba: conversion of a HoVLE, the published key layout, files of distillation stages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.weights import image_batch, state_dict
from safetensors.torch import load_file, save_file
from tiny_hovle import LAYERS, batch, config, prompt, stir, student, teacher
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from zoo.backbones._mamba2 import Mamba2Mixer
from zoo.backbones.hovle import HoVLEAttention, HoVLEConfig
from zoo.backbones.mmmamba import (
    HoVLELinearForConditionalGeneration,
    MMMambaConfig,
    from_hovle,
    student_config,
)

import zoo
import zoo.vlm
from zoo.errors import ZooError
from zoo.vlm.weights import (
    convert_checkpoint,
    load_weights,
    merge_projections,
    read_weights,
    split_projections,
)

PARITY = Path(__file__).parent / 'parity'


def test_the_layout_of_one_layer_is_the_published_one():
    layers = {}
    for name in ('mmmamba_layer', 'mmmamba_layer_converted'):
        manifest, arrays = json.loads((PARITY / f'{name}.json').read_text()), np.load(PARITY / f'{name}.npz')
        c = manifest['config']
        mixer = Mamba2Mixer(c['hidden_size'], c['num_heads'], c['num_kv_heads'], c['head_dim'], layer_idx=0)
        weights = state_dict(manifest, arrays)
        mixer.load_state_dict(split_projections(weights, mixer))
        with torch.no_grad():
            y, _ = mixer(image_batch(manifest['inputs']['hidden_states']))
        expected = torch.from_numpy(arrays['out/y'])
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
        layers[name] = (mixer, arrays)
    mixer, arrays = layers['mmmamba_layer']
    merged = merge_projections(mixer.state_dict())['wvkqgdt.weight']
    assert torch.equal(merged, torch.from_numpy(arrays['out/converted_wvkqgdt']))


def test_options_have_their_published_names():
    mixer = Mamba2Mixer(32, 4, 2, 8, layer_idx=0, use_qknorm=True, use_D=True)
    state = {k: torch.randn_like(v) for k, v in mixer.state_dict().items()}
    published = {k.replace('_layer_norm', '_norm'): v for k, v in state.items()}
    assert {'D', 'q_norm.weight', 'k_norm.bias'} < set(published)
    assert split_projections(published, mixer).keys() == state.keys()
    mixer.load_state_dict(split_projections(published, mixer))
    assert torch.equal(mixer.k_layer_norm.bias, published['k_norm.bias'])


@pytest.mark.parametrize(
    'layers, parameters, tensors',
    [(range(32), 2_741_992_448, 396), ([i for i in range(32) if i % 4], 2_708_076_288, 356)],
)
def test_published_sizes(layers, parameters, tensors):
    with torch.device('meta'):
        net = HoVLELinearForConditionalGeneration(student_config(HoVLEConfig(), layers))
    keys = merge_projections(net.state_dict())
    assert sum(v.numel() for v in keys.values()) == parameters and len(keys) == tensors
    first = 'embedding_model.encoder.1.attention.'
    assert {k: tuple(v.shape) for k, v in keys.items() if k.startswith(first)} == {
        f'{first}wvkqgdt.weight': (6160, 2048),
        f'{first}conv1d.weight': (4096, 1, 2),
        f'{first}conv1d.bias': (4096,),
        f'{first}dt_bias': (16,),
        f'{first}A_log_bias': (16,),
        f'{first}g_norm_swish_gate.weight': (128,),
        f'{first}o_proj.weight': (2048, 2048),
    }
    index = {'metadata': {'total_size': 2 * parameters}, 'weight_map': dict.fromkeys(keys, 'model-0000X-of-00002')}
    assert tensors != 356 or abs(len(json.dumps(index, indent=2)) - 33_863) < 6000  # "33.9 kB" on the hub


@pytest.mark.parametrize('kind', LAYERS)
def test_conversion(kind):
    source = teacher()
    before = {k: v.clone() for k, v in source.state_dict().items()}
    made = from_hovle(source, LAYERS[kind], seed=3)
    types = made.config.embedding_config.layers_block_type + made.config.llm_config.layers_block_type
    assert [i for i, t in enumerate(types) if t == 'mamba2'] == LAYERS[kind] and set(types) <= {'mamba2', 'mha'}
    for i, (old, new) in enumerate(zip(source.layers, made.layers)):
        if i not in LAYERS[kind]:
            assert torch.equal(old.attention.wqkv.weight, new.attention.wqkv.weight)
            continue
        mixer, fused = new.attention, old.attention.wqkv.weight
        q, k, v = fused.view(2, 4, 8, 32).split((2, 1, 1), 1)
        assert torch.equal(mixer.q_proj.weight, q.reshape(32, 32))
        assert torch.equal(mixer.k_proj.weight, k.reshape(16, 32)) and torch.equal(
            mixer.v_proj.weight, v.reshape(16, 32)
        )
        assert torch.equal(mixer.o_proj.weight, old.attention.wo.weight)
        assert (mixer.in_proj.weight == 0).all() and (mixer.conv1d.weight == torch.tensor([0.0, 1.0])).all()
        assert mixer.layer_idx == i
    owned = {p.untyped_storage().data_ptr() for p in source.parameters()}
    assert not any(p.untyped_storage().data_ptr() in owned for p in made.parameters())
    stir(made)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items())


def test_frozen_weights_can_be_shared_and_the_seed_counts():
    source = teacher()
    shared = from_hovle(source, [1, 2], share_frozen=True)
    owned = {p.untyped_storage().data_ptr() for p in source.parameters()}
    for name, p in shared.named_parameters():
        mine = name.startswith(('embedding_model.encoder.1.attention.', 'language_model.model.layers.0.attention.'))
        assert (p.untyped_storage().data_ptr() in owned) != mine and p.requires_grad == mine, name
    again, other = from_hovle(source, [2]), from_hovle(source, [2], seed=1)
    assert torch.equal(again.layers[2].attention.dt_bias, shared.layers[2].attention.dt_bias)
    assert not torch.equal(again.layers[2].attention.dt_bias, other.layers[2].attention.dt_bias)


def test_linearize_gives_the_native_student():
    made = zoo.linearize(teacher(), 'mamba2', layers='3:1')
    assert type(made) is HoVLELinearForConditionalGeneration
    assert made.config.block_types == ['mha', 'mamba2', 'mamba2', 'mamba2']


@torch.no_grad()
def test_state_does_not_grow_and_padding_leaves_it_at_zero():
    net, cache = student(), DynamicCache()
    ids, _ = prompt([], 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    net(input_ids=padded[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    assert all(not s.any() for layer in cache.layers for s in (layer.recurrent_states[0], layer.conv_states[0]))
    net(input_ids=padded[:, 4:], attention_mask=mask, past_key_values=cache)
    sizes = [layer.state_bytes() for layer in cache.layers]
    net(input_ids=ids, past_key_values=cache)
    assert [layer.state_bytes() for layer in cache.layers] == sizes == [4 * 8 * 8 * 4 + 64 * 2 * 4] * 4


def test_options_of_the_mixer_survive_the_file(tmp_path):
    options = dict(use_D=True, use_qknorm=True, use_gnorm=False)
    made = from_hovle(teacher(), [0, 3], mixer_kwargs=options)
    stir(made)
    made.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.mixer_options == options
    assert torch.equal(made(prompt([])[0]).logits, again(prompt([])[0]).logits)
    with pytest.raises(TypeError, match='use_nothing'):
        from_hovle(teacher(), mixer_kwargs={'use_nothing': True})


@pytest.mark.parametrize('kind', ['linear', 'hybrid'])
def test_published_layout_round_trip(tmp_path, kind):
    net, inputs = student(kind), prompt([2], 14)
    net.save_pretrained(tmp_path / 'a', max_shard_size='100KB')
    weights = read_weights(tmp_path / 'a')
    assert len(list((tmp_path / 'a').glob('*.safetensors'))) > 2
    assert not any(word in key for key in weights for word in ('q_proj', 'g_proj', 'in_proj', 'g_norm.'))
    assert sum('wvkqgdt' in key for key in weights) == len(LAYERS[kind])
    values = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert values['model_type'] == 'mmMamba_chat' and values['architectures'] == 'mmMambaChatModel'
    assert values['auto_map']['AutoModelForCausalLM'] == 'modeling_mmMamba_chat.mmMambaChatModel'
    assert values['embedding_config']['model_type'] == 'mmMamba_embedding'
    text = values['llm_config']
    assert text['model_type'] == 'mmMamba' and text['architectures'] == 'mmMambaForCausalLM'
    assert text['auto_map']['AutoConfig'] == 'configuration_mmMamba.mmMambaConfig'
    assert 'layers_block_type' not in values and 'mixer_options' not in values
    with torch.no_grad():
        expected = net(*inputs).logits
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
            again = auto.from_pretrained(tmp_path / 'a')
            assert type(again) is HoVLELinearForConditionalGeneration
            assert again.config.block_types == net.config.block_types
            assert torch.equal(again(*inputs).logits, expected)
    again.save_pretrained(tmp_path / 'b')
    other = read_weights(tmp_path / 'b')
    assert set(other) == set(weights) and all(torch.equal(v, other[k]) for k, v in weights.items())
    fresh = HoVLELinearForConditionalGeneration(net.config).eval()
    fresh.load_state_dict(weights)
    assert torch.equal(fresh(*inputs).logits, expected)
    fresh.load_state_dict(net.state_dict())


def test_module_keys_are_read_and_published_ones_written(tmp_path):
    net = student()
    net.config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / 'model.safetensors', {'format': 'pt'}
    )
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    again.save_pretrained(tmp_path / 'again')
    assert set(read_weights(tmp_path / 'again')) == set(merge_projections(net.state_dict()))


def test_a_config_without_block_types_is_linear():
    values = config().to_diff_dict()
    del values['model_type']
    made = MMMambaConfig(**values)
    assert made.block_types == ['mamba2'] * 4
    with pytest.raises(ValueError, match="'gla' is neither"):
        HoVLELinearForConditionalGeneration(student_config_with('gla'))
    with pytest.raises(ValueError, match='there is no layer 4'):
        student_config(config(), [4])


def student_config_with(kind):
    made = student_config(config(), [])
    made.llm_config.layers_block_type[1] = kind
    return made


def test_wrong_sizes_are_named(tmp_path):
    net = student()
    net.save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    key = 'embedding_model.encoder.1.attention.wvkqgdt.weight'
    weights[key] = weights[key][:-1].clone()
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='encoder.1.attention.wvkqgdt.weight has 99 rows'):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='wvkqgdt.weight has 99 rows'):
        net.load_state_dict(weights)


# Stages


def stage_files(folder, net):
    """Files as the published trainer writes them: what the stage trained, under the modules' names."""
    state = net.state_dict()
    second = ('in_proj', 'conv1d', 'g_proj', 'g_norm', 'dt_bias', 'A_log_bias', 'q_proj', 'k_proj', 'v_proj')
    third = [name for name in second if name not in ('dt_bias', 'A_log_bias')]
    files = []
    for stage, names in ((2, second), (3, third)):
        chosen = {f'module.{k}': v + stage for k, v in state.items() if any(f'.{n}' in k for n in names)}
        files.append(folder / f'stage{stage}.pt')
        torch.save({'model_state_dict': chosen, 'step': 7}, files[-1])
    return files


def test_stage_files_are_merged(tmp_path):
    net = student()
    second, third = stage_files(tmp_path, net)
    other = from_hovle(teacher())
    with pytest.raises(ZooError, match='(?s)8 keys are missing: .*dt_bias.*give the file of the stage before'):
        load_weights(other, third)
    load_weights(other, second, third)
    for i, layer in enumerate(other.layers):
        mine = net.layers[i].attention
        assert torch.equal(layer.attention.dt_bias, mine.dt_bias + 2)
        assert torch.equal(layer.attention.A_log_bias, mine.A_log_bias + 2)
        assert torch.equal(layer.attention.g_proj.weight, mine.g_proj.weight + 3)
    hybrid = from_hovle(teacher(), LAYERS['hybrid'])
    load_weights(hybrid, second, third)
    assert torch.equal(hybrid.layers[1].attention.dt_bias, net.layers[1].attention.dt_bias + 2)
    counted = {f'mixers.{i}.{k}': v for i in LAYERS['hybrid'] for k, v in net.layers[i].attention.state_dict().items()}
    save_file(counted, tmp_path / 'stage.safetensors')
    load_weights(hybrid, tmp_path / 'stage.safetensors')
    assert torch.equal(hybrid.layers[2].attention.dt_bias, net.layers[2].attention.dt_bias)


def test_stage_files_that_do_not_fit_are_refused(tmp_path):
    net = student()
    files = stage_files(tmp_path, net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = from_hovle(teacher(llm_config=dict(num_key_value_heads=4)))
    with pytest.raises(ZooError, match=r'weights of another size: .*k_proj.weight \(16, 32\), not \(32, 32\)'):
        load_weights(other, *files)
    torch.save({'what.is.this': torch.zeros(1)}, tmp_path / 'x.pt')
    with pytest.raises(ZooError, match='does not have: what.is.this'):
        load_weights(net, *files, tmp_path / 'x.pt')
    files[1].write_bytes(files[1].read_bytes()[:1000])
    with pytest.raises(ZooError, match='stage3.pt is cut off'):
        load_weights(net, *files)
    with pytest.raises(ZooError, match='no such checkpoint'):
        read_weights(tmp_path / 'none.pt')
    torch.save({'step': 1}, tmp_path / 'x.pt')
    with pytest.raises(ZooError, match='holds no weights'):
        read_weights(tmp_path / 'x.pt')
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_lacking_shard_is_named(tmp_path):
    student().save_pretrained(tmp_path, max_shard_size='100KB')
    lacking = sorted(tmp_path.glob('*.safetensors'))[1]
    lacking.unlink()
    with pytest.raises(ZooError, match=f'lacks {lacking.name}'):
        read_weights(tmp_path)


def test_convert_checkpoint(tmp_path):
    source = teacher()
    source.save_pretrained(tmp_path / 'teacher')
    (tmp_path / 'teacher' / 'tokenizer_config.json').write_text('{}')
    files = stage_files(tmp_path, student())
    folder = convert_checkpoint(tmp_path / 'teacher', files, tmp_path / 'made', softmax=[0, 3], dtype=torch.float32)
    made = AutoModelForImageTextToText.from_pretrained(folder)
    assert made.config.block_types == ['mha', 'mamba2', 'mamba2', 'mha']
    assert isinstance(made.layers[3].attention, HoVLEAttention)
    assert torch.equal(made.layers[3].attention.wo.weight, source.layers[3].attention.wo.weight)
    assert torch.equal(made.layers[1].attention.dt_bias, student().layers[1].attention.dt_bias + 2)
    assert (folder / 'tokenizer_config.json').is_file() and not list(tmp_path.glob('.made*'))
    assert AutoConfig.from_pretrained(folder).model_type == 'mmMamba_chat'
    with pytest.raises(ZooError, match='is there already'):
        convert_checkpoint(tmp_path / 'teacher', files, tmp_path / 'made')
    with pytest.raises(ZooError, match='the model has 4 layers'):
        convert_checkpoint(tmp_path / 'teacher', files, tmp_path / 'other', softmax=[9])
    assert not (tmp_path / 'other').exists()


PEAK = """
import sys, threading, time
import torch
import zoo.vlm
from transformers import AutoModelForImageTextToText

def resident():
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(sys.argv[3]))

torch.zeros(1) + 1
start, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident() - start)
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
assert all(bool(p.isfinite().all()) for p in model.parameters())
done = True
thread.join()
print(peak / size, size)
"""


@pytest.mark.slow
@pytest.mark.parametrize('dtype, memory', [('bfloat16', 'VmRSS'), ('float32', 'RssAnon')])
def test_loading_holds_the_weights_once(tmp_path, dtype, memory):
    """With a change of dtype, the file's own pages do not count: they are the kernel's to drop."""
    sizes = dict(hidden_size=1024, intermediate_size=12288, num_attention_heads=8, num_key_value_heads=4)
    made = config(
        embedding_config=dict(sizes, num_hidden_layers=2, llm_hidden_size=1024),
        llm_config=dict(sizes, num_hidden_layers=4),
    )
    net = HoVLELinearForConditionalGeneration(student_config(made, [0, 1, 3, 4, 5]))
    net.bfloat16().save_pretrained(tmp_path, max_shard_size='70MB')
    env_command = [sys.executable, '-c', PEAK, str(tmp_path), dtype, memory]
    out = subprocess.run(env_command, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) > 150e6 and float(out[0]) <= 1.3


def test_batches_train():
    net, inputs = student('hybrid').train(), batch(prompt([1], 12), prompt([1], 9, seed=1), side='right')
    out = net(**inputs, labels=inputs['input_ids'])
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
