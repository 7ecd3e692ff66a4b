"""The UNets of `zoo bench unet` and what each row puts in the place of their self-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from torch import nn

from zoo.backbones._linfusion_layer import softmax_layers
from zoo.backbones.linfusion import LinearSelfAttention, LinFusion
from zoo.diffusion.layers import fast_layers, plain_layers


def unet_config(name: str, quick: bool) -> tuple[dict, int | str | None]:
    """Arguments of UNet2DConditionModel, and the width of LinFusion's MLPs as published for it.

    Args:
        name: `sd15` or `sdxl`.
        quick: two narrow levels in place of the real sizes.
    """
    cross, plain = 'CrossAttn{}Block2D', '{}Block2D'
    blocks = lambda side, kinds: tuple(k.format(side) for k in kinds)  # noqa: E731
    if name == 'sd15':
        down, config = [cross] * 3 + [plain], dict(sample_size=64, cross_attention_dim=768)
        config |= dict(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8)
        rule = None
    else:
        down, rule = [plain, cross, cross], 'div:16'
        config = dict(sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280))
        config |= dict(attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10))
        config |= dict(use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256)
        config |= dict(projection_class_embeddings_input_dim=2816)
    config |= dict(down_block_types=blocks('Down', down), up_block_types=blocks('Up', down[::-1]))
    if quick:
        small = dict(block_out_channels=(32, 64, 64, 64)[: len(down)], layers_per_block=1, norm_num_groups=8)
        small |= dict(attention_head_dim=4, cross_attention_dim=32, sample_size=8)
        small |= {'transformer_layers_per_block': 1} if name == 'sdxl' else {}
        config |= small
    return config, rule


def build(name: str, device: str, dtype: torch.dtype, quick: bool, keep_teacher: bool = True):
    """A UNet with random weights and its LinFusion.

    Args:
        name: `sd15` or `sdxl`.
        device: where.
        dtype: of its weights.
        quick: see `unet_config`.
        keep_teacher: whether the softmax layers stay.
    """
    config, rule = unet_config(name, quick)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config)
    unet = nn.Module.to(unet, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    softmax = softmax_layers(unet)
    linear = LinFusion.attach(unet, projection_mid_dim=rule, keep_teacher=keep_teacher)
    for layer in softmax.values():
        layer.to('cpu')  # until a row has them in place
    return unet, linear


def step_inputs(unet: nn.Module, size: int, batch: int) -> tuple[tuple, dict]:
    """Random arguments of one step.

    Args:
        unet: what takes them.
        size: side in pixels, 8 to a latent.
        batch: images, twice that with guidance.
    """
    rng = torch.Generator(unet.device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, device=unet.device).to(unet.dtype)  # noqa: E731
    c = unet.config
    latents = draw(batch, 4, size // 8, size // 8).contiguous(memory_format=torch.channels_last)
    named = {'encoder_hidden_states': draw(batch, 77, c.cross_attention_dim), 'return_dict': False}
    if c.addition_embed_type:
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        named['added_cond_kwargs'] = {'text_embeds': draw(batch, pooled), 'time_ids': draw(batch, 6)}
    return (latents, torch.full((batch,), 500, device=unet.device)), named


# --------------------------------------------------------------------------------------------------------------------
# The rows


class Formula(LinearSelfAttention):
    """The published order of operations: keys and values times N^-1/2 each, all in the weights' dtype."""

    def forward(self, hidden_states, *_, **__):
        x, elu = hidden_states, nn.functional.elu
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q = split(elu(self.to_q(x + self.to_q_(x))) + 1)
        k = split(elu(self.to_k(x + self.to_k_(x))) + 1)
        z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
        kv = (k.transpose(-2, -1) * x.shape[1] ** -0.5) @ (split(self.to_v(x)) * x.shape[1] ** -0.5)
        return self.to_out[1](self.to_out[0]((q @ kv / z).transpose(1, 2).flatten(2)))


