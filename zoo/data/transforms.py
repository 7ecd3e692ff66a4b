"""What a network sees: `View` is shared by training and evaluation, `Augment` is for training alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms as T

from zoo.errors import ZooError


@dataclass
class View:
    """How an image becomes the tensor that the network takes.

    Args:
        size: Height and width in pixels.
        channels: 3 (RGB) or 1 (grey).
        interpolation: Resampling: bicubic, bilinear, nearest or, in training only, random.
        crop_pct: Evaluation resizes the shorter side to size / crop_pct and cuts the centre.
        mean: Subtracted per channel, in the range 0..1.
        std: Divided by, per channel.
    """

    size: int = 224
    channels: int = 3
    interpolation: str = 'bicubic'
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ZooError(f'view.channels must be 1 or 3, not {self.channels}')
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ZooError(f'view: size {self.size} must be positive and crop_pct {self.crop_pct} within 0..1')
        self.mean, self.std = self._per_channel('mean'), self._per_channel('std')

    def _per_channel(self, name: str) -> tuple[float, ...]:
        values = tuple(getattr(self, name))
        if len(values) == 3 and self.channels == 1:
            return (sum(values) / 3,)
        if len(values) != self.channels:
            raise ZooError(f'view.{name} has {len(values)} values for {self.channels} channels')
        return values

    @property
    def mode(self) -> str:
        return 'RGB' if self.channels == 3 else 'L'


@dataclass
class Augment:
    """Training augmentation of single images; mixing of images (mixup, cutmix) belongs to the task.

    Args:
        scale: Area of the random crop, as fractions of the image.
        ratio: Aspect ratio of the random crop.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength; ignored where an auto-augment policy is set, as in timm.
        auto_augment: A timm policy such as rand-m9-mstd0.5-inc1, or null.
        re_prob: Probability of random erasing.
        re_mode: Fill of erased regions: pixel, rand or const.
        re_count: Largest number of erased regions.
        rotate: Largest random rotation in degrees.
        translate: Largest random shift as a fraction of the size.
        repeats: Differently augmented copies of an image in an epoch, which then visits a fraction of the images.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float | None = 0.4
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = 'pixel'
    re_count: int = 1
    rotate: float = 0.0
    translate: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ZooError(f'augment.repeats must be at least 1, not {self.repeats}')


def eval_transform(view: View) -> Callable[[Image.Image], object]:
    """The deterministic transform of validation, test and predict."""
    return create_transform(
        (view.channels, view.size, view.size),
        is_training=False,
        interpolation=view.interpolation if view.interpolation != 'random' else 'bicubic',
        mean=view.mean,
        std=view.std,
        crop_pct=view.crop_pct,
    )


def train_transform(view: View, augment: Augment) -> Callable[[Image.Image], object]:
    """The random transform of training (timm's), with an optional small rotation and shift before it."""
    transform = create_transform(
        (view.channels, view.size, view.size),
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter if view.channels == 3 else None,
        auto_augment=augment.auto_augment,
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
        re_count=augment.re_count,
    )
    if not augment.rotate and not augment.translate:
        return transform
    shift = (augment.translate, augment.translate)
    affine = T.RandomAffine(augment.rotate, translate=shift, interpolation=T.InterpolationMode.BILINEAR)
    return T.Compose([affine, transform])
