"""Outputs and gradients of gated linear attention, one chunk per program, from the states that arrive at the chunk.

Inside a chunk token j weighs exp(sum of log gates between j and i) in output i: forward gates below the diagonal,
reverse gates above it. The fast form splits this into a factor for i and one for j around the chunk's edge; the second
grows with the gates' sum, so a chunk whose sum passes `LIMIT` takes the safe form: halve the chunk again and again and
refer the pairs that a level separates to the boundary between the halves, where both factors are <= 1.
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
    # Forward, a query is late and a key early; reverse, the other way round: one sum per direction serves both.
    if DIRS != 2:
        x = gate_sums((late & (j >= e) & (j <= i)) | ((late == 0) & (j > i) & (j < e)), gf, MT, SPLIT)
        y = x
        pairs = apart & late & (second[None, :] == 0)
    if DIRS != 1:
        z = gate_sums(((late == 0) & (j >= i) & (j < e)) | (late & (j >= e) & (j < i)), gb, MT, SPLIT)
        if DIRS == 2:
            x = z
            y = z
            pairs = apart & (late == 0) & second[None, :]
        else:
            y = tl.where(late, z, x)
            x = tl.where(late, x, z)
            pairs = apart & (late != second[None, :])
    return x, y, pairs, second


@triton.jit
def wild(
    totals, h, gc, kk, n_chunks, H,
    BK: tl.constexpr, DIRS: tl.constexpr, LIMIT: tl.constexpr,
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
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs, H,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
def direction(
    qs, ks, da, ds, vs, strict, dqs, dks, dvs, a, h, gs, total,
    scale, states, prefix, seg_state, v_ptr, d_ptr, v_s, d_s, ok_t, r, at, at_seg, adj, adj_seg, several,
    REV: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    SAFE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr, SUMS: tl.constexpr, MT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to the gradients of a chunk, and find the gradient of its gates.

    `strict` (C, C) marks the pairs of this direction without the diagonal, whose part in the gates' gradient is zero.
    `h` is q dq - k dk from inside the chunk where the safe form has found it already.
    """
    VP: tl.constexpr = NV * BV
    i = r[:, None]
    j = r[None, :]
    kk = tl.arange(0, BK)
    row = tl.arange(0, BV)
    if REV:
        upto = j >= i  # the gates between the state that arrives and the row's token
        since = j <= i
        past = j > i
    else:
        upto = j <= i
        since = j >= i
        past = j < i
    e = gate_sums(upto, gs, MT, SPLIT)
    down = tl.exp2(e)
    if SAFE:
        left = tl.exp2(gate_sums(since & (i != j), gs, MT, SPLIT))
    else:
        left = tl.exp2(total[None, :] - e)

    q_in = tl.zeros((BT, BK), dtype=tl.float32)
    k_in = tl.zeros((BT, BK), dtype=tl.float32)
    held = tl.zeros((BK,), dtype=tl.float32)
    key = (ks * left).to(CT)
    for vb in tl.static_range(NV):
        vv = vb * BV + row
        if NV > 1:
            ds = load_tile(d_ptr, r, vv, d_s, ok_t, V, VP)
            vs = load_tile(v_ptr, r, vv, v_s, ok_t, V, VP)
        s = load_state(states, prefix, seg_state, at, at_seg, vv, kk, several, BK, VP, True)
        z = load_state(states, prefix, seg_state, adj, adj_seg, vv, kk, several, BK, VP, True)
        held += tl.sum(s.to(tl.float32) * z.to(tl.float32), 0)
        q_in = tl.dot(ds.to(CT), s.to(CT), acc=q_in, input_precision=PREC)
        k_in = tl.dot(vs.to(CT), z.to(CT), acc=k_in, input_precision=PREC)
        if NV == 1:
            dvs = tl.dot(key, tl.trans(z.to(CT)), acc=dvs, input_precision=PREC)

    if SAFE:
        dq = q_in * (down * scale)
        h += qs * dq
    else:
        up = tl.exp2(-e)
        down *= scale
        qd = (qs * down).to(CT)
        kd = (ks * up).to(CT)
        a += tl.where(strict, mm(qd, tl.trans(kd), CT, PREC), 0.0)
        part = tl.where(strict, da, 0.0).to(CT)
        dq = tl.dot(part, kd, acc=q_in, input_precision=PREC) * down
        dk = mm(tl.trans(part), qd, CT, PREC) * up
        dks += dk
        h = qs * dq - ks * dk
    dqs += dq
    k_in *= left
    dks += k_in
    # A gate acts on every query from its token on, and on every key before it by way of the outgoing state.
    dg = run_sums(since, h, SUMS) + run_sums(past, ks * k_in, SUMS) + (held * tl.exp2(total))[None, :]
    return dqs, dks, dvs, a, key, dg


