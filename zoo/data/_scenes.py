"""Drawn scenes: what is in them, their pixels, and questions with known answers, whole batches at a time.

Everything is a function of (seed, epoch, index). Objects stand in a 3 x 3 grid, each a little off its cell's middle, in
one of three sizes, on a dark and noisy ground. A scene holds a group of 1..3 objects of one shape and as many colours,
a group of 1..3 objects of one colour and as many shapes, and a single object that shares neither with anybody, so that
`ring` names one object of the second group, or the single one. The colour and the shape of the same number never meet
in training; held-out scenes have that pair in both groups, and their questions are about the second group's.

All steps treat colours, shapes, cells and directions alike, so within a type every answer is equally frequent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zoo.data.seeding import derive_seed, keyed_uniform

COLOURS = {
    'red': (225, 40, 40),
    'green': (40, 170, 60),
    'blue': (50, 80, 230),
    'yellow': (235, 220, 50),
    'purple': (150, 50, 185),
    'cyan': (60, 205, 215),
    'orange': (240, 135, 30),
    'white': (240, 240, 240),
}
SHAPES = ('circle', 'square', 'triangle', 'diamond', 'plus', 'cross', 'ring', 'moon')
TYPES = ('colour', 'count', 'position', 'relation')
ROWS, COLUMNS = ('top', 'middle', 'bottom'), ('left', 'center', 'right')
EMPTY = 'empty cell'
RELATIONS = ('left', 'right', 'above', 'below')
MOST = 3
ANSWERS: dict[str, tuple[str, ...]] = {
    'colour': tuple(COLOURS),
    'count': tuple(str(n) for n in range(MOST + 1)),
    'position': tuple(f'{row} {column}' for row in ROWS for column in COLUMNS),
    'relation': RELATIONS,
}
_GRID, _OBJECTS = 3, 2 * MOST + 1
_A, _B, _C = slice(0, MOST), slice(MOST, 2 * MOST), 2 * MOST
_SIZES, _SHIFTS = 3, 5
_PER_SCENE, _PER_TURN = 160, 3


def chance() -> dict[str, float]:
    """Share of right answers of the best constant answer, per type."""
    return {kind: 1 / len(answers) for kind, answers in ANSWERS.items()}


def held_out_pairs() -> list[tuple[str, str]]:
    """Color and shape of the objects that training never shows nor names."""
    return list(zip(COLOURS, SHAPES))


@dataclass
class Scenes:
    """A batch of scenes; the objects 0..2 are the group of one shape, 3..5 the group of one colour, 6 is the single.

    Args:
        colour: int64 (B, 7).
        shape: int64 (B, 7).
        cell: int64 (B, 7), row times 3 plus column.
        there: bool (B, 7), which of the objects exist.
        spare_colour: int64 (B,), a colour that does not occur.
        spare_shape: int64 (B,), a shape that does not occur.
        held_out: Whether the first object of both groups is a held-out pair.
        sparse: bool (B,), which of them may have lost objects.
    """

    colour: np.ndarray
    shape: np.ndarray
    cell: np.ndarray
    there: np.ndarray
    spare_colour: np.ndarray
    spare_shape: np.ndarray
    held_out: bool
    sparse: np.ndarray

    def words(self, row: int, item: int) -> str:
        return f'{tuple(COLOURS)[self.colour[row, item]]} {SHAPES[self.shape[row, item]]}'

    def name(self, row: int, item: int) -> str:
        return SHAPES[self.shape[row, item]]

    def named(self, row: int) -> np.ndarray:
        """The objects whose shape occurs once, which names them."""
        present = np.flatnonzero(self.there[row])
        shapes = self.shape[row, present]
        return present[np.bincount(shapes, minlength=len(SHAPES))[shapes] == 1]


class _Draws:
    """Uniform random numbers handed out column by column.

    Args:
        numbers: fp32 (B, N).
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers, self.used = numbers, 0

    def __call__(self, count: int) -> np.ndarray:
        self.used += count
        return self.numbers[:, self.used - count : self.used]

    def integer(self, below: int) -> np.ndarray:
        return (self(1)[:, 0] * below).astype(np.int64)


def _flags(chosen: np.ndarray, there: np.ndarray) -> np.ndarray:
    """bool (B, 8) that marks the values of `chosen` (B, n) where `there` (B, n)."""
    marked = np.zeros((len(chosen), len(SHAPES)), bool)
    rows, places = np.nonzero(there)
    marked[rows, chosen[rows, places]] = True
    return marked


