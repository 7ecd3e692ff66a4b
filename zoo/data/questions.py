"""Labelled images as questions with the class name as answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from zoo.data._words import word_processor
from zoo.data.base import ImageData
from zoo.data.chat import ChatData, Sample, load_each
from zoo.data.conversations import load_processor
from zoo.data.sampling import Source
from zoo.data.seeding import derive_seed, run_seed
from zoo.errors import ZooError


class _Labelled:
    """A split of labelled images as conversations of one turn.

    Args:
        source: The images.
        question: What is asked about each.
        answers: Names of the classes.
        hflip: Probability of flipping.
        shift: Most pixels by which an image is moved each way, black coming in.
    """

    def __init__(self, source: Source, question: str, answers: list[str], hflip: float = 0.0, shift: int = 0) -> None:
        self.source, self.question, self.answers = source, f'<image>{question}', answers
        self.hflip, self.shift = hflip, shift

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        return [
            load_each(lambda index, epoch=epoch: self._load(epoch, index), [(epoch, index)])[0] for epoch, index in keys
        ]

    def _load(self, epoch: int, index: int) -> Sample:
        image, label = self.source.load(index)
        image = self._moved(image.convert('RGB'), epoch, index)
        return Sample([(self.question, self.answers[label])], [image], self.name(index), ['class'])

    def _moved(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        if not self.hflip and not self.shift:
            return image
        flip, right, down = np.random.RandomState(derive_seed(run_seed(), epoch, index) % 2**32).rand(3)
        if flip < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y = (int(n * (2 * self.shift + 1)) - self.shift for n in (right, down))
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y)) if x or y else image


class ImageQuestions(ChatData):
    """Any labelled images as `<image>what is this` with the class name as answer.

    Args:
        images: Where images and labels come from; of its settings those about loading batches are not used.
        question: What is asked about every image.
        size: Height and width that images are resized to, for the processor that is built here.
        patch_size: Side of what one image token stands for, for the processor that is built here.
        processor: Folder or hub name of a transformers processor; by default one is built whose words are those of the
            question and of the class names.
        hflip: Probability of flipping a training image.
        shift: Most pixels by which a training image is moved each way.
        kwargs: See ChatData.
    """

    def __init__(
        self,
        images: ImageData,
        question: str = 'what is this',
        size: int = 32,
        patch_size: int = 4,
        processor: str | None = None,
        hflip: float = 0.0,
        shift: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size % patch_size:
            raise ZooError(f'data.size {size} must be a multiple of data.patch_size {patch_size}')
        self.images, self.question, self.size, self.patch_size = images, question, size, patch_size
        self.processor_name, self.hflip, self.shift = processor, hflip, shift

    def open_splits(self) -> None:
        self.images.setup()
        if not self.images.splits:
            raise ZooError(
                f'{type(self.images).__name__} reads a stream; questions need images that are found by index'
            )
        answers = [name.replace('_', ' ') for name in self.images.class_names]
        for split, source in self.images.splits.items():
            moves = (self.hflip, self.shift) if split == 'train' else (0.0, 0)
            self.splits[split] = _Labelled(source, self.question, answers, *moves)

    def build_processor(self) -> Any:
        if self.processor_name:
            return load_processor(self.processor_name)
        answers = next(iter(self.splits.values())).answers
        words = [word for text in (self.question, *answers) for word in text.split()]
        return word_processor(list(dict.fromkeys(words)), self.size, self.patch_size)

    @property
    def question_types(self) -> list[str]:
        return ['class']

    def chance(self) -> dict[str, float]:
        return {'class': 1 / self.images.num_classes} if self.images.num_classes else {}
