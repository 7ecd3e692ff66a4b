"""State space duality at language-model shapes, for `zoo bench kernels`."""

from __future__ import annotations

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._torch_ssd import ssd_fwd
from zoo.kernels.ssd import ssd, ssd_step_
from zoo.tools._bench_case import Case

# Shapes (B, T, H, G, P, N): B and C per head, and shared by all heads.
SHAPES = {
    'long_64': (1, 65536, 32, 32, 64, 64),
    'long_64_one_group': (1, 65536, 32, 1, 64, 64),
    'wide_128': (4, 8192, 16, 16, 128, 128),
    'wide_128_one_group': (4, 8192, 16, 1, 128, 128),
}
# mmMamba-2.7B: 16 heads of 128 x 128, keys of 8 heads; one token of a batch.
STEPS = {'decode_1': (1, 16, 8, 128, 128), 'decode_64': (64, 16, 8, 128, 128)}


def _make(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C; steps and rates as a freshly initialised Mamba-2 has them, both fp32."""
    batch, length, heads, groups, dim, state_dim = shape
    rng = torch.Generator(device).manual_seed(seed)
    draw = lambda *size, of=torch.randn: of(*size, generator=rng, device=device)  # noqa: E731
    x, B, C = (draw(batch, length, n, d).to(dtype) for n, d in ((heads, dim), (groups, state_dim), (groups, state_dim)))
    return x, F.softplus(draw(batch, length, heads) - 4), -1 - 15 * draw(heads, of=torch.rand), B, C


def _make_step(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    batch, heads, groups, dim, state_dim = shape
    x, dt, A, B, C = _make((batch, 1, heads, groups, dim, state_dim), device, dtype, seed)
    state = torch.zeros(batch, heads, dim, state_dim, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state


def _ours(x, dt, A, B, C):
    return ssd(x, dt, A, B, C)[0]


def _chunks(x, dt, A, B, C):
    return ssd_fwd(x, dt, A, B, C, None, None, False, None)[0]


def _fla(x, dt, A, B, C):
    from fla.ops.simple_gla import chunk_simple_gla

    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    return chunk_simple_gla(C, B, x * dt.unsqueeze(-1).to(x.dtype), dt * A, scale=1.0)[0]


def _step(x, dt, A, B, C, state):
    with torch.no_grad():
        return ssd_step_(x, dt, A, B, C, state)


def _step_formula(x, dt, A, B, C, state):
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    decay = (dt * A).exp()[..., None, None]
    new = state * decay + (dt.unsqueeze(-1) * x).unsqueeze(-1) * B.unsqueeze(-2)
    return (new @ C.to(new.dtype).unsqueeze(-1)).squeeze(-1).to(x.dtype)


def _bytes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Forward: x, B, C read, y written, steps in fp32. Backward: those and dy read, their gradients written."""
    batch, length, heads, groups, dim, state_dim = shape
    tokens = batch * length
    values, maps, steps = 2 * heads * dim, 4 * groups * state_dim, 4 * heads
    return tokens * (2 * values + maps + steps), tokens * (3 * values + 2 * maps + 2 * steps)


def cases() -> list[Case]:
    """The scan at every shape, and single steps of a decoder (forward only: the state is overwritten)."""
    found = []
    for label, shape in SHAPES.items():
        peers = {'chunked matmuls, eager': _chunks, 'fla chunk_simple_gla': _fla}
        found.append(
            Case('ssd', label, partial(_make, shape), _ours, peers, *_bytes(shape), dict(zip('BTHGPN', shape)))
        )
    for label, shape in STEPS.items():
        batch, heads, groups, dim, state_dim = shape
        moved = batch * (8 * heads * dim * state_dim + 4 * heads * (dim + 1) + 4 * groups * state_dim)
        peers = {'formula, eager': _step_formula, 'formula, torch.compile': _compiled_step}
        dims = dict(zip('BHGPN', shape))
        found.append(Case('ssd_step_', label, partial(_make_step, shape), _step, peers, moved, 0, dims,
                          batched=(0, 1, 3, 4, 5), reference=_step_formula))  # fmt: skip
    return found


@functools.cache
def _compiled():
    return torch.compile(_step_formula)


def _compiled_step(*arguments):
    return _compiled()(*arguments)
