"""The Triton kernels of state space duality in Triton's CPU interpreter, against the recurrence in fp64.

The interpreter proves the formulas and the masks; tests/gpu/check_ssd.py proves the compiled code.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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
    from zoo.kernels import ssd as op
    from zoo.kernels._triton import _common, ssd

    import zoo

NAMES = ('y', 'final', 'dx', 'ddt', 'dA', 'dB', 'dC', 'dD', 'dinitial')
CASES = [  # B, T, H, groups of B, of C, P, N, decays, cu_seqlens, D and initial state, dtype, chunks in a segment
    (2, 1, 2, 2, 2, 16, 16, 'mild', None, True, 'float32', 8),
    (2, 7, 2, 1, 2, 24, 20, 'mixed', None, True, 'float32', 8),
    (1, 70, 2, 1, 1, 16, 48, 'mixed', None, True, 'float32', 8),
    (1, 70, 1, 1, 1, 80, 16, 'strong', None, False, 'float32', 8),
    (1, 20, 2, 1, 2, 16, 144, 'mixed', None, True, 'float32', 8),
    (1, 20, 1, 1, 1, 136, 144, 'mild', None, True, 'bfloat16', 8),
    (1, 64, 2, 2, 1, 16, 16, 'mild', None, True, 'bfloat16', 8),
    (1, 140, 1, 1, 1, 16, 16, 'mixed', None, True, 'bfloat16', 1),
    (1, 100, 1, 1, 1, 16, 16, 'mild', None, True, 'float16', 2),
    (2, 100, 1, 1, 1, 16, 16, 'mixed', None, True, 'float32', 1),
    (1, 90, 2, 1, 2, 16, 16, 'mixed', (0, 1, 1, 70, 90), True, 'float32', 8),
    (1, 150, 1, 1, 1, 16, 16, 'mild', (0, 0, 130, 150), True, 'float32', 2),
    (1, 150, 1, 1, 1, 16, 16, 'mild', (0, 140, 150), False, 'bfloat16', 1),
]


def rms(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-2)).item() if torch.isfinite(a).all() else math.inf


def inputs(B, T, H, GB, GC, P, N, strength, cu, extras, dtype):
    """fp64 leaves whose values are exact in `dtype`, gradients of the results last."""
    torch.manual_seed(T + P)
    randn = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    fixed = lambda x, kind=dtype: x.to(kind).double().requires_grad_()  # noqa: E731
    rows = B if cu is None else len(cu) - 1
    dt = torch.nn.functional.softplus(randn(B, T, H) - 2)
    if strength == 'mixed':  # whole stretches of closed gates between open ones
        dt = 20.0 * (torch.rand(B, T, H) < 0.3)
    elif strength == 'strong':
        dt = 20.0 * torch.rand(B, T, H).double()
    x, Bs, Cs = fixed(randn(B, T, H, P)), fixed(randn(B, T, GB, N)), fixed(randn(B, T, GC, N))
    A = fixed(-torch.rand(H).double() - 0.5, torch.float32)
    D = fixed(randn(H), torch.float32) if extras else None
    init = fixed(randn(rows, H, P, N), torch.float32) if extras else None
    dfinal = randn(rows, H, P, N) if extras else None
    return x, fixed(dt, torch.float32), A, Bs, Cs, D, init, randn(B, T, H, P).to(dtype).double(), dfinal


def view(x):
    """The same values as a slice of something larger: rows that are not contiguous."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


