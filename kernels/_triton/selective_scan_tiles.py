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
def softplus_slope(v):
    """The derivative of softplus, 1 / (1 + exp(-v)), without overflow."""
    z = _decayed(v)
    return tl.where(v >= 0, 1.0, z) / (1.0 + z)


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
def times(i, T, height, width, BT: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr):
    """Time positions (BT,) of tile i and the tokens there; column-major time over a map of (height, width)."""
    pos = i * BT + tl.arange(0, BT)
    token = T - 1 - pos if REVERSE else pos
    if COLUMN:
        token = (token % height) * width + token // height
    return pos, token


@triton.jit
def at(base, token, channel, stride_t, stride_d, TLAST: tl.constexpr, UNIT: tl.constexpr):
    """Addresses (BT, BD); with TLAST tokens are contiguous and channel strides are in units of UNIT."""
    if TLAST:
        return base + (channel * (stride_d * UNIT))[None, :] + token[:, None]
    else:
        return base + (token * stride_t)[:, None] + (channel * stride_d)[None, :]


@triton.jit
def load_steps(d, token, channel, live, okc, R, stride_t, stride_d,
               RP: tl.constexpr, TLAST: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """What step sizes come from: themselves (BT, BD), or with RP their factor of low rank (BT, RP)."""
    if RP > 0:
        r = tl.arange(0, RP)
        return tl.load(d + (token * stride_t)[:, None] + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    else:
        mask = live[:, None] & okc[None, :]
        return tl.load(at(d, token, channel, stride_t, stride_d, TLAST, UNIT), mask=mask, other=0.0)


@triton.jit
def raw_steps(loaded, wt, bias, RP: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """Step sizes (BT, BD) before softplus in fp32 from what `load_steps` gave; wt is (RP, BD)."""
    if RP > 0:
        return mm(loaded.to(tl.float32), wt, CT, PREC) + bias[None, :]
    else:
        return loaded.to(tl.float32) + bias[None, :]


@triton.jit
def final_steps(raw, live, SOFTPLUS: tl.constexpr):
    """Step sizes, 0 behind the end."""
    step = softplus(raw) if SOFTPLUS else raw
    return tl.where(live[:, None], step, 0.0)


@triton.jit
def scan_tile(a, b, entering, pos, i, BT: tl.constexpr):
    """States (BT, BD) after each token of tile i, with the state (BD,) that enters it."""
    first = (pos == i * BT)[:, None]
    return tl.associative_scan((a, tl.where(first, a * entering[None, :] + b, b)), 0, _compose)[1]


@triton.jit
def last_row(x, pos, i, BT: tl.constexpr):
    """Row BT - 1 of a tile."""
    return tl.sum(tl.where((pos == i * BT + BT - 1)[:, None], x, 0.0), 0)


@triton.jit
def forward_pass(u, d, wt, bias, skip, A, B, C, y, channel, okc, T, height, width, R,
                 su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n, sy_t, sy_d,
                 N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                 SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                 TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Scan one sequence and write the outputs, or unless FIRST add them to those of an earlier pass.

    u, d, B, C, y point at the sequence (d and the strides sd at the factor of low rank with RP), A at (channels, N) fp32.
    skip (BD,) multiplies u.
    """
    states = tl.zeros((NP, BD), tl.float32)
    pos, token = times(0, T, height, width, BT, REVERSE, COLUMN)
    live = pos < T
    mask = live[:, None] & okc[None, :]
    u_next = tl.load(at(u, token, channel, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0)
    d_next = load_steps(d, token, channel, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
    for i in range(tl.cdiv(T, BT)):
        x = u_next.to(tl.float32)
        d_tile = d_next
        out_at = at(y, token, channel, sy_t, sy_d, TLAST, UNIT)
        here, here_pos, here_live, here_mask = token, pos, live, mask
        if not FIRST:
            y_before = tl.load(out_at, mask=mask, other=0.0)
        # The next tile's loads run while this one is computed; behind the end they are masked.
        pos, token = times(i + 1, T, height, width, BT, REVERSE, COLUMN)
        live = pos < T
        mask = live[:, None] & okc[None, :]
        u_next = tl.load(at(u, token, channel, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0)
        d_next = load_steps(d, token, channel, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)

        step = final_steps(raw_steps(d_tile, wt, bias, RP, CT, PREC), here_live, SOFTPLUS)
        drive = step * x
        acc = x * skip[None, :]
        for n in tl.static_range(N):
            An = tl.load(A + channel * N + n, mask=okc, other=0.0) * LOG2E
            Bn = tl.load(B + here * sb_t + n * sb_n, mask=here_live, other=0.0).to(tl.float32)
            Cn = tl.load(C + here * sc_t + n * sc_n, mask=here_live, other=0.0).to(tl.float32)
            h = scan_tile(tl.exp2(step * An[None, :]), drive * Bn[:, None], pick(states, n), here_pos, i, BT)
            states = put(states, n, last_row(h, here_pos, i, BT))
            acc += h * Cn[:, None]
        if not FIRST:
            acc += y_before.to(tl.float32)
        tl.store(out_at, acc.to(y.dtype.element_ty), mask=here_mask)


@triton.jit
def states_at_tiles(u, d, wt, bias, A, B, kept, states, start, end, channel, okc, T, height, width, R,
                    su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, every,
                    N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr,
                    TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Run through tiles [start, end) and keep the states (NP, BD) that enter every `every`-th of them, from start on."""
    index = tl.arange(0, NP)
    kept += (index * k_n)[:, None] + channel[None, :]
    ok_kept = (index < N)[:, None] & okc[None, :]
    tl.store(kept, states, mask=ok_kept)
    for i in range(start, end - 1):
        pos, token = times(i, T, height, width, BT, REVERSE, COLUMN)
        live = pos < T
        mask = live[:, None] & okc[None, :]
        x = tl.load(at(u, token, channel, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
        d_tile = load_steps(d, token, channel, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
        step = final_steps(raw_steps(d_tile, wt, bias, RP, CT, PREC), live, SOFTPLUS)
        drive = step * x
        for n in tl.static_range(N):
            An = tl.load(A + channel * N + n, mask=okc, other=0.0) * LOG2E
            Bn = tl.load(B + token * sb_t + n * sb_n, mask=live, other=0.0).to(tl.float32)
            h = scan_tile(tl.exp2(step * An[None, :]), drive * Bn[:, None], pick(states, n), pos, i, BT)
            states = put(states, n, last_row(h, pos, i, BT))
        done = i + 1 - start
        if done % every == 0:
            tl.store(kept + (done // every) * k_tile, states, mask=ok_kept)


@triton.jit
def backward_tile(i, u, d, wt, bias, skip, A, B, C, dy, du, dd, dB, dC, entering, adjoint, dA, dskip, dbias, dw,
                  channel, okc, T, height, width, R, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, so_t, so_d, se_t, se_d, sp_t, sp_n, k_n,
                  N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                  SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                  TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients at the tokens of tile i; `entering` points at the states that enter it.

    Writes du (strides so), and ddelta (se) with parts of dB and dC over this block of channels (sp), or with RP the
    part of the gradient of the rows [dt | B | C] (se_t). Returns the sums so far of the parameters' gradients and the
    adjoint (NP, BD): decay times gradient of the state, handed to the tile before.
    """
    pos, token = times(i, T, height, width, BT, REVERSE, COLUMN)
    live = pos < T
    mask = live[:, None] & okc[None, :]
    x = tl.load(at(u, token, channel, su_t, su_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
    g_out = tl.load(at(dy, token, channel, sg_t, sg_d, TLAST, UNIT), mask=mask, other=0.0).to(tl.float32)
    d_tile = load_steps(d, token, channel, live, okc, R, sd_t, sd_d, RP, TLAST, UNIT)
    if not FIRST:
        du_before = tl.load(at(du, token, channel, so_t, so_d, TLAST, UNIT), mask=mask, other=0.0)
    raw = raw_steps(d_tile, wt, bias, RP, CT, PREC)
    step = final_steps(raw, live, SOFTPLUS)
    drive = step * x
    ddrive = tl.zeros((BT, BD), tl.float32)
    dstep = tl.zeros((BT, BD), tl.float32)
    first = (pos == i * BT)[:, None]
    if RP > 0:
        r = tl.arange(0, RP)
        rows = tl.zeros((BT, RP), tl.float32)
    for n in tl.static_range(N):
        An = tl.load(A + channel * N + n, mask=okc, other=0.0)
        Bn = tl.load(B + token * sb_t + n * sb_n, mask=live, other=0.0).to(tl.float32)
        Cn = tl.load(C + token * sc_t + n * sc_n, mask=live, other=0.0).to(tl.float32)
        a = tl.exp2(step * (An * LOG2E)[None, :])
        b = drive * Bn[:, None]
        h = scan_tile(a, b, tl.load(entering + n * k_n + channel, mask=okc, other=0.0), pos, i, BT)
        # Backwards in time the tile's last row comes first, and takes what the next tile hands over.
        c = flip_rows(g_out * Cn[:, None])
        c = tl.where(first, c + pick(adjoint, n)[None, :], c)
        g = flip_rows(
            tl.associative_scan((tl.full((BT, BD), 1.0, tl.float32), c, flip_rows(a)), 0, _compose_adjoint)[1]
        )
        adjoint = put(adjoint, n, tl.sum(tl.where(first, a * g, 0.0), 0))
        if RP > 0:
            # Sums over channels as products, each into its own column of the row [dt | B | C].
            rows += mm(drive * g, ((r == R + n)[None, :] & okc[:, None]).to(tl.float32), CT, PREC)
            rows += mm(g_out * h, ((r == R + N + n)[None, :] & okc[:, None]).to(tl.float32), CT, PREC)
        else:
            tl.store(dB + token * sp_t + n * sp_n, tl.sum(drive * g, 1), mask=live)
            tl.store(dC + token * sp_t + n * sp_n, tl.sum(g_out * h, 1), mask=live)
        ddrive += g * Bn[:, None]
        through = g * (h - b)  # gradient times what the decay let through
        dstep += through * An[None, :]
        dA = put(dA, n, pick(dA, n) + tl.sum(through * step, 0))
    dx = ddrive * step + g_out * skip[None, :]
    if not FIRST:
        dx += du_before.to(tl.float32)
    tl.store(at(du, token, channel, so_t, so_d, TLAST, UNIT), dx.to(du.dtype.element_ty), mask=mask)
    dstep += ddrive * x
    if SOFTPLUS:
        dstep *= softplus_slope(raw)
    dstep = tl.where(live[:, None], dstep, 0.0)
    dskip += tl.sum(g_out * x, 0)
    dbias += tl.sum(dstep, 0)
    if RP > 0:
        rows += mm(dstep, tl.trans(wt), CT, PREC)
        tl.store(dd + (token * se_t)[:, None] + r[None, :], rows, mask=live[:, None] & (r < R + 2 * N)[None, :])
        dw += mm(tl.trans(dstep), d_tile.to(tl.float32), CT, PREC)
    else:
        tl.store(at(dd, token, channel, se_t, se_d, TLAST, UNIT), dstep.to(dd.dtype.element_ty), mask=mask)
    return adjoint, dA, dskip, dbias, dw


@triton.jit
def backward_pass(u, d, wt, bias, skip, A, B, C, dy, du, dd, dB, dC, far, near, dA_out, dskip_out, dbias_out, dw_out,
                  channel, okc, T, height, width, R, every, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                  sg_t, sg_d, so_t, so_d, se_t, se_d, sp_t, sp_n, k_tile, k_n,
                  N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
                  SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, COLUMN: tl.constexpr, FIRST: tl.constexpr,
                  TLAST: tl.constexpr, UNIT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of `forward_pass`, from the last stretch of `every` tiles to the first.

    far and near are memory of this program for states, (stretches, N, channels) and (every, N, channels) fp32: states
    are recomputed up to the start of every stretch, then once more inside a stretch when its turn comes.
    """
    tiles = tl.cdiv(T, BT)
    index = tl.arange(0, NP)
    kept = (index * k_n)[:, None] + channel[None, :]
    ok_kept = (index < N)[:, None] & okc[None, :]
    states_at_tiles(u, d, wt, bias, A, B, far, tl.zeros((NP, BD), tl.float32), 0, (tiles - 1) // every * every + 1,
                    channel, okc, T, height, width, R, su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, every,
                    N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, TLAST, UNIT, CT, PREC)  # fmt: skip
    tl.debug_barrier()
    adjoint = tl.zeros((NP, BD), tl.float32)
    dA = tl.zeros((NP, BD), tl.float32)
    dskip = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    dw = tl.zeros((BD, RP if RP > 0 else 1), tl.float32)
    for back in range(tl.cdiv(tiles, every)):
        stretch = tl.cdiv(tiles, every) - 1 - back
        start = stretch * every
        end = tl.minimum(start + every, tiles)
        states = tl.load(far + stretch * k_tile + kept, mask=ok_kept, other=0.0)
        states_at_tiles(u, d, wt, bias, A, B, near, states, start, end, channel, okc, T, height, width, R,
                        su_t, su_d, sd_t, sd_d, sb_t, sb_n, k_tile, k_n, 1,
                        N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, TLAST, UNIT, CT, PREC)  # fmt: skip
        tl.debug_barrier()
        for j in range(end - start):
            i = end - 1 - j
            adjoint, dA, dskip, dbias, dw = backward_tile(
                i, u, d, wt, bias, skip, A, B, C, dy, du, dd, dB, dC, near + (i - start) * k_tile, adjoint, dA, dskip,
                dbias, dw, channel, okc, T, height, width, R, su_t, su_d, sd_t, sd_d, sb_t, sb_n, sc_t, sc_n,
                sg_t, sg_d, so_t, so_d, se_t, se_d, sp_t, sp_n, k_n,
                N, NP, BT, BD, RP, SOFTPLUS, REVERSE, COLUMN, FIRST, TLAST, UNIT, CT, PREC)  # fmt: skip
        tl.debug_barrier()
    tl.store(dA_out + channel[None, :] * N + index[:, None], dA, mask=ok_kept)
    tl.store(dskip_out + channel, dskip, mask=okc)
    tl.store(dbias_out + channel, dbias, mask=okc)
    if RP > 0:
        r = tl.arange(0, RP)
        tl.store(dw_out + channel[:, None] * R + r[None, :], dw, mask=okc[:, None] & (r < R)[None, :])
