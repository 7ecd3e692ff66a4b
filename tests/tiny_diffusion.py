"""Diffusion models in miniature, random weights."""

import torch
from diffusers import UNet2DConditionModel

BLOCKS = dict(
    block_out_channels=(32, 64),
    down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
    cross_attention_dim=32,
    norm_num_groups=8,
)
UNET = BLOCKS | dict(sample_size=8, layers_per_block=1, attention_head_dim=(2, 4), use_linear_projection=True)


def unet(seed=0, **changes):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**UNET | changes).eval()


def inputs(size=(8, 8), seed=1, batch=2):
    """Latents, timesteps and text of one step."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, *size, generator=rng)
    return latents, torch.tensor([7, 500])[:batch], torch.randn(batch, 5, 32, generator=rng)


@torch.no_grad()
def step(model, size=(8, 8), **options):
    latents, t, text = inputs(size)
    return model(latents.to(model.dtype), t, text.to(model.dtype), **options).sample
