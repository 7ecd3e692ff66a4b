"""`zoo list`, `zoo info NAME` and `zoo configs`: what there is."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from timm.models import PretrainedCfg

import zoo
from zoo.errors import ZooError
from zoo.registry import CAPABILITIES, PUBLISHED_TOP1, capabilities, check_name, family, list_models
from zoo.tools._cost import cost, human, meta_model


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f'zoo {verb}', description=description)
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser


def _console() -> Console:
    """A console that does not fold tables when the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def cli_list(argv: list[str]) -> int:
    """Print the zoo's models, or those that match a pattern or have a capability."""
    parser = _parser('list', 'The models of the zoo. Any of them is also timm.create_model(NAME) after `import zoo`.')
    parser.add_argument('filter', nargs='*', help="wildcard patterns such as 'vig_hier*'; default: all")
    explained = '; '.join(f'{k}: {v}' for k, v in CAPABILITIES.items())
    parser.add_argument('--capability', choices=list(CAPABILITIES), help=explained.replace('%', '%%'))
    args = parser.parse_args(argv)
    names = list_models(args.filter, args.capability)
    if not names:
        raise ZooError(f'no model of the zoo matches {" ".join(args.filter)!r}. Type: zoo list')
    rows = [_summary(name) for name in names]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(title=f'{len(rows)} models; details: zoo info NAME')
    for column, justify in (('name', 'left'), ('params', 'right'), ('MACs', 'right'), ('at', 'right')):
        table.add_column(column, justify=justify, no_wrap=True)
    table.add_column('published top-1', justify='right')
    table.add_column('can')
    for row in rows:
        top1 = '' if row['published_top1'] is None else f'{row["published_top1"]:.1f} %'
        size = 'x'.join(str(n) for n in row['input_size'][1:])
        table.add_row(row['name'], human(row['params']), human(row['macs']), size, top1, ', '.join(row['capabilities']))
    _console().print(table)
    return 0


def _summary(name: str) -> dict:
    """The line of one model in `zoo list`."""
    model = meta_model(name)
    input_size = tuple(model.pretrained_cfg['input_size'])
    counted = cost(model, input_size)
    return {
        'name': name,
        'family': family(name),
        'params': counted.params,
        'macs': counted.macs,
        'scan_macs': counted.scan_macs,
        'input_size': input_size,
        'published_top1': PUBLISHED_TOP1.get(name.split('.')[0]),
        'capabilities': [c for c in CAPABILITIES if c in capabilities(name)],
    }


def describe(name: str, img_size: tuple[int, int] | None = None) -> dict:
    """Everything `zoo info` knows of a model, as plain data.

    Args:
        name: registered name, of the zoo or of timm.
        img_size: height and width at which operations are counted; default: the model's own.
    """
    model = meta_model(check_name(name))
    cfg = PretrainedCfg(**model.pretrained_cfg)
    input_size = (cfg.input_size[0], *(img_size or cfg.input_size[1:]))
    mixers = model.token_mixers() if hasattr(model, 'token_mixers') else []
    own = family(name) is not None
    return {
        'name': name,
        'family': family(name) or model.__class__.__module__,
        'capabilities': [c for c in CAPABILITIES if c in capabilities(name)] if own else None,
        **dataclasses.asdict(cost(model, input_size)),
        'input_size': input_size,
        'transform': {k: getattr(cfg, k) for k in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        'num_classes': cfg.num_classes,
        'weights': _weights(cfg),
        'published_top1': PUBLISHED_TOP1.get(name.split('.')[0]),
        'token_mixers': [list(m) for m in mixers],
    }


def _weights(cfg: PretrainedCfg) -> dict | None:
    """Where `pretrained=True` takes its weights from."""
    if not cfg.has_weights:
        return None
    return {
        'hub_id': cfg.hf_hub_id,
        'file': cfg.hf_hub_filename or cfg.file,
        'url': cfg.url,
        'license': cfg.license,
        'source': cfg.origin_url,
    }


def cli_info(argv: list[str]) -> int:
    """Print what is known of one model."""
    parser = _parser('info', 'Size, cost, transform, weights and token mixers of one model.')
    parser.add_argument('name', help='model name, see `zoo list`; any timm model works too')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='N', help='count operations at N or H W pixels')
    args = parser.parse_args(argv)
    size = args.img_size
    if size and len(size) > 2:
        raise ZooError('--img-size takes one number (square) or two (height width)')
    if args.name.startswith(('hf-hub:', 'local-dir:')):
        raise ZooError('zoo info takes a registered name: type `zoo list` to see them')
    info = describe(args.name, (size[0], size[-1]) if size else None)
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    _print_info(info)
    return 0


