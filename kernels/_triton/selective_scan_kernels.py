"""The launched kernels of the selective scan: one program per batch entry and block of channels, one warp each."""

import triton
import triton.language as tl
from zoo.kernels._triton.selective_scan_tiles import backward_pass, forward_pass, weight

_SIZES = ['T', 'height', 'width', 'blocks', 'batch', 'every', 'stretches', 'tiles']
_STRIDES = [f's{x}_{axis}' for x in 'udbcyeg' for axis in 'btdgn']
# Nothing may be known about where rows start: see selective_scan_tiles.py.
_MAPS = dict(do_not_specialize=_SIZES, do_not_specialize_on_alignment=['x', 'p', 'y', 'dy', 'dx', 'dp'])


@triton.jit
def _program(blocks, groups, channels, BD: tl.constexpr, EXACT: tl.constexpr):
    """Block, group, batch entry and first channel of this program, its lanes (BD,) and which of them have a channel."""
    pid = tl.program_id(0)
    block = pid % blocks
    group = (pid // blocks) % groups
    entry = (pid // (blocks * groups)).to(tl.int64)
    lane = tl.arange(0, BD)
    okc = lane < BD if EXACT else block * BD + lane < channels
    return block, group, entry, group * channels + block * BD, lane, okc


@triton.jit
def _per_channel(ptr, lane, okc, PRESENT: tl.constexpr):
    """Values (BD,) in fp32, 0 without a tensor."""
    if PRESENT:
        return tl.load(ptr + lane, mask=okc, other=0.0).to(tl.float32)
    else:
        return lane.to(tl.float32) * 0.0


@triton.jit(do_not_specialize=['channels', 'groups'] + _SIZES + _STRIDES)
def selective_scan_kernel_forward(
    u, delta, A, B, C, D, bias, y, T, channels, groups, blocks,
    su_b, su_t, su_d, sd_b, sd_t, sd_d, sb_b, sb_g, sb_t, sb_n, sc_b, sc_g, sc_t, sc_n, sy_b, sy_t, sy_d,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TLAST: tl.constexpr,
    UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Along sequences: u, delta, y (B, G D, T), A (G D, N), B, C (B, G, N, T), with `channels` = D; any strides."""
    _, group, entry, first, lane, okc = _program(blocks, groups, channels, BD, EXACT)
    forward_pass(u + entry * (su_b * UNIT) + first * (su_d * UNIT),
                 delta + entry * (sd_b * UNIT) + first * (sd_d * UNIT), 0,
                 _per_channel(bias + first if BIAS else bias, lane, okc, BIAS),
                 _per_channel(D + first if SKIP else D, lane, okc, SKIP), A + first * N,
                 B + entry * sb_b + group * sb_g, C + entry * sc_b + group * sc_g,
                 y + entry * (sy_b * UNIT) + first * (sy_d * UNIT), lane, okc, T, 1, 1, 0,
                 su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n, sy_t, sy_d,
                 N, NP, BT, BD, 0, SOFTPLUS, REVERSE, False, True, EVEN, TLAST, UNIT, CT, PREC)  # fmt: skip


@triton.jit
def _skips(D, lane, okc, channels: tl.constexpr, K: tl.constexpr):
    """Skip gains (BD,) summed over the directions."""
    total = lane.to(tl.float32) * 0.0
    for k in tl.static_range(K):
        total += tl.load(D + k * channels + lane, mask=okc, other=0.0).to(tl.float32)
    return total


@triton.jit
def _direction_forward(
    x, p, w, bias, A, y, skip, lane, okc, T, height, width, k: tl.constexpr, channels: tl.constexpr,
    columns: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    RP: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr, EVEN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    part = p + k * (R + 2 * N)
    wt = weight(w + k * channels * R, lane, okc, R, RP)
    b = tl.load(bias + k * channels + lane, mask=okc, other=0.0).to(tl.float32)
    forward_pass(x, part, wt, b, skip, A + k * channels * N, part + R, part + R + N, y, lane, okc,
                 T, height, width, R, channels, 1, columns, 0, columns, 1, columns, 1, channels, 1,
                 N, NP, BT, BD, RP, True, REVERSE, COLUMN, FIRST, EVEN, False, 1, CT, PREC)  # fmt: skip
    tl.debug_barrier()


@triton.jit(**_MAPS)
def selective_scan_2d_kernel_forward(
    x, p, w, bias, A, D, y, T, height, width, blocks,
    K: tl.constexpr, channels: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, RP: tl.constexpr, EVEN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Over maps: x, y (B, H W, D), p (B, H W, K (R + 2 N)) with `columns` per row, w (K, D, R), all contiguous.

    One direction after the other adds to y; the first one writes. A lane reads only what it wrote itself.
    """
    _, _, entry, first, lane, okc = _program(blocks, 1, channels, BD, EXACT)
    x += entry * T * channels + first
    y += entry * T * channels + first
    p += entry * T * columns
    w += first * R
    bias += first
    A += first * N
    none = lane.to(tl.float32) * 0.0
    skip = _skips(D + first, lane, okc, channels, K)
    if K == 4:
        _direction_forward(x, p, w, bias, A, y, none, lane, okc, T, height, width, 3, channels, columns, R,
                           N, NP, BT, BD, RP, True, True, True, EVEN, CT, PREC)  # fmt: skip
        _direction_forward(x, p, w, bias, A, y, none, lane, okc, T, height, width, 1, channels, columns, R,
                           N, NP, BT, BD, RP, False, True, False, EVEN, CT, PREC)  # fmt: skip
    _direction_forward(x, p, w, bias, A, y, none, lane, okc, T, height, width, K // 2, channels, columns, R,
                       N, NP, BT, BD, RP, True, False, K == 2, EVEN, CT, PREC)  # fmt: skip
    _direction_forward(x, p, w, bias, A, y, skip, lane, okc, T, height, width, 0, channels, columns, R,
                       N, NP, BT, BD, RP, False, False, False, EVEN, CT, PREC)  # fmt: skip


@triton.jit(do_not_specialize=['channels', 'groups'] + _SIZES + _STRIDES)
def selective_scan_kernel_backward(
    u, delta, A, B, C, D, bias, dy, du, ddelta, dB, dC, dA, dD, dbias, far, near,
    T, channels, groups, blocks, batch, every, stretches,
    su_b, su_t, su_d, sd_b, sd_t, sd_d, sb_b, sb_g, sb_t, sb_n, sc_b, sc_g, sc_t, sc_n, sg_b, sg_t, sg_d,
    sy_b, sy_t, sy_d, se_b, se_t, se_d,
    ONE: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
    EVEN: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `selective_scan_kernel_forward`: sy are the strides of du, se those of ddelta.

    dB, dC (blocks, B, G, N, T) fp32 are parts to be summed over the first axis, dA (B, G D, N), dD, dbias (B, G D) over
    the batch. far (B, stretches, N, G D) and near (B, every, N, G D) are scratch, fp32.
    """
    block, group, entry, first, lane, okc = _program(blocks, groups, channels, BD, EXACT)
    total = groups * channels
    part = ((block * batch + entry) * groups + group) * N * T
    params = entry * total + first
    backward_pass(u + entry * (su_b * UNIT) + first * (su_d * UNIT),
                  delta + entry * (sd_b * UNIT) + first * (sd_d * UNIT), dA,
                  _per_channel(bias + first if BIAS else bias, lane, okc, BIAS),
                  _per_channel(D + first if SKIP else D, lane, okc, SKIP), A + first * N,
                  B + entry * sb_b + group * sb_g, C + entry * sc_b + group * sc_g,
                  dy + entry * (sg_b * UNIT) + first * (sg_d * UNIT),
                  du + entry * (sy_b * UNIT) + first * (sy_d * UNIT),
                  ddelta + entry * (se_b * UNIT) + first * (se_d * UNIT), dB + part, dC + part,
                  far + entry * stretches * N * total + first, near + entry * every * N * total + first,
                  dA + params * N, dD + params, dbias + params, dA,
                  lane, okc, T, 1, 1, 0, every, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, sy_t, sy_d, se_t, se_d, T, N * total, total,
                  N, NP, BT, BD, 0, SOFTPLUS, REVERSE, False, True, EVEN, ONE, TLAST, UNIT, CT, PREC)  # fmt: skip


@triton.jit
def _direction_backward(
    x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, near, skip, lane, okc, T, height, width, tiles,
    k: tl.constexpr, channels: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, REVERSE: tl.constexpr,
    COLUMN: tl.constexpr, FIRST: tl.constexpr, EVEN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    part = k * (R + 2 * N)
    b = tl.load(bias + k * channels + lane, mask=okc, other=0.0).to(tl.float32)
    backward_pass(x, p + part, w + k * channels * R, b, skip, A + k * channels * N, p + part + R, p + part + R + N,
                  dy, dx, dp + part, dp, dp, near, near,
                  dA + k * channels * N, dD, dbias + k * channels, dw + k * channels * R,
                  lane, okc, T, height, width, R, tiles, channels, 1, columns, 0, columns, 1, columns, 1,
                  channels, 1, channels, 1, columns, 0, 0, N * channels, channels,
                  N, NP, BT, BD, RP, True, REVERSE, COLUMN, FIRST, EVEN, True, False, 1, CT, PREC)  # fmt: skip
    tl.debug_barrier()


@triton.jit(**_MAPS)
def selective_scan_2d_kernel_backward(
    x, p, w, bias, A, D, dy, dx, dp, dA, dD, dbias, dw, near,
    T, height, width, blocks, batch, tiles,
    K: tl.constexpr, channels: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, RP: tl.constexpr, EVEN: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `selective_scan_2d_kernel_forward`.

    dp (blocks, B, H W, columns) fp32 is to be summed over the first axis, dA (B, K D, N), dD (B, D), dbias (B, K D) and
    dw (B, K, D, R) over the batch. near (B, tiles, N, D) fp32 is scratch.
    """
    block, _, entry, first, lane, okc = _program(blocks, 1, channels, BD, EXACT)
    x += entry * T * channels + first
    dy += entry * T * channels + first
    dx += entry * T * channels + first
    p += entry * T * columns
    dp += (block * batch + entry) * T * columns
    near += entry * tiles * N * channels + first
    w += first * R
    bias += first
    A += first * N
    dA += (entry * K * channels + first) * N
    dD += entry * channels + first
    dbias += entry * K * channels + first
    dw += (entry * K * channels + first) * R
    none = lane.to(tl.float32) * 0.0
    skip = _skips(D + first, lane, okc, channels, K)
    if K == 4:
        _direction_backward(x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, near, none, lane, okc, T, height,
                            width, tiles, 3, channels, columns, R,
                            N, NP, BT, BD, RP, True, True, True, EVEN, CT, PREC)  # fmt: skip
        _direction_backward(x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, near, none, lane, okc, T, height,
                            width, tiles, 1, channels, columns, R,
                            N, NP, BT, BD, RP, False, True, False, EVEN, CT, PREC)  # fmt: skip
    _direction_backward(x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, near, none, lane, okc, T, height,
                        width, tiles, K // 2, channels, columns, R,
                        N, NP, BT, BD, RP, True, False, K == 2, EVEN, CT, PREC)  # fmt: skip
    _direction_backward(x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, near, skip, lane, okc, T, height,
                        width, tiles, 0, channels, columns, R,
                        N, NP, BT, BD, RP, False, False, False, EVEN, CT, PREC)  # fmt: skip
