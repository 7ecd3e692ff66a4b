"""Depthwise 2D convolution of channels-last maps on GPUs, forward and backward.

A group is M neighbouring columns of one image; groups are numbered through the whole batch, so that a width that is no
power of two wastes nothing. A program takes BN groups by BC channels, each thread a few neighbouring channels of one
group, and walks down R rows. A row is read once per thread, M + k - 1 values, and goes into the k x M sums that it
reaches, which stay in registers with the weight; then the oldest M sums are done. The reads that neighbouring groups
share hit the first-level cache. The rows after it are under way already: nothing else hides the latency of memory.

The backward pass needs the gradient g of the convolution's result: dy itself, or with an activation dy * act'(z), which
a forward pass with recomputed z writes. One kernel then reads g once for both gradients,

    du[h, w] = sum_ij weight[i, j] g[h - i + p, w - j + p]        dweight[i, j] = sum_hw u[h, w] g[h - i + p, w - j + p]

because both use the same shifts of g and no shift of u: a row of g meets the k rows of u and of du that it reaches. Its
programs keep their share of the weight's gradient in registers over many tiles; a last kernel adds the shares up in a
fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import LOG2E, Launch, aligned, alignment, ceil_div, on_device_of_first, plan

THREADS = 128
PROGRAMS = 1056  # enough to fill a GPU
LEAST_ROWS = 8  # in a tile: each reads k - 1 rows more
SIZES = ['xb', 'xh', 'xw', 'gb', 'gh', 'gw', 'H', 'W', 'CU', 'groups', 'GW', 'R', 'RB', 'CB']


@triton.jit
def normal_tail(x):
    """P(X > |x|) of a standard normal X and its density at x, to 1e-7 (Abramowitz and Stegun, 26.2.17)."""
    e = tl.exp2(x * x * (-0.5 * LOG2E))
    d = 0.2316419 * tl.abs(x) + 1.0
    t = tl.math.rsqrt(d * d)  # 1 / d, in fewer instructions than a division
    s = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702714)))
    return s * t * e, e * 0.3989422804014327


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == 'relu':
        return tl.maximum(z, 0.0)
    elif ACT == 'silu':
        return z * tl.sigmoid(z)
    elif ACT == 'gelu':
        tail, _ = normal_tail(z)
        return tl.maximum(z, 0.0) - tl.abs(z) * tail
    else:
        return z


@triton.jit
def derivative(z, ACT: tl.constexpr):
    if ACT == 'relu':
        return tl.where(z > 0, 1.0, 0.0)
    elif ACT == 'silu':
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        tail, density = normal_tail(z)
        return tl.where(z >= 0, 1.0 - tail, tail) + z * density


@triton.jit
def load_row(ptr, w, step, W, ok, N: tl.constexpr):
    """N neighbouring columns of one row from column w on, as a tuple of tiles; zeros outside the map."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + n * step, mask=ok & (w + n >= 0) & (w + n < W), other=0.0),)
    return tiles


