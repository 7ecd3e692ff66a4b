"""`zoo bench vlm`: a HoVLE-sized decoder and its linear and hybrid students, prompt and answer, at growing lengths.

Everything goes through transformers' `generate` with greedy search, batch 1, random weights and random text; a streamer
notes when each token arrives. Prefill is the time to the first token, decode the median time between later ones, peak
memory what PyTorch allocated at most, weights included. Rows, and what a user types for them:

| row | model | generate |
|---|---|---|
| linear, hybrid | mmMamba; softmax layers 0, 4, ..., 28 in the hybrid | inside `zoo.vlm.fast_decode` |
| teacher captured | HoVLE | inside `zoo.vlm.fast_decode` |
| teacher | HoVLE | as it is: key-value cache, eager |
| llama | transformers' Llama in HoVLE's sizes | as it is: key-value cache, eager |
| teacher compiled | transformers' Llama in HoVLE's sizes | `cache_implementation='static'`, which compiles the step |
| teacher without cache | HoVLE | `use_cache=False`, what its repository's code does; a few tokens only |
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from zoo.errors import ZooError
from zoo.tools._guard import in_words, recover, time_limit
from zoo.tools._timing import conditions, gpu_rates, rates_in_words, sync, write_json

LENGTHS = (4096, 16384, 65536, 103000, 262144, 1048576)
# layers that stay softmax in the published hybrid
_SOFTMAX = range(0, 32, 4)
_QUICK = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
_SETTINGS = ('dtype', 'lengths', 'tokens', 'rows', 'quick', 'prefill_chunk', 'row_seconds')


@dataclass(frozen=True)
class Row:
    """One way to generate.

    Args:
        model: `linear`, `hybrid`, `teacher` or `llama`.
        longest: prompt beyond which it is not tried.
        tokens: most tokens of the answer.
        fast: inside `fast_decode`.
        options: of `generate`.
        shortest: prompt below which it is not tried.
        ends: tried with the shortest and the longest of its prompts only.
    """

    model: str
    longest: int = 1 << 20
    tokens: int = 1 << 20
    fast: bool = False
    options: tuple[tuple[str, object], ...] = ()
    shortest: int = 1
    ends: bool = False

    def prompts(self, lengths: list[int]) -> list[int]:
        """Those of the asked lengths that it is tried with."""
        mine = sorted(n for n in lengths if self.shortest <= n <= self.longest)
        return sorted({mine[0], mine[-1]}) if mine and self.ends else mine


# What matters most comes first: the longest prompt of the hybrid and what follows it take minutes.
ROWS = {
    'linear': Row('linear', fast=True),
    'hybrid': Row('hybrid', 262144, fast=True),
    'teacher': Row('teacher', 103000, 17),
    'teacher captured': Row('teacher', 262144, fast=True),
    'llama': Row('llama', 103000, 17, ends=True),
    'hybrid, longest': Row('hybrid', fast=True, shortest=262145),
    'teacher without cache': Row('teacher', 103000, 3, options=(('use_cache', False),), ends=True),
    'teacher compiled': Row('llama', 65536, 33, options=(('cache_implementation', 'static'),), ends=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `zoo bench vlm`."""
    parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS, metavar='N', help='tokens of the prompt')
    parser.add_argument('--rows', help='some of: ' + ', '.join(ROWS), metavar='A,B')
    parser.add_argument('--tokens', type=int, default=65, metavar='N', help='tokens of the answer; default: 65')
    parser.add_argument('--dtype', choices=('bf16', 'fp16', 'fp32'), help='of the weights; default: bf16, on CPUs fp32')
    parser.add_argument('--prefill-chunk', type=int, default=16384, metavar='N', help='tokens of a piece of the prompt')
    parser.add_argument('--quick', action='store_true', help='four small layers in place of the real sizes')
    parser.add_argument('--row-seconds', type=float, default=240, metavar='S', help='longest measurement; default: 240')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw speed and memory over the length')


