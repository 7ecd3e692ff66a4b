"""What every image-text data module shares: conversations to token ids with any transformers processor, and loaders.

A batch is a dictionary:

    input_ids        int64 (B, L), padded on the right
    attention_mask   int64 (B, L)
    labels           int64 (B, L): the ids of the answers and of what ends a turn; -100 elsewhere
    pixel_values     and whatever else the processor makes of images (image_sizes, image_grid_thw, ...)
    question         B lists of str, one entry per turn; answer, question_type likewise
    name             B str by which the user finds a sample
    failures         (name, error) of samples that could not be read
    dropped          (name, number of tokens) of samples longer than max_length
    image            only in test loaders: the first image of each sample, or None
    prompts          only in test loaders: model inputs of one row per turn, padded on the left, that end where the
                     answer begins, earlier turns answered with the truth; rows go sample by sample, turn by turn

`model_inputs(batch)` is what a model's forward takes. The labels of one turn are neighbours and turns are apart, so
`turn_numbers(labels)` tells them from each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.data import DataLoader, Dataset

from zoo.data.base import ResumableData, loader_options
from zoo.data.sampling import SUBSTITUTES, UNREADABLE, EpochSampler, collate, substitute_for
from zoo.data.seeding import run_seed
from zoo.errors import ZooError

IGNORED = -100
EMPTY_IN_A_ROW = 8  # batches of training without a single usable sample, each filled up SUBSTITUTES times in vain
_MARK = '\ue000{}\ue001'  # private-use characters: no template writes them, no data should hold them
_BAD_ROW = (*UNREADABLE, KeyError, TypeError, AttributeError)


@dataclass
class Sample:
    """A conversation.

    Args:
        turns: Question and answer of each turn; `<image>` in a question stands for the next image.
        images: Pillow images or uint8 arrays (H, W, 3), as many as there are placeholders.
        name: By which the user finds it.
        kinds: Type of each question, for metrics.
        system: System message.
    """

    turns: list[tuple[str, str]]
    images: list[Any] = field(default_factory=list)
    name: str = ''
    kinds: list[str] = field(default_factory=list)
    system: str | None = None

    def parts(self) -> list[tuple[str, list[str | None], str | None]]:
        """Role, contents (a text each, None for an image) and answer of every message pair, the system's first."""
        told: list[tuple[str, list[str | None], str | None]] = []
        if self.system is not None:
            told.append(('system', [self.system.strip()], None))
        for question, answer in self.turns:
            pieces: list[str | None] = []
            for number, piece in enumerate(question.split('<image>')):
                pieces += [None] * bool(number) + [piece.strip()] * bool(piece.strip())
            told.append(('user', pieces, answer.strip()))
        return told


class ChatSource(Protocol):
    """One split of a data set of conversations."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name that lets the user find the sample."""
        ...

    def load_many(self, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
        """The samples of (epoch, index); what could not be read is its error."""
        ...


def load_each(load: Any, keys: list[tuple[int, int]]) -> list[Sample | Exception]:
    """`load_many` from a function that loads one index."""
    found: list[Sample | Exception] = []
    for _, index in keys:
        try:
            found.append(load(index))
        except _BAD_ROW as error:
            found.append(error)
    return found


def model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a model's forward takes: every tensor but the labels."""
    return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != 'labels'}


def turn_numbers(labels: torch.Tensor) -> torch.Tensor:
    """int64 (B, L): the number of the turn within its row where there is a label, -1 elsewhere."""
    answer = labels != IGNORED
    before = torch.nn.functional.pad(answer[:, :-1], (1, 0))
    return torch.where(answer, (answer & ~before).cumsum(1) - 1, -1)


