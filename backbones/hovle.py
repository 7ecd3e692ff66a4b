"""HoVLE: a vision-language model without a vision encoder (arXiv 2412.16158), for transformers' `generate`.

    pixels (T, 3, 448, 448) -> patches of 14 + positions -> pixel shuffle x 0.5 -> MLP -> (T, 256, C)
    ids (B, L) -> text table; rows of the image id are overwritten by the image vectors, in order
    -> causal layers of the embedding module -> causal InternLM2 layers -> RMSNorm -> logits (float32)

Weights: OpenGVLab/HoVLE on the Hugging Face hub (2 606 327 808 parameters, 236 tensors); module names are the published
keys. Facts: `hovle/modeling_*.py` of hustvl/mmMamba at 85143d03. Other than there, generation keeps a key-value cache
of all layers (32 entries), and every implementation of attention is causal. `import zoo.vlm` registers the model with
transformers' Auto classes; `zoo.backbones.mmmamba` is its linear student.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from zoo.backbones._hovle_config import HoVLEConfig
from zoo.backbones._hovle_generation import HoVLEGeneration
from zoo.backbones._layers import RMSNorm
from zoo.backbones._pieces import attend_piece

__all__ = ['HoVLEAttention', 'HoVLEConfig', 'HoVLEForConditionalGeneration', 'HoVLELayer']

# transformers names the cache `cache` since 5.2x and `past_key_values` before
CACHE_FIELD = 'cache' if 'cache' in {f.name for f in fields(CausalLMOutputWithPast)} else 'past_key_values'
# tiles that pass the patch embedding at once outside training: their activations stay below 200 MB at the real size
TILES_AT_ONCE = 16


class HoVLEAttention(nn.Module):
    """Causal softmax attention with grouped keys and values and one fused projection.

    Rows of `wqkv` are grouped per key-value head: its G query heads, then its key, then its value. Query head i uses
    key-value head i // G.

    Args:
        config: the model's configuration, which holds the attention implementation.
        part: `embedding_config` or `llm_config`.
        layer_idx: index in the whole stack of layers, and in the cache.
    """

    is_causal = True

    def __init__(self, config: HoVLEConfig, part: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = part.num_attention_heads
        self.num_key_value_heads = part.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = part.head_dim
        self.scaling = self.head_dim**-0.5
        self.dropout = part.attention_dropout
        width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(part.hidden_size, width, bias=part.qkv_bias)
        self.wo = nn.Linear(self.num_heads * self.head_dim, part.hidden_size, bias=part.qkv_bias)

    def projections(self) -> dict[str, Any]:
        """`q_proj`, `k_proj`, `v_proj` (rows of `wqkv` in head order, as copies) and `o_proj`: weight and bias each."""
        rows = {}
        for name in ('weight', 'bias'):
            fused = getattr(self.wqkv, name)
            if fused is None:
                rows[name] = (None, None, None)
                continue
            groups = fused.detach().unflatten(0, (self.num_key_value_heads, -1, self.head_dim))
            q, k, v = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
            rows[name] = (q.clone(), k.clone(), v.clone())
        parts = [SimpleNamespace(weight=w, bias=b) for w, b in zip(rows['weight'], rows['bias'])]
        return dict(zip(('q_proj', 'k_proj', 'v_proj', 'o_proj'), (*parts, self.wo)))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, L, C), and the weights (B, H, L, S) if the attention implementation gives them."""
        batch, length, _ = hidden_states.shape
        qkv = self.wqkv(hidden_states).view(batch, length, self.num_key_value_heads, -1, self.head_dim)
        query = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if isinstance(attention_mask, CausalBias):
            out = attend_piece(query, key, value, self.scaling).transpose(1, 2)
            return self.wo(out.reshape(batch, length, -1)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.wo(out.reshape(batch, length, -1)), weights


class HoVLEMLP(nn.Module):
    """w2(act(w1 x) * w3 x), without biases."""

    def __init__(self, part: Any):
        super().__init__()
        self.w1 = nn.Linear(part.hidden_size, part.intermediate_size, bias=False)
        self.w3 = nn.Linear(part.hidden_size, part.intermediate_size, bias=False)
        self.w2 = nn.Linear(part.intermediate_size, part.hidden_size, bias=False)
        self.act = ACT2FN[part.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class HoVLELayer(GradientCheckpointingLayer):
    """x += mix(norm(x)); x += mlp(norm(x)). `attention` is any token mixer with attention's call signature."""

    def __init__(self, part: Any, attention: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.attention = attention
        self.feed_forward = HoVLEMLP(part)
        self.attention_norm = RMSNorm(part.hidden_size, part.rms_norm_eps)
        self.ffn_norm = RMSNorm(part.hidden_size, part.rms_norm_eps)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, hidden_states: Tensor, output_attentions: bool = False, **kwargs):
        """Hidden states (B, L, C); with `output_attentions` also the mixer's second result."""
        branch, weights = self.attention(hidden_states=self.attention_norm(hidden_states), **kwargs)
        normed, hidden_states = self.ffn_norm(self.drop_path(branch), hidden_states)
        hidden_states = hidden_states + self.drop_path(self.feed_forward(normed))
        return (hidden_states, weights) if output_attentions else hidden_states


class HoVLEVisionEmbeddings(nn.Module):
    """Tiles (T, 3, H, W) to patch vectors (T, H/14 * W/14, C); positions are resized to the grid (bicubic)."""

    def __init__(self, part: Any):
        super().__init__()
        self.grid = part.image_size // part.patch_size
        self.patch_embedding = nn.Conv2d(part.num_channels, part.hidden_size, part.patch_size, part.patch_size)
        # in the checkpoints, used by nothing; the same holds for the position table's first row
        self.class_embedding = nn.Parameter(torch.randn(1, 1, part.hidden_size), requires_grad=False)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.grid**2, part.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        position = self.position_embedding[:, 1:]
        if (height, width) != (self.grid, self.grid):
            table = position.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=(height, width), mode='bicubic', align_corners=False)
            position = table.flatten(2).transpose(1, 2).to(position.dtype)
        return patches.flatten(2).transpose(1, 2) + position


def pixel_shuffle(x: Tensor, ratio: float) -> Tensor:
    """Neighbouring vectors of square grids (T, N, C) joined into (T, N ratio^2, C / ratio^2)."""
    tiles, count, channels = x.shape
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f'pixel shuffle needs square tiles, got {count} patches')
    small, wide = int(side * ratio), int(channels / ratio)
    x = x.reshape(tiles, side, small, wide).transpose(1, 2)
    return x.reshape(tiles, small, small, int(wide / ratio)).transpose(1, 2).reshape(tiles, small * small, -1)


