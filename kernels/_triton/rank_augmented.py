"""Rank-augmented linear attention (RALA) on GPUs; the formulas are in zoo/kernels/linear_attention.py.

Forward, four launches over parts of the token axis: sums of phi(q) (and a small table of cosines and sines); one sweep
over k and v as an online softmax that carries the largest log weight m, the sum of weights, of weighted keys and of
weighted rotated keys times values; the merge of the parts; the read-out with the output modulation. q is read twice,
k, v, lepe and gate once, y written once.

Backward, with normalised weights w, state S, key sum s, z = phi(q) . s + eps and dr = dy * gate:

    g = dr / z         u = -(dr . r) / z       dS = sum rope(phi(q)) g^T        ds = sum u phi(q)
    t = rope^-1(dS v) + ds                     dc = w (phi(k) . t - <dS, S> - ds . s) D^-0.5
    dk = (w t + dc qbar) phi'(k)               dv = w dS^T rope(phi(k))         dqbar = sum dc phi(k)
    dq = (rope^-1(S g) + u s + dqbar / T) phi'(q)

in sweeps over (q, dy, lepe, gate), (k, v) and (q, dr): the gradient of lepe is dr, so the last sweep reads it there.
phi(x) = elu(x) + 1 has the derivative min(phi(x), 1). Tables, sums, softmax and denominators are fp32.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from zoo.kernels._torch_linear_attention import TABLES, kept_sizes
from zoo.kernels._triton._common import (
    LOG2E,
    Launch,
    aligned,
    alignment,
    ceil_div,
    compute_types,
    load_tile,
    next_power,
    on_device_of_first,
    plan,
    store_tile,
)
from zoo.kernels._triton.linear_attention import (
    DTYPES,
    SIZES,
    Config,
    Options,
    cut,
    load_state,
    merge_launch,
    place,
    rows,
    span,
    start,
    store_state,
    strides,
)
from zoo.kernels.linear_attention import MAX_TRITON_DIM
from zoo.kernels.rope import LOG2_BASE

COPIES = tl.constexpr(TABLES)
MAX_PARTS = 1024
NUMBERS = [*SIZES, 'n_table', 'width'] + [x + y for x in ('lepe', 'gate', 'dy', 'dr') for y in ('_b', '_t', '_h')]


def config(dtype: torch.dtype, D: int, backward: bool) -> Config:
    """The fixed table of block sizes; every row has a case in tests/gpu/check_linear_attention.py."""
    bk = next_power(D)
    if dtype != torch.bfloat16:
        bv = bk if bk <= 64 else 32
        options = Options(16 if backward or bk > 64 else 32, 4 if bk <= 64 else 8, 2)
        return Config(bk, bv, ceil_div(D, bv), options, options)
    if bk <= 64:
        if backward:  # four programs a multiprocessor hide more of the chain of products and sums than wide tiles do
            return Config(bk, bk, 1, Options(16, 4, 3, registers=128), Options(16, 1, 3))
        return Config(bk, bk, 1, Options(32, 4, 3, registers=128), Options(64, 4, 3))
    if not backward:
        return Config(bk, bk, 1, Options(32, 8, 2), Options(32, 4, 2))
    return Config(bk, 64, ceil_div(D, 64), Options(16, 4, 2), Options(16, 4, 2))


def unsupported(dtype: torch.dtype, D: int, _: int) -> str | None:
    """Why the kernels cannot take q, k, v of a dtype and D channels a head, or None."""
    if dtype not in DTYPES:
        return f'dtype {str(dtype).removeprefix("torch.")}'
    return f'head dimension above {MAX_TRITON_DIM} (D = {D})' if D > MAX_TRITON_DIM else None


# --------------------------------------------------------------------------------------------------------------------
# Parts of kernels


@triton.jit
def positive(x, cols, D: tl.constexpr, BD: tl.constexpr):
    """elu(x) + 1 in fp32, zeros beyond D."""
    x = x.to(tl.float32)
    x = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    return x if D == BD else tl.where((cols < D)[None, :], x, 0.0)


@triton.jit
def angles(table, n_table, token, row_ok, width, D: tl.constexpr, BD: tl.constexpr):
    """Cosines and sines (tokens, BD / 2) of the pairs: D / 4 that turn with the row, D / 4 with the column.

    Neighbouring programs read different copies of the table.
    """
    M: tl.constexpr = D // 4
    table += (tl.program_id(0) + tl.program_id(1)) % COPIES * (2 * M * n_table)
    pair = tl.arange(0, BD // 2)
    row = token // width
    column = token - row * width
    by_row = (pair < M)[None, :]
    i = tl.where(by_row, row[:, None], column[:, None]) * M + tl.where(pair < M, pair, pair - M)[None, :]
    if M % 4 == 0:
        i = tl.max_contiguous(tl.multiple_of(i, (1, 4)), (1, 4))
    ok = row_ok[:, None]
    if D != BD:
        ok = ok & (pair < 2 * M)[None, :]
    return tl.load(table + i, mask=ok, other=1.0), tl.load(table + n_table * M + i, mask=ok, other=0.0)


@triton.jit
def rotate(x, cos, sin, BT: tl.constexpr, BD: tl.constexpr):
    """Turn interleaved pairs of columns."""
    even, odd = tl.split(tl.reshape(x, (BT, BD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (BT, BD))


@triton.jit
def load_row(x, cols, D: tl.constexpr):
    return tl.load(x + cols, mask=cols < D, other=0.0)


# --------------------------------------------------------------------------------------------------------------------
# Forward kernels, grid (parts, batch * heads, value blocks). Outputs are contiguous (B, T, H, D).


@triton.jit(do_not_specialize=NUMBERS)
def rala_fwd_kernel_queries(q, qbar, table, T, per, H, n_table, q_b, q_t, q_h, D: tl.constexpr, BT: tl.constexpr,
                            BD: tl.constexpr, BM: tl.constexpr, A: tl.constexpr, LOG2_BASE: tl.constexpr):  # fmt: skip
    """Sums of phi(q) over every part, to (parts, B * H, D). The last row of the grid writes the tables."""
    heads = tl.num_programs(1) - 1
    if tl.program_id(1) < heads:
        b, h, first, n = place(T, per, H)
        rows, cols = tl.arange(0, BT), tl.arange(0, BD)
        x = start(q, b, h, first, q_b, q_t, q_h, A)
        step = q_t * A
        single = tl.zeros((BT, BD), tl.float32)
        for t in range(0, n, BT):
            ok = rows < n - t
            y = positive(load_tile(x, rows, cols, step, ok, D, BD), cols, D, BD)
            single += tl.where(ok[:, None], y, 0.0)
            x += BT * step.to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
        tl.store(qbar + row * D + cols, tl.sum(single, 0), mask=cols < D)
    else:
        M: tl.constexpr = D // 4
        j = tl.arange(0, BM)
        frequency = tl.exp2(j.to(tl.float64) * (-LOG2_BASE / max(M - 1, 1))).to(tl.float32)
        for i in range(tl.program_id(0) * 16, n_table, tl.num_programs(0) * 16):
            place_of = i + tl.arange(0, 16)
            angle = place_of.to(tl.float32)[:, None] * frequency[None, :]
            ok = (place_of < n_table)[:, None] & (j < M)[None, :]
            to = table + place_of[:, None] * M + j[None, :]
            cos, sin = tl.cos(angle), tl.sin(angle)
            for _ in tl.static_range(COPIES):
                tl.store(to, cos, mask=ok)
                tl.store(to + n_table * M, sin, mask=ok)
                to += 2 * M * n_table


@triton.jit(do_not_specialize=NUMBERS)
def rala_fwd_kernel_keys(k, v, parts_q, qbar, table, kv, key, top, total_weight, T, per, H, parts, n_table, width, k_b,
                         k_t, k_h, v_b, v_t, v_h, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
                         BV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Online softmax over a part: its largest log weight (base 2) and the sums relative to it, final with one part."""
    b, h, first, n = place(T, per, H)
    part, heads, head, iv = tl.program_id(0), tl.num_programs(1).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, BT), tl.arange(0, BD)
    cols_v = iv * BV + tl.arange(0, BV)
    mean = tl.zeros((BD,), tl.float32)
    for p in range(0, parts, 16):
        some = p + tl.arange(0, 16)
        ok = (some < parts)[:, None] & (cols < D)[None, :]
        mean += tl.sum(tl.load(parts_q + (some[:, None] * heads + head) * D + cols[None, :], mask=ok, other=0.0), 0)
    mean = mean / T
    tl.store(qbar + head * D + cols, mean, mask=(cols < D) & (part + iv == 0))
    mean *= LOG2E / tl.sqrt(float(D))

    x, y = start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A)
    x_step, y_step = k_t * A, v_t * A
    token = first.to(tl.int32) + rows
    largest = -float('inf')
    weight = tl.zeros((BT,), tl.float32)
    single = tl.zeros((BT, BD), tl.float32)
    total = tl.zeros((BD, BV), tl.float32)
    for t in range(0, n, BT):
        ok = rows < n - t
        kf = positive(load_tile(x, rows, cols, x_step, ok, D, BD), cols, D, BD)
        vt = load_tile(y, rows, cols_v, y_step, ok, D, BV)
        cos, sin = angles(table, n_table, token + t, ok, width, D, BD)
        c = tl.where(ok, tl.sum(kf * mean[None, :], 1), -float('inf'))
        before = largest
        largest = tl.maximum(before, tl.max(c, 0))
        fade = tl.exp2(before - largest)
        w = tl.exp2(c - largest)
        weight = weight * fade + w
        kf *= w[:, None]
        single = single * fade + kf
        turned = rotate(kf, cos, sin, BT, BD)
        total = tl.dot(tl.trans(turned.to(CT)), vt.to(CT), total * fade, input_precision=PREC)
        x += BT * x_step.to(tl.int64)
        y += BT * y_step.to(tl.int64)
    norm = tl.sum(weight, 0)
    share = tl.where(parts == 1, 1.0 / norm, 1.0)
    row = part.to(tl.int64) * heads + head
    store_state(kv + row * (D * D), total * share, cols, cols_v, D, D)
    if iv == 0:
        tl.store(key + row * D + cols, tl.sum(single, 0) * share, mask=cols < D)
        tl.store(top + row, tl.where(parts == 1, (largest + tl.log2(norm)) / LOG2E, largest))
        tl.store(total_weight + row, norm)


