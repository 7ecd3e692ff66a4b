"""`zoo cache-latents`: encode images and captions once, into the shards that zoo.data.CachedLatents reads."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import RunError, ZooError

if TYPE_CHECKING:
    from zoo.tasks._denoising import Frame

PLAN = 'plan.json'
_DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='zoo cache-latents',
        description='Encodes images and captions once with the VAE and text encoders of a diffusers pipeline. A run '
        'that was stopped goes on when the same command is given again.',
    )
    add = parser.add_argument
    add('--pipeline', required=True, help='folder or hub name of a diffusers pipeline')
    add('--data', required=True, help='tar shards, a folder, parquet, or a hub name, see zoo.data.CaptionedImages')
    add('--output', required=True, type=Path, metavar='FOLDER')
    add('--split', default='train', help='of a hub or parquet data set')
    add('--captions', metavar='FILE', help='JSON list with one caption for each row')
    add('--image-column')
    add('--caption-column')
    add('--size', type=int, default=512, help='height and width in pixels (default: 512)')
    add('--resize', choices=['crop', 'square'], default='crop', help='square distorts (default: crop)')
    add('--interpolation', choices=['bicubic', 'bilinear'], default='bicubic')
    add('--no-antialias', action='store_true', help="shrink without a filter, as OpenCV's resize does")
    add('--bucket-step', type=int, metavar='PIXELS', help='buckets of aspect ratios, in steps of this; 64 is usual')
    add('--max-ratio', type=float, default=2.0, help='of buckets, longest side over shortest (default: 2)')
    add('--limit', type=int, metavar='N', help='the first N samples')
    add('--batch-size', type=int, default=8, metavar='N')
    add('--shard-size', type=int, default=512, metavar='N', help='samples in a file (default: 512)')
    add('--num-workers', type=int, default=4, metavar='N')
    add('--device', help='cuda where there is one, otherwise cpu')
    add('--dtype', choices=list(_DTYPES), help='to compute in: float16 on cuda, otherwise float32; files hold float16')
    return parser


def cli_cache_latents(argv: list[str]) -> int:
    """Writes a cache of latents and text embeddings."""
    args = _parser().parse_args(argv)
    for name in ('batch_size', 'shard_size', 'limit'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ZooError(f'--{name.replace("_", "-")} takes a positive number')
    from zoo.data.captions import find_buckets, open_captions
    from zoo.data.framing import Framing

    framing = Framing(
        args.size, args.resize, args.interpolation, not args.no_antialias, 0.0, args.bucket_step, args.max_ratio
    )
    source = open_captions(args.data, args.split, args.captions, args.image_column, args.caption_column)
    if args.limit and args.limit < len(source):
        from zoo.data.captions import _Part

        source = _Part(source, list(range(args.limit)))
    buckets = find_buckets(source, framing)
    shards = plan_shards(buckets, args.shard_size)
    # what is cached is the whole image: random crops are training's
    settings = {k: str(v) for k, v in vars(framing).items() if k != 'crop_area'}
    settings |= {'pipeline': args.pipeline, 'data': args.data}
    settings |= {'split': args.split, 'captions': str(args.captions), 'shard_size': str(args.shard_size)}
    plan = {'settings': settings, 'buckets': _digest(buckets), 'samples': len(buckets)}
    check_plan(args.output, plan)
    waiting = [number for number in range(len(shards)) if not _file(args.output, number).is_file()]
    print(f'{len(source)} samples in {len(shards)} shards, {len(shards) - len(waiting)} of them there already')
    if waiting or not (args.output / 'index.json').is_file():
        _encode(args, framing, source, buckets, shards, waiting, plan)
    print(f'cache: {args.output}/  (--data zoo.data.CachedLatents --data.path {args.output})')
    return 0


def plan_shards(buckets: list[int], size: int) -> list[list[int]]:
    """Indices of the samples of each shard: of one bucket, in their order, `size` at most."""
    order = sorted(range(len(buckets)), key=lambda i: buckets[i])
    shards: list[list[int]] = []
    for index in order:
        if not shards or len(shards[-1]) == size or buckets[shards[-1][0]] != buckets[index]:
            shards.append([])
        shards[-1].append(index)
    return shards


def _digest(buckets: list[int]) -> str:
    return hashlib.sha256(json.dumps(buckets).encode()).hexdigest()


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raises ZooError if something else than `plan` has been cached in a folder, or is there."""
    path = folder / PLAN
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ZooError(f'{folder} is neither empty nor a cache: give another --output')
        return
    theirs = json.loads(path.read_text())
    if theirs != plan:
        mine, told = ({**p['settings'], 'samples': p['samples'], 'images': p['buckets'][:8]} for p in (plan, theirs))
        key = next(key for key in mine if mine[key] != told.get(key))
        raise ZooError(
            f'{folder} is a cache with {key} {told.get(key)}, not {mine[key]}: give another --output or delete it'
        )


