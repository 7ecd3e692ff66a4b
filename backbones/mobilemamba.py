"""MobileMamba: three-stage backbones that split channels between a scan, wavelets and convolutions.

Paper: MobileMamba: Lightweight Multi-Receptive Visual Mamba Network, arXiv 2411.15941 (CVPR 2025).
Weights and reference: lewandofskee/MobileMamba (MIT). Module names are the keys of the published checkpoints.

Every token mixer is linear in the number of pixels. Maps are (B, C, h, w) in channels-last memory: 1 x 1 convolutions
are matrix products, depthwise convolutions and the scan take the same memory as tokens. `fuse()` folds every BatchNorm
and every other per-channel factor into the convolution beside it, for inference.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SEModule, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from zoo.backbones._features import PyramidMixin, getter_cfg, published_weights, unwrap_checkpoint
from zoo.backbones._folding import Conv, ConvBN, Residual, conv2d, fold, fuse_children, pad_widths
from zoo.kernels.selective_scan import selective_scan_2d
from zoo.kernels.wavelet import haar_signs, wavelet_conv2d

__all__ = ['MobileMamba', 'split_channels']

# The published Haar filters: fp32(0.70710677) ** 2, a hair below one half.
HAAR = 0.49999997

register_notrace_function(selective_scan_2d)
register_notrace_function(wavelet_conv2d)


def depthwise(dim: int, gain: float, **dd) -> Residual:
    """x + BN(3 x 3 depthwise convolution of x)."""
    return Residual(ConvBN(dim, dim, 3, groups=dim, gain=gain, **dd))


class FFN(nn.Module):
    """1 x 1 convolution to twice the channels, ReLU, and back."""

    def __init__(self, dim: int, gain: float, device=None, dtype=None):
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim, device=device, dtype=dtype)
        self.pw2 = ConvBN(2 * dim, dim, gain=gain, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


class PatchMerging(nn.Module):
    """Inverted bottleneck of stride 2 with squeeze-and-excite, four times the channels inside."""

    def __init__(self, dim: int, out: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden = 4 * dim
        self.conv1 = ConvBN(dim, hidden, **dd)
        self.conv2 = ConvBN(hidden, hidden, 3, 2, hidden, **dd)
        self.se = SEModule(hidden, rd_ratio=0.25, **dd)
        self.conv3 = ConvBN(hidden, out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Scale(nn.Module):
    """A factor per channel."""

    def __init__(self, dim: int, value: float, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, dim, 1, 1), value, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


class LocalOp(nn.Module):
    """Depthwise k x k convolution, BatchNorm, ReLU, a factor per channel, BatchNorm.

    The names say 3 x 3 and 1 x 1 as the published keys do.
    """

    def __init__(self, dim: int, kernel: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.dwconv3x3 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(dim, **dd)
        self.dwconv1x1 = nn.Conv2d(dim, dim, 1, groups=dim, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(conv2d(x, self.dwconv3x3.weight)))
        return self.bn2(x * self.dwconv1x1.weight.view(1, -1, 1, 1).to(x.dtype))

    @torch.no_grad()
    def fuse(self) -> FusedLocalOp:
        return FusedLocalOp(*fold(self.dwconv3x3.weight, self.bn1), *fold(self.dwconv1x1.weight, self.bn2))


class FusedLocalOp(Conv):
    """A `LocalOp` after folding: the last two of its steps are a factor and a shift per channel."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor):
        super().__init__(weight, bias)
        self.scale, self.shift = nn.Parameter(scale.view(1, -1, 1, 1)), nn.Parameter(shift.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.weight, self.bias, act='relu')
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


