"""Distillation of a diffusion UNet into one with linear self-attention, as LinFusion does it (arXiv 2409.02097).

The student is the teacher with every self-attention replaced; all else is shared and frozen. On the same noisy inputs

    L = MSE(student, target) + 0.5 MSE(student, teacher) + 0.5 mean_i MSE(a_i of the student, a_i of the teacher)

where target is the noise, or the velocity where the teacher predicts that, and a_i is the output of self-attention i,
each computed from its own network's hidden states. Recipe: github.com/Huage001/LinFusion at 62ef289.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from zoo.data.seeding import derive_seed, run_seed
from zoo.errors import RunError, ZooError
from zoo.tasks._denoising import Denoising, Frame, load_pipeline
from zoo.tasks._distill_teacher import is_recipe, prepare_teacher
from zoo.tasks._unet_evaluate import conclude
from zoo.tasks._unet_report import Samples
from zoo.tasks._unet_student import Features, Losses, Student, Weights, losses, self_attention
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain
from zoo.tasks.train_unet import count_usable, held_out_generator

# of the frozen tensors
_DTYPES = {'bf16-mixed': torch.bfloat16, 'bf16-true': torch.bfloat16, '16-mixed': torch.float16}
Init = Literal['teacher', 'random']


class DistillUNet(FittingModule):
    """Distils the self-attention of a UNet into linear attention; the run leaves the layers in LinFusion's layout.

    Args:
        teacher: A diffusers pipeline's folder or hub name, or the YAML of a run that trains it first, once, beside this
            one.
        teacher_arguments: Command line of the run that trains the teacher, behind its config.
        projection_mid_dim: Width of the MLPs before queries and keys: null for that of the layer, an integer, div:16
            for a part of it, -1 for none.
        init: teacher copies its projections, random starts anew, as published; a list of both distils two students
            side by side, on the same noise.
        weights: Of the three losses: to the target, to the teacher's output, to its self-attention.
        guidance_dropout: Share of images that lose their class or caption; published: none.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging, which is then what is exported; null is off, as published.
        samples: What is drawn and scored when training is done.
        gradient_checkpointing: Whether to recompute the student's activations in the backward pass.
        compile: Whether to run torch.compile on teacher and student.
        channels_last: Whether to keep convolutions in channels-last layout.
        check_finite: Whether to stop at a loss that is not finite.
    """

    # why there is no validate, test and predict
    fit_alone = 'DistillUNet has fit alone: a student is a folder of linear layers, see zoo.backbones.linfusion'

    def __init__(
        self,
        teacher: str,
        teacher_arguments: list[str] | None = None,
        projection_mid_dim: int | str | None = None,
        init: Init | list[Init] = 'teacher',
        weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
        guidance_dropout: float = 0.0,
        optim: Optim = Optim(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        schedule: Schedule = Schedule(),  # noqa: B008
        ema: Ema | None = None,
        samples: Samples = Samples(),  # noqa: B008
        gradient_checkpointing: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        self.save_hyperparameters(settings)
        self.teacher_name, self.teacher_arguments = teacher, teacher_arguments or []
        self.inits = [init] if isinstance(init, str) else list(init)
        if not self.inits or len(set(self.inits)) < len(self.inits) or set(self.inits) - {'teacher', 'random'}:
            raise ZooError(f'model.init {init} must be teacher, random, or a list of both')
        if not 0 <= guidance_dropout < 1:
            raise ZooError(f'model.guidance_dropout {guidance_dropout} must be within 0..1')
        self.projection_mid_dim, self.weights = projection_mid_dim, Weights(*weights)
        self.guidance_dropout, self.check_finite = guidance_dropout, check_finite
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.ema_settings, self.samples = as_dataclass(Ema, ema), as_dataclass(Samples, samples)
        self.gradient_checkpointing, self.compiled, self.channels_last = gradient_checkpointing, compile, channels_last
        self.layers, self.ema = nn.ModuleDict(), None
        # outside the module tree: their tensors are the teacher's, which are neither trained nor saved
        self.__dict__.update(frame=None, teacher=None, teacher_features=None, students={})

    # building

    @property
    def trained(self) -> nn.Module:
        return self.layers

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)

    @property
    def net_name(self) -> str:
        return f'linear self-attention for {self.teacher_name}'

    def setup(self, stage: str) -> None:
        if stage != 'fit':
            raise ZooError(self.fit_alone)
        trainer, name = self.trainer, self.teacher_name
        if is_recipe(name):
            index = 'model_index.json'
            name = str(prepare_teacher(name, self.run_dir.parent, trainer, self.teacher_arguments, index))
        dtype = _DTYPES.get(trainer.precision, torch.float32)
        frame = Frame(load_pipeline(name, dtype))
        frame.check(trainer.datamodule)
        if frame.classes is not None and self.samples.count and not getattr(trainer.datamodule, 'splits', None):
            name = type(trainer.datamodule).__name__
            raise ZooError(f'{name} is a stream, from which no judge is trained: set --model.samples.count 0')
        device = trainer.strategy.root_device
        frame.to(device, encode=not getattr(trainer.datamodule, 'encoded', False))
        teacher = frame.pipeline.unet.to(device)
        if self.channels_last:
            teacher.to(memory_format=torch.channels_last)
        students = {init: self.new_student(teacher, init) for init in self.inits}
        self.layers = nn.ModuleDict({i: nn.ModuleList(s.linear.children()) for i, s in students.items()})
        self.ema = build_ema(self.layers, self.ema_settings)
        features = Features(self_attention(teacher))
        self.__dict__.update(frame=frame, teacher=teacher, students=students, teacher_features=features)
        self.__dict__.update(teacher_folder=name, _call_teacher=teacher)
        self._finish_networks()

    def new_student(self, teacher: nn.Module, init: str) -> Student:
        """A student as it starts: the same in every run of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(run_seed(), 1, len(init)) % 2**63)
            return Student(teacher, init, self.projection_mid_dim, self.trainer.precision.endswith('mixed'))

    def _finish_networks(self) -> None:
        for student in self.students.values():
            if self.gradient_checkpointing:
                student.unet.enable_gradient_checkpointing()
                student.unet.train()  # checkpointing is for training mode; dropout is 0 and there is no BatchNorm
            if self.compiled:
                student.call = torch.compile(student.unet)
        if self.compiled:
            self.__dict__['_call_teacher'] = torch.compile(self.teacher)

    # losses

    def compare(
        self, step: Denoising, students: dict[str, Student]
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, Losses]]]:
        """The teacher's output, and each student's with its losses.

        Args:
            step: Noisy inputs with targets and conditions.
            students: By name.
        """
        dtype = self.teacher.dtype
        with torch.no_grad():
            wanted, theirs = self.teacher_features.run(lambda: step.run(self._call_teacher, dtype))
        found = {}
        for name, student in students.items():
            out, ours = student.features.run(lambda student=student: step.run(student.call, dtype))
            found[name] = out, losses(out, ours, step.target, wanted, theirs, self.weights)
        return wanted, found

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor | None:
        size = count_usable(self.trainer.datamodule, batch)
        if not size:
            return None
        _, found = self.compare(self.frame.draw(batch, self.guidance_dropout), self.students)
        loss = sum(parts.loss for _, parts in found.values())  # no weight is shared: the sum trains each by itself
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(batch_idx)
        for init, (_, parts) in found.items():
            self._log_parts('train', init, parts, size)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        size = count_usable(self.trainer.datamodule, batch)
        if not size:
            return
        step = self.frame.draw(batch, generator=held_out_generator(self.device, self.global_rank, batch_idx))
        _, found = self.compare(step, self.students)
        for init, (_, parts) in found.items():
            self._log_parts('val', init, parts, size)
        total = sum(parts.loss for _, parts in found.values())
        self.log('val/loss', total, prog_bar=True, batch_size=size, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Never run: without it Lightning stops before `setup` says why."""

    def _log_parts(self, split: str, init: str, parts: Losses, size: int) -> None:
        inner = f'{split}/{init}/' if len(self.inits) > 1 else f'{split}/'
        named = {f'{inner}{key}': getattr(parts, key).detach() for key in ('target', 'output', 'features')}
        self.log_dict(named, batch_size=size, sync_dist=split == 'val')

    # hooks

    def on_validation_epoch_start(self) -> None:
        self.swap_average()

    def on_validation_epoch_end(self) -> None:
        self.swap_average()

    def swap_average(self) -> None:
        """Exchanges the trained weights and their average, where there is one; a second call puts them back."""
        if self.ema is not None:
            for ours, theirs in zip(self.layers.parameters(), self.ema.module.parameters()):
                ours.data, theirs.data = theirs.data, ours.data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['zoo'] = {'distill_unet': self._about()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        told = (checkpoint.get('zoo') or {}).get('distill_unet')
        if told is None:
            raise ZooError('the checkpoint was not written by a distillation of a UNet')
        for key, mine in self._about().items():
            if told[key] != mine:
                raise ZooError(f'the checkpoint has {key} {told[key]!r},\nthe config asks for {mine!r}')
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None, prefix='layers.')

    def _about(self) -> dict[str, Any]:
        first = next(iter(self.students.values())).linear
        return {'teacher': self.teacher_name, 'init': self.inits, 'layers': as_lists(first.config.modules_list)}

    def conclude(self, test: bool) -> list[str]:
        """Writes the students, curves and, if asked, samples with a table.

        Args:
            test: Whether to evaluate.

        Returns:
            Lines for the user.
        """
        return conclude(self, test) if self.trainer.is_global_zero else []

    def _diverged(self, batch_idx: int) -> RunError:
        return RunError(
            f'the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, or bf16-mixed instead of 16-mixed'
        )


def as_lists(entries: Any) -> list[dict[str, Any]]:
    """A config's list of layers as plain Python, which checkpoints can hold."""
    return [dict(entry) for entry in entries]
