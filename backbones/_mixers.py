"""The linear layers that can take the place of softmax attention in a decoder, by the name `zoo.linearize` takes."""

from __future__ import annotations

from zoo.backbones._mamba2 import Mamba2Mixer

__all__ = ['MIXERS']

MIXERS = {'mamba2': Mamba2Mixer}
