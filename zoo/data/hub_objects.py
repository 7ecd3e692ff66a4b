"""Object detection data sets in the Hugging Face format: a hub name, or parquet files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from PIL import Image

from zoo.data._coco import Instances, clipped_box
from zoo.data.detection import DetectionData, InstanceSplit
from zoo.data.hub import load_tables, open_cell, undecoded
from zoo.errors import ZooError


class HubObjects(DetectionData):
    """A Hugging Face data set with an image column and a column of objects. Code from the hub is never run.

    The column of objects holds lists: boxes, categories and, if there, areas. Boxes only: there is no common form for
    masks.

    Args:
        path: Hub name (rishitdagli/cppe-5), or a folder or file of parquet.
        name: Configuration of the hub data set.
        train: Split to train on; for local parquet also the beginning of the file names.
        val: Split to validate on.
        test: Split to test on; where it is missing the validation split is tested.
        image_column: Column of the images.
        objects_column: Column of the objects.
        box_key: What the boxes are called in it.
        category_key: What the categories are called in it.
        box_format: Whether a box is left, top, width, height or left, top, right, bottom.
        keep_empty: Whether training includes images without an object.
        cache_dir: Where downloads are kept; the default is Hugging Face's.
        kwargs: See DetectionData.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train: str = 'train',
        val: str = 'validation',
        test: str = 'test',
        image_column: str = 'image',
        objects_column: str = 'objects',
        box_key: str = 'bbox',
        category_key: str = 'category',
        box_format: Literal['xywh', 'xyxy'] = 'xywh',
        keep_empty: bool = False,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.name, self.cache_dir, self.keep_empty = path, name, cache_dir, keep_empty
        self.split_names = {'train': train, 'val': val, 'test': test}
        self.image_column, self.objects_column = image_column, objects_column
        self.box_key, self.category_key, self.box_format = box_key, category_key, box_format

    def open_splits(self) -> None:
        tables = load_tables(self.path, self.name, list(self.split_names.values()), self.cache_dir)
        found = {split: tables[name] for split, name in self.split_names.items() if name in tables}
        if not {'train', 'val'} <= set(found):
            raise ZooError(
                f'{self.path} has the splits {", ".join(tables)}; name yours with --data.train and --data.val'
            )
        self._read_classes(found)
        for split, rows in found.items():
            instances = self._read(rows, f'{self.path} {self.split_names[split]}')
            self.account(f'{self.path} {self.split_names[split]}', instances.problems)
            rows = rows.cast_column(self.image_column, undecoded())
            opener = _Opener(rows, self.image_column)
            self.splits[split] = InstanceSplit(instances, opener, with_empty=split != 'train' or self.keep_empty)
            if not len(self.splits[split]):
                raise ZooError(f'no image of {self.path} {self.split_names[split]} has a usable box')

    def use_masks(self) -> None:
        raise ZooError(f'{self.path} is read without masks: mask_rcnn needs zoo.data.CocoObjects')

    def _read_classes(self, found: dict[str, Any]) -> None:
        for rows in found.values():
            for column in (self.image_column, self.objects_column):
                if column not in rows.features:
                    option = 'image_column' if column == self.image_column else 'objects_column'
                    raise ZooError(f'{self.path}: set --data.{option}; the columns are {", ".join(rows.features)}')
        first = next(iter(found.values()))
        parts = first.features[self.objects_column]
        parts = getattr(parts, 'feature', parts)  # a list of objects, or lists of their properties
        for key, option in ((self.box_key, 'box_key'), (self.category_key, 'category_key')):
            if not isinstance(parts, dict) or key not in parts:
                raise ZooError(f'{self.path}: set --data.{option}; objects have {", ".join(parts)}')
        category = getattr(parts[self.category_key], 'feature', parts[self.category_key])
        if hasattr(category, 'names'):
            self.class_names, values = list(category.names), range(len(category.names))
        else:
            columns = [self._lists(row)[1] for rows in found.values() for row in rows[self.objects_column]]
            values = sorted({value for column in columns for value in column})
            self.class_names = [str(value) for value in values]
        self._labels = {value: label for label, value in enumerate(values)}
        self.category_ids = list(range(len(self.class_names)))

    def _lists(self, row: Any) -> tuple[list, list, list]:
        if isinstance(row, dict):
            return row[self.box_key], row[self.category_key], row.get('area') or []
        return [o[self.box_key] for o in row], [o[self.category_key] for o in row], [o.get('area') for o in row]

    def _read(self, rows: Any, title: str) -> Instances:
        instances = Instances(Path(title), names=self.class_names, ids=self.category_ids)
        sizes = _Opener(rows.cast_column(self.image_column, undecoded()), self.image_column)
        for number, row in enumerate(rows.select_columns([self.objects_column])):
            name, kept = f'{title} row {number}', []
            try:
                width, height = sizes.size(number)
            except (OSError, SyntaxError, ValueError, TypeError) as error:
                instances.problems.append(f'row {number}: {type(error).__name__}: {error}')
                continue
            boxes, categories, areas = self._lists(row[self.objects_column])
            for place, (box, category) in enumerate(zip(boxes, categories)):
                try:
                    corners = clipped_box(box, width, height, corners=self.box_format == 'xyxy')
                    label = self._labels[category]
                except (KeyError, TypeError, ValueError) as error:
                    instances.problems.append(f'row {number}, object {place}: {error}')
                    continue
                left, top, right, bottom = corners
                area = areas[place] if place < len(areas) and areas[place] else (right - left) * (bottom - top)
                kept.append((corners, label, float(area), False, None, place))
            instances.images.append((number, name, width, height))
            instances.objects.append(kept)
        return instances


class _Opener:
    """Opens the image of a row.

    Args:
        rows: the data set, its image column not decoded.
        column: of the images.
    """

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self.column = rows.select_columns([column]), column

    def __call__(self, entry: tuple) -> Image.Image:
        return open_cell(self.rows[entry[0]][self.column])

    def size(self, number: int) -> tuple[int, int]:
        """Width and height, without decoding pixels."""
        with open_cell(self.rows[number][self.column], decode=False) as image:
            return image.size
