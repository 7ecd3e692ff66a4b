"""The product inside a SwiGLU layer (arXiv 2002.05202): y = silu(a) * b for rows [a | b], silu(a) = a / (1 + exp(-a)).

x (..., 2m) holds a in the first m channels and b in the others, as one matrix product writes them; y is (..., m). The
product is computed in fp32 and stored in x's dtype; the backward pass computes silu again.

FLOP convention: none are counted, as for PyTorch's own elementwise functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['naive_swiglu', 'swiglu']


def naive_swiglu(x: Tensor) -> Tensor:
    """The formula in fp32 or fp64: the oracle."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (a * a.sigmoid() * b).to(x.dtype)


def _forward(x: Tensor) -> Tensor:
    return _dispatch.triton_module('swiglu').swiglu_fwd(x)


def _backward(x: Tensor, dy: Tensor) -> Tensor:
    return _dispatch.triton_module('swiglu').swiglu_bwd(x, dy)


_backward_op = Op('zoo::swiglu_backward', _backward, lambda x, dy: x.new_empty(x.shape))
_op = Op(
    'zoo::swiglu',
    _forward,
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lambda ctx, dy: _backward_op(ctx.saved_tensors[0], dy),
)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of x = [a | b].

    Args:
        x: (..., 2m).

    Returns:
        (..., m) in x's dtype.

    Raises:
        ValueError: if the last dimension is odd.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f'swiglu: the last dimension of x must be even, [a | b], got {tuple(x.shape)}')
    if _dispatch.forced() == 'naive':
        return naive_swiglu(x)
    if _dispatch.takes_triton('swiglu', x):
        return _op(x)
    a, b = x.chunk(2, -1)
    return F.silu(a) * b