class SS2D(nn.Module):
    """Selective scan over the pixels in row-major order and its reverse, one state per channel.

    Args:
        dim: channels C; 2C inside, low rank C / 16 for the time steps.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        inner, rank, directions = 2 * dim, dim // 16, 2
        self.in_proj = ConvBN(dim, 2 * inner, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(directions, rank + 2, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner, **dd))
        self.A_logs = nn.Parameter(torch.zeros(directions * inner, 1, **dd))
        self.Ds = nn.Parameter(torch.ones(directions * inner, **dd))
        self.out_norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = ConvBN(inner, dim, **dd)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, 0, 0.1)
        nn.init.uniform_(self.dt_projs_bias, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, 1)
        x = conv2d(x, self.conv2d.weight, self.conv2d.bias, act='silu')
        y = selective_scan_2d(
            x, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, directions=2
        )
        y = self.out_norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(z.dtype)
        return self.out_proj(y * F.silu(z))


class WaveletMamba(nn.Module):
    """base_scale * SS2D(x) + depthwise convolution of the Haar bands of x.

    `wt_filter` and `iwt_filter` are the frozen filters as published; what is computed are the sums and differences that
    they stand for, so loading checks that a file holds these and no others.
    """

    def __init__(self, dim: int, kernel: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.register_buffer('wt_filter', _haar_filters(dim, **dd))
        self.register_buffer('iwt_filter', _haar_filters(dim, **dd))
        self.global_atten = SS2D(dim, **dd)
        self.base_scale = Scale(dim, 1.0, **dd)
        self.wavelet_convs = nn.Sequential(
            nn.Conv2d(4 * dim, 4 * dim, kernel, padding=kernel // 2, groups=4 * dim, bias=False, **dd)
        )
        self.wavelet_scale = nn.Sequential(Scale(4 * dim, 0.1, **dd))

    def wavelet_weight(self) -> Tensor:
        """Kernels of the wavelet branch with every factor in them, bands outermost (published: innermost)."""
        if not hasattr(self, 'wavelet_scale'):
            return self.wavelet_convs[0].weight
        weight = self.wavelet_convs[0].weight * self.wavelet_scale[0].weight.view(-1, 1, 1, 1) * HAAR**2
        return weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_scale(self.global_atten(x)) + wavelet_conv2d(x, self.wavelet_weight())

    @torch.no_grad()
    def fuse(self) -> WaveletMamba:
        """Fold the scales into the convolutions beside them and drop the filters."""
        if isinstance(self.global_atten.out_proj, Conv):
            return self
        projection = self.global_atten.out_proj.fuse()
        projection.weight.data *= self.base_scale.weight.view(-1, 1, 1, 1)
        projection.bias.data *= self.base_scale.weight.view(-1)
        self.global_atten.out_proj, self.base_scale = projection, nn.Identity()
        self.wavelet_convs[0].weight = nn.Parameter(self.wavelet_weight().contiguous())
        del self.wavelet_scale, self.wt_filter, self.iwt_filter
        return self


def _haar_filters(dim: int, device=None, dtype=None) -> Tensor:
    """Filters as checkpoints hold them: (4C, 1, 2, 2), bands innermost."""
    return (haar_signs(device, dtype) * HAAR).repeat(dim, 1, 1)[:, None]


def split_channels(dim: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Channels of a stage that go global (the nearest multiple of 16, a tie going up), local, and nowhere."""
    wide = int(global_ratio * dim)
    wide = (wide + 8) // 16 * 16
    local = min(int(local_ratio * dim), dim - wide)
    if wide < 16 or local < 0:
        raise ValueError(
            f'global_ratio = {global_ratio} leaves {wide} of {dim} channels to the scan: 16 to {dim} needed'
        )
    return wide, local, dim - wide - local


class Mixer(nn.Module):
    """Channels split into global (scan and wavelet), local (convolution) and identity; joined, ReLU, projected."""

    def __init__(self, dim: int, split: tuple[int, int, int], kernel: int, gain: float, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.split = split
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, gain=gain, **dd))
        self.global_op = WaveletMamba(split[0], kernel, **dd)
        self.local_op = LocalOp(split[1], kernel, **dd) if split[1] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        wide, local, rest = x.split(self.split, 1)
        return self.proj(torch.cat((self.global_op(wide), self.local_op(local), rest), 1))


