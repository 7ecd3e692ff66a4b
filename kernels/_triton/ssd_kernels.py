"""Device side of state space duality: states of segments and chunks, outputs, gradients, single steps.

Per head, chunks of BT tokens. With c_i the sum of log decays (base 2) up to token i of a chunk and c its total, token j
reaches token i with weight 2^(c_i - c_j) dt_j, the outgoing state with 2^(c - c_j) dt_j, and the state that arrives
reaches token i with 2^c_i: every exponent is <= 0. A state is (P, N), its P rows cut into NP blocks of BP.
Tokens past the end have x = B = C = dt = 0: they change nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from zoo.kernels._triton._common import LOG2E, load_tile, mm, store_tile
from zoo.kernels._triton.gla_chunks import place
from zoo.kernels._triton.gla_states import load_state

STRIDES = ['x_b', 'x_t', 'x_h', 's_b', 's_t', 's_h', 'b_b', 'b_t', 'b_h', 'c_b', 'c_t', 'c_h', 'y_b', 'y_t', 'y_h']
SIZES = ['T', 'nch', 'cps', 'nseg', 'n_chunks', 'n_segs']


@triton.jit
def load_steps(dt, s_t, t, low, high):
    """Step sizes of the tokens `t` within [low, high), 0 elsewhere."""
    return tl.load(dt + t.to(tl.int64) * s_t, mask=(t >= low) & (t < high), other=0.0).to(tl.float32)


@triton.jit
def add_and_keep(log, step, next_log, next_step):
    return log + next_log, next_step


@triton.jit
def running_sums(steps, rate, WIDE: tl.constexpr):
    """Log decays (base 2) summed up to each token of a chunk, and in all; and the steps, handed through.

    Differences of running sums lose what single sums have; with `WIDE` they are fp64, so that strong decays before a
    pair of tokens do not blur the weak ones between them. The steps come out of the scan so that the compiler moves
    them between layouts: it would rather load them again, 16 addresses to a thread.
    """
    log = steps * rate
    if WIDE:
        log = log.to(tl.float64)
    upto, steps = tl.associative_scan((log, steps), 0, add_and_keep)
    return upto, tl.sum(log, 0), steps


@triton.jit
def power(e):
    """2^e, for an exponent that is <= 0 up to rounding."""
    return tl.exp2(tl.minimum(e, 0.0).to(tl.float32))


@triton.jit
def segment_of(seg, segs, T, nch, cps, nseg, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Segment number -> batch row, first chunk, number of chunks, first token, end of the sequence."""
    if VARLEN:
        b = 0
        chunk0 = tl.load(segs + 4 * seg)
        count = tl.load(segs + 4 * seg + 1)
        t_seg = tl.load(segs + 4 * seg + 2)
        end = tl.load(segs + 4 * seg + 3)
    else:
        b = seg // nseg
        first = (seg % nseg) * cps
        chunk0 = b * nch + first
        count = tl.minimum(nch - first, cps)
        t_seg = first * BT
        end = T
    return tl.cast(b, tl.int64), chunk0, count, t_seg, end


