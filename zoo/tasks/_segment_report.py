"""What segmentation leaves for the eye: overlays of masks on images, the worst images, tables per class."""

from __future__ import annotations

import colorsys
import csv
import heapq
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw

from zoo.data._mask_transforms import IGNORE
from zoo.data.folder import open_image
from zoo.data.sampling import UNREADABLE
from zoo.report import plot_confusion, plot_sheet, to_image

_EXAMPLES = 12
_MARGIN, _LINE = 6, 16


def palette(classes: int) -> np.ndarray:
    """uint8 (256, 3): grey for class 0, distinct hues for the others, black for what is ignored."""
    colours = np.zeros((256, 3), np.uint8)
    colours[0] = 110
    for number in range(1, min(classes, IGNORE)):
        # steps of the golden ratio never come close to each other
        hue, value = number * 0.618034 % 1, (1.0, 0.75, 0.9)[number % 3]
        colours[number] = [round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, value)]
    return colours


def overlay(image: Image.Image, mask: np.ndarray, colours: np.ndarray, strength: float = 0.7) -> Image.Image:
    """An image in grey under the colours of its mask (uint8, of any size); borders of regions are white.

    In its own colours the image would tint those of the mask away from the legend's. Ignored pixels are dark.
    """
    image = image.convert('L').convert('RGB')
    if image.size != mask.shape[::-1]:
        image = image.resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    mixed = (1 - strength) * np.asarray(image, np.float32) + strength * colours[mask]
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    mixed[border] = 255
    return Image.fromarray(mixed.astype(np.uint8))


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    titles: Sequence[str],
    legend: Sequence[tuple[str, np.ndarray]],
    side: int = 192,
    across: int = 2,
) -> Image.Image:
    """Examples of several pictures each, `across` beside each other, with captions and a legend of colours.

    Args:
        rows: Caption and pictures of every example.
        titles: What the pictures of an example are.
        legend: Name and colour (3,) of the classes to explain.
        side: Longest side of a picture in pixels.
        across: Examples in a row.
    """
    count, cell, height = len(titles), side + _MARGIN, side + _LINE + _MARGIN
    width = across * (count * cell + 2 * _MARGIN)
    lines = _legend_lines(legend, width)
    down = -(-len(rows) // across)
    page = Image.new('RGB', (width, _LINE + down * height + len(lines) * _LINE + 2 * _MARGIN), 'white')
    draw = ImageDraw.Draw(page)
    for number, (caption, pictures) in enumerate(rows):
        left = number % across * (count * cell + 2 * _MARGIN) + _MARGIN
        top = _LINE + number // across * height
        draw.text((left, top), caption[: count * cell // 7], fill='black')
        for place, picture in enumerate(pictures):
            scale = side / max(picture.size)
            size = [max(1, round(s * scale)) for s in picture.size]
            page.paste(
                picture.convert('RGB').resize(size, Image.Resampling.BICUBIC), (left + place * cell, top + _LINE)
            )
            if number < across:
                draw.text((left + place * cell, 2), titles[place], fill='black')
    top = _LINE + down * height + _MARGIN
    for line in lines:
        left = _MARGIN
        for name, colour in line:
            draw.rectangle((left, top + 2, left + 10, top + 12), fill=tuple(map(int, colour)))
            draw.text((left + 14, top + 1), name, fill='black')
            left += _legend_width(name)
        top += _LINE
    return page


def _legend_width(name: str) -> int:
    return 26 + 7 * len(name)


def _legend_lines(legend: Sequence[tuple[str, np.ndarray]], width: int) -> list[list[tuple[str, np.ndarray]]]:
    lines: list[list[tuple[str, np.ndarray]]] = [[]]
    used = _MARGIN
    for entry in legend:
        if used + _legend_width(entry[0]) > width and lines[-1]:
            lines.append([])
            used = _MARGIN
        lines[-1].append(entry)
        used += _legend_width(entry[0])
    return lines


def save_whole(image: Image.Image, path: Path) -> None:
    """Writes beside the target and renames: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    image.save(staged, 'PNG')
    os.replace(staged, path)


class SegmentReport(Callback):
    """Writes validation.png after every validation, the other `files` after a test.

    Args:
        folder: Where to write.
        samples: Where to leave a few test images to try `predict` on; null for none.
    """

    files = 'curves.png, validation.png, overlays.png, worst.png, confusion.png, classes.csv'

    def __init__(self, folder: str | Path, samples: str | Path | None = None) -> None:
        self.folder, self.samples = Path(folder), Path(samples) if samples else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._collect(trainer, outputs, batch, worst=False)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._collect(trainer, outputs, batch, worst=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and not trainer.fast_dev_run and self._examples:
            save_whole(self._sheet(trainer, self._examples), self.folder / 'validation.png')

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        names = trainer.datamodule.class_names
        save_whole(self._sheet(trainer, self._examples), self.folder / 'overlays.png')
        worst = [entry[2] for entry in sorted(self._worst, reverse=True)]
        save_whole(self._sheet(trainer, worst), self.folder / 'worst.png')
        table = {key: value.cpu().numpy() for key, value in pl_module.table.items()}
        percent = 100 * table['matrix'] / np.maximum(table['matrix'].sum(1, keepdims=True), 1)
        plot_confusion(np.rint(percent).astype(int), names, self.folder / 'confusion.png')
        with open(self.folder / 'classes.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'pixels', 'iou', 'accuracy', 'most_confused_with'])
            for number, name in enumerate(names):
                others = np.where(np.arange(len(names)) == number, 0, table['matrix'][number])
                confused = names[others.argmax()] if others.any() else ''
                scores = ['' if np.isnan(table[k][number]) else f'{table[k][number]:.4f}' for k in ('iou', 'accuracy')]
                writer.writerow([name, table['matrix'][number].sum(), *scores, confused])
        if self.samples:
            for place, (_, image, _, _) in enumerate(self._examples):
                save_whole(image, self.samples / f'{place:02d}.png')

    def _start(self, task: LightningModule) -> None:
        self._examples: list[tuple[str, Image.Image, np.ndarray, np.ndarray]] = []
        self._worst: list[tuple[float, int, Any]] = []
        self._seen, self._colours = 0, palette(task.num_classes)

    def _collect(self, trainer: Trainer, outputs: Any, batch: Any, worst: bool) -> None:
        view = trainer.datamodule.view
        for name, (image, truth, guess) in zip(batch['name'], outputs or ()):
            self._seen += 1
            wanted, wrong = len(self._examples) < _EXAMPLES, 0.0
            if worst:
                counted = truth != IGNORE
                wrong = float(((guess != truth) & counted).sum() / counted.sum().clamp_min(1))
                wanted |= len(self._worst) < _EXAMPLES or wrong > self._worst[0][0]
            if not wanted:
                continue
            accuracy = f'{Path(name).name[-32:]}' + (f' ({1 - wrong:.1%} right)' if worst else '')
            entry = (accuracy, to_image(image, view), truth.cpu().numpy(), guess.cpu().numpy())
            if len(self._examples) < _EXAMPLES:
                self._examples.append(entry)
            if worst:
                push = heapq.heappush if len(self._worst) < _EXAMPLES else heapq.heappushpop
                push(self._worst, (wrong, -self._seen, entry))

    def _sheet(self, trainer: Trainer, examples: list[Any]) -> Image.Image:
        names, rows, used = trainer.datamodule.class_names, [], set()
        for caption, image, truth, guess in examples:
            pictures = (image, overlay(image, truth, self._colours), overlay(image, guess, self._colours))
            rows.append((caption, pictures))
            used |= {*np.unique(truth).tolist(), *np.unique(guess).tolist()}
        legend = [(names[number], self._colours[number]) for number in sorted(used - {IGNORE})]
        return sheet(rows, ('image', 'truth', 'prediction'), legend)


class MaskWriter(Callback):
    """Writes masks/*.png (class numbers, with colours), overlays/*.png, predictions.csv and contact_sheet.png.

    Args:
        folder: Where to write.
        class_names: Classes of the network.
        top: Classes per row of the table, those with most pixels first.
        most: Images on the contact sheet.
    """

    files = ('masks/', 'overlays/', 'predictions.csv', 'contact_sheet.png')
    names_them = 'named in the table'

    def __init__(self, folder: str | Path, class_names: list[str], top: int = 3, most: int = 24) -> None:
        self.folder, self.class_names, self.top, self.most = Path(folder), class_names, top, most
        self.rows: list[list[Any]] = []
        self.count = self.unreadable = 0
        self._shown: list[tuple[str, Image.Image]] = []
        self._colours = palette(len(class_names))
        self._taken: set[str] = set()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        for name, guess in zip(batch['name'], outputs):
            self._write(name, guess.cpu().numpy())
        for name, error in batch['failures']:
            self.unreadable += 1
            self.rows.append([name, ''] + [''] * (2 * self.top) + [error])

    def _write(self, name: str, mask: np.ndarray) -> None:
        stem, number = Path(name).stem, 1
        while (file := f'{stem}.png' if number == 1 else f'{stem}-{number}.png') in self._taken:
            number += 1
        self._taken.add(file)
        numbers = Image.fromarray(mask)
        numbers.putpalette(self._colours.tobytes())
        save_whole(numbers, self.folder / 'masks' / file)
        self.count += 1
        shares = np.bincount(mask.ravel(), minlength=len(self.class_names)) / mask.size
        row: list[Any] = [name, f'masks/{file}']
        for place in np.argsort(-shares, kind='stable')[: self.top]:
            row += [self.class_names[place], f'{shares[place]:.4f}'] if shares[place] else ['', '']
        self.rows.append(row + [''] * (2 + 2 * self.top - len(row)) + [''])
        try:
            image = open_image(name)
        except UNREADABLE:
            return  # readable a moment ago, gone now
        drawn = overlay(image, mask, self._colours)
        save_whole(drawn, self.folder / 'overlays' / file)
        if len(self._shown) < self.most:
            drawn.thumbnail((256, 256))
            self._shown.append((f'{row[2]} {float(row[3]):.0%}\n{Path(name).name[-24:]}', drawn))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        header = ['file', 'mask']
        for rank in range(1, self.top + 1):
            header += [f'class_{rank}', f'share_{rank}']
        with open(self.folder / 'predictions.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(header + ['error'])
            writer.writerows(self.rows)
        left_out = self.count - len(self._shown)
        title = f'the first {len(self._shown)} of {self.count} images' if left_out > 0 else ''
        captions, images = [c for c, _ in self._shown], [i for _, i in self._shown]
        plot_sheet(images, captions, self.folder / 'contact_sheet.png', title)
