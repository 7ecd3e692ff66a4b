"""`zoo.linearize` on every family: what is kept, cache, padding, files, refusals, choice of layers, LoRA."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_vlms import TEXT, TEXTS, VLMS, build, inputs, left_padded
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import zoo
import zoo.vlm
from zoo.errors import ZooError
from zoo.linearizer import capture, decoder_layers, linear_layers, mixers, restore_attention, sensitivity, trainable

FAMILIES = [*VLMS, *TEXTS]
SLOW = pytest.mark.slow


def perturbed(student, scale=0.05):
    """Away from seeds that leave whole paths at zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for mixer in mixers(student).values():
            for p in mixer.parameters():
                p.add_(scale * torch.randn_like(p))
    return student


def greedy(model, batch, tokens=4, **kwargs):
    out = model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kwargs)
    return out[:, -tokens:]


ALSO_LINEAR = ('gemma3', 'llama', 'llava', 'qwen2_5_vl')  # the others in the slow tests


@pytest.mark.parametrize(
    'family, layers',
    [
        *(pytest.param(f, [1, 2], id=f'{f}-hybrid') for f in FAMILIES),
        *(pytest.param(f, 'all', id=f'{f}-linear', marks=() if f in ALSO_LINEAR else SLOW) for f in FAMILIES),
    ],
)
def test_family(family, layers, tmp_path):
    teacher, batch = build(family), inputs(family)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = zoo.linearize(teacher, 'mamba2', layers)
    chosen = list(range(4)) if layers == 'all' else layers
    assert list(mixers(student)) == chosen and type(teacher).__name__ == type(student).__name__.removeprefix(
        'Linearized'
    )
    # The teacher is as it was, and the student has copies of all it had.
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    state = student.state_dict()
    kept = {k for k in before if k in state}
    assert all(torch.equal(state[k], before[k]) for k in kept)
    assert all('self_attn' in k for k in set(before) - kept)
    mine = {p.data_ptr() for p in student.parameters()}
    assert not mine & {p.data_ptr() for p in teacher.parameters()}

    perturbed(student)
    with torch.no_grad():
        logits = student(**batch).logits
        assert (logits - teacher(**batch).logits).abs().max() > 1e-4
        if family in VLMS:
            other = batch | {'pixel_values': batch['pixel_values'] + 1}
            assert (student(**other).logits - logits).abs().max() > 1e-5
        # Token for token, with the cache and without; and behind padding.
        tokens = greedy(student, batch)
        assert torch.equal(tokens, greedy(student, batch, use_cache=False))
        padded = left_padded(batch, 5)
        shifted = student(**padded).logits[:, 5:]
        assert (shifted - logits).abs().max() < 2e-5
        assert torch.equal(greedy(student, padded), tokens)

    student.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family in TEXTS else AutoModelForImageTextToText
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert type(again) is type(student) and again.config.linearizer == student.config.linearizer
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
        assert torch.equal(greedy(again, padded), tokens)
    assert AutoConfig.from_pretrained(tmp_path).model_type == f'linearized_{family}'


def test_seeds_and_sharing():
    teacher = build('llama')
    one, two = zoo.linearize(teacher, seed=4), zoo.linearize(teacher, layers=[2], seed=4)
    assert torch.equal(mixers(one)[2].g_proj.weight, mixers(two)[2].g_proj.weight)
    assert not torch.equal(mixers(one)[2].g_proj.weight, mixers(one)[1].g_proj.weight)
    assert not torch.equal(mixers(zoo.linearize(teacher, seed=5))[2].g_proj.weight, mixers(one)[2].g_proj.weight)
    shared = zoo.linearize(teacher, layers=[1, 2], share_frozen=True)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    for name, p in shared.named_parameters():
        own = any(f'layers.{i}.self_attn' in name for i in (1, 2))
        assert (p.data_ptr() in theirs) != own and p.requires_grad == own
    assert all(p.requires_grad for p in teacher.parameters())
    assert shared.config is not teacher.config and teacher.config.model_type == 'llama'
    with pytest.raises(ZooError, match='would train both'):
        trainable(shared, ['rest'])


