"""Semantic segmentation: Semantic FPN or UPerNet on any backbone of timm's registry, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.data._mask_transforms import IGNORE, MaskView
from zoo.data.segmentation import MaskImages
from zoo.errors import ZooError
from zoo.heads._pyramid import Pyramid
from zoo.heads.segment import FCNHead, Segmentor, SemanticFPNHead, UPerHead, load_published, resize
from zoo.tasks._segment_inference import Inference, MaskScores, infer
from zoo.tasks._segment_report import MaskWriter, SegmentReport
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain


@dataclass
class Auxiliary:
    """A second, smaller head on an inner map, in training only.

    Args:
        weight: Of its loss.
        channels: Width of its convolution.
        level: Which map, the finest is 0.
    """

    weight: float = 0.4
    channels: int = 256
    level: int = 2


@dataclass
class SegmentHead:
    """What turns the backbone's maps into classes.

    Args:
        name: fpn (Semantic FPN) or uper (UPerNet).
        channels: Width before the classifier; null takes the published one: 128 (fpn), 512 (uper).
        fpn_channels: Width of the feature pyramid network before it (fpn).
        pools: Sides of the grids of pyramid pooling (uper).
        dropout: Of whole channels before the classifier.
        norm: BatchNorm (over all processes with trainer.sync_batchnorm) or GroupNorm.
        auxiliary: The auxiliary head; null is off.
    """

    name: Literal['fpn', 'uper'] = 'fpn'
    channels: int | None = None
    fpn_channels: int = 256
    pools: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    norm: Literal['batch', 'group'] = 'batch'
    auxiliary: Auxiliary | None = None

    def __post_init__(self) -> None:
        self.auxiliary = as_dataclass(Auxiliary, self.auxiliary)


@dataclass
class Maps:
    """Which maps of the backbone the head gets (zoo.heads._pyramid.Pyramid).

    Args:
        out_indices: Which of the backbone's maps; null takes all from stride 4 on, the last one of a plain model.
        norms: Whether every map goes through a LayerNorm over its channels, as in RAVLT's segmentors.
        finer: Levels to add below the finest map by transposed convolutions.
        width: Channels of the simple feature pyramid that a plain model gets.
        frozen: Maps, the finest first, whose parameters do not train.
        freeze_norms: Whether the backbone's BatchNorms keep their statistics; their weights train.
        grad_checkpointing: Whether blocks are computed again in the backward pass.
    """

    out_indices: list[int] | None = None
    norms: bool = False
    finer: int = 0
    width: int = 256
    frozen: int = 0
    freeze_norms: bool = False
    grad_checkpointing: bool = False


class Segment(FittingModule):
    """Trains a segmentor on images with a class for every pixel.

    Args:
        net: Name of the backbone in timm's registry, which holds the zoo's models too.
        num_classes: Number of classes, at most 255: masks are bytes, in which 255 is ignored.
        net_kwargs: Further arguments of timm.create_model, such as img_size or drop_path_rate.
        pretrained: Whether the backbone starts from published weights.
        published: A whole published segmentor to start from, in mmsegmentation's layout: a file, or
            hf-hub:OWNER/REPOSITORY/FILE.
        maps: What the head gets.
        head: The head.
        inference: How whole images are segmented.
        backbone_lr: Factor of the learning rate of the backbone (and of a feature pyramid network) to that of the head;
            null is one rate, or the optimizer's layer_decay.
        class_weights: Weight of every class in the loss; null is one for all.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging; null is off.
        compile: Whether to run torch.compile on the network.
        channels_last: Whether to keep images and convolutions in channels-last layout.
        check_finite: Whether to stop at a loss that is not finite, naming its origin.
    """

    def __init__(
        self,
        net: str,
        num_classes: int = 150,
        net_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        published: str | None = None,
        maps: Maps = Maps(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        head: SegmentHead = SegmentHead(),  # noqa: B008
        inference: Inference = Inference(),  # noqa: B008
        backbone_lr: float | None = None,
        class_weights: list[float] | None = None,
        optim: Optim = Optim(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        ema: Ema | None = None,
        compile: bool = False,
        channels_last: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        self.save_hyperparameters(settings)
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.inference, self.head = as_dataclass(Inference, inference), as_dataclass(SegmentHead, head)
        self.check_finite, self.channels_last = check_finite, channels_last
        if backbone_lr is not None:
            if self.optim.layer_decay is not None:
                raise ZooError('model.backbone_lr and model.optim.layer_decay both set the learning rates of layers')
            self.optim = replace(self.optim, layer_decay=backbone_lr)
        if not 1 <= num_classes <= IGNORE:
            raise ZooError(f'model.num_classes {num_classes} must be within 1 .. {IGNORE}: masks are bytes')
        self.net_name, self.num_classes = net, num_classes
        maps = as_dataclass(Maps, maps)
        self.net = build_segmentor(net, num_classes, maps, self.head, net_kwargs or {}, pretrained and not published)
        self.net.backbone_lr = backbone_lr is not None
        if published:
            read_published(published, self.net)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if class_weights is not None and len(class_weights) != num_classes:
            raise ZooError(f'model.class_weights has {len(class_weights)} values for {num_classes} classes')
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer('class_weights', weights, persistent=False)
        self.ema = build_ema(self.net, as_dataclass(Ema, ema))
        self.class_names: list[str] = []
        self.view: dict[str, Any] | None = None
        for split in ('val', 'test'):
            scores = MaskScores(num_classes, ignore_index=IGNORE, validate_args=False)
            self.add_module(f'{split}_scores', scores)
        self.val_loss = MeanMetric()
        # kept out of the module tree: a second name for the weights
        self.__dict__['_train_net'] = torch.compile(self.net) if compile else self.net

    # evaluation and prediction

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def forward(self, images: Tensor, augmented: bool = False) -> Tensor:
        """Images (B, 3, H, W) to fp32 logits (B, num_classes, h, w), h and w at most H and W."""
        return infer(self.eval_net, self._layout(images), self.inference, augmented)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        return self._evaluate(batch, self.val_scores, augmented=False)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        return self._evaluate(batch, self.test_scores, augmented=True)

    def on_validation_epoch_end(self) -> None:
        self._log_scores('val', self.val_scores)
        self.log('val/loss', self.val_loss.compute())
        self.val_loss.reset()

    def on_test_epoch_end(self) -> None:
        self.table = self._log_scores('test', self.test_scores)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Tensor]:
        """Class of every pixel of the images as they came, uint8 (H, W) each."""
        return [guess for _, _, guess in self._evaluate(batch, None, augmented=True)]

    def _evaluate(
        self, batch: dict[str, Any], scores: MaskScores | None, augmented: bool
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Image, true mask and guessed mask of every sample, in their order."""
        self._report(batch)
        found: list[Any] = [None] * len(batch['name'])
        groups: dict[Any, list[int]] = {}
        for place, (image, mask) in enumerate(zip(batch['image'], batch['mask'])):
            groups.setdefault((image.shape, mask.shape), []).append(place)
        for (_, shape), places in groups.items():
            images = torch.stack([batch['image'][i] for i in places])
            masks = torch.stack([batch['mask'][i] for i in places]).long()
            logits = resize(self(images, augmented), shape)
            guesses = logits.argmax(1)
            if scores is not None:
                scores.update(guesses, masks)
                if scores is self.val_scores:
                    self.val_loss.update(pixel_loss(logits, masks, self.class_weights), weight=len(places))
            for i, image, mask, guess in zip(places, images, masks, guesses):
                found[i] = image, mask.byte(), guess.byte()
        return found

    # what runs ask

    accuracy_curves = ('Validation', {'val/miou': 'mIoU', 'val/pixel_accuracy': 'pixel accuracy'})

    def headline(self, split: str, metrics: Any) -> str:
        """The line that people look for."""
        name = 'validation' if split == 'val' else split
        miou, accuracy = (100 * float(metrics[f'{split}/{key}']) for key in ('miou', 'pixel_accuracy'))
        return f'{name} mIoU: {miou:.2f} %, pixel accuracy: {accuracy:.2f} %'

    def report_callback(self, folder: Path, samples: Path | None) -> Callback:
        """What draws overlays and writes the report of a test; see Classify."""
        return SegmentReport(folder, samples)

    def prediction(
        self, images: list[str], about: dict[str, Any], folder: Path, batch_size: int
    ) -> tuple[LightningDataModule, Callback]:
        """The data of `predict` and what writes its results."""
        data = MaskImages(images, view=MaskView(**about['view']), eval_batch_size=batch_size, num_workers=0)
        return data, MaskWriter(folder, about['class_names'] or [str(n) for n in range(self.num_classes)])

    # training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self._report(batch)
        if not batch['name']:
            raise ZooError('none of the images and masks of a batch could be read: see the warnings above')
        images, masks = self._layout(batch['image']), batch['mask'].long()
        auxiliary = self.head.auxiliary
        outputs = self._train_net(images, auxiliary is not None)
        main = outputs if auxiliary is None else outputs[0]
        logits = resize(main.float(), masks.shape[-2:])
        loss = pixel_loss(logits, masks, self.class_weights)
        size = len(images)
        if auxiliary is not None:
            second = pixel_loss(resize(outputs[1].float(), masks.shape[-2:]), masks, self.class_weights)
            self.log('train/auxiliary_loss', second.detach(), on_step=False, on_epoch=True, batch_size=size)
            loss = loss + auxiliary.weight * second
        if self.check_finite and not torch.isfinite(loss):
            raise self.diverged(images, batch['name'], batch_idx)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    # hooks

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is None or not getattr(data, 'num_classes', 0):
            return
        self.check_classes(data)
        if stage == 'fit':
            self.class_names, self.view = list(data.class_names), as_plain(data.view)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['zoo'] = {'task': 'Segment', 'class_names': self.class_names, 'view': self.view}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get('zoo') or {}
        self.check_checkpoint(saved, checkpoint.get('hyper_parameters', {}))
        self.class_names, self.view = saved.get('class_names') or self.class_names, saved.get('view') or self.view
        theirs = checkpoint.get('hyper_parameters', {})
        head = (theirs.get('head') or {}).get('name', self.head.name)
        for key, mine, other in (
            ('net', self.net_name, theirs.get('net', self.net_name)),
            ('num_classes', self.num_classes, theirs.get('num_classes', self.num_classes)),
            ('head.name', self.head.name, head),
        ):
            if mine != other:
                raise ZooError(f'the checkpoint holds model.{key} {other}, the config asks for {mine}')
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)

    # helpers

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _report(self, batch: dict[str, Any]) -> None:
        if batch['failures']:
            self.trainer.datamodule.report_failures(batch['failures'])

    def _log_scores(self, split: str, scores: MaskScores) -> dict[str, Tensor]:
        table = scores.compute()
        for name in ('miou', 'pixel_accuracy', 'mean_accuracy'):
            self.log(f'{split}/{name}', table[name], prog_bar=f'{split}/{name}' == 'val/miou')
        scores.reset()
        return table


