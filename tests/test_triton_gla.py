"""The Triton kernels of gated linear attention in Triton's CPU interpreter, against loops in fp64.

The interpreter proves the formulas and the masks; tests/gpu/check_gla.py proves the compiled code.
"""

import math
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
    from zoo.kernels._triton import gla


def scan(q, k, v, g, scale, state, reverse):
    """One direction of one sequence (T, H, .), token by token -> outputs and the last state."""
    T, H, K = q.shape
    state = q.new_zeros(H, K, v.shape[-1]) if state is None else state
    out = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        if g is not None:
            decay = g[t].exp()
            state = state * (decay[:, :, None] if decay.dim() == 2 else decay[:, None, None])
        state = state + k[t, :, :, None] * v[t, :, None, :]
        out[t] = scale * torch.einsum('hk,hkv->hv', q[t], state)
    return (torch.stack(out) if T else v), state


def reference(q, k, v, gates, scale, init, cu, dirs):
    """dirs: 1 forward, 2 reverse, 3 both. Returns outputs like q's packing and final states (N, H, K, V)."""
    if cu is None:
        rows = [(b, slice(0, q.shape[1])) for b in range(q.shape[0])]
    else:
        rows = [(0, slice(int(a), int(b))) for a, b in zip(cu[:-1], cu[1:])]
    out = torch.zeros_like(v)
    finals = []
    for n, (b, s) in enumerate(rows):
        total = 0
        for d in (1, 2):
            if dirs & d:
                g = gates[d - 1]
                o, final = scan(q[b, s], k[b, s], v[b, s], None if g is None else g[b, s], scale,
                                None if init is None else init[n], d == 2)  # fmt: skip
                total = total + o
        out[b, s] = total if s.stop > s.start else out[b, s]
        finals.append(final)
    return out, torch.stack(finals)


def rms(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1.0)).item() if torch.isfinite(a).all() else math.inf


def gates_of(kind, B, T, H, K, strength):
    if kind == 'none':
        return None
    shape = (B, T, H, K) if kind == 'channel' else (B, T, H)
    if strength == 'mild':
        return torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64)) / 16
    if strength == 'mixed':  # whole stretches of closed gates between open ones
        return -20.0 * (torch.rand(shape, dtype=torch.float64) < 0.3) * torch.rand(shape, dtype=torch.float64).round()
    return -torch.rand(shape, dtype=torch.float64) * 6


CASES = [  # B, T, H, K, V, gates, strength, directions, cu_seqlens, initial state, dtype
    (1, 196, 2, 32, 64, 'channel', 'mild', 3, None, False, 'float16'),
    (1, 196, 1, 32, 64, 'channel', 'mixed', 3, None, False, 'float32'),
    (1, 100, 1, 32, 64, 'channel', 'mixed', 3, None, False, 'float16'),
    (1, 64, 2, 16, 16, 'head', 'mild', 3, None, False, 'float32'),
    (2, 63, 1, 24, 48, 'channel', 'strong', 3, None, False, 'float32'),
    (1, 7, 2, 80, 128, 'head', 'strong', 3, None, False, 'float32'),
    (2, 1, 1, 32, 32, 'channel', 'mild', 3, None, False, 'float32'),
    (1, 130, 1, 16, 80, 'none', 'mild', 3, None, False, 'float32'),
    (1, 1030, 1, 16, 16, 'channel', 'mild', 3, None, False, 'float16'),
    (1, 196, 1, 32, 64, 'channel', 'mild', 3, None, False, 'bfloat16'),
    (1, 150, 1, 16, 80, 'channel', 'mixed', 3, None, False, 'bfloat16'),
    (1, 150, 1, 16, 64, 'channel', 'mixed', 3, None, False, 'bfloat16'),
    (1, 700, 1, 16, 16, 'head', 'mild', 3, None, False, 'bfloat16'),
    (1, 700, 1, 16, 16, 'channel', 'mild', 3, (0, 0, 650, 700), False, 'bfloat16'),
    (2, 70, 2, 32, 64, 'channel', 'mild', 1, None, True, 'float16'),
    (1, 70, 2, 32, 24, 'channel', 'mixed', 2, None, True, 'float32'),
    (1, 1030, 1, 16, 16, 'channel', 'strong', 1, None, True, 'float32'),
    (1, 1100, 1, 16, 16, 'head', 'mild', 2, None, True, 'float16'),
    (1, 600, 1, 16, 16, 'none', 'mild', 2, None, True, 'float16'),
    (1, 100, 1, 48, 16, 'head', 'mild', 1, None, True, 'float16'),
    (1, 153, 1, 16, 32, 'channel', 'mild', 3, (0, 1, 1, 70, 134, 153), False, 'float32'),
    (1, 153, 1, 16, 32, 'head', 'mild', 1, (0, 1, 1, 70, 134, 153), True, 'float32'),
    (1, 1290, 1, 16, 16, 'channel', 'mild', 2, (0, 1230, 1290), True, 'float16'),
    (1, 1290, 1, 16, 16, 'channel', 'strong', 3, (0, 60, 1290), False, 'float32'),
]


