"""How HoVLE's stack of layers runs over a cache: pieces of a prompt, padding, image vectors, `generate`'s needs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask

__all__ = ['HoVLEGeneration', 'ImageRows']

# on a cache: whether the prompt had padding, so that decoding steps need not look at the mask (a wait for the device)
_PADDED = '_zoo_padded'
# on a cache, with pixel_shuffle_loc='post': which tokens of the longer sequence of the first layers are real
_FIRST_MASK = '_zoo_first_layers_mask'


class ImageRows:
    """Image vectors on their way to the rows of image ids, in order over the batch.

    Args:
        where: (B, L), true at image ids.
        images: vectors (T, N, C).
        times: vectors per image id.

    Raises:
        ValueError: if they are not equally many.
    """

    def __init__(self, where: Tensor, images: Tensor, times: int = 1):
        self.where, self.rows = where, images.flatten(0, 1)
        self.order = where.flatten().cumsum(0).view_as(where) - 1
        found, given = int(where.sum()) * times, len(self.rows)
        if found != given:
            tiles, each = images.shape[0], images.shape[1] // times
            raise ValueError(
                f'input_ids hold {found // times} image ids, but pixel_values hold {tiles} tiles of {each}: '
                f'{given // times} image vectors'
            )

    def write(self, embeds: Tensor, start: int, stop: int) -> Tensor:
        """Vectors (B, stop - start, C) of text with the rows of image ids replaced."""
        where = self.where[:, start:stop]
        rows = self.rows if where.shape == self.where.shape else self.rows[self.order[:, start:stop][where]]
        return embeds.masked_scatter(where[..., None], rows.to(embeds.dtype))


def spread_image_ids(ids: Tensor, image_id: int, times: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of the first layers with `pixel_shuffle_loc='post'`: every image id `times` times.

    Returns:
        ids (B, M), padded on the left; which of them are real (B, M); where ids came from (B, M), -1 where added.
    """
    device = ids.device
    counts = torch.where(ids == image_id, times, 1)
    origins = [torch.repeat_interleave(torch.arange(len(c), device=device), c) for c in counts]
    width = max(len(o) for o in origins)
    origin = torch.stack([torch.nn.functional.pad(o, (width - len(o), 0), value=-1) for o in origins])
    real = (torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]).gather(1, origin.clamp(min=0))
    return ids.gather(1, origin.clamp(min=0)), real.bool() & (origin >= 0), origin


