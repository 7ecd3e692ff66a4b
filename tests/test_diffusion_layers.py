"""Layers of diffusers in Triton kernels: same results, same names, and everything undone."""

from __future__ import annotations

import copy

import pytest
import tiny_diffusion as tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models import attention_processor as processors
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

import zoo
from zoo.diffusion.highres import Savings, _blend, savings
from zoo.diffusion.layers import FastAttention, FastGEGLU, FastGroupNorm, FastGroupNormSiLU, fast_layers, plain_layers
from zoo.diffusion.memory import peak_bytes
from zoo.tools._unet_rows import build_pipeline, step_inputs, unet_config

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(scope='module')
def pipe():
    return build_pipeline('sd15', DEVICE, torch.float32, True)[0]


@torch.no_grad()
def outputs(pipe) -> list[torch.Tensor]:
    args, named = step_inputs(pipe.unet, 64, 2)
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    image = pipe.vae.decode(z)[0]
    return [pipe.unet(*args, **named)[0], image, pipe.vae.encode(image).latent_dist.mean]


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_results_and_names_stay(pipe, backend):
    plain, names, classes = outputs(pipe), set(pipe.unet.state_dict()), [type(m) for m in pipe.unet.modules()]
    changed = fast_layers(pipe)
    try:
        kinds = [type(m) for m in (*pipe.unet.modules(), *pipe.vae.modules())]
        assert nn.GroupNorm not in kinds and {FastGEGLU, FastGroupNorm, FastGroupNormSiLU} <= set(kinds)
        assert fast_layers(pipe) == changed == sum(k.__module__.endswith('diffusion.layers') for k in kinds)
        assert set(pipe.unet.state_dict()) == names
        with zoo.kernel_backend(backend):
            for found in (outputs(pipe), outputs(copy.deepcopy(pipe))):
                for x, y in zip(found, plain, strict=True):
                    assert ((x - y).norm() / y.norm()).item() < 1e-5
    finally:
        plain_layers(pipe)
    assert [type(m) for m in pipe.unet.modules()] == classes
    assert all(torch.equal(x, y) for x, y in zip(outputs(pipe), plain, strict=True))


def test_blocks_that_scale_after_the_norm_keep_their_activation():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=16, time_embedding_norm='scale_shift').eval()
    x, temb = torch.randn(2, 8, 5, 7), torch.randn(2, 16)
    plain = block(x, temb)
    assert fast_layers(block) == 2 and type(block.norm2) is FastGroupNorm
    torch.testing.assert_close(block(x, temb), plain)


def test_blocks_of_videos_keep_their_activation():
    from diffusers.models.resnet import TemporalResnetBlock

    torch.manual_seed(0)
    block = TemporalResnetBlock(32, 32, temb_channels=16).eval()
    x, temb = torch.randn(1, 32, 3, 5, 7), torch.randn(1, 3, 16)
    plain = block(x, temb)
    fast_layers(block)
    torch.testing.assert_close(block(x, temb), plain)


def test_gradients_and_autocast():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=('DownEncoderBlock2D',),
                        up_block_types=('UpDecoderBlock2D',)).to(DEVICE)  # fmt: skip
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    grads = []
    for change in (lambda m: None, fast_layers):
        change(vae)
        vae.zero_grad()
        vae(x).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert vae.encoder.conv_norm_out(torch.randn(1, 8, 4, 4, device=DEVICE)).dtype == torch.bfloat16


@pytest.mark.parametrize('axis', [2, 3])
def test_tiles_blend_as_diffusers_has_it(axis):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=('DownEncoderBlock2D',),
                        up_block_types=('UpDecoderBlock2D',))  # fmt: skip
    theirs = vae.blend_v if axis == 2 else vae.blend_h
    for extent in (0, 3, 50):
        a, b = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 7, 7)
        if axis == 2:
            a = a[:, :, :, :7]
        else:
            a = a[:, :, :7]
        torch.testing.assert_close(_blend(axis)(a, b.clone(), extent), theirs(a, b.clone(), extent))


# --------------------------------------------------------------------------------------------------------------------
# Attention


def without(model):
    """The model with diffusers' attention, everything else as it is."""
    for module in model.modules():
        if type(module) is FastAttention:
            module.__class__ = Attention
    return model


@pytest.fixture
def long_way(monkeypatch):
    """Which layers went through diffusers' forward."""
    calls, plain = [], Attention.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Attention, 'forward', forward)
    return calls


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', ['sd15', 'sdxl'])
@torch.no_grad()
def test_attention_is_that_of_diffusers(name, fused, long_way):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_config(name, quick=True)[0]).eval()
    args, named = step_inputs(unet, 72, 2)
    if fused:
        unet.fuse_qkv_projections()
    fast_layers(unet)
    layers = [m for m in unet.modules() if isinstance(m, Attention)]
    assert {type(m) for m in layers} == {FastAttention}
    one, again = unet(*args, **named)[0], copy.deepcopy(unet)(*args, **named)[0]
    assert not long_way
    expected = without(unet)(*args, **named)[0]
    assert len(long_way) == len(layers)
    assert torch.equal(one, expected) and torch.equal(again, expected)
    fast_layers(unet)
    with savings(unet, Savings(chunk_guidance=True)):
        torch.testing.assert_close(unet(*args, **named)[0], expected)
    plain_layers(unet)
    assert {type(m) for m in layers} == {Attention}


