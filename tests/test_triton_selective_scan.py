"""The Triton kernels of the selective scan in Triton's CPU interpreter, against loops in fp64.

The interpreter proves the formulas and the masks; tests/gpu/check_selective_scan.py proves the compiled code. It takes
a scan apart into single numbers, so the cases are small.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip('triton')
INTERPRETING = os.environ.get('TRITON_INTERPRET') == '1'


@pytest.mark.skipif(INTERPRETING, reason='the interpreter is on: the cases below run in this process')
def test_in_interpreter():
    """Runs this file again with the interpreter on: the variable must be set before Triton is imported."""
    env = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', __file__], env=env,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


inner = pytest.mark.skipif(not INTERPRETING, reason='runs inside test_in_interpreter')
if INTERPRETING:
    import triton
    import triton.language as tl
    from zoo.kernels._triton import selective_scan as kernels
    from zoo.kernels._triton.selective_scan_tiles import softplus, softplus_slope

    @triton.jit
    def softplus_kernel(x, value, slope, N: tl.constexpr):
        i = tl.arange(0, N)
        v = softplus(tl.load(x + i))
        tl.store(value + i, v)
        tl.store(slope + i, softplus_slope(v))


from zoo.kernels.selective_scan import selective_scan, selective_scan_2d  # noqa: E402

import zoo  # noqa: E402

slow = pytest.mark.slow
LIMITS = {'float32': 1e-5, 'float16': 2e-3, 'bfloat16': 8e-3}
SEQUENCES = [  # T, D per group, groups, N, reverse, tokens contiguous, parts left out, dtype
    (1, 5, 1, 1, False, True, '', 'float32'),
    (19, 18, 1, 1, True, False, '', 'float32'),
    (20, 3, 2, 3, False, True, 'bias', 'float32'),
    (17, 5, 1, 2, False, False, 'skip softplus', 'bfloat16'),
    pytest.param((70, 33, 1, 1, False, False, '', 'float16'), marks=slow),
    pytest.param((50, 4, 2, 16, True, True, '', 'float32'), marks=slow),
    pytest.param((50, 4, 1, 5, False, True, 'skip', 'bfloat16'), marks=slow),
]
MAPS = [  # D, H, W, R, N, directions, dtype
    (5, 1, 1, 3, 1, 2, 'float32'),
    (16, 3, 7, 3, 1, 2, 'float32'),
    (18, 3, 3, 7, 1, 2, 'bfloat16'),
    (6, 5, 4, 3, 1, 4, 'float32'),
    pytest.param((40, 6, 6, 17, 1, 2, 'float16'), marks=slow),
    pytest.param((8, 5, 7, 14, 3, 4, 'float32'), marks=slow),
]


def rms(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-3)).item() if torch.isfinite(a).all() else float('inf')


def randn(*shape, dtype=torch.float32):
    """fp64 leaf whose values are exact in `dtype`."""
    return torch.randn(*shape).to(dtype).double().requires_grad_()


def check(got, out, leaves, names, dy, limit):
    expect = dict(zip(names, torch.autograd.grad(out, leaves, dy)))
    errors = {n: rms(got[n], g) for n, g in expect.items()} | {'y': rms(got['y'], out.detach())}
    assert all(e < limit for e in errors.values()), errors


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is NaN, so that an element nobody writes shows."""
    for name in ('empty', 'empty_like'):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **kw: make(*a, **kw).fill_(torch.nan))


@inner
@pytest.mark.parametrize('case', SEQUENCES, ids=lambda c: '-'.join(map(str, c)).replace(' ', '_'))
def test_sequences(case, poison):
    length, per_group, groups, states, reverse, tokens_last, without, name = case
    dtype, width = getattr(torch, name), groups * per_group
    u, delta = randn(2, width, length, dtype=dtype), randn(2, width, length, dtype=dtype)
    A = (-randn(width, states).detach().float().exp()).double().requires_grad_()
    B, C = (randn(2, groups, states, length, dtype=dtype) for _ in range(2))
    D = None if 'skip' in without else randn(width)
    bias = None if 'bias' in without else randn(width)
    softplus = 'softplus' not in without
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=bias)
    with zoo.kernel_backend('naive'):
        out = selective_scan(*tensors.values(), softplus, reverse)
    dy = randn(2, width, length, dtype=dtype).detach()
    cast = lambda x: None if x is None else x.detach().to(dtype if x.ndim > 2 else torch.float32)  # noqa: E731
    turned = lambda x: x if x is None or x.ndim != 3 or tokens_last else x.mT.contiguous().mT  # noqa: E731
    arguments = (*(turned(cast(x)) for x in tensors.values()), softplus, reverse)
    y = kernels.selective_scan_fwd(*arguments)
    grads = kernels.selective_scan_bwd(*arguments, turned(cast(dy)))
    present = {n: x for n, x in tensors.items() if x is not None}
    assert [g is None for g in grads] == [x is None for x in tensors.values()]
    check(dict(zip(tensors, grads)) | {'y': y}, out, list(present.values()), present, dy, LIMITS[name])
    assert y.dtype == grads[0].dtype == grads[1].dtype == grads[3].dtype == dtype and grads[2].dtype == torch.float32


