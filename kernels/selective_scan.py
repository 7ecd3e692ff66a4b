"""The selective scan of Mamba-1, along one sequence and along the pixel orders of a map.

For batch entry b, channel d of group g and state n, with step sizes delta:

    delta_t = softplus(raw_t + delta_bias)           softplus and bias optional; softplus(v) = v for v > 20
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t   h_0 = 0, in fp32
    y_t = sum_n C_t h_t + D u_t

u, delta (B, G D, T), A (G D, N), B, C (B, G, N, T), D, delta_bias (G D,); `reverse` runs from the last token to the
first. A is discretised exactly, B by Euler's rule: Mamba, arXiv 2312.00752, and its public `selective_scan_fn`.

`selective_scan_2d` runs K such scans with N states over the pixels of a map (B, D, H, W) and adds their outputs at each
pixel; dt (rank R), B and C of all directions are one projection of the map. Direction k is

    K = 2:  0 row by row, 1 the reverse of it                      (MobileMamba, arXiv 2411.15941)
    K = 4:  0 row by row, 1 column by column, 2 and 3 the reverses of 0 and 1   (VMamba's cross scan, arXiv 2401.10166)

The projections act on pixels, so they commute with any order: they are computed once, and only the scans differ.

FLOP convention: two per multiply-add. Per token, channel and state: decay, drive, update and read-out, 6; in 2D also
the product with dt_projs_weight, 2 R. A backward pass counts as two forward passes. The projection of the map is
counted as the matrix product it is.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from zoo.kernels import _dispatch, _torch_selective_scan
from zoo.kernels._op import Op

__all__ = ['naive_selective_scan', 'naive_selective_scan_2d', 'selective_scan', 'selective_scan_2d']


def naive_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """The recurrence, one token at a time, in fp32 (fp64 for fp64 input): the oracle of every faster path.

    Arguments and result are those of `selective_scan`.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, step, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    step = F.softplus(step) if delta_softplus else step
    per_group = A.shape[0] // B.shape[1]
    B, C = (t.repeat_interleave(per_group, 1) for t in (B, C))  # (B, G D, N, T)
    state = x.new_zeros(*x.shape[:2], A.shape[1])
    outputs: list[Tensor] = [x.new_empty(0)] * x.shape[-1]
    for t in reversed(range(x.shape[-1])) if reverse else range(x.shape[-1]):
        now = step[..., t, None]
        state = (now * A).exp() * state + now * B[..., t] * x[..., t, None]
        outputs[t] = (C[..., t] * state).sum(-1)
    y = torch.stack(outputs, -1) if outputs else torch.zeros_like(x)
    return (y if D is None else y + D.to(dtype)[:, None] * x).to(u.dtype)


def naive_selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    directions: int,
) -> Tensor:
    """Every direction as a permuted copy of the map, its own projections and `naive_selective_scan`.

    Arguments and result are those of `selective_scan_2d`.
    """
    dtype, (height, width) = torch.promote_types(x.dtype, torch.float32), x.shape[2:]
    rank, states = dt_projs_weight.shape[-1], A_logs.shape[-1]
    A, skip = (t.to(dtype).unflatten(0, (directions, -1)) for t in (-A_logs.to(dtype).exp(), Ds))
    merged = 0
    for k in range(directions):
        column = directions == 4 and k % 2 == 1
        reverse = k >= directions // 2
        u = (x.mT if column else x).flatten(2).to(dtype)
        u = u.flip(-1) if reverse else u
        dt, B, C = (x_proj_weight[k].to(dtype) @ u).split([rank, states, states], 1)
        raw = dt_projs_weight[k].to(dtype) @ dt
        y = naive_selective_scan(u, raw, A[k], B[:, None], C[:, None], skip[k], dt_projs_bias[k], True)
        y = y.flip(-1) if reverse else y
        y = y.unflatten(-1, (width, height) if column else (height, width))
        merged = merged + (y.mT if column else y)
    return merged.to(x.dtype)


# Custom ops. Optional results are empty tensors inside the ops: `Tensor | None` in a returned tuple is not supported.


def _scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> Tensor:
    path = _implementation(u, A)
    return _laid_out_like(u, path.selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse))


def _scan_fake(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    return torch.empty_like(u)


def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _implementation(u, A)
    grads = path.selective_scan_bwd(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, dy)
    inputs = (u, delta, A, B, C, D, delta_bias)
    return tuple(None if x is None else _laid_out_like(x, grad) for x, grad in zip(inputs, grads))


def _scan_backward_fake(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, dy):
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, A, B, C, D, delta_bias))


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx, dy):
    saved = ctx.saved_tensors
    grads = _scan_backward_op(*saved, ctx.delta_softplus, ctx.reverse, dy)
    return *(None if x is None else grad for x, grad in zip(saved, grads)), None, None


