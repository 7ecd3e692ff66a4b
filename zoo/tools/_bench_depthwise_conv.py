"""Depthwise convolutions of ViG, RAVLT and MobileMamba at 224, 192 and 1024 pixels, for `zoo bench kernels`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.depthwise_conv import depthwise_conv2d
from zoo.tools._bench_case import Case

# (B, H, W, C), kernel size, bias, options; `slice`: x is a quarter of a wider map's channels.
SHAPES = {
    'vig_small_224': ((256, 14, 14, 384), 3, False, {}),
    'vig_tiny_1024_silu': ((16, 64, 64, 192), 3, False, dict(activation='silu')),
    'ravlt_tiny_224_pos': ((256, 56, 56, 64), 3, True, dict(residual=True)),
    'ravlt_tiny_224_lepe': ((256, 56, 56, 64), 5, True, dict(slice=True)),
    'ravlt_tiny_224_ffn': ((256, 56, 56, 224), 3, True, dict(residual=True, pre_activation='gelu')),
    'ravlt_tiny_224_stage3_pos': ((256, 14, 14, 256), 3, True, dict(residual=True)),
    'ravlt_tiny_224_stage3_lepe': ((256, 14, 14, 256), 5, True, dict(slice=True)),
    'ravlt_tiny_224_stage3_ffn': ((256, 14, 14, 896), 3, True, dict(residual=True, pre_activation='gelu')),
    'mobilemamba_192_3x3': ((256, 12, 12, 144), 3, True, dict(residual=True)),
    'mobilemamba_192_silu': ((256, 12, 12, 144), 3, True, dict(activation='silu')),
    'mobilemamba_192_7x7': ((256, 12, 12, 144), 7, False, {}),
}


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool = False,
    activation: str | None = None,
    pre_activation: str | None = None,
) -> Tensor:
    """The op in PyTorch's words: cuDNN on maps in channels-last memory. Arguments as `depthwise_conv2d`."""
    u = getattr(F, pre_activation)(x) if pre_activation else x
    padding, channels = weight.shape[-1] // 2, x.shape[-1]
    y = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    y = getattr(F, activation)(y) if activation else y
    return y + u if residual else y


def _make(shape: tuple[int, ...], size: int, bias: bool, sliced: bool, device: str, dtype: torch.dtype, seed: int):
    rng = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    channels = shape[-1]
    x = draw(*shape[:3], 4 * channels)[..., 2 * channels : 3 * channels] if sliced else draw(*shape)
    return x, draw(channels, 1, size, size) / size, draw(channels) if bias else None


def _bytes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Forward: x read, y written. Backward: x and dy read, dx written. Weights are nothing beside them."""
    size = torch.Size(shape).numel() * 2
    return 2 * size, 3 * size


def cases() -> list[Case]:
    """The convolutions with what surrounds them in the models."""
    found = []
    for label, (shape, size, bias, options) in SHAPES.items():
        options = dict(options)
        make = partial(_make, shape, size, bias, options.pop('slice', False))
        eager = partial(formula, **options)
        peers = {'F.conv2d, eager': eager, 'F.conv2d, torch.compile': torch.compile(eager)}
        dims = dict(zip('BHWC', shape)) | {'k': size}
        ours = partial(depthwise_conv2d, **options)
        found.append(Case('depthwise_conv2d', label, make, ours, peers, *_bytes(shape), dims, (0,)))
    return found