@triton.jit
def drop(tiles, START: tl.constexpr, N: tl.constexpr):
    """N tiles from the one at START on."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tiles[START + n],)
    return out


@triton.jit
def activate_row(tiles, N: tl.constexpr, ACT: tl.constexpr):
    """The first N tiles in fp32, after the activation."""
    out = ()
    for n in tl.static_range(N):
        out = out + (activate(tiles[n].to(tl.float32), ACT),)
    return out


@triton.jit
def load_taps(weight, c, C, N: tl.constexpr, WHOLE: tl.constexpr, FOLD: tl.constexpr):
    """The weight (C, N), one fp32 tile per tap; with FOLD the skip is one more unit of the tap in the centre."""
    taps = ()
    CENTRE: tl.constexpr = N // 2
    for n in tl.static_range(N):
        tap = tl.load(weight + c * N + n) if WHOLE else tl.load(weight + c * N + n, mask=c < C, other=0.0)
        tap = tap.to(tl.float32)
        if FOLD and n == CENTRE:
            tap += 1.0
        taps = taps + (tap,)
    return taps


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel_out(
    x, weight, bias, dy, out, xb, xh, xw, gb, gh, gw, H, W, CU, groups, GW, R, RB, CB,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, A: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, RESIDUAL: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """activation(conv(u) + bias) (+ u), or with GRAD the gradient dy * activation'(conv(u) + bias).

    Strides (batch, row, column) are in units of A elements; weight is (C, K * K).
    """
    P: tl.constexpr = K // 2
    N: tl.constexpr = M + K - 1
    pid = tl.program_id(0)
    c = (pid % CB) * BC + tl.arange(0, BC)[None, :]
    h0 = (pid // CB) % RB * R
    end = tl.minimum(h0 + R, H)
    last = tl.minimum(end + P, H)  # rows of x that are read end here
    g = pid // CB // RB * BN + tl.arange(0, BN)[:, None]
    b = (g // GW).to(tl.int64)
    w0 = g % GW * M
    C = CU * A
    ok = g < groups
    if not WHOLE:
        ok = ok & (c < C)
    xh = xh.to(tl.int64) * A
    every = c + tl.zeros([BN, 1], tl.int32)
    taps = load_taps(weight, every, C, K * K, WHOLE, RESIDUAL and ACT is None)
    offset = tl.zeros([BN, BC], tl.float32)
    if BIAS:
        offset += tl.load(bias + every, mask=ok, other=0.0).to(tl.float32)

    first = tl.maximum(h0 - P, 0)
    source = x + (b * xb + (w0 - P) * xw) * A + c
    target = out + (b * H * W + w0) * C + c
    ahead = ()
    for early in tl.static_range(D):
        r = first + early
        ahead = ahead + load_row(source + r * xh, w0 - P, xw * A, W, ok & (r < last), N)
    z = ()
    for _ in tl.static_range(M * K):
        z = z + (offset,)
    # z holds the sums of the K output rows that the row at hand reaches, the one that it completes first.
    for h in range(first, end + P):
        r = h + D
        ahead = ahead + load_row(source + r * xh, w0 - P, xw * A, W, ok & (r < last), N)
        u = activate_row(ahead, N, PRE)
        sums = ()
        for d in tl.static_range(K):
            for m in tl.static_range(M):
                s = z[d * M + m]
                for j in tl.static_range(K):
                    s += taps[(K - 1 - d) * K + j] * u[m + j]
                sums = sums + (s,)
        r = h - P
        for m in tl.static_range(M):
            inside = ok & (w0 + m < W) & (r >= h0)
            y = sums[m]
            if GRAD:
                at = dy + (b * gb + (w0 + m) * gw + r.to(tl.int64) * gh) * A + c
                y = tl.load(at, mask=inside, other=0.0).to(tl.float32) * derivative(y, ACT)
            else:
                y = activate(y, ACT)
                if RESIDUAL and ACT is not None:
                    skip = tl.load(source + (P + m) * xw * A + r * xh, mask=inside, other=0.0).to(tl.float32)
                    y += activate(skip, PRE)
            tl.store(target + (r.to(tl.int64) * W + m) * C, y.to(out.dtype.element_ty), mask=inside)
        z = drop(sums, M, M * (K - 1))
        for _ in tl.static_range(M):
            z = z + (offset,)
        ahead = drop(ahead, N, N * D)


@triton.jit(do_not_specialize=[*SIZES, 'eb', 'eh', 'ew', 'tiles', 'share'])
def depthwise_kernel_gradients(
    x, weight, g, dy, dx, shares, xb, xh, xw, gb, gh, gw, eb, eh, ew, H, W, CU, groups, GW, R, RB, CB, tiles, share,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, A: tl.constexpr,
    WHOLE: tl.constexpr, PRE: tl.constexpr, FOLD: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """dx, and one program's part (K * K + 1, BC) of the gradients of weight and bias, over `share` tiles.

    g is the gradient of conv(u) + bias. The skip: FOLD where dy is g, so that it is one more term of the sum, SKIP
    where it is not. Strides: xb.. of x, gb.. of g, eb.. of dy.
    """
    P: tl.constexpr = K // 2
    N: tl.constexpr = M + K - 1
    pid = tl.program_id(0)
    c = (pid % CB) * BC + tl.arange(0, BC)[None, :]
    program = pid // CB
    C = CU * A
    xh = xh.to(tl.int64) * A
    gh = gh.to(tl.int64) * A
    zero = tl.zeros([BN, BC], tl.float32)
    taps = load_taps(weight, c + tl.zeros([BN, 1], tl.int32), C, K * K, WHOLE, FOLD)
    dw = ()
    for _ in tl.static_range(K * K):
        dw = dw + (zero,)
    db = zero

    for tile in range(program * share, tl.minimum((program + 1) * share, tiles)):
        h0 = tile % RB * R
        end = tl.minimum(h0 + R, H)
        last = tl.minimum(end + P, H)
        n = tile // RB * BN + tl.arange(0, BN)[:, None]
        b = (n // GW).to(tl.int64)
        w0 = n % GW * M
        ok = n < groups
        if not WHOLE:
            ok = ok & (c < C)
        first = tl.maximum(h0 - P, 0)
        source = x + (b * xb + w0 * xw) * A + c
        gradient = g + (b * gb + (w0 - P) * gw) * A + c
        target = dx + (b * H * W + w0) * C + c
        ahead = ()
        fresh = ()
        for early in tl.static_range(D):
            r = first + early
            ahead = ahead + load_row(gradient + r * gh, w0 - P, gw * A, W, ok & (r < last), N)
            fresh = fresh + load_row(source + (r + P) * xh, w0, xw * A, W, ok & (r + P < end), M)
        # u and du: K rows each that the row of g at hand reaches, the one that it completes first.
        u = ()
        for i in tl.static_range(K - 1):
            r = first - P + i
            raw = load_row(source + r * xh, w0, xw * A, W, ok & (r >= h0) & (r < end), M)
            u = u + activate_row(raw, M, PRE)
        du = ()
        for _ in tl.static_range(K * M):
            du = du + (zero,)
        for h in range(first, end + P):
            r = h + D
            ahead = ahead + load_row(gradient + r * gh, w0 - P, gw * A, W, ok & (r < last), N)
            fresh = fresh + load_row(source + (r + P) * xh, w0, xw * A, W, ok & (r + P < end), M)
            v = activate_row(ahead, N, None)
            u = u + activate_row(fresh, M, PRE)
            sums = ()
            new = ()
            for i in tl.static_range(K):
                for j in tl.static_range(K):
                    d = dw[i * K + j]
                    for m in tl.static_range(M):
                        d += u[i * M + m] * v[m + K - 1 - j]
                    new = new + (d,)
                for m in tl.static_range(M):
                    s = du[i * M + m]
                    for j in tl.static_range(K):
                        s += taps[i * K + j] * v[m + K - 1 - j]
                    sums = sums + (s,)
            dw = new
            if (h >= h0) & (h < end):
                for m in tl.static_range(M):
                    db += v[P + m]
            r = h - P
            for m in tl.static_range(M):
                inside = ok & (w0 + m < W) & (r >= h0)
                d = sums[m]
                if SKIP:
                    at = dy + (b * eb + (w0 + m) * ew + r.to(tl.int64) * eh) * A + c
                    d += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if PRE is not None:
                    at = source + m * xw * A + r * xh
                    d *= derivative(tl.load(at, mask=inside, other=0.0).to(tl.float32), PRE)
                tl.store(target + (r.to(tl.int64) * W + m) * C, d.to(dx.dtype.element_ty), mask=inside)
            du = drop(sums, M, M * (K - 1))
            for _ in tl.static_range(M):
                du = du + (zero,)
            u = drop(u, M, M * (K - 1))
            ahead = drop(ahead, N, N * D)
            fresh = drop(fresh, M, M * D)

    to = shares + program.to(tl.int64) * (K * K + 1) * CB * BC + (pid % CB) * BC + tl.arange(0, BC)
    for i in tl.static_range(K * K):
        tl.store(to + i * CB * BC, tl.sum(dw[i], 0))
    tl.store(to + K * K * CB * BC, tl.sum(db, 0))


@triton.jit(do_not_specialize=['count', 'C', 'stride'])
def depthwise_kernel_reduce(
    shares, dweight, dbias, count, C, stride, TAPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr
):
    """Sums of the programs' parts, one tap (or the bias) and BC channels per program."""
    tap = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.arange(0, BP)
    total = tl.zeros([BP, BC], tl.float32)
    for start in range(0, count, BP):
        row = (start + p).to(tl.int64) * (TAPS + 1) + tap
        ok = (start + p < count)[:, None] & (c < C)[None, :]
        total += tl.load(shares + row[:, None] * stride + c[None, :], mask=ok, other=0.0)
    value = tl.sum(total, 0)
    tl.store(dweight + c * TAPS + tap, value.to(dweight.dtype.element_ty), mask=(c < C) & (tap < TAPS))
    if BIAS:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=(c < C) & (tap == TAPS))


