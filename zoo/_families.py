"""Which transformers models can be linearised, and the classes that their students are saved and loaded under.

A student of a LLaVA is a `LinearizedLlavaForConditionalGeneration` with the model type `linearized_llava`: the
library's own class, whose constructor puts mixers in the place of the attention layers that `config.linearizer` names.
Importing this module creates the classes and tells transformers' Auto classes of them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from zoo.backbones._mixer import AttentionShape, Mixer
from zoo.backbones._state import attach_padding
from zoo.errors import ZooError

__all__ = ['FAMILIES', 'attention_shape', 'check_teacher', 'decoder_layers', 'install', 'register', 'student_class']

VERSION = 1

# Model type to the class with the language model's head. No name may contain 'mamba': `generate` treats such classes
# in a way of its own.
FAMILIES = {
    'gemma3': 'Gemma3ForConditionalGeneration',
    'idefics3': 'Idefics3ForConditionalGeneration',
    'internvl': 'InternVLForConditionalGeneration',
    'llava': 'LlavaForConditionalGeneration',
    'llava_onevision': 'LlavaOnevisionForConditionalGeneration',
    'paligemma': 'PaliGemmaForConditionalGeneration',
    'qwen2_5_vl': 'Qwen2_5_VLForConditionalGeneration',
    'qwen2_vl': 'Qwen2VLForConditionalGeneration',
    'qwen3_vl': 'Qwen3VLForConditionalGeneration',
    'smolvlm': 'SmolVLMForConditionalGeneration',
    'llama': 'LlamaForCausalLM',
    'mistral': 'MistralForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
}

_MLA = 'its attention keeps compressed keys and values (MLA): there are no key and value heads to inherit'
_SINKS = 'its softmax has attention sinks, which a linear state does not have'
_SHARED = 'some of its layers read the keys and values of others'
_LINEAR = 'most of its layers are linear already (gated delta rule)'
_CROSS = 'it reads images through cross-attention layers rather than in the sequence'
REFUSED = {
    'deepseek_v2': _MLA,
    'deepseek_v3': _MLA,
    'deepseek_vl': 'its text model is chosen by its config; linearise a LLaVA or Qwen family instead',
    'deepseek_vl_v2': _MLA,
    'gemma3n': _SHARED,
    'gemma4': _SHARED,
    'gpt_oss': _SINKS,
    'kimi_k25': _MLA,
    'kimi_vl': _MLA,
    'mllama': _CROSS,
    'qwen3_5': _LINEAR,
    'qwen3_5_moe': _LINEAR,
    'qwen3_next': _LINEAR,
}

_PROJECTIONS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the text decoder, in the order of their cache slots.

    Args:
        model: a transformers model with its head, a native HoVLE or mmMamba, or PEFT's wrapper of one. The eight
            embedding layers of HoVLE and mmMamba come first.

    Raises:
        ZooError: if there is no decoder with `layers`.
    """
    model = unwrapped(model)
    if hasattr(model, 'embedding_model') and hasattr(model, 'language_model'):
        return [*model.embedding_model.encoder, *model.language_model.model.layers]
    inner = getattr(model, 'model', model)
    for name in ('language_model', 'text_model'):
        inner = getattr(inner, name, inner)
    layers = getattr(inner, 'layers', None)
    if not isinstance(layers, nn.ModuleList):
        raise ZooError(
            f'{type(model).__name__} has no text decoder with `layers`; give the whole model, e.g. from '
            'AutoModelForImageTextToText.from_pretrained(...)'
        )
    return list(layers)


def attention_name(layer: nn.Module) -> str:
    """The attribute of a decoder layer that holds its attention, or what replaced it."""
    return 'self_attn' if hasattr(layer, 'self_attn') else 'attention'