def plan(draw: _Draws, held_out: bool, sparse: np.ndarray) -> Scenes:
    """Draws what is in a batch of scenes.

    Args:
        draw: Random numbers.
        held_out: Whether the first object of both groups is a held-out pair; otherwise no object is.
        sparse: bool (B,): where to draw scenes of which half lose some of their objects, though never all.
    """
    count, kinds = len(draw.numbers), np.arange(len(SHAPES))
    # added to random keys before they are sorted: the forbidden last, the diagonal first or last
    never, diagonal = 16.0, -4.0 if held_out else 4.0
    shape = draw.integer(len(SHAPES))
    a, b = 1 + draw.integer(MOST), 1 + draw.integer(MOST)
    on_diagonal = kinds == shape[:, None]
    group_colours = np.argsort(draw(8) + diagonal * on_diagonal, 1)[:, :MOST]
    has_a, has_b = np.arange(MOST) < a[:, None], np.arange(MOST) < b[:, None]
    used_colours = _flags(group_colours, has_a)
    colour = np.argmin(draw(8) + never * used_colours, 1)
    used_colours |= kinds == colour[:, None]
    used_shapes = on_diagonal.copy()
    keys = draw(8) + never * used_shapes + diagonal * (kinds == colour[:, None])
    group_shapes = np.argsort(keys, 1)[:, :MOST]
    used_shapes |= _flags(group_shapes, has_b)
    single_colour = np.argmin(draw(8) + never * used_colours, 1)
    used_colours |= kinds == single_colour[:, None]
    keys = draw(8) + never * used_shapes + 4.0 * (kinds == single_colour[:, None])
    single_shape = np.argmin(keys, 1)
    used_shapes |= kinds == single_shape[:, None]
    colours = np.concatenate([group_colours, np.repeat(colour[:, None], MOST, 1), single_colour[:, None]], 1)
    shapes = np.concatenate([np.repeat(shape[:, None], MOST, 1), group_shapes, single_shape[:, None]], 1)
    there = np.concatenate([has_a, has_b, np.ones((count, 1), bool)], 1)
    # some lose objects: what to look for is learned where there is little to see
    most = np.where(sparse & (draw(1)[:, 0] < 0.5), 1 + draw.integer(_OBJECTS), _OBJECTS)
    keys = np.where(there, draw(_OBJECTS), 2)
    there &= np.argsort(np.argsort(keys, 1), 1) < most[:, None]
    return Scenes(
        colour=colours,
        shape=shapes,
        cell=np.argsort(draw(_GRID**2), 1)[:, :_OBJECTS],
        there=there,
        spare_colour=np.argmin(draw(8) + never * used_colours, 1),
        spare_shape=np.argmin(draw(8) + never * used_shapes, 1),
        held_out=held_out,
        sparse=sparse,
    )


# pixels


def inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points belong to a shape of radius 1; u to the right, v down."""
    radius = u * u + v * v
    if kind == 'circle':
        return radius < 0.95
    if kind == 'square':
        return np.maximum(abs(u), abs(v)) < 0.82
    if kind == 'triangle':
        return (v < 0.8) & (abs(u) < 0.55 * (v + 1))
    if kind == 'diamond':
        return abs(u) / 0.75 + abs(v) < 1.08
    if kind == 'plus':
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)
    if kind == 'cross':
        p, q = (u + v) / 2**0.5, (u - v) / 2**0.5
        return (np.minimum(abs(p), abs(q)) < 0.26) & (np.maximum(abs(p), abs(q)) < 1.1)
    if kind == 'ring':
        return (radius < 1) & (radius > 0.36)
    return (radius < 1) & ((u - 0.55) ** 2 + v * v > 0.7)


@functools.lru_cache(maxsize=4)
def _masks(cell: int) -> np.ndarray:
    """Coverage of pixels by 4 x 4 points each, fp32 (shape, size, shift down, shift right, cell, cell)."""
    points = (np.arange(4 * cell) + 0.5) / 4 - cell / 2
    masks = np.zeros((len(SHAPES), _SIZES, _SHIFTS, _SHIFTS, cell, cell), np.float32)
    step = cell / 16
    for number, kind in enumerate(SHAPES):
        for size in range(_SIZES):
            radius = cell * (0.33 + 0.04 * size)
            for down in range(_SHIFTS):
                for right in range(_SHIFTS):
                    u = (points[None, :] - (right - _SHIFTS // 2) * step / 2) / radius
                    v = (points[:, None] - (down - _SHIFTS // 2) * step / 2) / radius
                    fine = inside(kind, *np.broadcast_arrays(u, v))
                    masks[number, size, down, right] = fine.reshape(cell, 4, cell, 4).mean((1, 3))
    return masks


def paint(scenes: Scenes, draw: _Draws, noise: np.ndarray, size: int) -> np.ndarray:
    """Pixels of a batch of scenes.

    Args:
        scenes: What to paint.
        draw: Random numbers for sizes, shifts and shades.
        noise: uint8 (N,) from which every image takes a stretch of its own.
        size: Height and width, a multiple of 3.

    Returns:
        uint8 (B, size, size, 3).
    """
    count, cell = len(scenes.colour), size // _GRID
    sizes, down, right = ((draw(_OBJECTS) * n).astype(np.int64) for n in (_SIZES, _SHIFTS, _SHIFTS))
    shade = draw(3 * _OBJECTS).reshape(count, _OBJECTS, 3) * 40 - 20
    ground = draw(1)[:, :, None, None] * 40 + 15
    colours = np.array(list(COLOURS.values()), np.float32)[scenes.colour] + shade
    masks = _masks(cell)[scenes.shape, sizes, down, right] * scenes.there[:, :, None, None]
    cells = np.zeros((count, _GRID**2, cell, cell), np.float32)
    tints = np.zeros((count, _GRID**2, 3), np.float32)
    rows = np.arange(count)[:, None]
    cells[rows, scenes.cell], tints[rows, scenes.cell] = masks, colours
    # ground + mask * (colour - ground), the noise on top
    image = cells[..., None] * (tints[:, :, None, None] - ground[..., None]) + ground[..., None]
    image = image.reshape(count, _GRID, _GRID, cell, cell, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count, size, size, 3)
    starts = (draw(1)[:, 0] * (len(noise) - size * size * 3)).astype(np.int64)
    for row, start in enumerate(starts):
        image[row] += noise[start : start + size * size * 3].reshape(size, size, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def noise_bank() -> np.ndarray:
    """int8 noise with a standard deviation of 6 grey levels."""
    return np.clip(np.random.RandomState(0).randn(1 << 20) * 6, -24, 24).astype(np.int8)


# questions


def _pick(among: np.ndarray, number: float) -> int:
    return int(among[int(number * len(among))])


def _target(scenes: Scenes, row: int, number: float) -> int | None:
    """An object to ask about: in held-out scenes the held-out one of the group of one colour."""
    among = np.array([MOST]) if scenes.held_out else scenes.named(row)
    return _pick(among, number) if len(among) else None


def _colour(scenes: Scenes, row: int, numbers: np.ndarray) -> tuple[str, str] | None:
    item = _target(scenes, row, numbers[0])
    return None if item is None else (f'colour of {scenes.name(row, item)}', tuple(COLOURS)[scenes.colour[row, item]])


def _count(scenes: Scenes, row: int, numbers: np.ndarray) -> tuple[str, str]:
    """About one of the groups, or about what does not occur."""
    none, by_shape = numbers[0] < 1 / (MOST + 1), numbers[1] < 0.5
    group, spare = (0, scenes.spare_shape) if by_shape else (MOST, scenes.spare_colour)
    values = scenes.shape if by_shape else scenes.colour
    value = spare[row] if none else values[row, group]
    word = SHAPES[value] if by_shape else tuple(COLOURS)[value]
    return f'count of {word}', str(0 if none else int(scenes.there[row, group : group + MOST].sum()))


def _position(scenes: Scenes, row: int, numbers: np.ndarray) -> tuple[str, str] | None:
    item = _target(scenes, row, numbers[0])
    return None if item is None else (f'place of {scenes.name(row, item)}', ANSWERS['position'][scenes.cell[row, item]])


def _relation(scenes: Scenes, row: int, numbers: np.ndarray) -> tuple[str, str] | None:
    """None where no other object stands clearly in one direction: as far sideways as up or down is neither."""
    item, others, cell = _target(scenes, row, numbers[0]), scenes.named(row), scenes.cell[row]
    if item is None:
        return None
    down, right = cell // _GRID - cell[item] // _GRID, cell % _GRID - cell[item] % _GRID
    clear = others[abs(down[others]) != abs(right[others])]
    if not len(clear):
        return None
    other = _pick(clear, numbers[1])
    y, x = -down[other], -right[other]  # of the item, seen from the other
    if numbers[2] < 0.5:
        item, other, y, x = other, item, -y, -x
    answer = ('left' if x < 0 else 'right') if abs(x) > abs(y) else ('above' if y < 0 else 'below')
    return f'{scenes.name(row, item)} from {scenes.name(row, other)}', answer


_ASK = {'colour': _colour, 'count': _count, 'position': _position, 'relation': _relation}


def _ask_all(scenes: Scenes, row: int, kinds: list[str], details: np.ndarray) -> list[tuple[str, str, str]] | None:
    """A turn of each type; where the scene has none, in sparse scenes a count, else None for the whole scene."""
    turns = []
    for kind, numbers in zip(kinds, details):
        turn = _ASK[kind](scenes, row, numbers)
        if turn is None and scenes.sparse[row]:
            kind, turn = 'count', _count(scenes, row, numbers)
        if turn is None:
            return None
        turns.append((kind, *turn))
    return turns


def _describe(scenes: Scenes, row: int, order: np.ndarray) -> tuple[str, str, str]:
    """Everything at once: what is in each cell in reading order, or where each named object is in a random order."""
    named = scenes.named(row)
    if order[0] < order[1] or not len(named):
        cells = [EMPTY] * _GRID**2
        for item in np.flatnonzero(scenes.there[row]):
            cells[scenes.cell[row, item]] = scenes.words(row, item)
        return 'what', 'what', ' '.join(cells)
    mixed = named[np.argsort(order[named])]
    places = [f'{scenes.name(row, i)} {ANSWERS["position"][scenes.cell[row, i]]}' for i in mixed]
    return 'where', 'where', ' '.join(places)


@dataclass
class Questions:
    """A batch of images and what is asked about them.

    Args:
        pixels: uint8 (B, size, size, 3).
        turns: Type, question and answer of every turn of every image.
    """

    pixels: np.ndarray
    turns: list[list[tuple[str, str, str]]]


def draw_batch(
    seed: int,
    epochs: list[int],
    indices: list[int],
    kinds: list[str] | None,
    size: int,
    held_out: bool = False,
    easy_epochs: int = 0,
    easy_kinds: list[str] | None = None,
) -> Questions:
    """Images with questions, a function of (seed, epoch, index) each.

    Args:
        seed: Of the whole set.
        epochs: Epoch of each image.
        indices: Index of each image.
        kinds: Types of the questions about each image, asked in an order drawn for each image; None for one question
            of type index modulo 4.
        size: Height and width of the images, a multiple of 3.
        held_out: Whether to draw held-out scenes and ask about their held-out objects.
        easy_epochs: Until this epoch half of the scenes are sparse, easy_kinds are asked, and a turn that asks for
            everything stands behind the questions, where it gives nothing away.
        easy_kinds: Types of the questions in those epochs; None for kinds.
    """
    easy_kinds = easy_kinds or kinds or []
    count, turns = len(indices), max(len(kinds), len(easy_kinds)) if kinds else 1
    pixels = np.empty((count, size, size, 3), np.uint8)
    asked: list[Any] = [None] * count
    pending, attempt = np.arange(count), 0
    keys, easy = (torch.tensor(epochs), torch.tensor(indices)), np.array(epochs) < easy_epochs
    while len(pending):
        # a scene on which a question cannot be asked is drawn anew, which is rare
        where = torch.from_numpy(pending)
        need = _PER_SCENE + turns * (1 + _PER_TURN)
        draw = _Draws(keyed_uniform(derive_seed(seed, attempt), keys[0][where], keys[1][where], need).numpy())
        scenes = plan(draw, held_out, easy[pending])
        pixels[pending] = paint(scenes, draw, noise_bank(), size)
        orders, mixed = draw(turns), draw(_OBJECTS)
        details = draw(turns * _PER_TURN).reshape(-1, turns, _PER_TURN)
        for row, place in enumerate(pending):
            wanted = [TYPES[indices[place] % len(TYPES)]]
            if kinds:
                among = easy_kinds if easy[place] else kinds
                wanted = [among[i] for i in np.argsort(orders[row, : len(among)])]
            asked[place] = _ask_all(scenes, row, wanted, details[row])
            if easy[place] and asked[place] is not None:
                asked[place].append(_describe(scenes, row, mixed[row]))
        pending = np.array([place for place in pending if asked[place] is None], int)
        attempt += 1
    return Questions(pixels, asked)
