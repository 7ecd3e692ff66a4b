"""Images with a class for every pixel: folders as ADE20K's, Cityscapes, Hugging Face data sets, and drawn scenes.

Masks hold class numbers; 255 is ignored by loss and metrics. A mask that is missing, of another size than its image,
not of class numbers, or with numbers that are no class is a failure like an unreadable image: named, counted, skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from zoo.data._drawing import CLASSES, draw_scene
from zoo.data._mask_transforms import IGNORE, EvalMasks, MaskAugment, MaskView, TrainMasks
from zoo.data.base import ResumableData, Subset, hold_out, loader_options
from zoo.data.folder import EXTENSIONS, open_image
from zoo.data.hub import image_columns, load_tables, open_cell, undecoded
from zoo.data.images import list_files
from zoo.data.sampling import EpochSampler, KeyedDataset, Source
from zoo.data.seeding import derive_seed, run_seed
from zoo.errors import ZooError

__all__ = ['Cityscapes', 'DrawnMasks', 'HubMasks', 'MaskAugment', 'MaskData', 'MaskFolder', 'MaskView']

CITYSCAPES = (
    ('road', 7),
    ('sidewalk', 8),
    ('building', 11),
    ('wall', 12),
    ('fence', 13),
    ('pole', 17),
    ('traffic light', 19),
    ('traffic sign', 20),
    ('vegetation', 21),
    ('terrain', 22),
    ('sky', 23),
    ('person', 24),
    ('rider', 25),
    ('car', 26),
    ('truck', 27),
    ('bus', 28),
    ('train', 31),
    ('motorcycle', 32),
    ('bicycle', 33),
)


class MaskDataset(KeyedDataset):
    """Images with their masks, transformed together; see KeyedDataset."""

    def prepare(self, image: Image.Image, target: Any) -> dict[str, Any]:
        image, mask = self.transform(image, target)
        return {'image': image, 'mask': mask}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the readable samples where all have one size, and keeps lists where not."""
    good = [s for s in samples if s['image'] is not None]
    batch: dict[str, Any] = {key: [s[key] for s in good] for key in ('image', 'mask')}
    for key, tensors in batch.items():
        if len({t.shape for t in tensors}) == 1:
            batch[key] = torch.stack(tensors)
    return {**batch, 'name': [s['name'] for s in good], 'failures': [f for s in samples for f in s['failures']]}


