"""Causal attention of a piece of a prompt: queries (B, H, L, d) of the newest L of S tokens, keys (B, K, S, d) of all.

PyTorch's flash kernels take the triangle at the lower right, but its cuDNN kernels, which it prefers on Hopper and
which are nearly twice as fast there, only square ones. Where it would choose cuDNN, the past is cut into blocks of
1, 2, 4, ... pieces: each is a full product, the newest piece a square triangle, and their outputs are averaged by the
sums of their exponentials. Few sizes occur that way, which matters because cuDNN prepares each size at its first use.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right

__all__ = ['attend_piece']

LEAST = 4096  # queries from which blocks are worth their averaging


def attend_piece(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V, query i seeing keys up to S - L + i.

    Args:
        query: (B, H, L, d).
        key: (B, K, S, d), K dividing H and S at least L.
        value: (B, K, S, d).
        scale: of the scores.

    Returns:
        (B, H, L, d).
    """
    length, total = query.shape[2], key.shape[2]
    if length >= LEAST and (total - length) % length == 0 and _cudnn_is_chosen(query, key, value, scale):
        return _average(_blocks(query, key, value, scale))
    grouped = can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))
    if not grouped:  # the other kernels for such a triangle want as many keys as queries
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    bias = causal_lower_right(length, total)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)


def _cudnn_is_chosen(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, False, scale=scale, enable_gqa=True)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithms of the sums of exponentials (B, H, L)."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1]


def _blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs (B, H, L, d) and log sums (B, H, L, 1) of the blocks of the past, the largest first, and of the piece."""
    length = query.shape[2]
    pieces, start = key.shape[2] // length - 1, 0
    sizes = [1 << i for i in reversed(range(pieces.bit_length())) if pieces >> i & 1]
    for size in [*sizes, 1]:
        stop = start + size * length
        causal = stop == key.shape[2]
        out, log_sum = _attend(query, key[:, :, start:stop], value[:, :, start:stop], causal, scale)
        yield out, log_sum.reshape(*out.shape[:3], 1).float()
        start = stop


def _average(blocks: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    out, log_sum = next(blocks)
    kind, out = out.dtype, out.float()
    for other, other_sum in blocks:
        both = torch.logaddexp(log_sum, other_sum)
        out = out.lerp_(other.float(), (other_sum - both).exp())
        log_sum = both
    return out.to(kind)
