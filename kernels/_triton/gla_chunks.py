"""Outputs and gradients of gated linear attention, one chunk per program, from the states that arrive at the chunk.

Inside a chunk token j weighs exp(sum of log gates between j and i) in output i: forward gates below the diagonal,
reverse gates above it. The fast form splits this into a factor for i and one for j around the chunk's edge; the second
grows with the gates' sum, so a chunk whose sum passes `LIMIT` takes the safe form: halve the chunk again and again and refer
the pairs that a level separates to the boundary between the halves, where both factors are <= 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from zoo.kernels._triton._common import gate_sums, load_gate, load_tile, mm, run_sums, store_tile
from zoo.kernels._triton.gla_states import SIZES, STRIDES, load_state


@triton.jit
def place(gc, chunks, T, nch, cps, nseg, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Chunk number -> batch row, first token, end of the sequence, segment."""
    if VARLEN:
        b = tl.load(chunks + 4 * gc)
        t0 = tl.load(chunks + 4 * gc + 1)
        end = tl.load(chunks + 4 * gc + 2)
        seg = tl.load(chunks + 4 * gc + 3)
    else:
        b = gc // nch
        t0 = (gc % nch) * BT
        end = T
        seg = b * nseg + (gc % nch) // cps
    return b, t0, end, seg


@triton.jit
def halves(level, r, BT: tl.constexpr):
    """At a level of the halving: block of each token, whether it lies in the block's second half, the half boundary."""
    half = BT >> (level + 1)
    block = r // (2 * half)
    second = (r & half) != 0
    return block, second, block * 2 * half + half


@triton.jit
def level_weights(level, r, gf, gb, BT: tl.constexpr, DIRS: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr):
    """Exponents (log 2, <= 0) from each token to its half boundary, as query and as key, and the pairs they serve."""
    block, second, edge = halves(level, r, BT)
    i = r[:, None]
    j = r[None, :]
    e = edge[:, None]
    late = second[:, None]
    apart = block[:, None] == block[None, :]
    if DIRS == 1:
        x = gate_sums(late & (j >= e) & (j <= i), gf, MT, SPLIT)
        y = gate_sums((late == 0) & (j > i) & (j < e), gf, MT, SPLIT)
        pairs = apart & late & (second[None, :] == 0)
    elif DIRS == 2:
        x = gate_sums((late == 0) & (j >= i) & (j < e), gb, MT, SPLIT)
        y = gate_sums(late & (j >= e) & (j < i), gb, MT, SPLIT)
        pairs = apart & (late == 0) & second[None, :]
    else:
        x = gate_sums(late & (j >= e) & (j <= i), gf, MT, SPLIT)
        x += gate_sums((late == 0) & (j >= i) & (j < e), gb, MT, SPLIT)
        y = gate_sums((late == 0) & (j > i) & (j < e), gf, MT, SPLIT)
        y += gate_sums(late & (j >= e) & (j < i), gb, MT, SPLIT)
        pairs = apart & (late != second[None, :])
    return x, y, pairs, second


