"""The stages of a distillation: their settings, their place in the run, what they train, and their hand-over files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from zoo.errors import ZooError
from zoo.tasks.optim import Optim, as_dataclass
from zoo.tasks.vlm import Lora

STAGES = 'stages'  # folder of hand-over files in a run folder
_FOLDERS = (STAGES, 'checkpoints', 'report', 'tensorboard')
ROLES = ('new', 'qkv', 'output', 'lora')


@dataclass
class StageOptim(Optim):
    """The optimizer of a stage; no weight decay on parameters with `bias` in their name (dt_bias and A_log_bias too).

    Args:
        name: A timm optimizer, see timm.optim.list_optimizers().
        lr: Learning rate.
        lr_per: lr is multiplied by total batch / lr_per; null takes it as it is.
        weight_decay: Weight decay.
        layer_decay: Not used here.
        betas: Momentum coefficients, where the optimizer has them.
        eps: Denominator offset, where the optimizer has one.
        options: Further arguments of the optimizer.
    """

    lr_per: int | None = None


@dataclass
class Wsd:
    """Linear warm-up, constant, cosine to zero, in optimizer steps (transformers' get_wsd_schedule).

    Args:
        warmup: Steps of the warm-up.
        stable: Steps at the full learning rate; null takes what the stage leaves.
        decay: Steps of the decay.
    """

    warmup: int = 0
    stable: int | None = None
    decay: int = 0


@dataclass
class Stage:
    """One stage.

    Args:
        name: Names its hand-over file and, for a logits stage, the folder of the finished student.
        loss: heads compares head outputs layer by layer on the teacher's inputs, logits whole models end to end.
        train: Which of the student's parameters: new (the mixer's own), qkv, output (o_proj), lora.
        freeze: Parameters of the mixers to leave out, by the last part of their names (such as dt_bias).
        max_steps: Optimizer steps.
        optim: Optimizer.
        wsd: Learning rate over the stage's steps.
        softmax_layers: Layers that keep the teacher's attention, by index.
        start_from: The earlier stage whose weights this one goes on from; null is the stage before it in the list.
        accumulate: Batches per optimizer step; null is the trainer's accumulate_grad_batches.
        positions: What counts in the loss: tokens leaves padding out, all includes it (as mmMamba does), answers
            (logits stages) takes the positions that predict a labelled token.
        scale: Factor of the mean squared error of a heads stage.
        kl_reduction: token is the mean over positions; sum divides the sum over positions by the batch size, which
            lets the gradient grow with the length (published).
        kl_weight: Factor of the KL of a logits stage.
        ce_weight: Factor of the labels' cross-entropy of a logits stage.
        lora: Adapters of a logits stage, which go into the student's weights at the end; `train` lists lora then.
    """

    name: str
    loss: Literal['heads', 'logits'] = 'heads'
    train: list[str] = field(default_factory=lambda: ['new'])
    freeze: list[str] = field(default_factory=list)
    max_steps: int = 1000
    optim: StageOptim = field(default_factory=StageOptim)
    wsd: Wsd = field(default_factory=Wsd)
    softmax_layers: list[int] = field(default_factory=list)
    start_from: str | None = None
    accumulate: int | None = None
    positions: Literal['all', 'tokens', 'answers'] = 'tokens'
    scale: float = 1000.0
    kl_reduction: Literal['token', 'sum'] = 'token'
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        self.optim, self.wsd, self.lora = (
            as_dataclass(StageOptim, self.optim),
            as_dataclass(Wsd, self.wsd),
            as_dataclass(Lora, self.lora),
        )
        self.softmax_layers = sorted(set(self.softmax_layers))

    def check(self) -> None:
        """Raises ZooError for settings that contradict each other."""
        where = f'stage {self.name!r}'
        if not self.name or set(self.name) & set('/\\') or self.name in _FOLDERS:
            raise ZooError(f'{where}: the name becomes a folder of the run; taken: {", ".join(_FOLDERS)}')
        if unknown := set(self.train) - set(ROLES):
            raise ZooError(f'{where} trains {sorted(unknown)}; roles are {", ".join(ROLES)}')
        if self.max_steps < 1 or min(self.wsd.warmup, self.wsd.decay, self.wsd.stable or 0) < 0:
            raise ZooError(f'{where}: max_steps is at least 1, the steps of wsd at least 0')
        if self.wsd.stable is None and self.wsd.warmup + self.wsd.decay > self.max_steps:
            raise ZooError(f'{where}: warm-up and decay together are longer than its {self.max_steps} steps')
        if self.loss == 'heads' and (self.softmax_layers or self.lora or self.positions == 'answers'):
            raise ZooError(f'{where}: softmax_layers, lora and positions: answers belong to logits stages')
        if ('lora' in self.train) != (self.lora is not None):
            raise ZooError(f'{where}: training lora takes both `lora` in train and the settings `lora: {{r: 8}}`')


class Plan:
    """The stages of a run in order.

    Args:
        stages: All stages of the recipe.
        only: Run this one alone.
        start_from: A hand-over file that the first stage to be run goes on from.
        from_scratch: Whether stages may start without their predecessor's weights.
    """

    def __init__(
        self,
        stages: list[Stage],
        only: str | None = None,
        start_from: str | None = None,
        from_scratch: bool = False,
    ) -> None:
        if not stages:
            raise ZooError('no stages: give model.stages a list')
        names = [stage.name for stage in stages]
        if len(set(names)) < len(names):
            raise ZooError(f'stages need names of their own: {", ".join(names)}')
        for stage in stages:
            stage.check()
        self.recipe = {stage.name: stage for stage in stages}
        self.before: dict[str, str | None] = {}
        for place, stage in enumerate(stages):
            before = stage.start_from or (names[place - 1] if place else None)
            if stage.start_from and stage.start_from not in names[:place]:
                raise ZooError(f'stage {stage.name!r} starts from {stage.start_from!r}, which is no earlier stage')
            if before and self.recipe[before].lora:
                raise ZooError(f'stage {stage.name!r} cannot go on from {before!r}: LoRA belongs to the last stage')
            self.before[stage.name] = before
        if only is not None and only not in names:
            raise ZooError(f'no stage {only!r}; the stages are {", ".join(names)}')
        self.stages = stages if only is None else [self.recipe[only]]
        self.start_from, self.from_scratch = start_from, from_scratch
        self._check_start()

    def _check_start(self) -> None:
        first = self.stages[0]
        if self.start_from is not None or self.from_scratch:
            return
        before = self.before[first.name]
        if before is not None:
            raise ZooError(
                f'stage {first.name!r} goes on from stage {before!r}: type --model.start_from '
                f'runs/NAME/{STAGES}/{before}.safetensors, or --model.from_scratch true to start without'
            )
        if first.loss == 'logits':
            raise ZooError(
                f'stage {first.name!r} trains end to end without a stage of head alignment before it: give weights '
                f'with --model.start_from FILE, or type --model.from_scratch true'
            )

    @property
    def total_steps(self) -> int:
        return sum(stage.max_steps for stage in self.stages)

    def start_of(self, index: int) -> int:
        """The optimizer step of the run at which stage `index` starts."""
        return sum(stage.max_steps for stage in self.stages[:index])

    def index_at(self, step: int) -> int:
        """The stage that optimizer step `step` (counted from 0) belongs to; the last one beyond the end."""
        for index in range(len(self.stages)):
            if step < self.start_of(index + 1):
                return index
        return len(self.stages) - 1


def role_of(name: str, roles: dict[str, str]) -> str:
    """The role of a mixer's parameter; LoRA wraps linear layers, which renames their weights."""
    return 'lora' if 'lora_' in name else roles[name.replace('.base_layer', '')]


