"""RAVLT: published keys and sizes, both mixers against their formulas, published files of every kind, small images."""

import argparse
import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo.tools._load import build

# Of the paper's variants: widths, depths, heads, layer scales at the start, parameters, state-dict entries.
VARIANTS = {
    'ravlt_tiny': ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), (1, 1, 1, 1), 14_897_768, 302),
    'ravlt_small': ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), (1, 1, 1, 1), 25_591_208, 462),
    'ravlt_base': ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (1, 1, 1e-6, 1e-6), 48_241_288, 622),
    'ravlt_large': ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 4 * (1e-6,), 95_242_440, 822),
}


def with_bias(prefix, *shape):
    return {f'{prefix}.weight': shape, f'{prefix}.bias': shape[:1]}


def batch_norm(prefix, dim):
    running = {f'{prefix}.running_mean': (dim,), f'{prefix}.running_var': (dim,), f'{prefix}.num_batches_tracked': ()}
    return with_bias(prefix, dim) | running


def block_keys(prefix, dim):
    hidden = int(3.5 * dim)
    keys = {f'{prefix}.gamma_{i}': (1, dim, 1, 1) for i in (1, 2)}
    keys |= with_bias(f'{prefix}.pos', dim, 1, 3, 3)
    keys |= with_bias(f'{prefix}.norm1.norm', dim) | with_bias(f'{prefix}.norm2.norm', dim)
    keys |= with_bias(f'{prefix}.attn.qkvo', 4 * dim, dim, 1, 1) | with_bias(f'{prefix}.attn.lepe', dim, 1, 5, 5)
    keys |= with_bias(f'{prefix}.attn.proj', dim, dim, 1, 1) | with_bias(f'{prefix}.ffn.fc1', hidden, dim, 1, 1)
    return keys | with_bias(f'{prefix}.ffn.dwconv', hidden, 1, 3, 3) | with_bias(f'{prefix}.ffn.fc2', dim, hidden, 1, 1)


