"""State space duality (Mamba-2): a causal scan with one decay per head and token.

Per batch entry and head (P value channels, N state channels, step dt_t >= 0, rate A < 0):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        S in P x N, fp32
    y_t = S_t C_t + D x_t

Shapes: x (B, T, H, P), dt (B, T, H), A and D (H,), B (B, T, G, N), C (B, T, G, N); group g serves the heads g H/G up to
(g + 1) H/G - 1. B and C may have different numbers of groups, as with grouped-query attention, where every head has
its own C (the query) and several share a B (the key). A step dt_t = 0 leaves the state as it is.

Sources: Mamba-2, arXiv 2405.21060; the same scan is `chunk_simple_gla` of flash-linear-attention with q = C, k = B,
v = dt x, g = dt A, scale 1 and the transposed state.

FLOP convention: two per multiply-add, the recurrent form counted: decay, rank-one update and read-out, i.e. 6 T H P N
per batch entry, whatever the implementation really does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch, _torch_ssd
from zoo.kernels._op import InplaceOp, Op
from zoo.kernels._torch_gla import checked_cuts

__all__ = ['naive_ssd', 'ssd', 'ssd_step', 'ssd_step_']


def naive_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time, in fp32 (fp64 for fp64 input): the oracle of every faster path.

    Arguments and results are those of `ssd`.
    """
    if cu_seqlens is not None:
        cuts = checked_cuts(cu_seqlens, x.shape[1]).tolist()
        parts = []
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):
            xs, dts, Bs, Cs = (t[:, start:end] for t in (x, dt, B, C))
            state = None if initial_state is None else initial_state[i : i + 1]
            parts.append(naive_ssd(xs, dts, A, Bs, Cs, D=D, initial_state=state, output_final_state=True))
        y = torch.cat([y for y, _ in parts], 1) if parts else torch.zeros_like(x)
        return y, torch.cat([s for _, s in parts]) if output_final_state else None
    dtype = _state_dtype(x)
    batch, length, heads, dim = x.shape
    xs, dts, rate = x.to(dtype), dt.to(dtype), A.to(dtype)
    Bs, Cs = (t.to(dtype).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = xs.new_zeros(batch, heads, dim, B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs: list[Tensor] = []
    for t in range(length):
        step = dts[:, t, :, None, None]
        state = (step * rate[:, None, None]).exp() * state + step * xs[:, t, :, :, None] * Bs[:, t, :, None, :]
        outputs.append(torch.einsum('bhpn,bhn->bhp', state, Cs[:, t]))
    y = torch.stack(outputs, 1) if length else xs.new_zeros(x.shape)
    y = y if D is None else y + D.to(dtype)[:, None] * xs
    return y.to(x.dtype), state if output_final_state else None


# Custom ops. Optional results are empty tensors inside the ops: `Tensor | None` in a returned tuple is not supported.


def _ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    path = _implementation(x, dt, B)
    return path.ssd_fwd(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)


def _ssd_fake(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
    if not output_final_state:
        return x.new_empty(x.shape), x.new_empty(0)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, x.shape[2], x.shape[3], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=_state_dtype(x))


def _ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation(x, dt, B).ssd_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens)


def _ssd_backward_fake(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, initial_state))


def _ssd_setup(ctx, inputs, output):
    *tensors, output_final_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.has_final = output_final_state
    ctx.set_materialize_grads(False)


def _ssd_gradients(ctx, dy, dfinal):
    x, dt, A, B, C, D, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal = dfinal if ctx.has_final else None
    *grads, dD, dinitial = _ssd_backward_op(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens)
    return *grads, None if D is None else dD, None if initial_state is None else dinitial, None, None


_ssd_backward_op = Op('zoo::ssd_backward', _ssd_backward, _ssd_backward_fake)
_ssd_op = Op('zoo::ssd', _ssd_forward, _ssd_fake, _ssd_setup, _ssd_gradients)


def _step_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _implementation(x, dt, B).ssd_step(x, dt, A, B, C, state, D)


def _step_fake(x, dt, A, B, C, state, D):
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _step_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dy: Tensor,
    dnew: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _torch_ssd.ssd_step_bwd(x, dt, A, B, C, state, D, dy, dnew)