@contextlib.contextmanager
def _fused(unet: nn.Module) -> Iterator[None]:
    """What a user of diffusers calls, and afterwards nothing left of it: unfusing keeps the copies of the weights."""
    unet.fuse_qkv_projections()
    try:
        yield
    finally:
        unet.unfuse_qkv_projections()
        for layer in unet.modules():
            if isinstance(layer, LinearSelfAttention):
                layer.fuse_projections(False)
            elif isinstance(layer, Attention):
                layer.fused_projections = False
                for name in ('to_qkv', 'to_kv'):
                    layer._modules.pop(name, None)


@contextlib.contextmanager
def _fast(unet: nn.Module) -> Iterator[None]:
    fast_layers(unet)
    try:
        yield
    finally:
        plain_layers(unet)


@contextlib.contextmanager
def _softmax(linear: LinFusion) -> Iterator[None]:
    """The softmax layers in place, the linear ones in main memory; afterwards the other way round."""
    device = linear.device
    with linear.teacher() as unet:
        softmax = [unet.get_submodule(name) for name in linear.layers]
        linear.to('cpu')
        try:
            yield
        finally:
            linear.to(device)
    for layer in softmax:
        layer.to('cpu')


@contextlib.contextmanager
def _in_place(linear: LinFusion, row: str) -> Iterator[None]:
    layers = list(linear.layers.values())
    for layer in layers:
        if row == 'none':
            layer.forward = lambda hidden_states, *_, **__: hidden_states
        elif row == 'formula':
            layer.__class__ = Formula
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = LinearSelfAttention
            layer.__dict__.pop('forward', None)


@contextlib.contextmanager
def self_attention(linear: LinFusion, row: str) -> Iterator[None]:
    """The UNet with the self-attention of a row; weights of the others are in main memory meanwhile.

    Args:
        linear: the UNet's LinFusion.
        row: `sdpa`, `linfusion`, `formula` or `none`; `sdpa fused` and `linfusion fused` are after
            `fuse_qkv_projections()` of the UNet, which also makes one product of keys and values of the text;
            `sdpa fast` and `linfusion fast` after that and `fast_layers`.
    """
    kind, _, more = row.partition(' ')
    with contextlib.ExitStack() as stack:
        stack.enter_context(_softmax(linear) if kind == 'sdpa' else _in_place(linear, kind))
        if more in ('fused', 'fast'):
            stack.enter_context(_fused(linear.model))
        if more == 'fast':
            stack.enter_context(_fast(linear.model))
        yield


def build_pipeline(name: str, device: str, dtype: torch.dtype, quick: bool):
    """A linear text-to-image pipeline with random weights, without text encoders.

    Args:
        name: `sd15` or `sdxl`.
        device: where.
        dtype: of its weights.
        quick: see `unet_config`.

    Returns:
        The pipeline, and random embeddings of a prompt and of none as its inputs.
    """
    unet, linear = build(name, device, dtype, quick, keep_teacher=False)
    linear.fuse()
    widths = (8, 8, 16, 16) if quick else (128, 256, 512, 512)
    size = dict(block_out_channels=widths, layers_per_block=1 if quick else 2, norm_num_groups=4 if quick else 32)
    blocks = dict(down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
    with torch.device(device):
        # the fp16 VAE that SDXL users take; the original one runs in fp32
        vae = AutoencoderKL(**size, **blocks, sample_size=512, force_upcast=False)
    vae = nn.Module.to(vae, dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    parts = dict(vae=vae, unet=unet, text_encoder=None, tokenizer=None, scheduler=DDIMScheduler())
    text = lambda *shape: torch.randn(1, *shape, device=device).to(dtype)  # noqa: E731
    inputs = {key: text(77, unet.config.cross_attention_dim) for key in ('prompt_embeds', 'negative_prompt_embeds')}
    if name == 'sd15':
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)  # fmt: skip
    else:
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs |= {f'{key}pooled_prompt_embeds': text(pooled) for key in ('', 'negative_')}
    return pipe, inputs
