"""`zoo generate-image MODEL --prompt TEXT`: text to image with linear attention, also far beyond the trained size."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import torch

from zoo.errors import ZooError


def _parser() -> argparse.ArgumentParser:
    about = (
        'Text to image with any diffusers pipeline whose UNet or PixArt transformer can be linear. Beyond the trained '
        'size a small image is made first and refined at twice the size again and again.'
    )
    parser = argparse.ArgumentParser(prog='zoo generate-image', description=about)
    parser.add_argument('model', help='folder or hub name of a diffusers pipeline')
    parser.add_argument('--prompt', required=True)
    parser.add_argument('--negative-prompt', metavar='TEXT')
    what = (
        'folder, file, hub name, none for softmax, auto for what the pipeline has or else the published ones that fit'
    )
    parser.add_argument('--linfusion', default='auto', metavar='WEIGHTS', help=f'{what}; default: auto')
    parser.add_argument('--size', metavar='WxH', help='default: the one that the model was trained at')
    parser.add_argument('--steps', type=int, default=50, metavar='N', help='of the schedule; default: 50')
    parser.add_argument('--guidance', type=float, default=7.5, metavar='X', help='default: 7.5; 1 for none')
    parser.add_argument('--strengths', type=float, nargs='+', metavar='S', help='part of the schedule that each level '
                        'after the first runs; default: 0.4 0.3 0.2 0.1, the last one again')  # fmt: skip
    parser.add_argument('--native', type=int, metavar='N', help="side of the first level; default: the model's own")
    parser.add_argument('--images', type=int, default=1, metavar='N', help='of this prompt; default: 1')
    parser.add_argument('--seed', type=int, default=0, metavar='N')
    parser.add_argument('--output', type=Path, default=Path('image.png'), metavar='FILE', help='PNG, JPEG or WebP '
                        'by its name; default: image.png')  # fmt: skip
    parser.add_argument('--device', help='cuda where there is one, otherwise cpu')
    parser.add_argument('--dtype', choices=('fp16', 'bf16', 'fp32'), help='default: fp16, on CPUs fp32')
    parser.add_argument('--capture', action='store_true', help='replay steps as CUDA graphs: shorter where a GPU waits '
                        'for Python, at small sizes')  # fmt: skip
    less = parser.add_argument_group('less memory')
    less.add_argument('--chunk-guidance', action='store_true', help='with and without prompt one after the other')
    less.add_argument('--chunk-feed-forward', type=int, default=1, metavar='N', help='tokens in N pieces; default: 1')
    less.add_argument('--tile', type=int, default=1024, metavar='N', help='side of the tiles that the VAE takes images '
                      'beyond it in; default: 1024, 0: never')  # fmt: skip
    less.add_argument('--offload', default='none', choices=('none', 'model', 'sequential'), help='keep weights in main '
                      'memory: model by model or layer by layer')  # fmt: skip
    less.add_argument('--memory-gb', type=float, metavar='X', help='stay below; default: what the device has')
    less.add_argument('--dry-run', action='store_true', help='show levels and the estimate, generate nothing')
    return parser


FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP'}


def load_pipeline(name: str, linfusion: str, dtype: torch.dtype, fuse: bool = True):
    """A pipeline with linear attention.

    Args:
        name: folder or hub name.
        linfusion: `auto`, `none`, or weights as `LinFusion.attach` takes them.
        dtype: of its weights.
        fuse: whether to fold the weights of linear layers. Those of cross-attention stay apart: copies as diffusers
            fuses them would take 0.7 GB more of SDXL, and ignore adapters that are loaded afterwards.

    Raises:
        ZooError: if there is none, or the weights do not fit.
    """
    from diffusers import DiffusionPipeline

    import zoo.diffusion as diffusion
    from zoo.diffusion.highres import size_unit

    try:
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except Exception as error:  # diffusers and the hub raise a dozen types; the user needs the name and the cause
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ZooError(f'{name} does not load as a diffusers pipeline: {cause[0]}') from error
    size_unit(pipe)
    linear = diffusion.LinFusion.of(pipe)
    if linfusion == 'none' and linear is not None:
        raise ZooError(f'--linfusion none: {name} is linear and holds no softmax layers; leave the option out')
    if not (linfusion == 'none' or (linfusion == 'auto' and linear is not None)):
        try:
            linear = diffusion.LinFusion.attach(pipe, linfusion, keep_teacher=False)
        except (OSError, ValueError) as error:
            raise ZooError(f'--linfusion {linfusion}: {error} (none: generate with softmax attention)') from error
    if linear is not None and fuse:
        linear.fuse()
    return pipe


def parse_size(text: str, option: str = '--size') -> tuple[int, int]:
    """Width and height of `2048x1024`.

    Args:
        text: what was typed.
        option: for which option.
    """
    match = re.fullmatch(r'(\d+)[xX](\d+)', text)
    if not match:
        raise ZooError(f'{option} {text}: write it as 2048x1024, width first')
    return int(match[1]), int(match[2])


def write_images(images: torch.Tensor, target: Path) -> list[Path]:
    """Write image files, in the format that the name says.

    Args:
        images: (B, 3, H, W) in [0, 1].
        target: name of the file; those of several images get numbers.
    """
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    # a PNG of 16384 x 8192 pixels takes 20 seconds at level 1, minutes at more
    how = {'compress_level': 1} if target.suffix.lower() == '.png' else {'quality': 95}
    for i, image in enumerate(images):
        path = target if len(images) == 1 else target.with_stem(f'{target.stem}_{i}')
        pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        partial = path.with_name(f'.{path.name}.{os.getpid()}')
        Image.fromarray(pixels).save(partial, format=FORMATS[path.suffix.lower()], **how)
        partial.replace(path)
        paths.append(path)
    return paths


def _check(args: argparse.Namespace, device: str) -> None:
    """Refuse what cannot work, naming the option."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ZooError(f'--device {device}: take cuda, cuda:1 or cpu') from error
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ZooError('--device cuda: torch sees no CUDA device here (zoo doctor says what it sees)')
    if min(args.steps, args.images, args.chunk_feed_forward) < 1 or args.tile < 0:
        raise ZooError('--steps, --images and --chunk-feed-forward must be at least 1, --tile at least 0')
    if args.native is not None and args.native < 1:
        raise ZooError(f'--native {args.native} must be a number of pixels')
    if args.offload != 'none' and kind == 'cpu':
        raise ZooError(f'--offload {args.offload} keeps weights in main memory, where a CPU has them already')
    if args.capture and kind == 'cpu':
        raise ZooError('--capture records CUDA graphs, which a CPU has none of')
    if args.capture and args.offload == 'sequential':
        raise ZooError('--capture needs the weights on the device: use --offload model, or leave one of them out')
    if args.size is not None:
        parse_size(args.size)
    if args.output.is_dir():
        raise ZooError(f'--output {args.output} is a folder: name a file')
    if args.output.suffix.lower() not in FORMATS:
        raise ZooError(f'--output {args.output}: name it with one of {", ".join(FORMATS)}')
    above = next(folder for folder in args.output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ZooError(f'--output {args.output}: {above} is no folder')


def cli_generate_image(argv: list[str]) -> int:
    """Generate images of a prompt."""
    args = _parser().parse_args(argv)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    _check(args, device)  # before any download
    from zoo.diffusion.highres import STRENGTHS, Savings, check_memory, denoiser, generate, ladder, native_side
    from zoo.diffusion.layers import fast_layers

    dtypes = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
    dtype = dtypes[args.dtype or ('fp16' if device.startswith('cuda') else 'fp32')]
    pipe = load_pipeline(args.model, args.linfusion, dtype, fuse=args.offload != 'sequential')  # to be moved, too
    if args.tile and args.tile % (4 * pipe.vae_scale_factor):
        raise ZooError(f'--tile must be a multiple of {4 * pipe.vae_scale_factor}, got {args.tile}')
    width, height = parse_size(args.size) if args.size else 2 * (args.native or native_side(pipe),)
    stages = ladder(pipe, width, height, args.steps, tuple(args.strengths or STRENGTHS), args.native)
    how = Savings(args.chunk_guidance, args.chunk_feed_forward, args.tile, args.offload)
    limit = None if args.memory_gb is None else int(args.memory_gb * 1e9)
    need = check_memory(pipe, stages, how, device, args.guidance > 1, args.images, limit)
    print('levels: ' + ', '.join(f'{s} ({s.calls} steps)' for s in stages))
    parts = '' if need is None else ', '.join(f'{k} {v / 1e9:.2f} GB' for k, v in need.items())
    print(f'memory: about {parts}' if parts else f'memory: no estimate for {type(denoiser(pipe)).__name__}')
    if args.dry_run:
        return 0
    fast_layers(pipe)
    if how.offload == 'none':
        pipe.to(device)
    else:
        offload = {'model': pipe.enable_model_cpu_offload, 'sequential': pipe.enable_sequential_cpu_offload}
        offload[how.offload](device=device)
    start = time.perf_counter()
    inputs = dict(prompt=args.prompt, num_images_per_prompt=args.images)
    inputs |= {} if args.negative_prompt is None else {'negative_prompt': args.negative_prompt}
    images, report = generate(pipe, stages, how, args.seed, guidance=args.guidance, capture=args.capture, **inputs)
    done = time.perf_counter()
    for row in report:
        print('  ' + ', '.join(f'{k} {v}' for k, v in row.items()))
    paths = write_images(images, args.output)
    written = time.perf_counter() - done
    print(f'generated in {done - start:.1f} s, written in {written:.1f} s: {", ".join(map(str, paths))}')
    return 0
