"""Lightning modules: a network with its loss, metrics and optimizer."""

from zoo.tasks.classify import Classify
from zoo.tasks.distill import Distill
from zoo.tasks.optim import Optim, Schedule
from zoo.tasks.vlm import FinetuneVLM, Lora

__all__ = ['Classify', 'Distill', 'FinetuneVLM', 'Lora', 'Optim', 'Schedule']