def test_trainable_roles():
    student = zoo.linearize(build('qwen2'), layers=[0, 3])
    names = trainable(student, ['new'])
    assert names.keys() == {n for n, p in student.named_parameters() if p.requires_grad}
    assert {n.split('self_attn.')[1] for n in names} == {
        *('dt_bias', 'A_log_bias', 'in_proj.weight', 'g_proj.weight', 'g_norm.weight', 'conv1d.weight', 'conv1d.bias')
    }
    assert len(trainable(student, ['qkv'])) == 2 * 6 and len(trainable(student, ['output'])) == 2
    everything = trainable(student, ['new', 'qkv', 'output', 'rest'])
    assert len(everything) == len(list(student.parameters()))
    for roles, what in ((['news'], 'unknown role news'), ([], None)):
        if what:
            with pytest.raises(ZooError, match=what):
                trainable(student, roles)
        else:
            assert trainable(student, roles) == {}
    with pytest.raises(ZooError, match='no linear layers'):
        trainable(build('qwen2'), ['new'])


@pytest.mark.parametrize('family', ['llava', 'gemma3', 'qwen3_vl', 'smolvlm'])
def test_capture(family):
    teacher, batch = build(family), inputs(family)
    with torch.no_grad():
        expected = teacher(**batch).logits
        with capture(teacher) as seen:
            assert torch.equal(teacher(**batch).logits, expected)
        teacher(**batch)
    assert sorted(seen.inputs) == sorted(seen.heads) == [0, 1, 2, 3]
    student = zoo.linearize(teacher)
    for i, layer in enumerate(decoder_layers(teacher)):
        heads = mixers(student)[i].heads(seen.inputs[i], **seen.kwargs[i])
        assert (
            heads.shape == seen.heads[i].shape == (*batch['input_ids'].shape, 4, 16) and not seen.heads[i].requires_grad
        )
        outputs = []
        handle = layer.self_attn.register_forward_hook(lambda *a, outputs=outputs: outputs.append(a[2][0]))
        with torch.no_grad():
            teacher(**batch)
        handle.remove()
        assert (layer.self_attn.o_proj(seen.heads[i].flatten(2)) - outputs[0]).abs().max() < 1e-6
    order = []
    with capture(teacher, [1, 3], lambda i, u, heads, kwargs: order.append((i, u.shape, heads.shape))) as seen:
        teacher(**batch)
    assert [i for i, *_ in order] == [1, 3] and not seen.inputs and not seen.heads
    assert not any(layer.self_attn._forward_pre_hooks for layer in decoder_layers(teacher))


def test_choice_of_layers():
    assert linear_layers('3:1', 8) == [1, 2, 3, 5, 6, 7]
    assert linear_layers('1:0', 3) == linear_layers('all', 3) == [0, 1, 2]
    assert linear_layers([2, 0], 3) == [0, 2]
    assert linear_layers(np.array([2, 0]), 3) == [0, 2]
    for wrong in ('3', 'most', '0:0', [3], [-1], [1, 1], None, 1.5, [1.5], ['a'], [True, False, True]):
        with pytest.raises(ZooError, match='layers='):
            linear_layers(wrong, 3)
    for nothing in ('0:1', '1:4', []):
        with pytest.raises(ZooError, match='none of the 4 layers linear'):
            zoo.linearize(build('llama'), layers=nothing)


