"""mmMamba: HoVLE with Mamba-2 layers carved out of its attention (arXiv 2502.13145), linear and hybrid.

The network is `zoo.backbones.hovle`'s; `layers_block_type` of `embedding_config` and of `llm_config` says for every
layer whether it is 'mamba2' (`zoo.backbones._mamba2.Mamba2Mixer`, state of constant size, no rotary embedding) or 'mha'
(HoVLE's own attention). Both kinds keep their state in transformers' `Cache`.

Weights on the Hugging Face hub: hustvl/mmMamba-linear (2 741 992 448 parameters, 396 tensors) and hustvl/mmMamba-hybrid
(2 708 076 288, 356). Their keys differ from the modules' in two places (`zoo.backbones._mmmamba_layout`). Facts:
hustvl/mmMamba at 85143d03 (`src/model`, `convert_weight.py`); the modelling files beside the weights were not read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from zoo.backbones._hovle_config import HoVLEConfig, HoVLEEmbeddingConfig, HoVLETextConfig
from zoo.backbones._mamba2 import Mamba2Mixer
from zoo.backbones._mixer import AttentionShape
from zoo.backbones._mmmamba_layout import problems, register_layout, split_projections
from zoo.backbones.hovle import HoVLEAttention, HoVLEForConditionalGeneration

__all__ = ['HoVLELinearForConditionalGeneration', 'MMMambaConfig', 'from_hovle', 'student_config']


class _Blocks:
    def __post_init__(self, **kwargs):
        if self.layers_block_type is None:
            self.layers_block_type = ['mamba2'] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class MMMambaEmbeddingConfig(_Blocks, HoVLEEmbeddingConfig):
    """`HoVLEEmbeddingConfig` with the kind of every layer; all are 'mamba2' by default."""

    model_type = 'mmMamba_embedding'


class MMMambaTextConfig(_Blocks, HoVLETextConfig):
    """`HoVLETextConfig` with the kind of every layer; all are 'mamba2' by default."""

    model_type = 'mmMamba'

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), 'architectures': 'mmMambaForCausalLM'}  # a string in the published files


class MMMambaConfig(HoVLEConfig):
    """An mmMamba checkpoint's config.json; without arguments the published linear model.

    Args:
        mixer_options: options of `Mamba2Mixer` other than the published ones, or None.
    """

    model_type = 'mmMamba_chat'
    parts: ClassVar[dict] = {'embedding_config': MMMambaEmbeddingConfig, 'llm_config': MMMambaTextConfig}
    # a string, not a list, in the published files
    published_architecture: ClassVar[Any] = 'mmMambaChatModel'

    mixer_options: dict | None = None

    def to_dict(self) -> dict[str, Any]:
        """The published layout."""
        output = super().to_dict()
        if not self.mixer_options:
            output.pop('mixer_options', None)
        return output


# transformers' `generate` treats classes with "mamba" in their name in a way of its own
class HoVLELinearForConditionalGeneration(HoVLEForConditionalGeneration):
    """mmMamba with its output matrix.

    `load_state_dict` takes the modules' keys and the published ones.

    Args:
        config: an `MMMambaConfig`.
    """

    config_class = MMMambaConfig
    config: MMMambaConfig

    def __init__(self, config: MMMambaConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_accept_published_keys)

    @staticmethod
    def make_mixer(config: MMMambaConfig, part: Any, kind: str, layer_idx: int) -> nn.Module:
        if kind == 'mha':
            return HoVLEAttention(config, part, layer_idx)
        if kind != 'mamba2':
            raise ValueError(f"layer {layer_idx}: layers_block_type {kind!r} is neither 'mamba2' nor 'mha'")
        return Mamba2Mixer(
            part.hidden_size,
            part.num_attention_heads,
            part.num_key_value_heads,
            part.head_dim,
            layer_idx=layer_idx,
            qkv_bias=part.qkv_bias,
            o_bias=part.qkv_bias,
            **(config.mixer_options or {}),
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):
            module.seed_parameters()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        register_layout(cls.config_class.model_type)
        token = problems.set([])
        try:
            return super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            if not problems.get():
                raise
            raise ValueError(f'{args[0]} does not fit {cls.__name__}: {"; ".join(problems.get())}') from error
        finally:
            problems.reset(token)

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers; files have the published keys, whatever keys the model was loaded from."""
        register_layout(self.config_class.model_type)
        self._weight_conversions = None
        super().save_pretrained(*args, **kwargs)


