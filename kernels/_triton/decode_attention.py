"""Softmax attention of one token over a long key-value buffer on GPUs: keys split over programs, then a merge.

The token's own entry is written before, with the rotary embedding of its key and queries.
How many keys count is read on the device, so a captured graph serves a growing buffer: a program takes an equal share
of the keys that there are. The query heads of a key head are the rows of one product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import (
    LOG2E,
    Launch,
    aligned,
    ceil_div,
    compute_types,
    next_power,
    on_device_of_first,
    plan,
    types,
)

PROGRAMS = 528  # over all rows and key heads: four per multiprocessor of an H100
_KEYS = 64  # in a tile


@triton.jit(do_not_specialize=['k_b', 'k_h', 'v_b', 'v_h', 'SPLITS'])
def decode_attention_kernel(
    q, keys, values, length, start, part, norms, k_b, k_h, v_b, v_h, scale, SPLITS,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
    BT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Unnormalised outputs `part` (B, K, SPLITS, G, D) and (B, K, SPLITS, G, 2) their largest exponent and sum."""
    split = tl.program_id(0)
    head = tl.program_id(1) % K
    b = (tl.program_id(1) // K).to(tl.int64)
    low = 0
    if start is not None:
        low = tl.load(start + b).to(tl.int32)
    high = tl.load(length).to(tl.int32)
    tiles = (high - low + BT - 1) // BT
    share = (tiles + SPLITS - 1) // SPLITS * BT
    first = low + split * share
    last = tl.minimum(first + share, high)
    rows = tl.arange(0, BG)
    dims = tl.arange(0, BD)
    r = tl.arange(0, BT)
    ok_d = (dims < D)[None, :]
    ok_q = (rows < G)[:, None] & ok_d
    qs = tl.load(q + (b * H + head * G + rows)[:, None] * D + dims[None, :], mask=ok_q, other=0.0)
    qs = (qs.to(tl.float32) * (scale * LOG2E)).to(CT)
    # 16-byte rows: the strides of a buffer are multiples of the head dimension
    k_ptr = keys + (b * k_b + head * k_h) * D + dims[None, :]
    v_ptr = values + (b * v_b + head * v_h) * D + dims[None, :]
    top = tl.full((BG,), float('-inf'), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    for t in range(first, last, BT):
        ok_t = t + r < last
        at = (t + r).to(tl.int64)[:, None] * D
        ks = tl.load(k_ptr + at, mask=ok_t[:, None] & ok_d, other=0.0)
        vs = tl.load(v_ptr + at, mask=ok_t[:, None] & ok_d, other=0.0)
        scores = tl.dot(qs, tl.trans(ks.to(CT)), input_precision=PREC)
        scores = tl.where(ok_t[None, :], scores, float('-inf'))
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        keep = tl.exp2(top - new)
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(weights.to(CT), vs.to(CT), acc=acc, input_precision=PREC)
        top = new
    at = ((b * K + head) * SPLITS + split) * G + rows
    tl.store(part + at[:, None] * D + dims[None, :], acc, mask=ok_q)
    tl.store(norms + at * 2, top, mask=rows < G)
    tl.store(norms + at * 2 + 1, total, mask=rows < G)


@triton.jit(do_not_specialize=['SPLITS'])
def decode_attention_merge_kernel(
    part, norms, y, SPLITS, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Program: (row, query head). The splits of a head lie G rows apart."""
    head = tl.program_id(0).to(tl.int64)
    base = (head // G) * SPLITS * G + head % G
    s = tl.arange(0, BS)
    dims = tl.arange(0, BD)
    top = float('-inf')
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    for s0 in range(0, SPLITS, BS):
        ok = s0 + s < SPLITS
        at = base + (s0 + s) * G
        tops = tl.load(norms + at * 2, mask=ok, other=float('-inf'))
        sums = tl.load(norms + at * 2 + 1, mask=ok, other=0.0)
        tile = tl.load(part + at[:, None] * D + dims[None, :], mask=ok[:, None] & (dims < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        keep = tl.exp2(top - new)
        weights = tl.where(sums > 0.0, tl.exp2(tops - new), 0.0)
        total = total * keep + tl.sum(weights * sums, 0)
        acc = acc * keep + tl.sum(weights[:, None] * tile, 0)
        top = new
    tl.store(y + head * D + dims, (acc / total).to(y.dtype.element_ty), mask=dims < D)


@triton.jit(do_not_specialize=['q_b', 'q_k', 'q_g', 'k_b', 'k_k', 'v_b', 'v_k', 'r_b', 'capacity'])
def rotate_and_store_kernel(
    q, k, v, cos, sin, keys, values, place, y, q_b, q_k, q_g, k_b, k_k, v_b, v_k, r_b, capacity,
    K: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Program: (row, key head), with its queries."""
    head = tl.program_id(0) % K
    b = (tl.program_id(0) // K).to(tl.int64)
    c = tl.arange(0, BH)
    ok = c < HALF
    low_cos = tl.load(cos + b * r_b + c, mask=ok, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + b * r_b + HALF + c, mask=ok, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + b * r_b + c, mask=ok, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + b * r_b + HALF + c, mask=ok, other=0.0).to(tl.float32)
    to = ((b * K + head) * capacity + tl.load(place)) * (2 * HALF) + c
    kind = keys.dtype.element_ty
    low = tl.load(k + b * k_b + head * k_k + c, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(k + b * k_b + head * k_k + HALF + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(keys + to, (low * low_cos - high * low_sin).to(kind), mask=ok)
    tl.store(keys + to + HALF, (high * high_cos + low * high_sin).to(kind), mask=ok)
    tl.store(values + to, tl.load(v + b * v_b + head * v_k + c, mask=ok, other=0.0), mask=ok)
    tl.store(values + to + HALF, tl.load(v + b * v_b + head * v_k + HALF + c, mask=ok, other=0.0), mask=ok)
    g = tl.arange(0, BG)[:, None]
    inside = (g < G) & ok[None, :]
    at = q + b * q_b + head * q_k + g * q_g + c[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = y + ((b * K + head) * G + g) * (2 * HALF) + c[None, :]
    tl.store(to, (low * low_cos[None, :] - high * low_sin[None, :]).to(kind), mask=inside)
    tl.store(to + HALF, (high * high_cos[None, :] + low * high_sin[None, :]).to(kind), mask=inside)


class _RotatePlan:
    def __init__(self, _, q, k, v, cos, sin, keys):
        self.in_place = all(t.stride(-1) == 1 for t in (q, k, v, cos, sin)) and sin.stride(0) == cos.stride(0)
        B, K, G, D = q.shape
        self.shape = B, K * G, D
        consts = {'K': K, 'G': G, 'BG': next_power(G, 1), 'HALF': D // 2, 'BH': next_power(D // 2)}
        of_row = 0 if len(cos) == 1 else cos.stride(0)
        sizes = *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], of_row, keys.shape[2]
        self.run = Launch(rotate_and_store_kernel, (B * K, 1, 1), sizes, consts, 1)


@on_device_of_first
def rotate_and_store_(q, k, v, cos, sin, keys, values, place):
    """Rotated queries (B, K G, d); keys and values, contiguous, take their entry."""
    options = (types(values, place),)
    steps = plan(_RotatePlan, options, q, k, v, cos, sin, keys)
    if not steps.in_place:
        q, k, v, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, cos, sin))
        sin = sin if sin.stride(0) == cos.stride(0) else sin.contiguous()
        steps = plan(_RotatePlan, options, q, k, v, cos, sin, keys)
    y = q.new_empty(*steps.shape)
    inputs = q, k, v, cos, sin, keys, values, place
    steps.run(aligned(*inputs), *inputs, y)
    return y


def _buffer(x: torch.Tensor) -> torch.Tensor:
    """Entries D apart and every stride a multiple of D, as buffers (B, K, capacity, D) and slices of them have."""
    D = x.shape[-1]
    fits = x.stride(-1) == 1 and x.stride(-2) == D and x.stride(0) % D == 0 and x.stride(1) % D == 0
    return x if fits else x.contiguous()


class _AttentionPlan:
    def __init__(self, scale: float, _, q, keys, values):
        (B, H, D), (K, capacity) = q.shape, keys.shape[1:3]
        splits = max(1, min(ceil_div(PROGRAMS, B * K), ceil_div(capacity, 2 * _KEYS)))
        G, BD = H // K, next_power(D)
        self.part, self.norms = (B, K, splits, G, D), (B, K, splits, G, 2)
        ct, prec = compute_types(q.dtype)
        consts = {'H': H, 'K': K, 'D': D, 'BD': BD, 'G': G, 'BG': next_power(G), 'BT': _KEYS if BD <= 128 else 32,
                  'CT': ct, 'PREC': prec}  # fmt: skip
        sizes = *(s // D for t in (keys, values) for s in t.stride()[:2]), scale, splits
        self.run = Launch(decode_attention_kernel, (splits, B * K, 1), sizes, consts, stages=3)
        self.merge = Launch(decode_attention_merge_kernel, (B * H, 1, 1), (splits,),
                            {'G': G, 'D': D, 'BD': BD, 'BS': 16})  # fmt: skip


@on_device_of_first
def attention(q, keys, values, length, start, scale):
    """(B, H, D); arguments as `zoo.kernels.decode.decode_attention`."""
    q, keys, values = q.contiguous(), _buffer(keys), _buffer(values)
    steps = plan(_AttentionPlan, (scale, types(length, start)), q, keys, values)
    part = torch.empty(*steps.part, dtype=torch.float32, device=q.device)
    norms = torch.empty(*steps.norms, dtype=torch.float32, device=q.device)
    inputs = q, keys, values, length, start
    steps.run(aligned(*inputs), *inputs, part, norms)
    y = torch.empty_like(q)
    steps.merge(True, part, norms, y)
    return y
