"""RMSNorm and LayerNorm over the last dimension, with the addition to a residual stream before them, or a gate after.

For every row of C channels, in fp32 (fp64 for fp64 input):

    s = residual + gamma * sample_scale * x          the stream (s = x without a residual)
    RMSNorm    y = s / sqrt(mean(s^2) + eps) * weight
    LayerNorm  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
    gated      y = x / sqrt(mean(x^2) + eps) * weight * silu(gate)
    leaky      y = leaky_relu(LayerNorm(x)), a LayerNorm of its own for each of G groups

`x` (..., C) is the output of a branch, `residual` (..., C) the stream it is added to, gamma (C,) LayerScale's factor
per channel (arXiv 2103.17239), sample_scale (B,) stochastic depth's factor per sample (arXiv 1603.09382). RMSNorm is
that of arXiv 1910.07467. A pre-norm network reads a branch and the stream once, and writes the new stream and the next
branch's input once. The gated norm is the output stage of linear attention with a swish gate (arXiv 2312.06635,
mmMamba's arXiv 2502.13145), per head. The leaky norm, for inference, is inside LinFusion's MLPs (arXiv 2409.02097),
whose first layers for queries and keys are one product.

FLOP convention: none are counted, as for PyTorch's own norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = [
    'gated_rms_norm',
    'layer_norm',
    'leaky_layer_norm',
    'naive_gated_rms_norm',
    'naive_leaky_layer_norm',
    'naive_norm',
    'rms_norm',
]


def naive_norm(x, residual, gamma, sample_scale, weight, bias, eps, center, dtype):
    """The formula in fp32 or fp64: the oracle. Arguments as the custom op's; gives y in `dtype` and the stream."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide)
    if gamma is not None:
        s = s * gamma.to(wide)
    if sample_scale is not None:
        s = s * _per_sample(sample_scale, x).to(wide)
    if residual is not None:
        s = (residual.to(wide) + s).to(residual.dtype)
    stream, s = s, s.to(wide)
    if center:
        s = s - s.mean(-1, keepdim=True)
    y = s * (s.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype), stream


def _torch_norm(x, residual, gamma, sample_scale, weight, bias, eps, center, dtype):
    """Plain PyTorch, for autograd, the compiler and the exporter to see through."""
    s = x
    if gamma is not None:
        s = s * gamma
    if sample_scale is not None:
        s = s * _per_sample(sample_scale, x).to(s.dtype)
    if residual is not None:
        s = (residual + s).to(residual.dtype)
    wide = torch.promote_types(s.dtype, torch.float32)
    w = weight.to(wide)
    if center:
        y = F.layer_norm(s.to(wide), w.shape, w, None if bias is None else bias.to(wide), eps)
    else:
        y = F.rms_norm(s.to(wide), w.shape, w, eps)
    return y.to(dtype), s


def _per_sample(sample_scale: Tensor, x: Tensor) -> Tensor:
    return sample_scale.reshape(-1, *[1] * (x.ndim - 1))


