"""Convolution, norm and activation as one op: every path against the formula in fp64, and how patch embeddings use it.

The Triton kernels run on the GPU where there is one, else in Triton's CPU interpreter; tests/gpu/check_conv_norm.py
proves the compiled code at the sizes of models.
"""

from __future__ import annotations

import pytest
import torch
from zoo.kernels import conv_norm as conv

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# (B, CIN, h, w), C, kernel, stride, padding, activation, table: few input channels, then many
CASES = [
    ((2, 3, 40, 33), 96, 9, 8, 1, 'silu', False),
    ((1, 3, 9, 8), 48, 3, 2, 1, 'gelu', True),
    ((2, 1, 7, 5), 16, 2, 1, 0, None, False),
    ((1, 96, 7, 6), 48, 3, 2, 1, None, True),
    ((1, 48, 3, 4), 64, 3, 1, 1, 'gelu', True),
]


def arguments(shape, channels, kernel, stride, padding, activation, table, dtype=torch.float32, last=False):
    draw = lambda *s, dtype=torch.float32: torch.randn(*s).to(DEVICE, dtype)  # noqa: E731
    x = draw(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight = draw(channels, shape[1], kernel, kernel, dtype=dtype)
    oh, ow = ((n + 2 * padding - kernel) // stride + 1 for n in shape[2:])
    options = dict(stride=stride, padding=padding, activation=activation)
    options['table'] = draw(oh * ow, channels) if table else None
    return (x, weight, draw(channels), draw(channels), draw(channels)), options


def error(backend, tensors, options):
    with torch.no_grad(), zoo.kernel_backend(backend):
        y = conv.conv_norm(*tensors, **options)
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) else x  # noqa: E731
    expected = conv.naive_conv_norm(*map(wide, tensors), **{k: wide(v) for k, v in options.items()})
    return ((y.double() - expected).norm() / expected.norm()).item(), y


@pytest.mark.parametrize('backend', ['torch', 'triton'])  # on a GPU fp32 takes the torch path in both cases
@pytest.mark.parametrize('case', CASES, ids=str)
def test_against_the_formula(case, backend):
    for last in (False, True):
        tensors, options = arguments(*case, last=last)
        assert error(backend, tensors, options)[0] < 1e-5
    assert error(backend, (*tensors[:2], None, *tensors[3:]), options)[0] < 1e-5


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_half_precision(backend):
    for case in (CASES[0], CASES[3]):
        tensors, options = arguments(*case, dtype=torch.bfloat16)
        found, y = error(backend, tensors, options)
        assert found < 8e-3 and y.dtype == torch.bfloat16
        assert error(backend, tensors, options | dict(dtype=torch.float32))[1].dtype == torch.float32


def test_bad_arguments_are_named():
    (x, weight, bias, w, b), options = arguments(*CASES[1])
    for change, word in (((x[0], weight, bias, w, b), 'x must'), ((x, weight, bias, w[:-1], b), 'w_norm')):
        with pytest.raises(ValueError, match=word):
            conv.conv_norm(*change, **options)
    with pytest.raises(ValueError, match='activation'):
        conv.conv_norm(x, weight, bias, w, b, activation='relu')


@pytest.mark.parametrize('size', [(96, 96), (50, 71)])
def test_patch_embedding_uses_it_without_gradients(size, monkeypatch):
    model = zoo.create_model('test_vig', num_classes=0).eval().to(DEVICE)
    x = torch.randn(1, 3, *size, device=DEVICE)
    calls = []
    original = conv._op
    monkeypatch.setattr(conv, '_op', lambda *args: calls.append(args[9] is not None) or original(*args))
    expected = model.embed(x)
    with torch.no_grad(), zoo.kernel_backend('triton'), torch.autocast(DEVICE, torch.bfloat16, DEVICE == 'cuda'):
        y = model.embed(x)
    assert calls == [False, True] and y.shape == expected.shape and y.dtype == torch.float32
    torch.testing.assert_close(y, expected, **(dict(rtol=0, atol=0.1) if DEVICE == 'cuda' else {}))
    calls.clear()
    model.patch_embed.proj[1].register_forward_hook(lambda *args: None)
    with torch.no_grad(), zoo.kernel_backend('triton'):
        model.embed(x)
    assert not calls
