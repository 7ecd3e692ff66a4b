"""Parameters and multiply-accumulates of a model, the scans of its token mixers included."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Args:
        params: number of parameters.
        macs: multiply-accumulates of a forward pass (half the FLOPs), matrix products, convolutions and scans.
        scan_macs: the part of `macs` that the zoo's own ops take, counted in their recurrent form.
    """

    params: int
    macs: int
    scan_macs: int


def cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count one forward pass of one image.

    Args:
        model: may live on the meta device, where nothing is computed.
        input_size: channels, height, width.
    """
    tensor = next(model.parameters())
    x = torch.zeros(1, *input_size, device=tensor.device, dtype=tensor.dtype)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(x)
    by_op = counter.get_flop_counts().get('Global', {})
    scan = sum(flops for op, flops in by_op.items() if str(op).startswith('zoo.'))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, scan // 2)


def meta_model(name: str, **kwargs) -> nn.Module:
    """Build a model without memory for its weights, for counting.

    Args:
        name: registered name.
        kwargs: passed to `create_model`.
    """
    with torch.device('meta'):
        return timm.create_model(name, **kwargs).eval()


def human(n: float) -> str:
    """5834536 -> '5.83 M'."""
    for limit, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if n >= limit:
            return f'{n / limit:.2f} {unit}'
    return f'{n:.0f}'
