"""The causal convolution in front of linear mixers: every path against the token loop in fp64, gradients and states.

The Triton kernels run in Triton's CPU interpreter where there is no GPU; tests/gpu/check_vlm.py proves the compiled
code.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo.kernels.causal_conv import causal_conv, causal_conv_step_

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-6)).item()


def draw(shape, width, dtype=torch.float32, bias=True, state=True):
    """x as a slice of something wider, weight, bias, state, and the gradients of y and the final state."""
    torch.manual_seed(sum(shape) + width)
    batch, length, channels = shape
    make = lambda *s: torch.randn(*s).to(DEVICE, dtype)  # noqa: E731
    x = make(batch, length, channels + 3)[..., :channels]
    w, b = make(channels, width), make(channels) if bias else None
    past = make(batch, channels, width) if state else None
    return [x, w, b, past], [make(*shape), make(batch, channels, width)]


def run(tensors, down, activation, backend, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    x, w, b, past = leaves
    with zoo.kernel_backend(backend):
        out = causal_conv(x, w, b, activation=activation, initial_state=past, output_final_state=True)
        grads = torch.autograd.grad(
            out, [t for t in leaves if t is not None], [d.to(y.dtype) for d, y in zip(down, out)], allow_unused=True
        )
    return [*out, *(torch.zeros(1) if g is None else g for g in grads)]


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('width', [2, 4])
def test_matches_the_loop(width, activation, backend):
    if backend == 'triton':
        pytest.importorskip('triton')
    for length, (bias, state) in itertools.product((1, 2, 37), ((True, True), (False, False))):
        tensors, down = draw((2, length, 20), width, bias=bias, state=state)
        pairs = zip(run(tensors, down, activation, backend), run(tensors, down, activation, 'naive', torch.float64))
        assert max(relative_rms(x, y) for x, y in pairs) < 1e-5, (length, bias, state)


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend):
    if backend == 'triton':
        pytest.importorskip('triton')
    tensors, down = draw((2, 19, 24), 3, dtype)
    got = run(tensors, down, 'silu', backend)
    assert got[0].dtype == got[1].dtype == dtype
    expected = run(tensors, down, 'silu', 'naive', torch.float64)
    assert max(relative_rms(x, y) for x, y in zip(got, expected)) < LIMITS[dtype]


@pytest.mark.parametrize('backend', ['naive', 'torch', 'triton'])
def test_pieces_and_single_tokens_equal_one_pass(backend):
    """Prefill in chunks, then token by token, with the state handed on."""
    if backend == 'triton':
        pytest.importorskip('triton')
    (x, w, b, _), _ = draw((2, 11, 8), 4)
    with zoo.kernel_backend(backend):
        whole, last = causal_conv(x, w, b, activation='silu', output_final_state=True)
        state, pieces = None, []
        for piece in x[:, :9].split([1, 2, 6], 1):
            y, state = causal_conv(piece, w, b, activation='silu', initial_state=state, output_final_state=True)
            pieces.append(y)
        pieces += [causal_conv_step_(x[:, t], w, b, state, activation='silu').unsqueeze(1) for t in (9, 10)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last) and torch.equal(last, x[:, -4:].transpose(1, 2))


@pytest.mark.parametrize('op', [torch.ops.zoo.causal_conv, torch.ops.zoo.causal_conv_backward], ids=str)
def test_custom_ops_are_sound(op):
    pytest.importorskip('triton')
    tensors, down = draw((1, 5, 16), 2)
    if 'backward' in str(op):
        torch.library.opcheck(op, (*tensors, down[0], 'silu'))
    else:
        leaves = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(op, (*leaves, 'silu'), atol=1e-4, rtol=1e-4)


def test_export_flops_and_empty():
    (x, w, b, _), _ = draw((1, 6, 16), 2)

    class Conv(torch.nn.Module):
        def forward(self, x):
            return causal_conv(x, w, b, activation='silu')[0]

    tokens = torch.export.Dim('tokens', min=2, max=64)
    program = torch.export.export(Conv(), (x.contiguous(),), dynamic_shapes={'x': {1: tokens}})
    other = torch.randn(1, 9, 16, device=DEVICE)
    torch.testing.assert_close(program.module()(other), Conv()(other))
    pytest.importorskip('triton')
    with zoo.kernel_backend('triton'), FlopCounterMode(display=False) as counter:
        causal_conv(x, w, b)
    assert counter.get_total_flops() == 2 * 2 * x.numel()
    y, state = causal_conv(x[:, :0], w, b, output_final_state=True)
    assert y.shape == (1, 0, 16) and not state.any()


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'x': torch.zeros(2, 16)}, r'x must be \(B, T, C\)'),
        ({'weight': torch.zeros(16, 1, 2)}, r'weight must be \(C, W\) with C = 16'),
        ({'bias': torch.zeros(8)}, r'bias must be \(16,\)'),
        ({'activation': 'gelu'}, 'activation must be one of'),
        ({'initial_state': torch.zeros(2, 16)}, r'initial_state must be \(B, C, W\) = \(1, 16, 2\)'),
    ],
)
def test_errors_name_the_argument(change, words):
    arguments = {'x': torch.zeros(1, 3, 16), 'weight': torch.zeros(16, 2), 'bias': None} | change
    with pytest.raises(ValueError, match=words):
        causal_conv(**arguments)
