"""Torch path of `linear_attention`: matrix products only, on any device, forward and backward.

The forward functions are plain differentiable torch: they are also what `torch.export` traces. All sums are fp32 (fp64
for fp64 input). Inside, tensors are (B, H, T, D).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo.kernels.rope import apply_rope, axial_rope_tables


def _heads_first(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(1, 2).to(like.dtype).contiguous()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sum over tokens of outer products: (B, H, T, K), (B, H, T, V) -> (B, H, K, V)."""
    return a.mT @ b


def linear_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, eps: float, keep: bool, elu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, H, V); fp32 mean of k v^T (B, H, K, V) and of k (B, H, K), empty ones unless `keep`."""
    with torch.autocast(q.device.type, enabled=False):
        features = _positive if elu else _heads_first
        qs, ks, vs = features(q), features(k), _heads_first(v)
        share = 1.0 / max(q.shape[1], 1)
        kv, mean = _outer(ks, vs) * share, ks.sum(2) * share
        out = (qs @ kv) / (qs @ mean.unsqueeze(-1) + eps)
        o = _tokens_first(out, v)
        return (o, kv, mean) if keep else (o, None, None)


def linear_attention_bwd(q, k, v, kv, mean, do, eps: float, elu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq, dk, dv; `kv` and `mean` are those of the forward pass."""
    with torch.autocast(q.device.type, enabled=False):
        features = _positive if elu else _heads_first
        qs, ks, vs, dos = features(q), features(k), _heads_first(v), _heads_first(do)
        share = 1.0 / max(q.shape[1], 1)
        inverse = (qs @ mean.unsqueeze(-1) + eps).reciprocal()
        g = dos * inverse
        t = g @ kv.mT
        weight = (qs * t).sum(-1, keepdim=True) * inverse  # do . o / denominator
        dq = t.addcmul(weight, mean.unsqueeze(-2), value=-1)
        dkv, dmean = _outer(qs, g) * share, -(qs * weight).sum(2) * share
        dk = (vs @ dkv.mT).add_(dmean.unsqueeze(-2))
        dv = ks @ dkv
        if elu:  # the derivative of elu(x) + 1
            dq, dk = dq * qs.clamp(max=1), dk * ks.clamp(max=1)
        return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v)


# --------------------------------------------------------------------------------------------------------------------
# Rank-augmented linear attention


def _positive(x: Tensor) -> Tensor:
    return F.elu(_heads_first(x).contiguous()).add_(1)  # elu of a strided view is several times slower than the copy


def _rotation(height: int, width: int, like: Tensor):
    """A function of (x, direction) that turns the pairs of x (B, H, T, D), back for direction -1."""
    cos, sin = axial_rope_tables(height, width, like.shape[-1], device=like.device)
    if torch.compiler.is_exporting():  # exchange formats have no complex numbers
        return lambda x, direction=1: apply_rope(x, cos, sin * direction)
    turn = torch.complex(cos[:, ::2].to(like.dtype), sin[:, ::2].to(like.dtype))

    def rotate(x: Tensor, direction: int = 1) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * (turn if direction == 1 else turn.conj())).flatten(-2)

    return rotate


def _modulated(r: Tensor, lepe: Tensor | None, gate: Tensor | None) -> Tensor:
    """(r + lepe) * gate in r's memory."""
    r = r if lepe is None else r.add_(lepe)
    return r if gate is None else r.mul_(gate)


# A table of a few KB that all programs of a GPU read all the time may lie in one slice of its cache, and they wait.
TABLES = 16


def kept_sizes(q: Tensor, height: int, width: int) -> list[int]:
    """Of what the forward pass of `rank_augmented` leaves in one tensor for the backward pass, padded to 16 bytes.

    The sum of w k v^T with rotated k (B, H, D, D), the sum of w k and the mean of q (B, H, D), the log normaliser of w
    (B, H), where w are the softmax weights of the tokens, and TABLES times cosines and sines (2, max(height, width),
    D / 4), which the torch path leaves alone.
    """
    batch, _, heads, dim = q.shape
    rows = batch * heads
    sizes = rows * dim * dim, rows * dim, rows * dim, rows, TABLES * 2 * torch.sym_max(height, width) * (dim // 4)
    return [(size + 3) // 4 * 4 for size in sizes]


def _unpack(kept: Tensor, q: Tensor, height: int, width: int) -> list[Tensor]:
    batch, _, heads, dim = q.shape
    shapes = (batch, heads, dim, dim), (batch, heads, dim), (batch, heads, dim), (batch, heads)
    parts = kept.split_with_sizes(kept_sizes(q, height, width))
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes)]


