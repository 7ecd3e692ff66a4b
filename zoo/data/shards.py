"""webdataset tar shards, read as streams.

Members are decoded by an explicit list (image, json, txt, cls). webdataset's own decoders unpickle, and its opener runs
the commands of `pipe:` addresses in a shell, so neither is used here: members that hold pickles and addresses that run
commands are refused.
"""

from __future__ import annotations

import glob
import io
import json
import os
import random
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zoo.data.base import ImageData, loader_options
from zoo.data.sampling import UNREADABLE, collate
from zoo.data.seeding import derive_seed, keyed_randomness, run_seed
from zoo.data.transforms import eval_transform, train_transform
from zoo.errors import ZooError

IMAGE_MEMBERS = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'ppm', 'pgm', 'tif', 'tiff')
_SPARES = 8
PICKLE_MEMBERS = ('pyd', 'pickle', 'pkl', 'pth', 'pt', 'npy', 'npz', 'joblib', 'dill')


def expand_shards(shards: str | list[str]) -> list[str]:
    """Brace patterns and globs to a list of shards; refuses what is neither a file nor an http(s) address."""
    try:
        import braceexpand
    except ImportError as error:
        raise ZooError('tar shards need the extra "data": pip install "linear-zoo[data]"') from error
    names = [
        n for pattern in ([shards] if isinstance(shards, str) else shards) for n in braceexpand.braceexpand(pattern)
    ]
    found: list[str] = []
    for name in names:
        scheme = name.split(':', 1)[0] if ':' in name else ''
        if scheme in ('http', 'https'):
            found.append(name)
        elif len(scheme) > 1:  # one letter is a Windows drive
            raise ZooError(
                f'refused shard address {name!r}: only files and http(s) addresses are read '
                '(pipe: and its like run commands)'
            )
        else:
            matches = sorted(glob.glob(name)) or [name]
            found += matches
    missing = [n for n in found if not n.startswith('http') and not os.path.isfile(n)]
    if missing:
        raise ZooError(f'{len(missing)} of {len(found)} shards do not exist, the first is {missing[0]}')
    if not found:
        raise ZooError(f'no shards match {shards}')
    return found


def open_shard(name: str) -> BinaryIO:
    return urllib.request.urlopen(name) if name.startswith('http') else open(name, 'rb')


