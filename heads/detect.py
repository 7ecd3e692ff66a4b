"""torchvision's detectors on the feature pyramid of any timm backbone.

`Detector` is RetinaNet (Lin et al., arXiv 1708.02002), Faster R-CNN (arXiv 1506.01497), Mask R-CNN (arXiv 1703.06870),
both on a feature pyramid network (arXiv 1612.03144), or SSDLite (section 6.2 of arXiv 1801.04381). Levels, anchors and
heads follow the detectors that backbones are compared with: RetinaNet from stride 8 on with two more levels made from
the backbone's last map, R-CNNs from stride 4 on with one more by subsampling. The levels of a plain backbone are a
simple feature pyramid (arXiv 2203.16527), without the top-down path.

Under autocast torchvision takes anchors and box offsets in the dtype of the maps; bf16 has 8 bits, which at 1000 pixels
are steps of 4. Here they are fp32.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from zoo.heads._pyramid import Pyramid

__all__ = ['Anchors', 'Detector', 'Kind', 'Neck', 'Resize']

Kind = Literal['retinanet', 'faster_rcnn', 'mask_rcnn', 'ssdlite']


@dataclass
class Neck:
    """What lies between the backbone and the heads.

    Args:
        width: Channels of the levels and of the heads; boxes of R-CNNs are judged by 4 x width units.
        least: Smallest stride of the levels; null takes the detector's own: 8 (RetinaNet), 4 (R-CNN), 16 (SSDLite).
        out_indices: Which of the backbone's maps; null takes all from `least` on.
        norms: Whether every map of the backbone goes through a LayerNorm first.
        finer: Levels added below the finest map by transposed convolutions.
        extra: Whether to add coarser levels: two (RetinaNet), one (R-CNN), as many as make six (SSDLite).
        group_norm: Whether the heads' convolutions have GroupNorms (arXiv 1803.08494), which training from nothing
            profits from; an R-CNN's boxes are then judged by four convolutions and one layer of units.
        frozen: Maps, the finest first, whose parameters do not train.
        freeze_norms: Whether the backbone's BatchNorms keep their statistics.
        grad_checkpointing: Whether the backbone's blocks are computed again in the backward pass.
    """

    width: int = 256
    least: int | None = None
    out_indices: list[int] | None = None
    norms: bool = False
    finer: int = 0
    extra: bool = True
    group_norm: bool = False
    frozen: int = 0
    freeze_norms: bool = False
    grad_checkpointing: bool = False


@dataclass
class Anchors:
    """Boxes that offsets are relative to.

    Args:
        scale: Side of a level's smallest anchor over its stride; null takes 4 (RetinaNet) or 8 (R-CNN).
        octaves: Anchors per octave of sizes; null takes 3 (RetinaNet) or 1 (R-CNN).
        ratios: Height over width; SSDLite has the ratios 1, 2, 3, 1/2 and 1/3.
        span: Sides of SSDLite's boxes on its first and last level, as fractions of the image.
    """

    scale: float | None = None
    octaves: int | None = None
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    span: tuple[float, float] = (0.2, 0.95)


@dataclass
class Resize:
    """How images are resized in evaluation, and normalised always.

    Args:
        size: Pixels of the shorter side; SSDLite takes size x size.
        max_size: Most pixels of the longer side.
        mean: Subtracted per channel, in the range 0..1.
        std: Divided by, per channel.
    """

    size: int = 800
    max_size: int = 1333
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


class LevelAnchors(AnchorGenerator):
    """torchvision's anchors in fp32 and with each level's true stride, which theirs guesses from rounded sizes."""

    def __init__(self, strides: list[int], scale: float, octaves: int, ratios: tuple[float, ...]) -> None:
        sizes = tuple(tuple(s * scale * 2 ** (i / octaves) for i in range(octaves)) for s in strides)
        super().__init__(sizes, (tuple(ratios),) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], strides))
        return [anchors for _ in image_list.image_sizes]


class LevelBoxes(DefaultBoxGenerator):
    """torchvision's default boxes of SSD in fp32."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        one = torch.zeros((), device=feature_maps[0].device)
        return super().forward(image_list, [one.expand(m.shape) for m in feature_maps])