@triton.jit(do_not_specialize=NUMBERS)
def rala_kernel_merge(parts_kv, parts_key, top, total_weight, kv, key, norm, parts, D: tl.constexpr,
                      BLOCK: tl.constexpr, BP: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """Adds the parts' sums relative to one largest weight and divides by the sum of weights."""
    heads, head, block = tl.num_programs(0).to(tl.int64), tl.program_id(0), tl.program_id(1)
    every = tl.arange(0, MOST)
    tops = tl.load(top + every * heads + head, mask=every < parts, other=-float('inf'))
    weights = tl.load(total_weight + every * heads + head, mask=every < parts, other=0.0)
    largest = tl.max(tops, 0)
    total = tl.sum(weights * tl.exp2(tops - largest), 0)
    of_kv = block < tl.num_programs(1) - tl.cdiv(D, BLOCK)
    size = tl.where(of_kv, D * D, D)
    i = tl.where(of_kv, block, block - tl.cdiv(D * D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    source = parts_key
    target = key
    if of_kv:
        source = parts_kv
        target = kv
    out = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, parts, BP):
        part = p + tl.arange(0, BP)
        ok = part < parts
        w = tl.exp2(tl.load(top + part * heads + head, mask=ok, other=-float('inf')) - largest)
        x = source + (part[:, None] * heads + head) * size + i[None, :]
        out += tl.sum(tl.load(x, mask=ok[:, None] & (i < size)[None, :], other=0.0) * w[:, None], 0)
    tl.store(target + head.to(tl.int64) * size + i, out / total, mask=i < size)
    if block == 0:
        tl.store(norm + head, (largest + tl.log2(total)) / LOG2E)


@triton.jit(do_not_specialize=NUMBERS)
def rala_fwd_kernel_out(q, lepe, gate, y, kv, key, table, T, per, H, eps, n_table, width, q_b, q_t, q_h, lepe_b,
                        lepe_t, lepe_h, gate_b, gate_t, gate_h, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
                        BV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr, LEPE: tl.constexpr,
                        GATE: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    rows, cols = tl.arange(0, BT), tl.arange(0, BD)
    cols_v, head = tl.program_id(2) * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    state = load_state(kv + head * (D * D), cols, cols_v, D, D).to(CT)
    s = load_row(key + head * D, cols, D)
    q = start(q, b, h, first, q_b, q_t, q_h, A)
    y += ((b * T + first) * H + h) * D
    if LEPE:
        lepe = start(lepe, b, h, first, lepe_b, lepe_t, lepe_h, A)
    if GATE:
        gate = start(gate, b, h, first, gate_b, gate_t, gate_h, A)
    token = first.to(tl.int32) + rows
    for t in range(0, n, BT):
        ok = rows < n - t
        qf = positive(load_tile(q, rows, cols, q_t * A, ok, D, BD), cols, D, BD)
        cos, sin = angles(table, n_table, token + t, ok, width, D, BD)
        inverse = 1.0 / (tl.sum(qf * s[None, :], 1) + eps)
        r = tl.dot(rotate(qf, cos, sin, BT, BD).to(CT), state, input_precision=PREC) * inverse[:, None]
        if LEPE:
            r += load_tile(lepe, rows, cols_v, lepe_t * A, ok, D, BV).to(tl.float32)
            lepe += BT * (lepe_t * A).to(tl.int64)
        if GATE:
            r *= load_tile(gate, rows, cols_v, gate_t * A, ok, D, BV).to(tl.float32)
            gate += BT * (gate_t * A).to(tl.int64)
        store_tile(y, r, rows, cols_v, H * D, ok, D, BV)
        q += BT * (q_t * A).to(tl.int64)
        y += BT * (H * D).to(tl.int64)


# --------------------------------------------------------------------------------------------------------------------
# Backward kernels


@triton.jit(do_not_specialize=NUMBERS)
def rala_bwd_kernel_queries(q, lepe, gate, dy, dlepe, dgate, kv, key, table, dkv, dkey, T, per, H, eps, n_table,
                            width, q_b, q_t, q_h, lepe_b, lepe_t, lepe_h, gate_b, gate_t, gate_h, dy_b, dy_t, dy_h,
                            D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, A: tl.constexpr,
                            CT: tl.constexpr, PREC: tl.constexpr, LEPE: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """Gradients of lepe and gate, and a part's share of those of the sums; dkey has a row per value block too."""
    b, h, first, n = place(T, per, H)
    rows, cols, iv = tl.arange(0, BT), tl.arange(0, BD), tl.program_id(2)
    cols_v, head = iv * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    state = load_state(kv + head * (D * D), cols, cols_v, D, D).to(CT)
    s = load_row(key + head * D, cols, D)
    q, dy = start(q, b, h, first, q_b, q_t, q_h, A), start(dy, b, h, first, dy_b, dy_t, dy_h, A)
    if LEPE:
        lepe = start(lepe, b, h, first, lepe_b, lepe_t, lepe_h, A)
    if LEPE or GATE:
        dlepe += ((b * T + first) * H + h) * D
    if GATE:
        gate = start(gate, b, h, first, gate_b, gate_t, gate_h, A)
        dgate += ((b * T + first) * H + h) * D
    token = first.to(tl.int32) + rows
    single = tl.zeros((BT, BD), tl.float32)
    total = tl.zeros((BD, BV), tl.float32)
    for t in range(0, n, BT):
        ok = rows < n - t
        qf = positive(load_tile(q, rows, cols, q_t * A, ok, D, BD), cols, D, BD)
        inverse = 1.0 / (tl.sum(qf * s[None, :], 1) + eps)
        cos, sin = angles(table, n_table, token + t, ok, width, D, BD)
        turned = rotate(qf, cos, sin, BT, BD).to(CT)
        dr = load_tile(dy, rows, cols_v, dy_t * A, ok, D, BV).to(tl.float32)
        r = tl.dot(turned, state, input_precision=PREC) * inverse[:, None]
        if GATE:
            out = r
            if LEPE:
                out += load_tile(lepe, rows, cols_v, lepe_t * A, ok, D, BV).to(tl.float32)
                lepe += BT * (lepe_t * A).to(tl.int64)
            store_tile(dgate, dr * out, rows, cols_v, H * D, ok, D, BV)
            dgate += BT * (H * D).to(tl.int64)
            dr *= load_tile(gate, rows, cols_v, gate_t * A, ok, D, BV).to(tl.float32)
            gate += BT * (gate_t * A).to(tl.int64)
        if LEPE or GATE:
            store_tile(dlepe, dr, rows, cols_v, H * D, ok, D, BV)
            dlepe += BT * (H * D).to(tl.int64)
        u = -tl.sum(dr * r, 1) * inverse
        single += u[:, None] * qf
        g = (dr * inverse[:, None]).to(CT)
        total = tl.dot(tl.trans(turned), g, total, input_precision=PREC)
        q += BT * (q_t * A).to(tl.int64)
        dy += BT * (dy_t * A).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    store_state(dkv + row * (D * D), total, cols, cols_v, D, D)
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + iv) * tl.num_programs(1) + head
    tl.store(dkey + row * D + cols, tl.sum(single, 0), mask=cols < D)


@triton.jit(do_not_specialize=NUMBERS)
def rala_bwd_kernel_keys(k, v, dk, dv, kv, key, qbar, norm, table, dkv, dkey, dqbar, T, per, H, n_table,
                         width, k_b, k_t, k_h, v_b, v_t, v_h, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
                         BV: tl.constexpr, NV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr,
                         PREC: tl.constexpr):  # fmt: skip
    """dk, dv and a part's share of dqbar."""
    b, h, first, n = place(T, per, H)
    rows, cols, block = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    head = tl.program_id(1).to(tl.int64)
    s, ds, mean = (
        load_row(key + head * D, cols, D),
        load_row(dkey + head * D, cols, D),
        load_row(qbar + head * D, cols, D),
    )
    top = tl.load(norm + head) * LOG2E
    kv += head * (D * D)
    dkv += head * (D * D)
    inner = tl.sum(s * ds, 0)
    for j in range(NV):
        part = load_state(dkv, cols, j * BV + block, D, D)
        inner += tl.sum(tl.sum(part * load_state(kv, cols, j * BV + block, D, D), 1), 0)
    if NV == 1:
        state = load_state(dkv, cols, block, D, D).to(CT)
    scale = 1.0 / tl.sqrt(float(D))
    k, v = start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A)
    to = ((b * T + first) * H + h) * D
    dk += to
    dv += to
    token = first.to(tl.int32) + rows
    single = tl.zeros((BT, BD), tl.float32)
    for t in range(0, n, BT):
        ok = rows < n - t
        kf = positive(load_tile(k, rows, cols, k_t * A, ok, D, BD), cols, D, BD)
        cos, sin = angles(table, n_table, token + t, ok, width, D, BD)
        c = tl.sum(kf * mean[None, :], 1) * (scale * LOG2E)
        w = tl.where(ok, tl.exp2(c - top), 0.0)
        turned = rotate(kf * w[:, None], cos, sin, BT, BD).to(CT)
        if NV == 1:
            x = load_tile(v, rows, block, v_t * A, ok, D, BV).to(CT)
            back = tl.dot(x, tl.trans(state), input_precision=PREC)
            store_tile(dv, tl.dot(turned, state, input_precision=PREC), rows, block, H * D, ok, D, BV)
        else:
            back = tl.zeros((BT, BD), tl.float32)
            for j in range(NV):
                x = load_tile(v, rows, j * BV + block, v_t * A, ok, D, BV).to(CT)
                part = load_state(dkv, cols, j * BV + block, D, D).to(CT)
                back = tl.dot(x, tl.trans(part), back, input_precision=PREC)
                store_tile(dv, tl.dot(turned, part, input_precision=PREC), rows, j * BV + block, H * D, ok, D, BV)
        back = rotate(back, cos, -sin, BT, BD) + ds[None, :]
        dc = w * (tl.sum(kf * back, 1) - inner) * scale
        single += dc[:, None] * kf
        back = (back * w[:, None] + dc[:, None] * mean[None, :]) * tl.minimum(kf, 1.0)
        store_tile(dk, back, rows, cols, H * D, ok, D, BD)
        k += BT * (k_t * A).to(tl.int64)
        v += BT * (v_t * A).to(tl.int64)
        dk += BT * (H * D).to(tl.int64)
        dv += BT * (H * D).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    tl.store(dqbar + row * D + cols, tl.sum(single, 0), mask=cols < D)


@triton.jit(do_not_specialize=NUMBERS)
def rala_bwd_kernel_dq(q, dr, dq, kv, key, table, dqbar, T, per, H, parts, eps, n_table, width, q_b, q_t, q_h,
                       dr_b, dr_t, dr_h, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
                       NV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    rows, cols, block = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    s = load_row(key + head * D, cols, D)
    kv += head * (D * D)
    if NV == 1:
        state = load_state(kv, cols, block, D, D).to(CT)
    mean = tl.zeros((BD,), tl.float32)
    for p in range(0, parts, 16):
        some = p + tl.arange(0, 16)
        ok = (some < parts)[:, None] & (cols < D)[None, :]
        mean += tl.sum(tl.load(dqbar + (some[:, None] * heads + head) * D + cols[None, :], mask=ok, other=0.0), 0)
    mean = mean / T
    q, dr = start(q, b, h, first, q_b, q_t, q_h, A), start(dr, b, h, first, dr_b, dr_t, dr_h, A)
    dq += ((b * T + first) * H + h) * D
    token = first.to(tl.int32) + rows
    for t in range(0, n, BT):
        ok = rows < n - t
        qf = positive(load_tile(q, rows, cols, q_t * A, ok, D, BD), cols, D, BD)
        cos, sin = angles(table, n_table, token + t, ok, width, D, BD)
        inverse = 1.0 / (tl.sum(qf * s[None, :], 1) + eps)
        if NV == 1:
            x = load_tile(dr, rows, block, dr_t * A, ok, D, BV).to(CT)
            back = tl.dot(x, tl.trans(state), input_precision=PREC)
        else:
            back = tl.zeros((BT, BD), tl.float32)
            for j in range(NV):
                x = load_tile(dr, rows, j * BV + block, dr_t * A, ok, D, BV).to(CT)
                part = load_state(kv, cols, j * BV + block, D, D).to(CT)
                back = tl.dot(x, tl.trans(part), back, input_precision=PREC)
        back = rotate(back, cos, -sin, BT, BD) * inverse[:, None]
        u = -tl.sum(qf * back, 1) * inverse
        back = (back + u[:, None] * s[None, :] + mean[None, :]) * tl.minimum(qf, 1.0)
        store_tile(dq, back, rows, cols, H * D, ok, D, BD)
        q += BT * (q_t * A).to(tl.int64)
        dr += BT * (dr_t * A).to(tl.int64)
        dq += BT * (H * D).to(tl.int64)


# --------------------------------------------------------------------------------------------------------------------
# Host side


def starts(sizes: list[int]) -> list[int]:
    """Where parts of fp32 numbers start in memory that they share, in bytes, and how many numbers there are."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [4 * end for end in ends[:-1]] + ends[-1:]


class _Plan:
    """What all launches of a pass share.

    Args:
        height: of the grid of tokens.
        width: of it.
        q: like the other tensors with the last dimension contiguous.
        others: the pass's other arguments of that shape.
    """

    backward = False

    def __init__(self, height: int, width: int, q: torch.Tensor, *others: torch.Tensor | None):
        self.n = max(height, width)
        self.in_place = all(x is None or rows(x) is x for x in (q, *others))
        self.kept_sizes = kept_sizes(q, height, width)
        *self.kept_starts, self.kept_total = starts(self.kept_sizes)
        self.B, self.T, self.H, self.D = q.shape
        self.device, self.heads = q.device, self.B * self.H
        self.cfg = config(q.dtype, self.D, self.backward)
        self.unit = alignment(q, *(x for x in others if x is not None))
        self.types = dict(zip(('CT', 'PREC'), compute_types(q.dtype)))
        self.parts, self.per = cut(self.T, self.heads * self.cfg.nv, self.cfg.sums, self.device)
        self.span = span(self.T, self.heads, self.cfg.reads.bt, self.device)
        self.grid = (self.parts, self.heads, self.cfg.nv)
        self.grid_reads = (ceil_div(self.T, self.span), self.heads)

    def blocks(self, bt: int, unit: int | None = None, **flags) -> dict:
        blocks = {'D': self.D, 'BT': bt, 'BD': self.cfg.bk, 'BV': self.cfg.bv}
        blocks |= {'NV': flags.pop('NV')} if 'NV' in flags else {}
        return blocks | {'A': unit or self.unit} | self.types | flags

    def set_scratch(self, *sizes: int) -> None:
        self.scratch_sizes = [ceil_div(n, 4) * 4 for n in sizes]  # each of them starts at a multiple of 16 bytes
        *self.scratch_starts, self.scratch_total = starts(self.scratch_sizes)

    def split(self, kept: torch.Tensor, scratch: torch.Tensor, ready: bool) -> tuple[list, list]:
        """The parts of what is kept and of the scratch, as tensors or, if `ready`, as addresses."""
        if not ready:
            return kept.split_with_sizes(self.kept_sizes), scratch.split_with_sizes(self.scratch_sizes)
        first, second = kept.data_ptr(), scratch.data_ptr()
        return [first + n for n in self.kept_starts], [second + n for n in self.scratch_starts]

    def fp32(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)


class _ForwardPlan(_Plan):
    def __init__(self, height: int, width: int, eps: float, q, k, v, lepe, gate):
        super().__init__(height, width, q, k, v, lepe, gate)
        n = self.n
        T, H, D, cfg, parts, heads = self.T, self.H, self.D, self.cfg, self.parts, self.heads
        each = (heads * D * D, heads * D, heads) if parts > 1 else (0, 0, 0)
        self.set_scratch(parts * heads * D, parts * heads, *(parts * size for size in each))
        consts = {'D': D, 'BT': 64, 'BD': cfg.bk, 'BM': next_power(D // 4), 'A': self.unit, 'LOG2_BASE': LOG2_BASE}
        self.queries = Launch(rala_fwd_kernel_queries, (parts, heads + 1, 1),
                              (T, self.per, H, n, *strides(self.unit, q)), consts, 4, 3)  # fmt: skip
        sizes = (T, self.per, H, parts, n, width, *strides(self.unit, k, v))
        self.keys = Launch(rala_fwd_kernel_keys, self.grid, sizes, self.blocks(cfg.sums.bt), *cfg.sums.launch)
        self.merge = Launch(rala_kernel_merge, (heads, ceil_div(D * D, 128) + ceil_div(D, 128), 1), (parts,),
                            {'D': D, 'BLOCK': 128, 'BP': 16, 'MOST': MAX_PARTS}, 4, 2)  # fmt: skip
        like = strides(self.unit, q, q if lepe is None else lepe, q if gate is None else gate)
        flags = {'LEPE': lepe is not None, 'GATE': gate is not None}
        self.out = Launch(rala_fwd_kernel_out, (*self.grid_reads, cfg.nv), (T, self.span, H, eps, n, width, *like),
                          self.blocks(cfg.reads.bt, **flags), *cfg.reads.launch)  # fmt: skip


class _BackwardPlan(_Plan):
    backward = True

    def __init__(self, height: int, width: int, eps: float, q, k, v, lepe, gate, dy):
        super().__init__(height, width, q, k, v, lepe, gate, dy)
        n = self.n
        T, H, D, cfg, parts, heads = self.T, self.H, self.D, self.cfg, self.parts, self.heads
        self.key_parts, per = cut(T, heads, cfg.sums, self.device)
        self.rows = parts * cfg.nv  # sums of the key's gradient
        state = heads * D * D if parts > 1 else 0
        self.set_scratch(heads * D * D, heads * D, parts * state, self.rows * heads * D, self.key_parts * heads * D)
        flags = {'LEPE': lepe is not None, 'GATE': gate is not None}
        like = strides(self.unit, q, q if lepe is None else lepe, q if gate is None else gate, dy)
        self.queries = Launch(rala_bwd_kernel_queries, self.grid, (T, self.per, H, eps, n, width, *like),
                              self.blocks(cfg.sums.bt, **flags), *cfg.sums.launch)  # fmt: skip
        self.merge = merge_launch(heads, D, D, parts, self.rows, 1.0)
        self.keys = Launch(rala_bwd_kernel_keys, (self.key_parts, heads, 1),
                           (T, per, H, n, width, *strides(self.unit, k, v)), self.blocks(cfg.sums.bt, NV=cfg.nv),
                           *cfg.sums.launch)  # fmt: skip
        dr = torch.empty(*q.shape, device='meta') if any(flags.values()) else dy
        unit = alignment(q, dr)
        self.dq = Launch(rala_bwd_kernel_dq, (*self.grid_reads, 1),
                         (T, self.span, H, self.key_parts, eps, n, width, *strides(unit, q, dr)),
                         self.blocks(cfg.reads.bt, unit, NV=cfg.nv), *cfg.reads.launch)  # fmt: skip


@on_device_of_first
def rank_augmented_fwd(q, k, v, lepe, gate, height: int, width: int, eps: float):
    """y (B, T, H, D), and what the backward pass needs in one fp32 tensor, see `kept_sizes`."""
    steps = plan(_ForwardPlan, (height, width, eps), q, k, v, lepe, gate)
    if not steps.in_place:
        q, k, v, lepe, gate = (x if x is None else rows(x) for x in (q, k, v, lepe, gate))
        steps = plan(_ForwardPlan, (height, width, eps), q, k, v, lepe, gate)
    at_16 = aligned(q, k, v, lepe, gate)
    # What a kernel does not need is allocated behind its launch: the host is often what a pass waits for.
    kept, scratch = steps.fp32(steps.kept_total), steps.fp32(steps.scratch_total)
    parts = steps.split(kept, scratch, at_16 and steps.out.compiled is not None)
    (kv, key, qbar, norm, table), (parts_q, weight, parts_kv, parts_key, top) = parts
    steps.queries(at_16, q, parts_q, table)
    if steps.parts == 1:
        steps.keys(at_16, k, v, parts_q, qbar, table, kv, key, norm, weight)
    else:
        steps.keys(at_16, k, v, parts_q, qbar, table, parts_kv, parts_key, top, weight)
        steps.merge(True, parts_kv, parts_key, top, weight, kv, key, norm)
    y = torch.empty(*q.shape, dtype=q.dtype, device=q.device)
    steps.out(at_16, q, lepe, gate, y, kv, key, table)
    return y, kept


@on_device_of_first
def rank_augmented_bwd(q, k, v, lepe, gate, kept, dy, height: int, width: int, eps: float):
    """Gradients dq, dk, dv, dlepe (or None), dgate (or None); `kept` is what the forward pass left."""
    q, k, v, dy = rows(q), rows(k), rows(v), rows(dy)
    lepe, gate = (x if x is None else rows(x) for x in (lepe, gate))
    steps = plan(_BackwardPlan, (height, width, eps), q, k, v, lepe, gate, dy)
    at_16 = aligned(q, k, v, lepe, gate, dy, kept)
    scratch = steps.fp32(steps.scratch_total)
    parts = steps.split(kept, scratch, at_16 and steps.dq.compiled is not None)
    (kv, key, qbar, norm, table), (dkv, dkey, parts_kv, parts_key, dqbar) = parts
    fresh = lambda: torch.empty(*q.shape, dtype=q.dtype, device=q.device)  # noqa: E731
    dr, dgate = dy if lepe is None and gate is None else fresh(), None if gate is None else fresh()
    parts_kv = dkv if steps.parts == 1 else parts_kv
    parts_key = dkey if steps.rows == 1 else parts_key
    steps.queries(at_16, q, lepe, gate, dy, None if dr is dy else dr, dgate, kv, key, table, parts_kv, parts_key)
    if steps.rows > 1:
        steps.merge(True, parts_kv, parts_key, dkv, dkey)
    dk, dv = fresh(), fresh()
    steps.keys(at_16, k, v, dk, dv, kv, key, qbar, norm, table, dkv, dkey, dqbar)
    dq = fresh()
    steps.dq(at_16, q, dr, dq, kv, key, table, dqbar)
    return dq, dk, dv, None if lepe is None else dr, dgate
