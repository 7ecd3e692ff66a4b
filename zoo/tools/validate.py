"""`zoo validate NAME --data FOLDER`: top-1 and top-5 on an ImageNet-layout folder, from the name alone."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from zoo.errors import ZooError
from zoo.registry import PUBLISHED_TOP1
from zoo.tools._load import build, image_size

_AMP = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='zoo validate',
        description="Accuracy of a model's weights on FOLDER (or its val/ subfolder): one subfolder per class, in the "
        "order of the labels when sorted. Resize, crop and normalisation are the model's own.",
    )
    parser.add_argument('name', help='model name, see `zoo list`; any timm model works too')
    parser.add_argument('--data', type=Path, required=True, metavar='FOLDER', help='class folders, or a folder of val/')
    parser.add_argument('--checkpoint', type=Path, metavar='F', help='weights from this file, not from the hub')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='N', help='evaluate at N or H W pixels')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=2, help='processes that decode images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', nargs='?', const='bf16', choices=list(_AMP), help='autocast, bf16 unless said')
    parser.add_argument('--limit', type=int, metavar='N', help='only N images, evenly spaced over the folder')
    parser.add_argument('--output', type=Path, metavar='JSON', help='also write the result here')
    parser.add_argument('--json', action='store_true', help='print JSON instead of text')
    return parser


def _read_image(path: str):
    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise ZooError(f'cannot read image {path}: {error}') from error


def open_folder(folder: Path, classes: int) -> ImageFolder:
    """Open an ImageNet-layout folder.

    Args:
        folder: one subfolder per class, or a folder with such a `val` or `validation` inside.
        classes: how many classes the model tells apart.

    Raises:
        ZooError: if the path is missing, a class folder is empty or the number of classes is another one.
    """
    if not folder.is_dir():
        raise ZooError(f'no such folder: {folder}')
    for sub in ('val', 'validation'):
        if (folder / sub).is_dir():
            folder = folder / sub
            break
    try:
        dataset = ImageFolder(str(folder), loader=_read_image)
    except FileNotFoundError as error:
        raise ZooError(f'{folder}: {str(error).splitlines()[0]}') from error
    if len(dataset.classes) != classes:
        raise ZooError(
            f'{folder} has {len(dataset.classes)} class folders ({", ".join(dataset.classes[:3])}, ...), the model has '
            f'{classes} classes: give the folder whose subfolders are the classes of these weights'
        )
    return dataset


def _loader(model: nn.Module, args: argparse.Namespace) -> tuple[DataLoader, dict]:
    """The images of `--data` through the model's own transform, and that transform's settings."""
    wanted = image_size(args.img_size)
    channels = model.pretrained_cfg['input_size'][0]
    overrides = {'input_size': (channels, *wanted)} if wanted else {}
    transform = resolve_data_config(overrides, model=model, use_test_size=wanted is None)
    dataset = open_folder(args.data, model.num_classes)
    dataset.transform = create_transform(**transform, is_training=False)
    total = len(dataset)
    if args.limit is not None and not 0 < args.limit:
        raise ZooError('--limit takes a positive number')
    if args.limit is not None and args.limit < total:
        dataset = Subset(dataset, [i * total // args.limit for i in range(args.limit)])
    pin = args.device.startswith('cuda')
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, pin_memory=pin), transform


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader, device: str, amp: torch.dtype | None = None) -> dict:
    """Top-1 and top-5 of a model over a loader, in per cent.

    Args:
        model: in eval mode, on `device`.
        loader: batches of images and labels.
        device: where the batches go.
        amp: autocast type, if any.
    """
    hits1 = hits5 = seen = 0
    start = time.perf_counter()
    columns = (
        TextColumn('validate'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.description}'),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task('', total=len(loader))
        for images, labels in loader:
            cast = torch.autocast(torch.device(device).type, amp) if amp else nullcontext()
            with cast:
                logits = model(images.to(device, non_blocking=True))
            ranked = logits.float().topk(min(5, logits.shape[-1])).indices.cpu()
            hit = ranked == labels[:, None]
            hits1 += int(hit[:, 0].sum())
            hits5 += int(hit.sum())
            seen += len(labels)
            bar.update(task, advance=1, description=f'top-1 {100 * hits1 / seen:.2f} %')
    seconds = time.perf_counter() - start
    return {'top1': 100 * hits1 / seen, 'top5': 100 * hits5 / seen, 'images': seen, 'seconds': round(seconds, 2)}


def _result(args: argparse.Namespace, measured: dict, transform: dict) -> dict:
    published = PUBLISHED_TOP1.get(args.name.split('.')[0])
    return {
        'name': args.name,
        'data': str(args.data),
        'checkpoint': str(args.checkpoint) if args.checkpoint else None,
        **measured,
        'published_top1': published,
        'device': args.device,
        'amp': args.amp,
        'batch_size': args.batch_size,
        'transform': {k: list(v) if isinstance(v, tuple) else v for k, v in transform.items()},
    }


def _print(result: dict) -> None:
    transform = result['transform']
    size = 'x'.join(str(n) for n in transform['input_size'][1:])
    print(f'{result["name"]} on {result["data"]}: {result["images"]} images in {result["seconds"]:.1f} s')
    print(f'  transform       {size}, {transform["interpolation"]}, crop_pct {transform["crop_pct"]}')
    print(f'  top-1 measured  {result["top1"]:.2f} %')
    if result['published_top1'] is not None:
        print(f'  top-1 published {result["published_top1"]:.1f} % (ImageNet-1k validation, 50000 images)')
    print(f'  top-5 measured  {result["top5"]:.2f} %')


def cli_validate(argv: list[str]) -> int:
    """Measure accuracy and print it beside the published one."""
    args = _parser().parse_args(argv)
    if not args.data.is_dir():  # before any download
        raise ZooError(f'no such folder: {args.data}')
    model = build(args.name, args.checkpoint, pretrained=True, img_size=image_size(args.img_size))
    loader, transform = _loader(model, args)
    try:
        measured = accuracy(model.to(args.device), loader, args.device, _AMP.get(args.amp))
    except ZooError as error:  # a worker's error arrives with its traceback in the text
        raise ZooError(str(error).strip().splitlines()[-1].removeprefix('zoo.errors.ZooError: ')) from None
    result = _result(args, measured, transform)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + '\n')
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0