class Config(NamedTuple):
    """Sizes of one kernel's tiles.

    m: columns of a group; each: numbers of a tile per thread; ahead: rows whose loads are under way; registers: most
    per thread, where the compiler alone would take so many that too few programs fit.
    """

    m: int
    each: int
    ahead: int
    registers: int | None = None


# By kernel size. Wide groups where every value that is read goes through an activation first.
FORWARD = {1: Config(2, 4, 2), 3: Config(4, 2, 2, 96), 5: Config(2, 2, 2, 128), 7: Config(4, 1, 1)}
FORWARD_GELU = {1: Config(4, 2, 1), 3: Config(4, 2, 1), 5: Config(4, 1, 1), 7: Config(2, 1, 1)}
BACKWARD = {1: Config(2, 2, 1), 3: Config(2, 2, 2, 128), 5: Config(2, 1, 1, 128), 7: Config(1, 1, 1, 168)}


def block(C: int) -> int:
    """Channels of a tile: wide where that wastes little."""
    return next((n for n in (64, 32) if ceil_div(C, n) * n * 8 <= C * 9), 16)


class Tiles(NamedTuple):
    """How a map is cut: columns and rows of tiles, groups in a tile, and the run-time sizes of a launch."""

    bn: int
    bc: int
    r: int
    count: int
    blocks: int
    sizes: tuple


