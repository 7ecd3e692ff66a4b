"""One token through a layer: matrix-vector products and what surrounds them, in as few launches as possible.

A decoding step reads every weight once and computes next to nothing, so that its time is bytes plus launches. For a few
rows x (B, C) of tokens:

    token_linear       y = x W^T + b (+ residual)
    token_swiglu       y = silu(x W1^T) * (x W3^T)
    token_projections_ y = [x W_1^T + b_1 | x W_2^T + b_2 | ...], the first channels through a causal convolution with
                       its SiLU, whose newest raw columns (B, channels, W) are pushed on in place
    mamba2_step_       [v | k | q | gate | dt] of mmMamba's layer -> its heads' outputs, the state S updated in place:
                       dt = softplus(dt + dt_bias); S = exp(-dt exp(A_log)) S + dt v k^T;
                       y = RMSNorm(S q + D v) * weight * silu(gate)
    rotate_and_store_  rotary embedding of queries and keys; keys and values go to one entry of a key-value buffer
    decode_attention   y = softmax(scale q K^T) V over the first `length` entries of that buffer

None has a gradient. On a GPU they work inside a captured CUDA graph: `length` and `start` are read on the device,
states are overwritten in place. Sources: mmMamba, arXiv 2502.13145; keys split over programs as in Flash-Decoding
(pytorch.org/blog/flash-decoding).

FLOP convention: two per multiply-add of the products (of all keys of the buffer in `decode_attention`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import InplaceOp, Op
from zoo.kernels.causal_conv import causal_conv_step_

__all__ = [
    'decode_attention',
    'mamba2_step_',
    'naive_decode_attention',
    'naive_mamba2_step',
    'rotate_and_store_',
    'token_linear',
    'token_projections_',
    'token_swiglu',
]

MAX_ROWS = 4  # tokens up to which products without matrix units are the fastest (an estimate)
MAX_HEAD = 256


def _takes(x: Tensor) -> bool:
    return 0 < x.shape[0] <= MAX_ROWS and x.shape[-1] % 16 == 0 and _dispatch.takes_triton('decode', x)


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f'{name} has no gradient: call it under torch.no_grad()')


def _check_products(name: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    if x.ndim != 2:
        raise ValueError(f'{name}: x must be (B, C), got {tuple(x.shape)}')
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.ndim != 2 or w.shape[1] != x.shape[1] or w.dtype != x.dtype or w.device != x.device:
            raise ValueError(
                f'{name}: weight {i} must be (O, C) with C = {x.shape[1]} in {x.dtype} on {x.device}, '
                f'got {tuple(w.shape)} {w.dtype} on {w.device}'
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f'{name}: bias {i} must be ({w.shape[0]},), got {tuple(b.shape)}')
    _refuse_gradients(name, x, *weights, *biases)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _dispatch.triton_module('decode').linear(x, weight, bias, residual)


_linear_op = Op('zoo::token_linear', _linear, lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]))


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear map of a few tokens, plus what it is added to.

    Args:
        x: (B, C).
        weight: (O, C) in x's dtype.
        bias: (O,), or None.
        residual: (B, O), or None.

    Returns:
        (B, O) in x's dtype.

    Raises:
        ValueError: for arguments that do not fit, or that want a gradient.
    """
    _check_products('token_linear', x, [weight], [bias])
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(f'token_linear: residual must be (B, O), got {tuple(residual.shape)}')
    if _takes(x):
        return _linear_op(x, weight, bias, residual)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def _swiglu(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    return _dispatch.triton_module('decode').swiglu(x, w1, w3)


_swiglu_op = Op('zoo::token_swiglu', _swiglu, lambda x, w1, w3: x.new_empty(x.shape[0], w1.shape[0]))


def token_swiglu(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """silu(x W1^T) * (x W3^T) of a few tokens.

    Args:
        x: (B, C).
        w1: (M, C) in x's dtype, whose product goes through the SiLU.
        w3: (M, C).

    Returns:
        (B, M) in x's dtype.

    Raises:
        ValueError: for arguments that do not fit, or that want a gradient.
    """
    _check_products('token_swiglu', x, [w1, w3], [None, None])
    if w1.shape != w3.shape:
        raise ValueError(f'token_swiglu: w1 and w3 must have one shape, got {tuple(w1.shape)} and {tuple(w3.shape)}')
    if _takes(x):
        return _swiglu_op(x, w1, w3)
    return F.silu(F.linear(x, w1)) * F.linear(x, w3)


def _projections(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
) -> Tensor:
    return _dispatch.triton_module('decode').projections_(x, weights, biases, conv_weight, conv_bias, conv_state)


def _projections_fake(x, weights, biases, conv_weight, conv_bias, conv_state):
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))


