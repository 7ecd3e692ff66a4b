"""RMSNorm and LayerNorm on GPUs, with the addition to the residual stream before them, or a gate or LeakyReLU after
them: one pass over memory each way.

A program holds whole rows. The backward pass recomputes the statistics from the stream, and every program sums the
gradients of the weights over its rows; the sums of the programs are added afterwards, in one order.
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
    types,
)
from zoo.kernels._triton.sums import Sums

MAX_DIM = 8192
_TILE = 4096  # elements of a forward tile; the backward, with more of them alive, takes half


@triton.jit
def _centred(h, inside, C: tl.constexpr, eps, CENTER: tl.constexpr):
    """Normalised rows and the reciprocal of their deviation."""
    if CENTER:
        h = tl.where(inside, h - (tl.sum(h, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(h * h, 1) / C + eps)
    return h * scale[:, None], scale


@triton.jit(do_not_specialize=['N', 'ROWS'])
def norm_fwd_kernel(
    x, residual, gamma, sample, weight, bias, y, stream, N, ROWS, eps,
    SX: tl.constexpr, SR: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BC)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    h = tl.load(x + rows[:, None] * SX + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if gamma is not None:
        h *= tl.load(gamma + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if sample is not None:
        h *= tl.load(sample + rows // ROWS, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        h += tl.load(residual + rows[:, None] * SR + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        # The statistics are those of the stream as it is stored.
        stored = h.to(stream.dtype.element_ty)
        tl.store(stream + rows[:, None] * C + cols[None, :], stored, mask=inside)
        h = stored.to(tl.float32)
    h, _ = _centred(h, inside, C, eps, CENTER)
    h *= tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        h += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * C + cols[None, :], h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['N', 'ROWS', 'STEP'])
def norm_bwd_kernel(
    stream, x, gamma, sample, weight, dy, dstream, dresidual, dx, partial, N, ROWS, STEP, eps,
    SS: tl.constexpr, SX: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, CENTER: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BC)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BN, BC), tl.float32)
    dbias = tl.zeros((BN, BC), tl.float32)
    dgamma = tl.zeros((BN, BC), tl.float32)
    for start in range(tl.program_id(0) * BN, N, STEP):
        rows = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        h = tl.load(stream + rows[:, None] * SS + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        h, scale = _centred(h, inside, C, eps, CENTER)
        dweight += g * h
        if BIAS:
            dbias += g
        g *= w
        d = g - h * (tl.sum(g * h, 1) / C)[:, None]
        if CENTER:
            d -= (tl.sum(g, 1) / C)[:, None]
        d *= scale[:, None]
        if dstream is not None:
            d += tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=inside)
        if sample is not None:
            d *= tl.load(sample + rows // ROWS, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        if gamma is not None:
            dgamma += d * tl.load(x + rows[:, None] * SX + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            d *= tl.load(gamma + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    P = tl.num_programs(0)
    at = partial + tl.program_id(0) * C + cols
    tl.store(at, tl.sum(dweight, 0), mask=cols < C)
    if BIAS:
        tl.store(at + P * C, tl.sum(dbias, 0), mask=cols < C)
    if gamma is not None:
        tl.store(at + 2 * P * C, tl.sum(dgamma, 0), mask=cols < C)


def _sizes(x: Tensor, sample: Tensor | None, tile: int) -> tuple[int, int, int, int, int]:
    """Rows, rows per sample, channels, padded channels, rows of a tile."""
    C = x.shape[-1]
    N = x.numel() // C
    BC = next_power(C)
    return N, N if sample is None else N // sample.numel(), C, BC, max(1, tile // BC)


class _NormPlan:
    def __init__(self, eps: float, center: bool, dtype: torch.dtype, x, residual, gamma, sample, *_):
        N, per_sample, C, BC, BN = _sizes(x, sample, _TILE)
        rows, SX = token_rows(x)
        rows_r, SR = (None, 0) if residual is None else token_rows(residual)
        self.in_place = rows is x and rows_r is residual
        consts = {'SX': SX, 'SR': SR, 'C': C, 'BC': BC, 'BN': BN, 'CENTER': center}
        self.run = Launch(norm_fwd_kernel, (ceil_div(N, BN), 1, 1), (N, per_sample, eps), consts)


@on_device_of_first
def norm_fwd(x, residual, gamma, sample, weight, bias, eps, center, dtype):
    """Normalised rows in `dtype`, and the stream in the residual's dtype (None without a residual)."""
    steps = plan(_NormPlan, (eps, center, dtype), x, residual, gamma, sample, weight, bias)
    y = torch.empty(*x.shape, dtype=dtype, device=x.device)
    stream = None if residual is None else torch.empty(*x.shape, dtype=residual.dtype, device=x.device)
    if not steps.in_place:
        x, residual = token_rows(x)[0], None if residual is None else token_rows(residual)[0]
    steps.run(aligned(x, residual, gamma, sample, weight, bias), x, residual, gamma, sample, weight, bias, y, stream)
    return y, stream


