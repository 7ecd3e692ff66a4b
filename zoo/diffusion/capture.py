"""Denoising steps as CUDA graphs: `with zoo.diffusion.captured_steps(pipeline): pipeline(...)`.

Up to about 1024 px a GPU finishes a step of a UNet sooner than Python has enqueued it. A graph is enqueued at once: the
step of a signature (shapes, strides, dtypes and devices of all tensors, values of everything else) runs as it is a few
times, then is captured, and replays compute the same with other values in the same buffers.

A replay runs no Python: hooks inside the model are not called, and what a step has read on the host stays what it was.
Changes are looked for at every call, while the device is busy with the one before: modules, processors, weights that
are exchanged, moved or written, and plain values of modules such as the scales of LoRA, IP-Adapter and FreeU; graphs
are dropped then. Writes into the `.data` of a weight and changes deep inside an object cannot be seen: call `forget()`
of what the context gives.

Nothing is captured where a gradient is recorded, in training, under autocast or compilation, on other devices, and of
weights that are elsewhere (sequential offloading); the call is then what it is without.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zoo._graphs import record
from zoo.diffusion.highres import denoiser
from zoo.errors import ZooError

KINDS = ('cuda',)  # of devices that have graphs
REMEMBERED = 64  # signatures without a graph
_VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _State:
    """What a graph has taken for granted: modules, their plain values, and where weights lie."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        dicts = [m._modules for m in modules if m._modules]
        # the root's own values are left out: its forward is exchanged here and by `savings`
        dicts += [vars(m) for m in modules[1:] if not type(m).__module__.startswith('torch.nn.')]
        self.dicts = [(d, {k: _as_it_is(k, v) for k, v in d.items()}) for d in dicts]
        owned = [(d, k, x) for m in modules for d in (m._parameters, m._buffers) for k, x in d.items() if x is not None]
        self.places = [(*entry, entry[-1].data_ptr()) for entry in owned]
        self.versions = [(x, x._version) for _, _, x in owned if not x.is_inference()]

    def holds(self) -> bool:
        """Whether the model is still as it was."""
        try:
            for now, then in self.dicts:
                if now != then:
                    return False
        except (RuntimeError, ValueError):  # an exchanged tensor or array, which has no truth value
            return False
        for owner, name, x, place in self.places:
            if owner.get(name) is not x or x.data_ptr() != place:
                return False
        for x, version in self.versions:
            if x._version != version:
                return False
        return True


def _as_it_is(name: str, value: Any) -> Any:
    """A value to compare with later: lists and dictionaries may change, but for those that torch keeps for itself."""
    return copy.copy(value) if type(value) in (list, dict, set) and name[:1] != '_' else value


def _is_small(x: Tensor) -> bool:
    return x.device.type == 'cpu' and x.numel() == 1


class _Graph:
    """A captured step and its buffers.

    Args:
        call: the step.
        leaves: tensors and values of its arguments.
        spec: how arguments are made of them.
        device: where it runs.
        pool: memory of another graph.
    """

    def __init__(self, call: Callable, leaves: list, spec, device: torch.device, pool):
        copied = lambda x: x.to(device, copy=True) if x.device != device else x.clone()  # noqa: E731
        self.leaves = [copied(x) if isinstance(x, Tensor) else x for x in leaves]

        def step():
            args, kwargs = tree_unflatten(self.leaves, spec)
            return call(*args, **kwargs)

        with torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext():
            self.graph, result = record(step, warmup=1, pool=pool)
        self.result, self.spec = tree_flatten(result)
        for x in self.result:
            if not isinstance(x, (Tensor, *_VALUES)):
                raise RuntimeError(f'a step gave a {type(x).__name__}, not tensors')

    def __call__(self, leaves: list):
        for mine, x in zip(self.leaves, leaves):
            if isinstance(x, Tensor):
                if _is_small(x):  # a timestep: a copy from pageable memory would wait for the device
                    mine.fill_(x.item())
                else:
                    mine.copy_(x)
        self.graph.replay()
        return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.result], self.spec)


