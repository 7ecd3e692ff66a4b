"""`zoo bench kernels`: the scans beside what one would use instead, and the time that moving their bytes takes."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels.gla import bidirectional_gla, gated_linear_attention
from zoo.tools._timing import conditions, copy_gb_per_s, graph_ms, interleaved

# Shapes (B, T, H, K, V) of the scans in ViG at the stated image size.
SHAPES = {
    'vig_small_224': (128, 196, 6, 32, 64),
    'vig_small_1024': (16, 4096, 6, 32, 64),
    'vig_base_224': (128, 196, 12, 32, 64),
}
_CPU_BATCH_SHRINK = 32  # the same shapes at a batch that a CPU finishes in milliseconds
_INPUT_SETS = 4
_DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass
class Inputs:
    """One set of scan arguments.

    Args:
        q: queries (B, T, H, K).
        k: keys (B, T, H, K).
        v: values (B, T, H, V).
        g_fwd: log gates of the forward scan (B, T, H, K).
        g_bwd: log gates of the reversed scan (B, T, H, K).
        wide: three tensors (B, T, H, V), for attention with heads as wide as the values.
        do: gradient of the output (B, T, H, V).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g_fwd: Tensor
    g_bwd: Tensor
    wide: tuple[Tensor, Tensor, Tensor]
    do: Tensor


def make_inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Random arguments with gates as a freshly initialised ViG has them.

    Args:
        shape: (B, T, H, K, V).
        device: where they live.
        dtype: of every tensor, the log gates included.
        seed: of the random numbers.
    """
    batch, length, heads, key_dim, value_dim = shape
    rng = torch.Generator(device).manual_seed(seed)

    def draw(dim: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=rng, device=device).to(dtype).requires_grad_()

    def gate() -> Tensor:
        raw = torch.randn(batch, length, heads, key_dim, generator=rng, device=device)
        return (F.logsigmoid(raw) / 16).to(dtype).requires_grad_()

    wide = (draw(value_dim), draw(value_dim), draw(value_dim))
    do = draw(value_dim).detach()
    return Inputs(draw(key_dim), draw(key_dim), draw(value_dim), gate(), gate(), wide, do)


def _sdpa(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (t.transpose(1, 2) for t in x.wide)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), list(x.wide)


def _bidirectional(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    return bidirectional_gla(x.q, x.k, x.v, x.g_fwd, x.g_bwd), [x.q, x.k, x.v, x.g_fwd, x.g_bwd]


def _causal(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    return gated_linear_attention(x.q, x.k, x.v, x.g_fwd)[0], [x.q, x.k, x.v, x.g_fwd]


def _fla_ops() -> dict[str, Callable[[Inputs], tuple[Tensor, list[Tensor]]]]:
    """flash-linear-attention's GLA, causal and in both directions, where it is installed."""
    if importlib.util.find_spec('fla') is None:
        return {}
    from fla.ops.gla import chunk_gla

    def causal(x: Inputs):
        return chunk_gla(x.q, x.k, x.v, x.g_fwd)[0], [x.q, x.k, x.v, x.g_fwd]

    def both(x: Inputs):
        flipped = [t.flip(1) for t in (x.q, x.k, x.v, x.g_bwd)]
        o = (chunk_gla(x.q, x.k, x.v, x.g_fwd)[0] + chunk_gla(*flipped)[0].flip(1)) / 2
        return o, [x.q, x.k, x.v, x.g_fwd, x.g_bwd]

    return {'fla chunk_gla, causal': causal, 'fla chunk_gla, two calls and flips': both}


def _forward(op: Callable, x: Inputs) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return op(x)

    return run


def _forward_backward(op: Callable, x: Inputs) -> Callable[[], object]:
    def run():
        o, leaves = op(x)
        return torch.autograd.grad(o, leaves, x.do)

    return run


