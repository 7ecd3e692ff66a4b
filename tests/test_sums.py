"""Sums over the shares of programs: three matrices in one launch, on the GPU where there is one, else interpreted."""

import pytest
import torch

pytest.importorskip('triton')
from zoo.kernels._triton.sums import Sums

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SHAPES = {
    'one': [(1, 1)],
    'norm': [(528, 100)] * 3,
    'short': [(3, 7), (65, 33), (64, 32)],
    'wide': [(3, 700), (33, 130), (17, 1)],
    'mix': [(4 * 5, 24), (4 * 5, 24), (4, 5 * 24)],
    'gates': [(2, 9 * 20), (11, 24 * 20), (11, 24)],
    'two': [(129, 31), (1, 70)],
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('wanted', [(True, True, True), (True, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize('name', SHAPES)
def test_every_sum_and_nothing_beside_it(name, wanted, dtype):
    shapes = SHAPES[name]
    sums = Sums(*shapes, wanted=wanted)
    assert sums.total == sum(rows * cols for rows, cols in shapes)
    shares = torch.randn(sums.total, device=DEVICE)
    guard = 5
    outs = [torch.full((cols + guard,), 7.0, dtype=dtype, device=DEVICE) for _, cols in shapes]
    sums(shares, *(out if want else None for out, want in zip(outs, wanted)))
    for (rows, cols), part, out, want in zip(shapes, shares.split_with_sizes(sums.sizes[: len(shapes)]), outs, wanted):
        expected = part.view(rows, cols).double().sum(0) if want else torch.full((cols,), 7.0, device=DEVICE)
        torch.testing.assert_close(out[:cols], expected.to(dtype), rtol=8e-3 if dtype != torch.float32 else 1e-6,
                                   atol=1e-5)  # fmt: skip
        assert (out[cols:] == 7).all()


def test_types_may_differ():
    sums = Sums((9, 40), (9, 40))
    shares = torch.randn(sums.total, device=DEVICE)
    a, b = torch.empty(40, dtype=torch.float16, device=DEVICE), torch.empty(40, device=DEVICE)
    sums(shares, a, b)
    expected = shares.view(2, 9, 40).double().sum(1)
    torch.testing.assert_close(b.double(), expected[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(a.double(), expected[0], rtol=1e-3, atol=1e-3)