def _forward(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    sample_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    path = _dispatch.triton_module('norm')
    return path.norm_fwd(x, residual, gamma, sample_scale, weight, bias, eps, center, dtype)


def _forward_fake(x, residual, gamma, sample_scale, weight, bias, eps, center, dtype):
    y = x.new_empty(x.shape, dtype=dtype)
    return y, x.new_empty(0) if residual is None else residual.new_empty(residual.shape)


def _backward(
    stream: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    sample_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    dstream: Tensor | None,
    eps: float,
    center: bool,
    has_residual: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _dispatch.triton_module('norm')
    return path.norm_bwd(stream, x, gamma, sample_scale, weight, bias, dy, dstream, eps, center, has_residual, dtype)


def _backward_fake(stream, x, gamma, sample_scale, weight, bias, dy, dstream, eps, center, has_residual, dtype):
    likes = (stream if has_residual else None, gamma, weight, bias)
    grads = (stream.new_empty(0) if like is None else like.new_empty(like.shape) for like in likes)
    return stream.new_empty(stream.shape, dtype=dtype), *grads


_backward_op = Op('zoo::norm_backward', _backward, _backward_fake)


def _setup(ctx, inputs, output):
    x, residual, gamma, sample_scale, weight, bias, eps, center, _ = inputs
    ctx.set_materialize_grads(False)
    stream = x if residual is None else output[1]
    ctx.save_for_backward(stream, None if gamma is None else x, gamma, sample_scale, weight, bias)
    ctx.config = (eps, center, residual is not None, x.dtype)


def _gradients(ctx, dy, dstream):
    if dy is None and dstream is None:
        return (None,) * 9
    stream, x, gamma, sample_scale, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(stream) if dy is None else dy
    has_residual = ctx.config[2]
    dx, dresidual, dgamma, dweight, dbias = _backward_op(
        stream, x, gamma, sample_scale, weight, bias, dy, dstream if has_residual else None, *ctx.config
    )
    return (
        dx,
        dresidual if has_residual else None,
        None if gamma is None else dgamma,
        None,
        dweight,
        None if bias is None else dbias,
        None,
        None,
        None,
    )


_op = Op('zoo::norm', _forward, _forward_fake, _setup, _gradients)


def _norm(name, x, residual, gamma, sample_scale, weight, bias, eps, center, dtype):
    if weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        raise ValueError(f'{name}: weight and bias must be ({x.shape[-1]},), as x {tuple(x.shape)} has channels')
    if residual is None and (gamma is not None or sample_scale is not None):
        raise ValueError(f'{name}: gamma and sample_scale scale what is added to a residual, and there is none')
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f'{name}: residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}')
    if gamma is not None and gamma.shape != weight.shape:
        raise ValueError(f'{name}: gamma must be {tuple(weight.shape)}, got {tuple(gamma.shape)}')
    if sample_scale is not None and sample_scale.numel() != x.shape[0]:
        raise ValueError(f'{name}: sample_scale must have {x.shape[0]} elements, got {sample_scale.numel()}')
    if dtype is None:
        wider = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        dtype = wider if wider == torch.float64 else _dispatch.autocast_dtype(x) or wider
    args = (x, residual, gamma, sample_scale, weight, bias, eps, center, dtype)
    if _dispatch.forced() == 'naive':
        y, stream = naive_norm(*args)
    elif x.shape[-1] <= 8192 and _dispatch.takes_triton('norm', x):
        y, stream = _op(*args)
    else:
        y, stream = _torch_norm(*args)
    return y if residual is None else (y, stream)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    sample_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of a tensor, or of the residual stream after a branch's output is added to it.

    Args:
        x: (..., C); the branch's output if there is a residual.
        weight: (C,).
        eps: added to the mean square.
        residual: the stream (..., C), which may have a wider dtype than x.
        gamma: LayerScale's factors (C,) on x, with a residual.
        sample_scale: stochastic depth's factors on x, one per entry of the first dimension, with a residual; no
            gradient flows to them.
        dtype: of the result; by default autocast's where it is enabled (the matrix product that follows then needs no
            pass that casts), else that of x (of the wider of x and residual).

    Returns:
        The normalised tensor, and with a residual also the new stream in the residual's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    return _norm('rms_norm', x, residual, gamma, sample_scale, weight, None, eps, False, dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    sample_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of a tensor, or of the residual stream after a branch's output is added to it.

    Args:
        x: (..., C); the branch's output if there is a residual.
        weight: (C,).
        bias: (C,) or None.
        eps: added to the variance.
        residual: as in `rms_norm`, and so are gamma, sample_scale and dtype.
        gamma: LayerScale's factors (C,).
        sample_scale: stochastic depth's factors, one per sample.
        dtype: of the result.

    Returns:
        The normalised tensor, and with a residual also the new stream in the residual's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    return _norm('layer_norm', x, residual, gamma, sample_scale, weight, bias, eps, True, dtype)


