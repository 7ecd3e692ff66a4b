"""Gated linear attention: causal, reversed and bidirectional.

Forward scan, per batch entry and head (K key channels, V value channels, gate g_t <= 0 in log space):

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        S in K x V, fp32
    o_t = scale * S_t^T q_t

The gate of token t multiplies the state that arrives at t, before k_t v_t^T is added. The reversed scan is its mirror
image, R_t = diag(exp g_t) R_{t+1} + k_t v_t^T. The bidirectional op is scale * (forward + reversed) / 2, so a token
sees itself with full weight and every other token with half of its one-directional weight.

Shapes follow flash-linear-attention: q, k (B, T, H, K), v (B, T, H, V), g (B, T, H, K) or (B, T, H) or None.
Sources: gated linear attention, arXiv 2312.06635; the bidirectional merge, arXiv 2405.18425 (ViG).

FLOP convention: two per multiply-add, the recurrent form counted: decay, rank-one update and read-out, i.e. 6 T H K V
per direction and batch entry, whatever the implementation really does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch, _torch_gla
from zoo.kernels._op import Op
from zoo.kernels.mix import gated_local_mix, log_gates

__all__ = ['bidirectional_gla', 'gated_linear_attention', 'gated_local_mix', 'log_gates', 'naive_gla']


def naive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence, one token at a time, in fp32 (fp64 for fp64 input): the oracle of every faster path.

    Arguments and results are those of `gated_linear_attention`.
    """
    if cu_seqlens is not None:
        cuts = _torch_gla.checked_cuts(cu_seqlens, q.shape[1]).tolist()
        kwargs = dict(scale=scale, output_final_state=True, reverse=reverse)
        parts = []
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):
            piece = [None if x is None else x[:, start:end] for x in (q, k, v, g)]
            state = None if initial_state is None else initial_state[i : i + 1]
            parts.append(naive_gla(*piece, initial_state=state, **kwargs))
        out = torch.cat([o for o, _ in parts], 1) if parts else torch.zeros_like(v)
        return out, torch.cat([s for _, s in parts]) if output_final_state else None
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    qs, ks, vs = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    gates = _expand_gate(g, q).to(dtype).transpose(1, 2).exp() if g is not None else torch.ones_like(qs)
    state = qs.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs: list[Tensor] = [qs.new_empty(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        state = state * gates[:, :, t, :, None] + ks[:, :, t, :, None] * vs[:, :, t, None, :]
        outputs[t] = torch.einsum('bhk,bhkv->bhv', qs[:, :, t] * scale, state)
    o = torch.stack(outputs, 1).to(v.dtype) if length else torch.zeros_like(v)
    return o, state if output_final_state else None


def _expand_gate(g: Tensor, q: Tensor) -> Tensor:
    return g.unsqueeze(-1).expand_as(q) if g.ndim == 3 else g


# Custom ops. Optional results are empty tensors inside the ops: `Tensor | None` in a returned tuple is not supported.


def _gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    path = _implementation(q, v, g)
    return path.gla_fwd(q, k, v, g, scale, initial_state, output_final_state, reverse, cu_seqlens)


def _gla_fake(q, k, v, g, scale, initial_state, output_final_state, reverse, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not output_final_state:
        return v.new_empty(v.shape), q.new_empty(0)
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(shape, dtype=_state_dtype(q))


def _gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _implementation(q, v, g)
    return path.gla_bwd(q, k, v, g, scale, initial_state, do, dfinal, reverse, cu_seqlens)


def _gla_backward_fake(q, k, v, g, scale, initial_state, do, dfinal, reverse, cu_seqlens):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, initial_state))


def _gla_setup(ctx, inputs, output):
    q, k, v, g, scale, initial_state, output_final_state, reverse, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
    ctx.scale, ctx.reverse, ctx.has_final = scale, reverse, output_final_state


def _gla_gradients(ctx, do, dfinal):
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal = dfinal if ctx.has_final else None
    dq, dk, dv, dg, dinitial = _gla_backward_op(
        q, k, v, g, ctx.scale, initial_state, do, dfinal, ctx.reverse, cu_seqlens
    )
    return dq, dk, dv, None if g is None else dg, None, None if initial_state is None else dinitial, None, None, None


_gla_backward_op = Op('zoo::gated_linear_attention_backward', _gla_backward, _gla_backward_fake, any_strides=True)
_gla_op = Op('zoo::gated_linear_attention', _gla_forward, _gla_fake, _gla_setup, _gla_gradients, any_strides=True)


def _bidirectional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor | None,
    g_bwd: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return _implementation(q, v, g_fwd).bidirectional_gla_fwd(q, k, v, g_fwd, g_bwd, scale, cu_seqlens)


def _bidirectional_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor | None,
    g_bwd: Tensor | None,
    scale: float,
    do: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation(q, v, g_fwd).bidirectional_gla_bwd(q, k, v, g_fwd, g_bwd, scale, do, cu_seqlens)


def _bidirectional_backward_fake(q, k, v, g_fwd, g_bwd, scale, do, cu_seqlens):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))


