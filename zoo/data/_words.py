"""A word-level tokenizer and a LLaVA processor built in code, for data sets whose vocabulary is known."""

from __future__ import annotations

from typing import Any

PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE = '<pad>', '<unk>', '<end>', '<user>', '<assistant>', '<image>'
SPECIAL = (PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE)

# content is a text, or the list of {'type': 'image'} and {'type': 'text', 'text': ...} that transformers writes
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    '{% endfor %}{% endif %}'
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}<assistant>{% endif %}'
)


def word_tokenizer(words: list[str]) -> Any:
    """A tokenizer that splits at spaces; a word that is not listed becomes <unk>.

    Args:
        words: The vocabulary behind the special tokens, in this order.

    Returns:
        transformers.PreTrainedTokenizerFast; ids 0..5 are <pad> <unk> <end> <user> <assistant> <image>.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((*SPECIAL, *words)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={'image_token': IMAGE, 'user_token': USER, 'assistant_token': ASSISTANT},
        chat_template=CHAT_TEMPLATE,
        padding_side='left',  # as generate needs it; training pads on the right by itself
        clean_up_tokenization_spaces=False,
    )


def word_processor(words: list[str], size: int, patch_size: int, mean: float = 0.5, std: float = 0.5) -> Any:
    """A processor that AutoProcessor saves and loads: images of one size, a token for each patch.

    Args:
        words: See word_tokenizer.
        size: Height and width that images are resized to.
        patch_size: Side of what one image token stands for.
        mean: Subtracted from pixels in 0..1.
        std: What they are then divided by.

    Returns:
        transformers.LlavaProcessor.
    """
    from transformers import LlavaProcessor, SiglipImageProcessor

    square = {'height': size, 'width': size}
    images = SiglipImageProcessor(size=square, image_mean=[mean] * 3, image_std=[std] * 3, do_convert_rgb=True)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=word_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy='full',
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
