"""Depthwise convolution of the Haar bands of a map.

With the 2 x 2 blocks of a channel written as [[p, q], [r, s]], the four bands of the one-level Haar transform, without
its factor, are

    sum          p + q + r + s
    rows         p + q - r - s
    columns      p - q + r - s
    both         p - q - r + s

    y = W^T conv(W x, weight)        W: (B, C, 2h, 2w) to (B, 4C, h, w), bands outermost; W^T W = 4

where each of the 4C maps has its own k x k kernel. Odd heights and widths get a row or column of zeros at the end,
which is cut off again. The bands are sums and differences of slices, in memory that stays channels last: strided and
transposed convolutions with C groups say the same and are slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.kernels import _dispatch
from zoo.kernels.depthwise_conv import depthwise_conv2d

__all__ = ['haar_analysis', 'haar_signs', 'haar_synthesis', 'naive_wavelet_conv2d', 'wavelet_conv2d']


def haar_signs(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The four filters (4, 2, 2) of the table above."""
    signs = [
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, 1.0], [-1.0, -1.0]],
        [[1.0, -1.0], [1.0, -1.0]],
        [[1.0, -1.0], [-1.0, 1.0]],
    ]
    return torch.tensor(signs, device=device, dtype=dtype)


def naive_wavelet_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """The formula with strided and transposed convolutions, bands innermost in between."""
    channels, (height, width) = x.shape[1], x.shape[2:]
    filters = haar_signs(x.device, x.dtype).repeat(channels, 1, 1)[:, None]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    bands = F.conv2d(x, filters, stride=2, groups=channels)
    weight = weight.to(x.dtype).unflatten(0, (4, channels)).transpose(0, 1).flatten(0, 1)
    bands = F.conv2d(bands, weight, padding=weight.shape[-1] // 2, groups=4 * channels)
    return F.conv_transpose2d(bands, filters, stride=2, groups=channels)[:, :, :height, :width]


def haar_analysis(x: Tensor) -> Tensor:
    """W: (B, C, 2h, 2w) to (B, 4C, h, w), in the memory layout of x."""
    top, bottom = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unbind(3)
    (a, b), (c, d) = (top + bottom).unbind(4), (top - bottom).unbind(4)
    return torch.cat((a + b, c + d, a - b, c - d), 1)


def haar_synthesis(y: Tensor) -> Tensor:
    """W^T: (B, 4C, h, w) to (B, C, 2h, 2w), in channels-last memory but for exported programs."""
    rows, channel = 2, 1
    if not _dispatch.exporting():
        y, rows, channel = y.permute(0, 2, 3, 1), 1, 3  # stacking writes memory in the order of dimensions
    total, vertical, horizontal, both = y.chunk(4, channel)
    a, b, c, d = total + horizontal, total - horizontal, vertical + both, vertical - both
    top, bottom = torch.stack((a + c, b + d), rows + 2), torch.stack((a - c, b - d), rows + 2)
    x = torch.stack((top, bottom), rows + 1).flatten(rows + 2, rows + 3).flatten(rows, rows + 1)
    return x if rows == 2 else x.permute(0, 3, 1, 2)


def _lines(x: Tensor, height: int, width: int) -> Tensor:
    """x[:, :, :height, :width] for sizes known only at run time: slices would compare them and fix the answer."""
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


def wavelet_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of the Haar bands of a map.

    Args:
        x: (B, C, H, W), any floating dtype. Channels-last memory is read as it is.
        weight: (4C, 1, k, k), k odd, bands outermost; the factors of W and W^T belong in it.

    Returns:
        (B, C, H, W), channels last in memory.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if x.ndim != 4:
        raise ValueError(f'wavelet_conv2d: x must be (B, C, H, W), got {tuple(x.shape)}')
    if weight.ndim != 4 or weight.shape[:2] != (4 * x.shape[1], 1) or not weight.shape[-1] % 2:
        raise ValueError(
            f'wavelet_conv2d: weight must be (4C, 1, k, k) with C = {x.shape[1]} and odd k, got {tuple(weight.shape)}'
        )
    if _dispatch.forced() == 'naive':
        return naive_wavelet_conv2d(x, weight)
    height, width = x.shape[2:]
    fixed = isinstance(height, int) and isinstance(width, int)
    if not fixed:  # a block more than needed, which changes nothing: a program keeps apart sizes of 1 and above
        x = _lines(F.pad(x, (0, 3, 0, 3)), (height + 3) // 2 * 2, (width + 3) // 2 * 2)
    elif height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    bands = haar_analysis(x)
    if _dispatch.exporting():
        bands = F.conv2d(bands, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    else:
        bands = depthwise_conv2d(bands.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
    y = haar_synthesis(bands)
    return y[:, :, :height, :width] if fixed else _lines(y, height, width)