def floor_bytes(shape: tuple[int, ...], directions: int, itemsize: int) -> int:
    """Bytes of a forward scan's arguments and result: q, k, v, its gates and o, each moved once.

    Args:
        shape: (B, T, H, K, V).
        directions: how many gate tensors.
        itemsize: bytes per number.
    """
    batch, length, heads, key_dim, value_dim = shape
    return batch * length * heads * ((2 + directions) * key_dim + 2 * value_dim) * itemsize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `zoo bench kernels` beside the shared ones.

    Args:
        parser: gets them.
    """
    parser.add_argument('--shapes', metavar='A,B', help=f'of {", ".join(SHAPES)}; default: all')
    parser.add_argument('--dtype', choices=list(_DTYPES), help='default: fp32 on the CPU, else bf16')
    parser.add_argument('--peers', action=argparse.BooleanOptionalAction, default=True, help='time SDPA and fla too')
    parser.add_argument('--backward', action=argparse.BooleanOptionalAction, default=True, help='fwd+bwd too')


def _ops(args: argparse.Namespace) -> dict[str, Callable]:
    own = {'bidirectional_gla': _bidirectional, 'gated_linear_attention': _causal}
    peers = {'SDPA, full': _sdpa} | (_fla_ops() if args.device.startswith('cuda') else {})
    return own | (peers if args.peers else {})


def measure(label: str, shape: tuple[int, ...], args: argparse.Namespace, bandwidth: float) -> list[dict]:
    """Time every op at one shape.

    Args:
        label: of the shape.
        shape: (B, T, H, K, V).
        args: the parsed command line.
        bandwidth: of a copy, in GB/s.
    """
    dtype = _DTYPES[args.dtype]
    gpu = args.device.startswith('cuda')
    sets = [make_inputs(shape, args.device, dtype, seed) for seed in range(_INPUT_SETS if gpu else 1)]
    ops = _ops(args)
    passes = {'fwd': _forward, 'fwd+bwd': _forward_backward} if args.backward else {'fwd': _forward}
    rows = []
    for what, make in passes.items():
        steps = {name: make(op, sets[0]) for name, op in ops.items()}
        timed = interleaved(steps, args.device, args.warmup, args.repeats)
        for name, op in ops.items():
            row = {'shape': label, 'BTHKV': list(shape), 'op': name, 'pass': what, **timed[name]}
            if gpu:
                row['graph_ms'] = round(graph_ms([make(op, x) for x in sets], args.repeats), 4)
            if name in ('bidirectional_gla', 'gated_linear_attention') and what == 'fwd':
                moved = floor_bytes(shape, 2 if name == 'bidirectional_gla' else 1, dtype.itemsize)
                row['floor_ms'] = round(moved / bandwidth / 1e6, 4)
            rows.append(row)
    return rows


def bench_kernels(args: argparse.Namespace) -> dict:
    """Run `zoo bench kernels`.

    Args:
        args: the parsed command line.
    """
    gpu = args.device.startswith('cuda')
    wanted = args.shapes.split(',') if args.shapes else list(SHAPES)
    for name in wanted:
        if name not in SHAPES:
            raise ZooError(f'unknown shape {name!r}: --shapes takes {", ".join(SHAPES)}')
    bandwidth = statistics.median(copy_gb_per_s(args.device, 1024 if gpu else 256) for _ in range(3))
    print(f'copy bandwidth {bandwidth:.1f} GB/s')
    rows = []
    for name in wanted:
        batch, *rest = SHAPES[name]
        shape = (batch if gpu else max(1, batch // _CPU_BATCH_SHRINK), *rest)
        group = measure(name, shape, args, bandwidth)
        rows += group
        _print(name, shape, group)
    settings = {k: getattr(args, k) for k in ('dtype', 'warmup', 'repeats')}
    missing = gpu and args.peers and not _fla_ops()
    if missing:
        print('flash-linear-attention is not installed: not compared (pip install "linear-zoo[bench]")')
    return {
        'bench': 'kernels',
        **conditions(args.device),
        **settings,
        'compile': False,
        'layout': '(B, T, H, D) contiguous',
        'copy_gb_per_s': round(bandwidth, 1),
        'l2': 'overwritten before every timed call; graphs rotate over four input sets' if gpu else None,
        'results': rows,
    }


def _print(name: str, shape: tuple[int, ...], rows: list[dict]) -> None:
    columns = ('median_ms', 'min_ms', 'graph_ms', 'floor_ms', 'cold_ms')
    table = Table(title=f'{name}: B, T, H, K, V = {", ".join(map(str, shape))}')
    for column in ('op', 'pass', *columns):
        table.add_column(column.replace('cold_ms', 'first call ms').replace('_', ' '), no_wrap=True, justify='right')
    table.columns[0].justify = 'left'
    for row in rows:
        table.add_row(row['op'], row['pass'], *(f'{row[c]:.3f}' if c in row else '' for c in columns))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
