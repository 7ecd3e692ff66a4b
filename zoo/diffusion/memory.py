"""What a pass needs, found by running it on meta tensors: shapes flow, memory is counted, nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Of the sum: what kernels take inside and the allocator cannot use.
MARGIN = 1.1


class _Attention(TorchFunctionMode):
    """Softmax attention as fused kernels have it: no matrix of scores."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, _, value = (*args, *(kwargs[k] for k in ('query', 'key', 'value') if k in kwargs))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **kwargs)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live.

    Attributes:
        peak: most bytes at one time, without what existed before.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}  # tensors per storage: views keep it alive

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        out = function(*args, **kwargs or {})
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self._watch(tensor, before)
        return out

    def _watch(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._users:
            self._users[key] += 1
        elif key in given:
            return  # a view of what existed before
        else:
            self._users[key] = 1
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that a call on meta tensors holds at a time, without its inputs and weights.

    Args:
        call: runs a model on meta tensors.
    """
    with torch.no_grad(), _Attention(), PeakMemory() as memory:
        call()
    return memory.peak


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers.

    Args:
        modules: any models; None counts nothing.
    """
    tensors = (t for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))
    return sum(t.numel() * t.element_size() for t in tensors)


def on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the same config without weights.

    Args:
        model: of diffusers.
        dtype: of the new one.
    """
    with torch.device('meta'):
        return nn.Module.to(type(model).from_config(model.config), dtype).eval()  # diffusers' own `to` warns


def available_bytes(device: torch.device | str) -> int | None:
    """Memory that the device still has for this process, None if it does not say.

    Args:
        device: `cuda` or `cpu`.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open('/proc/meminfo') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None
