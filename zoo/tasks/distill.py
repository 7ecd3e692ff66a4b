"""Distillation of a classifier from any timm model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import nn

from zoo.errors import ZooError


@dataclass
class Distill:
    """A teacher and how much its opinion counts.

    Args:
        teacher: Any model that timm can build, with as many classes as the student.
        teacher_kwargs: Arguments of timm.create_model for the teacher.
        pretrained: Whether to load the teacher's published weights.
        mode: soft compares distributions, hard takes the teacher's answer as label.
        weight: Factor of the teacher's loss, within 0..1 unless label_weight is given.
        label_weight: Factor of the labels' loss; null gives them what the teacher leaves, 1 - weight.
        temperature: Softens both distributions in soft mode.
        size: Height and width that the teacher sees; null is the student's, or the only one that the teacher takes.
    """

    teacher: str
    teacher_kwargs: dict[str, Any] | None = None
    pretrained: bool = True
    mode: Literal['soft', 'hard'] = 'soft'
    weight: float = 0.5
    label_weight: float | None = None
    temperature: float = 1.0
    size: int | None = None

    def combine(self, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of a step from its two parts."""
        return (1 - self.weight if self.label_weight is None else self.label_weight) * labels + self.weight * teacher


class Teacher:
    """The frozen teacher. Not a module, so that it is neither trained nor written to checkpoints.

    Args:
        distill: Settings.
        num_classes: Classes of the student.
        mean: Normalisation of the images that the student sees.
        std: Normalisation of the images that the student sees.
    """

    def __init__(self, distill: Distill, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.settings = distill
        kwargs = {'num_classes': num_classes, **(distill.teacher_kwargs or {})}
        try:
            self.net: nn.Module = timm.create_model(distill.teacher, pretrained=distill.pretrained, **kwargs)
        except RuntimeError as error:
            raise ZooError(f'cannot build the teacher {distill.teacher!r}: {error}') from error
        if self.net.num_classes != num_classes:
            raise ZooError(f'the teacher has {self.net.num_classes} classes, the student {num_classes}')
        self.net.eval().requires_grad_(False)
        cfg = self.net.pretrained_cfg
        size = (
            distill.size or kwargs.get('img_size') or (cfg['input_size'][-2:] if cfg.get('fixed_input_size') else None)
        )
        self.size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        teacher_mean, teacher_std = torch.tensor(cfg['mean']), torch.tensor(cfg['std'])
        # student tensor -> pixels -> teacher tensor, as one scale and shift per channel
        self.scale = (torch.tensor(std) / teacher_std).view(1, -1, 1, 1)
        self.shift = ((torch.tensor(mean) - teacher_mean) / teacher_std).view(1, -1, 1, 1)

    def to(self, device: torch.device) -> Teacher:
        self.net.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        if self.size and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode='bicubic', align_corners=False)
        return self.net(images)

    def loss(self, student: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """How far the student's logits are from the teacher's answer for the same images."""
        teacher = self(images).float()
        if self.settings.mode == 'hard':
            return F.cross_entropy(student.float(), teacher.argmax(-1))
        t = self.settings.temperature
        log_student, log_teacher = F.log_softmax(student.float() / t, -1), F.log_softmax(teacher / t, -1)
        return F.kl_div(log_student, log_teacher, reduction='batchmean', log_target=True) * t * t
