"""Console lines and the metrics file of a run."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class EpochLine(Callback):
    """Prints one line per epoch: what remains readable in a log file when the progress bar is gone."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        total = f'/{trainer.max_epochs}' if trainer.max_epochs and trainer.max_epochs > 0 else ''
        parts = [f'epoch {trainer.current_epoch + 1}{total}', f'step {trainer.global_step}']
        for key, label, form in (
            ('train/loss_epoch', 'train loss', '{:.4f}'),
            ('val/loss', 'val loss', '{:.4f}'),
            ('val/top1', 'val accuracy', '{:.2%}'),
            ('val/exact', 'val exact match', '{:.2%}'),
            ('val/map50', 'val mAP@50', '{:.2%}'),
            ('val/miou', 'val mIoU', '{:.2%}'),
        ):
            if key in metrics:
                parts.append(f'{label} {form.format(float(metrics[key])).replace("%", " %")}')
        parts.append(f'lr {trainer.optimizers[0].param_groups[-1]["lr"]:.2e}')
        if hasattr(self, '_start'):
            parts.append(f'{time.monotonic() - self._start:.1f} s')
        print('  '.join(parts), flush=True)


class Throughput(Callback):
    """Logs images per second of each epoch's training batches and, on a GPU, the peak memory in MiB so far.

    Validation does not count; the data loading that training waits for does, and the first batch does not.
    """

    def __init__(self) -> None:
        self._restart()  # a run that is resumed in mid-epoch does not start one

    def _restart(self) -> None:
        self._since, self._last, self._images = None, None, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._last = time.monotonic()
        if self._since is None:
            self._since = self._last
        else:
            self._images += len(batch['name']) * trainer.world_size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._images:
            pl_module.log('train/images_per_s', self._images / max(self._last - self._since, 1e-9))
        if pl_module.device.type == 'cuda':
            pl_module.log('train/peak_mib', torch.cuda.max_memory_allocated(pl_module.device) / 2**20)


class LearningRate(Callback):
    """Logs the learning rate together with the step metrics."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log('lr', trainer.optimizers[0].param_groups[-1]['lr'], on_step=True, on_epoch=False)


class _KeepingWriter(ExperimentWriter):
    """Lightning's CSV writer, which deletes the file it finds; this one goes on with it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with open(path, newline='') as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class MetricsCSV(CSVLogger):
    """metrics.csv in the run folder, continued when a run is resumed.

    Args:
        folder: The run folder.
        resume_step: Optimizer step that the run goes on from; the first row written drops the later ones, which will
            be written again.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int | None = None) -> None:
        super().__init__(save_dir=folder, name='', version='', flush_logs_every_n_steps=20)
        self._path, self._resume_step = Path(folder) / 'metrics.csv', resume_step

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._resume_step is not None:
            drop_rows(self._path, self._resume_step)
            self._resume_step = None
        super().log_metrics(metrics, step)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        return self._experiment


def drop_rows(path: Path, step: int) -> None:
    """Removes the rows of a metrics.csv from `step` on."""
    if not path.is_file():
        return
    with open(path, newline='') as file:
        reader = csv.DictReader(file)
        header, rows = list(reader.fieldnames or []), list(reader)
    staged = path.with_suffix('.tmp')
    with open(staged, 'w', newline='') as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        # a row cut off by a kill has no step
        writer.writerows(r for r in rows if r.get('step') and float(r['step']) < step)
    os.replace(staged, path)
