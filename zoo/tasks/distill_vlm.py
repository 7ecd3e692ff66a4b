"""Distillation of a vision-language model into one with linear layers: all stages in one run, resumable in each.

The recipe is mmMamba's (arXiv 2502.13145): head outputs of every layer are aligned on the teacher's inputs, first with
the mixers' new parameters alone, then with q, k and v; the last stage matches logits end to end.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from zoo.data.chat import model_inputs
from zoo.data.seeding import derive_seed, run_seed, seed_all
from zoo.errors import RunError, ZooError
from zoo.linearizer import capture, decoder_layers
from zoo.tasks._distill_evaluate import Report, measure, sweep
from zoo.tasks._distill_losses import HeadsLoss, LogitsLoss, logits_loss, positions
from zoo.tasks._distill_report import (
    as_json,
    plot_kl,
    plot_layers,
    plot_softmax_layers,
    say_stage,
    say_table,
    write_json,
)
from zoo.tasks._distill_stages import (
    STAGES,
    Plan,
    Stage,
    WsdSchedule,
    check_hand_over,
    load_stage,
    save_stage,
    stage_optimizer,
)
from zoo.tasks._distill_student import Student, about, export, hidden_states, output_head, rebuild
from zoo.tasks._distill_teacher import check_data, load_teacher, prepare_teacher
from zoo.tasks.optim import as_dataclass, as_plain

# of the frozen tensors; in 16-mixed they stay in fp32, as many teachers overflow in fp16
_DTYPES = {'bf16-mixed': torch.bfloat16, 'bf16-true': torch.bfloat16, '16-true': torch.float16}


class DistillVLM(LightningModule):
    """Distils a transformers vision-language model into one whose decoder is linear, or a hybrid.

    Args:
        teacher: A transformers folder or hub name, or the YAML of a run that trains it first, once, beside this one.
        stages: The stages in order.
        teacher_arguments: Command line of the run that trains the teacher, behind its config.
        mixer: Linear mixer of the student, see zoo.linearize.
        mixer_kwargs: Its arguments.
        stage: Run this stage alone.
        start_from: Weights of the stage before the first one that is run: RUN/stages/NAME.safetensors or a checkpoint.
        from_scratch: Let a stage start without its predecessor's weights, or from those of another stage.
        chunk: Positions whose logits are in memory at one time.
        gradient_checkpointing: Recompute the student's decoder layers in the backward pass of logits stages.
        check_finite: Whether to stop at a loss that is not finite.
        report: What is measured when all stages are done.
    """

    def __init__(
        self,
        teacher: str,
        stages: list[Stage],
        teacher_arguments: list[str] | None = None,
        mixer: str = 'mamba2',
        mixer_kwargs: dict[str, Any] | None = None,
        stage: str | None = None,
        start_from: str | None = None,
        from_scratch: bool = False,
        chunk: int = 1024,
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
        report: Report = Report(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
    ) -> None:
        super().__init__()
        stages = [as_dataclass(Stage, s) for s in stages]
        settings = {k: v for k, v in locals().items() if k not in ('self', '__class__')}
        self.report = as_dataclass(Report, report)
        self.save_hyperparameters({**settings, 'report': as_plain(report), 'stages': [as_plain(s) for s in stages]})
        self.plan = Plan(stages, stage, start_from, from_scratch)
        self.teacher_name, self.teacher_arguments = teacher, teacher_arguments or []
        self.mixer, self.mixer_kwargs = mixer, mixer_kwargs or {}
        self.chunk, self.gradient_checkpointing, self.check_finite = chunk, gradient_checkpointing, check_finite
        self.index = 0
        self.mixers, self.adapters = nn.ModuleDict(), nn.ParameterDict()
        # outside the module tree: their tensors are the teacher's, which are neither trained nor saved
        self.__dict__.update(_teacher=None, _student=None, _announced=False, _errors={})

    # the stages

    @property
    def now(self) -> Stage:
        """The stage that is running."""
        return self.plan.stages[self.index]

    @property
    def fit_alone(self) -> str:
        """Why there is no validate, test and predict."""
        return (
            f'{type(self).__name__} has fit alone: its students are transformers folders; evaluate them with '
            f'zoo eval-vlm RUN/{self.plan.stages[-1].name}'
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def stage_file(self, name: str) -> Path:
        """Where the weights of a finished stage are."""
        return self.run_dir / STAGES / f'{name}.safetensors'

    def _build(self, index: int) -> None:
        """Makes the student of a stage with freshly seeded mixers and adapters."""
        self.index = index
        self.__dict__['_student'] = None
        seed = derive_seed(run_seed(), 1 + index) % 2**31
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # adapters; mixers have a generator of their own
            student = Student(self._teacher, self.mixer, self.mixer_kwargs, self.now, seed)
        self.__dict__['_student'] = student
        self.mixers = nn.ModuleDict({str(i): m for i, m in student.mixers.items()})
        self.adapters = nn.ParameterDict({name.replace('.', '/'): p for name, p in student.adapters.items()})
        if self.trainer.precision.endswith('mixed'):
            for parameter in student.named_parameters().values():
                parameter.data = parameter.data.float()  # the frozen rest may be in half precision, what is trained not
        else:
            self.trainer.strategy.precision_plugin.convert_module(self)
        if self.gradient_checkpointing and self.now.loss == 'logits':
            student.checkpoint_layers()

    def _hand_over(self) -> None:
        """Loads the weights that the current stage goes on from."""
        plan, first = self.plan, self.index == 0
        before = plan.before[self.now.name]
        if first and plan.start_from is None:
            return  # from scratch, or nothing comes before
        path = Path(plan.start_from) if first and plan.start_from else self.stage_file(before)
        tensors, told = load_stage(path)
        mine = about(self._student)
        wanted = {**mine, 'stage': None if plan.from_scratch else before}
        check_hand_over(path, told, wanted)
        self._student.load(tensors, str(path))

    def _finish(self) -> None:
        """Writes the hand-over file of the stage that has just ended."""
        if self.trainer.is_global_zero:
            save_stage(self.stage_file(self.now.name), self._student.named_parameters(), about(self._student))
        self.trainer.strategy.barrier()

    def _advance(self, index: int) -> None:
        """Ends stage after stage up to `index`; a stage of an earlier run that was longer then counts as ended."""
        self._finish()
        self._build(index)
        self._hand_over()
        strategy = self.trainer.strategy
        if isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            strategy.model = self  # its reducer knows the parameters of the former stage
            strategy.configure_ddp()
        strategy.setup_optimizers(self.trainer)
        self._set_accumulation()
        self.__dict__['_announced'] = False

    def _set_accumulation(self) -> None:
        self.trainer.accumulate_grad_batches = self.now.accumulate or self._accumulate

    # Lightning's interface

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if stage != 'fit':
            raise ZooError(self.fit_alone)
        folder = prepare_teacher(self.teacher_name, self.run_dir.parent, trainer, self.teacher_arguments)
        teacher = load_teacher(folder, _DTYPES.get(trainer.precision, torch.float32))
        teacher.to(trainer.strategy.root_device)  # before students are made, which share its memory
        self.__dict__.update(_teacher=teacher, _teacher_folder=folder)
        check_data(teacher, folder, trainer.datamodule)
        self.__dict__['_accumulate'] = trainer.accumulate_grad_batches
        if not 0 <= trainer.max_steps <= self.plan.total_steps:
            trainer.fit_loop.epoch_loop.max_steps = self.plan.total_steps
        if trainer.ckpt_path is None:  # otherwise the checkpoint says which stage it is in
            self._build(0)
            self._hand_over()

    def configure_optimizers(self) -> dict[str, Any]:
        accumulate = self.now.accumulate or self._accumulate
        total_batch = self.trainer.datamodule.batch_size * self.trainer.world_size * accumulate
        optimizer, schedule = stage_optimizer(self._student.named_parameters(), self.now, total_batch)
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': schedule, 'interval': 'step'}}

    @property
    def stage_step(self) -> int:
        """Optimizer steps that the current stage has taken."""
        return self.global_step - self.plan.start_of(self.index)

    def lr_scheduler_step(self, scheduler: WsdSchedule, metric: Any) -> None:
        scheduler.apply(self.stage_step)

    def on_train_start(self) -> None:
        self._set_accumulation()
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.restore_options(self.stage_step)

    def on_train_epoch_start(self) -> None:
        if hasattr(self.trainer.datamodule, 'set_epoch'):
            self.trainer.datamodule.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        while self.index < self.plan.index_at(self.global_step):
            self._advance(self.index + 1)
        if not self._announced and batch['name']:
            self._announce(batch)
        seed_all(run_seed(), self.current_epoch, batch_idx, self.global_rank)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.now.loss == 'heads' and (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self._log_now({f'layers/{i:02d}': float(e) for i, e in self._errors.items()})

    def _log_now(self, metrics: dict[str, float]) -> None:
        """Logs values of this step alone; what `log` was given once stays in every later row of the epoch."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    def on_train_end(self) -> None:
        if self.global_step >= self.plan.total_steps:
            self._finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['zoo'] = {'distill': {**about(self._student), 'index': self.index, 'announced': self._announced}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        told = (checkpoint.get('zoo') or {}).get('distill')
        if told is None:
            raise ZooError('the checkpoint was not written by a distillation run')
        names = [s.name for s in self.plan.stages]
        if told['stage'] not in names:
            raise ZooError(f'the checkpoint is inside stage {told["stage"]!r}, the run has {", ".join(names)}')
        self._build(names.index(told['stage']))
        mine = about(self._student)
        for key in ('mixer', 'mixer_kwargs', 'teacher', 'softmax_layers', 'lora'):
            if told[key] != mine[key]:
                raise ZooError(f'the checkpoint has {key} {told[key]!r}, the config asks for {mine[key]!r}')
        self.__dict__['_announced'] = told['announced']

    # losses

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor | None:
        self.trainer.datamodule.count_unusable(batch, training=True)
        if not batch['name']:
            return None
        inputs, mask, labels = unpacked(batch)
        size = len(inputs['input_ids'])
        if self.now.loss == 'heads':
            loss, errors = self._heads(inputs, mask)
            self.__dict__['_errors'] = errors
        else:
            self._student.train_adapters(True)
            found = self._logits(inputs, mask, labels)
            loss = found.loss
            self.log_dict({'train/kl': found.kl, 'train/agreement': found.agreement}, prog_bar=True, batch_size=size)
            if self.now.ce_weight:
                self.log('train/ce', found.ce, batch_size=size)
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(batch_idx)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        self.log('stage', float(self.index), batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.trainer.datamodule.count_unusable(batch)
        if not batch['name']:
            return
        inputs, mask, labels = unpacked(batch)
        size = len(inputs['input_ids'])
        self._student.train_adapters(False)
        if self.now.loss == 'heads':
            loss, _ = self._heads(inputs, mask)
            self.log('val/heads', loss, batch_size=size, sync_dist=True)
        found = self._logits(inputs, mask, labels)
        self.log_dict({'val/kl': found.kl, 'val/agreement': found.agreement}, batch_size=size, sync_dist=True)

    def _heads(self, inputs: dict[str, Any], mask: torch.Tensor | None) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        mixers, keep = self._student.mixers, positions(self.now.positions, mask, None)
        loss = HeadsLoss(mixers, mask, keep, self.now.scale, learn=torch.is_grad_enabled())
        with torch.no_grad(), capture(self._teacher, mixers, loss):
            hidden_states(self._teacher, inputs)
        return loss.total(), loss.errors

    def _logits(self, inputs: dict[str, Any], mask: torch.Tensor | None, labels: torch.Tensor | None) -> LogitsLoss:
        stage = self.now
        with torch.no_grad():
            wanted = hidden_states(self._teacher, inputs)
        found = hidden_states(self._student.model, inputs)
        return logits_loss(
            found,
            wanted,
            output_head(self._student.model),
            output_head(self._teacher),
            keep=positions(stage.positions, mask, labels),
            labels=labels,
            reduction=stage.kl_reduction,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
            chunk=self.chunk,
        )

    @torch.no_grad()
    def _announce(self, batch: dict[str, Any]) -> None:
        """Logs where a stage starts: the KL on its first batch, and what it trains."""
        inputs, mask, labels = unpacked(batch)
        self._student.train_adapters(False)
        with self.trainer.precision_plugin.train_step_context():
            found = self._logits(inputs, mask, labels)
        self._log_now({'stage/start_kl': float(found.kl)})
        if self.trainer.is_global_zero:
            say_stage(self.plan, self.index, self._student, float(found.kl), float(found.agreement))
        self.__dict__['_announced'] = True

    # the end

    def conclude(self, test: bool) -> list[str]:
        """Writes figures and, when all stages are done, the students and the final table.

        Args:
            test: Whether to evaluate.

        Returns:
            Lines for the user.
        """
        if not self.trainer.is_global_zero:
            return []
        report, metrics = self.run_dir / 'report', self.run_dir / 'metrics.csv'
        report.mkdir(parents=True, exist_ok=True)
        if metrics.is_file():
            plot_layers(metrics, self.plan, report / 'layers.png')
            plot_kl(metrics, self.plan, report / 'kl.png')
        if self.global_step < self.plan.total_steps:
            return [f'stopped in stage {self.now.name!r} at step {self.global_step} of {self.plan.total_steps}']
        if not self.stage_file(self.now.name).is_file():  # killed between the last checkpoint and the end
            save_stage(self.stage_file(self.now.name), self._student.named_parameters(), about(self._student))
        students = [stage for stage in self.plan.stages if stage.loss == 'logits']
        models = {stage.name: self._finished(stage) for stage in students}
        for name, model in models.items():
            export(model, self.run_dir / name, self._teacher_folder)
        if test:
            self._evaluate(students, models, report)
        shown = [f'student: {self.run_dir / name}/  (transformers folder; import zoo.vlm first)' for name in models]
        return [*shown, f'report:  {report}/']

    def _finished(self, stage: Stage) -> nn.Module:
        path = self.stage_file(stage.name)
        return rebuild(Student(self._teacher, self.mixer, self.mixer_kwargs, stage, 0), load_stage(path)[0])

    def _evaluate(self, students: list[Stage], models: dict[str, nn.Module], report: Path) -> None:
        data, settings, teacher = self.trainer.datamodule, self.report, self._teacher
        loader, tokenizer, chance = data.test_dataloader(), data.processor.tokenizer, data.chance()
        rows = [measure('teacher', teacher, len(decoder_layers(teacher)), loader, tokenizer, settings)]
        for stage in students:
            rows.append(measure(stage.name, models[stage.name], len(stage.softmax_layers), loader, tokenizer, settings))
        linear = next((stage.name for stage in students if not stage.softmax_layers), None)
        swept = []
        if settings.sweep and linear:
            swept = sweep(linear, models[linear], teacher, loader, tokenizer, settings)
        say_table(rows, chance)
        more = {'sweep': [asdict(row) | {'exact_match': row.accuracy('all')} for row in swept], **self._conditions()}
        write_json(report / 'table.json', as_json(rows, chance, more))
        plot_softmax_layers(rows, swept, report / 'softmax_layers.png')

    def _conditions(self) -> dict[str, Any]:
        import transformers

        device = self.trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
        return {
            'teacher_folder': str(self._teacher_folder),
            'device': name,
            'threads': torch.get_num_threads(),
            'torch': torch.__version__,
            'transformers': transformers.__version__,
            'steps': {stage.name: stage.max_steps for stage in self.plan.stages},
        }

    def _diverged(self, batch_idx: int) -> RunError:
        return RunError(
            f'the loss is not finite at step {self.global_step} (stage {self.now.name!r}, epoch {self.current_epoch}, '
            f'batch {batch_idx})\nWhat helps: a lower optim.lr of the stage, --trainer.gradient_clip_val 2, a longer '
            'wsd.warmup, or bf16-mixed instead of 16-mixed'
        )


def unpacked(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None, torch.Tensor | None]:
    """Model inputs, padding mask and labels of a batch of zoo.data.chat."""
    inputs = model_inputs(batch)
    return inputs, inputs.get('attention_mask'), batch.get('labels')
