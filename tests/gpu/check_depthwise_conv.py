"""Checks the depthwise convolution kernels on the GPU: python tests/gpu/check_depthwise_conv.py [--out FILE]

Every kernel size, option and kind of shape, and each dtype, against a sum of shifted maps in fp64, with every gradient,
over two seeds, on poisoned memory, twice for determinism; then autocast, a CUDA graph and a compiled call. Nearly all
of the time is compilation of some hundred kernels: `--shard I/N` for every I at once takes an N-th of it.
"""

from functools import partial

import torch
from harness import DEVICE, LIMITS, main, rms, verdict
from torch import Tensor
from zoo.kernels.depthwise_conv import depthwise_conv2d, naive_depthwise_conv2d

PLAIN = dict(residual=False, activation=None, pre_activation=None)
SKIP = PLAIN | dict(residual=True)
SILU = PLAIN | dict(activation='silu')
FFN = SKIP | dict(pre_activation='gelu')
ALL = dict(residual=True, activation='gelu', pre_activation='gelu')
CASES = [  # B, H, W, C, kernel size, options, bias, slice of wider channels; fp16 takes every third
    (16, 14, 14, 384, 3, PLAIN, False, False),
    (4, 64, 64, 192, 3, SILU, False, False),
    (4, 56, 56, 64, 3, SKIP, True, False),
    (4, 56, 56, 64, 5, PLAIN, True, True),
    (4, 56, 56, 224, 3, FFN, True, False),
    (8, 14, 14, 256, 5, PLAIN, True, True),
    (8, 14, 14, 896, 3, FFN, True, False),
    (16, 12, 12, 144, 3, SKIP, True, False),
    (16, 12, 12, 144, 7, PLAIN, False, False),
    (8, 6, 6, 192, 5, SKIP, False, False),
    (2, 13, 27, 40, 5, SILU | dict(residual=True), True, False),
    (2, 13, 27, 48, 7, FFN, True, True),
    (2, 31, 5, 36, 3, PLAIN | dict(activation='relu'), True, False),
    (3, 9, 11, 20, 5, ALL, True, False),
    (3, 9, 11, 17, 3, ALL, True, True),  # odd strides: nothing is aligned
    (2, 7, 7, 512, 7, ALL, True, False),
    (2, 1, 1, 64, 3, SKIP, True, False),
    (1, 1, 300, 32, 7, SILU, True, False),
    (1, 300, 1, 32, 5, SKIP, True, False),
    (5, 8, 8, 64, 1, SILU, True, False),
]


def make(case: tuple, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias or None, dy; with a skip the parameters are in fp32, as under autocast."""
    B, H, W, C, size, options, bias, sliced = case
    torch.manual_seed(seed)
    draw = partial(torch.randn, device=DEVICE)
    x = draw(B, H, W, 3 * C).to(dtype)[..., C : 2 * C] if sliced else draw(B, H, W, C).to(dtype)
    own = torch.float32 if options['residual'] else dtype
    return x, (draw(C, 1, size, size) / size).to(own), draw(C).to(own) if bias else None, draw(B, H, W, C).to(dtype)


def run(function, x, weight, bias, dy, options: dict) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {
        n: t.detach().requires_grad_() for n, t in zip(('dx', 'dweight', 'dbias'), (x, weight, bias)) if t is not None
    }
    y = function(leaves['dx'], leaves['dweight'], leaves.get('dbias'), **options)
    return {'y': y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))))


def oracle(x, weight, bias, dy, options: dict) -> dict[str, Tensor]:
    """The same in fp64 by the naive sum of shifted maps."""
    wide = [None if t is None else t.double() for t in (x, weight, bias, dy)]
    return run(naive_depthwise_conv2d, *wide, options)


def in_other_surroundings(say) -> int:
    """Autocast, a captured graph and a compiled call give what a plain call gives."""
    bad = 0
    x, weight, bias, dy = make((4, 14, 14, 64, 3, SKIP, True, False), torch.float32, 0)
    expected = oracle(x, weight, bias, dy, SKIP)
    compiled = torch.compile(depthwise_conv2d, fullgraph=True)
    for name, function in (('autocast', depthwise_conv2d), ('compiled autocast', compiled)):
        with torch.autocast(DEVICE, torch.bfloat16):
            half = function(x, weight, bias)
            got = run(function, x, weight, bias, dy, SKIP)
        errors = {n: rms(got[n], t) for n, t in expected.items()}
        good = half.dtype == torch.bfloat16 and got['y'].dtype == torch.float32 and max(errors.values()) < 5e-3
        bad += not good
        say(what=name, good=good, **errors)
    out = depthwise_conv2d(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = depthwise_conv2d(x, weight, bias)
    captured.zero_()
    graph.replay()
    good = torch.equal(captured, out)
    say(what='CUDA graph', good=good)
    return bad + (not good)


def check(say, dtypes=(torch.float32, torch.float16, torch.bfloat16), shard=(0, 1)) -> int:
    """Number of bad cases.

    Args:
        say: notes a row.
        dtypes: to check.
        shard: (i, n) takes every n-th case from the i-th on.
    """
    bad = 0
    for dtype in dtypes:
        cases = (CASES[::3] if dtype == torch.float16 else CASES)[shard[0] :: shard[1]]
        worst = dict.fromkeys(('y', 'dx', 'dweight', 'dbias'), 0.0)
        for case in cases:
            for seed in (0, 1):
                tensors, options = make(case, dtype, seed), case[5]
                ours = partial(run, depthwise_conv2d, *tensors, options)
                good, errors = verdict(ours, oracle(*tensors, options), LIMITS[dtype][0], (dtype, case, seed))
                bad += not good
                worst |= {n: max(e, worst[n]) for n, e in errors.items()}
        say(what='depthwise_conv2d', dtype=str(dtype)[6:], cases=len(cases), **worst)
    return bad + in_other_surroundings(say)


if __name__ == '__main__':
    main(check)
