"""Depthwise convolution: both paths against plain formulas in fp64, with every gradient.

The Triton kernels run on the GPU where there is one, else in Triton's CPU interpreter, which proves formulas and masks;
tests/gpu/check_depthwise_conv.py proves the compiled code at the sizes of models.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import depthwise_conv
from zoo.kernels.depthwise_conv import DepthwiseConv2d, depthwise_conv2d, naive_depthwise_conv2d

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
OPTIONS = [  # residual, activation, pre_activation
    (False, None, None),
    (True, None, None),
    (False, 'silu', None),
    (True, 'relu', None),
    (True, None, 'gelu'),
    (True, 'gelu', 'gelu'),
]


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-6)).item()


def make_inputs(shape, size, dtype=torch.float64, device='cpu', bias=True):
    """x, weight, bias or None, and a gradient of the result; fp64 draws rounded to `dtype`."""
    channels = shape[-1]
    draw = lambda *s: torch.randn(*s, dtype=torch.float64).to(device, dtype)  # noqa: E731
    return draw(*shape), draw(channels, 1, size, size) / size, draw(channels) if bias else None, draw(*shape)


def named(options):
    return dict(zip(('residual', 'activation', 'pre_activation'), options))


def formula(x, weight, bias, residual=False, activation=None, pre_activation=None):
    """The definition in terms of PyTorch's own convolution."""
    u = F.gelu(x) if pre_activation else x
    y = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, 1, weight.shape[-1] // 2, 1, x.shape[-1]).permute(0, 2, 3, 1)
    y = getattr(F, activation)(y) if activation else y
    return y + u if residual else y


def results(function, inputs, options):
    """The output and the gradients of x, weight and bias by name."""
    *tensors, dy = inputs
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, **named(options))
    y.backward(dy.to(y.dtype))
    return {'y': y} | {n: t.grad for n, t in zip(('dx', 'dweight', 'dbias'), leaves) if t is not None}


def assert_close(got, expected, limit):
    errors = {name: relative_rms(got[name], x) for name, x in expected.items()}
    assert all(e <= limit for e in errors.values()), errors


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('size', [1, 3, 5, 7, 9])
def test_oracle_and_torch_path_match_the_definition(size, options):
    for shape in [(2, 6, 7, 5), (1, 1, 1, 3), (2, 9, 2, 4)]:
        inputs = make_inputs(shape, size, bias=options[1] != 'silu')
        expected = results(formula, inputs, options)
        for function in (naive_depthwise_conv2d, depthwise_conv2d):
            assert_close(results(function, inputs, options), expected, 1e-12)


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_torch_path_in_other_precisions(dtype, limit):
    inputs = make_inputs((2, 8, 9, 6), 5, dtype)
    double = [t.double() for t in inputs]
    got = results(depthwise_conv2d, inputs, (True, None, 'gelu'))
    assert got['y'].dtype == dtype
    assert_close(got, results(formula, double, (True, None, 'gelu')), limit)


def triton_results(inputs, options, monkeypatch):
    with zoo.kernel_backend('triton'), monkeypatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, 'empty', lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
        return results(depthwise_conv2d, inputs, options)


TRITON = [  # shape, kernel size, options, dtype
    ((2, 3, 5, 16), 3, OPTIONS[1], torch.float32),
    ((1, 5, 3, 20), 3, OPTIONS[2], torch.float32),
    ((1, 2, 4, 16), 5, OPTIONS[5], torch.float32),
    ((1, 1, 1, 6), 3, OPTIONS[3], torch.float32),
    ((1, 2, 3, 16), 7, OPTIONS[0], torch.float32),
    ((2, 3, 4, 32), 3, OPTIONS[4], torch.bfloat16),
    ((1, 3, 2, 8), 1, OPTIONS[2], torch.float16),
]


@pytest.mark.parametrize('case', TRITON, ids=str)
def test_triton_matches_the_oracle(case, monkeypatch):
    pytest.importorskip('triton')
    shape, size, options, dtype = case
    inputs = make_inputs(shape, size, dtype, DEVICE)
    got = triton_results(inputs, options, monkeypatch)
    assert got['y'].dtype == got['dx'].dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert_close(got, results(naive_depthwise_conv2d, [t.double() for t in inputs], options), limit)


