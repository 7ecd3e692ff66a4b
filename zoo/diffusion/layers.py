"""Layers of diffusers' UNets and VAEs made faster: GroupNorm with SiLU and GEGLU in Triton kernels, shorter attention.

Beyond 1024 px a linear UNet spends a third of its time on PyTorch's GroupNorm, which copies channels-last images and
has one program for a sample and group; so does a VAE, and more, at any size. Below, a GPU waits for the host, and
diffusers' attention inspects the signature of its processor and divides by 1 at every call. `fast_layers` gives such
layers, in place, classes that call `zoo.kernels.group_norm` and `zoo.kernels.swiglu` or go the shorter way; parameters,
their names and hooks stay, so that checkpoints, LoRA, `save_pretrained` and quantisation do not notice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from zoo.backbones._linfusion_layer import project_out
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


def _is_plain(layer: Attention) -> bool:
    """Whether a processor of diffusers would do nothing for this layer but project and attend."""
    return (
        layer.spatial_norm is layer.group_norm is layer.norm_cross is layer.norm_q is layer.norm_k is None
        and layer.rescale_output_factor == 1
        and not layer.residual_connection
    )


class FastAttention(Attention):
    """Softmax attention of (B, N, C) as diffusers' stock processors compute it, bit for bit, with less for the host.

    Whatever else the layer is asked for (a mask, keywords, an image, another processor) goes to diffusers.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        kind, text = type(self.processor), encoder_hidden_states
        known = kind is AttnProcessor2_0 or kind is FusedAttnProcessor2_0
        given = attention_mask is not None or cross_attention_kwargs
        if given or not known or hidden_states.ndim != 3 or not _is_plain(self):
            return super().forward(hidden_states, text, attention_mask, **cross_attention_kwargs)
        layers, heads = self._modules, self.heads  # looking every name up in the module takes a while
        batch = (hidden_states if text is None else text).shape[0]
        if kind is FusedAttnProcessor2_0 and text is None:
            qkv = layers['to_qkv'](hidden_states)
            q, k, v = qkv.view(batch, -1, 3, heads, qkv.shape[-1] // 3 // heads).transpose(1, 3).unbind(2)
        else:
            q = layers['to_q'](hidden_states)
            if kind is FusedAttnProcessor2_0:
                kv = layers['to_kv'](text)
                width = kv.shape[-1] // 2 // heads
                k, v = kv.view(batch, -1, 2, heads, width).transpose(1, 3).unbind(2)
            else:
                text = hidden_states if text is None else text
                k, v = layers['to_k'](text), layers['to_v'](text)
                width = k.shape[-1] // heads
                k, v = (x.view(batch, -1, heads, width).transpose(1, 2) for x in (k, v))
            q = q.view(batch, -1, heads, width).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # of (B, H, N, D)
        if o.dtype != q.dtype:  # under autocast, of projections that know nothing of it
            o = o.to(q.dtype)
        return project_out(layers['to_out'], o)


_PLAIN = {FastGroupNorm: nn.GroupNorm, FastGroupNormSiLU: nn.GroupNorm, FastGEGLU: GEGLU, TimeSiLU: nn.SiLU}
_PLAIN |= {FastAttention: Attention}
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
    """Let GroupNorm, SiLU after it, and GEGLU run in Triton kernels, and softmax attention in fewer calls.

    Calling it again is harmless. Attention, of text or of an image's own tokens, stays diffusers' to the bit.

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
            elif type(module) is Attention and _is_plain(module):
                module.__class__ = FastAttention
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
