"""Student UNets that share all but their self-attention with the teacher, and the losses between the two."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.linfusion import LinFusion
from zoo.errors import RunError, ZooError


class Weights(NamedTuple):
    """How much each loss counts; the defaults are the published ones.

    Args:
        target: Mean squared error to the noise or velocity.
        output: To the teacher's output.
        features: Mean over the layers of that to the teacher's self-attention outputs.
    """

    target: float = 1.0
    output: float = 0.5
    features: float = 0.5


class Losses(NamedTuple):
    """Losses of a batch, fp32 scalars; `layers` is (number of layers,)."""

    loss: Tensor
    target: Tensor
    output: Tensor
    features: Tensor
    layers: Tensor


class Features:
    """Outputs of self-attention layers, collected by forward hooks that stay where they are.

    Args:
        layers: Layers by name.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.found: dict[int, Tensor] = {}
        self.listening = False
        for number, layer in enumerate(layers.values()):
            layer.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.listening:  # not when checkpointing computes the layer once more in the backward pass
                self.found[number] = output

        return hook

    def run(self, call: Any) -> tuple[Tensor, list[Tensor]]:
        """The result of `call()` and what the layers gave meanwhile, in their order; nothing is kept here."""
        self.found.clear()
        self.listening = True
        try:
            out = call()
        finally:
            self.listening = False
        found = [self.found[number] for number in sorted(self.found)]
        self.found.clear()
        return out, found


def self_attention(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that linear attention takes the place of, in the order of the published files."""
    from diffusers.models.attention_processor import Attention

    return {n: m for n, m in unet.named_modules() if isinstance(m, Attention) and 'attn1' in n}


def share(unet: nn.Module) -> nn.Module:
    """A UNet of its own modules over the same parameters and buffers."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, memo={id(t): t for t in tensors})


class Student:
    """A UNet with trainable linear self-attention over the teacher's frozen rest.

    Args:
        teacher: The teacher's UNet.
        init: teacher, or random as published.
        projection_mid_dim: Width of the MLPs, see LinFusion.attach.
        mixed: Whether what is trained is to be fp32 whatever the rest is.

    Raises:
        ZooError: The teacher's self-attention cannot be replaced.
    """

    def __init__(self, teacher: nn.Module, init: str, projection_mid_dim: int | str | None, mixed: bool) -> None:
        self.unet = share(teacher)
        try:
            self.linear = LinFusion.attach(
                self.unet, projection_mid_dim=projection_mid_dim, init=init, keep_teacher=False
            )
        except ValueError as error:
            raise ZooError(f'the teacher cannot be made linear: {error}') from error
        self.unet.requires_grad_(False)
        self.linear.requires_grad_(True)
        if mixed:
            self.linear.float()
        self.features = Features(self.linear.layers)
        self.call = self.unet  # or compiled


def losses(
    out: Tensor, features: list[Tensor], target: Tensor, wanted: Tensor, teachers: list[Tensor], weights: Weights
) -> Losses:
    """The published loss, everything in fp32.

    Args:
        out: The student's output (B, C, H, W).
        features: Its self-attention outputs, each (B, N, d).
        target: Noise, velocity or clean image.
        wanted: The teacher's output.
        teachers: Its self-attention outputs.
        weights: Weights.
    """
    with torch.autocast(out.device.type, enabled=False):
        to_target = F.mse_loss(out.float(), target.float())
        to_teacher = F.mse_loss(out.float(), wanted.float())
        layers = torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(features, teachers, strict=True)])
        mean = layers.mean()
        total = weights.target * to_target + weights.output * to_teacher + weights.features * mean
    return Losses(total, to_target, to_teacher, mean, layers)


def save_linear(linear: LinFusion, state: dict[str, Tensor], target: Path, dtype: torch.dtype) -> None:
    """Writes linear layers in the published layout, whole or not at all.

    Args:
        linear: Says what the layers are.
        state: Their weights, which may be averages.
        target: Folder.
        dtype: Of the file.
    """
    written = LinFusion(linear.config.modules_list)
    written.load_state_dict(state)
    staged = target.with_name(f'.{target.name}.tmp')
    shutil.rmtree(staged, ignore_errors=True)
    try:
        nn.Module.to(written, dtype).save_pretrained(staged)  # diffusers' own `to` warns of what does not apply
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise RunError(f'cannot write {target}: {error}') from error
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