def test_triton_cuts_high_maps_into_rows_of_tiles(monkeypatch):
    """One image leaves few programs, so its rows are shared out; what lies between tiles counts once."""
    module = pytest.importorskip('zoo.kernels._triton.depthwise_conv')
    monkeypatch.setattr(module, 'LEAST_ROWS', 2)
    monkeypatch.setattr(module, 'PROGRAMS', 3)
    monkeypatch.setattr(pytest.importorskip('zoo.kernels._triton._common'), '_plans', {})
    inputs = make_inputs((1, 7, 2, 16), 5, torch.float32, DEVICE)
    assert module.cut(inputs[0], module.BACKWARD[5], 1).count > 1
    got = triton_results(inputs, OPTIONS[1], monkeypatch)
    assert_close(got, results(naive_depthwise_conv2d, [t.double() for t in inputs], OPTIONS[1]), 1e-6)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_slices_of_wider_maps(backend, monkeypatch):
    """As RAVLT's v: one quarter of a projection's channels, read where it lies."""
    wide = torch.randn(1, 3, 4, 64, device=DEVICE)
    x = wide[..., 32:48]
    _, weight, bias, dy = make_inputs(x.shape, 3, torch.float32, DEVICE)
    expected = results(formula, (x.contiguous().double(), weight.double(), bias.double(), dy.double()), OPTIONS[0])
    if backend == 'triton':
        module = pytest.importorskip('zoo.kernels._triton.depthwise_conv')
        assert module._channels_last(x) is x and module._channels_last(x.transpose(1, 2)).data_ptr() == x.data_ptr()
        monkeypatch.setattr(torch.Tensor, 'contiguous', None)  # a copy would fail
    leaf = wide.clone().requires_grad_()
    with zoo.kernel_backend(backend):
        y = depthwise_conv2d(leaf[..., 32:48], weight, bias)
        y.backward(dy)
    assert relative_rms(y, expected['y']) < 1e-6
    assert relative_rms(leaf.grad[..., 32:48], expected['dx']) < 1e-6
    assert not leaf.grad[..., :32].any() and not leaf.grad[..., 48:].any()


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make_inputs((1, 3, 4, 2), 3)[:3]]
    function = lambda *tensors: depthwise_conv2d(*tensors, **named(OPTIONS[5]))  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('backend', ['naive', 'torch', 'triton'])
def test_autocast_gives_the_dtypes_of_the_formula(backend):
    """x and the weight in fp32; the skip promotes the result. The kernels read x unrounded."""
    pytest.importorskip('triton')
    x, weight, bias, dy = make_inputs((1, 2, 3, 16), 3, torch.float32, DEVICE)
    for dtype, residual in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x.to(dtype), weight, bias)]
        with torch.autocast(DEVICE, torch.bfloat16):
            expected = formula(*leaves, residual)
            with zoo.kernel_backend(backend):
                y = depthwise_conv2d(*leaves, residual=residual)
        assert y.dtype == expected.dtype
        assert relative_rms(y, formula(*(t.double() for t in leaves), residual)) < 5e-3
        if backend != 'naive':
            y.backward(dy.to(y.dtype))
            assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize('nhwc', [False, True])
