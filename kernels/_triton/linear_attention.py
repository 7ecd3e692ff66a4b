"""Normalised linear attention on GPUs.

Forward: the sums over tokens S = mean of k v^T and kbar = mean of k (k and v read once), then o = S^T q / (q . kbar +
eps) (q read, o written once). The token axis is cut into parts, one program each; a third kernel adds the parts' sums
in a fixed order. Where batch and heads fill the GPU by themselves, one program does all of it for one head.

Backward, with z = q . kbar + eps, g = do / z, t = S g and c = (q . t) / z, where c equals do . o / z:

    dq = t - c kbar        dS = mean of q g^T        dkbar = -mean of c q        (q, do read, dq written)
    dk = dS v + dkbar      dv = dS^T k                                          (k, v read, dk, dv written)

With `elu`, q and k go through elu(x) + 1 where they are loaded, and their gradients through its derivative, which is
min(elu(x) + 1, 1).

The forward's sums are kept: (K + 1) V numbers per head. Values wider than 128 are cut into blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import (
    Launch,
    aligned,
    alignment,
    ceil_div,
    compute_types,
    interpreting,
    load_tile,
    next_power,
    on_device_of_first,
    plan,
    programs,
    store_tile,
)

MAX_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEWEST = 256  # tokens in a part, at least
SIZES = ['T', 'per', 'H', 'parts', 'singles', 'eps', 'share'] + [
    x + y for x in ('q', 'k', 'v', 'do') for y in ('_b', '_t', '_h')
]


class Options(NamedTuple):
    """Of one kernel.

    bt: tokens in a tile; stages: of its loop; fill: programs per multiprocessor to cut the sums into; registers: most
    per thread, where the compiler alone would take so many that too few programs fit.
    """

    bt: int
    warps: int
    stages: int
    fill: int = 4
    registers: int | None = None

    @property
    def launch(self) -> tuple[int, int, int | None]:
        return self.warps, self.stages, self.registers


class Config(NamedTuple):
    """bk: K padded; bv: a block of V; nv: their number; options of kernels that sum, read the sums, do a whole head."""

    bk: int
    bv: int
    nv: int
    sums: Options
    reads: Options
    head: Options | None = None


def config(dtype: torch.dtype, K: int, V: int, backward: bool) -> Config:
    """The fixed table of block sizes; every row has a case in tests/gpu/check_linear_attention.py."""
    bk, bv = next_power(K), next_power(V)
    wide = max(bk, bv)
    if dtype != torch.bfloat16:
        bv = bv if wide <= 64 else min(bv, 32)
        options = Options(16 if wide > 64 or (backward and dtype == torch.float32) else 32, 4 if wide <= 64 else 8, 2)
        return Config(bk, bv, ceil_div(V, bv), options, options, options if wide <= 64 else None)
    if wide <= 64:
        return Config(bk, bv, 1, Options(64, 4, 3), Options(64, 4, 3), Options(32, 4, 3))
    if wide <= 128 and not backward:
        return Config(bk, bv, 1, Options(32, 8, 3), Options(64, 4, 2))
    bv = min(bv, 64)
    if wide <= 128:
        return Config(bk, bv, ceil_div(V, bv), Options(16, 4, 2), Options(32, 4, 2))
    return Config(bk, bv, ceil_div(V, bv), Options(32, 8, 2), Options(32, 8, 2))


def sum_types(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Operand type and precision of products of two inputs: in their own type they are exact."""
    if dtype == torch.float32 or interpreting():
        return tl.float32, 'tf32x3'
    return (tl.bfloat16 if dtype == torch.bfloat16 else tl.float16), 'tf32'


