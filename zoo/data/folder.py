"""Folders of images, one folder per class: PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from zoo.data.base import ImageData, ListSource, Subset, hold_out
from zoo.errors import ZooError

EXTENSIONS = tuple(IMG_EXTENSIONS)


def open_image(path: str) -> Image.Image:
    """Opens and fully decodes one file, so that a cut-off file fails here and not later."""
    with Image.open(path) as image:
        image.load()
        return image


class ImageFolder(ImageData):
    """ImageNet-layout folders.

    Args:
        path: Folder that holds one folder per split; also a folder of classes, which is then split.
        train: Name of the training split's folder.
        val: Name of the validation split's folder.
        test: Name of the test split's folder; without it `test` evaluates the validation split.
        val_fraction: Share of the training images held out where there is no validation folder.
        kwargs: See ImageData.
    """

    def __init__(
        self,
        path: str,
        train: str = 'train',
        val: str = 'val',
        test: str = 'test',
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.val_fraction = Path(path).expanduser(), val_fraction
        self.folders = {'train': train, 'val': val, 'test': test}

    def open_splits(self) -> None:
        if not self.path.is_dir():
            raise ZooError(
                f'no such folder: {self.path}\nGive the folder that holds {self.folders["train"]}/ and '
                f'{self.folders["val"]}/ with --data.path FOLDER'
            )
        present = {split: self.path / name for split, name in self.folders.items() if (self.path / name).is_dir()}
        if 'train' not in present and 'val' not in present:
            present = {'train': self.path}
        reference = present.get('train', present.get('val'))
        self.class_names = class_folders(reference)
        for split, folder in present.items():
            names = class_folders(folder)
            if names != self.class_names:
                raise ZooError(_class_difference(reference, self.class_names, folder, names))
            self.splits[split] = ListSource(list_images(folder, names), open_image)
        if 'val' not in self.splits:
            kept, held = hold_out(len(self.splits['train']), self.val_fraction)
            whole = self.splits['train']
            self.splits['train'], self.splits['val'] = Subset(whole, kept), Subset(whole, held)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted, as torchvision and every published ImageNet model order them."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))
    if not names:
        raise ZooError(f'{folder} holds no class folders: expected {folder}/CLASS/IMAGE.jpg')
    return names


def list_images(folder: Path, names: list[str]) -> list[tuple[str, int]]:
    """Path and label of every image, in a fixed order; a class without any is an error."""
    items: list[tuple[str, int]] = []
    empty = []
    for label, name in enumerate(names):
        before = len(items)
        for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
            items += [(os.path.join(root, f), label) for f in sorted(files) if f.lower().endswith(EXTENSIONS)]
        if len(items) == before:
            empty.append(name)
    if empty:
        listed = ', '.join(empty[:5]) + (f' and {len(empty) - 5} more' if len(empty) > 5 else '')
        raise ZooError(
            f'{len(empty)} of {len(names)} class folders in {folder} hold no image: {listed}\n'
            f'Known endings: {" ".join(EXTENSIONS)}'
        )
    return items


def _class_difference(folder_a: Path, a: list[str], folder_b: Path, b: list[str]) -> str:
    def few(names: set[str]) -> str:
        return ', '.join(sorted(names)[:5]) + (' ...' if len(names) > 5 else '')

    lines = [f'the splits have different classes: {folder_a} has {len(a)}, {folder_b} has {len(b)}']
    if only := set(a) - set(b):
        lines.append(f'  only in {folder_a.name}: {few(only)}')
    if only := set(b) - set(a):
        lines.append(f'  only in {folder_b.name}: {few(only)}')
    return '\n'.join(lines)
