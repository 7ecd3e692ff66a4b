"""GroupNorm of channels-last images on GPUs.

Small images: one program to a sample and group, which stays in its registers. Others, forward: sums per channel over
parts of the pixels, a small kernel that joins them into the statistics of groups, and one that normalises; x is read
twice and y written once. Backward: the same three steps over dy and x. Sums are taken of differences to the first pixel
of a sample, so that a variance is not the small difference of two large numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import Launch, aligned, ceil_div, next_power, on_device_of_first, plan, programs

_SIZES = ['S', 'per', 'parts', 'units', 'groups', 'size', 'eps']


@triton.jit
def place(S, per, units, A: tl.constexpr, BC: tl.constexpr):
    """Sample, first and last pixel of this program, its channels."""
    first = tl.program_id(0) * per
    return tl.program_id(2).to(tl.int64), first, tl.minimum(first + per, S), tl.program_id(1) * BC + tl.arange(0, BC)


@triton.jit
def normalised(x, m, scale, shift, SILU: tl.constexpr):
    """z = (x - m) scale + shift, and the factor that SiLU puts on it."""
    z = (x - m) * scale + shift
    return z, tl.sigmoid(z) if SILU else z


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_sums(x, sums, S, per, parts, units, A: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    b, first, end, cols = place(S, per, units, A, BC)
    C, ok = units * A, cols < units * A
    x += b * S * C
    pivot = tl.load(x + cols, mask=ok, other=0.0).to(tl.float32)
    one, two = tl.zeros((BT, BC), tl.float32), tl.zeros((BT, BC), tl.float32)
    for t in range(first, end, BT):
        rows = t + tl.arange(0, BT)
        inside = (rows < end)[:, None] & ok[None, :]
        d = tl.load(x + rows.to(tl.int64)[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, d - pivot[None, :], 0.0)
        one += d
        two += d * d
    sums += (b * parts + tl.program_id(0)) * 2 * C + cols
    tl.store(sums, tl.sum(one, 0), mask=ok)
    tl.store(sums + C, tl.sum(two, 0), mask=ok)


@triton.jit
def joined(sums, b, parts, C, cols, ok, BP: tl.constexpr, BC: tl.constexpr):
    """The two sums of a sample's channels `cols`, over all parts."""
    one, two = tl.zeros((BP, BC), tl.float32), tl.zeros((BP, BC), tl.float32)
    for p in range(0, parts, BP):
        rows = p + tl.arange(0, BP)
        inside = (rows < parts)[:, None] & ok[None, :]
        at = sums + (b * parts + rows)[:, None] * 2 * C + cols[None, :]
        one += tl.load(at, mask=inside, other=0.0)
        two += tl.load(at + C, mask=inside, other=0.0)
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_statistics(x, sums, stats, S, parts, units, groups, size, eps, A: tl.constexpr, BP: tl.constexpr,
                         BC: tl.constexpr):  # fmt: skip
    """Of one group: `size` channels."""
    g, b, C = tl.program_id(0), tl.program_id(1).to(tl.int64), units * A
    ok, cols = tl.arange(0, BC) < size, g * size + tl.arange(0, BC)
    sum1, sum2 = joined(sums, b, parts, C, cols, ok, BP, BC)
    count = S.to(tl.float32)
    centre = tl.load(x + b * S * C + cols, mask=ok, other=0.0).to(tl.float32) + sum1 / count
    spread = tl.sum(sum2 - sum1 * sum1 / count, 0)
    middle = tl.sum(tl.where(ok, centre, 0.0), 0) / size
    off = tl.where(ok, centre - middle, 0.0)
    variance = (spread + count * tl.sum(off * off, 0)) / (count * size)
    tl.store(stats + (b * groups + g) * 2, middle)
    tl.store(stats + (b * groups + g) * 2 + 1, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit
def factors(stats, weight, bias, b, cols, ok, groups, size):
    """scale and shift of z = (x - m) scale + shift, m, and 1 / standard deviation, per channel."""
    at = stats + (b * groups + cols // size) * 2
    m, r = tl.load(at, mask=ok, other=0.0), tl.load(at + 1, mask=ok, other=0.0)
    scale = r if weight is None else r * tl.load(weight + cols, mask=ok, other=0.0).to(tl.float32)
    shift = tl.zeros_like(m) if bias is None else tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    return scale, shift, m, r


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_apply(x, y, stats, weight, bias, S, per, units, groups, size, A: tl.constexpr, BT: tl.constexpr,
                    BC: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    b, first, end, cols = place(S, per, units, A, BC)
    C, ok = units * A, cols < units * A
    scale, shift, m, r = factors(stats, weight, bias, b, cols, ok, groups, size)
    x, y = x + b * S * C, y + b * S * C
    for t in range(first, end, BT):
        rows = t + tl.arange(0, BT)
        inside = (rows < end)[:, None] & ok[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z, s = normalised(v, m[None, :], scale[None, :], shift[None, :], SILU)
        tl.store(y + at, (z * s if SILU else z).to(y.dtype.element_ty), mask=inside)


@triton.jit
def silu_gradient(dy, x, m, scale, shift, SILU: tl.constexpr):
    """dz of y = silu(z), or dy."""
    if SILU:
        z, s = normalised(x, m, scale, shift, SILU)
        return dy * s * (1.0 + z * (1.0 - s))
    else:
        return dy


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_gradient_sums(x, dy, sums, stats, weight, bias, S, per, parts, units, groups, size,
                            A: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Over pixels: of dz, and of dz (x - mean) rstd."""
    b, first, end, cols = place(S, per, units, A, BC)
    C, ok = units * A, cols < units * A
    scale, shift, m, r = factors(stats, weight, bias, b, cols, ok, groups, size)
    x, dy = x + b * S * C, dy + b * S * C
    one, two = tl.zeros((BT, BC), tl.float32), tl.zeros((BT, BC), tl.float32)
    for t in range(first, end, BT):
        rows = t + tl.arange(0, BT)
        inside = (rows < end)[:, None] & ok[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dz = silu_gradient(dz, v, m[None, :], scale[None, :], shift[None, :], SILU)
        one += dz
        two += dz * ((v - m[None, :]) * r[None, :])
    sums += (b * parts + tl.program_id(0)) * 2 * C + cols
    tl.store(sums, tl.sum(one, 0), mask=ok)
    tl.store(sums + C, tl.sum(two, 0), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_gradient_means(sums, total, means, weight, S, parts, units, groups, size, A: tl.constexpr,
                             BP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Of one group: sums over pixels per channel, and their means over the group, times weight."""
    g, b, C = tl.program_id(0), tl.program_id(1).to(tl.int64), units * A
    ok, cols = tl.arange(0, BC) < size, g * size + tl.arange(0, BC)
    sum1, sum2 = joined(sums, b, parts, C, cols, ok, BP, BC)
    tl.store(total + b * 2 * C + cols, sum1, mask=ok)
    tl.store(total + b * 2 * C + C + cols, sum2, mask=ok)
    if weight is not None:
        w = tl.load(weight + cols, mask=ok, other=0.0).to(tl.float32)
        sum1, sum2 = sum1 * w, sum2 * w
    count = S.to(tl.float32) * size
    tl.store(means + (b * groups + g) * 2, tl.sum(tl.where(ok, sum1, 0.0), 0) / count)
    tl.store(means + (b * groups + g) * 2 + 1, tl.sum(tl.where(ok, sum2, 0.0), 0) / count)


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_gradient(x, dy, dx, means, stats, weight, bias, S, per, units, groups, size, A: tl.constexpr,
                       BT: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """dx = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat)), xhat = (x - mean) rstd."""
    b, first, end, cols = place(S, per, units, A, BC)
    C, ok = units * A, cols < units * A
    scale, shift, m, r = factors(stats, weight, bias, b, cols, ok, groups, size)
    at_group = means + (b * groups + cols // size) * 2
    mean1 = tl.load(at_group, mask=ok, other=0.0) * r
    mean2 = tl.load(at_group + 1, mask=ok, other=0.0) * r * r
    x, dy, dx = x + b * S * C, dy + b * S * C, dx + b * S * C
    for t in range(first, end, BT):
        rows = t + tl.arange(0, BT)
        inside = (rows < end)[:, None] & ok[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dz = silu_gradient(dz, v, m[None, :], scale[None, :], shift[None, :], SILU)
        g = dz * scale[None, :] - mean1[None, :] - (v - m[None, :]) * mean2[None, :]
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def gn_kernel_whole(x, y, stats, weight, bias, S, units, groups, parts, eps, A: tl.constexpr, BT: tl.constexpr,
                    BC: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """The whole forward pass of one group of `parts` times A channels, which stays in registers."""
    g, b, C, size = tl.program_id(0), tl.program_id(1).to(tl.int64), units * A, parts * A
    rows, ok = tl.arange(0, BT), tl.arange(0, BC) < size
    cols = g * size + tl.arange(0, BC)
    inside = (rows < S)[:, None] & ok[None, :]
    x, y, at = x + b * S * C, y + b * S * C, rows[:, None] * C + cols[None, :]
    pivot = tl.load(x + g * size).to(tl.float32)
    v = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - pivot, 0.0)
    count = S.to(tl.float32) * size
    off = tl.sum(tl.sum(v, 0), 0) / count
    v = tl.where(inside, v - off, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(v * v, 0), 0) / count + eps)
    tl.store(stats + (b * groups + g) * 2, pivot + off)
    tl.store(stats + (b * groups + g) * 2 + 1, r)
    scale = tl.zeros((BC,), tl.float32) + r
    if weight is not None:
        scale *= tl.load(weight + cols, mask=ok, other=0.0).to(tl.float32)
    shift = tl.zeros((BC,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    z, s = normalised(v, 0.0, scale[None, :], shift[None, :], SILU)
    tl.store(y + at, (z * s if SILU else z).to(y.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# Host side

SMALL = 1 << 15  # numbers of a group, with what is masked, that the registers of one program hold


def tile(C: int) -> tuple[int, int, int]:
    """Pixels and channels of a tile, and warps: as few channels beyond the image's as possible, those are masked."""
    width = 128 if C % 128 == 0 else 64
    return (4096 // width, width, 8) if C >= 64 else (64, next_power(C), 4)


class _Plan:
    """Launches for one set of shapes and types."""

    def __init__(self, groups: int, eps: float, silu: bool, dtype: torch.dtype, x, *_):
        (B, C, H, W), device = x.shape, x.device
        S, size = H * W, C // groups
        bt, bc, warps = tile(C)
        unit = next(u for u in (16, 8, 4, 2, 1) if C % u == 0)
        units, blocks = C // unit, ceil_div(C, bc)
        self.stats = B, groups, 2
        wanted = max(1, programs(device) // (B * blocks))
        per = ceil_div(ceil_div(S, min(wanted, ceil_div(S, 4 * bt))), bt) * bt
        parts = ceil_div(S, per)
        self.sums, self.channels = (B, parts, 2, C), (B, 2, C)
        self.whole = None
        height, width = next_power(S, 1), next_power(size, 1)
        if height * width <= SMALL:
            step = min(16, size & -size)  # channels that lie together at multiples of their number
            consts = {'A': step, 'BT': height, 'BC': width, 'SILU': silu}
            sizes, many = (S, C // step, groups, size // step, eps), min(16, max(1, height * width // 1024))
            self.whole = Launch(gn_kernel_whole, (groups, B, 1), sizes, consts, many, 1)
        part, whole = {'A': unit, 'BT': bt, 'BC': bc}, {'A': unit, 'BP': 16, 'BC': next_power(size, 1)}
        grid, of_groups = (parts, blocks, B), (groups, B, 1)
        few = max(bt, min(per, 16 * bt))
        fine = ceil_div(S, few), blocks, B
        self.add = Launch(gn_kernel_sums, grid, (S, per, parts, units), part, warps, 3)
        self.join = Launch(gn_kernel_statistics, of_groups, (S, parts, units, groups, size, eps), whole, 4, 2)
        part = part | {'SILU': silu}
        self.apply = Launch(gn_kernel_apply, fine, (S, few, units, groups, size), part, warps, 3)
        self.add_back = Launch(gn_kernel_gradient_sums, grid, (S, per, parts, units, groups, size), part, warps, 3)
        self.join_back = Launch(gn_kernel_gradient_means, of_groups, (S, parts, units, groups, size), whole, 4, 2)
        self.back = Launch(gn_kernel_gradient, fine, (S, few, units, groups, size), part, warps, 3)


@on_device_of_first
def group_norm_fwd(x, groups: int, weight, bias, eps: float, silu: bool, dtype: torch.dtype):
    """y like x in `dtype`; fp32 mean and 1 / standard deviation (B, G, 2)."""
    steps = plan(_Plan, (groups, eps, silu, dtype), x, weight, bias)
    fp32 = dict(dtype=torch.float32, device=x.device)
    at_16 = aligned(x, weight, bias)
    y, stats = torch.empty_like(x, dtype=dtype), torch.empty(*steps.stats, **fp32)
    if steps.whole is not None:
        steps.whole(at_16, x, y, stats, weight, bias)
        return y, stats
    sums = torch.empty(*steps.sums, **fp32)
    steps.add(at_16, x, sums)
    steps.join(at_16, x, sums, stats)
    steps.apply(at_16, x, y, stats, weight, bias)
    return y, stats


@on_device_of_first
def group_norm_bwd(x, groups: int, weight, bias, stats, dy, silu: bool):
    """dx like x; fp32 gradients of weight and bias (C,)."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    steps = plan(_Plan, (groups, 0.0, silu, dy.dtype), x, weight, bias)
    fp32 = dict(dtype=torch.float32, device=x.device)
    sums, total, means = (torch.empty(*n, **fp32) for n in (steps.sums, steps.channels, steps.stats))
    dx, at_16 = torch.empty_like(x), aligned(x, dy, weight, bias)
    steps.add_back(at_16, x, dy, sums, stats, weight, bias)
    steps.join_back(at_16, sums, total, means, weight)
    steps.back(at_16, x, dy, dx, means, stats, weight, bias)
    return dx, total[:, 1].sum(0), total[:, 0].sum(0)
