"""The block of ViG and ViG-H: a token mixer on bidirectional gated linear attention, and a SwiGLU MLP.

On maps (B, h, w, C). Without gradients everything behind the scan is one kernel (`zoo.kernels.block_tail`) where it
fits; where a layer is more than its weight (adapters, hooks) the modules are called one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn
from zoo.backbones._layers import LayerNorm, Normed, Pending, PreNormBlock, RMSNorm, add_then_norm, is_bare
from zoo.kernels.block_tail import Norm, block_tail, fits_block_tail
from zoo.kernels.depthwise_conv import DepthwiseConv2d, depthwise_conv2d
from zoo.kernels.gla import bidirectional_gla, gated_local_mix, log_gates
from zoo.kernels.swiglu import fits_swiglu_linear, swiglu, swiglu_linear

__all__ = ['HierSwiGLU', 'SwiGLU', 'ViGMixer', 'ViGPreNormBlock', 'swiglu_width']

GATE_LOGIT_NORMALIZER = 16

for _op in (bidirectional_gla, depthwise_conv2d, gated_local_mix, log_gates, swiglu, swiglu_linear):
    register_notrace_function(_op)


class Scanned(NamedTuple):
    """What a mixer's mix takes: (B, T, H, V) each; the gate before the sigmoid, and a bias (C,) for it or None."""

    o: Tensor
    local: Tensor
    gate: Tensor
    gate_bias: Tensor | None


