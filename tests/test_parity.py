"""Outputs of the published implementations for regenerated weights, and the published sizes of every variant."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity.weights import image_batch, state_dict

import zoo

HERE = Path(__file__).parent / 'parity'
# language and diffusion models have tests of their own
CASES = sorted(p.stem for p in HERE.glob('*.json') if not p.stem.startswith(('hovle', 'linfusion', 'mmmamba')))

# Of the paper's variants: width(s), depth(s), parameters.
PLAIN = {
    'vig_tiny_patch16_224': (192, 3, 512, 5_834_536),
    'vig_small_patch16_224': (384, 6, 1024, 22_615_144),
    'vig_base_patch16_224': (768, 12, 2048, 89_022_184),
}
HIER = {
    'vig_hier_tiny_224': (96, (2, 2, 5, 2), (256, 512, 1024, 2048), 28_600_680),
    'vig_hier_small_224': (96, (2, 2, 17, 2), (256, 512, 1024, 2048), 50_051_688),
    'vig_hier_base_224': (128, (2, 2, 17, 2), (352, 704, 1376, 2752), 88_904_360),
}


class Case:
    def __init__(self, name, folder):
        self.manifest = json.loads((HERE / f'{name}.json').read_text())
        self.arrays = np.load(HERE / f'{name}.npz')
        file = folder / 'published.pth'
        weights, wrapper = state_dict(self.manifest, self.arrays), self.manifest['wrapper']
        torch.save({wrapper: weights} if wrapper else weights, file)
        kwargs = dict(pretrained=True, pretrained_cfg_overlay={'file': str(file)})
        self.model = timm.create_model(self.manifest['name'], **kwargs).eval()
        self.x = image_batch(self.manifest['inputs']['x'])
        with torch.no_grad():
            self.final, self.maps = self.model.forward_intermediates(self.x)
            self.logits = self.model.forward_head(self.final)
        if self.final.ndim == 3:
            self.final = self.final.transpose(1, 2)

    def limit(self, expected):
        """The case's own tolerance, times the array's size where that is large; else 1e-4 of the array's deviation."""
        atol = self.manifest.get('suggested_atol')
        return atol * max(1.0, float(expected.abs().max())) if atol else 1e-4 * float(expected.std())

    def close(self, actual, key):
        expected = torch.from_numpy(self.arrays[f'out/{key}'])
        limit = self.limit(expected)
        assert actual.shape == expected.shape, key
        error = float((actual - expected).abs().max())
        assert error <= limit, f'{key}: max abs error {error:.2e}, limit {limit:.1e}'

    def close_moments(self, x, key, index=None):
        """Mean and standard deviation over the pixels of (B, C, ...)."""
        x = x.flatten(2).double()
        for name, actual in (('mean', x.mean(2)), ('std', x.std(2, correction=0))):
            if index is None:
                self.close(actual.float(), f'{key}_{name}')
            else:
                expected = torch.from_numpy(self.arrays[f'out/{key}_{name}'][index])
                error = float((actual.float() - expected).abs().max())
                assert error <= self.limit(expected), f'{key}_{name}[{index}]'


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_cases_are_there():
    assert set(CASES) == {
        'vig_tiny_patch16_224',
        'vig_hier_tiny_224',
        'mobilemamba_t2',
        'mobilemamba_b1',
        'ravlt_tiny',
    }


def test_logits(case):
    expected = torch.from_numpy(case.arrays['out/logits'])
    assert float((case.logits - expected).abs().max()) <= case.manifest.get('suggested_atol', case.limit(expected))
    if 'logits_from_float64' in case.manifest['outputs']:
        case.close(case.logits, 'logits_from_float64')
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.x), case.logits)


