"""A ViG block from the scan's output to the next block's input (arXiv 2405.18425), for inference.

    m = gated_local_mix(o, local, gate)         see zoo/kernels/mix.py; (B, T, H, V) as (B, T, C)
    s = stream + m W_out^T                      [a | b] = norm(s) W_up^T
    new = s + (silu(a) * b) W_down^T            y = next_norm(new)

stream (..., C), W_out (C, C), W_up (2M, C), W_down (C, M); the norms are RMSNorm, or LayerNorm where they have a bias.
Everything between the products is fp32. Where the Triton kernel runs, no intermediate is written to memory; it has no
backward pass, so where gradients are needed the ops it is made of run one by one.

FLOP convention: the three products, two per multiply-add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op
from zoo.kernels.mix import gated_local_mix, naive_gated_local_mix
from zoo.kernels.norm import layer_norm, naive_norm, rms_norm
from zoo.kernels.swiglu import naive_swiglu, swiglu

__all__ = ['Norm', 'block_tail', 'fits_block_tail', 'naive_block_tail']


class Norm(NamedTuple):
    """weight (C,), bias (C,) or None for RMSNorm, eps."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6


def naive_block_tail(
    stream: Tensor,
    o: Tensor,
    local: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    w_global: Tensor,
    w_local: Tensor,
    w_out: Tensor,
    norm: Norm,
    w_up: Tensor,
    w_down: Tensor,
    next_norm: Norm | None = None,
    *,
    mix_eps: float = 1e-6,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formula in fp32 or fp64: the oracle; arguments as `block_tail`."""
    wide = torch.promote_types(o.dtype, torch.float32)
    args = (x.to(wide) for x in (o, local, gate))
    m = naive_gated_local_mix(*args, gate_bias, w_global, w_local, mix_eps, True, activation == 'silu')
    s = stream.to(wide) + (m.flatten(-2) @ w_out.to(wide).T).reshape(stream.shape)

    def normed(x: Tensor, by: Norm) -> Tensor:
        return naive_norm(x, None, None, None, by.weight, by.bias, by.eps, by.bias is not None, wide)[0]

    new = (s + naive_swiglu(normed(s, norm) @ w_up.to(wide).T) @ w_down.to(wide).T).to(stream.dtype)
    return new, None if next_norm is None else normed(new.to(wide), next_norm).to(o.dtype)


def _forward(
    o: Tensor,
    stream: Tensor,
    local: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    w_global: Tensor,
    w_local: Tensor,
    mix_eps: float,
    silu: bool,
    w_out: Tensor,
    w_norm: Tensor,
    b_norm: Tensor | None,
    eps: float,
    w_up: Tensor,
    w_down: Tensor,
    w_next: Tensor | None,
    b_next: Tensor | None,
    eps_next: float,
) -> tuple[Tensor, Tensor]:
    path = _dispatch.triton_module('block_tail')
    return path.block_tail(
        stream, o, local, gate, gate_bias, w_global, w_local, mix_eps, silu, w_out, w_norm, b_norm, eps, w_up, w_down,
        w_next, b_next, eps_next, b_norm is not None,
    )  # fmt: skip


def _fake(o, stream, local, gate, gate_bias, w_global, w_local, mix_eps, silu, w_out, w_norm, b_norm, eps, w_up,
          w_down, w_next, *_):  # fmt: skip
    return stream.new_empty(stream.shape), o.new_empty(0 if w_next is None else stream.shape)


_op = Op('zoo::block_tail', _forward, _fake, any_strides=True)


@register_flop_formula(torch.ops.zoo.block_tail)
def _flops(o_shape, stream_shape, *args, out_shape=None, **kwargs) -> int:
    w_out, w_up, w_down = args[7], args[11], args[12]
    tokens = torch.Size(stream_shape).numel() // stream_shape[-1]
    return 2 * tokens * sum(torch.Size(w).numel() for w in (w_out, w_up, w_down))


@torch.compiler.assume_constant_result
def _supported(dtype: torch.dtype, channels: int, head_dim: int, hidden: int) -> bool:
    return _dispatch.triton_module('block_tail').unsupported(dtype, channels, head_dim, hidden) is None


def fits_block_tail(o: Tensor, w_global: Tensor, w_down: Tensor) -> bool:
    """Whether `block_tail` is one kernel for these of its arguments, with no gradient wanted.

    Where it is not, it has nothing over the ops that it is made of.
    """
    if not isinstance(o, Tensor) or torch.is_grad_enabled() or _dispatch.forced() == 'naive':
        return False
    return _dispatch.takes_triton('block_tail', o) and _supported(
        o.dtype, w_down.shape[0], *w_global.shape, w_down.shape[1]
    )


def block_tail(
    stream: Tensor,
    o: Tensor,
    local: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    w_global: Tensor,
    w_local: Tensor,
    w_out: Tensor,
    norm: Norm,
    w_up: Tensor,
    w_down: Tensor,
    next_norm: Norm | None = None,
    *,
    mix_eps: float = 1e-6,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The mix, the output projection, the SwiGLU MLP, both residual additions and the norms around them.

    Args:
        stream: the residual stream (..., C), of any floating dtype.
        o: the scan's output (B, T, H, V) with H V = C and as many tokens as the stream.
        local: the local branch, like o.
        gate: logits of the 2D gate, like o.
        gate_bias: (C,) added to the logits, or None.
        w_global: weight (V,) of the norm of o.
        w_local: weight (V,) of the norm of the local branch.
        w_out: (C, C).
        norm: before the MLP.
        w_up: (2M, C): the rows that go through SiLU, then the others.
        w_down: (C, M).
        next_norm: of the new stream, of the same kind as `norm`, or None.
        mix_eps: of the norms inside the mix.
        activation: `silu` of the mix, or None.

    Returns:
        The new stream in its dtype, and its norm (..., C) in o's dtype, None without `next_norm`.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    C, M = w_down.shape
    if o.ndim != 4 or o.shape[2] * o.shape[3] != C or stream.shape[-1] != C or stream.numel() != o.numel():
        raise ValueError(
            f'block_tail: o must be (B, T, H, V) and stream (..., {C}) with H V = {C} as w_down has rows and as many '
            f'tokens, got {tuple(o.shape)} and {tuple(stream.shape)}'
        )
    if w_out.shape != (C, C) or w_up.shape != (2 * M, C):
        raise ValueError(
            f'block_tail: w_out must be {(C, C)} and w_up {(2 * M, C)} for w_down {(C, M)}, got {tuple(w_out.shape)} '
            f'and {tuple(w_up.shape)}'
        )
    if next_norm is not None and (next_norm.bias is None) != (norm.bias is None):
        raise ValueError('block_tail: norm and next_norm must be of one kind, both with a bias or both without')
    arguments = (stream, o, local, gate, gate_bias, w_global, w_local, w_out, norm, w_up, w_down, next_norm)
    if _dispatch.forced() == 'naive':
        return naive_block_tail(*arguments, mix_eps=mix_eps, activation=activation)
    if not fits_block_tail(o, w_global, w_down):
        return _torch_block_tail(*arguments, mix_eps, activation)
    last = (None, None, 0.0) if next_norm is None else next_norm
    w_out, w_up, w_down = (w.to(o.dtype).contiguous() for w in (w_out, w_up, w_down))
    new, y = _op(o, stream, local, gate, gate_bias, w_global, w_local, float(mix_eps), activation == 'silu', w_out,
                 *norm, w_up, w_down, *last)  # fmt: skip
    return new, None if next_norm is None else y


def _torch_block_tail(
    stream, o, local, gate, gate_bias, w_global, w_local, w_out, norm, w_up, w_down, next_norm, mix_eps, activation
):
    m = gated_local_mix(
        o, local, gate, w_global, w_local, mix_eps, gate_logits=True, gate_bias=gate_bias, activation=activation
    )

    def added(x: Tensor, to: Tensor, by: Norm) -> tuple[Tensor, Tensor]:
        x = x.reshape(to.shape)
        if by.bias is None:
            return rms_norm(x, by.weight, by.eps, to, dtype=o.dtype)
        return layer_norm(x, by.weight, by.bias, by.eps, to, dtype=o.dtype)

    y, stream = added(F.linear(m.flatten(-2), w_out.to(o.dtype)), stream, norm)
    branch = F.linear(swiglu(F.linear(y, w_up.to(o.dtype))), w_down.to(o.dtype))
    if next_norm is None:
        return stream + branch, None
    y, stream = added(branch, stream, next_norm)
    return stream, y
