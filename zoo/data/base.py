"""What every image data module shares: loaders, resuming in mid-epoch, and the account of unreadable images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from zoo.data.cache import CachedBatches, CachedSource, DeviceTransform
from zoo.data.sampling import EpochSampler, KeyedDataset, Source, collate, shield_worker
from zoo.data.seeding import run_seed
from zoo.data.transforms import Augment, View, eval_transform, train_transform
from zoo.errors import ZooError

_WARNED_ONE_BY_ONE = 3


class ResumableData(LightningDataModule):
    """Base of all data modules: where a run stands in its data, and the account of what could not be read.

    Args:
        batch_size: Samples per step and process.
        num_workers: Loader processes.
        strict: Whether an unreadable sample is an error; otherwise it is skipped and counted.
    """

    noun = 'image'

    def __init__(self, batch_size: int, num_workers: int, strict: bool) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ZooError(f'batch_size {batch_size} must be positive and num_workers {num_workers} not negative')
        self.batch_size, self.num_workers, self.strict = batch_size, num_workers, strict
        self.skipped, self._bad = 0, set()
        self._resume_at: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches that the next run has to start behind."""
        loop = self.trainer.fit_loop
        progress, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        epoch = progress.processed
        if progress.ready == progress.processed:
            batches = 0  # between epochs: the batch counter is still the last epoch's
        elif batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0  # in the validation that closes an epoch
        return {'epoch': epoch, 'batches': batches, 'batch_size': self.batch_size, 'seed': run_seed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # an evaluation starts at the beginning
        # this hook is the last one before Lightning starts the workers, which prefetch at once
        self._resume_at = (state_dict['epoch'], state_dict['batches'])
        for key, now in (('batch_size', self.batch_size), ('seed', run_seed())):
            if state_dict.get(key, now) != now:
                warnings.warn(
                    f'{key} is {now}, the checkpoint was written with {state_dict[key]}: the run goes on, but the '
                    f'{self.noun}s of this epoch will not be the ones the first run would have seen',
                    stacklevel=2,
                )

    def _train_sampler(self) -> EpochSampler:
        """The training split's sampler where the last run stopped."""
        sampler = self._sampler('train', shuffle=True)
        if len(sampler) < self.batch_size:
            raise ZooError(
                f'the training split gives {len(sampler)} {self.noun}s per process, fewer than one batch of '
                f'{self.batch_size}: lower data.batch_size'
            )
        if self._resume_at:
            epoch, batches = self._resume_at
            sampler.resume(epoch, batches * self.batch_size)
        return sampler

    def set_epoch(self, epoch: int) -> None:
        """Streams override this; samplers get the epoch from Lightning."""

    def report_failures(self, failures: list[tuple[str, str]]) -> None:
        """Counts unreadable samples, each once however often it is met; an error in strict mode."""
        for name, error in failures:
            if self.strict:
                raise ZooError(f'unreadable {self.noun}: {name}\n  {error}\n(strict: true; false skips such files)')
            self.leave_out('skipped', name, f'skipped unreadable {self.noun} {name} ({error})')

    def leave_out(self, account: str, name: str, words: str) -> None:
        """Counts a sample that cannot be used, once however often it is met; warns of the first and of every 1000th.

        Args:
            account: Attribute with the number.
            name: Of the sample.
            words: What the warning says.
        """
        if name in self._bad:
            return
        self._bad.add(name)
        count = getattr(self, account) + 1
        setattr(self, account, count)
        if count <= _WARNED_ONE_BY_ONE or count % 1000 == 0:
            warnings.warn(f'{words}; {count} so far', RuntimeWarning, stacklevel=3)

    def _ranks(self) -> tuple[int, int]:
        """Number of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


class ImageData(ResumableData):
    """Base of the image data modules; a subclass fills `class_names` and `splits` in `open_splits`.

    Args:
        batch_size: Images per step and process.
        num_workers: Loader processes.
        view: Size, channels and normalisation of what the network sees.
        augment: Training augmentation.
        strict: Whether an unreadable image is an error; otherwise it is skipped and counted.
        cache: memory decodes every image once, with all workers, and keeps the pixels for them to share.
        transform_on: Where images are cropped, flipped and normalised: one by one in the loader's workers, or as whole
            batches on the accelerator (crop and flip only; needs cache: memory and images of one size, no more than
            twice as large as view.size), which leaves the workers nothing to do once the images are decoded.
    """

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 2,
        view: View = View(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        augment: Augment = Augment(),  # noqa: B008
        strict: bool = False,
        cache: Literal['memory'] | None = None,
        transform_on: Literal['worker', 'device'] = 'worker',
    ) -> None:
        super().__init__(batch_size, num_workers, strict)
        self.view, self.augment, self.cache = view, augment, cache
        self.device_transform = DeviceTransform(view, augment) if transform_on == 'device' else None
        if self.device_transform and not cache:
            raise ZooError('transform_on: device needs cache: memory')
        self.class_names: list[str] = []
        self.splits: dict[str, Source] = {}
        self._opened = False

    def open_splits(self) -> None:
        """Fills `class_names` and `splits`; raises ZooError for whatever is wrong with the data."""
        raise TypeError(f'{type(self).__name__} does not define open_splits')

    # Lightning's interface

    def setup(self, stage: str | None = None) -> None:
        if self._opened:
            return
        self.open_splits()
        if self.cache:
            for split in self.splits:
                self.splits[split] = CachedSource(self.splits[split], self.view.mode, self.num_workers)
                if self.device_transform:
                    self.device_transform.check(self.splits[split], split)
        self._opened = True

    def train_dataloader(self) -> DataLoader:
        sampler = self._train_sampler()
        if self.device_transform:
            dataset = CachedBatches(self.splits['train'], run_seed(), substitute=True)
        else:
            transform = train_transform(self.view, self.augment)
            dataset = KeyedDataset(self.splits['train'], transform, self.view.mode, run_seed(), substitute=True)
        return self._loader(dataset, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader('val')

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self._present('test'))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.device_transform:
            return batch
        uniform = batch.pop('uniform', None)
        return {**batch, 'image': self.device_transform(batch['image'], uniform)}

    # used by tasks

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def in_order(self, split: str) -> DataLoader:
        """Batches of a split in its order and without augmentation; a missing test split is the val split."""
        return self._eval_loader(self._present(split))

    def whole(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All readable images of a split as the network sees them, without augmentation, and their labels.

        Args:
            split: train, val or test; a missing test split is the val split.

        Returns:
            fp32 (N, C, H, W) and int64 (N,), on the CPU.
        """
        batches = [self.on_after_batch_transfer(batch, 0) for batch in self.in_order(split)]
        return torch.cat([b['image'] for b in batches]), torch.cat([b['target'] for b in batches])

    def _present(self, split: str) -> str:
        return 'val' if split == 'test' and 'test' not in self.splits else split

    # loaders

    def _sampler(self, split: str, shuffle: bool) -> EpochSampler:
        rank, world = self._ranks()
        return EpochSampler(len(self.splits[split]), run_seed(), shuffle, rank, world, self.augment.repeats)

    def _eval_loader(self, split: str) -> DataLoader:
        if split not in self.splits:
            raise ZooError(f'{type(self).__name__} has no {split} split; it has: {", ".join(self.splits)}')
        if self.device_transform:
            dataset = CachedBatches(self.splits[split])
        else:
            dataset = KeyedDataset(self.splits[split], eval_transform(self.view), self.view.mode)
        return self._loader(dataset, self._sampler(split, shuffle=False), drop_last=False)

    def _loader(self, dataset: KeyedDataset | CachedBatches, sampler: EpochSampler, drop_last: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            # a batch of cached pixels costs less than its way from another process
            **loader_options(0 if self.device_transform else self.num_workers),
        )


def loader_options(num_workers: int) -> dict[str, Any]:
    """Loader arguments that are the same for map-style data and streams."""
    options: dict[str, Any] = {'num_workers': num_workers, 'pin_memory': torch.cuda.is_available()}
    if num_workers:
        options['worker_init_fn'] = shield_worker
    return options


class ListSource:
    """A source of (name, label) pairs and a function that opens a name.

    Args:
        items: Name and label of each sample.
        opener: Turns a name into a decoded image.
    """

    def __init__(self, items: list[tuple[str, int]], opener: Callable[[str], Any]) -> None:
        self.items, self.opener = items, opener

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items[index][0]

    def load(self, index: int) -> tuple[Any, int]:
        name, target = self.items[index]
        return self.opener(name), target


def hold_out(count: int, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits range(count) into what is kept and what is held out, the same on every machine and for every run seed."""
    from zoo.data.seeding import derive_seed

    held = max(1, round(count * fraction))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, count))).tolist()
    return sorted(order[held:]), sorted(order[:held])


class Subset:
    """Some samples of a source, by index."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def load(self, index: int) -> tuple[Any, int]:
        return self.source.load(self.indices[index])
