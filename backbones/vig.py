"""ViG and ViG-H: vision backbones on bidirectional gated linear attention with 2D gated locality injection.

Paper: ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention, arXiv 2405.18425 (AAAI 2025).
Weights and reference: hustvl/ViG (Apache-2.0). Not to be confused with Vision GNN, which shares the name.

Every token mixer is linear in the number of tokens; there is no softmax attention. Module names are the keys of the
published checkpoints. Maps are channels-last (B, h, w, C) between modules: tokens and pixels are the same memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from zoo.backbones._features import PyramidMixin, TokenMixin, getter_cfg, published_weights, squeeze_linears
from zoo.backbones._folding import to_channels_last
from zoo.backbones._layers import LayerNorm, LayerNorm2d, RMSNorm, is_bare
from zoo.backbones._vig_block import HierSwiGLU, SwiGLU, ViGMixer, ViGPreNormBlock, swiglu_width
from zoo.kernels import _dispatch
from zoo.kernels.conv_norm import conv_norm, fits_conv_norm

__all__ = ['HierViG', 'ViG', 'ViGMixer']

XAVIER_GAIN = 2**-2.5


class ChannelsLast(nn.Module):
    """NCHW to NHWC, a view for maps in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """NHWC to NCHW, a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ViGPatchEmbed(nn.Module):
    """Two strided convs: kernel p/2 + 1 with stride p/2, then 3 x 3 with stride 2. (B, 3, H, W) to (B, h, w, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if patch_size < 4 or patch_size % 4:
            raise ValueError(f'patch_size must be a multiple of 4 for the two strided convs, got {patch_size}')
        half = patch_size // 2
        self.half = half
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, half + 1, half, 1, **dd),
            LayerNorm2d(dim // 2, **dd),
            nn.SiLU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
            LayerNorm2d(dim, starts_stream=True, **dd),
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of an image (H, W)."""
        return self.second_grid(tuple((n + 1 - self.half) // self.half + 1 for n in size))

    @staticmethod
    def second_grid(size: tuple[int, int]) -> tuple[int, int]:
        """Token grid from the size of the map between the convolutions."""
        return tuple((n - 1) // 2 + 1 for n in size)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fused(x):
            return self.fused(x, None, (0, 0))
        return self.proj(to_channels_last(x)).permute(0, 2, 3, 1)

    def is_fused(self, x: Tensor) -> bool:
        """Whether the first convolution of these images and what follows it is one kernel."""
        return all(is_bare(module) for module in (self.proj, *self.proj)) and fits_conv_norm(x, self.proj[0].weight)

    def fused(self, x: Tensor, pos_embed: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Embedded images, with a position table (1, N, C) of `grid` added if there is one."""
        conv, norm, _, conv2, norm2 = self.proj
        x = _conv_norm(x, conv, norm, 'silu')
        if fits_conv_norm(x, conv2.weight):
            table = None
            if pos_embed is not None:
                table = position_table(pos_embed, grid, self.second_grid(x.shape[1:3])).flatten(0, 1)
            return _conv_norm(x.permute(0, 3, 1, 2), conv2, norm2, None, table)
        x = norm2(conv2(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return x if pos_embed is None else add_pos_embed(x, pos_embed, grid)


def _conv_norm(x: Tensor, conv: nn.Conv2d, norm: LayerNorm2d, activation: str | None, table: Tensor | None = None):
    return conv_norm(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        stride=conv.stride[0],
        padding=conv.padding[0],
        activation=activation,
        table=table,
        dtype=torch.promote_types(x.dtype, norm.weight.dtype) if norm.starts_stream else None,
    )


def position_table(pos_embed: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A position table (1, N, C) of `grid` as (h, w, C) for another size, resampled (bicubic) where they differ."""
    table = pos_embed.unflatten(1, grid)
    # Exported programs always resample: a size that is only known at run time cannot choose.
    if _dispatch.exporting() or tuple(size) != tuple(grid):
        table = F.interpolate(
            table.to(torch.promote_types(table.dtype, torch.float32)).permute(0, 3, 1, 2),
            size=size,
            mode='bicubic',
            align_corners=False,
        ).permute(0, 2, 3, 1)
    return table[0]


@register_notrace_function
def add_pos_embed(x: Tensor, pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add a position table (1, N, C) of `grid` to a map (B, h, w, C), resampled where the grids differ."""
    return x + position_table(pos_embed, grid, x.shape[1:3]).to(x.dtype)


class ViGBlock(ViGPreNormBlock):
    """x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)), on (B, h, w, C)."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, device=None, dtype=None, **mixer):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.attn_norm = RMSNorm(dim, **dd)
        self.attn = ViGMixer(dim, num_heads, **mixer, **dd)
        self.mlp_norm = RMSNorm(dim, **dd)
        self.mlp = SwiGLU(dim, swiglu_width(dim, 256 if dim >= 128 else 32), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def branches(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.attn_norm, self.attn), (self.mlp_norm, self.mlp)


class ViG(TokenMixin, nn.Module):
    """Plain ViG: patch embedding, position table, blocks on one token grid, mean over the tokens, linear head.

    Args:
        img_size: image size whose grid the position table has; any other size resamples it at run time.
        patch_size: multiple of 4.
        in_chans: image channels.
        num_classes: classes, 0 for pooled features.
        global_pool: `avg`, or '' for tokens.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads of the mixer.
        conv_act: SiLU after the mixer's conv (ViG-T).
        out_act: SiLU before the mixer's output projection (ViG-T).
        merge_scale: factor on the sum of the scan directions; 1/4 is what the published accuracies were measured with.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        conv_act: bool = False,
        out_act: bool = False,
        merge_scale: float = 0.25,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '' (no pooling), got {global_pool!r}")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = ViGPatchEmbed(in_chans, embed_dim, patch_size, **dd)
        self.grid_size = self.patch_embed.grid(to_2tuple(img_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid_size), embed_dim, **dd))
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        mixer = dict(conv_act=conv_act, out_act=out_act, merge_scale=merge_scale)
        self.blocks = nn.Sequential(*(ViGBlock(embed_dim, num_heads, rates[i], **mixer, **dd) for i in range(depth)))
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=patch_size) for i in range(depth)]
        self.norm = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Normal(0, 0.02) linears and position table, Xavier with gain 2 ** -2.5 inside the mixers."""
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for module in block.attn.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.xavier_uniform_(module.weight, gain=XAVIER_GAIN)

    def token_mixers(self) -> list[tuple[str, str]]:
        """(module name, kind) of every token mixer."""
        return [(f'blocks.{i}.attn', 'bidirectional gated linear attention (linear)') for i in range(len(self.blocks))]

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the position table of another (square) image size; see `checkpoint_filter_fn` for the rest."""
        table = state_dict.get('pos_embed')
        if table is not None and table.ndim == 3 and table.shape[1] != self.pos_embed.shape[1]:
            side = math.isqrt(table.shape[1])
            if side * side == table.shape[1]:
                table = table.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
                table = F.interpolate(table, size=self.grid_size, mode='bicubic', align_corners=False)
                state_dict['pos_embed'] = table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return squeeze_linears(self, state_dict)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to embedded tokens (B, h, w, C)."""
        if is_bare(self.patch_embed) and self.patch_embed.is_fused(x):
            return self.patch_embed.fused(x, self.pos_embed, self.grid_size)
        x = self.patch_embed(x)
        return add_pos_embed(x, self.pos_embed, self.grid_size)


class HierBlock(ViGPreNormBlock):
    """x + mixer(LayerNorm(x)), then x + SwiGLU(LayerNorm(x)), on (B, h, w, C)."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, merge_scale: float, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm = LayerNorm(dim, **dd)
        self.op = ViGMixer(dim, num_heads, merge_scale=merge_scale, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = HierSwiGLU(dim, swiglu_width(dim, 32), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def branches(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.norm, self.op), (self.norm2, self.mlp)


class HierStage(nn.Module):
    """Blocks at one resolution and the strided conv to the next (None in the last stage)."""

    def __init__(self, blocks: list[nn.Module], dim: int, out_dim: int | None, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.blocks = nn.Sequential(*blocks)
        self.downsample = None
        if out_dim is not None:
            self.downsample = nn.Sequential(
                ChannelsFirst(),
                nn.Conv2d(dim, out_dim, 3, 2, 1, **dd),
                ChannelsLast(),
                LayerNorm(out_dim, starts_stream=True, **dd),
            )


class HierViG(PyramidMixin, nn.Module):
    """ViG-H: four stages at strides 4, 8, 16, 32, no position table; any image size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for pooled features.
        global_pool: `avg`, or '' for the map.
        dims: channels of the stages.
        depths: blocks of the stages.
        head_dim: value channels per head; keys have half.
        stem_stride: 4 as published; 2 or 1 for small images, with the same parameters.
        merge_scale: factor on the sum of the scan directions.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    channels_last = True
    classifier_name = 'classifier.head'
    final_names = r'^classifier\.norm'

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        head_dim: int = 32,
        stem_stride: int = 4,
        merge_scale: float = 0.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '' (no pooling), got {global_pool!r}")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        if stem_stride not in (1, 2, 4):
            raise ValueError(f'stem_stride must be 1, 2 or 4, got {stem_stride!r}')
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, 2 if stem_stride == 4 else 1, 1, **dd),
            ChannelsLast(),
            LayerNorm(dims[0] // 2, **dd),
            ChannelsFirst(),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2 if stem_stride > 1 else 1, 1, **dd),
            ChannelsLast(),
            LayerNorm(dims[0], starts_stream=True, **dd),
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            blocks = [HierBlock(dim, dim // head_dim, next(rates), merge_scale, **dd) for _ in range(depth)]
            self.layers.append(HierStage(blocks, dim, dims[i + 1] if i + 1 < len(dims) else None, **dd))
            self.feature_info.append(dict(module=f'layers.{i}', num_chs=dim, reduction=stem_stride * 2**i))
        self.classifier = nn.Module()
        self.classifier.norm = LayerNorm(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal linears; the mixers' depthwise convs keep the Xavier gain 2 ** -2.5."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ViGMixer):
                nn.init.xavier_uniform_(module.in_proj[0].weight, gain=XAVIER_GAIN)

    def final(self, x: Tensor) -> Tensor:
        return self.classifier.norm(x).permute(0, 3, 1, 2)

    def intermediate_norm(self, x: Tensor) -> Tensor:
        return self.classifier.norm(x)

    def drop_final(self) -> None:
        self.classifier.norm = nn.Identity()

    def token_mixers(self) -> list[tuple[str, str]]:
        """(module name, kind) of every token mixer."""
        kind = 'bidirectional gated linear attention (linear)'
        return [
            (f'layers.{s}.blocks.{j}.op', kind) for s, stage in enumerate(self.layers) for j in range(len(stage.blocks))
        ]

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept linears stored as 1 x 1 convolutions."""
        return squeeze_linears(self, state_dict)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published or training checkpoint to a state dict: unwraps it and renames older ViG-H keys."""
    state_dict = published_weights(state_dict)
    if not isinstance(model, HierViG):
        return state_dict
    renames = {'patch_embed.proj.': 'patch_embed.0.', 'patch_embed.norm.': 'patch_embed.2.'}
    renames |= {'norm.': 'classifier.norm.', 'head.': 'classifier.head.'}
    out = {}
    for key, value in state_dict.items():
        for old, new in renames.items():
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        if key.startswith('layers.'):
            key = key.replace('.ln_1.', '.norm.').replace('.self_attention.', '.op.')
        out[key] = value
    return out


def _cfg(file: str = '', top1: float | None = None, **kwargs) -> dict:
    published = dict(hf_hub_id='hustvl/ViG', hf_hub_filename=file, license='apache-2.0') if file else {}
    if top1 is not None:
        published['description'] = f'ImageNet-1k top-1 {top1} % at 224 px, as published'
    return {
        **published,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj.0',
        'classifier': 'head',
        'paper_ids': 'arXiv:2405.18425',
        'origin_url': 'https://github.com/hustvl/ViG',
        **kwargs,
    }


def _hier_cfg(file: str = '', top1: float | None = None, **kwargs) -> dict:
    hier = dict(first_conv='patch_embed.0', classifier='classifier.head', pool_size=(7, 7))
    return _cfg(file, top1, **{**hier, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        'vig_tiny_patch16_224.in1k': _cfg('vig_t_77p2acc.pth', 77.2),
        'vig_small_patch16_224.in1k': _cfg('vig_s_81p7acc.pth', 81.7),
        'vig_base_patch16_224.in1k': _cfg('vig_b_82p6acc.pth', 82.6),
        'vig_hier_tiny_224.in1k': _hier_cfg('vig_h_t_82p8acc.pth', 82.8),
        'vig_hier_small_224.in1k': _hier_cfg('vig_h_s_83p8acc.pth', 83.8),
        'vig_hier_base_224.in1k': _hier_cfg('vig_h_b_84p2acc.pth', 84.2),
        'test_vig.untrained': _cfg(input_size=(3, 96, 96)),
        'test_vig_hier.untrained': _hier_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_vig(variant: str, pretrained: bool = False, **kwargs) -> ViG:
    feature_cfg = getter_cfg(kwargs, 3)
    return build_model_with_cfg(
        ViG,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


def _create_hier(variant: str, pretrained: bool = False, **kwargs) -> HierViG:
    feature_cfg = getter_cfg(kwargs, (0, 1, 2, 3))
    kwargs.pop('img_size', None)  # any size: there is no table to fit
    return build_model_with_cfg(
        HierViG,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def vig_tiny_patch16_224(pretrained: bool = False, **kwargs) -> ViG:
    args = dict(embed_dim=192, depth=12, num_heads=3, conv_act=True, out_act=True)
    return _create_vig('vig_tiny_patch16_224', pretrained, **{**args, **kwargs})


@register_model
def vig_small_patch16_224(pretrained: bool = False, **kwargs) -> ViG:
    args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create_vig('vig_small_patch16_224', pretrained, **{**args, **kwargs})


@register_model
def vig_base_patch16_224(pretrained: bool = False, **kwargs) -> ViG:
    args = dict(embed_dim=768, depth=12, num_heads=12)
    return _create_vig('vig_base_patch16_224', pretrained, **{**args, **kwargs})


@register_model
def vig_hier_tiny_224(pretrained: bool = False, **kwargs) -> HierViG:
    args = dict(dims=(96, 192, 384, 768), depths=(2, 2, 5, 2))
    return _create_hier('vig_hier_tiny_224', pretrained, **{**args, **kwargs})


@register_model
def vig_hier_small_224(pretrained: bool = False, **kwargs) -> HierViG:
    args = dict(dims=(96, 192, 384, 768), depths=(2, 2, 17, 2))
    return _create_hier('vig_hier_small_224', pretrained, **{**args, **kwargs})


@register_model
def vig_hier_base_224(pretrained: bool = False, **kwargs) -> HierViG:
    args = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 17, 2))
    return _create_hier('vig_hier_base_224', pretrained, **{**args, **kwargs})


@register_model
def test_vig(pretrained: bool = False, **kwargs) -> ViG:
    """Tiny plain ViG for tests."""
    args = dict(img_size=96, embed_dim=64, depth=3, num_heads=2, conv_act=True, out_act=True)
    return _create_vig('test_vig', pretrained, **{**args, **kwargs})


@register_model
def test_vig_hier(pretrained: bool = False, **kwargs) -> HierViG:
    """Tiny ViG-H for tests."""
    args = dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=16)
    return _create_hier('test_vig_hier', pretrained, **{**args, **kwargs})
