"""States of gated linear attention at every chunk boundary: sweep over the chunks of a segment, scan over segments.

Four kinds of state obey one recurrence, y (value side) and x (key side) being rows of the inputs:

| kind | x, y | gates | runs | weight of a row inside its chunk |
|---|---|---|---|---|
| S, forward scan | k, v | forward | left to right | gates after the row |
| R, reverse scan | k, v | reverse | right to left | gates before the row |
| dS, gradient of S | scale q, do | forward | right to left | gates up to the row, with it |
| dR, gradient of R | scale q, do | reverse | left to right | gates from the row on, with it |

Each is kept transposed, (V, K): the product y^T x then has at least 64 rows. Every exponent is <= 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from zoo.kernels._triton._common import gate_sums, load_gate, load_tile, mm


@triton.jit(do_not_specialize=['N', 'cps'])
def gla_kernel_table(cu, chunks, segs, spans, N, cps, BT: tl.constexpr, BN: tl.constexpr):
    """Where each chunk and each segment of packed sequences lies; one program per sequence.

    chunks (n_chunks, 4): sequence, first token, end of the sequence, segment; segs (n_segs, 4): first chunk, number of
    chunks, first token, end of the sequence; spans (N, 2): first segment, number of segments. Unused rows hold -1.
    """
    n = tl.program_id(0)
    chunk0 = 0
    seg0 = 0
    for i in range(0, n, BN):
        r = i + tl.arange(0, BN)
        size = tl.load(cu + r + 1, mask=r < n, other=0).to(tl.int32) - tl.load(cu + r, mask=r < n, other=0).to(tl.int32)
        c = (size + BT - 1) // BT
        s = tl.maximum((c + cps - 1) // cps, 1)
        chunk0 += tl.sum(c, 0)
        seg0 += tl.sum(tl.where(r < n, s, 0), 0)
    t0 = tl.load(cu + n).to(tl.int32)
    end = tl.load(cu + n + 1).to(tl.int32)
    count = (end - t0 + BT - 1) // BT
    n_seg = tl.maximum((count + cps - 1) // cps, 1)
    tl.store(spans + 2 * n, seg0)
    tl.store(spans + 2 * n + 1, n_seg)
    r = tl.arange(0, BN)
    for i in range(0, count, BN):
        row = chunks + 4 * (chunk0 + i + r)
        ok = i + r < count
        tl.store(row, n, mask=ok)
        tl.store(row + 1, t0 + (i + r) * BT, mask=ok)
        tl.store(row + 2, end, mask=ok)
        tl.store(row + 3, seg0 + (i + r) // cps, mask=ok)
    for i in range(0, n_seg, BN):
        row = segs + 4 * (seg0 + i + r)
        ok = i + r < n_seg
        tl.store(row, chunk0 + (i + r) * cps, mask=ok)
        tl.store(row + 1, tl.minimum(count - (i + r) * cps, cps), mask=ok)
        tl.store(row + 2, t0 + (i + r) * cps * BT, mask=ok)
        tl.store(row + 3, end, mask=ok)


STRIDES = ['q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t', 'v_h', 'd_b', 'd_t', 'd_h', 'g_b', 'g_t', 'g_h',
           'r_b', 'r_t', 'r_h']  # fmt: skip
SIZES = ['T', 'nch', 'cps', 'nseg', 'n_chunks', 'n_segs', 'H']


@triton.jit(do_not_specialize=STRIDES + SIZES)
def gla_kernel_states(
    q, k, v, do, gf, gb,
    states, totals, prefix, seg_state, seg_total, init, dinit, final, segs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs, H,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, DIRS: tl.constexpr, ADJOINT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    INIT: tl.constexpr, DINIT: tl.constexpr, FINAL: tl.constexpr, KEEP: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """State that arrives at every chunk of a segment (with `KEEP`), and the segment's own total.

    Program: (segment, head, kind) x value block. With one segment per sequence the sweep starts from `init` (states) or
    `dinit` (their gradients) and writes `final`; with several it starts from zero and `gla_kernel_scan` follows.
    """
    ND: tl.constexpr = 2 if DIRS == 3 else 1
    NK: tl.constexpr = ND * (2 if ADJOINT else 1)
    pid = tl.program_id(0)
    vb = tl.program_id(1)
    slot = pid % NK
    h = (pid // NK) % H
    seg = pid // (NK * H)
    adjoint = slot >= ND
    if DIRS == 3:
        rev = slot % 2
    else:
        rev = DIRS - 1
    leftward = (rev == 1) != adjoint

    if VARLEN:
        b = 0
        chunk0 = tl.load(segs + 4 * seg)
        count = tl.load(segs + 4 * seg + 1)
        t_seg = tl.load(segs + 4 * seg + 2)
        end = tl.load(segs + 4 * seg + 3)
        if chunk0 < 0:
            return
    else:
        b = seg // nseg
        first = (seg % nseg) * cps
        chunk0 = b * nch + first
        count = tl.minimum(nch - first, cps)
        t_seg = first * BT
        end = T

    b = tl.cast(b, tl.int64)
    x_ptr = k + (b * k_b + h * k_h) * A
    y_ptr = v + (b * v_b + h * v_h) * A
    x_t = k_t
    y_t = v_t
    weight = tl.where(adjoint, scale, 1.0)
    if ADJOINT:
        if adjoint:
            x_ptr = q + (b * q_b + h * q_h) * A
            y_ptr = do + (b * d_b + h * d_h) * A
            x_t = q_t
            y_t = d_t
    if GATE:
        g_ptr = gf + (b * g_b + h * g_h) * AG
        g_s = g_t
        if DIRS == 3:
            if rev == 1:
                g_ptr = gb + (b * r_b + h * r_h) * AG
                g_s = r_t
        elif DIRS == 2:
            g_ptr = gb + (b * r_b + h * r_h) * AG
            g_s = r_t

    r = tl.arange(0, BT)
    kk = tl.arange(0, BK)
    vv = vb * BV + tl.arange(0, BV)
    vrow = tl.arange(0, BV)
    i = r[:, None]
    j = r[None, :]
    own = ADJOINT & adjoint & (i == j)
    if leftward:
        member = (j < i) | own
    else:
        member = (j > i) | own

    state = tl.zeros((BV, BK), dtype=tl.float32)
    if INIT or DINIT:
        ok = (vv < V)[:, None] & (kk < K)[None, :]
        if VARLEN:
            n = tl.cast(seg, tl.int64)
        else:
            n = b
        spot = (n * H + h) * K * V + kk[None, :] * V + vv[:, None]
        if nseg == 1:
            if INIT:
                if not adjoint:
                    state = tl.load(init + spot, mask=ok, other=0.0)
            if DINIT:
                if adjoint:
                    state = tl.load(dinit + spot, mask=ok, other=0.0)
    run = tl.zeros((BV, BK), dtype=tl.float32)
    tile = (slot * H + h).to(tl.int64) * n_chunks + chunk0
    for step in range(0, count):
        c = step
        if leftward:
            c = count - 1 - step
        t0 = t_seg + c * BT
        ok_t = r < end - t0
        x = load_tile(x_ptr + tl.cast(t0, tl.int64) * x_t * A, r, kk, x_t * A, ok_t, K, BK)
        y = load_tile(y_ptr + tl.cast(t0, tl.int64) * y_t * A, r, vv, y_t * A, ok_t, V, NV * BV)
        if KEEP:
            out = (tile + c) * (NV * BV) + vb * BV
            tl.store(states + (out + vrow[:, None]) * BK + kk[None, :], state.to(states.dtype.element_ty))
        if GATE:
            g = load_gate(g_ptr + tl.cast(t0, tl.int64) * g_s * AG, r, kk, g_s * AG, ok_t, K, BK, GATE == 1)
            x = x.to(tl.float32) * (weight * tl.exp2(gate_sums(member, g, MT, SPLIT)))
            total = gate_sums(vrow[:, None] >= 0 * j, g, MT, SPLIT)  # the same in every row
            if KEEP:
                one = (vv == 0)[:, None]  # every row holds the same
                at_k = (tile + c) * BK + kk[None, :] + 0 * vrow[:, None]
                tl.store(totals + at_k, total, mask=one)
                tl.store(prefix + at_k, run, mask=one)
            run += total
            state = state * tl.exp2(total)
        else:
            x = x.to(tl.float32) * weight
        state += mm(tl.trans(y), x, CT, PREC)
    if nseg > 1:
        own_seg = (slot * H + h).to(tl.int64) * n_segs + seg
        tl.store(seg_state + (own_seg * (NV * BV) + vv[:, None]) * BK + kk[None, :], state)
        if GATE:
            one = (vv == 0)[:, None]  # every row holds the same
            tl.store(seg_total + own_seg * BK + kk[None, :] + 0 * vrow[:, None], run, mask=one)
    elif FINAL:
        ok = (vv < V)[:, None] & (kk < K)[None, :]
        if adjoint == (FINAL == 2):
            if VARLEN:
                n = tl.cast(seg, tl.int64)
            else:
                n = b
            tl.store(final + (n * H + h) * K * V + kk[None, :] * V + vv[:, None], state, mask=ok)


@triton.jit(do_not_specialize=['nseg', 'n_segs', 'H'])
def gla_kernel_scan(
    seg_state, seg_total, init, dinit, final, spans, nseg, n_segs, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VP: tl.constexpr,
    DIRS: tl.constexpr, ADJOINT: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    INIT: tl.constexpr, DINIT: tl.constexpr, FINAL: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Replace each segment's total by the state that arrives at it. Program: (sequence, head, kind) x value block.

    States in `init`, `dinit` and `final` are (K, V), or with `TURNED` (V, K) as in the scratch.
    """
    ND: tl.constexpr = 2 if DIRS == 3 else 1
    NK: tl.constexpr = ND * (2 if ADJOINT else 1)
    pid = tl.program_id(0)
    slot = pid % NK
    h = (pid // NK) % H
    n = tl.cast(pid // (NK * H), tl.int64)
    adjoint = slot >= ND
    rev = slot % 2 if DIRS == 3 else DIRS - 1
    leftward = (rev == 1) != adjoint
    if VARLEN:
        seg0 = tl.load(spans + 2 * n).to(tl.int64)
        count = tl.load(spans + 2 * n + 1)
    else:
        seg0 = n * nseg
        count = nseg
    kk = tl.arange(0, BK)
    vv = tl.program_id(1) * BV + tl.arange(0, BV)
    ok = (vv < V)[:, None] & (kk < K)[None, :]
    at = (n * H + h) * K * V
    if TURNED:
        at = at + vv[:, None] * K + kk[None, :]
    else:
        at = at + kk[None, :] * V + vv[:, None]
    state = tl.zeros((BV, BK), dtype=tl.float32)
    if INIT:
        if not adjoint:
            state = tl.load(init + at, mask=ok, other=0.0)
    if DINIT:
        if adjoint:
            state = tl.load(dinit + at, mask=ok, other=0.0)
    base = (slot * H + h).to(tl.int64) * n_segs + seg0
    for step in tl.range(0, count, num_stages=6):  # loads far ahead: the loop is nothing but their latency
        s = step
        if leftward:
            s = count - 1 - step
        spot = seg_state + ((base + s) * VP + vv[:, None]) * BK + kk[None, :]
        own = tl.load(spot)
        tl.store(spot, state)
        if GATE:
            state = state * tl.exp2(tl.load(seg_total + (base + s) * BK + kk))[None, :]
        state += own
    if FINAL:
        if adjoint == (FINAL == 2):
            tl.store(final + at, state, mask=ok)


@triton.jit
def load_state(
    states, prefix, seg_state, at_chunk, at_seg, vv, kk, several,
    BK: tl.constexpr, VP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """State that arrives at a chunk, (value block, K): what its own segment holds and what came from before.

    In the type in which states are stored, that of the products' operands: fp32 copies would cost registers.
    """
    s = tl.load(states + (at_chunk * VP + vv[:, None]) * BK + kk[None, :])
    if several:
        came = tl.load(seg_state + (at_seg * VP + vv[:, None]) * BK + kk[None, :])
        if GATE:
            came = came * tl.exp2(tl.load(prefix + at_chunk * BK + kk))[None, :]
        s = (s.to(tl.float32) + came).to(states.dtype.element_ty)
    return s
