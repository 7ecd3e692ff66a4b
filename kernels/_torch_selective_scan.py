"""The selective scan with vector operations: the path for CPUs, Apple GPUs, export, and where Triton is missing.

Tokens lie on a grid of `outer` rows with `inner` tokens each, and time runs through the rows. One row takes `inner`
steps, all rows together; then the rows' last states are carried from row to row and added where they arrive. That is
inner + outer steps over the data instead of T, every factor is a product of decays, and nothing is divided, so nothing
can overflow. A map (H, W) is such a grid as it lies (row-major order) and transposed (column-major order), and a
reversed scan takes the same steps backwards: no order needs a permuted copy. Sequences are padded to a square grid.

Grid tensors are (B, outer, inner, G, D) for D channels in each of G groups; `B` and `C` are (B, outer, inner, G, 1) for
one state. States are taken one after the other, which keeps memory at a few tensors of the input's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXPORT_CHUNK = 16  # tokens per chunk of an exported scan over a length that is not known: unrolled in the graph
MAX_CHUNK = 32  # where it is known, about the square root of it up to this

# VMamba's order; the two directions of bidirectional models are its row-major ones.
COLUMN_MAJOR = {2: (False, False), 4: (False, True, False, True)}
REVERSED = {2: (False, True), 4: (False, False, True, True)}


@dataclass
class Grads:
    """Gradients of one scan over a grid; those of B and C are (B, outer, inner, G, N), that of A (G, D, N)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


# --------------------------------------------------------------------------------------------------------------------
# Entry points, in the shape that the Triton module has too


def selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """Outputs (B, G D, T) in u's dtype; arguments as `zoo.kernels.selective_scan.selective_scan`."""
    with torch.autocast(u.device.type, enabled=False):
        dtype = _compute_dtype(u)
        x, step, Bg, Cg = _sequence_grids(u, delta, B, C, delta_bias, delta_softplus, dtype)
        y = _scan(x, step, _by_group(A, B.shape[1], dtype), Bg, Cg, reverse)
        if D is not None:
            y.addcmul_(x, D.to(dtype).view(B.shape[1], -1))
        return _from_grid(y, u.shape[-1]).to(u.dtype)


def selective_scan_bwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, dy):
    """Gradients du, ddelta, dA, dB, dC, dD (or None), ddelta_bias (or None) in the dtypes of their inputs."""
    with torch.autocast(u.device.type, enabled=False):
        dtype, groups, length = _compute_dtype(u), B.shape[1], u.shape[-1]
        x, step, Bg, Cg = _sequence_grids(u, delta, B, C, delta_bias, delta_softplus, dtype)
        dy = _grid(dy, groups, dtype)
        grads = _scan_backward(x, step, _by_group(A, groups, dtype), Bg, Cg, reverse, dy)
        dD = None
        if D is not None:
            grads.u.addcmul_(dy, D.to(dtype).view(groups, -1))
            dD = (dy * x).sum((0, 1, 2)).flatten().to(D.dtype)
        if delta_softplus:
            grads.delta.mul_(-torch.expm1(-step))  # the derivative of softplus, from its value
        ddelta = _from_grid(grads.delta, length)
        dbias = None if delta_bias is None else ddelta.sum((0, 2)).to(delta_bias.dtype)
        dB, dC = (g.flatten(1, 2)[:, :length].permute(0, 2, 3, 1).to(x.dtype) for g, x in ((grads.B, B), (grads.C, C)))
        du, dA = _from_grid(grads.u, length).to(u.dtype), grads.A.flatten(0, 1).to(A.dtype)
        return du, ddelta.to(delta.dtype), dA, dB, dC, dD, dbias


