"""Non-causal normalised linear attention, plain and rank-augmented.

`linear_attention`, per batch entry and head, q and k already positive features (elu + 1 and the like), N tokens:

    S = sum_j k_j v_j^T / N        kbar = sum_j k_j / N        o_i = S^T q_i / (q_i . kbar + eps)

eps is added to the mean-normalised denominator, so a model behaves alike at every resolution. Source: LinFusion, arXiv
2409.02097, with eps 1e-4. With `elu` q and k come before that activation, phi(x) = elu(x) + 1, and the op applies it.

`rank_augmented` (RALA), from q, k before their activation, phi(x) = elu(x) + 1, rope the axial rotation of `rope.py`:

    w = softmax_j(D ** -0.5 * mean_n(phi(q_n)) . phi(k_j))
    S = sum_j w_j rope(phi(k_j)) v_j^T        s = sum_j w_j phi(k_j)
    r_i = S^T rope(phi(q_i)) / (phi(q_i) . s + eps)

and the output modulation y = (r + lepe) * gate. The denominator and the weights see no rotation. Source: RAVLT, arXiv
2411.07635; its code carries factors N and N ** -0.5 that cancel.

Shapes: q, k (B, T, H, K), v (B, T, H, V); K = V = D for `rank_augmented`. Every sum over tokens is fp32.

FLOP convention: two per multiply-add, the two matrix products counted, 4 T H K V forward and twice that backward per
batch entry, whatever the implementation recomputes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch, _torch_linear_attention
from zoo.kernels._op import Op
from zoo.kernels.rope import apply_rope, axial_rope_tables

__all__ = ['linear_attention', 'naive_linear_attention', 'naive_rank_augmented', 'rank_augmented']

MAX_TRITON_DIM = 128  # channels of a head that the kernels of `rank_augmented` take


def naive_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-4, elu: bool = False) -> Tensor:
    """The T x T form in fp32 (fp64 for fp64 input), the oracle of the faster paths; arguments as `linear_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    if elu:
        qs, ks = torch.nn.functional.elu(qs) + 1, torch.nn.functional.elu(ks) + 1
    weights = qs @ ks.mT / q.shape[1]
    out = (weights @ vs) / (weights.sum(-1, keepdim=True) + eps)
    return out.transpose(1, 2).to(v.dtype)


def naive_rank_augmented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    height: int,
    width: int,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The published order of operations in fp32 (fp64 for fp64 input): the oracle; arguments as `rank_augmented`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    tokens, dim = q.shape[1], q.shape[-1]
    qs, ks = torch.nn.functional.elu(qs) + 1, torch.nn.functional.elu(ks) + 1
    cos, sin = axial_rope_tables(height, width, dim, device=q.device)
    share = torch.softmax(dim**-0.5 * qs.mean(2, keepdim=True) @ ks.mT, -1)  # (B, H, 1, T)
    ks = ks * share.mT * tokens
    z = 1 / (qs @ ks.mean(2, keepdim=True).mT + eps)
    kv = (apply_rope(ks, cos, sin) * tokens**-0.5).mT @ (vs * tokens**-0.5)
    out = ((apply_rope(qs, cos, sin) @ kv) * z).transpose(1, 2)
    out = out if lepe is None else out + lepe
    return (out if gate is None else out * gate).to(v.dtype)


# Custom ops. The sums over tokens come out beside the result: they are small and the backward pass needs them.


def _linear_forward(
    q: Tensor, k: Tensor, v: Tensor, eps: float, keep: bool, elu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation('linear_attention', q, v).linear_attention_fwd(q, k, v, eps, keep, elu)


def _linear_fake(q, k, v, eps, keep, elu=False):
    batch, _, heads, key_dim = q.shape
    state = lambda *shape: q.new_empty(shape, dtype=_state_dtype(q)) if keep else q.new_empty(0)  # noqa: E731
    return v.new_empty(v.shape), state(batch, heads, key_dim, v.shape[-1]), state(batch, heads, key_dim)


def _linear_backward(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, mean: Tensor, do: Tensor, eps: float, elu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation('linear_attention', q, v).linear_attention_bwd(q, k, v, kv, mean, do, eps, elu)


def _linear_backward_fake(q, k, v, kv, mean, do, eps, elu):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _linear_setup(ctx, inputs, output):
    q, k, v, eps, _, elu = inputs
    ctx.save_for_backward(q, k, v, *output[1:])
    ctx.options = eps, elu
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the sums would be kernels


def _linear_gradients(ctx, do, *_):
    if do is None:
        return (None,) * 6
    return *_linear_backward_op(*ctx.saved_tensors, do, *ctx.options), None, None, None


_linear_backward_op = Op('zoo::linear_attention_backward', _linear_backward, _linear_backward_fake, any_strides=True)
_linear_op = Op(
    'zoo::linear_attention', _linear_forward, _linear_fake, _linear_setup, _linear_gradients, any_strides=True
)


def _rank_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lepe: Tensor | None,
    gate: Tensor | None,
    height: int,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    path = _implementation('rank_augmented', q, v)
    return path.rank_augmented_fwd(q, k, v, lepe, gate, height, width, eps)


def _rank_fake(q, k, v, lepe, gate, height, width, eps):
    kept = sum(_torch_linear_attention.kept_sizes(q, height, width))
    return v.new_empty(v.shape), q.new_empty(kept, dtype=_state_dtype(q))


def _rank_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lepe: Tensor | None,
    gate: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    height: int,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _implementation('rank_augmented', q, v)
    return path.rank_augmented_bwd(q, k, v, lepe, gate, kept, dy, height, width, eps)


def _rank_backward_fake(q, k, v, lepe, gate, kept, dy, height, width, eps):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, lepe, gate))


def _rank_setup(ctx, inputs, output):
    *tensors, height, width, eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = height, width, eps
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rank_gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    grads = _rank_backward_op(*saved, dy, *ctx.options)
    return *(None if x is None else grad for x, grad in zip(saved, grads)), None, None, None


_rank_backward_op = Op('zoo::rank_augmented_backward', _rank_backward, _rank_backward_fake, any_strides=True)
_rank_op = Op('zoo::rank_augmented', _rank_forward, _rank_fake, _rank_setup, _rank_gradients, any_strides=True)


def _implementation(family: str, q: Tensor, v: Tensor):
    """The module whose functions of this op run: the torch path or the Triton kernels."""
    if q.numel() == 0 or v.numel() == 0:
        return _torch_linear_attention
    return _dispatch.implementation(family, _torch_linear_attention, q, q.dtype, q.shape[-1], v.shape[-1])


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _product_flops(passes: int):
    def formula(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        batch, length, heads, key_dim = q_shape
        return 4 * passes * batch * length * heads * key_dim * v_shape[-1]

    return formula


register_flop_formula(torch.ops.zoo.linear_attention)(_product_flops(1))
register_flop_formula(torch.ops.zoo.linear_attention_backward)(_product_flops(2))
register_flop_formula(torch.ops.zoo.rank_augmented)(_product_flops(1))
register_flop_formula(torch.ops.zoo.rank_augmented_backward)(_product_flops(2))


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what no implementation accepts, naming the argument."""
    shape, values, dtype, device = q.shape, v.shape, q.dtype, q.device
    if len(shape) != 4 or k.shape != shape:
        raise ValueError(f'{op}: q and k must both be (B, T, H, K), got {tuple(shape)} and {tuple(k.shape)}')
    if values != shape and (len(values) != 4 or values[:3] != shape[:3]):
        raise ValueError(f"{op}: v must be (B, T, H, V) with q's B, T, H = {tuple(shape[:3])}, got {tuple(values)}")
    if not dtype == k.dtype == v.dtype or dtype not in _dispatch.DTYPES:
        raise ValueError(
            f'{op}: q, k, v must share one floating dtype, {_dispatch.DTYPE_NAMES}, got {dtype}, {k.dtype}, {v.dtype}'
        )
    if not device == k.device == v.device:
        raise ValueError(f'{op}: q, k, v must be on one device, got {device}, {k.device}, {v.device}')


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-4, elu: bool = False) -> Tensor:
    """Normalised attention of every token to every token, linear in T.

    Args:
        q: positive query features (B, T, H, K), fp64, fp32, fp16 or bf16.
        k: positive key features (B, T, H, K), dtype of q.
        v: values (B, T, H, V), dtype of q.
        eps: added to the denominator q . mean(k).
        elu: whether elu(x) + 1 of q and k are the features, computed where they are read.

    Returns:
        The outputs (B, T, H, V) in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('linear_attention', q, k, v)
    if _dispatch.forced() == 'naive':
        return naive_linear_attention(q, k, v, eps=eps, elu=elu)
    if _dispatch.exporting():
        return _torch_linear_attention.linear_attention_fwd(q, k, v, eps, False, elu)[0]
    return _linear_op(q, k, v, float(eps), _differentiated(q, k, v), elu)[0]


def rank_augmented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    height: int,
    width: int,
    lepe: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rank-augmented linear attention over a grid of tokens, with its output modulation (r + lepe) * gate.

    Views whose last dimension is contiguous, such as slices of one fused (B, T, 4 H D) projection, are read in place.

    Args:
        q: queries before the activation (B, T, H, D), row-major tokens, D a multiple of 4; fp64, fp32, fp16 or bf16.
        k: keys before the activation, shape and dtype of q.
        v: values, shape and dtype of q.
        height: rows of the grid.
        width: columns of the grid, height * width = T.
        lepe: added to the attention's result, shape and dtype of v; None for nothing.
        gate: multiplies the sum, used as it is, shape and dtype of v; None for 1.
        eps: added to the denominator.

    Returns:
        The outputs (B, T, H, D) in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check('rank_augmented', q, k, v)
    if v.shape != q.shape or q.shape[-1] % 4:
        raise ValueError(
            f'rank_augmented: v must have the shape of q, with D a multiple of 4, got q {tuple(q.shape)} and '
            f'v {tuple(v.shape)}'
        )
    for name, x in (('lepe', lepe), ('gate', gate)):
        if x is not None and (x.shape != v.shape or x.dtype != v.dtype or x.device != v.device):
            raise ValueError(
                f"rank_augmented: {name} must have v's shape, dtype and device {tuple(v.shape)} {v.dtype} {v.device}, "
                f'got {tuple(x.shape)} {x.dtype} {x.device}'
            )
    exporting = _dispatch.exporting()
    if not exporting and height * width != q.shape[1]:  # an exporter would turn the comparison into a fixed size
        raise ValueError(f'rank_augmented: height * width must be T = {q.shape[1]}, got {height} * {width}')
    if _dispatch.forced() == 'naive':
        return naive_rank_augmented(q, k, v, height=height, width=width, lepe=lepe, gate=gate, eps=eps)
    if exporting:
        return _torch_linear_attention.rank_augmented_inference(q, k, v, lepe, gate, height, width, eps)
    return _rank_op(q, k, v, lepe, gate, height, width, float(eps))[0]
