"""Times block sizes of the kernels of rank-augmented linear attention on a GPU, bf16, heads of 64 channels.

    python tests/gpu/sweep_rank_augmented.py

Forward and backward apart, replayed in a CUDA graph at the two linear stages of RAVLT-S at 224 px, batch 256. A row is
printed only with the error against the table in use, because a fast row may be a wrong one. The table itself is
`config` in kernels/_triton/rank_augmented.py.
"""

import json

import torch
from zoo.kernels._triton import _common
from zoo.kernels._triton import rank_augmented as kernels
from zoo.kernels._triton.linear_attention import Config, Options

from zoo.tools._timing import graph_ms

SHAPES = {'stage1': (256, 56, 56, 1), 'stage2': (256, 28, 28, 2)}
SUMS = {
    'fwd': [(32, 4, 3, 4, 128), (32, 2, 3, 8, None), (16, 2, 3, 8, None), (32, 1, 3, 16, None), (16, 1, 3, 16, None)],
    'bwd': [(16, 4, 3, 4, 128), (16, 2, 3, 8, None), (32, 2, 3, 8, None), (16, 2, 2, 8, 128), (16, 1, 3, 16, None)],
}
READS = {
    'fwd': [(64, 4, 3, 4, None), (32, 2, 3, 4, None), (64, 2, 3, 4, None), (32, 1, 3, 4, None), (16, 1, 3, 4, None)],
    'bwd': [(32, 4, 3, 4, None), (32, 2, 3, 4, None), (16, 2, 3, 4, None), (32, 1, 3, 4, None), (16, 1, 3, 4, None)],
}


def steps(batch, height, width, heads):
    """Calls of the forward and of the backward pass on one set of inputs."""
    draw = lambda *more: torch.randn(batch, height * width, *more, device='cuda').bfloat16()  # noqa: E731
    q, k, v, gate = draw(4, heads, 64).unbind(2)
    lepe, dy = draw(heads, 64), draw(heads, 64)
    forward = lambda: kernels.rank_augmented_fwd(q, k, v, lepe, gate, height, width, 1e-6)  # noqa: E731
    kept = forward()[1]
    backward = lambda: kernels.rank_augmented_bwd(q, k, v, lepe, gate, kept, dy, height, width, 1e-6)  # noqa: E731
    return {'fwd': forward, 'bwd': backward}


def error(found, expected) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs)


def main():
    table = kernels.config
    for label, shape in SHAPES.items():
        sets = [steps(*shape) for _ in range(3)]
        for which in ('fwd', 'bwd'):
            kernels.config = table
            _common._plans.clear()
            expected = sets[0][which]()
            first = SUMS[which][0], READS[which][0]
            rows = [(s, first[1]) for s in SUMS[which]] + [(first[0], r) for r in READS[which][1:]]
            for sums, reads in rows:
                kernels.config = lambda *_: Config(64, 64, 1, Options(*sums), Options(*reads))  # noqa: B023
                _common._plans.clear()  # launches were made for another table
                row = dict(shape=label, what=which, sums=sums, reads=reads)
                try:
                    row['error'] = float(f'{error(sets[0][which](), expected):.2g}')
                    row['ms'] = round(graph_ms([s[which] for s in sets], 20), 4)
                except Exception as problem:
                    row['problem'] = f'{type(problem).__name__}: {problem}'[:200]
                print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