def read_shard(name: str) -> Iterator[dict[str, Any]]:
    """The samples of one shard as raw bytes by member ending; refuses members that hold pickles."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    def checked(members: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for member in members:
            ending = member['fname'].rsplit('.', 1)[-1].lower()
            if ending in PICKLE_MEMBERS:
                raise ZooError(
                    f'refused {member["fname"]} in {name}: .{ending} members may hold a pickle, which runs code'
                )
            yield {**member, '__url__': name}

    with open_shard(name) as stream:
        try:
            yield from group_by_keys(checked(tar_file_iterator(stream)))
        except tarfile.TarError as error:
            raise ZooError(f'{name} is cut off or no tar file: {error}') from error


def decode_member(sample: dict[str, Any], endings: tuple[str, ...]) -> Any:
    """Decodes the first member with one of `endings`; None where there is none."""
    for ending in endings:
        if ending not in sample:
            continue
        data = sample[ending]
        if ending in IMAGE_MEMBERS:
            image = Image.open(io.BytesIO(data))
            image.load()
            return image
        if ending == 'json':
            return json.loads(data)
        text = data.decode('utf-8').strip()
        return int(text) if ending == 'cls' else text
    return None


class ShardStream(IterableDataset):
    """Samples of tar shards; the order is a function of (seed, epoch, rank, worker).

    In training every worker gives exactly its share of the epoch's batches, going round its shards again if they are
    short. A resumed stream reads past what was consumed without decoding it. In evaluation each shard is read once.

    Args:
        shards: Files or addresses.
        transform: Image to tensor.
        options: seed, mode, shuffle_buffer, batch_size, rank, world_size, batches (per epoch and rank, None for one
            pass in order); for classes label_key and num_classes.
    """

    def __init__(self, shards: list[str], transform: Callable | None, **options: Any) -> None:
        self.shards, self.transform = shards, transform
        self.seed: int = options['seed']
        self.mode: str = options['mode']
        self.label_key: str | None = options.get('label_key')
        self.num_classes: int = options.get('num_classes', 0)
        self.shuffle_buffer: int = options['shuffle_buffer']
        self.batch_size: int = options['batch_size']
        self.rank: int = options['rank']
        self.world_size: int = options['world_size']
        self.batches: int | None = options['batches']
        self.epoch, self.done = 0, 0

    def start_at(self, epoch: int, batches_done: int = 0) -> None:
        self.epoch, self.done = epoch, batches_done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.batches is None:
            yield from self._one_pass(worker, workers)
            return
        # the loader starts its rounds at worker 0, so that worker has to play the part of the one whose turn it is
        part = (worker + self.done) % workers
        share = len(range(part, self.batches, workers)) * self.batch_size
        consumed = len(range(part, self.done, workers)) * self.batch_size
        seed = derive_seed(self.seed, self.epoch, self.rank, part)
        for position, (sample, spare) in enumerate(self._shuffled(self._endless(part, workers), seed)):
            if position >= share:
                return
            if position >= consumed:
                yield self._decode_or_spare(sample, spare, position, part)

    def _mine(self, names: list[str], worker: int, workers: int) -> list[str]:
        return names[self.rank * workers + worker :: self.world_size * workers]

    def _one_pass(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        for name in self._mine(self.shards, worker, workers):
            for sample in read_shard(name):
                yield self._decode(sample, 0, worker)

    def _endless(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        rounds = 0
        while True:
            order = list(self.shards)
            random.Random(derive_seed(self.seed, self.epoch, rounds)).shuffle(order)
            mine = self._mine(order, worker, workers)
            if not mine:
                # fewer shards than readers: share them, each reader starting somewhere else
                mine = order[worker % len(order) :] + order[: worker % len(order)]
            empty = True
            for name in mine:
                for sample in read_shard(name):
                    empty = False
                    yield sample
            if empty:
                raise ZooError(f'the shards of worker {worker} hold no samples: {", ".join(mine[:3])}')
            rounds += 1

    def _shuffled(
        self,
        stream: Iterator[dict[str, Any]],
        seed: int,
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Samples out of a buffer, each with the buffer as it stands: what may take its place if it is unreadable."""
        rng = random.Random(seed)
        buffer: list[dict[str, Any]] = []
        for sample in stream:
            if len(buffer) < max(self.shuffle_buffer, _SPARES):
                buffer.append(sample)
                continue
            place = rng.randrange(len(buffer))
            buffer[place], sample = sample, buffer[place]
            yield sample, buffer

    def _decode_or_spare(self, sample: dict[str, Any], spare: list, position: int, part: int) -> dict[str, Any]:
        # a spare is used without being consumed, so a resumed stream can skip samples without decoding them
        decoded = self._decode(sample, position, part)
        failures = decoded['failures']
        for other in spare[:_SPARES]:
            if self._usable(decoded):
                break
            decoded = self._decode(other, position, part)
        return {**decoded, 'failures': failures}

    def _usable(self, decoded: dict[str, Any]) -> bool:
        return decoded['image'] is not None

    def _label(self, sample: dict[str, Any]) -> int:
        if self.label_key:
            described = decode_member(sample, ('json',))
            label = described.get(self.label_key) if isinstance(described, dict) else None
        else:
            label = decode_member(sample, ('cls', 'txt'))
        try:
            label = int(label)
        except (TypeError, ValueError) as error:
            where = f'json key {self.label_key!r}' if self.label_key else '.cls member'
            raise ZooError(
                f'sample {sample["__key__"]} in {sample["__url__"]} has no class number ({where})'
            ) from error
        if not 0 <= label < self.num_classes:
            raise ZooError(
                f'sample {sample["__key__"]} in {sample["__url__"]} has label {label}, but data.num_classes is '
                f'{self.num_classes}'
            )
        return label

    def _decode(self, sample: dict[str, Any], position: int, part: int) -> dict[str, Any]:
        name = f'{sample["__url__"]}:{sample["__key__"]}'
        try:
            image = decode_member(sample, IMAGE_MEMBERS)
            if image is None:
                raise ValueError(f'no image member (known endings: {", ".join(IMAGE_MEMBERS)})')
            image = image.convert(self.mode)
        except UNREADABLE as error:
            failure = (name, f'{type(error).__name__}: {error}')
            return {'image': None, 'target': -1, 'name': name, 'failures': [failure]}
        with keyed_randomness(self.seed, self.epoch, self.rank, part, position):
            tensor = self.transform(image)
        return {'image': tensor, 'target': self._label(sample), 'name': name, 'failures': []}


