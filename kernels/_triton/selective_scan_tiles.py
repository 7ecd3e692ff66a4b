"""One direction of a selective scan for one block of channels: what the kernels along sequences and maps share.

A program is one warp with a channel (or a few) in each lane, and walks through time in tiles of BT tokens. Nothing says
where a lane's part of a tile starts, as strides are plain integers, so loads put neighbouring channels in neighbouring
lanes and a tile's tokens in one lane's registers. There a scan over tokens is a chain of multiply-adds, and reversing a
tile is renaming registers: no shuffles, no shared memory, no barriers. Sequences with contiguous tokens instead of
channels keep 16 bytes of tokens in a lane, to the same effect.

Time position j of a reversed scan is token T - 1 - j: padding is always at the end of the scan, with step 0 (keep the
state, add nothing). States (NP, BD) are picked by masked sums, which are free, as the index is known at compile time.
"""

import triton
import triton.language as tl
from zoo.kernels._triton._common import LOG2E, mm


@triton.jit
def _decayed(v):
    """exp(-|v|)."""
    return tl.exp2(tl.abs(v) * -LOG2E)


@triton.jit
def softplus(v):
    """max(v, 0) + log(1 + z), z = exp(-|v|), relative error 3e-7: log(1 + z) / z is a polynomial on [0, 1]."""
    z = _decayed(v)
    p = z * -0.00837115291506052 + 0.04349390044808388
    p = p * z - 0.1068500280380249
    p = p * z + 0.1768747717142105
    p = p * z - 0.24474774301052094
    p = p * z + 0.3327192962169647
    p = p * z - 0.49997174739837646
    p = p * z + 0.9999997615814209
    return tl.maximum(v, 0.0) + z * p


@triton.jit
def softplus_slope(s):
    """The derivative of softplus from its value s: 1 - exp(-s), by its series where that would cancel."""
    p = 1.0 - s * (1.0 / 6.0) * (1.0 - s * (1.0 / 7.0))
    p = 1.0 - s * (1.0 / 4.0) * (1.0 - s * (1.0 / 5.0) * p)
    p = s * (1.0 - s * (1.0 / 2.0) * (1.0 - s * (1.0 / 3.0) * p))
    return tl.where(s < 0.25, p, 1.0 - _decayed(s))


@triton.jit
def _compose(a1, h1, a2, h2):
    """h -> a h + b, first (a1, h1), then (a2, h2)."""
    return a2 * a1, a2 * h1 + h2


@triton.jit
def _compose_adjoint(m1, g1, a1, m2, g2, a2):
    """g_t = c_t + a_{t+1} g_{t+1}, walked backwards in time, with a_t kept for the token before.

    An element is (1, c_t, a_t); m is the product of the decays between the ends, the last one not included.
    """
    return m2 * a1 * m1, g2 + m2 * a1 * g1, a2


@triton.jit
def flip_rows(x):
    """Reverse a tile (2 ** k, D) of fp32 along its first axis, bit by bit of the row index.

    Two numbers swap as (a + b) - a in wrapping integers, which the compiler sees through.
    """
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    y = x.to(tl.int32, bitcast=True)
    if R == 16:
        y = tl.reshape(y, (2, 2, 2, 2, D))
        for i in tl.static_range(4):
            y = (tl.sum(y, i, keep_dims=True) - y).to(tl.int32)
    else:
        tl.static_assert(R == 8)
        y = tl.reshape(y, (2, 2, 2, D))
        for i in tl.static_range(3):
            y = (tl.sum(y, i, keep_dims=True) - y).to(tl.int32)
    return tl.reshape(y, (R, D)).to(tl.float32, bitcast=True)


@triton.jit
def pick(states, n):
    """Row n of (NP, BD)."""
    index = tl.arange(0, states.shape[0])
    return tl.sum(tl.where(index[:, None] == n, states, 0.0), 0)


@triton.jit
def put(states, n, row):
    """(NP, BD) with row n replaced."""
    index = tl.arange(0, states.shape[0])
    return tl.where(index[:, None] == n, row[None, :], states)


