"""`zoo bench kernels`: ops beside what one would use instead, and the time that moving their bytes takes.

Cases come from the modules `_bench_<family>.py` beside this one. A peer that fails or takes too long is a row with an
`error`; the result file is rewritten after every case, so a run that is stopped keeps what it has measured.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo import tools
from zoo.errors import ZooError
from zoo.kernels._dispatch import kernel_backend
from zoo.tools._bench_case import Case, Inputs
from zoo.tools._guard import in_words, recover, time_limit
from zoo.tools._timing import (
    conditions,
    copy_gb_per_s,
    gpu_rates,
    graph_ms,
    host_us,
    interleaved,
    rates_in_words,
    wall_ms,
    write_json,
)

_CPU_BATCH_SHRINK = 32  # the same shapes at a batch that a CPU finishes in milliseconds
_INPUT_SETS = 4
_CHECKED_BATCH = 2
_TIMED_SHARE_S = 20.0  # of repeats of one pass of one case, all implementations together
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_OURS = 'zoo'


def all_cases() -> list[Case]:
    """The cases of every module beside this one that has some."""
    names = sorted(m.name for m in pkgutil.iter_modules(tools.__path__) if m.name.startswith('_bench_'))
    modules = [importlib.import_module(f'zoo.tools.{name}') for name in names if f'zoo.tools.{name}' != __name__]
    return [case for module in modules if hasattr(module, 'cases') for case in module.cases()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `zoo bench kernels` beside the shared ones.

    Args:
        parser: gets them.
    """
    parser.add_argument('--ops', metavar='A,B', help='public names of ops; default: all')
    parser.add_argument('--shapes', metavar='A,B', help='labels of shapes; default: all')
    parser.add_argument('--dtype', choices=list(DTYPES), help='default: fp32 on the CPU, else bf16')
    parser.add_argument(
        '--peers',
        nargs='?',
        const='auto',
        default='auto',
        metavar='A,B',
        help='what to time too: parts of labels, none, all, or auto (default): all but flash-linear-attention, which '
        'autotunes for minutes',
    )
    parser.add_argument('--backward', action=argparse.BooleanOptionalAction, default=True, help='fwd+bwd too')
    parser.add_argument('--peer-seconds', type=float, default=90, metavar='S', help='longest first call of a peer')
    parser.add_argument('--launch', action='store_true', help='instead: what a call of each op (gated_delta_rule where '
                        'named) costs the host, on one small shape and without peers')  # fmt: skip


