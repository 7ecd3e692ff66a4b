"""Losses of the distillation stages: head outputs layer by layer, and logits in chunks of positions.

Both work out their gradients piece by piece inside the forward pass and hand them to autograd afterwards, so that what
is alive at one time is one layer's graph or one chunk's logits. Gradient accumulation, loss scaling, clipping and
DistributedDataParallel see an ordinary loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # transformers' label of positions without a target


class _Deferred(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient * scale.to(gradient.dtype) for gradient in ctx.gradients)


def deferred(value: torch.Tensor, tensors: Iterable[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
    """`value`, with `gradients` as its derivatives by `tensors`."""
    return _Deferred.apply(value.detach(), gradients, *tensors)


# stages 1 and 2


def head_error(predicted: torch.Tensor, target: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error between head outputs, in fp32.

    Args:
        predicted: (B, L, H, d).
        target: (B, L, H, d).
        keep: bool (B, L), the positions that count; None counts all, padding included (as mmMamba does).
    """
    if keep is None:
        return F.mse_loss(predicted.float(), target.float())
    # a product with the mask rather than a selection: no synchronisation of host and device
    error = (predicted.float() - target.float()).square() * keep[..., None, None]
    return error.sum() / (keep.sum().clamp(min=1) * predicted.shape[-1] * predicted.shape[-2])


class HeadsLoss:
    """scale * mean over layers of each mixer's error on the teacher's inputs (mmMamba, stages 1 and 2).

    Called with one layer after the other while the teacher runs (`capture(teacher, callback=...)`); the gradients of a
    layer are worked out at once, so that one layer's graph is alive at a time.

    Args:
        mixers: Mixers by layer; those of their parameters that require gradients get them.
        padding_mask: (B, L), 0 where there is padding, or None.
        keep: bool (B, L), positions that count, or None for all.
        scale: Factor of the loss.
        learn: Whether gradients are wanted.
    """

    def __init__(
        self,
        mixers: dict[int, nn.Module],
        padding_mask: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        scale: float = 1000.0,
        learn: bool = True,
    ) -> None:
        self.mixers, self.padding_mask, self.keep, self.scale, self.learn = mixers, padding_mask, keep, scale, learn
        self.errors: dict[int, torch.Tensor] = {}
        self._parameters: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def __call__(self, layer: int, inputs: torch.Tensor, heads: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Adds a layer: inputs (B, L, hidden), softmax heads (B, L, H, d), further arguments of the attention."""
        mixer = self.mixers[layer]
        trained = [p for p in mixer.parameters() if p.requires_grad] if self.learn else []
        with torch.set_grad_enabled(bool(trained)):
            error = head_error(mixer.heads(inputs, padding_mask=self.padding_mask, **kwargs), heads, self.keep)
            if trained:
                share = self.scale / len(self.mixers)
                found = torch.autograd.grad(error * share, trained, allow_unused=True)
                self._parameters += [p for p, g in zip(trained, found) if g is not None]
                self._gradients += [g for g in found if g is not None]
        self.errors[layer] = error.detach()

    def total(self) -> torch.Tensor:
        """The loss over the layers seen."""
        loss = self.scale * torch.stack(list(self.errors.values())).mean()
        return deferred(loss, self._parameters, self._gradients) if self._parameters else loss


# stage 3


@dataclass
class LogitsLoss:
    """Result of logits_loss; everything but `loss` is detached.

    Args:
        loss: What is minimised.
        kl: KL(teacher || student), mean over the positions that count, in nats.
        ce: Cross-entropy on the labels, mean over labelled positions; 0 without labels.
        agreement: Share of the positions that count where both have the same first choice.
        count: Number of positions that count.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor
    agreement: torch.Tensor
    count: torch.Tensor


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """The label that the logits of each position are about: that of the next one; none for the last. (B, L)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def positions(
    which: Literal['all', 'tokens', 'answers'], padding_mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor | None:
    """bool (B, L) of the positions whose logits count; None for all of them.

    Args:
        which: all, including padding; tokens leaves padding out; answers takes what predicts a label.
        padding_mask: (B, L), 0 where there is padding, or None.
        labels: (B, L), -100 where there is none, or None.
    """
    if which == 'answers' and labels is not None:
        return shifted_labels(labels) != IGNORED
    return padding_mask.bool() if which != 'all' and padding_mask is not None else None


def logits_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: Callable[[torch.Tensor], torch.Tensor],
    teacher_head: Callable[[torch.Tensor], torch.Tensor],
    *,
    keep: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    reduction: Literal['token', 'sum'] = 'token',
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk: int = 1024,
) -> LogitsLoss:
    """kl_weight * KL(teacher || student) + ce_weight * cross-entropy, over chunks of positions.

    At no time are there more than `chunk` rows of logits of each model. The heads are frozen: gradients flow to
    `student` alone.

    Args:
        student: (B, L, hidden), what the student's output head reads.
        teacher: (B, L, hidden') of the teacher.
        student_head: (N, hidden) to logits (N, V).
        teacher_head: (N, hidden') to logits (N, V).
        keep: bool (B, L), positions that count in the KL; None for all.
        labels: (B, L) token ids, -100 where there is none; shifted here.
        reduction: token is the mean over the positions that count; sum divides their sum by B only, as torch's
            batchmean over (B, L, V) does (mmMamba's choice: the gradient then grows with the length).
        kl_weight: Factor of the KL.
        ce_weight: Factor of the cross-entropy (mean over labelled positions).
        chunk: Positions at a time.
    """
    flat, reference = student.flatten(0, 1), teacher.flatten(0, 1)
    weight = torch.ones(len(flat), device=flat.device) if keep is None else keep.flatten().float()
    targets = None if labels is None else shifted_labels(labels).flatten()
    labelled = torch.zeros_like(weight) if targets is None else (targets != IGNORED).float()
    count, answers = weight.sum().clamp(min=1), labelled.sum().clamp(min=1)
    kl_share = kl_weight / (count if reduction == 'token' else student.shape[0])
    learn = torch.is_grad_enabled() and student.requires_grad
    gradient = torch.zeros_like(flat) if learn else None
    kl, ce, same = flat.new_zeros((), dtype=torch.float32), flat.new_zeros((), dtype=torch.float32), 0.0
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        with torch.no_grad():
            wanted = teacher_head(reference[part]).float().log_softmax(-1)
        with torch.set_grad_enabled(learn):
            leaf = flat[part].detach().requires_grad_(learn)
            scores = student_head(leaf).float().log_softmax(-1)
            part_kl = (F.kl_div(scores, wanted, reduction='none', log_target=True).sum(-1) * weight[part]).sum()
            part_ce = part_kl.new_zeros(())
            if targets is not None:
                part_ce = F.nll_loss(scores, targets[part], ignore_index=IGNORED, reduction='sum')
            if learn:
                total = kl_share * part_kl + (ce_weight / answers) * part_ce
                gradient[part] = torch.autograd.grad(total, leaf)[0]
        kl, ce = kl + part_kl.detach(), ce + part_ce.detach()
        same = same + ((scores.argmax(-1) == wanted.argmax(-1)) * weight[part]).sum()
    loss = kl_share * kl + (ce_weight / answers) * ce
    if learn:
        loss = deferred(loss, [student], [gradient.view_as(student)])
    return LogitsLoss(loss, kl / count, ce / answers, same / count, count)
