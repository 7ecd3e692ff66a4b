"""Checks the kernels of the selective scan on the GPU against the torch path in fp64.

    python tests/gpu/check_selective_scan.py [--out FILE] [--shard I/N] [--dtypes A,B]

Several seeds, poisoned memory, twice for determinism, every gradient; the public ops in both memory layouts besides.
The torch path is itself tested against the recurrence in tests/test_selective_scan.py.
"""

from __future__ import annotations

import torch
from harness import DEVICE, LIMITS, main, rms, verdict
from torch import Tensor
from zoo.kernels import _torch_selective_scan as exact
from zoo.kernels._triton import selective_scan as kernels
from zoo.kernels.selective_scan import naive_selective_scan_2d, selective_scan_2d

MAP_NAMES = ('x', 'p', 'dt_weight', 'dt_bias', 'A', 'D')
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
MAPS = [  # B, D, H, W, R, N, directions, factor of the step sizes
    (8, 224, 12, 12, 7, 1, 2, 1),
    (8, 384, 6, 6, 12, 1, 2, 1),
    (8, 448, 3, 3, 14, 1, 2, 1),
    (4, 320, 16, 16, 10, 1, 2, 30),
    (3, 544, 4, 4, 17, 1, 2, 1),
    (2, 320, 32, 32, 10, 1, 2, 1),
    (2, 70, 5, 41, 16, 1, 2, 1),
    (1, 33, 1, 1, 3, 1, 2, 1),
    (2, 96, 14, 9, 6, 1, 4, 1),
    (2, 64, 7, 11, 4, 16, 4, 1),
]
SEQUENCES = [  # B, D per group, groups, T, N, reverse, tokens contiguous, softplus, bias and skip, factor
    (4, 384, 1, 196, 16, False, True, True, True, 1),
    (2, 384, 1, 4096, 16, False, True, True, True, 1),
    (4, 384, 1, 197, 16, False, False, True, True, 1),
    (4, 384, 1, 196, 16, True, True, True, True, 30),
    (2, 40, 2, 333, 5, False, True, False, False, 1),
    (2, 64, 1, 1030, 1, True, False, True, True, 1),
    (2, 64, 1, 1024, 1, False, True, True, True, 30),
    (3, 33, 1, 1, 2, False, True, True, False, 1),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def wide(tensors: tuple) -> list:
    """The tensors in fp64."""
    return [t.double() if torch.is_tensor(t) else t for t in tensors]


def map_case(case: tuple, dtype: torch.dtype, seed: int) -> tuple:
    """`run` for the kernels, and what it should give."""
    batch, channels, height, width, rank, states, directions, factor = case
    torch.manual_seed(seed)
    rows = directions * (rank + 2 * states)
    x, p = randn(batch, height, width, channels, dtype=dtype), randn(batch, height, width, rows, dtype=dtype)
    weight = randn(directions, channels, rank) * rank**-0.5 * factor
    A = -randn(directions * channels, states).exp()
    arguments = (x, p, weight, randn(directions, channels), A, randn(directions * channels), directions)
    dy = randn(*x.shape, dtype=dtype)

    def run(path=kernels, inputs=arguments, dy=dy) -> dict[str, Tensor]:
        grads = path.selective_scan_2d_bwd(*inputs, dy)
        return {'y': path.selective_scan_2d_fwd(*inputs)} | {f'd{n}': g for n, g in zip(MAP_NAMES, grads)}

    return run, run(exact, wide(arguments), dy.double())


def sequence_case(case: tuple, dtype: torch.dtype, seed: int) -> tuple:
    """`run` for the kernels, and what it should give."""
    batch, per_group, groups, length, states, reverse, tokens_last, softplus, extras, factor = case
    torch.manual_seed(seed)
    channels = groups * per_group
    turned = lambda x: x if tokens_last else x.mT.contiguous().mT  # noqa: E731
    u, delta, dy = (turned(randn(batch, channels, length, dtype=dtype)) for _ in range(3))
    delta = (delta * factor if softplus else delta.abs()).to(dtype)
    B, C = (randn(batch, groups, states, length, dtype=dtype) for _ in range(2))
    D, bias = (randn(channels), randn(channels)) if extras else (None, None)
    arguments = (u, delta, -randn(channels, states).exp(), B, C, D, bias, softplus, reverse)

    def run(path=kernels, inputs=arguments, dy=dy) -> dict[str, Tensor]:
        grads = path.selective_scan_bwd(*inputs, dy)
        found = {f'd{n}': g for n, g in zip(NAMES, grads) if g is not None}
        return {'y': path.selective_scan_fwd(*inputs)} | found

    return run, run(exact, wide(arguments), dy.double())


CASES = [(map_case, case) for case in MAPS] + [(sequence_case, case) for case in SEQUENCES]


def check_public(dtype: torch.dtype) -> bool:
    """The op on maps through autograd, in both memory layouts, against the recurrence with all gradients."""
    torch.manual_seed(0)
    directions, rank, channels = 2, 7, 64
    x, x_proj = randn(3, channels, 6, 5, dtype=dtype), randn(directions, rank + 2, channels) * channels**-0.5
    parameters = (x_proj, randn(directions, channels, rank) * rank**-0.5, randn(directions, channels),
                  randn(directions * channels, 1), randn(directions * channels))  # fmt: skip
    dy, good = randn(*x.shape, dtype=dtype), True

    def run(op, inputs, dy):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = op(*leaves, directions=directions)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    want = run(naive_selective_scan_2d, wide((x, *parameters)), dy.double())
    for memory in (torch.contiguous_format, torch.channels_last):
        got = run(selective_scan_2d, (x.to(memory_format=memory), *parameters), dy)
        errors = [rms(a, b) for a, b in zip(got, want)]
        # The projections are rounded to the input's dtype too, as in any network that runs in it.
        if max(errors) > 3 * LIMITS[dtype][0]:
            print('BAD public', dtype, memory, [f'{e:.1e}' for e in errors], flush=True)
            good = False
    return good


def check(say, shard=(0, 1), dtypes=(torch.float32, torch.float16, torch.bfloat16)) -> int:
    """Number of bad cases.

    Args:
        say: takes a row by keywords.
        shard: (i, n): every n-th case from the i-th.
        dtypes: of the inputs.
    """
    bad = 0
    for make, case in CASES[shard[0] :: shard[1]]:
        for dtype in dtypes:
            worst: dict[str, float] = {}
            for seed in range(2):
                run, expected = make(case, dtype, seed)
                limits = {n: LIMITS[dtype][0 if n == 'y' else 1] for n in expected}
                if expected['dA'].abs().max() < 1e-12:  # at T = 1, where what rounding leaves is compared with zero
                    limits['dA'] = max(limits['dA'], 1e-4)
                good, errors = verdict(run, expected, limits, (make.__name__, case, dtype, seed))
                bad += not good
                worst = {n: max(e, worst.get(n, 0.0)) for n, e in errors.items()}
            say(what=make.__name__, case=list(case), dtype=str(dtype), worst=max(worst, key=worst.get), **worst)
    if shard[0] == 0:
        bad += sum(not check_public(dtype) for dtype in dtypes)
    return bad


if __name__ == '__main__':
    main(check)
