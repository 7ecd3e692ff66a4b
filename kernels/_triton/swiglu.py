"""The products of SwiGLU and GEGLU on GPUs: silu(a) * b or a * gelu(b) of rows [a | b], each way one pass over memory.

`swiglu_linear` has the matrix product before it in the same kernel: a program makes a tile of a and the same tile of b
side by side, so that [a | b], twice as wide as the result, is never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
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
)

_BLOCK = 256  # columns
_TILE = 2048  # elements


@triton.jit
def normal_below(x):
    """The probability that a standard normal number is below x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=['N'])
def swiglu_fwd_kernel(x, y, N, SX: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      GELU: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    at = x + rows[:, None] * SX + cols[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + M, mask=inside, other=0.0).to(tl.float32)
    product = a * b * normal_below(b) if GELU else a * tl.sigmoid(a) * b
    tl.store(y + rows[:, None] * M + cols[None, :], product.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['N'])
def swiglu_bwd_kernel(x, dy, dx, N, SX: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      GELU: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    at = x + rows[:, None] * SX + cols[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + M, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + rows[:, None] * M + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if GELU:
        s = normal_below(b)
        da, db = g * b * s, g * a * (s + b * 0.3989422804014327 * tl.exp(-0.5 * b * b))
    else:
        s = tl.sigmoid(a)
        da, db = g * b * s * (1.0 + a * (1.0 - s)), g * a * s
    to = dx + rows[:, None] * (2 * M) + cols[None, :]
    tl.store(to, da.to(dx.dtype.element_ty), mask=inside)
    tl.store(to + M, db.to(dx.dtype.element_ty), mask=inside)


class Config(NamedTuple):
    """Rows and columns of a tile of the result, channels of a step of the product, warps, stages of the loop."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int


def config(C: int) -> Config:
    """The fixed table of `swiglu_linear`; every row has a case in tests/gpu/check_fused.py."""
    if interpreting():
        return Config(16, 16, 16, 4, 2)
    return Config(128, 64, 64 if C % 64 == 0 else 32, 8, 3)


def unsupported(dtype: torch.dtype, C: int) -> str | None:
    """Why `swiglu_linear` cannot take rows of C numbers, or None."""
    if dtype not in (torch.bfloat16, torch.float16) and not interpreting():
        return f'dtype {str(dtype).removeprefix("torch.")}'
    return None if C % 32 == 0 else f'{C} channels are no multiple of 32'


@triton.jit(do_not_specialize=['N'])
def swiglu_linear_kernel(
    x, weight, y, N, SX: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Programs of neighbouring numbers share rows of x, all of whose columns they make; the weight stays in L2."""
    blocks: tl.constexpr = (M + BM - 1) // BM
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    ok = rows < N
    inside = cols < M
    channels = tl.arange(0, BK)
    a = tl.zeros((BN, BM), tl.float32)
    b = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        t = load_tile(x + k, rows, channels, SX, ok, BK, BK).to(CT)
        w = load_tile(weight + k, cols, channels, C, inside, BK, BK).to(CT)
        a = tl.dot(t, tl.trans(w), a, input_precision=PREC)
        w = load_tile(weight + M * C + k, cols, channels, C, inside, BK, BK).to(CT)
        b = tl.dot(t, tl.trans(w), b, input_precision=PREC)
    store_tile(y, a * tl.sigmoid(a) * b, rows, cols, M, ok, M, BM * blocks)


class _LinearPlan:
    def __init__(self, x, weight):
        M, C = weight.shape[0] // 2, x.shape[-1]
        N = x.numel() // C
        rows, SX = token_rows(x)
        self.in_place, self.shape = rows is x, (*x.shape[:-1], M)
        cfg = config(C)
        ct, prec = compute_types(x.dtype)
        if x.dtype == torch.float16 and not interpreting():
            ct = tl.float16  # one factor is an activation, the other a weight: nothing that could overflow
        consts = {'SX': SX, 'C': C, 'M': M, 'BN': cfg.bn, 'BM': cfg.bm, 'BK': cfg.bk, 'STAGES': cfg.stages, 'CT': ct,
                  'PREC': prec}  # fmt: skip
        grid = ceil_div(N, cfg.bn) * ceil_div(M, cfg.bm), 1, 1
        self.run = Launch(swiglu_linear_kernel, grid, (N,), consts, cfg.warps, cfg.stages)


@on_device_of_first
def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(a) * b of [a | b] = x W^T: x (..., C), weight (2m, C) contiguous -> (..., m)."""
    steps = plan(_LinearPlan, (), x, weight)
    y = x.new_empty(*steps.shape)
    if not steps.in_place:
        x = token_rows(x)[0]
    steps.run(aligned(x, weight), x, weight, y)
    return y


class _ProductPlan:
    """Launch of the product, or with its gradient of the backward pass."""

    def __init__(self, gelu: bool, x, dy=None):
        M = x.shape[-1] // 2
        N = x.numel() // (2 * M)
        rows, SX = token_rows(x)
        self.in_place, self.shape = rows is x, (*x.shape[:-1], M)
        BM = min(_BLOCK, next_power(M))
        BN = _TILE // BM
        consts = {'SX': SX, 'M': M, 'BM': BM, 'BN': BN, 'GELU': gelu}
        kernel = swiglu_fwd_kernel if dy is None else swiglu_bwd_kernel
        self.run = Launch(kernel, (ceil_div(N, BN), ceil_div(M, BM), 1), (N,), consts)


@on_device_of_first
def swiglu_fwd(x: Tensor, gelu: bool) -> Tensor:
    """silu(a) * b, or a * gelu(b), of [a | b] (..., 2m) -> (..., m)."""
    steps = plan(_ProductPlan, (gelu,), x)
    y = torch.empty(*steps.shape, dtype=x.dtype, device=x.device)
    if not steps.in_place:
        x = token_rows(x)[0]
    steps.run(aligned(x), x, y)
    return y


@on_device_of_first
def swiglu_bwd(x: Tensor, dy: Tensor, gelu: bool) -> Tensor:
    """Gradient (..., 2m) of [a | b]."""
    x, dy = token_rows(x)[0], dy.contiguous()
    steps = plan(_ProductPlan, (gelu,), x, dy)
    dx = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    steps.run(aligned(x, dy), x, dy, dx)
    return dx