def cut(x: torch.Tensor, cfg: Config, unit: int) -> Tiles:
    """Tiles of one map: as many rows as leave enough programs to fill a GPU."""
    B, H, W, C = x.shape
    bc = block(C)
    bn = THREADS * cfg.each // bc
    columns = ceil_div(W, cfg.m)
    groups, blocks = B * columns, ceil_div(C, bc)
    wide = ceil_div(groups, bn)
    rows = min(ceil_div(PROGRAMS, wide * blocks), ceil_div(H, LEAST_ROWS))
    r = ceil_div(H, rows)
    rows = ceil_div(H, r)
    return Tiles(bn, bc, r, wide * rows, blocks, (H, W, C // unit, groups, columns, r, rows, blocks))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """The map with contiguous channels: views into wider maps pass as they are, other layouts are copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _unit(*maps: torch.Tensor) -> int:
    """The largest power of two up to 16 that divides the number of channels and all strides: see `alignment`."""
    bits = alignment(*maps) | maps[0].shape[-1]
    return bits & -bits


def _strides(x: torch.Tensor, unit: int) -> list[int]:
    return [s // unit for s in x.stride()[:3]]


class _OutPlan:
    """The launch of the forward kernel; with dy that of the gradient of conv(u) + bias."""

    def __init__(self, residual, activation, pre_activation, dtype, x, weight, bias, dy=None):
        K, C = weight.shape[-1], x.shape[-1]
        maps = (x,) if dy is None else (x, dy)
        self.in_place = all(_channels_last(m) is m for m in maps) and weight.is_contiguous()
        cfg = (FORWARD if pre_activation is None else FORWARD_GELU)[K]
        if dy is not None:
            cfg = cfg._replace(registers=None)  # one more map to read
        unit = _unit(*maps)
        tiles = cut(x, cfg, unit)
        consts = dict(
            K=K, M=cfg.m, D=cfg.ahead, BN=tiles.bn, BC=tiles.bc, A=unit, WHOLE=C % tiles.bc == 0,
            BIAS=bias is not None, ACT=activation, PRE=pre_activation, RESIDUAL=residual, GRAD=dy is not None,
        )  # fmt: skip
        sizes = *_strides(x, unit), *_strides(maps[-1], unit), *tiles.sizes
        grid = tiles.count * tiles.blocks, 1, 1
        self.run = Launch(depthwise_kernel_out, grid, sizes, consts, registers=cfg.registers)


class _GradientsPlan:
    """The launches of the gradients of the input and of the parameters."""

    def __init__(self, residual, activation, pre_activation, x, weight, bias, g, dy):
        K, C = weight.shape[-1], x.shape[-1]
        cfg = BACKWARD[K]
        unit = _unit(x, g, dy)
        tiles = cut(x, cfg, unit)
        padded = ceil_div(C, tiles.bc) * tiles.bc
        share = ceil_div(tiles.count, ceil_div(PROGRAMS, tiles.blocks))
        programs = ceil_div(tiles.count, share)
        self.shares = programs, K * K + 1, padded
        self.skip = residual and activation is not None
        consts = dict(
            K=K, M=cfg.m, D=cfg.ahead, BN=tiles.bn, BC=tiles.bc, A=unit, WHOLE=C % tiles.bc == 0, PRE=pre_activation,
            FOLD=residual and not self.skip, SKIP=self.skip,
        )  # fmt: skip
        sizes = *_strides(x, unit), *_strides(g, unit), *_strides(dy, unit), *tiles.sizes, tiles.count, share
        grid = programs * tiles.blocks, 1, 1
        self.run = Launch(depthwise_kernel_gradients, grid, sizes, consts, registers=cfg.registers)
        consts = dict(TAPS=K * K, BP=64, BC=32, BIAS=bias is not None)
        grid = ceil_div(C, 32), K * K + consts['BIAS'], 1
        self.reduce = Launch(depthwise_kernel_reduce, grid, (programs, C, padded), consts)


@on_device_of_first
def depthwise_conv2d_fwd(x, weight, bias, residual, activation, pre_activation, out_dtype):
    """activation(conv(u) + bias) (+ u) with u = pre_activation(x).

    Args:
        x: (B, H, W, C).
        weight: (C, 1, k, k).
        bias: (C,) or None.
        residual: whether to add u.
        activation: `relu`, `silu`, `gelu` or None.
        pre_activation: `gelu` or None.
        out_dtype: of the result.

    Returns:
        (B, H, W, C), contiguous.
    """
    if x.numel() == 0:
        return torch.empty(*x.shape, dtype=out_dtype, device=x.device)
    options = residual, activation, pre_activation, out_dtype
    steps = plan(_OutPlan, options, x, weight, bias)
    if not steps.in_place:
        x, weight = _channels_last(x), weight.contiguous()
        steps = plan(_OutPlan, options, x, weight, bias)
    out = torch.empty(*x.shape, dtype=out_dtype, device=x.device)
    steps.run(aligned(x, weight, bias), x, weight, bias, None, out)
    return out


@on_device_of_first
def depthwise_conv2d_bwd(x, weight, bias, dy, residual, activation, pre_activation):
    """Gradients (dx, dweight, dbias or None) for dy (B, H, W, C); other arguments as `depthwise_conv2d_fwd`."""
    x, dy = _channels_last(x), _channels_last(dy)
    B, H, W, C = x.shape
    dx = torch.empty(B, H, W, C, dtype=x.dtype, device=x.device)
    dweight = torch.empty(*weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(C, dtype=bias.dtype, device=x.device)
    if x.numel() == 0:
        return dx, dweight.zero_(), None if bias is None else dbias.zero_()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    g = dy
    if activation is not None:
        steps = plan(_OutPlan, (residual, activation, pre_activation, dy.dtype), x, weight, bias, dy)
        g = torch.empty(B, H, W, C, dtype=dy.dtype, device=x.device)
        steps.run(aligned(x, weight, bias, dy), x, weight, bias, dy, g)
    steps = plan(_GradientsPlan, (residual, activation, pre_activation), x, weight, bias, g, dy)
    shares = torch.empty(*steps.shares, dtype=torch.float32, device=x.device)
    steps.run(aligned(x, weight, dy), x, weight, g, dy if steps.skip else None, dx, shares)
    steps.reduce(True, shares, dweight, dbias)
    return dx, dweight, dbias
