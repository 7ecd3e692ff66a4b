"""Times tile sizes of the depthwise convolution on the GPU: python tests/gpu/sweep_depthwise_conv.py [--out FILE]

Each is checked before it is timed, in bf16, beside a copy of the map (which moves a forward pass's bytes) and cuDNN.
The fixed tables of kernels/_triton/depthwise_conv.py are to be read against it.
"""

from functools import partial

import torch
from check_depthwise_conv import PLAIN, make, oracle, run
from harness import LIMITS, main, rms
from zoo.kernels._triton import _common
from zoo.kernels._triton import depthwise_conv as kernels
from zoo.kernels.depthwise_conv import depthwise_conv2d

from zoo.tools._bench_depthwise_conv import SHAPES, formula

LABELS = 'vig_small_224', 'ravlt_tiny_224_pos', 'ravlt_tiny_224_ffn', 'ravlt_tiny_224_lepe', 'mobilemamba_192_7x7'
FORWARD = {  # by kernel size: m, each, ahead (and registers)
    3: [(2, 4, 1), (2, 4, 2), (1, 4, 2), (1, 4, 3), (4, 2, 1), (4, 2, 2), (4, 2, 3), (4, 2, 2, 96), (2, 2, 3)],
    5: [(2, 2, 1), (2, 2, 2), (4, 1, 2), (2, 1, 2), (4, 2, 1)],
    7: [(2, 1, 1), (1, 1, 2), (4, 1, 1), (4, 1, 1, 128), (2, 2, 1)],
}
BACKWARD = {
    3: [(2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 1, 2), (1, 4, 1), (2, 2, 1, 96)],
    5: [(2, 1, 1), (2, 1, 2), (1, 1, 2), (1, 2, 1, 168)],
    7: [(1, 1, 1, 168), (1, 1, 1, 128), (1, 1, 1)],
}


def graph_ms(function, inputs: list[tuple]) -> float:
    """Time of a call inside a graph that goes through the inputs in turn, so that none stays in the cache."""
    for x in inputs:
        function(*x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            function(*x)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(inputs))
    return sorted(times)[len(times) // 2]


def sweep_shape(say, label: str) -> int:
    """Rows of one shape of the benchmark; the number of tile sizes that compute something wrong."""
    shape, size, bias, options = SHAPES[label]
    options = PLAIN | {n: v for n, v in options.items() if n != 'slice'}
    flags = tuple(options.values())
    sets = [make((*shape, size, options, bias, False), torch.bfloat16, seed) for seed in (0, 2, 4)]
    few = tuple(t[:2] if t is not None and t.shape[0] == shape[0] else t for t in sets[0])
    expected = oracle(*few, options)
    spare = torch.empty_like(sets[0][0])
    say(what='copy', shape=label, ms=graph_ms(lambda x, *_: spare.copy_(x), sets))
    same = [tuple(None if t is None else t.bfloat16() for t in tensors) for tensors in sets]
    say(what='F.conv2d fwd', shape=label, ms=graph_ms(lambda x, w, b, _: formula(x, w, b, **options), same))
    passes = {
        'fwd': lambda x, w, b, _: kernels.depthwise_conv2d_fwd(x, w, b, *flags, x.dtype),
        'bwd': lambda x, w, b, dy: kernels.depthwise_conv2d_bwd(x, w, b, dy, *flags),
    }
    forward = kernels.FORWARD_GELU if options['pre_activation'] else kernels.FORWARD
    bad = 0
    for name, table, choices in (('fwd', forward, FORWARD), ('bwd', kernels.BACKWARD, BACKWARD)):
        kept = table[size]
        for choice in dict.fromkeys([tuple(kept), *choices[size]]):
            table[size] = kernels.Config(*choice)
            _common._plans.clear()  # launches were made for another table
            got = run(depthwise_conv2d, *few, options)
            error = max(rms(got[n], t) for n, t in expected.items())
            bad += error > LIMITS[torch.bfloat16][0]
            row = dict(config=choice, now=table[size] == kept, ms=graph_ms(passes[name], sets), error=error)
            say(what=name, shape=label, **row)
        table[size] = kept
        _common._plans.clear()
    return bad


def sweep(say) -> int:
    """All shapes."""
    return sum(map(partial(sweep_shape, say), LABELS))


if __name__ == '__main__':
    main(sweep)
