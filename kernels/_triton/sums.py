"""Gradients of an op's parameters from the shares of the programs that made them: all of an op's sums in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from zoo.kernels._triton._common import Launch, ceil_div, next_power

_TILE = 2048  # numbers of a step
SIZES = [f'{name}_{i}' for i in range(3) for name in ('rows', 'cols')] + ['blocks_0', 'blocks_1']


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    shares, out_0, out_1, out_2, rows_0, cols_0, rows_1, cols_1, rows_2, cols_2, blocks_0, blocks_1,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of three matrices, one behind the other in `shares`. Program: a block of columns of one."""
    pid = tl.program_id(0)
    first = pid < blocks_0
    second = pid < blocks_0 + blocks_1
    block = tl.where(first, pid, tl.where(second, pid - blocks_0, pid - blocks_0 - blocks_1))
    rows = tl.where(first, rows_0, tl.where(second, rows_1, rows_2))
    width = tl.where(first, cols_0, tl.where(second, cols_1, cols_2))
    one = tl.cast(rows_0, tl.int64) * cols_0
    shares += tl.where(first, 0, tl.where(second, one, one + tl.cast(rows_1, tl.int64) * cols_1))
    cols = block * BC + tl.arange(0, BC)
    ok = cols < width
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        at = row.to(tl.int64)[:, None] * width + cols[None, :]
        total += tl.load(shares + at, mask=(row < rows)[:, None] & ok[None, :], other=0.0)
    total = tl.sum(total, 0)
    if out_0 is not None:
        tl.store(out_0 + cols, total.to(out_0.dtype.element_ty), mask=ok & first)
    if out_1 is not None:
        tl.store(out_1 + cols, total.to(out_1.dtype.element_ty), mask=ok & second & (pid >= blocks_0))
    if out_2 is not None:
        tl.store(out_2 + cols, total.to(out_2.dtype.element_ty), mask=ok & (pid >= blocks_0 + blocks_1))


class Sums:
    """The launch that adds the rows of up to three fp32 matrices, which lie one behind the other, in a fixed order.

    Args:
        shapes: (rows, columns) of the matrices.
        wanted: which of the sums to take; all by default.
    """

    def __init__(self, *shapes: tuple[int, int], wanted: tuple[bool, ...] = (True, True, True)):
        shapes = (*shapes, *[(0, 0)] * (3 - len(shapes)))
        self.sizes = [rows * cols for rows, cols in shapes]
        self.total = sum(self.sizes)
        most = max(shapes, key=lambda shape: shape[0] * shape[1])[0]
        br = min(128, next_power(most, 1))  # few steps, each of which waits for memory
        bc = _TILE // br
        blocks = [ceil_div(cols, bc) if want else 0 for (_, cols), want in zip(shapes, wanted)]
        sizes = *(n for shape in shapes for n in shape), *blocks[:2]
        self.run = Launch(sums_kernel, (sum(blocks), 1, 1), sizes, {'BR': br, 'BC': bc})

    def __call__(self, shares: torch.Tensor, *outs: torch.Tensor | None) -> None:
        """Sums of `shares`, `total` fresh numbers, to contiguous fresh tensors of any dtypes, None where not wanted."""
        self.run(True, shares, *outs, *[None] * (3 - len(outs)))
