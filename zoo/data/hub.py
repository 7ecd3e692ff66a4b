"""Image data sets in the Hugging Face format: a hub name, or parquet files on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.data.base import ImageData, Subset, hold_out
from zoo.errors import ZooError


def open_cell(value: dict[str, Any] | None, decode: bool = True) -> Image.Image:
    """What an image column holds, decoded or with its header alone.

    Raises:
        ValueError: The cell is empty.
    """
    if not value or not (value.get('bytes') or value.get('path')):
        raise ValueError('there is no image')
    image = Image.open(io.BytesIO(value['bytes']) if value.get('bytes') else value['path'])
    if decode:
        image.load()
    return image


def load_tables(path: str, name: str | None, splits: list[str], cache_dir: str | None = None) -> Any:
    """The splits of a data set in the Hugging Face format. Code from the hub is never run.

    Args:
        path: Hub name, or a folder or file of parquet.
        name: Configuration of the hub data set.
        splits: Names of the splits; parquet files belong to the split that their names begin with, a file alone to the
            first.
        cache_dir: Where downloads are kept.

    Raises:
        ZooError: Nothing there, or it cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ZooError('this data set needs the extra "data": pip install "linear-zoo[data]"') from error
    local = Path(path).expanduser()
    if not local.exists():
        if path.startswith(('.', '/', '~')) or path.count('/') > 1:
            raise ZooError(f'no such file or folder: {path}')
        try:
            return datasets.load_dataset(path, name, cache_dir=cache_dir)
        except Exception as error:  # the hub client raises a dozen types; the user needs the name and the cause
            raise ZooError(f'cannot load the data set {path}: {type(error).__name__}: {error}') from error
    files = [local] if local.is_file() else sorted(local.rglob('*.parquet'))
    by_split = {split: [str(f) for f in files if f.name.startswith(split)] for split in splits}
    by_split = {split: found for split, found in by_split.items() if found}
    if local.is_file() and not by_split:
        by_split = {splits[0]: [str(local)]}
    if not by_split:
        raise ZooError(f'{local} holds none of {", ".join(f"{split}*.parquet" for split in splits)}')
    return datasets.load_dataset('parquet', data_files=by_split, cache_dir=cache_dir)


def image_columns(features: Any) -> list[str]:
    """Columns that hold images, by their type."""
    import datasets

    def is_image(feature: Any) -> bool:
        if isinstance(feature, datasets.Image):
            return True
        return isinstance(feature, dict) and {'bytes', 'path'} <= set(feature)

    return [name for name, feature in features.items() if is_image(feature)]


class _Rows:
    """A split of a data set, images decoded one by one so that a bad one can be named.

    Args:
        rows: The data set, its image column not decoded.
        image: Name of the image column.
        label: Name of the label column.
        to_label: Class number of a value of the label column.
        title: What rows are called in messages.
    """

    def __init__(self, rows: Any, image: str, label: str, to_label: dict[Any, int] | None, title: str) -> None:
        self.rows, self.image, self.label, self.to_label, self.title = rows, image, label, to_label, title

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f'{self.title} row {index}'

    def load(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        label = row[self.label]
        return open_cell(row[self.image]), self.to_label[label] if self.to_label else int(label)


class HubImages(ImageData):
    """A Hugging Face data set with an image column and a label column. Code from the hub is never run.

    Args:
        path: Hub name (uoft-cs/cifar10), or a folder or file of parquet.
        name: Configuration of the hub data set.
        train: Split to train on; for local parquet also the beginning of the file names.
        val: Split to validate on; where it is missing a part of the training split is held out.
        test: Split to test on.
        image_column: Found by its type where not given.
        label_column: Found by its type where not given.
        classes: Names or numbers of the classes to keep, in the order of their new numbers; null keeps all.
        val_fraction: Share of the training images held out where there is no validation split.
        cache_dir: Where downloads are kept; the default is Hugging Face's.
        kwargs: See ImageData.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train: str = 'train',
        val: str = 'validation',
        test: str = 'test',
        image_column: str | None = None,
        label_column: str | None = None,
        classes: list[int | str] | None = None,
        val_fraction: float = 0.1,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.name, self.val_fraction, self.cache_dir = path, name, val_fraction, cache_dir
        self.split_names = {'train': train, 'val': val, 'test': test}
        self.image_column, self.label_column, self.classes = image_column, label_column, classes

    def open_splits(self) -> None:
        tables = load_tables(self.path, self.name, list(self.split_names.values()), self.cache_dir)
        found = {split: tables[name] for split, name in self.split_names.items() if name in tables}
        if 'train' not in found and 'val' not in found and 'test' not in found:
            raise ZooError(f'{self.path} has the splits {", ".join(tables)}; name yours with --data.train and so on')
        features = next(iter(found.values())).features
        image, label = self._columns(features)
        to_label = self._read_classes(found, label)
        if self.classes is not None:
            to_label = self._keep_classes(to_label)
        for split, rows in found.items():
            rows = rows.cast_column(image, undecoded())
            source = _Rows(rows, image, label, to_label, f'{self.path} {self.split_names[split]}')
            if self.classes is not None:
                source = Subset(source, [i for i, value in enumerate(rows[label]) if value in to_label])
            self.splits[split] = source
        if 'val' not in self.splits and 'train' in self.splits:
            whole = self.splits['train']
            kept, held = hold_out(len(whole), self.val_fraction)
            self.splits['train'], self.splits['val'] = Subset(whole, kept), Subset(whole, held)

    def _columns(self, features: Any) -> tuple[str, str]:
        import datasets

        images = image_columns(features)
        labels = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
        labels += [k for k in ('label', 'labels', 'fine_label') if k in features and k not in labels]
        image = self.image_column or (images[0] if images else None)
        label = self.label_column or (labels[0] if labels else None)
        for column, option in ((image, 'image_column'), (label, 'label_column')):
            if column not in features:
                raise ZooError(
                    f'{self.path}: set --data.{option}; the columns are {", ".join(features)}'
                    + (f' (there is no {column})' if column else '')
                )
        return image, label

    def _read_classes(self, found: dict[str, Any], label: str) -> dict[Any, int] | None:
        feature = next(iter(found.values())).features[label]
        if hasattr(feature, 'names'):
            self.class_names = list(feature.names)
            return None
        values = sorted({value for rows in found.values() for value in rows.unique(label)})
        self.class_names = [str(value) for value in values]
        return {value: number for number, value in enumerate(values)}

    def _keep_classes(self, to_label: dict[Any, int] | None) -> dict[Any, int]:
        numbers: dict[int | str, int] = {key: i for i, name in enumerate(self.class_names) for key in (i, name)}
        unknown = [str(name) for name in self.classes if name not in numbers]
        kept = [numbers[name] for name in self.classes if name in numbers]
        if unknown or len(set(kept)) != len(kept) or not kept:
            raise ZooError(
                f'{self.path}: data.classes must hold different ones of {", ".join(self.class_names[:20])}, or their '
                'numbers' + (f'; there is no {", ".join(unknown)}' if unknown else '')
            )
        former = to_label or {number: number for number in range(len(self.class_names))}
        new = {number: i for i, number in enumerate(kept)}
        self.class_names = [self.class_names[number] for number in kept]
        return {value: new[number] for value, number in former.items() if number in new}


def undecoded() -> Any:
    """An image feature that keeps the encoded bytes, so that a bad image is one bad row."""
    import datasets

    return datasets.Image(decode=False)
