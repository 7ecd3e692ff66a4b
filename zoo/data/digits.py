"""Handwritten digits: the 1797 scans of 8 x 8 pixels that come with scikit-learn (UCI optical digits). No download."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from zoo.data.base import ImageData

_TEST_PER_CLASS, _VAL_PER_CLASS = 36, 18


class _Scans:
    """A split of the scans.

    Args:
        images: uint8 scans, (N, 8, 8).
        targets: Digits.
        indices: Positions in scikit-learn's set.
    """

    def __init__(self, images: np.ndarray, targets: np.ndarray, indices: np.ndarray) -> None:
        self.images, self.targets, self.indices = images[indices], targets[indices], indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f'digit-{self.indices[index]:04d}'

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


class Digits(ImageData):
    """scikit-learn's digits with a fixed split: 1257 to train, 180 to validate, 360 to test, balanced by class.

    Args:
        kwargs: See ImageData.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def open_splits(self) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        targets = bunch.target
        # RandomState's stream is frozen by NumPy, so the split is the same with every version
        rng = np.random.RandomState(0)
        parts: dict[str, list[np.ndarray]] = {'train': [], 'val': [], 'test': []}
        for digit in range(10):
            order = rng.permutation(np.flatnonzero(targets == digit))
            held = _TEST_PER_CLASS + _VAL_PER_CLASS
            parts['test'].append(order[:_TEST_PER_CLASS])
            parts['val'].append(order[_TEST_PER_CLASS:held])
            parts['train'].append(order[held:])
        self.splits = {k: _Scans(images, targets, np.sort(np.concatenate(v))) for k, v in parts.items()}
        self.class_names = [str(digit) for digit in range(10)]