def _layers(config: HoVLEConfig, part: Any, first: int, make: Any) -> nn.ModuleList:
    rates = torch.linspace(0, getattr(part, 'drop_path_rate', 0.0), part.num_hidden_layers, device='cpu').tolist()
    kinds = part.block_types
    return nn.ModuleList(HoVLELayer(part, make(config, part, kinds[i], first + i), rates[i]) for i in range(len(kinds)))


class HoVLEEmbedding(nn.Module):
    """Tables of text and image vectors, and the causal layers that make one kind of both."""

    def __init__(self, config: HoVLEConfig, make_mixer: Any):
        super().__init__()
        part = config.embedding_config
        self.ratio = part.downsample_ratio if part.use_pixel_shuffle_proj else None
        self.shuffle_first = part.pixel_shuffle_loc == 'pre'
        self.vision_embeddings = HoVLEVisionEmbeddings(part)
        self.llm_text_embeddings = nn.Embedding(part.llm_vocab_size, part.llm_hidden_size)
        self.encoder = _layers(config, part, 0, make_mixer)
        if self.ratio is not None:
            joined = int(part.hidden_size / part.downsample_ratio**2)
            self.pixel_shuffle_proj = nn.Sequential(
                nn.Linear(joined, part.hidden_size), nn.GELU(), nn.Linear(part.hidden_size, part.hidden_size)
            )
        self.rotary_emb = LlamaRotaryEmbedding(part)

    def join(self, patches: Tensor) -> Tensor:
        """Patch vectors (T, N, C) to the decoder's image vectors (T, N ratio^2, C)."""
        return self.pixel_shuffle_proj(pixel_shuffle(patches, self.ratio))

    def images(self, pixel_values: Tensor) -> Tensor:
        """Tiles (T, 3, H, W) to the vectors (T, N, C) that enter the layers."""
        chunks = [pixel_values] if torch.is_grad_enabled() else pixel_values.split(TILES_AT_ONCE)
        out = []
        for tiles in chunks:
            x = self.vision_embeddings(tiles)
            out.append(self.join(x) if self.shuffle_first and self.ratio is not None else x)
        return torch.cat(out)


