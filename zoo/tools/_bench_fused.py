"""The fused token ops at ViG's shapes, for `zoo bench kernels`."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.mix import gated_local_mix, log_gates
from zoo.kernels.norm import rms_norm
from zoo.kernels.swiglu import swiglu
from zoo.tools._bench_case import Case

# (B, T, H, V, hidden channels of the MLP); channels are H V, key channels half of that.
SHAPES = {
    'vig_small_224': (128, 196, 6, 64, 1024),
    'vig_tiny_1024': (16, 4096, 3, 64, 512),
    'vig_base_224': (128, 196, 12, 64, 2048),
}
_RANK = 16


def _draws(shapes: tuple[tuple[int, ...], ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    rng = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(*s, generator=rng, device=device).to(dtype) for s in shapes)


def _eager_norm(x: Tensor, residual: Tensor, weight: Tensor):
    stream = residual + x
    return F.rms_norm(stream.float(), weight.shape, weight.float(), 1e-6).to(x.dtype), stream


def _norm(x: Tensor, residual: Tensor, weight: Tensor):
    return rms_norm(x, weight, 1e-6, residual)


def _eager_swiglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def _eager_gates(r: Tensor, weight: Tensor, bias: Tensor):
    return tuple((F.logsigmoid(F.linear(r, weight, bias).float()) / 16).to(r.dtype).chunk(2, -1))


def _eager_mix(o: Tensor, local: Tensor, gate: Tensor, w_global: Tensor, w_local: Tensor) -> Tensor:
    a, b = (F.rms_norm(x.float(), w.shape, w.float(), 1e-6) for x, w in ((o, w_global), (local, w_local)))
    return torch.lerp(b, a, gate.sigmoid().float()).to(o.dtype)


def _mix(o: Tensor, local: Tensor, gate: Tensor, w_global: Tensor, w_local: Tensor) -> Tensor:
    return gated_local_mix(o, local, gate, w_global, w_local, gate_logits=True)


def _compiled(formula):
    """The formula under torch.compile, compiled when it is first called."""
    compiled = cache(lambda: torch.compile(formula))
    return lambda *args: compiled()(*args)


def _case(op: str, label: str, shapes: tuple, ours, formula, moved: tuple[int, int], dims: dict[str, int]) -> Case:
    peers = {'eager': formula, 'torch.compile': _compiled(formula)}
    return Case(op, label, partial(_draws, shapes), ours, peers, 2 * moved[0], 2 * moved[1], dims)


def cases() -> list[Case]:
    """Each op at every shape. Numbers moved: every argument and result once, gradients likewise."""
    found = []
    for label, (batch, length, heads, dim, hidden) in SHAPES.items():
        tokens, width = batch * length, heads * dim
        n = tokens * width
        dims = dict(B=batch, T=length, H=heads, V=dim)
        map_ = (batch, length, width)
        per_head = (batch, length, heads, dim)
        gates = ((batch, length, _RANK), (width, _RANK), (width,))
        found += [
            _case('rms_norm', label, (map_, map_, (width,)), _norm, _eager_norm, (4 * n, 5 * n), dims),
            _case('swiglu', label, ((batch, length, 2 * hidden),), swiglu, _eager_swiglu,
                  (3 * tokens * hidden, 5 * tokens * hidden), dims),
            _case('log_gates', label, gates, log_gates, _eager_gates,
                  (tokens * _RANK + n, 2 * tokens * _RANK + n), dims),
            _case('gated_local_mix', label, (*[per_head] * 3, (dim,), (dim,)), _mix, _eager_mix, (4 * n, 7 * n), dims),
        ]  # fmt: skip
    return found
