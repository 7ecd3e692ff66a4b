"""`zoo doctor`: what a bug report needs, in one paste."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys

import torch

import zoo
import zoo.kernels
from zoo.kernels._dispatch import explain

_PACKAGES = (
    'torchvision timm lightning jsonargparse transformers open_clip_torch torchmetrics scikit-learn safetensors '
    'tensorboard rich matplotlib huggingface_hub numpy pillow diffusers accelerate onnx onnxscript onnxruntime '
    'datasets webdataset peft sentencepiece pycocotools flash-linear-attention'
).split()
_VARIABLES = ('CUDA_', 'TRITON_', 'TORCH_', 'TORCHINDUCTOR_', 'PYTORCH_', 'OMP_', 'MKL_')
_HUB_VARIABLES = ('HF_HUB_OFFLINE', 'HF_HUB_CACHE')


def version(package: str) -> str | None:
    """Version of an installed distribution, or None.

    Args:
        package: distribution name.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the NVIDIA driver, where nvidia-smi is at hand."""
    if shutil.which('nvidia-smi') is None:
        return None
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else None


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as lines:
            for line in lines:
                if line.lower().startswith('model name'):
                    return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[dict]:
    """Name, memory and compute capability of each visible GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({'name': p.name, 'memory_gib': round(p.total_memory / 2**30, 1), 'capability': [p.major, p.minor]})
    return found


def devices() -> list[str]:
    """The kinds of device that tensors can live on here."""
    found = ['cpu']
    if torch.cuda.is_available():
        found.append('cuda')
    if torch.backends.mps.is_available():
        found.append('mps')
    return found


def op_families() -> list[str]:
    """The op families of `zoo.kernels`: one public file each."""
    return sorted(m.name for m in pkgutil.iter_modules(zoo.kernels.__path__) if not m.name.startswith('_'))


def kernel_path(op: str, device: str) -> str:
    """The implementation an op family takes on a device and why; a broken one is reported, not raised.

    Args:
        op: name from `op_families()`.
        device: name from `devices()`.
    """
    try:
        return explain(op, device)
    except Exception as error:  # this is the program that has to survive a broken installation
        return f'BROKEN: {type(error).__name__}: {error}'


def report() -> dict:
    """Everything that `zoo doctor` prints, as plain data."""
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES) or k in _HUB_VARIABLES}
    return {
        'linear-zoo': zoo.__version__,
        'python': platform.python_version(),
        'executable': sys.executable,
        'os': platform.platform(),
        'cpu': f'{cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads',
        'torch': torch.__version__,
        'triton': version('triton') or version('triton-windows') or version('pytorch-triton'),
        'cuda': torch.version.cuda,
        'hip': torch.version.hip,
        'cudnn': torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        'driver': driver(),
        'gpus': gpus(),
        'packages': {p: version(p) for p in _PACKAGES},
        'environment': variables,
        'kernels': {f: {d: kernel_path(f, d) for d in devices()} for f in op_families()},
    }


def cli_doctor(argv: list[str]) -> int:
    """Print versions, hardware and the kernel path of every op."""
    parser = argparse.ArgumentParser(prog='zoo doctor', description=__doc__)
    parser.add_argument('--json', action='store_true', help='print JSON instead of text')
    args = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if args.json else '\n'.join(_lines(found)))
    return 0


def _lines(found: dict) -> list[str]:
    plain = ('linear-zoo', 'python', 'executable', 'os', 'cpu', 'torch', 'triton', 'cuda', 'cudnn', 'driver')
    lines = [f'{key:<12} {"not found" if found[key] is None else found[key]}' for key in plain]
    if found['hip']:
        lines.append(f'{"hip":<12} {found["hip"]}')
    for index, gpu in enumerate(found['gpus']):
        capability = '.'.join(map(str, gpu['capability']))
        lines.append(f'{f"gpu {index}":<12} {gpu["name"]}, {gpu["memory_gib"]} GiB, compute capability {capability}')
    if not found['gpus']:
        lines.append(f'{"gpu":<12} none visible to torch')
    lines += ['', 'packages']
    lines += [f'  {name:<24} {installed or "-"}' for name, installed in found['packages'].items()]
    lines += ['', 'environment'] + [f'  {k}={v}' for k, v in found['environment'].items()]
    lines += ['', 'kernel path of each op on each device']
    for family, paths in found['kernels'].items():
        lines += [f'  {family:<24} {device:<5} {why}' for device, why in paths.items()]
    return lines