class TarShards(ImageData):
    """Images in webdataset tar shards: KEY.jpg beside KEY.cls (or a number in KEY.json).

    Args:
        train: Shards to train on, such as data/train-{000000..000146}.tar; a list, braces, globs or http(s).
        val: Shards to validate on.
        num_classes: Number of classes.
        train_samples: Images in the training shards: the length of an epoch.
        test: Shards to test on; without it `test` evaluates the validation shards.
        label_key: Key of the class number where labels are in .json members.
        shuffle_buffer: Samples that each worker mixes; reading order is shuffled by shard besides.
        class_names: Names of the classes; numbers where not given.
        kwargs: See ImageData.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str],
        num_classes: int,
        train_samples: int,
        test: str | list[str] | None = None,
        label_key: str | None = None,
        shuffle_buffer: int = 1000,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.cache:
            raise ZooError('tar shards are read as streams and cannot be kept in memory: leave out data.cache')
        if self.augment.repeats > 1:
            raise ZooError('data.augment.repeats needs images that can be drawn by index; TarShards reads a stream')
        self.patterns = {'train': train, 'val': val} | ({'test': test} if test else {})
        self.train_samples, self.label_key, self.shuffle_buffer = train_samples, label_key, shuffle_buffer
        self.class_names = class_names or [str(number) for number in range(num_classes)]
        if len(self.class_names) != num_classes:
            raise ZooError(f'data.num_classes is {num_classes}, but {len(self.class_names)} class_names are given')
        self._stream: ShardStream | None = None

    def open_splits(self) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise ZooError('tar shards need the extra "data": pip install "linear-zoo[data]"') from error
        self.shards = {split: expand_shards(pattern) for split, pattern in self.patterns.items()}

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size if self.trainer else 1
        batches = self.train_samples // (self.batch_size * world)
        if not batches:
            raise ZooError(f'train_samples {self.train_samples} is fewer than one batch of {self.batch_size} x {world}')
        self._stream = self._dataset('train', train_transform(self.view, self.augment), batches)
        if self._resume_at:
            self._stream.start_at(*self._resume_at)
        return SizedLoader(
            batches,
            self._stream,
            batch_size=self.batch_size,
            collate_fn=collate,
            **loader_options(self.num_workers),
        )

    def val_dataloader(self) -> DataLoader:
        return self._pass_loader('val')

    def test_dataloader(self) -> DataLoader:
        return self._pass_loader('test' if 'test' in self.shards else 'val')

    def set_epoch(self, epoch: int) -> None:
        if self._stream is not None and epoch != self._stream.epoch:
            self._stream.start_at(epoch)

    def _pass_loader(self, split: str) -> DataLoader:
        dataset = self._dataset(split, eval_transform(self.view), None)
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=collate, **loader_options(self.num_workers))

    def _dataset(self, split: str, transform: Callable, batches: int | None) -> ShardStream:
        rank, world = self._ranks()
        return ShardStream(
            self.shards[split],
            transform,
            seed=run_seed(),
            mode=self.view.mode,
            label_key=self.label_key,
            num_classes=self.num_classes,
            shuffle_buffer=self.shuffle_buffer if batches is not None else 0,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world,
            batches=batches,
        )


class SizedLoader(DataLoader):
    """A loader over a stream that knows how many batches an epoch has.

    Args:
        batches: Number of batches.
        args: See DataLoader.
        kwargs: See DataLoader.
    """

    def __init__(self, batches: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches
