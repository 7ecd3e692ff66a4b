"""Finding where a NaN or an infinity came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(_finite(v) for v in value)
    return True


def first_nonfinite(net: nn.Module, run: Callable[[], Any], images: torch.Tensor) -> str:
    """Names the first place where a forward pass leaves the finite numbers.

    Args:
        net: Network to watch.
        run: Repeats the forward pass of `net`.
        images: Its input.

    Returns:
        A phrase: the input, a parameter, a module with its class, or the loss.
    """
    if not _finite(images):
        return 'the input images themselves'
    for name, parameter in net.named_parameters():
        if not _finite(parameter.detach()):
            return f'parameter {name}: an earlier update already made it non-finite'
    found: list[str] = []
    handles = []
    for name, module in net.named_modules():

        def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            # children finish before their parents, so the first report is the innermost module
            if not found and not _finite(output):
                found.append(f'module {name or "(the network)"} ({type(module).__name__})')

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else 'the loss function (the network output is finite)'
