"""SwiGLU's product on GPUs: silu(a) * b of rows [a | b], each way one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels._triton._common import ceil_div, launch, next_power, token_rows

_BLOCK = 256  # columns
_TILE = 2048  # elements


@triton.jit(do_not_specialize=['N'])
def swiglu_fwd_kernel(x, y, N, SX: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    at = x + rows[:, None] * SX + cols[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + M, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows[:, None] * M + cols[None, :], (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['N'])
def swiglu_bwd_kernel(x, dy, dx, N, SX: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    at = x + rows[:, None] * SX + cols[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + M, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + rows[:, None] * M + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    to = dx + rows[:, None] * (2 * M) + cols[None, :]
    tl.store(to, (g * b * s * (1.0 + a * (1.0 - s))).to(dx.dtype.element_ty), mask=inside)
    tl.store(to + M, (g * a * s).to(dx.dtype.element_ty), mask=inside)


def _run(kernel, x: Tensor, *others: Tensor) -> None:
    M = x.shape[-1] // 2
    N = x.numel() // (2 * M)
    x, SX = token_rows(x)
    BM = min(_BLOCK, next_power(M))
    BN = _TILE // BM
    consts = {'SX': SX, 'M': M, 'BM': BM, 'BN': BN}
    launch(kernel, (ceil_div(N, BN), ceil_div(M, BM), 1), (x, *others), (N,), consts)


def swiglu_fwd(x: Tensor) -> Tensor:
    """silu(a) * b of [a | b] (..., 2m) -> (..., m)."""
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    _run(swiglu_fwd_kernel, x, y)
    return y


def swiglu_bwd(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient (..., 2m) of [a | b]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(swiglu_bwd_kernel, x, dy.contiguous(), dx)
    return dx
