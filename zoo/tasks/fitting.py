"""What every task with one network, one optimizer and one schedule does around its own training step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torchmetrics import Metric

from zoo.data.seeding import run_seed, seed_all
from zoo.errors import RunError, ZooError
from zoo.tasks.nonfinite import first_nonfinite
from zoo.tasks.optim import UpdateSchedule, as_plain, fit_optimizer

__all__ = ['FittingModule']

_HALF = (torch.float16, torch.bfloat16)


class FittingModule(LightningModule):
    """A task that sets `optim`, `schedule` and `ema` (None, or timm's average of `trained`).

    A batch's random numbers are a function of seed, epoch, batch and process, and the learning rate one of the step:
    a resumed run goes on as if it had never stopped.
    """

    ema: nn.Module | None

    @property
    def trained(self) -> nn.Module:
        """What the optimizer and the average are of."""
        return self.net

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> FittingModule:
        """Metrics stay in fp32 where `bf16-true` converts the module: in bf16 a sum soon stands still."""
        super()._apply(fn, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, Metric) and module.dtype in _HALF:
                module.set_dtype(torch.float32)
        return self

    def check_classes(self, data: Any) -> None:
        """Refuses data with another number of classes than the model's; 0 stands for data that does not know.

        Raises:
            ZooError: naming the option that fits.
        """
        if data.num_classes and data.num_classes != self.num_classes:
            raise ZooError(
                f'the data has {data.num_classes} classes, the model {self.num_classes}: set '
                f'--model.num_classes {data.num_classes}'
            )

    def check_checkpoint(self, saved: dict[str, Any], hparams: dict[str, Any]) -> None:
        """Compares a checkpoint with the run that goes on from it and with the data that it meets.

        Args:
            saved: Its `class_names` and `view`, as far as it has them.
            hparams: Its hyper-parameters.

        Raises:
            ZooError: it was trained with another optimizer, or one class has one number there and another in the data.
        """
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        theirs = (hparams.get('optim') or {}).get('name', self.optim.name)
        if fitting and theirs != self.optim.name:
            raise ZooError(
                f'the checkpoint was trained with model.optim.name {theirs}, whose state {self.optim.name} cannot take '
                'over: a resumed run keeps its optimizer'
            )
        data = getattr(self._trainer, 'datamodule', None)
        theirs, ours = list(saved.get('class_names') or []), list(getattr(data, 'class_names', None) or [])
        numbers = [str(i) for i in range(len(ours))]  # what stands for names where there are none
        if len(ours) == len(theirs) and theirs != ours and numbers not in (theirs, ours):
            for number, name in enumerate(ours):
                if name in theirs and theirs[number] != name:
                    raise ZooError(
                        f'the classes of the data have another order than those of the checkpoint: {name!r} is number '
                        f'{number} here and number {theirs.index(name)} there'
                    )
            number, there, here = next((i, *pair) for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
            warnings.warn(
                f'the data has other class names than the checkpoint: number {number} is {here!r}, not {there!r}',
                stacklevel=2,
            )
        view, mine = saved.get('view') or {}, as_plain(getattr(data, 'view', None)) or {}
        changed = [k for k, v in view.items() if k in mine and _listed(mine[k]) != _listed(v)]
        if changed:
            told = ', '.join(f'{k} {_listed(view[k])} (now {_listed(mine[k])})' for k in changed)
            warnings.warn(f'the checkpoint was trained with another data.view: {told}', stacklevel=2)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.ema is not None and any(p.dtype in _HALF for p in self.ema.parameters()):
            raise ZooError(
                f'model.ema needs weights in fp32, not {self.trainer.precision}: an average in half precision does not '
                'move. Set --trainer.precision bf16-mixed, or --model.ema null'
            )
        return fit_optimizer(self.trainer, self.trained, self.optim, self.schedule)

    def lr_scheduler_step(self, scheduler: UpdateSchedule, metric: Any) -> None:
        scheduler.apply(self.global_step)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.trained, step=self.global_step)

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.restore_options(self.global_step)

    def on_train_epoch_start(self) -> None:
        if hasattr(self.trainer.datamodule, 'set_epoch'):
            self.trainer.datamodule.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_step(batch_idx)

    def diverged(self, images: torch.Tensor, names: list[Any], batch_idx: int) -> RunError:
        """What to raise when the loss of `net(images)` is not finite."""

        def run() -> Any:
            self.seed_step(batch_idx)
            return self.net(images)

        origin = first_nonfinite(self.net, run, images)
        few = ', '.join(map(str, names[:4])) + (' ...' if len(names) > 4 else '')
        return RunError(
            f'the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})\n'
            f'first non-finite value: {origin}\n'
            f'batch: {few}\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, a longer warm-up, or bf16-mixed '
            'instead of 16-mixed'
        )

    def seed_step(self, batch_idx: int) -> None:
        seed_all(run_seed(), self.current_epoch, batch_idx, self.global_rank)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
