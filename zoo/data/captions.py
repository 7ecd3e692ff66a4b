"""Images with captions: folders, Hugging Face data sets and tar shards, in one size or in buckets of aspect ratios."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from zoo.data.base import ResumableData, Subset, hold_out, loader_options
from zoo.data.folder import EXTENSIONS
from zoo.data.framing import Framing
from zoo.data.hub import load_tables, open_cell, undecoded
from zoo.data.sampling import SUBSTITUTES, UNREADABLE, BucketBatches, substitute_for
from zoo.data.seeding import keyed_randomness, run_seed
from zoo.data.shards import IMAGE_MEMBERS, expand_shards
from zoo.data.transforms import View
from zoo.errors import ZooError

_CAPTION_KEYS = ('caption', 'text', 'prompt')
_TEXTS = ('string', 'large_string')  # types of Hugging Face's columns


class CaptionSource(Protocol):
    """Images with captions, decoded when asked for."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """By which the user finds the sample."""
        ...

    def open(self, index: int) -> tuple[Image.Image, str]:
        """The image, its pixels not read yet, and its caption."""
        ...


class _Files:
    """Image files.

    Args:
        items: Path and caption of each.
    """

    def __init__(self, items: list[tuple[str, str]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items[index][0]

    def open(self, index: int) -> tuple[Image.Image, str]:
        path, caption = self.items[index]
        return Image.open(path), caption


class _Table:
    """Rows of a Hugging Face data set.

    Args:
        rows: The data set, its image column not decoded.
        image: Name of the image column.
        caption: Name of the caption column; None where `captions` are given.
        captions: Caption of each row in place of the column.
        title: What rows are called in messages.
    """

    def __init__(self, rows: Any, image: str, caption: str | None, captions: list[str] | None, title: str) -> None:
        self.rows, self.image, self.caption, self.captions, self.title = rows, image, caption, captions, title

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f'{self.title} row {index}'

    def open(self, index: int) -> tuple[Image.Image, str]:
        row = self.rows[index]
        caption = self.captions[index] if self.captions else row[self.caption]
        if not isinstance(caption, str):
            raise ValueError(f'column {self.caption} holds {caption!r}, which is no text')
        return open_cell(row[self.image], decode=False), caption


class _Member(NamedTuple):
    shard: str
    key: str
    image: tuple[int, int]  # offset and length in the shard
    text: tuple[int, int]
    described: bool  # whether the text is JSON


class _Tar:
    """Samples of tar shards on disk, by index: where members are is read once.

    Args:
        shards: Files.
    """

    def __init__(self, shards: list[str]) -> None:
        self.members = [member for shard in shards for member in _members(shard)]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f'{self.members[index].shard}:{self.members[index].key}'

    def open(self, index: int) -> tuple[Image.Image, str]:
        member = self.members[index]
        with open(member.shard, 'rb') as file:
            image, text = (_cut(file, *place) for place in (member.image, member.text))
        caption = _described(json.loads(text)) if member.described else text.decode('utf-8').strip()
        return Image.open(io.BytesIO(image)), caption


def _cut(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _described(row: Any) -> str:
    found = next((row[key] for key in _CAPTION_KEYS if isinstance(row, dict) and isinstance(row.get(key), str)), None)
    if found is None:
        raise ValueError(f'no caption: none of the keys {", ".join(_CAPTION_KEYS)} holds a text')
    return found


def _members(shard: str) -> list[_Member]:
    """KEY.jpg beside KEY.txt or KEY.json; images without either are left out and counted."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, 'r:') as tar:
            for entry in tar:
                key, _, ending = entry.name.rpartition('.')
                if entry.isfile():
                    places.setdefault(key, {})[ending.lower()] = (entry.offset_data, entry.size)
    except tarfile.TarError as error:
        raise ZooError(f'{shard} is cut off or no uncompressed tar file: {error}') from error
    found, wrong = [], []
    for key, own in places.items():
        image = next((own[ending] for ending in IMAGE_MEMBERS if ending in own), None)
        text = own.get('txt', own.get('json'))
        if image and text:
            found.append(_Member(shard, key, image, text, 'txt' not in own))
        elif image:
            wrong.append(f'{key}: neither {key}.txt nor {key}.json')
    _account(shard, wrong)
    return found


