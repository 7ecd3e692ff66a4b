"""`zoo eval-vlm MODEL --data FILE`: exact match, VQA accuracy and perplexity of a vision-language model."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from zoo.errors import ZooError
from zoo.tools._timing import conditions, write_json
from zoo.tools._vlm_rows import BadRow, JsonRows, Question, TableRows, open_rows
from zoo.tools._vlm_scores import exact_match, vqa_accuracy

METRICS: dict[str, Callable[[str, list[str]], float]] = {'exact': exact_match, 'vqa': vqa_accuracy}
_SHOWN_MISTAKES, _LISTED_BAD = 24, 50
_LABELS = {'exact': 'exact match', 'vqa': 'VQA accuracy', 'perplexity': 'perplexity'}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='zoo eval-vlm',
        description='Asks a vision-language model the questions of a data set and scores its answers. MODEL is any '
        'folder or hub name that AutoModelForImageTextToText loads, ours included.',
    )
    parser.add_argument('model', help='folder or hub name')
    parser.add_argument(
        '--data', required=True, metavar='D', help='.jsonl, .json, .parquet, a folder of parquet files, or a hub name'
    )
    parser.add_argument('--split', default='test', help='split of parquet folders and hub data sets (test)')
    parser.add_argument('--config', metavar='NAME', help='configuration of a hub data set')
    parser.add_argument('--images', type=Path, metavar='FOLDER', help="where image paths start, if not the file's")
    parser.add_argument('--metrics', nargs='+', choices=[*METRICS, 'perplexity'], default=['exact', 'vqa'])
    parser.add_argument('--suffix', default='', metavar='TEXT', help='appended to every question, on its own line')
    parser.add_argument('--max-new-tokens', type=int, default=32, metavar='N')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N')
    parser.add_argument('--limit', type=int, metavar='N', help='only N rows, drawn by --seed')
    parser.add_argument('--seed', type=int, default=0, help='which rows --limit draws; also of sampling')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16', 'float16'])
    parser.add_argument('--output', type=Path, metavar='FOLDER', help='runs/eval-vlm/MODEL-DATA unless given')
    parser.add_argument('--json', action='store_true', help='print the results as JSON instead of tables')
    return parser


def load_questions(
    rows: JsonRows | TableRows, limit: int | None, seed: int
) -> Iterator[tuple[list[Question], tuple[str, str] | None]]:
    """Goes over the rows, or over `limit` of them in their order.

    Args:
        rows: Of a data set.
        limit: How many rows; all for None.
        seed: Which ones.

    Yields:
        Per row its questions, or none and the row's name with what is wrong about it.
    """
    chosen = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    for index in chosen:
        try:
            yield rows.questions(index), None
        except BadRow as error:
            yield [], (rows.name(index), str(error))


@torch.inference_mode()
def answer_loss(model: Any, processor: Any, texts: list[str], answers: list[str], images: list) -> list[tuple]:
    """Negative log-likelihood of the right answers, the token that ends them included.

    Args:
        model: In eval mode.
        processor: Of the model.
        texts: Prompts that end where the answer begins.
        answers: One right answer each.
        images: Images of each prompt.

    Returns:
        Per prompt the sum in nats and the number of tokens.
    """
    from zoo.vlm.chat import encode

    stops = getattr(processor, 'stop_token_ids', None) or [processor.tokenizer.eos_token_id]
    end = processor.tokenizer.convert_ids_to_tokens(stops[0])
    begun, whole = (
        encode(processor, t, images, 'right') for t in (texts, [t + a + end for t, a in zip(texts, answers)])
    )
    spans = []
    for i in range(len(texts)):
        ids = whole['input_ids'][i][whole['attention_mask'][i].bool()]
        prefix = begun['input_ids'][i][begun['attention_mask'][i].bool()]
        n = min(len(ids), len(prefix))
        differs = (ids[:n] != prefix[:n]).nonzero()
        spans.append((int(differs[0]) if len(differs) else n, ids))  # an answer may merge with the prompt's last token
    # logits of a long prompt full of image tokens would take most of the memory
    first = min(start for start, _ in spans) - 1
    keep = {'logits_to_keep': whole['input_ids'].shape[1] - first}
    if 'logits_to_keep' not in inspect.signature(model.forward).parameters:
        first, keep = 0, {}
    logits = model(**whole.to(model.device, model.dtype), **keep).logits
    found = []
    for i, (start, ids) in enumerate(spans):
        scores = torch.log_softmax(logits[i, start - 1 - first : len(ids) - 1 - first].float(), -1)
        nll = -scores.gather(-1, ids[start:, None].to(scores.device)).sum()
        found.append((float(nll), len(ids) - start))
    return found


class Evaluation:
    """Asks in batches and keeps what the results need.

    Args:
        model: In eval mode.
        processor: Of the model.
        args: Of the command line.
    """

    def __init__(self, model: Any, processor: Any, args: argparse.Namespace) -> None:
        self.model, self.processor, self.args = model, processor, args
        self.rows: list[dict[str, Any]] = []
        self.bad: list[tuple[str, str]] = []
        self.mistakes: list[tuple[Any, str]] = []
        self.waiting: dict[bool, list[tuple[Question, list]]] = {True: [], False: []}
        self.seconds, self.right = 0.0, 0.0

    def add(self, question: Question) -> None:
        """Reads the images of a question and asks when a batch is full; with and without images apart."""
        from zoo.vlm.processing import read_image

        try:
            images = [read_image(image) for image in question.images]
            self._conversation(question, images).placed()
        except ZooError as error:
            self.bad.append((question.name, str(error)))
            return
        queue = self.waiting[bool(images)]
        queue.append((question, images))
        if len(queue) == self.args.batch_size:
            self.ask(queue)

    def finish(self) -> None:
        """Asks what is left."""
        for queue in self.waiting.values():
            self.ask(queue)

    def _conversation(self, question: Question, images: list) -> Any:
        from zoo.vlm.chat import Conversation

        turns = list(question.turns)
        if self.args.suffix:
            turns[-1] = (turns[-1][0], f'{turns[-1][1]}\n{self.args.suffix}')
        return Conversation(turns, images)

    def ask(self, queue: list[tuple[Question, list]]) -> None:
        """Answers and scores a batch, then empties it; a batch that the processor refuses is asked one by one."""
        batch, queue[:] = list(queue), []
        if not batch:
            return
        start = time.perf_counter()
        try:
            scored = self._score(batch)
        except ZooError as error:
            if len(batch) == 1:
                self.bad.append((batch[0][0].name, str(error)))
            else:
                for single in batch:
                    self.ask([single])
            return
        self.seconds += time.perf_counter() - start
        for (question, images), row in zip(batch, scored):
            self.rows.append(row)
            self.right += row.get('exact', 0.0)
            if row.get('exact') == 0 and len(self.mistakes) < _SHOWN_MISTAKES:
                self.mistakes.append((_thumbnail(images), _caption(question, row)))

    def _score(self, batch: list[tuple[Question, list]]) -> list[dict[str, Any]]:
        from zoo.vlm.chat import answer, prompt

        conversations = [self._conversation(question, images) for question, images in batch]
        rows: list[dict[str, Any]] = [
            {'name': q.name, 'type': q.kind, 'question': q.turns[-1][1], 'answers': q.answers} for q, _ in batch
        ]
        wanted = [metric for metric in METRICS if metric in self.args.metrics]
        if wanted:
            said = answer(self.model, self.processor, conversations, max_new_tokens=self.args.max_new_tokens)
            for row, text in zip(rows, said):
                row['said'] = text
                row |= {metric: METRICS[metric](text, row['answers']) for metric in wanted}
        if 'perplexity' in self.args.metrics:
            texts = [prompt(self.processor, conversation) for conversation in conversations]
            firsts = [question.answers[0] for question, _ in batch]
            losses = answer_loss(self.model, self.processor, texts, firsts, [images for _, images in batch])
            for row, (nll, tokens) in zip(rows, losses):
                row['nll'], row['tokens'] = nll, tokens
        return rows


def _thumbnail(images: list) -> Any:
    from PIL import Image

    if not images:
        return Image.new('RGB', (256, 256), 'white')
    copy = images[0].copy()
    copy.thumbnail((256, 256))
    return copy


def _caption(question: Question, row: dict[str, Any]) -> str:
    asked = ' '.join(question.turns[-1][1].replace('<image>', ' ').split())
    lines = (asked, f'said: {row["said"]}', f'is: {row["answers"][0]}')
    return '\n'.join(textwrap.shorten(line.replace('$', r'\$'), 34, placeholder='...') or '-' for line in lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over rows: shares in per cent, and perplexity per token.

    Args:
        rows: Scored questions.
    """
    found: dict[str, Any] = {'questions': len(rows)}
    for metric in METRICS:
        if rows and metric in rows[0]:
            found[metric] = round(100 * sum(row[metric] for row in rows) / len(rows), 3)
    if rows and 'nll' in rows[0]:
        mean = sum(row['nll'] for row in rows) / sum(row['tokens'] for row in rows)
        found['perplexity'] = round(math.exp(min(mean, 700.0)), 5)
    return found


def _results(args: argparse.Namespace, evaluation: Evaluation, total: int, seconds: float) -> dict[str, Any]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in evaluation.rows:
        groups[row['type']].append(row)
    from transformers import __version__

    return {
        'model': args.model,
        'data': args.data,
        'split': args.split,
        'all': summary(evaluation.rows),
        'by_type': {kind or '(none)': summary(rows) for kind, rows in sorted(groups.items())} if any(groups) else {},
        'rows': total,
        'bad_rows': len(evaluation.bad),
        'bad': [{'name': name, 'reason': reason} for name, reason in evaluation.bad[:_LISTED_BAD]],
        'settings': {
            key: getattr(args, key)
            for key in ('metrics', 'suffix', 'max_new_tokens', 'batch_size', 'limit', 'seed', 'dtype')
        },
        'seconds': round(seconds, 2),
        'questions_per_second': round(len(evaluation.rows) / max(evaluation.seconds, 1e-9), 3),
        'transformers': __version__,
        'conditions': conditions(args.device),
    }


def _write(folder: Path, results: dict[str, Any], evaluation: Evaluation) -> None:
    """predictions.jsonl and mistakes.png, then results.json, each replaced in one step."""
    from zoo.report import plot_sheet

    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f'.predictions.{os.getpid()}.jsonl'
    lines.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in evaluation.rows), encoding='utf-8')
    lines.replace(folder / 'predictions.jsonl')
    if 'exact' in results['settings']['metrics']:
        wrong = sum(row['exact'] == 0 for row in evaluation.rows)
        sheet = folder / f'.mistakes.{os.getpid()}.png'
        title = f'{len(evaluation.mistakes)} of {wrong} wrong answers'
        plot_sheet([image for image, _ in evaluation.mistakes], [text for _, text in evaluation.mistakes], sheet, title)
        sheet.replace(folder / 'mistakes.png')
    write_json(folder / 'results.json', results)


