"""The gated delta rule: a causal scan that decays, corrects and reads a state.

Per batch entry and head (K key channels, V value channels, log decay g_t <= 0, rate beta_t, |k_t| <= 1):

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        S in K x V, fp32
    o_t = scale S_t^T q_t

Shapes: q, k (B, T, H, K), v (B, T, H, V), g, beta (B, T, H). A rate of 0 with g = 0 leaves the state as it is; rates
up to 2 give eigenvalues down to -1 (arXiv 2411.12537).

Source: Gated DeltaNet, arXiv 2412.06464. On GPUs the scan runs in flash-linear-attention's kernels where that package
is installed (`pip install "linear-zoo[bench]"`), whose argument names these are; elsewhere in chunks of 64 tokens: with
c the sums of g inside a chunk, D_ij = exp(c_i - c_j) for i >= j and M = (I + strict_lower(beta (K K^T * D)))^-1 beta,

    U = M V - M (K * exp(c)) S,    O = (Q * exp(c)) S + (Q K^T * D) U,    S <- exp(c_C) S + (K * exp(c_C - c))^T U

where every exponent is at most 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from zoo.kernels import _dispatch
from zoo.kernels._torch_gla import ZERO_GATE

__all__ = ['gated_delta_rule', 'naive_gated_delta_rule']

CHUNK = 64


def naive_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time, in fp32 (fp64 for fp64 input): the oracle."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs, gs, rates = (t.to(wide) for t in (q, k, v, g, beta))
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state = qs.new_zeros(shape) if initial_state is None else initial_state.to(wide)
    outputs: list[Tensor] = []
    for t in range(q.shape[1]):
        state = gs[:, t, :, None, None].exp() * state
        error = vs[:, t] - torch.einsum('bhkv,bhk->bhv', state, ks[:, t])
        state = state + torch.einsum('bhk,bhv->bhkv', ks[:, t], rates[:, t].unsqueeze(-1) * error)
        outputs.append(scale * torch.einsum('bhkv,bhk->bhv', state, qs[:, t]))
    out = torch.stack(outputs, 1) if outputs else qs.new_zeros(v.shape)
    return out.to(v.dtype), state


def torch_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Matrix products over chunks, a loop over the chunks' states; differentiable."""
    wide, dtype, length = torch.promote_types(q.dtype, torch.float32), v.dtype, q.shape[1]
    chunk = min(CHUNK, max(length, 1))
    pad = -length % chunk

    def cut(x: Tensor) -> Tensor:
        """(B, T, H, X) to (B, H, chunks, C, X); padding tokens neither decay nor write."""
        x = torch.nn.functional.pad(x.to(wide), (0, 0, 0, 0, 0, pad))
        return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v = cut(q) * scale, cut(k), cut(v)
    # differences of sums follow, which infinities would turn into NaN
    g, beta = cut(g.unsqueeze(-1)).clamp(min=ZERO_GATE[wide]), cut(beta.unsqueeze(-1))
    sums = g.cumsum(-2)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = torch.where(lower, sums - sums.mT, float('-inf')).exp()
    key, eye = k * sums.exp(), torch.eye(chunk, dtype=wide, device=q.device)
    mix = (beta * (k @ k.mT) * decay).tril(-1) + eye
    solved = torch.linalg.solve_triangular(mix, torch.cat((beta * v, beta * key), -1), upper=False, unitriangular=True)
    values, keys = solved.split((v.shape[-1], k.shape[-1]), -1)
    read, within, total = q * sums.exp(), (q @ k.mT) * decay, sums[..., -1:, :]
    write = k * (total - sums).exp()
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    state = q.new_zeros(shape) if initial_state is None else initial_state.to(wide)
    outputs: list[Tensor] = []
    for i in range(q.shape[2]):
        u = values[:, :, i] - keys[:, :, i] @ state
        outputs.append(read[:, :, i] @ state + within[:, :, i] @ u)
        state = total[:, :, i].exp() * state + write[:, :, i].mT @ u
    if not outputs:
        return v.new_zeros(q.shape[0], 0, q.shape[1], v.shape[-1], dtype=dtype), state
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype), state


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f'gated_delta_rule: q and k must be (B, T, H, K), got {tuple(q.shape)} and {tuple(k.shape)}')
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f'gated_delta_rule: v must be {tuple(q.shape[:3])} + (V,), got {tuple(v.shape)}')
    for name, t in (('g', g), ('beta', beta)):
        if t.shape != q.shape[:3]:
            raise ValueError(f'gated_delta_rule: {name} must be (B, T, H) = {tuple(q.shape[:3])}, got {tuple(t.shape)}')
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f'gated_delta_rule: q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}')
    expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f'gated_delta_rule: initial_state must be {expected}, got {tuple(initial_state.shape)}')


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, linear in T.

    Args:
        q: queries (B, T, H, K), fp64, fp32, fp16 or bf16.
        k: keys of norm at most 1 (B, T, H, K), dtype of q.
        v: values (B, T, H, V), dtype of q.
        g: log decays <= 0 (B, T, H); -inf forgets the state, where flash-linear-attention's kernels do not run.
        beta: rates of the correction, from 0 to 2 (B, T, H).
        scale: multiplies q; K ** -0.5 by default.
        initial_state: fp32 state (B, H, K, V) that arrives at the first token.
        output_final_state: also return the state that leaves the sequence.

    Returns:
        The outputs (B, T, H, V) in v's dtype and the fp32 final state, or None unless asked for.

    Raises:
        ValueError: for shapes or dtypes that do not fit, naming the argument.
    """
    _check(q, k, v, g, beta, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    path = _torch_path
    if _dispatch.forced() == 'naive':
        path = naive_gated_delta_rule
    elif not _dispatch.exporting() and _dispatch.may_use_triton(q):
        module = _dispatch.triton_module('gated_delta')
        unsupported = module.unsupported(q, v) if module is not None else None
        if _dispatch.select('gated_delta', q, unsupported=unsupported) == 'triton':
            path = module.gated_delta_rule
    o, state = path(q, k, v, g, beta, scale, initial_state)
    return o, state if output_final_state else None


def _torch_path(q, k, v, g, beta, scale, initial_state):
    if q.shape[1] == 1:  # one step needs no chunk
        return naive_gated_delta_rule(q, k, v, g, beta, scale, initial_state)
    return torch_gated_delta_rule(q, k, v, g, beta, scale, initial_state)
