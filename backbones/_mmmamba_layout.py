"""The published key layout of mmMamba's layers, as a transform of loading and saving.

Modules keep the projections apart, because training treats them differently; files hold them as one matrix:

    attention.wvkqgdt.weight           = rows of v_proj, k_proj, q_proj, g_proj, in_proj, in this order
    attention.g_norm_swish_gate.weight = g_norm.weight

conv1d, dt_bias, A_log_bias and o_proj keep their names. Source: `change_weight` of hustvl/mmMamba at 85143d03, and the
sizes of the files at hustvl/mmMamba-linear and -hybrid on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

__all__ = ['PROJECTIONS', 'merge_projections', 'register_layout', 'split_projections']

PROJECTIONS = ('v_proj', 'k_proj', 'q_proj', 'g_proj', 'in_proj')
# why merged matrices could not be split, in the loading that is running
problems: ContextVar[list[str]] = ContextVar('problems', default=[])  # noqa: B039
_MERGED, _NORM, _PUBLISHED_NORM = 'wvkqgdt.weight', 'g_norm.weight', 'g_norm_swish_gate.weight'


def merge_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the keys of modules as one with the published keys; other layers' keys stay."""
    out = dict(state)
    for key in state:
        prefix, found, rest = key.rpartition('in_proj.weight')
        if not found or rest:
            continue
        parts = [out.pop(f'{prefix}{name}.weight', None) for name in PROJECTIONS]
        out[prefix + _MERGED] = torch.cat([part for part in parts if part is not None])
        if prefix + _NORM in out:
            out[prefix + _PUBLISHED_NORM] = out.pop(prefix + _NORM)
    return out


def split_projections(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict with published keys as one with the keys of `module`; other keys stay.

    Args:
        state: tensors by key, relative to `module`; left as it is.
        module: a model, or one of its layers' mixers, whose parameters tell how many rows belong to which projection.

    Raises:
        ValueError: if a merged matrix has another number of rows than the projections of its layer.
    """
    out, sizes = dict(state), {name: p.shape for name, p in module.named_parameters()}
    for key in state:
        prefix, found, rest = key.rpartition(_MERGED)
        names = [f'{prefix}{name}.weight' for name in PROJECTIONS]
        names = [name for name in names if name in sizes]
        if found and not rest and names:
            rows = [sizes[name][0] for name in names]
            out.update(zip(names, _split(out.pop(key), rows, key)))
        prefix, found, rest = key.rpartition(_PUBLISHED_NORM)
        if found and not rest:
            out[prefix + _NORM] = out.pop(key)
        for name in ('q', 'k'):  # `use_qknorm`'s; here those names belong to norms of the teacher's
            ours = key.replace(f'{name}_norm.', f'{name}_layer_norm.')
            if key in out and ours in sizes and key not in sizes:
                out[ours] = out.pop(key)
    return out


def _split(merged: Tensor, rows: list[int], key: str) -> tuple[Tensor, ...]:
    if merged.shape[0] != sum(rows):
        raise ValueError(f'{key} has {merged.shape[0]} rows; v, k, q, g and dt of this config need {rows}: {sum(rows)}')
    return merged.split(rows)


class _SplitRows(ConversionOps):
    """wvkqgdt to the projections that the model has, by their row counts."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, **kwargs) -> dict[str, Tensor]:
        tensor = next(iter(input_dict.values()))
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        key, first, model = kwargs['full_layer_name'], target_patterns[0], kwargs['model']
        known = dict(model.named_parameters())
        targets = [t for t in target_patterns if key.replace(first, t) in known]
        rows = [known[key.replace(first, t)].shape[0] for t in targets]
        try:
            parts = _split(tensor, rows, key.replace(first, source_patterns[0]))
        except ValueError as error:
            problems.get().append(str(error))  # transformers logs what happens here and raises without the reason
            raise
        # copies: views would keep the merged matrix alive beside projections that later move or change dtype
        return {t: part.clone() for t, part in zip(targets, parts)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _JoinRows()


class _JoinRows(ConversionOps):
    """The projections, in the order of the patterns, to wvkqgdt."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns, target_patterns, **kwargs) -> dict[str, Tensor]:
        parts = [input_dict[p] for p in source_patterns if p in input_dict]
        return {target_patterns[0]: torch.cat([p[0] if isinstance(p, list) else p for p in parts])}

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitRows()


def register_layout(model_type: str) -> None:
    """Tell `from_pretrained` and `save_pretrained` of the layout; calling it again changes nothing."""
    if get_checkpoint_conversion_mapping(model_type) is not None:
        return
    projections = [f'attention.{name}.weight' for name in PROJECTIONS]
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightRenaming(f'attention.{_PUBLISHED_NORM}', f'attention.{_NORM}'),
            WeightConverter(f'attention.{_MERGED}', projections, [_SplitRows()]),
        ],
    )
