"""What happens to an image and its mask together: resizing, cropping, flipping, colours; masks are never blended.

The training transform is mmsegmentation's: a random scale of the size that evaluation resizes to, a random crop that no
class fills, a flip, and photometric distortion (contrast, saturation, brightness and hue, each in half of the images).
Source: mmsegmentation 1.2, transforms RandomResize, RandomCrop, RandomFlip and PhotoMetricDistortion. Pillow averages
over all pixels when it shrinks an image; OpenCV, which mmsegmentation uses, does not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from zoo.errors import ZooError

IGNORE = 255
_CROPS = 10  # crops that are tried before one that a class fills is taken


@dataclass
class MaskView:
    """How an image becomes the tensor that the network takes.

    Args:
        crop: Height and width of training images in pixels.
        short: Shorter side that images are resized to before anything else; null leaves them as they are.
        long: What the longer side is then at most.
        mean: Subtracted per channel, in the range 0..1.
        std: Divided by, per channel.
    """

    crop: tuple[int, int] = (512, 512)
    short: int | None = 512
    long: int | None = 2048
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        self.crop, self.mean, self.std = tuple(self.crop), tuple(self.mean), tuple(self.std)
        if min(self.crop) < 1 or (self.short is not None and self.short < 1):
            raise ZooError(f'view: crop {list(self.crop)} and short {self.short} must be positive')

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image is resized to."""
        if self.short is None:
            return width, height
        scale = self.short / min(width, height)
        if self.long is not None:
            scale = min(scale, self.long / max(width, height))
        return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


@dataclass
class MaskAugment:
    """Training augmentation.

    Args:
        scale: Factors of the evaluation size between which one is drawn.
        most_of_a_class: A crop of which one class takes more than this share is drawn again, up to ten times.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        photometric: Whether to distort brightness, contrast, saturation and hue.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    most_of_a_class: float = 0.75
    hflip: float = 0.5
    vflip: float = 0.0
    photometric: bool = True

    def __post_init__(self) -> None:
        self.scale = tuple(self.scale)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ZooError(f'augment.scale {list(self.scale)} must be two positive numbers, the smaller first')


def to_tensor(pixels: np.ndarray, view: MaskView) -> torch.Tensor:
    """uint8 (H, W, 3) to normalised fp32 (3, H, W)."""
    mean, std = (255 * np.array(v, np.float32) for v in (view.mean, view.std))
    return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))


class EvalMasks:
    """Resizes the image and leaves the mask as it is: results are about the original pixels.

    Args:
        view: What the network sees.
    """

    def __init__(self, view: MaskView) -> None:
        self.view = view

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 (3, h, w) and uint8 (H, W)."""
        size = self.view.size(*image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        return to_tensor(np.asarray(image), self.view), torch.from_numpy(np.ascontiguousarray(mask))


class TrainMasks:
    """The random transform of training; what a crop lacks is filled with zeros and ignored.

    Args:
        view: What the network sees.
        augment: Settings.
    """

    def __init__(self, view: MaskView, augment: MaskAugment) -> None:
        self.view, self.augment = view, augment

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 (3, *view.crop) and uint8 (*view.crop)."""
        augment, (high, wide) = self.augment, self.view.crop
        factor = random.uniform(*augment.scale)
        width, height = (max(1, int(side * factor + 0.5)) for side in self.view.size(*image.size))
        inner = min(high, height), min(wide, width)
        for _ in range(_CROPS):
            top, left = random.randint(0, height - inner[0]), random.randint(0, width - inner[1])
            cut = _nearest(mask, (height, width), (top, left), inner)
            if not _filled(cut, augment.most_of_a_class):
                break
        # one resampling of the crop's part alone gives what a crop of the resized image would hold
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + inner[1]) * across, (top + inner[0]) * down)
        if image.size != inner[::-1] or box != (0, 0, *image.size):
            image = image.resize(inner[::-1], Image.Resampling.BILINEAR, box=box)
        flips = tuple(slice(None, None, -1 if random.random() < p else 1) for p in (augment.vflip, augment.hflip))
        pixels = np.asarray(distort(image) if augment.photometric else image)[flips]
        tensor, target = to_tensor(pixels, self.view), torch.from_numpy(np.ascontiguousarray(cut[flips]))
        if inner == (high, wide):
            return tensor, target
        missing = (0, wide - inner[1], 0, high - inner[0])
        pad = torch.nn.functional.pad
        return pad(tensor, missing), pad(target, missing, value=IGNORE)


def _nearest(mask: np.ndarray, size: tuple[int, int], start: tuple[int, int], count: tuple[int, int]) -> np.ndarray:
    """A part of a mask that was resized to `size`, by the nearest pixel."""
    places = [
        ((np.arange(first, first + number) + 0.5) * (old / new)).astype(np.int64)
        for first, number, old, new in zip(start, count, mask.shape, size)
    ]
    return mask[np.ix_(*places)]


def _filled(mask: np.ndarray, share: float) -> bool:
    """Whether one class takes more than this share of what is not ignored."""
    if share >= 1:
        return False
    counts = np.bincount(mask.ravel(), minlength=256)[:IGNORE]
    return counts.max() > share * counts.sum() or not counts.any()


def distort(image: Image.Image) -> Image.Image:
    """Photometric distortion of an RGB image."""
    slope, offset = 1.0, 0.0
    if random.random() < 0.5:
        offset = random.uniform(-32, 32)
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    contrast_first = random.random() < 0.5
    if contrast_first:
        slope, offset = contrast, offset * contrast
    image = _line(image, slope, offset)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    turn = random.uniform(-18, 18) if random.random() < 0.5 else 0.0  # in units of 2 degrees, as OpenCV has them
    if saturation != 1 or turn:
        hue, colour, value = image.convert('HSV').split()
        hue = hue.point([int(level + turn * 256 / 180) % 256 for level in range(256)])
        colour = colour.point([min(255, int(level * saturation)) for level in range(256)])
        image = Image.merge('HSV', (hue, colour, value)).convert('RGB')
    return image if contrast_first else _line(image, contrast, 0.0)


def _line(image: Image.Image, slope: float, offset: float) -> Image.Image:
    if slope == 1 and not offset:
        return image
    table = [min(255, max(0, int(slope * level + offset))) for level in range(256)]
    return image.point(table * 3)
