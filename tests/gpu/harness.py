"""What the GPU checks share: the error measure, poisoned allocations, comparison with a limit, and the command line.

Timing is `zoo bench kernels`; its pieces are in zoo/tools/_timing.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DEVICE = 'cuda'
# Relative RMS: of outputs and gradients, of gradients of log gates.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.float16: (1.5e-3, 2e-3), torch.bfloat16: (5e-3, 1e-2)}


def rms(value: Tensor, expected: Tensor) -> float:
    """Relative root mean square error; infinite where a value is not finite or the shape differs.

    Args:
        value: any dtype.
        expected: the same shape.
    """
    if value.shape != expected.shape or not torch.isfinite(value).all():
        return float('inf')
    a, b = value.double(), expected.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-2)).item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh allocation of `torch.empty` and its kin with NaN, so that an element nobody writes shows."""
    plain = {name: getattr(torch, name) for name in ('empty', 'empty_like', 'empty_strided')}
    plain_new = torch.Tensor.new_empty

    def fill(x: Tensor) -> Tensor:
        if x.device.type == 'meta':
            return x
        return x.fill_(float('nan')) if x.is_floating_point() else x.fill_(1 if x.dtype == torch.bool else -7)

    for name, make in plain.items():
        setattr(torch, name, lambda *a, make=make, **kw: fill(make(*a, **kw)))
    torch.Tensor.new_empty = lambda *a, **kw: fill(plain_new(*a, **kw))
    try:
        yield
    finally:
        for name, make in plain.items():
            setattr(torch, name, make)
        torch.Tensor.new_empty = plain_new


def verdict(
    run: Callable[[], dict[str, Tensor]],
    expected: dict[str, Tensor],
    limits: dict[str, float] | float,
    label: object,
) -> tuple[bool, dict[str, float]]:
    """Run twice on poisoned memory: results within their limits and bitwise the same both times?

    Args:
        run: gives results by name, at least those of `expected`.
        expected: by name, fp64 or so.
        limits: relative RMS, one for all or by name.
        label: printed with what is wrong.

    Returns:
        Whether all is well, and the errors by name.
    """
    with poisoned():
        got, again = run(), run()
    errors = {n: rms(got[n], x) for n, x in expected.items()}
    changed = [n for n in expected if not torch.equal(got[n], again[n])]
    limits = limits if isinstance(limits, dict) else dict.fromkeys(expected, limits)
    good = not changed and all(e <= limits[n] for n, e in errors.items())
    if not good:
        found = {n: f'{e:.1e}' for n, e in errors.items()}
        print('BAD', label, f'NOT DETERMINISTIC: {changed}' if changed else '', found, flush=True)
    return good, errors


def main(check: Callable[..., int]) -> None:
    """Command line of a check: `--out FILE` writes its rows, `--shard I/N` and `--dtypes A,B` cut it up.

    Args:
        check: `check(say, shard=(i, n), dtypes=[...])` gives the number of bad cases; `say(**row)` notes a row.
            Arguments that it does not take are not passed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', type=Path)
    parser.add_argument('--shard', default='0/1')
    parser.add_argument('--dtypes', default='float32,float16,bfloat16')
    args = parser.parse_args()
    rows: list[dict] = []

    def say(**row) -> None:
        rows.append(row)
        print(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + '\n')

    import triton

    versions = dict(torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda)
    say(what='device', name=torch.cuda.get_device_name(), **versions)
    offered = dict(
        shard=tuple(map(int, args.shard.split('/'))), dtypes=[getattr(torch, d) for d in args.dtypes.split(',')]
    )
    start = time.time()
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    bad = check(say, **{k: v for k, v in offered.items() if k in wanted})
    say(what='end', bad=bad, seconds=round(time.time() - start, 1))
    sys.exit(bool(bad))
