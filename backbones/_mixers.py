"""The linear layers that can take the place of softmax attention in a decoder, by the name `zoo.linearize` takes.

`mamba2` is mmMamba's layer (`_mamba2.py`). The others, for one head with queries q, keys k and values v of d channels:

- `gla` (Liger, arXiv 2503.01496; gates pooled from the keys, no new parameters): S_t = diag(exp g_t) S_{t-1} + k' v^T,
  o = q'^T S with q' = softmax_d(q), k' = softmax_d(k), g = logsigmoid(k) / 16, no rotary embedding; the output is the
  mean of o and of softmax attention over the newest 64 tokens.
- `hedgehog` (LoLCATs, arXiv 2410.10254; feature map of arXiv 2402.04347): phi(x) = [softmax(W x), softmax(-W x)];
  o_i = (gamma sum_window exp(s_ij - max) v_j + sum_older phi(q_i).phi(k_j) v_j) / (the same without v_j), with the
  softmax scores s of the newest 64 tokens and one gamma a head.
- `gated_deltanet` (arXiv 2412.06464): S_t = a_t (I - b_t k k^T) S_{t-1} + b_t k v^T with unit q and k, decay a and rate
  b from the input; head norm and gate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from zoo.backbones._mamba2 import Mamba2Mixer, convolve
from zoo.backbones._mixer import Mixer
from zoo.backbones._state import LinearStateLayer
from zoo.kernels.gated_delta import gated_delta_rule
from zoo.kernels.gla import gated_linear_attention
from zoo.kernels.norm import gated_rms_norm

__all__ = ['MIXERS', 'GLAMixer', 'GatedDeltaNetMixer', 'HedgehogMixer']


def rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (B, L, H, d) by cosines and sines (B or 1, L, r) of its first r channels."""
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in position_embeddings)
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-b, a), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def window_sums(
    q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scale: float, width: int
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the newest `width` tokens, before the division; memory L x 2 width.

    Args:
        q: queries (B, L, H, d).
        keys: (B, width + L, K, d): the `width` tokens before the first query, then those of the queries.
        values: the same of values.
        valid: (B, width + L), False at tokens that do not exist; a query's own token counts in any case.
        scale: of the scores.
        width: how many tokens a query sees, itself included.

    Returns:
        sum_j exp(s_ij - max_j s_ij) v_j (B, L, H, d) and the sum without v_j (B, L, H, 1), fp32.
    """
    batch, length, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = 1 if length == 1 else width
    pad, reach = -length % rows, width + rows
    if length == 1:
        keys, values, valid = keys[:, 1:], values[:, 1:], valid[:, 1:]
        reach = width
    blocks = F.pad(q.to(wide), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, rows)).unflatten(3, (keys.shape[2], -1))
    k, v = (F.pad(t.to(wide), (0, 0, 0, 0, 0, pad)).unfold(1, reach, rows) for t in (keys, values))
    row, column = (torch.arange(n, device=q.device) for n in (rows, reach))
    ahead = column - row[:, None] - (reach - rows)  # 0 is the query's own token, -width + 1 the oldest it sees
    seen = F.pad(valid, (0, pad)).unfold(1, reach, rows)[:, :, None] & (ahead <= 0) & (ahead > -width)
    scores = torch.einsum('bnrkgd,bnkdc->bnkgrc', blocks, k) * scale
    scores = scores.masked_fill(~(seen | (ahead == 0))[:, :, None, None], float('-inf'))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.einsum('bnkgrc,bnkdc->bnrkgd', weights, v).reshape(batch, -1, heads, dim)
    norm = weights.sum(-1).permute(0, 1, 4, 2, 3).reshape(batch, -1, heads, 1)
    return total[:, :length], norm[:, :length]


class _WindowedMixer(Mixer):
    """A linear state and, beside it, softmax attention over a window; the cache holds both."""

    number_of_states = 2  # the recurrent state; the window's columns

    def __init__(self, *args: Any, window: int = 64, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if window < 0:
            raise ValueError(f'window={window}: expected the number of tokens, or 0 for none')
        self.window = window

    def _inputs(self, hidden_states: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, d), k and v (B, L, K, d); v is 0 at padding."""
        if visible is not None:
            hidden_states = hidden_states.masked_fill(~visible.unsqueeze(-1), 0)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return q, k, v if visible is None else v.masked_fill(~visible[..., None, None], 0)

    def _rotated(self, *tensors: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        if position_embeddings is None:
            raise ValueError(f'{type(self).__name__} with rotary embeddings needs position_embeddings=(cos, sin)')
        return [rotate(t, position_embeddings) for t in tensors]

    def _history(
        self, k: Tensor, v: Tensor, visible: Tensor | None, state: LinearStateLayer | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and validity (B, window + L, ...): those before the input, from the cache, and its own.

        Validity is a channel of the cached columns, so that tokens before the first one and padding read as 0.
        """
        new = v.new_ones(v.shape[:2]) if visible is None else visible.to(v.dtype)
        columns = torch.cat((k.flatten(2), v.flatten(2), new.unsqueeze(-1)), -1)
        past = None if state is None else state.columns(1)
        before = columns.new_zeros(v.shape[0], self.window, columns.shape[-1]) if past is None else past.transpose(1, 2)
        both = torch.cat((before, columns), 1)
        if state is not None:
            state.push_columns(columns, self.window, 1)
        keys, values, valid = both.split((columns.shape[-1] // 2, columns.shape[-1] // 2, 1), -1)
        return *(t.unflatten(-1, (-1, self.head_dim)) for t in (keys, values)), valid.squeeze(-1) > 0

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: LinearStateLayer | None) -> Tensor:
        """The causal state of k and v (B, L, H, ...) read by q, after the cached one."""
        past = None if state is None else state.recurrent()
        if past is not None and q.shape[1] == 1:
            past = past if g is None else past * g[:, 0].to(past.dtype).exp().unsqueeze(-1)
            write = k[:, 0].to(past.dtype).unsqueeze(-1) * v[:, 0].to(past.dtype).unsqueeze(-2)
            final = past + write
            o = (q.to(past.dtype).transpose(1, 2) @ final).transpose(1, 2).to(v.dtype)
        else:
            o, final = gated_linear_attention(
                q, k, v, g, scale=1.0, initial_state=past, output_final_state=state is not None
            )
        if state is not None:
            state.store_recurrent(final)
            state.advance(q.shape[1])
        return o


class GLAMixer(_WindowedMixer):
    """Liger's layer: gated linear attention whose gates are pooled from the keys, and a softmax window.

    Args:
        args: sizes, see `Mixer`.
        window: tokens of the softmax window, 0 for none.
        mix: share of the window in the output; 0 without a window.
        gate_normalizer: divides the log gates.
        kwargs: `layer_idx` and more of `Mixer`.
    """

    def __init__(self, *args: Any, window: int = 64, mix: float = 0.5, gate_normalizer: float = 16.0, **kwargs: Any):
        super().__init__(*args, window=window, **kwargs)
        self.mix, self.gate_normalizer = mix if window else 0.0, gate_normalizer

    def heads(
        self,
        hidden_states: Tensor,
        *,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state = self._state(past_key_values)
        decoding = state is not None and state.get_seq_length() > 0 and hidden_states.shape[1] == 1
        visible = None if decoding else self._visible(padding_mask, hidden_states.shape[1])
        q, k, v = self._inputs(hidden_states, visible)
        wide = torch.promote_types(q.dtype, torch.float32)
        gate = F.logsigmoid(k.to(wide)) / self.gate_normalizer
        if visible is not None:
            gate = gate.masked_fill(~visible[..., None, None], 0)
        q_map, k_map = (t.softmax(-1, dtype=wide).to(v.dtype) for t in (q, k))
        o = self._scan(q_map, self._repeat(k_map), self._repeat(v), self._repeat(gate), state)
        if not self.window:
            return o
        q, k = self._rotated(q, k, position_embeddings=position_embeddings)
        total, norm = window_sums(q, *self._history(k, v, visible, state), self.scaling, self.window)
        return torch.lerp(o.to(wide), total / norm, self.mix).to(v.dtype)


class HedgehogMixer(_WindowedMixer):
    """LoLCATs' layer: softmax over a sliding window, learned positive features for all older tokens, one normaliser.

    Args:
        hidden_size: channels of the input.
        num_heads: query heads; each has feature maps of its own for queries and keys.
        num_kv_heads: key and value heads.
        head_dim: d.
        features: f, half the size of the features; min(d, 64) by default.
        window: tokens of the softmax window, 0 for features alone.
        feature_init: `identity` (Hedgehog's: a softmax over the channels themselves) or `kaiming` (LoLCATs' default).
        kwargs: `layer_idx` and more of `Mixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        features: int | None = None,
        window: int = 64,
        feature_init: str = 'identity',
        **kwargs: Any,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, window=window, **kwargs)
        if feature_init not in ('identity', 'kaiming'):
            raise ValueError(f"feature_init={feature_init!r}: expected 'identity' or 'kaiming'")
        features = min(head_dim, 64) if features is None else features
        if features < 1:
            raise ValueError(f'features={features}: expected at least 1')
        self.feature_init = feature_init
        self.q_map = nn.Parameter(torch.zeros(num_heads, head_dim, features))
        self.k_map = nn.Parameter(torch.zeros(num_heads, head_dim, features))
        self.window_factors = nn.Parameter(torch.zeros(num_heads)) if window else None

    @torch.no_grad()
    def seed_parameters(self, generator: torch.Generator | None = None) -> None:
        for weight in (self.q_map, self.k_map):
            if self.feature_init == 'identity':
                weight.copy_(torch.eye(*weight.shape[1:]).expand(weight.shape))
            else:
                bound = self.head_dim**-0.5
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        if self.window_factors is not None:
            self.window_factors.fill_(math.log(0.1 / 0.9))  # gamma = 0.1

    def heads(
        self,
        hidden_states: Tensor,
        *,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state, length = self._state(past_key_values), hidden_states.shape[1]
        decoding = state is not None and state.get_seq_length() > 0 and length == 1
        visible = None if decoding else self._visible(padding_mask, length)
        q, k, v = self._inputs(hidden_states, visible)
        q, k = self._rotated(q, k, position_embeddings=position_embeddings)
        if not self.window:
            total, norm = self._older(q, k, v, visible, state)
            return (total / norm.clamp(min=1e-20)).to(v.dtype)
        keys, values, valid = self._history(k, v, visible, state)
        # The state lags behind by the window: what leaves the window at a token enters the state there.
        total, norm = self._older(q, keys[:, :length], values[:, :length], valid[:, :length], state)
        near, near_norm = window_sums(q, keys, values, valid, self.scaling, self.window)
        gamma = self.window_factors.to(near.dtype).sigmoid().unsqueeze(-1)
        return ((gamma * near + total) / (gamma * near_norm + norm)).to(v.dtype)

    def _older(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: LinearStateLayer | None
    ) -> tuple[Tensor, Tensor]:
        """sum_j phi(q).phi(k_j) v_j and the sum without v_j, in fp32; the latter from a column of ones beside v."""
        wide = torch.promote_types(q.dtype, torch.float32)
        ones = v.new_ones(*v.shape[:3], 1) if valid is None else valid[..., None, None].expand(*v.shape[:3], 1)
        v = self._repeat(torch.cat((v.to(wide), ones.to(wide)), -1))
        o = self._scan(_features(q, self.q_map), _features(self._repeat(k), self.k_map), v, None, state)
        return o.split((self.head_dim, 1), -1)


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog's map of x (B, L, H, d) by weight (H, d, f): (B, L, H, 2 f), positive, fp32."""
    x = torch.einsum('blhd,hdf->blhf', x, weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1).clamp(min=1e-12)


class GatedDeltaNetMixer(Mixer):
    """The gated delta rule over the attention's q, k and v.

    Args:
        hidden_size: channels of the input.
        num_heads: query heads, one state each.
        num_kv_heads: key and value heads, repeated.
        head_dim: d.
        conv_width: taps of the depthwise causal convolution of q, k and v, 0 for none; it starts as the identity.
        activation: `silu` after the convolution, or None: the attention it comes from has none.
        negative_eigenvalues: rates up to 2 rather than 1, which lets a state flip signs (arXiv 2411.12537).
        rotary: keep the rotary embedding on q and k.
        max_memory: the decay of the slowest head starts at 1 - 1 / max_memory; the fastest one's at 1 - 1 / 64.
        norm_eps: of the head norm.
        kwargs: `layer_idx` and more of `Mixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        conv_width: int = 4,
        activation: str | None = None,
        negative_eigenvalues: bool = True,
        rotary: bool = False,
        max_memory: int = 8192,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, **kwargs)
        if activation not in (None, 'silu'):
            raise ValueError(f"activation={activation!r}: expected 'silu' or None")
        if conv_width < 0:
            raise ValueError(f'conv_width={conv_width}: expected the number of taps, or 0 for none')
        self.conv_width, self.activation, self.rotary = conv_width, activation, rotary
        self.negative_eigenvalues, self.max_memory, self.norm_eps = negative_eigenvalues, max_memory, norm_eps
        channels = (num_heads + 2 * num_kv_heads) * head_dim
        self.conv1d = nn.Conv1d(channels, channels, conv_width, groups=channels, bias=False) if conv_width else None
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads)
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.g_proj = nn.Linear(hidden_size, num_heads * head_dim)
        self.o_norm = nn.RMSNorm(head_dim, norm_eps)

    @torch.no_grad()
    def seed_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing is random: rates of 1/2, decays over log-spaced lengths, an open gate, an identity convolution."""
        self.o_norm.reset_parameters()
        for linear in (self.a_proj, self.b_proj, self.g_proj):
            linear.weight.zero_()
        self.b_proj.bias.fill_(math.log(0.25 / 0.75) if self.negative_eigenvalues else 0.0)
        self.g_proj.bias.fill_(1.2784645)  # silu of it is 1
        if self.conv1d is not None:
            self.conv1d.weight.zero_()[..., -1] = 1
        length = torch.linspace(math.log(64), math.log(self.max_memory), self.num_heads).exp()
        rate = -torch.log1p(-1 / length)  # exp(-rate) = 1 - 1 / length
        self.A_log.zero_()
        self.dt_bias.copy_(rate + torch.log(-torch.expm1(-rate)))  # inverse of softplus

    def heads(
        self,
        hidden_states: Tensor,
        *,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state, length = self._state(past_key_values), hidden_states.shape[1]
        decoding = state is not None and state.get_seq_length() > 0 and length == 1
        visible = None if decoding else self._visible(padding_mask, length)
        if visible is not None:
            hidden_states = hidden_states.masked_fill(~visible.unsqueeze(-1), 0)
        q, k, v = self._convolved(hidden_states, visible, state)
        if self.rotary:
            if position_embeddings is None:
                raise ValueError('GatedDeltaNetMixer with rotary=True needs position_embeddings=(cos, sin)')
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (F.normalize(t.to(wide), dim=-1, eps=1e-6).to(v.dtype) for t in (q, k))
        decay = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(hidden_states).to(wide) + self.dt_bias.to(wide))
        rate = self.b_proj(hidden_states).to(wide).sigmoid() * (2 if self.negative_eigenvalues else 1)
        if visible is not None:
            decay, rate = (t.masked_fill(~visible.unsqueeze(-1), 0) for t in (decay, rate))
        past = None if state is None else state.recurrent()
        o, final = gated_delta_rule(
            q, self._repeat(k), self._repeat(v), decay, rate, initial_state=past, output_final_state=state is not None
        )
        if state is not None:
            state.store_recurrent(final)
            state.advance(length)
        return gated_rms_norm(o, self.o_norm.weight, self.g_proj(hidden_states).view(o.shape), self.norm_eps)

    def _convolved(
        self, u: Tensor, visible: Tensor | None, state: LinearStateLayer | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(u).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.conv1d is not None:
            x = torch.cat((q, k, v), 2).flatten(2)
            x = x if visible is None else x.masked_fill(~visible.unsqueeze(-1), 0)
            x = convolve(x, self.conv1d, self.activation, state).unflatten(-1, (-1, self.head_dim))
            return x.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        return tuple(F.silu(t) if self.activation else t for t in (q, k, v))


MIXERS = {
    'mamba2': Mamba2Mixer,
    'gla': GLAMixer,
    'hedgehog': HedgehogMixer,
    'gated_deltanet': GatedDeltaNetMixer,
}
