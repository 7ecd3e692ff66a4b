"""Loose images to predict: files and folders as the user typed them."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.data import DataLoader

from zoo.data.base import ImageData, ListSource
from zoo.data.folder import EXTENSIONS, open_image
from zoo.data.transforms import View
from zoo.errors import ZooError


def list_files(paths: list[str]) -> list[str]:
    """The files named, and the images of the folders named, in order.

    Raises:
        ZooError: Something is not there, or a folder holds no image.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [os.path.join(root, f) for root, _, names in sorted(os.walk(path)) for f in sorted(names)]
            found = [f for f in found if f.lower().endswith(EXTENSIONS)]
            if not found:
                raise ZooError(f'{path} holds no image (known endings: {" ".join(EXTENSIONS)})')
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise ZooError(f'no such file or folder: {path}')
    return files


class ImageList(ImageData):
    """Image files and folders without labels.

    Args:
        paths: Files, or folders that are searched for images.
        view: What the network was trained to see.
        class_names: Classes of the network.
        batch_size: Images per step.
        num_workers: Loader processes.
        strict: Whether an unreadable image is an error.
    """

    def __init__(
        self,
        paths: list[str],
        view: View,
        class_names: list[str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, view, strict=strict)
        self.paths, self.class_names = paths, class_names or []

    def open_splits(self) -> None:
        self.splits = {'predict': ListSource([(f, -1) for f in list_files(self.paths)], open_image)}

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader('predict')
