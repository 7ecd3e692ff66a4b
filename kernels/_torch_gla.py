"""Gated linear attention as matrix products: the path for CPUs, Apple GPUs, export, and where Triton is missing.

The sequence is cut into N chunks of C tokens, laid out as (B, H, N, C, D). With a_i the sum of the log gates from the
chunk's edge to token i (from the left for the forward scan, from the right for the reversed one, which makes the two
mirror images), token j reaches token i of its chunk with weight exp(a_i - a_j), and chunks talk through K x V states.

Two ways to form exp(a_i - a_j):

- fast: (q exp(a_i - a_m)) (k exp(a_m - a_j)) with the reference m in the middle of the chunk, one C x C product.
  Exponents are positive on one side; it is taken only when no half-chunk sum leaves [-60, 60], where fp32 can neither
  overflow nor lose the product to underflow.
- safe: recursive halving. At block sizes 2, 4, ..., C the reference is the boundary between a block's halves, so every
  exponent is a sum of log gates and <= 0; exact for gates of any strength. log2(C) levels of small products. Gates
  are raised to `ZERO_GATE` first, whose exponential is 0 too: sums of infinities would be NaN.

`Direction.read` multiplies the queries that read the incoming state, `Direction.write` the keys that write to the
outgoing one; the states themselves are kept at chunk edges, where all decays are <= 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FAST_LIMIT = 60.0
FAST_CHUNK = 64
SAFE_CHUNK = 64
ZERO_GATE = {torch.float32: -110.0, torch.float64: -750.0}  # log gates whose exponential is 0, denormals included
EXPORT_BASE = 16  # exported graphs halve down to blocks this long only: fewer, larger operators


@dataclass
class Direction:
    """Decays of one scan direction. All tensors end in K channels, or 1 for per-head gates; None without gates.

    Shapes: g, read, write (B, H, N, C, K); entry, exit, total (B, H, N, K).
    """

    reverse: bool
    safe: bool
    g: Tensor | None = None
    read: Tensor | None = None  # exp(a_i - reference): multiplies q
    write: Tensor | None = None  # exp(reference - a_j): multiplies k
    entry: Tensor | None = None  # exp(reference): decay of the incoming state up to the reference
    exit: Tensor | None = None  # exp(total - reference): decay from the reference to the outgoing edge
    total: Tensor | None = None  # exp(total): decay of the state across the chunk
    levels: list[tuple[int, Tensor, Tensor]] | None = None  # safe: half size, exp decay to readers, from writers

    def scaled_q(self, q: Tensor) -> Tensor:
        return q if self.read is None else self.read * q

    def scaled_k(self, k: Tensor) -> Tensor:
        return k if self.write is None else self.write * k


# --------------------------------------------------------------------------------------------------------------------
# Entry points, in the shape that the Triton module has too


def gla_fwd(q, k, v, g, scale, initial_state, output_final_state, reverse, cu_seqlens):
    """Causal op: outputs (B, T, H, V) and the final state (N, H, K, V) or None."""
    with torch.autocast(q.device.type, enabled=False):
        packed = _Packing(cu_seqlens, q.shape[1]) if cu_seqlens is not None else None
        tensors = [q, k, v, g] if packed is None else [packed.pad(x) for x in (q, k, v, g)]
        o, state = _forward(*tensors[:3], [(tensors[3], reverse)], scale, initial_state)
        o = o if packed is None else packed.unpad(o)
    return o, state if output_final_state else None


def gla_bwd(q, k, v, g, scale, initial_state, do, dfinal, reverse, cu_seqlens):
    """Gradients dq, dk, dv, dg (or None), dinitial_state (or None)."""
    with torch.autocast(q.device.type, enabled=False):
        packed = _Packing(cu_seqlens, q.shape[1]) if cu_seqlens is not None else None
        tensors = [q, k, v, g, do] if packed is None else [packed.pad(x) for x in (q, k, v, g, do)]
        grads = _backward(*tensors[:3], [(tensors[3], reverse)], scale, tensors[4], initial_state, dfinal)
        dq, dk, dv, (dg,), dinitial = grads
        if packed is not None:
            dq, dk, dv, dg = (packed.unpad(x) for x in (dq, dk, dv, dg))
    return dq, dk, dv, dg, None if initial_state is None else dinitial.to(initial_state.dtype)


def bidirectional_gla_fwd(q, k, v, g_fwd, g_bwd, scale, cu_seqlens):
    """Sum of both directions (B, T, H, V); the caller halves `scale`."""
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            return _forward(q, k, v, [(g_fwd, False), (g_bwd, True)], scale, None)[0]
        packed = _Packing(cu_seqlens, q.shape[1])
        q, k, v, g_fwd, g_bwd = (packed.pad(x) for x in (q, k, v, g_fwd, g_bwd))
        return packed.unpad(_forward(q, k, v, [(g_fwd, False), (g_bwd, True)], scale, None)[0])


def bidirectional_gla_bwd(q, k, v, g_fwd, g_bwd, scale, do, cu_seqlens):
    """Gradients dq, dk, dv, dg_fwd (or None), dg_bwd (or None)."""
    with torch.autocast(q.device.type, enabled=False):
        packed = _Packing(cu_seqlens, q.shape[1]) if cu_seqlens is not None else None
        if packed is not None:
            q, k, v, g_fwd, g_bwd, do = (packed.pad(x) for x in (q, k, v, g_fwd, g_bwd, do))
        dq, dk, dv, dgs, _ = _backward(q, k, v, [(g_fwd, False), (g_bwd, True)], scale, do, None, None)
        grads = (dq, dk, dv, *dgs)
        return grads if packed is None else tuple(packed.unpad(x) for x in grads)


def export_gla(q, k, v, gates, scale, initial_state):
    """Forward for `torch.export`: no data-dependent choice, no loop over chunks, any length at run time.

    The states come from an N x N matrix of chunk decays, so memory grows with (T / 64) ** 2: fine to about 16k tokens.
    """
    length, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    if isinstance(length, int):
        chunk, pad = _safe_layout(length)
    else:
        # At least two chunks, as tracing would single out one; no remainder, which symbolic shapes are slow with.
        chunk, pad = SAFE_CHUNK, ((length - 1) // SAFE_CHUNK + 2) * SAFE_CHUNK - length
    base = min(EXPORT_BASE, chunk)
    # Directions are batch rows, reversed ones flipped: one set of operators for both halves the graph.
    flips = [reverse for _, reverse in gates]
    stack = lambda xs: torch.cat([x.flip(1) if flip else x for x, flip in zip(xs, flips)])  # noqa: E731
    qc, kc, vc = (_chunked(stack([x] * len(flips)), chunk, pad, dtype) for x in (q, k, v))
    ungated = gates[0][0] is None
    g = None if ungated else _raised(_chunked(stack([_four_dims(g) for g, _ in gates]), chunk, pad, dtype))
    d = _safe_direction(g, False, base)
    states, state = _states_by_matrix(d.scaled_k(kc).mT @ vc, d, initial_state)
    out = _unchunked(_halving(qc, kc, d, base) @ vc + d.scaled_q(qc) @ states)[:, :length] * scale
    out = sum(o.flip(1) if flip else o for o, flip in zip(out.unflatten(0, (len(flips), -1)).unbind(), flips))
    return out.to(v.dtype), state


# --------------------------------------------------------------------------------------------------------------------
# Layout


def checked_cuts(cu_seqlens: Tensor, length: int) -> Tensor:
    """The boundaries of packed sequences in int64.

    Raises:
        ValueError: if they do not rise from 0 to `length`.
    """
    cuts = cu_seqlens.long()
    if cuts.numel() < 1 or cuts[0] != 0 or cuts[-1] != length or (cuts.diff() < 0).any():
        raise ValueError(f'cu_seqlens must rise from 0 to T = {length}, got {cuts.tolist()[:16]}')
    return cuts


class _Packing:
    """Sequences packed in one row <-> a batch padded on the right.

    Padding tokens have k = v = 0 and log gate 0: they change no output and no state, in either direction.
    """

    def __init__(self, cu_seqlens: Tensor, length: int):
        cuts = checked_cuts(cu_seqlens, length)
        lengths = cuts.diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        position = torch.arange(length, device=cuts.device)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=cuts.device), lengths)
        self.shape = (len(lengths), longest)
        self.index = row * longest + position - cuts[:-1][row]

    def pad(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return padded.index_copy_(0, self.index, x[0]).view(*self.shape, *x.shape[2:])

    def unpad(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1)[self.index][None]


def _four_dims(g: Tensor) -> Tensor:
    return g.unsqueeze(-1) if g.ndim == 3 else g


def _chunked(x: Tensor, chunk: int, pad: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, D) to (B, H, N, C, D) in the compute dtype; padding tokens are zero."""
    if not isinstance(pad, int) or pad:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).to(dtype).contiguous()