def _step_backward_fake(x, dt, A, B, C, state, D, dy, dnew):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, state, D))


def _step_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _step_gradients(ctx, dy, dnew):
    x, *rest, state, D = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dnew = torch.zeros_like(state) if dnew is None else dnew
    *grads, dD = _step_backward_op(x, *rest, state, D, dy, dnew)
    return *grads, None if D is None else dD


_step_backward_op = Op('zoo::ssd_step_backward', _step_backward, _step_backward_fake)
_step_op = Op('zoo::ssd_step', _step_forward, _step_fake, _step_setup, _step_gradients)


def _step_inplace(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None) -> Tensor:
    return _implementation(x, dt, B).ssd_step_(x, dt, A, B, C, state, D)


_step_inplace_op = InplaceOp('zoo::ssd_step_', _step_inplace, lambda x, *_: x.new_empty(x.shape), 'state')


def _implementation(x: Tensor, dt: Tensor, B: Tensor):
    """The module whose `ssd_fwd`, `ssd_bwd`, ... run: the torch path or the Triton kernels."""
    if x.numel() == 0 or B.numel() == 0:
        return _torch_ssd
    return _dispatch.implementation('ssd', _torch_ssd, x, x.dtype, dt.dtype, x.shape[-1], B.shape[-1])


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flops(passes: int):
    def formula(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
        return 6 * passes * math.prod(x_shape) * B_shape[-1]

    return formula


# The backward of a scan recomputes the states and carries their adjoints: counted as two forward passes.
register_flop_formula(torch.ops.zoo.ssd)(_flops(1))
register_flop_formula(torch.ops.zoo.ssd_backward)(_flops(2))
register_flop_formula(torch.ops.zoo.ssd_step)(_flops(1))
register_flop_formula(torch.ops.zoo.ssd_step_)(_flops(1))
register_flop_formula(torch.ops.zoo.ssd_step_backward)(_flops(2))


def _check(op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, lead: str) -> None:
    """Refuse what no implementation accepts, naming the argument; `lead` are the axes before the heads."""
    dims, shape = lead.count(',') + 3, x.shape
    if len(shape) != dims:
        raise ValueError(f'{op}: x must be ({lead}, H, P), got {tuple(shape)}')
    before, heads = shape[:-2], shape[-2]
    if dt.shape != shape[:-1]:
        raise ValueError(f'{op}: dt must be ({lead}, H) = {tuple(shape[:-1])}, got {tuple(dt.shape)}')
    for name, t in (('A', A), ('D', D)):
        if t is not None and t.shape != (heads,):
            raise ValueError(f'{op}: {name} must be (H,) = ({heads},), got {tuple(t.shape)}')
    for name, t in (('B', B), ('C', C)):
        shape = t.shape
        if len(shape) != dims or shape[:-2] != before or shape[-1] != B.shape[-1]:
            raise ValueError(
                f'{op}: {name} must be ({lead}, G, N) with one N for both and {lead} = {tuple(before)}, '
                f'got {tuple(shape)}'
            )
        groups = shape[-2]
        if groups == 0 or heads % groups:
            raise ValueError(f'{op}: {name} has {groups} groups, which do not divide {heads} heads')
    if not x.dtype == B.dtype == C.dtype or x.dtype not in _dispatch.DTYPES:
        raise ValueError(
            f'{op}: x, B and C must share one floating dtype, {_dispatch.DTYPE_NAMES}, '
            f'got {x.dtype}, {B.dtype}, {C.dtype}'
        )
    for name, t in (('dt', dt), ('A', A), ('D', D)):
        if t is not None and not t.is_floating_point():
            raise ValueError(f'{op}: {name} must be floating point, got {t.dtype}')
    device = x.device
    if not device == dt.device == A.device == B.device == C.device == (device if D is None else D.device):
        away = {name: t for name, t in (('dt', dt), ('A', A), ('B', B), ('C', C), ('D', D)) if t is not None}
        name, t = next((name, t) for name, t in away.items() if t.device != device)
        raise ValueError(f'{op}: {name} is on {t.device}, x on {device}')


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's scan, linear in T.

    Args:
        x: values (B, T, H, P), fp64, fp32, fp16 or bf16.
        dt: step sizes >= 0, after the softplus (B, T, H), any floating dtype.
        A: rates <= 0 (H,), any floating dtype.
        B: input maps (B, T, G, N) in x's dtype; G divides H.
        C: output maps (B, T, G, N) in x's dtype; its G may differ from B's.
        D: weight of x itself in the output (H,), or None.
        initial_state: fp32 state (N, H, P, N) that arrives at the first token; its first axis is B, or the number of
            sequences with `cu_seqlens`.
        output_final_state: also return the state that leaves the sequence.
        cu_seqlens: int32 or int64 (N + 1,) boundaries of sequences packed into one row (B = 1).

    Returns:
        The outputs (B, T, H, P) in x's dtype and the fp32 final state, or None unless asked for.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('ssd', x, dt, A, B, C, D, 'B, T')
    if cu_seqlens is not None and (x.shape[0] != 1 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f'ssd: with cu_seqlens, the sequences are packed in one row: expected B = 1 and cu_seqlens an integer '
            f'vector (0, ..., T), got B = {x.shape[0]} and {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}'
        )
    if initial_state is not None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = _checked_state('ssd: initial_state', initial_state, sequences, x, B)
    if _dispatch.forced() == 'naive':
        return naive_ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    if _dispatch.exporting():
        if cu_seqlens is not None:
            raise ValueError('cu_seqlens cannot be exported: pass one sequence per batch row instead')
        y, state = _torch_ssd.export_ssd(x, dt, A, B, C, D, initial_state)
    else:
        y, state = _ssd_op(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)
    return y, state if output_final_state else None


def _checked_state(what: str, state: Tensor, sequences: int, x: Tensor, B: Tensor) -> Tensor:
    expected = (sequences, x.shape[-2], x.shape[-1], B.shape[-1])
    if state.shape != expected:
        raise ValueError(f'{what} must be {expected}, got {tuple(state.shape)}')
    if state.device != x.device:
        raise ValueError(f'{what} is on {state.device}, x on {x.device}')
    dtype = _state_dtype(x)
    return state if state.dtype == dtype else state.to(dtype)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`.

    Args:
        x: values (B, H, P), fp64, fp32, fp16 or bf16.
        dt: step sizes >= 0, after the softplus (B, H).
        A: rates <= 0 (H,).
        B: input maps (B, G, N) in x's dtype.
        C: output maps (B, G, N) in x's dtype; its G may differ from B's.
        state: fp32 state (B, H, P, N) that arrives at the token.
        D: weight of x itself in the output (H,), or None.

    Returns:
        The output (B, H, P) in x's dtype and the new fp32 state.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('ssd_step', x, dt, A, B, C, D, 'B')
    state = _checked_state('ssd_step: state', state, x.shape[0], x, B)
    if _dispatch.forced() == 'naive' or _dispatch.exporting():
        return _torch_ssd.ssd_step(x, dt, A, B, C, state, D)
    return _step_op(x, dt, A, B, C, state, D)


def ssd_step_(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor | None = None
) -> Tensor:
    """`ssd_step` for generation: overwrites the state, has no gradient, works inside a captured CUDA graph.

    Args:
        x: values (B, H, P), fp64, fp32, fp16 or bf16.
        dt: step sizes >= 0, after the softplus (B, H).
        A: rates <= 0 (H,).
        B: input maps (B, G, N) in x's dtype.
        C: output maps (B, G, N) in x's dtype; its G may differ from B's.
        state: contiguous state (B, H, P, N), fp32 (fp64 for fp64 x); holds the new state afterwards.
        D: weight of x itself in the output (H,), or None.

    Returns:
        The output (B, H, P) in x's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument, and for arguments that require
            a gradient.
    """
    _check('ssd_step_', x, dt, A, B, C, D, 'B')
    if _checked_state('ssd_step_: state', state, x.shape[0], x, B) is not state or not state.is_contiguous():
        raise ValueError(f'ssd_step_: state must be contiguous and {_state_dtype(x)}, got {state.dtype}')
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, C, state, D)):
        raise ValueError('ssd_step_ has no gradient: use ssd_step, or torch.no_grad()')
    if _dispatch.forced() == 'naive' or _dispatch.exporting():
        return _torch_ssd.ssd_step_(x, dt, A, B, C, state, D)
    return _step_inplace_op(x, dt, A, B, C, state, D)