class HoVLEGeneration:
    """The part of the model that runs its layers, and its hooks into `GenerationMixin`."""

    def _run(
        self, input_ids, images, inputs_embeds, attention_mask, position_ids, cache, piece, tail, record
    ) -> Tensor:
        """Normed hidden states (B, L, C) of the tokens given; of the last `tail` or more of them in a long prompt."""
        whole = input_ids if inputs_embeds is None else inputs_embeds
        length = whole.shape[1]
        part = self.config.embedding_config
        late = part.pixel_shuffle_loc == 'post' and part.use_pixel_shuffle_proj
        mask = self._padding(attention_mask, cache, length)
        if late and inputs_embeds is None:
            return self._run_late(input_ids, images, mask, position_ids, cache, record)
        rows = None if images is None else ImageRows(input_ids == self.config.image_token_id, images)
        recorded = any(value is not None for value in record.values())
        step = piece if piece and cache is not None and not recorded else length
        is_2d = isinstance(mask, Tensor) and mask.ndim == 2
        kept: list[Tensor] = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            embeds = inputs_embeds[:, start:stop] if inputs_embeds is not None else self._text(input_ids[:, start:stop])
            if rows is not None:
                embeds = rows.write(embeds, start, stop)
            seen = mask[:, : mask.shape[1] - length + stop] if is_2d else mask
            places = position_ids if position_ids is None else position_ids[..., start:stop]
            hidden = self._both(embeds, seen, places, cache, record, decoding=step == length)
            if stop + (tail or length) > length:
                kept.append(hidden)
        return kept[0] if len(kept) == 1 else torch.cat(kept, 1)

    def _text(self, ids: Tensor) -> Tensor:
        return self.embedding_model.llm_text_embeddings(ids)

    def _both(self, x, mask, position_ids, cache, record, decoding: bool) -> Tensor:
        first, second = self.embedding_model, self.language_model.model
        softmax = [i for i, kind in enumerate(self.config.block_types) if kind == 'mha']
        attend = None
        if softmax:
            position_ids = self._positions(x, mask, position_ids, cache, softmax[0])
            attend = self._causal(x, mask, cache, softmax[0])
        padding = _local_padding(mask, x, decoding, cache)
        x = self._layers(first.encoder, first.rotary_emb, x, attend, position_ids, cache, padding, record)
        x = self._normalise(x)
        x = self._layers(second.layers, second.rotary_emb, x, attend, position_ids, cache, padding, record)
        return self._finish(x, record)

    def _run_late(self, ids, images, mask, position_ids, cache, record) -> Tensor:
        """`pixel_shuffle_loc='post'`: the first layers see every patch, the decoder what the shuffle makes of them."""
        first, second, config = self.embedding_model, self.language_model.model, self.config
        if mask is not None and mask.ndim != 2:
            raise ValueError("pixel_shuffle_loc='post' needs the two-dimensional attention_mask")
        times = round(config.embedding_config.downsample_ratio**-2)
        longer, real, origin = spread_image_ids(ids, config.image_token_id, times, mask)
        x = self._text(longer)
        is_image = (longer == config.image_token_id) & (origin >= 0)
        if images is not None:
            x = ImageRows(is_image, images).write(x, 0, x.shape[1])
        seen = real if mask is not None or not bool(real.all()) else None
        before = getattr(cache, _FIRST_MASK, None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if before is not None or (seen is not None and cache is not None):
            before = real.new_ones(len(ids), past) if before is None else before
            seen = torch.cat([before, real], 1)
            setattr(cache, _FIRST_MASK, seen)
        n = config.num_embedding_layers
        x = self._part(first.encoder, first.rotary_emb, x, seen, None, cache, 0, record)
        out = x.new_zeros(*ids.shape, x.shape[-1])
        text = ids != config.image_token_id
        out = out.masked_scatter(text[..., None], x[(origin >= 0) & ~is_image])
        if bool((~text).any()):
            patches = first.vision_embeddings.grid**2 if images is None else images.shape[1]
            out = out.masked_scatter(~text[..., None], first.join(x[is_image].unflatten(0, (-1, patches))))
        out = self._normalise(out)
        return self._finish(
            self._part(second.layers, second.rotary_emb, out, mask, position_ids, cache, n, record), record
        )

    def _part(self, layers, rotary, x, mask, position_ids, cache, first: int, record) -> Tensor:
        softmax = [first + i for i in range(len(layers)) if self.config.block_types[first + i] == 'mha']
        attend = None
        if softmax:
            position_ids = self._positions(x, mask, position_ids, cache, softmax[0])
            attend = self._causal(x, mask, cache, softmax[0])
        padding = _local_padding(mask, x, True, cache)
        return self._layers(layers, rotary, x, attend, position_ids, cache, padding, record)

    def _layers(self, layers, rotary, x, attention_mask, position_ids, cache, padding, record) -> Tensor:
        embeddings = None if position_ids is None else rotary(x, position_ids)
        for layer in layers:
            if record['hidden_states'] is not None:
                record['hidden_states'] += (x,)
            x = layer(
                x,
                output_attentions=record['attentions'] is not None,
                position_embeddings=embeddings,
                attention_mask=attention_mask,
                past_key_values=cache,
                padding_mask=padding,
            )
            if record['attentions'] is not None:
                x, weights = x
                record['attentions'] += (weights,)
        return x

    def _normalise(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) if self.config.normalize_encoder_output else x

    def _finish(self, x: Tensor, record) -> Tensor:
        x = self.language_model.model.norm(x)
        if record['hidden_states'] is not None:
            record['hidden_states'] += (x,)
        return x

    def _padding(self, mask: Any, cache: Cache | None, length: int) -> Any:
        """The mask, or None where nothing is padding; later steps of a cache trust what the prompt said."""
        if not isinstance(mask, Tensor) or mask.ndim != 2 or torch.compiler.is_compiling():
            return mask
        padded = getattr(cache, _PADDED, None)
        if length > 1 or padded is None:
            padded = not bool(mask.all())
            if cache is not None:
                setattr(cache, _PADDED, padded)
        return mask if padded else None

    def _positions(self, x, mask, position_ids, cache, layer: int) -> Tensor:
        """Positions (B, L), or (1, L): given, counted over real tokens, or going on from the cache."""
        if position_ids is not None:
            return position_ids
        length = x.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past = 0 if cache is None else _from(cache, layer).get_seq_length()
        return (torch.arange(length, device=x.device) + past)[None]

    def _causal(self, x, mask, cache, layer: int) -> Any:
        """What the attention implementation takes as its causal mask, sized by cache entry `layer`."""
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return mask
        length, view = x.shape[1], None if cache is None else _from(cache, layer)
        name = self.config._attn_implementation
        if mask is None and view is not None and length > 1 and not torch.is_grad_enabled():
            past = view.get_seq_length()
            makes = ALL_MASK_ATTENTION_FUNCTIONS[name] if name in ALL_MASK_ATTENTION_FUNCTIONS else None
            if isinstance(past, int) and past > 0 and makes is sdpa_mask:
                # a piece of a long prompt: flash kernels align the triangle themselves, no L x (past + L) mask
                return causal_lower_right(length, past + length)
        return create_causal_mask(self.config, x, mask, view)

    # What `generate` calls

    def _set_stop_tokens(self) -> None:
        text, config = self.config.llm_config, self.generation_config
        config.bos_token_id = text.bos_token_id if config.bos_token_id is None else config.bos_token_id
        config.pad_token_id = text.pad_token_id if config.pad_token_id is None else config.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = self.config.stop_token_ids

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        attention_mask=None,
        inputs_embeds=None,  # named: `generate` looks for it here
        is_first_iteration=False,
        **kwargs,
    ):
        cache = kwargs.get('cache', kwargs.get('past_key_values'))
        if is_first_iteration and next_sequence_length is None and cache is not None and attention_mask is not None:
            # a conversation that goes on: the ids hold what the cache has seen; transformers cuts them for caches with
            # keys, and leaves them for those whose layers are all recurrent
            past = int(cache.get_seq_length(self.config.num_hidden_layers - 1)) if len(cache.layers) else 0
            if past and attention_mask.shape[1] == input_ids.shape[1] > past:
                next_sequence_length = input_ids.shape[1] - past
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get('use_cache', True):
            inputs.pop('pixel_values', None)
            inputs.pop('image_flags', None)
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # pieces of the prompt are `forward`'s business: it has the image vectors at hand, transformers refuses them
        if generation_config.prefill_chunk_size is not None:
            model_kwargs = {**model_kwargs, 'prefill_chunk_size': generation_config.prefill_chunk_size}
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Beams and several answers: the tiles of a row stay together, and follow each of its copies."""
        pixels, flags = kwargs.pop('pixel_values', None), kwargs.pop('image_flags', None)
        if pixels is not None and expand_size > 1:
            if flags is not None:
                pixels, flags = pixels[flags.flatten().to(pixels.device) == 1], None
            counts = (input_ids == self.config.image_token_id).sum(1)
            each = int(counts.sum()) // max(len(pixels), 1)
            if each and bool((counts % each == 0).all()) and int(counts.sum()) == each * len(pixels):
                tiles = pixels.split((counts // each).tolist())
                pixels = torch.cat([t for t in tiles for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        images = {'pixel_values': pixels, 'image_flags': flags}
        return input_ids, {**kwargs, **{name: value for name, value in images.items() if value is not None}}


def _from(cache: Cache, layer: int) -> Cache:
    """A view of a cache whose first entry is that of `layer`: mask sizes are read there."""
    return cache if layer == 0 else Cache(layers=cache.layers[layer:])


def _local_padding(mask: Any, x: Tensor, decoding: bool, cache: Cache | None) -> Tensor | None:
    """The mask's columns (B, L) of the tokens at hand; None where nothing is padding and in decoding steps."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    step = decoding and x.shape[1] == 1 and cache is not None and mask.shape[1] > 1
    return None if step else mask[:, -x.shape[1] :]
