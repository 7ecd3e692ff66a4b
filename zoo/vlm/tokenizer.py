"""InternLM2's tokenizer, read from its sentencepiece model into `tokenizers`, without the published remote code.

A published folder (`OpenGVLab/HoVLE`, `hustvl/mmMamba-*`) holds `tokenizer.model` and says in `tokenizer_config.json`,
`added_tokens.json` and `special_tokens_map.json` which ids are special: some rename reserved pieces of the model
(`<|im_end|>` 92542, `<|im_start|>` 92543), some lie behind it (`<img>` 92544, `</img>` 92545, `<IMG_CONTEXT>` 92546).
Nothing of that is hard-coded here. What is saved again is a plain `tokenizer.json` that transformers loads by itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.utils import cached_file

from zoo.errors import ZooError

# kinds of pieces, as in sentencepiece_model.proto
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_SPACE = '▁'
_NAMES = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')
_DEFAULTS = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '</s>'}
_HUB_ARGUMENTS = ('cache_dir', 'force_download', 'token', 'revision', 'local_files_only', 'subfolder')


def read_model(path: str | Path) -> Any:
    """The parsed `ModelProto` of a sentencepiece file.

    Args:
        path: `tokenizer.model`.

    Raises:
        ZooError: if the file is no sentencepiece BPE model.
    """
    from google.protobuf.message import DecodeError

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise ZooError(f'{path} is not a sentencepiece model ({error}): is it a Git LFS pointer?') from error
    if proto.trainer_spec.model_type != _BPE:
        raise ZooError(f"{path} is not a BPE model, which InternLM2's tokenizer is: load it with AutoTokenizer")
    return proto


def _ranked_merges(pieces: list, names: list[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first as sentencepiece merges."""
    normal = {names[i]: piece.score for i, piece in enumerate(pieces) if piece.type == _NORMAL}
    ranked = []
    for index, (piece, score) in enumerate(normal.items()):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, index, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """What sentencepiece does to a text before it merges, in its order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r'\A +| +\z'), ''), normalizers.Replace(Regex(' {2,}'), ' ')]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(' ', _SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any, byte_fallback: bool, added: list[str]) -> decoders.Decoder:
    """Pieces to text. A dummy prefix is taken away again at the start of the text and behind every added token."""
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, ' ')]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=' ', left=1))
        if added:
            behind = '|'.join(f'(?<={re.escape(token)})' for token in added)
            steps.append(decoders.Replace(Regex(f'(?:{behind}) '), ''))
    return decoders.Sequence(steps)


def build_backend(path: str | Path, added: dict[int, AddedToken]) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes as sentencepiece does between added tokens.

    Args:
        path: `tokenizer.model`, BPE.
        added: Tokens by id that are matched in the raw text. An id inside the model renames its piece, others follow.

    Raises:
        ZooError: if a token has two ids or the file is no such model.
    """
    proto = read_model(path)
    spec, pieces = proto.normalizer_spec, list(proto.pieces)
    names = [str(added[i]) if i in added else piece.piece for i, piece in enumerate(pieces)]
    vocabulary = {name: i for i, name in enumerate(names)} | {str(token): i for i, token in added.items()}
    taken = {i: name for name, i in vocabulary.items()}
    for i, name in [*enumerate(names), *((i, str(token)) for i, token in added.items())]:
        if taken.get(i) != name:
            raise ZooError(f'{Path(path).parent}: the token {name!r} has two ids, {i} and {vocabulary[name]}')
    user_defined = [names[i] for i, p in enumerate(pieces) if p.type == _USER_DEFINED and i not in added]
    byte_fallback = proto.trainer_spec.byte_fallback
    model = models.BPE(
        vocab=vocabulary,
        merges=_ranked_merges(pieces, names),
        unk_token=names[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=bool(user_defined),  # sentencepiece never splits these pieces, nor merges them
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(spec)
    if user_defined:
        longest_first = '|'.join(re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior='isolated')
    tokenizer.decoder = _decoder(spec, byte_fallback, [str(token) for token in added.values()])
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
        pieces = {piece.piece: i for i, piece in enumerate(read_model(model).pieces)}
        for token in set(named.values()) - known:
            if token not in pieces:
                raise ZooError(f'{Path(model).parent} names the special token {token!r} but gives it no id')
            added[pieces[token]] = AddedToken(token, normalized=False, special=True)
        backend = build_backend(model, added)
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
