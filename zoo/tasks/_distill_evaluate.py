"""Teacher and students after a distillation: answers, decoding speed, size of the state."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.tasks._distill_report import Measured
from zoo.tasks.vlm import generate_answers


@dataclass
class Report:
    """What is measured when all stages are done.

    Args:
        questions: Test questions for the final table; null takes all.
        new_tokens: Most tokens of an answer.
        sweep: Whether to put softmax layers back into the linear student one by one, for the plot.
        sweep_questions: Test questions for each point of it.
        speed_tokens: Tokens generated per row of the first test batch to measure tokens/s and state; 0 for neither.
    """

    questions: int | None = None
    new_tokens: int = 16
    sweep: bool = True
    sweep_questions: int = 512
    speed_tokens: int = 32


def flat(turns: list[list[str]]) -> list[str]:
    """Entries of all turns of all samples in the order of a batch's prompts."""
    return list(itertools.chain.from_iterable(turns))


def moved(inputs: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Model inputs on the model's device, pixels in its dtype."""
    like = next(model.parameters())
    return {k: v.to(like.device, like.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def exact_match(
    model: nn.Module, batches: Iterable[dict[str, Any]], tokenizer: Any, settings: Report, limit: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Right answers and questions per type.

    Args:
        model: Teacher or student.
        batches: Test batches with `prompts`, see zoo.data.chat.
        tokenizer: Of the data.
        settings: Settings.
        limit: Questions at most; None for all.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for batch in batches:
        if not batch['name']:
            continue
        found = generate_answers(model, moved(batch['prompts'], model), tokenizer, settings.new_tokens)
        for said, truth, kind in zip(found, flat(batch['answer']), flat(batch['question_type'])):
            if limit is not None and sum(asked.values()) >= limit:
                return {k: right[k] for k in asked}, dict(asked)
            asked[kind] += 1
            right[kind] += said == truth.strip()
    return {k: right[k] for k in asked}, dict(asked)


@torch.no_grad()
def speed(model: nn.Module, prompts: dict[str, torch.Tensor], tokens: int) -> tuple[float, int, int]:
    """Decoding speed and size of the state.

    Args:
        model: Teacher or student.
        prompts: Left-padded prompts, all rows at once.
        tokens: New tokens of each row.

    Returns:
        New tokens of all rows per second, the best of three tries, prompts included in the time; bytes of the cache for
        one row; tokens that it covers.
    """
    inputs = moved(prompts, model)
    rows, length = inputs['input_ids'].shape
    best = float('inf')
    for _ in range(3):
        start = _now(inputs['input_ids'].device)
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        best = min(best, _now(inputs['input_ids'].device) - start)
    # the last token has been chosen, not read
    return rows * tokens / best, cache_bytes(out.past_key_values) // rows, length + tokens - 1


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a transformers cache."""
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            found = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            total += sum(t.nbytes for t in found if isinstance(t, torch.Tensor) and t.ndim > 1)
    return total


def measure(
    name: str, model: nn.Module, softmax_layers: int, loader: Iterable[dict[str, Any]], tokenizer: Any, settings: Report
) -> Measured:
    """A row of the final table."""
    from zoo.linearizer import decoder_layers

    correct, asked = exact_match(model, loader, tokenizer, settings, settings.questions)
    row = Measured(name, softmax_layers, len(decoder_layers(model)), correct, asked)
    first = next((batch for batch in loader if batch['name']), None) if settings.speed_tokens else None
    if first is not None:
        row.tokens_per_s, row.state_bytes, row.context = speed(model, first['prompts'], settings.speed_tokens)
    return row


def spread_order(count: int) -> list[int]:
    """All of range(count), each prefix about evenly spaced: 0, the middle, the quarters, ..."""
    width = max(1, (count - 1).bit_length())
    order = (int(f'{i:0{width}b}'[::-1], 2) for i in range(2**width))
    return [i for i in order if i < count]


def sweep(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[dict[str, Any]],
    tokenizer: Any,
    settings: Report,
) -> list[Measured]:
    """Exact match of a linear student while its layers become softmax again, at most nine points, without training.

    Args:
        name: Of the student.
        student: Changed in place.
        teacher: The teacher.
        loader: Test batches.
        tokenizer: Of the data.
        settings: Settings.
    """
    from zoo.linearizer import mixers, restore_attention

    count = len(mixers(student))
    order, rows, back = spread_order(count), [], 0
    for softmax in sorted({round(count * i / min(count, 8)) for i in range(min(count, 8) + 1)}):
        restore_attention(student, teacher, order[back:softmax])
        back = softmax
        correct, asked = exact_match(student, loader, tokenizer, settings, settings.sweep_questions)
        rows.append(Measured(name, softmax, count, correct, asked))
    return rows