class _Decoder(nn.Module):
    def __init__(self, config: HoVLEConfig, make_mixer: Any):
        super().__init__()
        part = config.llm_config
        # in the checkpoints, used by nothing: the decoder gets vectors
        self.tok_embeddings = nn.Embedding(part.vocab_size, part.hidden_size)
        self.tok_embeddings.weight.requires_grad_(False)
        self.layers = _layers(config, part, config.num_embedding_layers, make_mixer)
        self.norm = RMSNorm(part.hidden_size, part.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(part)


class HoVLELanguageModel(nn.Module):
    """The decoder and the output matrix."""

    def __init__(self, config: HoVLEConfig, make_mixer: Any):
        super().__init__()
        self.model = _Decoder(config, make_mixer)
        self.output = nn.Linear(config.llm_config.hidden_size, config.llm_config.vocab_size, bias=False)


class HoVLEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know: initialisation, attention implementations, strict loading."""

    config_class = HoVLEConfig
    config: HoVLEConfig
    base_model_prefix = ''
    main_input_name = 'input_ids'
    input_modalities = ('image', 'text')
    supports_gradient_checkpointing = True
    _no_split_modules = ['HoVLELayer', 'HoVLEVisionEmbeddings']
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for the call in the source of the class's own module

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoVLEVisionEmbeddings):
            init.normal_(module.class_embedding)
            init.normal_(module.position_embedding)

    @classmethod
    def from_pretrained(cls, name: Any, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint that does not fill the model is an error.

        Raises:
            ValueError: naming the damaged file, or keys that are missing, unknown or of another size.
        """
        lenient = kwargs.setdefault('ignore_mismatched_sizes', False)
        kwargs['ignore_mismatched_sizes'] = True  # the error for them is raised here, with the names
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f'{_damaged(name)} is cut off or damaged: {error}') from error
        problems = {
            'missing': sorted(info['missing_keys']),
            'unknown to the model': sorted(info['unexpected_keys']),
            'of another size': [f'{k} {tuple(a)}, not {tuple(b)}' for k, a, b in sorted(info['mismatched_keys'])],
        }
        if lenient:
            del problems['of another size']
        found = [
            f'{len(keys)} {what}: {", ".join(keys[:4])}{", ..." * (len(keys) > 4)}'
            for what, keys in problems.items()
            if keys
        ]
        if found:
            raise ValueError(f'{name} does not fit {cls.__name__}: keys ' + '; keys '.join(found))
        model._freeze_unused()
        return (model, info) if output_loading_info else model


def _damaged(name: Any) -> str:
    for file in sorted(Path(name).glob('*.safetensors')):
        try:
            with safe_open(file, 'pt'):
                pass
        except SafetensorError:
            return str(file)
    return f'a file of {name}'


