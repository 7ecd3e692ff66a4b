"""Training of diffusion UNets: class-conditional in pixels, or text-conditional inside a pipeline's latents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.data.seeding import derive_seed, keyed_randomness, run_seed
from zoo.errors import RunError, ZooError
from zoo.tasks._denoising import PIPELINE, Denoising, Frame, load_pipeline
from zoo.tasks._unet_report import Samples, draw_sheet, plot_losses
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.nonfinite import first_nonfinite
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain


class TrainUNet(FittingModule):
    """Trains a diffusers UNet to denoise; the run leaves a diffusers pipeline in RUN/model.

    Args:
        unet: Arguments of a new UNet2DConditionModel, whose self-attention is linear if they have projection_mid_dim
            (null, an integer, div:16 or -1, see LinFusion.attach); null goes on training the pipeline's own.
        pipeline: Folder or hub name of a pipeline whose VAE, text encoders and scheduler are used and whose UNet is
            replaced; null trains on pixels, conditioned on the classes of the data.
        tokens: Tokens that a class becomes in cross-attention.
        scheduler: Arguments of diffusers' DDPMScheduler; null takes the pipeline's or, without one, its defaults.
        guidance_dropout: Share of training images that lose their class or caption, for classifier-free guidance.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging, which is what the run exports; null is off.
        samples: What is drawn when training is done.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        compile: Whether to run torch.compile on the UNet.
        channels_last: Whether to keep convolutions in channels-last layout.
        check_finite: Whether to stop at a loss that is not finite, naming its origin.
    """

    def __init__(
        self,
        unet: dict[str, Any] | None = None,
        pipeline: str | None = None,
        tokens: int = 4,
        scheduler: dict[str, Any] | None = None,
        guidance_dropout: float = 0.1,
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
        if unet is None and pipeline is None:
            raise ZooError('nothing to train: give model.unet (a config), model.pipeline (a folder), or both')
        if not 0 <= guidance_dropout < 1:
            raise ZooError(f'model.guidance_dropout {guidance_dropout} must be within 0..1')
        self.source, self.pipeline_name, self.tokens, self.scheduler = unet, pipeline, tokens, scheduler
        self.guidance_dropout, self.check_finite = guidance_dropout, check_finite
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.ema_settings, self.samples = as_dataclass(Ema, ema), as_dataclass(Samples, samples)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.gradient_checkpointing, self.compiled = gradient_checkpointing, compile
        self.net: nn.Module | None = None
        self.ema: nn.Module | None = None
        # outside the module tree: what is not trained, and a second name for the weights
        self.__dict__.update(frame=None, _train_net=None)

    # building

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)

    @property
    def net_name(self) -> str:
        return 'a UNet' if self.pipeline_name is None else f'a UNet for {self.pipeline_name}'

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def configure_model(self) -> None:
        if self.net is not None:
            return
        data = self.trainer.datamodule
        pipeline = self._pipeline(data)
        self.__dict__['frame'] = Frame(pipeline)
        self.frame.check(data)
        self.net = pipeline.unet.float().requires_grad_(True).train().to(memory_format=self.layout)
        self.ema = build_ema(self.net, self.ema_settings)
        if self.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        self.__dict__['_train_net'] = torch.compile(self.net) if self.compiled else self.net

    def _pipeline(self, data: Any) -> Any:
        from diffusers import DDPMScheduler

        from zoo.diffusion.class_to_image import ClassToImagePipeline, build_class_unet, build_unet

        with keyed_randomness(run_seed()):
            if self.pipeline_name is not None:
                pipeline = load_pipeline(self.pipeline_name)
                if self.source is not None:
                    pipeline.unet = build_unet(self.source)
                if self.scheduler is not None:
                    pipeline.scheduler = DDPMScheduler(**self.scheduler)
                return pipeline
            names = list(getattr(data, 'class_names', []))
            if not names:
                raise ZooError(f'{type(data).__name__} has no classes: give model.pipeline to train on captions')
            unet = build_class_unet(self.source, len(names), self.tokens)
            labels = {str(number): name for number, name in enumerate(names)}
            pipeline = ClassToImagePipeline(unet, DDPMScheduler(**(self.scheduler or {})), labels)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

    # training

    def on_fit_start(self) -> None:
        self.frame.to(self.device, encode=not getattr(self.trainer.datamodule, 'encoded', False))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor | None:
        size = count_usable(self.trainer.datamodule, batch)
        if not size:
            return None
        step = self.frame.draw(batch, self.guidance_dropout)
        loss = nn.functional.mse_loss(step.run(self._train_net, torch.float32), step.target)
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(step, batch, batch_idx)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        size = count_usable(self.trainer.datamodule, batch)
        if size:
            step = self.frame.draw(batch, generator=held_out_generator(self.device, self.global_rank, batch_idx))
            found = step.run(self.eval_net, torch.float32)
            loss = nn.functional.mse_loss(found, step.target)
            self.log('val/loss', loss, prog_bar=True, batch_size=size, sync_dist=True)
            self.log('val/noise_mse', self.frame.noise_error(found, step).mean(), batch_size=size, sync_dist=True)

    # hooks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs = checkpoint.get('hyper_parameters', {})
        for key, mine in (('unet', self.source), ('pipeline', self.pipeline_name)):
            if theirs.get(key, mine) != mine:
                raise ZooError(f'the checkpoint holds model.{key} {theirs[key]},\nthe config asks for {mine}')
        self.check_checkpoint({}, theirs)
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)

    # the end

    def conclude(self, test: bool) -> list[str]:
        """Writes the pipeline, curves and, if asked, a sheet of samples.

        Args:
            test: Whether to draw samples.

        Returns:
            Lines for the user.
        """
        if not self.trainer.is_global_zero:
            return []
        report = self.run_dir / 'report'
        report.mkdir(parents=True, exist_ok=True)
        plot_losses(self.run_dir / 'metrics.csv', report / 'curves.png')
        pipeline = self.frame.pipeline
        device = self.trainer.strategy.root_device  # which the trainer has taken the network away from
        pipeline.unet = self.eval_net.requires_grad_(False).eval().to(device)
        if test and (self.samples.count or self.samples.prompts):
            self.frame.to(device)
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                draw_sheet(self.frame, self.samples, report / 'samples.png')
        save_pipeline(pipeline, self.run_dir / PIPELINE)
        loss = self.trainer.callback_metrics.get('val/noise_mse')
        line = [] if loss is None else [f'noise MSE on the validation split: {float(loss):.4f}']
        return [*line, f'model:   {self.run_dir / PIPELINE}/  (diffusers pipeline)', f'report:  {report}/']

    def _diverged(self, step: Denoising, batch: dict[str, Any], batch_idx: int) -> RunError:
        def run() -> Any:
            return step.run(self.net, torch.float32)

        names = ', '.join(batch['name'][:4]) + (' ...' if len(batch['name']) > 4 else '')
        return RunError(
            f'the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})\n'
            f'first non-finite value: {first_nonfinite(self.net, run, step.noisy)}\n'
            f'batch: {names}\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, a longer warm-up, or bf16-mixed '
            'instead of 16-mixed'
        )


def count_usable(data: Any, batch: dict[str, Any]) -> int:
    """Size of a batch; unreadable samples are counted."""
    if batch['failures']:
        data.report_failures(batch['failures'])
    return len(batch['name'])


def held_out_generator(device: torch.device, rank: int, batch_idx: int) -> torch.Generator:
    """Noise and timesteps of a validation batch: the same in every epoch and for every model."""
    return torch.Generator(device).manual_seed(derive_seed(run_seed(), 2, rank, batch_idx) % 2**63)


def save_pipeline(pipeline: Any, target: Path) -> None:
    """A diffusers folder, written beside its place and then renamed."""
    staged = target.with_name(f'.{target.name}.tmp')
    shutil.rmtree(staged, ignore_errors=True)
    try:
        pipeline.save_pretrained(staged)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise RunError(f'cannot write {target}: {error}') from error
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
