"""HoVLE: recorded outputs of the published code, generation over a cache, files of the published layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.weights import image_batch, state_dict
from tiny_hovle import IMAGE, batch, config, model, prompt, student, teacher
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from zoo.backbones.hovle import CACHE_FIELD, HoVLEConfig, HoVLEForConditionalGeneration

import zoo.vlm

PARITY = Path(__file__).parent / 'parity'
KINDS = ['softmax', 'linear', 'hybrid']
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=[IMAGE])


@pytest.mark.parametrize('name', ['hovle_tiny', 'hovle_variant', 'hovle_post'])
@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_matches_the_published_code(name, attention):
    manifest, arrays = json.loads((PARITY / f'{name}.json').read_text()), np.load(PARITY / f'{name}.npz')
    net = HoVLEForConditionalGeneration(HoVLEConfig(**manifest['config'], attn_implementation=attention)).eval()
    assert net.config._attn_implementation == attention
    net.load_state_dict(state_dict(manifest, arrays))
    assert sum(p.numel() for p in net.parameters()) == manifest['params']
    ids = torch.tensor(manifest['inputs']['input_ids']['values'])
    pixels = image_batch(manifest['inputs']['pixel_values'])
    with torch.no_grad():
        out = net(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    assert out.logits.dtype == torch.float32
    assert (out.logits - torch.from_numpy(arrays['out/logits'])).abs().max() < 2e-4
    assert len(out.hidden_states) == net.config.num_hidden_layers + 1
    if 'out/embedding_out' in arrays:
        first = out.hidden_states[net.config.num_embedding_layers][..., ::4]
        assert (first - torch.from_numpy(arrays['out/embedding_out'])).abs().max() < 2e-4


def test_published_size():
    with torch.device('meta'):
        net = HoVLEForConditionalGeneration(HoVLEConfig())
    keys = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 2_606_327_808 and len(keys) == 236
    assert keys['embedding_model.encoder.7.attention.wqkv.weight'].shape == (4096, 2048)
    assert keys['language_model.model.layers.23.feed_forward.w2.weight'].shape == (2048, 8192)
    assert keys['embedding_model.vision_embeddings.position_embedding'].shape == (1, 1025, 2048)
    assert keys['embedding_model.pixel_shuffle_proj.0.weight'].shape == (2048, 8192)
    for key in ('language_model.output.weight', 'language_model.model.tok_embeddings.weight'):
        assert keys[key].shape == keys['embedding_model.llm_text_embeddings.weight'].shape == (92553, 2048)
    assert net.config.tokens_per_tile == 256 and net.config.image_token_id == 92546
    assert set(net.generation_config.eos_token_id) == {2, 1163, 92542, 92543}


def test_an_untrained_model_is_initialised():
    net = AutoModelForImageTextToText.from_config(config())
    table = net.embedding_model.vision_embeddings.position_embedding
    assert abs(float(table.detach().std()) - 1) < 0.1
    assert abs(float(net.language_model.output.weight.detach().std()) - 0.02) < 2e-3
    assert (net.layers[0].attention_norm.weight == 1).all()
    unused = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert unused == {
        'embedding_model.vision_embeddings.class_embedding',
        'language_model.model.tok_embeddings.weight',
    }
    net(input_ids=prompt([1])[0], pixel_values=prompt([1])[1]).logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize('kind', [*KINDS, 'softmax first'])
@pytest.mark.parametrize('tiles', [[], [1, 2]])
def test_generation_over_a_cache(kind, tiles):
    net, (ids, pixels) = model(kind), prompt(tiles, 18)
    inputs = dict(input_ids=ids, pixel_values=pixels)
    cached = net.generate(**inputs, **GREEDY)
    assert torch.equal(cached, net.generate(**inputs, **GREEDY, use_cache=False))
    for size in (5, 17):
        assert torch.equal(cached, net.generate(**inputs, **GREEDY, prefill_chunk_size=size)), size
    assert cached.shape == (1, 23)


@pytest.mark.parametrize('kind', [*KINDS, 'softmax first'])
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@torch.no_grad()
def test_pieces_of_a_prompt_give_the_same_logits(kind, attention):
    net = model(kind)
    net.set_attn_implementation(attention)
    whole = batch(prompt([2, 1], 20), prompt([1], 13, seed=1))
    expected = net(**whole).logits[:, -3:]
    for size in (1, 7, 19):
        out = net(**whole, use_cache=True, prefill_chunk_size=size, logits_to_keep=3)
        assert (out.logits - expected).abs().max() < 2e-5, size
    cache, mask = DynamicCache(config=net.config), whole['attention_mask']
    for start, stop in ((0, 18), (18, 19), (19, 20)):
        pixels = whole['pixel_values'] if start == 0 else None
        ids = whole['input_ids'][:, start:stop]
        out = net(input_ids=ids, pixel_values=pixels, attention_mask=mask[:, :stop], past_key_values=cache)
    assert (out.logits[:, -1] - expected[:, -1]).abs().max() < 2e-5
    assert getattr(out, CACHE_FIELD) is cache and cache.get_seq_length() == 20 and len(cache.layers) == 4


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [None, 4])
def test_left_padding_changes_nothing(kind, size):
    net = model(kind)
    prompts = [prompt([2, 1], 20), prompt([1], 13, seed=1), prompt([], 5, seed=2)]
    together = net.generate(**batch(*prompts), **GREEDY, prefill_chunk_size=size)
    for row, (ids, pixels) in zip(together, prompts):
        alone = net.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
        assert row[20:].tolist() == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_right_padding_changes_nothing(kind):
    net, prompts = model(kind), [prompt([1], 16), prompt([1], 9, seed=1)]
    together = net(**batch(*prompts, side='right')).logits
    for row, (ids, pixels) in zip(together, prompts):
        alone = net(input_ids=ids, pixel_values=pixels).logits[0]
        assert (row[: len(alone)] - alone).abs().max() < 2e-5


@pytest.mark.parametrize('kind', KINDS)
def test_beams_and_several_answers(kind):
    net, inputs = model(kind), batch(prompt([2], 14), prompt([1, 2], 20, seed=1))
    options = dict(max_new_tokens=5, eos_token_id=None, pad_token_id=0, suppress_tokens=[IMAGE])
    beams = net.generate(**inputs, **options, num_beams=3, num_return_sequences=2, do_sample=False)
    again = net.generate(**inputs, **options, num_beams=3, num_return_sequences=2, do_sample=False, use_cache=False)
    assert torch.equal(beams, again) and beams.shape == (4, 25)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(net.generate(**inputs, **options, do_sample=True, num_return_sequences=3))
    assert torch.equal(*drawn) and len({tuple(row.tolist()) for row in drawn[0]}) > 2


@pytest.mark.parametrize('kind', KINDS)
def test_a_conversation_goes_on_from_its_cache(kind):
    net, (ids, pixels) = model(kind), prompt([1], 12)
    first = net.generate(input_ids=ids, pixel_values=pixels, **GREEDY, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt([], 4, seed=5)[0]], 1)
    fresh = net.generate(input_ids=more, pixel_values=pixels, **GREEDY)
    going_on = net.generate(input_ids=more, **GREEDY, **{CACHE_FIELD: first[CACHE_FIELD]})
    assert torch.equal(fresh, going_on)


@pytest.mark.parametrize('kind', KINDS)
def test_generation_from_vectors(kind):
    net, inputs = model(kind), batch(prompt([1], 12), prompt([], 7, seed=2))
    ids = inputs['input_ids']
    embeds = net.get_input_embeddings()(ids).detach().clone()
    embeds[ids == IMAGE] = net.get_image_features(inputs['pixel_values']).flatten(0, 1).detach()
    expected = net.generate(**inputs, **GREEDY)[:, 12:]
    for size in (None, 5):
        made = net.generate(
            inputs_embeds=embeds, attention_mask=inputs['attention_mask'], **GREEDY, prefill_chunk_size=size
        )
        assert torch.equal(made, expected)


def test_generation_computes_logits_of_the_last_position_only():
    for kind in KINDS:
        net, rows = model(kind), []
        net.language_model.output.register_forward_hook(lambda m, args, out, rows=rows: rows.append(out.shape[1]))
        net.generate(input_ids=prompt([1], 30)[0], pixel_values=prompt([1], 30)[1], **GREEDY, prefill_chunk_size=8)
        assert rows == [1] * GREEDY['max_new_tokens']


def test_a_static_cache_serves_the_teacher():
    net, (ids, pixels) = teacher(), prompt([1], 12)
    expected = net.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
    got = net.generate(input_ids=ids, pixel_values=pixels, **GREEDY, cache_implementation='static')
    assert torch.equal(got, expected)


@torch.no_grad()
def test_the_decoding_step_does_not_look_at_the_mask():
    """Reading the mask's values would make every step wait for the device."""
    for kind in KINDS:
        net, whole = model(kind), batch(prompt([1], 12))
        cache = DynamicCache(config=net.config)
        net(**whole, past_key_values=cache)
        step = dict(input_ids=torch.tensor([[7]]), past_key_values=cache, position_ids=torch.tensor([[12]]))
        expected = net(**step).logits
        cache = DynamicCache(config=net.config)
        net(**whole, past_key_values=cache)
        unread = torch.zeros(1, 13, dtype=torch.long)  # as if all were padding
        assert torch.equal(net(**step | dict(past_key_values=cache), attention_mask=unread).logits, expected)


