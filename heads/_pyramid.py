"""Feature pyramids of any backbone in timm's registry, by name.

A model with stages gives its own maps. A model that keeps one token grid (ViG, ViT, DeiT) gives ViTDet's simple feature
pyramid, made of its last map alone: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
arXiv 2203.16527, section 3 and appendix (two transposed convolutions, one, none, max pooling; then a 1 x 1 and a 3 x 3
convolution of one width, each with a LayerNorm, on every level).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ['Pyramid', 'SimplePyramid']


class SimplePyramid(nn.Module):
    """One map of stride s to maps of strides s/4, s/2, s and 2s, all `width` channels.

    Args:
        channels: of the map.
        width: of every level.
        skip: levels left out, the finest first.
    """

    def __init__(self, channels: int, width: int = 256, skip: int = 0) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        double = nn.ConvTranspose2d(channels, half, 2, 2)
        quadruple = [nn.ConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half), nn.GELU()]
        resize = [
            (nn.Sequential(*quadruple, nn.ConvTranspose2d(half, quarter, 2, 2)), quarter),
            (double, half),
            (nn.Identity(), channels),
            (nn.MaxPool2d(2, ceil_mode=True), channels),
        ]
        self.levels = nn.ModuleList(nn.Sequential(layer, *_to_width(dim, width)) for layer, dim in resize[skip:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, h, w) to maps (B, width, ...), the finest first."""
        return [level(x) for level in self.levels]


def _to_width(channels: int, width: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


class Pyramid(nn.Module):
    """The maps of a backbone, the finest first, with `channels` and `strides`.

    `simple` says that they are a simple feature pyramid: each has seen the whole network, so that a top-down path on
    top of them adds nothing (ViTDet, table 1).

    Args:
        name: Name in timm's registry, which holds the zoo's models too; timm's `hf-hub:` and `local-dir:` work.
        kwargs: Further arguments of timm.create_model, such as drop_path_rate, img_size or dynamic_img_size.
        pretrained: Whether to start from published weights.
        out_indices: Which of the model's maps; all from stride `least` on by default, the last one of a plain model.
        least: Smallest stride of the maps wanted.
        norms: Whether every map of a model with stages goes through a LayerNorm over its channels, as Swin's and
            RAVLT's detectors do.
        finer: Levels to add below the finest map, each a transposed convolution of the level above it: MobileMamba's
            maps begin at stride 16, and its detectors add two.
        width: Channels of a simple feature pyramid.
        frozen: Maps, the finest first, whose parameters do not train (a plain model has one: all of it).
        freeze_norms: Whether BatchNorms keep their statistics everywhere; their weights train.
        grad_checkpointing: Whether blocks are computed again in the backward pass, where the model can.

    Raises:
        ValueError: The model has no features_only form or not these maps.
    """

    def __init__(
        self,
        name: str,
        *,
        kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        least: int = 4,
        norms: bool = False,
        finer: int = 0,
        width: int = 256,
        frozen: int = 0,
        freeze_norms: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = _create(name, pretrained, out_indices, kwargs or {})
        channels, strides = self.backbone.feature_info.channels(), self.backbone.feature_info.reduction()
        self.simple = len(strides) == 1 or min(strides) == max(strides)
        lower = 0 if self.simple or out_indices is not None else least
        self._take = [i for i, stride in enumerate(strides) if stride >= lower][-1 if self.simple else None :]
        if not self._take:
            raise ValueError(f'{name} has no map of stride {least} or more; its strides are {strides}')
        channels, strides = ([values[i] for i in self._take] for values in (channels, strides))
        self.norms = nn.ModuleList(map(LayerNorm2d, channels)) if norms and not self.simple else None
        if self.simple:
            stride = strides[0]
            if stride % 4:
                raise ValueError(f'{name} has maps of stride {stride}: a simple feature pyramid needs a multiple of 4')
            strides = [s for s in (stride // 4, stride // 2, stride, stride * 2) if s >= least]
            self.top = SimplePyramid(channels[0], width, skip=4 - len(strides))
            channels = [width] * len(strides)
        self.finer = nn.ModuleList(nn.ConvTranspose2d(channels[0], channels[0], 2, 2) for _ in range(finer))
        self.channels: list[int] = [channels[0]] * finer + channels
        self.strides: list[int] = [strides[0] // 2**i for i in range(finer, 0, -1)] + strides
        if self.strides[0] < 1:
            raise ValueError(f'finer={finer}: the finest map of {name} has stride {strides[0]}')
        inner = getattr(self.backbone, 'model', self.backbone)
        if grad_checkpointing:
            inner.set_grad_checkpointing(True)
        self._freeze_norms = freeze_norms
        if frozen:
            self._freeze(frozen, kwargs or {})
        self.train(self.training)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to maps (B, channels[i], H / strides[i], W / strides[i])."""
        maps = self._maps(images)
        if self.simple:
            maps = self.top(maps[-1])
        elif self.norms is not None:
            maps = [norm(x) for norm, x in zip(self.norms, maps)]
        for layer in self.finer:
            maps = [layer(maps[0]), *maps]
        return maps

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        for module in self._batch_norms():
            own = list(module.parameters())  # none where it has no weights, and says nothing of what is frozen
            if self._freeze_norms or (own and not any(p.requires_grad for p in own)):
                module.eval()  # a frozen part keeps its statistics
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants left out of weight decay."""
        inner = getattr(self.backbone, 'model', None)
        prefix = 'backbone.model.' if inner is not None else 'backbone.'
        inner = inner if inner is not None else self.backbone
        return {prefix + key for key in inner.no_weight_decay()} if hasattr(inner, 'no_weight_decay') else set()

    def _maps(self, images: Tensor) -> list[Tensor]:
        found = self.backbone(images)
        found = [found[i] for i in self._take]
        # timm's networks for channels-last maps say so in output_fmt
        last = str(getattr(self.backbone, 'output_fmt', 'NCHW')).endswith('NHWC')
        return [x.permute(0, 3, 1, 2) if last else x for x in found]

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def _freeze(self, count: int, kwargs: dict[str, Any]) -> None:
        """Freezes what the `count`-th map depends on, whatever the model calls its parts: autograd knows."""
        if count > len(self._take):
            raise ValueError(f'frozen={count}: {self.name} gives {len(self._take)} maps')
        config = getattr(getattr(self.backbone, 'model', self.backbone), 'pretrained_cfg', None) or {}
        size = kwargs.get('img_size') or config.get('input_size', (3, 224, 224))[-2:]
        images = torch.zeros(1, kwargs.get('in_chans', 3), *((size, size) if isinstance(size, int) else size))
        was, parameters = self.training, [p for p in self.backbone.parameters() if p.requires_grad]
        target = self.eval()._maps(images)[count - 1].float().sum()
        used = torch.autograd.grad(target, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, used):
            parameter.requires_grad_(gradient is None)
        self.train(was)


def _create(name: str, pretrained: bool, out_indices: Sequence[int] | None, kwargs: dict[str, Any]) -> nn.Module:
    chosen = {} if out_indices is None else {'out_indices': tuple(out_indices)}
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **chosen, **kwargs)
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
        if 'Unknown model' in str(error):
            raise ValueError(f'no model named {name!r}') from error
        raise ValueError(f'{name} gives no feature maps with {kwargs | chosen}\n  {error}') from error
