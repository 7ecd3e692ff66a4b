"""Selective scans at MobileMamba's and Vision Mamba's shapes, for `zoo bench kernels`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.kernels.selective_scan import selective_scan, selective_scan_2d
from zoo.tools._bench_case import Case

# MobileMamba, shapes (B, D, H, W, R) with one state and two directions: the stages of T2, B1 and B4.
MAPS = {
    'mobilemamba_t2_1': (256, 224, 12, 12, 7),
    'mobilemamba_t2_2': (256, 384, 6, 6, 12),
    'mobilemamba_t2_3': (256, 448, 3, 3, 14),
    'mobilemamba_b1_1': (256, 320, 16, 16, 10),
    'mobilemamba_b1_2': (256, 512, 8, 8, 16),
    'mobilemamba_b1_3': (256, 544, 4, 4, 17),
    'mobilemamba_b4_1': (256, 320, 32, 32, 10),
    'mobilemamba_b4_2': (256, 512, 16, 16, 16),
    'mobilemamba_b4_3': (256, 544, 8, 8, 17),
}
# Vision Mamba (tiny), shapes (B, D, T, N) with one direction. The doubling formula keeps log2(T) tensors of T x N
# numbers per channel for its backward pass: where they do not fit, it is left out.
SEQUENCES = {'vision_mamba_196': (64, 384, 196, 16), 'vision_mamba_4096': (64, 384, 4096, 16)}
_FORMULA_FITS = 2**28
_DIRECTIONS = 2


def _make_map(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A channels-last map and fp32 parameters as MobileMamba initialises them."""
    batch, channels, height, width, rank = shape
    rng = torch.Generator(device).manual_seed(seed)
    draw = lambda *size, of=torch.randn: of(*size, generator=rng, device=device)  # noqa: E731
    x = draw(batch, height, width, channels).to(dtype).permute(0, 3, 1, 2)
    x_proj = draw(_DIRECTIONS, rank + 2, channels) * channels**-0.5
    dt_proj, bias = (0.1 * draw(_DIRECTIONS, channels, *r, of=torch.rand) for r in ((rank,), ()))
    width = _DIRECTIONS * channels
    return x, x_proj, dt_proj, bias, torch.zeros(width, 1, device=device), torch.ones(width, device=device)


def _make_sequence(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """u, delta, A, B, C, D, delta_bias; rates -1 to -N and small steps as Mamba initialises them."""
    batch, channels, length, states = shape
    rng = torch.Generator(device).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=rng, device=device)  # noqa: E731
    u, delta = (draw(batch, channels, length).to(dtype) for _ in range(2))
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    B, C = (draw(batch, 1, states, length).to(dtype) for _ in range(2))
    return u, delta, A, B, C, torch.ones(channels, device=device), draw(channels) - 4


def _doubling(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along the last axis in log2(T) vectorised passes (Hillis and Steele)."""
    shift = 1
    while shift < b.shape[-1]:
        b = torch.cat([b[..., :shift], torch.addcmul(b[..., shift:], a[..., shift:], b[..., :-shift])], -1)
        a = torch.cat([a[..., :shift], a[..., shift:] * a[..., :-shift]], -1)
        shift *= 2
    return b


def _formula(u, delta, A, B, C, D, delta_bias) -> Tensor:
    """One group, softplus on."""
    step = F.softplus(delta.to(A.dtype) + delta_bias[:, None]).unsqueeze(2)  # (B, D, 1, T)
    h = _doubling((step * A.unsqueeze(-1)).exp(), step * u.unsqueeze(2) * B)
    return ((C * h).sum(2) + D[:, None] * u).to(u.dtype)


def _map_formula(x, x_proj, dt_proj, bias, A_logs, Ds) -> Tensor:
    """Permuted copies, per direction its own projections, then the formula: what the published code does."""
    rank, states = dt_proj.shape[-1], A_logs.shape[-1]
    tokens = x.flatten(2)
    A, Ds = (t.unflatten(0, (_DIRECTIONS, -1)) for t in (-A_logs.exp(), Ds))
    total = 0
    for k in range(_DIRECTIONS):
        u = tokens.flip(-1) if k else tokens
        dt, B, C = (x_proj[k].to(x.dtype) @ u).split([rank, states, states], 1)
        y = _formula(u, dt_proj[k].to(x.dtype) @ dt, A[k], B.unsqueeze(1), C.unsqueeze(1), Ds[k], bias[k])
        total = total + (y.flip(-1) if k else y)
    return total.view_as(x)


def _torch_path(op):
    def run(*inputs):
        with zoo.kernel_backend('torch'):
            return op(*inputs)

    return run


def cases() -> list[Case]:
    """The scan over maps at every stage of three models, and along sequences."""
    found = []
    over_map = partial(selective_scan_2d, directions=_DIRECTIONS)
    along = partial(selective_scan, delta_softplus=True)
    for label, shape in MAPS.items():
        batch, channels, height, width, rank = shape
        values, row = 2 * batch * height * width * channels, 2 * batch * height * width * _DIRECTIONS * (rank + 2)
        dims = dict(zip('BDHWR', shape)) | {'N': 1, 'K': _DIRECTIONS}
        peers = {'eager formula': _map_formula, 'torch.compile of the formula': torch.compile(_map_formula),
                 'vectorised torch path': _torch_path(over_map)}  # fmt: skip
        # Forward: x read twice (projection, scan), the projection written and read, y written. Backward: x, dy and the
        # projection read, dx and the projection's gradient written, those two and x read for the projection's own.
        found.append(Case('selective_scan_2d', label, partial(_make_map, shape), over_map, peers,
                          3 * values + 2 * row, 6 * values + 3 * row, dims, batched=(0,)))  # fmt: skip
    for label, shape in SEQUENCES.items():
        batch, channels, length, states = shape
        values, maps = 2 * batch * channels * length, 2 * batch * states * length
        peers = {'vectorised torch path': _torch_path(along)}
        if values * states // 2 < _FORMULA_FITS:
            peers |= {'eager formula': _formula, 'torch.compile of the formula': torch.compile(_formula)}
        found.append(Case('selective_scan', label, partial(_make_sequence, shape), along, peers,
                          3 * values + 2 * maps, 5 * values + 4 * maps, dict(zip('BDTN', shape)),
                          batched=(0, 1, 3, 4)))  # fmt: skip
    return found
