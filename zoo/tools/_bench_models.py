"""`zoo bench models`: whole models beside those one would use instead.

On a CPU the models take turns, one call each, so that a busy machine hits all alike. On a GPU one model follows the
other, each alone in memory; a model that fails, does not fit or compiles for too long is a row with an `error`, and the
result file is rewritten after every row.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.utils.model import reparameterize_model
from torch import nn

from zoo.errors import ZooError
from zoo.registry import check_name
from zoo.tools._guard import in_words, recover, time_limit
from zoo.tools._load import build
from zoo.tools._timing import conditions, gpu_rates, interleaved, rates_in_words, wall_ms, write_json
from zoo.tools.export import Shape, export, onnx_session

# The timm models of the same size and shape that one would pick instead.
PEERS = {
    'vig_tiny_patch16_224': ['deit_tiny_patch16_224'],
    'vig_small_patch16_224': ['deit_small_patch16_224', 'deit_base_patch16_224'],
    'vig_base_patch16_224': ['deit_base_patch16_224'],
    'vig_hier_tiny_224': ['convnext_tiny', 'swin_tiny_patch4_window7_224'],
    'vig_hier_small_224': ['convnext_small', 'swin_small_patch4_window7_224'],
    'vig_hier_base_224': ['convnext_base', 'swin_base_patch4_window7_224'],
    'ravlt_tiny': ['convnext_tiny', 'swin_tiny_patch4_window7_224', 'mambaout_tiny'],
    'ravlt_small': ['convnext_tiny', 'swin_tiny_patch4_window7_224', 'mambaout_tiny'],
    'mobilemamba_t2': ['mobilenetv4_conv_small', 'efficientvit_b0'],
    'mobilemamba_s6': ['efficientvit_b1', 'repvit_m1', 'mobilenetv4_conv_medium', 'fastvit_t8'],
    'mobilemamba_b1': ['efficientvit_b1', 'repvit_m1', 'mobilenetv4_conv_medium', 'fastvit_t8'],
}
NATIVE = 'native'
_DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_SETTINGS = ('dtype', 'pure', 'fuse', 'compile', 'compile_mode', 'channels_last', 'warmup', 'repeats', 'relative_to')
RUNTIMES = {'torch': 'PyTorch', 'onnxruntime': 'ONNX Runtime'}
_BOTH = {'no': [False], 'yes': [True], 'both': [False, True]}


@dataclass(frozen=True)
class Scenario:
    """One table.

    Args:
        size: image side in pixels, or `native`: each model's own.
        batch: images per call.
        train: a training step (forward, backward, AdamW) rather than inference.
        compile: through `torch.compile`.
        runtime: one of `RUNTIMES`; another one than torch runs what `zoo export` writes, on the CPU.
    """

    size: int | str
    batch: int
    train: bool
    compile: bool = False
    runtime: str = 'torch'

    def __str__(self) -> str:
        what = 'training step' if self.train else 'inference'
        size = 'native size' if self.size == NATIVE else f'{self.size} px'
        how = ', compiled' if self.compile else '' if self.runtime == 'torch' else f', {RUNTIMES[self.runtime]}'
        return f'{what}, {size}, batch {self.batch}{how}'


def _listed(name: str, words: str | None) -> bool:
    """Whether one of the comma-separated patterns names this model."""
    return bool(words) and any(fnmatch(name, w) for w in words.split(','))


def _side(name: str, scenario: Scenario) -> int:
    if scenario.size != NATIVE:
        return int(scenario.size)
    return timm.models.get_pretrained_cfg_value(name, 'input_size')[-1]


@torch.no_grad()
def _redraw_zeros(model: nn.Module) -> None:
    """Small random numbers for parameters that are all zero: networks begin with gains of 0, and zeros run faster."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)


def _fused(model: nn.Module) -> nn.Module:
    """With every normalisation and branch folded that the model knows how to fold."""
    if hasattr(model, 'fuse'):
        return model.fuse() or model
    return reparameterize_model(model)