_projections_op = InplaceOp('zoo::token_projections_', _projections, _projections_fake, 'conv_state')


def token_projections_(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
) -> Tensor:
    """Several linear maps of a few tokens side by side, a causal convolution and SiLU over the first channels.

    Args:
        x: (B, C).
        weights: up to five (O_i, C) in x's dtype.
        biases: (O_i,) or None for each.
        conv_weight: (channels, W); the channels are the first of the outputs and end with one of the maps.
        conv_bias: (channels,), or None.
        conv_state: raw columns (B, channels, W), contiguous, overwritten with the newest ones.

    Returns:
        (B, sum of O_i) in x's dtype.

    Raises:
        ValueError: for arguments that do not fit, or that want a gradient.
    """
    _check_products('token_projections_', x, weights, biases)
    channels, width = conv_weight.shape
    if len(weights) > 5 or channels not in [sum(w.shape[0] for w in weights[: i + 1]) for i in range(len(weights))]:
        raise ValueError(
            f'token_projections_: the convolution has {channels} channels, which are not those of the first of '
            f'at most five maps with {[w.shape[0] for w in weights]} outputs'
        )
    if conv_state.shape != (x.shape[0], channels, width) or not conv_state.is_contiguous():
        raise ValueError(
            f'token_projections_: conv_state must be contiguous {(x.shape[0], channels, width)}, '
            f'got {tuple(conv_state.shape)}'
        )
    if _takes(x):
        return _projections_op(x, weights, biases, conv_weight, conv_bias, conv_state)
    y = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases)], -1)
    conved = causal_conv_step_(y[:, :channels], conv_weight, conv_bias, conv_state, activation='silu')
    return torch.cat((conved, y[:, channels:]), -1)


