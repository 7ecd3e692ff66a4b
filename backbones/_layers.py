"""Layers shared by the backbones whose blocks are pre-norm: norms that take in the branch before them.

A block of such a network is x + f(norm(x)) for one branch f after the other. Between two branches the sum and the next
norm are one op (`zoo.kernels.norm`), so a branch's output travels as `Pending`: added by whatever norm comes next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import DropPath
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from zoo.kernels.norm import layer_norm, rms_norm

__all__ = [
    'LayerNorm',
    'LayerNorm2d',
    'Normed',
    'Pending',
    'PreNormBlock',
    'RMSNorm',
    'add_pending',
    'add_then_norm',
    'draw_drop_path',
    'is_bare',
]


class Pending(NamedTuple):
    """A branch's output that is not yet in the residual stream.

    Args:
        branch: (B, ..., C), like the stream.
        sample_scale: stochastic depth's factors (B, 1, ..., 1), or None.
    """

    branch: Tensor
    sample_scale: Tensor | None


class Normed(NamedTuple):
    """Nothing is pending, and the stream's norm is known already.

    Args:
        y: the normalised stream (B, ..., C).
        norm: the module that y is the result of.
    """

    y: Tensor
    norm: nn.Module


@register_notrace_module
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32; see `zoo.kernels.norm.rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None, sample_scale: Tensor | None = None):
        """The norm of x; with a residual, of their sum, and the sum."""
        return rms_norm(x, self.weight, self.eps, residual, sample_scale=sample_scale)


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, computed in fp32; see `zoo.kernels.norm.layer_norm`.

    Args:
        dim: channels.
        eps: added to the variance.
        starts_stream: the result is where a residual stream begins, which under autocast keeps the parameters' dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-5, starts_stream: bool = False, device=None, dtype=None):
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.starts_stream = starts_stream

    def forward(self, x: Tensor, residual: Tensor | None = None, sample_scale: Tensor | None = None):
        """The norm of x; with a residual, of their sum, and the sum."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype) if self.starts_stream else None
        return layer_norm(x, self.weight, self.bias, self.eps, residual, sample_scale=sample_scale, dtype=dtype)


@register_notrace_module
class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of an NCHW map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def draw_drop_path(drop_path: nn.Module, branch: Tensor) -> Pending:
    """The branch with this step's factors of stochastic depth, drawn as timm's DropPath draws them."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return Pending(branch, None)
    return Pending(branch, _draw(branch, 1 - drop_path.drop_prob, drop_path.scale_by_keep))


@register_notrace_function
def _draw(branch: Tensor, keep: float, scale_by_keep: bool) -> Tensor:
    scale = branch.new_empty((branch.shape[0], *[1] * (branch.ndim - 1))).bernoulli_(keep)
    return scale.div_(keep) if keep and scale_by_keep else scale


def add_pending(x: Tensor, pending: Pending | Normed | None) -> Tensor:
    """The stream with what is pending added."""
    if not isinstance(pending, Pending):
        return x
    branch, scale = pending
    return x + (branch if scale is None else branch * scale)


def add_then_norm(norm: nn.Module, x: Tensor, pending: Pending | Normed | None) -> tuple[Tensor, Tensor]:
    """The normalised stream and the stream, after adding what is pending."""
    if isinstance(pending, Normed) and pending.norm is norm:
        return pending.y, x
    if isinstance(pending, Pending) and isinstance(norm, (RMSNorm, LayerNorm)):
        return norm(pending.branch, x, pending.sample_scale)
    x = add_pending(x, pending)
    return norm(x), x


class PreNormBlock(nn.Module):
    """x + f(norm(x)) for one branch f after the other; a subclass sets `drop_path` and names its branches."""

    drop_path: nn.Module

    def branches(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """(norm, f) of every branch, in order."""
        raise TypeError(f'{type(self).__name__} does not name its branches')

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to (B, ..., C)."""
        return add_pending(*self.run_pending(x, None))

    def run_pending(
        self, x: Tensor, pending: Pending | Normed | None, next_norm: nn.Module | None = None
    ) -> tuple[Tensor, Pending | Normed | None]:
        """The block between its neighbours: takes in what they left pending and leaves its last branch so.

        Args:
            x: the stream (B, ..., C).
            pending: what is to be added to it.
            next_norm: what the stream meets next, for blocks that can do its work too.
        """
        for norm, branch in self.branches():
            y, x = add_then_norm(norm, x, pending)
            pending = draw_drop_path(self.drop_path, branch(y))
        return x, pending

    def takes_pending(self) -> bool:
        """Whether nothing has to happen at the borders of this block, such as a hook."""
        return is_bare(self)


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its `forward`: no hooks, not compiled by itself."""
    return not module._forward_hooks and not module._forward_pre_hooks and module._compiled_call_impl is None
