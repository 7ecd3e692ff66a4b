"""Convolution of images, LayerNorm over its channels, activation: what patch embeddings are made of, for inference.

    y[b, i, j] = act(LayerNorm(sum_(c, u, v) weight[:, c, u, v] x[b, c, i S - P + u, j S - P + v] + bias)) + table[i, j]

x (B, CIN, h, w) in any memory format, weight (C, CIN, KH, KW), y (B, oh, ow, C) channels last with
oh = floor((h + 2 P - KH) / S) + 1; table (oh ow, C) is a position embedding. Everything behind the product is fp32. The
Triton kernels have no backward pass, so where gradients are needed the ops it is made of run one by one.

FLOP convention: the product, two per multiply-add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op
from zoo.kernels.norm import layer_norm

__all__ = ['conv_norm', 'fits_conv_norm', 'naive_conv_norm']

ACTIVATIONS = {None: lambda x: x, 'silu': F.silu, 'gelu': F.gelu}


def naive_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_norm: Tensor,
    b_norm: Tensor,
    *,
    eps: float = 1e-5,
    stride: int = 1,
    padding: int = 0,
    activation: str | None = None,
    table: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula over unfolded patches in fp32 or fp64: the oracle; arguments as `conv_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:])]
    patches = F.unfold(x.to(wide), weight.shape[2:], padding=padding, stride=stride).mT
    y = patches @ weight.to(wide).flatten(1).T
    y = y if bias is None else y + bias.to(wide)
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * w_norm.to(wide) + b_norm.to(wide)
    y = ACTIVATIONS[activation](y)
    y = y if table is None else y + table.to(wide)
    return y.unflatten(1, size).to(dtype or x.dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_norm: Tensor,
    b_norm: Tensor,
    eps: float,
    stride: int,
    padding: int,
    activation: str | None,
    table: Tensor | None,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    path = _dispatch.triton_module('conv_norm')
    return path.conv_norm_fwd(
        x, weight, bias, w_norm, b_norm, eps, stride, padding, activation, table, compute, dtype
    )  # fmt: skip


def _fake(x, weight, bias, w_norm, b_norm, eps, stride, padding, activation, table, compute, dtype):
    size = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:]))
    return x.new_empty((x.shape[0], *size, weight.shape[0]), dtype=dtype)


_op = Op('zoo::conv_norm', _forward, _fake)


@register_flop_formula(torch.ops.zoo.conv_norm)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(out_shape[:3]).numel() * torch.Size(weight_shape).numel()


@torch.compiler.assume_constant_result
def _supported(dtype: torch.dtype, c_in: int, c_out: int) -> bool:
    return _dispatch.triton_module('conv_norm').unsupported(dtype, c_in, c_out) is None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return _dispatch.autocast_dtype(x) or weight.dtype


def fits_conv_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv_norm` is one kernel for these of its arguments, with no gradient wanted."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or _dispatch.forced() == 'naive':
        return False
    if not _dispatch.takes_triton('conv_norm', x):
        return False
    return _supported(_compute_dtype(x, weight), weight.shape[1], weight.shape[0])


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_norm: Tensor,
    b_norm: Tensor,
    *,
    eps: float = 1e-5,
    stride: int = 1,
    padding: int = 0,
    activation: str | None = None,
    table: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(LayerNorm(conv(x))) + table, channels last.

    Args:
        x: images (B, CIN, h, w), contiguous or channels last or anything else.
        weight: (C, CIN, KH, KW), in the dtype of the product unless autocast names another.
        bias: (C,) or None.
        w_norm: (C,), of the norm.
        b_norm: (C,), of the norm.
        eps: added to the variance.
        stride: in both directions.
        padding: zeros at every side.
        activation: `silu`, `gelu` (exact) or None.
        table: (oh ow, C) added last, or None.
        dtype: of the result; by default that of the product.

    Returns:
        (B, oh, ow, C).

    Raises:
        ValueError: for arguments that do not fit, naming them.
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f'conv_norm: x must be (B, CIN, h, w) and weight (C, CIN, KH, KW), got {tuple(x.shape)} and '
            f'{tuple(weight.shape)}'
        )
    if not w_norm.shape == b_norm.shape == weight.shape[:1]:
        raise ValueError(
            f'conv_norm: w_norm and b_norm must be ({weight.shape[0]},), got {tuple(w_norm.shape)} and '
            f'{tuple(b_norm.shape)}'
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f'conv_norm: activation must be None, silu or gelu, got {activation!r}')
    options = dict(eps=eps, stride=stride, padding=padding, activation=activation, table=table)
    if _dispatch.forced() == 'naive':
        return naive_conv_norm(x, weight, bias, w_norm, b_norm, **options, dtype=dtype)
    compute = _compute_dtype(x, weight)
    dtype = dtype or compute
    if fits_conv_norm(x, weight):
        return _op(
            x, weight, bias, w_norm, b_norm, float(eps), stride, padding, activation, table, compute, dtype
        )  # fmt: skip
    y = F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), stride, padding).permute(0, 2, 3, 1)
    y = ACTIVATIONS[activation](layer_norm(y, w_norm, b_norm, eps, dtype=dtype))
    return y if table is None else y + table.view(*y.shape[1:]).to(y.dtype)
