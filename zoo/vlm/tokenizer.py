"""InternLM2's tokenizer, read from its sentencepiece model into `tokenizers`, without the published remote code.

A published folder (`OpenGVLab/HoVLE`, `hustvl/mmMamba-*`) holds `tokenizer.model` and says in `tokenizer_config.json`,
`added_tokens.json` and `special_tokens_map.json` which ids are special: some rename reserved pieces of the model
(`<|im_end|>` 92542, `<|im_start|>` 92543), some lie behind it (`<img>` 92544, `</img>` 92545, `<IMG_CONTEXT>` 92546).
Nothing of that is hard-coded here. What is saved again is a plain `tokenizer.json` that transformers loads by itself.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from zoo.errors import ZooError

# kinds of pieces, as in sentencepiece_model.proto
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_SPACE = '▁'
_NAMES = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')
_DEFAULTS = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '</s>'}
_HUB_ARGUMENTS = ('cache_dir', 'force_download', 'token', 'revision', 'local_files_only', 'subfolder')


@dataclass
class SentencePieceModel:
    """What a sentencepiece file says, as far as encoding needs it.

    Args:
        pieces: Text, score and kind of each piece, by id.
        unk_id: Id of the piece for unknown characters.
        byte_fallback: Whether unknown characters become bytes.
        charsmap: Compiled normalisation table, or nothing.
        add_dummy_prefix: Whether a text begins with a space.
        remove_extra_whitespaces: Whether spaces at the ends and in a row are dropped.
        escape_whitespaces: Whether spaces become U+2581.
    """

    pieces: list[tuple[str, float, int]]
    unk_id: int = 0
    byte_fallback: bool = False
    charsmap: bytes = b''
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer message: an int, 4 or 8 bytes, or the bytes of a message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or (varint() if key & 7 == 2 else 0)
        if not 0 <= size <= len(data) - position or key & 7 not in (1, 2, 5):
            raise ValueError('it ends too early or is something else')
        yield key >> 3, data[position : position + size]
        position += size


def read_model(path: str | Path) -> SentencePieceModel:
    """Reads a sentencepiece file by its wire format, so that neither sentencepiece nor a protobuf version is needed.

    Field numbers are those of `sentencepiece_model.proto` (github.com/google/sentencepiece).

    Args:
        path: `tokenizer.model`.

    Raises:
        ZooError: if the file is no sentencepiece BPE model.
    """
    try:
        parts = list(_fields(Path(path).read_bytes()))
        pieces = []
        for message in (value for number, value in parts if number == 1):
            piece = dict(_fields(message))
            score = struct.unpack('<f', piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
        trainer, normalizer = ({k: v for n, m in parts if n == part for k, v in _fields(m)} for part in (2, 3))
    except (OSError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ZooError(f'{path} is not a sentencepiece model ({error}): is it a Git LFS pointer?') from error
    if trainer.get(3) != _BPE:
        raise ZooError(f"{path} is not a BPE model, which InternLM2's tokenizer is: load it with AutoTokenizer")
    switches = [bool(normalizer.get(number, 1)) for number in (3, 4, 5)]
    return SentencePieceModel(pieces, trainer.get(40, 0), bool(trainer.get(35, 0)), normalizer.get(2, b''), *switches)


def _ranked_merges(model: SentencePieceModel, names: list[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first as sentencepiece merges."""
    normal = {names[i]: score for i, (_, score, kind) in enumerate(model.pieces) if kind == _NORMAL}
    ranked = []
    for index, (piece, score) in enumerate(normal.items()):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, index, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec: SentencePieceModel) -> normalizers.Normalizer:
    """What sentencepiece does to a text before it merges, in its order."""
    steps: list[normalizers.Normalizer] = []
    if spec.charsmap:
        steps.append(normalizers.Precompiled(spec.charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r'\A +| +\z'), ''), normalizers.Replace(Regex(' {2,}'), ' ')]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(' ', _SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: SentencePieceModel, added: list[str]) -> decoders.Decoder:
    """Pieces to text. A dummy prefix is taken away again at the start of the text and behind every added token."""
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, ' ')]
    if spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=' ', left=1))
        if added:
            behind = '|'.join(f'(?<={re.escape(token)})' for token in added)
            steps.append(decoders.Replace(Regex(f'(?:{behind}) '), ''))
    return decoders.Sequence(steps)


