"""Checks convolution, norm and activation in one kernel on a GPU.

    python tests/gpu/check_conv_norm.py [--out FILE]

The patch embeddings of ViG and ViG-H and odd sizes, images in both memory formats and in fp32 and bf16, several seeds,
on poisoned memory, twice for determinism, against the formula in fp64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from harness import LIMITS, main, verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_conv_norm import arguments
from zoo.kernels import conv_norm as conv

# (B, CIN, h, w), C, kernel, stride, padding, activation, table
CASES = [
    ((4, 3, 1024, 1024), 96, 9, 8, 1, 'silu', False),  # ViG-T
    ((4, 96, 128, 128), 192, 3, 2, 1, None, True),
    ((8, 3, 224, 224), 192, 9, 8, 1, 'silu', False),  # ViG-S
    ((8, 3, 224, 224), 48, 3, 2, 1, 'gelu', False),  # ViG-H
    ((8, 48, 112, 112), 96, 3, 2, 1, None, False),
    ((3, 3, 97, 61), 256, 9, 8, 1, 'silu', True),
    ((3, 1, 41, 33), 16, 5, 4, 2, None, True),
    ((2, 192, 27, 15), 256, 3, 2, 1, None, True),
    ((1, 16, 5, 7), 80, 3, 1, 1, 'gelu', True),
]


def check(say) -> int:
    """The number of bad cases."""
    bad = 0
    for case in CASES:
        worst = 0.0
        for seed in range(3):
            torch.manual_seed(seed)
            tensors, options = arguments(*case, dtype=torch.bfloat16, last=seed == 1)
            if seed == 2 and tensors[0].shape[1] <= 8:
                tensors = (tensors[0].float(), *tensors[1:])  # under autocast an image comes in fp32
            options['dtype'] = torch.float32 if seed else torch.bfloat16

            def run(tensors=tensors, options=options):
                with torch.no_grad():
                    return {'y': conv.conv_norm(*tensors, **options)}

            wide = [x.double() for x in tensors]
            expected = conv.naive_conv_norm(*wide, **options | dict(dtype=torch.float64))
            with torch.no_grad():
                used = conv.fits_conv_norm(*tensors[:2])
            good, errors = verdict(run, {'y': expected}, LIMITS[torch.bfloat16][0], (case, seed))
            bad += not (good and used)
            worst = max(worst, errors['y'])
        say(what='conv_norm', case=str(case), worst=worst)
    return bad


if __name__ == '__main__':
    main(check)
