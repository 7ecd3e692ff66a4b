"""Lightning modules: a network with its loss, metrics and optimizer."""

from typing import Any

from zoo.tasks.classify import Classify
from zoo.tasks.detect import Detect
from zoo.tasks.distill import Distill
from zoo.tasks.distill_vlm import DistillVLM
from zoo.tasks.optim import Optim, Schedule
from zoo.tasks.segment import Segment
from zoo.tasks.vlm import FinetuneVLM, Lora

__all__ = [
    'Classify',
    'Contrast',
    'Detect',
    'Distill',
    'DistillUNet',
    'DistillVLM',
    'FinetuneVLM',
    'Lora',
    'Optim',
    'Schedule',
    'Segment',
    'TrainUNet',
]


def __getattr__(name: str) -> Any:
    # imported when asked for: open_clip takes seconds, and diffusers is an extra
    if name == 'Contrast':
        from zoo.tasks.contrast import Contrast

        return Contrast
    if name == 'DistillUNet':
        from zoo.tasks.distill_unet import DistillUNet

        return DistillUNet
    if name == 'TrainUNet':
        from zoo.tasks.train_unet import TrainUNet

        return TrainUNet
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
