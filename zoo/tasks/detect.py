"""Object detection and instance segmentation: torchvision's detectors on any timm backbone, measured as COCO does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from zoo.data._coco import mask_tools
from zoo.data.detection import ImagesToSearch
from zoo.errors import RunError, ZooError
from zoo.heads.detect import Anchors, Detector, Kind, Neck, Resize
from zoo.registry import check_name
from zoo.tasks._detect_report import DetectionReport, DetectionWriter
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.nonfinite import first_nonfinite
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain

_SCORES = {'map': 'map', 'map50': 'map_50', 'map75': 'map_75', 'map_small': 'map_small', 'mar100': 'mar_100'}


class Detect(FittingModule):
    """Trains a detector on images with boxes and, for Mask R-CNN, masks.

    Args:
        net: Backbone: name in timm's registry, which holds the zoo's models too.
        num_classes: Classes of objects, without a background.
        detector: Which of torchvision's detectors.
        net_kwargs: Further arguments of timm.create_model, such as img_size or drop_path_rate.
        pretrained: Whether the backbone starts from published weights.
        neck: Levels between the backbone and the heads.
        anchors: Boxes that offsets are relative to.
        resize: Size of images in evaluation, and normalisation.
        options: Further arguments of the detector: thresholds and counts, see torchvision's documentation.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging; null is off.
        draw_above: Lowest score of detections in pictures.
        compile: Whether to run torch.compile on the backbone, in training.
        channels_last: Whether to keep convolutions in channels-last layout.
        check_finite: Whether to stop at a loss that is not finite, naming its origin.
    """

    def __init__(
        self,
        net: str,
        num_classes: int = 80,
        detector: Kind = 'retinanet',
        net_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        neck: Neck = Neck(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        anchors: Anchors = Anchors(),  # noqa: B008
        resize: Resize = Resize(),  # noqa: B008
        options: dict[str, Any] | None = None,
        optim: Optim = Optim(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        ema: Ema | None = None,
        draw_above: float = 0.5,
        compile: bool = False,
        channels_last: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        self.save_hyperparameters(settings)
        mask_tools()
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.detector, self.num_classes, self.draw_above = detector, num_classes, draw_above
        self.check_finite, self.net_name, self.backbone_name = check_finite, f'{detector} on {net}', net
        try:
            self.net = Detector(
                detector,
                check_name(net),
                num_classes,
                kwargs=net_kwargs,
                pretrained=pretrained,
                neck=as_dataclass(Neck, neck),
                anchors=as_dataclass(Anchors, anchors),
                resize=as_dataclass(Resize, resize),
                options=options,
            )
        except (TypeError, ValueError) as error:
            raise ZooError(f'cannot build {self.net_name}\n{error}') from error
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compile:
            self.net.pyramid.backbone.compile()
        self.ema = build_ema(self.net, as_dataclass(Ema, ema))
        self.class_names: list[str] = []
        self.category_ids: list[int] = []
        self.per_class: list[dict[str, float]] = []
        self.val_map, self.test_map = build_map(self.net.has_masks), build_map(self.net.has_masks, per_class=True)

    # evaluation and prediction

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.eval_net(images) if images else []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        return self._evaluate(batch, self.val_map)

    def on_validation_epoch_end(self) -> None:
        self._log_map('val', self.val_map)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        return self._evaluate(batch, self.test_map)

    def on_test_epoch_end(self) -> None:
        scores = self._log_map('test', self.test_map)
        self.per_class = self._by_class(scores)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        return self(self._unpack(batch)[0])

    def _evaluate(self, batch: dict[str, Any], metric: nn.Module) -> list[dict[str, Tensor]]:
        images, targets = self._unpack(batch)
        found = self(images)
        keys = ('boxes', 'labels', 'iscrowd', 'area', *(['masks'] if self.net.has_masks else []))
        metric.update(found, [{k: t[k].int() if k == 'iscrowd' else t[k] for k in keys} for t in targets])
        return found

    def _log_map(self, split: str, metric: nn.Module) -> dict[str, Tensor]:
        scores = metric.compute()
        metric.reset()
        for prefix, theirs in (('', 'bbox_'), ('mask_', 'segm_')) if self.net.has_masks else (('', ''),):
            for name, key in _SCORES.items():
                value = scores[theirs + key].float().to(self.device)
                self.log(f'{split}/{prefix}{name}', value, prog_bar=split == 'val' and name in ('map', 'map50'))
        return scores

    def _by_class(self, scores: dict[str, Tensor]) -> list[dict[str, float]]:
        """Average precision and recall of every class; -1 where no object of it was there."""
        rows = [{} for _ in range(self.num_classes)]
        present = scores['classes'].flatten().tolist()
        for prefix, theirs in (('', 'bbox_'), ('mask_', 'segm_')) if self.net.has_masks else (('', ''),):
            for name, key in (('map', 'map_per_class'), ('mar100', 'mar_100_per_class')):
                for row in rows:
                    row[prefix + name] = -1.0
                for label, value in zip(present, scores[theirs + key].flatten().tolist()):
                    rows[label][prefix + name] = value
        return rows

    # what runs ask

    @property
    def accuracy_curves(self) -> tuple[str, dict[str, str], str]:
        labels = {'val/map': 'box mAP', 'val/map50': 'box mAP@50'}
        if self.net.has_masks:
            labels |= {'val/mask_map': 'mask mAP', 'val/mask_map50': 'mask mAP@50'}
        return 'Mean average precision, validation', labels, 'sum of the losses'

    def headline(self, split: str, metrics: Any) -> str:
        """The line that people look for."""
        name = 'validation' if split == 'val' else split
        words = []
        for prefix, what in (('', 'box'), ('mask_', 'mask')) if self.net.has_masks else (('', 'box'),):
            whole, half = (100 * float(metrics[f'{split}/{prefix}{key}']) for key in ('map', 'map50'))
            words.append(f'{what} mAP {whole:.2f} %, mAP@50 {half:.2f} %')
        return f'{name} {"; ".join(words)}'

    def report_callback(self, folder: Path, samples: Path | None) -> Callback:
        """What draws and writes the report of a validation or test.

        Args:
            folder: Where it goes.
            samples: Where to leave images to try `predict` on, if anywhere.
        """
        return DetectionReport(folder, samples, self.draw_above)

    def prediction(self, images: list[str], about: dict[str, Any], folder: Path, batch_size: int) -> tuple[Any, Any]:
        """Data and writer of predict."""
        names, ids = about['class_names'], about['category_ids']
        data = ImagesToSearch(images, names, ids, batch_size, self.net.has_masks)
        return data, DetectionWriter(folder, names, ids, self.draw_above)

    # training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        images, targets = self._unpack(batch)
        if not images:
            return None
        losses = self.net(images, targets)
        loss = sum(losses.values())
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(images, targets, losses, batch, batch_idx)
        size = len(images)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        for name, value in losses.items():
            self.log(f'train/{name}', value.detach(), on_step=False, on_epoch=True, batch_size=size)
        return loss

    # hooks

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is None or stage == 'predict':
            return
        self.check_classes(data)
        if self.net.has_masks:
            data.use_masks()
        square, size = data.augment.square, self.net.resize.size
        if self.detector == 'ssdlite' and stage == 'fit' and not (square and set(data.augment.sizes) == {size}):
            raise ZooError(
                f'ssdlite trains on squares of model.resize.size {size}: set --data.augment.square true '
                f'--data.augment.sizes [{size}]'
            )
        if stage == 'fit':
            self.class_names, self.category_ids = list(data.class_names), list(data.category_ids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        about = {'class_names': self.class_names, 'category_ids': self.category_ids, 'task': 'Detect'}
        checkpoint['zoo'] = {**about, 'view': as_plain(self.net.resize)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get('zoo') or {}
        names = {'class_names': saved.get('class_names')}  # its view is the network's
        self.check_checkpoint(names, checkpoint.get('hyper_parameters', {}))
        self.class_names = saved.get('class_names') or self.class_names
        self.category_ids = saved.get('category_ids') or self.category_ids
        theirs = checkpoint.get('hyper_parameters', {})
        for key, mine in (
            ('net', self.backbone_name),
            ('detector', self.detector),
            ('num_classes', self.num_classes),
        ):
            if theirs.get(key, mine) != mine:
                raise ZooError(f'the checkpoint holds model.{key} {theirs[key]}, the config asks for {mine}')
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)

    # helpers

    def _unpack(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        if batch['failures']:
            self.trainer.datamodule.report_failures(batch['failures'])
        return batch['image'], batch['target']

    def _diverged(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]],
        losses: dict[str, Tensor],
        batch: dict[str, Any],
        batch_idx: int,
    ) -> RunError:
        def run() -> Any:
            self.seed_step(batch_idx)
            return self.net(images, targets)

        wrong = ', '.join(name for name, value in losses.items() if not torch.isfinite(value))
        names = ', '.join(batch['name'][:4]) + (' ...' if len(batch['name']) > 4 else '')
        return RunError(
            f'{wrong} is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})\n'
            f'first non-finite value: {first_nonfinite(self.net, run, images)}\n'
            f'batch: {names}\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, a longer warm-up, or bf16-mixed '
            'instead of 16-mixed'
        )


def build_map(masks: bool, per_class: bool = False) -> nn.Module:
    """torchmetrics' mean average precision over pycocotools, of boxes and perhaps masks."""
    from torchmetrics.detection import MeanAveragePrecision

    kinds = ('bbox', 'segm') if masks else 'bbox'
    metric = MeanAveragePrecision(iou_type=kinds, class_metrics=per_class, backend='pycocotools')
    metric.warn_on_many_detections = False  # as COCO does, the 100 best count
    return metric
