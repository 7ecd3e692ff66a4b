"""Lightning modules: a network with its loss, metrics and optimizer."""

from zoo.tasks.classify import Classify
from zoo.tasks.distill import Distill
from zoo.tasks.distill_vlm import DistillVLM
from zoo.tasks.optim import Optim, Schedule
from zoo.tasks.vlm import FinetuneVLM, Lora

__all__ = ['Classify', 'Distill', 'DistillVLM', 'FinetuneVLM', 'Lora', 'Optim', 'Schedule']
