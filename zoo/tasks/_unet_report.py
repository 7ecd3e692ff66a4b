"""What training or distilling a UNet leaves for the eye: samples, a table, curves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from zoo.data.seeding import derive_seed, run_seed
from zoo.report import _BLUE, _COLOURS, _ORANGE, _figure, plot_sheet, read_metrics
from zoo.tasks._denoising import Frame
from zoo.tasks._distill_report import show, write_json
from zoo.tasks._unet_judge import Judge


@dataclass
class Samples:
    """What is drawn when a run is done.

    Args:
        count: Images per model and size for the table, the classes in turn; 0 for none.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        batch_size: Images at a time.
        sizes: Sizes in pixels besides the one that was trained on.
        sizes_count: Images per model at each of them.
        untrained: Whether a distillation also measures its students as they were before it.
        rows: Images of each class in the picture.
        prompts: Texts to draw, for pipelines that take texts.
        judge: The classifier that scores images of classes.
    """

    count: int = 400
    steps: int = 20
    guidance: float = 2.0
    batch_size: int = 250
    sizes: list[int] = field(default_factory=list)
    sizes_count: int = 1000
    untrained: bool = True
    rows: int = 4
    prompts: list[str] = field(default_factory=list)
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        if isinstance(self.judge, dict):  # as checkpoints hold it
            self.judge = Judge(**self.judge)


def draw_classes(pipeline: Any, unet: nn.Module, settings: Samples, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Guided samples, the classes in turn, the same starting noise for every model.

    Args:
        pipeline: A ClassToImagePipeline.
        unet: Takes the place of its UNet.
        settings: Settings.
        count: Number of images.
        size: Height and width.

    Returns:
        fp32 (count, C, size, size) in -1..1 and class numbers (count,), on the UNet's device.
    """
    labels = torch.arange(count) % pipeline.classes
    parts = []
    for start in range(0, count, settings.batch_size):
        generator = torch.Generator().manual_seed(derive_seed(run_seed(), 3, size, start) % 2**63)
        parts.append(
            pipeline(
                labels[start : start + settings.batch_size],
                settings.steps,
                settings.guidance,
                generator,
                size,
                size,
                output_type='pt',
                unet=unet,
            ).images
        )
    images = torch.cat(parts)
    return images, labels.to(images.device)


def draw_prompts(frame: Frame, unet: nn.Module, settings: Samples) -> list[Image.Image]:
    """One image for each prompt, the same starting noise for every model."""
    pipeline = frame.pipeline
    former, pipeline.unet = pipeline.unet, unet
    try:
        images = []
        for number, prompt in enumerate(settings.prompts):
            generator = torch.Generator().manual_seed(derive_seed(run_seed(), 3, number) % 2**63)
            options = {'num_inference_steps': settings.steps, 'guidance_scale': settings.guidance}
            latents = pipeline(prompt, generator=generator, output_type='latent', **options).images
            images += pipeline.image_processor.postprocess(frame.decode(latents), output_type='pil')
        return images
    finally:
        pipeline.unet = former


