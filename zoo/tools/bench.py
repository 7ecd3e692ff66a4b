"""`zoo bench models|kernels|vlm|unet|detect`: times beside those of the models and kernels one would use instead.

Everything that is compared runs in one process. Without arguments `zoo bench models` measures the smallest ViG beside
DeiT-tiny: inference and training at 224 and 1024 pixels (on a CPU training at 224 only).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from zoo.errors import ZooError
from zoo.tools._bench_detect import add_arguments as add_detect_arguments
from zoo.tools._bench_detect import bench_detect
from zoo.tools._bench_kernels import add_arguments as add_kernel_arguments
from zoo.tools._bench_kernels import bench_kernels
from zoo.tools._bench_launch import bench_launch
from zoo.tools._bench_models import NATIVE, bench_models
from zoo.tools._bench_unet import add_arguments as add_unet_arguments
from zoo.tools._bench_unet import bench_unet
from zoo.tools._bench_vlm import add_arguments as add_vlm_arguments
from zoo.tools._bench_vlm import bench_vlm
from zoo.tools._timing import write_json

_VERBS = {
    'models': bench_models,
    'kernels': bench_kernels,
    'vlm': bench_vlm,
    'unet': bench_unet,
    'detect': bench_detect,
}
_YES_NO = {'nargs': '?', 'const': 'yes', 'choices': ('no', 'yes', 'both')}
_WHICH = {'nargs': '?', 'const': '*', 'metavar': 'A,B'}


def _size(text: str) -> int | str:
    return text if text == NATIVE else int(text)


def _add_model_arguments(models: argparse.ArgumentParser) -> None:
    models.add_argument('--models', metavar='A,B', help='registered names; default: vig_tiny_patch16_224')
    models.add_argument(
        '--peers',
        nargs='?',
        const='auto',
        metavar='A,B',
        help='timm models to compare with: names, auto (those of the same size) or none; '
        'default: auto, none with --models',
    )
    models.add_argument('--relative-to', metavar='NAME', help="columns with every model's speed and memory over NAME's")
    models.add_argument(
        '--img-size',
        type=_size,
        nargs='+',
        metavar='N',
        help=f'image sides, or {NATIVE}: the size that each model was made for; default: 224 and 1024',
    )
    models.add_argument('--batch-size', type=int, nargs='+', metavar='N', help='one, or one per size')
    models.add_argument('--train', **_YES_NO, help='training steps; default: no with --img-size, else both')
    models.add_argument('--dtype', choices=('fp32', 'bf16', 'fp16'), help='autocast type; default: fp32 on the CPU, '
                        'else bf16')  # fmt: skip
    models.add_argument('--pure', action='store_true', help='inference with weights in --dtype instead of autocast')
    models.add_argument('--fuse', **_WHICH, help='fold norms and branches before inference: of all models or of A,B')
    models.add_argument('--compile', default='no', **_YES_NO, help='torch.compile the models')
    models.add_argument('--runtime', default='torch', metavar='A,B', help='torch, onnxruntime or both (inference on '
                        'the CPU, what zoo export writes); default: torch')  # fmt: skip
    models.add_argument('--compile-mode', choices=('default', 'reduce-overhead', 'max-autotune-no-cudagraphs'))
    models.add_argument('--channels-last', **_WHICH, help='channels-last images and weights: all models or A,B '
                        '(patterns such as "ravlt*")')  # fmt: skip
    models.add_argument('--model-seconds', type=float, default=180, metavar='S', help='longest first call of a model')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='zoo bench', description=__doc__.split('\n', 1)[1].strip())
    verbs = parser.add_subparsers(dest='what', required=True, metavar='models|kernels|vlm|unet|detect')
    models = verbs.add_parser('models', help='whole models', description='Whole models beside those of timm.')
    _add_model_arguments(models)
    kernels = verbs.add_parser('kernels', help='the ops', description='Kernels beside what one would use instead.')
    add_kernel_arguments(kernels)
    vlm = verbs.add_parser('vlm', help='generation at growing lengths', description='A HoVLE-sized decoder and its '
                           'linear and hybrid students with random weights, through generate.')  # fmt: skip
    add_vlm_arguments(vlm)
    unet = verbs.add_parser('unet', help='steps of diffusion UNets', description='A step of the SD 1.5 and SDXL UNets '
                            'with random weights: softmax against linear self-attention at growing sizes.')  # fmt: skip
    add_unet_arguments(unet)
    detect = verbs.add_parser('detect', help='training steps of detectors', description='Training steps of one '
                              'detector on several backbones at the sizes of detection.')  # fmt: skip
    add_detect_arguments(detect)
    for verb in (models, kernels, vlm, unet, detect):
        verb.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        verb.add_argument('--threads', type=int, help="torch's CPU threads")
        verb.add_argument('--warmup', type=int, help='uncounted calls after the first; default: 2, on CUDA 10')
        verb.add_argument('--repeats', type=int, help='counted calls; default: 10, on CUDA 50')
        verb.add_argument('--output', type=Path, metavar='JSON', help='write everything here, as it is measured')
    return parser


def cli_bench(argv: list[str]) -> int:
    """Measure, print a table and write JSON."""
    args = _parser().parse_args(argv)
    gpu = args.device.startswith('cuda')
    if gpu and not torch.cuda.is_available():
        raise ZooError('--device cuda: torch sees no CUDA device here (zoo doctor says what it sees)')
    args.dtype = args.dtype or (('fp16' if args.what == 'unet' else 'bf16') if gpu else 'fp32')
    args.warmup = args.warmup if args.warmup is not None else (10 if gpu else 2)
    args.repeats = args.repeats or (50 if gpu else 10)
    threads, tuned = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(args.threads or threads)
    # Where sizes do not change, the fastest convolution for everybody; elsewhere every new size would be searched anew.
    changing = args.what == 'detect' or getattr(args, 'end_to_end', None)
    torch.backends.cudnn.benchmark = (gpu and not changing) or tuned
    try:
        run = bench_launch if getattr(args, 'launch', False) else _VERBS[args.what]
        result = run(args)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = tuned
    if args.output:
        write_json(args.output, result)
        print(f'written: {args.output}')
    return 0
