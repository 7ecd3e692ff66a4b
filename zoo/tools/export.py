"""`zoo export NAME`: ONNX, torch.export or safetensors, written only if what was written computes the same.

The file is made beside its destination, loaded back (onnxruntime, torch.export.load, a fresh model) and compared with
eager on the example input and, for dynamic axes, on other batch sizes and other, non-square image sizes. Only then does
it get its name.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zoo.errors import ZooError
from zoo.tools._load import build, image_size

FORMATS = {'onnx': '.onnx', 'torch-export': '.pt2', 'safetensors': '.safetensors'}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """The input of an export.

    Args:
        batch: images in the example input.
        channels: input channels.
        height: of the example input.
        width: of the example input.
        dynamic_batch: whether other batch sizes must work.
        dynamic_size: whether other heights and widths must work.
    """

    batch: int
    channels: int
    height: int
    width: int
    dynamic_batch: bool = False
    dynamic_size: bool = False

    def example(self) -> torch.Tensor:
        """The input that the export is traced with."""
        return _noise(self.batch, self.channels, self.height, self.width)

    def probes(self) -> list[torch.Tensor]:
        """Inputs on which the result must agree with eager: every axis that may change, changed."""
        sizes = [(self.height, self.width)]
        if self.dynamic_size:
            sizes += [(self.height + 37, self.width - 21), (max(65, self.height // 2 + 5), self.width + 16)]
        batches = [self.batch] + ([1, self.batch + 1] if self.dynamic_batch else [])
        first, rest = sizes[0], sizes[1:]
        shapes = [(b, *first) for b in batches] + [(batches[i % len(batches)], *s) for i, s in enumerate(rest, 1)]
        return [_noise(b, self.channels, h, w) for b, h, w in shapes]

    def dynamic_shapes(self) -> dict | None:
        """What torch.export is told of the axes."""
        axes = {0: torch.export.Dim.DYNAMIC} if self.dynamic_batch else {}
        if self.dynamic_size:
            axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        return {'x': axes} if axes else None


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class _Positional(nn.Module):
    """Gives any model the input name `x`, so that names in the exported file do not depend on the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite for another shape or NaN.

    Args:
        actual: output of the exported file.
        expected: output of the eager model.
    """
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float('inf')
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _trace(model: nn.Module, shape: Shape) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            wrapped = _Positional(model).eval()
            return torch.export.export(wrapped, (shape.example(),), dynamic_shapes=shape.dynamic_shapes())
    except torch._dynamo.exc.UserError as error:
        raise ZooError(f'torch.export refused these shapes: {_first_lines(error)}') from error


def _first_lines(error: Exception, lines: int = 6) -> str:
    return '\n'.join(str(error).strip().splitlines()[:lines])


def _write_torch_export(model: nn.Module, path: Path, shape: Shape, opset: int | None):
    torch.export.save(_trace(model, shape), path)
    program = torch.export.load(path).module()
    return lambda x: program(x)


def onnx_session(path: Path, threads: int = 0):
    """A function of the input array that runs a file of one input in ONNX Runtime on the CPU.

    Args:
        path: the ONNX file.
        threads: how many; 0 for ONNX Runtime's own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every node that it does not fold
    options.intra_op_num_threads = threads
    # A pool that waits by spinning slows down whatever runs beside it, such as the other models of a benchmark.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _write_onnx(model: nn.Module, path: Path, shape: Shape, opset: int | None):
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ZooError(f'{error.name} is missing. Type: pip install "linear-zoo[export]"') from error
    # Unoptimised: torch's graph rewriting takes time with the square of the nodes, and runtimes do it anyway.
    program = torch.onnx.export(
        _trace(model, shape), (), dynamo=True, optimize=False, opset_version=opset, verbose=False
    )
    program.save(str(path), external_data=False)
    run = onnx_session(path)
    return lambda x: torch.from_numpy(run(x.numpy())[0])


def _write_safetensors(model: nn.Module, path: Path, shape: Shape, opset: int | None):
    import copy

    from safetensors.torch import load_file, save_file

    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, str(path), metadata={'format': 'pt', 'architecture': model.pretrained_cfg['architecture']})
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()  # so that agreement can only come from the file
    fresh.load_state_dict(load_file(str(path)))
    return lambda x: fresh(x)


_WRITERS = {'onnx': _write_onnx, 'torch-export': _write_torch_export, 'safetensors': _write_safetensors}