@triton.jit(do_not_specialize=STRIDES + SIZES)
def ssd_kernel_states(
    x, dt, a, bm, cm, dy, states, prefix, seg_state, seg_total, init, dinit, final, segs,
    x_b, x_t, x_h, s_b, s_t, s_h, b_b, b_t, b_h, c_b, c_t, c_h, y_b, y_t, y_h, T, nch, cps, nseg, n_chunks, n_segs,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    NP: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, ADJOINT: tl.constexpr, VARLEN: tl.constexpr,
    INIT: tl.constexpr, DINIT: tl.constexpr, FINAL: tl.constexpr, A: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state; with `ADJOINT` also the gradient of the state, and both at every chunk.

    Program: ((segment, head, kind), P block). With one segment per sequence the sweep starts from `init` or `dinit` and
    writes `final`; with several it starts from zero and `gla_kernel_scan` follows.
    """
    NK: tl.constexpr = 2 if ADJOINT else 1
    pid = tl.program_id(0)
    pb = pid % NP
    slot = (pid // NP) % NK
    h = (pid // (NP * NK)) % H
    seg = pid // (NP * NK * H)
    adjoint = slot == 1
    b, chunk0, count, t_seg, end = segment_of(seg, segs, T, nch, cps, nseg, BT, VARLEN)
    if VARLEN:
        if chunk0 < 0:
            return
    v_ptr = x + (b * x_b + h * x_h) * A
    k_ptr = bm + (b * b_b + (h // RB) * b_h) * A
    v_t = x_t
    k_t = b_t
    if ADJOINT:
        if adjoint:
            v_ptr = dy + (b * y_b + h * y_h) * A
            k_ptr = cm + (b * c_b + (h // RC) * c_h) * A
            v_t = y_t
            k_t = c_t
    s_ptr = dt + b * s_b + tl.cast(h, tl.int64) * s_h
    rate = tl.load(a + h).to(tl.float32) * LOG2E
    r = tl.arange(0, BT)
    pp = tl.arange(0, BP)
    nn = tl.arange(0, BN)
    rows = pb * BP + pp

    state = tl.zeros((BP, BN), dtype=tl.float32)
    n = b
    if VARLEN:
        n = tl.cast(seg, tl.int64)
    spot = ((n * H + h) * P + rows[:, None]) * N + nn[None, :]
    ok = (rows < P)[:, None] & (nn < N)[None, :]
    if INIT:
        if (nseg == 1) & (slot == 0):
            state = tl.load(init + spot, mask=ok, other=0.0)
    if DINIT:
        if (nseg == 1) & adjoint:
            state = tl.load(dinit + spot, mask=ok, other=0.0)
    run = tl.sum(tl.zeros((BT,), dtype=tl.float32), 0)
    tile = tl.cast(slot * H + h, tl.int64) * n_chunks + chunk0
    way = tl.where(adjoint, -1, 1)
    t0 = t_seg + tl.where(adjoint, count - 1, 0) * BT
    steps = load_steps(s_ptr, s_t, t0 + r, t_seg, end)
    for step in range(0, count):
        c = tl.where(adjoint, count - 1 - step, step)
        t0 = t_seg + c * BT
        ok_t = r < end - t0
        now = steps
        steps = load_steps(s_ptr, s_t, t0 + way * BT + r, t_seg, end)  # the next chunk's, well before their use
        v = load_tile(v_ptr + tl.cast(t0, tl.int64) * v_t * A, r, rows, v_t * A, ok_t, P, NP * BP)
        k = load_tile(k_ptr + tl.cast(t0, tl.int64) * k_t * A, r, nn, k_t * A, ok_t, N, BN)
        upto, total, now = running_sums(now, rate, WIDE)
        if ADJOINT:
            at = tile + c
            tl.store(states + (at * (NP * BP) + rows[:, None]) * BN + nn[None, :], state.to(states.dtype.element_ty))
            tl.store(prefix + at * BN + nn, tl.zeros((BN,), dtype=tl.float32) + run, mask=(nn >= 0) & (pb == 0))
            weight = tl.where(adjoint, 1.0, now) * power(tl.where(adjoint, upto, total - upto))
        else:
            weight = now * power(total - upto)
        run += total.to(tl.float32)
        state = state * power(total) + mm(tl.trans(v.to(tl.float32) * weight[:, None]), k, CT, PREC)
    if nseg > 1:
        own = tl.cast(slot * H + h, tl.int64) * n_segs + seg
        tl.store(seg_state + (own * (NP * BP) + rows[:, None]) * BN + nn[None, :], state)
        tl.store(seg_total + own * BN + nn, tl.zeros((BN,), dtype=tl.float32) + run, mask=(nn >= 0) & (pb == 0))
    elif FINAL:
        if adjoint == (FINAL == 2):
            tl.store(final + spot, state, mask=ok)


@triton.jit(do_not_specialize=STRIDES + SIZES)
def ssd_fwd_kernel_out(
    x, dt, a, bm, cm, d, y, seg_state, init, final, segs,
    x_b, x_t, x_h, s_b, s_t, s_h, b_b, b_t, b_h, c_b, c_t, c_h, y_b, y_t, y_h, T, nch, cps, nseg, n_chunks, n_segs,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    NP: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, HAS_D: tl.constexpr, VARLEN: tl.constexpr,
    INIT: tl.constexpr, FINAL: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment, chunk by chunk, the state in registers. Program: ((segment, head), P block).

    The blocks of a head and the heads of a group are neighbours: they read B and C from the cache.
    """
    pid = tl.program_id(0)
    pb = pid % NP
    h = (pid // NP) % H
    seg = pid // (NP * H)
    b, chunk0, count, t_seg, end = segment_of(seg, segs, T, nch, cps, nseg, BT, VARLEN)
    if VARLEN:
        if chunk0 < 0:
            return
    x_ptr = x + (b * x_b + tl.cast(t_seg, tl.int64) * x_t + h * x_h) * A
    b_ptr = bm + (b * b_b + tl.cast(t_seg, tl.int64) * b_t + (h // RB) * b_h) * A
    c_ptr = cm + (b * c_b + tl.cast(t_seg, tl.int64) * c_t + (h // RC) * c_h) * A
    s_ptr = dt + b * s_b + tl.cast(h, tl.int64) * s_h
    o_ptr = y + ((b * T + t_seg) * H + h) * P
    rate = tl.load(a + h).to(tl.float32) * LOG2E
    if HAS_D:
        skip = tl.load(d + h).to(tl.float32)
    r = tl.arange(0, BT)
    pp = tl.arange(0, BP)
    nn = tl.arange(0, BN)
    rows = pb * BP + pp

    n = b
    if VARLEN:
        n = tl.cast(seg, tl.int64)
    spot = ((n * H + h) * P + rows[:, None]) * N + nn[None, :]
    ok = (rows < P)[:, None] & (nn < N)[None, :]
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if nseg > 1:
        own = tl.cast(h, tl.int64) * n_segs + seg
        state = tl.load(seg_state + (own * (NP * BP) + rows[:, None]) * BN + nn[None, :])
    elif INIT:
        state = tl.load(init + spot, mask=ok, other=0.0)
    steps = load_steps(s_ptr, s_t, t_seg + r, t_seg, end)
    for c in range(0, count):
        t = c * BT + r
        ok_t = t < end - t_seg
        xs = load_tile(x_ptr, t, rows, x_t * A, ok_t, P, NP * BP)
        bs = load_tile(b_ptr, t, nn, b_t * A, ok_t, N, BN)
        cs = load_tile(c_ptr, t, nn, c_t * A, ok_t, N, BN)
        now = steps
        steps = load_steps(s_ptr, s_t, t_seg + BT + t, t_seg, end)  # the next chunk's, well before their use
        upto, total, now = running_sums(now, rate, WIDE)
        gaps = (upto[:, None] - upto[None, :]).to(tl.float32)
        weights = mm(cs, tl.trans(bs), CT, PREC)
        weights = tl.where(r[:, None] >= r[None, :], weights, 0.0) * tl.exp2(tl.minimum(gaps, 0.0)) * now[None, :]
        out = mm(cs, tl.trans(state.to(CT)), CT, PREC) * power(upto)[:, None]
        out = tl.dot(weights.to(CT), xs.to(CT), acc=out, input_precision=PREC)
        if HAS_D:
            out += skip * xs.to(tl.float32)
        store_tile(o_ptr + tl.cast(c, tl.int64) * (BT * H * P), out, r, rows, H * P, ok_t, P, NP * BP)
        written = xs.to(tl.float32) * (now * power(total - upto))[:, None]
        state = state * power(total) + mm(tl.trans(written), bs, CT, PREC)
    if FINAL:
        if nseg == 1:
            tl.store(final + spot, state, mask=ok)


@triton.jit(do_not_specialize=STRIDES + SIZES)
def ssd_bwd_kernel_chunk(
    x, dt, a, bm, cm, d, dy, dx, ddt, db, dc, parts, states, prefix, seg_state, chunks,
    x_b, x_t, x_h, s_b, s_t, s_h, b_b, b_t, b_h, c_b, c_t, c_h, y_b, y_t, y_h, T, nch, cps, nseg, n_chunks, n_segs,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    NP: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, HAS_D: tl.constexpr, VARLEN: tl.constexpr,
    A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, from the state that arrives and the gradient of the one that leaves.

    Program: (chunk, head). `db` and `dc` are one head's share; `parts` (2, H, n_chunks) takes the chunk's share of the
    gradients of A and D.
    """
    pid = tl.program_id(0)
    h = pid % H
    gc = tl.cast(pid // H, tl.int64)
    b, t0, end, seg = place(gc, chunks, T, nch, cps, nseg, BT, VARLEN)
    part = parts + tl.cast(h, tl.int64) * n_chunks + gc
    if VARLEN:
        if b < 0:
            tl.store(part, 0.0)
            tl.store(part + tl.cast(n_chunks, tl.int64) * H, 0.0)
            return
        b = 0
    b = tl.cast(b, tl.int64)
    t0 = tl.cast(t0, tl.int64)
    several = nseg > 1
    VP: tl.constexpr = NP * BP
    r = tl.arange(0, BT)
    pp = tl.arange(0, BP)
    nn = tl.arange(0, BN)
    i = r[:, None]
    j = r[None, :]
    ok_t = r < end - t0
    x_ptr = x + (b * x_b + t0 * x_t + h * x_h) * A
    y_ptr = dy + (b * y_b + t0 * y_t + h * y_h) * A
    b_ptr = bm + (b * b_b + t0 * b_t + (h // RB) * b_h) * A
    c_ptr = cm + (b * c_b + t0 * c_t + (h // RC) * c_h) * A
    row = (b * T + t0) * H + h
    at = tl.cast(h, tl.int64) * n_chunks + gc
    at_seg = tl.cast(h, tl.int64) * n_segs + seg
    adj = tl.cast(H + h, tl.int64) * n_chunks + gc
    adj_seg = tl.cast(H + h, tl.int64) * n_segs + seg

    rate = tl.load(a + h).to(tl.float32)
    steps = tl.load(dt + b * s_b + tl.cast(h, tl.int64) * s_h + (t0 + r) * s_t, mask=ok_t, other=0.0).to(tl.float32)
    upto, total, steps = running_sums(steps, rate * LOG2E, WIDE)
    gaps = (upto[:, None] - upto[None, :]).to(tl.float32)
    down = power(upto)
    left = power(total - upto)

    bs = load_tile(b_ptr, r, nn, b_t * A, ok_t, N, BN)
    cs = load_tile(c_ptr, r, nn, c_t * A, ok_t, N, BN)
    dweights = tl.zeros((BT, BT), dtype=tl.float32)
    for pb in range(NP):
        ys = load_tile(y_ptr, r, pb * BP + pp, y_t * A, ok_t, P, VP)
        xs = load_tile(x_ptr, r, pb * BP + pp, x_t * A, ok_t, P, VP)
        dweights = tl.dot(ys.to(CT), tl.trans(xs.to(CT)), acc=dweights, input_precision=PREC)
    if HAS_D:
        tl.store(part + tl.cast(n_chunks, tl.int64) * H, tl.sum(tl.sum(tl.where(i == j, dweights, 0.0), 1), 0))
    decay = tl.exp2(tl.where(i >= j, gaps, float('-inf')))
    scores = mm(cs, tl.trans(bs), CT, PREC) * decay
    dscores = dweights * (decay * steps[None, :])
    products = dweights * scores * steps[None, :]
    # Pairs j < t <= i summed without the others, which would have to cancel.
    since = mm(j >= i, products, CT, PREC)
    if CT == tl.bfloat16:  # the gradient of A is a sum over all tokens with signs: it keeps what rounding leaves
        since += mm(j >= i, products - products.to(CT).to(tl.float32), CT, PREC)
    since = tl.sum(tl.where(j < i, since, 0.0), 1)
    scores = scores.to(CT)
    dscores = dscores.to(CT)

    acc = tl.zeros((BT, BN), dtype=tl.float32)
    held = tl.zeros((BN,), dtype=tl.float32)
    for pb in range(NP):
        rows = pb * BP + pp
        s = load_state(states, prefix, seg_state, at, at_seg, rows, nn, several, BN, VP, True)
        z = load_state(states, prefix, seg_state, adj, adj_seg, rows, nn, several, BN, VP, True)
        held += tl.sum(s.to(tl.float32) * z.to(tl.float32), 0)
        ys = load_tile(y_ptr, r, rows, y_t * A, ok_t, P, VP)
        acc = tl.dot(ys.to(CT), s.to(CT), acc=acc, input_precision=PREC)
    acc *= down[:, None]
    reads = tl.sum(acc * cs.to(tl.float32), 1)
    acc = tl.dot(dscores, bs.to(CT), acc=acc, input_precision=PREC)
    store_tile(dc + row * N, acc, r, nn, H * N, ok_t, N, BN)

    acc = tl.zeros((BT, BN), dtype=tl.float32)
    direct = tl.zeros((BT,), dtype=tl.float32)
    writes = tl.zeros((BT,), dtype=tl.float32)
    for pb in range(NP):
        rows = pb * BP + pp
        z = load_state(states, prefix, seg_state, adj, adj_seg, rows, nn, several, BN, VP, True)
        xs = load_tile(x_ptr, r, rows, x_t * A, ok_t, P, VP)
        ys = load_tile(y_ptr, r, rows, y_t * A, ok_t, P, VP)
        values = mm(bs, tl.trans(z), CT, PREC) * left[:, None]
        writes += tl.sum(values * xs.to(tl.float32), 1)
        values = tl.dot(tl.trans(scores), ys.to(CT), acc=values, input_precision=PREC)
        direct += tl.sum(values * xs.to(tl.float32), 1)
        values *= steps[:, None]
        if HAS_D:
            values += tl.load(d + h).to(tl.float32) * ys.to(tl.float32)
        store_tile(dx + row * P, values, r, rows, H * P, ok_t, P, VP)
        acc = tl.dot(xs.to(CT), z.to(CT), acc=acc, input_precision=PREC)
    acc *= (steps * left)[:, None]
    acc = tl.dot(tl.trans(dscores), cs.to(CT), acc=acc, input_precision=PREC)
    store_tile(db + row * N, acc, r, nn, H * N, ok_t, N, BN)

    # The log decay of token t acts on the pairs around it, on reads from t on and on writes before t.
    writes *= steps
    dlog = since + tl.sum(tl.where(j >= i, reads[None, :], writes[None, :]), 1)
    dlog += tl.sum(held, 0) * power(total)
    tl.store(ddt + row + r * H, (direct + dlog * rate).to(ddt.dtype.element_ty), mask=ok_t)
    tl.store(part, tl.sum(tl.where(ok_t, dlog * steps, 0.0), 0))


@triton.jit(do_not_specialize=['x_b', 'x_h', 's_b', 's_h', 'b_b', 'b_h', 'c_b', 'c_h'])
def ssd_kernel_step(
    x, dt, a, bm, cm, d, y, state, out, x_b, x_h, s_b, s_h, b_b, b_h, c_b, c_h,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NP: tl.constexpr,
    RB: tl.constexpr, RC: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One token; `out` may be `state`. Program: (batch entry, head, P block)."""
    pid = tl.program_id(0)
    pb = pid % NP
    h = (pid // NP) % H
    b = tl.cast(pid // (NP * H), tl.int64)
    rows = pb * BP + tl.arange(0, BP)
    nn = tl.arange(0, BN)
    ok_p = rows < P
    ok_n = nn < N
    xs = tl.load(x + b * x_b + h * x_h + rows, mask=ok_p, other=0.0).to(tl.float32)
    bs = tl.load(bm + b * b_b + (h // RB) * b_h + nn, mask=ok_n, other=0.0).to(tl.float32)
    cs = tl.load(cm + b * c_b + (h // RC) * c_h + nn, mask=ok_n, other=0.0).to(tl.float32)
    step = tl.load(dt + b * s_b + h * s_h).to(tl.float32)
    decay = tl.exp2(step * tl.load(a + h).to(tl.float32) * LOG2E)
    ok = ok_p[:, None] & ok_n[None, :]
    spot = ((b * H + h) * P + rows[:, None]) * N + nn[None, :]
    new = tl.load(state + spot, mask=ok, other=0.0) * decay + (step * xs)[:, None] * bs[None, :]
    tl.debug_barrier()  # in place, a small state is held by several threads each: all have read before one stores
    tl.store(out + spot, new, mask=ok)
    o = tl.sum(new * cs[None, :], 1)
    if HAS_D:
        o += tl.load(d + h).to(tl.float32) * xs
    tl.store(y + (b * H + h) * P + rows, o.to(y.dtype.element_ty), mask=ok_p)
