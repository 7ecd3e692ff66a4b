"""Data modules of images with objects: boxes, labels and masks, in COCO's format or drawn.

A batch is `image` (a list of uint8 (3, H, W)), `target` (a list of dictionaries), `name` and `failures`. A target has
boxes fp32 (N, 4) as left, top, right, bottom in pixels, labels int64 (N,), and where masks are used masks bool
(N, H, W). In evaluation images keep their size, and targets also have iscrowd, area and image_id.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from zoo.data import _drawing
from zoo.data._coco import Instances, draw_mask, few, read_instances
from zoo.data.base import ResumableData, loader_options
from zoo.data.folder import open_image
from zoo.data.images import list_files
from zoo.data.sampling import SUBSTITUTES, UNREADABLE, BucketBatches, EpochSampler, substitute_for
from zoo.data.seeding import derive_seed, keyed_randomness, run_seed
from zoo.errors import ZooError

_CROP_SIZES, _CROP = (400, 500, 600), (384, 600)


@dataclass
class BoxAugment:
    """Training augmentation of images with boxes; evaluation has the model's own size.

    Args:
        sizes: Pixels of the shorter side, one drawn for every image.
        max_size: Most pixels of the longer side.
        square: Whether to resize to size x size instead, as SSDLite wants it.
        hflip: Probability of a horizontal flip.
        crop: Whether half of the images are resized to 400, 500 or 600 and cropped to sides of 384 to 600 first, as
            DETR's training does (arXiv 2005.12872, section 4).
        iou_crop: Whether to crop so that objects overlap with the crop by a drawn share, as SSD's training does (arXiv
            1512.02325, section 2.2).
        photometric: Whether to distort brightness, contrast, saturation and hue as SSD's training does.
    """

    sizes: tuple[int, ...] = (800,)
    max_size: int = 1333
    square: bool = False
    hflip: float = 0.5
    crop: bool = False
    iou_crop: bool = False
    photometric: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or not 0 <= self.hflip <= 1:
            raise ZooError(f'augment: sizes {self.sizes} must be positive and hflip {self.hflip} within 0..1')

    def build(self) -> v2.Transform:
        """The transform of an image and a target."""
        steps: list[v2.Transform] = [v2.RandomPhotometricDistort()] if self.photometric else []
        if self.iou_crop:
            steps.append(v2.RandomIoUCrop())
        if self.square:
            squares = [v2.Resize((size, size)) for size in self.sizes]
            resize = squares[0] if len(squares) == 1 else v2.RandomChoice(squares)
        else:
            resize = v2.RandomShortestSize(list(self.sizes), self.max_size)
        if self.crop:
            small = v2.Compose([v2.RandomShortestSize(list(_CROP_SIZES)), _RandomSizeCrop(), resize])
            steps.append(v2.RandomChoice([resize, small]))
        else:
            steps.append(resize)
        if self.hflip:
            steps.append(v2.RandomHorizontalFlip(self.hflip))
        return v2.Compose(steps)


class _RandomSizeCrop:
    """Crops to a height and a width drawn from the range of DETR."""

    def __call__(self, image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        sides, (low, high) = image.shape[-2:], _CROP
        height, width = (int(torch.randint(min(low, side), min(high, side) + 1, ())) for side in sides)
        top, left = (int(torch.randint(side - cut + 1, ())) for side, cut in zip(sides, (height, width)))
        moved = {k: v if k == 'labels' else F.crop(v, top, left, height, width) for k, v in target.items()}
        return F.crop(image, top, left, height, width), moved


class ObjectSource(Protocol):
    """One split of a data set with objects."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name that lets the user find the image."""
        ...

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width."""
        ...

    def load(self, index: int, epoch: int, masks: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """uint8 (3, H, W), and boxes, labels, iscrowd, area, image_id and, if asked for, masks."""
        ...


class KeyedObjects(Dataset):
    """Loads samples of a source; random transforms are keyed by (seed, epoch, index).

    Args:
        source: The split.
        masks: Whether targets have masks.
        augment: Training augmentation; without it images keep their size and crowds stay.
        seed: Of the run.
    """

    def __init__(self, source: ObjectSource, masks: bool, augment: BoxAugment | None = None, seed: int = 0) -> None:
        self.source, self.masks, self.seed = source, masks, seed
        self.transform = augment.build() if augment else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        failures: list[tuple[str, str]] = []
        for attempt in range(1 + (SUBSTITUTES if self.transform else 0)):
            chosen = index if attempt == 0 else substitute_for(index, attempt, len(self.source))
            name = self.source.name(chosen)
            try:
                image, target = self.source.load(chosen, epoch, self.masks)
            except UNREADABLE as error:
                failures.append((name, f'{type(error).__name__}: {error}'))
                continue
            if self.transform:
                with keyed_randomness(self.seed, epoch, index):
                    image, target = self._augmented(image, target)
            return {'image': image, 'target': target, 'name': name, 'failures': failures}
        return {'image': None, 'target': None, 'name': '', 'failures': failures}

    def _augmented(self, image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        single = ~target['iscrowd']
        boxes = tv_tensors.BoundingBoxes(target['boxes'][single], format='XYXY', canvas_size=image.shape[-2:])
        sample = {'boxes': boxes, 'labels': target['labels'][single]}
        if self.masks:
            sample['masks'] = tv_tensors.Mask(target['masks'][single])
        image, sample = self.transform(tv_tensors.Image(image), sample)
        sample = {k: v.as_subclass(torch.Tensor) for k, v in sample.items()}
        # what ClampBoundingBoxes and SanitizeBoundingBoxes do, which take longer than drawing a small image
        height, width = image.shape[-2:]
        corners = torch.minimum(sample['boxes'].clamp(min=0), torch.tensor([width, height, width, height]))
        sample['boxes'] = corners
        kept = (corners[:, 2:] - corners[:, :2] >= 1).all(1)
        return image.as_subclass(torch.Tensor), {k: v[kept] for k, v in sample.items()}


def collate_objects(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists of the readable samples."""
    good = [s for s in samples if s['image'] is not None]
    batch = {key: [s[key] for s in good] for key in ('image', 'target', 'name')}
    return {**batch, 'failures': [f for s in samples for f in s['failures']]}


