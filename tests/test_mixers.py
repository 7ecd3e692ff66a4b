"""The other linear layers against their formulas written as L x L matrices, with state, padding and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_vlms import build, inputs, left_padded
from torch import nn
from transformers import DynamicCache
from zoo.backbones._mixers import MIXERS, GatedDeltaNetMixer, GLAMixer, HedgehogMixer, rotate, window_sums
from zoo.kernels.gated_delta import gated_delta_rule

import zoo
from zoo.linearizer import mixers

CASES = {
    'gla': (GLAMixer, dict(window=7)),
    'gla-no-window': (GLAMixer, dict(window=0)),
    'gla-norms': (GLAMixer, dict(window=16, mix=0.3, qkv_bias=True, q_norm=nn.RMSNorm(8), k_norm=nn.RMSNorm(8))),
    'hedgehog': (HedgehogMixer, dict(window=7)),
    'hedgehog-no-window': (HedgehogMixer, dict(window=0, feature_init='kaiming', features=5)),
    'hedgehog-biases': (HedgehogMixer, dict(window=16, qkv_bias=True, o_bias=True, scaling=0.2)),
    'gated-deltanet': (GatedDeltaNetMixer, {}),
    'gated-deltanet-silu': (GatedDeltaNetMixer, dict(activation='silu', negative_eigenvalues=False, qkv_bias=True)),
    'gated-deltanet-rotary': (GatedDeltaNetMixer, dict(conv_width=0, rotary=True, k_norm=nn.RMSNorm(8))),
}


def mixer_of(case):
    cls, options = CASES[case]
    mixer = cls(32, 4, 2, 8, layer_idx=0, **copy.deepcopy(options))
    mixer.seed_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def angles(length, batch=1, start=0):
    freqs = torch.arange(start, start + length).unsqueeze(-1) * 100.0 ** (-torch.arange(4) / 4)
    both = torch.cat((freqs, freqs), -1).expand(batch, -1, -1)
    return both.cos(), both.sin()


def close(actual, expected, relative=2e-5):
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert (actual - expected).abs().max() <= relative * max(expected.abs().max().item(), 1e-3)


def projected(mixer, u, rotary):
    q, k, v = (p(u).unflatten(-1, (-1, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (t if norm is None else norm(t) for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm)))
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    return (rotate(q, rotary), rotate(k, rotary), v), (q, k, v)


def distances(length):
    return torch.arange(length)[:, None] - torch.arange(length)


def softmax_window(mixer, q, k):
    scores = torch.einsum('bihd,bjhd->bhij', q, k) * mixer.scaling
    gap = distances(q.shape[1])
    return scores.masked_fill((gap < 0) | (gap >= mixer.window), float('-inf'))


def gla_by_matrix(mixer, u, rotary):
    turned, (q, k, v) = projected(mixer, u, rotary)
    sums = (F.logsigmoid(k) / mixer.gate_normalizer).cumsum(1)
    decay = (sums[:, :, None] - sums[:, None]).exp()
    weight = torch.einsum('bihd,bjhd,bijhd->bhij', q.softmax(-1), k.softmax(-1), decay).tril()
    if mixer.window:
        weight = (1 - mixer.mix) * weight + mixer.mix * softmax_window(mixer, *turned[:2]).softmax(-1)
    return torch.einsum('bhij,bjhd->bihd', weight, v)


def hedgehog_by_matrix(mixer, u, rotary):
    (q, k, v), _ = projected(mixer, u, rotary)

    def features(x, w):
        x = torch.einsum('bihd,hdf->bihf', x, w)
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)

    linear = torch.einsum('bihf,bjhf->bhij', features(q, mixer.q_map), features(k, mixer.k_map))
    weight = linear.masked_fill(distances(u.shape[1]) < mixer.window, 0)
    if mixer.window:
        scores = softmax_window(mixer, q, k)
        gamma = mixer.window_factors.sigmoid()[:, None, None]
        weight = weight + gamma * (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum('bhij,bjhd->bihd', weight / weight.sum(-1, keepdim=True), v)


@pytest.mark.parametrize('length', [1, 5, 40])
@pytest.mark.parametrize('case', [c for c in CASES if 'delta' not in c])
def test_formula(case, length):
    mixer = mixer_of(case).double()
    by_matrix = gla_by_matrix if isinstance(mixer, GLAMixer) else hedgehog_by_matrix
    u, rotary = torch.randn(2, length, 32, requires_grad=True, dtype=torch.float64), angles(length)
    cotangent = torch.randn(2, length, 4, 8, dtype=torch.float64)
    wanted = [u, *(p for n, p in mixer.named_parameters() if 'o_proj' not in n)]
    results = []
    for function in (lambda: mixer.heads(u, position_embeddings=rotary), lambda: by_matrix(mixer, u, rotary)):
        out = function()
        grads = torch.autograd.grad((out * cotangent).sum(), wanted, allow_unused=True)
        results.append([out, *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted))])
    for actual, expected in zip(*results):
        close(actual, expected, 1e-9)


def test_deltanet_formula():
    mixer = mixer_of('gated-deltanet')
    u = torch.randn(2, 30, 32)
    q, k, v = (p(u) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    x = F.pad(torch.cat((q, k, v), -1), (0, 0, 3, 0)).transpose(1, 2)
    q, k, v = F.conv1d(x, mixer.conv1d.weight, groups=64).mT.unflatten(-1, (-1, 8)).split((4, 2, 2), 2)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1).repeat_interleave(2, 2)
    v, state, outputs = v.repeat_interleave(2, 2), torch.zeros(2, 4, 8, 8), []
    rate = 2 * mixer.b_proj(u).sigmoid()
    decay = (-mixer.A_log.exp() * F.softplus(mixer.a_proj(u) + mixer.dt_bias)).exp()
    for t in range(30):
        kk = k[:, t, :, :, None] * k[:, t, :, None, :]
        turn = torch.eye(8) - rate[:, t, :, None, None] * kk
        state = decay[:, t, :, None, None] * turn @ state
        state = state + rate[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ state).squeeze(2) * 8**-0.5)
    o = F.rms_norm(torch.stack(outputs, 1), (8,), mixer.o_norm.weight, 1e-5)
    close(mixer.heads(u), o * F.silu(mixer.g_proj(u)).view(o.shape))


@pytest.mark.parametrize('case', CASES)
def test_chunks_and_single_tokens_equal_one_pass(case):
    mixer, length = mixer_of(case), 53
    u, cache, parts, start = torch.randn(2, length, 32), DynamicCache(), [], 0
    with torch.no_grad():
        expected = mixer(u, position_embeddings=angles(length))[0]
        for chunk in u.split((1, 3, 1, 30, 1, 1, 16), 1):
            size = chunk.shape[1]
            parts.append(mixer(chunk, past_key_values=cache, position_embeddings=angles(size, start=start))[0])
            start += size
    close(torch.cat(parts, 1), expected)
    slot = cache.layers[0]
    assert slot.get_seq_length() == length and slot.recurrent_states[0].dtype == torch.float32
    size = slot.state_bytes()
    with torch.no_grad():
        mixer(torch.randn(2, 20, 32), past_key_values=cache, position_embeddings=angles(20))
    assert slot.state_bytes() == size > 0


@pytest.mark.parametrize('case', CASES)
def test_padding_is_invisible(case):
    mixer = mixer_of(case)
    u = torch.randn(1, 21, 32)
    padded = torch.cat((torch.full((1, 9, 32), float('nan')), u), 1)
    mask = torch.arange(30)[None] >= 9
    plain, left = DynamicCache(), DynamicCache()
    cos, sin = (F.pad(t, (0, 0, 9, 0)) for t in angles(21))
    with torch.no_grad():
        expected = mixer(u, position_embeddings=angles(21), past_key_values=plain)[0]
        first = (cos[:, :4], sin[:, :4]), (cos[:, 4:], sin[:, 4:])
        mixer(padded[:, :4], padding_mask=mask[:, :4], past_key_values=left, position_embeddings=first[0])
        out = mixer(padded[:, 4:], padding_mask=mask, past_key_values=left, position_embeddings=first[1])[0]
        close(out[:, 5:], expected)
        new, turn = torch.randn(1, 1, 32), angles(1, start=21)
        step = [mixer(new, past_key_values=c, position_embeddings=turn)[0] for c in (left, plain)]
        close(*step)


def test_the_window_is_softmax_attention():
    q, k, v = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 8)
    keys, values = (F.pad(t, (0, 0, 0, 0, 64, 0)) for t in (k, v))
    total, norm = window_sums(q, keys, values, F.pad(torch.ones(2, 50).bool(), (64, 0)), 8**-0.5, 64)
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    close(total / norm, expected)


@pytest.mark.parametrize('length', [1, 2, 63, 64, 150])
def test_delta_rule_in_chunks(length):
    torch.manual_seed(length)
    q, k = (F.normalize(torch.randn(2, length, 3, 8), dim=-1) for _ in range(2))
    v, state = torch.randn(2, length, 3, 5), torch.randn(2, 3, 8, 5)
    g = -(torch.rand(2, length, 3) ** 8) * 30  # from almost no decay to forgetting everything
    g[:, length // 3] = -torch.inf
    beta = 2 * torch.rand(2, length, 3)
    tensors = [t.requires_grad_() for t in (q, k, v, g, beta, state)]
    weights, results = torch.randn(2, length, 3, 5), []
    for backend in ('naive', 'torch'):
        with zoo.kernel_backend(backend):
            o, final = gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        results.append([o, final, *torch.autograd.grad((o * weights).sum() + final.square().sum(), tensors)])
    for expected, actual in zip(*results):
        close(actual, expected, 1e-4)


def test_delta_rule_refuses():
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r'beta must be \(B, T, H\) = \(1, 3, 2\)'):
        gated_delta_rule(q, q, q, q[..., 0], q)
    with pytest.raises(ValueError, match='initial_state must be'):
        gated_delta_rule(q, q, q, q[..., 0], q[..., 0], initial_state=torch.zeros(1, 2, 4, 5))
    empty = q[:, :0]
    assert gated_delta_rule(empty, empty, empty, empty[..., 0], empty[..., 0])[0].shape == (1, 0, 2, 4)
    with zoo.kernel_backend('triton'), pytest.raises(RuntimeError, match='gated_delta cannot use it'):
        gated_delta_rule(q, q, q, q[..., 0], q[..., 0])


def test_seeds():
    hedgehog, delta = HedgehogMixer(32, 4, 2, 8, layer_idx=0), GatedDeltaNetMixer(32, 4, 2, 8, layer_idx=0)
    for mixer in (hedgehog, delta):
        mixer.seed_parameters()
    assert torch.equal(hedgehog.q_map[1], torch.eye(8))
    close(hedgehog.window_factors.sigmoid(), torch.full((4,), 0.1))
    decay = (-delta.A_log.exp() * F.softplus(delta.dt_bias)).exp()
    close(1 / (1 - decay[[0, -1]]), torch.tensor([64.0, 8192.0]), 1e-2)
    u = torch.randn(1, 5, 32)
    close(F.silu(delta.g_proj(u)), torch.ones(1, 5, 32))
    close(2 * delta.b_proj(u).sigmoid(), torch.full((1, 5, 4), 0.5))
    assert set(GLAMixer(32, 4, 2, 8, layer_idx=0).parameter_roles().values()) == {'qkv', 'output'}
    with pytest.raises(ValueError, match='position_embeddings'):
        hedgehog(u)


@pytest.mark.parametrize('family', ['llama', 'qwen2_vl', 'gemma3'])
@pytest.mark.parametrize('name', [n for n in MIXERS if n != 'mamba2'])
def test_in_a_model(name, family, tmp_path):
    options = {'gated_deltanet': dict(conv_width=2)}.get(name, dict(window=5))
    student, batch = zoo.linearize(build(family), name, [0, 1, 3], mixer_kwargs=options), inputs(family, text=14)
    with torch.no_grad():
        for mixer in mixers(student).values():
            for p in mixer.parameters():
                p.add_(0.05 * torch.randn_like(p))
        logits = student(**batch).logits
        padded = left_padded(batch, 6)
        if 'qwen2_vl' not in family:  # features of rotated keys depend on the positions, which `generate` makes so
            padded['position_ids'] = (padded['attention_mask'].cumsum(-1) - 1).clamp(min=0)
        assert (student(**padded).logits[:, 6:] - logits).abs().max() < 3e-5
        kwargs = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
        tokens = student.generate(**batch, **kwargs)
        assert torch.equal(tokens, student.generate(**batch, **kwargs, use_cache=False))
        assert torch.equal(tokens[:, -6:], student.generate(**left_padded(batch, 6), **kwargs)[:, -6:])
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, logits)
    loss = student.train()(**padded, labels=padded['input_ids']).loss
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() for m in mixers(student).values() for p in m.parameters()
    )
