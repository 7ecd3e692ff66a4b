"""Checks and times the gated linear attention kernels on the GPU.

    python tests/gpu/check_gla.py [--out FILE] [check] [time]

`check` compares every shape class, dtype and gate strength with a loop in fp64, over several seeds, with poisoned
outputs, twice for determinism (`--shard I/N` takes every N-th case: most of its time is compilation). `time`
writes the rows of docs/results/gla-kernels-*.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from zoo.kernels._triton import gla

DEVICE = 'cuda'
FLOORS = {'vig_s 224': (128, 196, 6, 32, 64), 'vig_s 1024': (16, 4096, 6, 32, 64), 'vig_b 224': (128, 196, 12, 32, 64)}
NAMES = {1: ('o', 'final', 'dq', 'dk', 'dv', 'dg', 'dinit'), 3: ('o', 'dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd')}
LIMITS = {torch.float32: (1e-5, 1e-5), torch.float16: (1.5e-3, 2e-3), torch.bfloat16: (5e-3, 1e-2)}


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


def rms(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-2)).item() if torch.isfinite(a).all() else float('inf')


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


def poisoned():
    """Make every fresh allocation NaN, so that an element that no kernel writes shows."""
    plain = torch.empty

    def empty(*a, **kw):
        x = plain(*a, **kw)
        return x.fill_(float('nan')) if x.is_floating_point() else x.fill_(-7)

    torch.empty = empty
    return lambda: setattr(torch, 'empty', plain)


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


def check(say, cases, dtypes, seeds=(0, 1)):
    bad = 0
    for dtype in dtypes:
        worst = {}
        for case in cases:
            B, T, H, K, V, kind, strength, dirs, cu, state = case
            n_init = (B if cu is None else len(cu) - 1) if state else None
            for seed in seeds:
                gate_dtype = torch.float32 if seed % 2 and strength != 'mild' else dtype
                args = make(B, T, H, K, V, kind, strength, dtype, gate_dtype, seed, n_init)
                q, k, v, gates, do, init, dfinal = args
                expect = reference(q, k, v, gates, K**-0.5, do, init, dfinal, dirs, cu)
                ids = None if cu is None else torch.tensor(cu, device=DEVICE)
                undo = poisoned()
                try:
                    got = run(q, k, v, gates, K**-0.5, do, init, dfinal, dirs, ids)
                    again = run(q, k, v, gates, K**-0.5, do, init, dfinal, dirs, ids)
                finally:
                    undo()
                errors = {n: rms(got[n], x) for n, x in expect.items()}
                same = all(torch.equal(got[n], again[n]) for n in expect)
                plain, gate = LIMITS[dtype]
                ok = same and all(e < (gate if n.startswith('dg') else plain) for n, e in errors.items())
                for n, e in errors.items():
                    worst[n] = max(worst.get(n, 0), e)
                if not ok:
                    bad += 1
                    print('BAD', dtype, case, 'seed', seed, 'same' if same else 'NOT DETERMINISTIC',
                          {n: f'{e:.1e}' for n, e in errors.items()}, flush=True)  # fmt: skip
        say(what='check', dtype=str(dtype)[6:], cases=len(cases), seeds=len(seeds), worst=worst)
    return bad


def events(fn, rep=150):
    return do_bench(fn, warmup=30, rep=rep, return_mode='median')


def graphed(fns, replays=30):
    """ms per call inside a graph that rotates over several sets of inputs (so none stays in the L2 cache)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for f in fns:
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in fns:
            f()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / len(fns))
    return sorted(times)[len(times) // 2]


def floor_inputs(shape, dtype=torch.bfloat16, strength='mild', sets=4):
    made = [make(*shape, 'channel', strength, dtype, dtype, s) for s in range(sets)]
    return [tuple(x.contiguous() if torch.is_tensor(x) else x for x in m) for m in made]


def forward_of(sets, scale):
    return [lambda s=s: gla.bidirectional_gla_fwd(*s[:3], *s[3], scale, None) for s in sets]


def both_of(sets, scale):
    return [lambda s=s: (gla.bidirectional_gla_fwd(*s[:3], *s[3], scale, None),
                         gla.bidirectional_gla_bwd(*s[:3], *s[3], scale, s[4], None)) for s in sets]  # fmt: skip


def timings(say):
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / events(lambda: y.copy_(x)) / 1e9
    say(what='copy', TBps=copy)
    # The first call of the process compiles; the same op at other lengths must not.
    for label, make_fn in (('fwd', forward_of), ('fwd+bwd', both_of)):
        row = {}
        for T in (196, 192, 4096):
            fn = make_fn(floor_inputs((2, T, 6, 32, 64), sets=1), 0.1)[0]
            torch.cuda.synchronize()
            start = time.perf_counter()
            fn()
            torch.cuda.synchronize()
            row[f'T{T}_s'] = time.perf_counter() - start
        say(what='first call', op=label, **row)
    for name, shape in FLOORS.items():
        B, T, H, K, V = shape
        scale = K**-0.5 / 2
        sets = floor_inputs(shape)
        fwd, both = forward_of(sets, scale), both_of(sets, scale)
        row = dict(what='bidirectional_gla', shape=name, B=B, T=T, H=H, K=K, V=V, dtype='bfloat16')
        row |= dict(fwd_ms=events(fwd[0]), fwd_graph_ms=graphed(fwd))
        row |= dict(fwdbwd_ms=events(both[0]), fwdbwd_graph_ms=graphed(both))
        row['floor_fwd_ms'] = B * T * H * (4 * K + 2 * V) * 2 / copy / 1e9
        row['floor_bwd_ms'] = B * T * H * (8 * K + 3 * V) * 2 / copy / 1e9
        small = [tuple(x[:2] if torch.is_tensor(x) else x for x in sets[0])][0]
        q, k, v, gates, do, init, dfinal = small
        gates = [g[:2] for g in gates]
        expect = reference(q, k, v, gates, scale, do, init, dfinal, 3, None)
        got = run(q, k, v, gates, scale, do, init, dfinal, 3, None)
        row['relative_rms'] = {n: rms(got[n], x) for n, x in expect.items()}
        strong = floor_inputs(shape, strength='mixed')
        row['any_gate_fwd_graph_ms'] = graphed(forward_of(strong, scale))
        row['any_gate_fwdbwd_graph_ms'] = graphed(both_of(strong, scale))
        heads = [[torch.randn(B, H, T, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
                 for _ in range(4)]  # fmt: skip
        douts = [torch.randn_like(h[0]) for h in heads]
        with torch.no_grad():
            att = [lambda h=h: F.scaled_dot_product_attention(*h) for h in heads]
            row |= dict(sdpa_fwd_ms=events(att[0]), sdpa_fwd_graph_ms=graphed(att))
        train = [lambda h=h, d=d: torch.autograd.grad(F.scaled_dot_product_attention(*h), h, d)
                 for h, d in zip(heads, douts)]  # fmt: skip
        row |= dict(sdpa_fwdbwd_ms=events(train[0]), sdpa_fwdbwd_graph_ms=graphed(train, 10))
        say(**row)
    sets = floor_inputs((2, 64, 2, 32, 64))
    for label, f in (('fwd', forward_of(sets, 0.1)[0]), ('fwd+bwd', both_of(sets, 0.1)[0])):
        f()
        torch.cuda.synchronize()
        t = time.perf_counter()
        for _ in range(200):
            f()
        say(what='launch overhead', op=label, us=(time.perf_counter() - t) / 200 * 1e6)
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('parts', nargs='*', default=['time', 'check'])
    parser.add_argument('--out')
    parser.add_argument('--shard', default='0/1')
    parser.add_argument('--dtypes', default='float32,float16,bfloat16')
    args = parser.parse_args()
    rows = []

    def say(**row):
        rows.append(row)
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)

    say(what='device', name=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        cuda=torch.version.cuda)  # fmt: skip
    bad = 0
    for part in args.parts or ['time', 'check']:
        start = time.time()
        if part == 'check':
            i, n = map(int, args.shard.split('/'))
            bad += check(say, cases=CASES[i::n], dtypes=[getattr(torch, d) for d in args.dtypes.split(',')])
        else:
            timings(say)
        print(part, 'took', round(time.time() - start, 1), 's', flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + '\n')
    print('BAD CASES', bad)
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
