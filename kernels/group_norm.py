"""GroupNorm (arXiv 1803.08494) of channels-last images, with SiLU after it where wanted.

For every sample and group of C / G channels, over all its H x W pixels, in fp32 (fp64 for fp64 input):

    y = (x - mean) / sqrt(var + eps) * weight + bias,   optionally y * sigmoid(y)

PyTorch's CUDA op takes channels-first memory only: it copies channels-last images there, gives one program to a sample
and group however large the image is, and the next convolution copies back.

FLOP convention: none are counted, as for PyTorch's own norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['group_norm', 'naive_group_norm']


def naive_group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    silu: bool = False, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The formula in fp32 or fp64: the oracle. Arguments as for `group_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g = x.to(wide).reshape(x.shape[0], groups, -1)
    g = g - g.mean(-1, keepdim=True)
    y = (g * (g.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    shape = 1, -1, *[1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.to(wide).reshape(shape)
    if bias is not None:
        y = y + bias.to(wide).reshape(shape)
    return (y * y.sigmoid() if silu else y).to(dtype or x.dtype)


def _forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _dispatch.triton_module('group_norm').group_norm_fwd(x, groups, weight, bias, eps, silu, dtype)


def _forward_fake(x, groups, weight, bias, eps, silu, dtype):
    return torch.empty_like(x, dtype=dtype), x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)


def _backward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, stats: Tensor, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    path = _dispatch.triton_module('group_norm')
    return path.group_norm_bwd(x, groups, weight, bias, stats, dy, silu)


def _backward_fake(x, groups, weight, bias, stats, dy, silu):
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), sums, torch.empty_like(sums)


_backward_op = Op('zoo::group_norm_backward', _backward, _backward_fake)


def _setup(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, ctx.silu, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _chain(ctx, dy, *_):
    x, weight, bias, stats = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(x, ctx.groups, weight, bias, stats, dy, ctx.silu)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, None, dweight, None if bias is None else dbias.to(bias.dtype), None, None, None


_op = Op('zoo::group_norm', _forward, _forward_fake, _setup, _chain)


def _suits(x: Tensor) -> bool:
    """Whether the kernel takes this tensor: an image with its channels side by side in memory."""
    return x.ndim == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise every group of channels of every sample.

    Args:
        x: (B, C, ...), of any floating dtype. The Triton kernel takes (B, C, H, W) in channels-last memory; everything
            else goes to PyTorch's op.
        groups: G, a divisor of C.
        weight: (C,), 1 if absent.
        bias: (C,), 0 if absent.
        eps: added to the variance.
        silu: whether SiLU follows.
        dtype: of the result; x's by default.

    Returns:
        x's shape and memory format.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f'group_norm: groups must divide the channels of x (B, C, ...), got {groups} for '
                         f'{tuple(x.shape)}')  # fmt: skip
    for name, given in (('weight', weight), ('bias', bias)):
        if given is not None and given.shape != x.shape[1:2]:
            raise ValueError(f'group_norm: {name} must be ({x.shape[1]},) for x {tuple(x.shape)}, '
                             f'got {tuple(given.shape)}')  # fmt: skip
    dtype = dtype or x.dtype
    if _dispatch.forced() == 'naive':
        return naive_group_norm(x, groups, weight, bias, eps, silu, dtype)
    if _suits(x) and x.numel() and _dispatch.takes_triton('group_norm', x):
        return _op(x, groups, weight, bias, eps, silu, dtype)[0]
    same = [None if w is None else w.to(x.dtype) for w in (weight, bias)]
    y = F.group_norm(x, groups, *same, eps)
    return (F.silu(y) if silu else y).to(dtype)
