"""Checkpoints that are either whole or not there, and what to do with one that was damaged anyway."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo.errors import RunError, ZooError

LAST, PREVIOUS, BEST = 'last.ckpt', 'previous.ckpt', 'best.ckpt'


def damage(path: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint file, or None; reads the whole file once to compare its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return f'checksum of {broken} is wrong' if broken else None


def newest_whole(folder: str | os.PathLike) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint in `folder` that is whole, and the newer ones that are not."""
    broken: list[Path] = []
    for path in sorted(Path(folder).glob('*.ckpt'), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if damage(path) is None:
            return path, broken
        broken.append(path)
    return None, broken


def read_checkpoint(path: str | os.PathLike, map_location: Any = 'cpu', mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint with `weights_only=True`.

    Args:
        path: File.
        map_location: See torch.load.
        mmap: Whether to leave tensors on disk until they are used, to look at the rest only.
    """
    path = Path(path)
    if not path.is_file():
        raise ZooError(f'no such checkpoint: {path}')
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        reason = damage(path)
        if reason is None:
            raise ZooError(f'{path} is not a checkpoint that can be loaded safely: {error}') from error
        whole, _ = newest_whole(path.parent)
        hint = f'\nThe newest whole checkpoint beside it: {whole}' if whole else ''
        raise ZooError(f'{path} is cut off or damaged ({reason}){hint}') from error


def load_net(path: str | os.PathLike, ema: bool = True) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Rebuilds the network of a training run from its checkpoint alone.

    Args:
        path: Checkpoint written by `zoo fit`.
        ema: Whether to take the averaged weights where there are any.

    Returns:
        The network in evaluation mode, and a dictionary with net, num_classes, net_kwargs, class_names and view.
    """
    import zoo  # noqa: F401  registers the zoo's models
    from zoo.heads.classify import create_classifier

    checkpoint = read_checkpoint(path)
    hparams = checkpoint.get('hyper_parameters') or {}
    if 'net' not in hparams:
        raise ZooError(f'{path} does not say which network it holds: not written by zoo fit')
    if (task := (checkpoint.get('zoo') or {}).get('task', 'Classify')) != 'Classify':
        raise ZooError(
            f'{path} is of the task {task}, not a classifier: zoo.tasks.{task}.load_from_checkpoint reads it'
        )
    head = [hparams.get(k, default) for k, default in (('head', 'linear'), ('head_kwargs', None), ('freeze', None))]
    net = create_classifier(hparams['net'], hparams['num_classes'], *head, **(hparams['net_kwargs'] or {}))
    state = checkpoint['state_dict']
    prefix = 'ema.module.' if ema and any(k.startswith('ema.module.') for k in state) else 'net.'
    net.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    described = {k: hparams[k] for k in ('net', 'num_classes', 'net_kwargs')}
    return net.eval(), {**described, **(checkpoint.get('zoo') or {})}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, forces the bytes to disk, then renames; the old file is whole until that moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f'.{target.name}.tmp-*'):
            stale.unlink(missing_ok=True)  # left by a process that was killed while writing
        temporary = target.parent / f'.{target.name}.tmp-{os.getpid()}'
        try:
            with open(temporary, 'wb') as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = f'; the former {target.name} is untouched' if target.exists() else ''
            raise RunError(f'cannot write the checkpoint {target}: {error}{kept}') from error
        _sync_folder(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = 'cpu', weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path, map_location)


def _sync_folder(folder: Path) -> None:
    if os.name != 'posix':
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class KeepLast(Checkpoint):
    """Keeps last.ckpt, and the one before it as previous.ckpt: every epoch, every so often within it, and on SIGTERM.

    Args:
        folder: Where checkpoints go.
        every_n_steps: Save after this many optimizer steps too.
        every_minutes: Save after this much time too.
    """

    def __init__(self, folder: str, every_n_steps: int | None = None, every_minutes: float | None = 10.0) -> None:
        self.folder, self.every_n_steps, self.every_minutes = folder, every_n_steps, every_minutes
        self._saved_step, self._saved_time = -1, time.monotonic()

    @property
    def path(self) -> Path:
        return Path(self.folder) / LAST

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)
        self._saved_time = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batch_idx = args[-1]
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # the end of the epoch follows, or gradients are half gathered
        if self._due(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # the loops raise this between two batches; every other exception may find weights half updated
        if isinstance(exception, SIGTERMException):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes last.ckpt unless it already holds this step."""
        if trainer.global_step == self._saved_step or trainer.fast_dev_run or trainer.sanity_checking:
            return
        if trainer.is_global_zero:
            self._keep_previous()
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0:
            return True
        if not self.every_minutes:
            return False
        late = time.monotonic() - self._saved_time > 60 * self.every_minutes
        if trainer.world_size == 1:
            return late
        # ranks have to agree, and asking costs a round of messages
        return step % 50 == 0 and trainer.strategy.reduce_boolean_decision(late, all=False)

    def _keep_previous(self) -> None:
        if not self.path.exists():
            return
        staged = self.path.with_name(f'.{PREVIOUS}.tmp-{os.getpid()}')
        staged.unlink(missing_ok=True)
        try:
            os.link(self.path, staged)
        except OSError:  # file systems without hard links
            shutil.copyfile(self.path, staged)
        os.replace(staged, self.path.with_name(PREVIOUS))


def resolve_last(folder: str | os.PathLike) -> Path | None:
    """The checkpoint that `last` means: the newest whole one, with a warning about newer ones that are damaged."""
    whole, broken = newest_whole(folder)
    if broken:
        names = ', '.join(p.name for p in broken)
        if whole is None:
            raise ZooError(f'every checkpoint in {folder} is cut off or damaged: {names}')
        warnings.warn(f'{names} in {folder}: cut off or damaged; going on from {whole.name}', stacklevel=2)
    return whole
