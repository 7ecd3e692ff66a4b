"""Checks the op behind ViG's scan on a GPU: the mix, the output projection, the MLP and the norms in one kernel.

    python tests/gpu/check_block_tail.py [--out FILE]

Every width that takes the kernel, token counts that fill programs and that do not, strided gates, RMSNorm and
LayerNorm, streams in fp32 and bf16, several seeds, on poisoned memory, twice for determinism, against fp64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from harness import DEVICE, main, verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_block_tail import arguments
from zoo.kernels import block_tail as tail

# (tokens, heads, channels per head, hidden channels)
SHAPES = [
    ((16, 4096), 3, 64, 512),  # ViG-T
    ((8, 3136), 3, 32, 256),  # ViG-H-T and -S, stages 1 and 2
    ((8, 784), 6, 32, 512),
    ((4, 3136), 4, 32, 384),  # 128 channels, one piece
    ((3, 197), 2, 32, 192),
    ((1, 1), 3, 64, 512),
    ((1, 127), 3, 64, 64),
    ((1, 129), 5, 16, 128),
    ((2, 333), 5, 32, 448),
]
LIMIT = 6e-3  # relative RMS: three products in a row round their operands to bf16


def check(say) -> int:
    """The number of bad cases."""
    bad = 0
    for shape in SHAPES:
        worst = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            center, stream = seed == 1, torch.bfloat16 if seed == 2 else torch.float32
            given = arguments(*shape, center, torch.bfloat16, stream)
            for name in ('w_out', 'w_up', 'w_down'):
                given[name] = given[name].bfloat16().float()  # the kernel's products are in bf16
            options = {'activation': 'silu' if seed else None}

            def run(given=given, options=options):
                with torch.no_grad():
                    return dict(zip(('new', 'y'), tail.block_tail(**given, **options), strict=True))

            wide = lambda x: x.double() if isinstance(x, torch.Tensor) else x  # noqa: E731
            exact = {k: tail.Norm(*map(wide, v)) if isinstance(v, tail.Norm) else wide(v) for k, v in given.items()}
            expected = dict(zip(('new', 'y'), tail.naive_block_tail(**exact, **options), strict=True))
            with torch.no_grad():
                used = tail.fits_block_tail(given['o'], given['w_global'], given['w_down'])
            good, errors = verdict(run, expected, LIMIT, (shape, seed))
            bad += not (good and used)
            worst = max(worst, *errors.values())
        say(what='block_tail', shape=str(shape), worst=worst)
    return bad


if __name__ == '__main__':
    assert DEVICE == 'cuda'
    main(check)