def _unchunked(x: Tensor) -> Tensor:
    """(B, H, N, C, D) to (B, N C, H, D)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _layout(length: int, target: int) -> tuple[int, int]:
    """Chunk length and padding: equal chunks of at most `target` tokens."""
    count = max(-(-length // target), 1)
    chunk = -(-length // count)
    return chunk, count * chunk - length


def _safe_layout(length: int) -> tuple[int, int]:
    """Chunk length, a power of two, and padding."""
    chunk = min(SAFE_CHUNK, 1 << max(length - 1, 0).bit_length())
    return chunk, -length % chunk


@functools.lru_cache(maxsize=64)
def _sum_matrix(chunk: int, reverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, C) matrix M with (M g)_i = a_i - a_m, the log decay from the middle of the chunk to token i."""
    inclusive = torch.ones(chunk, chunk, dtype=dtype, device=device).tril()
    if reverse:
        inclusive = inclusive.T
    return (inclusive - inclusive[chunk // 2]).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Decays


def _directions(gates, length: int, dtype: torch.dtype) -> tuple[list[Direction], int, int]:
    """Decays of every direction, all fast if that is within range, else all safe; chunk length and padding."""
    chunk, pad = _layout(length, FAST_CHUNK)
    directions = []
    for g, reverse in gates:
        d = Direction(reverse, safe=False) if g is None else _fast_direction(g, reverse, chunk, pad, dtype)
        if d is None:
            break
        directions.append(d)
    else:
        return directions, chunk, pad
    chunk = min(SAFE_CHUNK, 1 << (length - 1).bit_length())
    pad = -length % chunk
    return (
        [
            _safe_direction(None if g is None else _raised(_chunked(_four_dims(g), chunk, pad, dtype)), reverse)
            for g, reverse in gates
        ],
        chunk,
        pad,
    )


def _fast_direction(g: Tensor, reverse: bool, chunk: int, pad: int, dtype: torch.dtype) -> Direction | None:
    g = _chunked(_four_dims(g), chunk, pad, dtype)
    centred = _sum_matrix(chunk, reverse, dtype, g.device) @ g
    first, last = (-1, 0) if reverse else (0, -1)
    exit = centred[..., last, :]
    entry = g[..., first, :] - centred[..., first, :]
    # Infinite gates are NaN here and fail the comparison too; NaN gates come out of the safe path as NaN.
    if not torch.stack((entry, exit)).abs().amax() <= FAST_LIMIT:
        return None
    return Direction(
        reverse, False, g, centred.exp(), centred.neg().exp_(), entry.exp(), exit.exp(), (entry + exit).exp()
    )


def _raised(g: Tensor) -> Tensor:
    return g.clamp(min=ZERO_GATE[g.dtype])


def _safe_direction(g: Tensor | None, reverse: bool, base: int = 1) -> Direction:
    """Decays from sums of log gates within blocks of `base` tokens, merged pairwise up to the chunk.

    reach (..., blocks, W, K) is the sum from a block's entry edge to each token, rest from each token to the exit edge,
    total (..., blocks, K) across the block: sums only, no differences.
    """
    if g is None:
        return Direction(reverse, safe=True)
    blocks = g.unflatten(-2, (-1, base))
    inclusive = torch.ones(base, base, dtype=g.dtype, device=g.device)
    inclusive = inclusive.triu() if reverse else inclusive.tril()
    reach, rest, total = inclusive @ blocks, (1 - inclusive) @ blocks, blocks.sum(-2)
    source, sink = (1, 0) if reverse else (0, 1)
    levels = []
    for _ in range((g.shape[-2] // base).bit_length() - 1):
        reach, rest, total = reach.unflatten(-3, (-1, 2)), rest.unflatten(-3, (-1, 2)), total.unflatten(-2, (-1, 2))
        reaches, rests = list(reach.unbind(-3)), list(rest.unbind(-3))
        levels.append((reach.shape[-2], reaches[sink].exp(), rests[source].exp()))
        reaches[sink] = reaches[sink] + total[..., source, None, :]
        rests[source] = rests[source] + total[..., sink, None, :]
        reach, rest, total = torch.cat(reaches, -2), torch.cat(rests, -2), total.sum(-2)
    one = torch.ones_like(total[..., 0, :])
    decays = reach.squeeze(-3).exp(), rest.squeeze(-3).exp(), one, one, total.squeeze(-2).exp()
    return Direction(reverse, True, g, *decays, levels)


# --------------------------------------------------------------------------------------------------------------------
# Inside a chunk


def _masked(x: Tensor, reverse: bool) -> Tensor:
    return x.triu_() if reverse else x.tril_()


def _half_blocks(x: Tensor, half: int, which: int) -> Tensor:
    """(..., C, D) to the first or second halves of its blocks of 2 `half` tokens: (..., blocks, half, D)."""
    return x.unflatten(-2, (-1, 2, half))[..., which, :, :]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _direct(q: Tensor, k: Tensor, d: Direction, base: int) -> Tensor:
    """The matrices (..., C / base, base, base) of short blocks, one exponential per pair of tokens and channel."""
    q, k, g = (x.unflatten(-2, (-1, base)) for x in (q, k, d.g))
    allowed = torch.ones(base, base, dtype=torch.bool, device=q.device)
    allowed = allowed.triu() if d.reverse else allowed.tril()
    sums = allowed.to(g.dtype) @ g
    gaps = sums.unsqueeze(-2) - sums.unsqueeze(-3)
    decay = torch.where(allowed[..., None], gaps, float('-inf')).exp()
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)


def _halving(q: Tensor, k: Tensor, d: Direction, base: int = 1) -> Tensor:
    """The (C, C) matrix of one direction, diagonal included, by recursive halving down to blocks of `base` tokens."""
    if d.g is None:
        return (q @ k.mT).triu() if d.reverse else (q @ k.mT).tril()
    source, sink = (1, 0) if d.reverse else (0, 1)
    blocks = (q * k).sum(-1)[..., None, None] if base == 1 else _direct(q, k, d, base)
    for half, reach, rest in d.levels:
        cross = (_half_blocks(q, half, sink) * reach) @ (_half_blocks(k, half, source) * rest).mT
        first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        zero = torch.zeros_like(cross)
        upper, lower = (cross, zero) if d.reverse else (zero, cross)
        blocks = torch.cat((torch.cat((first, upper), -1), torch.cat((lower, second), -1)), -2)
    return blocks.squeeze(-3)


def _halving_backward(q: Tensor, k: Tensor, p: Tensor, d: Direction) -> tuple[Tensor, Tensor]:
    """Gradients of q and k through `_halving`, given p, the gradient of its matrix."""
    if d.g is None:
        p = p.triu() if d.reverse else p.tril()
        return p @ k, p.mT @ q
    source, sink = (1, 0) if d.reverse else (0, 1)
    diagonal = p.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dk = diagonal * k, diagonal * q
    for half, reach, rest in d.levels:
        blocks = p.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))  # (..., rows, 2, half, columns, 2, half)
        block = blocks[..., sink, :, :, source, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        q_half, k_half = _half_blocks(q, half, sink) * reach, _half_blocks(k, half, source) * rest
        _half_blocks(dq, half, sink).add_((block @ k_half) * reach)
        _half_blocks(dk, half, source).add_((block.mT @ q_half) * rest)
    return dq, dk


# --------------------------------------------------------------------------------------------------------------------
# Between chunks


def _states_by_loop(kv: Tensor, d: Direction, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States that arrive at every chunk's entry edge (B, H, N, K, V) and the one that leaves the sequence."""
    states = torch.empty_like(kv)
    state = torch.zeros_like(kv[:, :, 0]) if initial is None else initial.to(kv.dtype).clone()
    for n in _order(kv.shape[2], d.reverse):
        states[:, :, n] = state
        if d.total is None:
            state += kv[:, :, n]
        else:
            state.mul_(d.total[:, :, n, :, None]).addcmul_(kv[:, :, n], d.exit[:, :, n, :, None])
    return states, state


def _order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def _states_by_matrix(kv: Tensor, d: Direction, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_states_by_loop` of safe forward decays without a loop: a matrix of the decays between all pairs of chunks."""
    if d.g is None:
        after = kv.cumsum(2) if initial is None else kv.cumsum(2) + initial.to(kv.dtype).unsqueeze(2)
        return after - kv, after[:, :, -1]
    log_total = d.g.sum(-2).double()  # doubles: differences of long cumulative sums follow
    upto = log_total.cumsum(2)
    before = upto - log_total
    gaps = before.unsqueeze(3) - upto.unsqueeze(2)  # (B, H, N to, N from, K)
    positions = torch.arange(kv.shape[2], device=kv.device)
    earlier = (positions[:, None] > positions[None, :])[..., None]
    decay = torch.where(earlier, gaps, float('-inf')).exp().to(kv.dtype).expand(-1, -1, -1, -1, kv.shape[-2])
    states = torch.einsum('bhnmk,bhmkv->bhnkv', decay, kv)
    if initial is not None:
        states = states + before.exp().to(kv.dtype).unsqueeze(-1) * initial.to(kv.dtype).unsqueeze(2)
    final = states[:, :, -1] * log_total[:, :, -1].exp().to(kv.dtype).unsqueeze(-1) + kv[:, :, -1]
    return states, final


# --------------------------------------------------------------------------------------------------------------------
# Forward and backward


def _forward(q, k, v, gates, scale, initial_state) -> tuple[Tensor, Tensor | None]:
    length, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or v.numel() == 0:
        empty = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
        return torch.zeros_like(v), empty if initial_state is None else initial_state.to(dtype).clone()
    directions, chunk, pad = _directions(gates, length, dtype)
    qc, kc, vc = (_chunked(x, chunk, pad, dtype) for x in (q, k, v))
    matrix, out, state = None, None, None
    for d in directions:
        qs, ks = d.scaled_q(qc), d.scaled_k(kc)
        inner = _halving(qc, kc, d) if d.safe else _masked(qs @ ks.mT, d.reverse)
        matrix = inner if matrix is None else matrix.add_(inner)
        states, state = _states_by_loop(ks.mT @ vc, d, initial_state)
        if initial_state is None and states.shape[2] == 1:
            continue
        carried = qs @ (states if d.entry is None else states.mul_(d.entry.unsqueeze(-1)))
        out = carried if out is None else out.add_(carried)
    out = matrix @ vc if out is None else out.add_(matrix @ vc)
    out = _unchunked(out)[:, :length]
    return torch.mul(out, scale, out=torch.empty(v.shape, dtype=dtype, device=v.device)).to(v.dtype), state


def _backward(q, k, v, gates, scale, do, initial_state, dfinal):
    """dq, dk, dv, one dg per direction (or None), gradient of the initial state."""
    length, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or v.numel() == 0:
        dgs = [None if g is None else torch.zeros_like(g) for g, _ in gates]
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dgs, dfinal
    directions, chunk, pad = _directions(gates, length, dtype)
    qc, kc, vc, doc = (_chunked(x, chunk, pad, dtype) for x in (q, k, v, do))
    doc = doc * scale  # not in place: the layout may be a view of the caller's tensor
    p = doc @ vc.mT  # gradient of the C x C matrix
    dq, dk, dv, dgs, dstate = torch.zeros_like(qc), torch.zeros_like(kc), torch.zeros_like(vc), [], None
    for d, (g, _) in zip(directions, gates):
        qs, ks = d.scaled_q(qc), d.scaled_k(kc)
        kv = ks.mT @ vc
        states, final = _states_by_loop(kv, d, initial_state)
        dstates, douts, dstate = _state_adjoints(qs.mT @ doc, d, dfinal)
        dwritten = douts if d.exit is None else douts * d.exit.unsqueeze(-1)
        dv += ks @ dwritten
        dqs = doc @ (states if d.entry is None else states * d.entry.unsqueeze(-1)).mT
        dks = vc @ dwritten.mT
        if d.safe:
            dv += _halving(qc, kc, d).mT @ doc
            dq_inner, dk_inner = _halving_backward(qc, kc, p, d)
            dq_d, dk_d = dq_inner.add_(_times(dqs, d.read)), dk_inner.add_(_times(dks, d.write))
        else:
            dv += _masked(qs @ ks.mT, d.reverse).mT @ doc
            p_d = _masked(p.clone(), d.reverse)
            dq_d = _times(dqs.add_(p_d @ ks), d.read)
            dk_d = _times(dks.add_(p_d.mT @ qs), d.write)
        dq += dq_d
        dk += dk_d
        dgs.append(None if g is None else _gate_gradient(qc, kc, dq_d, dk_d, states, final, douts, d, g, length))
    cut = lambda x, like: _unchunked(x)[:, :length].to(like.dtype).contiguous()  # noqa: E731
    return cut(dq, q), cut(dk, k), cut(dv, v), dgs, dstate


def _state_adjoints(dread: Tensor, d: Direction, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoints of the states entering (B, H, N, K, V) and leaving every chunk, and of the initial state.

    dread is the gradient through the chunk's own read-out, of the state decayed to the reference.
    """
    entering, leaving = torch.empty_like(dread), torch.empty_like(dread)
    state = torch.zeros_like(dread[:, :, 0]) if dfinal is None else dfinal.to(dread.dtype).clone()
    for n in _order(dread.shape[2], not d.reverse):
        leaving[:, :, n] = state
        if d.total is None:
            state += dread[:, :, n]
        else:
            state.mul_(d.total[:, :, n, :, None]).addcmul_(dread[:, :, n], d.entry[:, :, n, :, None])
        entering[:, :, n] = state
    return entering, leaving, state


def _gate_gradient(qc, kc, dq, dk, states, final, dleaving, d: Direction, g: Tensor, length: int) -> Tensor:
    """dg_t = sum over the tokens from t to the chunk's exit of (q dq - k dk) + sum_v (state * its adjoint) at the exit.

    The exit term is invariant to where both are referenced, so no cumulative sum runs over the whole sequence.
    """
    leaving = torch.cat(
        (final.unsqueeze(2), states[:, :, :-1]) if d.reverse else (states[:, :, 1:], final.unsqueeze(2)), 2
    )
    h = torch.addcmul(qc * dq, kc, dk, value=-1)
    at_exit = (leaving * dleaving).sum(-1)
    if g.ndim == 3:
        h, at_exit = h.sum(-1, keepdim=True), at_exit.sum(-1, keepdim=True)
    toward_exit = torch.ones(h.shape[-2], h.shape[-2], dtype=h.dtype, device=h.device)
    toward_exit = toward_exit.tril() if d.reverse else toward_exit.triu()
    dg = _unchunked(toward_exit @ h + at_exit.unsqueeze(-2))[:, :length].to(g.dtype)
    return (dg.squeeze(-1) if g.ndim == 3 else dg).contiguous()
