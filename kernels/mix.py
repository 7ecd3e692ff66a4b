"""What surrounds the scan in ViG's token mixer (arXiv 2405.18425): its log gates before, the 2D gated mix after.

Log gates of both directions from low-rank logits, z = r W^T + b, r (..., R), W (2K, R), b (2K,):

    g = logsigmoid(z) / normalizer          (..., K) forward from the first K rows, (..., K) backward from the others

2D gated locality injection, per token and head of V channels, with one pair of weights (V,) for all heads:

    m = s * RMSNorm(o; w_global) + (1 - s) * RMSNorm(local; w_local)         y = m, or silu(m)

o, local, s (B, T, H, V); s is given, or s = sigmoid(gate + gate_bias) with gate_bias (H V,). Everything is computed in
fp32 and stored once, in the dtype of r and o; the backward passes compute z, s and the norms again.

FLOP convention: the products z = r W^T are counted, the rest is elementwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch
from zoo.kernels._op import Op

__all__ = ['gated_local_mix', 'log_gates', 'naive_gated_local_mix', 'naive_log_gates']


def naive_log_gates(r: Tensor, weight: Tensor, bias: Tensor, normalizer: float = 16.0) -> tuple[Tensor, Tensor]:
    """The formula in fp32 or fp64: the oracle of `log_gates`."""
    wide = _wide(r)
    z = r.to(wide) @ weight.to(wide).T + bias.to(wide)
    g = torch.minimum(z, torch.zeros_like(z)) - torch.log1p(torch.exp(-z.abs()))
    return tuple((g / normalizer).to(r.dtype).chunk(2, -1))


def naive_gated_local_mix(o, local, gate, gate_bias, w_global, w_local, eps, gate_logits, silu) -> Tensor:
    """The formula in fp32 or fp64: the oracle of `gated_local_mix`, with the custom op's arguments."""
    wide = _wide(o)
    s = gate.to(wide)
    if gate_bias is not None:
        s = s + gate_bias.to(wide).unflatten(0, gate.shape[-2:])
    s = s.sigmoid() if gate_logits else s

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(wide)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide)

    m = s * norm(o, w_global) + (1 - s) * norm(local, w_local)
    return (m * m.sigmoid() if silu else m).to(o.dtype)