def _onnxruntime(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call of the exported model, checked against eager, with as many threads as torch has."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / 'model.onnx'
        export(model, path, 'onnx', Shape(*x.shape))
        run = onnx_session(path, torch.get_num_threads())
    image = x.numpy()
    return lambda: run(image)


def _step(name: str, scenario: Scenario, args: argparse.Namespace) -> tuple[Callable[[], object], dict]:
    """The call to time, on inputs of its own, and what a row says about it."""
    torch.manual_seed(0)
    side, layout = _side(name, scenario), torch.contiguous_format
    model = build(name, img_size=(side, side))
    _redraw_zeros(model)
    last = _listed(name, args.channels_last)
    if last:
        layout = torch.channels_last
    fuse = _listed(name, args.fuse) and not scenario.train
    if fuse:
        model = _fused(model)
    dtype = _DTYPES[args.dtype]
    pure = dtype if args.pure and not scenario.train else None
    model = model.to(args.device, dtype=pure, memory_format=layout).train(scenario.train)
    x = torch.randn(scenario.batch, 3, side, side, device=args.device, dtype=pure).to(memory_format=layout)
    y = torch.randint(0, model.num_classes, (scenario.batch,), device=args.device)
    said = {'size': side, 'channels_last': last, 'fused': fuse}
    if scenario.runtime == 'onnxruntime':
        return _onnxruntime(model, x), said
    # One size at a time: a second one would otherwise turn the first's sizes into symbols, for some models only.
    run = torch.compile(model, dynamic=False, mode=args.compile_mode) if scenario.compile else model

    def cast():
        return torch.autocast(torch.device(args.device).type, dtype) if dtype and not pure else nullcontext()

    def infer():
        with torch.inference_mode(), cast():
            return run(x)

    if not scenario.train:
        return infer, said
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device.startswith('cuda') or None)

    def train():
        with cast():
            loss = F.cross_entropy(run(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train, said


def _peak_mib(step: Callable[[], object], before: int) -> float:
    """Peak memory of one call above what the process held before the model was built."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _measure(names: list[str], scenario: Scenario, args: argparse.Namespace) -> list[dict]:
    """Time models that are in memory together; failures become rows."""
    gpu = args.device.startswith('cuda')
    before = torch.cuda.memory_allocated() if gpu else 0
    rows = {name: {'model': name, **asdict(scenario)} for name in names}
    steps, cold = {}, {}
    for name in names:
        try:
            with time_limit(args.model_seconds, '--model-seconds'):
                step, said = _step(name, scenario, args)
                rows[name] |= said
                cold[name] = round(wall_ms(step, args.device), 3)
                steps[name] = step
        except Exception as error:
            rows[name]['error'] = in_words(error)
            step = None
            recover(args.device, error)
    try:
        timed = interleaved(steps, args.device, args.warmup, args.repeats) if steps else {}
        for name, times in timed.items():
            rows[name] |= times | {'cold_ms': cold[name]}
            rows[name]['images_per_s'] = round(scenario.batch / times['median_ms'] * 1e3, 2)
            if gpu:
                rows[name]['peak_mib'] = _peak_mib(steps[name], before)
    except Exception as error:
        for name in steps:
            rows[name]['error'] = in_words(error)
        recover(args.device, error)
    return list(rows.values())


def measure(scenario: Scenario, names: list[str], args: argparse.Namespace) -> Iterator[dict]:
    """Time models in one scenario, on a GPU one after the other.

    Args:
        scenario: what they do.
        names: registered names.
        args: the parsed command line.

    Yields:
        One row per model.
    """
    torch._dynamo.reset()  # compiled code of other scenarios counts against the recompilation limit
    gpu = args.device.startswith('cuda')
    for group in [[name] for name in names] if gpu else [names]:
        yield from _measure(group, scenario, args)
        if gpu:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


def ratios(rows: list[dict], own: list[str]) -> list[dict]:
    """Our models against each peer in the same scenario.

    Args:
        rows: from `measure`; those with an error are left out.
        own: which models are ours.

    Returns:
        Per pair: `time_ratio` (time per image, below 1 we are faster) and, on a GPU, `memory_ratio`.
    """
    found, scenario = [], ('batch', 'train', 'compile', 'runtime')
    rows = [r for r in rows if 'error' not in r]
    for row, peer in itertools.product(rows, rows):
        same = all(row.get(k) == peer.get(k) for k in scenario) and row.get('asked') == peer.get('asked')
        if same and row['model'] in own and peer['model'] not in own:
            pair = {'model': row['model'], 'peer': peer['model'], 'size': row['size']}
            pair |= {k: row[k] for k in scenario if k in row}
            pair['time_ratio'] = round(peer['images_per_s'] / row['images_per_s'], 3)
            if 'peak_mib' in row and 'peak_mib' in peer:
                pair['memory_ratio'] = round(row['peak_mib'] / peer['peak_mib'], 3)
            found.append(pair)
    return found


def _relate(rows: list[dict], name: str | None) -> None:
    """Add to every row its speed and memory over those of one model in the same scenario."""
    reference = next((r for r in rows if r['model'] == name and 'error' not in r), None)
    for row in rows if reference else []:
        for key, ratio in (('images_per_s', 'speed_ratio'), ('peak_mib', 'memory_ratio')):
            if key in row and key in reference:
                row[ratio] = round(row[key] / reference[key], 3)


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    """What the command line asks for; everything the project promises when it asks for nothing.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: if there are neither one nor as many batches as sizes, or for a runtime that cannot do this.
    """
    gpu = args.device.startswith('cuda')
    full = 256 if gpu else 8
    batches, sizes = args.batch_size or [], args.img_size or [224, 1024]
    if len(batches) not in (0, 1, len(sizes)):
        raise ZooError('--batch-size takes one number, or as many as --img-size')
    default = [full if s == NATIVE else max(1, full * 224**2 // s**2) for s in sizes]
    batch = [batches[i % len(batches)] if batches else default[i] for i in range(len(sizes))]
    train = _BOTH[args.train or ('no' if args.img_size else 'both')]
    cases = list(zip(sizes, batch))
    found = []
    for runtime in _runtimes(args):
        for t, c, (s, b) in itertools.product(train, _BOTH[args.compile], cases):
            if runtime == 'torch' or not (t or c):
                found.append(Scenario(s, b, t, c, runtime))
    if not found:
        raise ZooError('--runtime onnxruntime: there is inference only, and nothing for torch.compile to do')
    if args.train is None and not args.img_size and not gpu:
        found = [c for c in found if not (c.train and c.size != NATIVE and c.size > 224)]
    return found


def _runtimes(args: argparse.Namespace) -> list[str]:
    names = args.runtime.split(',')
    for name in names:
        if name not in RUNTIMES:
            raise ZooError(f'unknown name {name!r}: --runtime takes {", ".join(RUNTIMES)}')
    if names != ['torch'] and (args.device != 'cpu' or args.dtype != 'fp32'):
        raise ZooError('--runtime onnxruntime: only with --device cpu --dtype fp32')
    return names


def chosen(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Our models and their peers.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: for a name that nobody registered.
    """
    own = args.models.split(',') if args.models else ['vig_tiny_patch16_224']
    peers = args.peers or ('none' if args.models else 'auto')
    if peers == 'auto':
        found = [p for name in own for p in PEERS.get(name, [])]
    else:
        found = [] if peers == 'none' else peers.split(',')
    found = [p for p in dict.fromkeys(found) if p not in own]
    for name in own + found + ([args.relative_to] if args.relative_to else []):
        check_name(name)
    if args.relative_to and args.relative_to not in own + found:
        raise ZooError(f'--relative-to {args.relative_to}: add it to --peers or --models')
    return own, found


def bench_models(args: argparse.Namespace) -> dict:
    """Run `zoo bench models`, rewriting `--output` after every row.

    Args:
        args: the parsed command line.
    """
    own, peers = chosen(args)
    torch.ones(64, 64, device=args.device).matmul(torch.ones(64, 64, device=args.device))  # start the libraries
    settings = {k: getattr(args, k) for k in _SETTINGS}
    rates = gpu_rates(args.device)
    result = {'bench': 'models', **conditions(args.device), **settings, **rates, 'complete': False, 'results': []}
    if rates:
        result['cudnn_benchmark'] = torch.backends.cudnn.benchmark
        print(rates_in_words(rates), flush=True)
    for scenario in scenarios(args):
        group: list[dict] = []
        print(scenario, flush=True)
        for row in measure(scenario, own + peers, args):
            row['asked'] = scenario.size
            group.append(row)
            print(f'  {row["model"]}: {row.get("error") or str(row["images_per_s"]) + " images/s"}', flush=True)
            write_json(args.output, {**result, 'results': result['results'] + group})
        _relate(group, args.relative_to)
        result['results'] += group
        _print(scenario, group, ratios(group, own))
    after = {'rates_after': gpu_rates(args.device)} if rates else {}
    return {**result, **after, 'complete': True, 'ratios': ratios(result['results'], own)}


def _print(scenario: Scenario, rows: list[dict], compared: list[dict]) -> None:
    columns = {
        'median ms': ('median_ms', 2), 'min ms': ('min_ms', 2), 'images/s': ('images_per_s', 1),
        'relative': ('speed_ratio', 2), 'peak MiB': ('peak_mib', 0), 'rel. memory': ('memory_ratio', 2),
        'first call ms': ('cold_ms', 0),
    }  # fmt: skip
    columns = {title: c for title, c in columns.items() if any(c[0] in row for row in rows)}
    table = Table(title=str(scenario))
    for column in ('model', *columns):
        table.add_column(column, justify='left' if column == 'model' else 'right', no_wrap=True)
    for row in rows:
        name = row['model'] + (f' @{row["size"]}' if scenario.size == NATIVE else '')
        values = [f'{row[key]:.{digits}f}' if key in row else '' for key, digits in columns.values()]
        table.add_row(name, *(values if 'error' not in row else ['failed', *values[1:]]))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    for row in rows:
        if 'error' in row:
            print(f'  {row["model"]}: {row["error"]}')
    for c in compared:
        factor = c['time_ratio']
        words = f'{1 / factor:.2f}x faster' if factor < 1 else f'{factor:.2f}x the time'
        print(f'  {c["model"]} against {c["peer"]}: time ratio {factor:.2f} ({words})')
