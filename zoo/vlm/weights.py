"""Weights of mmMamba from files: those of distillation stages, merged into a student and written as published.

    from zoo.vlm.weights import convert_checkpoint

    convert_checkpoint('OpenGVLab/HoVLE', ['stage2.pt', 'stage3.pt'], 'mmMamba-hybrid', softmax=range(0, 32, 4))

A file of the published trainer's stage 3 lacks `dt_bias` and `A_log_bias`, which only the stages before train: give the
file of stage 2 first. Published and module key names are both read (`zoo.backbones._mmmamba_layout`).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.backbones._mixer import Mixer
from zoo.backbones._mmmamba_layout import merge_projections, split_projections
from zoo.backbones.mmmamba import HoVLELinearForConditionalGeneration, from_hovle
from zoo.errors import ZooError

__all__ = ['convert_checkpoint', 'load_weights', 'merge_projections', 'read_weights', 'split_projections']

_WRAPPERS = ('model_state_dict', 'state_dict')
_MIXER = re.compile(r'mixers\.(\d+)\.(.+)')


def read_weights(source: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by key, on the CPU.

    Args:
        source: a safetensors file, a file of torch.save (with or without `model_state_dict` or `state_dict` around the
            tensors), or a folder with safetensors in one file or in shards.

    Raises:
        ZooError: for a file that is missing, cut off or holds no tensors, naming it.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ZooError(f'no such checkpoint: {path}')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ZooError(f'{path} is cut off, damaged or no checkpoint: {str(error).splitlines()[0]}') from error
    while isinstance(state, dict) and (inner := next((w for w in _WRAPPERS if w in state), None)):
        state = state[inner]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ZooError(f'{path} holds no weights')
    return tensors


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / 'model.safetensors.index.json'
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
        if lacking := [name for name in names if not (folder / name).is_file()]:
            raise ZooError(f'{folder} lacks {", ".join(lacking)}, which its index names: download it again')
    else:
        names = sorted(file.name for file in folder.glob('*.safetensors'))
    if not names:
        raise ZooError(f'{folder} holds no safetensors files')
    state: dict[str, Tensor] = {}
    for name in names:
        state.update(read_weights(folder / name))
    return state


@torch.no_grad()
def load_weights(model: HoVLELinearForConditionalGeneration, *sources: str | os.PathLike) -> None:
    """Fill a student's mixers, and whatever else the files hold, in place.

    Args:
        model: the student.
        sources: files or folders in the order of the stages; a later one wins. Mixers of layers that are softmax in
            `model` are passed over.

    Raises:
        ZooError: if a key is unknown, a shape differs, or a mixer is not complete, naming keys; nothing is changed.
    """
    state: dict[str, Tensor] = {}
    for source in sources:
        state.update(_in_module_names(read_weights(source), model, source))
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    softmax = tuple(f'{name}.' for name, m in _mixers(model) if not isinstance(m, Mixer))
    unknown = [k for k in state if k not in shapes and not k.startswith(softmax)]
    if unknown:
        raise ZooError(f'{_list(sources)}: keys that the model does not have: {_list(sorted(unknown))}')
    state = {k: v for k, v in state.items() if k in shapes}
    other = [f'{k} {tuple(v.shape)}, not {tuple(shapes[k])}' for k, v in state.items() if v.shape != shapes[k]]
    if other:
        raise ZooError(f'{_list(sources)}: weights of another size: {_list(other, "; ")}')
    needed = [
        f'{name}.{parameter}'
        for name, mixer in _mixers(model)
        if isinstance(mixer, Mixer)
        for parameter, role in mixer.parameter_roles().items()
        if role != 'output'
    ]
    if missing := [k for k in needed if k not in state]:
        hint = ''
        if all(k.endswith(('dt_bias', 'A_log_bias')) for k in missing):
            hint = '\nThe last stage does not train these: give the file of the stage before it first'
        raise ZooError(f'{_list(sources)}: {len(missing)} keys are missing: {_list(missing)}{hint}')
    targets = model.state_dict()
    for key, value in state.items():
        targets[key].copy_(value)


def _mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Full name and token mixer of every layer of the whole stack."""
    first = [(f'embedding_model.encoder.{i}', layer) for i, layer in enumerate(model.embedding_model.encoder)]
    rest = [(f'language_model.model.layers.{i}', layer) for i, layer in enumerate(model.language_model.model.layers)]
    return [(f'{name}.attention', layer.attention) for name, layer in first + rest]


def _in_module_names(state: dict[str, Tensor], model: nn.Module, source: str | os.PathLike) -> dict[str, Tensor]:
    names = [name for name, _ in _mixers(model)]
    for prefix in ('module.', '_orig_mod.'):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    out = {}
    for key, value in state.items():
        if found := _MIXER.fullmatch(key):  # files of `zoo`'s own stages count layers over the whole stack
            if int(found[1]) >= len(names):
                raise ZooError(f'{source}: {key} belongs to layer {found[1]}; the model has {len(names)}')
            key = f'{names[int(found[1])]}.{found[2]}'
        out[key] = value
    try:
        return split_projections(out, model)
    except ValueError as error:
        raise ZooError(f'{source}: {error}') from error


def _list(names: Iterable, separator: str = ', ', limit: int = 4) -> str:
    names = [str(name) for name in names]
    return separator.join(names[:limit]) + (f'{separator}... ({len(names)} in all)' if len(names) > limit else '')


def convert_checkpoint(
    teacher: str | os.PathLike,
    sources: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    softmax: Iterable[int] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a distilled student as a folder of the published layout, with the teacher's tokenizer and processor files.

    Args:
        teacher: folder of the HoVLE that was distilled, or its hub name.
        sources: files of the stages, see `load_weights`.
        folder: target; must not exist, and appears whole or not at all.
        softmax: indices, in the whole stack, of the layers that keep softmax attention.
        dtype: of the written weights.

    Returns:
        The folder.

    Raises:
        ZooError: for files that do not fit, or a target that exists.
    """
    from transformers import AutoModelForImageTextToText

    target = Path(folder)
    if target.exists():
        raise ZooError(f'{target} is there already: choose another folder or remove it')
    try:
        model = AutoModelForImageTextToText.from_pretrained(teacher, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ZooError(f'cannot load the teacher {teacher}: {error}') from error
    softmax = set(softmax)
    linear = [i for i in range(model.config.num_hidden_layers) if i not in softmax]
    if softmax - set(range(model.config.num_hidden_layers)):
        raise ZooError(f'softmax layers {sorted(softmax)}: the model has {model.config.num_hidden_layers} layers')
    student = from_hovle(model, linear, share_frozen=True)
    load_weights(student, *sources)
    staged = target.with_name(f'.{target.name}.tmp-{os.getpid()}')
    try:
        student.save_pretrained(staged)
        for file in Path(teacher).glob('*') if Path(teacher).is_dir() else []:
            if file.is_file() and file.suffix in ('.json', '.model', '.txt', '.jinja') and 'index' not in file.name:
                if not (staged / file.name).exists():
                    shutil.copyfile(file, staged / file.name)
        os.replace(staged, target)
    except OSError as error:
        raise ZooError(f'cannot write {target}: {error}') from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target