def naive_gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula in fp32 or fp64: the oracle."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, g = x.to(wide), gate.to(wide)
    y = s * (s.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide) * g * g.sigmoid()
    return y.to(x.dtype)


def _gated_forward(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return _dispatch.triton_module('norm').gated_norm_fwd(x, weight, gate, eps)


def _gated_backward(x: Tensor, weight: Tensor, gate: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _dispatch.triton_module('norm').gated_norm_bwd(x, weight, gate, dy, eps)


_gated_backward_op = Op(
    'zoo::gated_rms_norm_backward',
    _gated_backward,
    lambda x, weight, gate, dy, eps: tuple(t.new_empty(t.shape) for t in (x, weight, gate)),
)


def _gated_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_gated_op = Op(
    'zoo::gated_rms_norm',
    _gated_forward,
    lambda x, weight, gate, eps: x.new_empty(x.shape),
    _gated_setup,
    lambda ctx, dy: (*_gated_backward_op(*ctx.saved_tensors, dy, ctx.eps), None),
)


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dimension times silu(gate), in fp32 with one rounding at the end.

    Args:
        x: (..., H, C): outputs of H heads.
        weight: (C,), shared by the heads.
        gate: (..., H, C) before the SiLU; on the GPU a slice of a fused projection is read where it lies.
        eps: added to the mean square.

    Returns:
        (..., H, C) in x's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f'gated_rms_norm: weight must be ({x.shape[-1]},), got {tuple(weight.shape)}')
    if gate.shape != x.shape or x.ndim < 2:
        raise ValueError(f'gated_rms_norm: gate must be (..., H, C) like x {tuple(x.shape)}, got {tuple(gate.shape)}')
    if _dispatch.forced() == 'naive':
        return naive_gated_rms_norm(x, weight, gate, eps)
    if x.numel() and x.shape[-1] <= 1024 and _dispatch.takes_triton('norm', x):
        return _gated_op(x, weight, gate, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps) * F.silu(gate.to(wide))
    return y.to(x.dtype)


def naive_leaky_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """The formula in fp32 or fp64: the oracle."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    h = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide) + bias.to(wide)
    return torch.where(h > 0, h, slope * h).to(x.dtype)


def _leaky_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    return _dispatch.triton_module('norm').leaky_norm_fwd(x, weight, bias, eps, slope)


_leaky_op = Op('zoo::leaky_layer_norm', _leaky_forward, lambda x, weight, bias, eps, slope: x.new_empty(x.shape))


def leaky_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, slope: float = 0.01) -> Tensor:
    """LeakyReLU of a LayerNorm over the last dimension, with weights per group.

    The kernel is for inference: where gradients are recorded the plain operations run.

    Args:
        x: (..., G, C).
        weight: (G, C).
        bias: (G, C).
        eps: added to the variance.
        slope: factor of negative values.

    Returns:
        (..., G, C) in x's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if x.ndim < 2 or weight.shape != x.shape[-2:] or bias.shape != weight.shape:
        raise ValueError(
            f"leaky_layer_norm: weight and bias must be (G, C) like x's last two dimensions, got {tuple(weight.shape)} "
            f'and {tuple(bias.shape)} for x {tuple(x.shape)}'
        )
    if _dispatch.forced() == 'naive':
        return naive_leaky_layer_norm(x, weight, bias, eps, slope)
    if not torch.is_grad_enabled() and x.numel() and x.shape[-1] <= 8192 and _dispatch.takes_triton('norm', x):
        return _leaky_op(x, weight, bias, float(eps), float(slope))
    wide = torch.promote_types(x.dtype, torch.float32)
    h = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps) * weight.to(wide) + bias.to(wide)
    return F.leaky_relu(h, slope).to(x.dtype)