class Levels(nn.Module):
    """Images to named levels of one width, as torchvision's detectors take them from their `backbone`.

    Args:
        pyramid: of the backbone.
        width: channels of the levels.
        extra: coarser levels: 0, 1 by subsampling, or 2 by convolutions.
    """

    def __init__(self, pyramid: Pyramid, width: int, extra: int) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, width
        self.fpn = None if pyramid.simple else FeaturePyramidNetwork(pyramid.channels, width)
        self.extra: nn.Module | None = LastLevelMaxPool() if extra else None
        if extra == 2:
            self.extra = LastLevelP6P7(pyramid.channels[-1], width)
            self.extra.use_P5 = False  # also where the backbone's last map happens to have `width` channels
        last = pyramid.strides[-1]
        self.strides = [*pyramid.strides, *(last * 2 ** (i + 1) for i in range(extra))]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.pyramid(x)
        levels = OrderedDict((str(i), m) for i, m in enumerate(maps))
        levels = levels if self.fpn is None else self.fpn(levels)
        if self.extra is None:
            return levels
        found, names = self.extra(list(levels.values()), maps, list(levels))
        return OrderedDict(zip(names, found))


class SSDLevels(nn.Module):
    """Images to the backbone's maps and to coarser ones behind them, each of its own width, as SSDLite takes them.

    Args:
        pyramid: of the backbone.
        total: levels in all.
    """

    def __init__(self, pyramid: Pyramid, total: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        channels = list(pyramid.channels)
        self.extra = nn.ModuleList()
        for width in (512, 256, 256, 128)[: max(total - len(channels), 0)]:
            self.extra.append(_downsample(channels[-1], width))
            channels.append(width)
        self.out_channels = channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.pyramid(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(i), m) for i, m in enumerate(maps))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(channels // 8, 1), channels)


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)  # MobileNetV3-SSDLite's


def _downsample(channels: int, width: int) -> nn.Sequential:
    options = dict(norm_layer=_norm, activation_layer=nn.ReLU6)
    middle = width // 2
    block = nn.Sequential(
        Conv2dNormActivation(channels, middle, 1, **options),
        Conv2dNormActivation(middle, middle, 3, stride=2, groups=middle, **options),
        Conv2dNormActivation(middle, width, 1, **options),
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.03)
    return block


class Detector(nn.Module):
    """A detector on a backbone by name.

    Labels are 0 .. num_classes - 1, without a background class, whatever torchvision's heads need.

    Args:
        kind: Which detector.
        name: Backbone in timm's registry.
        num_classes: Classes of objects.
        kwargs: Further arguments of timm.create_model.
        pretrained: Whether the backbone starts from published weights.
        neck: Levels.
        anchors: Anchors.
        resize: Size in evaluation, and normalisation.
        options: Further arguments of torchvision's RetinaNet, FasterRCNN, MaskRCNN or SSD: thresholds and counts.

    Raises:
        ValueError: The backbone is unknown or has no such maps, or the detector no such options.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        num_classes: int,
        *,
        kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        neck: Neck = Neck(),  # noqa: B008  settings are not modified
        anchors: Anchors = Anchors(),  # noqa: B008
        resize: Resize = Resize(),  # noqa: B008
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_options(kind, options or {})
        self.kind, self.resize = kind, resize
        self.has_masks = kind == 'mask_rcnn'
        self._first = 0 if kind == 'retinanet' else 1  # torchvision's label of the first class
        least = {'retinanet': 8, 'faster_rcnn': 4, 'mask_rcnn': 4, 'ssdlite': 16}[kind]
        pyramid = Pyramid(
            name,
            kwargs=kwargs,
            pretrained=pretrained,
            out_indices=neck.out_indices,
            least=least if neck.least is None else neck.least,
            norms=neck.norms,
            finer=neck.finer,
            width=neck.width,
            frozen=neck.frozen,
            freeze_norms=neck.freeze_norms,
            grad_checkpointing=neck.grad_checkpointing,
        )
        common = dict(image_mean=list(resize.mean), image_std=list(resize.std), _skip_resize=True, **(options or {}))
        if kind == 'ssdlite':
            self.model = _ssdlite(pyramid, num_classes, neck, anchors, resize, common)
        else:
            divisible = max(32, pyramid.strides[-1])
            common |= dict(min_size=resize.size, max_size=resize.max_size, size_divisible=divisible)
            build = _retinanet if kind == 'retinanet' else _rcnn
            self.model = build(pyramid, num_classes, neck, anchors, common, self.has_masks)
        for module in self.model.modules():
            if isinstance(module, _OUTPUTS):
                module.register_forward_hook(_in_fp32)

    @property
    def pyramid(self) -> Pyramid:
        return self.model.backbone.pyramid

    def no_weight_decay(self) -> set[str]:
        return {f'model.backbone.pyramid.{key}' for key in self.pyramid.no_weight_decay()}

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        Args:
            images: uint8 or, in 0..1, fp32 (3, H, W) of any sizes. Training takes them in the size they have (SSDLite:
                resize.size squared), evaluation resizes them.
            targets: For each image boxes fp32 (N, 4) as left, top, right, bottom in pixels, labels int64 (N,), and for
                Mask R-CNN masks bool or uint8 (N, H, W).

        Returns:
            Losses by name; or for each image boxes (N, 4) in its own pixels, labels, scores, best first, and for Mask
            R-CNN masks bool (N, H, W).
        """
        images = [x.float() / 255 if x.dtype == torch.uint8 else x for x in images]
        if self.training:
            keys = ('boxes', 'masks') if self.has_masks else ('boxes',)
            targets = [{'labels': t['labels'] + self._first, **{k: t[k] for k in keys}} for t in targets]
            return self.model(images, targets)
        found = self.model(images)
        for detections in found:
            detections['labels'] = detections['labels'] - self._first
            if self.has_masks:
                detections['masks'] = detections['masks'][:, 0] > 0.5
        return found