def ask(layer, x, **how):
    torch.manual_seed(0)  # of dropout
    return layer(x, **how)


TEXT, MASK = torch.randn(2, 5, 24), torch.zeros(2, 1, 5).index_fill(2, torch.tensor([4]), -1e4)
ASKED = {
    'mask': ({}, {'encoder_hidden_states': TEXT, 'attention_mask': MASK}),
    'unknown keywords': ({}, {'encoder_hidden_states': TEXT, 'unknown': 1}),
    'keywords': ({}, {'encoder_hidden_states': TEXT, 'temb': None}),
    'image': ({'cross_attention_dim': None}, {}),
    'norms of heads': ({'qk_norm': 'layer_norm'}, {'encoder_hidden_states': TEXT}),
    'norm of the text': ({'cross_attention_norm': 'layer_norm'}, {'encoder_hidden_states': TEXT}),
    'norm and residual': ({'norm_num_groups': 4, 'residual_connection': True}, {'encoder_hidden_states': TEXT}),
    'rescaled': ({'rescale_output_factor': 2.0}, {'encoder_hidden_states': TEXT}),
    'slices': ({'processor': processors.SlicedAttnProcessor(1)}, {'encoder_hidden_states': TEXT}),
    'matrices': ({'processor': processors.AttnProcessor()}, {'encoder_hidden_states': TEXT}),
}


@pytest.mark.parametrize('asked', ASKED)
def test_attention_leaves_the_rest_to_diffusers(asked, long_way):
    made, how = ASKED[asked]
    layer = Attention(16, **({'cross_attention_dim': 24, 'heads': 2, 'dim_head': 8} | made)).eval()
    x = torch.randn(2, 16, 3, 3) if asked == 'image' else torch.randn(2, 9, 16)
    expected = ask(layer, x, **how)
    layer.__class__ = FastAttention
    assert torch.equal(ask(layer, x, **how), expected) and len(long_way) == 2
    layer.__class__ = Attention
    fast_layers(layer)
    assert (type(layer) is Attention) == asked.startswith(('norm', 'rescaled'))


@pytest.mark.parametrize('heads', [2, 4])
def test_attention_with_dropout_hooks_and_odd_batches(heads, long_way):
    layer = Attention(16, 24, heads=heads, dim_head=8, dropout=0.5, bias=True)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append('layer'))
    layer.to_k.register_forward_hook(lambda _, __, y: y * 2)
    x, text = torch.randn(4, 9, 16), torch.randn(2, 5, 24)  # two images to a text, as diffusers folds them
    for training in (True, False):
        layer.train(training)
        layer.to_out[1].register_forward_hook(lambda *_: seen.append('dropout'))
        for given in (torch.cat([text, text]), text):
            expected, found = ask(layer, x, encoder_hidden_states=given), seen[:]
            seen.clear(), long_way.clear()
            assert fast_layers(layer) == 1
            assert torch.equal(ask(layer, x, encoder_hidden_states=given), expected)
            assert seen == found and not long_way
            plain_layers(layer), seen.clear()


def test_attention_with_adapters():
    """LoRA, image prompts, slices, another processor and training, after `fast_layers`."""
    from peft import LoraConfig

    unet = tiny.unet()
    fast_layers(unet)
    plain = tiny.step(unet)
    unet.set_attention_slice('auto')
    assert torch.equal(tiny.step(unet), tiny.step(without(copy.deepcopy(unet))))
    unet.set_attn_processor(processors.AttnProcessor2_0())
    assert torch.equal(tiny.step(unet), plain)
    unet.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_k', 'to_v', 'to_out.0'], init_lora_weights=False))
    assert (tiny.step(unet) - plain).abs().max() > 1e-3
    assert torch.equal(tiny.step(unet), tiny.step(without(copy.deepcopy(unet))))
    unet.enable_gradient_checkpointing()
    grads = []
    for model in (copy.deepcopy(unet).train(), without(copy.deepcopy(unet)).train()):
        model(*tiny.inputs()).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    named = tiny.load_ip_adapter(unet)
    found = tiny.step(unet, **named)
    assert (found - tiny.step(unet, added_cond_kwargs={'image_embeds': [torch.zeros(2, 1, 16)]})).abs().max() > 1e-3
    assert torch.equal(found, tiny.step(without(copy.deepcopy(unet)), **named))


@pytest.mark.parametrize('fused', [False, True])
def test_attention_compiles_casts_and_needs_no_more_memory(fused):
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=24).eval()
    if fused:
        for layer in (block.attn1, block.attn2):
            layer.fuse_projections()
            layer.set_processor(processors.FusedAttnProcessor2_0())
    fast_layers(block)
    x, text = torch.randn(2, 9, 16), torch.randn(2, 5, 24)
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, encoder_hidden_states=text), block(x, encoder_hidden_states=text))
    attend = lambda layer, x, text: layer(x, encoder_hidden_states=text)  # noqa: E731
    with torch.autocast('cpu', torch.bfloat16):
        found = attend(block.attn2, x, text)
        assert found.dtype == torch.bfloat16 and torch.equal(found, attend(without(block).attn2, x, text))
    text, x = text.to('meta'), x.to('meta')
    plain, fast = copy.deepcopy(block).to('meta').attn2, block.to('meta').attn2
    fast_layers(fast)
    assert 0 < peak_bytes(lambda: attend(fast, x, text)) <= peak_bytes(lambda: attend(plain, x, text))
