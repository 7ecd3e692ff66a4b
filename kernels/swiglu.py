"""The product inside a SwiGLU layer (arXiv 2002.05202): y = silu(a) * b for rows [a | b], silu(a) = a / (1 + exp(-a)).

x (..., 2m) holds a in the first m channels and b in the others, as one matrix product writes them; y is (..., m). The
product is computed in fp32 and stored in x's dtype; the backward pass computes silu again. `geglu`, of the same paper,
is a * gelu(b) with gelu(b) = b (1 + erf(b / sqrt(2))) / 2: diffusion models have the activation on the second half.

`swiglu_linear` is silu(a) * b of [a | b] = x W^T, for inference: W (2m, C). Where its Triton kernel runs, [a | b] is
not written to memory; it has no backward pass, so where gradients are needed the product and `swiglu` run one by one.

FLOP convention: none are counted for the elementwise part, as for PyTorch's own functions; two per multiply-add of the
matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['fits_swiglu_linear', 'geglu', 'naive_geglu', 'naive_swiglu', 'swiglu', 'swiglu_linear']


def naive_swiglu(x: Tensor) -> Tensor:
    """The formula in fp32 or fp64: the oracle."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (a * a.sigmoid() * b).to(x.dtype)


def naive_geglu(x: Tensor) -> Tensor:
    """The formula of `geglu` in fp32 or fp64: the oracle."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (a * 0.5 * b * (1 + torch.erf(b * 0.5**0.5))).to(x.dtype)


def _product(name: str, gelu: bool) -> Op:
    def forward(x: Tensor) -> Tensor:
        return _dispatch.triton_module('swiglu').swiglu_fwd(x, gelu)

    def backward(x: Tensor, dy: Tensor) -> Tensor:
        return _dispatch.triton_module('swiglu').swiglu_bwd(x, dy, gelu)

    of_x = Op(f'zoo::{name}_backward', backward, lambda x, dy: x.new_empty(x.shape))
    return Op(
        f'zoo::{name}',
        forward,
        lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
        lambda ctx, dy: of_x(ctx.saved_tensors[0], dy),
    )


_op, _geglu_op = _product('swiglu', False), _product('geglu', True)


def _run(name: str, x: Tensor, naive: Callable, op: Op, product: Callable) -> Tensor:
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f'{name}: the last dimension of x must be even, [a | b], got {tuple(x.shape)}')
    if _dispatch.forced() == 'naive':
        return naive(x)
    if _dispatch.takes_triton('swiglu', x):
        return op(x)
    return product(*x.chunk(2, -1))


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of x = [a | b].

    Args:
        x: (..., 2m).

    Returns:
        (..., m) in x's dtype.

    Raises:
        ValueError: if the last dimension is odd.
    """
    return _run('swiglu', x, naive_swiglu, _op, lambda a, b: F.silu(a) * b)


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) of x = [a | b].

    Args:
        x: (..., 2m).

    Returns:
        (..., m) in x's dtype.

    Raises:
        ValueError: if the last dimension is odd.
    """
    return _run('geglu', x, naive_geglu, _geglu_op, lambda a, b: a * F.gelu(b))


def _linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    return _dispatch.triton_module('swiglu').swiglu_linear(x, weight)


_linear_op = Op(
    'zoo::swiglu_linear', _linear_forward, lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
)


@register_flop_formula(torch.ops.zoo.swiglu_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@torch.compiler.assume_constant_result
def _supported(dtype: torch.dtype, channels: int) -> bool:
    return _dispatch.triton_module('swiglu').unsupported(dtype, channels) is None


def fits_swiglu_linear(x: Tensor) -> bool:
    """Whether `swiglu_linear` is one kernel for these rows, with no gradient wanted.

    Where it is not, it has nothing over the ops that it is made of.
    """
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or _dispatch.forced() == 'naive' or x.numel() == 0:
        return False
    return _dispatch.takes_triton('swiglu', x) and _supported(x.dtype, x.shape[-1])


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """silu(a) * b of [a | b] = x W^T.

    Args:
        x: (..., C), of any floating dtype.
        weight: (2m, C): the rows that go through SiLU, then the others.

    Returns:
        (..., m) in x's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f'swiglu_linear: weight must be (2m, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}'
        )
    weight = weight.to(x.dtype)
    if fits_swiglu_linear(x):
        return _linear_op(x, weight.contiguous())
    return swiglu(F.linear(x, weight))
