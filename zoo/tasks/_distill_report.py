"""What a distillation leaves for the eye: tables on the console, curves, accuracy over softmax layers, JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from zoo.report import read_metrics

if TYPE_CHECKING:
    from zoo.tasks._distill_stages import Plan
    from zoo.tasks._distill_student import Student

ALL = 'all'  # the row over all questions


def show(title: str, table: Table, caption: str = '') -> None:
    """Prints a table, in full also where the output is a file."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(title, table, *filter(None, [caption]), sep='\n', highlight=False)


def say_stage(plan: Plan, index: int, student: Student, kl: float, agreement: float) -> None:
    """Prints where a stage starts and what it trains."""
    from zoo.tasks._distill_student import parameter_rows

    stage = plan.stages[index]
    softmax = f', softmax in layers {stage.softmax_layers}' if stage.softmax_layers else ''
    title = f'stage {index + 1}/{len(plan.stages)} {stage.name}: {stage.loss}, {stage.max_steps} steps{softmax}'
    caption = f'at its start: KL(teacher || student) {kl:.4g} nats a position, same first choice {agreement:.1%}'
    table = Table()
    table.add_column('parameters')
    table.add_column('trained', justify='right')
    table.add_column('of', justify='right')
    for kind, trained, total in parameter_rows(student):
        table.add_row(kind, f'{trained:,}', f'{total:,}')
    show(title, table, caption)


# the final table


@dataclass
class Measured:
    """One model of the final table.

    Args:
        name: teacher, or the stage's name.
        softmax_layers: Number of layers with softmax attention.
        layers: Number of decoder layers.
        correct: Questions answered right, per type.
        questions: Questions asked, per type.
        tokens_per_s: Generated tokens per second over the whole batch, prompts included in the time.
        state_bytes: What the cache holds for one sample of `context` tokens.
        context: Tokens of that sample.
    """

    name: str
    softmax_layers: int
    layers: int
    correct: dict[str, int]
    questions: dict[str, int]
    tokens_per_s: float | None = None
    state_bytes: int | None = None
    context: int | None = None

    def accuracy(self, kind: str) -> float:
        """Exact match of a type, or of all questions."""
        if kind == ALL:
            return sum(self.correct.values()) / max(1, sum(self.questions.values()))
        return self.correct[kind] / max(1, self.questions[kind])


def margin_kept(student: Measured, teacher: Measured, chance: dict[str, float], kind: str) -> float | None:
    """Share of the teacher's exact match above chance that the student has; None where the teacher has none.

    Over all questions, chance is the mean over questions.
    """
    if kind == ALL:
        asked = sum(teacher.questions.values())
        floor = sum(chance.get(k, 0.0) * n for k, n in teacher.questions.items()) / max(1, asked)
    else:
        floor = chance.get(kind, 0.0)
    margin = teacher.accuracy(kind) - floor
    return (student.accuracy(kind) - floor) / margin if margin > 0 else None


def as_json(models: list[Measured], chance: dict[str, float], more: dict[str, Any]) -> dict[str, Any]:
    """The final table with everything it is computed from; the first model is the teacher."""
    teacher, kinds = models[0], [*models[0].questions, ALL]
    rows = []
    for model in models:
        row = asdict(model)
        row['exact_match'] = {k: model.accuracy(k) for k in kinds}
        row['margin_kept'] = {k: margin_kept(model, teacher, chance, k) for k in kinds}
        rows.append(row)
    return {**more, 'chance': chance, 'models': rows}


def say_table(models: list[Measured], chance: dict[str, float]) -> None:
    """Prints exact match per question type and the share of the teacher's margin above chance in brackets."""
    # rows without a type are of the type ALL
    teacher, kinds = models[0], [*(k for k in models[0].questions if k != ALL), ALL]
    asked = sum(teacher.questions.values())
    table = Table()
    table.add_column('')
    for model in models:
        table.add_column(model.name, justify='right')
    table.add_column('chance', justify='right')
    for kind in kinds:
        cells = []
        for model in models:
            kept = margin_kept(model, teacher, chance, kind)
            share = '' if model is teacher or kept is None else f' ({100 * kept:.1f} %)'
            cells.append(f'{100 * model.accuracy(kind):.2f} %{share}')
        floor = chance.get(kind)
        table.add_row(kind, *cells, '' if floor is None else f'{100 * floor:.1f} %', end_section=kind == kinds[-2:][0])
    table.add_section()
    table.add_row('softmax layers', *(f'{m.softmax_layers} of {m.layers}' for m in models), '')
    if all(m.tokens_per_s for m in models):
        table.add_row('tokens/s', *(f'{m.tokens_per_s:.1f}' for m in models), '')
    if all(m.state_bytes for m in models):
        label = f'state bytes at {teacher.context} tokens'
        table.add_row(label, *(f'{m.state_bytes:,}' for m in models), '')
    show(f'{asked} questions: exact match (share of the margin above chance that is kept)', table)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    staged.write_text(json.dumps(value, indent=1) + '\n')
    os.replace(staged, path)