def check_tokens(processor: Any, config: Any) -> None:
    """Refuses a processor whose token ids do not fit a model.

    Args:
        processor: transformers processor.
        config: transformers config of the model.

    Raises:
        ZooError: An id is beyond the model's vocabulary, or both name different tokens for images.
    """
    size, tokenizer = config.get_text_config().vocab_size, processor.tokenizer
    if len(tokenizer) > size:
        raise ZooError(
            f'the processor has {len(tokenizer)} tokens, the model ({config.model_type}) only {size}: they do not '
            'belong together. Take the processor that lies in the folder of the model'
        )
    # a model may have more rows than its tokenizer has tokens: tables are padded to round sizes
    theirs, ours = getattr(config, 'image_token_id', None), image_token_id(processor)
    if None not in (theirs, ours) and theirs != ours:
        raise ZooError(
            f'the processor writes images as token {ours} ({tokenizer.convert_ids_to_tokens(ours)}), the model expects '
            f'{theirs}: they do not belong together. Take the processor that lies in the folder of the model'
        )


def image_token_id(processor: Any) -> int | None:
    """The token that stands for (a part of) an image, if the processor says so."""
    found = getattr(processor, 'image_token_id', None)
    if found is None and isinstance(token := getattr(processor, 'image_token', None), str):
        found = processor.tokenizer.convert_tokens_to_ids(token)
    return found