def attention_shape(attention: nn.Module, layer_idx: int) -> AttentionShape:
    """The sizes of a softmax attention module, from its projections.

    Raises:
        ZooError: if it is not attention with separate linear q, k, v and o projections.
    """
    what = f'layer {layer_idx} ({type(attention).__name__})'
    for name in _PROJECTIONS:
        if not isinstance(getattr(attention, name, None), nn.Linear):
            found = type(getattr(attention, name, None)).__name__
            raise ZooError(f'{what} cannot be linearised: `{name}` must be a Linear layer, found {found}')
        if getattr(attention, name).weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ZooError(f'{what} is quantized: load the teacher in bfloat16 or float32')
    if getattr(attention, 'sinks', None) is not None:
        raise ZooError(f'{what} cannot be linearised: {_SINKS}')
    q, k, v, o = (getattr(attention, name) for name in _PROJECTIONS)
    dim = attention.head_dim
    if k.out_features != v.out_features or q.out_features != o.in_features or q.out_features % dim:
        raise ZooError(
            f'{what} cannot be linearised: its projections give {q.out_features} query, {k.out_features} key, '
            f'{v.out_features} value channels and read {o.in_features}, for heads of {dim}'
        )
    _check_kept(attention, what, dim)
    if (q.bias is None) != (k.bias is None) or (q.bias is None) != (v.bias is None):
        raise ZooError(f'{what} cannot be linearised: only some of its q, k, v projections have a bias')
    return AttentionShape(
        hidden_size=q.in_features,
        num_heads=q.out_features // dim,
        num_kv_heads=k.out_features // dim,
        head_dim=dim,
        layer_idx=layer_idx,
        qkv_bias=q.bias is not None,
        o_bias=o.bias is not None,
        scaling=getattr(attention, 'scaling', None),
    )


def _check_kept(attention: nn.Module, what: str, dim: int) -> None:
    """Refuses attention with weights that no mixer would inherit, or norms over more than one head."""
    known = (*_PROJECTIONS, 'q_norm', 'k_norm')
    others = {name for name, p in attention.named_parameters() if name.split('.')[0] not in known}
    if others:
        raise ZooError(f'{what} cannot be linearised: no mixer has a place for its {", ".join(sorted(others))}')
    for name in ('q_norm', 'k_norm'):
        norm = getattr(attention, name, None)
        wrong = [tuple(p.shape) for p in norm.parameters() if p.shape != (dim,)] if norm is not None else []
        if wrong:
            raise ZooError(f'{what} cannot be linearised: its {name} has weights {wrong[0]}, not one for each of {dim}')


def mark_linear(model: nn.Module, linear: list[int]) -> None:
    """Write into a student's config which of its layers are linear; a native mmMamba reads that in every pass."""
    config = unwrapped(model).config
    if getattr(config, 'linearizer', None):
        config.linearizer = config.linearizer | {'layers': sorted(linear)}
    elif hasattr(config, 'num_embedding_layers'):
        kinds = ['mamba2' if i in linear else 'mha' for i in range(config.num_hidden_layers)]
        config.embedding_config.layers_block_type = kinds[: config.num_embedding_layers]
        config.llm_config.layers_block_type = kinds[config.num_embedding_layers :]


def check_teacher(model: Any) -> type[PreTrainedModel]:
    """The class of the model's student.

    Raises:
        ZooError: if the model cannot be linearised, with the reason.
    """
    if hasattr(model, 'get_base_model'):
        raise ZooError('the teacher is wrapped by PEFT: merge its adapters first, teacher = teacher.merge_and_unload()')
    if not isinstance(model, PreTrainedModel):
        raise ZooError(f'the teacher must be a loaded transformers model, got {type(model).__name__}')
    kind = model.config.model_type
    if kind.startswith('linearized_'):
        raise ZooError('the teacher is linearised already: start from the softmax model')
    for name in (kind, model.config.get_text_config(decoder=True).model_type):
        reason = REFUSED.get(name.removesuffix('_text'))
        if reason:
            raise ZooError(f'{kind} cannot be linearised: {reason}')
    if kind not in FAMILIES:
        raise ZooError(f'{kind} is not among the families that can be linearised: {", ".join(sorted(FAMILIES))}')
    if not isinstance(model, getattr(transformers, FAMILIES[kind])):
        raise ZooError(
            f'the teacher must be a {FAMILIES[kind]}, the model with its head, got {type(model).__name__}: '
            f'load it with {_auto_class(kind).__name__}.from_pretrained(...)'
        )
    if getattr(model, 'is_quantized', False) or getattr(model, 'hf_quantizer', None) is not None:
        raise ZooError('the teacher is quantized: load it in bfloat16 or float32')
    return student_class(kind)


