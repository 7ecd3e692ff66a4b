"""Convolutions on maps in channels-last memory, and what folds a BatchNorm into them.

Maps are (B, C, h, w) by shape, channels last by memory: 1 x 1 convolutions are then matrix products over the channels
and depthwise ones the kernels of `zoo.kernels.depthwise_conv`. A module with a method `fuse` gives its folded form, in
place or as a new module; timm's `reparameterize_model` calls the same method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn
from zoo.kernels import _dispatch
from zoo.kernels.depthwise_conv import depthwise_conv2d

__all__ = ['Conv', 'ConvBN', 'Residual', 'conv2d', 'fold', 'fuse_children', 'pad_widths', 'to_channels_last']


@register_notrace_function
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, act: str | None = None) -> Tensor:
    """Convolution with padding k // 2 of a map in channels-last memory, then an activation.

    Args:
        x: (B, C, h, w).
        weight: (O, C, k, k), or (C, 1, k, k) for a depthwise convolution.
        bias: (O,).
        stride: of the kernel.
        act: `relu`, `silu` or None.
    """
    kernel, depthwise = weight.shape[-1], weight.shape[1] == 1 < x.shape[1]
    if depthwise and stride == 1 and not _dispatch.exporting():
        return depthwise_conv2d(x.permute(0, 2, 3, 1), weight, bias, activation=act).permute(0, 3, 1, 2)
    if kernel == 1 and not _dispatch.exporting():
        x = x.permute(0, 2, 3, 1)
        # Two dimensions, so that a slice of channels is read where it lies.
        y = F.linear(x.reshape(-1, x.shape[-1]), weight.flatten(1), bias)
        y = y.view(*x.shape[:-1], len(weight)).permute(0, 3, 1, 2)
    else:
        y = F.conv2d(x, weight, bias, stride, kernel // 2, 1, x.shape[1] if depthwise else 1)
    return getattr(F, act)(y) if act else y


@register_notrace_function
def to_channels_last(x: Tensor) -> Tensor:
    """Images in channels-last memory; exported programs leave layouts to their runtime."""
    return x if _dispatch.exporting() else x.contiguous(memory_format=torch.channels_last)


class Conv(nn.Module):
    """Convolution with bias: a `ConvBN` after folding."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1):
        super().__init__()
        self.weight, self.bias, self.stride = nn.Parameter(weight), nn.Parameter(bias), stride

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride)


def fold(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without bias followed by a BatchNorm."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), bn.bias - bn.running_mean * scale


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm whose gain starts at `gain`."""

    def __init__(self, dim: int, out: int, kernel=1, stride=1, groups=1, gain=1.0, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.c = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out, **dd)
        self.stride = stride
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(conv2d(x, self.c.weight, None, self.stride))

    @torch.no_grad()
    def fuse(self) -> Conv:
        return Conv(*fold(self.c.weight, self.bn), self.stride)


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m, self.skip = m, True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x) if self.skip else self.m(x)

    @torch.no_grad()
    def fuse(self) -> Residual:
        """Fold; the identity beside a depthwise convolution becomes part of its centre tap."""
        if isinstance(self.m, ConvBN):
            self.m, self.skip = self.m.fuse(), False
            centre = self.m.weight.shape[-1] // 2
            self.m.weight.data[:, :, centre, centre] += 1
        return self


def fuse_children(module: nn.Module) -> None:
    """Give every module below its folded form, the outermost first (the order of timm's `reparameterize_model`)."""
    for name, child in list(module.named_children()):
        if hasattr(child, 'fuse'):
            setattr(module, name, child.fuse())
        fuse_children(getattr(module, name))


def pad_widths(convs: Sequence[Conv], multiple: int = 8) -> None:
    """Bring the widths between convolutions with ReLU up to a multiple with channels that stay 0.

    Half-precision convolutions of channels-last maps need it to run on tensor cores without copies.
    """
    for first, second in zip(convs, convs[1:]):
        more = -first.weight.shape[0] % multiple
        first.weight = nn.Parameter(F.pad(first.weight, (0, 0) * 3 + (0, more)))
        first.bias = nn.Parameter(F.pad(first.bias, (0, more)))
        second.weight = nn.Parameter(F.pad(second.weight, (0, 0) * 2 + (0, more)))
