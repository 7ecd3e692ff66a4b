"""Gated linear attention against the recurrence, with every gradient, and the properties that any scan must have.

These run the torch path on a CPU; tests/test_triton_gla.py does the same for the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import _torch_gla, gla
from zoo.kernels.gla import bidirectional_gla, gated_linear_attention, gated_local_mix, naive_gla

import zoo

GATES = ('channel', 'head', 'none')
LENGTHS = (1, 7, 63, 64, 196, 1000, 4097)


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-6)).item()


def make_inputs(batch, length, heads, key_dim, value_dim, gate='channel', strong=False, dtype=torch.float32, seed=0):
    """q, k, v and the gates of both directions; strong gates mix 0 with decays down to exp(-20) a step."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    q, k = randn(batch, length, heads, key_dim), randn(batch, length, heads, key_dim)
    v = randn(batch, length, heads, value_dim)
    shape = {'channel': (batch, length, heads, key_dim), 'head': (batch, length, heads)}.get(gate)
    if shape is None:
        gates = [None, None]
    elif strong:
        gates = [-20 * randn(*shape).abs().clamp(max=1) * (randn(*shape) < 0) for _ in range(2)]
    else:
        gates = [F.logsigmoid(randn(*shape)) / 16 for _ in range(2)]
    return [None if x is None else x.to(dtype) for x in (q, k, v, *gates)]