def build_segmentor(
    net: str, num_classes: int, maps: Maps, head: SegmentHead, kwargs: dict[str, Any], pretrained: bool = False
) -> Segmentor:
    """The network, with errors that name what to type instead."""
    try:
        pyramid = Pyramid(net, kwargs=kwargs, pretrained=pretrained, **as_plain(maps))
    except (TypeError, ValueError) as error:
        raise ZooError(f'model.net {net}: {error}') from error
    common = {'num_classes': num_classes, 'dropout': head.dropout, 'norm': head.norm}
    if head.name == 'fpn':
        width = head.channels or 128
        top = SemanticFPNHead(pyramid.channels, pyramid.strides, width=width, fpn_width=head.fpn_channels, **common)
    else:
        top = UPerHead(pyramid.channels, width=head.channels or 512, pools=head.pools, **common)
    if head.auxiliary is None:
        return Segmentor(pyramid, top)
    level = head.auxiliary.level
    if not 0 <= level < len(pyramid.channels):
        raise ZooError(f'model.head.auxiliary.level {level}: {net} gives the maps 0 .. {len(pyramid.channels) - 1}')
    second = FCNHead(pyramid.channels[level], width=head.auxiliary.channels, **common)
    return Segmentor(pyramid, top, second, level)


def read_published(name: str, net: Segmentor) -> None:
    """Loads a published segmentor from a file or from hf-hub:OWNER/REPOSITORY/FILE."""
    path = name
    try:
        if name.startswith('hf-hub:'):
            from huggingface_hub import hf_hub_download

            owner, repository, file = name.removeprefix('hf-hub:').split('/', 2)
            path = hf_hub_download(f'{owner}/{repository}', file)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # the hub client and the unpickler raise a dozen types; the user needs name and cause
        what = f'cannot load model.published {name}: {type(error).__name__}: {str(error).splitlines()[0]}'
        raise ZooError(
            f'{what}\nA file that holds more than tensors has to be reduced to its state_dict where you trust it: '
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from error
    try:
        load_published(net, state)
    except (ValueError, RuntimeError) as error:
        raise ZooError(f'model.published {name}: {error}') from error


def pixel_loss(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the pixels that are not ignored; 0 where all are.

    Args:
        logits: (B, classes, H, W).
        masks: int64 (B, H, W), 255 is ignored.
        weights: (classes,).
    """
    total = nn.functional.cross_entropy(logits, masks, weights, ignore_index=IGNORE, reduction='sum')
    return total / (masks != IGNORE).sum().clamp_min(1)
