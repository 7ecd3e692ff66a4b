"""Loose images to predict: files and folders as the user typed them."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.data import DataLoader

from zoo.data.base import ImageData, ListSource
from zoo.data.folder import EXTENSIONS, open_image
from zoo.data.transforms import View
from zoo.errors import ZooError


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
        files: list[str] = []
        for path in map(Path, self.paths):
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
        self.splits = {'predict': ListSource([(f, -1) for f in files], open_image)}

    def predict_dataloader(self) -> DataLoader:
        return self._eval_loader('predict')
