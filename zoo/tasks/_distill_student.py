"""The student of a distillation: the teacher's frozen parts with mixers of its own in some layers."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.errors import ZooError
from zoo.tasks._distill_stages import Stage, set_trainable
from zoo.tasks.vlm import Lora

_STUDENT_FILES = '*.safetensors', 'config.json', 'generation_config.json', 'model.safetensors.index.json'


class Student:
    """A linearized copy of the teacher that shares its frozen tensors. Not a module: the task holds what it owns.

    Args:
        teacher: The frozen teacher.
        mixer: Name of the linear mixer.
        kwargs: Arguments of the mixer.
        stage: Whose softmax layers and adapters the student has.
        seed: Seed of the mixers' new parameters.
    """

    def __init__(self, teacher: nn.Module, mixer: str, kwargs: dict[str, Any], stage: Stage, seed: int) -> None:
        from zoo.linearizer import decoder_layers, linearize, mixers

        count = len(decoder_layers(teacher))
        if wrong := [i for i in stage.softmax_layers if not 0 <= i < count]:
            raise ZooError(f'stage {stage.name!r} keeps softmax in layers {wrong}; the teacher has 0 to {count - 1}')
        layers = [i for i in range(count) if i not in stage.softmax_layers]
        if not layers:
            raise ZooError(f'stage {stage.name!r} keeps softmax in every layer: nothing is left to distil')
        self.teacher, self.mixer, self.kwargs, self.stage, self.seed = teacher, mixer, kwargs, stage, seed
        self.model = linearize(teacher, mixer, layers, mixer_kwargs=kwargs, share_frozen=True, seed=seed).eval()
        self.model.requires_grad_(False)
        if stage.lora is not None:
            attach_lora(self.model, stage.lora)
        self.mixers = mixers(self.model)
        inside = {id(p) for m in self.mixers.values() for p in m.parameters()}
        lora = {name: p for name, p in self.model.named_parameters() if '.lora_' in name}
        # adapters inside mixers are the mixers' parameters already
        self.adapters = {name: p for name, p in lora.items() if id(p) not in inside}
        set_trainable(self.mixers, lora.values(), stage)

    def train_adapters(self, mode: bool) -> None:
        """Switches the adapters' dropout, the only part of the student that differs in training."""
        for name, module in self.model.named_modules():
            if name.rsplit('.', 1)[-1] == 'lora_dropout' or '.lora_dropout.' in name:
                module.train(mode)

    def checkpoint_layers(self) -> None:
        """Recomputes decoder layers in the backward pass; transformers does so in layers that are in training mode."""
        from zoo.linearizer import decoder_layers

        self.model.gradient_checkpointing_enable({'use_reentrant': False})
        for layer in decoder_layers(self.model):
            layer.training = True

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that the student owns, by the name that files use."""
        own = {f'mixers.{i}.{name}': p for i, m in self.mixers.items() for name, p in m.named_parameters()}
        return {**own, **{f'adapters.{name}': p for name, p in self.adapters.items()}}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], source: str) -> None:
        """Takes the mixers' weights of an earlier stage; layers that keep softmax here are passed over.

        Args:
            tensors: Parameters by name.
            source: Where they come from, for the message.
        """
        for name, parameter in self.named_parameters().items():
            if '.lora_' in name or name.startswith('adapters.'):
                continue  # starts at zero
            found = tensors.get(name.replace('.base_layer', ''))
            if found is None or found.shape != parameter.shape:
                what = 'lacks' if found is None else f'has another shape {tuple(found.shape)} of'
                raise ZooError(f'{source} {what} {name}: it belongs to another teacher, mixer or set of options')
            parameter.copy_(found)


def attach_lora(model: nn.Module, lora: Lora) -> None:
    """Puts peft's adapters beside the named linear layers, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ZooError("LoRA needs peft. Type: pip install 'linear-zoo[vlm]'") from error
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ZooError(f'lora.targets {lora.targets}: {error}') from error
    if '.lora_' in ' '.join(name for name, _ in model.get_output_embeddings().named_parameters(prefix='.')):
        raise ZooError('lora.targets takes in the output embeddings, which stay frozen: name the layers instead')


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters to the weights they stand beside and removes them; shared weights are copied before."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, base)