class ViGMixer(nn.Module):
    """Depthwise conv, bidirectional gated linear attention, 2D gated mixing with the conv's output.

    Args:
        dim: channels C; keys have C / 2.
        num_heads: heads H; C must be a multiple of 2 H.
        conv_act: SiLU after the depthwise conv (ViG-T only).
        out_act: SiLU before the output projection (ViG-T only).
        merge_scale: factor on the sum of the two directions. The reference's plain ViG trains with 1/2 and evaluates
            with 1/4; it matters only through the eps of the norm that follows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv_act: bool = False,
        out_act: bool = False,
        merge_scale: float = 0.5,
        gate_rank: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim % (2 * num_heads):
            raise ValueError(f'ViGMixer: dim = {dim} must be a multiple of 2 x num_heads = {2 * num_heads}')
        self.num_heads, self.conv_act, self.out_act, self.merge_scale = num_heads, conv_act, out_act, merge_scale
        self.in_proj = nn.Sequential(
            DepthwiseConv2d(dim, bias=False, activation='silu' if conv_act else None, nhwc=True, **dd)
        )
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.gk_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False, **dd), nn.Linear(gate_rank, dim, **dd))
        self.g_proj = nn.Linear(dim, dim, **dd)
        self.g_norm = RMSNorm(dim // num_heads, **dd)
        self.l_norm = RMSNorm(dim // num_heads, **dd)
        self.o_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, h, w, C)."""
        return self.project(self.scan(x), x.shape)

    def scan(self, x: Tensor) -> Scanned:
        """The scan of a map (B, h, w, C), and what is mixed into its output."""
        batch, height, width, dim = x.shape
        tokens = self.in_proj(x).reshape(batch, height * width, dim)
        qkv, gate, gate_bias, r = self._project(tokens)
        g_fwd, g_bwd = self._log_gates(r)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1))

        q, k, v = qkv.split((dim // 2, dim // 2, dim), -1)
        scale = (dim // 2 // self.num_heads) ** -0.5 * self.merge_scale
        o = bidirectional_gla(heads(q), heads(k), heads(v), heads(g_fwd), heads(g_bwd), scale=scale, merge='sum')
        return Scanned(o, heads(tokens), heads(gate), gate_bias)

    def project(self, scanned: Scanned, shape: torch.Size) -> Tensor:
        """The mix and the output projection, in the shape of the map."""
        o, local, gate, gate_bias = scanned
        y = gated_local_mix(
            o,
            local,
            gate,
            self.g_norm.weight,
            self.l_norm.weight,
            self.g_norm.eps,
            gate_logits=True,
            gate_bias=gate_bias,
            activation=self.activation,
        )
        return self.o_proj(y.flatten(-2)).reshape(shape)

    @property
    def activation(self) -> str | None:
        """Of the mix."""
        return 'silu' if self.out_act else None

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """[q | k | v], the 2D gate's logits, what is to be added to them, and the log gates' low-rank logits."""
        layers = (self.qkv_proj, self.g_proj, self.gk_proj[0])
        if not all(_is_plain(layer) for layer in layers):
            return self.qkv_proj(tokens), self.g_proj(tokens), None, self.gk_proj[0](tokens)
        # One product for all three; its slices are read in place.
        weights = [layer.weight for layer in layers]
        qkv, gate, r = F.linear(tokens, torch.cat(weights)).split([len(w) for w in weights], -1)
        return qkv, gate, self.g_proj.bias, r

    def _log_gates(self, r: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.gk_proj[1]
        if _is_plain(layer):
            return log_gates(r, layer.weight, layer.bias, GATE_LOGIT_NORMALIZER)
        return (F.logsigmoid(layer(r)) / GATE_LOGIT_NORMALIZER).chunk(2, -1)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else: neither an adapter, nor quantised, nor hooked."""
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and is_bare(layer)


def swiglu_width(dim: int, multiple: int) -> int:
    return math.ceil(int(dim * 4 * 2 / 3) / multiple) * multiple


def _up(layer: nn.Module, x: Tensor) -> Tensor:
    """The product before the activation and the activation, which are one kernel where they can be."""
    if _is_plain(layer) and fits_swiglu_linear(x):
        return swiglu_linear(x, layer.weight)
    return swiglu(layer(x))


class SwiGLU(nn.Module):
    """(SiLU(a) * b) W_out with [a | b] = x W_in, under plain ViG's key names."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.gate_proj = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_up(self.gate_proj, x))

    def layers(self) -> tuple[nn.Module, nn.Module]:
        """The product before the activation and the one behind it."""
        return self.gate_proj, self.down_proj


class HierSwiGLU(nn.Module):
    """`SwiGLU` under ViG-H's key names."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_up(self.fc1, x))

    def layers(self) -> tuple[nn.Module, nn.Module]:
        """The product before the activation and the one behind it."""
        return self.fc1, self.fc2


def _norm_of(module: nn.Module | None) -> Norm | None:
    """A norm's parameters, or None where it is anything else or has to be called."""
    if type(module) not in (LayerNorm, RMSNorm) or not is_bare(module):
        return None
    return Norm(module.weight, getattr(module, 'bias', None), module.eps)


class ViGPreNormBlock(PreNormBlock):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on (B, h, w, C); a subclass names its parts in `branches`."""

    def run_pending(
        self, x: Tensor, pending: Pending | Normed | None, next_norm: nn.Module | None = None
    ) -> tuple[Tensor, Pending | Normed | None]:
        """As that of every pre-norm block; where one kernel does what is behind the scan, nothing is left pending."""
        if self.training or torch.is_grad_enabled() or not self._is_plain():
            return super().run_pending(x, pending, next_norm)
        (norm, mixer), (mlp_norm, mlp) = self.branches()
        y, x = add_then_norm(norm, x, pending)
        scanned = mixer.scan(y)
        up, down = mlp.layers()
        if not fits_block_tail(scanned.o, mixer.g_norm.weight, down.weight):
            y, x = add_then_norm(mlp_norm, x, Pending(mixer.project(scanned, x.shape), None))
            return x, Pending(mlp(y), None)
        own, following = _norm_of(mlp_norm), _norm_of(next_norm)
        x, y = block_tail(
            x,
            *scanned,
            mixer.g_norm.weight,
            mixer.l_norm.weight,
            mixer.o_proj.weight,
            own,
            up.weight,
            down.weight,
            following if type(next_norm) is type(mlp_norm) else None,
            mix_eps=mixer.g_norm.eps,
            activation=mixer.activation,
        )
        return x, None if y is None else Normed(y, next_norm)

    def _is_plain(self) -> bool:
        """Whether every part behind the scan is its parameters and nothing else."""
        (_, mixer), (mlp_norm, mlp) = self.branches()
        bare = (mixer, mixer.g_norm, mixer.l_norm, mlp)
        return (
            all(is_bare(module) for module in bare)
            and _norm_of(mlp_norm) is not None
            and all(_is_plain(layer) for layer in (mixer.o_proj, *mlp.layers()))
        )
