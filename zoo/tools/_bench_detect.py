"""`zoo bench detect`: training steps of one detector on several backbones, at the sizes that detection trains at.

A step is forward, losses, backward and AdamW on random images with random rectangles, whose masks they fill; heads,
proposals, levels and anchors are the same for every backbone. Each backbone is alone in memory, and one that fails,
does not fit or takes too long is a row with an `error`. The result file is rewritten after every row.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from zoo.errors import ZooError
from zoo.heads.detect import Detector, Neck, Resize
from zoo.registry import check_name
from zoo.tools._bench_models import _DTYPES, _listed, _peak_mib, _redraw_zeros
from zoo.tools._guard import in_words, recover, time_limit
from zoo.tools._timing import conditions, gpu_rates, interleaved, rates_in_words, write_json

_SETTINGS = ('detector', 'dtype', 'objects', 'classes', 'width', 'channels_last', 'freeze_norms', 'warmup', 'repeats')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `zoo bench detect`."""
    parser.add_argument('--models', default='vig_hier_tiny_224,ravlt_tiny', metavar='A,B', help='backbones; default: '
                        '%(default)s')  # fmt: skip
    parser.add_argument('--peers', default='resnet50', metavar='A,B', help='backbones to compare with, or none; '
                        'default: %(default)s')  # fmt: skip
    kinds = ('retinanet', 'faster_rcnn', 'mask_rcnn', 'ssdlite')
    parser.add_argument('--detector', choices=kinds, default='mask_rcnn')
    parser.add_argument('--img-size', type=int, nargs='+', default=[1024], metavar='N', help='image sides')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[2, 4], metavar='N', help='every one is measured')
    parser.add_argument('--dtype', choices=tuple(_DTYPES), help='autocast type; default: fp32 on the CPU, else bf16')
    parser.add_argument('--objects', type=int, default=8, metavar='N', help='in every image')
    parser.add_argument('--classes', type=int, default=80, metavar='N')
    parser.add_argument('--width', type=int, default=256, metavar='N', help='channels of levels and heads')
    parser.add_argument('--channels-last', nargs='?', const='*', metavar='A,B', help='of all backbones or of A,B')
    parser.add_argument('--freeze-norms', default='resnet*', metavar='A,B', help='backbones whose BatchNorms keep '
                        'their statistics, as ResNets in detectors do; default: %(default)s')  # fmt: skip
    parser.add_argument('--grad-checkpointing', action='store_true', help='compute blocks again in the backward pass')
    parser.add_argument('--model-seconds', type=float, default=120, metavar='S', help='longest time for a row')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw images/s and memory')


def _objects(count: int, side: int, classes: int, device: str) -> dict[str, torch.Tensor]:
    sizes = side * (0.05 + 0.45 * torch.rand(count, 2))
    corners = torch.rand(count, 2) * (side - sizes)
    boxes = torch.cat([corners, corners + sizes], 1)
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = True
    labels = torch.randint(classes, (count,))
    return {k: v.to(device) for k, v in (('boxes', boxes), ('labels', labels), ('masks', masks))}


