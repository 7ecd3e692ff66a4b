"""Gated linear attention at ViG's shapes, for `zoo bench kernels`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.gla import bidirectional_gla, gated_linear_attention
from zoo.tools._bench_case import Case

# Shapes (B, T, H, K, V) of the scans in ViG at the stated image size.
SHAPES = {
    'vig_small_224': (128, 196, 6, 32, 64),
    'vig_small_1024': (16, 4096, 6, 32, 64),
    'vig_base_224': (128, 196, 12, 32, 64),
}


def _make(shape: tuple[int, ...], strong: bool, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """q, k, v, g_fwd, g_bwd and a query and a key as wide as the values, for attention.

    Gates are those of a freshly initialised ViG, or with `strong` nearly closed (log gate -20) at 3 of 10 places.
    """
    batch, length, heads, key_dim, value_dim = shape
    rng = torch.Generator(device).manual_seed(seed)

    def draw(dim: int, of=torch.randn) -> Tensor:
        return of(batch, length, heads, dim, generator=rng, device=device)

    def gate() -> Tensor:
        return -20.0 * (draw(key_dim, torch.rand) < 0.3) if strong else F.logsigmoid(draw(key_dim)) / 16

    q, k, v, wide_q, wide_k = (draw(dim) for dim in (key_dim, key_dim, value_dim, value_dim, value_dim))
    return tuple(x.to(dtype) for x in (q, k, v, gate(), gate(), wide_q, wide_k))


def _bidirectional(q, k, v, g_fwd, g_bwd, *_):
    return bidirectional_gla(q, k, v, g_fwd, g_bwd)


def _causal(q, k, v, g, *_):
    return gated_linear_attention(q, k, v, g)[0]


def _sdpa(q, k, v, g_fwd, g_bwd, wide_q, wide_k):
    q, k, v = (x.transpose(1, 2) for x in (wide_q, wide_k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _fla_causal(q, k, v, g, *_):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g)[0]


def _fla_both(q, k, v, g_fwd, g_bwd, *_):
    from fla.ops.gla import chunk_gla

    backward = chunk_gla(*(x.flip(1) for x in (q, k, v, g_bwd)))[0]
    return (chunk_gla(q, k, v, g_fwd)[0] + backward.flip(1)) / 2


def _bytes(shape: tuple[int, ...], directions: int) -> tuple[int, int]:
    """Forward: q, k, v and gates read, o written. Backward: those and do read, their gradients written."""
    batch, length, heads, key_dim, value_dim = shape
    tokens = batch * length * heads
    arguments = (2 + directions) * key_dim + value_dim
    return tokens * (arguments + value_dim) * 2, tokens * (2 * arguments + value_dim) * 2


def cases() -> list[Case]:
    """Both scans at every shape; the bidirectional one with strong gates too, where the safe form runs."""
    both = {'SDPA, full': _sdpa, 'fla chunk_gla, two calls and flips': _fla_both}
    causal = {'fla chunk_gla, causal': _fla_causal}
    found = []
    for label, shape in SHAPES.items():
        dims = dict(zip('BTHKV', shape))
        mild, strong = (partial(_make, shape, gates) for gates in (False, True))
        found += [
            Case('bidirectional_gla', label, mild, _bidirectional, both, *_bytes(shape, 2), dims),
            Case('bidirectional_gla', f'{label}_strong', strong, _bidirectional, {}, *_bytes(shape, 2), dims),
            Case('gated_linear_attention', label, mild, _causal, causal, *_bytes(shape, 1), dims),
        ]
    return found
