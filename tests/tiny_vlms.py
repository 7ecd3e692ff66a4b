"""Tiny random models of the families that `zoo.linearize` takes, and inputs for them."""

import torch
import transformers

IMAGE = 250
TEXT = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SIGLIP = VISION | dict(model_type='siglip_vision_model', image_size=28, patch_size=7)
QWEN_VISION = dict(depth=2, num_heads=4, patch_size=7, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
QWEN_TOKENS = dict(image_token_id=IMAGE, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)
BOTH = dict(image_token_index=IMAGE, image_token_id=IMAGE)


def rope(*section, **kwargs):
    return dict(rope_type='default', rope_theta=10000.0, mrope_section=list(section), **kwargs)


def idefics(kind):
    vision = VISION | dict(model_type=kind, image_size=28, patch_size=7)
    return dict(text_config=dict(model_type='llama'), vision_config=vision, scale_factor=2, image_token_id=IMAGE)


# Family: class of the model without its suffix, class of the config, tokens an image, keyword arguments of the config.
VLMS = {
    'llava': (
        'Llava',
        16,
        dict(
            text_config=dict(model_type='llama'),
            vision_config=SIGLIP | dict(model_type='clip_vision_model', projection_dim=48),
            vision_feature_layer=-2,
            vision_feature_select_strategy='default',
            **BOTH,
        ),
    ),
    'smolvlm': ('SmolVLM', 4, idefics('smolvlm_vision') | dict(pad_token_id=0)),
    'idefics3': ('Idefics3', 4, idefics('idefics3_vision') | dict(pad_token_id=0)),
    'qwen2_vl': (
        'Qwen2VL',
        4,
        dict(
            text_config=dict(model_type='qwen2_vl_text', rope_parameters=rope(2, 3, 3)),
            vision_config=QWEN_VISION | dict(embed_dim=48, hidden_size=64, mlp_ratio=2),
            **QWEN_TOKENS,
        ),
    ),
    'qwen2_5_vl': (
        'Qwen2_5_VL',
        4,
        dict(
            text_config=dict(model_type='qwen2_5_vl_text', rope_parameters=rope(2, 3, 3)),
            vision_config=QWEN_VISION
            | dict(hidden_size=48, intermediate_size=96, out_hidden_size=64, window_size=28, fullatt_block_indexes=[1]),
            **QWEN_TOKENS,
        ),
    ),
    'qwen3_vl': (
        'Qwen3VL',
        4,
        dict(
            text_config=dict(
                model_type='qwen3_vl_text', head_dim=16, rope_parameters=rope(4, 2, 2, mrope_interleaved=True)
            ),
            vision_config=QWEN_VISION
            | dict(hidden_size=48, intermediate_size=96, out_hidden_size=64)
            | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
            **QWEN_TOKENS,
        ),
    ),
    'internvl': (
        'InternVL',
        4,
        dict(
            text_config=dict(model_type='qwen2'),
            vision_config=VISION | dict(model_type='internvl_vision', image_size=[28, 28], patch_size=[7, 7]),
            downsample_ratio=0.5,
            image_token_id=IMAGE,
        ),
    ),
    'paligemma': (
        'PaliGemma',
        16,
        dict(text_config=dict(model_type='gemma', head_dim=16), vision_config=SIGLIP, projection_dim=64, **BOTH),
    ),
    'gemma3': (
        'Gemma3',
        4,
        dict(
            text_config=dict(
                model_type='gemma3_text',
                head_dim=16,
                sliding_window=8,
                layer_types=['sliding_attention'] * 3 + ['full_attention'],
            ),
            vision_config=SIGLIP | dict(vision_use_head=False),
            mm_tokens_per_image=4,
            boi_token_id=251,
            eoi_token_id=252,
            **BOTH,
        ),
    ),
    'llava_onevision': (
        'LlavaOnevision',
        36,
        dict(
            text_config=dict(model_type='qwen2'),
            vision_config=SIGLIP | dict(vision_use_head=False),
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
            vision_feature_layer=-1,
            **BOTH,
        ),
    ),
}
TEXTS = {'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}


def build(family, seed=0, **text):
    """A random model in evaluation mode; `text` overrides sizes of its decoder."""
    torch.manual_seed(seed)
    if family in TEXTS:
        config = getattr(transformers, f'{TEXTS[family]}Config')(**TEXT | dict(head_dim=16) | text)
        return getattr(transformers, f'{TEXTS[family]}ForCausalLM')(config).eval()
    name, _, kwargs = VLMS[family]
    config = getattr(transformers, f'{name}Config')(**kwargs | {'text_config': TEXT | kwargs['text_config'] | text})
    model = getattr(transformers, f'{name}ForConditionalGeneration')(config).eval()
    if family == 'gemma3':  # zero at the start, which would hide the image
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def inputs(family, batch=2, text=11, seed=1):
    """Model inputs with an image (if the family sees any) in front of `text` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 200, (batch, text), generator=generator)
    if family in TEXTS:
        return dict(input_ids=words, attention_mask=torch.ones_like(words))
    image = torch.full((batch, VLMS[family][1]), IMAGE)
    if family.startswith('qwen'):
        edge = torch.ones(batch, 1, dtype=torch.long)
        image = torch.cat((252 * edge, image, 253 * edge), 1)
    ids = torch.cat((words[:, :2], image, words[:, 2:]), 1)
    out = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    shape = {'smolvlm': (1, 3), 'idefics3': (1, 3), 'llava_onevision': (2, 3)}.get(family, (3,))
    out['pixel_values'] = torch.randn(batch, *shape, 28, 28, generator=generator)
    is_image = (ids == IMAGE).long()
    if family.startswith('qwen'):
        out['pixel_values'] = torch.randn(16 * batch, 3 * 2 * 7 * 7, generator=generator)
        out['image_grid_thw'] = torch.tensor([[1, 4, 4]] * batch)
        out['mm_token_type_ids'] = is_image
    if family in ('paligemma', 'gemma3'):
        out['token_type_ids'] = is_image
    if family == 'llava_onevision':
        out['image_sizes'] = torch.tensor([[28, 28]] * batch)
    return out


def left_padded(batch, amount):
    """The same inputs with `amount` padding tokens in front of every row."""
    out = dict(batch)
    for name in ('input_ids', 'attention_mask', 'token_type_ids', 'mm_token_type_ids'):
        if name in batch:
            out[name] = torch.nn.functional.pad(batch[name], (amount, 0))
    return out
