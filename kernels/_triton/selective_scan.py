"""The selective scan on GPUs, host side: layouts, scratch, launches and the sums of partial gradients.

One warp per program, 32 channels each: with MobileMamba's widths, all multiples of 32, no lane idles, and a batch of
256 gives every scheduler of a large GPU several warps. Backward passes recompute the states from the inputs, keep them
at the starts of tiles for one stretch of the sequence at a time, and write partial sums that are added in a fixed order
here: results do not vary from run to run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from zoo.kernels._triton._common import alignment, ceil_div, compute_types, interpreting, launch, next_power
from zoo.kernels._triton.selective_scan_kernels import (
    selective_scan_2d_kernel_backward,
    selective_scan_2d_kernel_forward,
    selective_scan_kernel_backward,
    selective_scan_kernel_forward,
)

BLOCK = 32  # channels per program
STEPS = 8  # tokens of a sequence per tile: 16 bytes of contiguous ones in half precision
TILE = 16  # tokens of a map per tile, as many as a matrix product needs
MAX_STATES = 32
MAX_ROW = 128  # numbers per token and direction that are projected for a scan over maps, R + 2 N
KEEP_ALL = 64  # states per channel, tiles times N, up to which a backward pass keeps those of all tiles


def unsupported(u: Tensor, A: Tensor, rank: int = 0) -> str | None:
    """Why the kernels cannot take these arguments, or None when they can."""
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'dtype {u.dtype}'
    if A.shape[1] > MAX_STATES:
        return f'more than {MAX_STATES} states (N = {A.shape[1]})'
    if rank and rank + 2 * A.shape[1] > MAX_ROW:
        return f'R + 2 N above {MAX_ROW} (R = {rank}, N = {A.shape[1]})'
    return None


def _products(dtype: torch.dtype) -> tuple:
    """Operand type and precision of the products: of fp32 values, which half-precision inputs round to tf32."""
    return compute_types(torch.float16 if dtype == torch.bfloat16 else dtype)


def _block(channels: int) -> int:
    return min(BLOCK, next_power(channels)) if interpreting() else BLOCK


def _stretch(tiles: int, states: int) -> tuple[int, int]:
    """Tiles per stretch of a backward pass, and how many stretches: one, or about the square root of the tiles."""
    every = tiles if tiles * states <= KEEP_ALL else math.isqrt(tiles - 1) + 1
    return every, ceil_div(tiles, every)


def _contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if x is None else x.to(dtype or x.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Along sequences


def _consts(u, A, B, D, bias, delta_softplus, reverse, tensors) -> dict:
    """Compile-time constants; tokens count as contiguous if they are so in all of `tensors`."""
    states, channels = A.shape[1], u.shape[1] // B.shape[1]
    tlast = all(x.stride(2) == 1 for x in tensors) and not reverse
    compute, precision = _products(u.dtype)
    block = _block(channels)
    return {
        'N': states, 'NP': next_power(states, 1), 'BT': STEPS, 'BD': block, 'EXACT': channels % block == 0,
        'EVEN': u.shape[2] % STEPS == 0, 'SKIP': D is not None, 'BIAS': bias is not None,
        'SOFTPLUS': bool(delta_softplus), 'REVERSE': bool(reverse), 'TLAST': tlast,
        'UNIT': alignment(*tensors) if tlast else 1, 'CT': compute, 'PREC': precision,
    }  # fmt: skip


def _strides(x: Tensor, unit: int) -> list[int]:
    """Batch, token and channel strides of (B, G D, T); batch and channel in units of `unit`."""
    return [x.stride(0) // unit, x.stride(2), x.stride(1) // unit]


def _state_strides(x: Tensor) -> list[int]:
    """Batch, group, token and state strides of (B, G, N, T)."""
    return [x.stride(0), x.stride(1), x.stride(3), x.stride(2)]


def selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """Outputs (B, G D, T), laid out like u; arguments as `zoo.kernels.selective_scan.selective_scan`."""
    y = torch.empty_like(u)
    consts = _consts(u, A, B, D, delta_bias, delta_softplus, reverse, (u, delta, y))
    groups, channels, unit = B.shape[1], u.shape[1] // B.shape[1], consts['UNIT']
    blocks = ceil_div(channels, consts['BD'])
    tensors = (u, delta, _contiguous(A, torch.float32), B, C, _contiguous(D), _contiguous(delta_bias), y)
    sizes = (u.shape[2], channels, groups, blocks, *_strides(u, unit), *_strides(delta, unit), *_state_strides(B),
             *_state_strides(C), *_strides(y, unit))  # fmt: skip
    launch(selective_scan_kernel_forward, (u.shape[0] * groups * blocks, 1, 1), tensors, sizes, consts, warps=1,
           registers=128)  # fmt: skip
    return y


def selective_scan_bwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, dy):
    """Gradients du, ddelta, dA, dB, dC, dD (or None), ddelta_bias (or None) in the dtypes of their inputs."""
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    consts = _consts(u, A, B, D, delta_bias, delta_softplus, reverse, (u, delta, dy, du, ddelta))
    batch, width, length = u.shape
    groups, states, unit = B.shape[1], A.shape[1], consts['UNIT']
    channels = width // groups
    blocks = ceil_div(channels, consts['BD'])
    every, stretches = _stretch(ceil_div(length, STEPS), states)
    consts = {'ONE': stretches == 1} | consts
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=u.device)  # noqa: E731
    dB, dC = new(blocks, *B.shape), new(blocks, *C.shape)
    dA, dD, dbias = new(batch, *A.shape), new(batch, width), new(batch, width)
    far, near = new(batch, stretches, states, width), new(batch, every, states, width)
    tensors = (u, delta, _contiguous(A, torch.float32), B, C, _contiguous(D), _contiguous(delta_bias), dy, du, ddelta,
               dB, dC, dA, dD, dbias, far, near)  # fmt: skip
    sizes = (length, channels, groups, blocks, batch, every, stretches, *_strides(u, unit), *_strides(delta, unit),
             *_state_strides(B), *_state_strides(C), *_strides(dy, unit), *_strides(du, unit),
             *_strides(ddelta, unit))  # fmt: skip
    launch(selective_scan_kernel_backward, (batch * groups * blocks, 1, 1), tensors, sizes, consts, warps=1)
    total = lambda x, like: None if like is None else x.sum(0).to(like.dtype)  # noqa: E731
    return du, ddelta, total(dA, A), total(dB, B), total(dC, C), total(dD, D), total(dbias, delta_bias)


# --------------------------------------------------------------------------------------------------------------------
# Over maps


def _map_consts(x, p, A, rank, directions, row: int) -> dict:
    """Compile-time constants; `row` numbers of a pixel's projection take part in products."""
    states, channels, block = A.shape[1], x.shape[3], _block(x.shape[3])
    compute, precision = _products(x.dtype)
    return {
        'K': directions, 'channels': channels, 'columns': p.shape[3], 'R': rank, 'N': states,
        'NP': next_power(states, 1), 'BT': TILE, 'BD': block, 'EXACT': channels % block == 0, 'RP': next_power(row),
        'EVEN': x.shape[1] * x.shape[2] % TILE == 0, 'CT': compute, 'PREC': precision,
    }  # fmt: skip