def select(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: for an op or a shape that no case has.
    """
    cases = all_cases()
    for option, attribute in (('ops', 'op'), ('shapes', 'shape')):
        wanted = (getattr(args, option) or '').split(',') if getattr(args, option) else []
        known = list(dict.fromkeys(getattr(c, attribute) for c in cases))
        for name in wanted:
            if name not in known:
                raise ZooError(f'unknown name {name!r}: --{option} takes {", ".join(known)}')
        cases = [c for c in cases if not wanted or getattr(c, attribute) in wanted]
    if not cases:
        raise ZooError(f'no case of {args.ops} has a shape named {args.shapes}')
    return cases


def _implementations(case: Case, peers: str) -> dict[str, Callable]:
    if peers == 'auto':
        chosen = {k: f for k, f in case.peers.items() if not k.startswith('fla')}
    elif peers == 'all':
        chosen = case.peers
    else:
        words = [] if peers == 'none' else peers.split(',')
        chosen = {k: f for k, f in case.peers.items() if any(w in k for w in words)}
    return {_OURS: case.ours, **chosen}


def _tensors(outputs: Tensor | tuple) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs if x is not None and x.is_floating_point()]


def _forward(op: Callable, inputs: Inputs) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return op(*inputs)

    return run


def forward_backward(op: Callable, inputs: Inputs) -> Callable[[], object]:
    """A step with output and gradients of every floating-point argument.

    Args:
        op: what it calls; the first call draws the gradients of its outputs.
        inputs: with these arguments.
    """
    leaves, upstream = _leaves(inputs), []

    def run():
        outputs = [o for o in _tensors(op(*inputs)) if o.requires_grad]
        if not upstream:
            rng = torch.Generator(outputs[0].device).manual_seed(7)
            upstream.extend(
                torch.randn(o.shape, generator=rng, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs
            )
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return run


def make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int, batch: int | None = None) -> Inputs:
    """Arguments of a case as leaves of a graph.

    Args:
        case: whose.
        device: where they live.
        dtype: of every number that the case does not keep wider.
        seed: of the random numbers.
        batch: how many batch entries to keep; all by default.
    """
    inputs = case.make(device, dtype, seed)
    if batch is not None:
        inputs = case.cut(inputs, batch)
    return tuple(x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs)


def errors(case: Case, device: str, dtype: torch.dtype, backward: bool) -> dict[str, float]:
    """Relative RMS error of our op against fp64 on a small batch: of outputs (`o0`, ...) and gradients (`d0`, ...).

    Args:
        case: what to run.
        device: where.
        dtype: of the arguments; fp64 gets the same numbers.
        backward: gradients too.
    """
    inputs = make_inputs(case, device, dtype, 0, min(_CHECKED_BATCH, case.dims['B']))
    wide = tuple(x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs)

    def results(op: Callable, arguments: Inputs, upstream: list[Tensor]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = op(*arguments)
        outputs = [o for o in _tensors(outputs) if o.requires_grad or not backward]
        upstream.extend(torch.randn_like(o) for o in outputs[len(upstream) :])
        found = {f'o{i}': o.detach() for i, o in enumerate(outputs)}
        if backward:
            like = [d.to(o.dtype) for d, o in zip(upstream, outputs)]
            grads = torch.autograd.grad(outputs, _leaves(arguments), like, allow_unused=True)
            found |= {f'd{i}': g for i, g in enumerate(grads) if g is not None}
        return found

    upstream: list[Tensor] = []
    got = results(case.ours, inputs, upstream)
    with kernel_backend('torch'):
        expected = results(case.reference or case.ours, wide, upstream)
    return {n: float(f'{_relative_rms(got[n], x):.3g}') for n, x in expected.items()}


def _relative_rms(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)).item()


def _survivors(steps: dict[str, Callable], rows: dict[str, dict], args: argparse.Namespace) -> dict[str, Callable]:
    """Make the first call of each under a time limit; those that fail get an `error` in their row instead."""
    alive = {}
    for name, step in steps.items():
        try:
            with time_limit(args.peer_seconds if name != _OURS else 10 * args.peer_seconds, '--peer-seconds'):
                rows[name]['cold_ms'] = round(wall_ms(step, args.device), 3)
                rows[name]['warm_ms'] = min(wall_ms(step, args.device) for _ in range(2))
            alive[name] = step
        except Exception as error:
            rows[name]['error'] = in_words(error)
            recover(args.device, error)
    return alive


def _on_gpu(row: dict, steps: list[Callable], repeats: int) -> None:
    """Add what only CUDA gives: time within a graph, time on the host, memory beyond the arguments."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = steps[0]()
    torch.cuda.synchronize()
    row['peak_mib'] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    del kept
    row['host_us'] = round(min(host_us(steps[0])), 1)
    try:
        row['graph_ms'] = round(graph_ms(steps, repeats), 4)
    except Exception as error:
        row['graph_error'] = in_words(error)
        recover('cuda', error)


def measure(case: Case, args: argparse.Namespace, bandwidth: float) -> list[dict]:
    """Time a case's op and its peers, forward and with the backward pass.

    Args:
        case: what to run.
        args: the parsed command line.
        bandwidth: of a copy, in GB/s.

    Returns:
        One row per pass and implementation, ours first.
    """
    torch._dynamo.reset()  # the recompilation limit counts over all shapes
    dtype, gpu = DTYPES[args.dtype], args.device.startswith('cuda')
    batch = case.dims['B'] if gpu else max(1, case.dims['B'] // _CPU_BATCH_SHRINK)
    sets = [make_inputs(case, args.device, dtype, seed, batch) for seed in range(_INPUT_SETS if gpu else 1)]
    share = batch / case.dims['B'] * dtype.itemsize / 2
    passes = {'fwd': (_forward, case.bytes_forward)}
    if args.backward and case.bytes_backward:
        passes['fwd+bwd'] = (forward_backward, case.bytes_forward + case.bytes_backward)
    ops, found = _implementations(case, args.peers), []
    for what, (make, moved) in passes.items():
        head = {'op': case.op, 'shape': case.shape, 'dims': {**case.dims, 'B': batch}}
        rows = {name: {**head, 'implementation': name, 'pass': what} for name in ops}
        all_steps = {name: [make(op, x) for x in sets] for name, op in ops.items()}
        alive = _survivors({name: steps[0] for name, steps in all_steps.items()}, rows, args)
        round_s = sum(rows[name].pop('warm_ms') for name in alive) / 1e3
        repeats = max(3, min(args.repeats, int(_TIMED_SHARE_S / max(round_s, 1e-6))))
        timed = interleaved(alive, args.device, min(args.warmup, repeats), repeats) if alive else {}
        for name in alive:
            cold = rows[name]['cold_ms']
            rows[name] |= timed[name] | {'cold_ms': cold}
            if gpu:
                _on_gpu(rows[name], all_steps[name], repeats)
        rows[_OURS]['floor_ms'] = round(moved * share / bandwidth / 1e6, 4)
        found += _compared(rows)
    return found


def _compared(rows: dict[str, dict]) -> list[dict]:
    """Add to each peer its time over ours, with and without the launches; above 1 we are faster."""
    for name, row in rows.items():
        for key, ratio in (('median_ms', 'times_ours'), ('graph_ms', 'times_ours_graph')):
            if name != _OURS and key in row and key in rows[_OURS]:
                row[ratio] = round(row[key] / rows[_OURS][key], 3)
    return list(rows.values())


def bench_kernels(args: argparse.Namespace) -> dict:
    """Run `zoo bench kernels`, rewriting `--output` after every case.

    Args:
        args: the parsed command line.
    """
    gpu = args.device.startswith('cuda')
    cases = select(args)
    rates = gpu_rates(args.device) or {'copy_gb_per_s': round(copy_gb_per_s(args.device, 256), 1)}
    print(rates_in_words(rates), flush=True)
    result = {
        'bench': 'kernels',
        **conditions(args.device),
        **{k: getattr(args, k) for k in ('dtype', 'warmup', 'repeats')},
        'compile': 'the peers that say so',
        **rates,
        'l2': f'overwritten before every timed call; graphs rotate over {_INPUT_SETS} input sets' if gpu else None,
        'complete': False,
        'results': [],
        'relative_rms': [],
    }
    start = time.perf_counter()
    for i, case in enumerate(cases):
        print(f'[{i + 1}/{len(cases)}, {time.perf_counter() - start:.0f} s] {case.op} {case.shape}', flush=True)
        try:
            rows = measure(case, args, rates['copy_gb_per_s'])
            result['results'] += rows
            _print(case, rows)
            if gpu:
                found = errors(case, args.device, DTYPES[args.dtype], args.backward and case.bytes_backward > 0)
                result['relative_rms'].append({'op': case.op, 'shape': case.shape, **found})
                print('  relative RMS error:', found, flush=True)
        except ZooError:
            raise
        except Exception as error:
            result['results'].append({'op': case.op, 'shape': case.shape, 'error': in_words(error)})
            print(f'  {in_words(error)}', flush=True)
            recover(args.device, error)
        if gpu:
            torch.cuda.empty_cache()
        write_json(args.output, result)
    if gpu:
        result['rates_after'] = gpu_rates(args.device)
    result['complete'] = True
    return result


def _print(case: Case, rows: list[dict]) -> None:
    columns = ('median_ms', 'graph_ms', 'floor_ms', 'times_ours', 'host_us', 'peak_mib', 'cold_ms')
    sizes = ', '.join(f'{k} {v}' for k, v in rows[0]['dims'].items())
    table = Table(title=f'{case.op}, {case.shape}: {sizes}')
    for column in ('implementation', 'pass', *columns):
        table.add_column(column.replace('cold_ms', 'first call ms').replace('_', ' '), no_wrap=True, justify='right')
    table.columns[0].justify = 'left'
    for row in rows:
        table.add_row(row['implementation'], row['pass'], *(f'{row[c]:.3f}' if c in row else '' for c in columns))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    for row in rows:
        for key in ('error', 'graph_error'):
            if key in row:
                print(f'  {row["implementation"]}, {row["pass"]}: {row[key]}')