def selective_scan_2d_fwd(x, p, dt_weight, dt_bias, A, D, directions):
    """Merged outputs (B, H, W, D) in x's dtype.

    Args:
        x: (B, H, W, D).
        p: projections of x for all directions (B, H, W, K (R + 2 N)): dt, B and C of direction 0, then of 1, ...
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A: (K D, N), negative.
        D: skip gains (K D,).
        directions: K.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = _compute_dtype(x)
        y = x.to(dtype) * D.to(dtype).view(directions, -1).sum(0)
        for k in range(directions):
            u, step, Ak, Bk, Ck, _ = _direction(x, p, dt_weight, dt_bias, A, k, directions, dtype)
            _oriented(y, k, directions).unsqueeze(3).add_(_scan(u, step, Ak, Bk, Ck, REVERSED[directions][k]))
        return y.to(x.dtype)


def selective_scan_2d_bwd(x, p, dt_weight, dt_bias, A, D, directions, dy):
    """Gradients dx, dp, ddt_weight, ddt_bias, dA, dD in the dtypes of their inputs."""
    with torch.autocast(x.device.type, enabled=False):
        dtype, rank = _compute_dtype(x), dt_weight.shape[-1]
        dy = dy.to(dtype)
        dx = dy * D.to(dtype).view(directions, -1).sum(0)
        dp = torch.empty(p.shape, dtype=dtype, device=p.device)
        dweight, dbias = (torch.empty(w.shape, dtype=dtype, device=w.device) for w in (dt_weight, dt_bias))
        dA = []
        for k in range(directions):
            u, step, Ak, Bk, Ck, dt = _direction(x, p, dt_weight, dt_bias, A, k, directions, dtype)
            dyk = _oriented(dy, k, directions).unsqueeze(3)
            grads = _scan_backward(u, step, Ak, Bk, Ck, REVERSED[directions][k], dyk)
            draw = grads.delta.mul_(-torch.expm1(-step)).squeeze(3)
            dweight[k] = draw.reshape(-1, draw.shape[-1]).mT @ dt.reshape(-1, rank)
            dbias[k] = draw.sum((0, 1, 2))
            parts = (draw @ dt_weight[k].to(dtype), grads.B.squeeze(3), grads.C.squeeze(3))
            _oriented(dp.unflatten(-1, (directions, -1))[..., k, :], k, directions).copy_(torch.cat(parts, -1))
            _oriented(dx, k, directions).add_(grads.u.squeeze(3))
            dA.append(grads.A.squeeze(0))
        dD = (dy * x.to(dtype)).sum((0, 1, 2)).expand(directions, -1).flatten()
        grads = (dx, dp, dweight, dbias, torch.cat(dA), dD)
        return tuple(g.to(like.dtype) for g, like in zip(grads, (x, p, dt_weight, dt_bias, A, D)))


# --------------------------------------------------------------------------------------------------------------------
# Layout


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _grid_shape(length: int) -> tuple[int, int]:
    """Rows and tokens per row of the grid that a sequence is padded to."""
    inner = math.isqrt(max(length - 1, 0)) + 1
    return -(-length // inner), inner


def _grid(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, G D, T) to (B, outer, inner, G, D), zeros behind the end."""
    outer, inner = _grid_shape(x.shape[-1])
    x = F.pad(x.to(dtype), (0, outer * inner - x.shape[-1])).transpose(1, 2).contiguous()
    return x.view(x.shape[0], outer, inner, groups, x.shape[2] // groups)


def _from_grid(x: Tensor, length: int) -> Tensor:
    """(B, outer, inner, G, D) to (B, G D, T), contiguous."""
    return x.flatten(3).flatten(1, 2)[:, :length].transpose(1, 2).contiguous()


def _by_group(A: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return A.to(dtype).unflatten(0, (groups, -1))


def _sequence_grids(u, delta, B, C, delta_bias, delta_softplus, dtype):
    """u, the final step sizes, B, C on the grid of a sequence; steps behind the end are 0, so that nothing happens."""
    groups = B.shape[1]
    step = delta.to(dtype, copy=True)
    if delta_bias is not None:
        step += delta_bias.to(dtype)[:, None]
    step = F.softplus(step) if delta_softplus else step
    B, C = (_grid(x.flatten(1, 2), groups, dtype) for x in (B, C))
    return _grid(u, groups, dtype), _grid(step, groups, dtype), B, C


def _oriented(x: Tensor, k: int, directions: int) -> Tensor:
    """A map (B, H, W, ...) as the grid of direction k: a view."""
    return x.transpose(1, 2) if COLUMN_MAJOR[directions][k] else x


def _direction(x, p, dt_weight, dt_bias, A, k, directions, dtype):
    """u, step, A, B, C, dt of direction k as grids with one group."""
    rank, states = dt_weight.shape[-1], A.shape[-1]
    u = _oriented(x, k, directions).to(dtype)
    part = _oriented(p.unflatten(-1, (directions, -1))[..., k, :], k, directions).to(dtype)
    dt, B, C = part.split([rank, states, states], -1)
    step = F.softplus(F.linear(dt, dt_weight[k].to(dtype), dt_bias[k].to(dtype)))
    Ak = A.to(dtype).unflatten(0, (directions, 1, -1))[k]
    return u.unsqueeze(3), step.unsqueeze(3), Ak, B.unsqueeze(3), C.unsqueeze(3), dt


# --------------------------------------------------------------------------------------------------------------------
# The scan


def _run(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + b_t over a grid, in place of b; a is used up."""
    rows_a, rows_b = a.unbind(1), b.unbind(1)
    steps_a, steps_b = a.unbind(2), b.unbind(2)
    order = range(len(steps_a) - 1, -1, -1) if reverse else range(len(steps_a))
    for i, j in zip(order, order[1:]):
        steps_b[j].addcmul_(steps_a[j], steps_b[i])
        steps_a[j].mul_(steps_a[i])  # decay from before the row to here
    last = order[-1] if len(order) else 0
    rows = range(len(rows_a) - 1, -1, -1) if reverse else range(len(rows_a))
    for i, j in zip(rows, rows[1:]):
        rows_b[j].addcmul_(rows_a[j], rows_b[i][:, last : last + 1])
    return b


def _from_next(a: Tensor, reverse: bool) -> Tensor:
    """The decay that follows each token in time: what the adjoint of its state is multiplied with on its way here."""
    out = torch.empty_like(a)
    if a.numel() == 0:
        return out
    if reverse:
        out[:, :, 1:] = a[:, :, :-1]
        out[:, 1:, 0] = a[:, :-1, -1]
        out[:, 0, 0] = 0
    else:
        out[:, :, :-1] = a[:, :, 1:]
        out[:, :-1, -1] = a[:, 1:, 0]
        out[:, -1, -1] = 0
    return out


def _scan(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """y without the skip; step is used up.

    Shapes: u, step (B, outer, inner, G, D), A (G, D, N), B, C (B, outer, inner, G, N).
    """
    drive, y = step * u, None
    for n in range(A.shape[-1]):
        if n < A.shape[-1] - 1:
            a, b = step * A[..., n], drive * B[..., n, None]
        else:  # fresh memory costs more than the product
            a, b = step.mul_(A[..., n]), drive.mul_(B[..., n, None])
        h = _run(a.exp_(), b, reverse)
        y = h.mul_(C[..., n, None]) if y is None else y.addcmul_(h, C[..., n, None])
    return torch.zeros_like(u) if y is None else y


def _scan_backward(u, step, A, B, C, reverse, dy) -> Grads:
    """Gradients of `_scan`; with g the adjoint of h, which is a scan in the opposite order."""
    drive = step * u
    ddrive, dstep = torch.zeros_like(drive), torch.zeros_like(step)
    dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    for n in range(A.shape[-1]):
        Bn, Cn = B[..., n, None], C[..., n, None]
        a = (step * A[..., n]).exp_()
        follow = _from_next(a, reverse)
        b = drive * Bn
        h = _run(a, b.clone(), reverse)
        dC[..., n] = (dy * h).sum(-1)
        g = _run(follow, dy * Cn, not reverse)
        ddrive.addcmul_(g, Bn)
        dB[..., n] = (drive * g).sum(-1)
        kept = h.sub_(b).mul_(g)  # g times what the decay let through
        dstep.addcmul_(kept, A[..., n])
        dA[..., n] = (kept * step).sum((0, 1, 2))
    dstep.addcmul_(ddrive, u)
    return Grads(ddrive.mul_(step), dstep, dA, dB, dC)


# --------------------------------------------------------------------------------------------------------------------
# Export: no loop over a length that is not known, no writing into views


def export_scan(u, step, A, B, C):
    """y without the skip for `torch.export`: all sequences run forwards, any length at run time.

    The states that enter chunks come from a matrix of the decays between all pairs of chunks, so memory grows with
    (T / 16) ** 2: fine to about 4k tokens.

    Args:
        u: (S, T, D) for S sequences.
        step: (S, T, D).
        A: (S or 1, D, N).
        B: (S, T, N).
        C: (S, T, N).
    """
    length = u.shape[1]
    if isinstance(length, int):
        chunk = min(math.isqrt(max(length - 1, 0)) + 1, MAX_CHUNK)
        pad = -length % chunk
    else:
        # At least two chunks, as tracing would single out one; no remainder, which symbolic shapes are slow with.
        chunk, pad = EXPORT_CHUNK, ((length - 1) // EXPORT_CHUNK + 2) * EXPORT_CHUNK - length
    drive, step, B, C = (F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, chunk)) for x in (step * u, step, B, C))
    total, y = step.sum(2).double(), 0
    for n in range(A.shape[-1]):
        An = A[:, None, :, n]
        decays = (step * An[:, None]).exp().unbind(2)
        drives = (drive * B[..., n, None]).unbind(2)
        states, reach = [drives[0]], [decays[0]]  # inside the chunk; decay of the incoming state
        for a, b in zip(decays[1:], drives[1:]):
            states.append(a * states[-1] + b)
            reach.append(a * reach[-1])
        entering = _entering_states(states[-1], total * An)
        h = torch.stack(states, 2) + torch.stack(reach, 2) * entering.unsqueeze(2)
        y = y + h * C[..., n, None]
    return y.flatten(1, 2)[:, :length]


def _entering_states(last: Tensor, log_decay: Tensor) -> Tensor:
    """States before each chunk from the chunks' own last states (S, chunks, D) and log decays, in fp64."""
    upto = log_decay.cumsum(1)
    gaps = (upto - log_decay).unsqueeze(2) - upto.unsqueeze(1)  # (S, to, from, D)
    positions = torch.arange(last.shape[1], device=last.device)
    earlier = (positions[:, None] > positions[None, :])[..., None]
    decay = torch.where(earlier, gaps, float('-inf')).exp().to(last.dtype)
    return (decay * last.unsqueeze(1)).sum(2)


def export_selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """`selective_scan_fwd` for `torch.export`."""
    dtype, groups = _compute_dtype(u), B.shape[1]
    time_major = lambda x: (x.flip(-1) if reverse else x).to(dtype).transpose(1, 2)  # noqa: E731
    x, step = time_major(u), time_major(delta)
    step = step if delta_bias is None else step + delta_bias.to(dtype)
    step = F.softplus(step) if delta_softplus else step
    outs = []
    for g, (ug, sg) in enumerate(zip(x.chunk(groups, -1), step.chunk(groups, -1))):
        Ag = A.to(dtype).unflatten(0, (groups, -1))[g : g + 1]
        outs.append(export_scan(ug, sg, Ag, time_major(B[:, g]), time_major(C[:, g])))
    y = outs[0] if groups == 1 else torch.cat(outs, -1)
    y = y if D is None else y + x * D.to(dtype)
    y = y.transpose(1, 2).to(u.dtype)
    return y.flip(-1) if reverse else y


def export_selective_scan_2d(x, p, dt_weight, dt_bias, A, D, directions):
    """`selective_scan_2d_fwd` for `torch.export`: directions are rows of a batch, permuted as they need."""
    dtype, rank, states = _compute_dtype(x), dt_weight.shape[-1], A.shape[-1]
    height, width = x.shape[1:3]
    skip = D.to(dtype).view(directions, -1).sum(0)
    weights, biases, decays = dt_weight.to(dtype), dt_bias.to(dtype), A.to(dtype).unflatten(0, (directions, -1))

    def sequence(t: Tensor, k: int) -> Tensor:
        t = _oriented(t, k, directions).flatten(1, 2).to(dtype)
        return t.flip(1) if REVERSED[directions][k] else t

    us, steps, Bs, Cs = [], [], [], []
    for k in range(directions):
        dt, B, C = sequence(p.unflatten(-1, (directions, -1))[..., k, :], k).split([rank, states, states], -1)
        us.append(sequence(x, k))
        steps.append(F.softplus(F.linear(dt, weights[k], biases[k])))
        Bs.append(B)
        Cs.append(C)
    A = torch.stack([d.expand(x.shape[0], -1, -1) for d in decays.unbind()]).flatten(0, 1)
    ys = export_scan(torch.cat(us), torch.cat(steps), A, torch.cat(Bs), torch.cat(Cs)).unflatten(0, (directions, -1))
    out = x.to(dtype) * skip
    for k, y in enumerate(ys.unbind()):
        y = y.flip(1) if REVERSED[directions][k] else y
        column = COLUMN_MAJOR[directions][k]
        y = y.unflatten(1, (width, height) if column else (height, width))
        out = out + (y.transpose(1, 2) if column else y)
    return out.to(x.dtype)
