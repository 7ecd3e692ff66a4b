"""Checks the gated linear attention kernels on the GPU.

    python tests/gpu/check_gla.py [--out FILE] [--shard I/N] [--dtypes A,B]

Compares every shape class, dtype and gate strength with a loop in fp64, over several seeds, with poisoned outputs,
twice for determinism (`--shard I/N` takes every N-th case: most of the time is compilation). Times come from
`zoo bench kernels`.
"""

import torch
import torch.nn.functional as F
from harness import DEVICE, LIMITS, main, verdict
from zoo.kernels._triton import gla

NAMES = {1: ('o', 'final', 'dq', 'dk', 'dv', 'dg', 'dinit'), 3: ('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')}


class Scan(torch.autograd.Function):
    """One direction in fp64 with a hand-written adjoint: a loop over tokens, vectorised over batch and heads."""

    @staticmethod
    def forward(ctx, q, k, v, g, scale, state, reverse):
        B, T, H, K = q.shape
        order = range(T - 1, -1, -1) if reverse else range(T)
        states = q.new_empty(T, B, H, K, v.shape[-1])
        decay = g.exp()
        for t in order:
            state = state * decay[:, t, :, :, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
            states[t] = state
        ctx.save_for_backward(q, k, v, decay, states)
        ctx.scale, ctx.reverse = scale, reverse
        return scale * torch.einsum('bthk,tbhkv->bthv', q, states), state.clone()

    @staticmethod
    def backward(ctx, do, dstate):
        q, k, v, decay, states = ctx.saved_tensors
        T = q.shape[1]
        dq = ctx.scale * torch.einsum('bthv,tbhkv->bthk', do, states)
        carry = dstate.clone()
        adj = torch.empty_like(states)
        for t in range(T) if ctx.reverse else range(T - 1, -1, -1):
            carry = carry + ctx.scale * q[:, t, :, :, None] * do[:, t, :, None, :]
            adj[t] = carry
            carry = carry * decay[:, t, :, :, None]
        dk = torch.einsum('tbhkv,bthv->bthk', adj, v)
        dv = torch.einsum('tbhkv,bthk->bthv', adj, k)
        # The state that arrives at t, decayed, is the state at t without its own k v^T.
        dg = (adj * states).sum(-1).permute(1, 0, 2, 3) - k * dk
        return dq, dk, dv, dg, None, carry, None


def make(B, T, H, K, V, kind, strength, dtype, gate_dtype, seed, n_init=None):
    torch.manual_seed(seed)
    new = lambda *s: torch.randn(*s, device=DEVICE)  # noqa: E731
    fused = new(B, T, H * (2 * K + V)).to(dtype)
    q, k, v = (x.unflatten(-1, (H, -1)) for x in fused.split([H * K, H * K, H * V], -1))
    gates = []
    for _ in range(2):
        shape = (B, T, H, K) if kind == 'channel' else (B, T, H)
        if strength == 'mild':
            g = F.logsigmoid(new(*shape)) / 16
        elif strength == 'mixed':
            g = -20.0 * (torch.rand(shape, device=DEVICE) < 0.3)
        elif strength == 'some':  # a few chunks with strong gates among mild ones
            g = F.logsigmoid(new(*shape)) / 16
            g[:, T // 3 : T // 3 + 5] = -20
        else:
            g = -6 * torch.rand(shape, device=DEVICE)
        gates.append(None if kind == 'none' else g.to(gate_dtype))
    do = new(B, T, H, V).to(dtype)
    init = dfinal = None
    if n_init:
        init, dfinal = new(n_init, H, K, V), new(n_init, H, K, V)
    return q, k, v, gates, do, init, dfinal


def reference(q, k, v, gates, scale, do, init, dfinal, dirs, cu):
    """Outputs and gradients in fp64 under the names of NAMES."""
    leaf = lambda x: None if x is None else x.detach().double().requires_grad_()  # noqa: E731
    q, k, v, init = map(leaf, (q, k, v, init))
    gates = [leaf(g) if dirs & d else None for d, g in zip((1, 2), gates)]
    B, T, H, K = q.shape
    rows = [slice(0, T)] if cu is None else [slice(a, b) for a, b in zip(cu[:-1], cu[1:])]
    outs, finals = [], []
    for n, s in enumerate(rows):
        total = 0
        for d in (1, 2):
            if not dirs & d:
                continue
            g = gates[d - 1]
            g = torch.zeros_like(q) if g is None else g if g.dim() == 4 else g[..., None].expand_as(q)
            if init is None:
                state = q.new_zeros(B, H, K, v.shape[-1])
            else:
                state = init if cu is None else init[n : n + 1]
            o, final = Scan.apply(q[:, s], k[:, s], v[:, s], g[:, s], scale, state, d == 2)
            total = total + o
        outs.append(total)
        finals.append(final)
    o, final = torch.cat(outs, 1), torch.cat(finals)
    leaves = [x for x in (q, k, v, *gates, init) if x is not None]
    objective = (o * do.double()).sum() + (0 if dfinal is None else (final * dfinal.double()).sum())
    grads = list(torch.autograd.grad(objective, leaves))
    out = {'o': o.detach()}
    out |= {n: grads.pop(0) for n in ('dq', 'dk', 'dv')}
    for n, g in zip(('dg_fwd', 'dg_bwd') if dirs == 3 else ('dg', 'dg'), gates):
        if g is not None:
            out[n] = grads.pop(0)
    if dirs != 3:
        out['final'] = final.detach()
        if init is not None:
            out['dinit'] = grads.pop(0)
    return out


def run(q, k, v, gates, scale, do, init, dfinal, dirs, cu):
    if dirs == 3:
        o = gla.bidirectional_gla_fwd(q, k, v, *gates, scale, cu)
        return dict(zip(NAMES[3], (o, *gla.bidirectional_gla_bwd(q, k, v, *gates, scale, do, cu))))
    g = gates[dirs - 1]
    o, final = gla.gla_fwd(q, k, v, g, scale, init, True, dirs == 2, cu)
    grads = gla.gla_bwd(q, k, v, g, scale, init, do, dfinal, dirs == 2, cu)
    return dict(zip(NAMES[1], (o, final, *grads)))


CASES = [  # B, T, H, K, V, gates, strength, directions, cu_seqlens, state
    (16, 196, 6, 32, 64, 'channel', 'mild', 3, None, False),
    (8, 196, 6, 32, 64, 'channel', 'mixed', 3, None, False),
    (8, 196, 6, 32, 64, 'channel', 'some', 3, None, False),
    (2, 1500, 3, 32, 64, 'channel', 'mild', 3, None, False),
    (2, 1500, 3, 32, 64, 'channel', 'some', 3, None, False),
    (2, 1, 6, 32, 64, 'channel', 'mild', 3, None, False),
    (3, 7, 2, 24, 48, 'channel', 'strong', 3, None, False),
    (3, 63, 2, 16, 16, 'head', 'mild', 3, None, False),
    (2, 200, 2, 64, 64, 'channel', 'mild', 3, None, False),
    (2, 200, 2, 128, 128, 'channel', 'mild', 3, None, False),
    (2, 200, 2, 80, 128, 'head', 'strong', 3, None, False),
    (2, 300, 2, 64, 128, 'none', 'mild', 3, None, False),
    (2, 300, 2, 64, 128, 'channel', 'some', 3, None, False),
    (2, 700, 2, 32, 64, 'head', 'mild', 3, None, False),
    (1, 2000, 2, 32, 64, 'channel', 'some', 3, (0, 1300, 1300, 2000), False),
    (2, 150, 2, 32, 64, 'channel', 'mild', 1, None, True),
    (2, 1300, 2, 32, 64, 'channel', 'mild', 1, None, True),
    (2, 1300, 2, 64, 64, 'head', 'mild', 2, None, True),
    (2, 300, 2, 32, 64, 'channel', 'mixed', 2, None, True),
    (2, 300, 2, 128, 128, 'channel', 'mixed', 1, None, True),
    (2, 300, 2, 64, 64, 'none', 'mild', 2, None, True),
    (1, 700, 2, 32, 64, 'channel', 'mild', 3, (0, 1, 1, 70, 134, 700), False),
    (1, 700, 2, 32, 64, 'channel', 'mild', 1, (0, 1, 1, 70, 134, 700), True),
    (1, 3000, 2, 32, 64, 'channel', 'some', 2, (0, 1300, 1300, 3000), True),
]


def check(say, shard=(0, 1), dtypes=tuple(LIMITS), cases=None, seeds=(0, 1)):
    bad = 0
    cases = CASES[shard[0] :: shard[1]] if cases is None else cases
    for dtype in dtypes:
        worst, (plain, gate) = {}, LIMITS[dtype]
        for case in cases:
            B, T, H, K, V, kind, strength, dirs, cu, state = case
            n_init = (B if cu is None else len(cu) - 1) if state else None
            for seed in seeds:
                gate_dtype = torch.float32 if seed % 2 and strength != 'mild' else dtype
                args = make(B, T, H, K, V, kind, strength, dtype, gate_dtype, seed, n_init)
                q, k, v, gates, do, init, dfinal = args
                expect = reference(q, k, v, gates, K**-0.5, do, init, dfinal, dirs, cu)
                ids = None if cu is None else torch.tensor(cu, device=DEVICE)
                limits = {n: gate if n.startswith('dg') else plain for n in expect}
                call = lambda: run(q, k, v, gates, K**-0.5, do, init, dfinal, dirs, ids)  # noqa: E731, B023
                good, errors = verdict(call, expect, limits, (dtype, case, 'seed', seed))
                bad += not good
                worst |= {n: max(worst.get(n, 0), e) for n, e in errors.items()}
        say(what='check', dtype=str(dtype)[6:], cases=len(cases), seeds=len(seeds), worst=worst)
    return bad


if __name__ == '__main__':
    main(check)
