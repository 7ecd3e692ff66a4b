"""`zoo bench unet`: a step of the SD 1.5 and SDXL UNets at growing sizes, softmax against linear self-attention.

Random weights, channels-last; SD 1.5's published LinFusion has MLPs as wide as its layers, SDXL's a sixteenth of that.

| row | self-attention |
|---|---|
| sdpa | as diffusers has it: `scaled_dot_product_attention`, flash attention on GPUs |
| linfusion | `zoo.backbones.linfusion` with `zoo.kernels.linear_attention` |
| formula | the published order of operations in plain PyTorch |
| none | the layer gives back its input: what is left of a step is everything else |

`sdpa fused` and `linfusion fused` are after `fuse_qkv_projections()` of the UNet, cross-attention included; `sdpa fast`
and `linfusion fast` also have `zoo.diffusion.layers.fast_layers`.

Modes: `eager`; `compiled`, the whole UNet by `torch.compile`; `captured`, a CUDA graph of the eager step; `compiled
captured`, one of the compiled step. A step that does not fit is tried at batch 1, then with feed-forward layers in
pieces, and the row says so. Peak memory is what PyTorch allocated at most, weights included.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from zoo._graphs import record
from zoo.errors import ZooError
from zoo.tools._guard import in_words, recover, time_limit
from zoo.tools._timing import conditions, gpu_rates, interleaved, rates_in_words, wall_ms, write_json
from zoo.tools.doctor import version
from zoo.tools.generate_image import parse_size

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
MODES = ('eager', 'captured', 'compiled', 'compiled captured')
ROWS = ('sdpa', 'sdpa fused', 'sdpa fast', 'linfusion', 'linfusion fused', 'linfusion fast', 'formula', 'none')
MODELS = ('sd15', 'sdxl')
# cuDNN is asked for the fastest convolution up to this size; beyond, it tries some that take minutes.
SEARCHED = 4096
_SETTINGS = ('dtype', 'sizes', 'batch', 'rows', 'modes', 'quick', 'row_seconds')
# What a step is tried with: batch (None: the one asked for), pieces of the feed-forward layers.
_ATTEMPTS = ((None, 1), (1, 1), (1, 8))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `zoo bench unet`."""
    parser.add_argument('--models', default=','.join(MODELS), metavar='A,B', help='sd15, sdxl; default: both')
    parser.add_argument('--sizes', type=int, nargs='+', metavar='N', help='sides of the image in pixels; default: 512 '
                        'to 16384')  # fmt: skip
    parser.add_argument('--rows', default=','.join(ROWS), metavar='A,B', help='some of: ' + ', '.join(ROWS))
    parser.add_argument('--modes', default=','.join(MODES[:3]), metavar='A,B', help='some of: ' + ', '.join(MODES)
                        + '; default: all but the last')  # fmt: skip
    parser.add_argument('--batch', type=int, default=2, metavar='N', help='default: 2, an image with guidance')
    parser.add_argument('--dtype', choices=('fp16', 'bf16', 'fp32'), help='of the weights; default: fp16, on CPUs fp32')
    parser.add_argument('--row-seconds', type=float, default=240, metavar='S', help='longest row; steps that will take '
                        'longer are not tried; default: 240')  # fmt: skip
    parser.add_argument('--end-to-end', metavar='WxH', help='also generate an image of this size, without --sizes '
                        'nothing else')  # fmt: skip
    parser.add_argument('--steps', type=int, default=50, metavar='N', help='schedule of --end-to-end; default: 50')
    parser.add_argument('--profile', action='store_true', help='where the time of eager steps goes')
    parser.add_argument('--quick', action='store_true', help='small UNets in place of the real ones')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw time and memory over the size')


def _captured(step: Callable) -> Callable:
    graph, step.result = record(step)
    return graph.replay


