"""`zoo probe`: what frozen features are worth, by linear, moment, Matryoshka and nearest-neighbour probes."""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from zoo.errors import ZooError
from zoo.heads.classify import Headed, nested_dims
from zoo.tools._load import build
from zoo.tools._probe_fit import Features, Splits, encode, principal_axes, probe_head, probe_knn, top1
from zoo.tools._timing import conditions, sync, write_json

_AMP = {'bf16': torch.bfloat16, 'fp16': torch.float16}
_SETTINGS = ('--data.', '--model.', '--trainer.', '--run.', '--seed_everything')
_CHOICE = 10  # one of so many training images is held out to choose settings, where the data has no split for that


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='zoo probe',
        usage='zoo probe MODEL [--config CONFIG] [--data.KEY VALUE ...] [options]\n'
        '       zoo probe --fit CONFIG [--data.KEY VALUE ... --model.KEY VALUE ... --trainer.KEY VALUE ...] [options]',
        description='Computes the features of all images once, without augmentation, and reports top-1 of: a linear '
        'probe of the first d features, moment probing, Matryoshka embeddings (MRL, MRL-E) and their nearest '
        'neighbours beside those of raw and principal components, at d = 8, 16, ... and all. Learning rates and k are '
        'chosen on the validation split if the data has a test split besides, else on a tenth of the training images; '
        'accuracies are of the test split. Writes probe.json and probe.png.',
    )
    parser.add_argument('model', nargs='?', help='model name, see `zoo list`, or a checkpoint of `zoo fit`')
    parser.add_argument('--fit', metavar='CONFIG', help='train this config first, into OUTPUT, and probe the result')
    parser.add_argument('--config', metavar='CONFIG', help='take the data of this config; default: of the run')
    parser.add_argument(
        '--all-classes', action='store_true', help='probe all classes where the config keeps some (data.classes)'
    )
    parser.add_argument('--checkpoint', type=Path, metavar='F', help='weights of the named model from this file')
    parser.add_argument('--pretrained', action='store_true', help='published weights of the named model')
    parser.add_argument('--steps', type=int, default=500, help='optimizer steps of each head (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=256, help='images a step (default: %(default)s)')
    parser.add_argument(
        '--lrs',
        type=float,
        nargs='+',
        default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        help='learning rates that are trained side by side (default: %(default)s)',
    )
    parser.add_argument('--ks', type=int, nargs='+', default=[5, 10, 20, 50], help='numbers of neighbours')
    parser.add_argument('--temperature', type=float, default=0.07, help='of the neighbours (default: %(default)s)')
    parser.add_argument(
        '--hidden', type=int, help='channels of moment probing (default: 512, or the width of narrower networks)'
    )
    parser.add_argument(
        '--tokens-gb', type=float, default=8.0, help='moment probing needs all tokens: no more memory than this'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', nargs='?', const='bf16', choices=list(_AMP), help='autocast of the network')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help='default: runs/probe/MODEL')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser


# network and data


def _fit(args: argparse.Namespace, overrides: list[str]) -> Path:
    """Trains the config into the output folder; the best checkpoint."""
    from zoo.checkpoints import BEST, LAST
    from zoo.runs import CHECKPOINTS, newest_run, run

    own = ['--config', args.fit, f'--run.root={args.output}', '--run.name=backbone', '--run.test_after_fit=false']
    if code := run('fit', [*own, *overrides]):
        raise ZooError(f'training stopped with exit code {code}')
    folder = newest_run(str(args.output), 'backbone')
    if folder is None:
        raise ZooError('training left no checkpoint')
    best = folder / CHECKPOINTS / BEST
    return best if best.is_file() else folder / CHECKPOINTS / LAST


def _network(args: argparse.Namespace, size: int) -> tuple[nn.Module, str]:
    """The network in evaluation mode, and its name."""
    if args.model.endswith('.ckpt'):
        from zoo.checkpoints import load_net

        net, described = load_net(args.model)
        return net, described['net']
    net = build(args.model, args.checkpoint, pretrained=args.pretrained, img_size=(size, size))
    return net, args.model


def open_data(config: Path, overrides: list[str], all_classes: bool) -> Any:
    """The data module of a config.

    Args:
        config: YAML file with a data section.
        overrides: Such as --data.path=FOLDER.
        all_classes: Whether to set data.classes to null.

    Raises:
        ZooError: no such section, a wrong setting, or data without images and labels.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from zoo.data import ImageData
    from zoo.runs import spell_null, user_error

    section = (yaml.safe_load(config.read_text()) or {}).get('data')
    if not section:
        raise ZooError(f'{config} has no data section')
    if all_classes:
        if not (section.get('init_args') or {}).pop('classes', None):
            raise ZooError(f'--all-classes: {config} keeps all classes already')
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, 'data', required=True)
    try:
        parsed = parser.parse_args([f'--data={json.dumps(section)}', *spell_null(overrides)])
        return parser.instantiate_classes(parsed).data
    except (ArgumentError, TypeError, ValueError, ZooError) as error:
        raise user_error(error) or ZooError(f'data of {config}: {error}') from error


# features


def extract(
    net: nn.Module, data: Any, split: str, args: argparse.Namespace, own: bool, tokens: bool, bar: Progress
) -> Features:
    """Features of a split.

    Args:
        net: In evaluation mode, on its device.
        data: Data module, set up.
        split: train, val or test.
        args: device and amp.
        own: Whether the network's own classifiers know these classes.
        tokens: Whether to keep tokens.
        bar: Progress.
    """
    loader = data.in_order(split)
    task = bar.add_task(f'features, {split}', total=len(loader))
    parts: list[tuple] = []
    cast = torch.autocast(torch.device(args.device).type, _AMP[args.amp]) if args.amp else nullcontext()
    for batch in loader:
        data.report_failures(batch['failures'])
        if len(batch['target']):
            batch = {k: v.to(args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            images = data.on_after_batch_transfer(batch, 0)['image']
            with cast:
                all_tokens, pooled, logits = encode(net, images, own)
            parts.append((pooled, all_tokens if tokens else None, batch['target'], logits))
        bar.advance(task)
    if not parts:
        raise ZooError(f'the {split} split has no readable image')
    pooled, kept, target, logits = zip(*parts)
    found = Features(
        torch.cat(pooled),
        torch.cat(kept) if tokens else None,
        torch.cat(target),
        tuple(torch.cat(o) for o in zip(*logits)),
    )
    for name, values in (('features', found.pooled), ('tokens', found.tokens)):
        if values is not None and not torch.isfinite(values).all():
            raise ZooError(
                f'the {name} of the {split} split are not finite' + (': leave out --amp' if args.amp else '')
            )
    return found


def _token_gb(net: nn.Module, data: Any, args: argparse.Namespace) -> float:
    """Memory of the tokens of all images, in 1e9 bytes."""
    size = (2, data.view.channels, data.view.size, data.view.size)
    tokens, _, _ = encode(net, torch.zeros(size, device=args.device), own=False)
    return tokens[0].numel() * 4 * sum(len(source) for source in data.splits.values()) / 1e9


def _same(a: Any, b: Any) -> bool:
    """Whether two sources are one split under two names."""
    return a is b or (len(a) == len(b) and a.name(0) == b.name(0))


def features(net: nn.Module, data: Any, args: argparse.Namespace, trained: bool) -> tuple[Splits, dict[str, Any]]:
    """Features to fit, choose on and test, and what to say about them."""
    own = trained and getattr(net, 'num_classes', 0) == data.num_classes
    gb = _token_gb(net, data, args)
    test = 'test' if 'test' in data.splits else 'val'
    separate = 'val' in data.splits and test == 'test' and not _same(data.splits['val'], data.splits['test'])
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        names = ('train', 'val', test) if separate else ('train', test)
        found = [extract(net, data, name, args, own, gb <= args.tokens_gb, bar) for name in names]
    sync(args.device)
    if not separate:
        order = torch.randperm(len(found[0]), generator=torch.Generator().manual_seed(args.seed))
        held = max(1, len(found[0]) // _CHOICE)
        rows = order.to(args.device)
        found = [found[0].at(rows[held:]), found[0].at(rows[:held]), found[1]]
    about = {
        'images': dict(zip(('fit', 'choose', 'test'), map(len, found))),
        'chosen_on': 'val' if separate else f'{len(found[1])} training images',
        'width': found[0].pooled.shape[1],
        'tokens': None if found[0].tokens is None else list(found[0].tokens.shape[1:]),
        'tokens_gb': round(gb, 3),
        'feature_seconds': round(time.perf_counter() - start, 2),
    }
    return Splits(*found), about


# probes


def probe(
    splits: Splits, num_classes: int, own_dims: tuple[int, ...], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and what was left out.

    Args:
        splits: Features.
        num_classes: Number of classes.
        own_dims: Widths of the network's own classifiers where it has several.
        args: Settings.
    """
    normal, rows, left_out = splits.normalised(), [], []
    width = splits.fit.pooled.shape[1]
    heads = [
        ('linear', 'matryoshka', {}),  # with frozen features and no embedding its classifiers share nothing
        ('moment', 'moment', {'hidden': args.hidden or min(512, max(32, width // 4 * 4))}),
        ('matryoshka', 'matryoshka', {'embed_dim': width}),
        ('matryoshka, one matrix', 'matryoshka', {'embed_dim': width, 'efficient': True}),
    ]
    if splits.fit.tokens is None:
        heads = [head for head in heads if head[1] != 'moment']
        left_out.append(f'moment probing: the tokens take more than --tokens-gb {args.tokens_gb:g}')
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for d, logits in zip(own_dims or (width,), splits.test.own):
            rows.append({'method': 'own classifier', 'dim': d, 'top1': top1(logits, splits.test.target)})
        task = bar.add_task('', total=len(heads) * args.steps + 3 * len(nested_dims(width)))
        embedding = None
        for method, name, options in heads:
            bar.update(task, description=method)
            found, head = probe_head(method, name, options, normal, num_classes, args, lambda: bar.advance(task))
            rows += found
            embedding = head if method == 'matryoshka' else embedding
        for method, embed, data in (
            ('neighbours', lambda x: x, splits),
            ('neighbours, principal', principal_axes(splits.fit.pooled), splits),
            ('neighbours, matryoshka', embedding.embed, normal),
        ):
            bar.update(task, description=method)
            rows += probe_knn(method, embed, data, num_classes, args, lambda: bar.advance(task))
    return rows, left_out


# words and pictures


def draw(results: dict[str, Any], target: Path) -> None:
    """Accuracy against dimensions; what has but one width is a level line."""
    from zoo.report import _COLOURS, _figure

    figure, axes = _figure(8.5, 5)
    axis = axes[0, 0]
    methods = list(dict.fromkeys(row['method'] for row in results['rows']))
    for method, colour in zip(methods, _COLOURS):
        rows = [row for row in results['rows'] if row['method'] == method]
        values = [100 * row['top1'] for row in rows]
        if len(rows) == 1:
            axis.axhline(values[0], color=colour, linestyle=':', linewidth=1.6, label=method)
        else:
            style = '--' if method.startswith('neighbours') else '-'
            axis.plot([row['dim'] for row in rows], values, style, color=colour, marker='.', label=method)
    dims = sorted({row['dim'] for row in results['rows']})
    axis.set_xscale('log', base=2)
    axis.set_xticks(dims, [str(d) for d in dims])
    axis.minorticks_off()
    title = f'{results["model"]}: {results["images"]["test"]} test images of {results["num_classes"]} classes'
    axis.set(title=title, xlabel='dimensions', ylabel='top-1, %')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    partial = target.with_name(f'.{target.name}.{os.getpid()}')
    figure.savefig(partial, format='png')
    partial.replace(target)


def show(results: dict[str, Any], folder: Path) -> None:
    """One table: methods down, dimensions across."""
    dims = sorted({row['dim'] for row in results['rows']})
    table = Table(title=f'top-1 in %, {results["model"]}, {results["num_classes"]} classes', title_justify='left')
    table.add_column('dimensions', no_wrap=True)
    for d in dims:
        table.add_column(str(d), justify='right')
    for method in dict.fromkeys(row['method'] for row in results['rows']):
        cells = {row['dim']: f'{100 * row["top1"]:.2f}' for row in results['rows'] if row['method'] == method}
        table.add_row(method, *(cells.get(d, '') for d in dims))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for line in results['left_out']:
        print(f'left out: {line}')
    images = results['images']
    print(
        f'{images["fit"]} images to fit, {images["test"]} to test; settings chosen on {results["chosen_on"]}; '
        f'features {results["feature_seconds"]:.1f} s, all {results["seconds"]:.1f} s'
    )
    print(f'{folder}/probe.json, {folder}/probe.png')


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of this command, and settings of data, model and trainer as --KEY=VALUE."""
    own: list[str] = []
    settings: list[str] = []
    waiting = False  # whether the last setting has no value yet
    for word in argv:
        if word.startswith(_SETTINGS):
            settings.append(word)
            waiting = '=' not in word
        elif waiting:
            settings[-1] += f'={word}'
            waiting = False
        else:
            own.append(word)
    return own, settings


def _checked(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments and settings of data, model and trainer."""
    own, settings = _split(argv)
    args = _parser().parse_args(own)
    wrong = [word for word in settings if not args.fit and not word.startswith('--data.')]
    if wrong:
        raise ZooError(f'{" ".join(wrong)}: without --fit only --data settings count')
    if bool(args.fit) == bool(args.model):
        raise ZooError('zoo probe takes either a MODEL or --fit CONFIG')
    for name in ('steps', 'batch_size'):
        if getattr(args, name) < 1:
            raise ZooError(f'--{name.replace("_", "-")} takes a positive number')
    if min(args.lrs) <= 0 or min(args.ks) < 1 or args.temperature <= 0:
        raise ZooError('--lrs, --ks and --temperature take positive numbers')
    path = Path(args.fit or args.model)
    name = path.absolute().parents[1].name if path.suffix == '.ckpt' else path.name.removesuffix('.yaml')
    args.output = args.output or Path('runs/probe') / name.replace(':', '_')
    return args, settings


def cli_probe(argv: list[str]) -> int:
    """Probes a network and writes probe.json and probe.png."""
    from zoo.runs import config_of, resolve_config

    args, overrides = _checked(argv)
    start = time.perf_counter()
    if args.fit:
        args.model, overrides = str(_fit(args, overrides)), []
    if args.config:
        config = resolve_config(args.config)
    elif args.model.endswith('.ckpt'):
        config = config_of(Path(args.model))
    else:
        raise ZooError('zoo probe MODEL needs --config CONFIG, whose data it takes; such as --config quickstart')
    data = open_data(config, overrides, args.all_classes)
    net, name = _network(args, data.view.size)
    data.setup()
    net.to(args.device)
    splits, about = features(net, data, args, args.model.endswith('.ckpt') or args.pretrained or args.checkpoint)
    own_dims = net.head.dims if isinstance(net, Headed) else ()
    rows, left_out = probe(splits, data.num_classes, own_dims, args)
    results = {
        'what': 'top-1 of heads over frozen features, computed once without augmentation',
        'model': name,
        'weights': str(args.checkpoint or ('published' if args.pretrained else args.model)),
        'config': args.fit or args.config or str(config),
        'num_classes': data.num_classes,
        'view': vars(data.view),
        **about,
        'rows': [{**row, 'top1': round(row['top1'], 5)} for row in rows],
        'left_out': left_out,
        'settings': {
            k: getattr(args, k) for k in ('steps', 'batch_size', 'lrs', 'ks', 'temperature', 'hidden', 'seed', 'amp')
        },
        'seconds': round(time.perf_counter() - start, 2),
        **conditions(args.device),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    draw(results, args.output / 'probe.png')
    write_json(args.output / 'probe.json', results)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results, args.output)
    return 0
