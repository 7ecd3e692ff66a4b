"""Strided convolution, LayerNorm over its channels and activation on GPUs, as one product over gathered patches.

A program holds all output channels of a tile of pixels, so the norm, the activation and a table (position embedding)
are added in registers and the result is written once, channels last. Images are read where they are, in their own
layout and type: nothing is transposed, cast or unfolded in memory. Channels are cut into two pieces as in `block_tail`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from zoo.kernels._triton._common import (
    Launch,
    aligned,
    ceil_div,
    compute_types,
    interpreting,
    on_device_of_first,
    plan,
    store_tile,
    types,
)
from zoo.kernels._triton.block_tail import norm_pieces, pieces, row

MAX_CHANNELS = 256
FEW = 8  # input channels up to which patches are gathered element by element


class Config(NamedTuple):
    """Pixels of a tile, depth of a step of the product, warps, stages of its loop."""

    bt: int
    bk: int
    warps: int
    stages: int


def config(few: bool, c_in: int) -> Config:
    """The fixed table of block sizes; every row has a case in tests/gpu/check_conv_norm.py."""
    if few:
        return Config(16 if interpreting() else 64, 32, 4, 2)
    return Config(16 if interpreting() else 64, min(32, c_in & -c_in), 4, 4)


def unsupported(dtype: torch.dtype, c_in: int, c_out: int) -> str | None:
    """Why the kernels cannot compute in `dtype` for these channels, or None."""
    if dtype != torch.bfloat16 and not interpreting():
        return f'dtype {str(dtype).removeprefix("torch.")}'
    if c_out > MAX_CHANNELS or c_out % 16:
        return f'{c_out} output channels, no multiple of 16 up to {MAX_CHANNELS}'
    if c_in > FEW and c_in % 16:
        return f'{c_in} input channels, neither up to {FEW} nor a multiple of 16'
    return None


@triton.jit
def _finish(acc1, acc2, c1, c2, bias, w_norm, b_norm, table, y, pixel, ok, grid, eps, C: tl.constexpr,
            B1: tl.constexpr, B2: tl.constexpr, ACT: tl.constexpr):  # fmt: skip
    """Bias, norm, activation and table of a tile, stored."""
    TWO: tl.constexpr = B2 > 0
    if bias is not None:
        acc1 += row(bias, c1, C)
        if TWO:
            acc2 += row(bias, c2, C)
    acc1, acc2 = norm_pieces(acc1, acc2, c1, c2, w_norm, b_norm, eps, C, TWO, True)
    acc1 = _activate(acc1, ACT)
    if TWO:
        acc2 = _activate(acc2, ACT)
    if table is not None:
        at = table + (pixel % grid)[:, None] * C
        acc1 += tl.load(at + c1[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
        if TWO:
            acc2 += tl.load(at + c2[None, :], mask=ok[:, None] & (c2 < C)[None, :], other=0.0).to(tl.float32)
    store_tile(y, acc1, pixel, c1, C, ok, B1, B1)
    if TWO:
        store_tile(y, acc2, pixel, c2, C, ok, C, B1 + B2)


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 'silu':
        x *= tl.sigmoid(x)
    elif ACT == 'gelu':
        x *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


SIZES = ['N', 'h', 'w', 'oh', 'ow', 'x_b', 'x_c', 'x_h', 'x_w']


@triton.jit(do_not_specialize=SIZES)
def conv_norm_kernel_few(
    x, weight, bias, w_norm, b_norm, table, y, N, h, w, oh, ow, x_b, x_c, x_h, x_w, eps,
    KH: tl.constexpr, KW: tl.constexpr, DEPTH: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, ACT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Few input channels: patches (c, i, j) are gathered; weight (C, STEPS BK) with zeros from DEPTH on."""
    pixel = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = pixel < N
    grid = oh * ow
    r = (pixel % grid).to(tl.int32)
    top = r // ow * STRIDE - PAD
    left = r % ow * STRIDE - PAD
    x += (pixel // grid) * x_b + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    c1 = tl.arange(0, B1)
    c2 = B1 + tl.arange(0, B2 if B2 else B1)
    acc1 = tl.zeros((BT, B1), tl.float32)
    acc2 = tl.zeros((BT, B2 if B2 else B1), tl.float32)
    for step in range(0, STEPS):
        k = step * BK + tl.arange(0, BK)
        i = k // KW % KH
        j = k % KW
        inside = ((top[:, None] + i[None, :]).to(tl.uint32) < h) & ((left[:, None] + j[None, :]).to(tl.uint32) < w)
        inside = inside & ok[:, None] & (k < DEPTH)[None, :]
        at = (k // (KH * KW)).to(tl.int64) * x_c + i * x_h + j * x_w
        a = tl.load(x[:, None] + at[None, :], mask=inside, other=0.0).to(CT)
        b = tl.load(weight + c1[:, None] * (STEPS * BK) + k[None, :])
        acc1 = tl.dot(a, tl.trans(b.to(CT)), acc1, input_precision=PREC)
        if B2:
            b = tl.load(weight + c2[:, None] * (STEPS * BK) + k[None, :], mask=(c2 < C)[:, None], other=0.0)
            acc2 = tl.dot(a, tl.trans(b.to(CT)), acc2, input_precision=PREC)
    _finish(acc1, acc2, c1, c2, bias, w_norm, b_norm, table, y, pixel, ok, grid, eps, C, B1, B2, ACT)


@triton.jit(do_not_specialize=SIZES)
def conv_norm_kernel_many(
    x, weight, bias, w_norm, b_norm, table, y, N, h, w, oh, ow, x_b, x_h, x_w, eps,
    KH: tl.constexpr, KW: tl.constexpr, CIN: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, A: tl.constexpr, ACT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Channels last, CIN a multiple of BK: BK channels of one tap after the other; weight (C, KH KW CIN)."""
    pixel = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = pixel < N
    grid = oh * ow
    r = (pixel % grid).to(tl.int32)
    top = r // ow * STRIDE - PAD
    left = r % ow * STRIDE - PAD
    start = ((pixel // grid) * x_b + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w) * A
    c1 = tl.arange(0, B1)
    c2 = B1 + tl.arange(0, B2 if B2 else B1)
    some = tl.arange(0, BK)
    acc1 = tl.zeros((BT, B1), tl.float32)
    acc2 = tl.zeros((BT, B2 if B2 else B1), tl.float32)
    DEPTH: tl.constexpr = KH * KW * CIN
    for k in range(0, DEPTH, BK):
        tap = k // CIN
        i = tap // KW
        j = tap % KW
        inside = ok & ((top + i).to(tl.uint32) < h) & ((left + j).to(tl.uint32) < w)
        at = start + (i.to(tl.int64) * x_h + j.to(tl.int64) * x_w) * A
        a = tl.load(x + at[:, None] + (k % CIN + some)[None, :], mask=inside[:, None], other=0.0).to(CT)
        b = tl.load(weight + c1[:, None] * DEPTH + (k + some)[None, :])
        acc1 = tl.dot(a, tl.trans(b.to(CT)), acc1, input_precision=PREC)
        if B2:
            b = tl.load(weight + c2[:, None] * DEPTH + (k + some)[None, :], mask=(c2 < C)[:, None], other=0.0)
            acc2 = tl.dot(a, tl.trans(b.to(CT)), acc2, input_precision=PREC)
    _finish(acc1, acc2, c1, c2, bias, w_norm, b_norm, table, y, pixel, ok, grid, eps, C, B1, B2, ACT)


def prepared(weight: torch.Tensor, few: bool, dtype: torch.dtype) -> torch.Tensor:
    """The weight (C, CIN, KH, KW) as the kernels read it."""
    if not few:
        return weight.to(dtype).permute(0, 2, 3, 1).flatten(1).contiguous()
    weight = weight.to(dtype).flatten(1)
    missing = -weight.shape[1] % config(True, 1).bk
    return F.pad(weight, (0, missing)) if missing else weight.contiguous()


class _Plan:
    def __init__(self, eps, stride, padding, activation, compute, dtype, _, x, weight):
        B, CIN, h, w = x.shape
        C, _, KH, KW = weight.shape
        oh, ow = ((n + 2 * padding - k) // stride + 1 for n, k in ((h, KH), (w, KW)))
        self.shape = B, oh, ow, C
        self.few = few = CIN <= FEW
        self.in_place = few or x.stride(1) == 1
        cfg = config(few, CIN)
        B1, B2 = pieces(C)
        ct, prec = compute_types(compute)
        N = B * oh * ow
        last = {'ACT': activation, 'CT': ct, 'PREC': prec}
        shape = {'STRIDE': stride, 'PAD': padding, 'C': C, 'B1': B1, 'B2': B2, 'BT': cfg.bt, 'BK': cfg.bk}
        if few:
            kernel, strides, depth = conv_norm_kernel_few, x.stride(), CIN * KH * KW
            consts = {'KH': KH, 'KW': KW, 'DEPTH': depth, **shape, 'STEPS': ceil_div(depth, cfg.bk), **last}
        else:
            kernel, distances = conv_norm_kernel_many, (x.stride(0), x.stride(2), x.stride(3))
            bits = distances[0] | distances[1] | distances[2] | 16
            unit = bits & -bits
            strides = [n // unit for n in distances]
            consts = {'KH': KH, 'KW': KW, 'CIN': CIN, **shape, 'A': unit, **last}
        sizes = N, h, w, oh, ow, *strides, eps
        self.run = Launch(kernel, (ceil_div(N, cfg.bt), 1, 1), sizes, consts, cfg.warps, cfg.stages)


@on_device_of_first
def conv_norm_fwd(x, weight, bias, w_norm, b_norm, eps, stride, padding, activation, table, compute, dtype):
    """(B, CIN, h, w) to (B, oh, ow, C) in `dtype`; `table` (oh ow, C) or None."""
    options = eps, stride, padding, activation, compute, dtype, types(bias, w_norm, b_norm, table)
    steps = plan(_Plan, options, x, weight)
    if not steps.in_place:
        x = x.contiguous(memory_format=torch.channels_last)
        steps = plan(_Plan, options, x, weight)
    y = torch.empty(*steps.shape, dtype=dtype, device=x.device)
    weight = prepared(weight, steps.few, compute)
    table = None if table is None else table.contiguous()
    steps.run(aligned(x, weight, bias, w_norm, b_norm, table), x, weight, bias, w_norm, b_norm, table, y)
    return y
