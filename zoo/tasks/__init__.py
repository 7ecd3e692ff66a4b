"""Lightning modules: a network with its loss, metrics and optimizer."""

from zoo.tasks.classify import Classify
from zoo.tasks.distill import Distill
from zoo.tasks.distill_vlm import DistillVLM
from zoo.tasks.optim import Optim, Schedule

__all__ = ['Classify', 'Distill', 'DistillVLM', 'Optim', 'Schedule']
