"""Randomly initialised Stable Diffusion pipelines of each kind, and captioned images to train them on."""

import numpy as np
import tiny_diffusion
import torch
from PIL import Image


def pipeline(kind='sd15'):
    """A pipeline of sd15, sd21 (velocity) or sdxl (two text encoders, sizes as conditions)."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    base = tiny_diffusion.pipeline()
    if kind == 'sd21':
        base.scheduler = DDIMScheduler(prediction_type='v_prediction')
    if kind != 'sdxl':
        return base
    added = {'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8, 'cross_attention_dim': 64}
    added |= {'projection_class_embeddings_input_dim': 6 * 8 + 32, 'transformer_layers_per_block': (1, 2)}
    config = base.text_encoder.config
    config.projection_dim = 32
    torch.manual_seed(0)
    base.vae.register_to_config(force_upcast=True)
    found = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=UNet2DConditionModel(**tiny_diffusion.UNET | added).eval(),
        scheduler=base.scheduler,
    )
    found.set_progress_bar_config(disable=True)
    return found


def captioned_folder(folder, count=6, sizes=((40, 40), (56, 30), (30, 56))):
    """KEY.png beside KEY.txt, images of the sizes (height, width) in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{number:02d}.png')
        (folder / f'{number:02d}.txt').write_text(f'caption {"abc"[number % 3]} {"xyz"[number % 2]}')
    return folder
