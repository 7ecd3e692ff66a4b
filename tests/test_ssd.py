"""State space duality against the recurrence, with every gradient, and the properties that any scan must have.

These run the torch path on a CPU; tests/test_triton_ssd.py does the same for the Triton kernels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels import _torch_ssd
from zoo.kernels import ssd as module
from zoo.kernels.gla import gated_linear_attention
from zoo.kernels.ssd import naive_ssd, ssd, ssd_step, ssd_step_

import zoo

NAMES = ('x', 'dt', 'A', 'B', 'C', 'D', 'initial_state')


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-6)).item()


def make_inputs(batch, length, heads, groups, dim, state_dim, strong=False, dtype=torch.float32, seed=0):
    """x, dt, A, B, C, D and a state; strong steps mix 0 with decays down to exp(-20)."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    groups_b, groups_c = groups if isinstance(groups, tuple) else (groups, groups)
    x, D = randn(batch, length, heads, dim), randn(heads)
    B, C = randn(batch, length, groups_b, state_dim), randn(batch, length, groups_c, state_dim)
    if strong:
        dt = 20 * randn(batch, length, heads).abs().clamp(max=1) * (randn(batch, length, heads) < 0)
    else:
        dt = F.softplus(randn(batch, length, heads) - 2)
    A = -randn(heads).abs().clamp(0.3, 1)
    state = randn(batch, heads, dim, state_dim)
    wide = torch.promote_types(dtype, torch.float32)
    dt, A, D, state = (t.to(wide) for t in (dt, A, D, state))
    return [x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D, state]


def leaves(tensors, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def call(function, tensors, **kwargs):
    x, dt, A, B, C, D, state = tensors
    return function(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True, **kwargs)


def compare(tensors, limit, **kwargs):
    ours, exact = leaves(tensors), leaves(tensors, torch.float64)
    results, expected = call(ssd, ours, **kwargs), call(naive_ssd, exact, **kwargs)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=rng).to(t.dtype) for t in results]
    torch.autograd.backward(results, weights)
    torch.autograd.backward(expected, [w.double() for w in weights])
    errors = dict(zip(('y', 'final'), map(relative_rms, results, expected)))
    errors |= {n: relative_rms(a.grad, b.grad) for n, a, b in zip(NAMES, ours, exact) if a is not None}
    assert not (bad := {n: e for n, e in errors.items() if not e < limit}), bad


