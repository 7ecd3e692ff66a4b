"""Normalised and rank-augmented linear attention against their plain formulas in fp64, with every gradient.

The same cases run on the torch path and on the Triton kernels; without a GPU these run in Triton's interpreter, which
proves formulas and masks (tests/gpu/check_linear_attention.py proves the compiled code).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import _dispatch
from zoo.kernels import linear_attention as ops
from zoo.kernels.linear_attention import linear_attention, naive_linear_attention, naive_rank_augmented, rank_augmented
from zoo.kernels.rope import apply_rope, axial_rope_tables

import zoo

HAS_TRITON = importlib.util.find_spec('triton') is not None
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


def relative_rms(x: torch.Tensor, reference: torch.Tensor, floor: float = 1e-6) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(floor)).item()


def views(count, batch, length, heads, dim, seed=0):
    """Slices of one fused projection, as a model hands them over, fp64."""
    rng = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, length, count * heads * dim, generator=rng, dtype=torch.float64)
    return fused, lambda x: [part.unflatten(-1, (heads, dim)) for part in x.chunk(count, -1)]


def compare(op, oracle, fused, split, dtype, backend, scale=1.0):
    """Outputs and the gradient of every slice of the fused tensor, with fresh memory poisoned."""
    rounded = (fused * scale).to(dtype)
    ours, exact = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    expected = oracle(*split(exact))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with zoo.kernel_backend(backend):
        out = op(*split(ours))
        out.backward(weight)
    expected.backward(weight.double())
    assert out.dtype == dtype and out.shape == expected.shape
    errors = {'o': relative_rms(out, expected)}
    # Where gradients cancel (a single token: o = v), rounding is measured against the gradient of the values.
    floor = 0.1 * split(exact.grad)[2].norm().item() if fused.shape[1] == 1 else 1e-6
    for name, x, y in zip(('q', 'k', 'v', 'lepe', 'gate'), split(ours.grad), split(exact.grad)):
        errors[name] = relative_rms(x, y, floor)
    bad = {n: e for n, e in errors.items() if not e <= LIMITS[dtype] * (2 if n != 'o' and dtype.itemsize == 2 else 1)}
    assert not bad, errors


def positive(op, **kwargs):
    return lambda q, k, v: op(F.elu(q) + 1, F.elu(k) + 1, v, **kwargs)


@pytest.fixture
def short_parts(monkeypatch):
    """Cut the token axis into parts even where it is short, so that small cases cover the merge of their sums."""
    if HAS_TRITON:
        for family in ('linear_attention', 'rank_augmented'):
            monkeypatch.setattr(_dispatch.triton_module(family), 'cut', short_cut)


def short_cut(tokens, heads, options, device):
    parts = max(1, min(2, tokens // 64))
    per = -(-tokens // parts // options.bt) * options.bt
    return -(-tokens // per), per


@pytest.fixture
def poison(monkeypatch):
    make = torch.empty
    fill = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch, 'empty', lambda *a, **kw: fill(make(*a, **kw)))


backends = pytest.mark.parametrize(
    'backend',
    ['torch', pytest.param('triton', marks=pytest.mark.skipif(not HAS_TRITON, reason='Triton is not installed'))],
)
# (B, T, H, D), dtype
LINEAR = [
    ((2, 1, 2, 16), torch.float32),
    ((1, 70, 1, 40), torch.float32),
    ((2, 67, 1, 64), torch.bfloat16),
    ((1, 33, 2, 80), torch.float16),
    ((1, 40, 1, 160), torch.float32),
    ((1, 150, 1, 16), torch.float32),
    ((1, 70, 1, 160), torch.bfloat16),
]


@pytest.mark.parametrize('shape, dtype', LINEAR, ids=str)
@backends
def test_linear_attention(backend, shape, dtype, poison, short_parts):
    fused, split = views(3, *shape)
    compare(positive(linear_attention), positive(naive_linear_attention), fused, split, dtype, backend)


@pytest.mark.parametrize('shape, dtype', LINEAR, ids=str)
@backends
def test_linear_attention_applies_elu(backend, shape, dtype, poison, short_parts):
    """Inside the op: tokens that do not exist have no features, although elu(0) + 1 is 1."""
    fused, split = views(3, *shape)
    op, oracle = (lambda q, k, v, f=f: f(q, k, v, elu=True) for f in (linear_attention, naive_linear_attention))
    compare(op, oracle, fused, split, dtype, backend, scale=3.0)
    with zoo.kernel_backend('torch'):
        inside = op(*split(fused))
        torch.testing.assert_close(inside, positive(linear_attention)(*split(fused)), rtol=1e-12, atol=1e-12)


def grid(op, height, width, lepe=True, gate=True):
    def run(q, k, v, *rest):
        rest = list(rest)
        extra = {'lepe': rest.pop(0) if lepe else None, 'gate': rest.pop(0) if gate else None}
        return op(q, k, v, height=height, width=width, **extra)

    return run


# B, height, width, H, D, dtype, lepe, gate
RANK = [
    (2, 1, 1, 2, 16, torch.float32, True, True),
    (1, 7, 11, 1, 64, torch.float32, True, True),
    (2, 5, 13, 1, 64, torch.bfloat16, True, True),
    (1, 13, 11, 1, 16, torch.float32, True, True),
    (1, 10, 13, 1, 32, torch.bfloat16, False, True),
    (1, 5, 7, 1, 96, torch.float32, True, False),
    (1, 14, 5, 1, 96, torch.bfloat16, False, False),
    (1, 3, 6, 1, 128, torch.float16, True, True),
]


@pytest.mark.parametrize('case', RANK, ids=str)
@backends
def test_rank_augmented(backend, case, poison, short_parts):
    batch, height, width, heads, dim, dtype, *extra = case
    fused, split = views(3 + sum(extra), batch, height * width, heads, dim)
    op, oracle = (grid(f, height, width, *extra) for f in (rank_augmented, naive_rank_augmented))
    compare(op, oracle, fused, split, dtype, backend)


@backends
def test_one_large_key_wins_and_all_stay_finite(backend):
    """Log weights of hundreds: a softmax without its largest term taken out would overflow."""
    fused, split = views(5, 1, 20, 1, 16)
    op, oracle = grid(rank_augmented, 4, 5), grid(naive_rank_augmented, 4, 5)
    fused[:, 7, 16:32] *= 300
    fused[:, :, :16] = fused[:, :, :16].abs() * 8
    with zoo.kernel_backend(backend):
        x = fused.float().requires_grad_()
        out = op(*split(x))
        out.square().sum().backward()
    assert relative_rms(out, oracle(*split(fused.float().double()))) < 1e-4
    assert torch.isfinite(x.grad).all()


def test_values_may_be_wider_than_keys():
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 30, 2, 16, generator=rng) for _ in range(2))
    v = torch.randn(1, 30, 2, 24, generator=rng)
    for backend in ('torch', 'triton') if HAS_TRITON else ('torch',):
        with zoo.kernel_backend(backend):
            assert relative_rms(linear_attention(q, k, v), naive_linear_attention(q, k, v)) < 1e-5


def test_epsilon_is_added_to_the_mean_normalised_denominator():
    """Doubling every token changes nothing, and eps shrinks outputs by z / (z + eps)."""
    q, k, v = (torch.rand(1, 12, 1, 8) for _ in range(3))
    o = linear_attention(q, k, v, eps=1.0)
    twice = linear_attention(*(x.repeat(1, 2, 1, 1) for x in (q, k, v)), eps=1.0)
    torch.testing.assert_close(twice[:, :12], o)
    z = (q * k.mean(1, keepdim=True)).sum(-1, keepdim=True)
    torch.testing.assert_close(o, linear_attention(q, k, v, eps=0.0) * z / (z + 1.0))
    q, k, v = (torch.randn(1, 12, 1, 8) for _ in range(3))
    large = rank_augmented(q, k, v, height=3, width=4, eps=10.0)
    torch.testing.assert_close(large, naive_rank_augmented(q, k, v, height=3, width=4, eps=10.0))


def test_rotation_is_relative_and_orthogonal():
    """Scores of rotated vectors depend on the offset of their places only, along rows and along columns."""
    cos, sin = axial_rope_tables(5, 6, 16)
    a, b = torch.randn(16), torch.randn(16)
    at = lambda x, row, column: apply_rope(x, cos[row * 6 + column], sin[row * 6 + column])  # noqa: E731
    score = lambda p, q: (at(a, *p) * at(b, *q)).sum()  # noqa: E731
    torch.testing.assert_close(score((0, 1), (2, 3)), score((2, 2), (4, 4)))
    assert (score((0, 1), (2, 3)) - score((0, 1), (3, 3))).abs() > 1e-3
    torch.testing.assert_close(apply_rope(at(a, 3, 4), cos[22], -sin[22]), a)
    torch.testing.assert_close(torch.stack((cos[6, 2], cos[1, 10])), torch.tensor(10000 ** (-1 / 3)).cos().expand(2))
    with pytest.raises(ValueError, match='multiple of 4'):
        axial_rope_tables(2, 2, 18)


def test_empty_inputs():
    for shape in ((0, 6, 2, 8), (2, 0, 2, 8)):
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        linear_attention(q, k, v).sum().backward()
        rank_augmented(q, k, v, height=shape[1] // 3, width=3).sum().backward()
        assert q.grad.shape == shape


def test_opcheck():
    _, split = views(5, 2, 12, 2, 8)
    q, k, v, lepe, gate = (x.detach().requires_grad_() for x in split(torch.randn(2, 12, 80)))
    torch.library.opcheck(ops._linear_op.custom, (q, k, v, 1e-4, True))
    torch.library.opcheck(ops._linear_op.custom, (q, k, v, 1e-4, True, True))
    torch.library.opcheck(ops._rank_op.custom, (q, k, v, lepe, gate, 3, 4, 1e-6))
    torch.library.opcheck(ops._rank_op.custom, (q, k, v, lepe, None, 3, 4, 1e-6))


class Both(torch.nn.Module):
    """Both ops on slices of one projection of an image (B, h, w, C)."""

    def forward(self, x):
        height, width = x.shape[1:3]
        q, k, v, lepe, gate = (part.unflatten(-1, (2, -1)) for part in x.flatten(1, 2).chunk(5, -1))
        y = rank_augmented(q, k, v, height=height, width=width, lepe=lepe, gate=gate)
        return y + linear_attention(q.exp(), k.exp(), v)


def test_export_with_dynamic_sizes_equals_eager():
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {0: dynamic, 1: dynamic, 2: dynamic}
    program = torch.export.export(Both(), (torch.randn(2, 5, 7, 80),), dynamic_shapes=(sizes,))
    x = torch.randn(3, 8, 4, 80)
    torch.testing.assert_close(program.module()(x), Both()(x))


def test_compiled_equals_eager_with_gradients():
    x, y = (torch.randn(2, 3, 4, 80, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    Both()(x).square().sum().backward()
    torch.compile(Both(), backend='aot_eager', fullgraph=True)(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_autocast_does_not_reach_inside():
    _, split = views(3, 1, 12, 2, 8)
    inputs = split(torch.randn(1, 12, 48))
    expected = rank_augmented(*inputs, height=3, width=4), linear_attention(*inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(rank_augmented(*inputs, height=3, width=4), expected[0])
        assert torch.equal(linear_attention(*inputs), expected[1])


def test_flops_count_the_two_products():
    q, k, v = (torch.rand(2, 12, 3, 8, requires_grad=True) for _ in range(3))
    for op in (linear_attention, lambda *x: rank_augmented(*x, height=3, width=4)):
        with FlopCounterMode(display=False) as counter:
            out = op(q, k, v)
        assert counter.get_total_flops() == 4 * 2 * 12 * 3 * 8 * 8
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 8 * 2 * 12 * 3 * 8 * 8


def test_naive_backend():
    q, k, v = (torch.rand(1, 12, 1, 8) for _ in range(3))
    with zoo.kernel_backend('naive'):
        assert torch.equal(linear_attention(q, k, v), naive_linear_attention(q, k, v))
        grid_of = dict(height=3, width=4)
        assert torch.equal(rank_augmented(q, k, v, **grid_of), naive_rank_augmented(q, k, v, **grid_of))


def test_errors_name_the_argument():
    q, k, v = (torch.rand(1, 12, 1, 8) for _ in range(3))
    kwargs = dict(height=3, width=4)
    cases = [
        (lambda: linear_attention(q[0], k, v), 'q and k must both be'),
        (lambda: linear_attention(q, k, v[:, :3]), 'v must be'),
        (lambda: linear_attention(q, k.half(), v), 'share one floating dtype'),
        (lambda: linear_attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v))), 'float16 or bfloat16'),
        (lambda: rank_augmented(q, k, v, height=3, width=5), r'height \* width must be T = 12'),
        (lambda: rank_augmented(q, k, v[..., :4], **kwargs), 'v must have the shape of q'),
        (lambda: rank_augmented(q[..., :6], k[..., :6], v[..., :6], **kwargs), 'multiple of 4'),
        (lambda: rank_augmented(q, k, v, lepe=v[:, :3], **kwargs), "lepe must have v's shape"),
        (lambda: rank_augmented(q, k, v, gate=v.half(), **kwargs), "gate must have v's shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