def build_backend(model: SentencePieceModel, added: dict[int, AddedToken]) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes as sentencepiece does between added tokens.

    Args:
        model: From `read_model`.
        added: Tokens by id that are matched in the raw text. An id inside the model renames its piece, others follow.

    Raises:
        ZooError: if a token has two ids.
    """
    names = [str(added[i]) if i in added else piece for i, (piece, *_) in enumerate(model.pieces)]
    vocabulary = {name: i for i, name in enumerate(names)} | {str(token): i for i, token in added.items()}
    taken = {i: name for name, i in vocabulary.items()}
    for i, name in [*enumerate(names), *((i, str(token)) for i, token in added.items())]:
        if taken.get(i) != name:
            raise ZooError(f'the token {name!r} of the tokenizer has two ids, {i} and {vocabulary[name]}')
    user_defined = [names[i] for i, (*_, kind) in enumerate(model.pieces) if kind == _USER_DEFINED and i not in added]
    merging = models.BPE(
        vocab=vocabulary,
        merges=_ranked_merges(model, names),
        unk_token=names[model.unk_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(user_defined),  # sentencepiece never splits these pieces, nor merges them
    )
    tokenizer = Tokenizer(merging)
    tokenizer.normalizer = _normalizer(model)
    if user_defined:
        longest_first = '|'.join(re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior='isolated')
    tokenizer.decoder = _decoder(model, [str(token) for token in added.values()])
    for _, token in sorted(added.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _read_json(path: str | None) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding='utf-8')) if path else {}


def _content(token: Any) -> str | None:
    return token.get('content') if isinstance(token, dict) else token


def added_tokens(config: dict[str, Any], extra: dict[str, int], named: dict[str, str]) -> dict[int, AddedToken]:
    """Added tokens by id, as the files of a folder say.

    Args:
        config: `tokenizer_config.json`.
        extra: `added_tokens.json`, ids by token.
        named: Special tokens by role, which are special whatever the first two say.
    """
    special = {*named.values(), *(_content(token) for token in config.get('additional_special_tokens') or [])}
    found: dict[int, AddedToken] = {}
    described = {int(i): token for i, token in (config.get('added_tokens_decoder') or {}).items()}
    for i, token in {**{i: token for token, i in extra.items()}, **described}.items():
        flags = token if isinstance(token, dict) else {}
        content = _content(token)
        found[i] = AddedToken(
            content,
            single_word=flags.get('single_word', False),
            lstrip=flags.get('lstrip', False),
            rstrip=flags.get('rstrip', False),
            normalized=False,  # matched in the raw text: each stretch between them has its own dummy prefix
            special=bool(flags.get('special', True)) or content in special,
        )
    return found


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """InternLM2's tokenizer as a fast tokenizer of transformers: BOS in front, left padding.

    `from_pretrained` reads published folders (`tokenizer.model` and its JSON files) as well as saved ones.
    """

    vocab_files_names = {'tokenizer_file': 'tokenizer.json'}
    padding_side = 'left'
    model_input_names = ['input_ids', 'attention_mask']

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any):
        """Loads a tokenizer; see `transformers.PreTrainedTokenizerBase.from_pretrained`.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            inputs: Not used by fast tokenizers.
            kwargs: Those of transformers, such as `padding_side`.

        Raises:
            ZooError: if the files are missing or contradict each other.
        """
        name = str(pretrained_model_name_or_path)
        where = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        missing_is_none = {
            '_raise_exceptions_for_missing_entries': False,
            '_raise_exceptions_for_connection_errors': False,
        }

        def find(file: str) -> str | None:
            return cached_file(name, file, **where, **missing_is_none)

        if find('tokenizer.json'):
            return super().from_pretrained(name, *inputs, **kwargs)
        model = find('tokenizer.model')
        if model is None:
            raise ZooError(f'{name} has neither tokenizer.json nor tokenizer.model')
        files = [_read_json(find(f)) for f in ('tokenizer_config.json', 'added_tokens.json', 'special_tokens_map.json')]
        ignored = ('auto_map', 'tokenizer_class', 'added_tokens_decoder', 'additional_special_tokens', '_commit_hash')
        options = {key: value for key, value in files[0].items() if key not in (*ignored, *_NAMES)}
        given = {key: v for key, v in kwargs.items() if not key.startswith('_') and key not in _HUB_ARGUMENTS}
        for key in ('trust_remote_code', 'config', 'use_fast'):
            given.pop(key, None)
        return cls._from_model(model, *files, {**options, **given, 'name_or_path': name})

    @classmethod
    def _from_model(cls, model: str, config: dict, extra: dict, special_map: dict, options: dict):
        """Builds the tokenizer from `tokenizer.model` and the contents of the JSON files beside it."""
        named = dict(_DEFAULTS)
        for source in (config, special_map):
            named |= {key: _content(source[key]) for key in _NAMES if source.get(key)}
        added = added_tokens(config, extra, named)
        known = {str(token) for token in added.values()}
        parsed = read_model(model)
        pieces = {piece: i for i, (piece, *_) in enumerate(parsed.pieces)}
        for token in set(named.values()) - known:
            if token not in pieces:
                raise ZooError(f'{Path(model).parent} names the special token {token!r} but gives it no id')
            added[pieces[token]] = AddedToken(token, normalized=False, special=True)
        backend = build_backend(parsed, added)
        bos = named['bos_token']
        add_bos = options.pop('add_bos_token', True)
        backend.post_processor = processors.TemplateProcessing(
            single=f'{bos} $A' if add_bos else '$A',
            pair=f'{bos} $A {bos} $B:1' if add_bos else '$A $B:1',
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
        return cls(
            tokenizer_object=backend,
            add_bos_token=add_bos,
            **named,
            clean_up_tokenization_spaces=options.pop('clean_up_tokenization_spaces', False),
            extra_special_tokens=[str(t) for t in added.values() if t.special and str(t) not in named.values()],
            padding_side=options.pop('padding_side', cls.padding_side),  # written down, for plain AutoTokenizer
            **options,
        )