_scan_backward_op = Op('zoo::selective_scan_backward', _scan_backward, _scan_backward_fake)
_scan_op = Op('zoo::selective_scan', _scan_forward, _scan_fake, _scan_setup, _scan_gradients)


def _scan_2d_forward(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, directions: int
) -> Tensor:
    return (
        _implementation(x, A, dt_weight.shape[2])
        .selective_scan_2d_fwd(x, p, dt_weight, dt_bias, A, D, directions)
        .contiguous()
    )


def _scan_2d_fake(x, p, dt_weight, dt_bias, A, D, directions):
    return x.new_empty(x.shape)


def _scan_2d_backward(
    x: Tensor, p: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, directions: int, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    path = _implementation(x, A, dt_weight.shape[2])
    grads = path.selective_scan_2d_bwd(x, p, dt_weight, dt_bias, A, D, directions, dy)
    return tuple(grad.contiguous() for grad in grads)


def _scan_2d_backward_fake(x, p, dt_weight, dt_bias, A, D, directions, dy):
    return tuple(t.new_empty(t.shape) for t in (x, p, dt_weight, dt_bias, A, D))


def _scan_2d_setup(ctx, inputs, output):
    *tensors, ctx.directions = inputs
    ctx.save_for_backward(*tensors)


def _scan_2d_gradients(ctx, dy):
    return *_scan_2d_backward_op(*ctx.saved_tensors, ctx.directions, dy), None


_scan_2d_backward_op = Op('zoo::selective_scan_2d_backward', _scan_2d_backward, _scan_2d_backward_fake)
_scan_2d_op = Op('zoo::selective_scan_2d', _scan_2d_forward, _scan_2d_fake, _scan_2d_setup, _scan_2d_gradients)


@functools.lru_cache(1024)
def _dense_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of `torch.empty_like` for a tensor of these."""
    return torch.empty_like(torch.empty_strided(shape, stride, device='meta')).stride()


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout of `like`, which the fake kernels promise; most implementations give it as it is."""
    fits = x.stride() == _dense_strides(like.shape, like.stride())
    return x if fits else torch.empty_like(like).copy_(x)


def _implementation(u: Tensor, A: Tensor, rank: int = 0):
    """The module whose `selective_scan_fwd`, ... run: the torch path or the Triton kernels."""
    if u.numel() == 0 or A.numel() == 0:
        return _torch_selective_scan
    return _dispatch.implementation('selective_scan', _torch_selective_scan, u, u.dtype, A.shape[1], rank)


def _scan_flops(passes: int):
    def formula(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
        batch, channels, length = u_shape
        return 6 * passes * batch * channels * length * A_shape[1]

    return formula


def _scan_2d_flops(passes: int):
    def formula(x_shape, p_shape, dt_shape, bias_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
        directions, channels, rank = dt_shape
        batch, height, width, _ = x_shape
        return passes * directions * batch * height * width * channels * (6 * A_shape[1] + 2 * rank)

    return formula


register_flop_formula(torch.ops.zoo.selective_scan)(_scan_flops(1))
register_flop_formula(torch.ops.zoo.selective_scan_backward)(_scan_flops(2))
register_flop_formula(torch.ops.zoo.selective_scan_2d)(_scan_2d_flops(1))
register_flop_formula(torch.ops.zoo.selective_scan_2d_backward)(_scan_2d_flops(2))


def _require(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], layout: str, device) -> None:
    """Refuse an argument of another shape than `shape`, which the message calls `layout`, or on another device."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f'{op}: {name} must be {layout} = {tuple(shape)}, got {tuple(x.shape)}')
    if not x.is_floating_point():
        raise ValueError(f'{op}: {name} must be a real floating tensor, got {x.dtype}')
    if x.device != device:
        raise ValueError(f'{op}: {name} is on {x.device}, the input on {device}')


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Mamba's selective scan, linear in T.

    Args:
        u: inputs (B, G D, T), fp64, fp32, fp16 or bf16; any strides.
        delta: step sizes (B, G D, T), before bias and softplus.
        A: real state matrix (G D, N), negative for decay.
        B: input matrix (B, G, N, T), shared by the channels of a group.
        C: output matrix (B, G, N, T).
        D: skip gains (G D,), or None.
        delta_bias: added to delta (G D,), or None.
        delta_softplus: apply softplus to the step sizes.
        reverse: scan from the last token to the first.

    Returns:
        The outputs (B, G D, T) in u's dtype, accumulated in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    op = 'selective_scan'
    if u.ndim != 3 or u.dtype not in _dispatch.DTYPES:
        raise ValueError(
            f'{op}: u must be a floating tensor (B, G D, T), {_dispatch.DTYPE_NAMES}, got {tuple(u.shape)} {u.dtype}'
        )
    batch, channels, length = u.shape
    if A.ndim != 2 or B.ndim != 4 or B.shape[1] == 0 or channels % B.shape[1]:
        raise ValueError(
            f'{op}: A must be (G D, N) and B (B, G, N, T) with G a divisor of G D = {channels}, '
            f'got A {tuple(A.shape)} and B {tuple(B.shape)}'
        )
    states, groups, device = A.shape[1], B.shape[1], u.device
    _require(op, 'delta', delta, u.shape, '(B, G D, T)', device)
    _require(op, 'A', A, (channels, states), '(G D, N)', device)
    _require(op, 'B', B, (batch, groups, states, length), '(B, G, N, T)', device)
    _require(op, 'C', C, (batch, groups, states, length), '(B, G, N, T)', device)
    _require(op, 'D', D, (channels,), '(G D,)', device)
    _require(op, 'delta_bias', delta_bias, (channels,), '(G D,)', device)
    arguments = (u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    if _dispatch.forced() == 'naive':
        return naive_selective_scan(*arguments)
    if _dispatch.exporting():
        return _torch_selective_scan.export_selective_scan(*arguments)
    return _scan_op(*arguments)


def selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    directions: int,
) -> Tensor:
    """Selective scans over the pixels of a map in several orders, summed at each pixel.

    Args:
        x: (B, D, H, W), fp64, fp32, fp16 or bf16. Channels-last memory is read as it is, any other is copied to it.
        x_proj_weight: (K, R + 2 N, D), rows of dt, B and C of each direction; cast to x's dtype for the product.
        dt_projs_weight: (K, D, R).
        dt_projs_bias: (K, D), added before softplus.
        A_logs: (K D, N); the state matrix is -exp(A_logs).
        Ds: skip gains (K D,).
        directions: K, 2 or 4; their order is at the top of this module.

    Returns:
        The sum over directions (B, D, H, W) in x's dtype with channels-last memory, accumulated in fp32 (fp64 for fp64
        input). Where a forward and a reverse scan are added on a GPU, one of them is rounded to x's dtype in between.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming the argument.
    """
    op = 'selective_scan_2d'
    if directions not in (2, 4):
        raise ValueError(f'{op}: directions must be 2 or 4, got {directions!r}')
    if x.ndim != 4 or x.dtype not in _dispatch.DTYPES:
        raise ValueError(
            f'{op}: x must be a floating tensor (B, D, H, W), {_dispatch.DTYPE_NAMES}, got {tuple(x.shape)} {x.dtype}'
        )
    if dt_projs_weight.ndim != 3 or A_logs.ndim != 2:
        raise ValueError(
            f'{op}: dt_projs_weight must be (K, D, R) and A_logs (K D, N), '
            f'got {tuple(dt_projs_weight.shape)} and {tuple(A_logs.shape)}'
        )
    channels, rank, states, device = x.shape[1], dt_projs_weight.shape[2], A_logs.shape[1], x.device
    _require(op, 'x_proj_weight', x_proj_weight, (directions, rank + 2 * states, channels), '(K, R + 2 N, D)', device)
    _require(op, 'dt_projs_weight', dt_projs_weight, (directions, channels, rank), '(K, D, R)', device)
    _require(op, 'dt_projs_bias', dt_projs_bias, (directions, channels), '(K, D)', device)
    _require(op, 'A_logs', A_logs, (directions * channels, states), '(K D, N)', device)
    _require(op, 'Ds', Ds, (directions * channels,), '(K D,)', device)
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if _dispatch.forced() == 'naive':
        return naive_selective_scan_2d(x, *parameters, directions=directions)
    pixels = x.permute(0, 2, 3, 1)
    p = F.linear(pixels, x_proj_weight.to(x.dtype).flatten(0, 1))
    A = -A_logs.to(torch.promote_types(x.dtype, torch.float32)).exp()
    arguments = (pixels, p, dt_projs_weight, dt_projs_bias, A, Ds, directions)
    if _dispatch.exporting():
        return _torch_selective_scan.export_selective_scan_2d(*arguments).permute(0, 3, 1, 2)
    return _scan_2d_op(*(t.contiguous() if torch.is_tensor(t) else t for t in arguments)).permute(0, 3, 1, 2)