class _Step:
    """One call of a model; a captured one keeps its result alive."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.result = model, inputs, None

    def __call__(self):
        return self.model(*self.inputs[0], **self.inputs[1])[0]


def _time(step: Callable, args: argparse.Namespace) -> dict:
    first = wall_ms(step, args.device)
    second = wall_ms(step, args.device)
    repeats = max(1, min(args.repeats, int(6000 / second)))
    found = interleaved({'step': step}, args.device, min(args.warmup, repeats - 1), repeats)['step']
    return {'step_ms': found['median_ms'], 'min_ms': found['min_ms'], 'repeats': repeats, 'first_ms': round(first, 1)}


def _attempt(unet, mode: str, size: int, batch: int, pieces: int, args: argparse.Namespace) -> dict:
    from zoo.diffusion.highres import Savings, savings
    from zoo.tools._unet_rows import step_inputs

    gpu = args.device.startswith('cuda')
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark and size <= SEARCHED  # what it was is put back by the caller
    model = torch.compile(unet, dynamic=False) if 'compiled' in mode else unet
    with torch.no_grad(), savings(unet, Savings(chunk_feed_forward=pieces)):
        step = _Step(model, step_inputs(unet, size, batch))
        found = _time(_captured(step) if 'captured' in mode else step, args)
        if args.profile and mode == 'eager' and gpu:
            found['profile'] = _profile(step)
    if gpu:
        found['peak_gb'] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    found |= {'batch': batch, 'cudnn_benchmark': torch.backends.cudnn.benchmark}
    return found | ({'feed_forward_pieces': pieces} if pieces > 1 else {})


def _profile(step: Callable) -> dict:
    """Milliseconds of the 30 kernels that take longest, and of all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    times = {e.key[:120]: e.self_device_time_total / 1e3 for e in seen.key_averages()}
    longest = dict(sorted(times.items(), key=lambda pair: -pair[1])[:30])
    return {'all_ms': round(sum(times.values()), 3)} | {k: round(v, 3) for k, v in longest.items()}


def _row(unet, mode: str, size: int, expected_s: float, args: argparse.Namespace) -> dict:
    """What one row says at one size: times and memory, or why not."""
    if 'captured' in mode and not args.device.startswith('cuda'):
        return {'error': 'a CUDA graph needs a CUDA device'}
    if expected_s > args.row_seconds / 4:
        return {'error': f'not tried: a step would take about {expected_s:.0f} s (--row-seconds)'}
    error = None
    with time_limit(args.row_seconds, '--row-seconds'):
        for batch, pieces in _ATTEMPTS:
            batch = args.batch if batch is None else min(batch, args.batch)
            try:
                return _attempt(unet, mode, size, batch, pieces, args)
            except torch.OutOfMemoryError as failed:
                error = failed.with_traceback(None)  # frames would hold what did not fit
            recover(args.device, error)
    return {'error': in_words(error)}


def _model_rows(name: str, args: argparse.Namespace) -> Iterator[dict]:
    from zoo.tools._unet_rows import build, self_attention

    unet, linear = build(name, args.device, args.torch_dtype, args.quick)
    last: dict[tuple, float] = {}
    for size in args.sizes:
        for mode in args.modes:
            for row in args.rows:
                # four times the pixels: sixteen times the time of softmax attention at most
                grown = 16 if row.startswith('sdpa') else 4
                expected = last.get((row, mode), last.get((row, 'eager'), 0.0)) * grown
                try:
                    with self_attention(linear, row):
                        said = _row(unet, mode, size, expected, args)
                except ZooError:
                    raise
                except Exception as error:
                    recover(args.device, error)
                    said = {'error': in_words(error)}
                last[row, mode] = said.get('step_ms', expected * 1e3) / 1e3
                yield {'model': name, 'size': size, 'mode': mode, 'row': row, **said}