def _torch_gated_local_mix(o, local, gate, gate_bias, w_global, w_local, eps, gate_logits, silu) -> Tensor:
    wide = _wide(o)
    s = gate.to(wide)
    if gate_bias is not None:
        s = s + gate_bias.to(wide).unflatten(0, gate.shape[-2:])
    s = s.sigmoid() if gate_logits else s
    x, y = (F.rms_norm(x.to(wide), w.shape, w.to(wide), eps) for x, w in ((o, w_global), (local, w_local)))
    m = torch.lerp(y, x, s)
    return (F.silu(m) if silu else m).to(o.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gates_forward(r: Tensor, weight: Tensor, bias: Tensor, normalizer: float) -> tuple[Tensor, Tensor]:
    return _dispatch.triton_module('mix').gates_fwd(r, weight, bias, normalizer)


def _gates_fake(r, weight, bias, normalizer):
    shape = (*r.shape[:-1], weight.shape[0] // 2)
    return r.new_empty(shape), r.new_empty(shape)


def _gates_backward(
    r: Tensor, weight: Tensor, bias: Tensor, dg_fwd: Tensor, dg_bwd: Tensor, normalizer: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _dispatch.triton_module('mix').gates_bwd(r, weight, bias, dg_fwd, dg_bwd, normalizer)


def _gates_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.normalizer = inputs[3]


def _gates_gradients(ctx, dg_fwd, dg_bwd):
    return *_gates_backward_op(*ctx.saved_tensors, dg_fwd, dg_bwd, ctx.normalizer), None


_gates_backward_op = Op(
    'zoo::log_gates_backward',
    _gates_backward,
    lambda r, weight, bias, *_: tuple(x.new_empty(x.shape) for x in (r, weight, bias)),
    any_strides=True,
)
_gates_op = Op('zoo::log_gates', _gates_forward, _gates_fake, _gates_setup, _gates_gradients, any_strides=True)


def _mix_forward(
    o: Tensor,
    local: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    w_global: Tensor,
    w_local: Tensor,
    eps: float,
    gate_logits: bool,
    silu: bool,
) -> Tensor:
    path = _dispatch.triton_module('mix')
    return path.mix_fwd(o, local, gate, gate_bias, w_global, w_local, eps, gate_logits, silu)


def _mix_backward(
    o: Tensor,
    local: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    w_global: Tensor,
    w_local: Tensor,
    dy: Tensor,
    eps: float,
    gate_logits: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _dispatch.triton_module('mix')
    return path.mix_bwd(o, local, gate, gate_bias, w_global, w_local, dy, eps, gate_logits, silu)


def _mix_backward_fake(o, local, gate, gate_bias, w_global, w_local, *_):
    tensors = (o, local, gate, gate_bias, w_global, w_local)
    return tuple(o.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _mix_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.config = inputs[6:]


def _mix_gradients(ctx, dy):
    saved = ctx.saved_tensors
    do, dlocal, dgate, dbias, dw_global, dw_local = _mix_backward_op(*saved, dy, *ctx.config)
    return do, dlocal, dgate, None if saved[3] is None else dbias, dw_global, dw_local, None, None, None


_mix_backward_op = Op('zoo::gated_local_mix_backward', _mix_backward, _mix_backward_fake, any_strides=True)
_mix_op = Op(
    'zoo::gated_local_mix',
    _mix_forward,
    lambda o, *_: o.new_empty(o.shape),
    _mix_setup,
    _mix_gradients,
    any_strides=True,
)


def _gates_flops(passes: int):
    def formula(r_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * passes * torch.Size(r_shape).numel() * weight_shape[0]

    return formula


register_flop_formula(torch.ops.zoo.log_gates)(_gates_flops(1))
register_flop_formula(torch.ops.zoo.log_gates_backward)(_gates_flops(3))


def log_gates(r: Tensor, weight: Tensor, bias: Tensor, normalizer: float = 16.0) -> tuple[Tensor, Tensor]:
    """Log gates of a bidirectional scan, logsigmoid(r W^T + b) / normalizer.

    Args:
        r: low-rank logits (..., R).
        weight: (2K, R): the forward direction's rows, then the backward one's.
        bias: (2K,).
        normalizer: the larger, the slower the default decay.

    Returns:
        The log gates (..., K) of the forward and of the backward direction, in r's dtype.

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != r.shape[-1]:
        raise ValueError(
            f'log_gates: weight must be (2K, {r.shape[-1]}) for r {tuple(r.shape)}, got {tuple(weight.shape)}'
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f'log_gates: bias must be ({weight.shape[0]},) as weight has rows, got {tuple(bias.shape)}')
    if _dispatch.forced() == 'naive':
        return naive_log_gates(r, weight, bias, normalizer)
    if r.shape[-1] <= 64 and _dispatch.takes_triton('mix', r):
        return _gates_op(r, weight, bias, float(normalizer))
    wide = _wide(r)
    z = F.linear(r.to(wide), weight.to(wide), bias.to(wide)).to(wide)
    return tuple((F.logsigmoid(z) / normalizer).to(r.dtype).chunk(2, -1))


def gated_local_mix(
    o: Tensor,
    local: Tensor,
    gate: Tensor,
    w_global: Tensor,
    w_local: Tensor,
    eps: float = 1e-6,
    *,
    gate_logits: bool = False,
    gate_bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """ViG's 2D gated locality injection: gate * RMSNorm(o) + (1 - gate) * RMSNorm(local), per head.

    Args:
        o: the scan's output (B, T, H, V).
        local: the local branch (B, T, H, V).
        gate: mixing weights in [0, 1], after the sigmoid (B, T, H, V).
        w_global: weight (V,) of o's norm, shared by the heads.
        w_local: weight (V,) of the local branch's norm.
        eps: added to the mean square of both norms.
        gate_logits: the gate is given before the sigmoid.
        gate_bias: (H V,) added to gate logits.
        activation: `silu` of the mixture, or None.

    Returns:
        The mixture (B, T, H, V) in o's dtype; it is computed in fp32.

    Raises:
        ValueError: for arguments that do not fit, naming them.
    """
    shape, device = o.shape, o.device
    if len(shape) != 4 or not shape == local.shape == gate.shape:
        raise ValueError(
            f'gated_local_mix: o, local and gate must share one shape (B, T, H, V), '
            f'got {tuple(shape)}, {tuple(local.shape)}, {tuple(gate.shape)}'
        )
    for name, x in (('o', o), ('local', local), ('gate', gate)):
        if x.dtype not in _dispatch.DTYPES or x.device != device:
            raise ValueError(
                f'gated_local_mix: {name} must be {_dispatch.DTYPE_NAMES}, on {device} as o is, '
                f'got {x.dtype} on {x.device}'
            )
    heads, width = shape[2:]
    if not w_global.shape == w_local.shape == (width,):
        raise ValueError(
            f'gated_local_mix: w_global and w_local must be ({width},), '
            f'got {tuple(w_global.shape)} and {tuple(w_local.shape)}'
        )
    if gate_bias is not None and (not gate_logits or gate_bias.shape != (heads * width,)):
        raise ValueError(
            f'gated_local_mix: gate_bias must be ({heads * width},) and comes with gate_logits=True, '
            f'got {tuple(gate_bias.shape)}'
        )
    if activation not in (None, 'silu'):
        raise ValueError(f"gated_local_mix: activation must be None or 'silu', got {activation!r}")
    args = (o, local, gate, gate_bias, w_global, w_local, float(eps), gate_logits, activation == 'silu')
    if _dispatch.forced() == 'naive':
        return naive_gated_local_mix(*args)
    if width <= 256 and _dispatch.takes_triton('mix', o):
        return _mix_op(*args)
    return _torch_gated_local_mix(*args)