def test_intermediate_statistics(case):
    outputs = case.manifest['outputs']
    if 'patch_embed_mean' in outputs:
        with torch.no_grad():
            stem = case.model.patch_embed(case.x)
        case.close_moments(stem.permute(0, 3, 1, 2), 'patch_embed')
    if 'feat_mean' in outputs:
        case.close_moments(case.final, 'feat')
    if 'pooled' in outputs:
        case.close(case.final.mean((2, 3)), 'pooled')
    for i, x in enumerate(case.maps, 1):
        if f'stage{i}_sub' in outputs:
            step = max(1, x.shape[2] // 7) if 'stage4_sub' in outputs else 2
            case.close(x[:, ::16, ::step, ::step], f'stage{i}_sub')
    if 'block_mean' in outputs:
        for i, x in enumerate(case.maps):
            case.close_moments(x, 'block', i)
    else:
        first = 0 if 'stage0_mean' in outputs else 1
        for i, x in enumerate(case.maps, first):
            case.close_moments(x, f'stage{i}')


def test_naive_scan_agrees(case):
    """The oracle of the scan, on a smaller picture: the fast path is no closer to the paper than to its own oracle."""
    x = case.x[:1, :, :64, :96]
    with torch.no_grad():
        fast = case.model(x)
        with zoo.kernel_backend('naive'):
            slow = case.model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=case.limit(slow))