def test_layer_is_a_drop_in_for_conv2d(nhwc):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 6, 5, padding=2, groups=6)
    torch.manual_seed(0)
    layer = DepthwiseConv2d(6, 5, nhwc=nhwc)
    assert isinstance(layer, torch.nn.Conv2d) and layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)
    x = torch.randn(2, 6, 8, 7).to(memory_format=torch.channels_last)
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nhwc else layer(x)
    torch.testing.assert_close(y, plain(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert DepthwiseConv2d(6, bias=False).bias is None


def test_layer_passes_its_options_on():
    x = torch.randn(2, 6, 8, 7)
    layer = DepthwiseConv2d(6, 3, residual=True, activation='silu', pre_activation='gelu')
    expected = formula(x.permute(0, 2, 3, 1), layer.weight, layer.bias, True, 'silu', 'gelu').permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match='kernel_size must be odd, got 4'):
        DepthwiseConv2d(6, 4)


def test_export_is_plain_pytorch():
    layer = DepthwiseConv2d(6, 3, residual=True, pre_activation='gelu').eval()
    size = {2: torch.export.Dim('height', min=2, max=64), 3: torch.export.Dim('width', min=2, max=64)}
    with zoo.kernel_backend('triton'):
        program = torch.export.export(layer, (torch.randn(1, 6, 8, 10),), dynamic_shapes=(size,))
    assert 'zoo' not in program.graph_module.code
    x = torch.randn(1, 6, 5, 9)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize('backend', ['auto', 'triton'])
def test_compiled_in_one_graph(backend):
    pytest.importorskip('triton')
    inputs = make_inputs((1, 2, 3, 16), 3, torch.float32, DEVICE)
    torch._dynamo.reset()

    @torch.compile(backend='aot_eager', fullgraph=True)
    def compiled(x, weight, bias, **kw):
        with torch.autocast(DEVICE, torch.bfloat16):
            return depthwise_conv2d(x, weight, bias, **kw)

    with zoo.kernel_backend(backend):
        got = results(compiled, inputs, OPTIONS[1])
    assert got['y'].dtype == torch.float32
    assert_close(got, results(formula, [t.double() for t in inputs], OPTIONS[1]), 1e-2)


def test_opcheck():
    pytest.importorskip('triton')
    x, weight, bias, dy = make_inputs((1, 2, 2, 16), 3, torch.float32, DEVICE)
    for t in (x, weight, bias):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d, (x, weight, bias, True, None, 'gelu', torch.float32))
    args = (x.detach(), weight.detach(), None, dy, False, None, None)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d_backward, args)


def test_flops():
    x, weight, bias, dy = make_inputs((2, 4, 5, 16), 3, torch.float32, 'meta')
    once = 2 * 9 * x.numel()
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, bias)
        torch.ops.zoo.depthwise_conv2d(x, weight, bias, False, None, None, torch.float32)
    assert counter.get_total_flops() == 2 * once
    with FlopCounterMode(display=False) as counter:
        torch.ops.zoo.depthwise_conv2d_backward(x, weight, bias, dy, False, 'silu', None)
    assert counter.get_total_flops() == 3 * once


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_empty_batch(backend):
    pytest.importorskip('triton')
    inputs = make_inputs((0, 4, 5, 16), 3, torch.float32, DEVICE)
    with zoo.kernel_backend(backend):
        got = results(depthwise_conv2d, inputs, OPTIONS[1])
    assert got['y'].shape == got['dx'].shape == (0, 4, 5, 16)
    assert not got['dweight'].any() and not got['dbias'].any()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(x=torch.zeros(4, 5, 6)), r'x must be floating-point \(B, H, W, C\)'),
        (dict(x=torch.zeros(1, 4, 5, 6, dtype=torch.int64)), 'x must be floating-point'),
        (dict(weight=torch.zeros(5, 1, 3, 3)), r'weight must be \(6, 1, k, k\), got \(5, 1, 3, 3\)'),
        (dict(weight=torch.zeros(6, 1, 3, 5)), 'weight must be'),
        (dict(weight=torch.zeros(6, 1, 4, 4)), 'odd kernel size, got 4'),
        (dict(weight=torch.zeros(6, 1, 3, 3, device='meta')), 'weight must be floating-point on cpu'),
        (dict(bias=torch.zeros(5)), r'bias must be \(6,\), got \(5,\)'),
        (dict(activation='tanh'), "activation must be one of .*'silu'.*, got 'tanh'"),
        (dict(pre_activation='silu'), "pre_activation must be one of .*'gelu'.*, got 'silu'"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(x=torch.zeros(1, 4, 5, 6), weight=torch.zeros(6, 1, 3, 3)) | change
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**arguments)


def test_kernel_sizes_beyond_the_kernels_take_the_torch_path():
    inputs = make_inputs((1, 3, 4, 16), 9, torch.float32, DEVICE)
    assert inputs[1].shape[-1] > depthwise_conv.MAX_TRITON_KERNEL
    with zoo.kernel_backend('triton'), pytest.raises(RuntimeError, match='kernel size 9'):
        depthwise_conv2d(*inputs[:3])
