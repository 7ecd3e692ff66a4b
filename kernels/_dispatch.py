"""Which implementation of an op runs: the only place in the package that looks at devices.

Every op has three implementations under one public function: `naive` (a loop in fp32 or fp64, the oracle), `torch`
(matrix products, any device) and `triton` (NVIDIA and AMD GPUs). `auto` takes Triton for GPU tensors where it can be
imported and supports the arguments, the torch path otherwise, and says so once when a GPU tensor takes the slow road.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from contextlib import ContextDecorator

import torch

BACKENDS = ('auto', 'naive', 'torch', 'triton')
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.float64, *TRITON_DTYPES)
DTYPE_NAMES = 'float64, float32, float16 or bfloat16'

_forced = 'auto'
_told: set[str] = set()


class kernel_backend(ContextDecorator):
    """Force one implementation of the kernels, as a call or as a context manager.

    Args:
        name: `auto`, `naive`, `torch` or `triton`.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: str):
        global _forced
        if name not in BACKENDS:
            raise ValueError(f'kernel_backend({name!r}): expected one of {", ".join(BACKENDS)}')
        self._previous = _forced
        _forced = name

    def __enter__(self) -> kernel_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _forced
        _forced = self._previous


@functools.cache
def triton_module(family: str):
    """The module `zoo.kernels._triton.<family>`, or None where Triton is not installed."""
    if importlib.util.find_spec('triton') is None:
        return None
    return importlib.import_module(f'zoo.kernels._triton.{family}')


def _interpreting() -> bool:
    """Whether Triton's interpreter is on (tests only): kernels then run on CPU tensors."""
    if importlib.util.find_spec('triton') is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _too_old(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 5)


def _why_not_triton(family: str, tensors: tuple[torch.Tensor, ...], unsupported: str | None) -> str | None:
    """The reason Triton cannot take these tensors, or None when it can."""
    if not tensors[0].is_cuda and not _interpreting():
        return f'{tensors[0].device.type} tensors'
    if triton_module(family) is None:
        return 'triton is not installed (pip install triton)'
    if tensors[0].is_cuda and _too_old(tensors[0].device):
        return 'compute capability below 7.5'
    return unsupported


def exporting() -> bool:
    """Whether torch.export or an ONNX export traces the code, which then takes plain torch operations.

    `torch.compiler.is_exporting()` itself is true in every program that torch 2.11 compiles: its Dynamo folds it.
    """
    return torch.compiler._is_exporting_flag


def forced() -> str:
    """The backend set by `kernel_backend`, `auto` by default."""
    return _forced


def may_use_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels have to be looked at for this tensor at all (saves their import on a CPU)."""
    return _forced in ('auto', 'triton') and (tensor.is_cuda or _interpreting())


def select(family: str, *tensors: torch.Tensor, unsupported: str | None = None) -> str:
    """Name the implementation that an op of `family` takes for these tensors.

    Args:
        family: file name of the op under `kernels/`, such as `gla`.
        tensors: the op's tensor arguments, all on one device.
        unsupported: why the Triton kernels of this op cannot take these arguments, if they cannot.

    Raises:
        RuntimeError: if `kernel_backend('triton')` is forced and Triton cannot run.
    """
    if _forced in ('naive', 'torch'):
        return _forced
    reason = _why_not_triton(family, tensors, unsupported)
    if _forced == 'triton':
        if reason:
            raise RuntimeError(f"kernel_backend('triton') is set but {family} cannot use it: {reason}")
        return 'triton'
    if reason is None and tensors[0].is_cuda:
        return 'triton'
    if tensors[0].is_cuda and f'{family}:{reason}' not in _told:
        _told.add(f'{family}:{reason}')
        warnings.warn(f'zoo.kernels.{family}: using the slower torch path on the GPU: {reason}', stacklevel=3)
    return 'torch'


@functools.cache
def _remembered(family: str, device: torch.device, dtype: torch.dtype, forced: str) -> bool:
    unsupported = None if dtype in TRITON_DTYPES else f'dtype {str(dtype).removeprefix("torch.")}'
    return select(family, torch.empty(0, device=device), unsupported=unsupported) == 'triton'


@torch.compiler.assume_constant_result
def _ready(family: str, device: torch.device, dtype: torch.dtype, forced: str) -> bool:
    return _remembered(family, device, dtype, forced)  # the compiler looks through a cache, but not into this function


def takes_triton(family: str, x: torch.Tensor) -> bool:
    """Whether an op whose torch path is plain PyTorch runs its Triton kernels for this tensor.

    Such an op decides before the compiler or autograd see it, so that its torch path is theirs to trace; the answer
    is remembered per device, dtype and forced backend, and is a constant of a compiled program. Exports never do.

    Raises:
        RuntimeError: if `kernel_backend('triton')` is forced and Triton cannot run.
    """
    return not exporting() and _ready(family, x.device, x.dtype, _forced)


@functools.cache
def _chosen(family: str, torch_path, device: torch.device, facts: tuple, forced: str):
    first = torch.empty(0, device=device)
    module = triton_module(family) if may_use_triton(first) else None
    unsupported = module.unsupported(*facts) if module is not None else None
    return module if select(family, first, unsupported=unsupported) == 'triton' else torch_path


def implementation(family: str, torch_path, x: torch.Tensor, *facts):
    """The module of an op's host code that runs: its torch path or that of its Triton kernels, remembered.

    Args:
        family: file name of the op under `kernels/`.
        torch_path: module of the same functions in plain PyTorch.
        x: one of the op's tensors.
        facts: dtypes and sizes by which the Triton module's `unsupported(*facts)` decides.

    Raises:
        RuntimeError: if `kernel_backend('triton')` is forced and Triton cannot run.
    """
    return _chosen(family, torch_path, x.device, facts, _forced)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes on this tensor's device, or None where it is off."""
    if not torch._C._is_any_autocast_enabled():  # a fifth of the time
        return None
    kind = x.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def explain(family: str, device: str) -> str:
    """One line for bug reports: the path that `family` takes on `device` and why."""
    if _forced != 'auto':
        return f"{_forced}: forced by kernel_backend('{_forced}')"
    probe = torch.empty(0, device=device)
    reason = _why_not_triton(family, (probe,), None)
    if reason is None and not probe.is_cuda:
        reason = f"{device} tensors; Triton's interpreter runs only when forced"
    return f'torch: {reason}' if reason else 'triton: GPU tensors and triton is installed'
