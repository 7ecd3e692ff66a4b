"""A HoVLE of 0.1 M parameters, its students, and prompts for them."""

import torch
from zoo.backbones.hovle import HoVLEConfig, HoVLEForConditionalGeneration
from zoo.backbones.mmmamba import from_hovle

IMAGE, PER_TILE = 190, 4
LAYERS = {'linear': [0, 1, 2, 3], 'hybrid': [1, 2], 'softmax first': [1, 2, 3]}


def config(**top):
    sizes = dict(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    first = dict(sizes, image_size=56, llm_vocab_size=200, llm_hidden_size=32, img_context_token_id=IMAGE)
    second = dict(sizes, vocab_size=200, rope_theta=1000000, rms_norm_eps=1e-5)
    first.update(top.pop('embedding_config', {}))
    second.update(top.pop('llm_config', {}))
    return HoVLEConfig(embedding_config=first, llm_config=second, force_image_size=56, **top)


def teacher(seed=0, **top):
    torch.manual_seed(seed)
    model = HoVLEForConditionalGeneration(config(**top)).eval()
    stir(model)
    return model


def student(kind='linear', **top):
    model = from_hovle(teacher(**top), LAYERS[kind])
    stir(model, 0.05)
    return model


def model(kind, **top):
    return teacher(**top) if kind == 'softmax' else student(kind, **top)


@torch.no_grad()
def stir(model, scale=0.2):
    """Away from the initial values, at which little depends on the input."""
    for p in model.parameters():
        p.add_(scale * torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1))


def prompt(tiles, length=12, seed=0):
    """Ids (1, length) with the images' ids in them, and tiles (T, 3, 56, 56) or None."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 180, (length,), generator=generator)
    start = 2
    for count in tiles:
        ids[start : start + count * PER_TILE] = IMAGE
        start += count * PER_TILE + 1
    pixels = torch.randn(sum(tiles), 3, 56, 56, generator=generator) if tiles else None
    return ids[None], pixels


def batch(*prompts, side='left'):
    """Prompts of different lengths as one padded batch: keyword arguments of the model."""
    width = max(ids.shape[1] for ids, _ in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, (row, _) in enumerate(prompts):
        where = slice(width - row.shape[1], None) if side == 'left' else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    pixels = [p for _, p in prompts if p is not None]
    return dict(input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pixels) if pixels else None)