def set_trainable(mixers: dict[int, nn.Module], adapters: Iterable[nn.Parameter], stage: Stage) -> None:
    """Sets requires_grad of every parameter of the student's mixers and adapters to what the stage trains.

    Args:
        mixers: Mixers by layer.
        adapters: LoRA parameters, within and outside of mixers.
        stage: The stage.
    """
    for mixer in mixers.values():
        roles = {name.replace('.base_layer', ''): role for name, role in mixer.parameter_roles().items()}
        known = {name.rsplit('.', 1)[-1] for name in roles} | {part for name in roles for part in name.split('.')}
        if unknown := set(stage.freeze) - known:
            raise ZooError(f'stage {stage.name!r} freezes {sorted(unknown)}; the mixer has {sorted(known)}')
        for name, parameter in mixer.named_parameters():
            frozen = set(name.split('.')) & set(stage.freeze)
            parameter.requires_grad_(role_of(name, roles) in stage.train and not frozen)
    for parameter in adapters:
        parameter.requires_grad_('lora' in stage.train)


def stage_optimizer(
    named: dict[str, nn.Parameter], stage: Stage, total_batch: int
) -> tuple[torch.optim.Optimizer, WsdSchedule]:
    """The optimizer of a stage over its trainable parameters, and its schedule.

    Args:
        named: Parameters by name; those that do not require gradients are left out.
        stage: The stage.
        total_batch: Samples per optimizer step over all processes.
    """
    settings, options = stage.optim, dict(stage.optim.options)
    if settings.betas:
        options['betas'] = tuple(settings.betas)
    if settings.eps:
        options['eps'] = settings.eps
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        raise ZooError(f'stage {stage.name!r} trains nothing: no parameter has one of the roles {stage.train}')
    decayed = [p for name, p in trained.items() if 'bias' not in name]
    exempt = [p for name, p in trained.items() if 'bias' in name]
    groups = [{'params': decayed}, {'params': exempt, 'weight_decay': 0.0}]
    lr = settings.lr * (total_batch / settings.lr_per if settings.lr_per else 1.0)
    try:
        optimizer = create_optimizer_v2(
            [g for g in groups if g['params']],
            opt=settings.name,
            lr=lr,
            weight_decay=settings.weight_decay,
            **options,
        )
    except ValueError as error:
        if settings.name in list_optimizers():
            raise
        raise ZooError(f'no optimizer {settings.name!r}; timm has: {", ".join(list_optimizers())}') from error
    return optimizer, WsdSchedule(optimizer, stage)


