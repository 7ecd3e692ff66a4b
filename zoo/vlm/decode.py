"""`generate` with a captured one-token step: `with zoo.vlm.fast_decode(model): model.generate(...)`.

Inside, transformers' `generate` prepares everything as always (inputs, sampling, stopping criteria, streamers) and its
greedy or sampling loop is replaced by one that

- passes a long prompt in pieces, so that memory grows with the piece (`prefill_chunk_size`, 16384 tokens by default),
- captures the forward pass of one token as a CUDA graph, greedy choice included, and replays it for every token,
- never waits for the device before the next step is queued: whether a row has ended is read one step late, and the
  token that was then computed in vain is dropped.

States of linear layers are overwritten in place, softmax layers get a buffer for prompt and answer, and products run
in kernels for single tokens (`zoo.kernels.decode`). The graph is kept while the context lasts, so a second prompt whose
buffers fit captures nothing. What cannot be captured runs in transformers' own loop, and a warning says why, once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from zoo.backbones._mixer import Mixer
from zoo.backbones._state import LinearStateLayer
from zoo.vlm._step import KVLayer, Step

__all__ = ['fast_decode']

PREFILL_CHUNK = 16384
_ROUND = 256  # capacities are multiples of it


@contextlib.contextmanager
def fast_decode(model: PreTrainedModel, *, capture: bool | None = None) -> Iterator[PreTrainedModel]:
    """Inside, `model.generate` decodes with a captured step.

    Args:
        model: a decoder with a cache, native or transformers' own, linear, hybrid or softmax.
        capture: whether steps become a CUDA graph; by default on CUDA devices, other devices then use transformers'
            loop. False runs the same loop and steps without a graph, on any device.

    Yields:
        The model.
    """
    inner = model.get_base_model() if hasattr(model, 'get_base_model') else model  # inside PEFT's wrapper
    plain, decoder = type(inner), _Decoder(capture)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        reason = decoder.why_not(self, *arguments, **kwargs)
        if reason is None:
            return decoder.sample(self, *arguments, **kwargs)
        decoder.tell(reason)
        return plain._sample(self, *arguments, **kwargs)

    # `generate` takes its loop from the class
    names = {'_sample': _sample, '__module__': plain.__module__, '__doc__': plain.__doc__}
    inner.__class__ = type(plain.__name__, (plain,), names)
    try:
        yield model
    finally:
        inner.__class__ = plain


class _Stops:
    """Which rows go on, on the device: the end-of-sequence tokens, and other criteria where there are any."""

    def __init__(self, criteria: StoppingCriteriaList, pad: Tensor | None, batch: int, device: torch.device):
        eos = [c.eos_token_id.flatten().to(device) for c in criteria if hasattr(c, 'eos_token_id')]
        self.eos = torch.cat(eos) if eos else None
        self.pad = None if pad is None or not eos else pad.to(device)
        others = [c for c in criteria if not hasattr(c, 'eos_token_id') and not hasattr(c, 'max_length')]
        self.others = StoppingCriteriaList(others)
        self.open = torch.ones(batch, dtype=torch.bool, device=device)

    def same_tokens(self, other: _Stops) -> bool:
        pairs = ((self.eos, other.eos), (self.pad, other.pad))
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def take(self, ids: Tensor, tokens: Tensor) -> None:
        """Write chosen tokens (B,) to ids (B, 1), padding in rows that have ended; note which rows end."""
        if self.eos is not None:
            tokens = tokens if self.pad is None else torch.where(self.open, tokens, self.pad)
            self.open.logical_and_((tokens.unsqueeze(1) != self.eos).all(1))  # isin may wait for the device
        ids.copy_(tokens.unsqueeze(1))

    def greedy(self, ids: Tensor, logits: Tensor) -> None:
        """Choose the likeliest tokens."""
        self.take(ids, logits.argmax(-1))


class _Choice:
    """Tokens from logits by processors, sampling and criteria that look at everything generated so far."""

    def __init__(self, processors: Any, sampled: bool, stops: _Stops, prompt: Tensor, budget: int):
        self.processors, self.sampled, self.stops = processors, sampled, stops
        self.ids = torch.cat((prompt, prompt.new_zeros(prompt.shape[0], budget)), 1)
        self.seen = prompt.shape[1]

    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        scores = self.processors(self.ids[:, : self.seen], logits.clone())
        tokens = scores.softmax(-1).multinomial(1).squeeze(1) if self.sampled else scores.argmax(-1)
        self.stops.take(ids, tokens)
        self.ids[:, self.seen] = ids[:, 0]
        self.seen += 1
        if len(self.stops.others):
            self.stops.open.logical_and_(~self.stops.others(self.ids[:, : self.seen], None))


class _Readback:
    """Tokens, and whether any row goes on, on their way to the host while the next step runs."""

    def __init__(self, batch: int, device: torch.device):
        pinned = device.type == 'cuda'
        self.slot = torch.empty(batch + 1, dtype=torch.long, pin_memory=pinned)
        self.event = torch.cuda.Event() if pinned else None

    def push(self, ids: Tensor, alive: Tensor) -> None:
        self.slot.copy_(torch.cat((ids[:, 0], alive.any().long().unsqueeze(0))), non_blocking=True)
        if self.event is not None:
            self.event.record()

    def read(self) -> tuple[Tensor, bool]:
        """The tokens (B,) pushed last and whether a row goes on after them."""
        if self.event is not None:
            self.event.synchronize()
        values = self.slot.clone()
        return values[:-1], bool(values[-1])


class _Decoder:
    """The loop behind `fast_decode`, and the step it captured."""

    def __init__(self, capture: bool | None):
        self.capture = capture
        self.told: set[str] = set()
        self.step: Step | None = None
        self.key: tuple | None = None
        self.stops: _Stops | None = None

    def tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(f"fast_decode: transformers' own loop runs, because {reason}", stacklevel=4)

    def why_not(self, model, input_ids, processors, criteria, config, synced_gpus=False, **kwargs) -> str | None:
        """Why this call cannot use the captured step, or None."""
        cache, mask = kwargs.get(_cache_name(kwargs)), kwargs.get('attention_mask')
        if self.capture is None and model.device.type != 'cuda':
            return f'the model is on {model.device.type} and the step is captured as a CUDA graph'
        if len({p.device for p in model.parameters()}) > 1:
            return 'the model is spread over several devices'
        if synced_gpus:
            return 'synced_gpus is set'
        if model.config.is_encoder_decoder:
            return 'the model has an encoder and a decoder'
        if config.return_dict_in_generate:
            return 'return_dict_in_generate asks for more than tokens'
        if criteria.max_length is None:
            return 'there is no maximum length'
        if not isinstance(cache, Cache):
            return 'use_cache is off'
        linear = {m.layer_idx for m in model.modules() if isinstance(m, Mixer)}
        kinds = {type(layer) for i, layer in enumerate(cache.layers) if i not in linear}
        if kinds - {DynamicLayer} or any(layer.get_seq_length() for layer in cache.layers):
            return 'the cache is not a new one of full-attention and linear layers'
        if cache.layer_class_to_replicate not in (None, DynamicLayer) or cache.offloading:
            return 'the cache is of a special kind'
        if isinstance(mask, Tensor) and (mask.ndim != 2 or not bool((mask.long().diff(dim=1) >= 0).all())):
            return 'padding is not on the left'
        return None

    def sample(
        self, model, input_ids, processors, criteria, config, synced_gpus=False, streamer=None, **kwargs
    ) -> Tensor:
        """The tokens (B, prompt and answer), as `GenerationMixin._sample` gives them."""
        budget = criteria.max_length - input_ids.shape[1]
        stops = _Stops(criteria, config._pad_token_tensor, input_ids.shape[0], model.device)
        inside = not (config.do_sample or len(processors) or len(stops.others))
        logits, inputs, start = self._prompt(model, input_ids, config, kwargs, budget)
        step, stops = self._step(model, inputs, start, stops, inside)
        choose = stops.greedy if inside else _Choice(processors, config.do_sample, stops, input_ids, budget)
        choose(step.ids, logits)
        answer, readback = [], _Readback(input_ids.shape[0], model.device)
        while True:
            readback.push(step.ids, stops.open)
            more = len(answer) + 1 < budget
            if more:  # queued before the host looks at the token before it
                step(self.capture is not False)
                if not inside:
                    choose(step.ids, step.logits)
            tokens, goes_on = readback.read()
            answer.append(tokens)
            if streamer is not None:
                streamer.put(tokens)
            if not (more and goes_on):
                break
        if step.failure is not None:
            self.tell(f'the step could not be captured: {step.failure}')
        if streamer is not None:
            streamer.end()
        return torch.cat((input_ids, torch.stack(answer, 1).to(input_ids.device)), 1)

    def _prompt(self, model, input_ids, config, kwargs, budget) -> tuple[Tensor, dict, Tensor | None]:
        """Logits (B, vocabulary) after the prompt, the arguments of the next step, and where rows begin."""
        name = _cache_name(kwargs)
        mask, embeds = kwargs.get('attention_mask'), kwargs.get('inputs_embeds')
        whole = input_ids if embeds is None else embeds
        length = whole.shape[1] if mask is None else mask.shape[1]
        start = None if mask is None or bool(mask.all()) else (mask == 0).sum(1)
        self._make_room(kwargs[name], whole.shape[0], length + budget)
        config = copy.copy(config)
        if config.prefill_chunk_size is None and length > PREFILL_CHUNK and _takes_pieces(model, kwargs):
            config.prefill_chunk_size = PREFILL_CHUNK
        outputs = model._prefill(input_ids, config, kwargs, is_first_iteration=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        ids = torch.cat((input_ids, input_ids.new_zeros(input_ids.shape[0], 1)), 1)
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        inputs = {k: v for k, v in inputs.items() if v is not None and k != 'attention_mask'}
        return outputs.logits[:, -1].float(), inputs, start

    def _make_room(self, cache: Cache, batch: int, tokens: int) -> None:
        """Buffers instead of growing keys and values; those of the captured step where they fit."""
        capacity = -(-tokens // _ROUND) * _ROUND
        mine = self.step.cache.layers if self.step is not None else []
        fits = [isinstance(m, KVLayer) and m.capacity >= tokens and len(m.keys) == batch for m in mine]
        if not all(fit or isinstance(m, LinearStateLayer) for fit, m in zip(fits, mine)):
            self.step = None  # frees its buffers before new ones are made
            mine = []
        for i in range(max(len(cache.layers), len(mine))):
            slot = mine[i] if i < len(mine) and fits[i] else KVLayer(capacity)
            slot.reset()
            cache.layers[i : i + 1] = [slot]
        if cache.layer_class_to_replicate is not None:
            cache.layer_class_to_replicate = functools.partial(KVLayer, capacity)

    def _step(self, model, inputs, start, stops, inside) -> tuple[Step, _Stops]:
        """The captured step if it can serve this call, or a new one."""
        cache = inputs[_cache_name(inputs)]
        shapes = {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in inputs.items() if v is not cache}
        key = (inside, start is None, sorted(shapes.items()))
        same = self.step is not None and key == self.key and stops.same_tokens(self.stops)
        if same and len(self.step.cache.layers) == len(cache.layers):
            self.stops.others = stops.others
            self.stops.open.fill_(True)
            self.step.begin(inputs, cache, start)
        else:
            self.key, self.stops = key, stops
            self.step = Step(model, inputs, cache, start, stops.greedy if inside else None)
        return self.step, self.stops


def _cache_name(kwargs: dict) -> str:
    return 'cache' if 'cache' in kwargs else 'past_key_values'  # its names from and before transformers 5.20


def _takes_pieces(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether a prompt may be cut: the model does it, or there is nothing but tokens."""
    if 'prefill_chunk_size' in inspect.signature(model.forward).parameters:
        return True
    named = ('attention_mask', 'position_ids', 'token_type_ids', 'mm_token_type_ids', _cache_name(kwargs))
    return not any(isinstance(v, Tensor) for k, v in kwargs.items() if k not in named)
