"""Classification heads over any backbone with timm's interface, frozen or not, and nearest neighbours.

A head takes the tokens of the last layer (B, T, C) and the backbone's own pooled features (B, D). Sources of facts:

- linear probe: MAE (arXiv 2111.06377; facebookresearch/mae, main_linprobe.py): BatchNorm without affine parameters
  before the classifier, whose weights start from a normal distribution of deviation 0.01.
- moment probing (arXiv 2307.11342; mingzeG/Moment-Probing, models/representation/MP.py): 512 projected channels in 4
  heads, cross-covariances of neighbouring heads, two strided 3 x 3 convolutions, mean of the two classifiers' logits.
- Matryoshka (arXiv 2205.13147; RAIVNLab/MRL, MRL.py): classifiers of the first d features for several d, each with its
  own weights (MRL) or with the first d columns of one matrix (MRL-E); the training loss is the sum over d.
- nearest neighbours: DINO (arXiv 2104.14294; facebookresearch/dino, eval_knn.py): cosine similarity s, votes
  exp(s / 0.07) of the k nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import group_parameters
from torch import Tensor, nn

__all__ = [
    'HEADS',
    'Headed',
    'LinearHead',
    'MatryoshkaHead',
    'MomentHead',
    'create_classifier',
    'knn_votes',
    'nested_dims',
    'nested_loss',
    'tokens_and_pooled',
]


class _Head(nn.Module):
    """What heads share; those with several outputs override `nested`."""

    dims: tuple[int, ...] = ()  # widths of the nested classifiers
    loss_weights: tuple[float, ...] = (1.0,)

    def nested(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, num_classes) of every classifier, the one that counts last."""
        return (self(tokens, pooled),)


