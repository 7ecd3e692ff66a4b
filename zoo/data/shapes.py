"""Questions about drawn shapes: a visual-question-answering set that needs no download and never ends.

Four types of questions, with short answers that are equally frequent within a type (see `zoo.data._scenes`):

    colour    colour of ring                  one of 8 colours       by chance 12.5 %
    count     count of red                    0..3                            25.0 %
    position  place of ring                   top left ... (9)                11.1 %
    relation  ring from plus                  left right above below          25.0 %

Eight pairs of colour and shape (held_out_pairs) never occur in training. Every validation and test image holds two
objects of such pairs, and its one question is about one of them. Training images carry several questions, which are new
in every epoch. In the first `easy_epochs` half of them are sparse, and behind the questions comes `what`, answered by
two words for each cell, or `where`, answered by the place of every object that its shape names: a small model learns to
see sooner.
Batches are described in `zoo.data.chat`.
"""

from __future__ import annotations

from typing import Any, Literal

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
        kinds: Types of the questions about each image; None for one question, the types in turn.
        size: Height and width of the images.
        seed: Of the whole set.
        easy: Further arguments of draw_batch.
    """

    def __init__(self, split: str, count: int, kinds: list[str] | None, size: int, seed: int, **easy: Any) -> None:
        self.split, self.count, self.kinds, self.size, self.easy = split, count, kinds, size, easy
        self.seed = derive_seed(seed, _SPLITS.index(split))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f'shapes-{self.split}-{index}'

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        training = self.split == 'train'
        epochs, indices = [epoch if training else 0 for epoch, _ in keys], [index for _, index in keys]
        drawn = _scenes.draw_batch(
            self.seed, epochs, indices, self.kinds, self.size, held_out=not training, **self.easy
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
        ask: Types of the questions about each training image, which are asked in random order.
        easy_epochs: Epochs in which half of the training images are sparse, easy_ask is asked, and a last turn asks for
            everything.
        easy_ask: Types of the questions in those epochs; None for ask.
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
        ask: tuple[Literal['colour', 'count', 'position', 'relation'], ...] = 2 * _scenes.TYPES,
        easy_epochs: int = 4,
        easy_ask: tuple[Literal['colour', 'count', 'position', 'relation'], ...] | None = None,
        train_images: int = 6400,
        val_images: int = 1024,
        test_images: int = 4096,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size % 3 or size % patch_size:
            raise ZooError(f'data.size {size} must be a multiple of 3 and of data.patch_size {patch_size}')
        if not ask or min(train_images, val_images, test_images) < 1:
            raise ZooError('data.ask must not be empty; train_images, val_images and test_images must be positive')
        self.size, self.patch_size, self.ask, self.seed = size, patch_size, ask, seed
        self.easy = {'easy_epochs': easy_epochs, 'easy_kinds': list(easy_ask or ask)}
        self.counts = {'train': train_images, 'val': val_images, 'test': test_images}

    def open_splits(self) -> None:
        train = _Drawn('train', self.counts['train'], list(self.ask), self.size, self.seed, **self.easy)
        self.splits = {'train': train}
        for split in ('val', 'test'):
            self.splits[split] = _Drawn(split, self.counts[split], None, self.size, self.seed)

    def build_processor(self) -> Any:
        # pixels not scaled up: SigLIP's table of positions starts small, and a network that hardly sees where a patch
        # lies learns nothing but colours for a long time
        return word_processor(vocabulary(), self.size, self.patch_size, mean=0.2, std=1.0)

    @property
    def question_types(self) -> list[str]:
        return list(_scenes.TYPES)

    def chance(self) -> dict[str, float]:
        return _scenes.chance()
