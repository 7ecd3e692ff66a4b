"""What only MobileMamba has: the channel split, wavelets, folding before and after loading, two heads."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from zoo.backbones.mobilemamba import HAAR, split_channels
from zoo.kernels.wavelet import haar_analysis, haar_synthesis, wavelet_conv2d

import zoo
from zoo.errors import ZooError
from zoo.tools.export import cli_export, relative_error

PARITY = Path(__file__).parent / 'parity'
NAME = 'test_mobilemamba'
# Parameters, tensors of the state dict and input size as published; frozen wavelet filters are buffers here.
PUBLISHED = {
    'mobilemamba_t2': (8_806_682, 547, 192, 8_836_890),
    'mobilemamba_t4': (14_137_690, 547, 192, 14_176_090),
    'mobilemamba_s6': (14_996_696, 547, 224, 15_036_632),
    'mobilemamba_b1': (17_070_625, 707, 256, 17_122_849),
    'mobilemamba_b2': (17_070_625, 707, 384, 17_122_849),
    'mobilemamba_b4': (17_070_625, 707, 512, 17_122_849),
}
# Of the paper's widths: global, local and identity channels.
SPLITS = {
    (144, 0.8, 0.2): (112, 28, 4),
    (176, 0.8, 0.2): (144, 32, 0),
    (192, 0.8, 0.2): (160, 32, 0),
    (200, 0.8, 0.2): (160, 40, 0),
    (272, 0.7, 0.2): (192, 54, 26),
    (368, 0.7, 0.2): (256, 73, 39),
    (384, 0.7, 0.2): (272, 76, 36),
    (376, 0.7, 0.2): (256, 75, 45),
    (368, 0.6, 0.3): (224, 110, 34),
    (448, 0.6, 0.3): (272, 134, 42),
    (40, 0.6, 0.3): (32, 8, 0),  # a remainder of 8 goes up, and local channels give way
}


def randomised(name=NAME, **kwargs):
    """A model in which no branch, scale or statistic is trivial."""
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(('bn.weight', 'bn1.weight', 'bn2.weight', 'scale.weight', 'scale.0.weight', 'Ds')):
                p.copy_(0.5 + 0.5 * torch.rand_like(p))
            elif p.ndim == 1 or key.endswith('A_logs'):
                p.copy_(0.2 * torch.randn_like(p))
        for key, b in model.named_buffers():
            if key.endswith('running_mean'):
                b.copy_(0.2 * torch.randn_like(b))
            elif key.endswith('running_var'):
                b.copy_(0.5 + torch.rand_like(b))
    return model


@pytest.mark.parametrize('args', SPLITS)
def test_channel_split(args):
    assert split_channels(*args) == SPLITS[args]


def test_channel_split_refuses():
    with pytest.raises(ValueError, match='global_ratio'):
        split_channels(48, 0.1, 0.2)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
    params, tensors, size, with_filters = PUBLISHED[name]
    with torch.device('meta'):
        model = timm.create_model(name)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(state) == tensors
    assert params + sum(v.numel() for k, v in state.items() if k.endswith('wt_filter')) == with_filters
    assert model.default_cfg['input_size'] == (3, size, size) and model.default_cfg['crop_pct'] == 0.875
    dagger = timm.models.get_pretrained_cfg(f'{name}.in1k_kd')
    assert dagger.hf_hub_filename.endswith(f'{name}s.pth') and dagger.input_size == (3, size, size)


@pytest.mark.parametrize('name', ['mobilemamba_t2', 'mobilemamba_b1'])
def test_published_keys(name):
    keys = json.loads((PARITY / f'{name}.json').read_text())['keys']
    with torch.device('meta'):
        state = timm.create_model(name).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {k: spec['shape'] for k, spec in keys.items()}


def published_wavelets(x, weight, scale, filters):
    """The reference's wavelet branch: strided convolutions with the stored filters, bands innermost."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    bands = F.conv2d(x, filters, stride=2, groups=x.shape[1])
    bands = F.conv2d(bands, weight, padding=weight.shape[-1] // 2, groups=bands.shape[1]) * scale
    return F.conv_transpose2d(bands, filters, stride=2, groups=x.shape[1])[:, :, :height, :width]


@pytest.mark.parametrize('size', [(8, 6), (5, 8), (7, 3), (1, 1)])
def test_wavelet_branch_is_the_published_one(size):
    op = next(m for m in randomised().modules() if hasattr(m, 'wavelet_convs'))
    x = torch.randn(2, op.wt_filter.shape[0] // 4, *size).contiguous(memory_format=torch.channels_last)
    weight, scale = op.wavelet_convs[0].weight, op.wavelet_scale[0].weight
    with torch.no_grad():
        expected = published_wavelets(x, weight, scale, op.wt_filter)
        torch.testing.assert_close(wavelet_conv2d(x, op.wavelet_weight()), expected, rtol=1e-5, atol=1e-6)
        with zoo.kernel_backend('naive'):
            torch.testing.assert_close(wavelet_conv2d(x, op.wavelet_weight()), expected, rtol=1e-5, atol=1e-6)


def test_wavelet_gradients_and_mistakes():
    x, weight = torch.randn(1, 2, 5, 4).double().requires_grad_(), torch.randn(8, 1, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(wavelet_conv2d, (x, weight))
    for bad, words in (
        ((x[0], weight), 'x must be'),
        ((x, weight[1:]), 'weight must be'),
        ((x, weight[..., :2]), 'odd'),
    ):
        with pytest.raises(ValueError, match=words):
            wavelet_conv2d(*bad)


def test_wavelets_reconstruct():
    x = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(haar_synthesis(haar_analysis(x)) / 4, x)
    assert torch.tensor(HAAR) == torch.tensor(0.70710677) ** 2


@pytest.mark.parametrize('kwargs', [{}, {'distillation': True}, {'stem_stride': 2}, {'num_classes': 0}], ids=str)
def test_fusing_changes_nothing(kwargs):
    model = randomised(**kwargs)
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        for size in ((64, 64), (97, 70)):
            x = torch.randn(2, 3, *size)
            assert relative_error(fused(x), model(x)) < 1e-5
        for a, b in zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert relative_error(a, b) < 1e-5
    norms = [n for n, m in fused.named_modules() if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    assert norms == (['head.bn'] if kwargs == {'num_classes': 0} else [])
    assert not [k for k in fused.state_dict() if 'filter' in k or 'base_scale' in k or 'wavelet_scale' in k]
    assert [n for n, _ in fused.token_mixers()] == [n for n, _ in model.token_mixers()]
    again = {k: v.clone() for k, v in fused.state_dict().items()}
    assert all(torch.equal(v, again[k]) for k, v in fused.fuse().state_dict().items()), 'fusing twice'


@pytest.mark.parametrize('name', ['mobilemamba_t2', 'mobilemamba_t4', 'mobilemamba_b1'])
def test_fused_stem_has_aligned_widths(name):
    with torch.device('meta'):
        model = timm.create_model(name, fuse=True)
        assert not any(m.weight.shape[0] % 8 for m in (model.patch_embed[i] for i in (0, 2, 4, 6)))
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_timm_folds_it_too():
    model = randomised()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-5


def test_load_then_fold(tmp_path):
    """Unfolded files load into a fused model by every route; folded files do not load into an unfolded one."""
    model = randomised(num_classes=7)
    torch.save({'net': {}, 'net_E': model.state_dict()}, tmp_path / 'w.pth')
    fused = copy.deepcopy(model).fuse()
    torch.save(fused.state_dict(), tmp_path / 'folded.pth')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fused(x)
        for file in ('w.pth', 'folded.pth'):
            overlay = {'file': str(tmp_path / file), 'num_classes': 7}
            for kwargs in (
                dict(pretrained=True, pretrained_cfg_overlay=overlay),
                dict(checkpoint_path=str(tmp_path / file)),
            ):
                loaded = timm.create_model(NAME, num_classes=7, fuse=True, **kwargs)
                assert loaded.folded and torch.equal(loaded(x), expected)
        maps = timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, fuse=True, features_only=True
        )
        for a, b in zip(maps(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert relative_error(a, b) < 1e-5
        for classes in (0, 3):
            other = timm.create_model(
                NAME,
                pretrained=True,
                pretrained_cfg_overlay={**overlay, 'file': str(tmp_path / 'w.pth')},
                num_classes=classes,
                fuse=True,
            )
            pooled = other.forward_features(x)
            assert relative_error(pooled, model.forward_features(x)) < 1e-5
    with pytest.raises(RuntimeError, match='fuse=True'):
        timm.create_model(NAME, num_classes=7, checkpoint_path=str(tmp_path / 'folded.pth'))


def test_other_filters_are_refused():
    model = timm.create_model(NAME)
    state = model.state_dict()
    key = next(k for k in state if k.endswith('.iwt_filter'))
    state[key] = state[key].flip(0)
    with pytest.raises(RuntimeError, match=f'{key}.*Haar'):
        model.load_state_dict(state)
    state[key] = model.state_dict()[key].half()  # one half exactly, as good
    model.load_state_dict(state)


def test_two_heads(tmp_path):
    model = randomised(num_classes=5, distillation=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x).mean((2, 3))
        one, two = model.head(features), model.head_dist(features)
        assert not torch.allclose(one, two, atol=1e-2)
        torch.testing.assert_close(model(x), (one + two) / 2)
    model.train()
    pair = model(x)
    assert isinstance(pair, tuple) and [p.shape for p in pair] == [(2, 5), (2, 5)]
    sum(p.square().sum() for p in pair).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.get_classifier() == (model.head.l, model.head_dist.l)
    model.reset_classifier(3)
    assert [p.shape for p in model(x)] == [(2, 3), (2, 3)]
    for call in (
        lambda: model.reset_classifier(3, ''),
        lambda: timm.create_model(NAME, distillation=True, global_pool=''),
    ):
        with pytest.raises(ValueError, match="global_pool='avg'"):
            call()
    single = randomised(num_classes=5)
    double = timm.create_model(NAME, num_classes=5, distillation=True).eval()
    double.load_state_dict(single.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(double(x), single(x))
    torch.save(model.eval().state_dict(), tmp_path / 'w.pth')  # two heads of 3 classes, for another number of them
    overlay = {'file': str(tmp_path / 'w.pth'), 'num_classes': 3}
    other = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9, distillation=True
    ).eval()
    with torch.no_grad():
        assert other(x).shape == (2, 9)
        assert torch.equal(other.forward_features(x), model.forward_features(x))


def test_native_small_images():
    """Stem strides for small images keep the published key names and shapes."""
    with torch.device('meta'):
        wanted = {k: v.shape for k, v in timm.create_model('mobilemamba_t2').state_dict().items()}
        for stride in (1, 2, 4, 8):
            model = timm.create_model('mobilemamba_t2', stem_stride=stride).eval()
            assert {k: v.shape for k, v in model.state_dict().items()} == wanted
            maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
            assert [m.shape[-1] for m in maps] == [-(-32 // (stride * 2**s)) for s in range(3)]
            assert [f['reduction'] for f in model.feature_info] == [stride, 2 * stride, 4 * stride]
        with pytest.raises(ValueError, match='stem_stride'):
            timm.create_model('mobilemamba_t2', stem_stride=3)


def test_command_line_fuses(tmp_path, capsys):
    model = randomised(num_classes=7)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    argv = [NAME, '--checkpoint', str(tmp_path / 'w.pth'), '--format', 'safetensors', '--img-size', '64']
    assert cli_export([*argv, '--fuse', '--output', str(tmp_path / 'm.safetensors')]) == 0
    again = timm.create_model(NAME, num_classes=7, fuse=True, checkpoint_path=str(tmp_path / 'm.safetensors'))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(again(x), model(x)) < 1e-5
    with pytest.raises(ZooError, match='nothing to fold'):
        cli_export(['test_vig', '--fuse', '--output', str(tmp_path / 'm')])


def test_half_precision_maps_stay_half():
    """Nothing in a fused model silently goes back to fp32."""
    model = randomised().fuse().bfloat16()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.no_grad():
        out = model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert out.isfinite().all() and set(seen) == {torch.bfloat16}
