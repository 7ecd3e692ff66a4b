"""One decoding step with fixed addresses: a key-value buffer, modules for single tokens, and their capture.

A decoder's forward pass for one token launches hundreds of small kernels. With states that are overwritten in place,
keys and values in a buffer of fixed size and everything that changes from step to step in tensors of its own, the pass
can be captured once as a CUDA graph and replayed for every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from zoo._graphs import record
from zoo.backbones._mixer import Mixer
from zoo.backbones._state import LinearStateLayer
from zoo.backbones.hovle import HoVLEAttention, HoVLELayer
from zoo.kernels.decode import MAX_ROWS, decode_attention, rotate_and_store_, token_linear, token_swiglu
from zoo.kernels.norm import rms_norm

ATTENTION = 'zoo_decode'

_running: list[Step] = []


class KVLayer(CacheLayerMixin):
    """The slot of a softmax layer: keys and values (B, K, capacity, d), allocated once.

    A prompt, whole or in pieces, is written where the host says, without the copies of a growing cache; in captured
    steps the place is read on the device.

    Args:
        capacity: most tokens.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = (
            t.new_empty(*t.shape[:2], self.capacity, t.shape[-1]) for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if _running:
            place = _running[-1].place
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            return self.keys, self.values
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.filled = 0


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one token over the buffer, as transformers' attention implementations are called."""
    step = _running[-1]
    special = [name for name in ('sliding_window', 'softcap', 's_aux') if kwargs.get(name) is not None]
    if special:
        raise ValueError(f'attention with {", ".join(special)} has no captured step')
    out = decode_attention(query[:, :, 0], key, value, step.count, start=step.start, scale=scaling)
    return out.unsqueeze(1), None


AttentionInterface.register(ATTENTION, _attention)


def _linear(module: nn.Linear) -> Callable:
    def forward(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2) if x.ndim > 1 else x
        if rows.ndim != 2 or rows.shape[0] > MAX_ROWS or x.dtype != module.weight.dtype:
            return nn.Linear.forward(module, x)
        return token_linear(rows, module.weight, module.bias).view(*x.shape[:-1], -1)

    return forward


def _mlp(first: nn.Linear, second: nn.Linear, last: nn.Linear) -> Callable:
    def forward(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return token_linear(token_swiglu(rows, first.weight, second.weight), last.weight).view(*x.shape[:-1], -1)

    return forward


def _layer(layer: HoVLELayer) -> Callable:
    """The layer with its second sum inside the last product."""
    first, second, last = (layer.feed_forward.w1, layer.feed_forward.w3, layer.feed_forward.w2)

    def forward(hidden_states: Tensor, output_attentions: bool = False, **kwargs) -> Tensor:
        branch, _ = layer.attention(hidden_states=layer.attention_norm(hidden_states), **kwargs)
        normed, hidden_states = layer.ffn_norm(branch, hidden_states)
        product = token_swiglu(normed.flatten(0, 1), first.weight, second.weight)
        return token_linear(product, last.weight, residual=hidden_states.flatten(0, 1)).view_as(hidden_states)

    return forward


def _softmax(module: HoVLEAttention) -> Callable:
    """The attention with its rotary embedding and the buffer's new entry in one launch."""
    shape = (module.num_key_value_heads, module.num_key_value_groups + 2, module.head_dim)

    def forward(hidden_states: Tensor, position_embeddings: tuple, attention_mask: Any = None,
                past_key_values: Cache | None = None, **kwargs) -> tuple[Tensor, None]:  # fmt: skip
        step, slot = _running[-1], past_key_values.layers[module.layer_idx]
        qkv = module.wqkv(hidden_states).view(-1, *shape)
        cos, sin = (t[:, 0] for t in position_embeddings)
        entry = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1], cos, sin, slot.keys, slot.values, step.place
        query = rotate_and_store_(*entry)
        out = decode_attention(query, slot.keys, slot.values, step.count, start=step.start, scale=module.scaling)
        return module.wo(out.flatten(1).unsqueeze(1)), None

    return forward


def _norm(module: nn.Module) -> Callable:
    return lambda x: rms_norm(x, module.weight, module.variance_epsilon)


def _swiglu_maps(module: nn.Module) -> list[nn.Linear] | None:
    """The three maps of a SwiGLU layer without biases, the one behind the SiLU first, or None for other modules."""
    for names in (('w1', 'w3', 'w2'), ('gate_proj', 'up_proj', 'down_proj')):
        maps = [getattr(module, name, None) for name in names]
        act = getattr(module, 'act', getattr(module, 'act_fn', None))
        plain = all(type(m) is nn.Linear and m.bias is None for m in maps)
        if plain and len(list(module.children())) == 4 and type(act).__name__ in ('SiLU', 'SiLUActivation'):
            return maps
    return None


def _single_token_forward(module: nn.Module) -> Callable | None:
    """A forward pass for single tokens in fewer launches, for modules known to compute nothing else."""
    kind = type(module)
    if kind is nn.Linear:
        return _linear(module)
    if kind is HoVLEAttention:
        return _softmax(module)
    if kind is HoVLELayer and _swiglu_maps(module.feed_forward):
        return _layer(module)
    maps = _swiglu_maps(module)
    if maps:
        return _mlp(*maps)
    # transformers' own; Gemma's scale by 1 + weight
    if kind.__name__.endswith('RMSNorm') and hasattr(module, 'variance_epsilon') and 'Gemma' not in kind.__name__:
        return _norm(module)
    return None


@contextlib.contextmanager
def single_token_modules(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers, SwiGLU layers and norms of `model` run kernels for single tokens."""
    changed = []
    try:
        for module in model.modules():
            forward = None if 'forward' in vars(module) else _single_token_forward(module)
            if forward is not None:
                module.forward = forward
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


@contextlib.contextmanager
def buffer_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the softmax layers of the decoder attend to their buffer."""
    layers = [m for m in model.modules() if hasattr(m, 'layer_idx') and not isinstance(m, Mixer)]
    configs = {id(c): c for c in (getattr(m, 'config', None) for m in layers) if c is not None}.values()
    before = [(c, c._attn_implementation_internal) for c in configs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


class Step:
    """A model's forward pass for the next token of every row, and a choice of tokens, captured and replayed.

    Args:
        model: the model.
        inputs: arguments of its forward pass for one token; tensors are copied.
        cache: the cache after the prompt, its slots `KVLayer` and `LinearStateLayer`.
        start: (B,) where rows begin behind their padding, or None.
        choose: `choose(ids, logits)` writes the tokens that follow from logits (B, vocabulary) fp32 to ids (B, 1); None
            if tokens are chosen outside.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        cache: Cache,
        start: Tensor | None,
        choose: Callable[[Tensor, Tensor], None] | None,
    ):
        self.model, self.cache, self.choose = model, cache, choose
        self.inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        self.ids = self.inputs['input_ids']
        length = int(cache.get_seq_length())
        self.place = torch.tensor([length], device=self.ids.device)
        self.count = self.place + 1
        self.start = start
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failure: str | None = None
        self.logits: Tensor | None = None
        self.positions = [v for k, v in self.inputs.items() if 'position' in k and isinstance(v, Tensor)]

    def begin(self, inputs: dict[str, Any], cache: Cache, start: Tensor | None) -> None:
        """Take up another prompt: its inputs and states go to the captured addresses."""
        for name, value in self.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(inputs[name])
        for mine, new in zip(self.cache.layers, cache.layers, strict=True):
            if isinstance(mine, LinearStateLayer):
                for own, other in ((mine.conv_states, new.conv_states), (mine.recurrent_states, new.recurrent_states)):
                    for i, state in own.items():
                        if state is not None:
                            state.copy_(other[i])
                mine.cumulative_length = new.cumulative_length
        self.place.fill_(int(cache.get_seq_length()))
        torch.add(self.place, 1, out=self.count)
        if self.start is not None:
            self.start.copy_(start)

    def _once(self) -> None:
        _running.append(self)
        try:
            output = self.model(**self.inputs, return_dict=True)
        finally:
            _running.pop()
        logits = output.logits[:, -1].float()
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        if self.choose is not None:
            self.choose(self.ids, self.logits)
        for position in self.positions:
            position.add_(1)
        self.place.add_(1)
        self.count.add_(1)

    def _prepared(self, run: Callable[[], None]) -> None:
        with torch.no_grad(), single_token_modules(self.model), buffer_attention(self.model):
            run()

    def __call__(self, capture: bool = True) -> None:
        """Compute the next logits, and tokens where they are chosen inside: once as it is, then captured."""
        if capture and self.graph is None and self.failure is None and self.logits is not None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._prepared(self._once)

    def _capture(self) -> None:
        counters = [(s, s.cumulative_length) for s in self.cache.layers if isinstance(s, LinearStateLayer)]
        try:
            self.graph, _ = record(lambda: self._prepared(self._once), warmup=0)
        except RuntimeError as error:
            self.failure = str(error).strip().splitlines()[0]
        for slot, count in counters:  # a capture runs the host's code, not the device's
            slot.cumulative_length = count
