"""Image-text conversations from disk or the hub.

A row of InternVL's and LLaVA's format, one JSON object per line, or in one list that is the file:

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A dog."}]}

`image` may be a list or missing (text only), `images` is the same; `messages` with role and content, or `question` and
`answer`, take the place of `conversations`; `question_type` names what metrics are kept for. Images that no `<image>`
stands for go in front of the first question. Batches are described in `zoo.data.chat`.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from zoo.data.base import hold_out, loader_options
from zoo.data.chat import ChatData, ChatEncoder, ChatSource, Sample, load_each
from zoo.data.folder import open_image
from zoo.data.hub import load_tables, open_cell, undecoded
from zoo.data.seeding import run_seed
from zoo.data.shards import IMAGE_MEMBERS, ShardStream, SizedLoader, decode_member, expand_shards
from zoo.errors import ZooError

_SPEAKERS = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}


def read_row(row: dict[str, Any], name: str, opener: Callable[[Any], Any]) -> Sample:
    """A sample from a row in any of the formats above.

    Args:
        row: The row.
        name: By which the user finds it.
        opener: Decodes what the row holds of an image.

    Raises:
        ValueError: What is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f'not an object but {type(row).__name__}')
    turns, system = _turns(row)
    values = row.get('image') or row.get('images') or []
    values = values if isinstance(values, (list, tuple)) else [values]
    placeholders = sum(question.count('<image>') for question, _ in turns)
    if not placeholders and values:
        turns[0] = ('<image>' * len(values) + '\n' + turns[0][0], turns[0][1])
    elif placeholders != len(values):
        raise ValueError(f'{placeholders} <image> placeholders, but {len(values)} images')
    kinds = row.get('question_type') or []
    kinds = [kinds] * len(turns) if isinstance(kinds, str) else list(kinds)
    if kinds and len(kinds) != len(turns):
        raise ValueError(f'{len(kinds)} question types for {len(turns)} turns')
    return Sample(turns, [opener(value) for value in values], name, kinds, system)