class MaskData(ResumableData):
    """Base of the modules below; a subclass fills `class_names` and `splits` in `open_splits`.

    Args:
        batch_size: Images per step and process in training.
        eval_batch_size: Images per step in validation and test; those of one size go through the network together.
        num_workers: Loader processes.
        view: Sizes and normalisation of what the network sees.
        augment: Training augmentation.
        strict: Whether a bad image or mask is an error; otherwise it is skipped and counted.
    """

    def __init__(
        self,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        view: MaskView = MaskView(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        augment: MaskAugment = MaskAugment(),  # noqa: B008
        strict: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, strict)
        if eval_batch_size < 1:
            raise ZooError(f'data.eval_batch_size must be positive, not {eval_batch_size}')
        self.eval_batch_size, self.view, self.augment = eval_batch_size, view, augment
        self.class_names: list[str] = []
        self.splits: dict[str, Source] = {}
        self._opened = False

    def open_splits(self) -> None:
        """Fills `class_names` and `splits`; raises ZooError for whatever is wrong with the data."""
        raise TypeError(f'{type(self).__name__} does not define open_splits')

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        if not self._opened:
            self.open_splits()
            self._opened = True

    def train_dataloader(self) -> DataLoader:
        if 'train' not in self.splits:
            raise ZooError(f'{type(self).__name__} has no train split; it has: {", ".join(self.splits)}')
        sampler = self._train_sampler()
        transform = TrainMasks(self.view, self.augment)
        dataset = MaskDataset(self.splits['train'], transform, seed=run_seed(), substitute=True)
        return self._loader(dataset, sampler, self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader('val')

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader('test' if 'test' in self.splits else 'val')

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader('predict')

    def _sampler(self, split: str, shuffle: bool) -> EpochSampler:
        return EpochSampler(len(self.splits[split]), run_seed(), shuffle, *self._ranks())

    def _eval_loader(self, split: str) -> DataLoader:
        if split not in self.splits:
            raise ZooError(f'{type(self).__name__} has no {split} split; it has: {", ".join(self.splits)}')
        dataset = MaskDataset(self.splits[split], EvalMasks(self.view))
        return self._loader(dataset, self._sampler(split, shuffle=False), self.eval_batch_size, drop_last=False)

    def _loader(self, dataset: MaskDataset, sampler: EpochSampler, batch_size: int, drop_last: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            **loader_options(self.num_workers),
        )


# masks


def read_mask(mask: Image.Image, image: Image.Image, classes: int, table: np.ndarray | None = None) -> np.ndarray:
    """Class numbers of an image's pixels.

    Args:
        mask: Of one channel, class numbers.
        image: What it belongs to.
        classes: Number of classes.
        table: uint8 (256,), class of every number in the file.

    Returns:
        uint8 (H, W), every value below `classes` or 255.

    Raises:
        ValueError: Another size, more channels, or other numbers.
    """
    if mask.size != image.size:
        raise ValueError(f'the mask has {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}')
    if mask.mode not in ('L', 'P', '1', 'I', 'I;16'):
        raise ValueError(f'the mask has the mode {mask.mode}: expected one channel of class numbers')
    numbers = np.array(mask)
    if numbers.dtype != np.uint8:
        if numbers.min() < 0 or numbers.max() > 255:
            raise ValueError(f'the mask holds numbers from {numbers.min()} to {numbers.max()}: no more than 255 can be')
        numbers = numbers.astype(np.uint8)
    if table is not None:
        numbers = table[numbers]
    present = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256))
    if len(wrong := present[(present >= classes) & (present != IGNORE)]):
        few = ', '.join(map(str, wrong[:5])) + (' ...' if len(wrong) > 5 else '')
        raise ValueError(f'the mask holds {few}: neither one of the {classes} classes nor {IGNORE}')
    return numbers


def label_table(reduce_zero_label: bool, labels: dict[int, int] | None = None) -> np.ndarray | None:
    """uint8 (256,), class of every number in the files; None where they are the classes.

    Args:
        reduce_zero_label: Whether 0 is nothing and 1 the first class: 0 becomes 255, other numbers lose 1, 255 stays.
        labels: Class of each number; what is not named is ignored.
    """
    if labels is not None:
        if reduce_zero_label or not all(0 <= v < 256 for pair in labels.items() for v in pair):
            raise ZooError('data.labels takes numbers from 0 to 255 and excludes data.reduce_zero_label')
        table = np.full(256, IGNORE, np.uint8)
        table[list(labels)] = list(labels.values())
        return table
    if not reduce_zero_label:
        return None
    table = np.arange(-1, 255)
    table[[0, 255]] = IGNORE
    return table.astype(np.uint8)


class PairSource:
    """Images and masks in files.

    Args:
        pairs: Image and mask of every sample.
        classes: Number of classes.
        table: See read_mask.
    """

    def __init__(self, pairs: list[tuple[str, str]], classes: int, table: np.ndarray | None) -> None:
        self.pairs, self.classes, self.table = pairs, classes, table

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0]

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, path = open_image(self.pairs[index][0]), self.pairs[index][1]
        try:
            return image, read_mask(open_image(path), image, self.classes, self.table)
        except (OSError, SyntaxError, ValueError) as error:
            reason = 'there is no such mask' if isinstance(error, FileNotFoundError) else error
            raise ValueError(f'{path}: {reason}') from error