def _linear(features: int, num_classes: int, std: float) -> nn.Linear:
    layer = nn.Linear(features, num_classes)
    trunc_normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def _input_norm(features: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm1d(features, eps=1e-6, affine=False) if batch_norm else nn.Identity()


class LinearHead(_Head):
    """A linear classifier of the pooled features.

    Args:
        token_features: Channels of the tokens; not used.
        pooled_features: Width of the pooled features.
        num_classes: Number of classes.
        batch_norm: Whether a BatchNorm without affine parameters comes first.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        token_features: int,
        pooled_features: int,
        num_classes: int,
        batch_norm: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm, self.drop = _input_norm(pooled_features, batch_norm), nn.Dropout(drop_rate)
        self.fc = _linear(pooled_features, num_classes, std=0.01)

    def forward(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(pooled)))


class MomentHead(_Head):
    """First-order moments (the pooled features) beside second-order ones: cross-covariances of projected tokens.

    The tokens are projected to `hidden` channels and cut into heads of d = hidden / num_heads channels, which share a
    LayerNorm. Of neighbouring heads x, y (T, d) the matrix (x - m)^T (y - n) / T is normalised over its rows; the
    num_heads - 1 matrices are the channels of two strided convolutions, and what is left is classified linearly.

    Args:
        token_features: Channels of the tokens.
        pooled_features: Width of the pooled features.
        num_classes: Number of classes.
        hidden: Channels of the projection.
        num_heads: Heads, at least 2.
        centre: What m and n are: `channel` is the mean of every channel over the tokens, the covariance proper;
            `image` is one number for each image and head, the mean over tokens and channels, as in the published code.
        batch_norm: Whether a BatchNorm without affine parameters comes before the first-order classifier.

    Raises:
        ValueError: for sizes that leave nothing to classify.
    """

    def __init__(
        self,
        token_features: int,
        pooled_features: int,
        num_classes: int,
        hidden: int = 512,
        num_heads: int = 4,
        centre: str = 'image',
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 2 or hidden % num_heads or hidden // num_heads < 7:
            raise ValueError(
                f'head moment: hidden {hidden} must be a multiple of num_heads {num_heads} (2 or more), with at least '
                '7 channels a head'
            )
        if centre not in ('channel', 'image'):
            raise ValueError(f"head moment: centre must be 'channel' or 'image', not {centre!r}")
        self.num_heads, self.centre = num_heads, centre
        pairs, channels = num_heads - 1, hidden // num_heads
        side = ((channels - 3) // 2 + 1 - 3) // 2 + 1
        self.proj, self.norm = _linear(token_features, hidden, std=0.02), nn.LayerNorm(channels)
        self.reduce = nn.Sequential(
            nn.Conv2d(pairs, pairs, 3, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(pairs, pairs, 3, stride=2, bias=False),
        )
        self.first_norm = _input_norm(pooled_features, batch_norm)
        self.first = _linear(pooled_features, num_classes, std=0.02)
        self.second = _linear(pairs * side * side, num_classes, std=0.02)

    def cross_covariance(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, C) to matrices (B, num_heads - 1, d, d), every column of length 1."""
        x = self.norm(self.proj(tokens).unflatten(-1, (self.num_heads, -1)))  # (B, T, heads, d)
        x = x - x.mean((1,) if self.centre == 'channel' else (1, 3), keepdim=True)
        left, right = x[:, :, :-1].permute(0, 2, 3, 1), x[:, :, 1:].transpose(1, 2)
        return F.normalize(left / x.shape[1] @ right, dim=2)

    def forward(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        second = self.second(self.reduce(self.cross_covariance(tokens)).flatten(1))
        return (self.first(self.first_norm(pooled)) + second) / 2


class MatryoshkaHead(_Head):
    """Classifiers of the first d features for several d, trained together; the largest d gives the logits.

    In training mode the output is the tuple of all logits, the smallest d first.

    Args:
        token_features: Channels of the tokens; not used.
        pooled_features: Width of the pooled features.
        num_classes: Number of classes.
        dims: The widths d, rising; by default the powers of two from 8 and the full width.
        efficient: MRL-E: one matrix, whose first d columns classify the first d features.
        embed_dim: Width of a learned linear embedding that is nested in place of the features themselves. With frozen
            features it is what makes the widths share anything.
        loss_weights: Factor of the loss of each width; 1 by default.
        batch_norm: Whether a BatchNorm without affine parameters comes first.

    Raises:
        ValueError: for widths that do not rise or exceed the features.
    """

    def __init__(
        self,
        token_features: int,
        pooled_features: int,
        num_classes: int,
        dims: Sequence[int] | None = None,
        efficient: bool = False,
        embed_dim: int | None = None,
        loss_weights: Sequence[float] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        width = embed_dim or pooled_features
        dims = tuple(nested_dims(width) if dims is None else dims)
        if not dims or min(dims) < 1 or max(dims) > width or list(dims) != sorted(set(dims)):
            raise ValueError(f'head matryoshka: dims {list(dims)} must rise within 1..{width}')
        if loss_weights is not None and len(loss_weights) != len(dims):
            raise ValueError(f'head matryoshka: {len(loss_weights)} loss_weights for {len(dims)} dims')
        self.dims, self.efficient = dims, efficient
        self.loss_weights = tuple(loss_weights) if loss_weights is not None else (1.0,) * len(dims)
        self.norm = _input_norm(pooled_features, batch_norm)
        self.project = nn.Linear(pooled_features, embed_dim, bias=False) if embed_dim else nn.Identity()
        self.classifiers = nn.ModuleList(
            _linear(d, num_classes, std=0.01) for d in ((dims[-1],) if efficient else dims)
        )

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled features to the embedding whose beginnings are embeddings too."""
        return self.project(self.norm(pooled))

    def nested(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(pooled)
        if self.efficient:
            fc = self.classifiers[0]
            return tuple(F.linear(x[:, :d], fc.weight[:, :d], fc.bias) for d in self.dims)
        return tuple(fc(x[:, :d]) for d, fc in zip(self.dims, self.classifiers))

    def forward(self, tokens: Tensor, pooled: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.training:
            return self.nested(tokens, pooled)
        return self.classifiers[-1](self.embed(pooled)[:, : self.dims[-1]])


HEADS: dict[str, type[_Head]] = {'linear': LinearHead, 'moment': MomentHead, 'matryoshka': MatryoshkaHead}


def nested_dims(width: int, smallest: int = 8) -> list[int]:
    """The powers of two from `smallest` that are below `width`, and `width`."""
    dims = [smallest]
    while dims[-1] * 2 < width:
        dims.append(dims[-1] * 2)
    return [d for d in dims if d < width] + [width]


def nested_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    outputs: Tensor | tuple[Tensor, ...],
    target: Tensor,
    weights: Sequence[float] = (1.0,),
) -> Tensor:
    """The weighted sum of the losses of all classifiers of a head, computed in fp32.

    Args:
        criterion: Loss of logits (B, num_classes) and the target.
        outputs: Logits, or one tensor of them for each classifier.
        target: What the criterion takes.
        weights: One factor for each classifier.
    """
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [w * criterion(logits.float(), target) for w, logits in zip(weights, outputs, strict=True)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def tokens_and_pooled(net: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """What heads take, from what a network's `forward_features` gives.

    Args:
        net: Network with timm's interface.
        features: (B, C, H, W), (B, H, W, C), (B, T, C) with or without prefix tokens, or (B, C).

    Returns:
        Tokens without prefix tokens (B, T, C), and what the network's own classifier would get (B, D).

    Raises:
        ValueError: for a network that does not pool, or a shape that is none of these.
    """
    if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f'{type(net).__name__} has no tokens that heads can take: forward_features gives {shape}')
    pooled = net.forward_head(features, pre_logits=True)
    if pooled.ndim != 2:
        raise ValueError(f'{type(net).__name__} does not pool: set global_pool to avg, not {net.global_pool!r}')
    if features.ndim == 2:
        return features.unsqueeze(1), pooled
    if features.ndim == 3:
        return features[:, getattr(net, 'num_prefix_tokens', 0) :], pooled
    last = getattr(net, 'output_fmt', None) == 'NHWC' or features.shape[1] != net.num_features
    return (features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)), pooled


class Headed(nn.Module):
    """A backbone with a head of this file, to timm's tools a model like any other.

    Args:
        backbone: Model without classifier (num_classes=0).
        head: Takes tokens and pooled features.
        num_classes: Number of classes.
        frozen: Whether the backbone stays as it is: no gradients, and evaluation mode in training too.
    """

    def __init__(self, backbone: nn.Module, head: _Head, num_classes: int, frozen: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.num_classes, self.frozen = backbone, head, num_classes, frozen
        self.num_features = backbone.num_features
        self.pretrained_cfg = self.default_cfg = backbone.pretrained_cfg
        if frozen:
            backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Headed:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to tokens (B, T, C) and pooled features (B, D)."""
        if self.frozen:
            with torch.no_grad():
                return tokens_and_pooled(self.backbone, self.backbone.forward_features(x))
        return tokens_and_pooled(self.backbone, self.backbone.forward_features(x))

    def nested(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images to the logits of every classifier of the head, the one that counts last."""
        return self.head.nested(*self.features(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images to logits (B, num_classes); in training mode whatever the head trains with."""
        return self.head(*self.features(x))

    # timm's interface

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        own = getattr(self.backbone, 'no_weight_decay', set)
        return {f'backbone.{name}' for name in own()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, ...]]:
        """Layer of a parameter by its name: the backbone's own layers, then the head."""
        layers: dict[str, int] = {}
        if hasattr(self.backbone, 'group_matcher'):
            layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=-1) + 1
        return lambda name: (layers.get(name.removeprefix('backbone.'), last),)


def create_classifier(
    name: str,
    num_classes: int,
    head: str = 'linear',
    head_kwargs: dict[str, Any] | None = None,
    freeze: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A model of timm's registry, with its own classifier or with a head of this file.

    Args:
        name: Of the model.
        num_classes: Number of classes.
        head: One of `HEADS`; `linear` without options and without freezing is the model's own classifier.
        head_kwargs: Options of the head.
        freeze: `backbone` to train the head alone.
        kwargs: Of timm.create_model.

    Raises:
        ValueError: for an unknown head, or options that it does not take.
    """
    if head not in HEADS:
        raise ValueError(f'no head {head!r}; there are {", ".join(HEADS)}')
    if head == 'linear' and not head_kwargs and not freeze:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    backbone = timm.create_model(name, num_classes=0, **kwargs)
    pooled = getattr(backbone, 'head_hidden_size', None) or backbone.num_features
    try:
        built = HEADS[head](backbone.num_features, pooled, num_classes, **(head_kwargs or {}))
    except TypeError as error:
        raise ValueError(f'head {head} does not take {head_kwargs}: {error}') from error
    return Headed(backbone, built, num_classes, frozen=freeze == 'backbone')


def knn_votes(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Votes of the k nearest neighbours by cosine similarity, for several k at once.

    Args:
        bank: Features with known labels (N, D).
        labels: Their classes (N,).
        queries: Features (M, D).
        num_classes: Number of classes.
        ks: Numbers of neighbours; more than N are N.
        temperature: Of the votes exp(similarity / temperature).
        chunk: Queries at once; by default as many as take half a gigabyte, chunk x N numbers.

    Returns:
        For each k the votes (M, num_classes), fp32.
    """
    bank = F.normalize(bank.float(), dim=1).t()
    most = min(max(ks), bank.shape[1])
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(chunk or max(1, 2**27 // bank.shape[1])):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ bank).topk(most, dim=1)
        votes, classes = (similarity / temperature).exp(), labels[nearest]
        for k in ks:
            empty = votes.new_zeros(len(part), num_classes)
            found[k].append(empty.scatter_add_(1, classes[:, :k], votes[:, :k]))
    return {k: torch.cat(parts) for k, parts in found.items()}