class DetectionData(ResumableData):
    """Base of the data modules with objects; a subclass fills `class_names` and `splits` in `open_splits`.

    Args:
        batch_size: Images per step and process.
        num_workers: Loader processes.
        augment: Training augmentation.
        strict: Whether an unreadable image or a malformed annotation is an error; otherwise it is left out and counted.
    """

    def __init__(
        self,
        batch_size: int = 2,
        num_workers: int = 2,
        augment: BoxAugment = BoxAugment(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        strict: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, strict)
        self.augment = augment
        self.class_names: list[str] = []
        self.category_ids: list[int] = []  # what files call the classes
        self.splits: dict[str, ObjectSource] = {}
        self.missing: dict[str, str] = {}  # splits that are not there, and what to do about it
        self.masks, self.malformed = False, 0
        self._opened = False

    def open_splits(self) -> None:
        """Fills `class_names`, `category_ids` and `splits`; raises ZooError for whatever is wrong with the data."""
        raise TypeError(f'{type(self).__name__} does not define open_splits')

    def use_masks(self) -> None:
        """Loads masks too from now on."""
        self.masks = True

    def account(self, file: Path | str, problems: list[str]) -> None:
        """Counts malformed entries and warns of them; an error in strict mode."""
        if not problems:
            return
        if self.strict:
            raise ZooError(f'{file}: {len(problems)} malformed entries (strict: true){few(problems)}')
        self.malformed += len(problems)
        warnings.warn(f'{file}: {len(problems)} malformed entries left out{few(problems)}', RuntimeWarning, 2)

    def setup(self, stage: str | None = None) -> None:
        if not self._opened:
            self.open_splits()
            self._opened = True

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader:
        source, (rank, world) = self._source('train'), self._ranks()
        # a batch is padded to its largest height and width, so upright and lying images do not meet
        shapes = [source.shape(i) for i in range(len(source))]
        buckets = [int(height > width) for height, width in shapes]
        batches = BucketBatches(buckets, self.batch_size, run_seed(), True, rank, world)
        if not len(batches):
            raise ZooError(
                f'the training split has {len(source)} images with objects, which do not fill one batch of '
                f'{self.batch_size} per process: lower data.batch_size'
            )
        if self._resume_at:
            batches.resume(*self._resume_at)
        dataset = KeyedObjects(source, self.masks, self.augment, run_seed())
        return DataLoader(
            dataset, batch_sampler=batches, collate_fn=collate_objects, **loader_options(self.num_workers)
        )

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader('val')

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader('test' if 'test' in {*self.splits, *self.missing} else 'val')

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader('predict')

    def _source(self, split: str) -> ObjectSource:
        if split not in self.splits:
            has = f'{type(self).__name__} has no {split} split; it has: {", ".join(self.splits)}'
            raise ZooError(self.missing.get(split, has))
        return self.splits[split]

    def _eval_loader(self, split: str) -> DataLoader:
        source = self._source(split)
        sampler = EpochSampler(len(source), run_seed(), False, *self._ranks())
        return DataLoader(
            KeyedObjects(source, self.masks),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate_objects,
            **loader_options(self.num_workers),
        )


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1).contiguous()