def _print_info(info: dict) -> None:
    table = Table(title=info['name'], show_header=False)
    table.add_column(style='bold', no_wrap=True)
    table.add_column(overflow='fold')
    for key, value in _info_rows(info):
        table.add_row(key, value)
    _console().print(table)


def _info_rows(info: dict) -> list[tuple[str, str]]:
    transform, weights = info['transform'], info['weights']
    share = f', of which scan {human(info["scan_macs"])} ({info["scan_macs"] / info["macs"]:.1%})'
    rows = [
        ('family', info['family']),
        ('parameters', f'{human(info["params"])} ({info["params"]:,})'),
        ('MACs per image', human(info['macs']) + (share if info['scan_macs'] else '') + ' (FLOPs = 2 x MACs)'),
        ('input', ' x '.join(str(n) for n in info['input_size'])),
        ('classes', str(info['num_classes'])),
        ('mean / std', f'{_numbers(transform["mean"])} / {_numbers(transform["std"])}'),
        ('resize / crop', f'{transform["interpolation"]}, crop_pct {transform["crop_pct"]}, {transform["crop_mode"]}'),
    ]
    if weights:
        place = ' '.join(str(w) for w in (weights['hub_id'] or weights['url'], weights['file']) if w)
        rows += [
            ('weights', place),
            ('licence', weights['license'] or 'not stated'),
            ('source', weights['source'] or 'not stated'),
        ]
    else:
        rows += [('weights', 'none published: pretrained=True is not available')]
    if info['published_top1'] is not None:
        rows += [('published top-1', f'{info["published_top1"]:.1f} % (ImageNet-1k; check: zoo validate)')]
    if info['capabilities'] is not None:
        rows += [('can', ', '.join(info['capabilities']))]
    return rows + [('token mixers', line) for line in _mixer_lines(info['token_mixers'])]


def _numbers(values: tuple[float, ...]) -> str:
    return ', '.join(f'{v:g}' for v in values)


def _mixer_lines(mixers: list[list[str]]) -> list[str]:
    """The layers of one kind on one line, kinds in the order in which the network meets them."""
    layers: dict[str, list[str]] = {}
    for layer, kind in mixers:
        layers.setdefault(kind, []).append(layer)
    return [f'{len(ns)} x {kind}: {ns[0]}' + (f' ... {ns[-1]}' if len(ns) > 1 else '') for kind, ns in layers.items()]


def config_files() -> dict[str, Path]:
    """Packaged configs by the name that `--config` takes, such as `classify/quickstart`."""
    roots = [Path(p) / 'configs' for p in zoo.__path__]
    found = {}
    for root in roots:
        for path in sorted(root.rglob('*.yaml')):
            found.setdefault(path.relative_to(root).with_suffix('').as_posix(), path)
    return found


def _headline(path: Path) -> str:
    """The first line of the comment that opens a config: what it reproduces."""
    for line in path.read_text(encoding='utf-8').splitlines():
        text = line.lstrip('#').strip()
        if text:
            return text if line.startswith('#') else ''
    return ''


def cli_configs(argv: list[str]) -> int:
    """Print the packaged configs, or the text of one."""
    parser = _parser('configs', 'The packaged training configs; run one with: zoo fit --config NAME')
    parser.add_argument('name', nargs='?', help='print this config instead of the table')
    args = parser.parse_args(argv)
    files = config_files()
    if args.name:
        name = args.name.removesuffix('.yaml').removeprefix('configs/')
        if name not in files:
            raise ZooError(f'no packaged config {args.name!r}. There are: {", ".join(files)}')
        print(files[name].read_text(encoding='utf-8'), end='')
        return 0
    rows = [{'name': name, 'reproduces': _headline(path), 'file': str(path)} for name, path in files.items()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(title=f'{len(rows)} configs; read one: zoo configs NAME; run one: zoo fit --config NAME')
    table.add_column('name', no_wrap=True)
    table.add_column('what it reproduces', overflow='fold')
    for row in rows:
        table.add_row(row['name'], row['reproduces'])
    _console().print(table)
    return 0
