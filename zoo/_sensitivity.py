"""Which layers of a decoder need softmax: the change of the logits when one layer alone becomes linear."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError

__all__ = ['Sensitivity', 'sensitivity']


@dataclass(frozen=True)
class Sensitivity:
    """KL(teacher || teacher with one linear layer) in nats a token, for every layer.

    kl: one value a layer. tokens: over how many tokens each is the mean. mixer: the mixer that was put in.
    trained: whether its weights were a student's or its seeds.
    """

    kl: tuple[float, ...]
    tokens: int
    mixer: str
    trained: bool = False

    def linear_layers(self, softmax: int) -> list[int]:
        """The layers to linearise when the `softmax` most sensitive ones stay."""
        order = sorted(range(len(self.kl)), key=lambda i: (-self.kl[i], i))
        return sorted(order[softmax:])

    def save(self, folder: str | Path, softmax: int | None = None) -> None:
        """Write sensitivity.json and the plot sensitivity.png into a folder, made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {'kl': list(self.kl), 'tokens': self.tokens, 'mixer': self.mixer, 'trained': self.trained}
        partial = folder / 'sensitivity.json.part'
        partial.write_text(json.dumps(record, indent=1) + '\n')
        os.replace(partial, folder / 'sensitivity.json')
        self.plot(folder / 'sensitivity.png', softmax)

    def plot(self, path: str | Path, softmax: int | None = None) -> None:
        """Bars of the KL by layer, those of the `softmax` most sensitive layers in another colour."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        linear = set(range(len(self.kl)) if softmax is None else self.linear_layers(softmax))
        figure = Figure(figsize=(max(4.0, 0.25 * len(self.kl) + 2), 3.2), layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.bar(range(len(self.kl)), self.kl, color=['C0' if i in linear else 'C1' for i in range(len(self.kl))])
        if softmax:
            axes.bar([0], [0], color='C1', label='stays softmax')
            axes.bar([0], [0], color='C0', label='becomes linear')
            axes.legend()
        axes.set_xlabel('decoder layer')
        axes.set_ylabel('KL to the teacher, nats a token')
        state = 'trained' if self.trained else 'seeded'
        axes.set_title(f'one layer replaced by {self.mixer} ({state}), {self.tokens} tokens', fontsize='medium')
        partial = Path(f'{path}.part')
        figure.savefig(partial, dpi=120, format='png')
        os.replace(partial, path)


@torch.no_grad()
def sensitivity(
    teacher: nn.Module,
    calibration: Iterable[dict[str, Tensor]],
    mixer: str = 'mamba2',
    *,
    mixer_kwargs: dict[str, Any] | None = None,
    student: nn.Module | None = None,
    seed: int = 0,
) -> Sensitivity:
    """How much the logits move when one layer alone becomes linear.

    Costs 1 + layers forward passes for each batch, and the memory of one batch's logits twice.

    Args:
        teacher: the softmax model; put into evaluation mode while this runs.
        calibration: model inputs as keyword dictionaries, moved to the teacher's device.
        mixer: what replaces the layers.
        mixer_kwargs: its options.
        student: all-linear student of this teacher; its mixers, e.g. trained ones, are then used in the place of seeds.
        seed: of seeded mixers.

    Raises:
        ZooError: if the calibration data are empty or not dictionaries, or the student is not all linear.
    """
    from tqdm import tqdm

    from zoo._families import attention_name, mark_linear
    from zoo.linearizer import decoder_layers, linearize, mixers

    batches = list(calibration)
    if not batches or not all(hasattr(batch, 'keys') and hasattr(batch, 'items') for batch in batches):
        raise ZooError('calibration must be a non-empty list of dictionaries of model inputs (input_ids, ...)')
    layers = decoder_layers(teacher)
    trained = student is not None
    probe = student if trained else linearize(teacher, mixer, mixer_kwargs=mixer_kwargs, share_frozen=True, seed=seed)
    own = mixers(probe)
    if len(own) != len(layers):
        raise ZooError(f'sensitivity needs a student with all {len(layers)} layers linear, this one has {len(own)}')
    names = [attention_name(layer) for layer in layers]
    slots = decoder_layers(probe)
    modes = {model: model.training for model in (teacher, probe)}
    totals, tokens = [0.0] * len(layers), 0
    try:
        for model in modes:
            model.eval()
        for layer, slot, name in zip(layers, slots, names):
            setattr(slot, name, getattr(layer, name))
        for batch in tqdm(batches, desc='sensitivity', unit='batch', disable=None):
            batch = _on(batch, next(teacher.parameters()).device)
            expected, weight = teacher(**batch, use_cache=False).logits, _weight(batch)
            tokens += int(weight.sum()) if weight is not None else expected.shape[0] * expected.shape[1]
            for i, (layer, slot, name) in enumerate(zip(layers, slots, names)):
                setattr(slot, name, own[i])
                mark_linear(probe, [i])
                totals[i] += _kl(expected, probe(**batch, use_cache=False).logits, weight)
                setattr(slot, name, getattr(layer, name))
    finally:
        for i, (slot, name) in enumerate(zip(slots, names)):
            setattr(slot, name, own[i])
        mark_linear(probe, list(own))
        for model, mode in modes.items():
            model.train(mode)
    return Sensitivity(tuple(t / max(tokens, 1) for t in totals), tokens, mixer, trained)


def _on(batch, device: torch.device) -> dict[str, Any]:
    drop = ('labels',)  # the loss would cost another pass over the logits
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in drop}


def _weight(batch: dict[str, Any]) -> Tensor | None:
    mask = batch.get('attention_mask')
    return mask.float() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _kl(expected: Tensor, actual: Tensor, weight: Tensor | None, rows: int = 1024) -> float:
    """Sum over tokens of KL(expected || actual), `rows` tokens at a time in fp32."""
    total = 0.0
    weight = expected.new_ones(expected.shape[:2], dtype=torch.float32) if weight is None else weight
    chunks = zip(*(t.flatten(0, 1).split(rows) for t in (expected, actual, weight)))
    for p, q, w in chunks:
        p, q = (F.log_softmax(t.float(), -1) for t in (p, q))
        total += float(((p.exp() * (p - q)).sum(-1) * w).sum())
    return total
