"""The layer that mmMamba carves out of softmax attention: a Mamba-2 scan over the attention's own q, k and v.

With u (B, L, hidden) the normed input, H query heads, K key heads, d channels a head:

    v, k, q = Wv u, Wk u, Wq u                           heads in the order of the attention they come from
    v, k, q = silu(conv(v, k, q))                        one depthwise causal conv, width 2
    dt = softplus(Wdt u + dt_bias),  A = -exp(A_log_bias)
    S_t = exp(dt_t A) S_{t-1} + dt_t v_t k_t^T           per query head, S in d x d, fp32
    y_t = S_t q_t                                        (+ D v_t)
    y   = RMSNorm_d(y) * silu(Wg u)

No rotary embedding and no 1/sqrt(d). Source: mmMamba, arXiv 2502.13145, and its code at
github.com/hustvl/mmMamba (commit 85143d0), whose parameter names are kept; its cached state is the conv's last two raw
columns and S.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from zoo.backbones._mixer import Mixer
from zoo.backbones._state import LinearStateLayer
from zoo.kernels.causal_conv import causal_conv, causal_conv_step_
from zoo.kernels.decode import mamba2_step_, token_projections_
from zoo.kernels.norm import gated_rms_norm
from zoo.kernels.ssd import ssd, ssd_step_

__all__ = ['Mamba2Mixer', 'convolve']


class Mamba2Mixer(Mixer):
    """mmMamba's layer for training, prefill and decoding.

    Args:
        hidden_size: channels of the input.
        num_heads: query heads H, one scan each.
        num_kv_heads: key and value heads K.
        head_dim: d, the size of state and values.
        use_conv: the short causal convolution; without it q, k and v go through the SiLU alone.
        use_gnorm: RMSNorm and gate of the output.
        use_A: learned decay rates; without them A = -1.
        use_D: a learned skip from v per head.
        use_qknorm: LayerNorm of q and k after the convolution.
        mimic_init: seed as in the published recipe (identity convolution, step sizes that do not depend on the input);
            otherwise PyTorch's default initialisation and A uniform in (-16, -1).
        conv_width: taps of the convolution.
        norm_eps: of RMSNorm and LayerNorm.
        kwargs: `layer_idx`, `qkv_bias`, `o_bias`, `q_norm`, `k_norm`, `scaling` of `Mixer`; a norm of the teacher's is
            applied in front of the convolution, `scaling` is not used.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        use_conv: bool = True,
        use_gnorm: bool = True,
        use_A: bool = True,
        use_D: bool = False,
        use_qknorm: bool = False,
        mimic_init: bool = True,
        conv_width: int = 2,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, **kwargs)
        if conv_width < 1:
            raise ValueError(f'conv_width={conv_width}: expected taps; use_conv=False leaves the convolution out')
        self.mimic_init, self.norm_eps, self.conv_width = mimic_init, norm_eps, conv_width
        channels = (num_heads + 2 * num_kv_heads) * head_dim
        self.conv1d = nn.Conv1d(channels, channels, conv_width, groups=channels) if use_conv else None
        self.in_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log_bias = nn.Parameter(torch.ones(num_heads)) if use_A else None
        self.D = nn.Parameter(torch.ones(num_heads)) if use_D else None
        self.g_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False) if use_gnorm else None
        self.g_norm = nn.RMSNorm(head_dim, norm_eps) if use_gnorm else None
        self.q_layer_norm = nn.LayerNorm(head_dim, norm_eps) if use_qknorm else None
        self.k_layer_norm = nn.LayerNorm(head_dim, norm_eps) if use_qknorm else None

    @torch.no_grad()
    def seed_parameters(self, generator: torch.Generator | None = None) -> None:
        """Seed what the teacher does not have; drawn on the CPU in fp32, the same on every device."""

        def uniform(shape, low: float, high: float) -> Tensor:
            return torch.empty(shape).uniform_(low, high, generator=generator)

        for norm in (self.g_norm, self.q_layer_norm, self.k_layer_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.g_proj is not None:
            bound = 2**-2.5 * math.sqrt(6 / sum(self.g_proj.weight.shape))  # Xavier uniform, gain 2 ** -2.5
            self.g_proj.weight.copy_(uniform(self.g_proj.weight.shape, -bound, bound))
        if self.D is not None:
            self.D.fill_(1)
        if self.mimic_init:
            if self.conv1d is not None:
                self.conv1d.weight.zero_()[..., -1] = 1
                self.conv1d.bias.zero_()
            self.in_proj.weight.zero_()
            dt = uniform(self.dt_bias.shape, math.log(0.001), math.log(0.1)).exp().clamp(min=0.001)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            if self.A_log_bias is not None:
                self.A_log_bias.fill_(1)
            return
        if self.conv1d is not None:
            bound = self.conv_width**-0.5
            for p in (self.conv1d.weight, self.conv1d.bias):
                p.copy_(uniform(p.shape, -bound, bound))
        bound = self.hidden_size**-0.5
        self.in_proj.weight.copy_(uniform(self.in_proj.weight.shape, -bound, bound))
        self.dt_bias.zero_()
        if self.A_log_bias is not None:
            self.A_log_bias.copy_(uniform(self.A_log_bias.shape, 1, 16).log())

    def heads(
        self,
        hidden_states: Tensor,
        *,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        length = hidden_states.shape[1]
        state = self._state(past_key_values)
        decoding = state is not None and state.has_previous_state[0] and length == 1
        if decoding and padding_mask is None and not torch.is_grad_enabled() and self._fuses:
            return self._token(hidden_states[:, 0], state).unsqueeze(1)
        visible = None if decoding and padding_mask is None else self._visible(padding_mask, length)
        if visible is not None:  # filled, not multiplied: what a softmax layer leaves at padding need not be finite
            hidden_states = hidden_states.masked_fill(~visible.unsqueeze(-1), 0)
        vkq = self._project(hidden_states)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        dt = F.softplus(self.in_proj(hidden_states).to(wide) + self.dt_bias.to(wide))
        if visible is not None:  # biases; a step of 0 leaves the state as it is
            vkq = vkq.masked_fill(~visible.unsqueeze(-1), 0)
            dt = dt.masked_fill(~visible.unsqueeze(-1), 0)
        v, k, q = self._convolve(vkq, state)
        y = self._scan(v, dt, k, q, state)
        if self.g_norm is None:
            return y
        return gated_rms_norm(y, self.g_norm.weight, self.g_proj(hidden_states).view(y.shape), self.norm_eps)

    @property
    def _fuses(self) -> bool:
        """Whether a decoding step is the published layer's, which has kernels of its own."""
        if any(n is not None for n in (self.q_norm, self.k_norm, self.q_layer_norm, self.k_layer_norm)):
            return False
        # an adapter in the place of a linear map computes more than its weight says
        return self.conv1d is not None and all(type(m) is nn.Linear for m in self._maps)

    @property
    def _maps(self) -> tuple[nn.Module | None, ...]:
        """The projections in the order in which a token's results lie side by side."""
        return self.v_proj, self.k_proj, self.q_proj, self.g_proj, self.in_proj

    def _token(self, u: Tensor, state: LinearStateLayer) -> Tensor:
        """Heads (B, H, d) of one token u (B, hidden); the state is updated in place."""
        weights, biases = [m.weight for m in self._maps], [m.bias for m in self._maps]
        conv = self.conv1d.weight.squeeze(1), self.conv1d.bias, state.columns()
        mixed = token_projections_(u, weights, biases, *conv)
        state.advance(1)
        rest = (self.dt_bias, self.A_log_bias, self.D, self.g_norm.weight, self.norm_eps, self.num_kv_heads)
        return mamba2_step_(mixed, state.recurrent(), *rest)

    def _project(self, u: Tensor) -> Tensor:
        """(B, L, (2 K + H) d): values, keys and queries of all heads side by side, in this order."""
        q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)
        if self.q_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if self.k_norm is not None:
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat((v, k, q), -1)

    def _convolve(self, vkq: Tensor, state: LinearStateLayer | None) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, L, H, d), keys (B, L, K, d) and queries (B, L, H, d) after convolution and SiLU."""
        if self.conv1d is None:
            x = F.silu(vkq)
        else:
            x = convolve(vkq, self.conv1d, 'silu', state)
        kv = self.num_kv_heads * self.head_dim
        v, k, q = (t.unflatten(-1, (-1, self.head_dim)) for t in x.split((kv, kv, x.shape[-1] - 2 * kv), -1))
        if self.q_layer_norm is not None:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        return self._repeat(v), k, q

    def _scan(self, v: Tensor, dt: Tensor, k: Tensor, q: Tensor, state: LinearStateLayer | None) -> Tensor:
        rate = dt.new_full((self.num_heads,), -1.0) if self.A_log_bias is None else -self.A_log_bias.to(dt.dtype).exp()
        past = None if state is None else state.recurrent()
        if state is not None:
            state.advance(v.shape[1])
        if past is not None and v.shape[1] == 1 and not torch.is_grad_enabled():
            return ssd_step_(v[:, 0], dt[:, 0], rate, k[:, 0], q[:, 0], past, D=self.D).unsqueeze(1)
        y, final = ssd(v, dt, rate, k, q, D=self.D, initial_state=past, output_final_state=state is not None)
        if state is not None:
            state.store_recurrent(final)
        return y


def convolve(x: Tensor, conv: nn.Conv1d, activation: str | None, state: LinearStateLayer | None) -> Tensor:
    """Depthwise causal convolution of x (B, L, C) after the columns of `state`, which keeps the newest W of them."""
    weight, bias = conv.weight.squeeze(1), conv.bias
    past = None if state is None else state.columns()
    if past is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
        return causal_conv_step_(x[:, 0], weight, bias, past, activation=activation).unsqueeze(1)
    y, _ = causal_conv(x, weight, bias, activation=activation, initial_state=past)
    if state is not None:
        state.push_columns(x, weight.shape[1])
    return y