def _accept_published_keys(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    inside = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({prefix + key: value for key, value in split_projections(inside, module).items()})


def student_config(config: HoVLEConfig, linear: Sequence[int], mixer_options: dict | None = None) -> MMMambaConfig:
    """The config of the student of a HoVLE, with the edits of the published converter.

    Args:
        config: the teacher's.
        linear: indices, in the whole stack, of the layers that become 'mamba2'; the others stay 'mha'.
        mixer_options: options of `Mamba2Mixer`.

    Raises:
        ValueError: for an index out of range.
    """
    kinds = ['mha'] * config.num_hidden_layers
    for i in linear:
        if not 0 <= i < len(kinds):
            raise ValueError(f'there is no layer {i}: the model has {len(kinds)}')
        kinds[i] = 'mamba2'
    values = copy.deepcopy(config.to_diff_dict())
    for name in ('model_type', 'dtype'):
        values.pop(name, None)
    first = config.num_embedding_layers
    for name, chosen in (('embedding_config', kinds[:first]), ('llm_config', kinds[first:])):
        values[name].pop('model_type')
        values[name]['layers_block_type'] = chosen
    remote = 'modeling_mmMamba_chat.mmMambaChatModel'
    chat = {'AutoConfig': 'configuration_mmMamba_chat.mmMambaChatConfig', 'AutoModel': remote}
    remote = 'modeling_mmMamba.mmMambaForCausalLM'
    text = {'AutoConfig': 'configuration_mmMamba.mmMambaConfig', 'AutoModel': remote}
    values['auto_map'] = {**chat, 'AutoModelForCausalLM': chat['AutoModel']}
    values['llm_config']['auto_map'] = {**text, 'AutoModelForCausalLM': remote}
    return MMMambaConfig(**values, mixer_options=mixer_options or None, dtype=config.dtype)


@torch.no_grad()
def from_hovle(
    teacher: HoVLEForConditionalGeneration,
    linear: Sequence[int] | None = None,
    *,
    mixer_kwargs: dict[str, Any] | None = None,
    share_frozen: bool = False,
    seed: int = 0,
) -> HoVLELinearForConditionalGeneration:
    """The student of a HoVLE: projections inherited bit for bit, new parameters seeded by mmMamba's recipe.

    Nothing is equivalent at the start: the student has to be distilled.

    Args:
        teacher: a HoVLE; not changed.
        linear: indices of the layers that become linear, all by default; published hybrid: those not divisible by 4.
        mixer_kwargs: options of `Mamba2Mixer`.
        share_frozen: let everything but the mixers share memory with the teacher and not require gradients, for
            distillation; otherwise, and always for the mixers, the student's tensors are copies.
        seed: of the new parameters; a layer's do not depend on which others are linear.

    Returns:
        The student on the teacher's device, in its dtype and mode.
    """
    layers = range(teacher.config.num_hidden_layers) if linear is None else linear
    config = student_config(teacher.config, layers, mixer_kwargs)
    config._attn_implementation = teacher.config._attn_implementation
    with torch.device('meta'):
        student = HoVLELinearForConditionalGeneration(config)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    weights = dict(teacher.named_parameters())
    for i, (target, source) in enumerate(zip(student.layers, teacher.layers)):
        if isinstance(target.attention, Mamba2Mixer):
            target.attention = _seeded(source.attention, target.attention, seed * 100_003 + i, mixer_kwargs or {})
    for name, parameter in list(student.named_parameters()):
        if parameter.is_meta:
            value = weights[name].detach()
            new = nn.Parameter(value if share_frozen else value.clone(), parameter.requires_grad and not share_frozen)
            owner, _, leaf = name.rpartition('.')
            setattr(student.get_submodule(owner), leaf, new)
    for target, source in zip(student.modules_with_rotary(), teacher.modules_with_rotary()):
        target.rotary_emb = copy.deepcopy(source.rotary_emb)
    return student.train(teacher.training)


def _seeded(attention: HoVLEAttention, like: Mamba2Mixer, seed: int, options: dict[str, Any]) -> Mamba2Mixer:
    shape = AttentionShape(
        hidden_size=like.hidden_size,
        num_heads=like.num_heads,
        num_kv_heads=like.num_kv_heads,
        head_dim=like.head_dim,
        layer_idx=like.layer_idx,
        qkv_bias=like.q_proj.bias is not None,
        o_bias=like.o_proj.bias is not None,
    )
    mixer = Mamba2Mixer.like(attention, shape, **options)
    mixer.inherit(attention.projections())
    mixer.seed_parameters(torch.Generator().manual_seed(seed))
    return mixer.train(attention.training)