class CapturedSteps:
    """The graphs of one model; `captured_steps` makes and ends them.

    Args:
        model: whose steps they are.
        call: the step itself.
        after: calls of a signature before it is captured.
        graphs: how many are kept; the least recently used one goes.
    """

    def __init__(self, model: nn.Module, call: Callable, after: int, graphs: int):
        self.model, self.plain, self.after, self.limit = model, call, after, graphs
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.failure: str | None = None
        self._seen: OrderedDict[tuple, int] = OrderedDict()
        self._refused: set[tuple] = set()
        self._state: _State | None = None

    def forget(self) -> None:
        """Drop all graphs and their memory; signatures are captured anew."""
        self.graphs.clear()
        self._seen.clear()
        self._refused.clear()
        self._state = None

    def __call__(self, *args, **kwargs):
        """A step."""
        found = self._arguments(args, kwargs)
        if found is None:
            return self.plain(*args, **kwargs)
        leaves, spec, device, key = found
        if self._state is not None and not self._state.holds():
            self.forget()
            self.after *= 2  # a model that changes all the time is not worth capturing
        graph = self.graphs.get(key) or self._captured(leaves, spec, device, key)
        if graph is None:
            return self.plain(*args, **kwargs)
        self.graphs.move_to_end(key)
        return graph(leaves)

    def _arguments(self, args: tuple, kwargs: dict) -> tuple | None:
        """Leaves, structure, device and signature of arguments; None where a step cannot be captured."""
        if torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return None
        args, kwargs = _with_timestep_tensor(self.model, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.device.type in KINDS}
        known = len(devices) == 1 and all(x.device.type in (*KINDS, 'cpu') for x in tensors)
        if not known or not all(type(x) in (Tensor, nn.Parameter) or isinstance(x, _VALUES) for x in leaves):
            return None
        (device,) = devices
        if torch.is_autocast_enabled(device.type):
            return None
        if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return None
        signs = ((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        return leaves, spec, device, (torch.is_inference_mode_enabled(), spec, *signs)

    def _captured(self, leaves: list, spec, device: torch.device, key: tuple) -> _Graph | None:
        """A graph, once a signature has been seen often enough."""
        if key in self._refused:
            return None
        seen = self._seen.pop(key, 0)
        if seen < self.after:
            self._seen[key] = seen + 1
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None
        while len(self.graphs) >= self.limit:
            self.graphs.popitem(last=False)
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        try:
            if {x.device for x in self.model.parameters()} != {device}:
                raise RuntimeError(f'its weights are not all on {device}')
            graph = _Graph(self.plain, leaves, spec, device, pool)
            self._state = self._state or _State(self.model)
        except RuntimeError as error:
            self._refused.add(key)
            self.failure = str(error).strip().splitlines()[0]
            warnings.warn(f'a step of {type(self.model).__name__} is not captured: {self.failure}', stacklevel=3)
            return None
        self.graphs[key] = graph
        return graph


def _with_timestep_tensor(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A UNet's timestep given as a number, as the tensor that the UNet makes of it."""
    if not isinstance(model, UNet2DConditionModel):
        return args, kwargs
    t = kwargs['timestep'] if 'timestep' in kwargs else args[1] if len(args) > 1 else None
    if type(t) not in (int, float):
        return args, kwargs
    t = torch.tensor([t], dtype=torch.int64 if type(t) is int else torch.float64)
    if 'timestep' in kwargs:
        return args, kwargs | {'timestep': t}
    return (args[0], t, *args[2:]), kwargs


@contextlib.contextmanager
def captured_steps(model, after: int = 2, graphs: int = 4) -> Iterator[CapturedSteps]:
    """Inside, steps of a denoiser are replayed as CUDA graphs, where they can be.

    Worth it where steps are short: a graph holds the memory of a step's activations until it is dropped. Enable
    offloading before, and `torch.compile` captures by itself (`mode='reduce-overhead'`).

    Args:
        model: a UNet or transformer of diffusers, or a pipeline that has one.
        after: calls of a signature that run as they are before it is captured, at the cost of two more.
        graphs: how many signatures are kept; another one takes the place of the least recently used.

    Yields:
        The graphs: `forget()` drops them.

    Raises:
        ZooError: for a compiled model, or numbers that capture nothing.
    """
    model = model if isinstance(model, nn.Module) else denoiser(model)
    if hasattr(model, '_orig_mod'):
        raise ZooError("captured_steps: the model is compiled; torch.compile(mode='reduce-overhead') captures it")
    if after < 1 or graphs < 1:
        raise ZooError(f'captured_steps: after and graphs must be at least 1, got {after} and {graphs}')
    own = model.__dict__.get('forward')
    steps = CapturedSteps(model, model.forward, after, graphs)

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        # a copy of the model brings this method along, bound to itself
        return steps(*args, **kwargs) if self is model else type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    try:
        yield steps
    finally:
        steps.forget()
        if own is None:
            del model.forward
        else:
            model.forward = own
