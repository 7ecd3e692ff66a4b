"""mmMamba's layer: the recorded outputs of the published code, seeding, state and padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.weights import image_batch, state_dict
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo.backbones._mamba2 import Mamba2Mixer
from zoo.backbones._mixer import AttentionShape
from zoo.backbones._state import LinearStateLayer, state_layer

PARITY = Path(__file__).parent / 'parity'


def recorded(name):
    manifest = json.loads((PARITY / f'{name}.json').read_text())
    arrays = np.load(PARITY / f'{name}.npz')
    c = manifest['config']
    mixer = Mamba2Mixer(c['hidden_size'], c['num_heads'], c['num_kv_heads'], c['head_dim'], layer_idx=0)
    weights = state_dict(manifest, arrays)
    if 'wvkqgdt.weight' in weights:  # the merged layout: rows of v, k, q, g, dt
        kv, full = mixer.k_proj.out_features, mixer.q_proj.out_features
        rows = weights.pop('wvkqgdt.weight').split((kv, kv, full, full, mixer.num_heads))
        weights |= {f'{n}_proj.weight': w for n, w in zip(('v', 'k', 'q', 'g', 'in'), rows)}
        weights['g_norm.weight'] = weights.pop('g_norm_swish_gate.weight')
    mixer.load_state_dict(weights)
    inputs = {k: image_batch(v) for k, v in manifest['inputs'].items()}
    return mixer, inputs, {k: torch.from_numpy(arrays[v]) for k, v in manifest['outputs'].items()}


def assert_close(actual, expected, relative=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def small(**kwargs):
    torch.manual_seed(0)
    mixer = Mamba2Mixer(32, 4, 2, 8, layer_idx=1, **kwargs)
    mixer.seed_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():  # away from the seeds, where dt does not depend on the input and the conv is the identity
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize('name', ['mmmamba_layer', 'mmmamba_layer_converted'])
def test_matches_the_published_layer(name):
    mixer, inputs, expected = recorded(name)
    u = inputs['hidden_states'].requires_grad_()
    cache = DynamicCache()
    y, weights = mixer(u, past_key_values=cache)
    assert weights is None
    assert_close(y, expected['y'])
    (y * inputs['cotangent']).sum().backward()
    assert_close(u.grad, expected['grad_hidden_states'], 2e-5)
    grads = {k.removeprefix('grad_'): v for k, v in expected.items() if k.startswith('grad_') and 'hidden' not in k}
    for key, grad in grads.items():
        assert_close(mixer.get_parameter(key).grad, grad, 2e-5)
    assert name == 'mmmamba_layer_converted' or len(grads) == 6
    if 'conv_state' in expected:
        assert_close(cache.layers[0].conv_states[0], expected['conv_state'])
        assert_close(cache.layers[0].recurrent_states[0], expected['ssm_state'])
    else:
        assert_close(mixer.heads(u).transpose(1, 2), expected['distill_pred'])


OPTIONS = [
    {},
    dict(use_conv=False),
    dict(use_gnorm=False, use_A=False),
    dict(use_D=True, use_qknorm=True, mimic_init=False),
    dict(qkv_bias=True, o_bias=True, q_norm=torch.nn.RMSNorm(8), k_norm=torch.nn.RMSNorm(8), conv_width=4),
]


@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: '-'.join(o) or 'default')
def test_chunks_and_single_tokens_equal_one_pass(options):
    mixer = small(**options)
    u = torch.randn(2, 83, 32)
    with torch.no_grad():
        expected = mixer(u)[0]
        cache, parts = DynamicCache(), []
        for chunk in u.split((1, 64, 1, 1, 13, 1, 1, 1), 1):
            parts.append(mixer(chunk, cache=cache)[0])
    assert_close(torch.cat(parts, 1), expected)
    slot = cache.layers[1]
    assert slot.get_seq_length() == 83 and cache.get_mask_sizes(1, 1) == (84, 0)
    assert slot.recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: '-'.join(o) or 'default')
def test_padding_leaves_output_and_state_untouched(options):
    mixer = small(**options)
    u = torch.randn(1, 20, 32)
    padded = torch.cat((torch.full((1, 7, 32), float('nan')), u), 1)
    mask = torch.ones(1, 27)
    mask[:, :7] = 0
    plain, left = DynamicCache(), DynamicCache()
    with torch.no_grad():
        expected = mixer(u, past_key_values=plain)[0]
        first = mixer(padded[:, :5], padding_mask=mask[:, :5], past_key_values=left)[0]
        second = mixer(padded[:, 5:], padding_mask=mask, past_key_values=left)[0]
        assert first.isfinite().all()
        assert_close(second[:, 2:], expected)
        assert_close(left.layers[1].recurrent_states[0], plain.layers[1].recurrent_states[0])
        right = DynamicCache()
        tail = torch.cat((u, torch.randn(1, 6, 32)), 1)
        mixer(tail, padding_mask=torch.arange(26)[None] < 20, past_key_values=right)
        assert_close(right.layers[1].recurrent_states[0], plain.layers[1].recurrent_states[0])


def test_seeds_of_the_recipe():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True)
    attention = LlamaAttention(config, 3)
    shape = AttentionShape(32, 4, 2, 8, layer_idx=3, qkv_bias=True, o_bias=True)
    mixer, again = (
        Mamba2Mixer.from_attention(attention, shape, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(mixer.parameters(), again.parameters()))
    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
        for kind in ('weight', 'bias'):
            mine, theirs = getattr(getattr(mixer, name), kind), getattr(getattr(attention, name), kind)
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    u = torch.randn(2, 9, 32)
    raw = mixer._project(u)
    v, k, q = mixer._convolve(raw, None)
    assert torch.equal(torch.cat([v[:, :, ::2].flatten(2), k.flatten(2), q.flatten(2)], -1), F.silu(raw))
    assert not mixer.in_proj.weight.any() and torch.equal(mixer.A_log_bias, torch.ones(4))
    dt = F.softplus(mixer.dt_bias)
    assert 0.00099 <= dt.min() and dt.max() <= 0.1001
    assert 0 < mixer.g_proj.weight.abs().max() <= 2**-2.5 * (6 / 64) ** 0.5
    roles = mixer.parameter_roles()
    assert set(roles.values()) == {'new', 'qkv', 'output'} and roles['dt_bias'] == 'new'
    assert {n for n, r in roles.items() if r == 'output'} == {'o_proj.weight', 'o_proj.bias'}


def test_the_state_refuses_a_slot_that_holds_keys():
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match='keys and values of 3 tokens'):
        state_layer(cache, 0)
    assert isinstance(state_layer(cache, 2), LinearStateLayer) and len(cache.layers) == 3


def test_beams_and_reset_of_the_state():
    mixer, cache = small(), DynamicCache()
    u = torch.randn(3, 9, 32)
    with torch.no_grad():
        mixer(u, past_key_values=cache)
        slot = cache.layers[1]
        before = slot.recurrent_states[0].clone()
        cache.layers[1].reorder_cache(torch.tensor([2, 0, 0]))
        assert torch.equal(slot.recurrent_states[0], before[[2, 0, 0]])
        slot.batch_repeat_interleave(2)
        assert slot.recurrent_states[0].shape[0] == 6 and slot.conv_states[0].shape[0] == 6
        slot.batch_select_indices(torch.tensor([0, 2, 4]))
        slot.reset()
        assert slot.get_seq_length() == 0
        assert_close(mixer(u, past_key_values=cache)[0], mixer(u)[0])
