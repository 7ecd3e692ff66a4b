"""Drawn scenes with exact instance masks: shapes of any turn, size, colour and texture that hide one another.

A scene is a function of (seed, index): no state, no download, the same on every machine. The class of an object is its
shape alone. Shapes that turning makes alike (diamond and square, cross and plus) are left to `zoo.data._scenes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from zoo.data._scenes import COLOURS, inside, noise_bank
from zoo.data.seeding import keyed_uniform

CLASSES = ('circle', 'square', 'triangle', 'plus', 'ring', 'moon')
MOST = len(COLOURS)  # objects of a scene: no two have the same colour
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_PER_OBJECT, _PER_SCENE = 12, 32
_REACH = 1.3  # no shape of radius 1 reaches further
_LEAST_VISIBLE, _LEAST_PIXELS = 0.5, 16


@dataclass
class DrawnScene:
    """One image and its N >= 1 objects, front to back.

    Args:
        image: uint8 (H, W, 3).
        labels: int64 (N,), the class in 1 .. len(CLASSES); 0 is the ground.
        masks: bool (N, H, W), what is visible of each object: no pixel is in two of them.
        boxes: fp32 (N, 4), left, top, right and bottom of the visible mask in pixels, right and bottom exclusive.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


def draw_scene(seed: int, index: int, size: int, most: int = 5, radii: tuple[float, float] = (0.1, 0.24)) -> DrawnScene:
    """Draws a scene.

    Objects are placed front to back; one that would be hidden by more than half, or to less than 16 pixels, is left
    out, so that there may be fewer than drawn.

    Args:
        seed: Of the set; a split has a seed of its own (zoo.data.seeding.derive_seed).
        index: Of the scene.
        size: Height and width in pixels.
        most: Largest number of objects, 1 .. 8; each number down to 1 is equally likely before any is left out.
        radii: Least and largest radius of an object as fractions of the size.
    """
    count = _PER_SCENE + MOST * _PER_OBJECT
    numbers = keyed_uniform(seed, torch.zeros(1, dtype=torch.long), torch.tensor([index]), count)[0].numpy()
    scene, objects = numbers[:_PER_SCENE], numbers[_PER_SCENE:].reshape(MOST, _PER_OBJECT)
    colours = _PALETTE[np.argsort(scene[:MOST])]
    image = _ground(scene[MOST:], size)
    free = np.ones((size, size), bool)
    weight = np.zeros((size, size, 1), np.float32)  # of what already lies in front
    front = np.zeros((size, size, 3), np.float32)
    labels, masks, boxes = [], [], []
    for number in range(1 + int(scene[-1] * most)):
        label, cover, (top, left) = _shape(objects[number], size, radii)
        bottom, right = top + cover.shape[0], left + cover.shape[1]
        place = slice(top, bottom), slice(left, right)
        whole = cover >= 0.5
        visible = whole & free[place]
        area = int(visible.sum())
        if area < max(_LEAST_PIXELS, _LEAST_VISIBLE * whole.sum()):
            continue
        seen = cover[..., None] * (1 - weight[place])
        front[place] += seen * _paint(objects[number], colours[number], top, left, cover.shape)
        weight[place] += seen
        free[place] &= ~visible
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
        mask = np.zeros((size, size), bool)
        mask[place] = visible
        masks.append(mask)
        labels.append(label)
    image += front - weight * image
    noise, start = noise_bank(), int(scene[-2] * (len(noise_bank()) - image.size))
    image += noise[start : start + image.size].reshape(image.shape)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return DrawnScene(pixels, np.array(labels, np.int64), np.stack(masks), np.array(boxes, np.float32))


def _ground(numbers: np.ndarray, size: int) -> np.ndarray:
    """fp32 (size, size, 3): two dark tints blended along one direction, with ripples along another."""
    tints = 25 + 90 * numbers[:2, None] + 30 * numbers[2:8].reshape(2, 3)
    points = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    turns = 2 * np.pi * numbers[8:10]
    along = np.cos(turns[0]) * points[None, :] + np.sin(turns[0]) * points[:, None] + 0.5
    across = np.cos(turns[1]) * points[None, :] + np.sin(turns[1]) * points[:, None]
    ripples = 14 * numbers[10] * np.sin((10 + 60 * numbers[11]) * across)
    return (tints[0] + along[..., None] * (tints[1] - tints[0]) + ripples[..., None]).astype(np.float32)


def _shape(numbers: np.ndarray, size: int, radii: tuple[float, float]) -> tuple[int, np.ndarray, tuple[int, int]]:
    """Class, coverage of the pixels of a box by 2 x 2 points each, fp32 (h, w), and where the box begins."""
    kind = int(numbers[0] * len(CLASSES))
    radius = size * (radii[0] + (radii[1] - radii[0]) * numbers[1])
    x, y = 0.8 * radius + (size - 1.6 * radius) * numbers[2:4]
    left, top = (max(0, int(v - _REACH * radius)) for v in (x, y))
    right, bottom = (min(size, int(v + _REACH * radius) + 1) for v in (x, y))
    dx = (np.arange(2 * left, 2 * right, dtype=np.float32) + 0.5) / 2 - x
    dy = (np.arange(2 * top, 2 * bottom, dtype=np.float32) + 0.5) / 2 - y
    turn, flatness = 2 * np.pi * numbers[4], 0.8 + 0.2 * numbers[5]
    cos, sin = np.float32(np.cos(turn) / radius), np.float32(np.sin(turn) / radius)
    u = cos * dx[None, :] + sin * dy[:, None]
    v = (cos * dy[:, None] - sin * dx[None, :]) / np.float32(flatness)
    fine = inside(CLASSES[kind], u, v).view(np.uint8)
    rows = fine[0::2] + fine[1::2]
    return kind + 1, (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25), (top, left)


def _paint(numbers: np.ndarray, colour: np.ndarray, top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """fp32 (h, w, 3): a shade of the colour, in half of the objects with stripes."""
    colour = colour + 40 * numbers[6:9] - 20
    if numbers[9] < 0.5:
        return np.broadcast_to(colour, (*shape, 3)).astype(np.float32)
    turn, pitch = 2 * np.pi * numbers[10], 0.5 + 0.9 * numbers[11]
    rows = np.arange(top, top + shape[0], dtype=np.float32) * np.float32(pitch * np.sin(turn))
    columns = np.arange(left, left + shape[1], dtype=np.float32) * np.float32(pitch * np.cos(turn))
    return (colour + 28 * np.sin(rows[:, None] + columns[None, :])[..., None]).astype(np.float32)
