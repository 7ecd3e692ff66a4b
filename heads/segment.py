"""Semantic segmentation on the maps of any backbone: Semantic FPN, UPerNet, and the auxiliary FCN head.

- Semantic FPN: Kirillov et al., "Panoptic Feature Pyramid Networks", arXiv 1901.02446.
- UPerNet: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221.
- The auxiliary FCN head on an inner level: Zhao et al., "Pyramid Scene Parsing Network", arXiv 1612.01105.

Widths, dropout, interpolation and initialisation are those of mmsegmentation 1.2, in which published segmentors are
trained, and so are the names of the parts: `load_published` reads such files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.heads._pyramid import Pyramid

__all__ = ['FCNHead', 'SemanticFPNHead', 'Segmentor', 'UPerHead', 'load_published', 'resize']


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinear with aligned borders of pixels."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode='bilinear', align_corners=False)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm or GroupNorm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, norm: str = 'batch') -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width) if norm == 'batch' else nn.GroupNorm(math.gcd(32, width), width)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Head(nn.Module):
    """What all heads end in: dropout of whole channels and a 1 x 1 convolution."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class TopDown(nn.Module):
    """A feature pyramid network without norms: maps of several widths to maps of one.

    Args:
        channels: of every map, the finest first.
        width: of the maps that it gives.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in channels)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for conv in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[-2:], mode='nearest')
        return [conv(x) for conv, x in zip(self.fpn_convs, maps)]


class SemanticFPNHead(_Head):
    """Semantic FPN: every level is brought to the finest stride by convolutions and doublings, and all are summed.

    Args:
        channels: Of every map, the finest first.
        strides: Of every map.
        num_classes: Number of classes.
        width: Of the sum.
        fpn_width: Of the feature pyramid network before it.
        dropout: Of whole channels before the classifier.
        norm: batch or group.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 128,
        fpn_width: int = 256,
        dropout: float = 0.1,
        norm: str = 'batch',
    ) -> None:
        super().__init__(width, num_classes, dropout)
        self.fpn = TopDown(channels, fpn_width)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            doublings = round(math.log2(stride / strides[0]))
            parts: list[nn.Module] = []
            for number in range(max(1, doublings)):
                parts.append(ConvNorm(width if number else fpn_width, width, 3, norm))
                if doublings:
                    parts.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.scale_heads.append(nn.Sequential(*parts))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, channels[i], h_i, w_i) to logits (B, num_classes, h_0, w_0)."""
        maps = self.fpn(maps)
        total = self.scale_heads[0](maps[0])
        for head, x in zip(self.scale_heads[1:], maps[1:]):
            total = total + resize(head(x), total.shape[-2:])
        return self.classify(total)


class UPerHead(_Head):
    """UPerNet: pyramid pooling on the coarsest map, a top-down path, and all levels side by side.

    Args:
        channels: Of every map, the finest first.
        num_classes: Number of classes.
        width: Of everything inside.
        pools: Sides of the grids that the coarsest map is averaged to.
        dropout: Of whole channels before the classifier.
        norm: batch or group.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: str = 'batch',
    ) -> None:
        super().__init__(width, num_classes, dropout)
        top = channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNorm(top, width, 1, norm)) for side in pools
        )
        self.bottleneck = ConvNorm(top + len(pools) * width, width, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, width, 1, norm) for dim in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in channels[:-1])
        self.fpn_bottleneck = ConvNorm(len(channels) * width, width, 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, channels[i], h_i, w_i) to logits (B, num_classes, h_0, w_0)."""
        top = maps[-1]
        pooled = [resize(part(top), top.shape[-2:]) for part in self.psp_modules]
        found = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        found.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(found) - 1, 0, -1):
            found[i - 1] = found[i - 1] + resize(found[i], found[i - 1].shape[-2:])
        found = [*(conv(x) for conv, x in zip(self.fpn_convs, found)), found[-1]]
        found = [resize(x, found[0].shape[-2:]) for x in found]
        return self.classify(self.fpn_bottleneck(torch.cat(found, 1)))


class FCNHead(_Head):
    """3 x 3 convolutions and a classifier on one map; in training only, where it is the auxiliary head.

    Args:
        channels: Of the map.
        num_classes: Number of classes.
        width: Of the convolutions.
        depth: Number of convolutions.
        dropout: Of whole channels before the classifier.
        norm: batch or group.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        norm: str = 'batch',
    ) -> None:
        super().__init__(width, num_classes, dropout)
        self.convs = nn.Sequential(*(ConvNorm(width if i else channels, width, 3, norm) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs(x))


class Segmentor(nn.Module):
    """Backbone, head, and an auxiliary head where there is one.

    Args:
        pyramid: The backbone's maps.
        head: SemanticFPNHead or UPerHead over them.
        auxiliary: FCNHead over one of them.
        level: Which one.
        backbone_lr: Whether learning rates fall by one step from the heads to backbone and feature pyramid, rather than
            with every layer of the backbone, when an optimizer asks for layers.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        head: nn.Module,
        auxiliary: nn.Module | None = None,
        level: int = 2,
        backbone_lr: bool = False,
    ) -> None:
        super().__init__()
        self.pyramid, self.head, self.auxiliary = pyramid, head, auxiliary
        self.level, self.backbone_lr = level, backbone_lr

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to logits (B, num_classes, H / s, W / s), s the finest stride.

        With `auxiliary` also the auxiliary head's logits, at its level's stride.
        """
        maps = self.pyramid(images)
        logits = self.head(maps)
        return (logits, self.auxiliary(maps[self.level])) if auxiliary else logits

    def no_weight_decay(self) -> set[str]:
        return {f'pyramid.{name}' for name in self.pyramid.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters by depth; heads come last."""
        if self.backbone_lr:
            return {'backbone': r'^pyramid\.|^head\.fpn\.'}
        inner = getattr(self.pyramid.backbone, 'model', None)
        if inner is not None and hasattr(inner, 'group_matcher'):
            groups = inner.group_matcher(coarse=coarse)
            return {key: _below('pyramid.backbone.model.', value) for key, value in groups.items()}
        # timm's list of stages has no matcher: its parts in their order
        parts = [name for name, _ in self.pyramid.backbone.named_children()]
        return {'blocks': [(rf'^pyramid\.backbone\.{name}\.', (place,)) for place, name in enumerate(parts)]}


_CARET = r'(?<!\[)\^'


def _below(prefix: str, pattern):
    """timm's patterns (one, several, or pairs of one and a suffix) for names behind a prefix."""
    if isinstance(pattern, str):
        # timm matches at the beginning of names with or without a caret; that of [^.] stays
        return f'^{re.escape(prefix)}(?:{re.sub(_CARET, "", pattern)})'
    return type(pattern)(_below(prefix, part) if isinstance(part, (str, tuple, list)) else part for part in pattern)


# published files


_PARTS = (
    ('backbone.extra_norms.', 'pyramid.norms.'),
    ('backbone.', 'pyramid.backbone.model.'),
    ('neck.', 'head.fpn.'),
    ('decode_head.', 'head.'),
    ('auxiliary_head.', 'auxiliary.'),
)


def load_published(segmentor: Segmentor, state_dict: Mapping) -> None:
    """Loads a segmentor as mmsegmentation saves it, such as RAVLT's `fpn_*_1x.pth` and `uper_*_2x.pth`.

    An auxiliary head that `segmentor` does not have is left out. Layout: `backbone.*` (RAVLT's carries its norms of
    the maps as `extra_norms.i.norm`), `neck.*`, `decode_head.*`, `auxiliary_head.*`.

    Args:
        segmentor: Where to.
        state_dict: The file's content, or its `state_dict`.

    Raises:
        ValueError: Keys or shapes do not fit; the first few of each kind are named.
    """
    state_dict = state_dict.get('state_dict', state_dict)
    own, found = segmentor.state_dict(), {}
    for key, value in state_dict.items():
        for theirs, ours in _PARTS:
            if key.startswith(theirs):
                found[ours + key[len(theirs) :]] = value
                break
    renamed = {}
    for key, value in found.items():
        if key.startswith('pyramid.norms.'):
            key = key.replace('.norm.', '.')
        elif key.startswith('head.fpn.'):
            key = key.replace('.conv.', '.')
        if not (key.startswith('auxiliary.') and segmentor.auxiliary is None):
            renamed[key] = value
    inner = 'pyramid.backbone.model.'
    if hasattr(segmentor.pyramid.backbone, 'model'):
        adapt = getattr(segmentor.pyramid.backbone.model, 'adapt_state_dict', dict)
        backbone = adapt({k.removeprefix(inner): v for k, v in renamed.items() if k.startswith(inner)})
        renamed = {k: v for k, v in renamed.items() if not k.startswith(inner)}
        renamed |= {inner + k: v for k, v in backbone.items()}
    counters = {k for k in own if k.endswith('num_batches_tracked')}
    wrong = {
        'missing': [k for k in own if k not in renamed and k not in counters],
        'unexpected': [k for k in renamed if k not in own],
        'other shape': [
            f'{k}: file {tuple(v.shape)}, model {tuple(own[k].shape)}'
            for k, v in renamed.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    if not found or any(wrong.values()):
        lines = [f'{title} ({len(keys)}): {", ".join(keys[:5])}' for title, keys in wrong.items() if keys]
        raise ValueError('\n  '.join(['these weights do not fit this segmentor:', *lines]))
    segmentor.load_state_dict({**{k: own[k] for k in counters}, **renamed})