@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
@pytest.mark.parametrize('groups', [4, 2, 1, (2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize('length', [1, 7, 64, 130])
def test_matches_the_recurrence(length, groups, strong):
    compare(make_inputs(2, length, 4, groups, 8, 12, strong), 2e-6)


@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
def test_long_sequence(strong):
    compare(make_inputs(1, 1000, 1, 1, 8, 8, strong), 2e-6)


@pytest.mark.parametrize('dims', [(16, 128), (128, 16), (20, 33), (1, 1)])
def test_head_dims(dims):
    compare(make_inputs(1, 70, 2, 1, *dims), 2e-6)


@pytest.mark.parametrize('dtype, limit', [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, limit):
    compare(make_inputs(2, 100, 4, 2, 16, 16, dtype=dtype), limit)


def test_without_skip_and_state():
    *tensors, _, _ = make_inputs(2, 70, 2, 1, 8, 8)
    compare([*tensors, None, None], 2e-6)
    assert ssd(*tensors)[1] is None


def test_gradcheck():
    tensors = leaves(make_inputs(1, 9, 2, 1, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *t: call(ssd, t), tensors)
    x, dt, A, B, C, D, state = tensors
    step = [t.detach()[:, 0].clone().requires_grad_() for t in (x, dt, B, C)]
    assert torch.autograd.gradcheck(
        lambda x, dt, A, B, C, D, state: ssd_step(x, dt, A, B, C, state, D=D),
        (step[0], step[1], A, step[2], step[3], D, state),
    )


def test_equals_gated_linear_attention_with_a_gate_per_head():
    x, dt, A, B, C, _, _ = make_inputs(2, 90, 3, 3, 8, 16)
    y, state = ssd(x, dt, A, B, C, output_final_state=True)
    o, other = gated_linear_attention(C, B, x * dt[..., None], dt * A, scale=1.0, output_final_state=True)
    assert relative_rms(y, o) < 1e-6 and relative_rms(state, other.mT) < 1e-6


@pytest.mark.parametrize('cuts', [(0, 1, 150), (0, 64, 150), (0, 63, 64, 150), (0, 10, 20, 149, 150)])
def test_prefill_in_pieces_equals_one_shot(cuts):
    x, dt, A, B, C, D, state = make_inputs(2, 150, 4, 2, 8, 16, strong=True)
    expected, final = ssd(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)
    parts = []
    for start, end in zip(cuts, cuts[1:]):
        piece = [t[:, start:end] for t in (x, dt)], [t[:, start:end] for t in (B, C)]
        y, state = ssd(*piece[0], A, *piece[1], D=D, initial_state=state, output_final_state=True)
        parts.append(y)
    assert relative_rms(torch.cat(parts, 1), expected) < 1e-6 and relative_rms(state, final) < 1e-6


@pytest.mark.parametrize('inplace', [False, True])
def test_steps_equal_the_scan(inplace):
    x, dt, A, B, C, D, state = make_inputs(2, 20, 4, (2, 4), 8, 16)
    expected, final = ssd(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)
    state, ys = state.clone(), []
    for t in range(20):
        if inplace:
            y = ssd_step_(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D)
        else:
            y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D)
        ys.append(y)
    assert relative_rms(torch.stack(ys, 1), expected) < 1e-6 and relative_rms(state, final) < 1e-6


def test_step_gradients_equal_those_of_the_scan():
    tensors = make_inputs(2, 1, 4, (2, 1), 8, 16)
    ours, scan = leaves(tensors), leaves(tensors)
    x, dt, A, B, C, D, state = ours
    y, new = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D)
    expected, final = call(ssd, scan)
    dy, dnew = torch.randn_like(y), torch.randn_like(new)
    torch.autograd.backward([y, new], [dy, dnew])
    torch.autograd.backward([expected, final], [dy[:, None], dnew])
    assert all(relative_rms(a.grad, b.grad) < 1e-5 for a, b in zip(ours, scan))


def test_left_padding_leaves_the_state_untouched():
    x, dt, A, B, C, D, state = make_inputs(2, 80, 4, 2, 8, 16)
    expected, final = call(ssd, (x, dt, A, B, C, D, state))
    pad = lambda t: torch.cat([torch.randn(2, 13, *t.shape[2:]), t], 1)  # noqa: E731
    dt = F.pad(dt, (0, 0, 13, 0))
    y, padded = call(ssd, (pad(x), dt, A, pad(B), pad(C), D, state))
    assert relative_rms(y[:, 13:], expected) < 1e-6 and relative_rms(padded, final) < 1e-6
    _, same = call(ssd, (x[:, :13], dt[:, :13], A, B[:, :13], C[:, :13], D, state))
    assert torch.equal(same, state)


@pytest.mark.parametrize('strong', [False, True], ids=['mild', 'strong'])
def test_packed_sequences_equal_separate_ones(strong):
    *tensors, state = make_inputs(1, 200, 4, 2, 8, 16, strong)
    cuts = torch.tensor([0, 5, 5, 70, 71, 200], dtype=torch.int32)
    compare([*tensors, torch.randn(5, 4, 8, 16)], 2e-6, cu_seqlens=cuts)


def test_non_contiguous_inputs_and_untouched_arguments():
    x, dt, A, B, C, D, state = make_inputs(2, 50, 2, 2, 8, 8)
    fused = torch.cat([x, B, C], -1).transpose(1, 2).contiguous().transpose(1, 2)
    views = list(fused.split(8, -1))
    copies = [t.clone() for t in (*views, state)]
    assert not views[0].is_contiguous()
    turned = dt.transpose(1, 2).contiguous().transpose(1, 2)
    y, final = call(ssd, (views[0], turned, A, views[1], views[2], D, state))
    expected, expected_final = call(ssd, (x, dt, A, B, C, D, state))
    assert torch.equal(y, expected) and torch.equal(final, expected_final)
    assert all(torch.equal(a, b) for a, b in zip((*views, state), copies))


@pytest.mark.parametrize('shape', [(0, 5), (2, 0)], ids=['empty batch', 'empty sequence'])
def test_empty_inputs(shape):
    tensors = leaves(make_inputs(*shape, 2, 1, 8, 8))
    y, final = call(ssd, tensors)
    (y.sum() + final.sum()).backward()
    assert y.shape == tensors[0].shape and final.shape == tensors[-1].shape
    assert all(t.grad.shape == t.shape for t in tensors)
    assert shape[1] or torch.equal(final, tensors[-1])


def test_backends_are_forced():
    tensors = make_inputs(1, 20, 2, 1, 8, 8)
    with zoo.kernel_backend('naive'):
        naive = call(ssd, tensors)
    with zoo.kernel_backend('torch'):
        assert all(map(lambda a, b: relative_rms(a, b) < 1e-6, call(ssd, tensors), naive))


def test_errors_name_the_argument():
    x, dt, A, B, C, D, state = make_inputs(2, 6, 4, 2, 8, 8)
    cases = [
        ((x[0], dt, A, B, C), 'x must be'),
        ((x, dt[:, :3], A, B, C), r'dt must be \(B, T, H\)'),
        ((x, dt, A[:2], B, C), r'A must be \(H,\)'),
        ((x, dt, A, B[..., :4], C), 'C must be'),
        ((x, dt, A, B[:, :4], C), 'B must be'),
        ((x, dt, A, torch.cat([B, B[:, :, :1]], 2), C), 'B has 3 groups, which do not divide 4 heads'),
        ((x, dt, A, B.half(), C), 'share one floating dtype'),
        ((x.to(torch.float8_e4m3fn), dt, A, *(t.to(torch.float8_e4m3fn) for t in (B, C))), 'float16 or bfloat16'),
        ((x, dt.long(), A, B, C), 'dt must be floating point'),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ssd(*arguments)
    with pytest.raises(ValueError, match=r'D must be \(H,\)'):
        ssd(x, dt, A, B, C, D=D[:1])
    with pytest.raises(ValueError, match='initial_state must be'):
        ssd(x, dt, A, B, C, initial_state=state[:1])
    with pytest.raises(ValueError, match='expected B = 1'):
        ssd(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match='cu_seqlens must rise from 0 to T = 6'):
        ssd(x[:1], dt[:1], A, B[:1], C[:1], cu_seqlens=torch.tensor([0, 7]))
    step = [t[:, 0] for t in (x, dt)], [t[:, 0] for t in (B, C)]
    with pytest.raises(ValueError, match='state must be contiguous and torch.float32'):
        ssd_step_(*step[0], A, *step[1], state.half())
    with pytest.raises(ValueError, match='ssd_step_ has no gradient'):
        ssd_step_(*step[0], A, *step[1], state.requires_grad_())


def test_opcheck():
    x, dt, A, B, C, D, state = leaves(make_inputs(2, 20, 4, 2, 8, 8))
    torch.library.opcheck(module._ssd_op.custom, (x, dt, A, B, C, D, state, True, None))
    torch.library.opcheck(module._ssd_op.custom, (x, dt, A, B, C, None, None, False, None))
    x, dt, B, C = (t.detach()[:, 0].clone() for t in (x, dt, B, C))
    A, D, state = A.detach(), D.detach(), state.detach()
    torch.library.opcheck(module._step_inplace_op.custom, (x, dt, A, B, C, state, D))
    torch.library.opcheck(module._step_op.custom, leaves([x, dt, A, B, C, state, D]))


def test_autocast_does_not_reach_inside():
    tensors = make_inputs(1, 40, 2, 1, 8, 8)
    x, dt, A, B, C, D, state = tensors
    token = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state
    expected, expected_step = call(ssd, tensors), ssd_step(*token, D=D)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(map(torch.equal, call(ssd, tensors), expected))
        assert all(map(torch.equal, ssd_step(*token, D=D), expected_step))
        assert torch.equal(ssd_step_(*token[:5], state.clone(), D=D), expected_step[0])


def test_flops_count_the_recurrence():
    tensors = leaves(make_inputs(2, 30, 4, 2, 8, 16))
    with FlopCounterMode(display=False) as counter:
        y, _ = call(ssd, tensors)
    assert counter.get_total_flops() == 6 * 2 * 30 * 4 * 8 * 16
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 2 * 30 * 4 * 8 * 16
    x, dt, A, B, C, D, state = (t.detach() for t in tensors)
    with FlopCounterMode(display=False) as counter:
        ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
        ssd_step_(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
    assert counter.get_total_flops() == 2 * 6 * 2 * 4 * 8 * 16


@pytest.mark.parametrize('length', [1, 64, 150])
def test_exported_form_equals_eager(length):
    tensors = make_inputs(2, length, 4, (2, 4), 8, 16, strong=True)
    y, final = _torch_ssd.export_ssd(*tensors)
    expected, expected_final = call(ssd, tensors)
    assert relative_rms(y, expected) < 1e-6 and relative_rms(final, expected_final) < 1e-6


class Mixer(torch.nn.Module):
    def forward(self, x, dt, A, B, C, D, state):
        y, state = ssd(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)
        return y, ssd_step(x[:, -1], dt[:, -1], A, B[:, -1], C[:, -1], state)


def test_export_at_any_length():
    axes = {1: torch.export.Dim.DYNAMIC}
    shapes = dict(zip(('x', 'dt', 'A', 'B', 'C', 'D', 'state'), (axes, axes, None, axes, axes, None, None)))
    program = torch.export.export(Mixer(), tuple(make_inputs(2, 100, 4, 2, 8, 16)), dynamic_shapes=shapes)
    for length in (2, 63, 200):
        tensors = make_inputs(2, length, 4, 2, 8, 16, strong=True)
        y, step = program.module()(*tensors)
        expected, expected_step = Mixer()(*tensors)
        assert relative_rms(y, expected) < 1e-6 and all(
            map(lambda a, b: relative_rms(a, b) < 1e-6, step, expected_step)
        )


def test_compiles_without_a_graph_break():
    compiled = torch.compile(Mixer(), fullgraph=True, backend='aot_eager')
    tensors = make_inputs(2, 40, 4, 2, 8, 16)
    ours, eager = leaves(tensors), leaves(tensors)
    for inputs, model in ((ours, compiled), (eager, Mixer())):
        y, (z, state) = model(*inputs)
        (y.square().sum() + z.square().sum() + state.square().sum()).backward()
    assert all(relative_rms(a.grad, b.grad) < 1e-5 for a, b in zip(ours, eager))


def test_a_compiled_step_overwrites_its_state():
    x, dt, A, B, C, D, state = make_inputs(2, 1, 4, 2, 8, 16)
    token = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0]
    mine, theirs = state.clone(), state.clone()
    y = torch.compile(ssd_step_, fullgraph=True, backend='aot_eager')(*token, mine, D=D)
    assert torch.equal(y, ssd_step_(*token, theirs, D=D)) and torch.equal(mine, theirs)
    assert not torch.equal(mine, state)


def test_states_in_half_precision_are_taken_as_fp32():
    x, dt, A, B, C, D, state = make_inputs(1, 20, 2, 1, 8, 8, dtype=torch.bfloat16)
    state = state.bfloat16().requires_grad_()
    y, final = ssd(x, dt, A, B, C, initial_state=state, output_final_state=True)
    (y.float().sum() + final.sum()).backward()
    assert final.dtype == torch.float32 and state.grad.dtype == torch.bfloat16