def test_sensitive_layers_stay_softmax(tmp_path):
    teacher = build('llama')
    with torch.no_grad():  # layer 2 does the most, layer 0 nothing
        decoder_layers(teacher)[0].self_attn.o_proj.weight.zero_()
        decoder_layers(teacher)[2].self_attn.o_proj.weight.mul_(20)
    batches = [left_padded(inputs('llama', seed=s), s) for s in range(2)]
    weights = copy.deepcopy(teacher.state_dict())
    student = zoo.linearize(teacher, layers=2, calibration=batches, report=tmp_path)
    report = student.linearizer_report
    assert report.kl[0] < 1e-9 < min(report.kl[1:]) and max(report.kl) == report.kl[2]
    assert report.tokens == 2 * 2 * 11
    assert 0 in mixers(student) and 2 not in mixers(student) and len(mixers(student)) == 2
    assert json.loads((tmp_path / 'sensitivity.json').read_text())['kl'] == list(report.kl)
    assert (tmp_path / 'sensitivity.png').stat().st_size > 4000 and len(list(tmp_path.iterdir())) == 2
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())
    # By hand, for one layer: the KL of that layer's seeded mixer.
    alone = zoo.linearize(teacher, layers=[2])
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.log_softmax(-1) for m in (teacher, alone))
            total += ((p.exp() * (p - q)).sum(-1) * batch['attention_mask']).sum().item()
    assert abs(total / 44 - report.kl[2]) < 1e-4 * report.kl[2]
    # With a student whose mixers are given, these are measured, and stay its own.
    given = perturbed(zoo.linearize(teacher, seed=1), 0.3)
    measured = sensitivity(teacher, batches, student=given)
    assert measured.trained and measured.kl[2] != report.kl[2] and len(mixers(given)) == 4
    with pytest.raises(ZooError, match='calibration=\\[batch'):
        zoo.linearize(teacher, layers=2)
    with pytest.raises(ZooError, match='non-empty list of dictionaries'):
        zoo.linearize(teacher, layers=2, calibration=[])


def test_attention_comes_back(tmp_path):
    teacher, batch = build('llava'), inputs('llava')
    student = perturbed(zoo.linearize(teacher))
    expected = copy.deepcopy(student)
    restore_attention(student, teacher, [0, 2])
    assert list(mixers(student)) == student.config.linearizer['layers'] == [1, 3]
    logits = student(**batch).logits
    assert (logits - expected(**batch).logits).abs().max() > 1e-4
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path)(**batch).logits, logits)
    restore_attention(student, teacher, [1, 3])
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    with pytest.raises(ZooError, match=r'layers \[1\]'):
        restore_attention(student, teacher, [1])


def test_gradients_and_checkpointing_see_the_padding():
    student = perturbed(zoo.linearize(build('smolvlm'), layers=[0, 1, 3])).train()
    batch = left_padded(inputs('smolvlm'), 3)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(**batch, labels=batch['input_ids']).loss.backward()
        grads.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any('dt_bias' in n for n in grads[0])
    assert all((grads[1][n] - g).abs().max() <= 1e-5 * g.abs().max() + 1e-8 for n, g in grads[0].items())


def test_lora_attaches_and_sees_the_padding():
    student, batch = perturbed(zoo.linearize(build('qwen2_vl'), layers=[0, 2])), inputs('qwen2_vl')
    config = peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'g_proj', 'o_proj'], init_lora_weights=False)
    tuned = peft.get_peft_model(student, config).eval()
    assert sorted(mixers(tuned)) == [0, 2]
    padded = left_padded(batch, 4)
    with torch.no_grad():
        logits = tuned(**batch).logits
        assert (tuned(**padded).logits[:, 4:] - logits).abs().max() < 2e-5
        with tuned.disable_adapter():
            assert (tuned(**batch).logits - logits).abs().max() > 1e-4
        assert torch.equal(greedy(tuned, batch), greedy(tuned, batch, use_cache=False))
    tuned(**batch, labels=batch['input_ids']).loss.backward()
    lora = {n: p for n, p in tuned.named_parameters() if 'lora' in n and 'layers.0.self_attn' in n}
    assert len(lora) == 8 and all(p.grad is not None for p in lora.values())
    merged = tuned.merge_and_unload()
    assert (merged(**batch).logits - logits).abs().max() < 2e-5
    with pytest.raises(ZooError, match='merge_and_unload'):
        zoo.linearize(peft.get_peft_model(build('llama'), peft.LoraConfig(target_modules=['q_proj'])))


