"""How kernels are started: past Triton's look-up and hooks, unless a profiler has hung one in."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton')
from triton import knobs
from zoo.kernels._triton import _common, sums

import zoo
from zoo.tools import _bench_launch

for path in Path(_common.__file__).parent.glob('[a-z]*.py'):  # a module first imported below would keep what is patched
    importlib.import_module(f'zoo.kernels._triton.{path.stem}')

GRID, ARGS = (3, 2, 1), (torch.zeros(4), 7)


class Compiled:
    """What Triton gives after a first launch, noting how it is called."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(('hooked', grid, args))

    def run(self, *args):
        self.calls.append(('plain', args))


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda index: 'stream', raising=False)
    return Compiled()


def test_without_hooks_nothing_is_called_beside_the_kernel(compiled):
    _common.start(compiled, GRID, ARGS[:1], ARGS[1:])
    expected = (3, 2, 1, 'stream', 'function', 'metadata', None, None, None, ARGS[0].data_ptr(), *ARGS[1:])
    assert compiled.calls == [('plain', expected)]


@pytest.mark.parametrize('name', ['launch_enter_hook', 'launch_exit_hook'])
def test_hooks_of_profilers_see_every_launch(compiled, monkeypatch, name):
    monkeypatch.setattr(knobs.runtime, name, lambda metadata: None)
    _common.start(compiled, GRID, ARGS[:1], ARGS[1:])
    assert compiled.calls == [('hooked', GRID, ARGS)]


class Kernel:
    """A Triton function that compiles to `compiled` and notes what it is asked for."""

    def __init__(self, compiled, name='kernel'):
        self.compiled, self.fn, self.seen = compiled, name, []

    def __getitem__(self, grid):
        return lambda *args, **named: self.seen.append((grid, args, named)) or self.compiled

    def warmup(self, *args, grid, **named):
        self.seen.append(('warm', args, named))
        return self.compiled


@pytest.fixture
def looked_up(monkeypatch):
    monkeypatch.setattr(_common, 'interpreting', lambda: False)
    monkeypatch.setattr(_common, '_launched', {})


def test_a_kernel_is_looked_up_again_for_tensors_off_16_bytes(compiled, looked_up):
    kernel = Kernel(compiled)
    launch = _common.Launch(kernel, GRID, (5,), {'D': 8}, 2, 3, registers=64)
    buffer = torch.zeros(64)
    inside, off = buffer[:8], buffer[1:9]
    assert _common.aligned(inside, None) and not _common.aligned(inside, off)
    launch(False, off)
    launch(True, inside)
    launch(True, inside)
    launch(False, off)
    expected = {'D': 8, 'num_warps': 2, 'num_stages': 3, 'maxnreg': 64}
    assert [(args[1:], named) for _, args, named in kernel.seen] == [((5,), expected)] * 3
    assert [call[1][-3:] for call in compiled.calls] == [(inside.data_ptr(), 5, 8)]


def test_launches_share_code_unless_types_or_constants_differ(compiled, looked_up):
    kernel, x = Kernel(compiled), torch.zeros(8)
    make = lambda size, D=8, warps=4: _common.Launch(kernel, GRID, (size,), {'D': D}, warps)  # noqa: E731
    make(5)(True, x, None)
    make(6)(True, x, None)
    assert len(kernel.seen) == 1 and compiled.calls[-1][1][-4:] == (x.data_ptr(), None, 6, 8)
    others = [((5, 16), (x, None)), ((5, 8, 2), (x, None)), ((1 << 40,), (x, None)), ((5,), (x.half(), None)),
              ((5,), (x, x)), ((5,), (x, x.half()))]  # fmt: skip
    for options, tensors in others:
        make(*options)(True, *tensors)
    assert len(kernel.seen) == 7 and len(compiled.calls) == 1


def test_preparing_compiles_once_and_launches_nothing(compiled, looked_up):
    kernel, x = Kernel(compiled), torch.zeros(8)
    for size in (5, 6):
        _common.Launch(kernel, GRID, (size,), {'D': 8}).prepare(True, x)
    assert [grid for grid, _, _ in kernel.seen] == ['warm'] and not compiled.calls
    _common.Launch(kernel, GRID, (7,), {'D': 8})(True, x)
    assert len(kernel.seen) == 1 and compiled.calls[0][1][-2:] == (7, 8)


def test_plans_are_made_once_per_shapes_strides_types_and_options(monkeypatch):
    monkeypatch.setattr(_common, '_plans', {})
    made = []

    class Plan:
        def __init__(self, option, *tensors):
            made.append((option, tensors))

    x, bias = torch.zeros(4, 6), torch.zeros(6)
    first = _common.plan(Plan, (1,), x, bias, None)
    assert _common.plan(Plan, (1,), torch.ones(4, 6), torch.ones(6), None) is first and len(made) == 1
    others = [((2,), x, bias, None), ((1,), x[:2], bias, None), ((1,), x, bias.half(), None), ((1,), x, bias, bias),
              ((1,), torch.zeros(6, 4).T, bias, None), ((1,), x, None, bias)]  # fmt: skip
    assert len({id(_common.plan(Plan, *call)) for call in others} | {id(first)}) == len(made) == 7


class Recorded(Compiled):
    """A compiled kernel that notes its name, its grid and what it is started with."""

    def __init__(self, kernel, calls):
        self.name, self.calls = kernel.fn.__name__, calls

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.calls.append((self.name, (x, y, z), args))


@pytest.fixture
def recorded(compiled, looked_up, monkeypatch):
    """What Triton is asked for and what is started past it; nothing runs."""
    first, again = [], []

    def launch(kernel, grid):
        def run(*args, **named):
            constants = [value for name, value in named.items() if name.isupper() or name in kernel.arg_names]
            first.append((kernel.fn.__name__, tuple(grid), (*args, *constants)))
            return Recorded(kernel, again)

        return run

    kind = type(sums.sums_kernel)
    monkeypatch.setattr(kind, '__getitem__', launch)
    monkeypatch.setattr(kind, 'warmup', lambda kernel, *args, **named: Recorded(kernel, again))
    monkeypatch.setattr(_common, '_plans', {})
    _common.compute_types.cache_clear()
    yield first, again
    _common.compute_types.cache_clear()


ROWS = [row for row in _bench_launch.rows() if row.name not in (_bench_launch.YARDSTICK, 'gated_delta_rule')]


@pytest.mark.skipif(torch.cuda.is_available(), reason='kernels run on CPU tensors only where they are interpreted')
@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
def test_what_is_started_later_is_what_was_launched_first(row, recorded):
    """Grids, numbers, constants and which tensors are absent; addresses are multiples of 16, as the code has it."""
    first, again = recorded
    for step in _bench_launch._steps(row, 'cpu', torch.bfloat16).values():
        with zoo.kernel_backend('triton'), torch.autograd.set_multithreading_enabled(False):
            step()
            start = len(first), len(again)
            step()
            step()
        assert len(first) == start[0] and (len(again) - start[1]) % 2 == 0
        launched = again[: start[1]] + first
        for name, grid, args in again[start[1] :]:
            same = [call[2] for call in launched if call[:2] == (name, grid) and alike(call[2], args)]
            assert same, (name, grid, args)


def alike(first: tuple, later: tuple) -> bool:
    """Whether arguments are equal, an aligned address standing for a tensor."""
    pairs = zip(first, later, strict=True)
    return all(b % 16 == 0 if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
