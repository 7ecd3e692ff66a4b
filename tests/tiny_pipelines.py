"""Randomly initialised Stable Diffusion pipelines that are small enough for tests."""

import numpy as np
import torch
from PIL import Image

WORDS = 'a b red green blue cat dog house tree under over the'.split()


def tokenizer(length=16):
    """Splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(['<pad>', '<unk>', '<end>', *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token='<pad>', unk_token='<unk>', eos_token='<end>', model_max_length=length
    )


def text_encoder(projection=False, width=16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def pipeline(kind='sd15'):
    """A pipeline of sd15, sd21 (velocity, heads of equal width) or sdxl (two text encoders, sizes as conditions)."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    net = {
        'sample_size': 8,
        'block_out_channels': (16, 32),
        'layers_per_block': 1,
        'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
        'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
        'cross_attention_dim': 16,
        'attention_head_dim': 2,
        'norm_num_groups': 8,
    }
    if kind != 'sd15':
        net |= {'attention_head_dim': (2, 4), 'use_linear_projection': True}
    if kind == 'sdxl':
        net |= {'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8, 'cross_attention_dim': 32}
        net |= {'projection_class_embeddings_input_dim': 6 * 8 + 16, 'transformer_layers_per_block': (1, 2)}
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
        force_upcast=kind == 'sdxl',
    )
    scheduler = DDIMScheduler(
        beta_schedule='scaled_linear', prediction_type='v_prediction' if kind == 'sd21' else 'epsilon'
    )
    parts = {'unet': UNet2DConditionModel(**net), 'vae': vae, 'scheduler': scheduler}
    parts |= {'text_encoder': text_encoder(), 'tokenizer': tokenizer()}
    if kind == 'sdxl':
        parts |= {'text_encoder_2': text_encoder(projection=True), 'tokenizer_2': tokenizer()}
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def captioned_folder(folder, count=6, sizes=((40, 40), (56, 30), (30, 56))):
    """KEY.png beside KEY.txt, images of the sizes (height, width) in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{number:02d}.png')
        (folder / f'{number:02d}.txt').write_text(f'a {WORDS[2 + number % 3]} {WORDS[5 + number % 3]}')
    return folder
