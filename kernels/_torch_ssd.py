"""State space duality as matrix products: the path for CPUs, Apple GPUs, export, and where Triton is missing.

The sequence is cut into L chunks of at most 64 tokens. With c_i the sum of the log decays from the chunk's left edge to
token i, token j reaches token i of its chunk with weight exp(c_i - c_j), and chunks talk through P x N states. Each
exponent is a sum of log decays over an interval, hence <= 0.

Layout: the R heads of a group lie side by side, x as (B, G, L, C, R P) and states as (B, G, L, R P, N), so that one
product serves the group and B, C are never repeated. Decays are (B, G, L, C, R).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from zoo.kernels._torch_gla import (
    Direction,
    _chunked,
    _layout,
    _Packing,
    _state_adjoints,
    _states_by_loop,
    _unchunked,
)

CHUNK = 64
# Log decays as multiples of _GRID plus a remainder: sums of 64 multiples down to _LEAST are exact in fp32, so that
# differences of running sums are as exact as sums over intervals. exp(_LEAST) is below what fp32 can hold.
_GRID = 2.0**-10
_LEAST = -128.0


def ssd_fwd(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
    """Outputs (B, T, H, P) and the final state (N, H, P, N) or None."""
    with torch.autocast(x.device.type, enabled=False):
        packed = _Packing(cu_seqlens, x.shape[1]) if cu_seqlens is not None else None
        if packed is not None:
            x, dt, B, C = (packed.pad(t) for t in (x, dt, B, C))
        y, state = _forward(x, dt, A, B, C, D, initial_state)
        y = y if packed is None else packed.unpad(y)
    return y, state if output_final_state else None


def ssd_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens):
    """Gradients of x, dt, A, B, C, D (or None) and initial_state (or None)."""
    with torch.autocast(x.device.type, enabled=False):
        packed = _Packing(cu_seqlens, x.shape[1]) if cu_seqlens is not None else None
        if packed is not None:
            x, dt, B, C, dy = (packed.pad(t) for t in (x, dt, B, C, dy))
        dx, ddt, dA, dB, dC, dD, dinitial = _backward(x, dt, A, B, C, D, initial_state, dy, dfinal)
        if packed is not None:
            dx, ddt, dB, dC = (packed.unpad(t) for t in (dx, ddt, dB, dC))
    return dx, ddt, dA, dB, dC, dD, None if initial_state is None else dinitial.to(initial_state.dtype)


def export_ssd(x, dt, A, B, C, D, initial_state):
    """Forward for `torch.export`: no loop over chunks, any length at run time.

    The states come from an L x L matrix of chunk decays, so memory grows with (T / 64) ** 2: fine to about 16k tokens.
    """
    length = x.shape[1]
    if isinstance(length, int):
        chunk, pad = _layout(length, CHUNK)
    else:
        # At least two chunks, as tracing would single out one; no remainder, which symbolic shapes are slow with.
        chunk, pad = CHUNK, ((length - 1) // CHUNK + 2) * CHUNK - length
    return _forward(x, dt, A, B, C, D, initial_state, (chunk, pad))


def ssd_step(x, dt, A, B, C, state, D):
    """One token: y (B, H, P) in x's dtype and the new state (B, H, P, N)."""
    with torch.autocast(x.device.type, enabled=False):
        return _step(x, dt, A, B, C, state, D)


def _step(x, dt, A, B, C, state, D):
    xs, dts, Bs, Cs = (t.to(state.dtype) for t in (x, dt, B, C))
    decay = (dts * A.to(state.dtype)).exp()[..., None, None]
    write = _by_group((xs * dts.unsqueeze(-1)).unsqueeze(-1), B.shape[1]) * Bs[:, :, None, None, :]
    new = torch.addcmul(write.flatten(1, 2), state, decay)
    y = (_by_group(new, C.shape[1]).flatten(2, 3) @ Cs.unsqueeze(-1)).reshape(x.shape)
    return (y if D is None else torch.addcmul(y, xs, D.to(y.dtype)[:, None])).to(x.dtype), new


