"""Annotations in COCO's instances format (https://cocodataset.org/#format-data), with an account of bad entries."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.errors import ZooError

NEEDS_EXTRA = 'pycocotools is missing: pip install "linear-zoo[detect]"'


def mask_tools() -> Any:
    """pycocotools.mask.

    Raises:
        ZooError: pycocotools is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ZooError(f'masks and COCO metrics need the extra "detect"\n{NEEDS_EXTRA}') from error
    return mask


@dataclass
class Instances:
    """What one file says.

    Args:
        file: Its path.
        images: Entries (id, file_name, width, height), in the file's order.
        objects: For each image its entries (box, label, area, crowd, segmentation, place): box as left, top, right,
            bottom within the image, place the entry's position in the file.
        names: Of the categories, in the order of their ids; a label is a position in this list.
        ids: Of the categories.
        problems: What was left out, each named.
    """

    file: Path
    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    objects: list[list[tuple]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def without_bad_masks(self) -> list[str]:
        """Drops the objects whose segmentation cannot be drawn, and names them."""
        problems = []
        for number, ((_, _, width, height), objects) in enumerate(zip(self.images, self.objects)):
            kept = []
            for entry in objects:
                wrong = segmentation_problem(entry[4], height, width)
                if wrong:
                    problems.append(f'annotations[{entry[5]}]: {wrong}')
                else:
                    kept.append(entry)
            self.objects[number] = kept
        return problems


def read_instances(file: Path) -> Instances:
    """Reads a file; entries that make no sense are named in `problems` and left out.

    Raises:
        ZooError: The file is missing, not JSON, or lacks one of its three tables.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ZooError(f'cannot read annotations: {file}\n  {error.strerror}') from error
    except ValueError as error:
        raise ZooError(f'{file} is not JSON: {error}') from error
    tables = {}
    for key in ('images', 'annotations', 'categories'):
        tables[key] = content.get(key) if isinstance(content, dict) else None
        if not isinstance(tables[key], list):
            raise ZooError(
                f"{file} has no list {key!r}: expected COCO's instances format (images, annotations, categories)"
            )
    found = Instances(file)
    labels = _read_categories(found, tables['categories'])
    places = _read_images(found, tables['images'])
    for place, entry in enumerate(tables['annotations']):
        try:
            number, row = _read_object(entry, found.images, places, labels)
        except (KeyError, TypeError, ValueError) as error:
            found.problems.append(f'annotations[{place}]{_id_of(entry)}: {_words(error)}')
            continue
        found.objects[number].append((*row, place))
    if not found.images or not found.names:
        raise ZooError(f'{file} has no usable {"images" if not found.images else "categories"}' + few(found.problems))
    return found


def _read_categories(found: Instances, table: list[Any]) -> dict[int, int]:
    rows: dict[int, str] = {}
    for place, entry in enumerate(table):
        try:
            number, name = _whole(entry['id'], 'id'), str(entry['name'])
            if number in rows:
                raise ValueError(f'id {number} is taken')
            rows[number] = name
        except (KeyError, TypeError, ValueError) as error:
            found.problems.append(f'categories[{place}]: {_words(error)}')
    found.ids = sorted(rows)
    found.names = [rows[number] for number in found.ids]
    return {number: label for label, number in enumerate(found.ids)}


def _read_images(found: Instances, table: list[Any]) -> dict[int, int]:
    places: dict[int, int] = {}
    for place, entry in enumerate(table):
        try:
            number, name = _whole(entry['id'], 'id'), entry['file_name']
            width, height = _whole(entry['width'], 'width'), _whole(entry['height'], 'height')
            if not isinstance(name, str) or not name:
                raise ValueError(f'file_name is {name!r}')
            if width < 1 or height < 1:
                raise ValueError(f'is {width} x {height} pixels')
            if number in places:
                raise ValueError(f'id {number} is taken')
        except (KeyError, TypeError, ValueError) as error:
            found.problems.append(f'images[{place}]{_id_of(entry)}: {_words(error)}')
            continue
        places[number] = len(found.images)
        found.images.append((number, name, width, height))
        found.objects.append([])
    return places


def _read_object(
    entry: Any, images: list[tuple[int, str, int, int]], places: dict[int, int], labels: dict[int, int]
) -> tuple[int, tuple]:
    image, category = (_whole(entry[key], key) for key in ('image_id', 'category_id'))
    box = entry['bbox']
    if image not in places:
        raise ValueError(f'no image has id {image!r}')
    if category not in labels:
        raise ValueError(f'no category has id {category!r}')
    number = places[image]
    _, _, width, height = images[number]
    left, top, right, bottom = clipped_box(box, width, height)
    area = entry.get('area')
    area = float(area) if _is_number(area) and area > 0 else float((right - left) * (bottom - top))
    row = ((left, top, right, bottom), labels[category], area, bool(entry.get('iscrowd')), entry.get('segmentation'))
    return number, row


def clipped_box(box: Any, width: int, height: int, corners: bool = False) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box within an image.

    Args:
        box: x, y, width and height, or with `corners` left, top, right and bottom.
        width: of the image.
        height: of the image.
        corners: see box.

    Raises:
        ValueError: It is no box, or none of it is in the image.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        expected = '[left, top, right, bottom]' if corners else '[x, y, width, height]'
        raise ValueError(f'bbox is {box!r}, expected {expected}')
    x, y, x2, y2 = box if corners else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if x2 <= x or y2 <= y:
        raise ValueError(f'bbox {box} is empty')
    left, top, right, bottom = max(x, 0), max(y, 0), min(x2, width), min(y2, height)
    if left >= right or top >= bottom:
        raise ValueError(f'bbox {box} is outside of its image of {width} x {height}')
    return left, top, right, bottom


def segmentation_problem(value: Any, height: int, width: int) -> str | None:
    """Why a segmentation is neither polygons nor a run-length encoding of an image of this size, or None.

    pycocotools checks little: what runs leave out is whatever is in memory, and far vertices end the process.
    """
    if isinstance(value, dict):
        counts, size = value.get('counts'), value.get('size')
        if not isinstance(counts, (list, str)) or not isinstance(size, list) or len(size) != 2:
            return 'the run-length encoding needs counts and size'
        if size != [height, width]:
            return f'a mask of {size} in an image of {height} x {width}'
        runs = _runs(counts) if isinstance(counts, str) else counts
        if not all(_is_number(n) and n >= 0 and n == int(n) for n in runs) or sum(runs) != height * width:
            return f'the runs are not those of {height} x {width} pixels'
        return None
    if not isinstance(value, list) or not value:
        return 'has no segmentation'
    if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p)) for p in value):
        return 'a polygon needs pairs of numbers, three or more'
    for polygon in value:
        for numbers, side in ((polygon[::2], width), (polygon[1::2], height)):
            if min(numbers) < -side or max(numbers) > 2 * side:
                return f'a polygon reaches {min(numbers):g} .. {max(numbers):g} in an image of {width} x {height}'
    return None


def _runs(text: str) -> list[int]:
    """Lengths in a compressed encoding: 5 bits a character, a sixth that says that more follow, from the fourth length
    on differences to the one before the last (cocoapi, common/maskApi.c, rleFrString)."""
    runs: list[int] = []
    number, bits = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return [-1]
        number |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << bits
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, bits = 0, 0
    return [-1] if bits else runs


def draw_mask(value: Any, height: int, width: int) -> np.ndarray:
    """Polygons or a run-length encoding, in which segmentation_problem finds nothing, as uint8 (height, width)."""
    tools = mask_tools()
    if isinstance(value, dict):
        runs = tools.frPyObjects(value, height, width) if isinstance(value['counts'], list) else value
    else:
        runs = tools.merge(tools.frPyObjects(value, height, width))
    return tools.decode(runs)


def to_results(
    image_id: int | str, detections: dict[str, torch.Tensor], category_ids: list[int]
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format (https://cocodataset.org/#format-results)."""
    rows = []
    boxes, scores, labels = (detections[key].cpu().tolist() for key in ('boxes', 'scores', 'labels'))
    for (left, top, right, bottom), score, label in zip(boxes, scores, labels):
        box = [round(v, 2) for v in (left, top, right - left, bottom - top)]
        rows.append({'image_id': image_id, 'category_id': category_ids[label], 'bbox': box, 'score': round(score, 5)})
    if 'masks' in detections and rows:
        tools = mask_tools()
        masks = detections['masks'].cpu().numpy().astype(np.uint8)
        for row, runs in zip(rows, tools.encode(np.asfortranarray(masks.transpose(1, 2, 0)))):
            row['segmentation'] = {'size': runs['size'], 'counts': runs['counts'].decode()}
    return rows


def few(problems: list[str], most: int = 3) -> str:
    """The first problems, a line each."""
    lines = ''.join(f'\n  {p}' for p in problems[:most])
    return lines + (f'\n  ... and {len(problems) - most} more' if len(problems) > most else '')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, key: str) -> int:
    if not _is_number(value) or value != int(value):
        raise ValueError(f'{key} is {value!r}, expected a whole number')
    return int(value)


def _id_of(entry: Any) -> str:
    return f' (id {entry["id"]})' if isinstance(entry, dict) and 'id' in entry else ''


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f'has no {error.args[0]}'
    return 'is not an object with keys and values' if isinstance(error, TypeError) else str(error)
