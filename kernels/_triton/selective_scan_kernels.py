"""The launched kernels of the selective scan: one program per batch entry and block of channels, one warp each."""

import triton
import triton.language as tl
from zoo.kernels._triton.selective_scan_tiles import backward_pass, forward_pass

_SIZES = ['T', 'height', 'width', 'R', 'channels', 'blocks', 'batch', 'every', 'stretches', 'columns', 'groups']
_STRIDES = [f's{x}_{axis}' for x in 'udbcyeg' for axis in 'btdgn']


@triton.jit
def _program(blocks, groups, channels, BD: tl.constexpr):
    """Block, group and batch entry of this program, its channels within the group and which of them exist."""
    pid = tl.program_id(0)
    block = pid % blocks
    group = (pid // blocks) % groups
    entry = (pid // (blocks * groups)).to(tl.int64)
    inside = block * BD + tl.arange(0, BD)
    return block, group, entry, inside, inside < channels


@triton.jit
def _row(ptr, channel, okc, PRESENT: tl.constexpr):
    """Values per channel (BD,) fp32, 0 without a tensor."""
    if PRESENT:
        return tl.load(ptr + channel, mask=okc, other=0.0).to(tl.float32)
    else:
        return channel.to(tl.float32) * 0.0


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def selective_scan_kernel_forward(
    u, delta, A, B, C, D, bias, y, T, channels, groups, blocks,
    su_b, su_t, su_d, sd_b, sd_t, sd_d, sb_b, sb_g, sb_t, sb_n, sc_b, sc_g, sc_t, sc_n, sy_b, sy_t, sy_d,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Along sequences: u, delta, y (B, G D, T), A (G D, N), B, C (B, G, N, T), with `channels` = D; any strides."""
    _, group, entry, inside, okc = _program(blocks, groups, channels, BD)
    channel = group * channels + inside
    forward_pass(u + entry * (su_b * UNIT), delta + entry * (sd_b * UNIT), 0, _row(bias, channel, okc, BIAS),
                 _row(D, channel, okc, SKIP), A, B + entry * sb_b + group * sb_g, C + entry * sc_b + group * sc_g,
                 y + entry * (sy_b * UNIT), channel, okc, T, 1, 1, 0,
                 su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n, sy_t, sy_d,
                 N, NP, BT, BD, 0, SOFTPLUS, REVERSE, False, True, TLAST, UNIT, CT, PREC)  # fmt: skip


@triton.jit
def _weight(w, channel, okc, R, BD: tl.constexpr, RP: tl.constexpr):
    """The rows of (channels, R) for a block of channels, transposed: (RP, BD) fp32, zeros outside."""
    r = tl.arange(0, RP)
    ok = (r < R)[:, None] & okc[None, :]
    return tl.load(w + channel[None, :] * R + r[:, None], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _skips(D, inside, okc, channels, K: tl.constexpr):
    """Skip gains (BD,) summed over the directions."""
    total = inside.to(tl.float32) * 0.0
    for k in tl.static_range(K):
        total += tl.load(D + k * channels + inside, mask=okc, other=0.0).to(tl.float32)
    return total


@triton.jit
def _direction_forward(k, x, p, w, bias, A, y, skip, inside, okc, T, height, width, R, channels, columns,
                       N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                       REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                       CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    part = p + k * (R + 2 * N)
    wt = _weight(w + k * channels * R, inside, okc, R, BD, RP)
    b = tl.load(bias + k * channels + inside, mask=okc, other=0.0).to(tl.float32)
    forward_pass(x, part, wt, b, skip, A + k * channels * N, part + R, part + R + N, y, inside, okc,
                 T, height, width, R, channels, 1, columns, 0, columns, 1, columns, 1, channels, 1,
                 N, NP, BT, BD, RP, True, REVERSE, COLUMN, FIRST, False, 1, CT, PREC)  # fmt: skip
    tl.debug_barrier()


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_2d_kernel_forward(
    x, p, w, bias, A, D, y, T, height, width, R, channels, blocks, columns,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Over maps: x, y (B, H W, D), p (B, H W, K (R + 2 N)) with `columns` per row, w (K, D, R), all contiguous.

    One direction after the other adds to y; the first one writes. A lane reads only what it wrote itself.
    """
    _, _, entry, inside, okc = _program(blocks, 1, channels, BD)
    x += entry * T * channels
    y += entry * T * channels
    p += entry * T * columns
    none = inside.to(tl.float32) * 0.0
    skip = _skips(D, inside, okc, channels, K)
    if K == 4:
        _direction_forward(3, x, p, w, bias, A, y, none, inside, okc, T, height, width, R, channels, columns,
                           N, NP, BT, BD, RP, True, True, True, CT, PREC)  # fmt: skip
        _direction_forward(1, x, p, w, bias, A, y, none, inside, okc, T, height, width, R, channels, columns,
                           N, NP, BT, BD, RP, False, True, False, CT, PREC)  # fmt: skip
    _direction_forward(K // 2, x, p, w, bias, A, y, none, inside, okc, T, height, width, R, channels, columns,
                       N, NP, BT, BD, RP, True, False, K == 2, CT, PREC)  # fmt: skip
    _direction_forward(0, x, p, w, bias, A, y, skip, inside, okc, T, height, width, R, channels, columns,
                       N, NP, BT, BD, RP, False, False, False, CT, PREC)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def selective_scan_kernel_backward(
    u, delta, A, B, C, D, bias, dy, du, ddelta, dB, dC, dA, dD, dbias, far, near,
    T, channels, groups, blocks, batch, every, stretches,
    su_b, su_t, su_d, sd_b, sd_t, sd_d, sb_b, sb_g, sb_t, sb_n, sc_b, sc_g, sc_t, sc_n, sg_b, sg_t, sg_d,
    sy_b, sy_t, sy_d, se_b, se_t, se_d,
    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `selective_scan_kernel_forward`: sy are the strides of du, se those of ddelta.

    dB, dC (blocks, B, G, N, T) fp32 are parts to be summed over the first axis, dA (B, G D, N), dD, dbias (B, G D) over
    the batch. far (B, stretches, N, G D) and near (B, every, N, G D) are scratch, fp32.
    """
    block, group, entry, inside, okc = _program(blocks, groups, channels, BD)
    channel = group * channels + inside
    total = groups * channels
    part = ((block * batch + entry) * groups + group) * N * T
    backward_pass(u + entry * (su_b * UNIT), delta + entry * (sd_b * UNIT), tl.zeros((1, BD), tl.float32),
                  _row(bias, channel, okc, BIAS), _row(D, channel, okc, SKIP), A,
                  B + entry * sb_b + group * sb_g, C + entry * sc_b + group * sc_g, dy + entry * (sg_b * UNIT),
                  du + entry * (sy_b * UNIT), ddelta + entry * (se_b * UNIT), dB + part, dC + part,
                  far + entry * stretches * N * total, near + entry * every * N * total,
                  dA + entry * total * N, dD + entry * total, dbias + entry * total, dA,
                  channel, okc, T, 1, 1, 0, every, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, sy_t, sy_d, se_t, se_d, 1, T, N * total, total,
                  N, NP, BT, BD, 0, SOFTPLUS, REVERSE, False, True, TLAST, UNIT, CT, PREC)  # fmt: skip


@triton.jit
def _direction_backward(k, x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, far, near, skip, inside, okc,
                        T, height, width, R, channels, columns, every, K: tl.constexpr,
                        N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                        REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                        CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    part = k * (R + 2 * N)
    wt = _weight(w + k * channels * R, inside, okc, R, BD, RP)
    b = tl.load(bias + k * channels + inside, mask=okc, other=0.0).to(tl.float32)
    backward_pass(x, p + part, wt, b, skip, A + k * channels * N, p + part + R, p + part + R + N, dy, dx, dp + part,
                  dp, dp, far, near, dA + k * channels * N, dD, dbias + k * channels, dw + k * channels * R,
                  inside, okc, T, height, width, R, every, channels, 1, columns, 0, columns, 1, columns, 1,
                  channels, 1, channels, 1, columns, 0, 0, 0, N * channels, channels,
                  N, NP, BT, BD, RP, True, REVERSE, COLUMN, FIRST, False, 1, CT, PREC)  # fmt: skip
    tl.debug_barrier()


@triton.jit(do_not_specialize=_SIZES)
def selective_scan_2d_kernel_backward(
    x, p, w, bias, A, D, dy, dx, dp, dA, dD, dbias, dw, far, near,
    T, height, width, R, channels, blocks, columns, batch, every, stretches,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `selective_scan_2d_kernel_forward`.

    dp (blocks, B, H W, columns) fp32 is to be summed over the first axis, dA (B, K D, N), dD (B, D), dbias (B, K D) and
    dw (B, K, D, R) over the batch. far (B, stretches, N, D) and near (B, every, N, D) are scratch, fp32.
    """
    block, _, entry, inside, okc = _program(blocks, 1, channels, BD)
    x += entry * T * channels
    dy += entry * T * channels
    dx += entry * T * channels
    p += entry * T * columns
    dp += (block * batch + entry) * T * columns
    far += entry * stretches * N * channels
    near += entry * every * N * channels
    dA += entry * K * channels * N
    dD += entry * channels
    dbias += entry * K * channels
    dw += entry * K * channels * R
    none = inside.to(tl.float32) * 0.0
    skip = _skips(D, inside, okc, channels, K)
    if K == 4:
        _direction_backward(3, x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, far, near, none, inside, okc,
                            T, height, width, R, channels, columns, every, K,
                            N, NP, BT, BD, RP, True, True, True, CT, PREC)  # fmt: skip
        _direction_backward(1, x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, far, near, none, inside, okc,
                            T, height, width, R, channels, columns, every, K,
                            N, NP, BT, BD, RP, False, True, False, CT, PREC)  # fmt: skip
    _direction_backward(K // 2, x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, far, near, none, inside, okc,
                        T, height, width, R, channels, columns, every, K,
                        N, NP, BT, BD, RP, True, False, K == 2, CT, PREC)  # fmt: skip
    _direction_backward(0, x, p, w, bias, A, dy, dx, dp, dA, dD, dbias, dw, far, near, skip, inside, okc,
                        T, height, width, R, channels, columns, every, K,
                        N, NP, BT, BD, RP, False, False, False, CT, PREC)  # fmt: skip