def _account(where: str | Path, wrong: list[str]) -> None:
    """Counts images that are left out for want of a caption, and warns of them."""
    if wrong:
        shown = '\n  '.join([*wrong[:3], *(['...'] if len(wrong) > 3 else [])])
        warnings.warn(
            f'{where}: {len(wrong)} images without a caption left out\n  {shown}', RuntimeWarning, stacklevel=2
        )


def open_captions(
    path: str,
    split: str = 'train',
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
) -> CaptionSource:
    """Images with captions from wherever they are.

    Args:
        path: Tar shards on disk (.tar; braces and globs); a folder of images, with captions in metadata.jsonl
            (`file_name` and `text`) or in KEY.txt beside KEY.jpg; a folder or file of parquet; or a hub name.
        split: Split of a hub or parquet data set.
        captions: JSON file with a list of captions, one for each row, in place of the data set's own.
        image_column: Found by its type where not given.
        caption_column: caption, text or prompt where not given.
        cache_dir: Where downloads are kept.

    Raises:
        ZooError: Nothing there, or no captions.
    """
    texts = _read_captions(captions) if captions else None
    folder = Path(path).expanduser()
    if '.tar' in Path(path).name:
        shards = expand_shards(path)
        if remote := [s for s in shards if s.startswith('http')]:
            raise ZooError(f'captioned shards are read by index and have to be on disk; download {remote[0]} first')
        source: CaptionSource = _Tar(shards)
    elif folder.is_dir() and not any(folder.rglob('*.parquet')):
        source = _Files(_read_folder(folder))
    else:
        return _read_table(path, split, texts, image_column, caption_column, cache_dir)
    if texts is not None:
        raise ZooError('data.captions is for Hugging Face data sets, whose rows have numbers')
    if not len(source):
        raise ZooError(f'{path} holds no images with captions (KEY.jpg with KEY.txt, or a metadata.jsonl)')
    return source


def _read_captions(path: str) -> list[str]:
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ZooError(f'cannot read captions from {path}: {error}') from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ZooError(f'{path} must hold a JSON list of texts, one for each row')
    return found


def _read_folder(folder: Path) -> list[tuple[str, str]]:
    table = folder / 'metadata.jsonl'
    if table.is_file():
        return _read_metadata(folder, table)
    found, wrong = [], []
    for path in sorted(p for p in folder.rglob('*') if p.suffix.lower() in EXTENSIONS):
        text = path.with_suffix('.txt')
        try:
            found.append((str(path), text.read_text('utf-8').strip()))
        except (OSError, UnicodeDecodeError) as error:
            wrong.append(f'{text}: {error.strerror if isinstance(error, OSError) else error}')
    _account(folder, wrong)
    return found


def _read_metadata(folder: Path, table: Path) -> list[tuple[str, str]]:
    """Paths and captions of a metadata.jsonl; an error names the lines that are wrong, and how many there are."""
    found, wrong = [], []
    for number, line in enumerate(table.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get('file_name', ''), str):
                raise ValueError('no object with a text as file_name')
            found.append((str(folder / row['file_name']), _described(row)))
        except (KeyError, ValueError) as error:
            wrong.append(f'  line {number}: {f"no {error}" if isinstance(error, KeyError) else error}')
    if wrong:
        shown = '\n'.join([*wrong[:5], *(['  ...'] if len(wrong) > 5 else [])])
        total = len(found) + len(wrong)
        raise ZooError(
            f'{table}: every line needs file_name and text; {len(wrong)} of {total} do not have them:\n{shown}'
        )
    return found


