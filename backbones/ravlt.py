"""RAVLT: a vision backbone on rank-augmented linear attention (RALA), with softmax attention in its last two stages.

Paper: Breaking the Low-Rank Dilemma of Linear Attention, arXiv 2411.07635 (CVPR 2025).
Weights: aldjalkdf/RAVLT on the Hugging Face hub (MIT); reference: qhfan/RALA.

Module names are the keys of the published checkpoints, and 1 x 1 convolutions keep their 4-D weights. Between stages
and inside them maps are channels-last (B, h, w, C): tokens and pixels are the same memory, a 1 x 1 convolution is a
matrix product, and nothing is transposed. Sizes may be odd: every strided convolution gives ceil(n / 2). Under
autocast the residual stream has autocast's dtype, except that fp16 widens it to fp32 where there are layer scales.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from zoo.backbones._features import PyramidMixin, getter_cfg, published_weights, squeeze_linears
from zoo.backbones._layers import LayerNorm, add_pending, add_then_norm, draw_drop_path
from zoo.kernels.depthwise_conv import DepthwiseConv2d, depthwise_conv2d
from zoo.kernels.linear_attention import rank_augmented
from zoo.kernels.rope import apply_rope, axial_rope_tables

__all__ = ['RAVLT', 'RankAugmentedAttention', 'SoftmaxAttention']

STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}

register_notrace_function(depthwise_conv2d)
register_notrace_function(rank_augmented)


@register_notrace_function
def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """scale * (x W^T + b) per output channel, with the scale inside the weights: no pass over the map, nothing saved.

    fp16 cannot hold weights of the initial scales of 1e-6: there the fp32 scale multiplies the output, as published.
    Under autocast x has the low precision already, since a linear layer made it.
    """
    if x.dtype == torch.float16:
        return F.linear(x, weight, bias) * scale
    return F.linear(x, weight * scale[:, None], bias * scale)


class Pointwise(nn.Conv2d):
    """1 x 1 convolution of a map (..., C): a linear layer that keeps its published 4-D weight."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__(dim, out_dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(..., C) to (..., C'), times a layer scale of C' values in any shape."""
        weight = self.weight.flatten(1)
        return F.linear(x, weight, self.bias) if scale is None else scaled_linear(x, weight, self.bias, scale.flatten())


def _channel_norm(dim: int, **dd) -> nn.Module:
    """LayerNorm over the channels of (..., C), one level deeper as the published keys have it."""
    return nn.Sequential(OrderedDict(norm=LayerNorm(dim, eps=1e-6, **dd)))