def list_pairs(folder: Path, masks: Path, ending: str, mask_of: Callable[[str], str]) -> list[tuple[str, str]]:
    """Images below a folder, sorted, each with the path of its mask.

    Args:
        folder: Of images.
        masks: Of masks, with the same folders inside.
        ending: What the names of images end in, or '' for every known ending.
        mask_of: Name of the mask from the name of the image.

    Raises:
        ZooError: No image, or none that has a mask.
    """
    endings = (ending,) if ending else EXTENSIONS
    found = []
    for root, _, files in sorted(os.walk(folder, followlinks=True)):
        inside = masks / os.path.relpath(root, folder)
        found += [
            (os.path.join(root, f), str(inside / mask_of(f))) for f in sorted(files) if f.lower().endswith(endings)
        ]
    if not found:
        raise ZooError(f'{folder} holds no image (endings: {" ".join(endings)})')
    if not any(os.path.isfile(mask) for _, mask in found):
        raise ZooError(f'none of the {len(found)} images in {folder} has a mask: {found[0][1]} was expected')
    return found


def _class_names(names: list[str] | None, count: int | None, fallback: list[str] | None, hint: str) -> list[str]:
    """Names from the config, from the data, or numbers."""
    if names and count and len(names) != count:
        raise ZooError(f'data.class_names has {len(names)} names, data.num_classes is {count}')
    if names or (fallback and count in (None, len(fallback))):
        return list(names or fallback)
    if not count:
        raise ZooError(f'{hint}: give data.num_classes or data.class_names')
    return [str(number) for number in range(count)]


# data modules