def test_beam_search_and_chunks():
    student, batch = perturbed(zoo.linearize(build('internvl'), layers=[0, 1, 3])), inputs('internvl')
    kwargs = dict(max_new_tokens=5, num_beams=3, do_sample=False)
    assert torch.equal(student.generate(**batch, **kwargs), student.generate(**batch, **kwargs, use_cache=False))
    ids = inputs('llama', text=30)['input_ids']
    student = perturbed(zoo.linearize(build('llama')))
    cache = transformers.DynamicCache()
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        parts = [student(input_ids=p, past_key_values=cache).logits for p in ids.split((13, 1, 16), 1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 2e-5 and cache.get_seq_length() == 30
    with pytest.raises(ValueError, match="leave out cache_implementation='static'"):
        student.generate(input_ids=ids, max_new_tokens=2, cache_implementation='static')
    with pytest.raises(ValueError, match='start from an empty cache'):
        full = build('llama')(input_ids=ids, use_cache=True).past_key_values
        student(input_ids=ids, past_key_values=full)


class TestRefusals:
    def refused(self, teacher, match, *args, **kwargs):
        with pytest.raises(ZooError, match=match):
            zoo.linearize(teacher, *args, **kwargs)

    def test_teachers(self):
        teacher = build('llama')
        self.refused('llava-1.5', 'loaded transformers model, got str')
        self.refused(torch.nn.Linear(2, 2), 'got Linear')
        self.refused(teacher.model, 'LlamaForCausalLM, the model with its head, got LlamaModel')
        self.refused(zoo.linearize(teacher), 'linearised already')
        qwen = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16)
        config = transformers.Qwen3_5TextConfig(**TEXT, **qwen, linear_value_head_dim=16)
        self.refused(transformers.Qwen3_5ForCausalLM(config), 'linear already')
        experts = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16)
        self.refused(transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT | experts)), 'attention sinks')
        with torch.device('meta'):
            mllama = transformers.MllamaForConditionalGeneration(transformers.MllamaConfig())
            deepseek = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(num_hidden_layers=1))
            phi = transformers.PhiForCausalLM(transformers.PhiConfig(num_hidden_layers=1))
        self.refused(mllama, 'cross-attention')
        self.refused(deepseek, 'compressed keys and values')
        self.refused(phi, 'phi is not among the families')

    def test_attention_of_another_kind(self):
        teacher = build('llama')
        decoder_layers(teacher)[1].self_attn.k_proj = torch.nn.Sequential()
        self.refused(teacher, 'layer 1 .* `k_proj` must be a Linear layer, found Sequential')

    def test_weights_that_no_mixer_inherits(self):
        kwargs = VLMS['llava'][2]
        for kind, more, words in (
            ('olmo2', {}, r'its q_norm has weights \(64,\), not one for each of 16'),
            ('stablelm', {'qk_layernorm': True}, 'no mixer has a place for its k_layernorm'),
        ):
            text = TEXT | dict(model_type=kind) | more
            config = transformers.LlavaConfig(**kwargs | {'text_config': text})
            self.refused(transformers.LlavaForConditionalGeneration(config), words)

    def test_arguments(self):
        teacher = build('llama')
        self.refused(teacher, "unknown mixer 'mamba3'", 'mamba3')
        for mixer, options in (
            ('mamba2', {'chunk': 3}),
            ('mamba2', {'conv_width': 0}),
            ('gla', {'window': -1}),
            ('hedgehog', {'features': 0}),
            ('hedgehog', {'feature_init': 'zeros'}),
            ('gated_deltanet', {'conv_width': -1}),
        ):
            self.refused(teacher, f'{mixer}. does not take mixer_kwargs', mixer, mixer_kwargs=options)
        self.refused(teacher, 'has 4 layers that could stay', layers=np.int64(5), calibration=[{}])
        self.refused(teacher, 'has 4 layers that could stay', layers=5, calibration=[{}])

    def test_files_of_another_version(self, tmp_path):
        student = zoo.linearize(build('llama'))
        student.config.linearizer = student.config.linearizer | {'version': 99}
        student.save_pretrained(tmp_path)
        with pytest.raises(ZooError, match='has version 99'):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_tensors_are_seeded(tmp_path):
    """A file that lacks mixer parameters loads with their seeds, and keeps what it has."""
    student = perturbed(zoo.linearize(build('llama')))
    state = {k: v for k, v in student.state_dict().items() if 'dt_bias' not in k}
    student.save_pretrained(tmp_path, state_dict=state)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info['missing_keys']) == 4
    for mixer, old in zip(mixers(again).values(), mixers(student).values()):
        steps = torch.nn.functional.softplus(mixer.dt_bias)
        assert 0.0009 < steps.min() and steps.max() < 0.11
        assert torch.equal(mixer.A_log_bias, old.A_log_bias) and torch.equal(mixer.g_proj.weight, old.g_proj.weight)


