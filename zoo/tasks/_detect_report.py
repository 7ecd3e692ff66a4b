"""What a detection run leaves for the eye: detections beside the truth, average precision per class, COCO results."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor

from zoo.data._coco import to_results

_PALETTE = tuple('#e6194b #3cb44b #4363d8 #f58231 #911eb4 #008080 #9a6324 #808000 #e649c6 #42a5b5'.split())
_SIDE, _GAP = 320, 8  # pixels of a drawn image's longer side, and between images


def draw_objects(
    image: Tensor, objects: dict[str, Tensor], names: list[str], threshold: float = 0.0, side: int = _SIDE
) -> Image.Image:
    """Draws boxes, classes, scores and masks.

    Args:
        image: uint8 or, in 0..1, fp32 (3, H, W).
        objects: boxes, labels and, where there are any, scores and masks bool (N, H, W).
        names: of the classes.
        threshold: objects of a lower score are not drawn.
        side: pixels of the longer side of the picture.
    """
    pixels = image.cpu() if image.dtype == torch.uint8 else (image.cpu() * 255).round().clamp(0, 255).byte()
    objects = {k: v.detach().cpu() for k, v in objects.items() if k in ('boxes', 'labels', 'scores', 'masks')}
    if 'scores' in objects:
        chosen = objects['scores'] >= threshold
        objects = {k: v[chosen] for k, v in objects.items()}
    if len(objects.get('masks', ())):
        pixels = pixels.clone()
        for mask, label in zip(objects['masks'].bool(), objects['labels'].tolist()):
            colour = torch.tensor(_rgb(label), dtype=torch.float32)[:, None]
            pixels[:, mask] = (0.55 * pixels[:, mask] + 0.45 * colour).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(v * scale)) for v in picture.size], Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    scores = objects['scores'].tolist() if 'scores' in objects else [None] * len(objects['labels'])
    for box, label, score in zip((objects['boxes'] * scale).tolist(), objects['labels'].tolist(), scores):
        name = names[label] if label < len(names) else str(label)
        text = name if score is None else f'{name} {score:.0%}'
        left, top, right, bottom = box
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=_PALETTE[label % 10], width=2)
        place = pen.textbbox((left + 2, max(top - 12, 0)), text)
        pen.rectangle(place, fill=_PALETTE[label % 10])
        pen.text(place[:2], text, fill='white', anchor='lt')
    return picture


def _rgb(label: int) -> tuple[int, ...]:
    code = _PALETTE[label % 10]
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def beside(found: Image.Image, truth: Image.Image) -> Image.Image:
    """Detections to the left of the truth, each under its title."""
    sheet = Image.new('RGB', (found.width + truth.width + _GAP, found.height + 14), 'white')
    pen = ImageDraw.Draw(sheet)
    for x, title, picture in ((0, 'detected', found), (found.width + _GAP, 'truth', truth)):
        sheet.paste(picture, (x, 14))
        pen.text((x + 2, 1), title, fill='black')
    return sheet


def tile(pictures: list[Image.Image], columns: int, target: Path) -> None:
    """Writes pictures in a grid."""
    width, height = (max(getattr(p, key) for p in pictures) for key in ('width', 'height'))
    rows = -(-len(pictures) // columns)
    sheet = Image.new('RGB', (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), 'white')
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f'.{target.name}')
    sheet.save(staged, format='PNG')
    os.replace(staged, target)


def write_json(content: Any, target: Path) -> None:
    staged = target.with_name(f'.{target.name}')
    staged.write_text(json.dumps(content))
    os.replace(staged, target)


class DetectionReport(Callback):
    """Draws validation.png after every validation; about a test writes detections.png, per_class.csv, detections.json.

    Args:
        folder: Where to write.
        samples: Where to leave a few test images to try `predict` on; null for none.
        threshold: Lowest score of what is drawn.
        most: Images that are drawn.
    """

    files = 'curves.png, validation.png, detections.png, per_class.csv, detections.json'

    def __init__(self, folder: Path, samples: Path | None = None, threshold: float = 0.5, most: int = 12) -> None:
        self.folder, self.samples, self.threshold, self.most = folder, samples, threshold, most
        self._start()

    def _start(self, *_: Any) -> None:
        self._pictures: list[Image.Image] = []
        self._images: list[Tensor] = []
        self._results: list[dict[str, Any]] = []

    on_validation_start = on_test_start = _start

    def _add(self, model: LightningModule, outputs: Any, batch: Any, names: list[str]) -> None:
        for image, target, found in zip(batch['image'], batch['target'], outputs or []):
            if len(self._pictures) == self.most:
                return
            pictures = [draw_objects(image, objects, names, self.threshold) for objects in (found, target)]
            self._pictures.append(beside(*pictures))
            self._images.append(image.cpu())

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._add(pl_module, outputs, batch, trainer.datamodule.class_names)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._pictures and not trainer.sanity_checking:
            tile(self._pictures, 3, self.folder / 'validation.png')

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        data = trainer.datamodule
        self._add(pl_module, outputs, batch, data.class_names)
        for target, found in zip(batch['target'], outputs or []):
            self._results += to_results(target['image_id'], found, data.category_ids)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results = self._results
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, results)
            results = [row for part in parts for row in part]
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(results, self.folder / 'detections.json')
        if self._pictures:
            tile(self._pictures, 3, self.folder / 'detections.png')
        with open(self.folder / 'per_class.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, ['class', *pl_module.per_class[0]] if pl_module.per_class else ['class'])
            writer.writeheader()
            for name, row in zip(trainer.datamodule.class_names, pl_module.per_class):
                writer.writerow({'class': name, **{k: '' if v < 0 else f'{v:.4f}' for k, v in row.items()}})
        if self.samples:
            self.samples.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(self._images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.samples / f'{number:02d}.png')


class DetectionWriter(Callback):
    """Writes detections.json (COCO's results format), images.json (what its ids stand for), and drawn images.

    An image's id is the number that its file is called by, where all have one, as COCO's have; otherwise its place.

    Args:
        folder: Where to write.
        class_names: Of the model.
        category_ids: Of the model.
        threshold: Lowest score of what is drawn; the JSON holds everything.
        most: Images that are drawn.
    """

    files = ('detections.json', 'images.json', 'drawn/')
    names_them = 'named in images.json'

    def __init__(
        self, folder: Path, class_names: list[str], category_ids: list[int], threshold: float, most: int = 100
    ) -> None:
        self.folder, self.class_names, self.category_ids = folder, class_names, category_ids
        self.threshold, self.most = threshold, most
        self.images: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self._found: list[list[dict[str, Any]]] = []

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def unreadable(self) -> int:
        return len(self.failures)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.failures += [{'file_name': name, 'error': error} for name, error in batch['failures']]
        drawn = self.folder / 'drawn'
        drawn.mkdir(parents=True, exist_ok=True)
        for name, image, found in zip(batch['name'], batch['image'], outputs):
            if self.count < self.most:
                picture = draw_objects(image, found, self.class_names, self.threshold, max(_SIDE, *image.shape[1:]))
                picture.save(drawn / f'{self.count:04d}-{Path(name).stem}.png')
            self.images.append({'file_name': name, 'height': image.shape[1], 'width': image.shape[2]})
            self._found.append(to_results(0, found, self.category_ids))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stems = [Path(entry['file_name']).stem for entry in self.images]
        numbered = all(s.isascii() and s.isdigit() for s in stems) and len({int(s) for s in stems}) == len(stems)
        for place, (entry, stem) in enumerate(zip(self.images, stems)):
            entry['id'] = int(stem) if numbered else place
            for row in self._found[place]:
                row['image_id'] = entry['id']
        categories = [{'id': number, 'name': name} for number, name in zip(self.category_ids, self.class_names)]
        write_json([row for rows in self._found for row in rows], self.folder / 'detections.json')
        about = {'images': self.images, 'categories': categories, 'unreadable': self.failures}
        write_json(about, self.folder / 'images.json')
