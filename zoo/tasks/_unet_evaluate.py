"""The end of a distillation of a UNet: students written, teacher and students measured side by side."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.report import plot_sheet
from zoo.tasks._unet_judge import Verdict, trained_judge
from zoo.tasks._unet_report import (
    Row,
    draw_classes,
    draw_prompts,
    mosaic,
    plot_losses,
    plot_panels,
    say_rows,
    timed,
    write_rows,
)
from zoo.tasks._unet_student import Student, save_linear
from zoo.tasks.train_unet import count_usable, held_out_generator

if TYPE_CHECKING:
    from zoo.tasks.distill_unet import DistillUNet

STUDENT = 'linfusion'  # the folder of a student's layers in the run's
REAL, TEACHER, UNTRAINED = 'real, held out', 'teacher, softmax', 'undistilled'


def conclude(task: DistillUNet, test: bool) -> list[str]:
    """See DistillUNet.conclude."""
    report = task.run_dir / 'report'
    report.mkdir(parents=True, exist_ok=True)
    plot_losses(task.run_dir / 'metrics.csv', report / 'curves.png')
    task.swap_average()
    try:
        lines = _export(task)
        if test:
            _evaluate(task, report)
    finally:
        task.swap_average()
    return [*lines, f'report:  {report}/']


def student_name(task: DistillUNet, init: str) -> str:
    """The name of a student in tables and folders."""
    return STUDENT if len(task.inits) == 1 else f'{STUDENT}-{init}'


def _export(task: DistillUNet) -> list[str]:
    half = task.trainer.precision.startswith(('16', 'bf16'))
    lines = []
    for init, student in task.students.items():
        target = task.run_dir / student_name(task, init)
        state = {k: v.detach() for k, v in task.layers[init].state_dict().items()}
        save_linear(student.linear, state, target, torch.float16 if half else torch.float32)
        lines.append(f'student: {target}/  (zoo.backbones.linfusion.LinFusion.attach(pipeline, FOLDER))')
    return lines


@contextlib.contextmanager
def _inference(task: DistillUNet) -> Iterator[None]:
    with torch.no_grad(), task.trainer.precision_plugin.forward_context():
        yield


def _evaluate(task: DistillUNet, report: Path) -> None:
    task.to(task.trainer.strategy.root_device)  # a strategy may have taken what was trained away
    frame, settings = task.frame, task.samples
    students = {f'student, {init} init': student for init, student in task.students.items()}
    if settings.untrained:
        fresh = {f'{UNTRAINED}, {init} init': task.new_student(task.teacher, init) for init in task.inits}
        students |= fresh
    with _inference(task):
        errors, noise = _held_out(task, students)
    rows = [Row(REAL, 0), Row(TEACHER, 0, noise_mse=noise)]
    rows += [Row(name, 0, *values) for name, values in errors.items()]
    unets = {TEACHER: task.teacher, **{name: student.unet for name, student in students.items()}}
    judged = 'nobody'
    if frame.classes is not None and settings.count:
        rows, judged = _judged(task, rows, unets, report)
    elif settings.prompts:
        frame.to(task.device)
        with _inference(task):
            drawn = {name: draw_prompts(frame, unet, settings) for name, unet in unets.items()}
        images = [image for group in zip(*drawn.values()) for image in group]
        captions = [f'{name}\n{prompt[:28]}' for prompt in settings.prompts for name in drawn]
        plot_sheet(images, captions, report / 'samples.png')
    rows = [row for row in rows if row.name != REAL or row.samples]
    say_rows(rows, judged)
    write_rows(report / 'table.json', rows, _conditions(task, judged))


def _held_out(task: DistillUNet, students: dict[str, Student]) -> tuple[dict[str, tuple[float, float, float]], float]:
    """Means over the test split: noise error, distance to the teacher's output and features of each student; then the
    teacher's noise error."""
    data, frame = task.trainer.datamodule, task.frame
    sums, teacher, count = {name: torch.zeros(3, dtype=torch.float64) for name in students}, 0.0, 0
    loader, limit = data.test_dataloader(), task.trainer.limit_test_batches
    limit = limit if isinstance(limit, int) else round(limit * len(loader))
    for number, batch in enumerate(itertools.islice(loader, limit)):
        batch = data.transfer_batch_to_device(batch, task.device, 0)
        batch = data.on_after_batch_transfer(batch, 0)
        size = count_usable(data, batch)
        if not size:
            continue
        step = frame.draw(batch, generator=held_out_generator(task.device, 0, number))
        wanted, found = task.compare(step, students)
        count += size
        teacher += float(frame.noise_error(wanted, step).sum())
        for name, (out, parts) in found.items():
            own = float(frame.noise_error(out, step).mean())
            sums[name] += size * torch.tensor([own, float(parts.output), float(parts.features)], dtype=torch.float64)
    return {name: tuple((total / max(count, 1)).tolist()) for name, total in sums.items()}, teacher / max(count, 1)


def _judged(task: DistillUNet, rows: list[Row], unets: dict[str, nn.Module], report: Path) -> tuple[list[Row], str]:
    """Fills in what the judge says, adds a row for each further size, and draws the picture."""
    data, settings, pipeline = task.trainer.datamodule, task.samples, task.frame.pipeline
    train, test = (tuple(t.to(task.device) for t in data.whole(split)) for split in ('train', 'test'))
    net = trained_judge(settings.judge, *train, pipeline.classes, task.run_dir / 'judge.safetensors')
    verdict = Verdict(net, train[0])
    size = train[0].shape[-1]
    panels = {REAL: mosaic(_by_class(*test, pipeline.classes, settings.rows), pipeline.classes)}
    for row in rows:
        row.size = size
    rows[0].samples = len(test[0])
    rows[0].accuracy, rows[0].frechet = verdict(*test)
    judged = f'a classifier that names {100 * rows[0].accuracy:.2f} % of the real ones'
    scored = [(row, unets[row.name]) for row in rows[1:]]
    for side in settings.sizes:
        scored += [(Row(name, side), unet) for name, unet in unets.items() if not name.startswith(UNTRAINED)]
    for row, unet in scored:
        with timed(task.device) as seconds, _inference(task):
            count = settings.count if row.size == size else settings.sizes_count
            images, labels = draw_classes(pipeline, unet, settings, count, row.size)
        row.samples, row.seconds = len(images), seconds[0]
        row.accuracy, row.frechet = verdict(images, labels)
        shown = min(len(images), pipeline.classes * settings.rows)
        panels[f'{row.name}, {row.size} px'] = mosaic(images[:shown], pipeline.classes)
    plot_panels(panels, report / 'samples.png')
    return [rows[0], *(row for row, _ in scored)], judged


def _by_class(images: Tensor, labels: Tensor, classes: int, rows: int) -> Tensor:
    """The first images of each class, one class in each column; classes with too few begin again."""
    chosen = [(labels == number).nonzero().flatten() for number in range(classes)]
    return images[torch.stack([places[row % len(places)] for row in range(rows) for places in chosen])]


def _conditions(task: DistillUNet, judged: str) -> dict[str, Any]:
    import diffusers

    from zoo.tasks.optim import as_plain

    device = task.trainer.strategy.root_device
    return {
        'teacher': str(task.teacher_folder),
        'init': task.inits,
        'projection_mid_dim': task.projection_mid_dim,
        'steps': task.global_step,
        'precision': str(task.trainer.precision),
        'samples': as_plain(task.samples),
        'judge': judged,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'diffusers': diffusers.__version__,
    }