def _turns(row: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    if 'question' in row and 'answer' in row:
        return [(str(row['question']), str(row['answer']))], None
    told = row.get('conversations') or row.get('messages')
    if not told:
        raise ValueError(f'no conversations, messages, or question and answer; keys: {", ".join(row) or "none"}')
    system, texts = None, []
    if not isinstance(told, (list, tuple)) or not all(isinstance(message, dict) for message in told):
        raise ValueError('the conversation is not a list of messages')
    for number, message in enumerate(told):
        speaker = message.get('from') or message.get('role')
        text = message.get('value') if 'value' in message else message.get('content')
        role = _SPEAKERS.get(speaker)
        if isinstance(text, list):  # transformers' content lists
            text = ''.join(_content(part, number) for part in text)
        if not isinstance(text, str):
            raise ValueError(f'message {number} has no text but {type(text).__name__}')
        if role == 'system' and not texts and system is None:
            system = text
            continue
        if role != ('assistant' if len(texts) % 2 else 'user'):
            due = 'an answer' if len(texts) % 2 else 'a question'
            raise ValueError(f'message {number} is from {speaker!r} where {due} is due')
        texts.append(text)
    if not texts or len(texts) % 2:
        raise ValueError('the conversation does not end with an answer')
    return list(zip(texts[::2], texts[1::2])), system


def _content(part: Any, number: int) -> str:
    kind = part.get('type') if isinstance(part, dict) else type(part).__name__
    if kind == 'image':
        return '<image>'
    if kind != 'text' or not isinstance(part.get('text'), str):
        raise ValueError(f'message {number} has a {kind}, neither text nor image')
    return part['text']


class _JsonLines:
    """A split in files of JSON lines, read when asked for; files that are one list stay in memory, row by row.

    Args:
        paths: Files.
        image_root: Where relative image paths begin.
    """

    def __init__(self, paths: list[Path], image_root: Path) -> None:
        self.paths, self.image_root = paths, image_root
        self.lists: dict[int, bytes] = {}
        starts, lines, files = [], [], []
        for number, path in enumerate(paths):
            if path.suffix == '.json' and (listed := _listed(path)) is not None:
                self.lists[number] = listed
            offset = 0
            with io.BytesIO(self.lists[number]) if number in self.lists else open(path, 'rb') as file:
                for line_number, line in enumerate(file, 1):
                    if line.strip():
                        starts.append(offset)
                        lines.append(line_number)
                        files.append(number)
                    offset += len(line)
        # arrays, not lists: worker processes share their memory
        self.starts, self.lines, self.files = np.array(starts, np.int64), np.array(lines), np.array(files)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        file, line = self.files[index], self.lines[index]
        return f'{self.paths[file]} row {line - 1}' if file in self.lists else f'{self.paths[file]}:{line}'

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        return load_each(self._load, keys)

    def _load(self, index: int) -> Sample:
        number = self.files[index]
        with io.BytesIO(self.lists[number]) if number in self.lists else open(self.paths[number], 'rb') as file:
            file.seek(self.starts[index])
            row = json.loads(file.readline())  # a JSONDecodeError is a ValueError
        return read_row(row, self.name(index), self._open)

    def _open(self, value: Any) -> Image.Image:
        if not isinstance(value, str):
            raise ValueError(f'image is {type(value).__name__}, not a path')
        return open_image(str(self.image_root / value)).convert('RGB')


def _listed(path: Path) -> bytes | None:
    """The rows of a file that is one JSON list, as lines; None for other files.

    Raises:
        ZooError: It begins as a list and is none.
    """
    with open(path, 'rb') as file:
        if not file.read(4096).lstrip().startswith(b'['):
            return None
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ZooError(
            f'{path} is no list of JSON rows: {error}; rows without brackets go into a .jsonl file'
        ) from error
    return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


class _Rows:
    """A split of a Hugging Face data set.

    Args:
        rows: The data set, a single image column not decoded.
        title: What rows are called in messages.
        image_root: Where relative image paths begin.
    """

    def __init__(self, rows: Any, title: str, image_root: Path) -> None:
        self.rows, self.title, self.image_root = rows, title, image_root

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f'{self.title} row {index}'

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        return load_each(lambda index: read_row(self.rows[index], self.name(index), self._open), keys)

    def _open(self, value: Any) -> Image.Image:
        if isinstance(value, str):
            return open_image(str(self.image_root / value)).convert('RGB')
        return (value if isinstance(value, Image.Image) else open_cell(value)).convert('RGB')


class _Part:
    """Some samples of a source, by index.

    Args:
        source: The source.
        indices: Which.
    """

    def __init__(self, source: ChatSource, indices: list[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        return self.source.load_many([(epoch, self.indices[index]) for epoch, index in keys])


class _ChatStream(ShardStream):
    """Conversations in tar shards: KEY.json beside KEY.jpg; see ShardStream for the order."""

    def _decode(self, sample: dict[str, Any], position: int, part: int) -> dict[str, Any]:
        name = f'{sample["__url__"]}:{sample["__key__"]}'
        member = next((key for key in IMAGE_MEMBERS if key in sample), None)

        def row() -> Sample:
            described = decode_member(sample, ('json',))
            if described is None:
                raise ValueError('no .json member')
            described.pop('images', None)
            return read_row({**described, 'image': member}, name, lambda _: decode_member(sample, (member,)))

        found = load_each(lambda _: row(), [(0, 0)])[0]
        if isinstance(found, Exception):
            return {'sample': None, 'failures': [(name, f'{type(found).__name__}: {found}')]}
        found.images = [image.convert('RGB') for image in found.images]
        return {'sample': found, 'failures': []}

    def _usable(self, decoded: dict[str, Any]) -> bool:
        return decoded['sample'] is not None


def _encode_stream(encoder: ChatEncoder, decoded: list[dict[str, Any]]) -> dict[str, Any]:
    batch, _ = encoder([d['sample'] for d in decoded if d['sample'] is not None])
    batch['failures'] = [f for d in decoded for f in d['failures']] + batch['failures']
    return batch


class Conversations(ChatData):
    """Image-text conversations: JSON lines, Hugging Face data sets or tar shards, told apart by their names.

    Args:
        train: Files of JSON lines (.jsonl, .json) or of one JSON list (.json), tar shards (.tar: braces, globs and
            http(s) too), or a folder or file of parquet, or a hub name, whose split of that name is taken.
        processor: Folder or hub name of a transformers processor, usually the model's.
        val: Like train; without it a part of the training rows is held out.
        test: Like train; without it `test` evaluates the validation rows.
        image_root: Where relative image paths begin; by default the folder of the first file.
        name: Configuration of a hub data set.
        splits: Names of the splits of a hub or parquet data set.
        val_fraction: Share of the training rows held out where there is no val.
        train_samples: Samples in the training shards: the length of an epoch; needed for tar shards.
        shuffle_buffer: Samples that each worker mixes when reading shards.
        chat_template: File with a Jinja template in place of the processor's own.
        question_types: Order of the types in tables; those that are not listed follow.
        cache_dir: Where downloads are kept.
        kwargs: See ChatData.
    """

    def __init__(
        self,
        train: str | list[str],
        processor: str,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        image_root: str | None = None,
        name: str | None = None,
        splits: tuple[str, str, str] = ('train', 'validation', 'test'),
        val_fraction: float = 0.02,
        train_samples: int | None = None,
        shuffle_buffer: int = 1000,
        chat_template: str | None = None,
        question_types: list[str] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.paths = {'train': train, 'val': val, 'test': test}
        self.paths = {k: [v] if isinstance(v, str) else list(v) for k, v in self.paths.items() if v}
        self.processor_name, self.image_root, self.config_name = processor, image_root, name
        self.split_names = dict(zip(('train', 'val', 'test'), splits))
        self.val_fraction, self.train_samples, self.shuffle_buffer = val_fraction, train_samples, shuffle_buffer
        self.template_file, self.types, self.cache_dir = chat_template, question_types or ['all'], cache_dir
        self.shards: dict[str, list[str]] = {}
        self._stream: _ChatStream | None = None

    @property
    def question_types(self) -> list[str]:
        return self.types

    def build_processor(self) -> Any:
        return load_processor(self.processor_name)

    # opening

    def open_splits(self) -> None:
        if self.template_file:
            if not Path(self.template_file).is_file():
                raise ZooError(f'no such file: {self.template_file} (data.chat_template)')
            self.chat_template = Path(self.template_file).read_text()
        if _kind(self.paths['train'][0]) == 'shards':
            self._open_shards()
            return
        for split, paths in self.paths.items():
            self._open(split, paths)
        empty = [split for split, source in self.splits.items() if not len(source)]
        if empty:
            raise ZooError(f'{", ".join(self.paths.get(empty[0], []))} holds no conversations ({empty[0]} split)')
        if 'val' not in self.splits:
            whole = self.splits['train']
            kept, held = hold_out(len(whole), self.val_fraction)
            self.splits['train'], self.splits['val'] = _Part(whole, kept), _Part(whole, held)

    def _open(self, split: str, paths: list[str]) -> None:
        if _kind(paths[0]) == 'json':
            files = [Path(p).expanduser() for p in paths]
            if missing := [f for f in files if not f.is_file()]:
                raise ZooError(f'no such file: {missing[0]} (data.{split})')
            root = Path(self.image_root).expanduser() if self.image_root else files[0].parent
            if not root.is_dir():
                raise ZooError(f'no such folder: {root} (data.image_root)')
            self.splits[split] = _JsonLines(files, root)
            return
        names = list(self.split_names.values()) if split == 'train' else [self.split_names[split]]
        tables = load_tables(paths[0], self.config_name, names, self.cache_dir)
        # one name for everything: the splits that it has are the splits of the run
        found = {s: n for s, n in self.split_names.items() if n in tables and (s == split or s not in self.paths)}
        if split not in found:
            raise ZooError(f'{paths[0]} has the splits {", ".join(tables)}; name yours with --data.splits')
        for own, theirs in found.items():
            rows = tables[theirs]
            if 'image' in rows.features and hasattr(rows.features['image'], 'decode'):
                rows = rows.cast_column('image', undecoded())
            self.splits[own] = _Rows(rows, f'{paths[0]} {theirs}', Path(self.image_root or '.'))

    def _open_shards(self) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise ZooError('tar shards need the extra "data": pip install "linear-zoo[data]"') from error
        if 'val' not in self.paths or not self.train_samples:
            raise ZooError('tar shards need --data.val and --data.train_samples (the length of an epoch)')
        self.shards = {split: expand_shards(paths) for split, paths in self.paths.items()}

    # streams

    def set_epoch(self, epoch: int) -> None:
        if self._stream is not None and epoch != self._stream.epoch:
            self._stream.start_at(epoch)

    def train_dataloader(self) -> DataLoader:
        if not self.shards:
            return super().train_dataloader()
        world = self._ranks()[1]
        batches = self.train_samples // (self.batch_size * world)
        if not batches:
            raise ZooError(f'train_samples {self.train_samples} is fewer than one batch of {self.batch_size} x {world}')
        self._stream = self._dataset('train', batches)
        if self._resume_at:
            self._stream.start_at(*self._resume_at)
        return SizedLoader(batches, self._stream, batch_size=self.batch_size, **self._stream_options())

    def val_dataloader(self) -> DataLoader:
        return self._one_pass('val') if self.shards else super().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        if not self.shards:
            return super().test_dataloader()
        return self._one_pass('test' if 'test' in self.shards else 'val', prompts=True)

    def _one_pass(self, split: str, prompts: bool = False) -> DataLoader:
        options = self._stream_options(prompts)
        return DataLoader(self._dataset(split, None), batch_size=self.eval_batch_size, **options)

    def _stream_options(self, prompts: bool = False) -> dict[str, Any]:
        encode = functools.partial(_encode_stream, self.encoder(prompts))
        return {'collate_fn': encode, **loader_options(self.num_workers)}

    def _dataset(self, split: str, batches: int | None) -> _ChatStream:
        rank, world = self._ranks()
        return _ChatStream(
            self.shards[split],
            None,
            seed=run_seed(),
            mode='RGB',
            shuffle_buffer=self.shuffle_buffer if batches is not None else 0,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world,
            batches=batches,
        )


def _kind(path: str) -> Literal['json', 'shards', 'tables']:
    if path.endswith(('.jsonl', '.json')):
        return 'json'
    return 'shards' if path.endswith('.tar') or path.startswith(('http://', 'https://')) else 'tables'


def load_processor(name: str) -> Any:
    """A transformers processor from a folder or the hub, with the zoo's own types registered.

    Raises:
        ZooError: There is none.
    """
    from transformers import AutoProcessor

    import zoo.vlm  # noqa: F401  registers our processors

    if name.startswith(('.', '/', '~')) and not os.path.isdir(os.path.expanduser(name)):
        raise ZooError(f'no such folder: {name} (data.processor)')
    try:
        found = AutoProcessor.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError, KeyError) as error:
        raise ZooError(f'cannot load a processor from {name}: {error}') from error
    if not hasattr(found, 'tokenizer'):
        raise ZooError(f'{name} holds a {type(found).__name__}, no processor of images and text')
    return found