def _print(results: dict[str, Any], folder: Path) -> None:
    columns = [key for key in _LABELS if key in results['all']]
    table = Table(title=f'{results["model"]} on {results["data"]}', title_justify='left')
    table.add_column('type')
    table.add_column('questions', justify='right')
    for key in columns:
        table.add_column(_LABELS[key], justify='right')
    groups = results['by_type'].items() if len(results['by_type']) > 1 else ()
    for name, values in [*groups, ('all', results['all'])]:
        cells = [f'{values[k]:.3f}' if k == 'perplexity' else f'{values[k]:.2f} %' for k in columns]
        table.add_row(name, str(values['questions']), *cells)
    console = Console()
    console.print(table)
    if results['bad_rows']:
        console.print(f'{results["bad_rows"]} bad rows left out:', markup=False)
        for row in results['bad'][:5]:
            console.print(f'  {row["name"]}: {row["reason"]}', markup=False)
    print(f'{results["questions_per_second"]:.2f} questions/s on {results["conditions"]["device"]}; {folder}')


def evaluate(model: Any, processor: Any, rows: JsonRows | TableRows, args: argparse.Namespace) -> Evaluation:
    """Asks all questions with a progress bar.

    Args:
        model: In eval mode, on its device.
        processor: Of the model.
        rows: Of a data set.
        args: Of the command line.

    Raises:
        ZooError: if no question could be asked.
    """
    evaluation = Evaluation(model, processor, args)
    total = len(rows) if args.limit is None else min(args.limit, len(rows))
    columns = (
        TextColumn('eval-vlm'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.description}'),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task('', total=total)
        for questions, bad in load_questions(rows, args.limit, args.seed):
            if bad:
                evaluation.bad.append(bad)
            for question in questions:
                evaluation.add(question)
            shown = (
                f'exact {100 * evaluation.right / max(1, len(evaluation.rows)):.1f} %'
                if 'exact' in args.metrics
                else ''
            )
            bar.update(task, advance=1, description=shown)
        evaluation.finish()
    if not evaluation.rows:
        first = ': '.join(evaluation.bad[0]) if evaluation.bad else 'it is empty'
        raise ZooError(f'no question of {args.data} could be asked; {first}')
    return evaluation


def cli_eval_vlm(argv: list[str]) -> int:
    """Evaluates a model and writes results.json, predictions.jsonl and mistakes.png."""
    args = _parser().parse_args(argv)
    for name in ('limit', 'batch_size', 'max_new_tokens'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ZooError(f'--{name.replace("_", "-")} takes a positive number')
    rows = open_rows(args.data, args.split, args.config, args.images)  # before any download of a model
    from zoo.vlm.chat import load_vlm

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    model, processor = load_vlm(args.model, args.device, args.dtype)
    evaluation = evaluate(model, processor, rows, args)
    total = len(rows) if args.limit is None else min(args.limit, len(rows))
    results = _results(args, evaluation, total, time.perf_counter() - start)
    title = f'{Path(args.model).name}-{Path(args.data).stem}'
    folder = args.output or Path('runs/eval-vlm') / title
    _write(folder, results, evaluation)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _print(results, folder)
    return 0
