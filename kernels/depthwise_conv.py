"""Depthwise 2D convolution on channels-last maps, with the activations and the skip that surround it fused in.

    u = pre_activation(x)                                                    x, u in B x H x W x C
    z[b, h, w, c] = bias[c] + sum_{i, j < k} weight[c, 0, i, j] u[b, h + i - p, w + j - p, c]      p = (k - 1) / 2
    y = activation(z) (+ u with `residual`)

Stride 1, k odd, zeros outside the map (the zeros surround u), so y has the shape of x. The layout is that of tokens on
a grid; `DepthwiseConv2d` gives it to models whose maps are (B, C, H, W) in channels-last memory. Uses: the local mixing
of ViG (arXiv 2405.18425), position encoding, LePE and feed-forward network of RAVLT (arXiv 2411.07635), the depthwise
convolutions of MobileMamba (arXiv 2411.15941).

PyTorch has this convolution, so the torch path is plain `F.conv2d` with autograd and the compiler's fusion; the Triton
kernels are two custom ops, forward and backward. Sums run in fp32 there, and the weight is read in its own dtype.

FLOP convention: two per multiply-add, k^2 of them per output; the backward pass (input and weight gradients) twice
that, and half as much again where an activation makes it recompute z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['DepthwiseConv2d', 'depthwise_conv2d', 'naive_depthwise_conv2d']

ACTIVATIONS = {None: None, 'relu': F.relu, 'silu': F.silu, 'gelu': F.gelu}
PRE_ACTIVATIONS = {None: None, 'gelu': F.gelu}
MAX_TRITON_KERNEL = 7


def naive_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = False,
    activation: str | None = None,
    pre_activation: str | None = None,
) -> Tensor:
    """The sum over taps, one shifted map at a time, in fp32 (fp64 for fp64 input): the oracle of every faster path.

    Arguments and result are those of `depthwise_conv2d`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[1:3]
    size = weight.shape[-1]
    u = _apply(PRE_ACTIVATIONS[pre_activation], x.to(dtype))
    padded = F.pad(u, (0, 0, *(size // 2,) * 4))
    z = torch.zeros_like(u) if bias is None else torch.zeros_like(u) + bias.to(dtype)
    for i in range(size):
        for j in range(size):
            z = z + padded[:, i : i + height, j : j + width] * weight[:, 0, i, j].to(dtype)
    y = _apply(ACTIVATIONS[activation], z)
    return (y + u if residual else y).to(_out_dtype(x, residual))


def _apply(function, x: Tensor) -> Tensor:
    return x if function is None else function(x)


def _torch_depthwise_conv2d(x, weight, bias, residual, activation, pre_activation) -> Tensor:
    """The torch path: operators that autograd, autocast, export and the compiler know."""
    u = _apply(PRE_ACTIVATIONS[pre_activation], x)
    weight = weight.to(u.dtype)
    bias = None if bias is None else bias.to(u.dtype)
    z = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y = _apply(ACTIVATIONS[activation], z.permute(0, 2, 3, 1))
    return y + u if residual else y


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    activation: str | None,
    pre_activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    module = _dispatch.triton_module('depthwise_conv')
    return module.depthwise_conv2d_fwd(x, weight, bias, residual, activation, pre_activation, dtype)


def _forward_fake(x, weight, bias, residual, activation, pre_activation, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    residual: bool,
    activation: str | None,
    pre_activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _dispatch.triton_module('depthwise_conv')
    return module.depthwise_conv2d_bwd(x, weight, bias, dy, residual, activation, pre_activation)


def _backward_fake(x, weight, bias, dy, residual, activation, pre_activation):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


_backward_op = Op('zoo::depthwise_conv2d_backward', _backward, _backward_fake)


def _setup(ctx, inputs, output):
    x, weight, bias, *options, _ = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = options


def _gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(x, weight, bias, dy, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None, None, None, None


_conv_op = Op('zoo::depthwise_conv2d', _forward, _forward_fake, _setup, _gradients)


@register_flop_formula(torch.ops.zoo.depthwise_conv2d)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * weight_shape[-1] ** 2 * torch.Size(x_shape).numel()


@register_flop_formula(torch.ops.zoo.depthwise_conv2d_backward)
def _backward_flops(x_shape, weight_shape, bias_shape, dy_shape, residual, activation, *args, **kwargs) -> int:
    return (2 if activation is None else 3) * _flops(x_shape, weight_shape)


def _out_dtype(x: Tensor, residual: bool) -> torch.dtype:
    """The result's dtype: that of `F.conv2d` (half precision under autocast), promoted by the skip's."""
    dtype = _dispatch.autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x.dtype
    return torch.promote_types(x.dtype, dtype) if residual else dtype


def _check(x, weight, bias, activation, pre_activation) -> None:
    """Refuse what no implementation accepts, naming the argument."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f'depthwise_conv2d: x must be floating-point (B, H, W, C), got {tuple(x.shape)} {x.dtype}')
    channels, taps, device = x.shape[-1], weight.shape, x.device
    size = taps[-1] if taps else 0
    if taps != (channels, 1, size, size):
        raise ValueError(f'depthwise_conv2d: weight must be ({channels}, 1, k, k), got {tuple(taps)}')
    if size % 2 == 0:
        raise ValueError(f'depthwise_conv2d: weight must have an odd kernel size, got {size}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'depthwise_conv2d: bias must be ({channels},), got {tuple(bias.shape)}')
    for name, tensor in (('weight', weight), ('bias', bias)):
        if tensor is not None and (tensor.device != device or not tensor.is_floating_point()):
            raise ValueError(
                f'depthwise_conv2d: {name} must be floating-point on {device}, got {tensor.dtype} on {tensor.device}'
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f'depthwise_conv2d: activation must be one of {list(ACTIVATIONS)}, got {activation!r}')
    if pre_activation not in PRE_ACTIVATIONS:
        raise ValueError(
            f'depthwise_conv2d: pre_activation must be one of {list(PRE_ACTIVATIONS)}, got {pre_activation!r}'
        )


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = False,
    activation: str | None = None,
    pre_activation: str | None = None,
) -> Tensor:
    """Depthwise convolution of a channels-last map: activation(conv(u) + bias) (+ u), with u = pre_activation(x).

    Under autocast the result has the dtype that `F.conv2d` would give it: autocast's, promoted to that of x where the
    skip is added. x is then read as it is, without a copy in half precision.

    Args:
        x: maps (B, H, W, C), fp64, fp32, fp16 or bf16. Views with contiguous channels, such as a slice of a fused
            projection's channels, are read in place on the GPU; any other layout is copied once.
        weight: (C, 1, k, k) as `nn.Conv2d` keeps it, k odd (the kernels: up to 7); its dtype may differ from that of x.
        bias: (C,), or None.
        residual: add u last, after the activation.
        activation: `relu`, `silu` or `gelu` (the exact one) of conv(u) + bias; None for none.
        pre_activation: `gelu` of x before everything else, skip included; None for none.

    Returns:
        (B, H, W, C) in the dtype of x, or what autocast makes of it.

    Raises:
        ValueError: for shapes, dtypes, devices or names that do not fit, naming the argument.
    """
    _check(x, weight, bias, activation, pre_activation)
    if _dispatch.forced() == 'naive':
        names = dict(activation=activation, pre_activation=pre_activation)
        return naive_depthwise_conv2d(x, weight, bias, residual=residual, **names)
    if _dispatch.takes_triton('depthwise_conv', x):
        size = weight.shape[-1]
        if size <= MAX_TRITON_KERNEL:
            dtype = _out_dtype(x, residual)
            return _conv_op(x, weight, bias, residual, activation, pre_activation, dtype)
        _dispatch.select('depthwise_conv', x, unsupported=f'kernel size {size} above {MAX_TRITON_KERNEL}')
    return _torch_depthwise_conv2d(x, weight, bias, residual, activation, pre_activation)


class DepthwiseConv2d(nn.Conv2d):
    """`depthwise_conv2d` as a layer, with the parameters, key names and initialisation of `nn.Conv2d`.

    Maps in channels-last memory are read and written as they are, whichever way their shape is spelled.

    Args:
        dim: channels C.
        kernel_size: k, odd.
        bias: whether to add a bias.
        residual: see `depthwise_conv2d`; so are the activations.
        activation: after the convolution.
        pre_activation: before it.
        nhwc: take and give (B, H, W, C) instead of (B, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        bias: bool = True,
        *,
        residual: bool = False,
        activation: str | None = None,
        pre_activation: str | None = None,
        nhwc: bool = False,
        device=None,
        dtype=None,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f'DepthwiseConv2d: kernel_size must be odd, got {kernel_size}')
        padding = kernel_size // 2
        super().__init__(dim, dim, kernel_size, 1, padding, groups=dim, bias=bias, device=device, dtype=dtype)
        self.residual, self.activation, self.pre_activation = residual, activation, pre_activation
        self.nhwc = nhwc

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W, C) with `nhwc`, to the same."""
        names = dict(activation=self.activation, pre_activation=self.pre_activation)
        x = x if self.nhwc else x.permute(0, 2, 3, 1)
        y = depthwise_conv2d(x, self.weight, self.bias, residual=self.residual, **names)
        return y if self.nhwc else y.permute(0, 3, 1, 2)