def naive_mamba2_step(
    mixed: Tensor,
    state: Tensor,
    dt_bias: Tensor,
    A_log: Tensor | None,
    D: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """The formula in fp32 (fp64 for fp64 input): y (B, H, d) and the new state; arguments as `mamba2_step_`."""
    wide = torch.promote_types(mixed.dtype, torch.float32)
    batch, heads, dim, _ = state.shape
    sizes = [kv_heads * dim, kv_heads * dim, heads * dim, heads * dim, heads]
    v, k, q, gate, dt = mixed.to(wide).split(sizes, -1)
    v, k = (t.view(batch, kv_heads, dim).repeat_interleave(heads // kv_heads, 1) for t in (v, k))
    q, gate = q.view(batch, heads, dim), gate.view(batch, heads, dim)
    step = F.softplus(dt + dt_bias.to(wide))
    rate = step.new_full((heads,), -1.0) if A_log is None else -A_log.to(wide).exp()
    new = (step * rate).exp()[..., None, None] * state.to(wide)
    new = new + (step.unsqueeze(-1) * v).unsqueeze(-1) * k.unsqueeze(-2)
    y = (new @ q.unsqueeze(-1)).squeeze(-1)
    y = y if D is None else y + D.to(wide)[:, None] * v
    y = y.to(mixed.dtype).to(wide)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight.to(wide)
    return (y * gate * gate.sigmoid()).to(mixed.dtype), new


def _mamba2_step(
    mixed: Tensor,
    state: Tensor,
    dt_bias: Tensor,
    A_log: Tensor | None,
    D: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    kv_heads: int,
) -> Tensor:
    return _dispatch.triton_module('decode').mamba2_step_(mixed, state, dt_bias, A_log, D, norm_weight, eps, kv_heads)


_mamba2_op = InplaceOp(
    'zoo::mamba2_step_', _mamba2_step, lambda mixed, state, *_: mixed.new_empty(state.shape[:3]), 'state'
)


def mamba2_step_(
    mixed: Tensor,
    state: Tensor,
    dt_bias: Tensor,
    A_log: Tensor | None,
    D: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    kv_heads: int,
) -> Tensor:
    """One token of mmMamba's layer after its projections and convolution, up to the output projection.

    Args:
        mixed: (B, (2 K + 2 H) d + H): values and keys of K heads, queries and gates of H heads, raw step sizes.
        state: (B, H, d, d) fp32 (fp64 for fp64 input), contiguous, rows of values; overwritten.
        dt_bias: (H,).
        A_log: logarithms of the decay rates (H,), or None for rates of 1.
        D: (H,), or None.
        norm_weight: (d,) of the RMSNorm.
        eps: of the RMSNorm.
        kv_heads: K; head i of the H heads belongs to key head i // (H / K).

    Returns:
        (B, H, d) in `mixed`'s dtype.

    Raises:
        ValueError: for arguments that do not fit, or that want a gradient.
    """
    if state.ndim != 4 or state.shape[2] != state.shape[3] or not state.is_contiguous():
        raise ValueError(f'mamba2_step_: state must be contiguous (B, H, d, d), got {tuple(state.shape)}')
    batch, heads, dim, _ = state.shape
    wide = torch.promote_types(mixed.dtype, torch.float32)
    if state.dtype != wide:
        raise ValueError(f'mamba2_step_: state must be {wide}, got {state.dtype}')
    if heads % kv_heads or mixed.shape != (batch, (2 * kv_heads + 2 * heads) * dim + heads):
        raise ValueError(
            f'mamba2_step_: mixed must be (B, (2 K + 2 H) d + H) for state {tuple(state.shape)} and K = {kv_heads}, '
            f'got {tuple(mixed.shape)}'
        )
    _refuse_gradients('mamba2_step_', mixed, state, dt_bias, A_log, D, norm_weight)
    arguments = (mixed, state, dt_bias, A_log, D, norm_weight, eps, kv_heads)
    if mixed.numel() and dim <= 128 and _dispatch.takes_triton('decode', mixed):
        return _mamba2_op(*arguments)
    y, new = naive_mamba2_step(*arguments)
    state.copy_(new)
    return y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., d) in fp32 or wider, halves of the last axis as pairs; cos and sin broadcast against it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, -1)
    return (torch.cat((a, b), -1) * cos.to(wide) + torch.cat((-b, a), -1) * sin.to(wide)).to(x.dtype)


def _rotate(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: Tensor
) -> Tensor:
    return _dispatch.triton_module('decode_attention').rotate_and_store_(q, k, v, cos, sin, keys, values, place)


def _rotate_fake(q, k, v, cos, sin, keys, values, place):
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2], q.shape[3])


_rotate_op = InplaceOp('zoo::rotate_and_store_', _rotate, _rotate_fake, 'keys', 'values')


def rotate_and_store_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, place: Tensor
) -> Tensor:
    """Rotary embedding of one token's queries and keys, and its entry in the buffer.

    Args:
        q: (B, K, G, d): the queries of each key head.
        k: (B, K, d).
        v: (B, K, d).
        cos: (B or 1, d) cosines, the two halves alike, as transformers' rotary modules give them.
        sin: (B or 1, d).
        keys: (B, K, capacity, d), written at `place`; the same for values.
        values: (B, K, capacity, d).
        place: the entry, one integer on q's device.

    Returns:
        The rotated queries (B, K G, d).

    Raises:
        ValueError: for shapes that do not fit, or arguments that want a gradient.
    """
    batch, kv, _, dim = q.shape
    if k.shape != (batch, kv, dim) or v.shape != k.shape or dim % 2:
        raise ValueError(
            f'rotate_and_store_: k and v must be (B, K, d) for q {tuple(q.shape)} = (B, K, G, d) with d even, '
            f'got {tuple(k.shape)} and {tuple(v.shape)}'
        )
    if cos.shape not in ((batch, dim), (1, dim)) or sin.shape != cos.shape:
        raise ValueError(f'rotate_and_store_: cos and sin must be (B or 1, d), got {tuple(cos.shape)}')
    if keys.shape[:2] != k.shape[:2] or keys.shape[3] != dim or values.shape != keys.shape or place.numel() != 1:
        raise ValueError(
            f'rotate_and_store_: keys and values must be (B, K, capacity, d) and place one integer, '
            f'got {tuple(keys.shape)}, {tuple(values.shape)} and {tuple(place.shape)}'
        )
    _refuse_gradients('rotate_and_store_', q, k, v)
    if q.numel() and dim <= MAX_HEAD and keys.is_contiguous() and _dispatch.takes_triton('decode_attention', q):
        return _rotate_op(q, k, v, cos, sin, keys, values, place)
    keys.index_copy_(2, place.view(1), _rotated(k, cos.unsqueeze(1), sin.unsqueeze(1)).unsqueeze(2))
    values.index_copy_(2, place.view(1), v.unsqueeze(2))
    return _rotated(q, cos[:, None, None], sin[:, None, None]).flatten(1, 2)