class GatedAttention(nn.Module):
    """What both kinds of attention share: W ((attention(q, k, v) + DWConv5x5(v)) * o), o a plain projection.

    Args:
        dim: channels C.
        num_heads: heads H of D = C / H channels, D a multiple of 4 of at least 8.
    """

    kind = ''

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        head_dim = dim // num_heads
        if dim % num_heads or head_dim % 4 or head_dim < 8:
            raise ValueError(
                f'{type(self).__name__}: dim = {dim} must give each of num_heads = {num_heads} heads the same number '
                'of channels, a multiple of 4 of at least 8'
            )
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkvo = Pointwise(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv2d(dim, 5, nhwc=True, **dd)
        self.proj = Pointwise(dim, dim, **dd)

    def attend(self, qkvo: Tensor, height: int, width: int) -> Tensor:
        """q, k, v, o side by side (B, T, 4 H, D) to (attention(q, k, v) + lepe(v)) * o (B, T, H, D).

        A subclass splits `qkvo` once: autograd then joins the gradients of the parts in one pass.
        """
        raise TypeError(f'{type(self).__name__} does not define attend')

    def local(self, v: Tensor, height: int, width: int) -> Tensor:
        """The convolution of the values (B, T, H, D), in that shape."""
        v = self.lepe(v.flatten(2).unflatten(1, (height, width)))
        return v.flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, h, w, C) to (B, h, w, C), times a layer scale if there is one."""
        height, width = x.shape[1], x.shape[2]
        qkvo = self.qkvo(x).flatten(1, 2).unflatten(-1, (4 * self.num_heads, self.head_dim))
        y = self.attend(qkvo, height, width)
        return self.proj(y.flatten(2).unflatten(1, (height, width)), scale)


class RankAugmentedAttention(GatedAttention):
    """Linear attention with keys weighted by their agreement with the mean query; see `rank_augmented`."""

    kind = 'rank-augmented linear attention (linear)'

    def attend(self, qkvo: Tensor, height: int, width: int) -> Tensor:
        q, k, v, o = qkvo.chunk(4, 2)
        return rank_augmented(q, k, v, height=height, width=width, lepe=self.local(v, height, width), gate=o)


class SoftmaxAttention(GatedAttention):
    """Softmax attention over all tokens of the map, queries and keys rotated by their row and column."""

    kind = 'softmax attention (quadratic)'

    def attend(self, qkvo: Tensor, height: int, width: int) -> Tensor:
        heads = self.num_heads
        qk, v, o = qkvo.split((2 * heads, heads, heads), 2)
        q, k = rotate(qk, height, width).chunk(2, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return (y + self.local(v, height, width)) * o


@register_notrace_function
def rotate(x: Tensor, height: int, width: int) -> Tensor:
    """Axial rotary embedding of tokens (B, height * width, H, D)."""
    cos, sin = axial_rope_tables(height, width, x.shape[-1], device=x.device)
    return apply_rope(x, cos.unsqueeze(1), sin.unsqueeze(1))


class ConvFFN(nn.Module):
    """W_2 (u + DWConv3x3(u)) with u = GELU(W_1 x), on (B, h, w, C)."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = Pointwise(dim, hidden, **dd)
        self.dwconv = DepthwiseConv2d(hidden, 3, residual=True, pre_activation='gelu', nhwc=True, **dd)
        self.fc2 = Pointwise(hidden, dim, **dd)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.fc2(self.dwconv(self.fc1(x)), scale)


