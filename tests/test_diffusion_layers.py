"""Layers of diffusers in Triton kernels: same results, same names, and everything undone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import zoo
from zoo.diffusion.highres import _blend
from zoo.diffusion.layers import FastGEGLU, FastGroupNorm, FastGroupNormSiLU, fast_layers, plain_layers
from zoo.tools._unet_rows import build_pipeline, step_inputs

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(scope='module')
def pipe():
    return build_pipeline('sd15', DEVICE, torch.float32, True)[0]


@torch.no_grad()
def outputs(pipe) -> list[torch.Tensor]:
    args, named = step_inputs(pipe.unet, 64, 2)
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    image = pipe.vae.decode(z)[0]
    return [pipe.unet(*args, **named)[0], image, pipe.vae.encode(image).latent_dist.mean]


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_results_and_names_stay(pipe, backend):
    plain, names, classes = outputs(pipe), set(pipe.unet.state_dict()), [type(m) for m in pipe.unet.modules()]
    changed = fast_layers(pipe)
    try:
        kinds = [type(m) for m in (*pipe.unet.modules(), *pipe.vae.modules())]
        assert nn.GroupNorm not in kinds and {FastGEGLU, FastGroupNorm, FastGroupNormSiLU} <= set(kinds)
        assert fast_layers(pipe) == changed == sum(k.__module__.endswith('diffusion.layers') for k in kinds)
        assert set(pipe.unet.state_dict()) == names
        with zoo.kernel_backend(backend):
            for found in (outputs(pipe), outputs(copy.deepcopy(pipe))):
                for x, y in zip(found, plain, strict=True):
                    assert ((x - y).norm() / y.norm()).item() < 1e-5
    finally:
        plain_layers(pipe)
    assert [type(m) for m in pipe.unet.modules()] == classes
    assert all(torch.equal(x, y) for x, y in zip(outputs(pipe), plain, strict=True))


def test_blocks_that_scale_after_the_norm_keep_their_activation():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=16, time_embedding_norm='scale_shift').eval()
    x, temb = torch.randn(2, 8, 5, 7), torch.randn(2, 16)
    plain = block(x, temb)
    assert fast_layers(block) == 2 and type(block.norm2) is FastGroupNorm
    torch.testing.assert_close(block(x, temb), plain)


def test_blocks_of_videos_keep_their_activation():
    from diffusers.models.resnet import TemporalResnetBlock

    torch.manual_seed(0)
    block = TemporalResnetBlock(32, 32, temb_channels=16).eval()
    x, temb = torch.randn(1, 32, 3, 5, 7), torch.randn(1, 3, 16)
    plain = block(x, temb)
    fast_layers(block)
    torch.testing.assert_close(block(x, temb), plain)


def test_gradients_and_autocast():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=('DownEncoderBlock2D',),
                        up_block_types=('UpDecoderBlock2D',)).to(DEVICE)  # fmt: skip
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    grads = []
    for change in (lambda m: None, fast_layers):
        change(vae)
        vae.zero_grad()
        vae(x).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert vae.encoder.conv_norm_out(torch.randn(1, 8, 4, 4, device=DEVICE)).dtype == torch.bfloat16


@pytest.mark.parametrize('axis', [2, 3])
def test_tiles_blend_as_diffusers_has_it(axis):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=('DownEncoderBlock2D',),
                        up_block_types=('UpDecoderBlock2D',))  # fmt: skip
    theirs = vae.blend_v if axis == 2 else vae.blend_h
    for extent in (0, 3, 50):
        a, b = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 7, 7)
        if axis == 2:
            a = a[:, :, :, :7]
        else:
            a = a[:, :, :7]
        torch.testing.assert_close(_blend(axis)(a, b.clone(), extent), theirs(a, b.clone(), extent))
