"""Normalised and rank-augmented linear attention against their plain formulas in fp64, with every gradient.

The same cases run on the torch path and on the Triton kernels; without a GPU these run in Triton's interpreter, which
proves formulas and masks (tests/gpu/check_linear_attention.py proves the compiled code).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import linear_attention as ops
from zoo.kernels.linear_attention import linear_attention, naive_linear_attention, naive_rank_augmented, rank_augmented
from zoo.kernels.rope import apply_rope, axial_rope_tables

import zoo

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
def poison(monkeypatch):
    make = torch.empty
    fill = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch, 'empty', lambda *a, **kw: fill(make(*a, **kw)))


# (B, T, H, D), dtype
LINEAR = [
    ((2, 1, 2, 16), torch.float32),
    ((1, 70, 1, 40), torch.float32),
    ((2, 67, 1, 64), torch.bfloat16),
    ((1, 33, 2, 80), torch.float16),
    ((1, 40, 1, 160), torch.float32),
    ((1, 600, 1, 16), torch.float32),
    ((1, 600, 1, 160), torch.bfloat16),
]


@pytest.mark.parametrize('shape, dtype', LINEAR, ids=str)
@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_linear_attention(backend, shape, dtype, poison):
    fused, split = views(3, *shape)
    compare(positive(linear_attention), positive(naive_linear_attention), fused, split, dtype, backend)


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
    (1, 40, 15, 1, 16, torch.float32, True, True),
    (1, 23, 30, 1, 32, torch.bfloat16, False, True),
    (1, 5, 9, 2, 96, torch.float32, True, False),
    (1, 9, 5, 1, 96, torch.bfloat16, False, False),
    (1, 3, 12, 1, 128, torch.float16, True, True),
]


@pytest.mark.parametrize('case', RANK, ids=str)
@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_rank_augmented(backend, case, poison):
    batch, height, width, heads, dim, dtype, *extra = case
    fused, split = views(3 + sum(extra), batch, height * width, heads, dim)
    op, oracle = (grid(f, height, width, *extra) for f in (rank_augmented, naive_rank_augmented))
    compare(op, oracle, fused, split, dtype, backend)