# figures


def _axes(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from zoo.report import _figure

    figure, axes = _figure(width, height, 1, columns)
    return figure, axes[0]


def plot_layers(metrics: Path, plan: Plan, target: Path) -> bool:
    """Draws the head error of every layer over the steps of each heads stage; False without any."""
    from matplotlib import colormaps

    series = read_metrics(metrics)
    names = sorted(k for k in series if k.startswith('layers/'))
    stages = [(i, s) for i, s in enumerate(plan.stages) if s.loss == 'heads']
    if not names or not stages:
        return False
    figure, axes = _axes(5.2 * len(stages) + 1, 4, len(stages))
    for axis, (index, stage) in zip(axes, stages):
        start, stop = plan.start_of(index), plan.start_of(index + 1)
        for place, name in enumerate(names):
            points = [(s - start, v) for s, v in zip(*series[name]) if start <= s < stop]
            if points:
                color = colormaps['viridis'](place / max(1, len(names) - 1))
                axis.plot(*zip(*points), color=color, linewidth=1.2, label=name.removeprefix('layers/'))
        axis.set(title=f'stage {stage.name}', xlabel='optimizer step of the stage', yscale='log')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('mean squared error of head outputs')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title='layer', loc='outside right upper', frameon=False, ncols=1 + len(names) // 17)
    figure.savefig(target)
    return True


def plot_kl(metrics: Path, plan: Plan, target: Path) -> None:
    """Draws KL(teacher || student) and their agreement over the whole run, stages marked."""
    series = read_metrics(metrics)
    figure, axes = _axes(11, 4, 2)
    shown = (
        (axes[0], 'train/kl', 'training batches', '#2b6cb0', 0.45),
        (axes[0], 'val/kl', 'validation', '#dd6b20', 1.0),
        (axes[1], 'train/agreement', 'training batches', '#2b6cb0', 0.45),
        (axes[1], 'val/agreement', 'validation', '#dd6b20', 1.0),
    )
    for axis, key, label, color, alpha in shown:
        if key in series:
            marker = 'o' if key.startswith('val') else None
            axis.plot(*series[key], color=color, alpha=alpha, label=label, marker=marker, markersize=3, linewidth=1)
    axes[0].set(title='KL(teacher || student)', ylabel='nats a position', yscale='log')
    axes[1].set(title='Same first choice as the teacher', ylabel='share of positions')
    for axis in axes:
        for index, stage in enumerate(plan.stages):
            axis.axvline(plan.start_of(index), color='#a0aec0', linewidth=0.8, linestyle='--')
            axis.text(
                plan.start_of(index), 1.0, f' {stage.name}', transform=axis.get_xaxis_transform(), va='top', fontsize=8
            )
        axis.set_xlabel('optimizer step')
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, loc='lower left' if axis is axes[0] else 'lower right')
    figure.savefig(target)


def plot_softmax_layers(models: list[Measured], sweep: list[Measured], target: Path) -> None:
    """Draws exact match over the number of softmax layers: trained students as dots, layers put back as a line.

    Args:
        models: Teacher and trained students.
        sweep: A student with more and more layers put back to the teacher's attention, without further training.
        target: Image file.
    """
    figure, axes = _axes(6.4, 4.2, 1)
    axis = axes[0]
    if sweep:
        points = sorted((m.softmax_layers, 100 * m.accuracy(ALL)) for m in sweep)
        asked = sum(sweep[0].questions.values())
        label = f'{sweep[0].name}, layers put back without training ({asked} questions)'
        axis.plot(*zip(*points), color='#2b6cb0', marker='.', label=label)
    for model, color in zip(models, ('#4a5568', '#dd6b20', '#38a169', '#805ad5', '#d53f8c')):
        axis.plot(model.softmax_layers, 100 * model.accuracy(ALL), 'o', color=color, label=model.name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(title='Accuracy over softmax layers', xlabel='layers with softmax attention', ylabel='exact match, %')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(target)
