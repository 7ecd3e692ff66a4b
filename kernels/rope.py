"""Axial rotary position embedding of image tokens, interleaved pairs.

For a head of D channels (a multiple of 4) there are m = D / 4 frequencies f_t = 10000 ** (-t / (m - 1)), t = 0..m-1,
both ends included. The first half of a head turns with the token's row, the second with its column: channels
(2j, 2j + 1) are a pair that turns by row * f_j for j < m and by column * f_{j-m} for j >= m. Tokens are in row-major
order, coordinates are whole numbers from 0 at every resolution.

Source: RAVLT, arXiv 2411.07635 and its code (an exponent of t / (m - 1), not of t / m). Angles are fp32, as there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ['apply_rope', 'axial_rope_tables']

LOG2_BASE = math.log2(10000.0)


def axial_rope_tables(
    height: int, width: int, dim: int, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles.

    Args:
        height: rows of the token grid.
        width: columns of the token grid.
        dim: channels of a head, a multiple of 4.
        device: where the tables are made.

    Returns:
        Two fp32 tables (height * width, dim); both channels of a pair carry the same value.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f'axial_rope_tables: dim must be a multiple of 4, got {dim}')
    steps = dim // 4
    count = lambda n: torch.arange(n, device=device, dtype=torch.float32)  # noqa: E731
    # An exponent rounded in fp32 would turn the 256th row by up to 1e-4: its leading bits are kept apart, exact.
    exponent = LOG2_BASE / max(steps - 1, 1)
    leading = round(exponent * 1024) / 1024
    frequencies = torch.exp2(-leading * count(steps)) * torch.exp2((leading - exponent) * count(steps))
    frequencies = frequencies.repeat_interleave(2)
    rows, columns = count(height)[:, None] * frequencies, count(width)[:, None] * frequencies
    # Trigonometry on one row and one column of the grid only, then spread over it.
    tables = []
    for function in (torch.cos, torch.sin):
        by_row = function(rows)[:, None].expand(height, width, 2 * steps)
        by_column = function(columns)[None].expand(height, width, 2 * steps)
        tables.append(torch.cat((by_row, by_column), -1).flatten(0, 1))
    return tables[0], tables[1]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of the last dimension: x * cos + R(x) * sin with R(x)[2j] = -x[2j+1], R(x)[2j+1] = x[2j].

    Args:
        x: (..., D), any floating dtype.
        cos: fp32, to broadcast against x: (T, D) for x (B, H, T, D), (T, 1, D) for x (B, T, H, D).
        sin: like `cos`; its negative turns back.

    Returns:
        A tensor like x, computed in fp32 (fp64 for fp64 input).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)
