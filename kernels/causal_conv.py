"""Depthwise causal convolution over tokens, the short one in front of linear mixers, with the SiLU that follows it.

    z[b, t, c] = bias[c] + sum_{i < W} weight[c, i] x[b, t - (W - 1) + i, c]        x, z in B x T x C
    y = silu(z)    or    y = z

The last tap meets the current token, as in Mamba (arXiv 2312.00752) and its kin. Columns before the first token come
from `initial_state` (B, C, W), the newest W raw columns of what came before with the newest last (transformers' cache
keeps them so; only W - 1 of them are read), or are zero. The layout is that of tokens (B, T, C): a slice of a fused
projection's channels is read in place.

FLOP convention: two per multiply-add, W of them per output; the backward pass (input and weight gradients) twice that,
and half as much again where the activation makes it recompute z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['causal_conv', 'causal_conv_step_', 'naive_causal_conv']

ACTIVATIONS = (None, 'silu')
MAX_TRITON_WIDTH = 8


def naive_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Token by token in fp32 (fp64 for fp64 input): the oracle of every faster path.

    Arguments and results are those of `causal_conv`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[-1]
    past = x.new_zeros(x.shape[0], x.shape[2], width) if initial_state is None else initial_state.to(x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        past = torch.cat((past[..., 1:], x[:, t, :, None]), -1)
        z = (past.to(dtype) * weight.to(dtype)).sum(-1)
        z = z if bias is None else z + bias.to(dtype)
        outputs.append(z * z.sigmoid() if activation else z)
    y = torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape, dtype=dtype)
    return y.to(x.dtype), past if output_final_state else None


def _torch_causal_conv(x, weight, bias, initial_state, activation) -> Tensor:
    """The torch path: shifted products in fp32, which autograd, export and the compiler see through."""
    width, length = weight.shape[-1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat((initial_state[..., 1:].transpose(1, 2).to(x.dtype), x), 1)
    taps = weight.to(wide).unbind(-1)
    z = padded[:, width - 1 :].to(wide) * taps[-1]
    for i in range(width - 1):
        z = torch.addcmul(z, padded[:, i : i + length].to(wide), taps[i])
    z = z if bias is None else z + bias.to(wide)
    return (F.silu(z) if activation else z).to(x.dtype)


def _final_state(x: Tensor, initial_state: Tensor | None, width: int) -> Tensor:
    """The newest W raw columns (B, C, W)."""
    new = x[:, -width:].transpose(1, 2)
    keep = width - new.shape[-1]
    if keep == 0:
        return new.contiguous()
    past = x.new_zeros(x.shape[0], x.shape[2], width) if initial_state is None else initial_state.to(x.dtype)
    return torch.cat((past[..., width - keep :], new), -1)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> Tensor:
    return _dispatch.triton_module('causal_conv').causal_conv_fwd(x, weight, bias, initial_state, activation)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    dy: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _dispatch.triton_module('causal_conv')
    return module.causal_conv_bwd(x, weight, bias, initial_state, dy, activation)


def _backward_fake(x, weight, bias, initial_state, dy, activation):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


_backward_op = Op('zoo::causal_conv_backward', _backward, _backward_fake)


def _setup(ctx, inputs, output):
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _gradients(ctx, dy):
    tensors = ctx.saved_tensors
    grads = _backward_op(*tensors, dy, ctx.activation)
    return *(None if t is None else grad for t, grad in zip(tensors, grads)), None


_op = Op(
    'zoo::causal_conv',
    _forward,
    lambda x, weight, bias, initial_state, activation: x.new_empty(x.shape),
    _setup,
    _gradients,
)


@register_flop_formula(torch.ops.zoo.causal_conv)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * weight_shape[-1] * torch.Size(x_shape).numel()


@register_flop_formula(torch.ops.zoo.causal_conv_backward)
def _backward_flops(x_shape, weight_shape, bias_shape, state_shape, dy_shape, activation, *args, **kwargs) -> int:
    return (2 if activation is None else 3) * _flops(x_shape, weight_shape)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dims: int) -> None:
    if x.ndim != dims:
        raise ValueError(f'{op}: x must be {"(B, T, C)" if dims == 3 else "(B, C)"}, got {tuple(x.shape)}')
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f'{op}: weight must be (C, W) with C = {channels}, got {tuple(weight.shape)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'{op}: bias must be ({channels},), got {tuple(bias.shape)}')
    if activation not in ACTIVATIONS:
        raise ValueError(f'{op}: activation must be one of {ACTIVATIONS}, got {activation!r}')
    device = x.device
    for name, t in (('x', x), ('weight', weight), ('bias', bias)):
        if t is not None and (not t.is_floating_point() or t.device != device):
            raise ValueError(f'{op}: {name} must be floating-point on {device}, got {t.dtype} on {t.device}')


def _check_state(what: str, state: Tensor, x: Tensor, width: int) -> None:
    expected = (x.shape[0], x.shape[-1], width)
    if state.shape != expected or state.device != x.device:
        raise ValueError(f'{what} must be (B, C, W) = {expected} on {x.device}, got {tuple(state.shape)}')


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution of tokens; padding is the caller's business (zeros in x, and in y with a bias).

    Args:
        x: (B, T, C), fp64, fp32, fp16 or bf16; sums are in fp32 or wider.
        weight: (C, W), any floating dtype; `nn.Conv1d`'s with its middle axis taken out.
        bias: (C,), or None.
        activation: `silu`, or None.
        initial_state: raw columns before the first token (B, C, W), the newest last.
        output_final_state: also return the newest W raw columns.

    Returns:
        y (B, T, C) in x's dtype, and the columns (B, C, W) in x's dtype or None. No gradient is lost: the columns are
        a slice of x.

    Raises:
        ValueError: for shapes, dtypes, devices or names that do not fit, naming the argument.
    """
    _check('causal_conv', x, weight, bias, activation, 3)
    width = weight.shape[-1]
    if initial_state is not None:
        _check_state('causal_conv: initial_state', initial_state, x, width)
    options = dict(activation=activation, initial_state=initial_state)
    if _dispatch.forced() == 'naive':
        return naive_causal_conv(x, weight, bias, **options, output_final_state=output_final_state)
    if x.numel() and width <= MAX_TRITON_WIDTH and _dispatch.takes_triton('causal_conv', x):
        y = _op(x, weight, bias, initial_state, activation)
    else:
        y = _torch_causal_conv(x, weight, bias, initial_state, activation)
    return y, _final_state(x, initial_state, width) if output_final_state else None


def causal_conv_step_(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = None
) -> Tensor:
    """One token of `causal_conv` for generation: pushes it into the state; no gradient.

    Args:
        x: raw columns (B, C).
        weight: (C, W).
        bias: (C,), or None.
        state: the newest W raw columns (B, C, W), overwritten.
        activation: `silu`, or None.

    Returns:
        y (B, C) in x's dtype.

    Raises:
        ValueError: for arguments that do not fit, naming them.
    """
    _check('causal_conv_step_', x, weight, bias, activation, 2)
    _check_state('causal_conv_step_: state', state, x, weight.shape[-1])
    with torch.no_grad():
        state.copy_(torch.cat((state[..., 1:], x.unsqueeze(-1).to(state.dtype)), -1))
        wide = torch.promote_types(x.dtype, torch.float32)
        z = (state.to(wide) * weight.to(wide)).sum(-1)
        z = z if bias is None else z + bias.to(wide)
        return (F.silu(z) if activation else z).to(x.dtype)