def naive_decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, start: Tensor | None, scale: float
) -> Tensor:
    """The formula in fp32 (fp64 for fp64 input): the oracle. Arguments as `decode_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // keys.shape[1]
    scores = scale * (q.to(wide).unflatten(1, (-1, group)) @ keys.to(wide).mT)
    places = torch.arange(keys.shape[2], device=q.device)
    seen = places < length
    if start is not None:
        seen = seen & (places >= start.unsqueeze(-1))
    seen = seen.view(-1, 1, 1, places.shape[0])
    weights = scores.masked_fill(~seen, float('-inf')).softmax(-1)
    # what lies past the length may be anything
    values = values.to(wide).masked_fill(~seen.transpose(2, 3), 0)
    return (weights @ values).flatten(1, 2).to(q.dtype)


def _attention(q: Tensor, keys: Tensor, values: Tensor, length: Tensor, start: Tensor | None, scale: float) -> Tensor:
    return _dispatch.triton_module('decode_attention').attention(q, keys, values, length, start, scale)


_attention_op = Op('zoo::decode_attention', _attention, lambda q, *rest: q.new_empty(q.shape))


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of one new token per row over a key-value buffer.

    Args:
        q: (B, H, d).
        keys: (B, K, capacity, d), K dividing H; entries from `length` on are not read.
        values: (B, K, capacity, d).
        length: how many entries count, one integer on q's device (int32 or int64, one element).
        start: the first entry that counts in each row (B,), behind padding on the left; None for 0.
        scale: of the scores; d ** -0.5 by default.

    Returns:
        (B, H, d) in q's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or arguments that want a gradient.
    """
    if q.ndim != 3 or keys.ndim != 4 or q.shape[0] != keys.shape[0] or q.shape[2] != keys.shape[3]:
        raise ValueError(
            f'decode_attention: q must be (B, H, d) and keys (B, K, capacity, d), '
            f'got {tuple(q.shape)} and {tuple(keys.shape)}'
        )
    if values.shape != keys.shape or q.shape[1] % keys.shape[1]:
        raise ValueError(
            f'decode_attention: values must have the shape of keys {tuple(keys.shape)}, whose heads divide the '
            f'{q.shape[1]} of q; got {tuple(values.shape)}'
        )
    if length.numel() != 1 or length.is_floating_point() or length.device != q.device:
        raise ValueError(f'decode_attention: length must be one integer on {q.device}, got {length}')
    if start is not None and (start.shape != q.shape[:1] or start.is_floating_point()):
        raise ValueError(f'decode_attention: start must be integers (B,), got {tuple(start.shape)} {start.dtype}')
    _refuse_gradients('decode_attention', q, keys, values)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() and q.shape[-1] <= MAX_HEAD and _dispatch.takes_triton('decode_attention', q):
        return _attention_op(q, keys, values, length, start, scale)
    return naive_decode_attention(q, keys, values, length, start, scale)


@register_flop_formula(torch.ops.zoo.token_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.zoo.token_swiglu)
def _swiglu_flops(x_shape, w1_shape, w3_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * x_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.zoo.decode_attention)
def _attention_flops(q_shape, keys_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * torch.Size(q_shape).numel() * keys_shape[2]
