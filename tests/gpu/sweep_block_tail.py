"""Times and checks choices for the tables of block_tail.py and conv_norm.py at ViG-T's shapes (1024 px, batch 16).

And of swiglu.py's product with the activation in it at ViG-S's (224 px, batch 256), beside the two ops it replaces.

    python tests/gpu/sweep_block_tail.py

Per choice: milliseconds with the L2 cache cold, relative RMS against the formula in fp64 over the first rows. A choice
counts only where its error is that of the others: Triton 3.6 miscompiles some of them on Hopper.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
from harness import rms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_block_tail
import test_conv_norm
from zoo.kernels import block_tail, conv_norm, swiglu
from zoo.kernels._triton import _common
from zoo.kernels._triton import block_tail as tails
from zoo.kernels._triton import conv_norm as convs
from zoo.kernels._triton import swiglu as products

TAILS = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)]
FEW = [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (128, 32, 8, 2)]
MANY = [(128, 32, 8, 4), (128, 32, 8, 3), (128, 16, 8, 4), (64, 32, 4, 4), (64, 32, 4, 3)]

PRODUCTS = [(128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 2), (128, 64, 64, 8, 4),
            (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (256, 64, 64, 8, 3)]  # fmt: skip


def sweep(name: str, choices: list[tuple], module, run, expected: torch.Tensor) -> None:
    for choice in choices:
        module.config = lambda *args, choice=choice: module.Config(*choice)
        _common._plans.clear()  # launches were made for another table
        try:
            with torch.no_grad():
                error = rms(run()[: len(expected)], expected)
                ms = triton.testing.do_bench(run, warmup=20, rep=100)
            print(f'{name} {choice}: {ms:.4f} ms, error {error:.1e}', flush=True)
        except Exception as failure:
            print(f'{name} {choice}: {type(failure).__name__} {str(failure)[:120]}', flush=True)


def main() -> None:
    torch.manual_seed(0)
    given = test_block_tail.arguments((16, 4096), 3, 64, 512, dtype=torch.bfloat16)
    for name in ('w_out', 'w_up', 'w_down'):
        given[name] = given[name].bfloat16()
    wide = lambda x: x[:1].double() if x.shape[0] == 16 else x.double()  # noqa: E731
    exact = {k: v if isinstance(v, block_tail.Norm) else wide(v) for k, v in given.items()}
    expected = block_tail.naive_block_tail(**exact)[0]
    sweep('block_tail', TAILS, tails, lambda: block_tail.block_tail(**given)[0], expected)
    x, w = (torch.randn(n, 384, device='cuda').bfloat16() for n in (50176, 2048))
    w *= 0.05
    expected = swiglu.naive_swiglu(x[:4096].double() @ w.double().T)
    sweep('swiglu_linear', PRODUCTS, products, lambda: swiglu.swiglu_linear(x, w), expected)
    sweep('its two ops', [PRODUCTS[0]], products, lambda: swiglu.swiglu(x @ w.T), expected)
    for name, choices, case in (
        ('conv_norm, few', FEW, ((16, 3, 1024, 1024), 96, 9, 8, 1, 'silu', False)),
        ('conv_norm, many', MANY, ((16, 96, 128, 128), 192, 3, 2, 1, None, True)),
    ):
        many = case[0][1] > 8
        tensors, options = test_conv_norm.arguments(*case, dtype=torch.bfloat16, last=many)
        exact = [tensors[0][:1].double(), *(x.double() for x in tensors[1:])]
        expected = conv_norm.naive_conv_norm(*exact, **options | dict(dtype=torch.float64))
        sweep(name, choices, convs, lambda t=tensors, o=options: conv_norm.conv_norm(*t, **o), expected)


if __name__ == '__main__':
    main()