@triton.jit
def chunk_gradients(
    q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb, states, totals, prefix, seg_state,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, several, n_chunks, n_segs, H, h, gc, b, t0, end, seg, wanted,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, LEVELS: tl.constexpr, DIRS: tl.constexpr, GATE: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr, SAFE: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, SUMS: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All gradients of chunk `gc` of head `h`, from the four states that arrive at it; stored only if `wanted`."""
    b = tl.cast(b, tl.int64)
    t0 = tl.cast(t0, tl.int64)
    VP: tl.constexpr = NV * BV
    ND: tl.constexpr = 2 if DIRS == 3 else 1
    LAST: tl.constexpr = ND - 1
    TIMES: tl.constexpr = 2.0 if DIRS == 3 else 1.0
    r = tl.arange(0, BT)
    vrow = tl.arange(0, BV)
    ok_t = r < end - t0
    put = r < tl.where(wanted, end - t0, 0)
    kk = tl.arange(0, BK)
    i = r[:, None]
    j = r[None, :]
    at_f = h.to(tl.int64)
    at_b = (LAST * H + h).to(tl.int64)
    adj_f = (ND * H + h).to(tl.int64)
    adj_b = ((ND + LAST) * H + h).to(tl.int64)
    v_ptr = v + (b * v_b + t0 * v_t + h * v_h) * A
    d_ptr = do + (b * d_b + t0 * d_t + h * d_h) * A
    v_s = v_t * A
    d_s = d_t * A
    row = (b * T + t0) * H + h

    vs = load_tile(v_ptr, r, vrow, v_s, ok_t, V, VP)
    ds = load_tile(d_ptr, r, vrow, d_s, ok_t, V, VP)
    da = mm(ds, tl.trans(vs), CT, PREC)
    for vb in tl.static_range(1, NV):
        vv = vb * BV + vrow
        v_more = load_tile(v_ptr, r, vv, v_s, ok_t, V, VP)
        d_more = load_tile(d_ptr, r, vv, d_s, ok_t, V, VP)
        da += mm(d_more, tl.trans(v_more), CT, PREC)
    qs = load_tile(q + (b * q_b + t0 * q_t + h * q_h) * A, r, kk, q_t * A, ok_t, K, BK).to(tl.float32)
    ks = load_tile(k + (b * k_b + t0 * k_t + h * k_h) * A, r, kk, k_t * A, ok_t, K, BK).to(tl.float32)

    a = tl.zeros((BT, BT), dtype=tl.float32)
    dqs = tl.zeros((BT, BK), dtype=tl.float32)
    dks = tl.zeros((BT, BK), dtype=tl.float32)
    dvs = tl.zeros((BT, BV), dtype=tl.float32)
    key_f = ks
    key_b = ks
    if GATE:
        h_f = dqs
        h_b = dqs
        gfs = ks
        gbs = ks
        if SAFE:
            if DIRS != 2:
                gfs = load_gate(gf + (b * g_b + t0 * g_t + h * g_h) * AG, r, kk, g_t * AG, ok_t, K, BK, GATE == 1)
            if DIRS != 1:
                gbs = load_gate(gb + (b * r_b + t0 * r_t + h * r_h) * AG, r, kk, r_t * AG, ok_t, K, BK, GATE == 1)
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
        if DIRS != 2:
            if not SAFE:
                gfs = load_gate(gf + (b * g_b + t0 * g_t + h * g_h) * AG, r, kk, g_t * AG, ok_t, K, BK, GATE == 1)
            total = tl.load(totals + (at_f * n_chunks + gc) * BK + kk)
            dqs, dks, dvs, a, key_f, dg = direction(
                qs, ks, da, ds, vs, i > j, dqs, dks, dvs, a, h_f, gfs, total,
                scale, states, prefix, seg_state, v_ptr, d_ptr, v_s, d_s, ok_t, r, at_f * n_chunks + gc,
                at_f * n_segs + seg, adj_f * n_chunks + gc, adj_f * n_segs + seg, several,
                False, V, BT, BK, BV, NV, SAFE, CT, PREC, SUMS, MT, SPLIT,
            )  # fmt: skip
            if GATE == 1:
                tl.store(dgf + row + r * H, tl.sum(dg, 1).to(dgf.dtype.element_ty), mask=put)
            else:
                store_tile(dgf + row * K, dg, r, kk, H * K, put, K, BK)
        if DIRS != 1:
            if not SAFE:
                gbs = load_gate(gb + (b * r_b + t0 * r_t + h * r_h) * AG, r, kk, r_t * AG, ok_t, K, BK, GATE == 1)
            total = tl.load(totals + (at_b * n_chunks + gc) * BK + kk)
            dqs, dks, dvs, a, key_b, dg = direction(
                qs, ks, da, ds, vs, i < j, dqs, dks, dvs, a, h_b, gbs, total,
                scale, states, prefix, seg_state, v_ptr, d_ptr, v_s, d_s, ok_t, r, at_b * n_chunks + gc,
                at_b * n_segs + seg, adj_b * n_chunks + gc, adj_b * n_segs + seg, several,
                True, V, BT, BK, BV, NV, SAFE, CT, PREC, SUMS, MT, SPLIT,
            )  # fmt: skip
            if GATE == 1:
                tl.store(dgb + row + r * H, tl.sum(dg, 1).to(dgb.dtype.element_ty), mask=put)
            else:
                store_tile(dgb + row * K, dg, r, kk, H * K, put, K, BK)
        own = (tl.sum(tl.where(i == j, da, 0.0), 1) * (scale * TIMES))[:, None]
        dqs += own * ks
        dks += own * qs
        a += tl.where(i == j, (tl.sum(qs * ks, 1) * (scale * TIMES))[:, None], 0.0)
    else:
        a = mm(qs * scale, tl.trans(ks), CT, PREC)
        if DIRS == 3:
            a = tl.where(i == j, 2 * a, a)
            da = tl.where(i == j, 2 * da, da)
        elif DIRS == 1:
            a = tl.where(i >= j, a, 0.0)
            da = tl.where(i >= j, da, 0.0)
        else:
            a = tl.where(i <= j, a, 0.0)
            da = tl.where(i <= j, da, 0.0)
        dqs = mm(da, ks, CT, PREC)
        dks = mm(tl.trans(da), qs * scale, CT, PREC)
        for vb in tl.static_range(NV):
            vv = vb * BV + vrow
            ds = load_tile(d_ptr, r, vv, d_s, ok_t, V, VP)
            vs = load_tile(v_ptr, r, vv, v_s, ok_t, V, VP)
            s = load_state(states, prefix, seg_state, at_f * n_chunks + gc, at_f * n_segs + seg, vv, kk, several,
                           BK, VP, False).to(tl.float32)  # fmt: skip
            z = load_state(states, prefix, seg_state, adj_f * n_chunks + gc, adj_f * n_segs + seg, vv, kk, several,
                           BK, VP, False).to(tl.float32)  # fmt: skip
            if DIRS == 3:
                s += load_state(states, prefix, seg_state, at_b * n_chunks + gc, at_b * n_segs + seg, vv, kk, several,
                                BK, VP, False)  # fmt: skip
                z += load_state(states, prefix, seg_state, adj_b * n_chunks + gc, adj_b * n_segs + seg, vv, kk,
                                several, BK, VP, False)  # fmt: skip
            dqs += mm(ds, s, CT, PREC)
            dks += mm(vs, z, CT, PREC)
            if NV == 1:
                dvs += mm(ks, tl.trans(z), CT, PREC)
        dqs *= scale
    store_tile(dq + row * K, dqs, r, kk, H * K, put, K, BK)
    store_tile(dk + row * K, dks, r, kk, H * K, put, K, BK)

    for vb in tl.static_range(NV):
        vv = vb * BV + vrow
        if NV > 1:
            ds = load_tile(d_ptr, r, vv, d_s, ok_t, V, VP)
            dvs = tl.zeros((BT, BV), dtype=tl.float32)
            if DIRS != 2:
                z = load_state(states, prefix, seg_state, adj_f * n_chunks + gc, adj_f * n_segs + seg, vv, kk,
                               several, BK, VP, GATE > 0)  # fmt: skip
                dvs += mm(key_f, tl.trans(z), CT, PREC)
            if DIRS != 1:
                z = load_state(states, prefix, seg_state, adj_b * n_chunks + gc, adj_b * n_segs + seg, vv, kk,
                               several, BK, VP, GATE > 0)  # fmt: skip
                dvs += mm(key_b, tl.trans(z), CT, PREC)
        dvs += mm(tl.trans(a), ds, CT, PREC)
        store_tile(dv + row * V, dvs, r, vv, H * V, put, V, VP)


@triton.jit
def both_directions(
    q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb, states, totals, prefix, seg_state,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, several, n_chunks, n_segs, H, h, gc, b, t0, end, seg, wanted,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, A: tl.constexpr, AG: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, SUMS: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The fast form of `chunk_gradients` for two gated directions and one value block.

    A loop takes one direction after the other: half the code, and less at once in registers than where both are written
    out, so that two warps suffice and twice as many programs run side by side.
    """
    b = tl.cast(b, tl.int64)
    t0 = tl.cast(t0, tl.int64)
    r = tl.arange(0, BT)
    vv = tl.arange(0, BV)
    kk = tl.arange(0, BK)
    ok_t = r < end - t0
    put = r < tl.where(wanted, end - t0, 0)
    i = r[:, None]
    j = r[None, :]
    row = (b * T + t0) * H + h
    vs = load_tile(v + (b * v_b + t0 * v_t + h * v_h) * A, r, vv, v_t * A, ok_t, V, BV)
    ds = load_tile(do + (b * d_b + t0 * d_t + h * d_h) * A, r, vv, d_t * A, ok_t, V, BV)
    qs = load_tile(q + (b * q_b + t0 * q_t + h * q_h) * A, r, kk, q_t * A, ok_t, K, BK).to(tl.float32)
    ks = load_tile(k + (b * k_b + t0 * k_t + h * k_h) * A, r, kk, k_t * A, ok_t, K, BK).to(tl.float32)
    da = mm(ds, tl.trans(vs), CT, PREC)
    own = (tl.sum(tl.where(i == j, da, 0.0), 1) * (scale * 2.0))[:, None]
    dqs = own * ks
    dks = own * qs
    a = tl.where(i == j, (tl.sum(qs * ks, 1) * (scale * 2.0))[:, None], 0.0)
    dvs = tl.zeros((BT, BV), dtype=tl.float32)
    for rev in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
        at = (rev * H + h).to(tl.int64)
        adj = at + 2 * H
        total = tl.load(totals + (at * n_chunks + gc) * BK + kk)
        if rev == 0:
            gs = load_gate(gf + (b * g_b + t0 * g_t + h * g_h) * AG, r, kk, g_t * AG, ok_t, K, BK, GATE == 1)
        else:
            gs = load_gate(gb + (b * r_b + t0 * r_t + h * r_h) * AG, r, kk, r_t * AG, ok_t, K, BK, GATE == 1)
        d = tl.where(rev == 0, i - j, j - i)  # how far before the row's token the column's lies
        e = gate_sums(d >= 0, gs, MT, SPLIT)
        left = tl.exp2(total[None, :] - e)
        s = load_state(states, prefix, seg_state, at * n_chunks + gc, at * n_segs + seg, vv, kk, several, BK, BV, True)
        q_in = tl.dot(ds.to(CT), s.to(CT), input_precision=PREC)
        z = load_state(states, prefix, seg_state, adj * n_chunks + gc, adj * n_segs + seg, vv, kk, several, BK, BV,
                       True)  # fmt: skip
        held = tl.sum(s.to(tl.float32) * z.to(tl.float32), 0)
        k_in = tl.dot(vs.to(CT), z.to(CT), input_precision=PREC) * left
        dvs = tl.dot((ks * left).to(CT), tl.trans(z.to(CT)), acc=dvs, input_precision=PREC)
        down = tl.exp2(e) * scale
        up = tl.exp2(-e)
        qd = (qs * down).to(CT)
        kd = (ks * up).to(CT)
        a += tl.where(d > 0, mm(qd, tl.trans(kd), CT, PREC), 0.0)
        part = tl.where(d > 0, da, 0.0).to(CT)
        gq = tl.dot(part, kd, acc=q_in, input_precision=PREC) * down
        gk = mm(tl.trans(part), qd, CT, PREC) * up
        dqs += gq
        dks += gk + k_in
        # As in `direction`; the sum over the tokens before one is that over all tokens less that over the others.
        w = ks * k_in
        dg = run_sums(d <= 0, qs * gq - ks * gk - w, SUMS)
        dg += (tl.sum(w, 0) + held * tl.exp2(total))[None, :]
        if rev == 0:
            if GATE == 1:
                tl.store(dgf + row + r * H, tl.sum(dg, 1).to(dgf.dtype.element_ty), mask=put)
            else:
                store_tile(dgf + row * K, dg, r, kk, H * K, put, K, BK)
        else:
            if GATE == 1:
                tl.store(dgb + row + r * H, tl.sum(dg, 1).to(dgb.dtype.element_ty), mask=put)
            else:
                store_tile(dgb + row * K, dg, r, kk, H * K, put, K, BK)
    store_tile(dq + row * K, dqs, r, kk, H * K, put, K, BK)
    store_tile(dk + row * K, dks, r, kk, H * K, put, K, BK)
    dvs = tl.dot(tl.trans(a.to(CT)), ds.to(CT), acc=dvs, input_precision=PREC)
    store_tile(dv + row * V, dvs, r, vv, H * V, put, V, BV)


@triton.jit(do_not_specialize=STRIDES + SIZES)
def gla_bwd_kernel_chunk(
    q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb,
    states, totals, prefix, seg_state, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
    scale, T, nch, cps, nseg, n_chunks, n_segs, H,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NV: tl.constexpr, LEVELS: tl.constexpr, DIRS: tl.constexpr, GATE: tl.constexpr, VARLEN: tl.constexpr,
    A: tl.constexpr, AG: tl.constexpr, LIMIT: tl.constexpr, SAFE: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, LOOP: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr, SUMS: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of `GROUP` chunks. Program: (group, head).

    The fast form has no branch in its loop, so that the next chunk's loads run during this one's products; the safe
    form, most often without any work, looks at the whole group first.
    """
    pid = tl.program_id(0)
    h = pid % H
    first = tl.cast(pid // H, tl.int64) * GROUP
    kk = tl.arange(0, BK)
    if SAFE:
        n = first + tl.arange(0, GROUP)
        at = ((h.to(tl.int64) * n_chunks + n) * BK)[:, None] + kk[None, :]
        low = tl.load(totals + at, mask=(n < n_chunks)[:, None], other=0.0)
        if DIRS == 3:
            at += tl.cast(n_chunks, tl.int64) * (H * BK)
            low = tl.minimum(low, tl.load(totals + at, mask=(n < n_chunks)[:, None], other=0.0))
        if tl.min(tl.min(low, 1), 0) >= LIMIT:
            return
    for step in tl.range(0, GROUP, num_stages=STAGES):
        gc = first + step
        inside = gc < n_chunks
        gc = tl.minimum(gc, n_chunks - 1)
        b, t0, end, seg = place(gc, chunks, T, nch, cps, nseg, BT, VARLEN)
        if VARLEN:
            inside = inside & (b >= 0)
            b = 0
            seg = tl.maximum(seg, 0)
            t0 = tl.maximum(t0, 0)
            end = tl.maximum(end, 0)
        wanted = inside
        if GATE:
            wanted = inside & (wild(totals, h, gc, kk, n_chunks, H, BK, DIRS, LIMIT) == SAFE)
        if SAFE:
            if wanted:
                chunk_gradients(
                    q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb, states, totals, prefix, seg_state,
                    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
                    scale, T, nseg > 1, n_chunks, n_segs, H, h, gc, b, t0, end, seg, wanted,
                    K, V, BT, BK, BV, NV, LEVELS, DIRS, GATE, A, AG, SAFE, CT, PREC, SUMS, MT, SPLIT,
                )  # fmt: skip
        elif LOOP:
            both_directions(
                q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb, states, totals, prefix, seg_state,
                q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
                scale, T, nseg > 1, n_chunks, n_segs, H, h, gc, b, t0, end, seg, wanted,
                K, V, BT, BK, BV, GATE, A, AG, CT, PREC, SUMS, MT, SPLIT,
            )  # fmt: skip
        else:
            chunk_gradients(
                q, k, v, do, gf, gb, dq, dk, dv, dgf, dgb, states, totals, prefix, seg_state,
                q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, g_b, g_t, g_h, r_b, r_t, r_h,
                scale, T, nseg > 1, n_chunks, n_segs, H, h, gc, b, t0, end, seg, wanted,
                K, V, BT, BK, BV, NV, LEVELS, DIRS, GATE, A, AG, SAFE, CT, PREC, SUMS, MT, SPLIT,
            )  # fmt: skip
