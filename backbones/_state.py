"""Recurrent state inside transformers' `Cache`, and the padding mask on its way to the layers that keep one.

A softmax layer of a decoder keeps keys and values in its slot of the cache, a linear layer a state of constant size.
The model's `layer_types` stay as they are (several decoders index their masks by them); instead a linear layer swaps
its own, still empty slot for a `LinearStateLayer` at its first call. Facts about the cache were read in transformers
5.24's `cache_utils`.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.modeling_utils import PreTrainedModel

__all__ = ['LinearStateLayer', 'PaddingContext', 'attach_padding', 'state_layer']


class LinearStateLayer(LinearAttentionLayer, CacheLayerMixin):
    """The slot of one linear layer: states that do not grow, and the number of tokens they have seen.

    `conv_states[i]` (B, C, W) are the newest W raw columns of window i, `recurrent_states[i]` any tensor with the batch
    first. Models ask layer 0 for the length of the sequence, hence the counter `cumulative_length`.
    """

    # With True, `generate` would hand the decoder prebuilt 4-D masks, from which padding can no longer be read.
    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, number_of_states: int = 1):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states)
        self.is_initialized = True
        self.cumulative_length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise ValueError('this layer of the cache holds a recurrent state: it cannot take keys and values')

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def advance(self, length: int) -> None:
        """Count `length` more tokens."""
        self.cumulative_length += length

    def columns(self, state_idx: int = 0) -> Tensor | None:
        """The newest raw columns, (B, C, W) with the newest last, or None before the first token."""
        return self.conv_states[state_idx] if self.has_previous_state[state_idx] else None

    def push_columns(self, x: Tensor, width: int, state_idx: int = 0) -> None:
        """Append columns x (B, L, C) and keep the newest `width` of them, in place."""
        if not self.is_conv_states_initialized[state_idx]:
            self.device = x.device
            self.lazy_initialization(conv_states=x.new_zeros(x.shape[0], x.shape[2], width), state_idx=state_idx)
        state, new = self.conv_states[state_idx], x.detach()[:, -width:].transpose(1, 2)
        keep = width - new.shape[2]
        state.copy_(new if keep == 0 else torch.cat((state[..., width - keep :], new), -1))
        self.has_previous_state[state_idx] = True

    def recurrent(self, state_idx: int = 0) -> Tensor | None:
        """The recurrent state, or None before the first token."""
        return self.recurrent_states[state_idx] if self.has_previous_state[state_idx] else None

    def store_recurrent(self, state: Tensor, state_idx: int = 0) -> None:
        """Overwrite the recurrent state in place; it carries no gradient."""
        self.device = state.device
        self.update_recurrent_state(state.detach(), state_idx)
        self.has_previous_state[state_idx] = True

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def _map(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: function(x) for i, x in states.items() if x is not None})

    def state_bytes(self) -> int:
        """Bytes of all the states."""
        tensors = [*self.conv_states.values(), *self.recurrent_states.values()]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def state_layer(cache: Cache, layer_idx: int, number_of_states: int = 1) -> LinearStateLayer:
    """The state of layer `layer_idx`; swaps the empty slot that the cache made for keys and values.

    Raises:
        ValueError: if the slot already holds keys and values.
    """
    while len(cache.layers) <= layer_idx:  # a cache built without a config grows as layers ask for their slots
        cache.layers.append(cache.layer_class_to_replicate())
    slot = cache.layers[layer_idx]
    if not isinstance(slot, LinearStateLayer):
        if int(slot.get_seq_length()) > 0:
            raise ValueError(
                f'layer {layer_idx} keeps a recurrent state, but the cache holds keys and values of '
                f'{int(slot.get_seq_length())} tokens for it: start from an empty cache'
            )
        slot = cache.layers[layer_idx] = LinearStateLayer(number_of_states)
    return slot


class PaddingContext:
    """The 2-D padding mask of the forward pass that is running.

    Decoders turn the mask into 4-D ones before their layers see it, so hooks on the models take it where it comes in.
    After the pass it is valid in the backward pass alone, where checkpointed layers run again.
    """

    def __init__(self):
        self.mask: Tensor | None = None
        self.depth = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: the outermost model sets the mask, an inner one only if it still sees a 2-D one."""
        if args:
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = kwargs.get('attention_mask')
        tokens = next((kwargs[name] for name in ('input_ids', 'inputs_embeds') if kwargs.get(name) is not None), None)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.mask = mask.bool()
            one_token = tokens is not None and tokens.shape[1] == 1 and mask.shape[1] > 1
            if one_token or (not torch.compiler.is_compiling() and bool(self.mask.all())):
                self.mask = None
        elif self.depth == 0:
            self.mask = None
        self.depth += 1

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        """Forward hook, also called after an exception."""
        self.depth = max(self.depth - 1, 0)

    def columns(self, length: int) -> Tensor | None:
        """The mask (B, L) of the newest `length` tokens, False at padding; None without padding."""
        if self.mask is None or not (self.depth > 0 or torch._C._current_graph_task_id() != -1):
            return None
        return self.mask[:, -length:]


def attach_padding(model: nn.Module) -> PaddingContext:
    """Let padding masks given to `model` reach every layer inside it that has a `padding` attribute.

    Every nested `PreTrainedModel` gets the hook: wrappers such as PEFT's call the outermost one's `forward` directly,
    past its hooks. Calling it again after layers were added keeps the same context.
    """
    layers = [m for m in model.modules() if hasattr(m, 'padding') and hasattr(m, 'parameter_roles')]
    context = next((m.padding for m in layers if isinstance(m.padding, PaddingContext)), PaddingContext())
    for layer in layers:
        layer.padding = context
    inside = set(layers)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(m in inside for m in module.modules()):
            hooked = any(getattr(hook, '__self__', None) is context for hook in module._forward_pre_hooks.values())
            if not hooked:
                module.register_forward_pre_hook(context.enter, with_kwargs=True)
                module.register_forward_hook(context.leave, always_call=True)
    return context
