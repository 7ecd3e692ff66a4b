"""What a run leaves for the eye: curves, confusion matrix, worst mistakes, contact sheets, and tables beside them."""

from __future__ import annotations

import csv
import heapq
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from zoo.data.folder import open_image
from zoo.data.sampling import UNREADABLE

_BLUE, _ORANGE, _GREY = '#2b6cb0', '#dd6b20', '#4a5568'
_COLOURS = (_BLUE, _ORANGE, _GREY, '#2f855a', '#b83280', '#6b46c1', '#975a16', '#00838f')
_MOST_CLASSES_DRAWN = 40


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def read_metrics(path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of every column of a metrics.csv, empty cells left out."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    with open(path, newline='') as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key not in ('step', 'epoch') and value not in ('', None):
                    steps, values = series.setdefault(key, ([], []))
                    steps.append(float(row['step']))
                    values.append(float(value))
    return series


def plot_curves(
    metrics: str | Path, target: str | Path, title: str, accuracies: dict[str, str], loss_name: str = 'cross-entropy'
) -> None:
    """Draws loss and accuracy over optimizer steps from a metrics.csv.

    Args:
        metrics: The file.
        target: The picture.
        title: Of the right half.
        accuracies: Metric to label, for the right half.
        loss_name: What the left half's axis is of.
    """
    series = read_metrics(metrics)
    figure, axes = _figure(10, 4, 1, 2)
    loss, accuracy = axes[0]
    if 'train/loss_step' in series:
        loss.plot(*series['train/loss_step'], color=_BLUE, alpha=0.25, linewidth=0.8)
    for key, label, color in (('train/loss_epoch', 'training', _BLUE), ('val/loss', 'validation', _ORANGE)):
        if key in series:
            loss.plot(*series[key], label=label, color=color, marker='.', markersize=3)
    for (key, label), color in zip(accuracies.items(), _COLOURS):
        if key in series:
            steps, values = series[key]
            accuracy.plot(steps, [100 * v for v in values], label=label, color=color, marker='.', markersize=3)
    loss.set(title='Loss', xlabel='optimizer step', ylabel=loss_name, ylim=(0, None))
    accuracy.set(title=title, xlabel='optimizer step', ylabel='%')
    for axis in (loss, accuracy):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    figure.savefig(target)


def plot_confusion(matrix: np.ndarray, names: list[str], target: str | Path) -> None:
    """Draws a confusion matrix, rows the truth; with many classes only those with most errors."""
    chosen = np.arange(len(matrix))
    title = 'Confusion matrix'
    if len(matrix) > _MOST_CLASSES_DRAWN:
        errors = matrix.sum(1) - np.diag(matrix)
        chosen = np.sort(np.argsort(-errors, kind='stable')[:_MOST_CLASSES_DRAWN])
        title += f': the {_MOST_CLASSES_DRAWN} of {len(matrix)} classes with most errors'
    shown = matrix[np.ix_(chosen, chosen)]
    share = shown / np.maximum(matrix.sum(1)[chosen, None], 1)
    side = max(4.5, 0.32 * len(chosen) + 2)
    figure, axes = _figure(side + 0.6, side)
    axis = axes[0, 0]
    drawn = axis.imshow(share, cmap='Blues', vmin=0, vmax=1)
    labels = [names[i] if i < len(names) else str(i) for i in chosen]
    axis.set_xticks(range(len(chosen)), labels, rotation=90 if max(map(len, labels)) > 2 else 0, parse_math=False)
    axis.set_yticks(range(len(chosen)), labels, parse_math=False)
    axis.set(title=title, xlabel='predicted', ylabel='true')
    for i, j in zip(*np.nonzero(shown)):
        color = 'white' if share[i, j] > 0.6 else 'black'
        axis.text(j, i, int(shown[i, j]), ha='center', va='center', color=color, fontsize=8)
    figure.colorbar(drawn, ax=axis, label='share of the true class', shrink=0.8)
    figure.savefig(target)


def plot_sheet(images: list[Image.Image], captions: list[str], target: str | Path, title: str = '') -> None:
    """Draws images with captions in a grid."""
    columns = min(6, max(1, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    figure, axes = _figure(1.9 * columns, 2.35 * rows + 0.4, rows, columns)
    for axis in axes.flat:
        axis.axis('off')
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image.convert('RGB'), interpolation='nearest')
        axis.set_title(caption, fontsize=8, parse_math=False)  # $ is a character of the users'
    if not images:
        axes[0, 0].text(0.5, 0.5, 'none', ha='center', va='center')
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(target)


def to_image(tensor: torch.Tensor, view: Any) -> Image.Image:
    """Undoes the normalisation of a network input."""
    mean, std = torch.tensor(view.mean).view(-1, 1, 1), torch.tensor(view.std).view(-1, 1, 1)
    pixels = (tensor.float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


class TestReport(Callback):
    """Writes a folder about a test run: confusion.png, mistakes.png, per_class.csv, and some sample images.

    Args:
        folder: Where to write.
        samples: Where to leave a few test images to try `predict` on; null for none.
        worst: Number of mistakes to show.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name
    files = 'curves.png, confusion.png, mistakes.png, per_class.csv'

    def __init__(self, folder: str | Path, samples: str | Path | None = None, worst: int = 24) -> None:
        self.folder, self.samples, self.worst = Path(folder), Path(samples) if samples else None, worst

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        classes = pl_module.num_classes
        self._matrix = torch.zeros(classes, classes, dtype=torch.long, device=pl_module.device)
        self._mistakes: list[tuple[float, int, Image.Image, str]] = []
        self._examples: list[tuple[str, Image.Image]] = []
        self._count = 0

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if not outputs:
            return
        probability, target = outputs['logits'].softmax(-1), outputs['target']
        confidence, guess = probability.max(-1)
        classes = pl_module.num_classes
        self._matrix += torch.bincount(target * classes + guess, minlength=classes**2).view(classes, classes)
        names = trainer.datamodule.class_names
        view = trainer.datamodule.view
        for i in (guess != target).nonzero().flatten().tolist():
            self._count += 1
            sure = float(confidence[i])
            if len(self._mistakes) == self.worst and sure <= self._mistakes[0][0]:
                continue
            caption = f'{names[guess[i]]} ({sure:.0%}), is {names[target[i]]}\n{Path(batch["name"][i]).name[-24:]}'
            entry = (sure, -self._count, to_image(batch['image'][i], view), caption)
            (heapq.heappush if len(self._mistakes) < self.worst else heapq.heapreplace)(self._mistakes, entry)
        if self.samples and len(self._examples) < 12:
            for i in range(min(len(target), 12 - len(self._examples))):
                self._examples.append((names[target[i]], to_image(batch['image'][i], view)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrix = trainer.strategy.reduce(self._matrix, reduce_op='sum').cpu().numpy()
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = trainer.datamodule.class_names
        plot_confusion(matrix, names, self.folder / 'confusion.png')
        worst = sorted(self._mistakes, key=lambda m: (-m[0], -m[1]))
        wrong = int(matrix.sum() - matrix.trace())  # of all processes
        title = f'Mistakes the network was surest of ({wrong} in all): prediction (confidence), truth'
        plot_sheet([m[2] for m in worst], [m[3] for m in worst], self.folder / 'mistakes.png', title)
        self._write_classes(matrix, names)
        if self.samples:
            self.samples.mkdir(parents=True, exist_ok=True)
            for number, (name, image) in enumerate(self._examples):
                safe = ''.join(c if c.isalnum() else '-' for c in name)
                image.save(self.samples / f'{number:02d}-is-{safe}.png')

    def _write_classes(self, matrix: np.ndarray, names: list[str]) -> None:
        with open(self.folder / 'per_class.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'images', 'correct', 'accuracy', 'most_confused_with'])
            for i, row in enumerate(matrix):
                others = row.copy()
                others[i] = 0
                confused = names[others.argmax()] if others.any() else ''
                accuracy = f'{row[i] / row.sum():.4f}' if row.sum() else ''
                writer.writerow([names[i], row.sum(), row[i], accuracy, confused])


class PredictionWriter(Callback):
    """Writes predictions.csv, one row per image, and contact_sheet.png.

    Another writer of predictions has, as this one, `count`, `unreadable`, `files` and `names_them`.

    Args:
        folder: Where to write.
        class_names: Classes of the network; numbers where unknown.
        top: Number of guesses per image.
        most: Images on the contact sheet.
    """

    files = ('predictions.csv', 'contact_sheet.png')
    names_them = 'named in the table'

    def __init__(self, folder: str | Path, class_names: list[str], top: int = 3, most: int = 48) -> None:
        self.folder, self.class_names, self.top, self.most = Path(folder), class_names, top, most
        self.rows: list[list[Any]] = []
        self.unreadable = 0

    @property
    def count(self) -> int:
        """Images that were read."""
        return len(self.rows) - self.unreadable

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        top = min(self.top, pl_module.num_classes)
        confidence, guess = outputs.topk(top, dim=-1)
        for name, values, classes in zip(batch['name'], confidence.tolist(), guess.tolist()):
            row: list[Any] = [name]
            for value, label in zip(values, classes):
                row += [self.class_names[label] if self.class_names else label, f'{value:.4f}']
            self.rows.append(row + [''])
        for name, error in batch['failures']:
            self.unreadable += 1
            self.rows.append([name] + [''] * (2 * top) + [error])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        top = min(self.top, pl_module.num_classes)
        self.folder.mkdir(parents=True, exist_ok=True)
        header = ['file']
        for rank in range(1, top + 1):
            header += [f'prediction_{rank}', f'confidence_{rank}']
        with open(self.folder / 'predictions.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(header + ['error'])
            writer.writerows(self.rows)
        images, captions = [], []
        for row in [r for r in self.rows if not r[-1]][: self.most]:
            try:
                image = open_image(row[0])
            except UNREADABLE:
                continue  # readable a moment ago, gone now
            image.thumbnail((256, 256))
            images.append(image)
            captions.append(f'{row[1]} ({float(row[2]):.0%})\n{Path(row[0]).name[-24:]}')
        left_out = len(self.rows) - self.unreadable - len(images)
        title = f'the first {len(images)} of {len(self.rows)} images' if left_out > 0 else ''
        plot_sheet(images, captions, self.folder / 'contact_sheet.png', title)
