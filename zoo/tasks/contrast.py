"""Contrastive training of image and text towers: CLIP's and SigLIP's losses, frozen towers, teachers, large batches."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from zoo.data.transforms import View
from zoo.errors import RunError, ZooError
from zoo.heads.contrast import ImageTower, TextTower, TimmTower, build_tokenizer, build_towers, open_clip_config
from zoo.tasks._contrast_evaluate import (
    Retrieval,
    ZeroShot,
    ZeroShotAccuracy,
    classifier,
    linear_probe,
    trunk_features,
)
from zoo.tasks._contrast_losses import (
    Converter,
    DistillTowers,
    Tokens,
    TowersTeacher,
    build_loss,
    contrastive_loss,
    distill_losses,
    encode,
    encode_texts,
)
from zoo.tasks._contrast_report import ContrastReport
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain

_START = {'clip': (1 / 0.07, None), 'siglip': (10.0, -10.0)}  # scale and bias of similarities, as published


class Contrast(FittingModule):
    """Trains two towers so that an image and its caption are close.

    The data are images with captions (CaptionedImages, CaptionedShapes), or labelled images of any kind, whose captions
    are their classes in the templates of zero_shot.

    Args:
        net: open_clip model (its JSON configs may name the zoo's backbones), or null where both towers are given.
        pretrained: Tag or file of its weights.
        image: Any timm backbone as vision tower, in the place of the open_clip model's.
        text: Text tower with softmax or linear attention, in the place of the open_clip model's.
        embed_dim: Channels of the shared space where there is no open_clip model; 512 by default.
        loss: CLIP's softmax over the batch, or SigLIP's sigmoid over pairs.
        freeze: A tower that keeps its weights (LiT); the projection of an image tower given in model.image is trained.
        chunk: Samples that a tower encodes at a time, with the gradients of the whole batch; null is all at once.
        distill: Teacher; null is off.
        zero_shot: How classes become texts.
        max_scale: The scale of similarities is kept from 1 to this; 100 for both losses, as in open_clip's training
            loop (open_clip_train/train.py).
        probe: Whether a test on labelled images also fits a linear probe to the image tower's features.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging; null is off.
        check_finite: Whether to stop at a loss that is not finite.
    """

    def __init__(
        self,
        net: str | None = None,
        pretrained: str | None = None,
        image: ImageTower | None = None,
        text: TextTower | None = None,
        embed_dim: int | None = None,
        loss: Literal['clip', 'siglip'] = 'clip',
        freeze: Literal['image', 'text'] | None = None,
        chunk: int | None = None,
        distill: DistillTowers | None = None,
        zero_shot: ZeroShot = ZeroShot(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        max_scale: float = 100.0,
        probe: bool = False,
        optim: Optim = Optim(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        ema: Ema | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        self.save_hyperparameters(settings)
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.zero_shot, self.distill = as_dataclass(ZeroShot, zero_shot), as_dataclass(DistillTowers, distill)
        self.kind, self.freeze, self.chunk, self.probe = loss, freeze, chunk, probe
        self.max_scale, self.check_finite = max_scale, check_finite
        if chunk is not None and chunk < 1 or max_scale <= 1:
            raise ZooError(f'model.chunk {chunk} must be positive and model.max_scale {max_scale} above 1')
        image, text = as_dataclass(ImageTower, image), as_dataclass(TextTower, text)
        self.net = build_towers(net, pretrained, image, text, embed_dim, *_START[loss])
        self.net_name = ' + '.join(filter(None, [net, image and image.name, text and f'{text.kind} text tower']))
        self.tokens = Tokens(build_tokenizer(net, text))
        own = open_clip_config(net)['embed_dim'] if net else embed_dim or 512
        width = self.distill.embed_dim if self.distill and self.distill.feature else own
        if width != own:
            self.net.to_teacher = nn.ModuleDict({k: nn.Linear(own, width) for k in ('image', 'text')})
        self._frozen = freeze_tower(self.net, freeze)
        self.ema = build_ema(self.net, as_dataclass(Ema, ema))
        self.classes: list[str] = list(self.zero_shot.classes or [])
        self.view: dict[str, Any] | None = None
        self.metrics = nn.ModuleDict({split: _metrics() for split in ('val', 'test')})
        self.criterion = build_loss(loss)
        # what belongs to a run rather than to the network
        self.__dict__.update(_teacher=None, _convert=None, _classifier=None)

    # towers

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def encode_images(self, net: nn.Module, images: Tensor) -> Tensor:
        """Normalised fp32 features (B, D) of images as the data module gives them."""
        return F.normalize(encode(net.visual, self._convert(images), self.chunk).float(), dim=-1)

    def encode_captions(self, net: nn.Module, captions: list[str]) -> Tensor:
        """Normalised fp32 features (B, D) of texts."""
        features = encode_texts(net.text, self.tokens, captions, self.chunk, self.device)
        return F.normalize(features.float(), dim=-1)

    def train(self, mode: bool = True) -> Contrast:
        super().train(mode)
        for module in self._frozen:
            module.eval()  # neither dropout nor moving statistics
        return self

    # training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, captions, target = self._unpack(batch)
        if not len(images):
            raise ZooError('none of the images and captions of a batch could be read: see the warnings above')
        captions = captions or self._draw_captions(target)
        image, text = self.encode_images(self.net, images), self.encode_captions(self.net, captions)
        with torch.autocast(self.device.type, enabled=False):
            parts = self._losses(image, text, images, captions)
            weights = {name: getattr(self.distill, name) for name in parts} if self.distill else {'contrastive': 1.0}
            loss = sum(weights[name] * value for name, value in parts.items())
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(batch, batch_idx, parts)
        size = len(captions)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        if self.distill:
            self.log_dict({f'train/{k}': v.detach() for k, v in parts.items()}, on_epoch=True, batch_size=size)
        self.log('train/scale', self.net.logit_scale.detach().exp(), on_step=False, on_epoch=True, batch_size=size)
        return loss

    def _losses(self, image: Tensor, text: Tensor, images: Tensor, captions: list[str]) -> dict[str, Tensor]:
        scale, bias = self.net.logit_scale.exp(), self.net.logit_bias
        parts = {'contrastive': contrastive_loss(self._criterion, image, text, scale, bias)}
        if self._teacher is not None:
            teacher, projections = self._teacher(images, captions, self.chunk), getattr(self.net, 'to_teacher', None)
            world = (self.global_rank, self.trainer.world_size)
            parts |= distill_losses(self.distill, (image, text, scale), teacher, projections, *world)
        return parts

    def _draw_captions(self, target: Tensor) -> list[str]:
        """A random template for each class."""
        templates = self.zero_shot.builders()
        drawn = torch.randint(len(templates), (len(target),)).tolist()
        return [templates[t](self.classes[c]) for t, c in zip(drawn, target.tolist())]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.clamp_scale()

    def clamp_scale(self) -> None:
        """Keeps the scale of similarities within 1..max_scale."""
        for net in (self.net, self.eval_net):
            net.logit_scale.data.clamp_(0, math.log(self.max_scale))

    # evaluation

    def on_validation_epoch_start(self) -> None:
        self._build_classifier()

    on_test_epoch_start = on_validation_epoch_start

    def on_predict_epoch_start(self) -> None:
        if not self.classes:
            raise ZooError('this network knows no classes: name some, --model.zero_shot.classes "[cat, dog]"')
        self._build_classifier()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, 'val')

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any] | None:
        return self._evaluate(batch, 'test')

    def _evaluate(self, batch: dict[str, Any], split: str) -> dict[str, Any] | None:
        images, captions, target = self._unpack(batch)
        if not len(images):
            return None
        metrics, net = self.metrics[split], self.eval_net
        image, found = self.encode_images(net, images), {}
        with torch.autocast(self.device.type, enabled=False):
            if captions:
                text = self.encode_captions(net, captions)
                metrics['retrieval'].update(image, text, captions)
                loss = contrastive_loss(self.criterion, image, text, net.logit_scale.exp(), net.logit_bias)
                self.log(f'{split}/loss', loss, on_epoch=True, batch_size=len(images), sync_dist=True)
                found = {'text': text, 'captions': captions}
            if target is not None and self._classifier is not None:
                logits = self._logits(image)
                metrics['zero_shot'].update(logits, target)
                found |= {'logits': logits, 'target': target}
        return found | {'image': image}

    def _logits(self, image: Tensor) -> Tensor:
        return self.eval_net.logit_scale.exp().float() * image @ self._classifier

    def on_validation_epoch_end(self) -> None:
        self._log_metrics('val')

    def on_test_epoch_end(self) -> None:
        self._log_metrics('test')
        if self.probe:
            self.log('test/probe_top1', self._probe())

    def _log_metrics(self, split: str) -> None:
        metrics = self.metrics[split]
        captioned = metrics['retrieval'].update_called
        for metric in metrics.values():
            if not metric.update_called:
                continue
            for key, value in metric.compute().items():
                if key != 'loss' or not captioned:  # with captions that name is the contrastive loss's
                    self.log(f'{split}/{key}', value, prog_bar=key in ('top1', 'i2t_r1'))
            metric.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, _, _ = self._unpack(batch)
        if not len(images):
            return torch.zeros(0, self.num_classes)
        with torch.autocast(self.device.type, enabled=False):
            return self._logits(self.encode_images(self.eval_net, images)).softmax(-1)

    def _probe(self) -> float:
        """Top-1 of a linear probe, fitted to the training images without augmentation."""
        data, visual = self.trainer.datamodule, self.eval_net.visual
        if not hasattr(data, 'whole') or self.trainer.world_size > 1:
            raise ZooError('model.probe needs labelled images that are found by index, and one process')
        splits = []
        for split in ('train', 'test'):
            images, target = data.whole(split)
            parts = [trunk_features(visual, self._convert(part.to(self.device))) for part in images.split(512)]
            splits.append((torch.cat(parts), target.to(self.device)))
        with torch.autocast(self.device.type, enabled=False):
            return linear_probe(*splits, self.num_classes)[0]

    def _build_classifier(self) -> None:
        self.__dict__['_classifier'] = None
        if self.classes:
            with torch.autocast(self.device.type, enabled=False):
                self.__dict__['_classifier'] = classifier(
                    self.eval_net, self.tokens, self.classes, self.zero_shot, self.device
                )

    # what runs ask

    accuracy_curves = (
        'Zero-shot accuracy and retrieval',
        {
            'val/top1': 'zero-shot top-1',
            'val/i2t_r1': 'image to text, recall at 1',
            'val/t2i_r1': 'text to image, recall at 1',
        },
    )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def headline(self, split: str, metrics: Any) -> str:
        """The lines that people look for."""
        name, lines = 'validation' if split == 'val' else split, []
        if f'{split}/top1' in metrics:
            probe = metrics.get(f'{split}/probe_top1')
            beside = '' if probe is None else f' (linear probe of the same features: {100 * float(probe):.2f} %)'
            top1 = 100 * float(metrics[f'{split}/top1'])
            lines.append(f'{name} zero-shot accuracy among {self.num_classes} classes: {top1:.2f} %{beside}')
        if f'{split}/i2t_r1' in metrics:
            i2t, t2i = ([f'{100 * float(metrics[f"{split}/{way}_r{k}"]):.1f}' for k in (1, 5, 10)] for way in _WAYS)
            lines.append(f'{name} recall at 1, 5, 10: image to text {" ".join(i2t)} %, text to image {" ".join(t2i)} %')
        return '\n'.join(lines)

    def report_callback(self, folder: Path, samples: Path | None) -> Callback:
        """What writes the report of a test."""
        return ContrastReport(folder, samples)

    # hooks

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        view = getattr(data, 'view', None)
        if not isinstance(view, View):
            raise ZooError(f'{type(data).__name__} gives no images with captions or labels')
        if stage != 'predict':
            self._take_classes(data)
        self.view = as_plain(view)
        self.__dict__['_convert'] = Converter(view, self.net.visual)
        self._try(view)
        if stage == 'fit':
            self.__dict__['_criterion'] = build_loss(self.kind, self.global_rank, self.trainer.world_size)
            if self.distill is not None:
                self.__dict__['_teacher'] = TowersTeacher(self.distill, view)

    def _take_classes(self, data: Any) -> None:
        names = [name.replace('_', ' ') for name in getattr(data, 'class_names', [])]
        given = self.zero_shot.classes
        if given and names and len(given) != len(names):
            raise ZooError(f'the data has {len(names)} classes, model.zero_shot.classes names {len(given)}')
        self.classes = list(given or names or self.classes)
        if not self.classes and not getattr(data, 'captioned', False):
            raise ZooError(f'{type(data).__name__} gives neither captions nor classes')

    @torch.no_grad()
    def _try(self, view: View) -> None:
        """Whether the image tower takes images of the data's size, and the text tower the words of the classes."""
        visual = self.net.visual
        training = {module: module.training for module in visual.modules()}
        try:
            device = next(visual.parameters()).device  # not there yet where the run will be
            visual.eval()(torch.zeros(1, view.channels, view.size, view.size, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ZooError(
                f'the image tower of {self.net_name} does not take {view.channels} x {view.size} x {view.size} pixels: '
                f'{error}\nSet model.image.kwargs (img_size, in_chans), or the size of the data'
            ) from error
        finally:
            for module, mode in training.items():
                module.training = mode
        builders = self.zero_shot.builders()
        if self.classes:
            self.tokens([builders[0](name) for name in self.classes] + [build(self.classes[0]) for build in builders])

    def on_fit_start(self) -> None:
        if (scale := float(self.net.logit_scale.detach().exp())) > 1.001 * self.max_scale:
            warnings.warn(
                f'the towers come with a scale of similarities of {scale:.1f}, which the first step cuts to '
                f'{self.max_scale:g}: --model.max_scale {math.ceil(scale)} keeps it',
                stacklevel=2,
            )
        if self._teacher is not None:
            self._teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['zoo'] = {'class_names': self.classes, 'view': self.view}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, theirs = checkpoint.get('zoo') or {}, checkpoint.get('hyper_parameters', {})
        self.check_checkpoint({'view': saved.get('view')}, theirs)  # classes are texts here, not numbers
        self.classes = self.classes or list(saved.get('class_names') or [])
        self.view = self.view or saved.get('view')
        for key in ('net', 'image', 'text', 'embed_dim'):
            held, mine = (_shape_of(settings.get(key)) for settings in (theirs, self.hparams))
            if key in theirs and held != mine:
                raise ZooError(f'the checkpoint holds model.{key} {held}, the config asks for {mine}')
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)

    # helpers

    def _unpack(self, batch: dict[str, Any]) -> tuple[Tensor, list[str], Tensor | None]:
        """Images, captions (none where the data has labels alone) and labels."""
        if batch['failures']:
            self.trainer.datamodule.report_failures(batch['failures'])
        return batch['image'], batch.get('caption', []), batch.get('target')

    def _diverged(self, batch: dict[str, Any], batch_idx: int, parts: dict[str, Tensor]) -> RunError:
        names = ', '.join(map(str, batch['name'][:4])) + (' ...' if len(batch['name']) > 4 else '')
        values = ', '.join(f'{name} {float(value):.4g}' for name, value in parts.items())
        return RunError(
            f'the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}): '
            f'{values}\nbatch: {names}\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, a longer warm-up, or bf16-mixed '
            'instead of 16-mixed'
        )


def _shape_of(setting: Any) -> Any:
    """What of a tower's settings a checkpoint has to agree with: where its weights came from is past."""
    return {k: v for k, v in setting.items() if k != 'pretrained'} if isinstance(setting, dict) else setting


_WAYS = ('i2t', 't2i')


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict({'zero_shot': ZeroShotAccuracy(), 'retrieval': Retrieval()})


def freeze_tower(net: nn.Module, which: str | None) -> list[nn.Module]:
    """Stops a tower's training; of a timm tower that has just been built the projection goes on.

    Returns:
        The modules that stay in evaluation mode.
    """
    if which is None:
        return []
    tower = net.text if which == 'text' else net.visual.trunk if isinstance(net.visual, TimmTower) else net.visual
    tower.requires_grad_(False)
    return [tower.eval()]
