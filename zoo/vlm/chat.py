"""Questions and answers with any vision-language model of transformers: prompts, batches, conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from zoo.errors import ZooError
from zoo.vlm.processing import IMAGE, HoVLEProcessor, read_image

MAX_NEW_TOKENS = 512


@dataclass
class Conversation:
    """What is said before the answer to give.

    Args:
        turns: Role (`system`, `user`, `assistant`) and text of each message; `<image>` stands for an image.
        images: Paths, URLs, bytes or Pillow images in the order of their placeholders. Where the turns have none, the
            placeholders go in front of the first question, a line each.
    """

    turns: list[tuple[str, str]]
    images: list[Any] = field(default_factory=list)

    def placed(self) -> list[tuple[str, str]]:
        """The turns with one placeholder an image.

        Raises:
            ZooError: if there are as many placeholders as images neither way.
        """
        written = sum(text.count(IMAGE) for _, text in self.turns)
        if written == len(self.images):
            return self.turns
        first = next((i for i, (role, _) in enumerate(self.turns) if role == 'user'), None)
        if written or first is None:
            raise ZooError(f'the conversation has {written} {IMAGE}, but {len(self.images)} images are given')
        turns = list(self.turns)
        turns[first] = ('user', f'{IMAGE}\n' * len(self.images) + turns[first][1])
        return turns


def load_vlm(
    name: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = 'auto'
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in eval mode and its processor, ours and transformers' own alike, without remote code.

    Args:
        name: Folder or hub name.
        device: Where to put it; a CUDA device where there is one by default.
        dtype: `auto` for that of the checkpoint, or a torch dtype or its name.

    Raises:
        ZooError: if it cannot be loaded or has no processor for images.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if str(name).startswith(('.', '/', '~')) or str(name).count('/') > 1:  # no hub name looks like this
        name = Path(name).expanduser()
        if not (name / 'config.json').is_file():
            raise ZooError(f'cannot load {name}: it is no folder with a config.json')
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ZooError(f'cannot load {name}: {lines[0][:300]}') from error
    if getattr(processor, 'image_processor', None) is None:
        raise ZooError(f'{name} has no processor for images: copy the processor files of its base model beside it')
    return model.to(device).eval(), processor


def prompt(processor: ProcessorMixin, conversation: Conversation) -> str:
    """The text of a conversation up to where the answer begins, in the processor's chat template.

    Args:
        processor: Of the model; without a chat template the turns are put one under the other.
        conversation: Ends with a turn of the user.
    """
    turns = conversation.placed()
    if isinstance(processor, HoVLEProcessor):  # its template takes texts as they are written
        messages = [{'role': role, 'content': text} for role, text in turns]
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if getattr(processor, 'chat_template', None) or getattr(processor.tokenizer, 'chat_template', None):
        messages = [{'role': role, 'content': list(_parts(text))} for role, text in turns]
        renderer = processor if getattr(processor, 'chat_template', None) else processor.tokenizer
        return renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    token = getattr(processor, 'image_token', IMAGE)
    return ''.join(f'{text.replace(IMAGE, str(token))}\n' for _, text in turns)


def _parts(text: str) -> Iterator[dict[str, str]]:
    """A text with placeholders as transformers' list of contents; templates bring their own line breaks."""
    for i, part in enumerate(text.split(IMAGE)):
        if i:
            yield {'type': 'image'}
            part = part.removeprefix('\n')
        if part:
            yield {'type': 'text', 'text': part}


@contextlib.contextmanager
def padding(processor: ProcessorMixin, side: str) -> Iterator[None]:
    """Pads on one side inside the block, with the end token where there is no token for padding."""
    tokenizer = processor.tokenizer
    before, token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = side
    if token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = before
        if token is None:
            tokenizer.pad_token = None


def encode(processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Any]], side: str) -> BatchFeature:
    """Inputs of a model for a batch of prompts, padded on one side.

    Args:
        processor: Of the model.
        texts: Prompts, from `prompt`.
        images: Images of each text; of all of them or of none, since some processors do not take a mixture.
        side: `left` to generate, `right` to score.

    Raises:
        ZooError: for an unreadable image or what the processor refuses.
    """
    pictures = [[read_image(i) if not isinstance(i, torch.Tensor) else i for i in group] for group in images]
    options: dict[str, Any] = {'padding': True, 'return_tensors': 'pt'}
    bos = processor.tokenizer.bos_token
    if bos and all(text.startswith(bos) for text in texts):
        options['add_special_tokens'] = False
    with padding(processor, side):
        try:
            return processor(images=pictures if any(pictures) else None, text=list(texts), **options)
        except ValueError as error:
            raise ZooError(f'the processor refuses: {str(error).splitlines()[0][:300]}') from error


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, conversations: Sequence[Conversation], **generate_kwargs: Any
) -> list[str]:
    """Answers to a batch of conversations, greedily unless told otherwise.

    Args:
        model: Any model that generates.
        processor: Of the model.
        conversations: Each ends with a turn of the user; all with images or all without.
        generate_kwargs: For `model.generate`; `max_new_tokens` is 512 by default.

    Raises:
        ZooError: for an unreadable image, wrong placeholders, or what the processor refuses.
    """
    texts = [prompt(processor, conversation) for conversation in conversations]
    inputs = encode(processor, texts, [conversation.images for conversation in conversations], 'left')
    inputs = inputs.to(model.device, model.dtype)
    tokenizer = processor.tokenizer
    options = {'max_new_tokens': MAX_NEW_TOKENS, 'do_sample': False} | generate_kwargs
    if options.get('max_length') and 'max_new_tokens' not in generate_kwargs:
        del options['max_new_tokens']
    if not options['do_sample']:  # a checkpoint's sampling settings would only cause warnings
        options = {'temperature': None, 'top_p': None, 'top_k': None} | options
    if model.generation_config.pad_token_id is None:
        options.setdefault('pad_token_id', tokenizer.pad_token_id or tokenizer.eos_token_id)
    if isinstance(processor, HoVLEProcessor):
        options.setdefault('eos_token_id', processor.stop_token_ids)
    made = model.generate(**inputs, **options)[:, inputs['input_ids'].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def chat(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    question: str,
    images: Any = None,
    history: Sequence[tuple[str, str]] | None = None,
    **generate_kwargs: Any,
) -> tuple[str, list[tuple[str, str]]]:
    """One turn of a conversation.

    Args:
        model: Any model that generates.
        processor: Of the model.
        question: Text; `<image>` says where an image belongs, a first line of its own by default.
        images: One image or a list: those of the history first, then those of the question.
        history: Earlier questions and answers, as the last call returned them.
        generate_kwargs: For `model.generate`.

    Returns:
        The answer, and the history with this turn appended.

    Raises:
        ZooError: for an unreadable image or a number of images that is not that of the placeholders.
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    history = list(history or [])
    used = sum(text.count(IMAGE) for text, _ in history)
    if IMAGE not in question:
        question = f'{IMAGE}\n' * (len(listed) - used) + question
    turns = [turn for asked, said in history for turn in (('user', asked), ('assistant', said))]
    said = answer(model, processor, [Conversation([*turns, ('user', question)], listed)], **generate_kwargs)[0]
    return said, [*history, (question, said)]


class ChatMixin:
    """Gives a model the method `chat`."""

    def chat(
        self,
        processor: ProcessorMixin,
        question: str,
        images: Any = None,
        history: Sequence[tuple[str, str]] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """One turn of a conversation; see `zoo.vlm.chat.chat`."""
        return chat(self, processor, question, images, history, **generate_kwargs)