class Block(nn.Module):
    """x + five residual modules in a row: the identity path counts twice, as in the published models."""

    def __init__(self, dim: int, split, kernel: int, drop_path: float, gain: float, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.dw0 = depthwise(dim, gain, **dd)
        self.ffn0 = Residual(FFN(dim, gain, **dd))
        self.mixer = Residual(nn.Sequential(OrderedDict(attn=Mixer(dim, split, kernel, gain, **dd))))
        self.dw1 = depthwise(dim, gain, **dd)
        self.ffn1 = Residual(FFN(dim, gain, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


def transition(dim: int, gain: float, **dd) -> nn.Sequential:
    """What stands before and after a PatchMerging."""
    return nn.Sequential(depthwise(dim, 1.0, **dd), Residual(FFN(dim, gain, **dd)))


class Head(nn.Module):
    """BatchNorm of the pooled features, linear classifier."""

    def __init__(self, dim: int, num_classes: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(dim, **dd)
        self.l = nn.Linear(dim, num_classes, **dd) if num_classes else nn.Identity()
        if num_classes:
            trunc_normal_(self.l.weight, std=0.02)
            nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    @torch.no_grad()
    def fuse(self) -> Head:
        """Fold the norm into the classifier; without classes it stays."""
        if isinstance(self.l, nn.Linear) and isinstance(self.bn, nn.BatchNorm1d):
            scale, shift = fold(torch.ones_like(self.bn.weight), self.bn)
            self.l.bias.data += self.l.weight @ shift
            self.l.weight.data *= scale
            self.bn = nn.Identity()
        return self


class MobileMamba(PyramidMixin, nn.Module):
    """MobileMamba: stem of stride 16, stages at strides 16, 32, 64; any image size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for pooled features.
        global_pool: `avg`, or '' for the map.
        dims: channels of the stages.
        depths: blocks of the stages.
        global_ratios: share of the channels that the scan sees, see `split_channels`.
        local_ratios: share of the channels of the local convolutions.
        kernels: sizes of the local and wavelet convolutions of the stages.
        stem_stride: 16, or 8, 4, 2, 1 for small images; the first convolutions of the stem are then not strided.
        distillation: a second head for the teacher; training gives the pair of logits, evaluation their mean.
        fuse: the network is meant to be folded: it takes folded files too, and `create_model` calls `fuse` once
            weights are there.
        zero_init: start every residual branch of a block at zero, as published; otherwise gains start at 1.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    classifier_name = 'head.l'

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        dims: tuple[int, int, int] = (144, 272, 368),
        depths: tuple[int, int, int] = (1, 2, 2),
        global_ratios: tuple[float, float, float] = (0.8, 0.7, 0.6),
        local_ratios: tuple[float, float, float] = (0.2, 0.2, 0.3),
        kernels: tuple[int, int, int] = (7, 5, 3),
        stem_stride: int = 16,
        distillation: bool = False,
        fuse: bool = False,
        zero_init: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        # What it takes to build the same network again, unfolded, to load weights that are not folded.
        self.config = {k: v for k, v in locals().items() if k not in ('self', '__class__', 'device', 'dtype')}
        dd = dict(device=device, dtype=dtype)
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '' (no pooling), got {global_pool!r}")
        if distillation and not global_pool:
            raise ValueError("distillation=True needs global_pool='avg': its two heads take pooled features")
        if stem_stride not in (1, 2, 4, 8, 16):
            raise ValueError(f'stem_stride must be 1, 2, 4, 8 or 16, got {stem_stride}')
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        gain = 0.0 if zero_init else 1.0
        self.patch_embed = nn.Sequential()
        strided, width = stem_stride.bit_length() - 1, in_chans
        for i, out in enumerate((dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0])):
            self.patch_embed.append(ConvBN(width, out, 3, 2 if i >= 4 - strided else 1, **dd))
            self.patch_embed.extend([nn.ReLU()] if i < 3 else [])
            width = out
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        self.feature_info = []
        for s, (dim, depth) in enumerate(zip(dims, depths)):
            stage = nn.Sequential()
            if s:
                stage.extend(
                    [transition(width, gain, **dd), PatchMerging(width, dim, **dd), transition(dim, gain, **dd)]
                )
            split = split_channels(dim, global_ratios[s], local_ratios[s])
            stage.extend([Block(dim, split, kernels[s], next(rates), gain, **dd) for _ in range(depth)])
            setattr(self, f'blocks{s + 1}', stage)
            self.feature_info.append(dict(module=f'blocks{s + 1}', num_chs=dim, reduction=stem_stride * 2**s))
            width = dim
        self.num_stages = len(dims)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = Head(width, num_classes, **dd)
        self.head_dist = Head(width, num_classes, **dd) if distillation else None

    @torch.no_grad()
    def fuse(self) -> MobileMamba:
        """Fold, in place, every BatchNorm and every factor per channel into the convolution beside it; for inference.

        Also folded: the identity beside depthwise convolutions, the wavelet filters' factor; widths of the stem become
        multiples of 8. Logits stay the same up to rounding; what `forward_head(pre_logits=True)` gives are then pooled
        features before the head's norm. A fused model takes fused and published weights.
        """
        if not self.folded:
            fuse_children(self)
            pad_widths([m for m in self.patch_embed if isinstance(m, Conv)])
        return self.eval()

    @property
    def folded(self) -> bool:
        """Whether `fuse` was called."""
        return isinstance(self.patch_embed[0], Conv)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load published or own weights; a fused model folds weights that are not.

        Raises:
            RuntimeError: if keys or shapes do not fit, wavelet filters are not Haar's, or the file is folded and the
                model is not.
        """
        state_dict = unwrap_checkpoint(state_dict)
        folded_file = 'patch_embed.0.weight' in state_dict
        if folded_file and self.config['fuse']:
            self.fuse()
        if folded_file and not self.folded:
            raise RuntimeError(
                'these weights have their BatchNorms folded, this model has not: load weights with the keys '
                'patch_embed.0.c.weight, ..., or build the model with fuse=True if `zoo export --fuse` wrote the file'
            )
        if self.folded and not folded_file:
            whole = type(self)(**{**self.config, 'num_classes': self.num_classes})
            whole.load_state_dict(state_dict, strict)
            state_dict = whole.fuse().state_dict()
        return super().load_state_dict(state_dict, strict, assign)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check the wavelet filters; give both heads of a distillation model what a file has for one."""
        for key, value in state_dict.items():
            if key.endswith('wt_filter') and value.ndim == 4:
                haar = _haar_filters(value.shape[0] // 4, device=value.device, dtype=torch.float32)
                if value.shape != haar.shape or not torch.allclose(value.float(), haar, rtol=0, atol=1e-6):
                    raise RuntimeError(f'{key} does not hold the Haar filters, the only ones this model computes')
        if self.head_dist is not None and not any(k.startswith('head_dist.') for k in state_dict):
            state_dict |= {f'head_dist.{k[5:]}': v for k, v in state_dict.items() if k.startswith('head.')}
        return state_dict

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = r'^blocks(\d+)' if coarse else r'^blocks(\d+)\.(\d+)'
        return dict(stem=r'^patch_embed', blocks=[(blocks, None), (r'^head(?:_dist)?\.bn', (99999,))])

    def stage_parts(self) -> list[tuple[Sequence[nn.Module], Sequence[nn.Module]]]:
        stages = [list(getattr(self, f'blocks{s + 1}')) for s in range(self.num_stages)]
        return [([], stages[0]), *((stage[:3], stage[3:]) for stage in stages[1:])]

    def final(self, x: Tensor) -> Tensor:
        return x

    def intermediate_norm(self, x: Tensor) -> Tensor:
        """Nothing: the only norm outside blocks is that of the pooled features."""
        return x

    def keep_stages(self, n: int) -> None:
        for s in range(n, self.num_stages):
            delattr(self, f'blocks{s + 1}')
        self.num_stages = n

    def drop_final(self) -> None:
        self.head.bn = nn.Identity()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head.l if self.head_dist is None else (self.head.l, self.head_dist.l)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, `global_pool=''` the unpooled map."""
        if self.head_dist is not None and global_pool == '':
            raise ValueError("distillation=True needs global_pool='avg': its two heads take pooled features")
        super().reset_classifier(num_classes, global_pool)
        if self.head_dist is not None:
            self.head_dist.l = copy.deepcopy(self.head.l)
            if num_classes:
                trunc_normal_(self.head_dist.l.weight, std=0.02)

    def norm_pooled(self, x: Tensor) -> Tensor:
        if self.head_dist is not None:
            return x  # each head has its own norm
        if self.global_pool:
            return self.head.bn(x)
        height, width = x.shape[2:]
        return self.head.bn(x.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)

    def classify(self, x: Tensor):
        if self.head_dist is None:
            return self.head.l(x)
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def token_mixers(self) -> list[tuple[str, str]]:
        """(module name, kind) of every token mixer: all are linear in the number of pixels."""
        names = []
        for name, module in self.named_modules():
            if isinstance(module, WaveletMamba):
                kernel = module.wavelet_convs[0].weight.shape[-1]
                names.append((f'{name}.global_atten', 'selective scan in two directions (linear)'))
                names.append((f'{name}.wavelet_convs', f'{kernel} x {kernel} convolution of Haar bands (linear)'))
            elif isinstance(module, (LocalOp, FusedLocalOp)):
                names.append((name, 'depthwise convolution (linear)'))
        return names


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Published file, trainer checkpoint (`net_E`, the averaged weights, before `net`) or own checkpoint, bare.

    Of a published detector or segmentor it keeps the backbone, to be loaded with `features_only=True`.
    """
    return published_weights(state_dict)


def _cfg(size: int = 192, file: str = '', top1: float | None = None, **kwargs) -> dict:
    published = dict(hf_hub_id='Lewandofski/MobileMamba', hf_hub_filename=file, license='mit') if file else {}
    if top1 is not None:
        published['description'] = f'ImageNet-1k top-1 {top1} % at {size} px, as published'
    return {
        **published,
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': (-(-size // 64),) * 2,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.0.c',
        'classifier': 'head.l',
        'paper_ids': 'arXiv:2411.15941',
        'origin_url': 'https://github.com/lewandofskee/MobileMamba',
        **kwargs,
    }


# Input size and published top-1 (%): trained 300 epochs, and 1000 epochs with a teacher ("dagger" in the paper).
_PUBLISHED = {
    't2': (192, 73.6, 76.9),
    't4': (192, 76.1, 78.9),
    's6': (224, 78.0, 80.7),
    'b1': (256, 79.9, 82.2),
    'b2': (384, 81.6, 83.3),
    'b4': (512, 82.5, 83.6),
}


def _published_cfgs() -> dict[str, dict]:
    cfgs = {}
    for variant, (size, top1, distilled) in _PUBLISHED.items():
        for tag, suffix, accuracy in (('in1k', '', top1), ('in1k_kd', 's', distilled)):
            folder, file = f'MobileMamba_{variant.upper()}{suffix}', f'mobilemamba_{variant}{suffix}.pth'
            cfgs[f'mobilemamba_{variant}.{tag}'] = _cfg(size, f'{folder}/{file}', accuracy)
    return cfgs


default_cfgs = generate_default_cfgs({**_published_cfgs(), 'test_mobilemamba.untrained': _cfg(128)})


def _create(variant: str, pretrained: bool = False, **kwargs) -> MobileMamba:
    feature_cfg = getter_cfg(kwargs, (0, 1, 2))
    kwargs.pop('img_size', None)  # any size: there is no table to fit
    if kwargs.get('distillation'):
        overlay = dict(classifier=('head.l', 'head_dist.l'))
        kwargs['pretrained_cfg_overlay'] = {**overlay, **(kwargs.get('pretrained_cfg_overlay') or {})}
    model = build_model_with_cfg(
        MobileMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    if kwargs.get('fuse'):
        (model.model if kwargs.get('features_only') else model).fuse()
    return model


_B = dict(dims=(200, 376, 448), depths=(2, 3, 2), drop_path_rate=0.03)


@register_model
def mobilemamba_t2(pretrained: bool = False, **kwargs) -> MobileMamba:
    return _create('mobilemamba_t2', pretrained, **{**dict(dims=(144, 272, 368)), **kwargs})


@register_model
def mobilemamba_t4(pretrained: bool = False, **kwargs) -> MobileMamba:
    return _create('mobilemamba_t4', pretrained, **{**dict(dims=(176, 368, 448)), **kwargs})


@register_model
def mobilemamba_s6(pretrained: bool = False, **kwargs) -> MobileMamba:
    return _create('mobilemamba_s6', pretrained, **{**dict(dims=(192, 384, 448)), **kwargs})


@register_model
def mobilemamba_b1(pretrained: bool = False, **kwargs) -> MobileMamba:
    """For 256 px; `mobilemamba_b2` and `mobilemamba_b4` are the same network for 384 and 512 px."""
    return _create('mobilemamba_b1', pretrained, **{**_B, **kwargs})


@register_model
def mobilemamba_b2(pretrained: bool = False, **kwargs) -> MobileMamba:
    return _create('mobilemamba_b2', pretrained, **{**_B, **kwargs})


@register_model
def mobilemamba_b4(pretrained: bool = False, **kwargs) -> MobileMamba:
    return _create('mobilemamba_b4', pretrained, **{**_B, **kwargs})


@register_model
def test_mobilemamba(pretrained: bool = False, **kwargs) -> MobileMamba:
    """Tiny MobileMamba for tests; its residual branches do not start at zero, so that they can be seen."""
    args = dict(dims=(48, 64, 80), depths=(1, 1, 1), zero_init=False)
    return _create('test_mobilemamba', pretrained, **{**args, **kwargs})