class CocoObjects(DetectionData):
    """Images and annotations in COCO's format. Who only evaluates needs no training split.

    Args:
        path: Folder that holds everything.
        train: Folder of the training images, in path.
        val: Folder of the validation images, in path.
        test: Folder of the test images, in path; null evaluates the validation split instead.
        annotations: File with the annotations of a split, in path; {split} stands for the name of the image folder.
        keep_empty: Whether training includes images without an object.
        kwargs: See DetectionData.
    """

    def __init__(
        self,
        path: str,
        train: str = 'train2017',
        val: str = 'val2017',
        test: str | None = None,
        annotations: str = 'annotations/instances_{split}.json',
        keep_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.annotations, self.keep_empty = Path(path).expanduser(), annotations, keep_empty
        self.folders = {'train': train, 'val': val, **({'test': test} if test else {})}

    def open_splits(self) -> None:
        for split, name in self.folders.items():
            folder, file = self.path / name, self.path / self.annotations.replace('{split}', name)
            if not folder.is_dir():
                self.missing[split] = (
                    f'no such folder: {folder}\nGive the folder that holds the images of {split} with --data.path and '
                    f'--data.{split}'
                )
                continue
            found = read_instances(file)
            self.account(file, found.problems)
            if not self.class_names:
                self.class_names, self.category_ids, first = found.names, found.ids, file
            elif (found.names, found.ids) != (self.class_names, self.category_ids):
                theirs, ours = {*zip(found.ids, found.names)}, {*zip(self.category_ids, self.class_names)}
                raise ZooError(f'{file} has other categories than {first}:' + few(list(map(str, theirs ^ ours))))
            found.images = [(number, str(folder / path), *size) for number, path, *size in found.images]
            self.splits[split] = InstanceSplit(found, _open_entry, with_empty=split != 'train' or self.keep_empty)
            if not len(self.splits[split]):
                raise ZooError(f'no image of {file} has a usable annotation')
        if not self.splits:
            raise ZooError(self.missing['val'])

    def use_masks(self) -> None:
        super().use_masks()
        for source in self.splits.values():
            self.account(source.instances.file, source.drop_bad_masks())


def _open_entry(entry: tuple[int, str, int, int]) -> Image.Image:
    return open_image(entry[1])


class InstanceSplit:
    """One split: its annotations, and how its images are opened.

    Args:
        instances: the annotations.
        opener: decodes the image of an entry of instances.images.
        with_empty: whether images without an object that trains belong to it.
    """

    def __init__(self, instances: Instances, opener: Callable[[tuple], Image.Image], with_empty: bool) -> None:
        self.instances, self.opener, self.with_empty = instances, opener, with_empty
        self._choose()

    def _choose(self) -> None:
        objects = self.instances.objects
        self.chosen = [i for i, rows in enumerate(objects) if self.with_empty or not all(row[3] for row in rows)]

    def drop_bad_masks(self) -> list[str]:
        problems = self.instances.without_bad_masks()
        self._choose()
        return problems

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return self.instances.images[self.chosen[index]][1]

    def shape(self, index: int) -> tuple[int, int]:
        _, _, width, height = self.instances.images[self.chosen[index]]
        return height, width

    def load(self, index: int, epoch: int, masks: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        entry, rows = self.instances.images[self.chosen[index]], self.instances.objects[self.chosen[index]]
        image = pixels_of(self.opener(entry))
        height, width = self.shape(index)
        if image.shape[1:] != (height, width):
            found = ' x '.join(map(str, image.shape[:0:-1]))
            raise ValueError(f'the image is {found} pixels, its annotations are for {width} x {height}')
        target = {
            'boxes': torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4),
            'labels': torch.tensor([row[1] for row in rows], dtype=torch.long),
            'area': torch.tensor([row[2] for row in rows], dtype=torch.float32),
            'iscrowd': torch.tensor([row[3] for row in rows], dtype=torch.bool),
            'image_id': entry[0],
        }
        if masks:
            drawn = [draw_mask(row[4], height, width) for row in rows]
            target['masks'] = torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, height, width))).bool()
        return image, target