def inputs(B, T, H, K, V, kind, strength, dirs, cu, state, dtype):
    """fp64 leaves whose values are exact in `dtype`."""
    torch.manual_seed(T + K)
    fixed = lambda x: None if x is None else x.to(dtype).double().requires_grad_()  # noqa: E731
    N = B if cu is None else len(cu) - 1
    q, k, v = (fixed(torch.randn(B, T, H, d, dtype=torch.float64)) for d in (K, K, V))
    gates = [fixed(gates_of(kind, B, T, H, K, strength)) if dirs & d else None for d in (1, 2)]
    init = fixed(torch.randn(N, H, K, V, dtype=torch.float64)) if state else None
    do = torch.randn(B, T, H, V, dtype=torch.float64).to(dtype).double()
    dfinal = torch.randn(N, H, K, V, dtype=torch.float64) if state else None
    return q, k, v, gates, init, do, dfinal


def run(q, k, v, gates, scale, init, do, dfinal, cu, dirs):
    """Kernel outputs under names."""
    if dirs == 3:
        o = gla.bidirectional_gla_fwd(q, k, v, *gates, scale, cu)
        grads = gla.bidirectional_gla_bwd(q, k, v, *gates, scale, do, cu)
        return dict(zip(('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd'), (o, *grads)))
    g = gates[dirs - 1]
    o, final = gla.gla_fwd(q, k, v, g, scale, init, True, dirs == 2, cu)
    grads = gla.gla_bwd(q, k, v, g, scale, init, do, dfinal, dirs == 2, cu)
    return dict(zip(('o', 'final', 'dq', 'dk', 'dv', 'dg', 'dinit'), (o, final, *grads)))


@inner
@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(map(str, c)).replace(' ', ''))
def test_against_loop(case, monkeypatch):
    B, T, H, K, V, kind, strength, dirs, cu, state, dtype = case
    dtype = getattr(torch, dtype)
    q, k, v, gates, init, do, dfinal = inputs(B, T, H, K, V, kind, strength, dirs, cu, state, dtype)
    scale = K**-0.5
    o, final = reference(q, k, v, gates, scale, init, cu, dirs)
    leaves = [x for x in (q, k, v, *gates, init) if x is not None]
    objective = (o * do).sum() + (0 if dfinal is None else (final * dfinal).sum())
    rest = list(torch.autograd.grad(objective, leaves))
    expect = {name: rest.pop(0) for name in ('dq', 'dk', 'dv')}
    for name, g in zip(('dg_fwd', 'dg_bwd') if dirs == 3 else ('dg', 'dg'), gates):
        if g is not None:
            expect[name] = rest.pop(0)
    if init is not None:
        expect['dinit'] = rest.pop(0)
    expect['o'] = o
    if dirs != 3:
        expect['final'] = final

    # Non-contiguous views: q, k and v lie in one fused tensor, as a projection leaves them.
    fused = torch.cat([x.detach().to(dtype).flatten(2) for x in (q, k, v)], -1)
    qs, ks, vs = (x.unflatten(-1, (H, -1)) for x in fused.split([H * K, H * K, H * V], -1))
    gs = [None if g is None else g.detach().to(dtype).transpose(0, 1).contiguous().transpose(0, 1) for g in gates]
    poison = lambda f: lambda *a, **kw: _poisoned(f(*a, **kw))  # noqa: E731
    monkeypatch.setattr(torch, 'empty', poison(torch.empty))
    got = run(qs, ks, vs, gs, scale, None if init is None else init.detach().float(), do.to(dtype),
              None if dfinal is None else dfinal.float(), None if cu is None else torch.tensor(cu), dirs)  # fmt: skip
    limit = {'float32': 1e-5, 'float16': 1e-3, 'bfloat16': 5e-3}[case[-1]]
    errors = {name: rms(got[name], x.detach()) for name, x in expect.items()}
    assert all(e < limit for e in errors.values()), errors
    assert got['o'].dtype == got['dq'].dtype == got['dk'].dtype == got['dv'].dtype == dtype


def _poisoned(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-7)


@inner
def test_unsupported():
    x = torch.zeros(1, 1, 1, 16)
    assert gla.unsupported(x.dtype, None, 64, 64) is None
    assert 'float64' in gla.unsupported(torch.float64, None, 64, 64)
    assert '128' in gla.unsupported(x.dtype, x.dtype, 64, 256)
