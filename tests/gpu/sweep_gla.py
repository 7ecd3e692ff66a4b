"""Other block sizes than the table's: `one N` checks a variant (each in its own process: a miscompiled one may fault),
`time FILE...` times those that passed, kernel by kernel. Variants are counted by `count`."""

import json
import sys
from pathlib import Path

import torch
from check_gla import make, reference, run
from harness import rms
from zoo.kernels._triton import _common, gla

from zoo.tools._bench_gla import SHAPES
from zoo.tools._timing import graph_ms

# backward, chunk, (warps, stages[, register cap]) of the states, the same of the chunks; group, ahead, sums, loop
VARIANTS = [
    (False, 64, (4, 3), (4, 2)), (False, 64, (4, 3), (4, 3)), (False, 64, (4, 3), (4, 4)), (False, 32, (4, 3), (4, 3)),
    (False, 64, (4, 2), (4, 3)), (False, 64, (4, 3), (4, 3, 168)),
    (True, 32, (4, 3), (4, 2), 1, 1, 'tf32'), (True, 32, (4, 3, 112), (4, 2), 3, 2, 'tf32'),
    (True, 32, (4, 3, 96), (4, 2), 4, 2, 'tf32'), (True, 32, (4, 3, 112), (4, 2), 3, 2, 'bf16'),
    (True, 32, (4, 3), (8, 2), 1, 1, 'tf32'), (True, 16, (4, 4), (2, 2), 7, 2, 'bf16'),
    (True, 32, (4, 3, 112), (2, 2), 1, 1, 'tf32', True), (True, 32, (4, 3, 112), (4, 2), 1, 1, 'tf32', True),
    (True, 32, (4, 3, 112), (2, 2, 224), 1, 1, 'tf32', True), (True, 32, (4, 3, 112), (2, 2), 1, 1, 'tf32'),
]  # fmt: skip
PLAIN = gla.config


def use(variant):
    backward, bt, states, chunks, *loop = variant
    loop = {'loop': False} | dict(zip(('group', 'ahead', 'sums', 'loop'), loop))

    def config(dtype, K, V, b, both):
        c = PLAIN(dtype, K, V, b, both)
        if b != backward:
            return c
        return c._replace(bt=bt, states=gla._options(*states), chunks=gla._options(*chunks), **loop)

    gla.config = config
    _common._plans.clear()
    _common._launched.clear()


def inputs(shape, sets):
    made = [make(*shape, 'channel', 'mild', torch.bfloat16, torch.bfloat16, seed) for seed in range(sets)]
    return [tuple(x.contiguous() if torch.is_tensor(x) else x for x in m) for m in made]


def one(variant):
    use(variant)
    shape = SHAPES['vig_small_224']
    scale = shape[3] ** -0.5 / 2
    errors = {}
    for s in inputs(shape, 2):
        q, k, v, gates, do, _, _ = s
        expect = reference(q[:4], k[:4], v[:4], [g[:4] for g in gates], scale, do[:4], None, None, 3, None)
        got = run(q, k, v, gates, scale, do, None, None, 3, None)
        for n, x in expect.items():
            errors[n] = max(errors.get(n, 0), rms(got[n][:4], x))
    good = all(e < 6e-3 for e in errors.values())
    print(variant, 'good' if good else 'WRONG', {n: f'{e:.1e}' for n, e in errors.items()}, flush=True)
    torch.cuda.synchronize()
    return good


def profile(fns):
    """us per launch of every kernel."""
    from torch.profiler import ProfilerActivity

    for f in fns:
        f()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(3):
            for f in fns:
                f()
        torch.cuda.synchronize()
    out = {}
    for e in p.events():
        if 'gla' in e.name:
            out.setdefault(e.name, []).append(e.device_time_total)
    # A kernel launched in two forms: fast, then safe.
    forms = {n: len(t) // (3 * len(fns)) for n, t in out.items()}
    return {n[4:]: [round(sorted(t[i :: forms[n]])[len(t) // forms[n] // 2], 1) for i in range(forms[n])]
            for n, t in out.items()}  # fmt: skip


def timing(indices):
    for name in ('vig_small_224', 'vig_small_1024'):
        scale = SHAPES[name][3] ** -0.5 / 2
        sets = inputs(SHAPES[name], 4)
        for n in indices:
            use(VARIANTS[n])
            if VARIANTS[n][0]:
                fns = [lambda s=s, c=scale: gla.bidirectional_gla_bwd(*s[:3], *s[3], c, s[4], None) for s in sets]
            else:
                fns = [lambda s=s, c=scale: gla.bidirectional_gla_fwd(*s[:3], *s[3], c, None) for s in sets]
            try:
                print(name, VARIANTS[n], 'graph ms', round(graph_ms(fns, 15), 4), json.dumps(profile(fns)), flush=True)
            except Exception as e:
                print(name, VARIANTS[n], repr(e)[:200], flush=True)


if __name__ == '__main__':
    if sys.argv[1] == 'count':
        print(len(VARIANTS))
    elif sys.argv[1] == 'one':
        sys.exit(not one(VARIANTS[int(sys.argv[2])]))
    else:
        timing([int(Path(p).name) for p in sys.argv[2:]])