def test_post_shuffle_generates_over_a_cache():
    net = teacher(embedding_config=dict(pixel_shuffle_loc='post'))
    prompts = [prompt([2], 14), prompt([1, 1], 15, seed=1), prompt([], 6, seed=2)]
    together = net.generate(**batch(*prompts), **GREEDY)
    for row, (ids, pixels) in zip(together, prompts):
        alone = net.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
        assert torch.equal(alone, net.generate(input_ids=ids, pixel_values=pixels, **GREEDY, use_cache=False))
        assert row[15:].tolist() == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_checkpointed_gradients(kind):
    net, inputs = model(kind).train(), batch(prompt([1], 12), prompt([1], 9, seed=1), side='right')
    labels = inputs['input_ids'].masked_fill(inputs['attention_mask'] == 0, -100)
    grads = []
    for on in (False, True):
        if on:
            net.gradient_checkpointing_enable()
        net.zero_grad()
        out = net(**inputs, labels=labels)
        assert getattr(out, CACHE_FIELD) is None
        out.loss.backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert net.layers[0].gradient_checkpointing and len(grads[0]) > 30
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name
    shifted = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(shifted, labels[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)


@torch.no_grad()
def test_other_outputs():
    net, (ids, pixels) = teacher(), prompt([1], 12)
    net.set_attn_implementation('eager')
    out = net(input_ids=ids, pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 4 and out.attentions[0].shape == (1, 4, 12, 12)
    assert out.attentions[3].triu(1).abs().max() == 0
    as_tuple = net(input_ids=ids, pixel_values=pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)
    embeds = net.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = net.get_image_features(pixels).flatten(0, 1)
    assert torch.equal(net(inputs_embeds=embeds).logits, out.logits)
    flags = torch.tensor([0, 1])
    two = torch.cat([torch.randn_like(pixels), pixels])
    assert torch.equal(net(input_ids=ids, pixel_values=two, image_flags=flags).logits, out.logits)
    picked = net(input_ids=ids, pixel_values=pixels, logits_to_keep=torch.tensor([3, 11])).logits
    assert torch.allclose(picked, out.logits[:, [3, 11]], atol=1e-6)


def test_contradicting_inputs_are_refused():
    net, (ids, pixels) = teacher(), prompt([2], 14)
    with pytest.raises(ValueError, match='8 image ids, but pixel_values hold 1 tiles of 4'):
        net(input_ids=ids, pixel_values=pixels[:1])
    with pytest.raises(ValueError, match=r'tiles \(T, 3, H, W\)'):
        net(input_ids=ids, pixel_values=pixels[None])
    with pytest.raises(ValueError, match='not both'):
        net(input_ids=ids, inputs_embeds=torch.zeros(1, 14, 32))
    with pytest.raises(ValueError, match='layers_block_type'):
        teacher(llm_config=dict(layers_block_type=['mamba2', 'mha']))
    with pytest.raises(ValueError, match='do not divide'):
        config(llm_config=dict(num_key_value_heads=3))


# Files


def published_config(tmp_path):
    """config.json as the hub has it: remote code, an attention implementation that is not installed."""
    values = json.loads((tmp_path / 'config.json').read_text())
    module = 'modeling_internvl_chat.InternVLChatModel'
    values['auto_map'] = {'AutoConfig': 'configuration_internvl_chat.InternVLChatConfig', 'AutoModel': module}
    values['auto_map']['AutoModelForCausalLM'] = values['auto_map']['AutoModelForImageTextToText'] = module
    values['embedding_config']['attn_implementation'] = values['llm_config']['attn_implementation'] = (
        'flash_attention_2'
    )
    values['torch_dtype'] = 'bfloat16'
    del values['dtype']
    (tmp_path / 'config.json').write_text(json.dumps(values))


def test_published_layout_round_trip(tmp_path):
    net, inputs = teacher(), prompt([1], 12)
    net.save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    keys = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']
    assert set(keys) == set(net.state_dict())
    values = json.loads((tmp_path / 'config.json').read_text())
    assert values['model_type'] == 'internvl_chat' and values['architectures'] == ['InternVLChatModel']
    assert values['llm_config']['rope_theta'] == 1000000 and values['llm_config']['rope_scaling'] is None
    assert values['embedding_config']['model_type'] == 'holistic_embedding'
    published_config(tmp_path)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(again) is HoVLEForConditionalGeneration and not again.training
        assert torch.equal(again(*inputs).logits, net(*inputs).logits)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype='auto').dtype == torch.bfloat16
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation='eager')
    assert eager.config._attn_implementation == 'eager'
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize('kind', ['softmax', 'hybrid'])
def test_more_tokens_survive_the_file(tmp_path, kind):
    net, inputs = model(kind), prompt([1], 12)
    before = net(*inputs).logits
    net.resize_token_embeddings(210)
    assert net.config.vocab_size == 210 and not net.language_model.model.tok_embeddings.weight.requires_grad
    net.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    logits = again(*inputs).logits
    assert torch.equal(logits, net(*inputs).logits) and torch.allclose(logits[..., :200], before, atol=1e-6)
    assert 'vocab_size' not in json.loads((tmp_path / 'config.json').read_text())