def _check_options(kind: Kind, options: dict[str, Any]) -> None:
    """torchvision hands unknown arguments on to a transform that swallows them."""
    build = {'retinanet': RetinaNet, 'faster_rcnn': FasterRCNN, 'mask_rcnn': MaskRCNN, 'ssdlite': SSD}[kind]
    # what is a number or a list of numbers; the other arguments are parts, which are built here
    known = [
        name
        for name in inspect.signature(build).parameters
        if re.search(r'thresh|_n_|per_im|per_img|fraction|topk|weights', name)
    ]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f'{kind} has no options {", ".join(unknown)}; it has {", ".join(known)}')


def _retinanet(
    pyramid: Pyramid, num_classes: int, neck: Neck, anchors: Anchors, common: dict[str, Any], has_masks: bool
) -> RetinaNet:
    levels = Levels(pyramid, neck.width, 2 if neck.extra else 0)
    scale = 4 if anchors.scale is None else anchors.scale
    boxes = LevelAnchors(levels.strides, scale, anchors.octaves or 3, anchors.ratios)
    norm = _group_norm if neck.group_norm else None
    head = RetinaNetHead(neck.width, boxes.num_anchors_per_location()[0], num_classes, norm)
    return RetinaNet(levels, num_classes, anchor_generator=boxes, head=head, **common)


def _rcnn(
    pyramid: Pyramid, num_classes: int, neck: Neck, anchors: Anchors, common: dict[str, Any], has_masks: bool
) -> FasterRCNN:
    width, hidden, classes = neck.width, 4 * neck.width, num_classes + 1
    levels = Levels(pyramid, width, 1 if neck.extra else 0)
    scale = 8 if anchors.scale is None else anchors.scale
    names = [str(i) for i in range(len(pyramid.strides))]
    norm = _group_norm if neck.group_norm else None
    judge = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm) if norm else TwoMLPHead(width * 7**2, hidden)
    parts = dict(
        rpn_anchor_generator=LevelAnchors(levels.strides, scale, anchors.octaves or 1, anchors.ratios),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=judge,
        box_predictor=FastRCNNPredictor(hidden, classes),
    )
    if not has_masks:
        return FasterRCNN(levels, **parts, **common)
    parts |= dict(
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )
    return MaskRCNN(levels, **parts, **common)


def _ssdlite(
    pyramid: Pyramid, num_classes: int, neck: Neck, anchors: Anchors, resize: Resize, common: dict[str, Any]
) -> SSD:
    levels = SSDLevels(pyramid, 6 if neck.extra else 0)
    low, high = anchors.span
    boxes = LevelBoxes([[2, 3]] * len(levels.out_channels), min_ratio=low, max_ratio=high)
    head = SSDLiteHead(levels.out_channels, boxes.num_anchors_per_location(), num_classes + 1, _norm)
    return SSD(levels, boxes, (resize.size, resize.size), num_classes + 1, head=head, **common)


_OUTPUTS = (RPNHead, RetinaNetHead, FastRCNNPredictor, MaskRCNNPredictor, SSDLiteHead)


def _in_fp32(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: what heads say of boxes and classes, in fp32 (nested as torchvision nests it)."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {k: _in_fp32(module, args, v) for k, v in output.items()}
    return type(output)(_in_fp32(module, args, v) for v in output)