@triton.jit
def tile_tokens(i, T, height, width, BT: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr,
                COLUMN: tl.constexpr):  # fmt: skip
    """Where tile i is: a first token, the others' distances from it (BT,), and which exist.

    Kept apart so that distances are compile-time constants in addresses where strides are. Column-major time is over a
    map of (height, width).
    """
    j = tl.arange(0, BT)
    start = i * BT
    live = j < BT if EVEN else start + j < T
    if COLUMN:
        pos = T - 1 - start - j if REVERSE else start + j
        return 0, (pos % height) * width + pos // height, live
    else:
        return (T - 1 - start if REVERSE else start), (0 - j if REVERSE else j), live


@triton.jit
def at(base, origin, token, lane, stride_t, stride_d, TLAST: tl.constexpr, UNIT: tl.constexpr):
    """Addresses (BT, BD); with TLAST tokens are contiguous and channel strides are in units of UNIT."""
    if TLAST:
        return base + origin + ((lane * (stride_d * UNIT))[None, :] + token[:, None])
    else:
        return base + origin * stride_t + ((token * stride_t)[:, None] + (lane * stride_d)[None, :])


@triton.jit
def load_steps(d, origin, token, lane, live, okc, R, stride_t, stride_d,
               RP: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """What step sizes come from: themselves (BT, BD), or with RP their factor of low rank (BT, RP)."""
    if RP > 0:
        r = tl.arange(0, RP)
        return tl.load(d + origin * stride_t + ((token * stride_t)[:, None] + r[None, :]),
                       mask=live[:, None] & (r < R)[None, :], other=0.0)  # fmt: skip
    else:
        mask = live[:, None] & okc[None, :]
        return tl.load(at(d, origin, token, lane, stride_t, stride_d, TLAST, UNIT), mask=mask, other=0.0)


@triton.jit
def weight(w, lane, okc, R, RP: tl.constexpr):
    """The rows of (channels, R) for a block of channels, transposed: (RP, BD) fp32, zeros outside; 0 without RP."""
    if RP > 0:
        r = tl.arange(0, RP)
        ok = (r < R)[:, None] & okc[None, :]
        return tl.load(w + lane[None, :] * R + r[:, None], mask=ok, other=0.0).to(tl.float32)
    else:
        return 0


@triton.jit
def raw_steps(loaded, wt, bias, RP: tl.constexpr):
    """Step sizes (BT, BD) before softplus in fp32 from what `load_steps` gave; wt is (RP, BD).

    The product is as exact as fp32 for every input type: large step sizes would multiply the rounding of the weight.
    """
    if RP > 0:
        return mm(loaded.to(tl.float32), wt, tl.float32, 'tf32x3') + bias[None, :]
    else:
        return loaded.to(tl.float32) + bias[None, :]


@triton.jit
def final_steps(raw, live, SOFTPLUS: tl.constexpr):
    """Step sizes, 0 behind the end."""
    step = softplus(raw) if SOFTPLUS else raw
    return tl.where(live[:, None], step, 0.0)


@triton.jit
def load_states(x, origin, token, live, n, stride_t, stride_n):
    """B or C of state n: (BT,) fp32."""
    return tl.load(x + origin * stride_t + n * stride_n + token * stride_t, mask=live, other=0.0).to(tl.float32)


@triton.jit
def scan_tile(a, b, entering, BT: tl.constexpr):
    """States (BT, BD) after each token of a tile, with the state (BD,) that enters it."""
    first = (tl.arange(0, BT) == 0)[:, None]
    return tl.associative_scan((a, tl.where(first, a * entering[None, :] + b, b)), 0, _compose)[1]


@triton.jit
def last_row(x, BT: tl.constexpr):
    """Row BT - 1 of a tile."""
    return tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], x, 0.0), 0)