def build(kind: str, device: str, dtype: torch.dtype, quick: bool) -> nn.Module:
    """A model with random weights, made on the device.

    Args:
        kind: `linear`, `hybrid`, `teacher` or `llama`.
        device: where.
        dtype: of its weights.
        quick: four small layers in place of HoVLE's sizes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.backbones import hovle, mmmamba

    torch.manual_seed(0)
    config = hovle.HoVLEConfig()
    if quick:
        first = _QUICK | dict(num_hidden_layers=2, image_size=56, llm_vocab_size=512, llm_hidden_size=64)
        second = _QUICK | dict(num_hidden_layers=2, vocab_size=512)
        config = hovle.HoVLEConfig(embedding_config=first | dict(img_context_token_id=511), llm_config=second)
    layers = range(config.num_hidden_layers)
    if kind == 'llama':
        names = ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'vocab_size')
        sizes = {name: getattr(config.llm_config, name) for name in names}
        config = LlamaConfig(**sizes, num_hidden_layers=len(layers), max_position_embeddings=1 << 20)
        owner = LlamaForCausalLM
    elif kind == 'teacher':
        owner = hovle.HoVLEForConditionalGeneration
    else:
        config = mmmamba.student_config(config, [i for i in layers if kind == 'linear' or i not in _SOFTMAX])
        owner = mmmamba.HoVLELinearForConditionalGeneration
    with torch.device(device):
        model = owner._from_config(config, dtype=dtype).eval()
    # an id that no token has: the end is looked for at every step and never comes
    model.generation_config.eos_token_id = config.get_text_config().vocab_size
    model.generation_config.pad_token_id = 0
    return model


class Clock:
    """A streamer that notes when tokens arrive."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: nn.Module, length: int, tokens: int, **options) -> tuple[float, list[float]]:
    """One call of `generate`.

    Args:
        model: what generates.
        length: tokens of the prompt.
        tokens: tokens of the answer.
        options: of `generate`.

    Returns:
        Seconds to the first token, and between each two after it.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator(model.device).manual_seed(0)
    high = min(vocabulary, 92000) - 1  # real words
    ids = torch.randint(3, high, (1, length), generator=generator, device=model.device)
    mask, clock = torch.ones_like(ids), Clock()
    sync(str(model.device))
    start = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=clock, **options
    )
    arrivals = clock.times[1:]  # the first is the prompt
    return arrivals[0] - start, [b - a for a, b in zip(arrivals, arrivals[1:])]


def _measure(model: nn.Module, row: Row, length: int, args: argparse.Namespace) -> dict:
    gpu = args.device.startswith('cuda')
    options = dict(row.options)
    if row.fast:
        options['prefill_chunk_size'] = args.prefill_chunk
    tokens = min(args.tokens, row.tokens)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = [generate(model, length, tokens, **options)]
    if not row.options and tokens > 3 and length <= 131072:  # the first call fills the allocator's pools
        found.append(generate(model, length, tokens, **options))
    prefill, gaps = found[-1]
    said = {'prefill_s': round(prefill, 4), 'tokens': len(gaps) + 1}
    if gaps:
        said |= {'decode_ms': round(statistics.median(gaps) * 1e3, 4), 'decode_ms_max': round(max(gaps) * 1e3, 4)}
    if gpu:
        said['peak_gb'] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return said


@contextlib.contextmanager
def _mode(model: nn.Module, row: Row, args: argparse.Namespace) -> Iterator[None]:
    if not row.fast:
        yield
        return
    from zoo.vlm.decode import fast_decode

    capture = None if args.device.startswith('cuda') else False
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='fast_decode')  # a row must be what it says
        with fast_decode(model, capture=capture):  # compiles; what it captures for other lengths goes with it
            for length in {min(args.lengths), min(2 * args.prefill_chunk, max(args.lengths))}:
                generate(model, length, 4, prefill_chunk_size=args.prefill_chunk)
        with fast_decode(model, capture=capture):
            yield


def _rows(name: str, row: Row, model: nn.Module, args: argparse.Namespace) -> Iterator[dict]:
    lengths = row.prompts(args.lengths)
    name = name.split(',')[0]
    try:
        with _mode(model, row, args):
            for length in lengths:
                said = {'row': name, 'length': length}
                try:
                    with time_limit(args.row_seconds, '--row-seconds'):
                        said |= _measure(model, row, length, args)
                except Exception as error:
                    said['error'] = in_words(error)
                    recover(args.device, error)
                yield said
    except ZooError:
        raise
    except Exception as error:
        recover(args.device, error)
        yield {'row': name, 'length': min(lengths, default=0), 'error': in_words(error)}


def compare(rows: list[dict]) -> list[dict]:
    """Students against the teacher in all its rows, and against Llama, at each length.

    Args:
        rows: what was measured; those with an error are left out.

    Returns:
        Per student, other row and length: how many times faster the student decodes and reads its prompt, and the
        share of memory it saves.
    """
    good = [r for r in rows if 'error' not in r]
    found = []
    for row in (r for r in good if r['row'] in ('linear', 'hybrid')):
        for peer in (r for r in good if r['row'] not in ('linear', 'hybrid') and r['length'] == row['length']):
            pair = {'row': row['row'], 'peer': peer['row'], 'length': row['length']}
            for key in ('decode_ms', 'prefill_s'):
                if row.get(key) and peer.get(key):
                    pair[f'{key.split("_")[0]}_times_faster'] = round(peer[key] / row[key], 2)
            if row.get('peak_gb') and peer.get('peak_gb'):
                pair['memory_saved'] = round(1 - row['peak_gb'] / peer['peak_gb'], 4)
            found.append(pair)
    return found


def plot(rows: list[dict], target: Path) -> None:
    """Decode and prefill time and peak memory over the prompt's length, all logarithmic.

    Args:
        rows: what was measured.
        target: PNG file.
    """
    from zoo.report import _figure

    panels = [('decode_ms', 'decode, ms a token'), ('prefill_s', 'prefill, s'), ('peak_gb', 'peak memory, GB')]
    figure, axes = _figure(14, 4.2, 1, 3)
    for axis, (key, label) in zip(axes[0], panels):
        for name in dict.fromkeys(r['row'] for r in rows):
            points = sorted((r['length'], r[key]) for r in rows if r['row'] == name and key in r)
            if points:
                axis.plot(*zip(*points), marker='o', markersize=4, label=name)
        axis.set(xscale='log', yscale='log', xlabel='tokens of the prompt', ylabel=label)
        axis.grid(alpha=0.3)
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def chosen(args: argparse.Namespace) -> dict[str, Row]:
    """The rows that the command line asks for.

    Args:
        args: the parsed command line.

    Raises:
        ZooError: for a name that is none, or lengths and tokens that measure nothing.
    """
    if args.tokens < 2 or min(args.lengths) < 1:
        raise ZooError('zoo bench vlm: --tokens must be at least 2 and --lengths at least 1')
    names = [n.strip() for n in args.rows.split(',')] if args.rows else list(ROWS)
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        raise ZooError(f'--rows: there is no {unknown[0]!r}; choose from {", ".join(ROWS)}')
    return {name: row for name, row in ROWS.items() if name.split(',')[0] in names}


def bench_vlm(args: argparse.Namespace) -> dict:
    """Run `zoo bench vlm`, rewriting `--output` after every measurement.

    Args:
        args: the parsed command line.
    """
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}[args.dtype]
    settings = {k: getattr(args, k) for k in _SETTINGS}
    rates = gpu_rates(args.device)
    result = {'bench': 'vlm', **conditions(args.device), **settings, **rates, 'complete': False, 'results': []}
    if rates:
        print(rates_in_words(rates), flush=True)
    model, built = None, None
    for name, row in chosen(args).items():
        if not row.prompts(args.lengths):
            continue
        if built != row.model:
            model = None
            gc.collect()
            if args.device.startswith('cuda'):
                torch.cuda.empty_cache()
            model, built = build(row.model, args.device, dtype, args.quick), row.model
            result.setdefault('parameters', {})[built] = sum(p.numel() for p in model.parameters())
        for said in _rows(name, row, model, args):
            result['results'].append(said)
            print('  ' + ', '.join(f'{k} {v}' for k, v in said.items()), flush=True)
            write_json(args.output, result)
        torch._dynamo.reset()
    model = None
    after = {'rates_after': gpu_rates(args.device)} if rates else {}
    result |= {**after, 'complete': True, 'ratios': compare(result['results'])}
    _print(result)
    if args.plot:
        plot(result['results'], args.plot)
        print(f'written: {args.plot}')
    return result


def _print(result: dict) -> None:
    table = Table(title='generate, batch 1: prefill s / decode ms a token / peak GB')
    lengths = sorted({r['length'] for r in result['results']})
    for column in ('', *map(str, lengths)):
        table.add_column(column, justify='right' if column else 'left')
    for name in dict.fromkeys(r['row'] for r in result['results']):
        cells = []
        for length in lengths:
            row = next((r for r in result['results'] if (r['row'], r['length']) == (name, length)), {})
            values = [row.get(k) for k in ('prefill_s', 'decode_ms', 'peak_gb')]
            cells.append('failed' if 'error' in row else ' / '.join('-' if v is None else f'{v:.2f}' for v in values))
        table.add_row(name, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for pair in result['ratios']:
        print('  ' + ', '.join(f'{k} {v}' for k, v in pair.items()))