def export(
    model: nn.Module,
    path: Path,
    format: str,
    shape: Shape,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> dict:
    """Write a model to a file, or leave nothing behind.

    Args:
        model: on the CPU, in fp32.
        path: destination; replaced only when everything agreed.
        format: one of `FORMATS`.
        shape: example input and dynamic axes.
        opset: ONNX operator set; torch's default unless given.
        tolerance: largest relative error on any probe.

    Returns:
        Path, bytes, largest relative error and the shapes that were compared.

    Raises:
        ZooError: if the format cannot express the model or the numbers differ.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.zoo-export-') as scratch:
        made = Path(scratch) / f'model{FORMATS[format]}'
        run = _WRITERS[format](model, made, shape, opset)
        worst, compared = 0.0, []
        for x in shape.probes():
            error = _compare(model, run, x)
            compared.append(list(x.shape))
            worst = max(worst, error)
            if not error <= tolerance:
                raise ZooError(
                    f'not written: the {format} file differs from eager by {error:.1e} relative (limit '
                    f'{tolerance:.0e}) on an input of shape {"x".join(map(str, x.shape))}'
                )
        with open(made, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(made, path)
    return {'file': str(path), 'bytes': path.stat().st_size, 'max_relative_error': worst, 'compared': compared}


@torch.no_grad()
def _compare(model: nn.Module, run, x: torch.Tensor) -> float:
    """Relative error of one probe; a file that cannot run it is as wrong as can be."""
    shape = 'x'.join(map(str, x.shape))
    try:
        expected = model(x)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ZooError(f'not written: the model itself takes no input of {shape}: {_first_lines(error)}') from error
    try:
        return relative_error(run(x), expected)
    except Exception as error:  # onnxruntime and torch.export raise many kinds
        raise ZooError(f'not written: the file fails on an input of {shape}: {_first_lines(error)}') from error


def fused(name: str, model: nn.Module) -> nn.Module:
    """The model with its BatchNorms folded, in place.

    Raises:
        ZooError: if there is nothing to fold.
    """
    if not hasattr(model, 'fuse'):
        raise ZooError(f'--fuse: {name} has nothing to fold')
    return model.fuse()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='zoo export',
        description='Write a model through its plain torch path. The file is loaded back and compared with eager; it '
        f'is written only if outputs agree to {TOLERANCE:.0e} relative.',
    )
    parser.add_argument('name', help='model name, see `zoo list`; any timm model works too')
    parser.add_argument('--format', choices=list(FORMATS), default='onnx')
    parser.add_argument('--output', type=Path, metavar='F', help='default: NAME with the suffix of the format')
    parser.add_argument('--checkpoint', type=Path, metavar='F', help='weights: published file or training checkpoint')
    parser.add_argument(
        '--pretrained', action='store_true', help='weights: the published ones, from the hub or its cache'
    )
    parser.add_argument(
        '--img-size', type=int, nargs='+', metavar='N', help="N or H W pixels; default: the model's own"
    )
    parser.add_argument('--batch-size', type=int, help='default: 1, or 2 with --dynamic-batch')
    parser.add_argument('--dynamic-batch', action='store_true', help='the file takes any batch size')
    parser.add_argument('--dynamic-size', action='store_true', help='the file takes any height and width')
    parser.add_argument(
        '--fuse', action='store_true', help='fold BatchNorms and other factors per channel into convolutions first'
    )
    parser.add_argument('--opset', type=int, help="ONNX operator set; default: torch's")
    parser.add_argument('--json', action='store_true', help='print JSON instead of text')
    return parser


def cli_export(argv: list[str]) -> int:
    """Export a model by name and report what was checked."""
    args = _parser().parse_args(argv)
    if args.checkpoint and args.pretrained:
        raise ZooError('--checkpoint and --pretrained both name weights: give one of them')
    size = image_size(args.img_size)
    model = build(args.name, args.checkpoint, pretrained=args.pretrained, img_size=size)
    if args.fuse:
        model = fused(args.name, model)
    channels, *own = model.pretrained_cfg['input_size']
    height, width = size or own
    batch = args.batch_size or (2 if args.dynamic_batch else 1)
    shape = Shape(batch, channels, height, width, args.dynamic_batch, args.dynamic_size)
    output = args.output or Path(args.name.replace(':', '_').replace('/', '_') + FORMATS[args.format])
    result = {'name': args.name, 'format': args.format, **export(model, output, args.format, shape, args.opset)}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    weights = args.checkpoint or ('published weights' if args.pretrained else 'random weights')
    shapes = ', '.join('x'.join(map(str, s)) for s in result['compared'])
    print(f'{args.name} ({weights}) -> {result["file"]}, {result["bytes"] / 2**20:.1f} MiB')
    print(f'  compared with eager at {shapes}: largest relative error {result["max_relative_error"]:.1e}')
    return 0
