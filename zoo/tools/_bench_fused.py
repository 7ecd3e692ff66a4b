"""The fused token ops and patch embeddings at ViG's shapes, those of diffusion models, for `zoo bench kernels`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.block_tail import Norm, _torch_block_tail, block_tail
from zoo.kernels.conv_norm import conv_norm
from zoo.kernels.group_norm import group_norm
from zoo.kernels.mix import gated_local_mix, log_gates
from zoo.kernels.norm import rms_norm
from zoo.kernels.swiglu import geglu, swiglu
from zoo.tools._bench_case import Case

# (B, T, H, V, hidden channels of the MLP); channels are H V, key channels half of that.
SHAPES = {
    'vig_small_224': (128, 196, 6, 64, 1024),
    'vig_tiny_1024': (16, 4096, 3, 64, 512),
    'vig_base_224': (128, 196, 12, 64, 2048),
}
_RANK = 16
# (B, CIN, image side, C, kernel, stride) of the convolutions before ViG's blocks; a norm follows each.
CONVS = {
    'vig_tiny_1024_conv1': (16, 3, 1024, 96, 9, 8),
    'vig_tiny_1024_conv2': (16, 96, 128, 192, 3, 2),
    'vig_small_224_conv1': (128, 3, 224, 192, 9, 8),
}
# (B, C, height and width) of feature maps: Stable Diffusion 1.5's first level at the stated size, a tile of its VAE.
MAPS = {
    'sd15_512': (2, 320, 64),
    'sd15_2048': (2, 320, 256),
    'sd15_4096': (2, 320, 512),
    'vae_1024': (1, 128, 1024),
}


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


def _tail_args(o: Tensor, stream: Tensor, local: Tensor, gate: Tensor, w_global: Tensor, w_local: Tensor,
               w_out: Tensor, w_norm: Tensor, w_up: Tensor, w_down: Tensor, w_next: Tensor) -> tuple:  # fmt: skip
    weights = (w_global, w_local, w_out * w_out.shape[1] ** -0.5)
    up, down = w_up * w_up.shape[1] ** -0.5, w_down * w_down.shape[1] ** -0.5
    return stream, o, local, gate, None, *weights, Norm(w_norm), up, down, Norm(w_next)


@torch.no_grad()
def _tail(*args: Tensor):
    return block_tail(*_tail_args(*args))


@torch.no_grad()
def _own_ops_tail(*args: Tensor):
    return _torch_block_tail(*_tail_args(*args), 1e-6, None)


def _eager_tail(*args: Tensor):
    """The formula in PyTorch's own ops, with an fp32 stream only inside the norms."""
    stream, o, local, gate, _, w_global, w_local, w_out, norm, w_up, w_down, following = _tail_args(*args)
    stream = stream + F.linear(_eager_mix(o, local, gate, w_global, w_local).flatten(-2), w_out)
    y = F.rms_norm(stream.float(), norm.weight.shape, norm.weight.float(), 1e-6).to(o.dtype)
    stream = stream + F.linear(_eager_swiglu(F.linear(y, w_up)), w_down)
    return stream, F.rms_norm(stream.float(), norm.weight.shape, following.weight.float(), 1e-6).to(o.dtype)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor, *, stride: int) -> Tensor:
    with torch.no_grad():
        return conv_norm(x, weight, bias, w, b, stride=stride, padding=1, activation='silu')


def _eager_conv(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor, *, stride: int) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, 1).permute(0, 2, 3, 1)
    return F.silu(F.layer_norm(y, w.shape, w, b))


def _conv_cases() -> list[Case]:
    """Channels-last maps where a convolution made them; images as they are loaded. Forward only."""
    found = []
    for label, (batch, inside, side, channels, kernel, stride) in CONVS.items():
        out = (side + 2 - kernel) // stride + 1
        numbers = batch * (inside * side**2 + channels * out**2)
        shapes = ((batch, inside, side, side), (channels, inside, kernel, kernel), *[(channels,)] * 3)
        ours, eager = partial(_conv, stride=stride), partial(_eager_conv, stride=stride)
        dims = dict(B=batch, CIN=inside, side=side, C=channels)
        case = _case('conv_norm', label, shapes, ours, eager, (numbers, 0), dims)
        found.append(replace(case, make=partial(_last, case.make)) if inside > 8 else case)
    return found


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, 32, weight, bias, silu=True)


def _eager_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def _eager_geglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * F.gelu(b)


def _diffusion_cases() -> list[Case]:
    """GroupNorm and SiLU of channels-last maps; GEGLU of as many tokens, four times as wide."""
    found = []
    for label, (batch, channels, side) in MAPS.items():
        n, dims = batch * channels * side**2, dict(B=batch, C=channels, side=side)
        shapes = ((batch, channels, side, side), (channels,), (channels,))
        case = _case('group_norm', label, shapes, _group_norm, _eager_group_norm, (2 * n, 3 * n), dims)
        found.append(replace(case, make=partial(_last, case.make)))
        if label.startswith('sd15'):
            shape = ((batch, side**2, 8 * channels),)
            found.append(_case('geglu', label, shape, geglu, _eager_geglu, (12 * n, 20 * n), dims))
    return found


def _last(make, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    x, *rest = make(device, dtype, seed)
    return x.contiguous(memory_format=torch.channels_last), *rest


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
        if width <= 192:
            weights = (dim,), (dim,), (width, width), (width,), (2 * hidden, width), (width, hidden), (width,)
            shapes = (per_head, map_, per_head, per_head, *weights)
            case = _case('block_tail', label, shapes, _tail, _eager_tail, (6 * n, 0), dims)
            found.append(replace(case, peers={**case.peers, 'one op after the other': _own_ops_tail}))
    return found + _conv_cases() + _diffusion_cases()
