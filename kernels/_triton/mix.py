"""What surrounds ViG's scan on GPUs: log gates from their low-rank logits before it, the 2D gated mix after it.

Each op is one pass over memory each way. Programs of the backward kernels take several tiles in turn, sum the gradients
of the parameters over them in registers, and their sums are added afterwards, in one order.
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
    compute_types,
    load_tile,
    mm,
    next_power,
    on_device_of_first,
    plan,
    programs,
    store_tile,
    token_rows,
    types,
)
from zoo.kernels._triton.sums import Sums

MAX_RANK = 64
MAX_DIM = 256
_TILE = 2048  # elements of a forward tile of the mix; the backward, with more of them alive, takes half
_GATE_ROWS = 64


@triton.jit
def _normalised(x, V: tl.constexpr, eps):
    scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
    return x * scale, scale


@triton.jit
def mixture(x, l, s, w_global, w_local, V: tl.constexpr, eps, SILU: tl.constexpr):
    """s * norm(x) + (1 - s) * norm(l) of rows of one head each, or its SiLU, in fp32; weights (1, V)."""
    x, _ = _normalised(x, V, eps)
    l, _ = _normalised(l, V, eps)
    l *= w_local
    x = l + s * (x * w_global - l)
    return x * tl.sigmoid(x) if SILU else x


@triton.jit(do_not_specialize=['N'])
def mix_fwd_kernel(
    o, local, gate, bias, w_global, w_local, y, N, eps,
    SO: tl.constexpr, SL: tl.constexpr, SG: tl.constexpr, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, LOGITS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # token and head
    cols = tl.arange(0, BV)
    ok = rows < N * H
    token, head = rows // H, rows % H
    inside = ok[:, None] & (cols < V)[None, :]
    inner = (head * V)[:, None] + cols[None, :]
    x = tl.load(o + token[:, None] * SO + inner, mask=inside, other=0.0).to(tl.float32)
    l = tl.load(local + token[:, None] * SL + inner, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(gate + token[:, None] * SG + inner, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        s += tl.load(bias + inner, mask=inside, other=0.0).to(tl.float32)
    if LOGITS:
        s = tl.sigmoid(s)
    wg = tl.load(w_global + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    wl = tl.load(w_local + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    x = mixture(x, l, s, wg, wl, V, eps, SILU)
    tl.store(y + token[:, None] * (H * V) + inner, x.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gradient(g, x, scale, V: tl.constexpr):
    """Through x = raw * scale, from the gradient of x and x itself."""
    return (g - x * (tl.sum(g * x, 1) / V)[:, None]) * scale


@triton.jit(do_not_specialize=['N', 'STEP'])
def mix_bwd_kernel(
    o, local, gate, bias, w_global, w_local, dy, do, dlocal, dgate, partial, N, STEP, eps,
    SO: tl.constexpr, SL: tl.constexpr, SG: tl.constexpr, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, LOGITS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    cols = tl.arange(0, BV)
    inner = head * V + cols
    wg = tl.load(w_global + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    wl = tl.load(w_local + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b = tl.load(bias + inner, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        db = tl.zeros((BN, BV), tl.float32)
    dwg = tl.zeros((BN, BV), tl.float32)
    dwl = tl.zeros((BN, BV), tl.float32)
    for start in range(tl.program_id(0) * BN, N, STEP):
        token = start + tl.arange(0, BN).to(tl.int64)
        ok = token < N
        x, x_scale = _normalised(load_tile(o + head * V, token, cols, SO, ok, V, BV).to(tl.float32), V, eps)
        l, l_scale = _normalised(load_tile(local + head * V, token, cols, SL, ok, V, BV).to(tl.float32), V, eps)
        s = load_tile(gate + head * V, token, cols, SG, ok, V, BV).to(tl.float32)
        g = load_tile(dy + head * V, token, cols, H * V, ok, V, BV).to(tl.float32)
        if bias is not None:
            s += b
        if LOGITS:
            s = tl.sigmoid(s)
        difference = x * wg - l * wl
        if SILU:
            m = l * wl + s * difference
            z = tl.sigmoid(m)
            g *= z * (1.0 + m * (1.0 - z))
        ds = g * difference
        if LOGITS:
            ds *= s * (1.0 - s)
        store_tile(dgate + head * V, ds, token, cols, H * V, ok, V, BV)
        if bias is not None:
            db += ds
        dx = g * s
        dl = g - dx
        dwg += dx * x
        dwl += dl * l
        store_tile(do + head * V, _norm_gradient(dx * wg, x, x_scale, V), token, cols, H * V, ok, V, BV)
        store_tile(dlocal + head * V, _norm_gradient(dl * wl, l, l_scale, V), token, cols, H * V, ok, V, BV)
    at = partial + (tl.program_id(0) * H + head) * V + cols
    plane = tl.num_programs(0) * H * V
    tl.store(at, tl.sum(dwg, 0), mask=cols < V)
    tl.store(at + plane, tl.sum(dwl, 0), mask=cols < V)
    if bias is not None:
        tl.store(at + 2 * plane, tl.sum(db, 0), mask=cols < V)


def _mix_consts(o, strides, gate_logits, silu, tile) -> dict:
    H, V = o.shape[-2:]
    BV = next_power(V)
    return {'SO': strides[0], 'SL': strides[1], 'SG': strides[2], 'H': H, 'V': V, 'BV': BV, 'BN': max(1, tile // BV),
            'LOGITS': gate_logits, 'SILU': silu}  # fmt: skip


class _MixPlan:
    def __init__(self, eps: float, logits: bool, silu: bool, _: tuple, o, local, gate):
        rows = [token_rows(x, 2) for x in (o, local, gate)]
        self.in_place = all(row is x for (row, _), x in zip(rows, (o, local, gate)))
        consts = _mix_consts(o, [distance for _, distance in rows], logits, silu, _TILE)
        N = o.shape[0] * o.shape[1]
        self.run = Launch(mix_fwd_kernel, (ceil_div(N * consts['H'], consts['BN']), 1, 1), (N, eps), consts)


@on_device_of_first
def mix_fwd(o, local, gate, gate_bias, w_global, w_local, eps, gate_logits, silu):
    """The mixture (B, T, H, V) in o's dtype."""
    options = eps, gate_logits, silu, types(gate_bias, w_global, w_local)
    steps = plan(_MixPlan, options, o, local, gate)
    y = o.new_empty(*o.shape)
    if not steps.in_place:
        o, local, gate = (token_rows(x, 2)[0] for x in (o, local, gate))
    steps.run(aligned(o, local, gate, gate_bias, w_global, w_local), o, local, gate, gate_bias, w_global, w_local, y)
    return y