def _read_table(
    path: str, split: str, texts: list[str] | None, image: str | None, caption: str | None, cache_dir: str | None
) -> _Table:
    import datasets

    tables = load_tables(path, None, [split], cache_dir)
    if split not in tables:
        raise ZooError(f'{path} has the splits {", ".join(tables)}, not {split}')
    rows = tables[split]
    images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image) or _is_image_cell(v)]
    image = image or next(iter(images), None)
    caption = caption or next((key for key in _CAPTION_KEYS if key in rows.features), None)
    if image not in rows.features:
        raise ZooError(f'{path}: set data.image_column; the columns are {", ".join(rows.features)}')
    if texts is None and caption not in rows.features:
        raise ZooError(f'{path}: set data.caption_column or data.captions; the columns are {", ".join(rows.features)}')
    if texts is None and (kind := getattr(rows.features[caption], 'dtype', 'list')) not in _TEXTS:
        raise ZooError(f'{path}: column {caption} holds {kind}, not texts: set data.caption_column or data.captions')
    if texts is not None and len(texts) != len(rows):
        raise ZooError(f'data.captions has {len(texts)} texts for {len(rows)} rows of {path}')
    return _Table(rows.cast_column(image, undecoded()), image, caption, texts, f'{path} {split}')


def _is_image_cell(feature: Any) -> bool:
    return isinstance(feature, dict) and {'bytes', 'path'} <= set(feature)


def find_buckets(source: CaptionSource, framing: Framing) -> list[int]:
    """The bucket of every sample, from the headers of the images; unreadable ones count as square."""
    if framing.bucket_step is None:
        return [0] * len(source)
    found, square = [], framing.bucket(1, 1)
    for index in range(len(source)):
        try:
            with source.open(index)[0] as image:
                found.append(framing.bucket(image.height, image.width))
        except UNREADABLE:
            found.append(square)
    return found


class FramedImages(Dataset):
    """Framed images with captions; random flips are keyed by (seed, epoch, index).

    In training another sample, chosen by the index alone and cut to the same bucket, takes the place of an unreadable
    one.

    Args:
        source: The split.
        framing: Framing.
        buckets: Of find_buckets.
        seed: Seed of the run.
        substitute: Whether to replace unreadable samples.
    """

    def __init__(
        self, source: CaptionSource, framing: Framing, buckets: list[int], seed: int = 0, substitute: bool = False
    ) -> None:
        self.source, self.framing, self.buckets = source, framing, buckets
        self.seed, self.substitute = seed, substitute

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        failures: list[tuple[str, str]] = []
        for attempt in range(1 + (SUBSTITUTES if self.substitute else 0)):
            chosen = index if not attempt else substitute_for(index, attempt, len(self.source))
            try:
                image, caption = self.source.open(chosen)
                image = image.convert('RGB')
            except UNREADABLE as error:
                failures.append((self.source.name(chosen), f'{type(error).__name__}: {error}'))
                continue
            with keyed_randomness(self.seed, epoch, index):
                pixels, sizes = self.framing(image, self.buckets[index])
            found = {'image': pixels, 'caption': caption, 'sizes': sizes, 'name': self.source.name(chosen)}
            return {**found, 'failures': failures}
        return {'image': None, 'failures': failures}


