"""What contrastive models are measured by: zero-shot classification, retrieval in both directions, a linear probe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.errors import ZooError

CUTS = (1, 5, 10)
NAMED_TEMPLATES = {
    'openai': open_clip.OPENAI_IMAGENET_TEMPLATES,
    'simple': open_clip.SIMPLE_IMAGENET_TEMPLATES,
}
_SIMILARITIES = 1 << 24  # at a time
_PROBE_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def _is_template(text: str) -> bool:
    try:
        return 'class' in text.replace('class', '').format('class')
    except (IndexError, KeyError, ValueError):
        return False


@dataclass
class ZeroShot:
    """How classes become texts.

    Args:
        templates: Texts with {} in the place of the class, which are averaged; or openai (CLIP's 80 for ImageNet) or
            simple (7 of them). Labelled images get one of them, drawn anew at every step, as caption in training.
        classes: Names of the classes; null takes those of the data.
    """

    templates: list[str] | str = 'simple'
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.templates, str):
            if self.templates not in NAMED_TEMPLATES:
                raise ZooError(
                    f'zero_shot.templates is {self.templates!r}: give a list of texts with {{}}, or '
                    f'{" or ".join(NAMED_TEMPLATES)}'
                )
        elif not self.templates or not all(map(_is_template, self.templates)):
            raise ZooError('zero_shot.templates: every text needs {} where the class goes, and no other braces')

    def builders(self) -> list[Callable[[str], str]]:
        """Functions from a class to a text."""
        if isinstance(self.templates, str):
            return list(NAMED_TEMPLATES[self.templates])
        return [text.format for text in self.templates]


class ZeroShotAccuracy(Metric):
    """`top1`, `top5` where there are more than five classes, and the mean cross-entropy as `loss`."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ('top1', 'top5', 'loss', 'total'):
            self.add_state(name, torch.zeros((), dtype=None if name == 'loss' else torch.long), 'sum')
        self.many = False

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch: (B, C) and int64 (B,)."""
        guesses = logits.topk(min(5, logits.shape[-1]), -1).indices == target[:, None]
        self.many = logits.shape[-1] > 5
        self.top1 += guesses[:, 0].sum()
        self.top5 += guesses.sum()
        self.loss += F.cross_entropy(logits.float(), target, reduction='sum')
        self.total += len(target)

    def compute(self) -> dict[str, Tensor]:
        total = self.total.clamp(min=1)
        found = {'top1': self.top1 / total, 'loss': self.loss / total}
        return found | ({'top5': self.top5 / total} if self.many else {})


class Retrieval(Metric):
    """Recall at 1, 5 and 10 from images to texts and back, as `i2t_r1` and so on.

    Equal captions are one text, and any of its images is a right answer, as with the five captions of COCO's images.
    Ties count against the model.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ('image', 'text', 'key'):
            self.add_state(name, [], 'cat')

    def update(self, image: Tensor, text: Tensor, captions: list[str]) -> None:
        """Adds a batch: normalised features (B, D) each, and the captions."""
        self.image.append(image.float())
        self.text.append(text.float())
        keys = [int.from_bytes(hashlib.blake2b(c.encode(), digest_size=8).digest(), 'big') >> 1 for c in captions]
        self.key.append(torch.tensor(keys, device=image.device))

    def compute(self) -> dict[str, Tensor]:
        image, text, key = (dim_zero_cat(state) for state in (self.image, self.text, self.key))
        _, owner = key.unique(return_inverse=True)
        count = int(owner.max()) + 1
        first = torch.full((count,), len(key), device=key.device).scatter_reduce(
            0, owner, torch.arange(len(key), device=key.device), 'amin'
        )
        text = text[first]
        image_ranks = torch.cat([self._image_ranks(*part, text) for part in self._parts(image, owner, count)])
        order = torch.arange(count, device=key.device)
        text_ranks = torch.cat([self._text_ranks(*part, image, owner) for part in self._parts(text, order, len(image))])
        ranks = (('i2t', image_ranks), ('t2i', text_ranks))
        return {f'{name}_r{cut}': (rank < cut).float().mean() for name, rank in ranks for cut in CUTS}

    @staticmethod
    def _parts(rows: Tensor, numbers: Tensor, columns: int) -> list[tuple[Tensor, Tensor]]:
        step = max(1, _SIMILARITIES // columns)
        return list(zip(rows.split(step), numbers.split(step)))

    @staticmethod
    def _image_ranks(image: Tensor, owner: Tensor, text: Tensor) -> Tensor:
        similarity = image @ text.T
        right = similarity.gather(1, owner[:, None])
        return (similarity >= right).sum(1) - 1

    @staticmethod
    def _text_ranks(text: Tensor, number: Tensor, image: Tensor, owner: Tensor) -> Tensor:
        similarity = text @ image.T
        right = owner == number[:, None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        return ((similarity >= best) & ~right).sum(1)


@torch.no_grad()
def classifier(net: nn.Module, tokenizer: Any, classes: list[str], zero_shot: ZeroShot, device: Any) -> Tensor:
    """open_clip's zero-shot classifier: (D, C), columns of length 1.

    Args:
        net: Model of open_clip.
        tokenizer: Texts to ids.
        classes: Names.
        zero_shot: Templates.
        device: Of the network.
    """
    templates = zero_shot.builders()
    per_batch = max(1, 1024 // len(templates))
    return open_clip.build_zero_shot_classifier(net, tokenizer, classes, templates, per_batch, device).float()


@torch.no_grad()
def trunk_features(visual: nn.Module, images: Tensor) -> Tensor:
    """What a linear probe sees: the pooled features before the projection, where the tower has such."""
    return visual.trunk(images) if hasattr(visual, 'trunk') else visual(images)


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> tuple[float, float]:
    """Top-1 of a multinomial logistic regression on frozen features, by L-BFGS.

    Its weight decay is the best of five on a tenth of the training features, which then train with the rest.

    Args:
        train: Features (N, D) and targets (N,).
        test: The same.
        classes: Number of classes.

    Returns:
        Accuracy within 0..1 on the test features, and the weight decay.
    """
    with torch.inference_mode(False):  # Lightning tests in inference mode, whose tensors autograd refuses
        return _probe(*((x.float().clone(), y.clone()) for x, y in (train, test)), classes)


def _probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> tuple[float, float]:
    features, target = train
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features, tested = (features - mean) / std, (test[0] - mean) / std
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    held, kept = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]

    def accuracy(fitted: nn.Linear, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float((fitted(x).argmax(-1) == y).float().mean())

    scores = {
        decay: accuracy(_fit(features[kept], target[kept], classes, decay), features[held], target[held])
        for decay in _PROBE_DECAYS
    }
    best = max(scores, key=scores.__getitem__)
    return accuracy(_fit(features, target, classes, best), tested, test[1]), best


@torch.enable_grad()
def _fit(features: Tensor, target: Tensor, classes: int, decay: float) -> nn.Linear:
    linear = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    solver = torch.optim.LBFGS(linear.parameters(), max_iter=100, history_size=10, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(linear(features), target) + decay * linear.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return linear