def leaves(tensors, dtype=None):
    return [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def naive_bidirectional(q, k, v, g_fwd, g_bwd):
    scale = q.shape[-1] ** -0.5 / 2
    return naive_gla(q, k, v, g_fwd, scale=scale)[0] + naive_gla(q, k, v, g_bwd, scale=scale, reverse=True)[0]


def compare_bidirectional(tensors, limit, grad_limit=None):
    ours, exact = leaves(tensors), leaves(tensors, torch.float64)
    out, expected = bidirectional_gla(*ours), naive_bidirectional(*exact)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(weight.to(out.dtype))
    expected.backward(weight.to(out.dtype).double())
    errors = {'o': relative_rms(out, expected)}
    for name, x, y in zip(('q', 'k', 'v', 'g_fwd', 'g_bwd'), ours, exact):
        # With one token the gates cannot matter: their gradient is zero up to rounding of the terms that cancel.
        if x is not None and not (name.startswith('g') and x.shape[1] == 1):
            errors[name] = relative_rms(x.grad, y.grad)
    bad = {k: v for k, v in errors.items() if not v <= (limit if k == 'o' else grad_limit or limit)}
    assert not bad, bad


@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('length', LENGTHS)
def test_bidirectional_matches_the_recurrence(length, gate, strong):
    small = length > 500
    compare_bidirectional(make_inputs(1 if small else 2, length, 1 if small else 2, 16, 24, gate, strong), 1e-5)


@pytest.mark.parametrize('dims', [(16, 16), (24, 40), (48, 80), (64, 128), (128, 64), (20, 33)])
@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
def test_head_dims(dims, strong):
    compare_bidirectional(make_inputs(1, 70, 2, *dims, strong=strong), 1e-5)


@pytest.mark.parametrize('dtype, limit', [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, limit):
    compare_bidirectional(make_inputs(2, 100, 2, 32, 64, dtype=dtype), limit)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('length', [1, 63, 196])
def test_causal_with_states_matches_the_recurrence(length, gate, strong, reverse):
    q, k, v, g, _ = make_inputs(2, length, 2, 16, 24, gate, strong)
    state = torch.randn(2, 2, 16, 24)
    ours, exact = leaves([q, k, v, g, state]), leaves([q, k, v, g, state], torch.float64)
    kwargs = dict(output_final_state=True, reverse=reverse)
    o, final = gated_linear_attention(*ours[:4], initial_state=ours[4], **kwargs)
    expected, expected_final = naive_gla(*exact[:4], initial_state=exact[4], **kwargs)
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    torch.autograd.backward([o, final], [do, dfinal])
    torch.autograd.backward([expected, expected_final], [do.double(), dfinal.double()])
    assert relative_rms(o, expected) < 1e-5 and relative_rms(final, expected_final) < 1e-5
    for x, y in zip(ours, exact):
        assert x is None or relative_rms(x.grad, y.grad) < 1e-5


@pytest.mark.parametrize('gate', ['channel', 'head'])
def test_infinite_gates_cut_the_sequence(gate):
    q, k, v, *gates = make_inputs(2, 150, 2, 16, 24, gate)
    cut = torch.rand(gates[0].shape, generator=torch.Generator().manual_seed(2)) < 0.1
    gates = [g.masked_fill(c, -math.inf) for g, c in zip(gates, (cut, cut.roll(1, 1)))]
    compare_bidirectional([q, k, v, *gates], 1e-5)
    state = torch.randn(2, 2, 16, 24)
    found = gated_linear_attention(q, k, v, gates[0], initial_state=state, output_final_state=True)
    for x, y in zip(found, naive_gla(q, k, v, gates[0], initial_state=state, output_final_state=True)):
        assert relative_rms(x, y) < 1e-5
    exported, _ = _torch_gla.export_gla(q, k, v, [(gates[0], False)], 0.25, state)
    assert relative_rms(exported, found[0]) < 1e-5


@pytest.mark.parametrize('strong', [False, True], ids=['fast', 'safe'])
def test_gradcheck(strong):
    q, k, v, g, b = leaves(make_inputs(1, 9, 1, 3, 2, strong=strong, dtype=torch.float64))
    state = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gla(*x), (q, k, v, g, b))
    causal = lambda q, k, v, g, s: gated_linear_attention(q, k, v, g, initial_state=s, output_final_state=True)  # noqa: E731
    assert torch.autograd.gradcheck(causal, (q, k, v, g, state))


def test_strong_gates_take_the_safe_form_and_mild_ones_the_fast_form():
    for strong in (False, True):
        g = make_inputs(1, 100, 1, 8, 8, strong=strong)[3]
        directions, _, _ = _torch_gla._directions([(g, False), (g, True)], 100, torch.float32)
        assert [d.safe for d in directions] == [strong, strong]


@pytest.mark.parametrize('cuts', [(0, 1, 150), (0, 64, 150), (0, 63, 64, 150), (0, 10, 20, 149, 150)])
@pytest.mark.parametrize('reverse', [False, True])
def test_any_split_of_the_sequence_gives_the_same(cuts, reverse):
    q, k, v, g, _ = make_inputs(2, 150, 2, 16, 16, strong=True)
    expected, final = gated_linear_attention(q, k, v, g, output_final_state=True, reverse=reverse)
    state, parts = None, []
    pieces = list(zip(cuts, cuts[1:]))
    for start, end in reversed(pieces) if reverse else pieces:
        piece = [x[:, start:end] for x in (q, k, v, g)]
        o, state = gated_linear_attention(*piece, initial_state=state, output_final_state=True, reverse=reverse)
        parts.append(o)
    assert relative_rms(torch.cat(parts[::-1] if reverse else parts, 1), expected) < 1e-5
    assert relative_rms(state, final) < 1e-5


@pytest.mark.parametrize('gate', GATES)
def test_reversal_symmetry(gate):
    q, k, v, g_fwd, g_bwd = make_inputs(2, 77, 2, 16, 16, gate)
    flip = lambda x: None if x is None else x.flip(1)  # noqa: E731
    mirrored = bidirectional_gla(flip(q), flip(k), flip(v), flip(g_bwd), flip(g_fwd)).flip(1)
    assert relative_rms(mirrored, bidirectional_gla(q, k, v, g_fwd, g_bwd)) < 1e-5
    forward = gated_linear_attention(q, k, v, g_fwd)[0]
    mirrored = gated_linear_attention(flip(q), flip(k), flip(v), flip(g_fwd), reverse=True)[0].flip(1)
    assert relative_rms(mirrored, forward) < 1e-5


@pytest.mark.parametrize('gate', GATES)
def test_packed_sequences_equal_separate_ones(gate):
    cuts = [0, 5, 5, 70, 71, 200]
    q, k, v, g_fwd, g_bwd = leaves(make_inputs(1, 200, 2, 16, 24, gate))
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    state = torch.randn(len(cuts) - 1, 2, 16, 24)
    both = bidirectional_gla(q, k, v, g_fwd, g_bwd, cu_seqlens=cu_seqlens)
    kwargs = dict(initial_state=state, output_final_state=True)
    o, final = gated_linear_attention(q, k, v, g_fwd, cu_seqlens=cu_seqlens, **kwargs)
    with zoo.kernel_backend('naive'):
        expected_both = bidirectional_gla(q, k, v, g_fwd, g_bwd, cu_seqlens=cu_seqlens)
        expected, expected_final = gated_linear_attention(q, k, v, g_fwd, cu_seqlens=cu_seqlens, **kwargs)
    assert relative_rms(both, expected_both) < 1e-5
    assert relative_rms(o, expected) < 1e-5 and relative_rms(final, expected_final) < 1e-5
    weight = torch.randn_like(both)
    inputs = [x for x in (q, k, v, g_fwd, g_bwd) if x is not None]
    for x, y in zip(torch.autograd.grad(both, inputs, weight), torch.autograd.grad(expected_both, inputs, weight)):
        assert relative_rms(x, y) < 1e-5


@pytest.mark.parametrize('backend', ['naive', 'torch'])
@pytest.mark.parametrize('cuts', [[0, 5], [1, 10], [0, 11], [0, 7, 5, 10], [0]], ids=str)
def test_bad_boundaries_of_packed_sequences_are_refused(cuts, backend):
    q, k, v, g, b = make_inputs(1, 10, 1, 4, 4)
    cu_seqlens = torch.tensor(cuts)
    with zoo.kernel_backend(backend):
        with pytest.raises(ValueError, match='cu_seqlens must rise from 0 to T = 10'):
            bidirectional_gla(q, k, v, g, b, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match='cu_seqlens must rise from 0 to T = 10'):
            gated_linear_attention(q, k, v, g, cu_seqlens=cu_seqlens)


def test_non_contiguous_inputs_and_untouched_arguments():
    q, k, v, g, b = make_inputs(2, 50, 3, 16, 16)
    fused = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = list(fused.split(16, -1))
    copies = [x.clone() for x in views]
    assert not views[0].is_contiguous()
    assert torch.equal(bidirectional_gla(*views, g, b), bidirectional_gla(q, k, v, g, b))
    assert all(torch.equal(x, y) for x, y in zip(views, copies))


@pytest.mark.parametrize('shape', [(0, 5, 2), (2, 0, 2)], ids=['empty batch', 'empty sequence'])
def test_empty_inputs(shape):
    q, k, v, g, b = leaves(make_inputs(*shape, 8, 8))
    out = bidirectional_gla(q, k, v, g, b)
    out.sum().backward()
    assert out.shape == v.shape and q.grad.shape == q.shape and g.grad.shape == g.shape
    state = torch.randn(shape[0], 2, 8, 8)
    o, final = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    assert o.shape == v.shape and final.shape == state.shape and (shape[1] or torch.equal(final, state))


def test_backends_are_forced_as_call_and_as_context():
    inputs = make_inputs(1, 20, 1, 8, 8)
    with zoo.kernel_backend('naive'):
        naive = bidirectional_gla(*inputs)
    with zoo.kernel_backend('torch'):
        assert relative_rms(bidirectional_gla(*inputs), naive) < 1e-5
    with pytest.raises(ValueError, match='expected one of auto, naive, torch, triton'):
        zoo.kernel_backend('cuda')
    forced = zoo.kernel_backend('naive')
    try:
        assert torch.equal(bidirectional_gla(*inputs), naive)
    finally:
        forced.__exit__()


def test_errors_name_the_argument():
    q, k, v, g, b = make_inputs(2, 6, 2, 8, 8)
    cases = [
        ((q[0], k, v, g, b), 'q and k must both be'),
        ((q, k, v[:, :3], g, b), 'v must be'),
        ((q, k.half(), v, g, b), 'share one floating dtype'),
        ((*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), g, b), 'float64, float32, float16 or bfloat16'),
        ((q, k, v, g[..., :4], b), 'g_fwd must be'),
        ((q, k, v, g, None), 'g_fwd and g_bwd must both be None or have the same shape'),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            bidirectional_gla(*arguments)
    with pytest.raises(ValueError, match='merge must be'):
        bidirectional_gla(q, k, v, g, b, merge='max')
    with pytest.raises(ValueError, match='expected B = 1'):
        bidirectional_gla(q, k, v, g, b, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match='initial_state must be'):
        gated_linear_attention(q, k, v, g, initial_state=torch.zeros(2, 2, 8, 9))
    with pytest.raises(ValueError, match='initial_state is on meta'):
        gated_linear_attention(q, k, v, g, initial_state=torch.zeros(2, 2, 8, 8, device='meta'))


@pytest.mark.parametrize('gate', GATES)
def test_opcheck(gate):
    q, k, v, g, b = leaves(make_inputs(2, 20, 2, 8, 8, gate))
    torch.library.opcheck(gla._bidirectional_op.custom, (q, k, v, g, b, 0.3, None))
    state = torch.randn(2, 2, 8, 8, requires_grad=True)
    torch.library.opcheck(gla._gla_op.custom, (q, k, v, g, 0.3, state, True, False, None))


def test_autocast_does_not_reach_inside():
    inputs = make_inputs(1, 40, 2, 16, 16)
    expected = bidirectional_gla(*inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(bidirectional_gla(*inputs), expected)


def test_flops_count_the_recurrence():
    q, k, v, g, b = leaves(make_inputs(2, 30, 3, 8, 16))
    with FlopCounterMode(display=False) as counter:
        out = bidirectional_gla(q, k, v, g, b)
    assert counter.get_total_flops() == 2 * 6 * 2 * 30 * 3 * 8 * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 6 * 2 * 30 * 3 * 8 * 16


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('length', [1, 64, 150])
def test_exported_form_equals_eager(length, gate):
    q, k, v, g, b = make_inputs(2, length, 2, 16, 24, gate, strong=True)
    scale = 16**-0.5 / 2
    both, _ = _torch_gla.export_gla(q, k, v, [(g, False), (b, True)], scale, None)
    assert relative_rms(both, bidirectional_gla(q, k, v, g, b)) < 1e-5
    state = torch.randn(2, 2, 16, 24)
    o, final = _torch_gla.export_gla(q, k, v, [(g, True)], scale, state)
    kwargs = dict(scale=scale, initial_state=state, output_final_state=True, reverse=True)
    expected, expected_final = gated_linear_attention(q, k, v, g, **kwargs)
    assert relative_rms(o, expected) < 1e-5 and relative_rms(final, expected_final) < 1e-5


def test_compiled_model_has_no_graph_break_and_equals_eager():
    model = zoo.create_model('test_vig').eval()
    x = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        assert relative_rms(compiled(x), model(x)) < 1e-5
    model.train()
    compiled(x).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    assert all(relative_rms(a, p.grad) < 1e-4 for a, p in zip(grads, model.parameters()))


def test_gated_local_mix_is_a_gated_sum_of_norms():
    torch.manual_seed(0)
    o, local, gate = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.rand(2, 5, 3, 8)
    w_global, w_local = torch.rand(8), torch.rand(8)
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    expected = gate * norm(o, w_global) + (1 - gate) * norm(local, w_local)
    torch.testing.assert_close(gated_local_mix(o, local, gate, w_global, w_local, 1e-6), expected)
    with pytest.raises(ValueError, match='share one shape'):
        gated_local_mix(o, local[:, :2], gate, w_global, w_local)
    with pytest.raises(ValueError, match='local must be float64'):
        gated_local_mix(o, local.long(), gate, w_global, w_local)
    with pytest.raises(ValueError, match='gate must be .* on cpu as o is'):
        gated_local_mix(o, local, gate.to('meta'), w_global, w_local)


def test_default_scale_and_merge():
    q, k, v, g, b = make_inputs(1, 12, 1, 16, 8)
    total = bidirectional_gla(q, k, v, g, b, scale=1.0, merge='sum')
    torch.testing.assert_close(bidirectional_gla(q, k, v, g, b), total / (2 * math.sqrt(16)))


def test_states_in_half_precision_are_taken_as_fp32():
    q, k, v, g, _ = make_inputs(1, 20, 1, 8, 8, dtype=torch.bfloat16)
    state = torch.randn(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    o, final = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    (o.float().sum() + final.sum()).backward()
    assert final.dtype == torch.float32 and state.grad.dtype == torch.bfloat16
