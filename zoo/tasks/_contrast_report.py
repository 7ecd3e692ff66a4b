"""What a test of a contrastive model leaves for the eye, and its numbers as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from zoo.report import TestReport, _figure, plot_sheet, to_image
from zoo.tasks._distill_report import write_json

_SHOWN, _COMPARED, _MOST_TEXTS = 24, 16, 4096


class ContrastReport(TestReport):
    """Adds similarity.png, retrieved.png and contrast.json to a report; confusion and mistakes are those of classes.

    Args:
        folder: Where to write.
        samples: Where to leave a few test images to try `predict` on; null for none.
    """

    files = 'curves.png, similarity.png, retrieved.png, contrast.json; of classes confusion.png, mistakes.png'

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._images: list[tuple[Image.Image, torch.Tensor, str]] = []
        self._texts: dict[str, torch.Tensor] = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if not outputs:
            return
        if 'logits' in outputs:
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        captions = outputs.get('captions') or [pl_module.classes[t] for t in outputs['target'].tolist()]
        view = trainer.datamodule.view
        for i in range(min(len(captions), _SHOWN - len(self._images))):
            self._images.append((to_image(batch['image'][i], view), outputs['image'][i].cpu(), captions[i]))
        texts = outputs['text'] if 'text' in outputs else pl_module._classifier.T[outputs['target']]
        if len(self._texts) < _MOST_TEXTS:
            self._texts |= dict(zip(captions, texts.cpu()))
        if self.samples and 'logits' not in outputs:
            self._examples += [(caption[:40], image) for image, _, caption in self._images[: 12 - len(self._examples)]]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.num_classes and len(self._matrix):
            super().on_test_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith('test/')}
        write_json(self.folder / 'contrast.json', {**metrics, **_conditions(trainer, pl_module)})
        if self._images:
            names = list(self._texts)
            texts = torch.stack(list(self._texts.values()))
            plot_retrieved(self._images, names, texts, self.folder / 'retrieved.png')
            plot_similarity(self._images, self.folder / 'similarity.png', self._texts)


def _conditions(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    import open_clip
    import timm

    device = pl_module.device
    return {
        'net': pl_module.net_name,
        'parameters': sum(p.numel() for p in pl_module.net.parameters()),
        'classes': pl_module.num_classes,
        'data': type(trainer.datamodule).__name__,
        'epoch': trainer.current_epoch,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'precision': str(trainer.precision),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'open_clip': open_clip.__version__},
    }


def plot_retrieved(
    images: list[tuple[Image.Image, torch.Tensor, str]], names: list[str], texts: torch.Tensor, target: Path
) -> None:
    """Draws images with the text that is the closest, and the right one where that is another.

    Args:
        images: Pixels, features (D,) and caption of each.
        names: Texts.
        texts: Their features (N, D).
        target: The picture.
    """
    similarity = torch.stack([feature for _, feature, _ in images]) @ texts.T
    guesses = [names[i] for i in similarity.argmax(1).tolist()]
    captions = [
        _folded(guess) if guess == caption else f'{_folded(guess)}\nNOT {_folded(caption)}'
        for guess, (_, _, caption) in zip(guesses, images)
    ]
    right = sum(guess == caption for guess, (_, _, caption) in zip(guesses, images))
    title = f'The closest of {len(names)} texts: {right} of {len(images)} right'
    plot_sheet([image for image, _, _ in images], captions, target, title)


def _folded(text: str, width: int = 26, most: int = 78) -> str:
    import textwrap

    return '\n'.join(textwrap.wrap(text if len(text) <= most else f'{text[: most - 3]}...', width))


def plot_similarity(
    images: list[tuple[Image.Image, torch.Tensor, str]], target: Path, texts: dict[str, torch.Tensor]
) -> None:
    """Draws cosines between images and the texts of these images, the right ones on the diagonal."""
    chosen = {caption: (image, feature) for image, feature, caption in reversed(images)}
    names = list(chosen)[::-1][:_COMPARED]
    cosines = torch.stack([texts[n] for n in names]) @ torch.stack([chosen[n][1] for n in names]).T
    count, side = len(names), 0.55 * len(names)
    figure, axes = _figure(side + 5.5, side + 1.2)
    axis = axes[0, 0]
    drawn = axis.imshow(cosines.numpy(), cmap='viridis')
    for (row, column), value in np.ndenumerate(cosines.numpy()):
        color = 'black' if value > (cosines.min() + cosines.max()) / 2 else 'white'
        axis.text(column, row, f'{value:.2f}'.replace('0.', '.'), ha='center', va='center', fontsize=7, color=color)
    axis.set_yticks(range(count), [_folded(name, 60) for name in names], fontsize=8, parse_math=False)
    axis.set_xticks([])
    for column, name in enumerate(names):
        inset = axis.inset_axes([column / count + 0.05 / count, 1.005, 0.9 / count, 0.9 / count])
        inset.imshow(chosen[name][0].convert('RGB'), interpolation='nearest')
        inset.axis('off')
    figure.colorbar(drawn, ax=axis, label='cosine of image (column) and text (row)', shrink=0.8)
    figure.savefig(target)