class MaskFolder(MaskData):
    """Folders of images and of masks with the same names: PATH/images/training/a.jpg, PATH/annotations/training/a.png.

    The defaults are those of ADE20K's 150 classes (ADEChallengeData2016), whose names are read from objectInfo150.txt.

    Args:
        path: Folder that holds both.
        images: Folder of the images in it.
        masks: Folder of the masks in it.
        train: Folder of the training split in both; where there is none of the three, all images are split.
        val: Of the validation split.
        test: Of the test split, if any.
        reduce_zero_label: Whether 0 in the files is no class and is ignored, so that 1 is the first class.
        labels: Class of every number in the files, for files with other numbers; what is not named is ignored.
        num_classes: Number of classes; by default that of class_names, or of objectInfo150.txt.
        class_names: Their names.
        val_fraction: Share of the training images held out where there is no validation folder.
        kwargs: See MaskData.
    """

    def __init__(
        self,
        path: str,
        images: str = 'images',
        masks: str = 'annotations',
        train: str = 'training',
        val: str = 'validation',
        test: str | None = None,
        reduce_zero_label: bool = True,
        labels: dict[int, int] | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.val_fraction = Path(path).expanduser(), val_fraction
        self.table = label_table(reduce_zero_label, labels)
        self.images, self.masks = self.path / images, self.path / masks
        self.folders = {'train': train, 'val': val, 'test': test}
        self._given = class_names, num_classes

    def open_splits(self) -> None:
        for folder in (self.path, self.images, self.masks):
            if not folder.is_dir():
                raise ZooError(f'no such folder: {folder}\nGive the folder that holds both with --data.path FOLDER')
        names, count = self._given
        hint = f'{self.path} does not say which classes there are'
        self.class_names = _class_names(names, count, read_object_info(self.path / 'objectInfo150.txt'), hint)
        present = {s: name for s, name in self.folders.items() if name and (self.images / name).is_dir()}
        for split, name in (present or {'train': '.'}).items():
            pairs = list_pairs(self.images / name, self.masks / name, '', lambda f: f'{os.path.splitext(f)[0]}.png')
            self.splits[split] = PairSource(pairs, self.num_classes, self.table)
        _hold_out(self.splits, self.val_fraction)


def _hold_out(splits: dict[str, Source], fraction: float) -> None:
    if 'val' not in splits and 'train' in splits:
        kept, held = hold_out(len(splits['train']), fraction)
        splits['train'], splits['val'] = Subset(splits['train'], kept), Subset(splits['train'], held)


def read_object_info(path: Path) -> list[str] | None:
    """First names in ADE20K's table of classes (tab-separated, the last column; a title first), or None without it."""
    if not path.is_file():
        return None
    rows = [line.rstrip('\n').split('\t') for line in path.read_text().splitlines()[1:] if line.strip()]
    return [row[-1].split(',')[0].strip() for row in rows]


class Cityscapes(MaskData):
    """Cityscapes: PATH/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and PATH/gtFine/SPLIT/CITY/*_gtFine_*.png.

    The masks of 19 classes (*_labelTrainIds.png) are used where the data set's scripts have made them, and otherwise
    made from *_labelIds.png while loading. The test split's labels are not public: `test` evaluates the validation
    split. Source of the numbers: cityscapesScripts, helpers/labels.py.

    Args:
        path: Folder that holds both.
        kwargs: See MaskData.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()

    def open_splits(self) -> None:
        self.class_names = [name for name, _ in CITYSCAPES]
        for split in ('train', 'val'):
            images, masks = self.path / 'leftImg8bit' / split, self.path / 'gtFine' / split
            if not images.is_dir():
                raise ZooError(f'no such folder: {images}\nGive the folder that holds leftImg8bit/ and gtFine/')
            made = any(masks.glob('*/*_gtFine_labelTrainIds.png'))
            kind = 'labelTrainIds' if made else 'labelIds'
            pairs = list_pairs(images, masks, '_leftimg8bit.png', lambda f, kind=kind: f'{f[:-16]}_gtFine_{kind}.png')
            table = None if made else label_table(False, {label: n for n, (_, label) in enumerate(CITYSCAPES)})
            self.splits[split] = PairSource(pairs, self.num_classes, table)


class _MaskRows:
    """A split of a data set with two image columns, decoded one by one so that a bad row can be named."""

    def __init__(self, rows: Any, columns: tuple[str, str], classes: int, table: np.ndarray | None, title: str) -> None:
        self.rows, self.columns, self.classes, self.table, self.title = rows, columns, classes, table, title

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f'{self.title} row {index}'

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        row = self.rows[index]
        image = open_cell(row[self.columns[0]])
        try:
            return image, read_mask(open_cell(row[self.columns[1]]), image, self.classes, self.table)
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise ValueError(f'column {self.columns[1]}: {error}') from error


class HubMasks(MaskData):
    """A Hugging Face data set with a column of images and one of masks. Code from the hub is never run.

    Args:
        path: Hub name, or a folder or file of parquet.
        num_classes: Number of classes; by default that of class_names.
        class_names: Their names.
        name: Configuration of the hub data set.
        train: Split to train on; for local parquet also the beginning of the file names.
        val: Split to validate on; where it is missing a part of the training split is held out.
        test: Split to test on.
        image_column: The first of two image columns where not given.
        mask_column: The second of two image columns where not given.
        reduce_zero_label: Whether 0 in the masks is no class and is ignored, so that 1 is the first class.
        labels: Class of every number in the masks, for masks with other numbers; what is not named is ignored.
        val_fraction: Share of the training images held out where there is no validation split.
        cache_dir: Where downloads are kept; the default is Hugging Face's.
        kwargs: See MaskData.
    """

    def __init__(
        self,
        path: str,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        name: str | None = None,
        train: str = 'train',
        val: str = 'validation',
        test: str = 'test',
        image_column: str | None = None,
        mask_column: str | None = None,
        reduce_zero_label: bool = False,
        labels: dict[int, int] | None = None,
        val_fraction: float = 0.1,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.name, self.cache_dir, self.val_fraction = path, name, cache_dir, val_fraction
        self.split_names = {'train': train, 'val': val, 'test': test}
        self.columns, self.table = (image_column, mask_column), label_table(reduce_zero_label, labels)
        self.class_names = _class_names(class_names, num_classes, None, f'{path} does not say which classes there are')

    def open_splits(self) -> None:
        tables = load_tables(self.path, self.name, list(self.split_names.values()), self.cache_dir)
        found = {split: tables[name] for split, name in self.split_names.items() if name in tables}
        if not found:
            raise ZooError(f'{self.path} has the splits {", ".join(tables)}; name yours with --data.train and so on')
        features = next(iter(found.values())).features
        columns = self._columns(features)
        for split, rows in found.items():
            for column in columns:
                rows = rows.cast_column(column, undecoded())
            title = f'{self.path} {self.split_names[split]}'
            self.splits[split] = _MaskRows(rows, columns, self.num_classes, self.table, title)
        _hold_out(self.splits, self.val_fraction)

    def _columns(self, features: Any) -> tuple[str, str]:
        present, chosen = image_columns(features), []
        for place, column in enumerate(self.columns):
            option = ('image_column', 'mask_column')[place]
            column = column or (present[place] if len(present) == 2 else None)
            if column not in features:
                raise ZooError(f'{self.path}: set --data.{option}; the columns are {", ".join(features)}')
            chosen.append(column)
        return chosen[0], chosen[1]


class _Drawn:
    """One split of drawn scenes."""

    def __init__(self, split: str, count: int, seed: int, **scene: Any) -> None:
        self.split, self.count, self.scene = split, count, scene
        self.seed = derive_seed(seed, ('train', 'val', 'test').index(split))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f'scene-{self.split}-{index}'

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = draw_scene(self.seed, index, **self.scene)
        mask = np.zeros(scene.image.shape[:2], np.uint8)
        for label, visible in zip(scene.labels, scene.masks):
            mask[visible] = label
        return Image.fromarray(scene.image), mask


class DrawnMasks(MaskData):
    """Drawn scenes of six kinds of shapes on a ground, which is a class too. No download.

    Args:
        size: Height and width in pixels.
        most: Largest number of objects in a scene.
        radii: Least and largest radius of an object as fractions of the size.
        train_images: Scenes of the training split, which are the same in every epoch; augmentation makes them new.
        val_images: Scenes of the validation split.
        test_images: Scenes of the test split.
        seed: Of the set: another one gives other scenes in all splits.
        kwargs: See MaskData.
    """

    def __init__(
        self,
        size: int = 96,
        most: int = 5,
        radii: tuple[float, float] = (0.1, 0.24),
        train_images: int = 4096,
        val_images: int = 256,
        test_images: int = 1024,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 32 or min(train_images, val_images, test_images) < 1:
            raise ZooError('data.size must be at least 32; train_images, val_images and test_images must be positive')
        if not 1 <= most <= 8:
            raise ZooError(f'data.most must be 1 to 8, not {most}')
        if not 0.05 <= radii[0] <= radii[1] <= 0.35:
            raise ZooError(f'data.radii {list(radii)} must be within 0.05 .. 0.35, the smaller first')
        self.seed, self.scene = seed, {'size': size, 'most': most, 'radii': tuple(radii)}
        self.counts = {'train': train_images, 'val': val_images, 'test': test_images}

    def open_splits(self) -> None:
        self.class_names = ['ground', *CLASSES]
        self.splits = {s: _Drawn(s, count, self.seed, **self.scene) for s, count in self.counts.items()}


class MaskImages(MaskData):
    """Loose images to predict: files and folders as the user typed them, without masks.

    Args:
        paths: Files, or folders that are searched for images.
        kwargs: See MaskData.
    """

    def __init__(self, paths: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.paths = paths

    def open_splits(self) -> None:
        self.splits = {'predict': _Loose(list_files(self.paths))}


class _Loose:
    """Image files; every mask is all 255."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image = open_image(self.files[index])
        return image, np.full((image.height, image.width), IGNORE, np.uint8)