class _NormBackwardPlan:
    def __init__(self, eps: float, center: bool, _, stream, x, gamma, sample, weight, bias):
        N, per_sample, C, BC, BN = _sizes(stream, sample, _TILE // 2)
        count = max(1, min(programs(stream.device), ceil_div(N, BN)))
        SS, SX = token_rows(stream)[1], 0 if x is None else token_rows(x)[1]
        consts = {'SS': SS, 'SX': SX, 'C': C, 'BC': BC, 'BN': BN, 'CENTER': center, 'BIAS': bias is not None}
        self.run = Launch(norm_bwd_kernel, (count, 1, 1), (N, per_sample, count * BN, eps), consts)
        self.sums = Sums(*[(count, C)] * 3, wanted=(True, bias is not None, gamma is not None))


@on_device_of_first
def norm_bwd(stream, x, gamma, sample, weight, bias, dy, dstream, eps, center, has_residual, dtype):
    """Gradients of x (in `dtype`), residual, gamma, weight and bias; None where there is no such argument."""
    device, shape, dy = stream.device, stream.shape, dy.contiguous()
    dstream = None if dstream is None else dstream.contiguous()
    options = eps, center, (dtype, has_residual, types(dy, dstream))
    steps = plan(_NormBackwardPlan, options, stream, x, gamma, sample, weight, bias)
    dx = torch.empty(*shape, dtype=dtype, device=device)
    dresidual = stream.new_empty(*shape) if has_residual else None
    stream, x = token_rows(stream)[0], None if x is None else token_rows(x)[0]
    shares = torch.empty(steps.sums.total, dtype=torch.float32, device=device)
    inputs = stream, x, gamma, sample, weight, dy, dstream
    steps.run(aligned(*inputs), *inputs, dresidual, dx, shares)
    dweight, dbias, dgamma = (None if w is None else w.new_empty(*w.shape) for w in (weight, bias, gamma))
    steps.sums(shares, dweight, dbias, dgamma)
    return dx, dresidual, dgamma, dweight, dbias


@triton.jit(do_not_specialize=['N'])
def gated_norm_fwd_kernel(
    x, weight, gate, y, N, eps,
    SX: tl.constexpr, SG: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head); tokens lie SX and SG apart, the heads of one side by side."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BC)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    head = ((rows % H) * C)[:, None] + cols[None, :]
    h = tl.load(x + (rows // H)[:, None] * SX + head, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + (rows // H)[:, None] * SG + head, mask=inside, other=0.0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 1) / C + eps)[:, None]
    h *= tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :] * g * tl.sigmoid(g)
    tl.store(y + rows[:, None] * C + cols[None, :], h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['N', 'STEP'])
def gated_norm_bwd_kernel(
    x, weight, gate, dy, dx, dgate, partial, N, STEP, eps,
    SX: tl.constexpr, SG: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BC)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BN, BC), tl.float32)
    for start in range(tl.program_id(0) * BN, N, STEP):
        rows = start + tl.arange(0, BN).to(tl.int64)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        head = ((rows % H) * C)[:, None] + cols[None, :]
        at = rows[:, None] * C + cols[None, :]
        h = tl.load(x + (rows // H)[:, None] * SX + head, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + (rows // H)[:, None] * SG + head, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(h * h, 1) / C + eps)[:, None]
        h *= scale
        s = tl.sigmoid(g)
        tl.store(dgate + at, (d * h * w * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
        d *= g * s
        dweight += d * h
        d *= w
        d = scale * (d - h * (tl.sum(d * h, 1) / C)[:, None])
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * C + cols, tl.sum(dweight, 0), mask=cols < C)


class _GatedPlan:
    def __init__(self, eps: float, x, weight, gate):
        rows, rows_g, N, consts = _gated(x, gate, _TILE // 2)
        self.in_place = rows is x and rows_g is gate
        self.run = Launch(gated_norm_fwd_kernel, (ceil_div(N, consts['BN']), 1, 1), (N, eps), consts)


def _gated(x: Tensor, gate: Tensor, tile: int) -> tuple[Tensor, Tensor, int, dict]:
    """x and gate as rows of heads, the number of rows and the constants of the kernels."""
    H, C = x.shape[-2:]
    N, BC = x.numel() // C, next_power(C)
    x, SX = token_rows(x, 2)
    gate, SG = token_rows(gate, 2)
    return x, gate, N, {'SX': SX, 'SG': SG, 'H': H, 'C': C, 'BC': BC, 'BN': max(1, tile // BC)}


@on_device_of_first
def gated_norm_fwd(x, weight, gate, eps):
    """(..., H, C) in x's dtype."""
    steps = plan(_GatedPlan, (eps,), x, weight, gate)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if not steps.in_place:
        x, gate = token_rows(x, 2)[0], token_rows(gate, 2)[0]
    steps.run(aligned(x, weight, gate), x, weight, gate, y)
    return y


class _GatedBackwardPlan:
    def __init__(self, eps: float, _, x, weight, gate):
        _, _, N, consts = _gated(x, gate, _TILE // 4)
        C, BN = consts['C'], consts['BN']
        count = max(1, min(programs(x.device), ceil_div(N, BN)))
        self.run = Launch(gated_norm_bwd_kernel, (count, 1, 1), (N, count * BN, eps), consts)
        self.sums = Sums((count, C))


@on_device_of_first
def gated_norm_bwd(x, weight, gate, dy, eps):
    """Gradients of x, weight and gate."""
    steps = plan(_GatedBackwardPlan, (eps, dy.dtype), x, weight, gate)
    dx, dgate, dweight = x.new_empty(*x.shape), gate.new_empty(*gate.shape), weight.new_empty(*weight.shape)
    x, gate, dy = token_rows(x, 2)[0], token_rows(gate, 2)[0], dy.contiguous()
    shares = torch.empty(steps.sums.total, dtype=torch.float32, device=x.device)
    steps.run(aligned(x, weight, gate, dy), x, weight, gate, dy, dx, dgate, shares)
    steps.sums(shares, dweight)
    return dx, dweight, dgate


@triton.jit(do_not_specialize=['N'])
def leaky_norm_kernel(
    x, weight, bias, y, N, eps, slope,
    SX: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows are (token, group); tokens lie SX apart, the groups of one side by side."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BC)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    group = ((rows % G) * C)[:, None] + cols[None, :]
    h = tl.load(x + (rows // G)[:, None] * SX + group, mask=inside, other=0.0).to(tl.float32)
    h, _ = _centred(h, inside, C, eps, True)
    h *= tl.load(weight + group, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(bias + group, mask=inside, other=0.0).to(tl.float32)
    h = tl.where(h > 0, h, slope * h)
    tl.store(y + rows[:, None] * C + cols[None, :], h.to(y.dtype.element_ty), mask=inside)


class _LeakyPlan:
    def __init__(self, eps: float, slope: float, x, weight, bias):
        G, C = x.shape[-2:]
        N, BC = x.numel() // C, next_power(C)
        rows, SX = token_rows(x, 2)
        self.in_place = rows is x and weight.is_contiguous() and bias.is_contiguous()
        consts = {'SX': SX, 'G': G, 'C': C, 'BC': BC, 'BN': max(1, _TILE // 2 // BC)}
        self.run = Launch(leaky_norm_kernel, (ceil_div(N, consts['BN']), 1, 1), (N, eps, slope), consts)


@on_device_of_first
def leaky_norm_fwd(x, weight, bias, eps, slope):
    """(..., G, C) in x's dtype."""
    steps = plan(_LeakyPlan, (eps, slope), x, weight, bias)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if not steps.in_place:
        x, weight, bias = token_rows(x, 2)[0], weight.contiguous(), bias.contiguous()
    steps.run(aligned(x, weight, bias), x, weight, bias, y)
    return y
