"""Optimizer and schedule of a run, both built by timm."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import Trainer
from timm.optim import OptimInfo, create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from torch import nn

from zoo.errors import ZooError
from zoo.tasks.muon import Muon32


@dataclass
class Optim:
    """The optimizer.

    Args:
        name: A timm optimizer, see timm.optim.list_optimizers(), or muon32 (zoo.tasks.muon).
        lr: Learning rate for a total batch of lr_per images.
        lr_per: lr, warm-up lr and minimal lr are multiplied by total batch / lr_per; null takes them as they are.
        weight_decay: Not applied to biases, other 1-D parameters and what the network lists in no_weight_decay().
        layer_decay: Factor of the learning rate from one layer to the one before it.
        betas: Momentum coefficients, where the optimizer has them.
        eps: Denominator offset, where the optimizer has one.
        options: Further arguments of the optimizer.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    lr_per: int | None = 512
    weight_decay: float = 0.05
    layer_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Schedule:
    """The learning rate over time, set anew at every optimizer step.

    Args:
        name: A timm schedule.
        warmup_epochs: Epochs of linear warm-up, part of the total; at most half of it.
        warmup_steps: The same in optimizer steps; null takes warmup_epochs.
        warmup_prefix: Whether the decay begins where the warm-up ends and takes the rest of the run; otherwise it runs
            from step 0 and the warm-up hides its beginning.
        warmup_lr: Where the warm-up starts; scaled like lr.
        min_lr: Where the decay ends; scaled like lr.
        decay_epochs: Epochs between drops (step) or length of the decay (wsd), at most what the warm-up leaves.
        decay_rate: Factor of a drop (step, multistep), or power (poly).
        decay_shape: Course of the decay (wsd): 1 minus the square root, a line or a cosine.
        milestones: Epochs that a drop comes after (multistep).
    """

    name: Literal['cosine', 'step', 'multistep', 'poly', 'wsd', 'constant'] = 'cosine'
    warmup_epochs: float = 5.0
    warmup_steps: int | None = None
    warmup_prefix: bool = True
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    decay_shape: Literal['1-sqrt', 'linear', 'cosine'] = '1-sqrt'
    milestones: tuple[float, ...] = ()


def lr_factor(optim: Optim, total_batch: int) -> float:
    """What base learning rates are multiplied by."""
    return total_batch / optim.lr_per if optim.lr_per else 1.0


def build_optimizer(net: nn.Module, optim: Optim, total_batch: int) -> torch.optim.Optimizer:
    """timm's optimizer over timm's parameter groups.

    Args:
        net: Network whose trainable parameters are optimised.
        optim: Settings.
        total_batch: Images per optimizer step over all processes.
    """
    if 'muon32' not in list_optimizers():
        about = 'Muon with fp32 iterations, for CPUs'
        default_registry.register(OptimInfo('muon32', Muon32, about, has_momentum=True, has_betas=True))
    options = dict(optim.options)
    if optim.betas:
        options['betas'] = tuple(optim.betas)
    if optim.eps:
        options['eps'] = optim.eps
    try:
        return create_optimizer_v2(
            net,
            opt=optim.name,
            lr=optim.lr * lr_factor(optim, total_batch),
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **options,
        )
    except ValueError as error:
        if optim.name in list_optimizers():
            raise
        raise ZooError(f'no optimizer {optim.name!r}; timm has: {", ".join(list_optimizers())}') from error


class UpdateSchedule:
    """A timm schedule as Lightning steps it: the learning rate is a function of the optimizer step and nothing else.

    It has no state: what a resumed run uses is what its config says, not what the checkpoint said.

    Args:
        optimizer: Optimizer to drive.
        schedule: Settings.
        factor: Multiplies warm-up and minimal learning rates.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of an epoch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        factor: float,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.optimizer = optimizer
        warmup = schedule.warmup_steps
        warmup = round(schedule.warmup_epochs * steps_per_epoch) if warmup is None else warmup
        warmup = min(warmup, total_steps // 2)
        options = {'decay_fn': schedule.decay_shape} if schedule.name == 'wsd' else {}
        if schedule.decay_epochs is not None:
            decay = max(1, round(schedule.decay_epochs * steps_per_epoch))
            options['decay_epochs'] = min(decay, total_steps - warmup) if schedule.name == 'wsd' else decay
        # timm's drop comes one step early
        milestones = [round(epoch * steps_per_epoch) + 1 for epoch in schedule.milestones]
        self.timm, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=max(total_steps - (warmup if schedule.warmup_prefix else 0), 1),
            **options,
            decay_milestones=milestones,
            decay_rate=schedule.decay_rate,
            min_lr=schedule.min_lr * factor,
            warmup_lr=schedule.warmup_lr * factor,
            warmup_epochs=warmup,
            warmup_prefix=schedule.warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        if self.timm is None:
            raise ZooError(
                f'this timm ({timm.__version__}) has no schedule {schedule.name!r}. Type: pip install -U timm'
            )
        self._groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]

    def apply(self, step: int) -> None:
        """Sets the learning rate of optimizer step `step`, counted from 0."""
        self.timm.step_update(num_updates=step)

    def restore_options(self, step: int) -> None:
        """Puts the configured weight decay, betas and so on back after a checkpoint has loaded its own."""
        for group, configured in zip(self.optimizer.param_groups, self._groups):
            group.update({k: v for k, v in configured.items() if k not in ('lr', 'initial_lr')})
        self.apply(step)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def fit_optimizer(trainer: Trainer, net: nn.Module, optim: Optim, schedule: Schedule) -> dict[str, Any]:
    """What `configure_optimizers` returns for a run with one optimizer.

    Args:
        trainer: The trainer, its data module included.
        net: Network whose trainable parameters are optimised.
        optim: Optimizer.
        schedule: Learning rate over time.

    Raises:
        ZooError: The run has no end.
    """
    accumulate = trainer.accumulate_grad_batches
    total_batch = trainer.datamodule.batch_size * trainer.world_size * accumulate
    trainer.fit_loop.setup_data()  # the length of an epoch is unknown before
    total_steps = trainer.estimated_stepping_batches
    if math.isinf(total_steps):
        raise ZooError('the length of the run is unknown: set trainer.max_steps or trainer.max_epochs')
    optimizer = build_optimizer(net, optim, total_batch)
    steps_per_epoch = math.ceil(trainer.num_training_batches / accumulate)
    scheduler = UpdateSchedule(optimizer, schedule, lr_factor(optim, total_batch), int(total_steps), steps_per_epoch)
    return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}


def as_dataclass(kind: type, value: Any) -> Any:
    """A settings object from itself, from the dictionary that checkpoints hold, or None."""
    return kind(**value) if isinstance(value, dict) else value


def as_plain(value: Any) -> Any:
    """What a checkpoint holds for a settings object."""
    return asdict(value) if hasattr(value, '__dataclass_fields__') else value