@triton.jit
def wild(
    totals, h, gc, kk, n_chunks,
    H: tl.constexpr, BK: tl.constexpr, DIRS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Whether the gates of a chunk sum up to less than `LIMIT` in any channel, in any direction."""
    at = h.to(tl.int64) * n_chunks + gc
    total = tl.load(totals + at * BK + kk)
    if DIRS == 3:
        total = tl.minimum(total, tl.load(totals + (at + H * n_chunks) * BK + kk))
    return tl.min(total, 0) < LIMIT


@triton.jit(do_not_specialize=STRIDES + SIZES)
def gla_fwd_kernel_out(
    q, k, v, gf, gb, o,
    states, totals, prefix, seg_state, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, LEVELS: tl.constexpr, DIRS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr, LIMIT: tl.constexpr, SAFE: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk. Program: (chunk, head) x value block."""
    pid = tl.program_id(0)
    vb = tl.program_id(1)
    h = pid % H
    gc = tl.cast(pid // H, tl.int64)
    b, t0, end, seg = place(gc, chunks, T, nch, cps, nseg, BT, VARLEN)
    if VARLEN:
        if b < 0:
            return
        b = 0
    if GATE:
        if wild(totals, h, gc, tl.arange(0, BK), n_chunks, H, BK, DIRS, LIMIT) != SAFE:
            return
    b = tl.cast(b, tl.int64)
    t0 = tl.cast(t0, tl.int64)
    VP: tl.constexpr = NV * BV
    r = tl.arange(0, BT)
    kk = tl.arange(0, BK)
    vv = vb * BV + tl.arange(0, BV)
    ok_t = r < end - t0
    qs = load_tile(q + (b * q_b + t0 * q_t + h * q_h) * A, r, kk, q_t * A, ok_t, K, BK).to(tl.float32) * scale
    ks = load_tile(k + (b * k_b + t0 * k_t + h * k_h) * A, r, kk, k_t * A, ok_t, K, BK)
    vs = load_tile(v + (b * v_b + t0 * v_t + h * v_h) * A, r, vv, v_t * A, ok_t, V, VP)
    i = r[:, None]
    j = r[None, :]
    last: tl.constexpr = 1 if DIRS == 3 else 0  # slot of the reverse direction

    out = tl.zeros((BT, BV), dtype=tl.float32)
    if GATE:
        gfs = ks
        gbs = ks
        if DIRS != 2:
            gfs = load_gate(gf + (b * g_b + t0 * g_t + h * g_h) * AG, r, kk, g_t * AG, ok_t, K, BK, GATE == 1)
            ef = gate_sums(j <= i, gfs, MT, SPLIT)
            qf = qs * tl.exp2(ef)
            at = h.to(tl.int64) * n_chunks + gc
            at_seg = h.to(tl.int64) * n_segs + seg
            s = load_state(states, prefix, seg_state, at, at_seg, vv, kk, nseg > 1, BK, VP, True)
            out += mm(qf, tl.trans(s), CT, PREC)
        if DIRS != 1:
            gbs = load_gate(gb + (b * r_b + t0 * r_t + h * r_h) * AG, r, kk, r_t * AG, ok_t, K, BK, GATE == 1)
            eb = gate_sums(j >= i, gbs, MT, SPLIT)
            qb = qs * tl.exp2(eb)
            at = (last * H + h).to(tl.int64) * n_chunks + gc
            at_seg = (last * H + h).to(tl.int64) * n_segs + seg
            s = load_state(states, prefix, seg_state, at, at_seg, vv, kk, nseg > 1, BK, VP, True)
            out += mm(qb, tl.trans(s), CT, PREC)
        ks = ks.to(tl.float32)
        a = tl.zeros((BT, BT), dtype=tl.float32)
        if SAFE:
            for level in range(0, LEVELS):
                x, y, pairs, second = level_weights(level, r, gfs, gbs, BT, DIRS, MT, SPLIT)
                a += tl.where(pairs, mm(qs * tl.exp2(x), tl.trans(ks * tl.exp2(y)), CT, PREC), 0.0)
            own = tl.sum(qs * ks, 1)[:, None]
            a += tl.where(i == j, own * (2.0 if DIRS == 3 else 1.0), 0.0)
        else:
            if DIRS != 2:
                a += tl.where(i >= j, mm(qf, tl.trans(ks * tl.exp2(-ef)), CT, PREC), 0.0)
            if DIRS != 1:
                a += tl.where(i <= j, mm(qb, tl.trans(ks * tl.exp2(-eb)), CT, PREC), 0.0)
    else:
        a = mm(qs, tl.trans(ks), CT, PREC)
        if DIRS == 3:
            a = tl.where(i == j, 2 * a, a)
        elif DIRS == 1:
            a = tl.where(i >= j, a, 0.0)
        else:
            a = tl.where(i <= j, a, 0.0)
        s = tl.zeros((BV, BK), dtype=tl.float32)
        for slot in tl.static_range(last + 1):
            at = (slot * H + h).to(tl.int64) * n_chunks + gc
            at_seg = (slot * H + h).to(tl.int64) * n_segs + seg
            s += load_state(states, prefix, seg_state, at, at_seg, vv, kk, nseg > 1, BK, VP, False)
        out += mm(qs, tl.trans(s), CT, PREC)
    out += mm(a, vs, CT, PREC)
    store_tile(o + ((b * T + t0) * H + h) * V, out, r, vv, H * V, ok_t, V, VP)


@triton.jit
def intra_fast(
    qs, ks, e, da, scale, keep,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Inside a chunk, one direction: weights (masked), gradients of q and k, and q dq - k dk."""
    up = tl.exp2(-e)
    down = tl.exp2(e)
    qd = (qs * (scale * down)).to(CT)
    kd = (ks * up).to(CT)
    a = tl.where(keep, mm(qd, tl.trans(kd), CT, PREC), 0.0)
    da = tl.where(keep, da, 0.0).to(CT)
    dq = mm(da, kd, CT, PREC) * (scale * down)
    dk = mm(tl.trans(da), qd, CT, PREC) * up
    return a, dq, dk, qs * dq - ks * dk


@triton.jit
def inter(
    qs, ks, gs, e, dq_in, dk_in, held, total, h_in, scale, after, since, past,
    CT: tl.constexpr, PREC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What the states add, one direction: gradients of q and k, keys as the outgoing state sees them, gradient of g.

    Masks (C, C), in the order in which the direction runs: the tokens strictly `after` the row's token, those `since`
    it (with it), and those strictly `past`.
    """
    dq = tl.exp2(e) * dq_in * scale
    left = tl.exp2(gate_sums(after, gs, MT, SPLIT))
    dk = left * dk_in
    # A gate acts on every query from its token on, and on every key before it by way of the outgoing state.
    dg = run_sums(since, h_in + qs * dq, CT, PREC) + run_sums(past, ks * dk, CT, PREC)
    return dq, dk, ks * left, dg + (held * tl.exp2(total))[None, :]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def gla_bwd_kernel_chunk(
    q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb,
    states, totals, prefix, seg_state, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, LEVELS: tl.constexpr, DIRS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr, LIMIT: tl.constexpr, SAFE: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk from the four states that arrive at it. Program: (chunk, head)."""
    pid = tl.program_id(0)
    h = pid % H
    gc = tl.cast(pid // H, tl.int64)
    b, t0, end, seg = place(gc, chunks, T, nch, cps, nseg, BT, VARLEN)
    if VARLEN:
        if b < 0:
            return
        b = 0
    if GATE:
        if wild(totals, h, gc, tl.arange(0, BK), n_chunks, H, BK, DIRS, LIMIT) != SAFE:
            return
    b = tl.cast(b, tl.int64)
    t0 = tl.cast(t0, tl.int64)
    VP: tl.constexpr = NV * BV
    ND: tl.constexpr = 2 if DIRS == 3 else 1
    LAST: tl.constexpr = ND - 1
    r = tl.arange(0, BT)
    kk = tl.arange(0, BK)
    ok_t = r < end - t0
    i = r[:, None]
    j = r[None, :]
    low = i >= j
    high = i <= j
    several = nseg > 1

    # Over the value channels: dA = do v^T and what the states give to dq and dk.
    da = tl.zeros((BT, BT), dtype=tl.float32)
    qin_f = tl.zeros((BT, BK), dtype=tl.float32)
    kin_f = tl.zeros((BT, BK), dtype=tl.float32)
    held_f = tl.zeros((BK,), dtype=tl.float32)
    qin_b = tl.zeros((BT, BK), dtype=tl.float32)
    kin_b = tl.zeros((BT, BK), dtype=tl.float32)
    held_b = tl.zeros((BK,), dtype=tl.float32)
    v_ptr = v + (b * v_b + t0 * v_t + h * v_h) * A
    d_ptr = do + (b * d_b + t0 * d_t + h * d_h) * A
    for vb in tl.static_range(NV):
        vv = vb * BV + tl.arange(0, BV)
        vs = load_tile(v_ptr, r, vv, v_t * A, ok_t, V, VP)
        ds = load_tile(d_ptr, r, vv, d_t * A, ok_t, V, VP)
        da += mm(ds, tl.trans(vs), CT, PREC)
        if DIRS != 2:
            at = h.to(tl.int64)
            s = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            at = (ND * H + h).to(tl.int64)
            z = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            qin_f += mm(ds, s, CT, PREC)
            kin_f += mm(vs, z, CT, PREC)
            held_f += tl.sum(s * z, 0)
        if DIRS != 1:
            at = (LAST * H + h).to(tl.int64)
            s = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            at = ((ND + LAST) * H + h).to(tl.int64)
            z = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            qin_b += mm(ds, s, CT, PREC)
            kin_b += mm(vs, z, CT, PREC)
            held_b += tl.sum(s * z, 0)

    qs = load_tile(q + (b * q_b + t0 * q_t + h * q_h) * A, r, kk, q_t * A, ok_t, K, BK).to(tl.float32)
    ks = load_tile(k + (b * k_b + t0 * k_t + h * k_h) * A, r, kk, k_t * A, ok_t, K, BK).to(tl.float32)
    row = (b * T + t0) * H + h
    a = tl.zeros((BT, BT), dtype=tl.float32)
    dqs = tl.zeros((BT, BK), dtype=tl.float32)
    dks = tl.zeros((BT, BK), dtype=tl.float32)
    key_f = ks
    key_b = ks
    if GATE:
        gfs = ks
        gbs = ks
        if DIRS != 2:
            gfs = load_gate(gf + (b * g_b + t0 * g_t + h * g_h) * AG, r, kk, g_t * AG, ok_t, K, BK, GATE == 1)
            ef = gate_sums(low, gfs, MT, SPLIT)
        if DIRS != 1:
            gbs = load_gate(gb + (b * r_b + t0 * r_t + h * r_h) * AG, r, kk, r_t * AG, ok_t, K, BK, GATE == 1)
            eb = gate_sums(high, gbs, MT, SPLIT)
        h_f = tl.zeros((BT, BK), dtype=tl.float32)
        h_b = tl.zeros((BT, BK), dtype=tl.float32)
        if SAFE:
            for level in range(0, LEVELS):
                x, y, pairs, second = level_weights(level, r, gfs, gbs, BT, DIRS, MT, SPLIT)
                x = tl.exp2(x) * scale
                y = tl.exp2(y)
                qd = (qs * x).to(CT)
                kd = (ks * y).to(CT)
                a += tl.where(pairs, mm(qd, tl.trans(kd), CT, PREC), 0.0)
                part = tl.where(pairs, da, 0.0).to(CT)
                x *= mm(part, kd, CT, PREC)
                y *= mm(tl.trans(part), qd, CT, PREC)
                dqs += x
                dks += y
                late = second[:, None]
                if DIRS != 2:
                    h_f += tl.where(late, qs * x, -ks * y)
                if DIRS != 1:
                    h_b += tl.where(late, -ks * y, qs * x)
            times: tl.constexpr = 2.0 if DIRS == 3 else 1.0
            own = (tl.sum(tl.where(i == j, da, 0.0), 1) * (scale * times))[:, None]
            dqs += own * ks
            dks += own * qs
            a += tl.where(i == j, (tl.sum(qs * ks, 1) * (scale * times))[:, None], 0.0)
        else:
            if DIRS != 2:
                a_d, dq_d, dk_d, h_f = intra_fast(qs, ks, ef, da, scale, low, CT, PREC)
                a += a_d
                dqs += dq_d
                dks += dk_d
            if DIRS != 1:
                a_d, dq_d, dk_d, h_b = intra_fast(qs, ks, eb, da, scale, high, CT, PREC)
                a += a_d
                dqs += dq_d
                dks += dk_d
        if DIRS != 2:
            total = tl.load(totals + (h.to(tl.int64) * n_chunks + gc) * BK + kk)
            dq_d, dk_d, key_f, dg = inter(qs, ks, gfs, ef, qin_f, kin_f, held_f, total, h_f, scale, i < j, high, i > j,
                                          CT, PREC, MT, SPLIT)  # fmt: skip
            dqs += dq_d
            dks += dk_d
            if GATE == 1:
                tl.store(dgf + row + r * H, tl.sum(dg, 1).to(dgf.dtype.element_ty), mask=ok_t)
            else:
                store_tile(dgf + row * K, dg, r, kk, H * K, ok_t, K, BK)
        if DIRS != 1:
            total = tl.load(totals + ((LAST * H + h).to(tl.int64) * n_chunks + gc) * BK + kk)
            dq_d, dk_d, key_b, dg = inter(qs, ks, gbs, eb, qin_b, kin_b, held_b, total, h_b, scale, i > j, low, i < j,
                                          CT, PREC, MT, SPLIT)  # fmt: skip
            dqs += dq_d
            dks += dk_d
            if GATE == 1:
                tl.store(dgb + row + r * H, tl.sum(dg, 1).to(dgb.dtype.element_ty), mask=ok_t)
            else:
                store_tile(dgb + row * K, dg, r, kk, H * K, ok_t, K, BK)
    else:
        a = mm(qs * scale, tl.trans(ks), CT, PREC)
        if DIRS == 3:
            a = tl.where(i == j, 2 * a, a)
            da = tl.where(i == j, 2 * da, da)
        elif DIRS == 1:
            a = tl.where(low, a, 0.0)
            da = tl.where(low, da, 0.0)
        else:
            a = tl.where(high, a, 0.0)
            da = tl.where(high, da, 0.0)
        dqs = (mm(da, ks, CT, PREC) + qin_f + qin_b) * scale
        dks = mm(tl.trans(da), qs * scale, CT, PREC) + kin_f + kin_b
    store_tile(dq + row * K, dqs, r, kk, H * K, ok_t, K, BK)
    store_tile(dk + row * K, dks, r, kk, H * K, ok_t, K, BK)

    for vb in tl.static_range(NV):
        vv = vb * BV + tl.arange(0, BV)
        ds = load_tile(d_ptr, r, vv, d_t * A, ok_t, V, VP)
        dvs = mm(tl.trans(a), ds, CT, PREC)
        if DIRS != 2:
            at = (ND * H + h).to(tl.int64)
            z = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            dvs += mm(key_f, tl.trans(z), CT, PREC)
        if DIRS != 1:
            at = ((ND + LAST) * H + h).to(tl.int64)
            z = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, VP,
                           GATE > 0)  # fmt: skip
            dvs += mm(key_b, tl.trans(z), CT, PREC)
        store_tile(dv + row * V, dvs, r, vv, H * V, ok_t, V, VP)
