"""LinFusion on transformers of diffusers whose self-attention is plain."""

import pytest
import tiny_diffusion as tiny
import torch
from diffusers import AutoModel, DiTTransformer2DModel, PixArtTransformer2DModel
from zoo.backbones.linfusion import LinFusion

import zoo.diffusion


def dits():
    shared = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
                  norm_num_groups=4)  # fmt: skip
    pixart = PixArtTransformer2DModel(**shared, out_channels=8, cross_attention_dim=16, caption_channels=12)
    return {'pixart': pixart, 'dit': DiTTransformer2DModel(**shared, out_channels=8, num_embeds_ada_norm=10)}


def dit_step(model, size=(8, 8)):
    latents, t, _ = tiny.inputs(size)
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(2, 3, 12, generator=rng)
    sizes = {'resolution': None, 'aspect_ratio': None}
    pixart = isinstance(model, PixArtTransformer2DModel)
    given = dict(class_labels=torch.tensor([1, 2]))
    if pixart:
        given = dict(encoder_hidden_states=text, added_cond_kwargs=sizes)
    with torch.no_grad():
        return model(latents, timestep=t, **given).sample


@pytest.mark.parametrize('name', ['pixart', 'dit'])
def test_plain_dits(name, tmp_path):
    model = dits()[name].eval()
    plain_class, before = type(model), dit_step(model)
    assert before.std() > 0
    linear = LinFusion.attach(model, init='random', projection_mid_dim=4)
    assert len(linear.layers) == 2 and linear.layers['transformer_blocks.0.attn1'].to_q.bias is not None
    expected = dit_step(model)
    assert not torch.equal(before, expected)
    model.save_pretrained(tmp_path / 'model'), linear.save_pretrained(tmp_path / 'layers')
    assert torch.equal(dit_step(AutoModel.from_pretrained(str(tmp_path / 'model'))), expected)
    with pytest.raises(RuntimeError, match='import zoo.diffusion'):  # the kind that diffusers raises derives from it
        plain_class.from_pretrained(tmp_path / 'model')
    linear.detach()
    assert type(model) is plain_class and torch.equal(dit_step(model), before)
    LinFusion.attach(model, tmp_path / 'layers')
    assert torch.equal(dit_step(model), expected)
    assert type(model) in zoo.diffusion.MODELS
