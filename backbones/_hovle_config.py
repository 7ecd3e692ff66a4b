"""Configurations of HoVLE (arXiv 2412.16158): the layout of the published config.json, read without remote code.

A checkpoint's config.json holds `embedding_config` (vision embedding and the first causal layers, the "holistic
embedding") and `llm_config` (InternLM2: the remaining layers and the output). Facts: `hovle/configuration_*.py` of
hustvl/mmMamba at 85143d03 and the config edits of its `convert_weight.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

__all__ = ['HoVLEConfig', 'HoVLEEmbeddingConfig', 'HoVLETextConfig']

# Attention implementations are chosen when a model is loaded, never by the file: the published one names flash
# attention 2, which most machines lack.
_IGNORED = ('attn_implementation', '_attn_implementation', 'use_flash_attn')


class _PartConfig(PreTrainedConfig):
    """What both stacks of layers share; `rope_theta` and `rope_scaling` are kept as transformers' `rope_parameters`."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    hidden_act: str = 'silu'
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    layers_block_type: list[str] | None = None

    def __post_init__(self, **kwargs):
        for name in _IGNORED:
            kwargs.pop(name, None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if kwargs.get('rope_scaling') is not None:
            kwargs['rope_scaling'] = dict(kwargs['rope_scaling'])  # the conversion edits it in place
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        heads, groups, name = self.num_attention_heads, self.num_key_value_heads, self.base_config_key
        if heads % groups:
            raise ValueError(f'{name}: {groups} key-value heads do not divide {heads} attention heads')
        if self.hidden_size % heads or (self.hidden_size // heads) % 2:
            raise ValueError(f'{name}: hidden_size {self.hidden_size} over {heads} heads is no even head width')
        types = self.layers_block_type
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(f'{name}.layers_block_type names {len(types)} layers of {self.num_hidden_layers}')

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def block_types(self) -> list[str]:
        """What mixes the tokens of each layer; softmax attention is 'mha'."""
        return list(self.layers_block_type or ['mha'] * self.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """The published layout: rotary parameters as `rope_theta` and `rope_scaling`."""
        output = super().to_dict()
        rope = dict(output.pop('rope_parameters', None) or {})
        output['rope_theta'] = rope.pop('rope_theta', 10000.0)
        output['rope_scaling'] = None
        if (kind := rope.pop('rope_type', 'default')) != 'default':
            output['rope_scaling'] = {'type': kind, **rope}
        if self.layers_block_type is None:
            output.pop('layers_block_type', None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        return _lean(self.to_dict())


def _lean(output: dict[str, Any]) -> dict[str, Any]:
    """Without what every transformers config holds and these models never use."""
    default = PreTrainedConfig().to_dict()
    kept = {k: _lean(v) if isinstance(v, dict) and 'model_type' in v else v for k, v in output.items()}
    return {
        k: v
        for k, v in kept.items()
        if k != '_name_or_path' and (k in ('model_type', 'transformers_version') or k not in default or v != default[k])
    }


class HoVLEEmbeddingConfig(_PartConfig):
    """Vision embedding and the causal layers before the decoder.

    Args:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        llm_vocab_size: rows of the text table.
        llm_hidden_size: its width; equals `hidden_size`.
        downsample_ratio: factor of the pixel shuffle per axis.
        pixel_shuffle_loc: 'pre' (before the layers) or 'post' (after them, HoVLE-HD).
        img_context_token_id: id whose rows are overwritten by image vectors.
        special_token_maps: tokens with a table of their own; must be empty, as published.
        use_ls: layer scale; must be false, as published.
        drop_path_rate: stochastic depth of the last layer; grows linearly from 0.
    """

    model_type = 'holistic_embedding'
    base_config_key = 'embedding_config'

    num_hidden_layers: int = 8
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 448
    attention_bias: bool = False
    attention_dropout: float = 0.0
    llm_vocab_size: int = 92553
    llm_hidden_size: int = 2048
    downsample_ratio: float = 0.5
    img_context_token_id: int = 92546
    pixel_shuffle_loc: str = 'pre'
    use_pixel_shuffle_proj: bool = True
    use_ls: bool = False
    special_token_maps: dict | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs):
        self.special_token_maps = self.special_token_maps or {}
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        if self.use_ls or self.special_token_maps:
            raise ValueError('embedding_config: use_ls must be false and special_token_maps empty, as published')
        if self.llm_hidden_size != self.hidden_size:
            raise ValueError(
                f'embedding_config: llm_hidden_size {self.llm_hidden_size} is not hidden_size {self.hidden_size}'
            )
        if self.pixel_shuffle_loc not in ('pre', 'post'):
            raise ValueError(f"embedding_config: pixel_shuffle_loc must be 'pre' or 'post': {self.pixel_shuffle_loc!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f'embedding_config: patch_size {self.patch_size} does not divide {self.image_size}')

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias


class HoVLETextConfig(_PartConfig):
    """The decoder: InternLM2's layers and the output matrix."""

    model_type = 'internlm2'
    base_config_key = 'llm_config'

    num_hidden_layers: int = 24
    vocab_size: int = 92553
    rms_norm_eps: float = 1e-6
    bias: bool = False
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.bias


# </s>, [UNUSED_TOKEN_145], <|im_start|> and <|im_end|> of the published vocabulary
_TURN_ENDS = (2, 1163, 92543, 92542)
# What `HoVLEConfig()` means; a file that leaves these out means the classes' defaults, as for the published code
_PUBLISHED_DECODER = {'rms_norm_eps': 1e-5, 'rope_theta': 1000000.0}


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """A copy with `architectures` as a list: published files of mmMamba hold a string, which transformers refuses."""
    names = values.get('architectures')
    return {**values, 'architectures': [names]} if isinstance(names, str) else dict(values)


class HoVLEConfig(PreTrainedConfig):
    """A HoVLE checkpoint's config.json; without arguments the published 2.6 B model.

    `num_hidden_layers`, `vocab_size` and the like speak of the whole stack of layers, which is what caches and
    generation ask for; they are not written to the file.

    Args:
        embedding_config: dictionary or `HoVLEEmbeddingConfig`.
        llm_config: dictionary or `HoVLETextConfig`.
        force_image_size: side of a tile in pixels, if not `embedding_config.image_size`.
        normalize_encoder_output: whether what leaves the embedding layers is divided by its norm.

    Raises:
        ValueError: for parts that do not fit together, or the config of an InternVL model with a vision encoder.
    """

    model_type = 'internvl_chat'
    # not transformers' `sub_configs`: one attention implementation serves both stacks, their modules being plain ones
    parts: ClassVar[dict] = {'embedding_config': HoVLEEmbeddingConfig, 'llm_config': HoVLETextConfig}
    published_architecture: ClassVar[Any] = ['InternVLChatModel']

    embedding_config: dict | PreTrainedConfig | None = None
    llm_config: dict | PreTrainedConfig | None = None
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    pad2square: bool = False
    select_layer: int = -1
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str | None = 'internlm2-chat'
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    ps_version: str = 'v1'
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    normalize_encoder_output: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if 'vision_config' in kwargs:
            raise ValueError(
                f'this {self.model_type!r} config has a vision_config, so it is an InternVL model with a vision '
                'encoder, not HoVLE; load it in a process that does not import zoo.vlm'
            )
        for name, cls in self.parts.items():
            part = getattr(self, name)
            if part is None:
                part = _PUBLISHED_DECODER if name == 'llm_config' else {}
            setattr(self, name, cls(**_listed(part)) if isinstance(part, dict) else part)
        if self.use_backbone_lora or self.use_llm_lora:
            raise ValueError('use_backbone_lora and use_llm_lora: attach adapters with peft instead')
        if self.embedding_config.hidden_size != self.llm_config.hidden_size:
            raise ValueError(
                f'embedding_config.hidden_size {self.embedding_config.hidden_size} is not llm_config.hidden_size '
                f'{self.llm_config.hidden_size}'
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return super().from_dict(_listed(config_dict), **kwargs)

    @property
    def num_embedding_layers(self) -> int:
        """Layers before the decoder; the decoder's layer i is layer `num_embedding_layers + i` of the whole."""
        return self.embedding_config.num_hidden_layers

    @property
    def num_hidden_layers(self) -> int:
        return self.embedding_config.num_hidden_layers + self.llm_config.num_hidden_layers

    @property
    def block_types(self) -> list[str]:
        """'mha' or 'mamba2' for every layer of the whole stack."""
        return self.embedding_config.block_types + self.llm_config.block_types

    @property
    def stop_token_ids(self) -> int | list[int] | None:
        """Ids that end an answer: the decoder's, and InternVL's end of a turn where the vocabulary has it."""
        stop = self.llm_config.eos_token_id
        if self.template != 'internlm2-chat' or self.llm_config.vocab_size != 92553:
            return stop
        return sorted({*_TURN_ENDS, *(stop if isinstance(stop, list) else [] if stop is None else [stop])})

    @property
    def image_token_id(self) -> int:
        return self.embedding_config.img_context_token_id

    @property
    def image_size(self) -> int:
        return self.force_image_size or self.embedding_config.image_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile in the prompt."""
        grid = self.image_size // self.embedding_config.patch_size
        ratio = self.embedding_config.downsample_ratio if self.embedding_config.use_pixel_shuffle_proj else 1
        return int(grid * ratio) ** 2

    def __getattr__(self, name: str) -> Any:
        # sizes that caches, generation and trainers look for on the outermost configuration
        if name in _TEXT_FIELDS and 'llm_config' in self.__dict__:
            return getattr(self.llm_config, name)
        raise AttributeError(f'{type(self).__name__!r} object has no attribute {name!r}')

    def to_dict(self) -> dict[str, Any]:
        """The published layout."""
        output = super().to_dict()
        output['architectures'] = self.published_architecture
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        return _lean(self.to_dict())


_TEXT_FIELDS = frozenset(
    'hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size max_position_embeddings '
    'initializer_range pad_token_id bos_token_id eos_token_id'.split()
)