@inner
@pytest.mark.parametrize('case', MAPS, ids=lambda c: '-'.join(map(str, c)))
def test_maps(case, poison):
    channels, height, width, rank, states, directions, name = case
    dtype, row = getattr(torch, name), rank + 2 * states
    x, p = randn(2, height, width, channels, dtype=dtype), randn(2, height, width, directions * row, dtype=dtype)
    weight, bias = randn(directions, channels, rank), randn(directions, channels)
    A = (-randn(directions * channels, states).detach().float().exp()).double().requires_grad_()
    leaves = dict(x=x, p=p, dt_weight=weight, dt_bias=bias, A=A, D=randn(directions * channels))
    with zoo.kernel_backend('torch'):  # in fp64; compared with the recurrence in test_selective_scan.py
        from zoo.kernels.selective_scan import _scan_2d_op

        out = _scan_2d_op(*leaves.values(), directions)
    dy = randn(2, height, width, channels, dtype=dtype).detach()
    arguments = [t.detach().to(dtype if t.ndim == 4 else torch.float32) for t in leaves.values()]
    y = kernels.selective_scan_2d_fwd(*arguments, directions)
    grads = kernels.selective_scan_2d_bwd(*arguments, directions, dy.to(dtype))
    check(dict(zip(leaves, grads)) | {'y': y}, out, list(leaves.values()), leaves, dy, LIMITS[name])
    assert y.dtype == grads[0].dtype == grads[1].dtype == dtype


@inner
def test_public_ops_take_the_kernels():
    x, x_proj, dt_proj = torch.randn(1, 6, 3, 3), torch.randn(2, 5, 6), torch.randn(2, 6, 3)
    parameters = (x_proj, dt_proj, torch.randn(2, 6), torch.zeros(12, 1), torch.randn(12))
    with zoo.kernel_backend('torch'):
        expected = selective_scan_2d(x, *parameters, directions=2)
    with zoo.kernel_backend('triton'):
        assert rms(selective_scan_2d(x, *parameters, directions=2), expected) < 1e-5
        with pytest.raises(RuntimeError, match='float64'):
            selective_scan_2d(x.double(), *parameters, directions=2)


@inner
def test_gradients_of_the_public_ops():
    """Plain eager tensors take the short way in; gradients lie in memory as what they belong to."""
    sequence = [torch.randn(2, 5, 6).mT, torch.randn(2, 6, 5), -torch.rand(2, 6).T, *torch.randn(2, 2, 2, 2, 5)]
    parameters = torch.randn(2, 5, 6), torch.randn(2, 6, 3), torch.randn(2, 6), torch.zeros(12, 1), torch.randn(12)
    over_map = [torch.randn(1, 3, 4, 6).permute(0, 3, 1, 2), *parameters]
    cases = [
        (lambda *args: selective_scan(*args[:5], delta_bias=args[5], delta_softplus=True), [*sequence, torch.randn(6)]),
        (lambda *args: selective_scan_2d(*args, directions=2), over_map),
    ]
    for op, tensors in cases:
        results = []
        for backend in ('torch', 'triton'):
            leaves = [t.detach().requires_grad_() for t in tensors]
            with zoo.kernel_backend(backend):
                results.append(torch.autograd.grad(op(*leaves).square().sum(), leaves))
        for wanted, got, t in zip(*results, tensors):
            assert rms(got, wanted) < 1e-5 and got.stride() == t.stride()


@inner
def test_softplus_and_its_slope():
    x = torch.cat([torch.linspace(-60, 60, 3000), torch.tensor([0.0, -87.0, 88.0, 1e4, -1e4])])
    x = torch.cat([x, x.new_zeros(4096 - len(x))])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    softplus_kernel[(1,)](x, value, slope, N=4096)
    exact = x.double().clamp_min(0) + torch.log1p(torch.exp(-x.double().abs()))
    normal = exact > 1e-37  # below, fp32 has no relative accuracy
    for got, want in ((value, exact), (slope, torch.sigmoid(x.double()))):
        assert ((got - want).abs() / want)[normal].max() < 5e-6


@inner
def test_unsupported():
    x = torch.zeros(1, 4, 4)
    assert kernels.unsupported(x.dtype, 16) is None
    assert 'float64' in kernels.unsupported(torch.float64, 16)
    assert 'N = 64' in kernels.unsupported(x.dtype, 64)
    assert 'R = 127' in kernels.unsupported(x.dtype, 16, 127)
