"""What contrastive training compares: open_clip's losses over both towers, those of a teacher, encoding in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.data.transforms import View
from zoo.errors import ZooError
from zoo.heads.contrast import build_tokenizer, load_open_clip, normalisation, open_clip_config

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class DistillTowers:
    """A contrastive teacher and how much its opinion counts; weights of 0 leave a part out.

    Args:
        teacher: Any open_clip model, also local-dir:FOLDER or hf-hub:REPOSITORY.
        pretrained: Tag or file of its weights.
        feature: Weight of the squared distance of normalised features, image to image and text to text, through a
            trained projection where widths differ (CLIP-KD's FD, arXiv 2307.12732).
        similarity: Weight of the squared distance of the similarities among images, and among texts, of a batch.
        logits: Weight of the cross-entropy of image-text similarities (CLIP-KD's CRD, TinyCLIP's affinity mimicking):
            open_clip's DistillClipLoss.
        contrastive: Weight of the contrastive loss itself.
    """

    teacher: str
    pretrained: str | None = None
    feature: float = 0.0
    similarity: float = 0.0
    logits: float = 1.0
    contrastive: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.feature, self.similarity, self.logits)
        if min(*weights, self.contrastive) < 0 or not any(weights):
            raise ZooError('distill: weights must not be negative, and one of feature, similarity, logits positive')

    @property
    def embed_dim(self) -> int:
        return open_clip_config(self.teacher)['embed_dim']


class Converter:
    """From the images of a data module to those that a tower expects: normalisation, and size where one is given.

    Args:
        view: What the data gives.
        visual: The tower.
        size: Height and width; None leaves them.
    """

    def __init__(self, view: View, visual: nn.Module, size: tuple[int, int] | None = None) -> None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation(visual))
        given = [torch.tensor(values).view(1, -1, 1, 1) for values in (view.mean, view.std)]
        if view.channels == 1:  # towers for grey images have no statistics of their own
            mean, std = given
        self.scale, self.shift, self.size = given[1] / std, (given[0] - mean) / std, size

    def __call__(self, images: Tensor) -> Tensor:
        images = images * self.scale.to(images) + self.shift.to(images)
        if self.size and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode='bicubic', align_corners=False, antialias=True)
        return images


class TowersTeacher:
    """The frozen teacher. Not a module, so that it is neither trained nor written to checkpoints.

    Args:
        settings: Settings.
        view: What the data gives.
    """

    def __init__(self, settings: DistillTowers, view: View) -> None:
        self.net = load_open_clip(settings.teacher, settings.pretrained).eval().requires_grad_(False)
        size = self.net.visual.image_size
        self.convert = Converter(view, self.net.visual, (size, size) if isinstance(size, int) else tuple(size))
        self.tokens = Tokens(build_tokenizer(settings.teacher, None))

    def to(self, device: torch.device) -> TowersTeacher:
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str], chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features of images and captions, and the scale of their similarities."""
        image = encode(self.net.visual, self.convert(images), chunk)
        text = encode_texts(self.net.text, self.tokens, captions, chunk, images.device)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), self.net.logit_scale.exp().float()


class Tokens:
    """A tokenizer that remembers what it has tokenised, as captions come back every epoch.

    Args:
        tokenizer: Texts to int64 (N, length).
        most: Texts that are remembered.
    """

    def __init__(self, tokenizer: Any, most: int = 1 << 16) -> None:
        self.tokenizer, self.most = tokenizer, most
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in self.known]
        if len(self.known) + len(missing) > self.most:
            self.known, missing = {}, list(dict.fromkeys(texts))
        if missing:
            self.known.update(zip(missing, self.tokenizer(missing)))
        return torch.stack([self.known[text] for text in texts])


# encoding


def encode(tower: nn.Module, inputs: Tensor, chunk: int | None) -> Tensor:
    """Features of a batch, in memory for the activations of one chunk.

    With gradients a chunk keeps its features alone and is computed again, with the same random numbers, when its
    gradients are due: those of the whole batch, as in GradCache (arXiv 2101.06983). Batch norms normalise chunk by
    chunk, and see each one once.

    Args:
        tower: The tower.
        inputs: Its inputs (N, ...).
        chunk: Samples at a time; None for all.
    """
    if not chunk or len(inputs) <= chunk:
        return tower(inputs)
    if not torch.is_grad_enabled():
        return torch.cat([tower(part) for part in inputs.split(chunk)])
    contexts = partial(_first_and_again, tower)
    return torch.cat(
        [checkpoint(tower, part, use_reentrant=False, context_fn=contexts) for part in inputs.split(chunk)]
    )


def _first_and_again(tower: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _steady_statistics(tower)


@contextlib.contextmanager
def _steady_statistics(tower: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch norms as they are."""
    norms = [(m, m.momentum, m.num_batches_tracked) for m in tower.modules() if isinstance(m, _NORMS)]
    norms = [(m, momentum, None if seen is None else seen.clone()) for m, momentum, seen in norms]
    for norm, _, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, seen in norms:
            norm.momentum = momentum
            if seen is not None:
                norm.num_batches_tracked.copy_(seen)


def encode_texts(
    tower: nn.Module, tokens: Tokens, captions: list[str], chunk: int | None, device: torch.device
) -> Tensor:
    """Features of captions, each different one encoded once."""
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    features = encode(tower, tokens(list(places)).to(device), chunk)
    return features[torch.tensor([places[caption] for caption in captions], device=device)]


# losses


def build_loss(kind: str, rank: int = 0, world_size: int = 1) -> nn.Module:
    """open_clip's loss over the batches of all processes, gradients included."""
    if kind == 'siglip':
        return SigLipLoss(rank=rank, world_size=world_size)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)


def contrastive_loss(criterion: nn.Module, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The loss of normalised fp32 features (B, D)."""
    if isinstance(criterion, SigLipLoss):
        return criterion(image, text, scale, bias)
    return criterion(image, text, scale, logit_bias=bias)


def distill_losses(
    settings: DistillTowers,
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    projections: nn.ModuleDict | None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """The parts that the settings ask for, not yet weighted.

    Args:
        settings: Settings.
        student: Normalised features of images and texts (B, D), fp32, and the scale of their similarities.
        teacher: The same, of another width perhaps.
        projections: `image` and `text`, from the student's width to the teacher's; None where they agree.
        rank: This process.
        world_size: Processes whose batches `logits` compares.
    """
    (image, text, scale), (image_t, text_t, scale_t) = student, teacher
    found: dict[str, Tensor] = {}
    if settings.feature:
        mapped = (image, text)
        if projections is not None:
            mapped = tuple(F.normalize(projections[k](x), dim=-1) for k, x in (('image', image), ('text', text)))
        found['feature'] = sum((a - b).square().sum(-1).mean() for a, b in zip(mapped, (image_t, text_t)))
    if settings.similarity:
        pairs = ((image, image_t), (text, text_t))
        found['similarity'] = sum((a @ a.T - b @ b.T).square().mean() for a, b in pairs)
    if settings.logits:
        criterion = DistillClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        ours = criterion.get_logits(image, text, scale)
        theirs = criterion.get_logits(image_t, text_t, scale_t)
        found['logits'] = sum(criterion.dist_loss(b, a) for a, b in zip(ours, theirs)) / 2
    return found