def training_step(name: str, side: int, batch: int, args: argparse.Namespace) -> tuple[Callable[[], object], dict]:
    """The call to time and what a row says about it.

    Args:
        name: backbone.
        side: height and width of the images.
        batch: images.
        args: the parsed command line.
    """
    torch.manual_seed(0)
    last, frozen = _listed(name, args.channels_last), _listed(name, args.freeze_norms)
    neck = Neck(width=args.width, freeze_norms=frozen, grad_checkpointing=args.grad_checkpointing)
    net = Detector(args.detector, name, args.classes, neck=neck, resize=Resize(side, side))
    _redraw_zeros(net)
    layout = torch.channels_last if last else torch.contiguous_format
    net = net.to(args.device, memory_format=layout).train()
    images = [torch.rand(3, side, side, device=args.device) for _ in range(batch)]
    targets = [_objects(args.objects, side, args.classes, args.device) for _ in range(batch)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=args.device.startswith('cuda') or None)
    dtype = _DTYPES[args.dtype]
    said = {
        'parameters': sum(p.numel() for p in net.parameters()),
        'backbone_parameters': sum(p.numel() for p in net.pyramid.parameters()),
        'channels_last': last,
        'frozen_norms': frozen,
    }

    def step() -> None:
        with torch.autocast(torch.device(args.device).type, dtype) if dtype else nullcontext():
            loss = sum(net(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, said


def _row(name: str, side: int, batch: int, args: argparse.Namespace) -> dict:
    gpu = args.device.startswith('cuda')
    row = {'model': name, 'size': side, 'batch': batch}
    before = torch.cuda.memory_allocated() if gpu else 0
    step = None
    try:
        with time_limit(args.model_seconds, '--model-seconds'):
            step, said = training_step(name, side, batch, args)
            row |= said
            row |= interleaved({name: step}, args.device, args.warmup, args.repeats)[name]
            row['images_per_s'] = round(batch / row['median_ms'] * 1e3, 2)
            if gpu:
                row['peak_mib'] = _peak_mib(step, before)
    except Exception as error:
        row['error'] = in_words(error)
        step = None
        recover(args.device, error)
    step = None
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return row


def bench_detect(args: argparse.Namespace) -> dict:
    """Run `zoo bench detect`, rewriting `--output` after every row.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: for a backbone that nobody registered, or sizes that are none.
    """
    names = list(dict.fromkeys([*args.models.split(','), *([] if args.peers == 'none' else args.peers.split(','))]))
    for name in names:
        check_name(name)
    if min(*args.img_size, *args.batch_size, args.objects, args.classes, args.width) < 1:
        raise ZooError('zoo bench detect: sizes, batches, objects, classes and width must be positive')
    rates = gpu_rates(args.device)
    settings = {k: getattr(args, k) for k in _SETTINGS}
    result = {'bench': 'detect', **conditions(args.device), **settings, **rates, 'complete': False, 'results': []}
    if rates:
        result['cudnn_benchmark'] = torch.backends.cudnn.benchmark
        print(rates_in_words(rates), flush=True)
    for side in args.img_size:
        for batch in args.batch_size:
            for name in names:
                row = _row(name, side, batch, args)
                result['results'].append(row)
                said = row.get('error') or f'{row["images_per_s"]} images/s'
                print(f'  {name}, {side} px, batch {batch}: {said}', flush=True)
                write_json(args.output, result)
    after = {'rates_after': gpu_rates(args.device)} if rates else {}
    result |= {**after, 'complete': True}
    _print(result, args)
    if args.plot:
        plot(result['results'], args.plot)
        print(f'written: {args.plot}')
    return result


def _print(result: dict, args: argparse.Namespace) -> None:
    table = Table(title=f'training step of {args.detector}, {args.dtype}')
    columns = {'size': '', 'batch': '', 'parameters': ',', 'median_ms': '.1f', 'images_per_s': '.2f', 'peak_mib': '.0f'}
    for column in ('model', *columns):
        table.add_column(column, justify='left' if column == 'model' else 'right', no_wrap=True)
    for row in result['results']:
        values = [format(row[key], form) if key in row else '' for key, form in columns.items()]
        table.add_row(row['model'], *values[:-2], *(['failed', ''] if 'error' in row else values[-2:]))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def plot(rows: list[dict], target: Path) -> None:
    """Bars of images/s and of peak memory.

    Args:
        rows: what was measured.
        target: PNG file.
    """
    from zoo.report import _COLOURS, _figure

    panels = [('images_per_s', 'images/s'), ('peak_mib', 'peak memory, MiB')]
    panels = [p for p in panels if any(p[0] in row for row in rows)] or panels[:1]
    names = list(dict.fromkeys(row['model'] for row in rows))
    cases = list(dict.fromkeys((row['size'], row['batch']) for row in rows))
    figure, axes = _figure(5.5 * len(panels), 4, 1, len(panels))
    share = 0.8 / len(names)
    for axis, (key, label) in zip(axes[0], panels):
        for place, name in enumerate(names):
            found = {(row['size'], row['batch']): row.get(key, 0) for row in rows if row['model'] == name}
            bars = axis.bar(
                [i + place * share for i in range(len(cases))],
                [found.get(case, 0) for case in cases],
                share,
                label=name,
                color=_COLOURS[place % len(_COLOURS)],
            )
            axis.bar_label(bars, fmt='%.4g', fontsize=8)
        middle = share * (len(names) - 1) / 2
        axis.set_xticks([i + middle for i in range(len(cases))], [f'{side} px, batch {batch}' for side, batch in cases])
        axis.set(ylabel=label)
        axis.grid(alpha=0.3, axis='y')
    axes[0][0].legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