def _end_to_end(name: str, args: argparse.Namespace) -> dict:
    """Wall time of a whole image from random embeddings, and of its parts."""
    import tempfile
    import time

    from zoo.diffusion.highres import Savings, generate, ladder
    from zoo.diffusion.layers import fast_layers
    from zoo.tools._unet_rows import build_pipeline
    from zoo.tools.generate_image import write_images

    pipe, inputs = build_pipeline(name, args.device, args.torch_dtype, args.quick)
    pipe.set_progress_bar_config(disable=True)
    stages = ladder(pipe, *args.end_to_end_size, args.steps)
    fast_layers(pipe)
    how = Savings(chunk_guidance=False, tile=32 if args.quick else 1024)
    generate(pipe, stages[:1], how, say=str, **inputs)  # kernels are loaded and chosen
    if args.device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    image, levels = generate(pipe, stages, how, say=lambda text: print(f'  {text}', flush=True), **inputs)
    done = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_images(image, Path(folder) / 'image.png')
    said = {'model': name, 'row': 'end to end', 'size': args.end_to_end, 'seconds': round(done - start, 2)}
    said |= {'png_seconds': round(time.perf_counter() - done, 2), 'levels': levels}
    if args.device.startswith('cuda'):
        said['peak_gb'] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return said


def compare(rows: list[dict]) -> list[dict]:
    """LinFusion against softmax attention, and our kernel against the formula, at each model, size and mode.

    Args:
        rows: what was measured; those with an error or at another batch are left out.

    Returns:
        Per model, size, mode and linear row: how many times faster the step is than those of `sdpa` and `sdpa fused`,
        and how many times longer the formula's share of a step is than the row's (a share is what a step takes beyond
        that of the row `none`).
    """
    found = []
    times = {(r['model'], r['size'], r['mode'], r['batch'], r['row']): r['step_ms'] for r in rows if 'step_ms' in r}
    for *key, row in times:
        at = lambda name: times.get((*key, name))  # noqa: B023, E731
        if not row.startswith('linfusion'):
            continue
        pair = dict(zip(('model', 'size', 'mode', 'batch', 'row'), (*key, row)))
        for peer in ('sdpa', 'sdpa fused', 'sdpa fast'):
            if at(peer):
                pair[f'times_faster_than_{peer.replace(" ", "_")}'] = round(at(peer) / at(row), 3)
        if at('formula') and at('none') and at(row) > at('none'):
            pair['formula_share_over_ours'] = round((at('formula') - at('none')) / (at(row) - at('none')), 3)
        if len(pair) > 5:
            found.append(pair)
    return found


