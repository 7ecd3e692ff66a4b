"""How images of any size become pixels of one size, or of a few sizes of equal area (buckets of aspect ratios)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from zoo.errors import ZooError


@dataclass
class Framing:
    """What of an image a diffusion model sees.

    Args:
        size: Height and width in pixels, or with buckets the root of the area.
        resize: crop keeps the aspect ratio and cuts the centre, square distorts.
        interpolation: Resampling.
        antialias: Whether to filter when shrinking; OpenCV's resize, which LinFusion's SD 1.5 script uses, does not.
        hflip: Probability of a horizontal flip.
        bucket_step: Height and width of buckets are multiples of this many pixels; null is one square.
        max_ratio: Longest side over shortest, of buckets.
        crop_area: Area of a random crop in training, as fractions of the image (0.9 to 1 in CLIP's recipe), which takes
            the place of resize; null is the centre.
    """

    size: int = 512
    resize: Literal['crop', 'square'] = 'crop'
    interpolation: Literal['bicubic', 'bilinear'] = 'bicubic'
    antialias: bool = True
    hflip: float = 0.0
    bucket_step: int | None = None
    max_ratio: float = 2.0
    crop_area: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        step = self.bucket_step
        if self.size < 1 or self.size % 8:
            raise ZooError(f'framing.size {self.size} must be a positive multiple of 8')
        if step is not None and (step < 8 or step % 8 or self.size % step):
            raise ZooError(f'framing.bucket_step {step} must be a multiple of 8 that divides framing.size {self.size}')
        if step is not None and self.resize == 'square':
            raise ZooError('framing.bucket_step is for resize: crop; square gives one size')
        if self.crop_area is not None and (step is not None or not 0 < self.crop_area[0] <= self.crop_area[1] <= 1):
            raise ZooError(f'framing.crop_area {self.crop_area} must be within 0..1, ascending, and without buckets')
        if self.max_ratio < 1:
            raise ZooError(f'framing.max_ratio {self.max_ratio} must be at least 1')

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Height and width of each bucket: for every width the largest height that keeps the area."""
        if self.bucket_step is None:
            return [(self.size, self.size)]
        step, found = self.bucket_step, set()
        for short in range(step, self.size + 1, step):
            long = self.size**2 // short // step * step
            if long / short <= self.max_ratio:
                found |= {(short, long), (long, short)}
        return sorted(found)

    def bucket(self, height: int, width: int) -> int:
        """The bucket, by number, whose aspect ratio is the closest."""
        ratio = math.log(height / width)
        return min(
            range(len(self.buckets)), key=lambda i: abs(math.log(self.buckets[i][0] / self.buckets[i][1]) - ratio)
        )

    def __call__(self, image: Image.Image, bucket: int = 0) -> tuple[Tensor, Tensor]:
        """Pixels in -1..1, fp32 (3, H, W), and int64 (6,): original height and width, top and left of the crop, H, W.

        Flip and crop are drawn from torch's default generator.

        Args:
            image: RGB.
            bucket: Number of the bucket.
        """
        height, width = self.buckets[bucket]
        mode = InterpolationMode(self.interpolation)
        original = [image.height, image.width]
        if self.crop_area:
            box = RandomResizedCrop.get_params(image, self.crop_area, (3 / 4, 4 / 3))  # top, left, height, width
            image = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        scale = max(height / image.height, width / image.width)
        inner = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
        inner = inner if self.resize == 'crop' and not self.crop_area else (height, width)
        pixels = TF.resize(TF.pil_to_tensor(image), list(inner), interpolation=mode, antialias=self.antialias)
        top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
        pixels = pixels[:, top : top + height, left : left + width]
        if self.hflip and float(torch.rand(())) < self.hflip:
            pixels, left = pixels.flip(-1), inner[1] - width - left
        return pixels / 127.5 - 1, torch.tensor([*original, top, left, height, width])