class WsdSchedule:
    """Learning rate of a stage as a function of its optimizer step and nothing else; it has no state to restore.

    Args:
        optimizer: Optimizer to drive.
        stage: The stage.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: Stage) -> None:
        from transformers import get_wsd_schedule

        wsd = stage.wsd
        stable = stage.max_steps - wsd.warmup - wsd.decay if wsd.stable is None else wsd.stable
        self.optimizer = optimizer
        self._groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]
        self._factor = get_wsd_schedule(optimizer, wsd.warmup, wsd.decay, num_stable_steps=stable).lr_lambdas[0]
        self.apply(0)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at step `step` of the stage; warm-up ends at the full rate."""
        return float(self._factor(step))

    def apply(self, step: int) -> None:
        """Sets the learning rate of the stage's optimizer step `step`, counted from 0."""
        for group, configured in zip(self.optimizer.param_groups, self._groups):
            group['lr'] = configured['lr'] * self.factor(step)

    def restore_options(self, step: int) -> None:
        """Puts configured weight decay, betas and so on back after a checkpoint has loaded its own."""
        for group, configured in zip(self.optimizer.param_groups, self._groups):
            group.update({k: v for k, v in configured.items() if k not in ('lr', 'initial_lr')})
        self.apply(step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


# hand-over files


def save_stage(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes a stage's tensors, whole or not at all.

    Args:
        path: RUN/stages/NAME.safetensors.
        tensors: All mixer parameters and adapters by name.
        about: What the file holds, stored beside the tensors as JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            staged,
            metadata={'zoo': json.dumps(about)},
        )
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise ZooError(f'cannot write {path}: {error}') from error


def load_stage(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a hand-over file, or of a checkpoint of a distillation run, and what it says about itself."""
    path = Path(path)
    if not path.is_file():
        raise ZooError(f'no such file: {path} (a stage writes RUN/{STAGES}/NAME.safetensors when it is finished)')
    if path.suffix == '.ckpt':
        from zoo.checkpoints import read_checkpoint

        checkpoint = read_checkpoint(path)
        about = (checkpoint.get('zoo') or {}).get('distill')
        if about is None:
            raise ZooError(f'{path} was not written by a distillation run')
        return checkpoint['state_dict'], about
    try:
        with safe_open(path, framework='pt') as file:
            about = json.loads((file.metadata() or {}).get('zoo', 'null'))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ZooError(f'{path} is damaged or not a safetensors file: {error}') from error
    if about is None or 'stage' not in about:
        raise ZooError(f'{path} was not written by a stage of a distillation run')
    return tensors, about


def check_hand_over(path: str | os.PathLike, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses the weights of another stage, mixer or teacher.

    Args:
        path: The file, for the message.
        about: What it says about itself: stage, mixer, shape of the teacher's decoder.
        wanted: The same of what is expected; a stage of None takes any.
    """
    for key, name in (('stage', 'of stage'), ('mixer', 'for the mixer'), ('teacher', 'of a student of')):
        if wanted.get(key) is not None and about.get(key) != wanted[key]:
            raise ZooError(
                f'{path} holds weights {name} {about.get(key)!r}, this run goes on {name} {wanted[key]!r}'
                + (' (--model.from_scratch true takes it all the same)' if key == 'stage' else '')
            )