def plot(rows: list[dict], target: Path) -> None:
    """Eager and captured step times and peak memory over the size, per model.

    Args:
        rows: what was measured.
        target: PNG file.
    """
    from zoo.report import _figure

    rows = [r for r in rows if 'step_ms' in r and r['row'] != 'none']
    models = list(dict.fromkeys(r['model'] for r in rows))
    figure, axes = _figure(11, 4.2 * max(1, len(models)), max(1, len(models)), 2)
    colors = {row: f'C{i}' for i, row in enumerate(dict.fromkeys(r['row'] for r in rows))}
    sizes = sorted({r['size'] for r in rows})
    for (left, right), model in zip(axes, models):
        for axis, key, label in ((left, 'step_ms', 'ms an image and step'), (right, 'peak_gb', 'peak memory, GB')):
            for row, mode in dict.fromkeys((r['row'], r['mode']) for r in rows if r['model'] == model):
                mine = [r for r in rows if (r['model'], r['row'], r['mode']) == (model, row, mode) and key in r]
                share = lambda r: r[key] / (r['batch'] if key == 'step_ms' else 1)  # noqa: B023, E731
                if mine and (key == 'step_ms' or mode == 'eager'):
                    style = {'eager': 'o-', 'captured': 's--'}.get(mode, '^:')
                    axis.plot([r['size'] for r in mine], [share(r) for r in mine], style, markersize=4,
                              color=colors[row], label=f'{row}, {mode}')  # fmt: skip
            axis.set(xscale='log', yscale='log', xlabel='side of the image, pixels', ylabel=label, title=model)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        left.legend(fontsize=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _chosen(args: argparse.Namespace) -> None:
    """Check the options, and turn lists of names into lists."""
    for option, known in (('models', MODELS), ('rows', ROWS), ('modes', MODES)):
        names = [n.strip() for n in getattr(args, option).split(',')]
        unknown = [n for n in names if n not in known]
        if unknown:
            raise ZooError(f'--{option}: there is no {unknown[0]!r}; choose from {", ".join(known)}')
        setattr(args, option, names)
    if args.end_to_end:
        args.end_to_end_size = parse_size(args.end_to_end, '--end-to-end')
    if args.sizes is None:
        args.sizes = [] if args.end_to_end else list((64, 128) if args.quick else SIZES)
    if args.batch < 1 or any(n < 64 or n % 8 for n in args.sizes):
        raise ZooError('zoo bench unet: --batch must be at least 1, --sizes multiples of 8 from 64')


def bench_unet(args: argparse.Namespace) -> dict:
    """Run `zoo bench unet`, rewriting `--output` after every row.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: for options that measure nothing, or without diffusers.
    """
    _chosen(args)
    import zoo.diffusion  # noqa: F401  says what to install

    args.cudnn_benchmark = torch.backends.cudnn.benchmark
    args.torch_dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}[args.dtype]
    rates = gpu_rates(args.device)
    settings = {key: getattr(args, key) for key in _SETTINGS} | {'compile': 'compiled' in ' '.join(args.modes)}
    result = {'bench': 'unet', **conditions(args.device), **settings, **rates, 'complete': False, 'results': []}
    result['versions']['diffusers'] = version('diffusers')
    if rates:
        print(rates_in_words(rates), flush=True)

    def note(said: dict) -> None:
        result['results'].append(said)
        print('  ' + ', '.join(f'{k} {v}' for k, v in said.items() if k not in ('profile', 'levels')), flush=True)
        write_json(args.output, result)

    for name in args.models:
        if args.sizes:
            for said in _model_rows(name, args):
                note(said)
        if args.end_to_end:
            try:
                with time_limit(2 * args.row_seconds, '--row-seconds'):
                    note(_end_to_end(name, args))
            except (RuntimeError, TimeoutError) as error:
                recover(args.device, error)
                note({'model': name, 'row': 'end to end', 'size': args.end_to_end, 'error': in_words(error)})
    after = {'rates_after': gpu_rates(args.device)} if rates else {}
    result |= {**after, 'complete': True, 'ratios': compare(result['results'])}
    _print(result)
    if args.plot:
        plot(result['results'], args.plot)
        print(f'written: {args.plot}')
    return result


def _print(result: dict) -> None:
    rows = [r for r in result['results'] if 'mode' in r]
    if rows:
        table = Table(title=f'a step, batch {result["batch"]} unless said: ms / peak GB')
        sizes = sorted({r['size'] for r in rows})
        for column in ('model', 'mode', 'self-attention', *map(str, sizes)):
            table.add_column(column, justify='right' if column.isdigit() else 'left')
        for model, mode, row in dict.fromkeys((r['model'], r['mode'], r['row']) for r in rows):
            at = {r['size']: r for r in rows if (r['model'], r['mode'], r['row']) == (model, mode, row)}
            table.add_row(model, mode, row, *(_cell(at.get(n), result['batch']) for n in sizes))
        console = Console()
        (console if console.is_terminal else Console(width=160)).print(table)
    for pair in result['ratios']:
        print('  ' + ', '.join(f'{k} {v}' for k, v in pair.items()))


def _cell(row: dict | None, batch: int) -> str:
    if row is None or 'step_ms' not in row:
        return '-'
    memory = f' / {row["peak_gb"]:.1f}' if 'peak_gb' in row else ''
    return f'{row["step_ms"]:.1f}{memory}' + (f' (batch {row["batch"]})' if row['batch'] != batch else '')
