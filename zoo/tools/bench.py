"""`zoo bench models|kernels`: times beside those of the models and kernels one would use instead.

Everything that is compared runs in one process, one call of each in turn. Without arguments `zoo bench models` measures
the smallest ViG beside DeiT-tiny: inference at 224 and 1024 pixels, a training step at 224.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from zoo.errors import ZooError
from zoo.registry import check_name
from zoo.tools._bench_kernels import add_arguments as add_kernel_arguments
from zoo.tools._bench_kernels import bench_kernels
from zoo.tools._load import build
from zoo.tools._timing import conditions, interleaved, write_json

# The timm models of the same size and shape that one would pick instead.
PEERS = {
    'vig_tiny_patch16_224': ['deit_tiny_patch16_224'],
    'vig_small_patch16_224': ['deit_small_patch16_224', 'deit_base_patch16_224'],
    'vig_base_patch16_224': ['deit_base_patch16_224'],
    'vig_hier_tiny_224': ['convnext_tiny', 'swin_tiny_patch4_window7_224'],
    'vig_hier_small_224': ['convnext_small', 'swin_small_patch4_window7_224'],
    'vig_hier_base_224': ['convnext_base', 'swin_base_patch4_window7_224'],
}
_DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass(frozen=True)
class Scenario:
    """One row group of the table.

    Args:
        size: image side in pixels.
        batch: images per call.
        train: a training step (forward, backward, AdamW) rather than inference.
    """

    size: int
    batch: int
    train: bool

    def __str__(self) -> str:
        return f'{"training step" if self.train else "inference"}, {self.size} px, batch {self.batch}'


def _step(model: nn.Module, scenario: Scenario, args: argparse.Namespace) -> Callable[[], object]:
    """The call to time, on inputs of its own."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(args.device, memory_format=layout).train(scenario.train)
    x = torch.randn(scenario.batch, 3, scenario.size, scenario.size, device=args.device).to(memory_format=layout)
    y = torch.randint(0, model.num_classes, (scenario.batch,), device=args.device)
    run = torch.compile(model) if args.compile else model
    dtype = _DTYPES[args.dtype]

    def cast():
        return torch.autocast(torch.device(args.device).type, dtype) if dtype else nullcontext()

    def infer():
        with torch.inference_mode(), cast():
            return run(x)

    if not scenario.train:
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device.startswith('cuda') or None)

    def train():
        with cast():
            loss = F.cross_entropy(run(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def _peak_mib(step: Callable[[], object], own_bytes: int) -> float:
    """Peak memory of one call as if the model were alone on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + own_bytes) / 2**20


def measure(scenario: Scenario, names: list[str], args: argparse.Namespace) -> list[dict]:
    """Time models side by side in one scenario.

    Args:
        scenario: what they do.
        names: registered names.
        args: the parsed command line.

    Returns:
        One row per model.
    """
    steps, resident = {}, {}
    for name in names:
        before = torch.cuda.memory_allocated() if args.device.startswith('cuda') else 0
        torch.manual_seed(0)
        steps[name] = _step(build(name, img_size=(scenario.size, scenario.size)), scenario, args)
        resident[name] = (torch.cuda.memory_allocated() - before) if args.device.startswith('cuda') else 0
    timed = interleaved(steps, args.device, args.warmup, args.repeats)
    rows = []
    for name in names:
        row = {'model': name, **asdict(scenario), **timed[name]}
        row['images_per_s'] = round(scenario.batch / row['median_ms'] * 1e3, 2)
        if args.device.startswith('cuda'):
            row['peak_mib'] = round(_peak_mib(steps[name], resident[name]), 1)
        rows.append(row)
    return rows


def ratios(rows: list[dict], own: list[str]) -> list[dict]:
    """Time of each of our models over that of each peer in the same scenario; below 1 we are faster.

    Args:
        rows: from `measure`.
        own: which models are ours.
    """
    found = []
    for row in rows:
        for peer in rows:
            same = all(row[k] == peer[k] for k in ('size', 'batch', 'train'))
            if same and row['model'] in own and peer['model'] not in own:
                scenario = {k: row[k] for k in ('size', 'batch', 'train')}
                ratio = round(row['median_ms'] / peer['median_ms'], 3)
                found.append({'model': row['model'], 'peer': peer['model'], **scenario, 'time_ratio': ratio})
    return found


def _scenarios(args: argparse.Namespace) -> list[Scenario]:
    """What the command line asks for; everything the project promises when it asks for nothing."""
    gpu = args.device.startswith('cuda')
    default_batch = (lambda s: max(1, 256 * 224**2 // s**2)) if gpu else (lambda s: max(1, 8 * 224**2 // s**2))
    batches = args.batch_size or []
    sizes = args.img_size or [224, 1024]
    if len(batches) not in (0, 1, len(sizes)):
        raise ZooError('--batch-size takes one number, or as many as --img-size')
    batch = [batches[i % len(batches)] if batches else default_batch(s) for i, s in enumerate(sizes)]
    modes = {None: [False] if args.img_size else [False, True], True: [True], False: [False]}[args.train]
    chosen = [Scenario(s, b, train) for train in modes for s, b in zip(sizes, batch)]
    if args.train is None and not args.img_size and not gpu:
        chosen = [c for c in chosen if not (c.train and c.size > 224)]
    return chosen


def _names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Our models and their peers."""
    own = args.models.split(',') if args.models else ['vig_tiny_patch16_224']
    peers = args.peers or ('none' if args.models else 'auto')
    if peers == 'auto':
        chosen = [p for name in own for p in PEERS.get(name, [])]
    else:
        chosen = [] if peers == 'none' else peers.split(',')
    chosen = [p for p in dict.fromkeys(chosen) if p not in own]
    for name in own + chosen:
        check_name(name)
    return own, chosen


def bench_models(args: argparse.Namespace) -> dict:
    """Run `zoo bench models`.

    Args:
        args: the parsed command line.
    """
    own, peers = _names(args)
    torch.ones(64, 64, device=args.device).matmul(torch.ones(64, 64, device=args.device))  # start the libraries
    rows = []
    for scenario in _scenarios(args):
        group = measure(scenario, own + peers, args)
        rows += group
        _print_models(scenario, group, ratios(group, own))
        if args.device.startswith('cuda'):
            torch.cuda.empty_cache()
    settings = {k: getattr(args, k) for k in ('dtype', 'compile', 'channels_last', 'warmup', 'repeats')}
    return {'bench': 'models', **conditions(args.device), **settings, 'results': rows, 'ratios': ratios(rows, own)}


def _print_models(scenario: Scenario, rows: list[dict], compared: list[dict]) -> None:
    table = Table(title=str(scenario))
    for column in ('model', 'median ms', 'min ms', 'images/s', 'first call ms', 'peak MiB'):
        table.add_column(column, justify='left' if column == 'model' else 'right', no_wrap=True)
    for row in rows:
        peak = f'{row["peak_mib"]:.0f}' if 'peak_mib' in row else ''
        times = [f'{row[k]:.2f}' for k in ('median_ms', 'min_ms', 'images_per_s', 'cold_ms')]
        table.add_row(row['model'], *times, peak)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    for c in compared:
        factor = c['time_ratio']
        words = f'{1 / factor:.2f}x faster' if factor < 1 else f'{factor:.2f}x the time'
        print(f'  {c["model"]} against {c["peer"]}: time ratio {factor:.2f} ({words})')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='zoo bench', description=__doc__.split('\n', 1)[1].strip())
    verbs = parser.add_subparsers(dest='what', required=True, metavar='models|kernels')
    models = verbs.add_parser('models', help='whole models', description='Whole models beside those of timm.')
    models.add_argument('--models', metavar='A,B', help='registered names; default: vig_tiny_patch16_224')
    models.add_argument(
        '--peers',
        nargs='?',
        const='auto',
        metavar='A,B',
        help='timm models to compare with: names, auto (those of the same size) or none; '
        'default: auto, none with --models',
    )
    models.add_argument('--img-size', type=int, nargs='+', metavar='N', help='image sides; default: 224 and 1024')
    models.add_argument('--batch-size', type=int, nargs='+', metavar='N', help='one, or one per size')
    models.add_argument('--train', action=argparse.BooleanOptionalAction, help='training steps; default without '
                        '--img-size: both, with it: inference')  # fmt: skip
    models.add_argument('--dtype', choices=list(_DTYPES), help='autocast type; default: fp32 on the CPU, else bf16')
    models.add_argument('--compile', action='store_true', help='torch.compile everything')
    models.add_argument('--channels-last', action='store_true', help='channels-last images and convolution weights')
    kernels = verbs.add_parser('kernels', help='the ops', description='Scans beside SDPA and flash-linear-attention.')
    add_kernel_arguments(kernels)
    for verb in (models, kernels):
        verb.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        verb.add_argument('--threads', type=int, help="torch's CPU threads")
        verb.add_argument('--warmup', type=int, help='uncounted calls after the first; default: 2, on CUDA 10')
        verb.add_argument('--repeats', type=int, help='counted calls; default: 10, on CUDA 50')
        verb.add_argument('--output', type=Path, metavar='JSON', help='write everything here')
    return parser


def cli_bench(argv: list[str]) -> int:
    """Measure, print a table and write JSON."""
    args = _parser().parse_args(argv)
    gpu = args.device.startswith('cuda')
    if gpu and not torch.cuda.is_available():
        raise ZooError('--device cuda: torch sees no CUDA device here (zoo doctor says what it sees)')
    args.dtype = args.dtype or ('bf16' if gpu else 'fp32')
    args.warmup = args.warmup if args.warmup is not None else (10 if gpu else 2)
    args.repeats = args.repeats or (50 if gpu else 10)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        result = bench_models(args) if args.what == 'models' else bench_kernels(args)
    finally:
        torch.set_num_threads(before)
    if args.output:
        write_json(args.output, result)
        print(f'written: {args.output}')
    return 0