def _bidirectional_setup(ctx, inputs, output):
    q, k, v, g_fwd, g_bwd, scale, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g_fwd, g_bwd, cu_seqlens)
    ctx.scale = scale


def _bidirectional_gradients(ctx, do):
    q, k, v, g_fwd, g_bwd, cu_seqlens = ctx.saved_tensors
    grads = _bidirectional_backward_op(q, k, v, g_fwd, g_bwd, ctx.scale, do, cu_seqlens)
    dg_fwd, dg_bwd = (None, None) if g_fwd is None else grads[3:]
    return *grads[:3], dg_fwd, dg_bwd, None, None


_bidirectional_backward_op = Op(
    'zoo::bidirectional_gla_backward', _bidirectional_backward, _bidirectional_backward_fake, any_strides=True
)
_bidirectional_op = Op(
    'zoo::bidirectional_gla',
    _bidirectional_forward,
    lambda q, k, v, *_: v.new_empty(v.shape),
    _bidirectional_setup,
    _bidirectional_gradients,
    any_strides=True,
)


def _implementation(q: Tensor, v: Tensor, g: Tensor | None):
    """The module whose `gla_fwd`, `gla_bwd`, ... run: the torch path or the Triton kernels."""
    if q.numel() == 0 or v.numel() == 0:
        return _torch_gla
    gates = None if g is None else g.dtype
    return _dispatch.implementation('gla', _torch_gla, q, q.dtype, gates, q.shape[-1], v.shape[-1])


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _scan_flops(directions: int, passes: int):
    def formula(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        batch, length, heads, key_dim = q_shape
        return 6 * directions * passes * batch * length * heads * key_dim * v_shape[-1]

    return formula


# The backward of a scan recomputes the states and carries their adjoints: counted as two forward passes.
register_flop_formula(torch.ops.zoo.gated_linear_attention)(_scan_flops(1, 1))
register_flop_formula(torch.ops.zoo.gated_linear_attention_backward)(_scan_flops(1, 2))
register_flop_formula(torch.ops.zoo.bidirectional_gla)(_scan_flops(2, 1))
register_flop_formula(torch.ops.zoo.bidirectional_gla_backward)(_scan_flops(2, 2))


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], cu_seqlens: Tensor | None):
    """Refuse what no implementation accepts, naming the argument."""
    shape, values, dtype, device = q.shape, v.shape, q.dtype, q.device
    if len(shape) != 4 or k.shape != shape:
        raise ValueError(f'{op}: q and k must both be (B, T, H, K), got {tuple(shape)} and {tuple(k.shape)}')
    tokens = shape[:3]
    if len(values) != 4 or values[:3] != tokens:
        raise ValueError(f"{op}: v must be (B, T, H, V) with q's B, T, H = {tuple(tokens)}, got {tuple(values)}")
    if not dtype == k.dtype == v.dtype or dtype not in _dispatch.DTYPES:
        raise ValueError(
            f'{op}: q, k, v must share one floating dtype, {_dispatch.DTYPE_NAMES}, got {dtype}, {k.dtype}, {v.dtype}'
        )
    for name, gate in gates.items():
        if gate is None:
            continue
        if gate.shape != shape and gate.shape != tokens:
            raise ValueError(
                f'{op}: {name} must be {tuple(shape)} (per channel) or {tuple(tokens)} (per head), '
                f'got {tuple(gate.shape)}'
            )
        if gate.device != device:
            raise ValueError(f'{op}: {name} is on {gate.device}, q on {device}')
    if not device == k.device == v.device:
        raise ValueError(f'{op}: q, k, v must be on one device, got {device}, {k.device}, {v.device}')
    if cu_seqlens is not None and (q.shape[0] != 1 or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f'{op}: with cu_seqlens, the sequences are packed in one row: expected B = 1 and cu_seqlens an integer '
            f'vector (0, ..., T), got B = {q.shape[0]} and {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}'
        )


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal gated linear attention, linear in T.

    Args:
        q: queries (B, T, H, K), fp64, fp32, fp16 or bf16.
        k: keys (B, T, H, K), dtype of q.
        v: values (B, T, H, V), dtype of q.
        g: log gates <= 0, per key channel (B, T, H, K) or per head (B, T, H); None for no decay. -inf forgets the state
            on the paths without Triton; the kernels on GPUs need finite gates: g.clamp(min=-110) is the same in fp32.
        scale: multiplies q; K ** -0.5 by default.
        initial_state: fp32 state (N, H, K, V) that arrives at the first token (at the last one if `reverse`);
            N is B, or the number of sequences with `cu_seqlens`.
        output_final_state: also return the state that leaves the sequence.
        reverse: scan from the last token to the first.
        cu_seqlens: int32 or int64 (N + 1,) boundaries of sequences packed into one row (B = 1).

    Returns:
        The outputs (B, T, H, V) in v's dtype and the fp32 final state (N, H, K, V), or None unless asked for.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('gated_linear_attention', q, k, v, {'g': g}, cu_seqlens)
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (sequences, q.shape[2], q.shape[3], v.shape[3])
        if initial_state.shape != expected:
            raise ValueError(
                f'gated_linear_attention: initial_state must be {expected}, got {tuple(initial_state.shape)}'
            )
        if initial_state.device != q.device:
            raise ValueError(f'gated_linear_attention: initial_state is on {initial_state.device}, q on {q.device}')
        initial_state = initial_state.to(_state_dtype(q))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _dispatch.forced() == 'naive':
        return naive_gla(
            q,
            k,
            v,
            g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
        )
    if _dispatch.exporting():
        _no_packing_in_export(cu_seqlens)
        o, state = _torch_gla.export_gla(q, k, v, [(g, reverse)], scale, initial_state)
        return o, state if output_final_state else None
    o, state = _gla_op(q, k, v, g, float(scale), initial_state, output_final_state, reverse, cu_seqlens)
    return o, state if output_final_state else None


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor | None = None,
    g_bwd: Tensor | None = None,
    *,
    scale: float | None = None,
    merge: str = 'mean',
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Gated linear attention in both directions over shared q, k, v, in one pass.

    Args:
        q: queries (B, T, H, K), fp64, fp32, fp16 or bf16.
        k: keys (B, T, H, K), dtype of q.
        v: values (B, T, H, V), dtype of q.
        g_fwd: log gates <= 0 of the forward scan, (B, T, H, K) or (B, T, H); None for no decay. -inf cuts the sequence
            on the paths without Triton; the kernels on GPUs need finite gates: g.clamp(min=-110) is the same in fp32.
        g_bwd: the same for the reversed scan; given exactly when g_fwd is, in the same shape.
        scale: multiplies q; K ** -0.5 by default.
        merge: `mean` halves the sum of the directions, `sum` does not.
        cu_seqlens: int32 or int64 (N + 1,) boundaries of sequences packed into one row (B = 1).

    Returns:
        The outputs (B, T, H, V) in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('bidirectional_gla', q, k, v, {'g_fwd': g_fwd, 'g_bwd': g_bwd}, cu_seqlens)
    if (g_fwd is None) != (g_bwd is None) or (g_fwd is not None and g_fwd.shape != g_bwd.shape):
        raise ValueError('bidirectional_gla: g_fwd and g_bwd must both be None or have the same shape')
    if merge not in ('mean', 'sum'):
        raise ValueError(f"bidirectional_gla: merge must be 'mean' or 'sum', got {merge!r}")
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) * (0.5 if merge == 'mean' else 1.0)
    if _dispatch.forced() == 'naive':
        kwargs = dict(scale=scale, cu_seqlens=cu_seqlens)
        return naive_gla(q, k, v, g_fwd, **kwargs)[0] + naive_gla(q, k, v, g_bwd, reverse=True, **kwargs)[0]
    if _dispatch.exporting():
        _no_packing_in_export(cu_seqlens)
        return _torch_gla.export_gla(q, k, v, [(g_fwd, False), (g_bwd, True)], scale, None)[0]
    return _bidirectional_op(q, k, v, g_fwd, g_bwd, float(scale), cu_seqlens)


def _no_packing_in_export(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError('cu_seqlens cannot be exported: pass one sequence per batch row instead')