def ssd_step_(x, dt, A, B, C, state, D):
    """`ssd_step` that overwrites the state; y alone."""
    y, new = ssd_step(x, dt, A, B, C, state, D)
    state.copy_(new)
    return y


def ssd_step_bwd(x, dt, A, B, C, state, D, dy, dnew):
    """Gradients of x, dt, A, B, C, state and D (or None)."""
    with torch.autocast(x.device.type, enabled=False):
        return _step_backward(x, dt, A, B, C, state, D, dy, dnew)


def _step_backward(x, dt, A, B, C, state, D, dy, dnew):
    dtype = state.dtype
    xs, dts, rate, Bs, Cs, dys = (t.to(dtype) for t in (x, dt, A, B, C, dy))
    decay = (dts * rate).exp()
    new = _step(xs, dts, rate, Bs, Cs, state, None)[1]
    dys_c = _by_group(dys, C.shape[1]).unsqueeze(-1)
    dstate = dnew + (dys_c * Cs[:, :, None, None, :]).flatten(1, 2)
    dC = (dys_c * _by_group(new, C.shape[1])).sum((2, 3))
    dstate_b = _by_group(dstate, B.shape[1])
    dB = (_by_group(dts.unsqueeze(-1) * xs, B.shape[1]).unsqueeze(-1) * dstate_b).sum((2, 3))
    dvalue = (dstate_b @ Bs[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
    dlog = decay * (state * dstate).sum((-1, -2))
    dx = dts.unsqueeze(-1) * dvalue
    dx = dx if D is None else torch.addcmul(dx, dys, D.to(dtype)[:, None])
    ddt = (dvalue * xs).sum(-1) + dlog * rate
    grads = dx, ddt, (dlog * dts).sum(0), dB, dC, decay[..., None, None] * dstate
    dD = None if D is None else (dys * xs).sum((0, 2)).to(D.dtype)
    return *(g.to(t.dtype) for g, t in zip(grads, (x, dt, A, B, C, state))), dD


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, H, ...) to (B, G, H / G, ...)."""
    return x.unflatten(1, (groups, -1))


class _Chunks:
    """The arguments in chunks, and their decays.

    Shapes: x (B, G, L, C, R P); B, C (B, G, L, C, N); dt (B, G, L, C, R); reach = exp(c_i) and rest = exp(c_C - c_j)
    like dt; log_total (B, G, L, R); pair (B, G, R, L, C, C) = exp(c_i - c_j) at and below the diagonal, 0 above it.
    """

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, layout: tuple[int, int]):
        self.groups = math.lcm(B.shape[2], C.shape[2])
        self.heads, self.dim = x.shape[2] // self.groups, x.shape[3]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.layout = layout
        self.x, self.dt = self.cut(x.flatten(2)), self.cut(dt)
        B, C = (t if t.shape[2] == self.groups else t.repeat_interleave(self.groups // t.shape[2], 2) for t in (B, C))
        self.B, self.C = self.cut(B.flatten(2)), self.cut(C.flatten(2))
        self.A = A.to(self.dtype).view(self.groups, 1, 1, self.heads)
        log = (self.dt * self.A).clamp(min=_LEAST)
        coarse = (log / _GRID).round() * _GRID
        sums = [part.cumsum(-2) for part in (coarse, log - coarse)]
        self.reach = (sums[0] + sums[1]).exp()
        self.rest = sum(s[..., -1:, :] - s for s in sums).exp()
        self.log_total = log.sum(-2)
        rows = [s.movedim(-1, 2) for s in sums]
        gaps = sum(s.unsqueeze(-1) - s.unsqueeze(-2) for s in rows)
        self.lower = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=x.device).tril()
        self.pair = torch.where(self.lower, gaps, float('-inf')).exp()

    def cut(self, x: Tensor) -> Tensor:
        """(B, T, G X) to (B, G, L, C, X) in the compute dtype; padding tokens are zero."""
        return _chunked(x.unflatten(-1, (self.groups, -1)), *self.layout, self.dtype)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """(..., C, R P) times a factor per head (..., C, R)."""
        return (x.unflatten(-1, (self.heads, -1)) * factor.unsqueeze(-1)).flatten(-2)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, G, L, C, R P) to (B, G, R, L, C, P)."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 2)

    def side_by_side(self, x: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        return x.movedim(2, -2).flatten(-2)

    def per_head(self, x: Tensor) -> Tensor:
        """Sum over P: (..., C, R P) to (..., C, R)."""
        return x.unflatten(-1, (self.heads, -1)).sum(-1)

    def column_dt(self) -> Tensor:
        """dt_j as a factor of C x C matrices: (B, G, R, L, 1, C)."""
        return self.dt.movedim(-1, 2).unsqueeze(-2)

    def written(self) -> Tensor:
        """What each chunk adds to the state: (B, G, L, R P, N)."""
        return self.scaled(self.x, self.rest * self.dt).mT @ self.B

    def direction(self) -> Direction:
        """The decays of whole chunks, as the passes over states take them."""
        total = self.log_total.exp().repeat_interleave(self.dim, -1)
        one = total.new_ones(()).expand_as(total)
        return Direction(False, True, total, entry=one, exit=one, total=total)

    def join(self, x: Tensor, length: int) -> Tensor:
        """(B, G, L, C, X) to (B, T, G X)."""
        return _unchunked(x)[:, :length].flatten(2)


def _grouped_state(state: Tensor | None, groups: int) -> Tensor | None:
    """(B, H, P, N) to (B, G, R P, N)."""
    return None if state is None else state.unflatten(1, (groups, -1)).flatten(2, 3)


def _states_by_matrix(written: Tensor, chunks: _Chunks, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_states_by_loop` without a loop: a matrix of the decays between all pairs of chunks."""
    log = chunks.log_total.double()  # doubles: differences of long cumulative sums follow
    upto = log.cumsum(2)
    before = upto - log
    gaps = before.unsqueeze(3) - upto.unsqueeze(2)  # (B, G, L to, L from, R)
    positions = torch.arange(log.shape[2], device=log.device)
    earlier = (positions[:, None] > positions[None, :])[..., None]
    decay = torch.where(earlier, gaps, float('-inf')).exp().to(written.dtype)
    by_head = written.unflatten(3, (chunks.heads, -1))
    states = torch.einsum('bgnmr,bgmrps->bgnrps', decay, by_head)
    if initial is not None:
        first = initial.to(written.dtype).unflatten(2, (chunks.heads, -1)).unsqueeze(2)
        states = states + before.exp().to(written.dtype)[..., None, None] * first
    last = states[:, :, -1] * log[:, :, -1].exp().to(written.dtype)[..., None, None] + by_head[:, :, -1]
    return states.flatten(3, 4), last.flatten(2, 3)


def _forward(x, dt, A, B, C, D, initial_state, matrix_layout=None) -> tuple[Tensor, Tensor]:
    """y and the final state; a given chunk layout stands for the form without a loop."""
    batch, length, heads, dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0 or B.numel() == 0:
        empty = x.new_zeros(batch, heads, dim, B.shape[-1], dtype=dtype)
        y = torch.zeros_like(x) if D is None else (x * D[:, None]).to(x.dtype)
        return y, empty if initial_state is None else initial_state.to(dtype).clone()
    c = _Chunks(x, dt, A, B, C, matrix_layout or _layout(length, CHUNK))
    initial = _grouped_state(initial_state, c.groups)
    if matrix_layout is None:
        states, final = _states_by_loop(c.written(), c.direction(), initial)
    else:
        states, final = _states_by_matrix(c.written(), c, initial)
    weights = (c.C @ c.B.mT).unsqueeze(2) * c.pair * c.column_dt()
    y = c.side_by_side(weights @ c.by_head(c.x))
    if initial_state is not None or matrix_layout is not None or states.shape[2] > 1:
        y = y + c.scaled(c.C @ states.mT, c.reach)
    y = c.join(y, length).unflatten(-1, (heads, dim))
    y = y if D is None else torch.addcmul(y, x.to(dtype), D.to(dtype)[:, None])
    return y.to(x.dtype).contiguous(), final.unflatten(2, (c.heads, dim)).flatten(1, 2)


def _backward(x, dt, A, B, C, D, initial_state, dy, dfinal):
    batch, length, heads, dim = x.shape
    if x.numel() == 0 or B.numel() == 0:
        dx, *zeros = [None if t is None else torch.zeros_like(t) for t in (x, dt, A, B, C)]
        dD = None
        if D is not None:
            dx, dD = (dy * D[:, None]).to(x.dtype), (dy * x).sum((0, 1, 3)).to(D.dtype)
        dinitial = initial_state if dfinal is None else dfinal
        return dx, *zeros, dD, None if dinitial is None else dinitial * (dfinal is not None)
    c = _Chunks(x, dt, A, B, C, _layout(length, CHUNK))
    dyc = c.cut(dy.flatten(2))
    states, _ = _states_by_loop(c.written(), c.direction(), _grouped_state(initial_state, c.groups))
    read = c.scaled(dyc, c.reach)
    _, dstates, dinitial = _state_adjoints(read.mT @ c.C, c.direction(), _grouped_state(dfinal, c.groups))

    scores = (c.C @ c.B.mT).unsqueeze(2) * c.pair  # of values scaled by dt
    dvalues_read = c.scaled(c.B @ dstates.mT, c.rest)
    dvalues = dvalues_read + c.side_by_side(scores.mT @ c.by_head(dyc))
    dweights = c.by_head(dyc) @ c.by_head(c.x).mT
    dscores = (dweights * c.pair * c.column_dt()).sum(2)
    dC = dscores @ c.B + read @ states
    dB = dscores.mT @ c.C + c.scaled(c.x, c.rest * c.dt) @ dstates

    # The log decay of token t acts on the pairs j < t <= i, on reads from t on and on writes before t. The pairs are
    # summed without the others, which would have to cancel.
    lower = c.lower.to(c.dtype)
    pairs = (lower.mT @ (dweights * scores * c.column_dt())).tril_(-1).sum(-1).movedim(2, -1)
    reads = c.per_head(read * (c.C @ states.mT))
    writes = c.dt * c.per_head(c.x * dvalues_read)
    held = c.log_total.exp() * (states * dstates).unflatten(3, (c.heads, -1)).sum((-1, -2))
    dlog = pairs + lower.mT @ reads + lower.tril(-1) @ writes + held.unsqueeze(-2)

    ddt = c.per_head(c.x * dvalues) + dlog * c.A
    dA = (dlog * c.dt).sum((0, 2, 3)).flatten()
    dx = c.join(c.scaled(dvalues, c.dt), length).unflatten(-1, (heads, dim))
    dD = None
    if D is not None:
        dyf = dy.to(c.dtype)
        dD = (dyf * x).sum((0, 1, 3)).to(D.dtype)
        dx = torch.addcmul(dx, dyf, D.to(c.dtype)[:, None])
    dB, dC = (
        c.join(g, length).unflatten(-1, (t.shape[2], -1, t.shape[3])).sum(3).to(t.dtype) for g, t in ((dB, B), (dC, C))
    )
    ddt = c.join(ddt, length).to(dt.dtype).contiguous()
    dinitial = dinitial.unflatten(2, (c.heads, dim)).flatten(1, 2)
    return dx.to(x.dtype).contiguous(), ddt, dA.to(A.dtype), dB, dC, dD, dinitial