def published_keys(dims, depths, heads):
    keys, half = {}, dims[0] // 2
    for i, (outside, inside) in enumerate(((half, 3), (half, half), (half, half), (dims[0], half))):
        keys |= with_bias(f'patch_embed.proj.{3 * i}', outside, inside, 3, 3)
        keys |= batch_norm(f'patch_embed.proj.{3 * i + 1}', outside)
    for i, (dim, depth) in enumerate(zip(dims, depths)):
        keys[f'layers.{i}.RoPE.angle'] = (dim // heads[i] // 2,)
        for j in range(depth):
            keys |= block_keys(f'layers.{i}.blocks.{j}', dim)
        if i < 3:
            keys |= with_bias(f'layers.{i}.downsample.reduction', dims[i + 1], dim, 3, 3)
            keys |= batch_norm(f'layers.{i}.downsample.norm', dims[i + 1])
    keys |= with_bias('proj', 1024, dims[3], 1, 1) | batch_norm('norm', 1024)
    return keys | with_bias('head', 1000, 1024)


@pytest.mark.parametrize('name', VARIANTS)
def test_published_keys_and_sizes(name):
    """And two stages of each kind of attention: what `zoo info` says is what runs."""
    *shape, _, params, entries = VARIANTS[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    keys = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert keys == published_keys(*shape)
    assert len(keys) == entries and sum(p.numel() for p in model.parameters()) == params
    kinds = [kind for _, kind in model.token_mixers()]
    linear = sum(shape[1][:2])
    assert len(kinds) == sum(shape[1])
    assert all('linear' in kind for kind in kinds[:linear]) and all('softmax' in kind for kind in kinds[linear:])


@pytest.mark.parametrize('name', VARIANTS)
def test_layer_scales_and_drop_path_by_stage(name, monkeypatch):
    """The published variants' starting values, read where the blocks are made: their weights need not be."""
    _, depths, _, scales, *_ = VARIANTS[name]
    made = []

    class Block(torch.nn.Module):
        def __init__(self, dim, attn, hidden, layer_scale, drop_path, **kwargs):
            super().__init__()
            made.append((layer_scale, drop_path))

    monkeypatch.setattr(sys.modules['zoo.backbones.ravlt'], 'RAVLTBlock', Block)
    with torch.device('meta'):
        timm.create_model(name, drop_path_rate=0.4)
    assert [scale for scale, _ in made] == [s for s, depth in zip(scales, depths) for _ in range(depth)]
    torch.testing.assert_close([rate for _, rate in made], torch.linspace(0, 0.4, sum(depths)).tolist())


@torch.no_grad()
def test_scales_in_the_weights():
    """A layer scale inside the projections' weights multiplies the branch; none at all is a scale of 1."""
    without = timm.create_model('test_ravlt', layer_scale=()).eval()
    scaled = timm.create_model('test_ravlt').eval()
    assert not [k for k in without.state_dict() if 'gamma' in k]
    assert scaled.load_state_dict(without.state_dict(), strict=False).missing_keys
    x = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(without(x), scaled(x), rtol=1e-4, atol=1e-5)
    linear, scale, y = scaled.layers[1].blocks[0].ffn.fc2, torch.randn(1, 32, 1, 1), torch.randn(2, 3, 5, 112)
    torch.testing.assert_close(linear(y, scale), linear(y) * scale.flatten())


def attention_in_fp64(attn, x, linear):
    """proj((attention + DWConv5x5(v)) * o) on (B, h, w, C), attention pair by pair of tokens."""
    batch, height, width, dim = x.shape
    heads, tokens, d = attn.num_heads, height * width, dim // attn.num_heads
    p = {k: v.double() for k, v in attn.state_dict().items()}
    maps = F.conv2d(x.permute(0, 3, 1, 2), p['qkvo.weight'], p['qkvo.bias'])
    lepe = F.conv2d(maps[:, 2 * dim : 3 * dim], p['lepe.weight'], p['lepe.bias'], padding=2, groups=dim)
    q, k, v, o = maps.reshape(batch, 4, heads, d, tokens).transpose(-1, -2).unbind(1)
    frequency = torch.tensor([10000 ** (-t / (d // 4 - 1)) for t in range(d // 4)], dtype=torch.float64)
    row, col = torch.arange(tokens) // width, torch.arange(tokens) % width
    angle = torch.cat((row[:, None] * frequency, col[:, None] * frequency), 1)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rope(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    if linear:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        share = (q.mean(-2, keepdim=True) @ k.mT * d**-0.5).softmax(-1)
        weights = rope(q) @ rope(k).mT * share / ((q @ k.mT * share).sum(-1, keepdim=True) + 1e-6)
    else:
        weights = (rope(q) @ rope(k).mT * d**-0.5).softmax(-1)
    y = (weights @ v + lepe.reshape(batch, heads, d, tokens).mT) * o
    y = y.mT.reshape(batch, dim, height, width)
    return F.conv2d(y, p['proj.weight'], p['proj.bias']).permute(0, 2, 3, 1)


@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_attention_against_its_formulas(stage):
    attn = timm.create_model('test_ravlt').layers[stage].blocks[0].attn
    with torch.no_grad():
        for p in attn.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5))
        x = torch.randn(2, 5, 7, attn.qkvo.in_channels)
        actual = attn(x).double()
        expected = attention_in_fp64(attn, x.double(), stage < 2)
        other = attention_in_fp64(attn, x.double(), stage >= 2)
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-2 * scale, 'the case does not tell the kinds apart'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_small_layer_scales_in_half_precision(dtype):
    """A scale of 1e-6 still gets its gradient; in fp16 those of the weights behind it may need more loss scaling."""
    model = timm.create_model('test_ravlt', layer_scale=4 * (1e-6,), num_classes=4).train()
    with torch.autocast('cpu', dtype):
        loss = model(torch.randn(2, 3, 64, 64)).float().square().sum()
    (loss * 1024).backward()
    for block in (block for stage in model.layers for block in stage.blocks):
        scales, weights = [block.gamma_1, block.gamma_2], [block.attn.proj.weight, block.ffn.fc2.weight]
        assert all(p.grad.isfinite().all() for p in scales + weights)
        assert all(p.grad.abs().max() > 0 for p in (scales if dtype == torch.float16 else scales + weights))


@torch.no_grad()
def test_file_as_the_training_script_writes_it(tmp_path):
    """Raw and averaged weights beside an argparse.Namespace; the averaged ones are taken, by every route."""
    torch.manual_seed(1)
    source, raw = timm.create_model('test_ravlt').eval(), timm.create_model('test_ravlt').eval()
    weights = {k: v[..., None, None] if k == 'head.weight' else v for k, v in source.state_dict().items()}
    args = argparse.Namespace(lr=5e-4, model='RAVLT_T', opt_betas=None, data_set='IMNET')
    file = tmp_path / 'RAVLT_T.pth'
    torch.save({'model': raw.state_dict(), 'model_ema': weights, 'epoch': 299, 'args': args}, file)
    x = torch.randn(1, 3, 64, 64)
    overlay = {'pretrained_cfg_overlay': {'file': str(file)}}
    for model in (
        timm.create_model('test_ravlt', pretrained=True, **overlay),
        timm.create_model('test_ravlt', checkpoint_path=str(file)),
        build('test_ravlt', checkpoint=file),
    ):
        assert torch.equal(model.eval()(x), source(x))
    overlay = {'state_dict': timm.models.load_state_dict(str(file), use_ema=False)}
    model = timm.create_model('test_ravlt', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.eval()(x), raw(x))


@torch.no_grad()
def test_backbone_of_a_detector(tmp_path):
    source = timm.create_model('test_ravlt').eval()
    weights = {f'backbone.{k}': v for k, v in source.state_dict().items() if not k.startswith(('proj', 'norm', 'head'))}
    weights |= {f'backbone.extra_norms.0.norm.{k}': torch.ones(16) for k in ('weight', 'bias')}
    weights |= {'neck.lateral_convs.0.conv.weight': torch.ones(1), 'bbox_head.retina_cls.bias': torch.ones(1)}
    file = tmp_path / 'retinanet.pth'
    torch.save({'meta': {'epoch': 12}, 'state_dict': weights}, file)
    overlay = dict(pretrained=True, pretrained_cfg_overlay={'file': str(file)})
    model = timm.create_model('test_ravlt', features_only=True, **overlay).eval()
    x = torch.randn(1, 3, 65, 96)
    for a, b in zip(model(x), source.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match='missing.*proj.weight'):
        timm.create_model('test_ravlt', **overlay)


def test_rotation_tables_of_a_file():
    model = timm.create_model('test_ravlt')
    weights = model.state_dict()
    key = 'layers.0.RoPE.angle'
    model.load_state_dict({k: v for k, v in weights.items() if 'RoPE' not in k})
    model.load_state_dict({k: v.bfloat16() if 'RoPE' in k else v for k, v in weights.items()})
    assert model.state_dict()[key].dtype == torch.float32
    exponents = -torch.arange(4) / 4  # t / m instead of t / (m - 1)
    with pytest.raises(RuntimeError, match=key):
        model.load_state_dict(weights | {key: torch.pow(10000, exponents).repeat_interleave(2)})


def test_small_images():
    """Smaller strides of the stem take the same weights; a native 32 px network keeps its maps from vanishing."""
    published = timm.create_model('test_ravlt').state_dict()
    for stride in (4, 2, 1):
        model = timm.create_model('test_ravlt', stem_stride=stride).eval()
        model.load_state_dict(published)
        with torch.no_grad():
            maps = model.forward_intermediates(torch.randn(1, 3, 32, 40), intermediates_only=True)
        expected = [(math.ceil(32 / (stride * 2**i)), math.ceil(40 / (stride * 2**i))) for i in range(4)]
        assert [tuple(m.shape[2:]) for m in maps] == expected
        assert [info['reduction'] for info in model.feature_info] == [stride * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ('kwargs', 'words'),
    [
        ({'stem_stride': 3}, 'stem_stride must be one of 4, 2, 1'),
        ({'mixers': ('linear', 'linear', 'linear', 'soft')}, 'mixers must name'),
        ({'num_heads': (1, 2, 5, 4)}, 'num_heads = 5'),
        ({'num_heads': (4, 2, 3, 4)}, 'at least 8'),
        ({'global_pool': 'max'}, 'global_pool'),
    ],
)
def test_arguments_that_do_not_fit(kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model('test_ravlt', **kwargs)


def test_all_linear():
    """The kinds are an argument: the softmax stages can be linear too."""
    model = timm.create_model('test_ravlt', mixers=4 * ('linear',)).eval()
    assert all('linear' in kind for _, kind in model.token_mixers())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), zoo.kernel_backend('naive'):
        slow = model(x)
    torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)


def test_weight_layouts_of_convolutions():
    """Channels-last parameters (`Classify(channels_last=True)`) compute the same."""
    model = timm.create_model('test_ravlt').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.head, nn.Linear)


@pytest.mark.slow
def test_kernels_inside_the_network():
    """Triton's kernels (interpreted where there is no GPU) get the views that the network makes, gradients included."""
    model = timm.create_model('test_ravlt', depths=(1, 1, 1, 1), stem_stride=2, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 10, 14)

    def run(backend):
        model.zero_grad()
        with zoo.kernel_backend(backend):
            out = model(x)
            out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    (out, grads), (expected, wanted) = run('triton'), run('torch')
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        error = (grad - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-6)
        assert error < 1e-3, f'{name}: relative error {error:.1e}'
