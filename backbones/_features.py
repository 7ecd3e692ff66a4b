"""Interface methods shared by the backbones: one mixin for token models, one for pyramids.

A family defines its parts and the few hooks named in a mixin's docstring; everything that timm asks of a model
(classifier access, intermediates, pruning, gradient checkpointing, readable loading errors) is here once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from zoo.backbones._folding import to_channels_last
from zoo.backbones._layers import Normed, Pending, PreNormBlock, add_pending, add_then_norm

__all__ = ['PyramidMixin', 'TokenMixin', 'getter_cfg', 'published_weights', 'squeeze_linears', 'unwrap_checkpoint']

_WRAPPERS = ('state_dict_ema', 'model_ema', 'net_E', 'state_dict', 'model', 'net')  # averaged weights first
_RUN_PARTS = ('ema.module.', 'net.')  # the network in a checkpoint of `zoo fit`, averaged weights first
_ADDED_NORMS = ('extra_norms.', 'outnorm')  # the authors' names for the norms of a pyramid's maps


def unwrap_checkpoint(state_dict: Mapping) -> dict[str, Tensor]:
    """The bare state dict inside a published checkpoint or a training checkpoint, EMA weights first."""
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    prefixes = ('module.', '_orig_mod.')
    out = {}
    for key, value in state_dict.items():
        while key.startswith(prefixes):
            key = key.split('.', 1)[1]
        out[key] = value
    for part in _RUN_PARTS:
        if inside := {k.removeprefix(part): v for k, v in out.items() if k.startswith(part)}:
            return inside
    return out


def published_weights(state_dict: Mapping) -> dict[str, Tensor]:
    """`unwrap_checkpoint`; of a detector or segmentor the backbone alone, without the norms added to its maps."""
    out = unwrap_checkpoint(state_dict)
    inside = {k.removeprefix('backbone.'): v for k, v in out.items() if k.startswith('backbone.')}
    return {k: v for k, v in inside.items() if not k.startswith(_ADDED_NORMS)} if inside else out


def getter_cfg(kwargs: dict, out_indices: int | Sequence[int]) -> dict:
    """timm's `feature_cfg` of a model whose maps come from `forward_intermediates`, out of `kwargs`.

    timm's other wrappers read the outputs of submodules, which here are not the maps that `feature_info` describes.

    Raises:
        ValueError: `kwargs` ask for another wrapper.
    """
    if (wanted := kwargs.pop('feature_cls', 'getter')) not in (None, 'getter', FeatureGetterNet):
        raise ValueError(
            f"feature_cls={wanted!r} would not give this model's maps: leave it out (features_only=True takes 'getter')"
        )
    return dict(out_indices=kwargs.pop('out_indices', out_indices), feature_cls='getter')


def _few(items: Sequence[str], limit: int = 6) -> str:
    more = f', ... ({len(items) - limit} more)' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more


class _CommonMixin:
    """What tokens and pyramids share; loading errors name a handful of keys and shapes, not all of them."""

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load weights, bare or in a checkpoint.

        Raises:
            RuntimeError: if keys or shapes do not fit, listing the first few of each kind; without `strict` only for
                shapes, and where not a single key is known.
        """
        own = self.state_dict()
        given = unwrap_checkpoint(state_dict)
        strict = strict or bool(given) and own.keys().isdisjoint(given)
        fitted = self.adapt_state_dict(given)
        shapes = [
            f'{k}: file {tuple(fitted[k].shape)}, model {tuple(own[k].shape)}'
            for k in fitted
            if k in own and fitted[k].shape != own[k].shape
        ]
        missing = [k for k in own if k not in fitted] if strict else []
        unexpected = [k for k in fitted if k not in own] if strict else []
        if shapes or missing or unexpected:
            parts = [f'these weights do not fit {type(self).__name__} with {len(own)} tensors:']
            for title, items in (('missing', missing), ('unexpected', unexpected), ('other shape', shapes)):
                if items:
                    parts.append(f'  {title} ({len(items)}): {_few(items)}')
            parts.append('Check that the name, num_classes and img_size given are those of the checkpoint.')
            raise RuntimeError('\n'.join(parts))
        return super().load_state_dict(fitted, strict=strict, assign=assign)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hook: rename, reshape or resample tensors of a foreign checkpoint."""
        return state_dict

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()


class TokenMixin(_CommonMixin):
    """Interface of models that keep one token grid.

    Needs `blocks`, `norm`, `head`, `head_drop`, `global_pool`, `num_features`, `num_classes` and the hook `embed(x)`:
    images to tokens on their grid (B, h, w, C).
    """

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^pos_embed|^patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', MATCH_PREV_GROUP)])

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, `global_pool=''` unpooled tokens."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = _new_head(self.num_features, num_classes, self.norm.weight)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """Features after chosen blocks.

        Args:
            x: images (B, 3, H, W).
            indices: blocks to take: the last n if an int, all if None.
            norm: apply the final norm to the intermediates.
            stop_early: do not run the blocks after the last one taken.
            output_fmt: `NCHW` maps (B, C, h, w) or `NLC` tokens (B, h w, C).
            intermediates_only: return only the list.

        Returns:
            The list of intermediates, or the final features and the list.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self.embed(x)
        found = []
        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        for i, block in enumerate(blocks):
            x = _run(self, [block], x)
            if i in take:
                y = self.norm(x) if norm else x
                found.append(y.permute(0, 3, 1, 2) if output_fmt == 'NCHW' else y.flatten(1, 2))
        if intermediates_only:
            return found
        return self.norm(x).flatten(1, 2), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one of `indices`, and the norm and head if asked."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.num_classes, self.head = 0, nn.Identity()
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to normalised tokens (B, h w, C)."""
        y, _ = add_then_norm(self.norm, *_run_pending(self, self.blocks, self.embed(x), self.norm))
        return y.flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, h w, C) to logits, or to pooled features with `pre_logits`."""
        if self.global_pool == 'avg':
            x = x.mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class PyramidMixin(_CommonMixin):
    """Interface of models with stages of falling resolution.

    A family sets `num_features` (channels of `forward_features`), `num_classes`, `global_pool`, `head_drop`,
    `grad_checkpointing` and the class attributes, and defines

    - `final(x)`: the last map to the map (B, num_features, h, w) that is pooled;
    - `drop_final()`: make `final` the identity (to NCHW).

    Its parts are `patch_embed` and `layers`, each with `blocks` and a `downsample` behind them (None in the last), or
    it defines these too:

    - `stem(x)`: images (B, 3, H, W) to the first map;
    - `stage_parts()`: of every stage, the modules that enter it (its downsampling, empty for the first) and its blocks;
    - `keep_stages(n)`: drop the stages after the n-th;
    - `group_matcher(coarse)`: timm's grouping of parameters by depth.
    """

    channels_last = False  # whether maps between stages are (B, h, w, C) rather than (B, C, h, w)
    classifier_name = 'head'  # path of the linear layer that gives the logits

    final_names = ''  # pattern of the parameters of `final`

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        last = (self.final_names, MATCH_PREV_GROUP)
        if coarse:
            return dict(stem=r'^patch_embed', blocks=[(r'^layers\.(\d+)', None), last])
        downsample = (r'^layers\.(\d+)\.downsample', MATCH_PREV_GROUP)  # with the last block of its stage
        blocks = [downsample, (r'^layers\.(\d+)\.blocks\.(\d+)', None), last]
        return dict(stem=r'^patch_embed', blocks=blocks)

    def stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(to_channels_last(x))

    def stage_parts(self) -> list[tuple[Sequence[nn.Module], Sequence[nn.Module]]]:
        entries = [[], *([stage.downsample] for stage in self.layers[:-1])]
        return [(entry, stage.blocks) for entry, stage in zip(entries, self.layers)]

    def keep_stages(self, n: int) -> None:
        self.layers = self.layers[:n]
        self.layers[-1].downsample = None

    def _in_format(self, x: Tensor, output_fmt: str) -> Tensor:
        if self.channels_last == (output_fmt == 'NHWC'):
            return x
        return x.permute(0, 3, 1, 2) if self.channels_last else x.permute(0, 2, 3, 1)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, `global_pool=''` the unpooled map."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.set_submodule(
            self.classifier_name, _new_head(self.num_features, num_classes, next(self.parameters())), strict=True
        )

    def intermediate_norm(self, x: Tensor) -> Tensor:
        """The final norm on the last stage's map, for models whose norm keeps its width."""
        raise ValueError(f'{type(self).__name__} has no norm that fits its intermediates: norm must be False')

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """Features of chosen stages, before their downsampling.

        Args:
            x: images (B, 3, H, W).
            indices: stages to take: the last n if an int, all if None.
            norm: apply the final norm to the last stage's features, the only ones it fits.
            stop_early: do not run the stages after the last one taken.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: return only the list.

        Returns:
            The list of maps, or the final features (B, C, h, w) and the list.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        parts = self.stage_parts()
        take, last = feature_take_indices(len(parts), indices)
        x = self.stem(x)
        found = []
        for i, (entry, blocks) in enumerate(parts[: last + 1] if stop_early else parts):
            x = _run(self, blocks, _run(self, entry, x))
            if i in take:
                y = self.intermediate_norm(x) if norm and i == len(parts) - 1 else x
                found.append(self._in_format(y, output_fmt))
        if intermediates_only:
            return found
        if stop_early and last + 1 < len(parts):
            return self._in_format(x, 'NCHW'), found
        return self.final(x), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one of `indices`, and the norm and head if asked."""
        stages = len(self.stage_parts())
        take, last = feature_take_indices(stages, indices)
        self.keep_stages(last + 1)
        if prune_norm or last + 1 < stages:
            self.drop_final()
        if prune_head:
            self.num_classes = 0
            self.set_submodule(self.classifier_name, nn.Identity(), strict=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the last map (B, num_features, h, w), normalised."""
        x = self.stem(x)
        for entry, blocks in self.stage_parts():
            x = _run(self, blocks, _run(self, entry, x))
        return self.final(x)

    def norm_pooled(self, x: Tensor) -> Tensor:
        """Hook: a norm of the pooled features (B, C), or of the map (B, C, h, w) where nothing is pooled."""
        return x

    def classify(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features), after dropout, to logits."""
        return self.get_classifier()(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, h, w) to logits, or to pooled features with `pre_logits`."""
        x = self.norm_pooled(x.mean((2, 3)) if self.global_pool == 'avg' else x)
        if not self.global_pool and self.num_classes and not pre_logits:
            return self.classify(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.head_drop(x)
        return x if pre_logits else self.classify(x)


def squeeze_linears(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of linears that a checkpoint stores as 1 x 1 convolutions their two dimensions."""
    for name, module in model.named_modules():
        weight = state_dict.get(f'{name}.weight') if isinstance(module, nn.Linear) else None
        if weight is not None and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            state_dict[f'{name}.weight'] = weight[:, :, 0, 0]
    return state_dict


def _check_pool(global_pool: str) -> None:
    if global_pool not in ('avg', ''):
        raise ValueError(f"global_pool must be 'avg' or '' (no pooling), got {global_pool!r}")


def _new_head(features: int, num_classes: int, like: Tensor) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(features, num_classes, device=like.device, dtype=like.dtype)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _run(model: nn.Module, blocks, x: Tensor) -> Tensor:
    return add_pending(*_run_pending(model, blocks, x))


def _run_pending(
    model: nn.Module, blocks, x: Tensor, norm: nn.Module | None = None
) -> tuple[Tensor, Pending | Normed | None]:
    """The stream after the blocks, and what of the last one is still to be added to it; `norm` comes after them."""
    if model.grad_checkpointing and model.training and len(blocks) and not torch.jit.is_scripting():
        return checkpoint_seq(blocks, x), None
    pending = None
    joined = [block if isinstance(block, PreNormBlock) and block.takes_pending() else None for block in blocks]
    following = [block and block.branches()[0][0] for block in joined[1:]] + [norm]
    for block, own, next_norm in zip(blocks, joined, following):
        if own is not None:
            x, pending = own.run_pending(x, pending, next_norm)
        else:
            x, pending = block(add_pending(x, pending)), None
    return x, pending
