"""Drawn shapes with captions: image-text pairs that need no download and never end.

One object of 8 colours and 8 shapes, in three sizes, stands in one of nine places on a dark and noisy ground. Training
captions say all or a part of what there is (`the red ring at the top left`, `something red`, `the ring that is red`).
Half of what is only called by its shape has a colour that has no name, and half of what is only called by its colour is
a blot: either word is learned apart from the other. Two pairs out of eight of every colour, and of every shape, never
occur in training, neither drawn nor named: one of them is what validation shows, the other one is for the test. Their
images have the class of their pair among all 64, and a caption that says everything.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from zoo.data import _scenes
from zoo.data._scenes import COLOURS, SHAPES
from zoo.data.base import ResumableData, loader_options
from zoo.data.sampling import EpochSampler
from zoo.data.seeding import derive_seed, keyed_uniform, run_seed
from zoo.data.transforms import View
from zoo.errors import ZooError

__all__ = ['CaptionedShapes', 'class_names', 'pairs_of']

TEMPLATES = (
    'the {colour} {shape}',
    'the {colour} {shape} at the {place}',
    'the {shape} that is {colour}',
    'the {shape} that is {colour} at the {place}',
    'a picture of the {colour} {shape}',
    'the {shape} at the {place}',
    'something {colour} at the {place}',
    'the {shape}',
    'something {colour}',
)
_EVERYTHING = TEMPLATES[1]
_SPLITS = ('train', 'val', 'test')
_PLACES = _scenes.ANSWERS['position']
_NUMBERS, _GRID = 13, 3
_LONE = 0.5  # share of the captions of one attribute whose object lacks the other one
_APART = 90  # least distance of a nameless colour from the named ones, in levels of RGB; shades reach 35


def class_names() -> list[str]:
    """The 64 pairs, by 8 x colour + shape."""
    return [f'{colour} {shape}' for colour in COLOURS for shape in SHAPES]


def pairs_of(split: str) -> list[int]:
    """The pairs, as classes, that a split shows: 48 in training, 8 that are nowhere else in validation and in test."""
    count = len(SHAPES)
    shift = {c * count + s: (s - c) % count for c in range(count) for s in range(count)}
    wanted = {'val': {0}, 'test': {1}}.get(split, set(range(2, count)))
    return [pair for pair, distance in shift.items() if distance in wanted]


class _Batches(Dataset):
    """Whole batches of one split, each sample a function of (seed, epoch, index).

    Args:
        split: Its name.
        count: Its size.
        seed: Of the whole set.
        size: Height and width of the images.
        view: Normalisation.
    """

    def __init__(self, split: str, count: int, seed: int, size: int, view: View) -> None:
        self.split, self.count, self.size, self.view = split, count, size, view
        self.seed, self.pairs = derive_seed(seed, _SPLITS.index(split)), np.array(pairs_of(split))

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        training = self.split == 'train'
        epochs = torch.tensor([epoch if training else 0 for epoch, _ in keys])
        numbers = keyed_uniform(self.seed, epochs, torch.tensor([index for _, index in keys]), _NUMBERS).numpy()
        pair, place, template = (
            (numbers[:, column] * size).astype(np.int64)
            for column, size in ((0, len(self.pairs)), (1, len(_PLACES)), (10, len(TEMPLATES)))
        )
        pair, said = self.pairs[pair], [TEMPLATES[t] if training else _EVERYTHING for t in template]
        lone = numbers[:, 11] < _LONE
        nameless = lone & np.array(['{colour}' not in text for text in said])
        shapeless = lone & np.array(['{shape}' not in text for text in said])
        pixels = _paint(pair, place, nameless, shapeless, numbers, self.size)
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.view.mean, self.view.std))
        captions = [
            text.format(colour=tuple(COLOURS)[p // len(SHAPES)], shape=SHAPES[p % len(SHAPES)], place=_PLACES[where])
            for p, where, text in zip(pair, place, said)
        ]
        names = [f'shapes-{self.split}-{index}' for _, index in keys]
        target = torch.from_numpy(np.where(nameless | shapeless, -1, pair))
        return {'image': (pixels - mean) / std, 'target': target, 'caption': captions, 'name': names, 'failures': []}


def _paint(
    pair: np.ndarray,
    place: np.ndarray,
    nameless: np.ndarray,
    shapeless: np.ndarray,
    numbers: np.ndarray,
    size: int,
) -> np.ndarray:
    """uint8 (B, size, size, 3): pairs (B,) at places (B,), the rest by random numbers (B, 13).

    Nameless ones (bool (B,)) have any colour far from the named ones, shapeless ones (bool (B,)) are blots.
    """
    count, cell = len(pair), size // _GRID
    pick = [(numbers[:, 2 + i] * n).astype(np.int64) for i, n in enumerate((3, 5, 5))]
    mask = _scenes._masks(cell)[pair % len(SHAPES), pick[0], pick[1], pick[2]]
    colour = np.array(list(COLOURS.values()), np.float32)[pair // len(SHAPES)] + 40 * numbers[:, 5:8] - 20
    for chosen, values, bank in ((nameless, colour, _nameless()), (shapeless, mask, _blots(cell))):
        values[chosen] = bank[(numbers[chosen, 12] * len(bank)).astype(np.int64)]
    mask = mask[..., None]
    ground = (15 + 40 * numbers[:, 8])[:, None, None, None].astype(np.float32)
    cells = np.broadcast_to(ground, (count, size, size, 3)).astype(np.float32)
    cells = cells.reshape(count, _GRID, cell, _GRID, cell, 3)
    cells[np.arange(count), place // _GRID, :, place % _GRID] = ground + mask * (colour[:, None, None] - ground)
    image, noise = cells.reshape(count, size, size, 3), _scenes.noise_bank()
    for row, start in enumerate((numbers[:, 9] * (len(noise) - size * size * 3)).astype(np.int64)):
        image[row] += noise[start : start + size * size * 3].reshape(size, size, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _nameless() -> np.ndarray:
    """Colours without a name, bright enough to be seen, fp32 (N, 3)."""
    colours = np.random.RandomState(0).uniform(30, 255, (8192, 3)).astype(np.float32)
    distance = np.linalg.norm(colours[:, None] - np.array(list(COLOURS.values()), np.float32), axis=-1)
    return colours[(distance.min(1) > _APART) & (colours.max(1) > 110)]


@functools.lru_cache(maxsize=4)
def _blots(cell: int) -> np.ndarray:
    """Six discs each, thrown at random, fp32 (N, cell, cell)."""
    draw, blots = np.random.RandomState(1), np.zeros((256, cell, cell), np.float32)
    pixels, unit = np.arange(cell), cell / 16
    for _ in range(6):
        down, right = draw.uniform(2 * unit, 14 * unit, (2, len(blots), 1, 1))
        radius = draw.uniform(unit, 2.6 * unit, (len(blots), 1, 1))
        distance = np.hypot(pixels[:, None] - down, pixels - right)
        blots = np.maximum(blots, np.clip(radius + 0.5 - distance, 0, 1, dtype=np.float32))
    return blots


class CaptionedShapes(ResumableData):
    """Drawn shapes with captions; what validation and test show are pairs of colour and shape that training never does.

    Training images whose object is no pair (nameless or a blot) have the target -1.

    Args:
        size: Height and width of the images in pixels, a multiple of 3.
        train_images: Images of an epoch; every epoch draws new ones.
        val_images: Images in validation, the same in every run of one seed.
        test_images: The same for test.
        seed: Of the set: another one gives other images in all splits.
        batch_size: Images per step and process.
        eval_batch_size: The same in validation and test; batch_size where not given.
        num_workers: Loader processes.
    """

    captioned = True

    def __init__(
        self,
        size: int = 48,
        train_images: int = 6400,
        val_images: int = 512,
        test_images: int = 2048,
        seed: int = 0,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, strict=False)
        if size < 24 or size % _GRID:
            raise ZooError(f'data.size {size} must be a multiple of 3, and at least 24')
        if not batch_size <= train_images or min(val_images, test_images) < 1:
            raise ZooError('data.train_images must fill a batch; val_images and test_images must be positive')
        self.seed, self.eval_batch_size, self.class_names = seed, eval_batch_size or batch_size, class_names()
        self.counts = {'train': train_images, 'val': val_images, 'test': test_images}
        self.view = View(size=size, crop_pct=1.0, mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(self.counts['train'], run_seed(), True, *self._ranks())
        if self._resume_at:
            epoch, batches = self._resume_at
            sampler.resume(epoch, batches * self.batch_size)
        return self._loader('train', sampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader('val', EpochSampler(self.counts['val'], run_seed(), False, *self._ranks()))

    def test_dataloader(self) -> DataLoader:
        return self._loader('test', EpochSampler(self.counts['test'], run_seed(), False, *self._ranks()))

    def _loader(self, split: str, sampler: EpochSampler) -> DataLoader:
        training = split == 'train'
        return DataLoader(
            _Batches(split, self.counts[split], self.seed, self.view.size, self.view),
            batch_size=self.batch_size if training else self.eval_batch_size,
            sampler=sampler,
            drop_last=training,
            collate_fn=_as_it_is,
            **loader_options(self.num_workers),
        )


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