def install(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Put mixers, their weights not inherited, where `recipe` (a student's `config.linearizer`) names them.

    Raises:
        ZooError: if the recipe comes from another version of the package or does not fit the model.
    """
    from zoo.backbones._mixers import MIXERS

    if recipe.get('version') != VERSION or recipe.get('mixer') not in MIXERS:
        raise ZooError(
            f'config.linearizer has version {recipe.get("version")} and mixer {recipe.get("mixer")!r}; this package '
            f'reads version {VERSION} with one of {", ".join(MIXERS)}: install the linear-zoo that saved the model'
        )
    layers = decoder_layers(model)
    for i in recipe['layers']:
        if not 0 <= i < len(layers):
            raise ZooError(f'config.linearizer names layer {i} of a decoder with {len(layers)} layers')
        name = attention_name(layers[i])
        attention = getattr(layers[i], name)
        mixer = MIXERS[recipe['mixer']].like(attention, attention_shape(attention, i), **recipe['mixer_kwargs'])
        if next(mixer.parameters()).device.type != 'meta':
            mixer.seed_parameters(torch.Generator().manual_seed(i))
        setattr(layers[i], name, mixer)
    attach_padding(model)


class _Linearized:
    """What a student's class adds to its teacher's."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if getattr(config, 'linearizer', None):
            install(self, config.linearizer)

    @torch.no_grad()
    def initialize_weights(self):
        """Seeds what a checkpoint lacks of a mixer; transformers, which marks what it has read, does the rest."""
        for mixer in self.modules():
            parameters = list(mixer.parameters()) if isinstance(mixer, Mixer) else []
            if all(getattr(p, '_is_hf_initialized', False) for p in parameters):
                continue
            read = {p: p.clone() for p in parameters if getattr(p, '_is_hf_initialized', False)}
            mixer.seed_parameters(torch.Generator().manual_seed(mixer.layer_idx))
            for parameter, value in read.items():
                parameter.copy_(value)
            roles = mixer.parameter_roles()
            for name, parameter in mixer.named_parameters():
                parameter._is_hf_initialized = roles[name] == 'new' or parameter in read
        super().initialize_weights()


def _auto_class(kind: str):
    return AutoModelForCausalLM if FAMILIES[kind].endswith('ForCausalLM') else AutoModelForImageTextToText


def student_class(kind: str) -> type[PreTrainedModel]:
    """The class of the students of the family `kind`, e.g. `llava`."""
    return globals()[f'Linearized{FAMILIES[kind]}']


def register() -> None:
    """Create the students' classes and register them with transformers; calling it again changes nothing."""
    for kind, name in FAMILIES.items():
        if f'Linearized{name}' in globals():
            continue
        base = getattr(transformers, name)
        new = {'model_type': f'linearized_{kind}', '__module__': __name__}
        config = type(f'Linearized{base.config_class.__name__}', (base.config_class,), new)
        model = type(f'Linearized{name}', (_Linearized, base), {'config_class': config, '__module__': __name__})
        globals().update({config.__name__: config, model.__name__: model})  # where pickle looks for them
        AutoConfig.register(config.model_type, config)
        _auto_class(kind).register(config, model)
        # Files keep the key names of the teacher's family, which can differ from the modules' names.
        mapping = get_checkpoint_conversion_mapping(kind)
        if mapping is not None:
            register_checkpoint_conversion_mapping(config.model_type, mapping)


importlib.import_module('zoo.backbones._mixers')
register()