def collate_captions(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the readable samples; a batch without any has no names."""
    good = [s for s in samples if s['image'] is not None]
    batch: dict[str, Any] = {'failures': [f for s in samples for f in s['failures']]}
    for key in ('caption', 'name'):
        batch[key] = [s[key] for s in good]
    for key in ('image', 'sizes'):
        batch[key] = torch.stack([s[key] for s in good]) if good else torch.zeros(0)
    return batch


class CaptionedImages(ResumableData):
    """Images with captions, for text-conditional diffusion models and contrastive towers.

    Args:
        train: Tar shards, folder, parquet or hub name, see zoo.data.captions.open_captions.
        val: The same for validation; without it a part of the training samples is held out.
        splits: Names of the splits of a hub or parquet data set.
        captions: JSON file with one caption for each training row, in place of the data set's own.
        image_column: Found by its type where not given.
        caption_column: caption, text or prompt where not given.
        framing: Size, cropping and buckets.
        val_fraction: Share of the training samples held out where there is no val.
        cache_dir: Where downloads are kept.
        batch_size: Images per step and process.
        num_workers: Loader processes.
        strict: Whether an unreadable image is an error; otherwise it is skipped and counted.
    """

    captioned = True

    def __init__(
        self,
        train: str,
        val: str | None = None,
        splits: tuple[str, str] = ('train', 'validation'),
        captions: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        framing: Framing = Framing(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        val_fraction: float = 0.005,
        cache_dir: str | None = None,
        batch_size: int = 8,
        num_workers: int = 4,
        strict: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, strict)
        self.paths, self.names, self.captions = (
            {'train': train, 'val': val},
            dict(zip(('train', 'val'), splits)),
            captions,
        )
        self.columns = {'image_column': image_column, 'caption_column': caption_column, 'cache_dir': cache_dir}
        self.framing, self.val_fraction = framing, val_fraction
        self.sources: dict[str, CaptionSource] = {}
        self.buckets: dict[str, list[int]] = {}

    @property
    def view(self) -> View:
        """What a square `framing` gives, as a view."""
        half = (0.5, 0.5, 0.5)
        return View(self.framing.size, 3, self.framing.interpolation, 1.0, mean=half, std=half)

    def setup(self, stage: str | None = None) -> None:
        if self.sources:
            return
        for split, path in self.paths.items():
            if path is not None:
                texts = self.captions if split == 'train' else None
                self.sources[split] = open_captions(path, self.names[split], texts, **self.columns)
        if 'val' not in self.sources:
            whole = self.sources['train']
            kept, held = hold_out(len(whole), self.val_fraction)
            self.sources = {'train': _Part(whole, kept), 'val': _Part(whole, held)}
        self.buckets = {split: find_buckets(source, self.framing) for split, source in self.sources.items()}

    def train_dataloader(self) -> DataLoader:
        sampler = bucket_sampler(self.buckets['train'], self, shuffle=True)
        return self._loader('train', sampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader('val', bucket_sampler(self.buckets['val'], self, shuffle=False))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _loader(self, split: str, sampler: BucketBatches) -> DataLoader:
        seed, training = run_seed(), split == 'train'
        framing = self.framing if training else Framing(**{**vars(self.framing), 'hflip': 0.0, 'crop_area': None})
        dataset = FramedImages(self.sources[split], framing, self.buckets[split], seed, substitute=training)
        options = loader_options(self.num_workers)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_captions, **options)


class _Part(Subset):
    def open(self, index: int) -> tuple[Image.Image, str]:
        return self.source.open(self.indices[index])


def bucket_sampler(buckets: list[int], data: ResumableData, shuffle: bool) -> BucketBatches:
    """The batches of a split, where a resumed run goes on; says what never fills a batch.

    Args:
        buckets: Bucket of every sample.
        data: The data module.
        shuffle: Whether it is for training.

    Raises:
        ZooError: No bucket fills a batch.
    """
    rank, world = data._ranks()
    sampler = BucketBatches(buckets, data.batch_size, run_seed(), shuffle, rank, world)
    if not shuffle:
        return sampler
    if not len(sampler):
        raise ZooError(
            f'no bucket of the training split fills a batch of {data.batch_size} on {world} processes '
            f'({len(buckets)} samples): lower data.batch_size'
        )
    small = sum(len(m) for m in sampler.members if len(m) < data.batch_size * world)
    if small:
        warnings.warn(
            f'{small} of {len(buckets)} {data.noun}s are in buckets too small for a batch of {data.batch_size * world} '
            'and never trained on: lower data.batch_size, or framing.max_ratio',
            stacklevel=2,
        )
    if data._resume_at:
        sampler.resume(*data._resume_at)
    return sampler
