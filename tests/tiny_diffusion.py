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


def load_ip_adapter(model):
    """Random weights; gives arguments of a step that uses them."""
    rng = torch.Generator().manual_seed(0)
    shape = lambda *s: torch.randn(*s, generator=rng) * 0.2  # noqa: E731
    image_proj = {'proj.weight': shape(4 * 32, 16), 'proj.bias': shape(4 * 32)}
    image_proj |= {'norm.weight': shape(32), 'norm.bias': shape(32)}
    adapter = {}
    for i, name in enumerate(n for n in model.attn_processors if 'attn2' in n):
        width = model.get_submodule(name.removesuffix('.processor')).to_q.weight.shape[0]
        adapter |= {f'{2 * i + 1}.to_{x}_ip.weight': shape(width, 32) for x in 'kv'}
    model._load_ip_adapter_weights([{'image_proj': image_proj, 'ip_adapter': adapter}])
    return dict(added_cond_kwargs={'image_embeds': [torch.randn(2, 1, 16, generator=rng)]})


def pipeline(seed=0, **changes):
    """Stable Diffusion in miniature; its tokenizer knows letters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    letters = 'abcdefghijklmnopqrstuvwxyz'
    words = [*letters, *(x + '</w>' for x in letters), '<|startoftext|>', '<|endoftext|>']
    text = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
    )
    found = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12),
        unet=unet(seed, **changes),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found
