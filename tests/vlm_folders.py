"""Folders of tiny vision-language models for tests: a tokenizer as it is published, and a LLaVA with random weights."""

import json

import numpy as np
from PIL import Image

TEXT = (
    ['the quick brown fox jumps over the lazy dog 0123456789', 'a red square, a blue circle and two green triangles']
    + [
        'What colour is it? How many are there?',
        'def f(x):\n    return  x',
        '你好，世界。这是一个测试。',
        'café naïve über',
    ]
) * 8
RENAMED = {'<|im_end|>': '[UNUSED_TOKEN_2]', '<|im_start|>': '[UNUSED_TOKEN_3]'}
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ 'USER ' if m.role == 'user' else 'ASSISTANT ' }}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}ASSISTANT "
)
BEHIND = ('<img>', '</img>', '<IMG_CONTEXT>')


def published_tokenizer(folder, dummy_prefix=True):
    """A sentencepiece model and the JSON files that InternLM2's tokenizer is published with."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / 'tokenizer'),
        vocab_size=420,
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[f'[UNUSED_TOKEN_{i}]' for i in range(4)],
        character_coverage=0.98,
        minloglevel=2,
    )
    (folder / 'tokenizer.vocab').unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    ids = {'<unk>': 0, '<s>': 1, '</s>': 2}
    ids |= {token: model.piece_to_id(piece) for token, piece in RENAMED.items()}
    ids |= {token: model.get_piece_size() + i for i, token in enumerate(BEHIND)}
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    config = {
        'added_tokens_decoder': {str(i): {'content': token, **flags} for token, i in ids.items()},
        'additional_special_tokens': [*RENAMED, *BEHIND],
        'auto_map': {'AutoTokenizer': ['tokenization_internlm2.InternLM2Tokenizer', None]},
        'tokenizer_class': 'InternLM2Tokenizer',
        'model_max_length': 8192,
    }
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    names = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '</s>'}
    (folder / 'special_tokens_map.json').write_text(json.dumps(names))
    return model, ids


def published_config(folder, **changes):
    """The part of HoVLE's config.json that a processor needs, at the published sizes."""
    config = {
        'model_type': 'internvl_chat',
        'template': 'internlm2-chat',
        'force_image_size': 448,
        'downsample_ratio': 0.5,
        'dynamic_image_size': True,
        'use_thumbnail': True,
        'min_dynamic_patch': 1,
        'max_dynamic_patch': 12,
        'embedding_config': {'patch_size': 14, 'image_size': 448},
    }
    (folder / 'config.json').write_text(json.dumps(config | changes))


def noise(width, height, seed=0):
    """An image with structure at several scales."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def tiny_llava(folder, chat_template=True):
    """A LLaVA of 0.3 M parameters with a word tokenizer, saved; 16 image tokens an image of 28 px."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ['<pad>', '<s>', '</s>', '<unk>', '<image>', 'USER', 'ASSISTANT', 'red', 'blue', 'green', 'what', 'colour']
    words += ['is', 'it', 'one', 'two', 'three', 'how', 'many', '?', '.', 'circle', 'square', 'answer', 'briefly']
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(['<pad>', '<s>', '</s>', '<unk>', '<image>'])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>'
    )
    square = {'height': 28, 'width': 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
        image_token='<image>',
        chat_template=LLAVA_TEMPLATE if chat_template else None,
    )
    text = {'model_type': 'llama', 'vocab_size': 32, 'hidden_size': 64, 'intermediate_size': 128}
    text |= {'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'pad_token_id': 0}
    vision = {'model_type': 'clip_vision_model', 'hidden_size': 48, 'intermediate_size': 96, 'num_hidden_layers': 2}
    vision |= {'num_attention_heads': 4, 'image_size': 28, 'patch_size': 7, 'projection_dim': 48}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text | {'bos_token_id': 1, 'eos_token_id': 2},
        vision_config=vision,
        image_token_id=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy='default',
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.language_model.parameters():  # initialised so small that every answer is the same word
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def tiny_mmmamba(folder, hybrid=False):
    """A student of a HoVLE with random weights, in the published layout: config.json, weights, tokenizer.model."""
    import torch

    from zoo.vlm import HoVLEConfig, HoVLEForConditionalGeneration, from_hovle

    model, ids = published_tokenizer(folder)
    size = model.get_piece_size() + len(BEHIND)
    part = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2}
    first = {'num_hidden_layers': 2, 'patch_size': 7, 'image_size': 28, 'llm_vocab_size': size, 'llm_hidden_size': 32}
    config = HoVLEConfig(
        embedding_config=part | first | {'img_context_token_id': ids['<IMG_CONTEXT>'], 'initializer_range': 0.3},
        llm_config=part | {'num_hidden_layers': 2, 'vocab_size': size, 'pad_token_id': 2, 'initializer_range': 0.3},
        force_image_size=28,
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=4,
        template='internlm2-chat',
    )
    torch.manual_seed(0)
    student = from_hovle(HoVLEForConditionalGeneration(config).eval(), [1, 3] if hybrid else None)
    student.save_pretrained(folder)
    return student
