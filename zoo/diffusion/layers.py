"""Layers of diffusers' UNets and VAEs in Triton kernels: GroupNorm with SiLU, and GEGLU.

Beyond 1024 px a linear UNet spends a third of its time on PyTorch's GroupNorm, which copies channels-last images and
has one program for a sample and group; so does a VAE, and more, at any size. `fast_layers` gives such layers, in place,
classes that call `zoo.kernels.group_norm` and `zoo.kernels.swiglu`; parameters, their names and hooks stay, so that
checkpoints, LoRA, `save_pretrained` and quantisation do not notice.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from zoo.kernels._dispatch import autocast_dtype
from zoo.kernels.group_norm import group_norm
from zoo.kernels.swiglu import geglu


class FastGroupNorm(nn.GroupNorm):
    """GroupNorm by `zoo.kernels.group_norm`; under autocast the result has autocast's dtype."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, dtype=dtype)


class FastGroupNormSiLU(FastGroupNorm):
    """The same with SiLU after it."""

    silu = True


class FastGEGLU(GEGLU):
    """GEGLU with its product in one kernel."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return geglu(self.proj(hidden_states))


class TimeSiLU(nn.SiLU):
    """The activation of a block whose norms have theirs inside: of time embeddings, and the identity for images."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.ndim >= 4 else super().forward(x)


_PLAIN = {FastGroupNorm: nn.GroupNorm, FastGroupNormSiLU: nn.GroupNorm, FastGEGLU: GEGLU, TimeSiLU: nn.SiLU}
# Norms that an activation of the module follows at once: its class, the activation's name, theirs.
_FOLLOWED = ((ResnetBlock2D, 'nonlinearity', ('norm1', 'norm2')), (nn.Module, 'conv_act', ('conv_norm_out',)))


def _networks(model) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    return [part for name in ('unet', 'transformer', 'vae') if (part := getattr(model, name, None)) is not None]


def _with_silu(module: nn.Module) -> None:
    if getattr(module, 'time_embedding_norm', 'default') != 'default':
        return  # a block with a scale and a shift between norm and activation
    for kind, activation, norms in _FOLLOWED:
        if not isinstance(module, kind):
            continue
        pair = [getattr(module, name, None) for name in norms]
        if type(getattr(module, activation, None)) is nn.SiLU and all(type(n) is nn.GroupNorm for n in pair):
            # get_activation() may hand one object to many blocks
            setattr(module, activation, TimeSiLU())
            for norm in pair:
                norm.__class__ = FastGroupNormSiLU


def fast_layers(model, channels_last: bool = True) -> int:
    """Let GroupNorm, SiLU after it, and GEGLU run in Triton kernels; calling it again is harmless.

    Args:
        model: a module of diffusers, or a pipeline: its UNet or transformer and its VAE. Call it before offloading is
            enabled. On devices without Triton it computes as before.
        channels_last: move convolutions' weights to channels-last memory, which the kernels are for.

    Returns:
        How many layers have another class now.
    """
    changed = 0
    for network in _networks(model):
        for module in network.modules():
            if channels_last and isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            _with_silu(module)
        for module in network.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = FastGroupNorm
            elif type(module) is GEGLU:
                module.__class__ = FastGEGLU
            changed += type(module) in _PLAIN
    return changed


def plain_layers(model) -> None:
    """Undo `fast_layers`, but for the memory format.

    Args:
        model: a module, or a pipeline of diffusers.
    """
    for network in _networks(model):
        for module in network.modules():
            if type(module) in _PLAIN:
                module.__class__ = _PLAIN[type(module)]