def unsupported(dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernels cannot take q, k (K channels a head) and v (V) of a dtype, or None."""
    if dtype not in DTYPES:
        return f'dtype {str(dtype).removeprefix("torch.")}'
    return f'head dimension above {MAX_DIM} (K = {K}, V = {V})' if max(K, V) > MAX_DIM else None


# --------------------------------------------------------------------------------------------------------------------
# Parts of kernels. Pointers are those of the first token of a program's range of `n` tokens, strides those of tokens.


@triton.jit
def load_features(x, rows, cols, step, ok, K: tl.constexpr, BK: tl.constexpr, ELU: tl.constexpr):
    """Features of tokens (BT, BK): as they are, or elu(x) + 1 in fp32; zero outside the tensor."""
    y = load_tile(x, rows, cols, step, ok, K, BK)
    if ELU:
        f = y.to(tl.float32)
        there = ok[:, None] & (cols < K)[None, :]
        y = tl.where(there, tl.where(f > 0, f + 1.0, tl.exp(tl.minimum(f, 0.0))), 0.0)
    return y


@triton.jit
def add_products(a, b, a_step, b_step, n, cols_a, cols_b, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
                 ELU: tl.constexpr):  # fmt: skip
    """Sums over tokens of a b^T (BK, BV) and of a (BK,)."""
    rows = tl.arange(0, BT)
    total = tl.zeros((BK, BV), tl.float32)
    single = tl.zeros((BT, BK), tl.float32)
    for t in range(0, n, BT):
        ok = rows < n - t
        x = load_features(a, rows, cols_a, a_step, ok, K, BK, ELU)
        y = load_tile(b, rows, cols_b, b_step, ok, V, BV)
        total = tl.dot(tl.trans(x.to(CT)), y.to(CT), total, input_precision=PREC)
        single += x.to(tl.float32)
        a += BT * a_step.to(tl.int64)
        b += BT * b_step.to(tl.int64)
    return total, tl.sum(single, 0)


@triton.jit
def read_out(q, o, q_step, o_step, n, cols_k, cols_v, kv, mean, eps, K: tl.constexpr, V: tl.constexpr,
             BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
             ELU: tl.constexpr):  # fmt: skip
    """o = kv^T q / (q . mean + eps) for every token; kv (BK, BV) in the compute type, mean (BK,) fp32."""
    rows = tl.arange(0, BT)
    for t in range(0, n, BT):
        ok = rows < n - t
        x = load_features(q, rows, cols_k, q_step, ok, K, BK, ELU)
        z = tl.sum(x.to(tl.float32) * mean[None, :], 1) + eps
        y = tl.dot(x.to(CT), kv, input_precision=PREC) / z[:, None]
        store_tile(o, y, rows, cols_v, o_step, ok, V, BV)
        q += BT * q_step.to(tl.int64)
        o += BT * o_step.to(tl.int64)


@triton.jit
def load_state(kv, rows, cols, K: tl.constexpr, V: tl.constexpr):
    """A block of a contiguous (K, V) state, zeros outside."""
    return tl.load(kv + rows[:, None] * V + cols[None, :], mask=(rows < K)[:, None] & (cols < V)[None, :], other=0.0)


@triton.jit
def store_state(kv, x, rows, cols, K: tl.constexpr, V: tl.constexpr):
    tl.store(kv + rows[:, None] * V + cols[None, :], x, mask=(rows < K)[:, None] & (cols < V)[None, :])


@triton.jit
def query_gradients(q, do, dq, kv_ptr, q_step, do_step, dq_step, n, cols_k, iv, mean, eps, K: tl.constexpr,
                    V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
                    CT: tl.constexpr, PREC: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    """dq, written by value block 0; sums over tokens of q g^T (BK, BV) for block iv and of -c q (BK,)."""
    rows = tl.arange(0, BT)
    block = tl.arange(0, BV)
    total = tl.zeros((BK, BV), tl.float32)
    single = tl.zeros((BT, BK), tl.float32)
    if NV == 1:
        kv = load_state(kv_ptr, cols_k, block, K, V).to(CT)
    for t in range(0, n, BT):
        ok = rows < n - t
        x = load_features(q, rows, cols_k, q_step, ok, K, BK, ELU)
        xf = x.to(tl.float32)
        y = load_tile(do, rows, iv * BV + block, do_step, ok, V, BV)
        inverse = 1.0 / (tl.sum(xf * mean[None, :], 1) + eps)
        if NV == 1:
            back = tl.dot(y.to(CT), tl.trans(kv), input_precision=PREC)
        else:
            back = tl.zeros((BT, BK), tl.float32)
            for j in range(NV):
                part = load_tile(do, rows, j * BV + block, do_step, ok, V, BV)
                kv = load_state(kv_ptr, cols_k, j * BV + block, K, V).to(CT)
                back = tl.dot(part.to(CT), tl.trans(kv), back, input_precision=PREC)
        back *= inverse[:, None]
        c = tl.sum(xf * back, 1) * inverse
        ok = ok & (iv == 0)
        grad = back - c[:, None] * mean[None, :]
        if ELU:
            grad *= tl.minimum(xf, 1.0)
        store_tile(dq, grad, rows, cols_k, dq_step, ok, K, BK)
        g = y.to(tl.float32) * inverse[:, None]
        total = tl.dot(tl.trans(x.to(CT)), g.to(CT), total, input_precision=PREC)
        single -= c[:, None] * xf
        q += BT * q_step.to(tl.int64)
        do += BT * do_step.to(tl.int64)
        dq += BT * dq_step.to(tl.int64)
    return total, tl.sum(single, 0)


@triton.jit
def key_gradients(k, v, dk, dv, dkv_ptr, dkv, dmean, k_step, v_step, dk_step, dv_step, n, cols_k, K: tl.constexpr,
                  V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
                  CT: tl.constexpr, PREC: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    """dk and dv of every token. dkv (BK, BV) in the compute type is the only block (NV = 1), or else read anew."""
    rows = tl.arange(0, BT)
    block = tl.arange(0, BV)
    for t in range(0, n, BT):
        ok = rows < n - t
        features = load_features(k, rows, cols_k, k_step, ok, K, BK, ELU)
        x = features.to(CT)
        if NV == 1:
            y = load_tile(v, rows, block, v_step, ok, V, BV).to(CT)
            back = tl.dot(y, tl.trans(dkv), input_precision=PREC)
            store_tile(dv, tl.dot(x, dkv, input_precision=PREC), rows, block, dv_step, ok, V, BV)
        else:
            back = tl.zeros((BT, BK), tl.float32)
            for j in range(NV):
                y = load_tile(v, rows, j * BV + block, v_step, ok, V, BV).to(CT)
                part = load_state(dkv_ptr, cols_k, j * BV + block, K, V).to(CT)
                back = tl.dot(y, tl.trans(part), back, input_precision=PREC)
                store_tile(dv, tl.dot(x, part, input_precision=PREC), rows, j * BV + block, dv_step, ok, V, BV)
        grad = back + dmean[None, :]
        if ELU:
            grad *= tl.minimum(features.to(tl.float32), 1.0)
        store_tile(dk, grad, rows, cols_k, dk_step, ok, K, BK)
        k += BT * k_step.to(tl.int64)
        v += BT * v_step.to(tl.int64)
        dk += BT * dk_step.to(tl.int64)
        dv += BT * dv_step.to(tl.int64)


@triton.jit
def place(T, per, H):
    """Batch entry, head and first token (64 bits) and number of tokens of the program at (part, head) of the grid."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * per
    return head // H, head % H, first, tl.minimum(T - first, per).to(tl.int32)


@triton.jit
def start(x, b, h, first, x_b, x_t, x_h, A: tl.constexpr):
    """The first element of a program's part of a tensor, strides in units of A."""
    return x + (b * x_b + h * x_h + first * x_t) * A


# --------------------------------------------------------------------------------------------------------------------
# Kernels, grid (parts, batch * heads, value blocks). Outputs are contiguous (B, T, H, .). With one part the sums are
# final and scaled at once, otherwise they go to (parts, B * H, .) and `la_kernel_merge` adds them.


@triton.jit(do_not_specialize=SIZES)
def la_fwd_kernel_sums(k, v, kv, mean, T, per, H, share, k_b, k_t, k_h, v_b, v_t, v_h, K: tl.constexpr,
                       V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, A: tl.constexpr,
                       CT: tl.constexpr, PREC: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    iv = tl.program_id(2)
    cols_k, cols_v = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    total, single = add_products(start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A),
                                 k_t * A, v_t * A, n, cols_k, cols_v, K, V, BT, BK, BV, CT, PREC, ELU)  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    store_state(kv + row * (K * V), total * share, cols_k, cols_v, K, V)
    tl.store(mean + row * K + cols_k, single * share, mask=(cols_k < K) & (iv == 0))


@triton.jit(do_not_specialize=SIZES)
def la_kernel_merge(parts_kv, parts_mean, kv, mean, parts, singles, share, BLOCK: tl.constexpr, BP: tl.constexpr,
                    SIZE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Adds, per head, `parts` sums of SIZE = K V numbers and `singles` sums of K numbers."""
    heads, head, block = tl.num_programs(0).to(tl.int64), tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_kv = block < tl.num_programs(1) - tl.cdiv(K, BLOCK)
    size = tl.where(of_kv, SIZE, K)
    i = tl.where(of_kv, block, block - tl.cdiv(SIZE, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    source = parts_mean
    target = mean
    count = singles
    if of_kv:
        source = parts_kv
        target = kv
        count = parts
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, count, BP):
        part = p + tl.arange(0, BP)
        x = source + (part[:, None] * heads + head) * size + i[None, :]
        total += tl.sum(tl.load(x, mask=(part < count)[:, None] & (i < size)[None, :], other=0.0), 0)
    tl.store(target + head * size + i, total * share, mask=i < size)


@triton.jit(do_not_specialize=SIZES)
def la_fwd_kernel_out(q, o, kv, mean, T, per, H, eps, q_b, q_t, q_h, K: tl.constexpr, V: tl.constexpr,
                      BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr,
                      PREC: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    cols_k, cols_v = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    head = tl.program_id(1).to(tl.int64)
    state = load_state(kv + head * (K * V), cols_k, cols_v, K, V).to(CT)
    key = tl.load(mean + head * K + cols_k, mask=cols_k < K, other=0.0)
    read_out(start(q, b, h, first, q_b, q_t, q_h, A), o + ((b * T + first) * H + h) * V, q_t * A, H * V, n, cols_k,
             cols_v, state, key, eps, K, V, BT, BK, BV, CT, PREC, ELU)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def la_fwd_kernel_head(q, k, v, o, kv, mean, T, H, share, eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
                       K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                       A: tl.constexpr, ST: tl.constexpr, SPREC: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
                       KEEP: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    """The whole forward pass of one head (and value block)."""
    b, h, first, n = place(T, T, H)
    iv = tl.program_id(2)
    cols_k, cols_v = tl.arange(0, BK), iv * BV + tl.arange(0, BV)
    total, single = add_products(start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A),
                                 k_t * A, v_t * A, n, cols_k, cols_v, K, V, BT, BK, BV, ST, SPREC,
                                 ELU)  # fmt: skip
    total *= share
    single *= share
    if KEEP:
        head = tl.program_id(1).to(tl.int64)
        store_state(kv + head * (K * V), total, cols_k, cols_v, K, V)
        tl.store(mean + head * K + cols_k, single, mask=(cols_k < K) & (iv == 0))
    read_out(start(q, b, h, first, q_b, q_t, q_h, A), o + (b * T * H + h) * V, q_t * A, H * V, n, cols_k, cols_v,
             total.to(CT), single, eps, K, V, BT, BK, BV, CT, PREC, ELU)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def la_bwd_kernel_queries(q, do, dq, kv, mean, dkv, dmean, T, per, H, share, eps, q_b, q_t, q_h, do_b, do_t, do_h,
                          K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                          NV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
                          ELU: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    iv = tl.program_id(2)
    cols_k, head = tl.arange(0, BK), tl.program_id(1).to(tl.int64)
    key = tl.load(mean + head * K + cols_k, mask=cols_k < K, other=0.0)
    total, single = query_gradients(start(q, b, h, first, q_b, q_t, q_h, A),
                                    start(do, b, h, first, do_b, do_t, do_h, A),
                                    dq + ((b * T + first) * H + h) * K, kv + head * (K * V), q_t * A, do_t * A, H * K,
                                    n, cols_k, iv, key, eps, K, V, BT, BK, BV, NV, CT, PREC, ELU)  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    store_state(dkv + row * (K * V), total * share, cols_k, iv * BV + tl.arange(0, BV), K, V)
    tl.store(dmean + row * K + cols_k, single * share, mask=(cols_k < K) & (iv == 0))


@triton.jit(do_not_specialize=SIZES)
def la_bwd_kernel_keys(k, v, dk, dv, dkv, dmean, T, per, H, k_b, k_t, k_h, v_b, v_t, v_h, K: tl.constexpr,
                       V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
                       A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    b, h, first, n = place(T, per, H)
    cols_k, head, row = tl.arange(0, BK), tl.program_id(1).to(tl.int64), (b * T + first) * H + h
    state = load_state(dkv + head * (K * V), cols_k, tl.arange(0, BV), K, V).to(CT)
    key = tl.load(dmean + head * K + cols_k, mask=cols_k < K, other=0.0)
    key_gradients(start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A), dk + row * K,
                  dv + row * V, dkv + head * (K * V), state, key, k_t * A, v_t * A, H * K, H * V, n, cols_k, K, V, BT,
                  BK, BV, NV, CT, PREC, ELU)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def la_bwd_kernel_head(q, k, v, do, dq, dk, dv, kv, mean, T, H, share, eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t,
                       v_h, do_b, do_t, do_h, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
                       BV: tl.constexpr, A: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
                       ELU: tl.constexpr):  # fmt: skip
    """The whole backward pass of one head, with values in one block."""
    b, h, first, n = place(T, T, H)
    cols_k, head, row = tl.arange(0, BK), tl.program_id(1).to(tl.int64), b * T * H + h
    key = tl.load(mean + head * K + cols_k, mask=cols_k < K, other=0.0)
    total, single = query_gradients(start(q, b, h, first, q_b, q_t, q_h, A),
                                    start(do, b, h, first, do_b, do_t, do_h, A),
                                    dq + row * K, kv + head * (K * V), q_t * A, do_t * A, H * K, n, cols_k, 0, key,
                                    eps, K, V, BT, BK, BV, 1, CT, PREC, ELU)  # fmt: skip
    key_gradients(start(k, b, h, first, k_b, k_t, k_h, A), start(v, b, h, first, v_b, v_t, v_h, A), dk + row * K,
                  dv + row * V, kv, (total * share).to(CT), single * share, k_t * A, v_t * A, H * K, H * V, n, cols_k,
                  K, V, BT, BK, BV, 1, CT, PREC, ELU)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Host side


def rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous: views of a fused projection pass as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(unit: int, *tensors: torch.Tensor) -> list[int]:
    """Strides of batch, token and head of every tensor, in units."""
    return [s // unit for x in tensors for s in x.stride()[:3]]


def cut(tokens: int, heads: int, options: Options, device: torch.device) -> tuple[int, int]:
    """Number of parts of the token axis and tokens in each, so that the programs fill the device."""
    wanted = programs(device) // 4 * options.fill
    parts = max(1, min((wanted + heads // 2) // heads, tokens // FEWEST))
    per = ceil_div(ceil_div(tokens, parts), options.bt) * options.bt
    return ceil_div(tokens, per), per


def span(tokens: int, heads: int, tile: int, device: torch.device) -> int:
    """Tokens of a program that only reads the state: long enough to pay for loading it, enough programs for balance."""
    return tile * max(1, min(16, tokens * heads // (tile * 2 * programs(device))))


def sums_of_parts(parts: int, kv: torch.Tensor, single: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the parts' sums go: straight to the final ones when there is one part."""
    if parts == 1:
        return kv, single
    return tuple(torch.empty(parts, *x.shape, dtype=x.dtype, device=x.device) for x in (kv, single))


def merge_launch(heads: int, K: int, V: int, parts: int, singles: int, share: float) -> Launch:
    """Of the kernel that adds sums (parts, heads, K, V) and (singles, heads, K) in a fixed order."""
    grid = (heads, ceil_div(K * V, 128) + ceil_div(K, 128), 1)
    return Launch(la_kernel_merge, grid, (parts, singles, share), {'BLOCK': 128, 'BP': 16, 'SIZE': K * V, 'K': K}, 4, 2)


class _ForwardPlan:
    """Launches of a forward pass, made once per set of shapes, strides and types: most of a pass's Python."""

    def __init__(self, eps: float, keep: bool, elu: bool, q, k, v):
        (B, T, H, K), V, device = q.shape, v.shape[-1], q.device
        cfg = config(q.dtype, K, V, False)
        unit = alignment(q, k, v)
        (st, sprec), (ct, prec) = sum_types(q.dtype), compute_types(q.dtype)
        blocks = lambda bt: {'K': K, 'V': V, 'BT': bt, 'BK': cfg.bk, 'BV': cfg.bv, 'A': unit}  # noqa: E731
        self.parts, per = cut(T, B * H * cfg.nv, cfg.sums, device)
        self.o, self.kv, self.mean = (B, T, H, V), (B, H, K, V), (B, H, K)
        self.in_place = all(rows(x) is x for x in (q, k, v))
        self.head = None
        if self.parts == 1 and cfg.head is not None:
            consts = blocks(cfg.head.bt) | {'ST': st, 'SPREC': sprec, 'CT': ct, 'PREC': prec, 'KEEP': keep, 'ELU': elu}
            sizes = (T, H, 1 / T, eps, *strides(unit, q, k, v))
            self.head = Launch(la_fwd_kernel_head, (1, B * H, cfg.nv), sizes, consts, *cfg.head.launch)
            return
        sizes = (T, per, H, 1 / T if self.parts == 1 else 1.0, *strides(unit, k, v))
        self.sums = Launch(la_fwd_kernel_sums, (self.parts, B * H, cfg.nv), sizes,
                           blocks(cfg.sums.bt) | {'CT': st, 'PREC': sprec, 'ELU': elu}, *cfg.sums.launch)  # fmt: skip
        self.merge = merge_launch(B * H, K, V, self.parts, self.parts, 1 / T)
        per = span(T, B * H, cfg.reads.bt, device)
        self.out = Launch(la_fwd_kernel_out, (ceil_div(T, per), B * H, cfg.nv), (T, per, H, eps, *strides(unit, q)),
                          blocks(cfg.reads.bt) | {'CT': ct, 'PREC': prec, 'ELU': elu}, *cfg.reads.launch)  # fmt: skip


class _BackwardPlan:
    """Those of a backward pass."""

    def __init__(self, eps: float, elu: bool, q, k, v, do):
        (B, T, H, K), V, device = q.shape, v.shape[-1], q.device
        cfg = config(q.dtype, K, V, True)
        unit = alignment(q, k, v, do)
        ct, prec = compute_types(q.dtype)
        blocks = lambda bt, more: (  # noqa: E731
            {'K': K, 'V': V, 'BT': bt, 'BK': cfg.bk, 'BV': cfg.bv}
            | more
            | {'A': unit, 'CT': ct, 'PREC': prec, 'ELU': elu}
        )
        self.parts, per = cut(T, B * H * cfg.nv, cfg.sums, device)
        self.head = None
        if self.parts == 1 and cfg.head is not None:
            sizes = (T, H, 1 / T, eps, *strides(unit, q, k, v, do))
            self.head = Launch(la_bwd_kernel_head, (1, B * H, 1), sizes, blocks(cfg.head.bt, {}), *cfg.head.launch)
            return
        many = {'NV': cfg.nv}
        sizes = (T, per, H, 1 / T if self.parts == 1 else 1.0, eps, *strides(unit, q, do))
        self.queries = Launch(la_bwd_kernel_queries, (self.parts, B * H, cfg.nv), sizes, blocks(cfg.sums.bt, many),
                              *cfg.sums.launch)  # fmt: skip
        self.merge = merge_launch(B * H, K, V, self.parts, self.parts, 1 / T)
        per = span(T, B * H, cfg.reads.bt, device)
        self.keys = Launch(la_bwd_kernel_keys, (ceil_div(T, per), B * H, 1), (T, per, H, *strides(unit, k, v)),
                           blocks(cfg.reads.bt, many), *cfg.reads.launch)  # fmt: skip


@on_device_of_first
def linear_attention_fwd(q, k, v, eps: float, keep: bool, elu: bool):
    """Outputs (B, T, H, V); fp32 mean of k v^T (B, H, K, V) and of k (B, H, K), None unless `keep`."""
    steps = plan(_ForwardPlan, (eps, keep, elu), q, k, v)
    if not steps.in_place:
        q, k, v = rows(q), rows(k), rows(v)
        steps = plan(_ForwardPlan, (eps, keep, elu), q, k, v)
    at_16 = aligned(q, k, v)
    o = torch.empty(*steps.o, dtype=q.dtype, device=q.device)
    fp32 = dict(dtype=torch.float32, device=q.device)
    if steps.head is not None and not keep:
        steps.head(at_16, q, k, v, o, None, None)
        return o, None, None
    kv, mean = torch.empty(*steps.kv, **fp32), torch.empty(*steps.mean, **fp32)
    if steps.head is not None:
        steps.head(at_16, q, k, v, o, kv, mean)
        return o, kv, mean
    parts_kv, parts_mean = sums_of_parts(steps.parts, kv, mean)
    steps.sums(at_16, k, v, parts_kv, parts_mean)
    if steps.parts > 1:
        steps.merge(True, parts_kv, parts_mean, kv, mean)
    steps.out(at_16, q, o, kv, mean)
    return (o, kv, mean) if keep else (o, None, None)


@on_device_of_first
def linear_attention_bwd(q, k, v, kv, mean, do, eps: float, elu: bool):
    """Gradients dq, dk, dv; `kv` and `mean` are those of the forward pass."""
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    steps = plan(_BackwardPlan, (eps, elu), q, k, v, do)
    at_16 = aligned(q, k, v, do, kv, mean)
    dq, dk, dv = (torch.empty(*x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if steps.head is not None:
        steps.head(at_16, q, k, v, do, dq, dk, dv, kv, mean)
        return dq, dk, dv
    dkv, dmean = torch.empty_like(kv), torch.empty_like(mean)
    parts_kv, parts_mean = sums_of_parts(steps.parts, dkv, dmean)
    steps.queries(at_16, q, do, dq, kv, mean, parts_kv, parts_mean)
    if steps.parts > 1:
        steps.merge(True, parts_kv, parts_mean, dkv, dmean)
    steps.keys(at_16, k, v, dk, dv, dkv, dmean)
    return dq, dk, dv
