"""The teacher of a distillation: found, trained first if it is a recipe, loaded, and checked against the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

import zoo
from zoo.data.chat import check_tokens
from zoo.errors import RunError, ZooError

MODEL = 'model'  # the folder that a run of zoo.tasks.FinetuneVLM or TrainUNet leaves
_LAUNCHER = (
    'LOCAL_RANK',
    'RANK',
    'WORLD_SIZE',
    'LOCAL_WORLD_SIZE',
    'NODE_RANK',
    'GROUP_RANK',
    'MASTER_ADDR',
    'MASTER_PORT',
)


def is_recipe(name: str) -> bool:
    """Whether a teacher is given as the config of a run that trains it."""
    return name.endswith(('.yaml', '.yml'))


def prepare_teacher(name: str, root: Path, trainer: Trainer, arguments: list[str], index: str = 'config.json') -> Path:
    """The teacher's folder; a recipe is run first, by the first process, unless it has been.

    Args:
        name: Folder, hub name of a transformers model, or YAML file.
        root: Where run folders are: the teacher's becomes a neighbour of the student's.
        trainer: The student's trainer.
        arguments: Command line of the teacher's run, behind its config.
        index: The file that a finished model's folder has.
    """
    if not is_recipe(name):
        return find_folder(name)
    stem = Path(name).stem
    if trainer.is_global_zero and finished(root, stem, index) is None:
        train_teacher(name, root, arguments)
    trainer.strategy.barrier()
    folder = finished(root, stem, index)
    if folder is None:
        raise RunError(f'the teacher of {name} was not finished: no {root / stem / MODEL}')
    if trainer.is_global_zero:
        print(f'teacher: {folder}/  (delete {folder.parent}/ to train it anew)', flush=True)
    return folder


def finished(root: Path, stem: str, index: str) -> Path | None:
    """The newest finished model among the runs STEM, STEM-2, ... in `root`."""
    found = [p.parent for p in root.glob(f'{stem}*/{MODEL}/{index}')]
    found = [p for p in found if p.parent.name == stem or p.parent.name.removeprefix(f'{stem}-').isdigit()]
    return max(found, key=lambda p: p.stat().st_mtime_ns, default=None)


def train_teacher(name: str, root: Path, arguments: list[str]) -> None:
    """Runs the teacher's recipe in a process of its own, going on where a former try was interrupted."""
    from zoo.runs import resolve_config

    stem = Path(name).stem
    command = [sys.executable, '-m', 'zoo', 'fit', '--config', str(resolve_config(name)), '--run.root', str(root)]
    command += ['--run.name', stem, '--ckpt_path', 'last', *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith('PL_')}
    source = str(Path(zoo.__file__).resolve().parents[1])
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [source, environment.get('PYTHONPATH')]))
    print(f'training the teacher first: {name}', flush=True)
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise RunError(f'training the teacher failed (exit code {code}); try it alone: zoo fit --config {name}')


def find_folder(name: str) -> Path:
    """A transformers folder from its path or hub name."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / 'config.json').is_file():
            raise ZooError(f'{folder} is no transformers folder: it has no config.json')
        return folder
    if name.count('/') != 1 or name.startswith(('.', '/')):
        raise ZooError(f'no teacher at {name}: give a transformers folder, a hub name, or the YAML of a run')
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=['*.bin', '*.pt', '*.h5', '*.msgpack', '*.gguf']))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ZooError(f'no teacher {name!r}: no such folder, and the hub says: {reason}') from error


def load_teacher(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The teacher with attention by torch's scaled_dot_product_attention, frozen, on the CPU.

    Args:
        folder: A transformers folder.
        dtype: Of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    import zoo.vlm  # noqa: F401  registers the zoo's models

    try:
        config = AutoConfig.from_pretrained(folder)
        known = type(config) in AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if known else AutoModelForCausalLM
        model = auto.from_pretrained(folder, config=config, dtype=dtype, attn_implementation='sdpa')
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ZooError(f'cannot load the teacher from {folder}: {error}') from error
    return model.requires_grad_(False).eval()


def check_data(teacher: nn.Module, folder: Path, data: Any) -> None:
    """Raises ZooError where the data's tokens are not the teacher's.

    Args:
        teacher: The teacher.
        folder: Its transformers folder.
        data: The data module; its processor is compared with the one in the folder.
    """
    check_tokens(data.processor, teacher.config)
    vocabulary = data.processor.tokenizer.get_vocab()
    theirs = teachers_vocabulary(folder)
    if theirs is None or theirs == vocabulary:
        return
    wrong = next(token for token in {**theirs, **vocabulary} if theirs.get(token) != vocabulary.get(token))
    raise ZooError(
        f"the data's tokenizer is not the teacher's: token {wrong!r} is {vocabulary.get(wrong)} in the data and "
        f'{theirs.get(wrong)} in {folder}'
    )


def teachers_vocabulary(folder: Path) -> dict[str, int] | None:
    """Tokens and ids of the tokenizer in a transformers folder; None if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, KeyError):
        return None
