"""What every linear layer that replaces softmax attention in a decoder shares.

A mixer owns the projections of the attention it replaces (q, k, v, o, their biases, norms over the head dimension) and
parameters of its own. It has the call of a transformers attention module, so a decoder layer does not notice the swap.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from zoo.backbones._state import LinearStateLayer, PaddingContext, state_layer

__all__ = ['AttentionShape', 'Mixer']


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer: what a mixer needs to be built without its weights."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_idx: int
    qkv_bias: bool = False
    o_bias: bool = False
    scaling: float | None = None


class Mixer(nn.Module):
    """A linear-time replacement of a causal softmax attention layer.

    Subclasses compute `heads`. Training, prefill in chunks and one-token steps are the same module.

    Args:
        hidden_size: channels of the input.
        num_heads: query heads H.
        num_kv_heads: key and value heads K, a divisor of H; query head i belongs to key head i // (H / K).
        head_dim: d.
        layer_idx: the layer's slot in the cache.
        qkv_bias: whether the query, key and value projections have biases.
        o_bias: whether the output projection has one.
        q_norm: module over d that the teacher applies to queries; None for none.
        k_norm: the same for keys.
        scaling: the factor of the teacher's attention scores; d ** -0.5 by default.
    """

    number_of_states = 1

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer_idx: int,
        qkv_bias: bool = False,
        o_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scaling: float | None = None,
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f'{num_heads} query heads cannot share {num_kv_heads} key heads evenly')
        self.hidden_size, self.head_dim, self.layer_idx = hidden_size, head_dim, layer_idx
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=o_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.padding: PaddingContext | None = None

    @classmethod
    def like(cls, attention: nn.Module, shape: AttentionShape, **options: Any) -> Mixer:
        """A mixer in the place of `attention`, on its device and in its dtype, its weights not yet set."""
        norms = {name: copy.deepcopy(getattr(attention, name, None)) for name in ('q_norm', 'k_norm')}
        like = next(p for p in attention.parameters() if p.is_floating_point())
        with torch.device(like.device):
            mixer = cls(**asdict(shape), **norms, **options)
        return mixer.to(like.dtype)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, shape: AttentionShape, *, generator: torch.Generator | None = None, **options: Any
    ) -> Mixer:
        """The mixer seeded from softmax attention: projections copied, the rest by the mixer's recipe.

        Args:
            attention: module with `q_proj`, `k_proj`, `v_proj`, `o_proj` (and `q_norm`, `k_norm` where it has them);
                nothing of it is shared or changed.
            shape: its sizes.
            generator: CPU generator of the random parameters, drawn in fp32, so that seeds give the same student on
                every device.
            options: of the mixer's constructor.
        """
        mixer = cls.like(attention, shape, **options)
        mixer.inherit({name: getattr(attention, name) for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')})
        mixer.seed_parameters(generator)
        return mixer.train(attention.training)

    @torch.no_grad()
    def inherit(self, projections: dict[str, nn.Linear]) -> None:
        """Copy weights and biases of the given projections into those of the same name."""
        for name, source in projections.items():
            target = getattr(self, name)
            target.weight.copy_(source.weight)
            if target.bias is not None:
                target.bias.copy_(source.bias)

    def seed_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the parameters whose role is 'new'."""

    def parameter_roles(self) -> dict[str, str]:
        """Parameter name to 'qkv' (inherited projections and their norms), 'output' or 'new'."""
        first = {
            'q_proj': 'qkv',
            'k_proj': 'qkv',
            'v_proj': 'qkv',
            'q_norm': 'qkv',
            'k_norm': 'qkv',
            'o_proj': 'output',
        }
        return {name: first.get(name.split('.')[0], 'new') for name, _ in self.named_parameters()}

    def heads(
        self,
        hidden_states: Tensor,
        *,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Outputs of the heads before the output projection: what layer-wise distillation compares.

        Args:
            hidden_states: normed input of the attention layer (B, L, hidden).
            padding_mask: (B, >= L), False or 0 at padding, the last L columns being those of the input; None to use
                the mask that the running model was given (`attach_padding`).
            past_key_values: cache with the state of earlier tokens, updated in place.
            kwargs: what a decoder layer hands its attention; `position_embeddings` is used by mixers with a window.

        Returns:
            (B, L, H, d) in the input's dtype.
        """
        raise TypeError(f'{type(self).__name__} does not define heads()')

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,  # the argument's name since transformers 5.20
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, L, hidden) to (B, L, hidden) and None, in the place of attention weights."""
        past_key_values = cache if past_key_values is None else past_key_values
        return self.o_proj(self.heads(hidden_states, past_key_values=past_key_values, **kwargs).flatten(2)), None

    def _visible(self, padding_mask: Tensor | None, length: int) -> Tensor | None:
        """The boolean mask (B, L) of real tokens, or None when all are."""
        if padding_mask is not None:
            return padding_mask[:, -length:].bool()
        return None if self.padding is None else self.padding.columns(length)

    def _state(self, past_key_values: Cache | None) -> LinearStateLayer | None:
        if past_key_values is None:
            return None
        return state_layer(past_key_values, self.layer_idx, self.number_of_states)

    def _repeat(self, x: Tensor) -> Tensor:
        """Key or value heads (B, L, K, d) to query heads (B, L, H, d)."""
        return x if self.num_kv_heads == self.num_heads else x.repeat_interleave(self.num_heads // self.num_kv_heads, 2)

    def extra_repr(self) -> str:
        return f'heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, layer={self.layer_idx}'