def mosaic(images: Tensor, columns: int) -> Image.Image:
    """A picture of images (N, C, H, W) in -1..1, row by row, a white line between them."""
    pixels = (images.float().cpu().clamp(-1, 1) / 2 + 0.5).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    height, width = pixels.shape[-2:]
    rows = -(-len(pixels) // columns)
    sheet = torch.full((3, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=torch.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + 1) + 1, number % columns * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def draw_sheet(frame: Frame, settings: Samples, target: Path) -> None:
    """Draws the samples of a pipeline's own UNet."""
    pipeline = frame.pipeline
    if frame.classes is not None:
        size = pipeline.unet.config.sample_size
        images, _ = draw_classes(pipeline, pipeline.unet, settings, pipeline.classes * settings.rows, size)
        plot_panels({'samples, a class in each column': mosaic(images, pipeline.classes)}, target)
    elif settings.prompts:
        plot_sheet(draw_prompts(frame, pipeline.unet, settings), settings.prompts, target)


def plot_panels(panels: dict[str, Image.Image], target: Path) -> None:
    """Draws pictures below each other, each with its title, pixels unsmoothed."""
    ratios = [image.height / image.width for image in panels.values()]
    figure, axes = _figure(8, sum(8 * ratio + 0.35 for ratio in ratios), len(panels), 1)
    for axis, (title, image) in zip(axes[:, 0], panels.items()):
        axis.imshow(image, interpolation='nearest')
        axis.set_title(title, fontsize=10)
        axis.axis('off')
    figure.savefig(target)


def plot_losses(metrics: Path, target: Path) -> None:
    """Draws training and validation losses over optimizer steps; the right half holds what a distillation matches."""
    if not metrics.is_file():
        return
    series = read_metrics(metrics)
    wanted = ('output', 'features')
    parts = sorted(k for k in series if k.startswith('val/') and k.rsplit('/', 1)[1] in wanted)
    figure, axes = _figure(11 if parts else 6, 4, 1, 2 if parts else 1)
    left = axes[0, 0]
    if 'train/loss_step' in series:
        left.plot(*series['train/loss_step'], color=_BLUE, alpha=0.4, linewidth=0.8, label='training batches')
    if 'val/loss' in series:
        left.plot(*series['val/loss'], color=_ORANGE, marker='.', markersize=4, label='validation')
    left.set(title='Loss', ylabel='mean squared error', yscale='log')
    for key, color in zip(parts, _COLOURS):
        inner = key.removeprefix('val/')
        axes[0, 1].plot(*series[key], color=color, marker='.', label=f'{inner}, validation')
        if f'train/{inner}' in series:
            axes[0, 1].plot(*series[f'train/{inner}'], color=color, alpha=0.4, linewidth=0.8)
    if parts:
        axes[0, 1].set(title="Distance to the teacher's output and self-attention", yscale='log')
    for axis in axes[0]:
        axis.set_xlabel('optimizer step')
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    figure.savefig(target)


# the table of a distillation


@dataclass
class Row:
    """One model at one size.

    Args:
        name: real, teacher or a student.
        size: Height and width in pixels.
        noise_mse: Error of the predicted noise on held-out images.
        output: Mean squared distance to the teacher's output there.
        features: Mean over the layers of that to the teacher's self-attention.
        accuracy: Share of samples that the judge gives their class.
        frechet: Distance of the judge's features to those of the training images.
        samples: Number of images behind the last two.
        seconds: Time to draw them.
    """

    name: str
    size: int
    noise_mse: float | None = None
    output: float | None = None
    features: float | None = None
    accuracy: float | None = None
    frechet: float | None = None
    samples: int = 0
    seconds: float | None = None


def say_rows(rows: list[Row], judge: str) -> None:
    """Prints the table."""
    table = Table()
    for number, column in enumerate(
        ('', 'size', 'noise MSE', 'to teacher', 'attention', 'right class', 'Frechet', 'samples', 's')
    ):
        table.add_column(column, justify='right' if number else 'left')
    for row in rows:
        errors = ('' if v is None else f'{v:.4f}' for v in (row.noise_mse, row.output, row.features))
        share = '' if row.accuracy is None else f'{100 * row.accuracy:.2f} %'
        distance = '' if row.frechet is None else f'{row.frechet:.3f}'
        taken = '' if row.seconds is None else f'{row.seconds:.1f}'
        table.add_row(row.name, str(row.size or ''), *errors, share, distance, str(row.samples or ''), taken)
    show(f'held-out images, and samples judged by {judge}', table)


def write_rows(path: Path, rows: list[Row], more: dict[str, Any]) -> None:
    write_json(path, {**more, 'rows': [asdict(row) for row in rows]})


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Gives a list that holds the seconds of the block when it has ended."""
    taken: list[float] = []
    start = _now(device)
    yield taken
    taken.append(_now(device) - start)


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
