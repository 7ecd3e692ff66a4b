"""Decoded images kept in memory, and batches that are cropped, flipped and normalised on the accelerator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from zoo.data.sampling import SUBSTITUTES, UNREADABLE, Source, substitute_for
from zoo.data.seeding import keyed_uniform
from zoo.data.transforms import Augment, View
from zoo.errors import ZooError

_CHUNK = 256
_CHANNELS = {'RGB': 3, 'L': 1}
_LARGEST_REDUCTION = 2


class _Decoding(Dataset):
    """Decodes runs of samples in the loader's workers; an unreadable sample is its error in words."""

    def __init__(self, source: Source, mode: str) -> None:
        self.source, self.mode = source, mode

    def __len__(self) -> int:
        return -(-len(self.source) // _CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[np.ndarray | str, int]]:
        return [self._one(i) for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.source)))]

    def _one(self, index: int) -> tuple[np.ndarray | str, int]:
        try:
            image, target = self.source.load(index)
            return np.array(image.convert(self.mode)), target
        except UNREADABLE as error:
            return f'{type(error).__name__}: {error}', -1


def _as_they_are(samples: list) -> list:
    return samples


class CachedSource:
    """A source whose samples are decoded once, into one block of memory that loader processes share.

    `size` is height and width if all readable images share them, else None.

    Args:
        source: What to decode.
        mode: Pillow mode of the kept images, RGB or L.
        num_workers: Processes that decode.
    """

    def __init__(self, source: Source, mode: str, num_workers: int = 0) -> None:
        self.source, self.mode = source, mode
        self.errors: dict[int, str] = {}
        # not torch's own collation: it would make a tensor, and a file of shared memory, of every image
        loader = DataLoader(_Decoding(source, mode), batch_size=None, num_workers=num_workers, collate_fn=_as_they_are)
        samples = [sample for chunk in loader for sample in chunk]
        self.errors = {i: image for i, (image, _) in enumerate(samples) if isinstance(image, str)}
        images = [image for image, _ in samples if not isinstance(image, str)]
        shapes = [(0, 0) if isinstance(image, str) else image.shape[:2] for image, _ in samples]
        self.shapes = torch.tensor(shapes, dtype=torch.long).reshape(-1, 2)
        sizes = self.shapes.prod(1) * _CHANNELS[mode]
        self.starts = sizes.cumsum(0) - sizes
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images] or [np.empty(0, 'u1')]))
        self.targets = torch.tensor([target for _, target in samples], dtype=torch.long)
        sizes = {image.shape[:2] for image in images}
        self.size: tuple[int, int] | None = sizes.pop() if len(sizes) == 1 else None

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.errors:
            raise OSError(self.errors[index])
        (height, width), start = self.shapes[index].tolist(), int(self.starts[index])
        flat = self.pixels[start : start + height * width * _CHANNELS[self.mode]].numpy()
        shape = (height, width, 3) if self.mode == 'RGB' else (height, width)
        return Image.fromarray(flat.reshape(shape)), int(self.targets[index])

    def gather(self, indices: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8, of readable samples that share one size."""
        height, width = self.size
        channels = _CHANNELS[self.mode]
        rows = self.pixels.view(-1, height, width, channels)
        return rows[self.starts[indices] // (height * width * channels)].permute(0, 3, 1, 2)


class CachedBatches(Dataset):
    """Whole batches of undecorated pixels, with the numbers that their random transforms are a function of.

    Unreadable samples are reported and replaced as `KeyedDataset` does it.

    Args:
        source: Images of one size.
        seed: Seed of the run.
        substitute: Whether to replace unreadable samples; also whether random numbers come with the batch.
    """

    def __init__(self, source: CachedSource, seed: int = 0, substitute: bool = False) -> None:
        self.source, self.seed, self.substitute = source, seed, substitute

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        failures, used = [], []
        for epoch, index in keys:
            chosen = index
            for attempt in range(1, 2 + SUBSTITUTES):
                if chosen not in self.source.errors:
                    used.append((epoch, index, chosen))
                    break
                failures.append((self.source.name(chosen), self.source.errors[chosen]))
                if not self.substitute:
                    break
                chosen = substitute_for(index, attempt, len(self.source))
        found = torch.tensor(used, dtype=torch.long).reshape(-1, 3)
        batch = {
            'image': self.source.gather(found[:, 2]),
            'target': self.source.targets[found[:, 2]],
            'name': [self.source.name(i) for i in found[:, 2].tolist()],
            'failures': failures,
        }
        if self.substitute:
            batch['uniform'] = keyed_uniform(self.seed, found[:, 0], found[:, 1], DeviceTransform.RANDOM_NUMBERS)
        return batch


class DeviceTransform:
    """The transforms of `View` and a part of `Augment` (crop and flip) for whole batches, on the batch's device.

    Crops are sampled bilinearly without antialiasing, and evaluation resizes with it: for images up to twice as large
    as what the network sees.

    Args:
        view: What the network sees.
        augment: Training augmentation.

    Raises:
        ZooError: for augmentation that this class does not have.
    """

    RANDOM_NUMBERS = 5

    def __init__(self, view: View, augment: Augment) -> None:
        missing = [k for k in ('auto_augment', 're_prob', 'rotate', 'translate') if getattr(augment, k)]
        missing += ['color_jitter'] if augment.color_jitter and view.channels == 3 else []
        if missing:
            raise ZooError(
                f'transform_on: device has crop and flip only; switch off augment.{", augment.".join(missing)} '
                '(null or 0), or set transform_on: worker'
            )
        self.view, self.augment = view, augment

    def check(self, source: CachedSource, split: str) -> None:
        """Refuses images of several sizes, and much larger ones than the network sees."""
        if source.size is None:
            raise ZooError(f'transform_on: device needs images of one size, those of the {split} split differ')
        if min(source.size) > _LARGEST_REDUCTION * self.view.size:
            raise ZooError(
                f'transform_on: device does not antialias: images of {source.size[0]} x {source.size[1]} pixels are '
                f'too large for view.size {self.view.size}; set transform_on: worker'
            )

    def __call__(self, images: Tensor, uniform: Tensor | None) -> Tensor:
        """Normalised float images (B, C, size, size).

        Args:
            images: uint8 (B, C, H, W).
            uniform: (B, RANDOM_NUMBERS) in [0, 1) for the random crop and flip; None for evaluation.
        """
        x = images.float().div_(255)
        x = self._centre(x) if uniform is None else F.grid_sample(
            x, self.crops(uniform, x.shape[-2:]), mode='bilinear', padding_mode='border', align_corners=False
        )  # fmt: skip
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.view.mean, self.view.std))
        return (x - mean) / std

    def _centre(self, x: Tensor) -> Tensor:
        size, interpolation = self.view.size, self.view.interpolation
        scaled = int(size / self.view.crop_pct)
        if min(x.shape[-2:]) != scaled:
            mode = InterpolationMode('bicubic' if interpolation == 'random' else interpolation)
            x = TF.resize(x, [scaled], interpolation=mode, antialias=True).clamp_(0, 1)
        return TF.center_crop(x, [size, size])

    def crops(self, uniform: Tensor, size: tuple[int, int]) -> Tensor:
        """Sampling grids (B, size, size, 2) of random crops with flips.

        Args:
            uniform: (B, 5): area, aspect ratio, column, row, flip.
            size: Height and width of the images; a crop that exceeds one of them is cut to it.
        """
        (low, high), (narrow, wide), out = self.augment.scale, self.augment.ratio, self.view.size
        height, width = size
        area = (low + (high - low) * uniform[:, 0]) * height * width
        ratio = (torch.lerp(*(uniform.new_tensor(r).log() for r in (narrow, wide)), uniform[:, 1])).exp()
        w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
        left, top = uniform[:, 2] * (width - w), uniform[:, 3] * (height - h)
        theta = uniform.new_zeros(len(uniform), 2, 3)
        flip = 1 - 2 * (uniform[:, 4] < self.augment.hflip).to(uniform)
        theta[:, 0, 0], theta[:, 1, 1] = w / width * flip, h / height
        theta[:, 0, 2], theta[:, 1, 2] = (2 * left + w) / width - 1, (2 * top + h) / height - 1
        return F.affine_grid(theta, [len(uniform), 1, out, out], align_corners=False)
