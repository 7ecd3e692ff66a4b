"""A small classifier, trained on the data that generated images imitate, that judges them: class and distance."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.seeding import derive_seed, run_seed


@dataclass
class Judge:
    """The classifier that judges samples.

    Args:
        widths: Channels of its stages; each but the first halves the image.
        epochs: Passes over the training split.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW.
        shift: Random shift in pixels.
        hflip: Whether to mirror half of the images.
    """

    widths: tuple[int, ...] = (32, 64)
    epochs: int = 20
    batch_size: int = 64
    lr: float = 5e-3
    shift: int = 1
    hflip: bool = False


class JudgeNet(nn.Module):
    """Convolutions with residual blocks; `features` (B, num_features) come before the last layer.

    Args:
        channels: Of the images.
        classes: Number of classes.
        widths: See Judge.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((channels, *widths), widths)):
            stages += [_convolution(before, width, stride=1 if number == 0 else 2), _Residual(width)]
        self.stages, self.num_features = nn.Sequential(*stages), widths[-1]
        self.head = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        return self.stages(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _convolution(before: int, width: int, stride: int = 1) -> nn.Module:
    layers = (nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*layers)


def trained_judge(settings: Judge, images: Tensor, targets: Tensor, classes: int, cache: Path) -> JudgeNet:
    """The judge of a training split, in eval mode; trained once, then read from `cache`.

    Args:
        settings: Settings.
        images: fp32 (N, C, H, W) in -1..1, on the device to work on.
        targets: int64 (N,).
        classes: Number of classes.
        cache: safetensors file; one that is for other settings or images is written anew.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    digest = hashlib.sha256(images.to(torch.float16).cpu().numpy().tobytes() + targets.cpu().numpy().tobytes())
    told = {'judge': json.dumps({**asdict(settings), 'seed': run_seed(), 'data': digest.hexdigest()})}
    net = JudgeNet(images.shape[1], classes, tuple(settings.widths))
    if cache.is_file():
        with safe_open(cache, 'pt') as file:
            if file.metadata() == told:
                net.load_state_dict(load_file(cache))
                return net.to(images.device).eval()
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(run_seed(), 4) % 2**63)
        net = JudgeNet(images.shape[1], classes, tuple(settings.widths)).to(images.device)
        _train(net, settings, images, targets)
    cache.parent.mkdir(parents=True, exist_ok=True)
    staged = cache.with_name(f'.{cache.name}.tmp-{os.getpid()}')
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, staged, metadata=told)
    os.replace(staged, cache)
    return net.eval()


def _train(net: JudgeNet, settings: Judge, images: Tensor, targets: Tensor) -> None:
    steps = settings.epochs * max(1, len(images) // settings.batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), settings.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps, pct_start=0.2)
    cuda = images.device.type == 'cuda'
    net.train().to(memory_format=torch.channels_last)
    order = torch.empty(0, dtype=torch.long, device=images.device)
    for _ in range(steps):
        if len(order) < settings.batch_size:
            order = torch.randperm(len(images), device=images.device)
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        batch = moved(images[chosen], settings.shift, settings.hflip)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cuda):
            loss = F.cross_entropy(net(batch).float(), targets[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def moved(images: Tensor, shift: int, hflip: bool) -> Tensor:
    """Images (B, C, H, W), each shifted at random by up to `shift` pixels, borders repeated, and perhaps mirrored."""
    count, height, width = len(images), images.shape[-2], images.shape[-1]
    device = images.device
    rows, columns = torch.randint(-shift, shift + 1, (2, count, 1), device=device)
    rows = (torch.arange(height, device=device) + rows).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + columns).clamp(0, width - 1)
    if hflip:
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    batch = torch.arange(count, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Verdict:
    """Scores sets of images by a judge.

    Args:
        net: The judge.
        real: Training images that the Fréchet distance is to, (N, C, H, W).
        batch_size: Images at a time.
    """

    def __init__(self, net: JudgeNet, real: Tensor, batch_size: int = 1024) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.net, self.batch_size, self.size = net, batch_size, real.shape[-2:]
        # on the CPU, where torch has the eigenvalues that it needs; features come ready
        given = _Given(net.num_features)
        self.distance = FrechetInceptionDistance(feature=given, reset_real_features=False, normalize=True)
        with torch.no_grad():
            for part in real.split(batch_size):
                self.distance.update(net.features(part).cpu(), real=True)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Share of images of the right class, and Fréchet distance to the training images.

        Args:
            images: (N, C, H, W) in -1..1; other sizes than the judge's are averaged over areas.
            labels: int64 (N,).
        """
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode='area')
        right = 0
        self.distance.reset()
        for part, truth in zip(images.split(self.batch_size), labels.split(self.batch_size)):
            features = self.net.features(part)
            right += int((self.net.head(features).argmax(1) == truth).sum())
            self.distance.update(features.cpu(), real=False)
        return right / len(images), float(self.distance.compute())


class _Given(nn.Module):
    """What torchmetrics takes for a feature extractor where features are known."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
