"""The gated delta rule in flash-linear-attention's kernels, imported at the first call.

Signatures read in fla-core 0.6.0: `chunk_gated_delta_rule` has a backward and refuses fp32, the recurrent form has none
and is the faster one for a few tokens.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

RECURRENT = 64


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec('fla') is not None  # searches the disk, 75 us where there is none


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if not _installed():
        return 'flash-linear-attention is not installed (pip install "linear-zoo[bench]")'
    if not q.is_cuda:
        return 'flash-linear-attention needs GPU tensors'
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f'flash-linear-attention takes fp16 and bf16, not {str(q.dtype).removeprefix("torch.")}'
    return 'head dimensions above 256' if max(q.shape[-1], v.shape[-1]) > 256 else None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `zoo.kernels.gated_delta.torch_gated_delta_rule`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, g, beta))
    op = fused_recurrent_gated_delta_rule if q.shape[1] <= RECURRENT and not needs_grad else chunk_gated_delta_rule
    kwargs = dict(g=g.float(), beta=beta.to(q.dtype), scale=scale, initial_state=initial_state, output_final_state=True)
    return op(q, k, v, **kwargs)