def export(model: nn.Module, folder: Path, extras: Path | None) -> None:
    """Writes a finished student as a transformers folder, whole or not at all.

    Args:
        model: The student.
        folder: Target; replaced if it is there.
        extras: The teacher's folder, whose tokenizer and processor files come along.
    """
    staged = folder.with_name(f'.{folder.name}.tmp-{os.getpid()}')
    shutil.rmtree(staged, ignore_errors=True)
    try:
        model.save_pretrained(staged)
        for file in sorted(extras.iterdir()) if extras else []:
            if file.is_file() and not (staged / file.name).exists() and not _is_weights(file):
                shutil.copyfile(file, staged / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staged, folder)
    except OSError as error:
        raise ZooError(f'cannot write {folder}: {error}') from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_weights(file: Path) -> bool:
    return any(file.match(pattern) for pattern in _STUDENT_FILES) or file.suffix in ('.bin', '.pt', '.ckpt')


def rebuild(student: Student, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model of its own with the given parameters, adapters merged: what is evaluated and saved in the end."""
    fresh = Student(student.teacher, student.mixer, student.kwargs, student.stage, student.seed)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters().items():
            parameter.copy_(tensors[name])
    if student.stage.lora is not None:
        merge_lora(fresh.model)
    return fresh.model.requires_grad_(False).eval()


# output heads without their logits


def output_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last linear layer of a decoder with what the model does to its output."""
    head = model.get_output_embeddings()
    if head is None:
        raise ZooError(f'{type(model).__name__} has no output embeddings: it is not a language model')
    text = model.config.get_text_config(decoder=True)
    cap = getattr(text, 'final_logit_softcapping', None)
    if cap is None:
        return head
    return lambda hidden: torch.tanh(head(hidden) / cap) * cap


@contextlib.contextmanager
def caught_hidden(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what the output head reads, (B, L, hidden), and lets it compute one position only."""
    caught: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def hidden_states(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What the model's output head reads for these inputs, (B, L, hidden)."""
    with caught_hidden(model) as caught:
        model(**inputs, use_cache=False)
    return caught[0]


def parameter_rows(student: Student) -> list[tuple[str, int, int]]:
    """(kind, trainable, all) parameter counts: mixers by role, adapters, and the frozen rest of the model."""
    from zoo.tasks._distill_stages import role_of

    rows: dict[str, list[int]] = {}
    for mixer in student.mixers.values():
        roles = {k.replace('.base_layer', ''): v for k, v in mixer.parameter_roles().items()}
        for name, p in mixer.named_parameters():
            row = rows.setdefault(role_of(name, roles), [0, 0])
            row[0] += p.numel() * p.requires_grad
            row[1] += p.numel()
    for p in student.adapters.values():
        row = rows.setdefault('lora', [0, 0])
        row[0] += p.numel() * p.requires_grad
        row[1] += p.numel()
    own = {id(p) for p in student.named_parameters().values()}
    rows['frozen (teacher)'] = [0, sum(p.numel() for p in student.model.parameters() if id(p) not in own)]
    return [(kind, *counts) for kind, counts in rows.items()]


def about(student: Student) -> dict[str, Any]:
    """What hand-over files and checkpoints say about the student: enough to refuse those of another."""
    text = student.teacher.config.get_text_config(decoder=True)
    sizes = [getattr(text, k, None) for k in ('num_hidden_layers', 'hidden_size', 'num_attention_heads', 'vocab_size')]
    return {
        'stage': student.stage.name,
        'mixer': student.mixer,
        'mixer_kwargs': student.kwargs,
        'teacher': ' x '.join([student.teacher.config.model_type, *map(str, sizes)]),
        'softmax_layers': student.stage.softmax_layers,
        'lora': asdict(student.stage.lora) if student.stage.lora else None,
    }
