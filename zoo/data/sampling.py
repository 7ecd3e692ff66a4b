"""Map-style loading whose order and randomness depend on (seed, epoch, index) alone, so that it can be resumed."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from zoo.data.seeding import derive_seed, keyed_randomness

# what Pillow raises for files that are missing, cut off, not images, or absurdly large
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
SUBSTITUTES = 8


class Source(Protocol):
    """One split of a data set: images that are decoded when asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name that lets the user find the sample, for warnings and reports."""
        ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its label."""
        ...


class KeyedDataset(Dataset):
    """Loads and transforms the samples of a source; random transforms are keyed by (seed, epoch, index, copy if any).

    An unreadable sample does not raise: its name and error travel in `failures`, and in training another sample,
    chosen by the index alone, takes its place so that batches keep their size.

    Args:
        source: The split.
        transform: Image to tensor.
        mode: Pillow mode that images are converted to.
        seed: Seed of the run.
        substitute: Whether to replace unreadable samples.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Any],
        mode: str = 'RGB',
        seed: int = 0,
        substitute: bool = False,
    ) -> None:
        self.source, self.transform, self.mode = source, transform, mode
        self.seed, self.substitute = seed, substitute

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        index = key[1]
        failures: list[tuple[str, str]] = []
        for attempt in range(1 + (SUBSTITUTES if self.substitute else 0)):
            chosen = index if attempt == 0 else substitute_for(index, attempt, len(self.source))
            name = self.source.name(chosen)
            try:
                image, target = self.source.load(chosen)
                image = image.convert(self.mode)
            except UNREADABLE as error:
                failures.append((name, f'{type(error).__name__}: {error}'))
                continue
            with keyed_randomness(self.seed, *key):
                return {**self.prepare(image, target), 'name': name, 'failures': failures}
        return {'image': None, 'target': -1, 'name': '', 'failures': failures}

    def prepare(self, image: Image.Image, target: Any) -> dict[str, Any]:
        """What a sample holds besides its name; targets that change with the image are transformed here."""
        return {'image': self.transform(image), 'target': target}


def substitute_for(index: int, attempt: int, length: int) -> int:
    """The sample that takes the place of an unreadable one, the same in every epoch."""
    return derive_seed(index, attempt) % length


def collate(samples: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Stacks the readable samples; a batch without any has zero rows. What is a batch already stays as it is."""
    if isinstance(samples, dict):
        return samples
    good = [s for s in samples if s['image'] is not None]
    return {
        'image': torch.stack([s['image'] for s in good]) if good else torch.zeros(0, 3, 1, 1),
        'target': torch.tensor([s['target'] for s in good], dtype=torch.long),
        'name': [s['name'] for s in good],
        'failures': [f for s in samples for f in s['failures']],
    }


class EpochSampler(Sampler):
    """Yields (epoch, index); the order is a function of (seed, epoch), this rank takes every world-th index.

    Args:
        length: Size of the data set.
        seed: Seed of the run.
        shuffle: Whether to permute; without it every index is visited once, also when ranks get unequal shares.
        rank: This process.
        world_size: Number of processes.
        repeats: Copies of an image per epoch in training (repeated augmentation, as timm's RepeatAugSampler); (epoch,
            index, copy) is yielded then. An epoch keeps its length and so visits that fraction of the images; the
            copies of one go to neighbouring ranks.
    """

    def __init__(
        self, length: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1, repeats: int = 1
    ) -> None:
        self.total, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size, self.repeats = rank, world_size, repeats if shuffle else 1
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.total // self.world_size
        return len(range(self.rank, self.total, self.world_size))

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def resume(self, epoch: int, skip: int) -> None:
        """Starts in `epoch` behind the first `skip` samples of this rank."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        # a list, not a generator: a generator would read `epoch` and `skip` when the first batch is asked for
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
            order = torch.randperm(self.total, generator=generator).tolist()
        else:
            order = list(range(self.total))
        mine = range(self.rank, self.total, self.world_size)[: len(self)][self.skip :]
        if self.repeats == 1:
            return iter([(self.epoch, order[place]) for place in mine])
        return iter([(self.epoch, order[place // self.repeats], place % self.repeats) for place in mine])


class BucketBatches(Sampler):
    """Yields batches of (epoch, index) from one bucket each; their order is a function of (seed, epoch).

    Args:
        buckets: Bucket of every sample, by number.
        batch_size: Samples per batch and process.
        seed: Seed of the run.
        shuffle: Whether to permute; what does not fill a batch on every rank is then left out of this epoch. Without it
            every index is visited once, ranks taking the batches in turn.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.batch_size, self.seed, self.shuffle, self.rank, self.world_size = (
            batch_size,
            seed,
            shuffle,
            rank,
            world_size,
        )
        numbers = torch.as_tensor(buckets, dtype=torch.long)
        self.members = [(numbers == bucket).nonzero().flatten() for bucket in numbers.unique().tolist()]
        self.epoch, self.skip = 0, 0
        self.sampler = self  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        if self.shuffle:
            return sum(len(m) // (self.batch_size * self.world_size) for m in self.members)
        return len(range(self.rank, sum(-(-len(m) // self.batch_size) for m in self.members), self.world_size))

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def resume(self, epoch: int, batches: int) -> None:
        """Starts in `epoch` behind the first `batches` batches of this rank."""
        self.epoch, self.skip = epoch, batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        if not self.shuffle:
            batches = [part.tolist() for members in self.members for part in members.split(self.batch_size)]
            return iter([[(self.epoch, i) for i in batch] for batch in batches[self.rank :: self.world_size]])
        whole = self.batch_size * self.world_size
        batches = []
        for members in self.members:
            mixed = members[torch.randperm(len(members), generator=generator)]
            batches += [part.tolist() for part in mixed.split(whole) if len(part) == whole]
        order = torch.randperm(len(batches), generator=generator).tolist()[self.skip :]
        mine = slice(self.rank, None, self.world_size)
        return iter([[(self.epoch, i) for i in batches[place][mine]] for place in order])


def shield_worker(worker_id: int) -> None:
    """Worker initialiser: SIGTERM counts only if the main process sends it.

    A scheduler signals every process of a job, but the main one needs its workers until it has saved. Were the signal
    ignored altogether, the interpreter would wait forever for a worker that it wants to end.
    """
    torch.set_num_threads(1)
    if not hasattr(signal, 'sigwaitinfo'):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(143)