def test_scaled_rotary_embedding_survives_the_file(tmp_path):
    scaling = {'type': 'dynamic', 'factor': 3.0}
    config(llm_config=dict(rope_scaling=scaling, rope_theta=123.0)).save_pretrained(tmp_path)
    text = json.loads((tmp_path / 'config.json').read_text())['llm_config']
    assert text['rope_scaling'] == scaling and text['rope_theta'] == 123.0
    assert AutoConfig.from_pretrained(tmp_path).llm_config.rope_parameters['rope_theta'] == 123.0


def test_files_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    net = teacher()
    net.save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    weights = load_file(file)
    key = 'language_model.model.layers.1.attention.wo.weight'

    def load(changed):
        save_file(changed, file, metadata={'format': 'pt'})
        return AutoModelForImageTextToText.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f'1 missing: {key}'):
        load({k: v for k, v in weights.items() if k != key})
    with pytest.raises(ValueError, match='1 unknown to the model: something.else'):
        load(weights | {'something.else': torch.zeros(1)})
    with pytest.raises(ValueError, match=rf'1 of another size: {key} \(8, 8\), not \(32, 32\)'):
        load(weights | {key: torch.zeros(8, 8)})
    save_file(weights, file, metadata={'format': 'pt'})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='model.safetensors is cut off or damaged'):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_an_internvl_with_a_vision_encoder_is_told_apart(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'internvl_chat', 'vision_config': {}}))
    with pytest.raises(ValueError, match='vision encoder, not HoVLE'):
        AutoConfig.from_pretrained(tmp_path)
    assert zoo.vlm.MODELS[type(student().config)] is type(student())
