"""The rest of a gated-linear-attention block on GPUs, from the scan's output to the next block's input, in one kernel.

A program holds the residual stream of its tokens in registers, as accumulators: the output projection and the MLP's
second product add to it where it is. Every activation is read once and written once, no intermediate leaves the chip;
the weights come from the L2 cache, so a program takes many tokens. C channels are cut into two pieces, powers of two:
192 = 128 + 64 costs nothing beyond its own products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import (
    Launch,
    aligned,
    ceil_div,
    compute_types,
    interpreting,
    load_tile,
    next_power,
    on_device_of_first,
    plan,
    store_tile,
    token_rows,
    types,
)
from zoo.kernels._triton.mix import mixture

MAX_DIM = 192


class Config(NamedTuple):
    """Tokens of a program, hidden channels of a step of the MLP, warps, stages of both loops."""

    bt: int
    bh: int
    warps: int
    stages: int


def config(dtype: torch.dtype, C: int) -> Config:
    """The fixed table of block sizes; every row has a case in tests/gpu/check_block_tail.py."""
    if interpreting():
        return Config(16, 16, 4, 2)
    return Config(64, 64, 4, 2) if C <= 128 else Config(128, 32, 8, 3)


def pieces(C: int) -> tuple[int, int]:
    """C channels as the largest power of two and the rest, rounded up to one (0 for none)."""
    first = max(16, 1 << (C.bit_length() - 1))
    return first, next_power(C - first) if C > first else 0


def unsupported(dtype: torch.dtype, C: int, V: int, M: int) -> str | None:
    """Why the kernel cannot take such tensors, or None."""
    if dtype != torch.bfloat16 and not interpreting():
        return f'dtype {str(dtype).removeprefix("torch.")}'
    if C > MAX_DIM:
        return f'{C} channels, more than {MAX_DIM}'
    if V % 16 or V & (V - 1) or M % 64:
        return f'V = {V} is no power of two from 16 on, or {M} hidden channels are no multiple of 64'
    return None


@triton.jit
def row(x, cols, C: tl.constexpr):
    return tl.load(x + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_pieces(x1, x2, c1, c2, weight, bias, eps, C: tl.constexpr, TWO: tl.constexpr, CENTER: tl.constexpr):
    """Norm of rows in two pieces, the second one zero beyond C, in fp32."""
    if CENTER:
        mean = tl.sum(x1, 1)
        if TWO:
            mean += tl.sum(x2, 1)
            x2 = tl.where((c2 < C)[None, :], x2 - (mean / C)[:, None], 0.0)
        x1 = x1 - (mean / C)[:, None]
    total = tl.sum(x1 * x1, 1)
    if TWO:
        total += tl.sum(x2 * x2, 1)
    scale = tl.rsqrt(total / C + eps)[:, None]
    x1 = x1 * scale * row(weight, c1, C)
    if TWO:
        x2 = x2 * scale * row(weight, c2, C)
    if bias is not None:
        x1 += row(bias, c1, C)
        if TWO:
            x2 += row(bias, c2, C)
    return x1, x2


@triton.jit(do_not_specialize=['N'])
def block_tail_kernel(
    stream, o, local, gate, gate_bias, w_global, w_local, w_out, w_norm, b_norm, w_up, w_down, w_next, b_next, new, y,
    N, eps_mix, eps, eps_next,
    SS: tl.constexpr, SO: tl.constexpr, SL: tl.constexpr, SG: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, M: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr, SILU: tl.constexpr, CENTER: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = rows < N
    TWO: tl.constexpr = B2 > 0
    c1 = tl.arange(0, B1)
    c2 = B1 + tl.arange(0, B2 if TWO else B1)
    acc1 = load_tile(stream, rows, c1, SS, ok, B1, B1).to(tl.float32)
    acc2 = acc1
    if TWO:
        acc2 = load_tile(stream, rows, c2, SS, ok, C, B1 + B2).to(tl.float32)
    # The mix of one head after the other, times its columns of the output projection.
    cols = tl.arange(0, V)
    wg = row(w_global, cols, V)
    wl = row(w_local, cols, V)
    for h in tl.range(0, H, num_stages=STAGES):
        x = load_tile(o + h * V, rows, cols, SO, ok, V, V).to(tl.float32)
        l = load_tile(local + h * V, rows, cols, SL, ok, V, V).to(tl.float32)
        s = load_tile(gate + h * V, rows, cols, SG, ok, V, V).to(tl.float32)
        if gate_bias is not None:
            s += row(gate_bias + h * V, cols, V)
        m = mixture(x, l, tl.sigmoid(s), wg, wl, V, eps_mix, SILU).to(CT)
        w = load_tile(w_out + h * V, c1, cols, C, c1 < C, V, V).to(CT)
        acc1 = tl.dot(m, tl.trans(w), acc1, input_precision=PREC)
        if TWO:
            w = load_tile(w_out + h * V, c2, cols, C, c2 < C, V, V).to(CT)
            acc2 = tl.dot(m, tl.trans(w), acc2, input_precision=PREC)

    y1, y2 = norm_pieces(acc1, acc2, c1, c2, w_norm, b_norm, eps, C, TWO, CENTER)
    y1 = y1.to(CT)
    y2 = y2.to(CT)
    hidden = tl.arange(0, BH)
    every = hidden >= 0
    for j in tl.range(0, M, BH, num_stages=STAGES):
        up = w_up + j * C
        w = load_tile(up, hidden, c1, C, every, B1, B1).to(CT)
        a = tl.dot(y1, tl.trans(w), input_precision=PREC)
        w = load_tile(up + M * C, hidden, c1, C, every, B1, B1).to(CT)
        b = tl.dot(y1, tl.trans(w), input_precision=PREC)
        if TWO:
            w = load_tile(up, hidden, c2, C, every, C, B1 + B2).to(CT)
            a = tl.dot(y2, tl.trans(w), a, input_precision=PREC)
            w = load_tile(up + M * C, hidden, c2, C, every, C, B1 + B2).to(CT)
            b = tl.dot(y2, tl.trans(w), b, input_precision=PREC)
        u = (a * tl.sigmoid(a) * b).to(CT)
        w = load_tile(w_down + j, c1, hidden, M, c1 < C, BH, BH).to(CT)
        acc1 = tl.dot(u, tl.trans(w), acc1, input_precision=PREC)
        if TWO:
            w = load_tile(w_down + j, c2, hidden, M, c2 < C, BH, BH).to(CT)
            acc2 = tl.dot(u, tl.trans(w), acc2, input_precision=PREC)

    stored = acc1.to(new.dtype.element_ty)
    store_tile(new, stored, rows, c1, C, ok, B1, B1)
    acc1 = stored.to(tl.float32)
    if TWO:
        stored = acc2.to(new.dtype.element_ty)
        store_tile(new, stored, rows, c2, C, ok, C, B1 + B2)
        acc2 = stored.to(tl.float32)
    if w_next is not None:
        y1, y2 = norm_pieces(acc1, acc2, c1, c2, w_next, b_next, eps_next, C, TWO, CENTER)
        store_tile(y, y1, rows, c1, C, ok, B1, B1)
        if TWO:
            store_tile(y, y2, rows, c2, C, ok, C, B1 + B2)


class _Plan:
    """The launch; weights and biases count by their types alone."""

    def __init__(self, eps_mix, silu, eps, eps_next, center, _, stream, o, local, gate, w_down):
        (H, V), (C, M) = o.shape[-2:], w_down.shape
        N = stream.numel() // C
        rows = [token_rows(x, dims) for x, dims in ((stream, 1), (o, 2), (local, 2), (gate, 2))]
        self.in_place = all(row is x for (row, _), x in zip(rows, (stream, o, local, gate)))
        cfg = config(o.dtype, C)
        B1, B2 = pieces(C)
        ct, prec = compute_types(o.dtype)
        distances = dict(zip(('SS', 'SO', 'SL', 'SG'), (distance for _, distance in rows)))
        consts = distances | {'H': H, 'V': V, 'C': C, 'B1': B1, 'B2': B2, 'M': M, 'BH': cfg.bh, 'BT': cfg.bt,
                              'STAGES': cfg.stages, 'SILU': silu, 'CENTER': center, 'CT': ct, 'PREC': prec}  # fmt: skip
        grid, sizes = (ceil_div(N, cfg.bt), 1, 1), (N, eps_mix, eps, eps_next)
        self.run = Launch(block_tail_kernel, grid, sizes, consts, cfg.warps, cfg.stages)


@on_device_of_first
def block_tail(stream, o, local, gate, gate_bias, w_global, w_local, eps_mix, silu, w_out, w_norm, b_norm, eps, w_up,
               w_down, w_next, b_next, eps_next, center):  # fmt: skip
    """The new stream and its norm by `w_next` (None without one); weights of products in o's dtype."""
    options = eps_mix, silu, eps, eps_next, center, types(gate_bias, w_global, w_local, w_norm, b_norm, w_next, b_next)
    steps = plan(_Plan, options, stream, o, local, gate, w_down)
    shape = stream.shape
    new = stream.new_empty(*shape)
    y = None if w_next is None else o.new_empty(*shape)
    if not steps.in_place:
        stream, o, local, gate = token_rows(stream)[0], *(token_rows(x, 2)[0] for x in (o, local, gate))
    inputs = (stream, o, local, gate, gate_bias, w_global, w_local, w_out, w_norm, b_norm, w_up, w_down, w_next,
              b_next)  # fmt: skip
    steps.run(aligned(*inputs), *inputs, new, y)
    return new, y
