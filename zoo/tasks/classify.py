"""Image classification: any timm model, other heads, timm's recipe ingredients, resumable to the bit."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import Callback
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.checkpoints import read_checkpoint
from zoo.errors import ZooError
from zoo.heads.classify import Headed, create_classifier, nested_loss
from zoo.report import TestReport
from zoo.tasks.distill import Distill, Teacher
from zoo.tasks.fitting import FittingModule
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain


@dataclass
class Mix:
    """Mixing of images and labels within a batch (timm's Mixup).

    Args:
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        prob: Probability of mixing a batch.
        switch_prob: Probability of cutmix where both are on.
        mode: One draw for the batch, for each pair, or for each element.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal['batch', 'pair', 'elem'] = 'batch'


@dataclass
class Ema:
    """An exponential moving average of the weights: what validation, test and predict use where it is on.

    Args:
        decay: Share of the old average at every optimizer step.
        warmup: Whether the decay grows from 0 (timm's warm-up), so that short runs profit too.
        warmup_gamma: Speed of the warm-up.
        warmup_power: Shape of the warm-up.
    """

    decay: float = 0.9999
    warmup: bool = False
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3


class Classify(FittingModule):
    """Trains a timm model on labelled images.

    Args:
        net: Name in timm's registry, which holds the zoo's models too.
        num_classes: Number of classes.
        net_kwargs: Further arguments of timm.create_model, such as img_size or drop_path_rate.
        pretrained: Whether to start from published weights.
        head: The model's own linear classifier, or a head of zoo.heads.classify over its features.
        head_kwargs: Options of the head, such as batch_norm, dims or num_heads; with any, linear is one of those too.
        freeze: backbone trains the head alone, over features that no longer change; its dropout and the like are off.
        init: Checkpoint of an earlier run, whose backbone this one starts from.
        optim: Optimizer.
        schedule: Learning rate over time.
        mix: Mixup and cutmix.
        smoothing: Label smoothing.
        loss: Cross-entropy, or one binary cross-entropy per class.
        ema: Weight averaging; null is off.
        distill: Teacher; null is off.
        compile: Whether to run torch.compile on the network.
        channels_last: Whether to keep images and convolutions in channels-last layout.
        check_finite: Whether to stop at a loss that is not finite, naming its origin.
    """

    def __init__(
        self,
        net: str,
        num_classes: int = 1000,
        net_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        head: Literal['linear', 'moment', 'matryoshka'] = 'linear',
        head_kwargs: dict[str, Any] | None = None,
        freeze: Literal['backbone'] | None = None,
        init: str | None = None,
        optim: Optim = Optim(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        schedule: Schedule = Schedule(),  # noqa: B008
        mix: Mix = Mix(),  # noqa: B008
        smoothing: float = 0.0,
        loss: Literal['ce', 'bce'] = 'ce',
        ema: Ema | None = None,
        distill: Distill | None = None,
        compile: bool = False,
        channels_last: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        if num_classes < 2:
            raise ZooError(f'model.num_classes must be at least 2, not {num_classes}: there is nothing to tell apart')
        self.save_hyperparameters(settings)
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.distill, self.check_finite, self.channels_last = (
            as_dataclass(Distill, distill),
            check_finite,
            channels_last,
        )
        self.net_name, self.num_classes, self.head_name, self.init = net, num_classes, head, init
        self.net = build_net(net, num_classes, pretrained, net_kwargs or {}, head, head_kwargs, freeze)
        self.dims: tuple[int, ...] = self.net.head.dims if isinstance(self.net, Headed) else ()
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.criterion, self.mixup = build_loss(loss, smoothing, as_dataclass(Mix, mix), num_classes)
        self.ema = build_ema(self.net, as_dataclass(Ema, ema))
        self.class_names: list[str] = []
        self.view: dict[str, Any] | None = None
        self.val_metrics = build_metrics(num_classes, 'val/')
        self.raw_metrics = build_metrics(num_classes, 'val/raw_') if self.ema else None
        self.test_metrics = build_metrics(num_classes, 'test/')
        self.val_nested = build_nested(num_classes, self.dims, 'val/') if self.dims else None
        self.test_nested = build_nested(num_classes, self.dims, 'test/') if self.dims else None
        # kept out of the module tree: a second name for the weights, and a network that is not ours to save
        self.__dict__['_train_net'] = torch.compile(self.net) if compile else self.net
        self.__dict__['_teacher'] = None

    # evaluation and prediction

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.eval_net(self._layout(images))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, target = self._unpack(batch)
        if not len(target):
            return
        update_metrics(self.val_metrics, self._evaluate(images, target, self.val_nested), target)
        if self.raw_metrics is not None:
            update_metrics(self.raw_metrics, self.net(self._layout(images)), target)

    def on_validation_epoch_end(self) -> None:
        for metrics in (self.val_metrics, self.raw_metrics, self.val_nested):
            if metrics is not None:
                self._log_metrics(metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor] | None:
        images, target = self._unpack(batch)
        if not len(target):
            return None
        logits = self._evaluate(images, target, self.test_nested).float()
        update_metrics(self.test_metrics, logits, target)
        return {'logits': logits, 'target': target}

    def on_test_epoch_end(self) -> None:
        self._log_metrics(self.test_metrics)
        if self.test_nested is not None:
            self._log_metrics(self.test_nested)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        images, _ = self._unpack(batch)
        return self(images).float().softmax(-1) if len(images) else images.new_zeros(0, self.num_classes)

    # what runs ask

    accuracy_curves = (
        'Top-1 accuracy',
        {
            'train/top1': 'training, augmented',
            'val/top1': 'validation',
            'val/raw_top1': 'validation, without averaging',
        },
    )

    def headline(self, split: str, metrics: Any) -> str:
        """The line that people look for."""
        name = 'validation' if split == 'val' else split
        nested = [f'{d}: {100 * float(metrics[f"{split}/top1_{d}"]):.2f} %' for d in self.dims]
        widths = f' (by features used, {", ".join(nested)})' if nested else ''
        return f'{name} accuracy: {100 * float(metrics[f"{split}/top1"]):.2f} %{widths}'

    def report_callback(self, folder: Path, samples: Path | None) -> Callback:
        """What writes the report of a test.

        Args:
            folder: Where it goes.
            samples: Where to leave images to try `predict` on, if anywhere.
        """
        return TestReport(folder, samples)

    # training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        images, target = self._unpack(batch)
        images = self._layout(images)
        labels = target
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        outputs = self._train_net(images)
        loss = nested_loss(self.criterion, outputs, target, self.net.head.loss_weights if self.dims else (1.0,))
        logits = outputs[-1] if self.dims else outputs
        if self._teacher is not None:
            loss = self.distill.combine(loss, self._teacher.loss(logits, images))
        if self.check_finite and not torch.isfinite(loss):
            raise self.diverged(images, batch['name'], batch_idx)
        size = len(labels)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        if self.mixup is None:
            hits = (logits.detach().argmax(-1) == labels).float().mean()
            self.log('train/top1', hits, on_step=False, on_epoch=True, batch_size=size)
        return loss

    # hooks

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is None:
            return
        self.check_classes(data)
        if stage != 'fit':
            return
        self.class_names, self.view = list(data.class_names), as_plain(data.view)
        if self.mixup is not None and data.batch_size % 2:
            raise ZooError(f'mixup and cutmix need an even data.batch_size, not {data.batch_size}')
        if self.distill is not None:
            teacher = Teacher(self.distill, self.num_classes, data.view.mean, data.view.std)
            self.__dict__['_teacher'] = teacher

    def on_fit_start(self) -> None:
        if self.init:
            load_backbone(self.net, self.init)
            if self.ema is not None:
                self.ema.module.load_state_dict(self.net.state_dict())
        if self._teacher is not None:
            self._teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['zoo'] = {'class_names': self.class_names, 'view': self.view}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get('zoo') or {}
        self.check_checkpoint(saved, checkpoint.get('hyper_parameters', {}))
        self.class_names, self.view = saved.get('class_names') or self.class_names, saved.get('view') or self.view
        theirs = checkpoint.get('hyper_parameters', {})
        theirs = {'head': 'linear', **theirs}  # from before there were others
        for key, mine in (
            ('net', self.net_name),
            ('num_classes', self.num_classes),
            ('head', self.head_name),
            ('freeze', self.hparams.freeze),
        ):
            if theirs.get(key, mine) != mine:
                raise ZooError(f'the checkpoint holds model.{key} {theirs[key]}, the config asks for {mine}')
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)
        self.init = None  # this checkpoint has all that the run started from

    # helpers

    def _layout(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _unpack(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if batch['failures']:
            self.trainer.datamodule.report_failures(batch['failures'])
        return batch['image'], batch['target']

    def _evaluate(self, images: torch.Tensor, target: torch.Tensor, nested: MetricCollection | None) -> torch.Tensor:
        """Logits; those of the narrower classifiers are counted, where the head has any."""
        if nested is None:
            return self(images)
        outputs = self.eval_net.nested(self._layout(images))
        by_name = dict(nested.items(keep_base=True))  # a collection sorts its metrics by name
        for d, logits in zip(self.dims, outputs):
            by_name[f'top1_{d}'].update(logits.float(), target)
        return outputs[-1]

    def _log_metrics(self, metrics: MetricCollection) -> None:
        values = metrics.compute()
        for name, value in values.items():
            if value.ndim == 0:
                self.log(name, value, prog_bar=name == 'val/top1')
        metrics.reset()


def build_net(
    name: str,
    num_classes: int,
    pretrained: bool,
    kwargs: dict[str, Any],
    head: str = 'linear',
    head_kwargs: dict[str, Any] | None = None,
    freeze: str | None = None,
) -> nn.Module:
    """A timm model, perhaps with another head, with errors that name what to type instead."""
    base = name.split(':', 1)[-1].split('.')[0]
    if ':' not in name and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
        raise ZooError(f'no model named {name!r}' + (f'; close: {", ".join(close)}' if close else ''))
    try:
        return create_classifier(name, num_classes, head, head_kwargs, freeze, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ZooError(f'model {name} does not take these arguments: {kwargs}\n{error}') from error
    except ValueError as error:
        if not str(error).startswith(('head ', 'no head ')):
            raise
        raise ZooError(f'{error}; see model.head and model.head_kwargs') from error


def load_backbone(net: nn.Module, path: str) -> None:
    """Takes the backbone of an earlier run, averaged weights where there are any; a classifier is left as it is.

    Args:
        net: Network of this run.
        path: Checkpoint of the earlier one.

    Raises:
        ZooError: the checkpoint holds another backbone.
    """
    state = read_checkpoint(path)['state_dict']
    prefix = 'ema.module.' if any(k.startswith('ema.module.') for k in state) else 'net.'
    state = {k.removeprefix(prefix).removeprefix('backbone.'): v for k, v in state.items() if k.startswith(prefix)}
    backbone = net.backbone if isinstance(net, Headed) else net
    own = backbone.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    head = {id(t) for t in net.get_classifier().state_dict(keep_vars=True).values()} if backbone is net else set()
    missing = [k for k, v in backbone.state_dict(keep_vars=True).items() if k not in fitting and id(v) not in head]
    if missing:
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise ZooError(f'{path} holds another backbone (model.init): no {", ".join(missing[:3])}{more} of these shapes')
    backbone.load_state_dict({**own, **fitting})


def build_loss(loss: str, smoothing: float, mix: Mix, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """The training loss, and timm's Mixup where it is on; mixed labels already carry the smoothing."""
    mixup = None
    if mix.mixup > 0 or mix.cutmix > 0:
        mixup = Mixup(
            mixup_alpha=mix.mixup,
            cutmix_alpha=mix.cutmix,
            prob=mix.prob,
            switch_prob=mix.switch_prob,
            mode=mix.mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
    if loss == 'bce':
        return BinaryCrossEntropy(smoothing=0.0 if mixup else smoothing), mixup
    return (SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)), mixup


def build_ema(net: nn.Module, ema: Ema | None) -> ModelEmaV3 | None:
    """timm's moving average of `net`, outside the reach of the optimizer."""
    if ema is None:
        return None
    average = ModelEmaV3(
        net,
        decay=ema.decay,
        use_warmup=ema.warmup,
        warmup_gamma=ema.warmup_gamma,
        warmup_power=ema.warmup_power,
    )
    return average.requires_grad_(False)


def build_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Loss, top-1, top-5 (where there are more than five classes) and accuracy per class."""
    metrics: dict[str, Any] = {
        'loss': MeanMetric(),
        'top1': MulticlassAccuracy(num_classes, average='micro'),
        'per_class': MulticlassAccuracy(num_classes, average='none'),
    }
    if num_classes > 5:
        metrics['top5'] = MulticlassAccuracy(num_classes, top_k=5, average='micro')
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def build_nested(num_classes: int, dims: tuple[int, ...], prefix: str) -> MetricCollection:
    """Top-1 of the classifiers of the first d features."""
    metrics: dict[str, Any] = {f'top1_{d}': MulticlassAccuracy(num_classes, average='micro') for d in dims}
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def update_metrics(metrics: MetricCollection, logits: torch.Tensor, target: torch.Tensor) -> None:
    """Adds a batch."""
    for name, metric in metrics.items(keep_base=True):
        if name == 'loss':
            metric.update(nn.functional.cross_entropy(logits.float(), target), weight=len(target))
        else:
            metric.update(logits.float(), target)


def adapt_ema(state: dict[str, torch.Tensor], wanted: bool, prefix: str = 'net.') -> None:
    """Lets weight averaging be switched on or off between the checkpoint and now; `prefix` is of what is averaged."""
    averaged = [k for k in state if k.startswith('ema.module.')]
    if wanted and not averaged:
        ours = [(k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix)]
        state.update({f'ema.module.{k}': v.clone() for k, v in ours})
    if not wanted:
        for key in averaged:
            del state[key]
