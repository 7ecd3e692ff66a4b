"""How a segmentor is applied to whole images: at once, in windows, at several sizes and mirrored; and its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from zoo.errors import ZooError
from zoo.heads.segment import resize


@dataclass
class Inference:
    """How images become logits in evaluation.

    Args:
        mode: whole puts an image through the network at once, slide in overlapping windows.
        crop: Height and width of the windows.
        stride: Steps from window to window, down and across.
        windows: Windows that go through the network together.
        scales: Sizes, as factors of the image, whose class probabilities are averaged in test.
        flip: Whether to average with the mirrored image in test.
    """

    mode: Literal['whole', 'slide'] = 'whole'
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    windows: int = 8
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        self.crop, self.stride, self.scales = tuple(self.crop), tuple(self.stride), tuple(self.scales)
        if not self.scales or min(self.scales) <= 0:
            raise ZooError(f'inference.scales {list(self.scales)} must be positive, and at least one')
        if min(*self.crop, *self.stride, self.windows) < 1 or any(s > c for s, c in zip(self.stride, self.crop)):
            raise ZooError(f'inference.stride {list(self.stride)} must be within 1 .. crop {list(self.crop)}')


def slide(net: Callable[[Tensor], Tensor], images: Tensor, settings: Inference) -> Tensor:
    """Logits of images from windows; where they overlap, the mean.

    The last window of a row or column is moved back to end at the border; an image smaller than a window is one.

    Args:
        net: Images (N, C, h, w) to logits at any stride.
        images: (B, C, H, W).
        settings: Windows.

    Returns:
        fp32 (B, classes, H, W).
    """
    size = images.shape[-2:]
    crop = [min(c, s) for c, s in zip(settings.crop, size)]
    starts = [sorted({min(i, s - c) for i in range(0, s - c + t, t)}) for s, c, t in zip(size, crop, settings.stride)]
    places = [(b, top, left) for b in range(len(images)) for top in starts[0] for left in starts[1]]
    total, count = None, images.new_zeros(1, 1, *size, dtype=torch.float32)
    for first in range(0, len(places), settings.windows):
        chosen = places[first : first + settings.windows]
        windows = torch.stack([images[b, :, y : y + crop[0], x : x + crop[1]] for b, y, x in chosen])
        logits = resize(net(windows).float(), tuple(crop))
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *size)
        for (b, y, x), found in zip(chosen, logits):
            total[b, :, y : y + crop[0], x : x + crop[1]] += found
            if b == 0:
                count[..., y : y + crop[0], x : x + crop[1]] += 1
    return total / count


def infer(net: Callable[[Tensor], Tensor], images: Tensor, settings: Inference, augmented: bool = False) -> Tensor:
    """Logits of images, or with `augmented` and more than one size or mirroring the logarithm of mean probabilities.

    Args:
        net: Images (N, C, h, w) to logits at any stride.
        images: (B, C, H, W).
        settings: What to do.
        augmented: Whether to use `scales` and `flip`.

    Returns:
        fp32 (B, classes, h, w); for `slide` and where something is averaged, h = H and w = W.
    """

    def once(x: Tensor) -> Tensor:
        return slide(net, x, settings) if settings.mode == 'slide' else net(x).float()

    scales, flip = (settings.scales, settings.flip) if augmented else ((1.0,), False)
    if scales == (1.0,) and not flip:
        return once(images)
    size, total = images.shape[-2:], 0
    for scale in scales:
        scaled = images
        if scale != 1:
            target = [max(1, round(side * scale)) for side in size]
            scaled = torch.nn.functional.interpolate(
                images, target, mode='bilinear', align_corners=False, antialias=scale < 1
            )
        total = total + resize(once(scaled), size).softmax(1)
        if flip:
            total = total + resize(once(scaled.flip(-1)), size).flip(-1).softmax(1)
    return (total / (len(scales) * (1 + flip))).clamp_min(1e-12).log()


class MaskScores(MulticlassConfusionMatrix):
    """mIoU, pixel accuracy and mean class accuracy of all images together, as the benchmarks define them.

    A class that occurs neither in the truth nor in any prediction does not count.
    """

    def compute(self) -> dict[str, Tensor]:
        """The three, and `iou` and `accuracy` per class (NaN where there is none) and the `matrix`, rows the truth."""
        matrix = super().compute().double()
        right, truth, guessed = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou, accuracy = right / (truth + guessed - right), right / truth
        scores: dict[str, Any] = {'miou': iou.nanmean(), 'mean_accuracy': accuracy.nanmean()}
        scores['pixel_accuracy'] = right.sum() / matrix.sum()
        return {**{k: v.float() for k, v in scores.items()}, 'iou': iou, 'accuracy': accuracy, 'matrix': matrix.long()}