def _replace(target: Path, write: Any) -> None:
    """Writes a file whole or not at all."""
    staged = target.with_name(f'.{target.name}.tmp-{os.getpid()}')
    try:
        write(staged)
        os.replace(staged, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise RunError(f'cannot write {target}: {error}; what is finished stays, run the command again') from error


def _file(folder: Path, number: int) -> Path:
    return folder / f'{number:05d}.safetensors'


def _encode(
    args: argparse.Namespace,
    framing: Any,
    source: Any,
    buckets: list[int],
    shards: list[list[int]],
    waiting: list[int],
    plan: dict[str, Any],
) -> None:
    from safetensors.torch import save_file

    from zoo.tasks._denoising import Frame, load_pipeline

    try:
        device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as error:
        raise ZooError(f'--device {args.device}: take cuda, cuda:1 or cpu') from error
    dtype = _DTYPES[args.dtype or ('float16' if device.type == 'cuda' else 'float32')]
    frame = Frame(load_pipeline(args.pipeline, dtype))
    if frame.vae is None or frame.classes is not None:
        raise ZooError(f'{args.pipeline} has no VAE and text encoder: there is nothing to cache')
    frame.to(device)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f'cannot write {args.output}: {error}') from error
    _replace(args.output / PLAN, lambda staged: staged.write_text(json.dumps(plan, indent=1) + '\n'))
    empty = {k: v[0].to('cpu', torch.float16).contiguous() for k, v in frame.encode_nothing().items()}
    _replace(args.output / 'empty.safetensors', lambda staged: save_file(empty, staged))
    _check_room(args.output, frame, framing, empty, sum(len(shards[number]) for number in waiting))
    skipped: list[tuple[str, str]] = []
    with _progress(sum(len(shards[number]) for number in waiting)) as advance:
        for number in waiting:
            tensors, names, bad = encode_shard(frame, framing, source, buckets, shards[number], args, advance)
            skipped += bad
            told = {'names': json.dumps(names[0]), 'captions': json.dumps(names[1]), 'bad': json.dumps(bad)}
            _replace(_file(args.output, number), lambda staged, t=tensors, m=told: save_file(t, staged, metadata=m))
    for name, error in skipped[:5]:
        print(f'left out: {name} ({error})')
    index = describe(args.output, frame, empty, plan['settings'], len(shards))
    _replace(args.output / 'index.json', lambda staged: staged.write_text(json.dumps(index, indent=1) + '\n'))
    print(f'{index["samples"]} samples cached, {len(index["left_out"])} unreadable ones left out')


def encode_shard(
    frame: Frame,
    framing: Any,
    source: Any,
    buckets: list[int],
    indices: list[int],
    args: argparse.Namespace,
    advance: Any,
) -> tuple[dict[str, Tensor], tuple[list[str], list[str]], list[tuple[str, str]]]:
    """Tensors of a shard, names and captions of its samples, and what could not be read."""
    from torch.utils.data import DataLoader

    from zoo.data.base import loader_options
    from zoo.data.captions import FramedImages, collate_captions

    dataset = FramedImages(source, framing, buckets)
    keys = [[(0, i) for i in indices[at : at + args.batch_size]] for at in range(0, len(indices), args.batch_size)]
    workers = loader_options(min(args.num_workers, len(keys)) if len(keys) > 1 else 0)
    parts: list[dict[str, Tensor]] = []
    names: tuple[list[str], list[str]] = ([], [])
    bad: list[tuple[str, str]] = []
    for batch in DataLoader(dataset, batch_sampler=keys, collate_fn=collate_captions, **workers):
        bad += batch['failures']
        if batch['name']:
            mean, std = frame.encode_images(batch['image'].to(frame.device))
            found = {'mean': mean, 'std': std, **frame.encode_texts(batch['caption'])}
            parts.append({k: v.to('cpu', torch.float16) for k, v in found.items()} | {'sizes': batch['sizes']})
            names[0].extend(batch['name'])
            names[1].extend(batch['caption'])
        advance(len(batch['name']) + len(batch['failures']))
    if not parts:  # a shard of unreadable samples: nothing, in the right shapes
        height, width = framing.buckets[buckets[indices[0]]]
        nothing = torch.zeros(1, 3, height, width, device=frame.device)
        mean, std = frame.encode_images(nothing)
        found = {'mean': mean, 'std': std, **frame.encode_texts([''])}
        parts = [{k: v[:0].to('cpu', torch.float16) for k, v in found.items()}]
        parts[0]['sizes'] = torch.zeros(0, 6, dtype=torch.long)
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}, names, bad


def describe(folder: Path, frame: Frame, empty: dict[str, Tensor], settings: dict[str, str], shards: int) -> dict:
    """The index of a finished cache, from its files alone: some may have been written by an earlier run."""
    from safetensors import safe_open

    entries, bad = [], []
    for number in range(shards):
        with safe_open(_file(folder, number), 'pt') as file:
            count, _, height, width = file.get_slice('mean').get_shape()
            bad += json.loads(file.metadata()['bad'])
        name = _file(folder, number).name
        entries.append({'file': name, 'samples': count, 'height': height, 'width': width})
    pooled = empty.get('pooled_embeds')
    return {
        'pipeline': settings['pipeline'],
        **frame.encoding(),
        'pooled_width': None if pooled is None else pooled.shape[-1],
        'settings': settings,
        'samples': sum(entry['samples'] for entry in entries),
        'left_out': bad,
        'shards': entries,
    }


def _check_room(folder: Path, frame: Frame, framing: Any, empty: dict[str, Tensor], samples: int) -> None:
    """Says how large the cache gets; raises ZooError where the disk has no room for it."""
    factor = 2 ** (len(frame.vae.config.block_out_channels) - 1)
    latents = 2 * frame.vae.config.latent_channels * (framing.size // factor) ** 2
    needed = samples * 2 * (latents + sum(t.numel() for t in empty.values()))
    free = shutil.disk_usage(folder).free
    print(f'{needed / 1e9:.2f} GB will be written to {folder}/')
    if needed > free:
        raise ZooError(f'the cache takes {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free')


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn('cache-latents'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task('', total=total)
        yield lambda count: bar.advance(task, count)