class RAVLTBlock(nn.Module):
    """x + DWConv3x3(x), then x + gamma_1 attention(LN(x)), then x + gamma_2 FFN(LN(x)), on (B, h, w, C).

    Args:
        dim: channels.
        attn: the token mixer.
        hidden: channels inside the FFN.
        layer_scale: initial value of gamma_1 and gamma_2, None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attn: GatedAttention,
        hidden: int,
        layer_scale: float | None,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.pos = DepthwiseConv2d(dim, 3, residual=True, nhwc=True, **dd)
        self.norm1 = _channel_norm(dim, **dd)
        self.attn = attn
        self.norm2 = _channel_norm(dim, **dd)
        self.ffn = ConvFFN(dim, hidden, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **dd))
            self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **dd))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos(x)
        mixed = draw_drop_path(self.drop_path, self.attn(self.norm1(x), self.gamma_1))
        y, x = add_then_norm(self.norm2.norm, x, mixed)
        return add_pending(x, draw_drop_path(self.drop_path, self.ffn(y, self.gamma_2)))


def rope_angles(head_dim: int) -> Tensor:
    """The published table of a stage (D / 2,): the frequencies 10000^(-t / (m - 1)), t < m = D / 4, each twice."""
    return torch.pow(10000, -torch.linspace(0, 1, head_dim // 4, device='cpu')).repeat_interleave(2)


class AxialRoPE(nn.Module):
    """The frequency table of a stage as published files hold it; the kernels compute with their own, in fp32."""

    def __init__(self, head_dim: int, device=None):
        super().__init__()
        self.register_buffer('angle', rope_angles(head_dim).to(device or torch.get_default_device()))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2 and BatchNorm, (B, h, w, C) to (B, h', w', C')."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class RAVLTStage(nn.Module):
    """Blocks at one resolution and the convolution to the next (None in the last stage)."""

    def __init__(
        self, blocks: Sequence[nn.Module], head_dim: int, dim: int, out_dim: int | None, device=None, dtype=None
    ):
        super().__init__()
        self.RoPE = AxialRoPE(head_dim, device)
        self.blocks = nn.Sequential(*blocks)
        self.downsample = None if out_dim is None else Downsample(dim, out_dim, device, dtype)


class Stem(nn.Module):
    """Four 3 x 3 convolutions with BatchNorm, GELU between them: (B, 3, H, W) to (B, h, w, C)."""

    def __init__(self, in_chans: int, dim: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if stride not in STEM_STRIDES:
            raise ValueError(f'stem_stride must be one of {", ".join(map(str, STEM_STRIDES))}, got {stride!r}')
        first, last = STEM_STRIDES[stride]
        half = dim // 2
        layers: list[nn.Module] = []
        for inside, outside, step in ((in_chans, half, first), (half, half, 1), (half, half, 1), (half, dim, last)):
            layers += [nn.Conv2d(inside, outside, 3, step, 1, **dd), nn.BatchNorm2d(outside, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(x).permute(0, 2, 3, 1)


class RAVLT(PyramidMixin, nn.Module):
    """RAVLT: four stages at strides 4, 8, 16, 32 without a position table; any image size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for pooled features.
        global_pool: `avg`, or '' for the map.
        dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: attention heads of the stages.
        mixers: `linear` (RALA) or `softmax` for each stage.
        mlp_ratio: hidden channels of the FFN over channels.
        layer_scale: initial layer scale of each stage; empty for no layer scale.
        head_width: channels of the 1 x 1 convolution before pooling.
        stem_stride: 4 as published; 2 or 1 for small images, with the same parameters.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, rising linearly over all blocks from 0.
    """

    channels_last = True
    final_names = r'^proj|^norm'

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mixers: tuple[str, ...] = ('linear', 'linear', 'softmax', 'softmax'),
        mlp_ratio: float = 3.5,
        layer_scale: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
        head_width: int = 1024,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '' (no pooling), got {global_pool!r}")
        kinds = {'linear': RankAugmentedAttention, 'softmax': SoftmaxAttention}
        if not set(mixers) <= kinds.keys():
            raise ValueError(f"mixers must name 'linear' or 'softmax' for each stage, got {mixers!r}")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = head_width
        self.grad_checkpointing = False
        self.patch_embed = Stem(in_chans, dims[0], stem_stride, **dd)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        scales = layer_scale or (None,) * len(dims)
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads)):
            blocks = [
                RAVLTBlock(dim, kinds[mixers[i]](dim, heads, **dd), int(mlp_ratio * dim), scales[i], next(rates), **dd)
                for _ in range(depths[i])
            ]
            out_dim = dims[i + 1] if i + 1 < len(dims) else None
            self.layers.append(RAVLTStage(blocks, dim // heads, dim, out_dim, **dd))
            self.feature_info.append(dict(module=f'layers.{i}', num_chs=dim, reduction=stem_stride * 2**i))
        self.proj = Pointwise(dims[-1], head_width, **dd)
        self.norm = nn.BatchNorm2d(head_width, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(head_width, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal convolutions and head of standard deviation 0.02, biases 0, as published."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def final(self, x: Tensor) -> Tensor:
        """SiLU(BatchNorm(1 x 1 convolution)): (B, h, w, C) to (B, head_width, h, w)."""
        if self.proj is None:
            return x.permute(0, 3, 1, 2)
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))

    def drop_final(self) -> None:
        self.proj = self.norm = None

    def token_mixers(self) -> list[tuple[str, str]]:
        """(module name, kind) of every token mixer."""
        return [
            (f'layers.{s}.blocks.{j}.attn', block.attn.kind)
            for s, stage in enumerate(self.layers)
            for j, block in enumerate(stage.blocks)
        ]

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept the head as a 1 x 1 convolution; a file's rotation frequencies must be the ones computed with.

        Raises:
            RuntimeError: if a table in the file holds other frequencies.
        """
        for i, stage in enumerate(self.layers):
            key = f'layers.{i}.RoPE.angle'
            table = state_dict.get(key)
            own = rope_angles(2 * stage.RoPE.angle.shape[0])
            # A hundredth leaves room for tables that were saved in half precision, and for nothing else.
            if table is not None and not table.is_meta and table.shape == own.shape:
                if not torch.allclose(table.detach().float().cpu(), own, rtol=1e-2, atol=1e-7):
                    raise RuntimeError(f'{key} holds other rotation frequencies than 10000^(-t / (m - 1))')
            if table is None or table.shape == own.shape:
                state_dict[key] = own
        return squeeze_linears(self, state_dict)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published or training checkpoint to a state dict: unwraps it, the averaged weights first.

    Of a published detector or segmentor it keeps the backbone, which has no `proj`, `norm` and `head`: such files load
    with `features_only=True`. For the raw weights of a file that holds both, pass
    `pretrained_cfg_overlay={'state_dict': timm.models.load_state_dict(path, use_ema=False)}`.
    """
    return published_weights(state_dict)


def _cfg(file: str = '', top1: float | None = None, **kwargs) -> dict:
    published = dict(hf_hub_id='aldjalkdf/RAVLT', hf_hub_filename=file, license='mit') if file else {}
    if top1 is not None:
        published['description'] = f'ImageNet-1k top-1 {top1} % at 224 px, as published'
    return {
        **published,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj.0',
        'classifier': 'head',
        'paper_ids': 'arXiv:2411.07635',
        'origin_url': 'https://github.com/qhfan/RALA',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'ravlt_tiny.in1k': _cfg('RAVLT_T.pth', 82.8),
        'ravlt_small.in1k': _cfg('RAVLT_S.pth', 84.4),
        'ravlt_base.in1k': _cfg('RAVLT_B.pth', 85.5),
        'ravlt_large.in1k': _cfg('RAVLT_L.pth', 85.8),
        'test_ravlt.untrained': _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_ravlt(variant: str, pretrained: bool = False, **kwargs) -> RAVLT:
    feature_cfg = getter_cfg(kwargs, (0, 1, 2, 3))
    kwargs.pop('img_size', None)  # any size: there is no table to fit
    # A detector's file has the maps but not the head: enough where only the maps are wanted.
    strict = not kwargs.get('features_only', False)
    return build_model_with_cfg(
        RAVLT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=strict,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def ravlt_tiny(pretrained: bool = False, **kwargs) -> RAVLT:
    args = dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    return _create_ravlt('ravlt_tiny', pretrained, **{**args, **kwargs})


@register_model
def ravlt_small(pretrained: bool = False, **kwargs) -> RAVLT:
    args = dict(dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8))
    return _create_ravlt('ravlt_small', pretrained, **{**args, **kwargs})


@register_model
def ravlt_base(pretrained: bool = False, **kwargs) -> RAVLT:
    args = dict(dims=(96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8))
    args |= dict(layer_scale=(1.0, 1.0, 1e-6, 1e-6))
    return _create_ravlt('ravlt_base', pretrained, **{**args, **kwargs})


@register_model
def ravlt_large(pretrained: bool = False, **kwargs) -> RAVLT:
    args = dict(dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(1, 2, 7, 10))
    args |= dict(layer_scale=(1e-6, 1e-6, 1e-6, 1e-6))
    return _create_ravlt('ravlt_large', pretrained, **{**args, **kwargs})


@register_model
def test_ravlt(pretrained: bool = False, **kwargs) -> RAVLT:
    """Tiny RAVLT for tests."""
    args = dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), head_width=128)
    return _create_ravlt('test_ravlt', pretrained, **{**args, **kwargs})