def selective_scan_2d_fwd(x, p, dt_weight, dt_bias, A, D, directions):
    """Merged outputs (B, H, W, D) in x's dtype.

    Args:
        x: (B, H, W, D).
        p: projections of x for all directions (B, H, W, K (R + 2 N)): dt, B and C of direction 0, then of 1, ...
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A: (K D, N).
        D: skip gains (K D,).
        directions: K.
    """
    batch, height, width, channels = x.shape
    rank = dt_weight.shape[2]
    consts = _map_consts(x, p, A, rank, directions, rank)
    blocks = ceil_div(channels, consts['BD'])
    x, p, w, bias, D = (_contiguous(t) for t in (x, p, dt_weight, dt_bias, D))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (height * width, height, width, blocks)
    tensors = (x, p, w, bias, _contiguous(A, torch.float32), D, y)
    launch(selective_scan_2d_kernel_forward, (batch * blocks, 1, 1), tensors, sizes, consts, warps=1, registers=128)
    return y


def selective_scan_2d_bwd(x, p, dt_weight, dt_bias, A, D, directions, dy):
    """Gradients dx, dp, ddt_weight, ddt_bias, dA, dD in the dtypes of their inputs."""
    batch, height, width, channels = x.shape
    rank, states, length = dt_weight.shape[2], A.shape[1], height * width
    consts = _map_consts(x, p, A, rank, directions, rank + 2 * states)
    blocks = ceil_div(channels, consts['BD'])
    tiles = ceil_div(length, TILE)
    x, p, w, bias, D, dy = (_contiguous(t) for t in (x, p, dt_weight, dt_bias, D, dy))
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    dx, dp, dA, dD = torch.empty_like(x), new(blocks, *p.shape), new(batch, *A.shape), new(batch, channels)
    dbias, dw = new(batch, *dt_bias.shape), new(batch, *dt_weight.shape)
    near = new(batch, tiles, states, channels)
    tensors = (x, p, w, bias, _contiguous(A, torch.float32), D, dy, dx, dp, dA, dD, dbias, dw, near)
    sizes = (length, height, width, blocks, batch, tiles)
    launch(selective_scan_2d_kernel_backward, (batch * blocks, 1, 1), tensors, sizes, consts, warps=1)
    total = lambda t, like: t.sum(0).to(like.dtype)  # noqa: E731
    dD = dD.sum(0).repeat(directions).to(D.dtype)
    return dx, total(dp, p), total(dw, dt_weight), total(dbias, dt_bias), total(dA, A), dD