def test_half_precision():
    teacher, batch = build('llava').bfloat16(), inputs('llava')
    student = zoo.linearize(teacher, layers='3:1')
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())
    batch['pixel_values'] = batch['pixel_values'].bfloat16()
    cache = transformers.DynamicCache()
    with torch.no_grad():
        assert student(**batch, past_key_values=cache).logits.isfinite().all()
    assert cache.layers[1].recurrent_states[0].dtype == torch.float32
    assert cache.layers[1].conv_states[0].dtype == torch.bfloat16


def tiny_hovle():
    from zoo.vlm import HoVLEConfig, HoVLEForConditionalGeneration

    sizes = {k: TEXT[k] for k in ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads')}
    first = dict(sizes, num_hidden_layers=2, llm_vocab_size=256, llm_hidden_size=64, image_size=28, patch_size=7)
    first |= dict(img_context_token_id=250, max_position_embeddings=512)
    second = dict(sizes, num_hidden_layers=4, vocab_size=256, max_position_embeddings=512, eos_token_id=2)
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(HoVLEConfig(embedding_config=first, llm_config=second)).eval()
    ids = inputs('llava', batch=2)['input_ids']
    keep = torch.cat((ids[:, :6], ids[:, 18:]), 1)  # 16 patches of 7 pixels make 4 tokens
    return model, dict(input_ids=keep, attention_mask=torch.ones_like(keep), pixel_values=torch.randn(2, 3, 28, 28))


def test_native_teacher(tmp_path):
    teacher, batch = tiny_hovle()
    batch = left_padded(batch, 3)
    assert len(decoder_layers(teacher)) == 6 and mixers(teacher) == {}
    student = zoo.linearize(teacher, layers='2:1', share_frozen=True)
    assert list(mixers(student)) == [1, 2, 4, 5]
    with torch.no_grad(), capture(teacher) as seen:
        teacher(**batch)
    for i, mixer in mixers(student).items():
        u, heads, kwargs = seen[i]
        assert mixer.heads(u, **kwargs).shape == heads.shape == (*batch['input_ids'].shape, 4, 16)
        out = decoder_layers(teacher)[i].attention.wo(heads.flatten(2))
        assert out.shape == u.shape
    assert len(trainable(student, ['new'])) == 4 * 7
    with pytest.raises(ZooError, match='would train both'):
        trainable(student, ['rest'])
    with pytest.raises(ZooError, match='only choice'):
        zoo.linearize(teacher, 'gla')
    # One layer at a time, softmax layers with the padding mask that they need, and the student as it was.
    with torch.no_grad():
        report = sensitivity(teacher, [batch], seed=3)
        alone = zoo.linearize(teacher, layers=[4], seed=3)
        p, q = (m(**batch).logits.log_softmax(-1) for m in (teacher, alone))
        expected = ((p.exp() * (p - q)).sum(-1) * batch['attention_mask']).sum() / batch['attention_mask'].sum()
        assert abs(report.kl[4] - expected) < 1e-3 * expected
    student = perturbed(zoo.linearize(teacher, layers=2, calibration=[batch], report=tmp_path / 'report'))
    assert len(mixers(student)) == 4 and student.config.block_types.count('mha') == 2
    chosen = list(mixers(student))
    restore_attention(student, teacher, chosen[1:])
    assert [i for i, kind in enumerate(student.config.block_types) if kind == 'mamba2'] == chosen[:1]
    student.save_pretrained(tmp_path / 'student')
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / 'student')
    with torch.no_grad():
        logits = student(**batch).logits
        assert (again(**batch).logits - logits).abs().max() < 1e-5
        restore_attention(student, teacher, chosen[:1])
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
