"""What a test of a vision-language model leaves for the eye: a table per question type, and the mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from zoo.report import plot_sheet

FILES = 'curves.png, exact_match.csv, mistakes.png, answers.jsonl'


class AnswersReport(Callback):
    """Writes exact_match.csv (per question type, beside chance), answers.jsonl (all of this rank) and mistakes.png.

    Args:
        folder: Where to write.
        worst: Most mistakes to show.
    """

    files = FILES

    def __init__(self, folder: str | Path, worst: int = 24) -> None:
        self.folder, self.worst = Path(folder), worst

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows: list[dict[str, Any]] = []
        self._mistakes: list[tuple[Image.Image, str]] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        images = [i for i, turns in enumerate(batch['question']) for _ in turns]
        for place, (kind, question, truth, answer, right) in zip(images, outputs or []):
            self._rows.append(
                {'name': batch['name'][place], 'type': kind, 'question': question, 'truth': truth, 'answer': answer}
            )
            if not right and len(self._mistakes) < self.worst:
                asked = question.replace('<image>', '').strip()
                caption = f'{_short(asked)}\n{_short(answer) or "(nothing)"}, is {_short(truth)}'
                self._mistakes.append((_picture(batch['image'][place]), caption))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / 'answers.jsonl', 'w') as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in self._rows)
        wrong = sum(row['answer'] != row['truth'].strip() for row in self._rows)
        title = f'{len(self._mistakes)} of {wrong} mistakes among {len(self._rows)} answers: question, answer, truth'
        images, captions = [image for image, _ in self._mistakes], [caption for _, caption in self._mistakes]
        plot_sheet(images, captions, self.folder / 'mistakes.png', title)
        chance = trainer.datamodule.chance()
        with open(self.folder / 'exact_match.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['type', 'exact_match', 'chance'])
            for kind in trainer.datamodule.question_types:
                value = trainer.callback_metrics.get(f'test/exact_{kind}')
                known = f'{chance[kind]:.4f}' if kind in chance else ''
                writer.writerow([kind, '' if value is None else f'{float(value):.4f}', known])
            writer.writerow(['all', f'{float(trainer.callback_metrics["test/exact"]):.4f}', ''])


def _short(text: str, most: int = 28) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= most else text[: most - 3] + '...'


def _picture(image: Any) -> Image.Image:
    if image is None:
        return Image.new('RGB', (32, 32), 'white')
    image = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)
    image.thumbnail((256, 256))
    return image
