"""Cached features of a network, and the heads that are trained on them side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.classify import HEADS, Headed, knn_votes, nested_dims, nested_loss, tokens_and_pooled

Advance = Callable[[], None]


@dataclass
class Features:
    """What a frozen network says of the images of a split, in order.

    Args:
        pooled: Features (N, D), fp32.
        tokens: Tokens (N, T, C), fp32, or None where they would not fit.
        target: Classes (N,).
        own: Logits (N, num_classes) of the network's own classifiers, narrowest first; none for another set of classes.
    """

    pooled: Tensor
    tokens: Tensor | None
    target: Tensor
    own: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.target)

    def at(self, rows: Tensor) -> Features:
        """Some of the images."""
        tokens = self.tokens[rows] if self.tokens is not None else None
        return Features(self.pooled[rows], tokens, self.target[rows], tuple(o[rows] for o in self.own))

    def normalised(self, mean: Tensor, std: Tensor) -> Features:
        """The pooled features in the units of a training set: a BatchNorm without affine parameters, once for all."""
        return Features((self.pooled - mean) / std, self.tokens, self.target, self.own)


@torch.inference_mode()
def encode(net: nn.Module, images: Tensor, own: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Tokens, pooled features and, if asked, the logits of the network's own classifiers, fp32.

    Args:
        net: In evaluation mode; a timm model or a `Headed` one.
        images: (B, C, H, W).
        own: Whether to apply the classifiers.
    """
    if isinstance(net, Headed):
        tokens, pooled = net.features(images)
        logits = net.head.nested(tokens, pooled) if own else ()
    else:
        features = net.forward_features(images)
        tokens, pooled = tokens_and_pooled(net, features)
        logits = (net.forward_head(features),) if own else ()
    return tokens.float(), pooled.float(), tuple(o.float() for o in logits)


def fit_heads(
    name: str,
    options: dict[str, Any],
    train: Features,
    num_classes: int,
    lrs: Sequence[float],
    steps: int,
    batch_size: int,
    seed: int,
    advance: Advance,
) -> list[nn.Module]:
    """Trains a copy of a head for every learning rate on the same batches (AdamW, a cosine behind 5 % of warm-up).

    Args:
        name: Of the head.
        options: Of the head.
        train: What to train on.
        num_classes: Number of classes.
        lrs: Learning rates.
        steps: Optimizer steps.
        batch_size: Images a step.
        seed: Of the first weights, which the copies share, and of the batches.
        advance: Called after every step.

    Returns:
        The heads in evaluation mode, one for each learning rate.
    """
    device = train.pooled.device
    token_width = train.tokens.shape[2] if train.tokens is not None else train.pooled.shape[1]
    heads = []
    for _ in lrs:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            heads.append(HEADS[name](token_width, train.pooled.shape[1], num_classes, **options).to(device))
    groups = [{'params': head.parameters(), 'lr': lr} for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, round(0.05 * steps))
    shape = [min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / steps)) for s in range(steps)]
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for factor in shape:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        batch, order = train.at(order[:batch_size].to(device)), order[batch_size:]
        for group, lr in zip(optimizer.param_groups, lrs):
            group['lr'] = lr * factor
        loss = sum(
            nested_loss(F.cross_entropy, head(batch.tokens, batch.pooled), batch.target, head.loss_weights)
            for head in heads
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance()
    return [head.eval() for head in heads]


@torch.inference_mode()
def accuracies(head: nn.Module, data: Features, chunk: int = 4096) -> list[float]:
    """Top-1 of every classifier of a head, narrowest first."""
    hits: list[Tensor] = []
    for rows in torch.arange(len(data), device=data.target.device).split(chunk):
        part = data.at(rows)
        outputs = head.nested(part.tokens, part.pooled)
        hits.append(torch.stack([(logits.argmax(1) == part.target).sum() for logits in outputs]))
    return (torch.stack(hits).sum(0) / len(data)).tolist()


def top1(logits: Tensor, target: Tensor) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == target).float().mean())


@dataclass
class Splits:
    """Features to fit, to choose settings on, and to report.

    Args:
        fit: Of training images.
        choose: Images that are in neither of the others.
        test: What accuracies are of.
    """

    fit: Features
    choose: Features
    test: Features

    def normalised(self) -> Splits:
        """With pooled features in the units of `fit`."""
        mean, std = self.fit.pooled.mean(0), self.fit.pooled.std(0, unbiased=False).clamp_min(1e-6)
        return Splits(*(s.normalised(mean, std) for s in (self.fit, self.choose, self.test)))


def probe_head(
    method: str, name: str, options: dict[str, Any], splits: Splits, num_classes: int, settings: Any, advance: Advance
) -> tuple[list[dict[str, Any]], nn.Module]:
    """Rows of a head, each with the learning rate that is best on `choose`, and the head of the widest row.

    Args:
        method: What the rows are called.
        name: Of the head.
        options: Of the head.
        splits: With normalised features.
        num_classes: Number of classes.
        settings: lrs, steps, batch_size and seed.
        advance: Called after every step.
    """
    start = time.perf_counter()
    heads = fit_heads(
        name,
        options,
        splits.fit,
        num_classes,
        settings.lrs,
        settings.steps,
        settings.batch_size,
        settings.seed,
        advance,
    )
    chosen, test = ([accuracies(head, data) for head in heads] for data in (splits.choose, splits.test))
    rows = []
    for i, d in enumerate(heads[0].dims or (splits.fit.pooled.shape[1],)):
        best = max(range(len(heads)), key=lambda j: chosen[j][i])
        rows.append({'method': method, 'dim': d, 'top1': test[best][i], 'choose_top1': chosen[best][i]})
        rows[-1]['lr'] = settings.lrs[best]
    seconds = round(time.perf_counter() - start, 2)
    parameters = sum(p.numel() for p in heads[best].parameters())
    for row in rows:
        row |= {'parameters': parameters, 'seconds': seconds}
    return rows, heads[best]


def probe_knn(
    method: str, embed: Callable[[Tensor], Tensor], splits: Splits, num_classes: int, settings: Any, advance: Advance
) -> list[dict[str, Any]]:
    """Rows of nearest neighbours among the first d dimensions of an embedding, k chosen on `choose`.

    Args:
        method: What the rows are called.
        embed: From pooled features to the embedding.
        splits: Features.
        num_classes: Number of classes.
        settings: ks and temperature.
        advance: Called after every width.
    """
    with torch.inference_mode():
        bank, choose, test = (embed(s.pooled) for s in (splits.fit, splits.choose, splits.test))
    rows = []
    for d in nested_dims(bank.shape[1]):
        start = time.perf_counter()
        found = []
        for part, data in ((choose, splits.choose), (test, splits.test)):
            args = (bank[:, :d], splits.fit.target, part[:, :d], num_classes, settings.ks, settings.temperature)
            found.append({k: top1(votes, data.target) for k, votes in knn_votes(*args).items()})
        best = max(settings.ks, key=lambda k: found[0][k])
        rows.append({'method': method, 'dim': d, 'top1': found[1][best], 'choose_top1': found[0][best], 'k': best})
        rows[-1]['seconds'] = round(time.perf_counter() - start, 2)
        advance()
    return rows


def principal_axes(pooled: Tensor) -> Callable[[Tensor], Tensor]:
    """The map to principal components, largest variance first."""
    mean = pooled.mean(0)
    centred = (pooled - mean).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1).float()
    return lambda x: (x - mean) @ axes