@inner
@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(map(str, c)).replace(' ', ''))
def test_against_recurrence(case, monkeypatch):
    *shape, dtype, chunks = case
    dtype = getattr(torch, dtype)
    x, dt, A, B, C, D, init, dy, dfinal = inputs(*shape, dtype)
    cu = None if case[8] is None else torch.tensor(case[8])
    y, final = op.naive_ssd(x, dt, A, B, C, D=D, initial_state=init, output_final_state=True, cu_seqlens=cu)
    leaves = [t for t in (x, dt, A, B, C, D, init) if t is not None]
    objective = (y * dy).sum() + (0 if dfinal is None else (final * dfinal).sum())
    grads = iter(torch.autograd.grad(objective, leaves))
    expect = dict(zip(NAMES, (y.detach(), final.detach())))
    expect |= {n: next(grads) for n, t in zip(NAMES[2:], (x, dt, A, B, C, D, init)) if t is not None}

    monkeypatch.setattr(ssd, 'LEAST_CHUNKS', chunks)
    monkeypatch.setattr(ssd, 'WORK', 1 << 30)
    monkeypatch.setattr(_common, '_plans', {})
    plain = torch.empty
    poison = lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(-7)  # noqa: E731
    monkeypatch.setattr(torch, 'empty', lambda *a, **kw: poison(plain(*a, **kw)))
    cast = lambda t, kind: None if t is None else t.detach().to(kind)  # noqa: E731
    args = [view(cast(x, dtype)), cast(dt, torch.float32), cast(A, torch.float32), view(cast(B, dtype)),
            view(cast(C, dtype)), cast(D, torch.float32), cast(init, torch.float32)]  # fmt: skip
    got = dict(zip(NAMES, ssd.ssd_fwd(*args, True, cu)))
    got |= dict(zip(NAMES[2:], ssd.ssd_bwd(*args, cast(dy, dtype), cast(dfinal, torch.float32), cu)))
    limit = {'float32': 1e-5, 'float16': 1e-3, 'bfloat16': 5e-3}[case[-2]]
    # With one token and no state before it the decay cannot matter: its gradient is rounding of what cancels.
    errors = {n: rms(got[n], e) for n, e in expect.items()}
    assert not (bad := {n: e for n, e in errors.items() if not e < limit}), bad
    assert got['y'].dtype == got['dx'].dtype == got['dB'].dtype == dtype and got['final'].dtype == torch.float32


@inner
@pytest.mark.parametrize('groups', [(2, 2), (1, 2)])
def test_step(groups):
    x, dt, A, B, C, D, init, *_ = inputs(3, 1, 2, *groups, 24, 20, 'mild', None, True, torch.float32)
    expected, expected_state = op.naive_ssd(x, dt, A, B, C, D=D, initial_state=init, output_final_state=True)
    x, dt, B, C = (view(t.detach().float())[:, 0] for t in (x, dt, B, C))
    A, D, state = (t.detach().float() for t in (A, D, init))
    y, new = ssd.ssd_step(x, dt, A, B, C, state, D)
    assert rms(y, expected[:, 0].detach()) < 1e-6 and rms(new, expected_state.detach()) < 1e-6
    old = state.clone()
    assert torch.equal(ssd.ssd_step_(x, dt, A, B, C, state, D), y) and torch.equal(state, new)
    with zoo.kernel_backend('triton'):
        state.copy_(old)
        version = state._version
        assert torch.equal(op.ssd_step_(x, dt, A, B, C, state, D=D), y) and torch.equal(state, new)
        assert state._version > version  # autograd learns of it although no operator of PyTorch wrote
        with torch.inference_mode():
            state = old.clone()
            assert torch.equal(op.ssd_step_(x, dt, A, B, C, state, D=D), y) and torch.equal(state, new)


@inner
def test_public_op_and_its_gradients():
    """The short way in against the custom op, which is taken under a mode such as the FLOP counter."""
    x, dt, A, B, C, D, init, dy, _ = inputs(2, 20, 2, 1, 2, 16, 16, 'mild', None, True, torch.float32)
    tensors = [t.detach().float().requires_grad_() for t in (x, dt, A, B, C, D, init)]

    def loss(x, dt, A, B, C, D, init):
        y, final = op.ssd(x, dt, A, B, C, D=D, initial_state=init, output_final_state=True)
        return (y * dy.float()).sum() + final.square().sum()

    with zoo.kernel_backend('triton'):
        grads = torch.autograd.grad(loss(*tensors), tensors)
        with FlopCounterMode(display=False) as counter:
            counted = torch.autograd.grad(loss(*tensors), tensors)
        assert all(map(torch.equal, grads, counted)) and counter.get_total_flops() == 3 * 6 * 2 * 20 * 2 * 16 * 16
        for absent in (5, 6):  # optional arguments, and a result that nobody uses
            some = [None if i == absent else t for i, t in enumerate(tensors)]
            y, final = op.ssd(*some[:5], D=some[5], initial_state=some[6], output_final_state=True)
            leaves = [t for t in some if t is not None]
            assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(final.sum(), leaves), leaves))


@inner
def test_unsupported():
    x = torch.zeros(1, 1, 1, 16)
    assert ssd.unsupported(x.dtype, x.dtype, 64, 64) is None
    assert 'float64' in ssd.unsupported(torch.float64, x.dtype, 64, 64)
    assert '256' in ssd.unsupported(x.dtype, x.dtype, 64, 257)
