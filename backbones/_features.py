"""Interface methods shared by the backbones: one mixin for token models, one for pyramids.

A family defines its parts and the few hooks named in a mixin's docstring; everything that timm asks of a model
(classifier access, intermediates, pruning, gradient checkpointing, readable loading errors) is here once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ['PyramidMixin', 'TokenMixin', 'unwrap_checkpoint']

_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


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
    return out


def _few(items: Sequence[str], limit: int = 6) -> str:
    more = f', ... ({len(items) - limit} more)' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more


class _CommonMixin:
    """What tokens and pyramids share; loading errors name a handful of keys and shapes, not all of them."""

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load weights.

        Raises:
            RuntimeError: if keys or shapes do not fit, listing the first few of each kind.
        """
        own = self.state_dict()
        fitted = self.adapt_state_dict(dict(state_dict))
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
        return dict(stem=r'^pos_embed|^patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, `global_pool=''` unpooled tokens."""
        self.num_classes = num_classes
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
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
        return self.norm(_run(self, self.blocks, self.embed(x))).flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, h w, C) to logits, or to pooled features with `pre_logits`."""
        if self.global_pool == 'avg':
            x = x.mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class PyramidMixin(_CommonMixin):
    """Interface of models with stages of falling resolution, channels last inside.

    Needs `patch_embed` (NCHW image to NHWC map), `layers` (stages with `blocks` and `downsample`, None in the last),
    `classifier` (with `norm` and `head`), `head_drop`, `global_pool`, `num_features` and `num_classes`.
    """

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return dict(stem=r'^patch_embed', blocks=[(r'^layers\.(\d+)', None), (r'^classifier\.norm', (99999,))])
        return dict(
            stem=r'^patch_embed',
            blocks=[
                (r'^layers\.(\d+)\.downsample', (0,)),
                (r'^layers\.(\d+)\.blocks\.(\d+)', None),
                (r'^classifier\.norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, `global_pool=''` the unpooled map."""
        self.num_classes = num_classes
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.classifier.head = _new_head(self.num_features, num_classes, self.layers[0].blocks[0].norm.weight)

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
        take, last = feature_take_indices(len(self.layers), indices)
        x = self.patch_embed(x)
        found = []
        final = len(self.layers) - 1
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = _run(self, stage.blocks, x)
            if i in take:
                y = self.classifier.norm(x) if norm and i == final else x
                found.append(y.permute(0, 3, 1, 2) if output_fmt == 'NCHW' else y)
            if stage.downsample is not None and not (stop_early and i == last):
                x = stage.downsample(x)
        if intermediates_only:
            return found
        x = self.classifier.norm(x) if x.shape[-1] == self.num_features else x
        return x.permute(0, 3, 1, 2), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one of `indices`, and the norm and head if asked."""
        take, last = feature_take_indices(len(self.layers), indices)
        dropped = last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = None
        if prune_norm or dropped:
            self.classifier.norm = nn.Identity()
        if prune_head:
            self.num_classes, self.classifier.head = 0, nn.Identity()
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the normalised last map (B, C, h, w)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = _run(self, stage.blocks, x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.classifier.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, h, w) to logits, or to pooled features with `pre_logits`."""
        if self.global_pool == 'avg':
            x = x.mean((2, 3))
        elif isinstance(self.classifier.head, nn.Linear) and not pre_logits:
            return self.classifier.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.head_drop(x)
        return x if pre_logits else self.classifier.head(x)


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
    if model.grad_checkpointing and model.training and not torch.jit.is_scripting():
        return checkpoint_seq(blocks, x)
    for block in blocks:
        x = block(x)
    return x