def mixer_keys(prefix, dim, heads):
    return {
        f'{prefix}.in_proj.0.weight': (dim, 1, 3, 3),
        f'{prefix}.qkv_proj.weight': (2 * dim, dim),
        f'{prefix}.gk_proj.0.weight': (16, dim),
        f'{prefix}.gk_proj.1.weight': (dim, 16),
        f'{prefix}.gk_proj.1.bias': (dim,),
        f'{prefix}.g_proj.weight': (dim, dim),
        f'{prefix}.g_proj.bias': (dim,),
        f'{prefix}.g_norm.weight': (dim // heads,),
        f'{prefix}.l_norm.weight': (dim // heads,),
        f'{prefix}.o_proj.weight': (dim, dim),
    }


def with_bias(prefix, *shape):
    return {f'{prefix}.weight': shape, f'{prefix}.bias': shape[:1]}


def plain_keys(dim, heads, hidden):
    keys = {'pos_embed': (1, 196, dim)}
    keys |= with_bias('patch_embed.proj.0', dim // 2, 3, 9, 9) | with_bias('patch_embed.proj.1', dim // 2)
    keys |= with_bias('patch_embed.proj.3', dim, dim // 2, 3, 3) | with_bias('patch_embed.proj.4', dim)
    for i in range(12):
        keys |= {f'blocks.{i}.attn_norm.weight': (dim,), f'blocks.{i}.mlp_norm.weight': (dim,)}
        keys |= mixer_keys(f'blocks.{i}.attn', dim, heads)
        keys[f'blocks.{i}.mlp.gate_proj.weight'] = (2 * hidden, dim)
        keys[f'blocks.{i}.mlp.down_proj.weight'] = (dim, hidden)
    return keys | {'norm.weight': (dim,)} | with_bias('head', 1000, dim)


def hier_keys(width, depths, hidden):
    keys = with_bias('patch_embed.0', width // 2, 3, 3, 3) | with_bias('patch_embed.2', width // 2)
    keys |= with_bias('patch_embed.5', width, width // 2, 3, 3) | with_bias('patch_embed.7', width)
    for s, depth in enumerate(depths):
        dim = width * 2**s
        for j in range(depth):
            block = f'layers.{s}.blocks.{j}'
            keys |= with_bias(f'{block}.norm', dim) | with_bias(f'{block}.norm2', dim)
            keys |= mixer_keys(f'{block}.op', dim, dim // 32)
            keys |= {f'{block}.mlp.fc1.weight': (2 * hidden[s], dim), f'{block}.mlp.fc2.weight': (dim, hidden[s])}
        if s < 3:
            down = f'layers.{s}.downsample'
            keys |= with_bias(f'{down}.1', 2 * dim, dim, 3, 3) | with_bias(f'{down}.3', 2 * dim)
    return keys | with_bias('classifier.norm', 8 * width) | with_bias('classifier.head', 1000, 8 * width)


@pytest.mark.parametrize('name', [*PLAIN, *HIER])
def test_published_keys_and_sizes(name):
    """The state dict has the published key names and shapes, so that the authors' files load without renaming."""
    make, variants = (plain_keys, PLAIN) if name in PLAIN else (hier_keys, HIER)
    *args, params = variants[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == make(*args)
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(math.prod(s) for s in make(*args).values()) == params


@pytest.mark.parametrize('name', [*PLAIN, *HIER])
def test_default_scale_of_the_directions(name):
    """Plain ViG was evaluated with a quarter of the sum of the directions, ViG-H with half."""
    with torch.device('meta'):
        model = timm.create_model(name)
        other = timm.create_model(name, merge_scale=0.5 if name in PLAIN else 0.25)
    for (mixer, _), (other_mixer, _) in zip(model.token_mixers(), other.token_mixers(), strict=True):
        assert model.get_submodule(mixer).merge_scale == (0.25 if name in PLAIN else 0.5)
        assert other.get_submodule(other_mixer).merge_scale == (0.5 if name in PLAIN else 0.25)


def mixer_in_fp64(mixer, u, merge_scale):
    """The paper's formulas term by term on (B, h, w, C), attention-like: every pair of tokens, no recurrence."""
    batch, height, width, dim = u.shape
    heads, length = mixer.num_heads, height * width
    p = {k: v.double() for k, v in mixer.state_dict().items()}
    x = torch.nn.functional.conv2d(u.permute(0, 3, 1, 2), p['in_proj.0.weight'], padding=1, groups=dim)
    x = x.flatten(2).transpose(1, 2)
    x = torch.nn.functional.silu(x) if mixer.conv_act else x

    def split(t):
        return t.reshape(batch, length, heads, -1).transpose(1, 2)

    q, k, v = (split(t) for t in (x @ p['qkv_proj.weight'].T).split((dim // 2, dim // 2, dim), -1))
    z = x @ p['gk_proj.0.weight'].T @ p['gk_proj.1.weight'].T + p['gk_proj.1.bias']
    g_fwd, g_bwd = (split(t.sigmoid().log() / 16) for t in z.chunk(2, -1))
    c_fwd, c_bwd = g_fwd.cumsum(2), g_bwd.cumsum(2)
    i, j = torch.meshgrid(torch.arange(length), torch.arange(length), indexing='ij')
    # Forward: gates of j + 1 .. i; backward: gates of i .. j - 1. The token itself is in both directions.
    forward = (c_fwd[:, :, :, None] - c_fwd[:, :, None]).exp()
    before = c_bwd - g_bwd
    backward = (before[:, :, None] - before[:, :, :, None]).exp()
    decay = forward * (j <= i)[..., None] + backward * (j >= i)[..., None]
    scores = torch.einsum('bhik,bhijk,bhjk->bhij', q * q.shape[-1] ** -0.5, decay, k)
    o = (scores @ v) * merge_scale

    def rms(t, weight):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    s = split((x @ p['g_proj.weight'].T + p['g_proj.bias']).sigmoid())
    y = s * rms(o, p['g_norm.weight']) + (1 - s) * rms(split(x), p['l_norm.weight'])
    y = y.transpose(1, 2).reshape(batch, length, dim)
    y = torch.nn.functional.silu(y) if mixer.out_act else y
    return (y @ p['o_proj.weight'].T).reshape(u.shape)


@pytest.mark.parametrize('merge_scale', [0.25, 0.5])
@pytest.mark.parametrize('name', ['test_vig', 'test_vig_hier'])
def test_mixer_against_its_formulas(name, merge_scale):
    """With a scan output near sqrt(eps), where the factor on the directions shows; the recorded cases are too large."""
    model = timm.create_model(name, merge_scale=merge_scale).eval()
    mixer = model.get_submodule(model.token_mixers()[0][0])
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.5))
        mixer.g_norm.weight.fill_(1.0)
        u = torch.randn(2, 5, 7, mixer.qkv_proj.in_features)
        expected = mixer_in_fp64(mixer, u.double(), merge_scale)
        other = mixer_in_fp64(mixer, u.double(), 0.75 - merge_scale)
        actual = mixer(u).double()
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-3 * scale, 'the case does not see the factor'
