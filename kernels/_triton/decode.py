"""One token through a layer on GPUs: matrix-vector products that read weights once, and the step of mmMamba's layer.

A program of a product owns a few output channels: a weight's rows are read in pieces of 256 channels, all of a
program's loads in flight at once, and a warp's threads share a row, so that a sum needs no barrier. What follows the
product happens on its result in registers: bias, residual, SwiGLU, the convolution of a channel with its past columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels._triton._common import LOG2E, Launch, aligned, ceil_div, next_power, on_device_of_first, plan, types

_PIECE = 256  # channels of a row that a warp reads at once


@triton.jit
def _products(x, w, rows, ok, C: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """x (C,) times rows of w (O, C) -> (R,) fp32."""
    cols = tl.arange(0, BK)[None, :]
    w_at = w + rows.to(tl.int64)[:, None] * C + cols
    # the same channels for every row, in the tile's shape: a change of layout would cost barriers
    x_at = x + rows[:, None] * 0 + cols
    acc = tl.zeros(w_at.shape, tl.float32)
    for k0 in range(0, C, BK * AHEAD):
        for u in tl.static_range(AHEAD):
            k = k0 + u * BK
            inside = ok[:, None]
            if C % (BK * AHEAD) != 0:
                inside = inside & (k + cols < C)
            tile = tl.load(w_at + k, mask=inside, other=0.0)
            xs = tl.load(x_at + k, mask=inside, other=0.0)
            acc += tile.to(tl.float32) * xs.to(tl.float32)
    return tl.sum(acc, 1)


@triton.jit
def linear_kernel(
    x, w0, w1, w2, w3, w4, b0, b1, b2, b3, b4, y, residual, conv_weight, conv_bias, conv_state,
    SX: tl.constexpr, C: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr,
    O4: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, SWIGLU: tl.constexpr,
    BIASED: tl.constexpr, CONV: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """R output channels of one of up to five maps; with SWIGLU w0 and w1 make one.

    Program: (channels, token); the tokens of a batch are neighbours and find the weights in the cache.
    """
    N0: tl.constexpr = (O0 + R - 1) // R
    N1: tl.constexpr = N0 + (0 if SWIGLU else (O1 + R - 1) // R)
    N2: tl.constexpr = N1 + (O2 + R - 1) // R
    N3: tl.constexpr = N2 + (O3 + R - 1) // R
    OUT: tl.constexpr = O0 if SWIGLU else O0 + O1 + O2 + O3 + O4
    pid = tl.program_id(0) // B
    b = tl.program_id(0) % B
    x += b * SX
    w = w0
    bias = b0
    biased = BIASED & 1
    first = 0
    base = 0
    count = O0
    if not SWIGLU:
        if O1 > 0:
            if pid >= N0:
                w = w1
                bias = b1
                biased = (BIASED >> 1) & 1
                first = N0
                base = O0
                count = O1
        if O2 > 0:
            if pid >= N1:
                w = w2
                bias = b2
                biased = (BIASED >> 2) & 1
                first = N1
                base = O0 + O1
                count = O2
        if O3 > 0:
            if pid >= N2:
                w = w3
                bias = b3
                biased = (BIASED >> 3) & 1
                first = N2
                base = O0 + O1 + O2
                count = O3
        if O4 > 0:
            if pid >= N3:
                w = w4
                bias = b4
                biased = (BIASED >> 4) & 1
                first = N3
                base = O0 + O1 + O2 + O3
                count = O4
    rows = (pid - first) * R + tl.arange(0, R)
    ok = rows < count
    value = _products(x, w, rows, ok, C, BK, AHEAD)
    if SWIGLU:
        value = value * tl.sigmoid(value) * _products(x, w1, rows, ok, C, BK, AHEAD)
    if BIASED > 0:
        value += tl.load(bias + rows, mask=ok & (biased > 0), other=0.0).to(tl.float32)
    out = base + rows
    if CONV > 0:
        if base < CONV:
            raw = value.to(y.dtype.element_ty)
            past = conv_state + (b * CONV + out) * W
            tap = tl.load(conv_weight + out * W + W - 1, mask=ok, other=0.0)
            value = raw.to(tl.float32) * tap.to(tl.float32)
            columns = ()
            for i in tl.static_range(W - 1):
                columns = columns + (tl.load(past + i + 1, mask=ok, other=0.0),)
                tap = tl.load(conv_weight + out * W + i, mask=ok, other=0.0)
                value += columns[i].to(tl.float32) * tap.to(tl.float32)
            # several warps hold the same few channels, and one of them stores: not before all have read
            tl.debug_barrier()
            for i in tl.static_range(W - 1):
                tl.store(past + i, columns[i], mask=ok)
            tl.store(past + W - 1, raw, mask=ok)
            if conv_bias is not None:
                value += tl.load(conv_bias + out, mask=ok, other=0.0).to(tl.float32)
            value *= tl.sigmoid(value)
    at = b * OUT + out
    if residual is not None:
        value = value.to(y.dtype.element_ty).to(tl.float32)
        value += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def mamba2_step_kernel(
    mixed, state, dt_bias, a_log, d, norm_weight, y, eps,
    SM: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program: (row of the batch, head)."""
    h = tl.program_id(0) % H
    b = tl.program_id(0) // H
    kv = h // (H // K)
    pp = tl.arange(0, BD)
    nn = tl.arange(0, BD)
    ok_p = pp < D
    ok_n = nn < D
    row = mixed + b * SM
    spot = state + ((b * H + h) * D + pp[:, None]) * D + nn[None, :]
    ok = ok_p[:, None] & ok_n[None, :]
    s = tl.load(spot, mask=ok, other=0.0)
    v = tl.load(row + kv * D + pp, mask=ok_p, other=0.0).to(tl.float32)
    k = tl.load(row + (K + kv) * D + nn, mask=ok_n, other=0.0).to(tl.float32)
    q = tl.load(row + (2 * K + h) * D + nn, mask=ok_n, other=0.0).to(tl.float32)
    g = tl.load(row + (2 * K + H + h) * D + pp, mask=ok_p, other=0.0).to(tl.float32)
    step = tl.load(row + (2 * K + 2 * H) * D + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    rate = 1.0
    if a_log is not None:
        rate = tl.exp(tl.load(a_log + h).to(tl.float32))
    s = s * tl.exp2(-step * rate * LOG2E) + (step * v)[:, None] * k[None, :]
    tl.debug_barrier()  # a small state is held by several threads each: all have read before one of them stores
    tl.store(spot, s, mask=ok)
    out = tl.sum(s * q[None, :], 1)
    if d is not None:
        out += tl.load(d + h).to(tl.float32) * v
    out = out.to(y.dtype.element_ty).to(tl.float32)  # as the plain path stores it before its norm
    out *= tl.rsqrt(tl.sum(out * out, 0) / D + eps)
    out *= tl.load(norm_weight + pp, mask=ok_p, other=0.0).to(tl.float32) * g * tl.sigmoid(g)
    tl.store(y + (b * H + h) * D + pp, out.to(y.dtype.element_ty), mask=ok_p)


class _LinearPlan:
    """The launch; what `types` are given of counts by them alone."""

    def __init__(self, swiglu: bool, biases: tuple, _, x, conv_weight, *weights):
        B, C = x.shape
        self.in_place = x.stride(-1) == 1 and all(w is None or w.is_contiguous() for w in (conv_weight, *weights))
        self.missing = [None] * (5 - len(weights))
        sizes = [w.shape[0] for w in weights] + [0] * len(self.missing)
        self.shape = B, sizes[0] if swiglu else sum(sizes)
        R = 4 if swiglu else 8
        BK = min(_PIECE, next_power(C))
        self.biased = sum(1 << i for i, b in enumerate(biases) if b is not None)
        channels, width = (0, 0) if conv_weight is None else conv_weight.shape
        consts = {'SX': x.stride(0), 'C': C, **{f'O{i}': n for i, n in enumerate(sizes)}, 'B': B, 'R': R,
                  'BK': BK, 'AHEAD': min(8, ceil_div(C, BK)), 'SWIGLU': swiglu, 'BIASED': self.biased,
                  'CONV': channels, 'W': width}  # fmt: skip
        blocks = ceil_div(sizes[0], R) if swiglu else sum(ceil_div(n, R) for n in sizes)
        self.run = Launch(linear_kernel, (blocks * B, 1, 1), (), consts)


@on_device_of_first
def _run(x, weights, biases, residual=None, swiglu=False, conv=(None, None, None)) -> Tensor:
    conv_weight, conv_bias, conv_state = conv
    options = swiglu, types(*biases), types(residual, conv_bias, conv_state)
    steps = plan(_LinearPlan, options, x, conv_weight, *weights)
    if not steps.in_place:
        x, weights = x if x.stride(-1) == 1 else x.contiguous(), [w.contiguous() for w in weights]
        conv_weight = None if conv_weight is None else conv_weight.contiguous()
        steps = plan(_LinearPlan, options, x, conv_weight, *weights)
    y = x.new_empty(*steps.shape)
    residual = None if residual is None else residual.contiguous()
    biases = [w if b is None else b for w, b in zip(weights, biases)] if steps.biased else biases
    missing = steps.missing
    inputs, rest = (x, *weights, *missing, *biases, *missing), (residual, conv_weight, conv_bias, conv_state)
    steps.run(aligned(*inputs, *rest), *inputs, y, *rest)
    return y


def linear(x, weight, bias, residual):
    """x W^T + b + residual: (B, O)."""
    return _run(x, [weight], [bias], residual)


def swiglu(x, w1, w3):
    """silu(x W1^T) * (x W3^T): (B, M)."""
    return _run(x, [w1, w3], [None, None], swiglu=True)


def projections_(x, weights, biases, conv_weight, conv_bias, conv_state):
    """All maps side by side, the first channels convolved: (B, sum of O)."""
    return _run(x, weights, biases, conv=(conv_weight, conv_bias, conv_state))


class _StepPlan:
    def __init__(self, eps: float, kv_heads: int, _, mixed, state):
        batch, H, dim, _ = state.shape
        BD = next_power(dim)
        consts = {'SM': mixed.stride(0), 'H': H, 'K': kv_heads, 'D': dim, 'BD': BD}
        self.shape = batch, H, dim
        self.run = Launch(mamba2_step_kernel, (batch * H, 1, 1), (eps,), consts, 8 if BD >= 128 else 4)


@on_device_of_first
def mamba2_step_(mixed, state, dt_bias, A_log, D, norm_weight, eps, kv_heads):
    """Heads' outputs (B, H, d); the state is overwritten."""
    mixed = mixed if mixed.stride(-1) == 1 else mixed.contiguous()
    steps = plan(_StepPlan, (eps, kv_heads, types(dt_bias, A_log, D, norm_weight)), mixed, state)
    y = mixed.new_empty(*steps.shape)
    inputs = mixed, state, dt_bias, A_log, D, norm_weight
    steps.run(aligned(*inputs), *inputs, y)
    return y
