"""Bidirectional gated linear attention, forward, one segment per program: the fast road for bf16 and per-token gates.

Two sweeps over the chunks of the segment: right to left for the state R that the reverse scan brings to each chunk,
kept in a small scratch; then left to right with the forward state S in registers, writing each output once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from zoo.kernels._triton._common import gate_sums, load_gate, load_tile, mm, store_tile
from zoo.kernels._triton.gla_chunks import level_weights
from zoo.kernels._triton.gla_states import SIZES, STRIDES


@triton.jit(do_not_specialize=STRIDES + SIZES)
def gla_fwd_kernel_sweep(
    q, k, v, gf, gb, o, states, seg_state, flags, segs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs, H,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr, LIMIT: tl.constexpr, SAFE: tl.constexpr, PARTS: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment. Program: (segment, head) x value block.

    The launch with `SAFE` off marks the programs whose gates pass `LIMIT` inside a chunk; the launch with it on, which
    follows, computes those and leaves the others alone. It cuts each of the chunks that `cps`, `nch` and the segment
    table count into `PARTS` of `BT` tokens: the safe form's work in a chunk grows with its square.
    """
    pid = tl.program_id(0)
    vb = tl.program_id(1)
    h = pid % H
    seg = pid // H
    flag = flags + pid * NV + vb
    if SAFE:
        if tl.load(flag) == 0:
            return
    if VARLEN:
        b = 0
        chunk0 = tl.load(segs + 4 * seg)
        count = tl.load(segs + 4 * seg + 1)
        t_seg = tl.load(segs + 4 * seg + 2)
        end = tl.load(segs + 4 * seg + 3)
        if chunk0 < 0:
            tl.store(flag, 0)
            return
    else:
        b = seg // nseg
        first = (seg % nseg) * cps
        chunk0 = b * nch + first
        count = tl.minimum(nch - first, cps)
        t_seg = first * (BT * PARTS)
        end = T
    chunk0 *= PARTS
    count *= PARTS
    b = tl.cast(b, tl.int64)
    t_seg = tl.cast(t_seg, tl.int64)
    VP: tl.constexpr = NV * BV
    r = tl.arange(0, BT)
    kk = tl.arange(0, BK)
    row = tl.arange(0, BV)
    vv = vb * BV + row
    i = r[:, None]
    j = r[None, :]
    ones = row[:, None] >= 0 * j
    q_ptr = q + (b * q_b + t_seg * q_t + h * q_h) * A
    k_ptr = k + (b * k_b + t_seg * k_t + h * k_h) * A
    v_ptr = v + (b * v_b + t_seg * v_t + h * v_h) * A
    f_ptr = gf + (b * g_b + t_seg * g_t + h * g_h) * AG
    b_ptr = gb + (b * r_b + t_seg * r_t + h * r_h) * AG
    o_ptr = o + ((b * T + t_seg) * H + h) * V
    scratch = states + ((h.to(tl.int64) * n_chunks * PARTS + chunk0) * VP + vv[:, None]) * BK + kk[None, :]
    rest = end - t_seg

    state = tl.zeros((BV, BK), dtype=tl.float32)
    if nseg > 1:
        at = (H + h).to(tl.int64) * n_segs + seg
        state = tl.load(seg_state + (at * VP + vv[:, None]) * BK + kk[None, :])
    for step in range(0, count - 1):
        c = count - 1 - step
        rows = c * BT + r
        ok_t = rows < rest
        ks = load_tile(k_ptr, rows, kk, k_t * A, ok_t, K, BK)
        vs = load_tile(v_ptr, rows, vv, v_t * A, ok_t, V, VP)
        gs = load_gate(b_ptr, rows, kk, r_t * AG, ok_t, K, BK, GATE == 1)
        tl.store(scratch + c.to(tl.int64) * (VP * BK), state.to(states.dtype.element_ty))
        ks = ks.to(tl.float32) * tl.exp2(gate_sums(j < i, gs, MT, SPLIT))
        state = state * tl.exp2(gate_sums(ones, gs, MT, SPLIT)) + mm(tl.trans(vs), ks, CT, PREC)
    if count > 0:
        tl.store(scratch, state.to(states.dtype.element_ty))
    tl.debug_barrier()

    state = tl.zeros((BV, BK), dtype=tl.float32)
    if nseg > 1:
        at = h.to(tl.int64) * n_segs + seg
        state = tl.load(seg_state + (at * VP + vv[:, None]) * BK + kk[None, :])
    lowest = tl.zeros((BT, BK), dtype=tl.float32)
    for c in range(0, count):
        rows = c * BT + r
        ok_t = rows < rest
        qs = load_tile(q_ptr, rows, kk, q_t * A, ok_t, K, BK)
        ks = load_tile(k_ptr, rows, kk, k_t * A, ok_t, K, BK)
        vs = load_tile(v_ptr, rows, vv, v_t * A, ok_t, V, VP)
        gfs = load_gate(f_ptr, rows, kk, g_t * AG, ok_t, K, BK, GATE == 1)
        gbs = load_gate(b_ptr, rows, kk, r_t * AG, ok_t, K, BK, GATE == 1)
        came = tl.load(scratch + tl.cast(c, tl.int64) * (VP * BK))
        qs = qs.to(tl.float32) * scale
        ks = ks.to(tl.float32)
        ef = gate_sums(j <= i, gfs, MT, SPLIT)
        eb = gate_sums(j >= i, gbs, MT, SPLIT)
        qf = (qs * tl.exp2(ef)).to(CT)
        qb = (qs * tl.exp2(eb)).to(CT)
        decay = tl.exp2(gate_sums(ones, gfs, MT, SPLIT))
        if SAFE:
            a = tl.zeros((BT, BT), dtype=tl.float32)
            for level in range(0, LEVELS):
                x, y, pairs, second = level_weights(level, r, gfs, gbs, BT, 3, MT, SPLIT)
                a += tl.where(pairs, mm(qs * tl.exp2(x), tl.trans(ks * tl.exp2(y)), CT, PREC), 0.0)
            a += tl.where(i == j, 2 * tl.sum(qs * ks, 1)[:, None], 0.0)
        else:
            lowest = tl.minimum(lowest, tl.minimum(ef, eb))
            kf = (ks * tl.exp2(-ef)).to(CT)
            kb = (ks * tl.exp2(-eb)).to(CT)
            low = mm(qf, tl.trans(kf), CT, PREC)
            high = mm(qb, tl.trans(kb), CT, PREC)
            a = tl.where(i >= j, low, 0.0) + tl.where(i <= j, high, 0.0)
        out = mm(a, vs, CT, PREC)
        out += mm(qf, tl.trans(state.to(CT)), CT, PREC)
        out += mm(qb, tl.trans(came.to(CT)), CT, PREC)
        store_tile(o_ptr + tl.cast(c, tl.int64) * (BT * H * V), out, r, vv, H * V, ok_t, V, VP)
        if SAFE:
            kf = ks * tl.exp2(gate_sums(j > i, gfs, MT, SPLIT))
            state = state * decay + mm(tl.trans(vs), kf, CT, PREC)
        else:
            state = (state + mm(tl.trans(vs), kf, CT, PREC)) * decay
    if not SAFE:
        tl.store(flag, (tl.min(tl.min(lowest, 1), 0) < LIMIT).to(tl.int32))