class DrawnObjects(DetectionData):
    """Drawn scenes of up to eight shapes on textured ground: boxes and masks without a download.

    Training draws new scenes in every epoch; validation and test scenes are the same in every run of one seed.

    Args:
        size: Height and width of the images in pixels, at most 512.
        most: Largest number of objects in an image.
        train_images: Images of an epoch.
        val_images: Images in validation.
        test_images: Images in test.
        seed: Of the scenes.
        kwargs: See DetectionData.
    """

    def __init__(
        self,
        size: int = 96,
        most: int = 5,
        train_images: int = 2048,
        val_images: int = 128,
        test_images: int = 512,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 32 <= size <= 512 or not 1 <= most <= _drawing.MOST or min(train_images, val_images, test_images) < 1:
            raise ZooError(
                f'data: size {size} must be within 32..512, most {most} within 1..{_drawing.MOST}, and train_images, '
                'val_images and test_images positive'
            )
        self.size, self.most, self.seed = size, most, seed
        self.counts = {'train': train_images, 'val': val_images, 'test': test_images}

    def open_splits(self) -> None:
        self.class_names = list(_drawing.CLASSES)
        self.category_ids = list(range(1, len(self.class_names) + 1))
        for number, (split, count) in enumerate(self.counts.items()):
            self.splits[split] = _DrawnSplit(split, count, self.size, self.most, derive_seed(self.seed, number))


class _DrawnSplit:
    def __init__(self, split: str, count: int, size: int, most: int, seed: int) -> None:
        self.split, self.count, self.size, self.most, self.seed = split, count, size, most, seed

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f'drawn-{self.split}-{index}'

    def shape(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def load(self, index: int, epoch: int, masks: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        number = index + (epoch * self.count if self.split == 'train' else 0)
        scene = _drawing.draw_scene(self.seed, number, self.size, most=self.most)
        target = {
            'boxes': torch.from_numpy(scene.boxes),
            'labels': torch.from_numpy(scene.labels) - 1,  # 0 is the ground
            'area': torch.from_numpy(scene.masks.sum((1, 2)).astype(np.float32)),
            'iscrowd': torch.zeros(len(scene.labels), dtype=torch.bool),
            'image_id': index,
        }
        if masks:
            target['masks'] = torch.from_numpy(scene.masks)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), target


class ImagesToSearch(DetectionData):
    """Files to predict on, without annotations.

    Args:
        paths: Image files and folders.
        class_names: Of the model.
        category_ids: Of the model.
        batch_size: Images per step.
        masks: Whether the model finds masks.
    """

    def __init__(
        self, paths: list[str], class_names: list[str], category_ids: list[int], batch_size: int, masks: bool
    ) -> None:
        super().__init__(batch_size, num_workers=0)
        self.paths, self.class_names, self.category_ids, self.masks = paths, class_names, category_ids, masks

    def open_splits(self) -> None:
        self.splits = {'predict': _Files(list_files(self.paths))}


class _Files:
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def shape(self, index: int) -> tuple[int, int]:
        with Image.open(self.files[index]) as image:
            return image.height, image.width

    def load(self, index: int, epoch: int, masks: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        return pixels_of(open_image(self.files[index])), {}
