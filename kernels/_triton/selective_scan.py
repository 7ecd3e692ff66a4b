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
from zoo.kernels._triton._common import (
    Launch,
    aligned,
    alignment,
    ceil_div,
    compute_types,
    interpreting,
    next_power,
    on_device_of_first,
    plan,
)
from zoo.kernels._triton.selective_scan_kernels import (
    selective_scan_2d_kernel_backward,
    selective_scan_2d_kernel_forward,
    selective_scan_kernel_backward,
    selective_scan_kernel_forward,
)
from zoo.kernels._triton.sums import Sums

BLOCK = 32  # channels per program
STEPS = 8  # tokens of a sequence per tile: 16 bytes of contiguous ones in half precision
TILE = 16  # tokens of a map per tile, as many as a matrix product needs
MAX_STATES = 32
MAX_ROW = 128  # numbers per token and direction that are projected for a scan over maps, R + 2 N
KEEP_ALL = 64  # states per channel, tiles times N, up to which a backward pass keeps those of all tiles


def unsupported(dtype: torch.dtype, N: int, rank: int = 0) -> str | None:
    """Why the kernels cannot take u of a dtype, N states and steps of that rank (0: given), or None."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'dtype {str(dtype).removeprefix("torch.")}'
    if N > MAX_STATES:
        return f'more than {MAX_STATES} states (N = {N})'
    if rank and rank + 2 * N > MAX_ROW:
        return f'R + 2 N above {MAX_ROW} (R = {rank}, N = {N})'
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
    if x is None or (x.is_contiguous() and (dtype is None or x.dtype == dtype)):
        return x
    return x.to(dtype or x.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Along sequences


def _strides(x: Tensor, unit: int) -> list[int]:
    """Batch, token and channel strides of (B, G D, T); batch and channel in units of `unit`."""
    return [x.stride(0) // unit, x.stride(2), x.stride(1) // unit]


def _state_strides(x: Tensor) -> list[int]:
    """Batch, group, token and state strides of (B, G, N, T)."""
    return [x.stride(0), x.stride(1), x.stride(3), x.stride(2)]


class _SequencePlan:
    """The launch of one pass along sequences, and the shapes of its scratch.

    Args:
        delta_softplus: as for the op, like all that follow.
        reverse: from the last token to the first.
        u: (B, G D, T), like the other tensors with their own strides.
        dy: gradient of the outputs, in a backward pass.
    """

    def __init__(self, delta_softplus: bool, reverse: bool, u, delta, A, B, C, D, bias, dy=None):
        self.in_place = _contiguous(A, torch.float32) is A and _contiguous(D) is D and _contiguous(bias) is bias
        du, ddelta = (torch.empty_like(x, device='meta') for x in (u, delta))  # in a forward pass y lies like du
        tiles = (u, delta, du) if dy is None else (u, delta, dy, du, ddelta)
        (batch, width, length), groups, states = u.shape, B.shape[1], A.shape[1]
        channels, block = width // groups, _block(width // groups)
        blocks = ceil_div(channels, block)
        tlast = all(x.stride(2) == 1 for x in tiles) and not reverse
        unit = alignment(*tiles) if tlast else 1
        compute, precision = _products(u.dtype)
        every, stretches = _stretch(ceil_div(length, STEPS), states)
        consts = {
            'N': states, 'NP': next_power(states, 1), 'BT': STEPS, 'BD': block, 'EXACT': channels % block == 0,
            'EVEN': length % STEPS == 0, 'SKIP': D is not None, 'BIAS': bias is not None,
            'SOFTPLUS': bool(delta_softplus), 'REVERSE': bool(reverse), 'TLAST': tlast, 'UNIT': unit, 'CT': compute,
            'PREC': precision,
        }  # fmt: skip
        inputs = *_strides(u, unit), *_strides(delta, unit), *_state_strides(B), *_state_strides(C)
        rest = [s for x in tiles[2:] for s in _strides(x, unit)]
        grid, sizes = (batch * groups * blocks, 1, 1), (length, channels, groups, blocks)
        if dy is None:
            self.run = Launch(selective_scan_kernel_forward, grid, (*sizes, *inputs, *rest), consts, 1, 2, 128)
            return
        sizes = *sizes, batch, every, stretches, *inputs, *rest
        self.run = Launch(selective_scan_kernel_backward, grid, sizes, {'ONE': stretches == 1} | consts, 1)
        self.sums = Sums((blocks, B.numel()), (blocks, C.numel()), (batch, A.numel()))
        self.gains = Sums((batch, width), (batch, width), wanted=(D is not None, bias is not None))
        kept = [batch * count * states * width for count in (stretches, every)]
        self.scratch = [*self.sums.sizes, *self.gains.sizes[:2], *kept]


@on_device_of_first
def selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """Outputs (B, G D, T), laid out like u; arguments as `zoo.kernels.selective_scan.selective_scan`."""
    steps = plan(_SequencePlan, (delta_softplus, reverse), u, delta, A, B, C, D, delta_bias)
    if not steps.in_place:
        A, D, delta_bias = _contiguous(A, torch.float32), _contiguous(D), _contiguous(delta_bias)
    y = torch.empty_like(u)
    steps.run(aligned(u, delta, A, B, C, D, delta_bias), u, delta, A, B, C, D, delta_bias, y)
    return y


@on_device_of_first
def selective_scan_bwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, dy):
    """Gradients du, ddelta, dA, dB, dC, dD (or None), ddelta_bias (or None) in the dtypes of their inputs."""
    rate, gains, bias = _contiguous(A, torch.float32), _contiguous(D), _contiguous(delta_bias)
    inputs = u, delta, rate, B, C, gains, bias, dy
    steps = plan(_SequencePlan, (delta_softplus, reverse), *inputs)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    scratch = _scratch(steps.scratch, u.device)
    steps.run(aligned(*inputs, *scratch), *inputs, du, ddelta, *scratch)
    dB, dC, dA, dD, dbias = (None if x is None else x.new_empty(*x.shape) for x in (B, C, A, D, delta_bias))
    steps.sums(scratch[0], dB, dC, dA)
    steps.gains(scratch[3], dD, dbias)
    return du, ddelta, dA, dB, dC, dD, dbias


def _scratch(sizes: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """fp32 numbers in one piece of memory, which `Sums` wants of those that it adds."""
    return torch.empty(sum(sizes), dtype=torch.float32, device=device).split_with_sizes(sizes)


# --------------------------------------------------------------------------------------------------------------------
# Over maps


class _MapPlan:
    """The launch of one pass over maps, and the shapes of its scratch; arguments as of the passes."""

    def __init__(self, directions: int, x, p, dt_weight, dt_bias, A, D, dy=None):
        (batch, height, width, channels), rank, states = x.shape, dt_weight.shape[2], A.shape[1]
        self.in_place = A.dtype == torch.float32 and all(t.is_contiguous() for t in (x, p, dt_weight, dt_bias, A, D))
        block, length = _block(channels), height * width
        blocks, tiles = ceil_div(channels, block), ceil_div(length, TILE)
        compute, precision = _products(x.dtype)
        row = rank if dy is None else rank + 2 * states  # numbers of a pixel's projection that are in products
        consts = {
            'K': directions, 'channels': channels, 'columns': p.shape[3], 'R': rank, 'N': states,
            'NP': next_power(states, 1), 'BT': TILE, 'BD': block, 'EXACT': channels % block == 0,
            'RP': next_power(row), 'EVEN': length % TILE == 0, 'CT': compute, 'PREC': precision,
        }  # fmt: skip
        grid, sizes = (batch * blocks, 1, 1), (length, height, width, blocks)
        if dy is None:
            self.run = Launch(selective_scan_2d_kernel_forward, grid, sizes, consts, 1, 2, 128)
            return
        self.run = Launch(selective_scan_2d_kernel_backward, grid, (*sizes, batch, tiles), consts, 1)
        self.sums = Sums((blocks, p.numel()), (batch, A.numel()), (batch, channels))
        self.gains = Sums((batch, dt_bias.numel()), (batch, dt_weight.numel()))
        self.scratch = [*self.sums.sizes, *self.gains.sizes[:2], batch * tiles * states * channels]


@on_device_of_first
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
    inputs = x, p, dt_weight, dt_bias, A, D
    steps = plan(_MapPlan, (directions,), *inputs)
    if not steps.in_place:
        inputs = *(_contiguous(t) for t in inputs[:4]), _contiguous(A, torch.float32), _contiguous(D)
        x = inputs[0]
    y = torch.empty_like(x)
    steps.run(aligned(*inputs), *inputs, y)
    return y


@on_device_of_first
def selective_scan_2d_bwd(x, p, dt_weight, dt_bias, A, D, directions, dy):
    """Gradients dx, dp, ddt_weight, ddt_bias, dA, dD in the dtypes of their inputs."""
    x, p, w, bias, gains, dy = (_contiguous(t) for t in (x, p, dt_weight, dt_bias, D, dy))
    inputs = x, p, w, bias, _contiguous(A, torch.float32), gains, dy
    steps = plan(_MapPlan, (directions,), *inputs)
    dx = torch.empty_like(x)
    scratch = _scratch(steps.scratch, x.device)
    steps.run(aligned(*inputs, *scratch), *inputs, dx, *scratch)
    dp, dw, dbias, dA = (t.new_empty(*t.shape) for t in (p, dt_weight, dt_bias, A))
    dD = D.new_empty(x.shape[-1])
    steps.sums(scratch[0], dp, dA, dD)
    steps.gains(scratch[3], dbias, dw)
    return dx, dp, dw, dbias, dA, dD.repeat(directions)
