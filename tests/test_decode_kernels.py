"""One token through a layer: every path of `zoo.kernels.decode` against plain formulas in fp64.

The Triton kernels run in Triton's CPU interpreter where there is no GPU; tests/gpu/check_vlm.py proves the compiled
code.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from zoo.kernels import decode
from zoo.kernels.causal_conv import naive_causal_conv

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKENDS = ('torch', 'triton')


pytest.importorskip('triton')


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def error(x, reference) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('rows', 'inputs', 'outputs'), [(1, 48, 20), (3, 272, 7)])
def test_products(rows, inputs, outputs, backend):
    x, w, w3, b, r = (
        draw(*s) for s in ((rows, inputs), (outputs, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    xs, ws, w3s = x.double(), w.double(), w3.double()
    with zoo.kernel_backend(backend):
        assert error(decode.token_linear(x, w), xs @ ws.T) < 1e-6
        assert error(decode.token_linear(x, w, b, r), xs @ ws.T + b + r) < 1e-6
        assert error(decode.token_swiglu(x, w, w3), F.silu(xs @ ws.T) * (xs @ w3s.T)) < 1e-6
        half = [t.bfloat16() for t in (x, w, b, r)]
        expected = half[0].double() @ half[1].double().T + half[2] + half[3]
        assert error(decode.token_linear(*half), expected) < 1e-2  # two roundings, which the interpreter cuts off


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('biased', 'width'), [(True, 2), (False, 4)])
def test_projections_convolve_the_first_channels(biased, width, backend):
    sizes, rows, inputs, channels = (4, 4, 8, 8, 2), 2, 32, 16
    weights = [draw(n, inputs) for n in sizes]
    biases = [draw(n) if biased and i < 3 else None for i, n in enumerate(sizes)]
    conv, bias, state = draw(channels, width), draw(channels) if biased else None, draw(rows, channels, width)
    x = draw(rows, inputs)
    plain = torch.cat(
        [F.linear(x.double(), w.double(), b if b is None else b.double()) for w, b in zip(weights, biases)], -1
    )
    conved, pushed = naive_causal_conv(
        plain[:, None, :channels], conv.double(), bias, activation='silu', initial_state=state.double(),
        output_final_state=True,
    )  # fmt: skip
    with zoo.kernel_backend(backend):
        y = decode.token_projections_(x, weights, biases, conv, bias, state)
    assert error(y, torch.cat((conved[:, 0], plain[:, channels:]), -1)) < 1e-6
    assert error(state, pushed) < 1e-6


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('extras', [True, False])
def test_mamba2_step(extras, backend):
    batch, heads, kv, dim = 2, 4, 2, 12
    mixed = draw(batch, (2 * heads + 2 * kv) * dim + heads + 3)[:, :-3]
    state, dt_bias, weight = draw(batch, heads, dim, dim), draw(heads), draw(dim)
    dt_bias[0] = 30.0  # softplus is the identity there
    a_log, d = (draw(heads), draw(heads)) if extras else (None, None)
    wide = [None if t is None else t.double() for t in (mixed, state, dt_bias, a_log, d, weight)]
    y, new = decode.naive_mamba2_step(*wide, 1e-5, kv)
    with zoo.kernel_backend(backend):
        got = decode.mamba2_step_(mixed, state, dt_bias, a_log, d, weight, 1e-5, kv)
    assert error(got, y) < 1e-5 and error(state, new) < 1e-6


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('heads', 'kv', 'dim', 'length'), [(4, 2, 16, 1), (2, 2, 20, 130), (6, 1, 16, 300)])
def test_attention_over_a_buffer(heads, kv, dim, length, backend):
    """What lies past the length or before the start is never looked at."""
    q, capacity = draw(2, heads, dim), 300
    keys, values = draw(2, kv, capacity, dim), draw(2, kv, capacity, dim)
    start = torch.tensor([0, length - 1], device=DEVICE)
    group = heads // kv
    expected = []
    for b in range(2):
        k, v = (t[b, :, start[b] : length].double().repeat_interleave(group, 0) for t in (keys, values))
        expected.append(F.scaled_dot_product_attention(q[b, :, None].double(), k, v, scale=0.3)[:, 0])
    keys[:, :, length:] = values[:, :, length:] = float('nan')
    values[1, :, : length - 1] = float('nan')
    count = torch.tensor(length, device=DEVICE)
    with zoo.kernel_backend(backend):
        y = decode.decode_attention(q, keys, values, count, start=start, scale=0.3)
        assert error(y, torch.stack(expected)) < 1e-5
        plain = decode.decode_attention(q[:1], keys[:1], values[:1], count)
    k, v = (t[:1, :, :length].double().repeat_interleave(group, 1) for t in (keys, values))
    assert error(plain, F.scaled_dot_product_attention(q[:1, :, None].double(), k, v)[:, :, 0]) < 1e-5


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('rows', [1, 3])
def test_rotary_embedding_and_the_entry(rows, backend):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    kv, group, dim, capacity, entry = 2, 3, 12, 7, 4
    mixed = draw(3, kv, group + 2, dim)
    q, k, v = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
    angles = torch.cat([draw(rows, dim // 2)] * 2, -1)
    keys, values = draw(3, kv, capacity, dim), draw(3, kv, capacity, dim)
    before = keys.clone(), values.clone()
    parts = q.flatten(1, 2).unsqueeze(2), k.unsqueeze(2), angles.cos()[:, None], angles.sin()[:, None]
    rotated, key = apply_rotary_pos_emb(*parts)
    with zoo.kernel_backend(backend):
        place = torch.tensor([entry], device=DEVICE)
        y = decode.rotate_and_store_(q, k, v, angles.cos(), angles.sin(), keys, values, place)
    torch.testing.assert_close(y, rotated[:, :, 0])
    torch.testing.assert_close(keys[:, :, entry], key[:, :, 0])
    assert torch.equal(values[:, :, entry], v)
    others = [i for i in range(capacity) if i != entry]
    assert torch.equal(keys[:, :, others], before[0][:, :, others])
    assert torch.equal(values[:, :, others], before[1][:, :, others])


def test_custom_ops_are_sound():
    x, w = draw(1, 16), draw(8, 16)
    torch.library.opcheck(torch.ops.zoo.token_linear, (x, w, None, None))
    torch.library.opcheck(torch.ops.zoo.token_swiglu, (x, w, w))
    torch.library.opcheck(torch.ops.zoo.token_projections_, (x, [w], [None], draw(8, 2), None, draw(1, 8, 2)))
    state = draw(1, 1, 16, 16)
    torch.library.opcheck(torch.ops.zoo.mamba2_step_, (draw(1, 65), state, draw(1), None, None, draw(16), 1e-5, 1))


def test_errors_name_the_argument():
    x, w = torch.zeros(1, 16), torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r'token_linear: weight 0 must be \(O, C\) with C = 16'):
        decode.token_linear(x, w[:, :8])
    with pytest.raises(ValueError, match='token_projections_: the convolution has 6 channels'):
        decode.token_projections_(x, [w], [None], torch.zeros(6, 2), None, torch.zeros(1, 6, 2))
    with pytest.raises(ValueError, match=r'mamba2_step_: mixed must be'):
        decode.mamba2_step_(x, torch.zeros(1, 1, 4, 4), torch.zeros(1), None, None, torch.zeros(4), 1e-5, 1)
    with pytest.raises(ValueError, match='decode_attention: length must be one integer'):
        buffer = torch.zeros(1, 1, 4, 4)
        decode.decode_attention(torch.zeros(1, 1, 4), buffer, buffer, torch.zeros(1))
    with torch.enable_grad(), pytest.raises(ValueError, match='has no gradient'):
        decode.token_linear(x.requires_grad_(), w)