class ChatEncoder:
    """Samples to batches with a processor, labels only where answers are.

    Args:
        processor: Any transformers processor with a fast tokenizer and a chat template.
        max_length: Longer samples are left out (see `too_long`).
        too_long: drop counts them, error stops.
        prompts: Whether to add what `generate` starts from.
        chat_template: In place of the processor's own.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        too_long: Literal['drop', 'error'] = 'drop',
        prompts: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.processor, self.max_length, self.too_long, self.prompts = processor, max_length, too_long, prompts
        self.template = chat_template or processor.chat_template or processor.tokenizer.chat_template
        if not self.template:
            raise ZooError('the processor has no chat template: give one with --data.chat_template FILE')
        if not processor.tokenizer.is_fast:
            raise ZooError(f'{type(processor.tokenizer).__name__} is no fast tokenizer: answers cannot be located')
        self.image_token = image_token_id(processor)
        self._skeletons: dict[tuple, list[str]] = {}
        self.end = ''
        self.end = self._skeleton((('user', (True,), True),))[-1].rstrip()

    def _skeleton(self, shape: tuple) -> list[str]:
        """What the template writes around the texts of a conversation of this shape.

        Rendering takes a millisecond and depends on the shape alone, so it is done once for each.
        """
        if shape not in self._skeletons:
            count, messages = 0, []

            def text() -> dict[str, str]:
                nonlocal count
                count += 1
                return {'type': 'text', 'text': _MARK.format(count - 1)}

            for role, contents, answered in shape:
                messages.append({'role': role, 'content': [text() if t else {'type': 'image'} for t in contents]})
                if answered:
                    messages.append({'role': 'assistant', 'content': [text()]})
            pieces = [self.processor.apply_chat_template(messages, tokenize=False, chat_template=self.template)]
            for number in range(count):
                pieces[-1:] = pieces[-1].split(_MARK.format(number))
                if len(pieces) != number + 2:
                    raise ZooError('the chat template does not write every text of a conversation once')
            self._skeletons[shape] = pieces
        return self._skeletons[shape]

    def render(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and first and last position of every answer with what ends its turn.

        A template that marks no end of a turn gets the tokenizer's end-of-sequence token there.
        """
        told = sample.parts()
        shape = tuple((role, tuple(c is not None for c in contents), a is not None) for role, contents, a in told)
        pieces = iter(self._skeleton(shape))
        text, spans = next(pieces), []
        for _, contents, answer in told:
            for content in contents:
                if content is not None:
                    text += content + next(pieces)
            if answer is not None:
                piece = next(pieces)
                written = text + answer + (self.end or self.processor.tokenizer.eos_token)
                spans.append((len(text), len(written) if piece.startswith(self.end) else len(text) + len(answer)))
                text = (text + answer if self.end else written) + piece
        return text, spans

    def __call__(self, samples: list[Sample]) -> tuple[dict[str, Any], list[int]]:
        """Encodes samples.

        Returns:
            The batch, and which of the samples are not in it (unreadable or too long).
        """
        good, texts, spans, failures = [], [], [], []
        for number, sample in enumerate(samples):
            try:
                text, span = self.render(sample)
            except TemplateError as error:
                failures.append((number, error))
                continue
            good.append(number)
            texts.append(text)
            spans.append(span)
        inputs = self._process(texts, [samples[n].images for n in good], 'right')
        if isinstance(inputs, Exception):
            # one by one, to know which
            alone = [self._process([t], [samples[n].images], 'right') for t, n in zip(texts, good)]
            bad = [i for i, made in enumerate(alone) if isinstance(made, Exception)]
            failures += [(good[i], alone[i]) for i in bad]
            if not bad:
                raise ZooError(f'the processor refuses this batch, though each sample alone is fine: {inputs}')
            return self._without(samples, failures, [])
        lengths = inputs['attention_mask'].sum(1).tolist() if good else []
        long = [(good[i], n) for i, n in enumerate(lengths) if n > self.max_length]
        if failures or long:
            return self._without(samples, failures, long)
        return self._finish(samples, texts, spans, inputs), []

    def _process(self, texts: list[str], images: list[list[Any]], side: str) -> dict[str, torch.Tensor] | Exception:
        if not texts:
            return {'input_ids': torch.zeros(0, 1, dtype=torch.long)}
        options = {'padding': True, 'padding_side': side, 'return_tensors': 'pt'}
        try:
            return dict(self.processor(text=texts, images=images if any(images) else None, **options))
        except Exception as error:  # each processor has its own way of refusing
            return error

    def _without(
        self, samples: list[Sample], failures: list[tuple[int, Exception]], long: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], list[int]]:
        if long and self.too_long == 'error':
            number, length = long[0]
            raise ZooError(
                f'{samples[number].name} has {length} tokens, more than data.max_length {self.max_length} '
                '(too_long: error; drop leaves such samples out)'
            )
        left_out = {n for n, _ in failures} | {n for n, _ in long}
        kept = [n for n in range(len(samples)) if n not in left_out]
        batch, more = self([samples[n] for n in kept])
        batch['failures'] += [(samples[n].name, _words(error)) for n, error in failures]
        batch['dropped'] += [(samples[n].name, length) for n, length in long]
        return batch, sorted(left_out | {kept[n] for n in more})

    def _finish(
        self, samples: list[Sample], texts: list[str], spans: list[list[tuple[int, int]]], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        ids = inputs['input_ids']
        labels = torch.full_like(ids, IGNORED)
        if texts:
            plain = self.processor.tokenizer(texts, return_offsets_mapping=True)
            for row, span in enumerate(spans):
                length = int(inputs['attention_mask'][row].sum())
                wanted = _inside(plain['offset_mapping'][row], span)
                mask = torch.from_numpy(
                    spread(plain['input_ids'][row], wanted, ids[row, :length].numpy(), self.image_token)
                )
                labels[row, :length][mask] = ids[row, :length][mask]
        batch = {
            **inputs,
            'labels': labels,
            'question': [[q for q, _ in s.turns] for s in samples],
            'answer': [[a for _, a in s.turns] for s in samples],
            'question_type': [list(s.kinds) or ['all'] * len(s.turns) for s in samples],
            'name': [s.name for s in samples],
            'failures': [],
            'dropped': [],
        }
        if self.prompts:
            batch['image'] = [s.images[0] if s.images else None for s in samples]
            batch['prompts'] = self._prompts(samples, texts, spans)
        return batch

    def _prompts(self, samples: list[Sample], texts: list[str], spans: list[list[tuple[int, int]]]) -> dict[str, Any]:
        begun, images = [], []
        for sample, text, span in zip(samples, texts, spans):
            shown = 0
            for (question, _), (start, _) in zip(sample.turns, span):
                shown += question.count('<image>')
                begun.append(text[:start])
                images.append(sample.images[:shown])
        made = self._process(begun, images, 'left')
        if isinstance(made, Exception):
            raise ZooError(f'the processor refuses the prompts of {samples[0].name} and the following: {made}')
        return made


def _words(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.replace('\n', ' ')[:300]


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """bool (L,): the tokens that begin within a span; tokens without characters never do."""
    starts, ends = np.array(offsets).reshape(-1, 2).T
    wanted = np.zeros(len(starts), bool)
    for first, last in spans:
        wanted |= (starts >= first) & (starts < last) & (ends > starts)
    return wanted


def spread(plain: list[int], wanted: np.ndarray, full: np.ndarray, image_token: int | None) -> np.ndarray:
    """Carries marks from the tokens of a text to the same tokens after its image placeholders were expanded.

    Args:
        plain: Ids with one placeholder per image, (N,).
        wanted: bool (N,).
        full: Ids as the processor made them, (M,).
        image_token: Id of the placeholder.

    Returns:
        bool (M,), False in the expansions.

    Raises:
        ValueError: The ids between the placeholders do not occur in this order.
    """
    ids, marks = np.asarray(plain), np.zeros(len(full), bool)
    cuts = [-1, *np.flatnonzero(ids == image_token).tolist(), len(ids)]
    at = 0
    for number, (before, behind) in enumerate(zip(cuts, cuts[1:])):
        piece = ids[before + 1 : behind]
        last = number == len(cuts) - 2
        found = _find(full, piece, max(at, len(full) - len(piece)) if last else at)
        if found is None:
            raise ZooError('the processor does not tokenise this text as its tokenizer does: answers cannot be located')
        marks[found : found + len(piece)] = wanted[before + 1 : behind]
        at = found + len(piece)
    return marks


def _find(ids: np.ndarray, piece: np.ndarray, start: int) -> int | None:
    for at in range(start, len(ids) - len(piece) + 1):
        if np.array_equal(ids[at : at + len(piece)], piece):
            return at
    return None


class ChatBatches(Dataset):
    """Whole batches of a source: in training, other samples take the place of those that cannot be used.

    Args:
        source: The split.
        encoder: Samples to batches.
        substitute: Whether to fill up batches.
    """

    def __init__(self, source: ChatSource, encoder: ChatEncoder, substitute: bool) -> None:
        self.source, self.encoder, self.substitute = source, encoder, substitute

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        samples: list[Sample | None] = [None] * len(keys)
        failures, dropped, pending = [], [], list(range(len(keys)))
        for attempt in range(1 + (SUBSTITUTES if self.substitute else 0)):
            chosen = [keys[place] if not attempt else self._other(keys[place], attempt) for place in pending]
            for place, key, sample in zip(pending, chosen, self.source.load_many(chosen)):
                if isinstance(sample, Exception):
                    failures.append((self.source.name(key[1]), _words(sample)))
                samples[place] = sample if isinstance(sample, Sample) else None
            places = [place for place, sample in enumerate(samples) if sample is not None]
            batch, left_out = self.encoder([samples[place] for place in places])
            failures, dropped = failures + batch['failures'], dropped + batch['dropped']
            for number in left_out:
                samples[places[number]] = None
            pending = [place for place, sample in enumerate(samples) if sample is None]
            if not pending:
                break
        return {**batch, 'failures': failures, 'dropped': dropped}

    def _other(self, key: tuple[int, int], attempt: int) -> tuple[int, int]:
        return key[0], substitute_for(key[1], attempt, len(self.source))


class ChatData(ResumableData):
    """Base of the image-text data modules; a subclass fills `splits` in `open_splits` and builds the processor.

    Args:
        batch_size: Samples per step and process.
        num_workers: Loader processes.
        max_length: Most tokens of a sample, image tokens included.
        too_long: What happens to longer samples: drop leaves them out and counts them, error stops.
        strict: Whether an unreadable sample is an error; otherwise it is skipped and counted.
        eval_batch_size: Samples per step in validation and test; batch_size where not given.
    """

    noun = 'sample'

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 2,
        max_length: int = 2048,
        too_long: Literal['drop', 'error'] = 'drop',
        strict: bool = False,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, strict)
        self.max_length, self.too_long, self.eval_batch_size = max_length, too_long, eval_batch_size or batch_size
        self.chat_template: str | None = None
        self.splits: dict[str, ChatSource] = {}
        self.dropped, self._empty_batches = 0, 0
        self._processor: Any = None
        self._opened = False

    def open_splits(self) -> None:
        """Fills `splits`; raises ZooError for whatever is wrong with the data."""
        raise TypeError(f'{type(self).__name__} does not define open_splits')

    def build_processor(self) -> Any:
        """The transformers processor of this data."""
        raise TypeError(f'{type(self).__name__} does not define build_processor')

    @property
    def question_types(self) -> list[str]:
        """The types that metrics are kept for, in the order of tables."""
        return ['all']

    def chance(self) -> dict[str, float]:
        """Share of right answers of the best constant answer, for those types of which it is known."""
        return {}

    @property
    def processor(self) -> Any:
        """The transformers processor; built when it is first asked for."""
        if self._processor is None:
            self.setup()
            self._processor = self.build_processor()
        return self._processor

    # Lightning's interface

    def setup(self, stage: str | None = None) -> None:
        if not self._opened:
            self.open_splits()
            self._opened = True

    def train_dataloader(self) -> DataLoader:
        sampler = self._train_sampler()
        return self._loader('train', sampler, self.encoder(), substitute=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader('val', self._sampler('val', shuffle=False), self.encoder())

    def test_dataloader(self) -> DataLoader:
        split = 'test' if 'test' in self.splits else 'val'
        return self._loader(split, self._sampler(split, shuffle=False), self.encoder(prompts=True))

    # used by tasks

    def encoder(self, prompts: bool = False) -> ChatEncoder:
        return ChatEncoder(self.processor, self.max_length, self.too_long, prompts, self.chat_template)

    def report_dropped(self, dropped: list[tuple[str, int]]) -> None:
        """Counts the samples that were too long, each once, and names the first."""
        for name, length in dropped:
            words = f'left out {name}: {length} tokens, data.max_length is {self.max_length}'
            self.leave_out('dropped', name, words)

    def count_unusable(self, batch: dict[str, Any], training: bool = False) -> None:
        """Takes note of what a batch had to leave out.

        Args:
            batch: A batch.
            training: Whether it is one of training, whose batches are filled up with other samples.

        Raises:
            ZooError: One batch of training after the other had nothing in it: the data are wrong as a whole.
        """
        self.report_failures(batch['failures'])
        self.report_dropped(batch['dropped'])
        if not training:
            return
        self._empty_batches = 0 if batch['name'] else self._empty_batches + 1
        if self._empty_batches == EMPTY_IN_A_ROW:
            why = [f'{n}: {e}' for n, e in batch['failures']]
            why += [f'{n}: {k} tokens, data.max_length is {self.max_length}' for n, k in batch['dropped']]
            raise ZooError(f'not one usable {self.noun} in {EMPTY_IN_A_ROW} batches; for instance {why[0]}')

    def _sampler(self, split: str, shuffle: bool) -> EpochSampler:
        if split not in self.splits:
            raise ZooError(f'{type(self).__name__} has no {split} split; it has: {", ".join(self.splits)}')
        return EpochSampler(len(self.splits[split]), run_seed(), shuffle, *self._ranks())

    def _loader(self, split: str, sampler: EpochSampler, encoder: ChatEncoder, substitute: bool = False) -> DataLoader:
        return DataLoader(
            ChatBatches(self.splits[split], encoder, substitute),
            batch_size=self.batch_size if substitute else self.eval_batch_size,
            sampler=sampler,
            drop_last=substitute,
            collate_fn=collate,
            **loader_options(self.num_workers),
        )
