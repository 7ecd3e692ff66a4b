"""Questions about drawn shapes: a visual-question-answering set that needs no download and never ends.

Four types of questions, with short answers that are equally frequent within a type (see `zoo.data._scenes`):

    colour    colour of ring                  one of 8 colours       by chance 12.5 %
    count     count of red                    0..4                            20.0 %
    position  place of red ring               top left ... (9)                11.1 %
    relation  red ring from blue plus         left right above below          25.0 %

Eight pairs of colour and shape (held_out_pairs) never occur in training. Every validation and test image holds two
objects of such pairs, and its one question is about them. Training images carry several questions, which are new in
every epoch. With `ramp` they begin with two objects and get fuller, and behind the questions comes `what`, answered by
two words for each cell, or `where`, answered by the place of every object: a small model learns to see sooner.
Batches are described in `zoo.data.chat`.
"""

from __future__ import annotations

from typing import Any

from zoo.data import _scenes
from zoo.data._scenes import held_out_pairs
from zoo.data._words import word_processor
from zoo.data.chat import ChatData, Sample
from zoo.data.seeding import derive_seed
from zoo.errors import ZooError

__all__ = ['Shapes', 'held_out_pairs']

_SPLITS = ('train', 'val', 'test')
_ASKING = ('colour', 'count', 'place', 'of', 'from', 'what', 'where', *_scenes.EMPTY.split())


def vocabulary() -> list[str]:
    """Every word of questions and answers."""
    words = [word for answers in _scenes.ANSWERS.values() for answer in answers for word in answer.split()]
    return list(dict.fromkeys([*_ASKING, *_scenes.SHAPES, *words]))


class _Drawn:
    """One split.

    Args:
        split: Its name.
        count: Its size.
        turns: Questions about each image.
        size: Height and width of the images.
        seed: Of the whole set.
        ramp: See Shapes.
    """

    def __init__(self, split: str, count: int, turns: int, size: int, seed: int, ramp: int | None = None) -> None:
        self.split, self.count, self.turns, self.size, self.ramp = split, count, turns, size, ramp
        self.seed = derive_seed(seed, _SPLITS.index(split))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f'shapes-{self.split}-{index}'

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        training = self.split == 'train'
        epochs, indices = [epoch if training else 0 for epoch, _ in keys], [index for _, index in keys]
        drawn = _scenes.draw_batch(
            self.seed, epochs, indices, self.turns, self.size, held_out=not training, ramp=self.ramp
        )
        return [
            Sample(
                turns=[(f'<image>{q}' if not n else q, a) for n, (_, q, a) in enumerate(turns)],
                images=[image],
                name=self.name(index),
                kinds=[kind for kind, _, _ in turns],
            )
            for image, turns, index in zip(drawn.pixels, drawn.turns, indices)
        ]


class Shapes(ChatData):
    """Drawn shapes with questions about colour, count, position and relation.

    Args:
        size: Height and width of the images in pixels, a multiple of 3 and of patch_size.
        patch_size: Side of what one image token stands for, as in the model's vision tower.
        turns: Questions about each training image.
        ramp: Epochs over which training images grow from two objects to all; half of them are sparse even then, and
            a last turn asks for everything. Null trains on full images and questions alone.
        train_images: Images of an epoch; every epoch draws new ones.
        val_images: Images (each with one question) in validation, the same in every run of one seed.
        test_images: The same for test.
        seed: Of the set: another one gives other images in all splits.
        kwargs: See ChatData.
    """

    def __init__(
        self,
        size: int = 48,
        patch_size: int = 12,
        turns: int = 8,
        ramp: int | None = 4,
        train_images: int = 6400,
        val_images: int = 1024,
        test_images: int = 4096,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size % 3 or size % patch_size:
            raise ZooError(f'data.size {size} must be a multiple of 3 and of data.patch_size {patch_size}')
        if min(turns, train_images, val_images, test_images) < 1:
            raise ZooError('data.turns, train_images, val_images and test_images must be positive')
        self.size, self.patch_size, self.turns, self.ramp, self.seed = size, patch_size, turns, ramp, seed
        self.counts = {'train': train_images, 'val': val_images, 'test': test_images}

    def open_splits(self) -> None:
        self.splits = {'train': _Drawn('train', self.counts['train'], self.turns, self.size, self.seed, self.ramp)}
        for split in ('val', 'test'):
            self.splits[split] = _Drawn(split, self.counts[split], 1, self.size, self.seed)

    def build_processor(self) -> Any:
        return word_processor(vocabulary(), self.size, self.patch_size)

    @property
    def question_types(self) -> list[str]:
        return list(_scenes.TYPES)

    def chance(self) -> dict[str, float]:
        return _scenes.chance()
