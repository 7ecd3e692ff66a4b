"""Device functions that several kernels share: tile access, matrix products, sums of log gates over intervals."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(ptr, rows, cols, stride, row_ok, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a matrix whose last dimension is contiguous, zeros outside -> (rows, BD)."""
    ok = row_ok[:, None]
    if D != BD:
        ok = ok & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=ok, other=0.0)


@triton.jit
def store_tile(ptr, x, rows, cols, stride, row_ok, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_tile`, cast to the pointer's type."""
    ok = row_ok[:, None]
    if D != BD:
        ok = ok & (cols < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def load_gate(ptr, rows, cols, stride, row_ok, K: tl.constexpr, BK: tl.constexpr, PER_HEAD: tl.constexpr):
    """Log gates of a chunk, 0 (keep all) outside: (rows, BK), or (rows,) with one gate per head."""
    if PER_HEAD:
        return tl.load(ptr + rows * stride, mask=row_ok, other=0.0)
    else:
        return load_tile(ptr, rows, cols, stride, row_ok, K, BK)


@triton.jit
def mm(a, b, CT: tl.constexpr, PREC: tl.constexpr):
    """Product in the compute type `CT`, accumulated in fp32."""
    return tl.dot(a.to(CT), b.to(CT), input_precision=PREC)


@triton.jit
def gate_sums(member, g, MT: tl.constexpr, SPLIT: tl.constexpr):
    """Sums of log gates over sets of tokens, in units of log 2: member (R, C) is boolean, g (C, K) -> (R, K) fp32.

    One gate per head, g (C,), gives (R, 1). Per channel, a product with a 0/1 matrix lands in the layout in which it is
    used, without a scan over tokens and its barriers. It is exact up to the fp32 sum: `MT` holds g exactly, or g is
    split into two bf16 parts.
    """
    if len(g.shape) == 1:
        s = tl.sum(tl.where(member, g[None, :].to(tl.float32), 0.0), 1)[:, None]
    elif SPLIT:
        hi = g.to(tl.bfloat16)
        lo = (g - hi.to(tl.float32)).to(tl.bfloat16)
        m = member.to(tl.bfloat16)
        s = tl.dot(m, lo, acc=tl.dot(m, hi))
    elif MT == tl.float32:
        s = tl.dot(member.to(tl.float32), g.to(tl.float32), input_precision='tf32x3')
    else:
        s = tl.dot(member.to(MT), g.to(MT))
    return s * LOG2E


@triton.jit
def run_sums(member, x, PREC: tl.constexpr):
    """Sums of fp32 values over sets of tokens: member (R, C) is 0/1, x (C, K) fp32 -> (R, K) fp32."""
    if PREC == 'bf16':
        return tl.dot(member.to(tl.bfloat16), x.to(tl.bfloat16))
    else:
        return tl.dot(member.to(tl.float32), x, input_precision=PREC)


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter."""
    return bool(knobs.runtime.interpret)


@functools.cache
def compute_types(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Operand type and precision of the matrix products for inputs of `dtype`.

    fp32 inputs take three tf32 products for one (relative error about 1e-7): IEEE products have no matrix units, and
    ten times the code. fp16 operands would overflow where a weight is split into two factors around a reference point,
    so fp16 inputs take tf32 products: fp32's range at fp16's precision. The interpreter multiplies the bits of bf16 as
    integers, so there everything is fp32.
    """
    if dtype == torch.bfloat16 and not interpreting():
        return tl.bfloat16, 'tf32'
    return tl.float32, 'tf32' if dtype == torch.float16 else 'tf32x3'


def gate_types(dtype: torch.dtype, gate: torch.dtype | None) -> tuple[tl.dtype, bool]:
    """Operand type that holds the gates exactly, and whether they must be split in two for it."""
    if interpreting() or gate is None or dtype == torch.float32:
        return tl.float32, False
    if gate == torch.float32:
        return tl.bfloat16, True
    return (tl.float16 if gate == torch.float16 else tl.bfloat16), False


def alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two up to 16 that divides every stride but the last.

    Kernels take strides in this unit: they stay unspecialised (no new compilation when only B or T changes) and the
    compiler still sees that rows are aligned.
    """
    bits = 16
    for x in tensors:
        for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
            if size > 1:
                bits |= stride
    return bits & -bits


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def token_rows(x: torch.Tensor, dims: int = 1) -> tuple[torch.Tensor, int]:
    """A tensor whose last `dims` dimensions are contiguous and whose others are rows at one distance, and the distance.

    Slices of a fused projection pass as they are; anything else is copied.
    """
    shape, stride = x.shape, x.stride()
    lead = x.dim() - dims
    size = 1
    for i in range(x.dim() - 1, lead - 1, -1):
        if shape[i] != 1 and stride[i] != size:
            return x.contiguous(), shape[lead:].numel()
        size *= shape[i]
    distance = None
    for i in range(lead - 1, -1, -1):
        if shape[i] == 1:
            continue
        if distance is None:
            distance = step = stride[i]
        elif stride[i] != step:
            return x.contiguous(), size
        step *= shape[i]
    return x, size if distance is None else distance


def on_device_of_first(function):
    """Triton launches on the current device, which need not be that of the first argument.

    `torch.cuda.current_device` would first see to it that CUDA is up, as it is where there are tensors.
    """

    @functools.wraps(function)
    def wrapped(q, *args, **kwargs):
        if not q.is_cuda or q.get_device() == torch._C._cuda_getDevice():
            return function(q, *args, **kwargs)
        with torch.cuda.device(q.device):
            return function(q, *args, **kwargs)

    return wrapped


def start(compiled, grid: tuple, tensors: tuple, rest: tuple) -> None:
    """Start a compiled kernel, which has run before, on the current device's stream.

    `compiled[grid](*tensors, *rest)` calls the hooks of profilers at every launch and asks the driver about every
    tensor, most of its time. Where no profiler has hung one in, they are left out, and addresses are given for tensors;
    some may be addresses already.
    """
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, 'calls', enter) or getattr(leave, 'calls', leave):
        compiled[grid](*tensors, *rest)
        return
    stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    places = [x if x is None or x.__class__ is int else x.data_ptr() for x in tensors]
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *places, *rest)


_launched: dict[tuple, object] = {}


class Launch:
    """A kernel with all of a launch but its tensors, which are of the same types in every call.

    From the second call on it goes past Triton's own look-up, which is most of a launch's time. Launches that differ in
    their grids and sizes alone share the compiled code.

    Args:
        kernel: its arguments are the tensors, `sizes`, then the constants by name.
        grid: three sizes; a launch with a zero in it is left out.
        sizes: run-time numbers, none of them specialised by the kernel.
        consts: its compile-time constants, in the kernel's order.
        warps: per program.
        stages: of pipelined loops.
        registers: most per thread, if the compiler is to be held back.
    """

    def __init__(self, kernel, grid, sizes, consts, warps: int = 4, stages: int = 2, registers: int | None = None):
        self.kernel, self.grid, self.sizes, self.consts = kernel, grid, tuple(sizes), consts
        self.rest = *self.sizes, *consts.values()
        self.options = {'num_warps': warps, 'num_stages': stages}
        if registers is not None:
            self.options['maxnreg'] = registers
        self.compiled = None

    def __call__(self, aligned: bool, *tensors: torch.Tensor | None) -> None:
        """Launch it on the current device.

        Args:
            aligned: whether all of `tensors` start at multiples of 16 bytes.
            tensors: pointers, None where absent; once it is `compiled` and they are aligned, addresses do.
        """
        compiled = self.compiled
        if aligned and compiled is not None:
            start(compiled, self.grid, tensors, self.rest)
        elif 0 in self.grid:
            return
        elif interpreting():
            self.kernel[self.grid](*tensors, *self.sizes, **self.consts)
        elif not aligned:
            self.kernel[self.grid](*tensors, *self.sizes, **self.consts, **self.options)
        else:
            key = self._code(tensors)
            compiled = _launched.get(key)
            if compiled is None:
                compiled = self.kernel[self.grid](*tensors, *self.sizes, **self.consts, **self.options)
                _launched[key] = compiled
            else:
                start(compiled, self.grid, tensors, self.rest)
            self.compiled = compiled

    def prepare(self, aligned: bool, *tensors: torch.Tensor | None) -> None:
        """Compile what a call with such tensors would, and launch nothing."""
        if interpreting():
            return
        key = self._code(tensors)
        if aligned and key in _launched:
            return
        compiled = self.kernel.warmup(*tensors, *self.sizes, grid=self.grid, **self.consts, **self.options)
        compiled[self.grid]  # loads it and builds its launcher
        if aligned:
            _launched[key] = compiled

    def _code(self, tensors: tuple) -> tuple:
        """What decides the compiled code, where all tensors are aligned."""
        long = tuple(n > 0x7FFFFFFF for n in self.sizes)
        options = tuple(self.options.values())
        return self.kernel.fn, tensors[0].device, options, long, *self.consts.values(), *types(*tensors)


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all of them start at multiples of 16 bytes."""
    ends = 0
    for x in tensors:
        if x is not None:
            ends |= x.data_ptr()
    return ends % 16 == 0


def types(*tensors: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Their dtypes, for the options of a plan that nothing else of them decides."""
    return tuple([None if x is None else x.dtype for x in tensors])


_plans: dict[tuple, object] = {}


def plan(kind: type, options: tuple, *tensors: torch.Tensor | None):
    """`kind(*options, *tensors)`, made once per options, shapes, strides and types: most of a pass's Python.

    Args:
        kind: what holds the launches of a pass.
        options: numbers and types on which they depend too.
        tensors: the pass's arguments, None where absent, all on the first one's device.
    """
    of = [None if x is None else (x.shape, x.dtype, x.stride()) for x in tensors]
    key = (kind, options, tensors[0].device, *of)
    found = _plans.get(key)
    if found is None:
        if len(_plans) > 4096:
            _plans.clear()
        found = _plans[key] = kind(*options, *tensors)
    return found


class Scratch:
    """What only the kernels of one pass see.

    Args:
        device: of the pass.
        parts: shape and dtype of each, None where it is not needed.
    """

    def __init__(self, device: torch.device, *parts: tuple[tuple[int, ...], torch.dtype] | None):
        self.device, self.parts, self.starts, self.bytes = device, parts, [], 0
        for part in parts:
            self.starts.append(None if part is None else self.bytes)
            if part is not None:
                self.bytes += ceil_div(math.prod(part[0]) * part[1].itemsize, 16) * 16

    def __call__(self, ready: bool, none: torch.Tensor) -> tuple[object, list]:
        """What to keep until all is launched, and the parts: addresses in one piece of memory, or tensors.

        Args:
            ready: whether only addresses count, all kernels being compiled.
            none: stands for a part that is not needed.
        """
        if ready:
            memory, first = none, 0
            if self.bytes:
                memory = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
                first = memory.data_ptr()
            return memory, [none if start is None else first + start for start in self.starts]
        parts = [none if p is None else torch.empty(*p[0], dtype=p[1], device=self.device) for p in self.parts]
        return parts, parts


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs fill a device when each of them takes several tiles in turn: four per multiprocessor."""
    if device.type != 'cuda':
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
