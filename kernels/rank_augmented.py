"""A whole rank-augmented token mixer between its two projections, on the fused projection's output as it is.

`rank_augmented_mixer`, from q, k, v, o side by side in one tensor, with `rank_augmented` of linear_attention.py:

    y = (rank_augmented(q, k, v) + DWConv(v)) * o

Source: RAVLT, arXiv 2411.07635, whose DWConv is 5 x 5. The kernels are those of `rank_augmented` and
`depthwise_conv2d`: forward they read strided slices, backward they write the slices of one gradient, into which the
convolution's share of dv is added while dv is written. Autograd outside would join four gradients by a copy and add the
two of v by another pass. The torch path is the composition of the two public functions.

FLOP convention: those of the two ops, added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op
from zoo.kernels.depthwise_conv import MAX_TRITON_KERNEL, depthwise_conv2d
from zoo.kernels.linear_attention import MAX_TRITON_DIM, rank_augmented

__all__ = ['rank_augmented_mixer']


def _as_map(x: Tensor, width: int) -> Tensor:
    """Tokens (B, T, H, D), which may be a slice, as a map (B, h, w, H D)."""
    return x.flatten(2).unflatten(1, (x.shape[1] // width, width))


def _composed(qkvo: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, eps: float) -> Tensor:
    q, k, v, o = qkvo.chunk(4, 2)
    lepe = depthwise_conv2d(v.flatten(2).unflatten(1, (height, width)), weight, bias)
    lepe = lepe.flatten(1, 2).unflatten(-1, v.shape[2:]).to(v.dtype)
    return rank_augmented(q, k, v, height=height, width=width, lepe=lepe, gate=o, eps=eps)


def _forward(
    qkvo: Tensor, weight: Tensor, bias: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, o = qkvo.chunk(4, 2)
    conv = _dispatch.triton_module('depthwise_conv')
    lepe = conv.depthwise_conv2d_fwd(_as_map(v, width), weight, bias, False, None, None, v.dtype).view(v.shape)
    path = _dispatch.triton_module('rank_augmented')
    height = q.shape[1] // width
    return *path.rank_augmented_fwd(q, k, v, lepe, o, height, width, eps), lepe


def _fake(qkvo, weight, bias, width, eps):
    batch, tokens, heads, dim = qkvo.shape
    heads //= 4
    shapes = (batch, heads, dim, dim), (batch, heads, dim), (batch, heads, dim), (batch, heads)
    shapes = *shapes, (2, torch.sym_max(tokens // width, width), dim // 4)
    y, lepe = (qkvo.new_empty((batch, tokens, heads, dim)) for _ in range(2))
    return y, *(qkvo.new_empty(shape, dtype=torch.float32) for shape in shapes), lepe


def _backward(
    qkvo: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kv: Tensor,
    key: Tensor,
    qbar: Tensor,
    norm: Tensor,
    table: Tensor,
    lepe: Tensor,
    dy: Tensor,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, o = qkvo.chunk(4, 2)
    conv = _dispatch.triton_module('depthwise_conv')
    path = _dispatch.triton_module('rank_augmented')
    found = []

    def local(dlepe: Tensor) -> Tensor:
        dlepe = _as_map(dlepe, width)
        dv, *rest = conv.depthwise_conv2d_bwd(_as_map(v, width), weight, bias, dlepe, False, None, None)
        found.extend(rest)
        return dv.view(v.shape)

    dqkvo = torch.empty(qkvo.shape, dtype=qkvo.dtype, device=qkvo.device)
    out = dqkvo.chunk(4, 2)
    path.rank_augmented_bwd(q, k, v, lepe, o, kv, key, qbar, norm, table, dy, width, eps, out, local)
    dweight, dbias = found
    return dqkvo, dweight, qkvo.new_empty(0) if dbias is None else dbias


def _backward_fake(qkvo, weight, bias, kv, key, qbar, norm, table, lepe, dy, width, eps):
    return tuple(qkvo.new_empty(0) if x is None else x.new_empty(x.shape) for x in (qkvo, weight, bias))


def _setup(ctx, inputs, output):
    qkvo, weight, bias, *options = inputs
    ctx.save_for_backward(qkvo, weight, bias, *output[1:])
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 5
    saved = ctx.saved_tensors
    dqkvo, dweight, dbias = _backward_op(*saved, dy, *ctx.options)
    return dqkvo, dweight, None if saved[2] is None else dbias, None, None


_backward_op = Op('zoo::rank_augmented_mixer_backward', _backward, _backward_fake)
_op = Op('zoo::rank_augmented_mixer', _forward, _fake, _setup, _gradients)


@register_flop_formula(torch.ops.zoo.rank_augmented_mixer)
def _flops(qkvo_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, heads, dim = qkvo_shape
    return batch * tokens * (heads // 4) * dim * (4 * dim + 2 * weight_shape[-1] ** 2)


@register_flop_formula(torch.ops.zoo.rank_augmented_mixer_backward)
def _backward_flops(qkvo_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(qkvo_shape, weight_shape)


def _one_op(qkvo: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these tensors; where they do not, each half says so by itself."""
    if (
        qkvo.ndim != 4
        or qkvo.stride(-1) != 1
        or qkvo.numel() == 0
        or not _dispatch.takes_triton('rank_augmented', qkvo)
    ):
        return False
    return qkvo.shape[-1] <= MAX_TRITON_DIM and qkvo.shape[-1] % 4 == 0 and weight.shape[-1] <= MAX_TRITON_KERNEL


def rank_augmented_mixer(
    qkvo: Tensor, weight: Tensor, bias: Tensor | None = None, *, height: int, width: int, eps: float = 1e-6
) -> Tensor:
    """(rank_augmented(q, k, v) + DWConv(v)) * o of a fused projection, over a grid of tokens.

    Args:
        qkvo: queries and keys before the activation, values and the plain gate o, side by side: (B, T, 4 H, D) with
            row-major tokens and D a multiple of 4; fp64, fp32, fp16 or bf16.
        weight: of the depthwise convolution (H D, 1, k, k), k odd; its dtype may differ from that of qkvo.
        bias: of the convolution (H D,), or None.
        height: rows of the grid.
        width: columns of the grid, height * width = T.
        eps: added to the attention's denominator.

    Returns:
        (B, T, H, D) in the dtype of qkvo.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    if qkvo.ndim != 4 or qkvo.shape[2] % 4:
        raise ValueError(f'rank_augmented_mixer: qkvo must be (B, T, 4 H, D), got {tuple(qkvo.shape)}')
    channels = qkvo.shape[2] // 4 * qkvo.shape[3]
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(f'rank_augmented_mixer: weight must be ({channels}, 1, k, k), got {tuple(weight.shape)}')
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f'rank_augmented_mixer: weight must have an odd kernel size, got {weight.shape[-1]}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'rank_augmented_mixer: bias must be ({channels},), got {tuple(bias.shape)}')
    for name, x in (('weight', weight), ('bias', bias)):
        if x is not None and x.device != qkvo.device:
            raise ValueError(f'rank_augmented_mixer: {name} must be on {qkvo.device}, got {x.device}')
    if not _dispatch.exporting() and height * width != qkvo.shape[1]:
        raise ValueError(f'rank_augmented_mixer: height * width must be T = {qkvo.shape[1]}, got {height} * {width}')
    if not _one_op(qkvo, weight):
        return _composed(qkvo, weight, bias, height, width, eps)
    return _op(qkvo, weight, bias, width, float(eps))[0]
