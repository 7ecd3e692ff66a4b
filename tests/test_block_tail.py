"""What follows ViG's scan as one op: every path against the formula in fp64, and how the models use it.

The Triton kernel runs on the GPU where there is one, else in Triton's CPU interpreter; tests/gpu/check_block_tail.py
proves the compiled code at the sizes of models.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo.backbones._vig_block import ViGPreNormBlock
from zoo.kernels import block_tail as tail

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
# tokens, heads, channels per head, hidden channels: one piece of channels, two pieces, the second one padded
SHAPES = [((2, 7), 2, 32, 64), ((1, 20), 3, 64, 128), ((3, 5), 3, 16, 64), ((1, 1), 5, 16, 64)]


def arguments(tokens, heads, dim, hidden, center=False, dtype=torch.float32, stream=torch.float32):
    """Slices of one projection for the gate, as the mixer has them."""
    width = heads * dim
    draw = lambda *shape, dtype=torch.float32: torch.randn(*shape).to(DEVICE, dtype)  # noqa: E731
    norm = lambda: tail.Norm(draw(width), draw(width) if center else None, 1e-5)  # noqa: E731
    per_head = lambda: draw(*tokens, heads, dim, dtype=dtype)  # noqa: E731
    gate = draw(*tokens, 3 * width, dtype=dtype)[..., width : 2 * width].unflatten(-1, (heads, dim))
    weights = [draw(*s) / s[1] ** 0.5 for s in ((width, width), (2 * hidden, width), (width, hidden))]
    return dict(
        stream=draw(*tokens, width, dtype=stream), o=per_head(), local=per_head(), gate=gate, gate_bias=draw(width),
        w_global=draw(dim), w_local=draw(dim), w_out=weights[0], norm=norm(), w_up=weights[1], w_down=weights[2],
        next_norm=norm(),
    )  # fmt: skip


def errors(backend, given, **options):
    with torch.no_grad(), zoo.kernel_backend(backend):
        got = tail.block_tail(**given, **options)
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) else x  # noqa: E731
    exact = {k: tail.Norm(*map(wide, v)) if isinstance(v, tail.Norm) else wide(v) for k, v in given.items()}
    expected = tail.naive_block_tail(**exact, **options)
    pairs = [(x, y) for x, y in zip(got, expected, strict=True) if y is not None]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs], got


@pytest.mark.parametrize('backend', ['torch', 'triton'])  # on a GPU fp32 takes the torch path in both cases
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_against_the_formula(shape, backend):
    for options in ({}, {'activation': 'silu', 'mix_eps': 1e-3}):
        for center in (False, True):
            found, _ = errors(backend, arguments(*shape, center), **options)
            assert max(found) < LIMITS[torch.float32], (found, options, center)
    found, (_, y) = errors(backend, arguments(*shape) | dict(gate_bias=None, next_norm=None))
    assert max(found) < LIMITS[torch.float32] and y is None


@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_half_precision(backend):
    for stream in (torch.float32, torch.bfloat16):
        found, (new, y) = errors(backend, arguments((2, 9), 3, 32, 64, dtype=torch.bfloat16, stream=stream))
        assert max(found) < LIMITS[torch.bfloat16], found
        assert new.dtype == stream and y.dtype == torch.bfloat16


def test_bad_shapes_name_the_argument():
    given = arguments((2, 3), 2, 16, 32)
    for change, word in (
        (dict(stream=given['stream'][:1]), 'stream'),
        (dict(w_up=given['w_up'][:-1]), 'w_up'),
        (dict(next_norm=tail.Norm(given['norm'].weight, given['norm'].weight)), 'next_norm'),
    ):
        with pytest.raises(ValueError, match=word):
            tail.block_tail(**given | change)


def test_flops_are_those_of_the_products():
    given = arguments((2, 3), 2, 16, 64)
    counts = []
    for backend in ('torch', 'triton'):
        with zoo.kernel_backend(backend), torch.no_grad(), FlopCounterMode(display=False) as counter:
            tail.block_tail(**given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 6 * (32 * 32 + 3 * 32 * 64)


def outputs(model, x, backend):
    with zoo.kernel_backend(backend), torch.no_grad():
        return model(x)


@pytest.mark.parametrize('name', ['test_vig', 'test_vig_hier'])
def test_models_use_it_without_gradients(name, monkeypatch):
    model = zoo.create_model(name, num_classes=7).eval().to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    x = torch.randn(1, 3, 48, 32, device=DEVICE)
    calls = []
    original = tail._op
    monkeypatch.setattr(tail, '_op', lambda *args: calls.append(args[15] is None) or original(*args))
    expected = outputs(model, x, 'torch')
    assert not calls
    if DEVICE == 'cuda':
        with torch.autocast('cuda', torch.bfloat16):
            torch.testing.assert_close(outputs(model, x, 'triton').float(), expected, rtol=5e-2, atol=5e-2)
    else:
        torch.testing.assert_close(outputs(model, x, 'triton'), expected, rtol=1e-4, atol=1e-4)
    # The norm behind the last block of a plain ViG is done too; a pyramid's last block of a stage has none.
    assert calls == ([False] * 3 if name == 'test_vig' else [True, False, True, True])
    calls.clear()
    with zoo.kernel_backend('triton'):
        model(x)  # gradients may follow
    assert not calls


def test_blocks_with_hooks_and_adapters_are_called(monkeypatch):
    model = zoo.create_model('test_vig', num_classes=0).eval().to(DEVICE)
    block = model.blocks[0]
    assert isinstance(block, ViGPreNormBlock) and block._is_plain()
    for module in (block.mlp, block.attn.g_norm, block.attn.o_proj, block.mlp_norm, block.mlp.down_proj):
        handle = module.register_forward_hook(lambda *args: None)
        assert not block._is_plain()
        handle.remove()
    assert block._is_plain()
    block.mlp.down_proj = torch.nn.Sequential(block.mlp.down_proj)
    assert not block._is_plain()
