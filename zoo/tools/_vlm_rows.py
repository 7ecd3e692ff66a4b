"""Questions about images from files: JSON lines, or tables in the Hugging Face format. A bad row says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

_ROLES = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}
_IMAGES = ('image', 'images', 'image_path', 'img')
_QUESTIONS = ('question', 'prompt', 'query', 'instruction')
_ANSWERS = ('answers', 'answer', 'label', 'response')
_KINDS = ('type', 'question_type', 'category', 'kind')


class BadRow(Exception):
    """A row that cannot be asked; the message says why."""


@dataclass
class Question:
    """One question with its right answers.

    Args:
        name: Where it comes from, for messages.
        turns: Role and text of each message up to the question; `<image>` stands for an image.
        images: Paths, bytes or Pillow images.
        answers: Right answers, at least one.
        kind: Group in the table of results, or ''.
    """

    name: str
    turns: list[tuple[str, str]]
    images: list[Any]
    answers: list[str]
    kind: str = ''


def _first(row: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _answers(value: Any) -> list[str]:
    """Answers out of a text, a number, a list of them, or a list of dicts with `answer` as VQA has it."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    found = [item.get('answer') if isinstance(item, dict) else item for item in listed]
    return [str(item) for item in found if item is not None and str(item).strip()]


def questions_of(row: Any, name: str, folder: Path | None) -> list[Question]:
    """The questions of one row: each answer of an InternVL/LLaVA conversation, or its single question.

    Args:
        row: `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "image": ...}`,
            `{"messages": [{"role": ..., "content": text}], ...}` or `{"question", "answer" or "answers", "image"}`;
            `image` may be a list or missing, `type` groups the results.
        name: Where it comes from.
        folder: What relative image paths start from.

    Raises:
        BadRow: saying what is missing.
    """
    if not isinstance(row, dict):
        raise BadRow(f'is a {type(row).__name__}, not an object')
    pictures = _first(row, _IMAGES)
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [] if pictures in (None, '') else [pictures]
    images = [_picture(picture, folder) for picture in listed]
    kind = str(_first(row, _KINDS) or '')
    said = row.get('conversations') or row.get('messages')
    if said is None:
        question, answers = _first(row, _QUESTIONS), _answers(_first(row, _ANSWERS))
        if question is None:
            raise BadRow(f'has no question: neither conversations nor {", ".join(_QUESTIONS)}')
        if not answers:
            raise BadRow(f'has no answer: none of {", ".join(_ANSWERS)}')
        return [Question(name, [('user', str(question))], images, answers, kind)]
    turns = _turns(said)
    places = [i for i, (role, _) in enumerate(turns) if role == 'assistant']
    if not places or places[0] == 0 or turns[0][0] == 'assistant':
        raise BadRow('has no answer that follows a question')
    found = []
    for number, i in enumerate(places):
        title = name if len(places) == 1 else f'{name} answer {number + 1}'
        seen = sum(text.count('<image>') for _, text in turns[:i])
        found.append(Question(title, turns[:i], images[:seen] if seen else images, [turns[i][1]], kind))
    return found


def _turns(said: Any) -> list[tuple[str, str]]:
    turns = []
    for turn in said if isinstance(said, (list, tuple)) else [said]:
        role = _ROLES.get(str((turn.get('from') or turn.get('role')) if isinstance(turn, dict) else None))
        text = (turn.get('value') if 'value' in turn else turn.get('content')) if role else None
        if role is None or not isinstance(text, str):
            raise BadRow('has a turn without a known speaker (human, gpt, system) and a text')
        turns.append((role, text))
    return turns


def _picture(value: Any, folder: Path | None) -> Any:
    """Something that `read_image` takes."""
    if isinstance(value, dict):  # an undecoded image of `datasets`
        value = value.get('bytes') or value.get('path')
    if isinstance(value, str) and folder is not None and not value.startswith(('http://', 'https://', 'data:')):
        return str(folder / value)  # an absolute path stays what it is
    if value is None:
        raise BadRow('has an empty image')
    return value


class JsonRows:
    """Rows of a .jsonl file, or of a .json file with a list.

    Args:
        path: The file.
        folder: What relative image paths start from; the file's folder by default.

    Raises:
        ZooError: if the file cannot be read.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path, self.folder = path, folder or path.parent
        try:
            text = path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise ZooError(f'cannot read {path}: {error}') from error
        if path.suffix == '.json':
            try:
                whole = json.loads(text)
            except json.JSONDecodeError as error:
                raise ZooError(f'{path} is not JSON: {error}; lines of JSON belong into a .jsonl file') from error
            if not isinstance(whole, list):
                raise ZooError(f'{path} holds a {type(whole).__name__}, not a list of rows')
            self.rows: list[tuple[str, Any]] = [(f'{path.name} row {i}', row) for i, row in enumerate(whole)]
        else:
            lines = enumerate(text.splitlines(), 1)
            self.rows = [(f'{path.name}:{i}', line) for i, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index][0]

    def questions(self, index: int) -> list[Question]:
        name, row = self.rows[index]
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except json.JSONDecodeError as error:
                raise BadRow(f'is not JSON: {error}') from error
        return questions_of(row, name, self.folder)


class TableRows:
    """Rows of parquet files or of a data set of the Hugging Face hub, images not decoded.

    Args:
        path: A .parquet file, a folder of them, or a hub name.
        split: Split of it.
        config: Configuration of a hub data set.
        folder: What relative image paths start from.

    Raises:
        ZooError: if it cannot be loaded or has no such split.
    """

    def __init__(self, path: str, split: str, config: str | None = None, folder: Path | None = None) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ZooError('this data set needs the extra "data": pip install "linear-zoo[data]"') from error
        local = Path(path).expanduser()
        if local.exists():
            files = [str(local)] if local.is_file() else [str(f) for f in sorted(local.rglob(f'*{split}*.parquet'))]
            if not files:
                raise ZooError(f'{path} has no .parquet file with {split} in its name: give another --split')
            where: tuple[Any, ...] = ('parquet', None, {'data_files': {split: files}})
        else:
            where = (path, config, {})
        try:
            table = datasets.load_dataset(where[0], where[1], split=split, **where[2])
        except Exception as error:  # the hub client raises a dozen types; the user needs the name and the cause
            first = (str(error).splitlines() or [''])[0]
            raise ZooError(f'cannot load the data set {path}: {type(error).__name__}: {first[:300]}') from error
        for key, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(key, datasets.Image(decode=False))
            elif isinstance(getattr(feature, 'feature', None), datasets.Image):
                table = table.cast_column(key, datasets.List(datasets.Image(decode=False)))
        self.table, self.title, self.folder = table, f'{path} {split}', folder

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f'{self.title} row {index}'

    def questions(self, index: int) -> list[Question]:
        return questions_of(self.table[index], self.name(index), self.folder)


def open_rows(data: str, split: str, config: str | None, images: Path | None) -> JsonRows | TableRows:
    """Opens a data set by what its name looks like.

    Args:
        data: A .jsonl or .json file, a .parquet file or a folder of them, or a hub name.
        split: Split of tables.
        config: Configuration of a hub data set.
        images: Folder that relative image paths start from.

    Raises:
        ZooError: if it cannot be read.
    """
    path = Path(data).expanduser()
    if path.suffix in ('.jsonl', '.json'):
        return JsonRows(path, images)
    if not path.exists() and (data.startswith(('.', '/', '~')) or data.count('/') > 1 or path.suffix):
        raise ZooError(f'no such file or folder: {data}')
    return TableRows(data, split, config, images)
