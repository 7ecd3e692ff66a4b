"""GroupNorm: every path against its formula in fp64, with every gradient.

Triton kernels run on the GPU where there is one, else in Triton's CPU interpreter; tests/gpu/check_fused.py has the
sizes of models.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from zoo.kernels import _dispatch
from zoo.kernels import group_norm as ops
from zoo.kernels.group_norm import group_norm

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3}


def relative_rms(x, reference) -> float:
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-6)).item()


def results(backend, x, weight, bias, dtype, **options):
    """The output and all gradients."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
    given = iter(leaves)
    args = [next(given) if t is not None else None for t in (x, weight, bias)]
    with zoo.kernel_backend(backend):
        y = group_norm(args[0], 4, args[1], args[2], 1e-5, **options)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(DEVICE, y.dtype))]


@pytest.fixture(params=['one launch', 'three launches'], autouse=True)
def launches(request, monkeypatch):
    """Small images as the whole of a program, and as large ones."""
    kernels = _dispatch.triton_module('group_norm')
    from zoo.kernels._triton import _common

    monkeypatch.setattr(_common, '_plans', {})
    if request.param == 'three launches':
        monkeypatch.setattr(kernels, 'SMALL', 0)


@pytest.mark.parametrize('silu', [False, True])
@pytest.mark.parametrize('dtype', LIMITS, ids=str)
@pytest.mark.parametrize('shape', [(2, 40, 9, 31), (1, 96, 1, 1), (3, 4, 16, 8), (1, 128, 40, 7)], ids=str)
@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_paths_agree(backend, shape, dtype, silu):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + 5).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1]).to(DEVICE, dtype) for _ in range(2))
    found = results(backend, x, weight, bias, dtype, silu=silu)
    exact = results('naive', x, weight, bias, torch.float64, silu=silu)
    assert found[0].dtype == dtype and found[0].shape == x.shape
    if shape[2] > 1:
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    errors = [relative_rms(*pair) for pair in zip(found, exact, strict=True) if pair[1].norm() > 1e-6]
    assert max(errors) < LIMITS[dtype] * (4 if shape[2] == 1 else 1), errors


@pytest.mark.parametrize('given', [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(given):
    x = torch.randn(2, 12, 5, 6).to(DEVICE).contiguous(memory_format=torch.channels_last)
    pair = [torch.randn(12).to(DEVICE) if there else None for there in given]
    found, exact = results('triton', x, *pair, torch.float32), results('naive', x, *pair, torch.float64)
    assert max(relative_rms(a, b) for a, b in zip(found, exact, strict=True)) < 1e-5


def test_a_mean_far_from_zero_costs_no_digits():
    x = (torch.randn(1, 8, 32, 32) + 1e4).to(DEVICE).contiguous(memory_format=torch.channels_last)
    with zoo.kernel_backend('triton'):
        assert relative_rms(group_norm(x, 2), F.group_norm(x.double(), 2)) < 1e-3  # the mean alone has 5e-4


def test_every_element_is_written_and_other_layouts_are_pytorchs():
    x = torch.randn(2, 24, 6, 5).to(DEVICE)
    with zoo.kernel_backend('triton'):
        for given in (x, x[:, :, 1:], x.flatten(2), x.contiguous(memory_format=torch.channels_last)[:, :, :, 1:]):
            torch.testing.assert_close(group_norm(given, 3), F.group_norm(given, 3), atol=1e-5, rtol=1e-5)
        assert group_norm(x, 3, dtype=torch.float16).dtype == torch.float16
        y = group_norm(x.contiguous(memory_format=torch.channels_last), 3, dtype=torch.float16)
    assert y.dtype == torch.float16 and relative_rms(y, F.group_norm(x, 3)) < 1e-3
    assert group_norm(x[:0], 3).shape == (0, 24, 6, 5)


def test_custom_ops_and_compiler():
    x = torch.randn(1, 8, 5, 6).to(DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(8).to(DEVICE), torch.randn(8).to(DEVICE)
    for silu in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(ops._op.custom, (leaves[0], 4, *leaves[1:], 1e-5, silu, torch.float32))
    with zoo.kernel_backend('triton'):
        compiled = torch.compile(lambda x: group_norm(x * 2, 4, weight, bias), fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x), group_norm(x * 2, 4, weight, bias))


def test_bad_arguments_are_named():
    x = torch.randn(2, 24, 6, 5)
    with pytest.raises(ValueError, match='groups must divide'):
        group_norm(x, 5)
    with pytest.raises(ValueError, match='weight must be'):
        group_norm(x, 3, torch.ones(23))
