"""`zoo.vlm.fast_decode`: its loop and steps, without a graph on the CPU, against transformers' own loop by tokens.

tests/gpu/check_vlm.py repeats the comparison with captured steps.
"""

from __future__ import annotations

import warnings

import pytest
import tiny_hovle
import tiny_vlms
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import zoo
import zoo.vlm
from zoo.vlm import _step
from zoo.vlm.decode import fast_decode

GREEDY = dict(do_sample=False, max_new_tokens=9)


class Collector:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.clone())

    def end(self):
        self.ended = True


def both(model, *calls):
    """Results of transformers' loop and of one `fast_decode` block for each call, which must not fall back."""
    plain = [model.generate(**call) for call in calls]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='fast_decode')
        with fast_decode(model, capture=False):
            fast = [model.generate(**call) for call in calls]
    return list(zip(plain, fast))


def padded_batch():
    ids = torch.cat([tiny_hovle.prompt([], 18, seed=i)[0] for i in (1, 2)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)


@pytest.mark.parametrize('kind', ['linear', 'hybrid', 'softmax'])
def test_same_tokens(kind):
    """Image prompt; a second, shorter prompt in the same block; left padding; pieces; processors; the end token."""
    model = tiny_hovle.model(kind)
    ids, pixels = tiny_hovle.prompt([1], 20)
    image = dict(input_ids=ids, pixel_values=pixels, **GREEDY)
    end = model.generate(**image)[0, -4].item()
    calls = [
        image,
        dict(input_ids=ids[:, -9:], **GREEDY),
        dict(**padded_batch(), **GREEDY),
        dict(**padded_batch(), **GREEDY, eos_token_id=end),
        dict(image, eos_token_id=end),
        dict(image, prefill_chunk_size=7),
        dict(image, repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(image, max_new_tokens=1),
    ]
    for plain, fast in both(model, *calls):
        assert torch.equal(plain, fast)


@pytest.mark.parametrize(
    ('family', 'mixer', 'layers'),
    [
        ('llava', 'mamba2', [1, 2]),
        ('qwen2_vl', 'gla', [0, 2, 3]),
        ('mistral', 'hedgehog', 'all'),
        ('llama', None, None),
    ],
)
def test_other_families(family, mixer, layers):
    """Transformers' own decoders: M-RoPE, biases, windows that are linear now; and a teacher as it is."""
    teacher = tiny_vlms.build(family)
    model = zoo.linearize(teacher, mixer, layers) if mixer else teacher
    inputs = tiny_vlms.left_padded(tiny_vlms.inputs(family), 3)
    inputs['attention_mask'][:, :3] = 0
    inputs['attention_mask'][1, :5] = 0
    for plain, fast in both(model, dict(**inputs, **GREEDY)):
        assert torch.equal(plain, fast)


def test_the_step_is_used_and_kept():
    """One step serves prompts that fit its buffers; single-token modules and attention are in place only inside it."""
    model, made = tiny_hovle.model('hybrid'), []
    ids, _ = tiny_hovle.prompt([], 20)
    plain = model.config._attn_implementation
    init = _step.Step.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_step.Step, '__init__', lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
        with fast_decode(model, capture=False):
            for length in (20, 12, 18):
                model.generate(input_ids=ids[:, :length], **GREEDY)
            assert len(made) == 1
            model.generate(input_ids=ids.repeat(1, 20), **GREEDY)  # beyond the buffer
            assert len(made) == 2
    assert type(model).__mro__[0] is type(tiny_hovle.model('hybrid'))
    assert model.config._attn_implementation == plain
    assert not any('forward' in vars(m) for m in model.modules())
    assert isinstance(made[-1].cache.layers[0], _step.KVLayer)


def test_sampling_streaming_and_criteria():
    model = tiny_hovle.model('linear')
    ids, _ = tiny_hovle.prompt([], 12)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 16)

    stop = dict(input_ids=ids, **GREEDY, stopping_criteria=StoppingCriteriaList([Stop()]))
    ((plain, fast),) = both(model, stop)
    assert torch.equal(plain, fast) and plain.shape[1] == 16
    sampled = dict(input_ids=ids, do_sample=True, top_k=20, temperature=1.3, max_new_tokens=9)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with fast_decode(model, capture=False):
            results.append(model.generate(**sampled))
    torch.manual_seed(0)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], model.generate(**sampled))
    assert not torch.equal(results[0], results[2])
    streamer = Collector()
    with fast_decode(model, capture=False):
        out = model.generate(input_ids=ids, streamer=streamer, **GREEDY)
    assert streamer.ended and torch.equal(torch.cat([t.flatten() for t in streamer.tokens]), out[0])


def test_falls_back_with_one_message():
    model = tiny_hovle.model('linear')
    ids, _ = tiny_hovle.prompt([], 12)
    with pytest.warns(UserWarning, match="transformers' own loop runs, because the model is on cpu") as caught:
        with fast_decode(model):
            for _ in range(2):
                out = model.generate(input_ids=ids, **GREEDY)
    assert len([w for w in caught if 'fast_decode' in str(w.message)]) == 1
    assert torch.equal(out, model.generate(input_ids=ids, **GREEDY))
    reasons = {
        'return_dict_in_generate': dict(return_dict_in_generate=True),
        'use_cache': dict(use_cache=False),
        'padding is not on the left': dict(attention_mask=torch.tensor([[1] * 10 + [0, 0]])),
    }
    for reason, options in reasons.items():
        with pytest.warns(UserWarning, match=reason), fast_decode(model, capture=False):
            model.generate(input_ids=ids, **GREEDY, **options)
    with fast_decode(model, capture=False):  # beams have a loop of their own
        beams = model.generate(input_ids=ids, num_beams=2, **GREEDY)
    assert torch.equal(beams, model.generate(input_ids=ids, num_beams=2, **GREEDY))