class HoVLEForConditionalGeneration(HoVLEGeneration, HoVLEPreTrainedModel, GenerationMixin):
    """HoVLE with its output matrix.

    Args:
        config: a `HoVLEConfig`.
    """

    def __init__(self, config: HoVLEConfig):
        super().__init__(config)
        self.embedding_model = HoVLEEmbedding(config, self.make_mixer)
        self.language_model = HoVLELanguageModel(config, self.make_mixer)
        self.post_init()
        self._freeze_unused()
        self._set_stop_tokens()

    @staticmethod
    def make_mixer(config: HoVLEConfig, part: Any, kind: str, layer_idx: int) -> nn.Module:
        """The token mixer of one layer.

        Raises:
            ValueError: for a kind of layer that this model does not have.
        """
        if kind != 'mha':
            raise ValueError(f'layer {layer_idx}: layers_block_type {kind!r} is not one of HoVLE, which has only mha')
        return HoVLEAttention(config, part, layer_idx)

    @property
    def layers(self) -> list[HoVLELayer]:
        """All layers in order: those of the embedding module, then the decoder's."""
        return [*self.embedding_model.encoder, *self.language_model.model.layers]

    def modules_with_rotary(self) -> tuple[nn.Module, nn.Module]:
        """The two stacks, each of which has its own `rotary_emb`."""
        return self.embedding_model, self.language_model.model

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding_model.llm_text_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding_model.llm_text_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.output = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As in transformers; the unused table and both parts of the config follow, so that files fit."""
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        size, decoder = table.num_embeddings, self.language_model.model
        decoder.tok_embeddings = self._get_resized_embeddings(decoder.tok_embeddings, size, mean_resizing=False)
        self.config.__dict__.pop('vocab_size', None)  # set by transformers in front of the decoder's
        self.config.llm_config.vocab_size = self.config.embedding_config.llm_vocab_size = size
        self._freeze_unused()
        return table

    def _freeze_unused(self) -> None:
        # no gradient ever reaches these two: left trainable, they stop distributed training
        self.embedding_model.vision_embeddings.class_embedding.requires_grad_(False)
        self.language_model.model.tok_embeddings.weight.requires_grad_(False)

    def get_image_features(self, pixel_values: Tensor, image_flags: Tensor | None = None) -> Tensor:
        """Vectors (T, N, C) of tiles (T, 3, H, W), of those whose flag (T,) is 1 if there are flags.

        Raises:
            ValueError: for pixel values of another shape.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f'pixel_values must be tiles (T, 3, H, W), got {tuple(pixel_values.shape)}')
        if image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten().to(pixel_values.device) == 1]
        return self.embedding_model.images(pixel_values)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_flags: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefill_chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """One pass over (B, L) tokens, or over the next L tokens after those in the cache.

        Args:
            input_ids: (B, L).
            pixel_values: tiles (T, 3, H, W) of all rows in order, each for `config.tokens_per_tile` image ids.
            attention_mask: (B, S + L) with 0 at padding, S tokens being in the cache; or a mask that transformers made.
            position_ids: (B, L); by default counted from the mask.
            past_key_values: cache with one entry per layer of the whole stack; `cache` is its newer name.
            inputs_embeds: (B, L, C), what would enter the first layer, instead of `input_ids` and `pixel_values`.
            labels: (B, L), -100 where there is no loss; shifted inside.
            image_flags: (T,), 0 for tiles that stand in for no image.
            use_cache: whether to return a cache; by default the config's, and not in training.
            logits_to_keep: how many last positions, or which, get logits; 0 for all.
            prefill_chunk_size: with a cache, run the tokens in pieces of this length: memory grows with the piece.
            output_hidden_states: also return what enters every layer, and the final norm's output.
            output_attentions: also return attention weights (`attn_implementation='eager'`).
            return_dict: False for a tuple.

        Returns:
            Logits (B, L or fewer, vocabulary) in float32, the cache, and what else was asked for.

        Raises:
            ValueError: if image ids and image vectors are not equally many, or inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('give input_ids or inputs_embeds, and not both')
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError('inputs_embeds already hold the image vectors: pixel_values need input_ids')
        use_cache, cache = self._choose_cache(use_cache, past_key_values if cache is None else cache)
        images = None if pixel_values is None else self.get_image_features(pixel_values, image_flags)
        asked = {'hidden_states': output_hidden_states, 'attentions': output_attentions}
        record = {name: () if wanted else None for name, wanted in asked.items()}
        tail = logits_to_keep if isinstance(logits_to_keep, int) else 0
        hidden_states = self._run(
            input_ids, images, inputs_embeds, attention_mask, position_ids, cache, prefill_chunk_size, tail, record
        )
        kept = hidden_states[:, slice(-tail, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        output = self._output(kept, labels, record, cache if use_cache else None, kwargs)
        return output.to_tuple() if return_dict is False else output

    def _choose_cache(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        trains = self.training and torch.is_grad_enabled()
        use_cache = self.config.use_cache and not trains if use_cache is None else use_cache
        if use_cache and cache is None and not (trains and self.layers[0].gradient_checkpointing):
            cache = DynamicCache(config=self.config)
        return use_cache, cache

    def _output(self, hidden_states, labels, record, cache, kwargs) -> CausalLMOutputWithPast:
        logits, loss = self.language_model.output(hidden_states).float(), None
        if labels is not None:
            options = {k: kwargs[k] for k in ('num_items_in_batch',) if k in kwargs}
            vocabulary = self.config.llm_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **options)
        attentions = record['attentions']
        if attentions and any(weights is None for weights in attentions):
            attentions = None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=record['hidden_states'],
            attentions=attentions,
            **{CACHE_FIELD: cache},
        )
