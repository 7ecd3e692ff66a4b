"""Depthwise causal convolution on GPUs: one pass over memory each way, the taps' neighbours from the cache.

Tokens of all rows are one axis of N = B T; a tile of it may straddle rows. The backward pass computes z again around
every token; each program sums the weights' gradients over its tokens, and the programs' sums are added in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels._triton._common import (
    Launch,
    aligned,
    ceil_div,
    next_power,
    on_device_of_first,
    plan,
    programs,
    token_rows,
)

_BLOCK = 128  # channels
_TILE = 2048  # elements of a forward tile; the backward, with more of them alive, takes half


@triton.jit
def _column(x, init, n, t, N, T, shift, cols, SX: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Raw columns `shift` tokens before the tokens n (t within their row) in fp32, from `init` or zero before them."""
    at = t - shift
    inside = (n < N) & (at >= 0) & (at < T)
    col_ok = (cols < C)[None, :]
    value = tl.load(x + (n - shift)[:, None] * SX + cols[None, :], mask=inside[:, None] & col_ok, other=0.0)
    value = value.to(tl.float32)
    if init is not None:
        before = (n < N) & (at < 0) & (at >= -W)
        row = (n // T)[:, None] * C + cols[None, :]
        value += tl.load(init + row * W + (W + at)[:, None], mask=before[:, None] & col_ok, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=['N', 'T'])
def causal_conv_fwd_kernel(
    x, weight, bias, init, y, N, T,
    SX: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = n % T
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    ok_c = cols < C
    z = tl.zeros((BN, BC), tl.float32)
    if bias is not None:
        z += tl.load(bias + cols, mask=ok_c, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        tap = tl.load(weight + cols * W + i, mask=ok_c, other=0.0).to(tl.float32)
        z += _column(x, init, n, t, N, T, W - 1 - i, cols, SX, C, W) * tap[None, :]
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + n[:, None] * C + cols[None, :], z.to(y.dtype.element_ty), mask=(n < N)[:, None] & ok_c[None, :])


@triton.jit
def _slope(
    x, weight, bias, init, dy, n, t, N, T, ahead, cols,
    SX: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient of z at the tokens `ahead` of n, zero past the row's end."""
    ok_c = cols < C
    inside = (n < N) & (t + ahead < T)
    at = (n + ahead)[:, None] * C + cols[None, :]
    g = tl.load(dy + at, mask=inside[:, None] & ok_c[None, :], other=0.0).to(tl.float32)
    if SILU:
        z = tl.zeros(g.shape, tl.float32)
        if bias is not None:
            z += tl.load(bias + cols, mask=ok_c, other=0.0).to(tl.float32)[None, :]
        for i in tl.static_range(W):
            tap = tl.load(weight + cols * W + i, mask=ok_c, other=0.0).to(tl.float32)
            z += _column(x, init, n, t, N, T, W - 1 - i - ahead, cols, SX, C, W) * tap[None, :]
        s = tl.sigmoid(z)
        g *= s * (1.0 + z * (1.0 - s))
    return g


@triton.jit(do_not_specialize=['N', 'T', 'STEP'])
def causal_conv_bwd_kernel(
    x, weight, bias, init, dy, dx, partial, N, T, STEP,
    SX: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """`partial` (programs, W + 1, C) takes a program's share of the gradients of the taps and the bias."""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    ok_c = cols < C
    taps = tl.arange(0, BW)
    sums = tl.zeros((BW, BC), tl.float32)
    for start in range(tl.program_id(0) * BN, N, STEP):
        n = start + tl.arange(0, BN).to(tl.int64)
        t = n % T
        own = _slope(x, weight, bias, init, dy, n, t, N, T, 0, cols, SX, C, W, SILU)
        d = own * tl.load(weight + cols * W + W - 1, mask=ok_c, other=0.0).to(tl.float32)[None, :]
        for s in tl.static_range(1, W):
            tap = tl.load(weight + cols * W + W - 1 - s, mask=ok_c, other=0.0).to(tl.float32)
            d += _slope(x, weight, bias, init, dy, n, t, N, T, s, cols, SX, C, W, SILU) * tap[None, :]
        tl.store(dx + n[:, None] * C + cols[None, :], d.to(dx.dtype.element_ty), mask=(n < N)[:, None] & ok_c[None, :])
        for i in tl.static_range(W):
            value = tl.sum(own * _column(x, init, n, t, N, T, W - 1 - i, cols, SX, C, W), 0)
            sums += tl.where((taps == i)[:, None], value[None, :], 0.0)
        sums += tl.where((taps == W)[:, None], tl.sum(own, 0)[None, :], 0.0)
    at = (tl.program_id(0) * (W + 1) + taps[:, None]) * C + cols[None, :]
    tl.store(partial + at, sums, mask=(taps <= W)[:, None] & ok_c[None, :])


def _sizes(x: Tensor, weight: Tensor, activation: str | None, tile: int) -> tuple[int, int, int, dict]:
    _, T, C = x.shape
    BC = min(_BLOCK, next_power(C))
    consts = {'C': C, 'W': weight.shape[-1], 'SILU': activation is not None, 'BN': tile // BC, 'BC': BC}
    return x.shape[0] * T, T, ceil_div(C, BC), consts


class _Plan:
    def __init__(self, activation: str | None, x, weight, bias, init):
        N, T, blocks, consts = _sizes(x, weight, activation, _TILE)
        rows, SX = token_rows(x)
        self.in_place = rows is x and weight.is_contiguous() and (init is None or init.is_contiguous())
        grid = ceil_div(N, consts['BN']), blocks, 1
        self.run = Launch(causal_conv_fwd_kernel, grid, (N, T), {'SX': SX} | consts)


@on_device_of_first
def causal_conv_fwd(x, weight, bias, init, activation):
    """y (B, T, C) in x's dtype; init (B, C, W) or None."""
    steps = plan(_Plan, (activation,), x, weight, bias, init)
    y = x.new_empty(*x.shape)
    if not steps.in_place:
        x, weight, init = token_rows(x)[0], weight.contiguous(), None if init is None else init.contiguous()
    steps.run(aligned(x, weight, bias, init), x, weight, bias, init, y)
    return y


class _BackwardPlan:
    def __init__(self, activation: str | None, _, x, weight, bias, init):
        N, T, blocks, consts = _sizes(x, weight, activation, _TILE // 2)
        W, C, BN = consts['W'], consts['C'], consts['BN']
        count = max(1, min(ceil_div(4 * programs(x.device), blocks), ceil_div(N, BN)))
        self.partial = count, W + 1, C
        consts = {'SX': token_rows(x)[1], **{k: consts[k] for k in ('C', 'W', 'SILU')}, 'BW': next_power(W + 1, 2),
                  'BN': BN, 'BC': consts['BC']}  # fmt: skip
        self.run = Launch(causal_conv_bwd_kernel, (count, blocks, 1), (N, T, count * BN), consts)


@on_device_of_first
def causal_conv_bwd(x, weight, bias, init, dy, activation):
    """Gradients of x, weight, bias (or None) and init (or None)."""
    steps = plan(_BackwardPlan, (activation, dy.dtype), x, weight, bias, init)
    W, dx = weight.shape[-1], x.new_empty(*x.shape)
    x, weight, dy = token_rows(x)[0], weight.contiguous(), dy.contiguous()
    init = None if init is None else init.contiguous()
    partial = torch.empty(*steps.partial, dtype=torch.float32, device=x.device)
    steps.run(aligned(x, weight, bias, init, dy), x, weight, bias, init, dy, dx, partial)
    total = partial.sum(0)
    dinit = None if init is None else _state_gradient(x, weight, bias, init, dy, activation)
    dweight = total[:W].T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, dweight, None if bias is None else total[W].to(bias.dtype, copy=True), dinit


def _state_gradient(x, weight, bias, init, dy, activation):
    """Gradient of the initial columns (B, C, W): only the first W - 1 tokens see them."""
    W = weight.shape[-1]
    taps = weight.float()
    count = min(W - 1, x.shape[1])
    columns = torch.cat((init[..., 1:].float(), x[:, :count].transpose(1, 2).float()), -1)  # (B, C, W - 1 + count)
    grad = torch.zeros(init.shape, dtype=torch.float32, device=init.device)
    for t in range(count):
        slope = dy[:, t].float()
        if activation:
            z = (columns[..., t : t + W] * taps).sum(-1) + (0 if bias is None else bias.float())
            s = z.sigmoid()
            slope = slope * s * (1 + z * (1 - s))
        grad[..., 1 + t :] += slope.unsqueeze(-1) * taps[:, : W - 1 - t]
    return grad.to(init.dtype)
