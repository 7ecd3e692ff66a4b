"""Times other block sizes than the table's, each with its error (Triton 3.6 miscompiles some on Hopper)."""

import time

import torch
from check_gla import FLOORS, floor_inputs, graphed, reference, rms, run
from zoo.kernels._triton import gla

SHAPES = ('vig_s 224', 'vig_s 1024')


def main(say):
    plain = gla.config
    for name in SHAPES:
        shape = FLOORS[name]
        K = shape[3]
        scale = K**-0.5 / 2
        sets = floor_inputs(shape)
        q, k, v, gates, do, _, _ = sets[0]
        few = [x[:2] for x in (q, k, v)], [g[:2] for g in gates], do[:2]
        expect = reference(*few[0], few[1], scale, few[2], None, None, 3, None)
        for backward in (False, True):
            for bt in (64, 32):
                for sw, ss in ((4, 3), (4, 2), (2, 3), (8, 3)) if bt == 64 else ((4, 3), (2, 3), (1, 3)):
                    variant(say, name, plain, bt, (sw, ss), None, backward, sets, few, expect, scale)
                for w in (2, 4, 8) if bt == 64 else (1, 2, 4):
                    variant(say, name, plain, bt, None, w, backward, sets, few, expect, scale)


def variant(say, name, plain, bt, states, warps, backward, sets, few, expect, scale):
    def config(dtype, K, V, b):
        c = plain(dtype, K, V, b)
        return c._replace(
            bt=bt,
            states=c.states if states is None else {'num_warps': states[0], 'num_stages': states[1]},
            chunks=c.chunks if warps is None else {'num_warps': warps, 'num_stages': 2},
        )

    gla.config = config
    try:
        start = time.time()
        if name == 'vig_s 224':
            got = run(*few[0], few[1], scale, few[2], None, None, 3, None)
            names = ('dq', 'dk', 'dv', 'dg_fwd', 'dg_bwd') if backward else ('o',)
            error = {n: float(f'{rms(got[n], expect[n]):.2g}') for n in names}
        else:
            error = {}
        passes = []
        for s in sets:
            gf, gb = s[3]
            passes.append(gla._Pass(*s[:3], gf, gb, scale, None, None, 3, s[4] if backward else None))
        if warps is None:  # the states alone
            t = graphed([lambda p=p: p.run_states(None) for p in passes], 20)
        elif backward:
            t = graphed([lambda s=s: gla.bidirectional_gla_bwd(*s[:3], *s[3], scale, s[4], None) for s in sets], 20)
        else:
            t = graphed([lambda s=s: gla.bidirectional_gla_fwd(*s[:3], *s[3], scale, None) for s in sets], 20)
        say(what='sweep', shape=name, backward=backward, bt=bt, states=states, warps=warps, ms=t, error=error,
            seconds=time.time() - start)  # fmt: skip
    except Exception as e:
        say(what='sweep', shape=name, backward=backward, bt=bt, states=states, warps=warps, error=repr(e)[:300])
        torch.cuda.synchronize()
    finally:
        gla.config = plain