def rank_augmented_fwd(q, k, v, lepe, gate, height: int, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D), and what the backward pass needs in one fp32 tensor, see `kept_sizes`."""
    y, *results = _rank_forward(q, k, v, lepe, gate, height, width, eps)
    kept = results[0].new_zeros(sum(kept_sizes(q, height, width)))
    for part, result in zip(_unpack(kept, q, height, width), results):
        part.copy_(result)
    return y, kept


def rank_augmented_inference(q, k, v, lepe, gate, height: int, width: int, eps: float) -> Tensor:
    """y alone, for exports."""
    return _rank_forward(q, k, v, lepe, gate, height, width, eps)[0]


def _rank_forward(q, k, v, lepe, gate, height: int, width: int, eps: float) -> tuple[Tensor, ...]:
    with torch.autocast(q.device.type, enabled=False):
        qs, ks, vs = _positive(q), _positive(k), _heads_first(v)
        rotate = _rotation(height, width, qs)
        qbar = qs.mean(2)
        logits = (ks @ qbar.unsqueeze(-1)) * q.shape[-1] ** -0.5  # (B, H, T, 1)
        norm = logits.logsumexp(2, keepdim=True)
        weights = (logits - norm).exp()
        weighted = ks * weights
        key, kv = weighted.sum(2), _outer(rotate(weighted), vs)
        r = (rotate(qs) @ kv) / (qs @ key.unsqueeze(-1) + eps)
        y = _modulated(r.transpose(1, 2), lepe, gate).to(v.dtype).contiguous()
        return y, kv, key, qbar, norm.flatten(1)


def rank_augmented_bwd(q, k, v, lepe, gate, kept, dy, height: int, width: int, eps: float):
    """Gradients dq, dk, dv, dlepe (or None), dgate (or None); `kept` is what the forward pass left."""
    kv, key, qbar, norm = _unpack(kept, q, height, width)
    with torch.autocast(q.device.type, enabled=False):
        qs, ks, vs = _positive(q), _positive(k), _heads_first(v)
        rotate = _rotation(height, width, qs)
        scale, row = q.shape[-1] ** -0.5, lambda x: x.unsqueeze(-2)
        turned_q = rotate(qs)
        inverse = (qs @ key.unsqueeze(-1) + eps).reciprocal()
        r = (turned_q @ kv) * inverse
        dr, dgate = _heads_first(dy), None
        if gate is not None:
            total = r if lepe is None else r + _heads_first(lepe)
            dgate = _tokens_first(dr * total, gate)
            dr = dr * _heads_first(gate)
        g, u = dr * inverse, -(dr * r).sum(-1, keepdim=True) * inverse
        dkv, dkey = _outer(turned_q, g), (qs * u).sum(2)
        # keys: the log weights' gradient needs the mean of the weights' gradients, which both states give
        weights = (ks @ qbar.unsqueeze(-1) * scale - norm[..., None, None]).exp()
        dk = rotate(vs @ dkv.mT, -1).add_(row(dkey))
        mean = (dkv * kv).sum((-2, -1)) + (dkey * key).sum(-1)
        dlogits = weights * ((ks * dk).sum(-1, keepdim=True) - mean[..., None, None]) * scale
        dk = (dk * weights + dlogits * row(qbar)) * ks.clamp_max(1)  # elu'(x) = min(elu(x) + 1, 1)
        dv = rotate(ks * weights) @ dkv
        dqbar = (ks * dlogits).sum(2) / max(q.shape[1], 1)
        dq = (rotate(g @ kv.mT, -1) + u * row(key) + row(dqbar)) * qs.clamp_max(1)
        if gate is None:  # dr is a view of dy, which an op must not return
            dr = dr.clone()
        dlepe = None if lepe is None else _tokens_first(dr, lepe)
        return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v), dlepe, dgate