class _MixBackwardPlan:
    def __init__(self, eps: float, logits: bool, silu: bool, kinds: tuple, o, local, gate):
        N, H, V = o.shape[0] * o.shape[1], *o.shape[2:]
        consts = _mix_consts(o, [token_rows(x, 2)[1] for x in (o, local, gate)], logits, silu, _TILE // 2)
        count = max(1, min(ceil_div(programs(o.device), H), ceil_div(N, consts['BN'])))
        self.run = Launch(mix_bwd_kernel, (count, H, 1), (N, count * consts['BN'], eps), consts)
        self.sums = Sums(*[(count * H, V)] * 2, (count, H * V), wanted=(True, True, kinds[0] is not None))


@on_device_of_first
def mix_bwd(o, local, gate, gate_bias, w_global, w_local, dy, eps, gate_logits, silu):
    """Gradients of o, local, gate, gate_bias (None without one), w_global and w_local."""
    options = eps, gate_logits, silu, types(gate_bias, w_global, w_local, dy)
    steps = plan(_MixBackwardPlan, options, o, local, gate)
    do, dlocal, dgate = o.new_empty(*o.shape), local.new_empty(*o.shape), gate.new_empty(*o.shape)
    inputs = (*(token_rows(x, 2)[0] for x in (o, local, gate)), gate_bias, w_global, w_local, dy.contiguous())
    shares = torch.empty(steps.sums.total, dtype=torch.float32, device=o.device)
    steps.run(aligned(*inputs), *inputs, do, dlocal, dgate, shares)
    ws = w_global, w_local, gate_bias
    dw_global, dw_local, dbias = grads = [None if w is None else w.new_empty(*w.shape) for w in ws]
    steps.sums(shares, *grads)
    return do, dlocal, dgate, dbias, dw_global, dw_local


@triton.jit
def _log_sigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit(do_not_specialize=['N'])
def gates_fwd_kernel(
    r, weight, bias, g_fwd, g_bwd, N, factor,
    SR: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    reverse = tl.program_id(1) // NK
    cols = tl.program_id(1) % NK * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    ok = rows < N
    w = load_tile(weight + reverse * K * R, cols, ranks, R, cols < K, R, BR)
    z = mm(load_tile(r, rows, ranks, SR, ok, R, BR), tl.trans(w), CT, PREC)
    z += tl.load(bias + reverse * K + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
    g = (_log_sigmoid(z) * factor).to(g_fwd.dtype.element_ty)
    inside = ok[:, None] & (cols < K)[None, :]
    at = rows[:, None] * K + cols[None, :]
    if reverse == 0:
        tl.store(g_fwd + at, g, mask=inside)
    else:
        tl.store(g_bwd + at, g, mask=inside)


@triton.jit(do_not_specialize=['N', 'STEP'])
def gates_bwd_kernel(
    r, weight, bias, dg_fwd, dg_bwd, dr, dweight, dbias, N, STEP, factor,
    SR: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    reverse = block // NK
    cols = block % NK * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    w = load_tile(weight + reverse * K * R, cols, ranks, R, cols < K, R, BR)
    b = tl.load(bias + reverse * K + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BK, BR), tl.float32)
    db = tl.zeros((BN, BK), tl.float32)
    for start in range(tl.program_id(0) * BN, N, STEP):
        rows = start + tl.arange(0, BN).to(tl.int64)
        ok = rows < N
        x = load_tile(r, rows, ranks, SR, ok, R, BR)
        inside = ok[:, None] & (cols < K)[None, :]
        at = rows[:, None] * K + cols[None, :]
        if reverse == 0:
            g = tl.load(dg_fwd + at, mask=inside, other=0.0).to(tl.float32)
        else:
            g = tl.load(dg_bwd + at, mask=inside, other=0.0).to(tl.float32)
        z = mm(x, tl.trans(w), CT, PREC) + b
        dz = g * factor / (1.0 + tl.exp(tl.minimum(z, 80.0)))
        db += dz
        dw += mm(tl.trans(dz.to(CT)), x, CT, PREC)
        store_tile(dr + block.to(tl.int64) * N * R, mm(dz, w, CT, PREC), rows, ranks, R, ok, R, BR)
    at = tl.program_id(0) * 2 * K + reverse * K + cols
    tl.store(dweight + at[:, None] * R + ranks[None, :], dw, mask=(cols < K)[:, None] & (ranks < R)[None, :])
    tl.store(dbias + at, tl.sum(db, 0), mask=cols < K)


def _gate_consts(r: Tensor, SR: int, K: int) -> dict:
    ct, prec = compute_types(r.dtype)
    widest = 64 if r.dtype == torch.bfloat16 else 32  # three tf32 products for one need the registers of two
    BK = next((b for b in (64, 32) if b <= widest and K % b == 0), min(widest, next_power(K)))
    R = r.shape[-1]
    return {'SR': SR, 'R': R, 'BR': next_power(R), 'K': K, 'BK': BK, 'NK': ceil_div(K, BK), 'BN': _GATE_ROWS,
            'CT': ct, 'PREC': prec}  # fmt: skip


class _GatesPlan:
    def __init__(self, normalizer: float, r, weight, bias):
        K, N = weight.shape[0] // 2, r.numel() // r.shape[-1]
        rows, SR = token_rows(r)
        self.in_place = rows is r and weight.is_contiguous() and bias.is_contiguous()
        consts = _gate_consts(r, SR, K)
        self.shape = (*r.shape[:-1], K)
        self.run = Launch(gates_fwd_kernel, (ceil_div(N, _GATE_ROWS), 2 * consts['NK'], 1), (N, 1 / normalizer), consts)


@on_device_of_first
def gates_fwd(r, weight, bias, normalizer):
    """Log gates (..., K) of both directions in r's dtype."""
    steps = plan(_GatesPlan, (normalizer,), r, weight, bias)
    g_fwd, g_bwd = r.new_empty(*steps.shape), r.new_empty(*steps.shape)
    if not steps.in_place:
        r, weight, bias = token_rows(r)[0], weight.contiguous(), bias.contiguous()
    steps.run(aligned(r, weight, bias), r, weight, bias, g_fwd, g_bwd)
    return g_fwd, g_bwd


class _GatesBackwardPlan:
    def __init__(self, normalizer: float, _, r, weight, bias):
        K, R = weight.shape[0] // 2, r.shape[-1]
        N = r.numel() // R
        consts = _gate_consts(r, token_rows(r)[1], K)
        blocks = 2 * consts['NK']
        count = max(1, min(ceil_div(programs(r.device), blocks), ceil_div(N, _GATE_ROWS)))
        sizes = N, count * _GATE_ROWS, 1 / normalizer
        self.run = Launch(gates_bwd_kernel, (count, blocks, 1), sizes, consts)
        self.sums = Sums((blocks, N * R), (count, 2 * K * R), (count, 2 * K))


@on_device_of_first
def gates_bwd(r, weight, bias, dg_fwd, dg_bwd, normalizer):
    """Gradients of r, weight and bias."""
    steps = plan(_GatesBackwardPlan, (normalizer, types(dg_fwd, dg_bwd)), r, weight, bias)
    dr, dweight, dbias = r.new_empty(*r.shape), weight.new_empty(*weight.shape), bias.new_empty(*bias.shape)
    inputs = token_rows(r)[0], *(x.contiguous() for x in (weight, bias, dg_fwd, dg_bwd))
    shares = torch.empty(steps.sums.total, dtype=torch.float32, device=r.device)
    parts = shares.split_with_sizes(steps.sums.sizes)
    steps.run(aligned(*inputs, *parts), *inputs, *parts)
    steps.sums(shares, dr, dweight, dbias)
    return dr, dweight, dbias
