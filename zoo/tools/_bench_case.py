"""A case of `zoo bench kernels`: an op at a named shape, what it is compared with, the bytes it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """What to run; `zoo/tools/_bench_kernels.py` says how. Building a case must cost nothing (no tensors, no imports).

    Args:
        op: public name of the op, such as `bidirectional_gla`.
        shape: label of the shape, such as `vig_small_224`.
        make: `make(device, dtype, seed)` gives the arguments of `ours` and of every peer; the runner turns on
            `requires_grad` for the floating-point ones. A peer that needs other arguments gets them here too, and each
            callable ignores the rest (`lambda q, k, v, *_: ...`).
        ours: our public op.
        peers: label to callable. `torch.compile(formula)` belongs here as it is; a peer of another package imports
            it inside the call. Labels that begin with `fla` run only when asked for by name: they autotune for minutes.
        bytes_forward: least bytes of a forward pass at two bytes per number: arguments and results, each moved once.
        bytes_backward: the same for the backward pass alone; 0 for ops without one.
        dims: sizes by name, with `B` the batch; written beside the times.
        batched: positions of the arguments whose first axis is the batch (cut on a CPU and for the error); by
            default those with three axes or more whose first one is `B`.
        reference: plain formula in fp64 with the arguments of `ours`, for the error; by default `ours` in fp64 on the
            torch path.
    """

    op: str
    shape: str
    make: Callable[[str, torch.dtype, int], Inputs]
    ours: Callable[..., Tensor | tuple]
    peers: dict[str, Callable[..., Tensor | tuple]]
    bytes_forward: int
    bytes_backward: int
    dims: dict[str, int]
    batched: tuple[int, ...] | None = None
    reference: Callable[..., Tensor | tuple] | None = field(default=None, compare=False)

    def cut(self, inputs: Inputs, batch: int) -> Inputs:
        """The first `batch` entries of the batched arguments.

        Args:
            inputs: from `make`.
            batch: how many entries to keep.
        """

        def is_batched(i: int, x: Tensor) -> bool:
            if self.batched is not None:
                return i in self.batched
            return x.ndim >= 3 and x.shape[0] == self.dims['B']

        return tuple(x if x is None or not is_batched(i, x) else x[:batch].clone() for i, x in enumerate(inputs))