@triton.jit
def _advance(n, step, drive, states, A, B, origin, token, live, okc, lane, sb_t, sb_n,
             N: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """State n through a tile: its values (BT, BD) and the states after the tile."""
    An = tl.load(A + lane * N + n, mask=okc, other=0.0) * LOG2E
    Bn = load_states(B, origin, token, live, n, sb_t, sb_n)
    h = scan_tile(tl.exp2(step * An[None, :]), drive * Bn[:, None], pick(states, n), BT)
    return h, put(states, n, last_row(h, BT))


@triton.jit
def forward_pass(u, d, wt, bias, skip, A, B, C, y, lane, okc, T, height, width, R,
                 su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n, sy_t, sy_d,
                 N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                 SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                 EVEN: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr,
                 CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Scan one sequence and write the outputs, or unless FIRST add them to those of an earlier pass.

    All pointers are at the sequence and the first channel of the block (d and the strides sd at the factor of low rank
    with RP); A is (channels, N) fp32. skip (BD,) multiplies u.
    """
    tiles = tl.cdiv(T, BT)
    states = tl.zeros((NP, BD), tl.float32)
    origin, token, live = tile_tokens(0, T, height, width, BT, EVEN, REVERSE, COLUMN)
    mask = live[:, None] & okc[None, :]
    u_next = tl.load(at(u, origin, token, lane, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0)
    d_next = load_steps(d, origin, token, lane, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
    for i in range(tiles):
        x = u_next.to(tl.float32)
        raw = raw_steps(d_next, wt, bias, RP)
        # The next tile's loads run while this one is computed; the last tile loads itself once more.
        origin, token, live = tile_tokens(tl.minimum(i + 1, tiles - 1), T, height, width, BT, EVEN, REVERSE, COLUMN)
        mask = live[:, None] & okc[None, :]
        u_next = tl.load(at(u, origin, token, lane, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0)
        d_next = load_steps(d, origin, token, lane, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)

        origin, token, live = tile_tokens(i, T, height, width, BT, EVEN, REVERSE, COLUMN)
        mask = live[:, None] & okc[None, :]
        out = at(y, origin, token, lane, sy_t, sy_d, TLAST, UNIT)
        acc = x * skip[None, :]
        if not FIRST:
            acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        step = final_steps(raw, live, SOFTPLUS)
        drive = step * x
        if N <= 2:
            for n in tl.static_range(N):
                h, states = _advance(n, step, drive, states, A, B, origin, token, live, okc, lane, sb_t, sb_n, N, BT)
                acc += h * load_states(C, origin, token, live, n, sc_t, sc_n)[:, None]
        else:
            for n in range(N):
                h, states = _advance(n, step, drive, states, A, B, origin, token, live, okc, lane, sb_t, sb_n, N, BT)
                acc += h * load_states(C, origin, token, live, n, sc_t, sc_n)[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def keep_states(u, d, w, bias, A, B, kept, states, start, end, lane, okc, T, height, width, R,
                su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, every,
                N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, EVEN: tl.constexpr,
                TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Write to `kept` the states (NP, BD) that enter every `every`-th of the tiles [start, end), from start on."""
    index = tl.arange(0, NP)
    kept += (index * k_n)[:, None] + lane[None, :]
    ok_kept = (index < N)[:, None] & okc[None, :]
    tl.store(kept, states, mask=ok_kept)
    wt = weight(w, lane, okc, R, RP)
    for i in range(start, end - 1):
        origin, token, live = tile_tokens(i, T, height, width, BT, EVEN, REVERSE, COLUMN)
        mask = live[:, None] & okc[None, :]
        x = tl.load(at(u, origin, token, lane, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
        loaded = load_steps(d, origin, token, lane, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
        step = final_steps(raw_steps(loaded, wt, bias, RP), live, SOFTPLUS)
        drive = step * x
        if N <= 2:
            for n in tl.static_range(N):
                _, states = _advance(n, step, drive, states, A, B, origin, token, live, okc, lane, sb_t, sb_n, N, BT)
        else:
            for n in range(N):
                _, states = _advance(n, step, drive, states, A, B, origin, token, live, okc, lane, sb_t, sb_n, N, BT)
        done = i + 1 - start
        if done % every == 0:
            tl.store(kept + (done // every) * k_tile, states, mask=ok_kept)


@triton.jit
def _gradients(n, step, drive, g_out, entering, adjoint, dA, ddrive, dstep, rows, A, B, C, dB, dC, R,
               origin, token, live, okc, lane, sb_t, sb_n, sc_t, sc_n, sp_n, k_n,
               N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
               CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """What state n adds to the gradients of a tile; arguments and results as in `backward_tile`."""
    An = tl.load(A + lane * N + n, mask=okc, other=0.0)
    Bn = load_states(B, origin, token, live, n, sb_t, sb_n)
    Cn = load_states(C, origin, token, live, n, sc_t, sc_n)
    a = tl.exp2(step * (An * LOG2E)[None, :])
    b = drive * Bn[:, None]
    h = scan_tile(a, b, tl.load(entering + n * k_n + lane, mask=okc, other=0.0), BT)
    # Backwards in time the tile's last row comes first, and takes what the tile behind it hands over.
    first = (tl.arange(0, BT) == 0)[:, None]
    c = flip_rows(g_out * Cn[:, None])
    c = tl.where(first, c + pick(adjoint, n)[None, :], c)
    one = tl.full((BT, BD), 1.0, tl.float32)
    g = flip_rows(tl.associative_scan((one, c, flip_rows(a)), 0, _compose_adjoint)[1])
    adjoint = put(adjoint, n, tl.sum(tl.where(first, a * g, 0.0), 0))
    if RP > 0:
        # Sums over channels as products, each into its own column of the row [dt | B | C].
        r = tl.arange(0, RP)
        rows += mm(drive * g, ((r == R + n)[None, :] & okc[:, None]).to(tl.float32), CT, PREC)
        rows += mm(g_out * h, ((r == R + N + n)[None, :] & okc[:, None]).to(tl.float32), CT, PREC)
    else:
        tl.store(dB + origin + n * sp_n + token, tl.sum(drive * g, 1), mask=live)
        tl.store(dC + origin + n * sp_n + token, tl.sum(g_out * h, 1), mask=live)
    through = g * (h - b)  # gradient times what the decay let through
    dA = put(dA, n, pick(dA, n) + tl.sum(through * step, 0))
    return adjoint, dA, ddrive + g * Bn[:, None], dstep + through * An[None, :], rows


@triton.jit
def backward_tile(i, u, d, w, bias, skip, A, B, C, dy, du, dd, dB, dC, entering, adjoint, dA, dskip, dbias, dw,
                  lane, okc, T, height, width, R, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, so_t, so_d, se_t, se_d, sp_n, k_n,
                  N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                  SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                  EVEN: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr,
                  CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients at the tokens of tile i; `entering` points at the states that enter it.

    Writes du (strides so), and ddelta (se) with parts of dB and dC over this block of channels (N, T), or with RP the
    part of the gradient of the rows [dt | B | C] (se_t). Returns the sums so far of the parameters' gradients and the
    adjoint (NP, BD): decay times gradient of the state, handed to the tile before.
    """
    origin, token, live = tile_tokens(i, T, height, width, BT, EVEN, REVERSE, COLUMN)
    mask = live[:, None] & okc[None, :]
    x = tl.load(at(u, origin, token, lane, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
    g_out = tl.load(at(dy, origin, token, lane, sg_t, sg_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
    loaded = load_steps(d, origin, token, lane, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
    # The weight is loaded again where it is used: the registers between are worth more.
    raw = raw_steps(loaded, weight(w, lane, okc, R, RP), bias, RP)
    step = final_steps(raw, live, SOFTPLUS)
    drive = step * x
    ddrive = tl.zeros((BT, BD), tl.float32)
    dstep = tl.zeros((BT, BD), tl.float32)
    rows = tl.zeros((BT, RP if RP > 0 else 1), tl.float32)
    if N <= 2:
        for n in tl.static_range(N):
            adjoint, dA, ddrive, dstep, rows = _gradients(
                n, step, drive, g_out, entering, adjoint, dA, ddrive, dstep, rows, A, B, C, dB, dC, R, origin, token,
                live, okc, lane, sb_t, sb_n, sc_t, sc_n, sp_n, k_n, N, BT, BD, RP, CT, PREC)  # fmt: skip
    else:
        for n in range(N):
            adjoint, dA, ddrive, dstep, rows = _gradients(
                n, step, drive, g_out, entering, adjoint, dA, ddrive, dstep, rows, A, B, C, dB, dC, R, origin, token,
                live, okc, lane, sb_t, sb_n, sc_t, sc_n, sp_n, k_n, N, BT, BD, RP, CT, PREC)  # fmt: skip
    out = at(du, origin, token, lane, so_t, so_d, TLAST, UNIT)
    dx = ddrive * step + g_out * skip[None, :]
    if not FIRST:
        dx += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, dx.to(du.dtype.element_ty), mask=mask)
    dskip += tl.sum(g_out * x, 0)
    dstep += ddrive * x
    if SOFTPLUS:
        dstep *= softplus_slope(step)
    else:
        dstep = tl.where(live[:, None], dstep, 0.0)
    dbias += tl.sum(dstep, 0)
    if RP > 0:
        r = tl.arange(0, RP)
        rows += mm(dstep, tl.trans(weight(w, lane, okc, R, RP)), CT, PREC)
        tl.store(dd + origin * se_t + ((token * se_t)[:, None] + r[None, :]), rows,
                 mask=live[:, None] & (r < R + 2 * N)[None, :])  # fmt: skip
        dw += mm(tl.trans(dstep), loaded.to(tl.float32), CT, PREC)
    else:
        tl.store(at(dd, origin, token, lane, se_t, se_d, TLAST, UNIT), dstep.to(dd.dtype.element_ty), mask=mask)
    return adjoint, dA, dskip, dbias, dw


@triton.jit
def backward_pass(u, d, w, bias, skip, A, B, C, dy, du, dd, dB, dC, far, near, dA_out, dskip_out, dbias_out, dw_out,
                  lane, okc, T, height, width, R, every, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, so_t, so_d, se_t, se_d, sp_n, k_tile, k_n,
                  N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                  SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                  EVEN: tl.constexpr, ONE: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr,
                  CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `forward_pass`, from the last stretch of `every` tiles to the first.

    far and near are memory of this program for states, (stretches, N, channels) and (every, N, channels) fp32: states
    are recomputed up to the start of every stretch, then once more inside a stretch when its turn comes. With ONE
    there is a single stretch and no far.
    """
    tiles = tl.cdiv(T, BT)
    index = tl.arange(0, NP)
    inside = (index * k_n)[:, None] + lane[None, :]
    ok_kept = (index < N)[:, None] & okc[None, :]
    zero = tl.zeros((NP, BD), tl.float32)
    if ONE:
        stretches = 1
    else:
        stretches = tl.cdiv(tiles, every)
        keep_states(u, d, w, bias, A, B, far, zero, 0, (stretches - 1) * every + 1, lane, okc, T, height, width, R,
                    su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, every,
                    N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, EVEN, TLAST, UNIT, CT, PREC)  # fmt: skip
        tl.debug_barrier()
    adjoint = zero
    dA = zero
    dskip = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    dw = tl.zeros((BD, RP if RP > 0 else 1), tl.float32)
    for back in range(stretches):
        start = (stretches - 1 - back) * every
        end = tl.minimum(start + every, tiles)
        states = zero if ONE else tl.load(far + (stretches - 1 - back) * k_tile + inside, mask=ok_kept, other=0.0)
        keep_states(u, d, w, bias, A, B, near, states, start, end, lane, okc, T, height, width, R,
                    su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, 1,
                    N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, EVEN, TLAST, UNIT, CT, PREC)  # fmt: skip
        tl.debug_barrier()
        for j in range(end - start):
            i = end - 1 - j
            adjoint, dA, dskip, dbias, dw = backward_tile(
                i, u, d, w, bias, skip, A, B, C, dy, du, dd, dB, dC, near + (i - start) * k_tile, adjoint, dA, dskip,
                dbias, dw, lane, okc, T, height, width, R, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                sg_t, sg_d, so_t, so_d, se_t, se_d, sp_n, k_n,
                N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, FIRST, EVEN, TLAST, UNIT, CT, PREC)  # fmt: skip
        tl.debug_barrier()
    tl.store(dA_out + lane[None, :] * N + index[:, None], dA, mask=ok_kept)
    tl.store(dskip_out + lane, dskip, mask=okc)
    tl.store(dbias_out + lane, dbias, mask=okc)
    if RP > 0:
        r = tl.arange(0, RP)
        tl.store(dw_out + lane[:, None] * R + r[None, :], dw, mask=okc[:, None] & (r < R)[None, :])
