"""`zoo bench kernels --launch`: what one call of each op costs the host, without waiting for the device.

Shapes are so small that a GPU is done before the next call comes: the time between two calls is Python, allocations and
launches. On a CPU, where nothing is queued, the work itself is in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels import block_tail as tail
from zoo.kernels import (
    causal_conv,
    conv_norm,
    decode,
    gated_delta,
    gla,
    linear_attention,
    mix,
    norm,
    rope,
    ssd,
    swiglu,
    wavelet,
)
from zoo.kernels import depthwise_conv as depthwise
from zoo.kernels import group_norm as groups
from zoo.kernels import selective_scan as scan
from zoo.tools._bench_kernels import DTYPES, forward_backward
from zoo.tools._guard import in_words, recover
from zoo.tools._timing import conditions, host_us, wall_ms, write_json

_CALLS = 50  # between two waits for the device: a dozen kernels each still fit its queue
_ROUNDS = 9
_THREADS = 8
YARDSTICK = 'torch layer_norm'
_BY_NAME = 'gated_delta_rule'  # on a GPU flash-linear-attention tunes its kernels for minutes

Draw = Callable[..., Tensor]


class Row(NamedTuple):
    """A call: `make(draw)` gives the arguments of `call`, `draw(*shape)` normal numbers; `backward` if it has one."""

    name: str
    make: Callable[[Draw], tuple]
    call: Callable
    backward: bool = True


def _wide(x: Tensor) -> Tensor:
    return x.float()


def _scan_rows() -> list[Row]:
    """The ops along sequences: 64 tokens, heads of 16 keys and 32 values."""
    qkv = lambda d: (d(2, 64, 2, 16), d(2, 64, 2, 16), d(2, 64, 2, 32))  # noqa: E731
    gate = lambda d: -d(2, 64, 2, 16).abs()  # noqa: E731
    one = lambda x: x.flatten(0, 1)[None]  # noqa: E731
    cuts = lambda d: torch.tensor([0, 60, 128], device=d(1).device)  # noqa: E731
    mamba = lambda d, *n: (d(*n, 2, 16), d(*n, 2).abs(), -d(2).abs(), d(*n, 1, 16), d(*n, 1, 16))  # noqa: E731
    sequence = lambda d: (d(2, 32, 64), d(2, 32, 64), -_wide(d(32, 4)).abs(), d(2, 1, 4, 64), d(2, 1, 4, 64))  # noqa: E731
    over_map = lambda d: (d(2, 32, 8, 8), d(2, 10, 32), d(2, 32, 2), d(2, 32), d(64, 4), d(64))  # noqa: E731
    positive = lambda d: (d(2, 64, 2, 16).exp(), d(2, 64, 2, 16).exp(), d(2, 64, 2, 16))  # noqa: E731
    delta = lambda d: (*(F.normalize(x, dim=-1) for x in qkv(d)[:2]), qkv(d)[2])  # noqa: E731
    return [
        Row('bidirectional_gla', lambda d: (*qkv(d), gate(d), gate(d)), gla.bidirectional_gla),
        Row('bidirectional_gla, packed', lambda d: (*(one(x) for x in (*qkv(d), gate(d), gate(d))), cuts(d)),
            lambda *args: gla.bidirectional_gla(*args[:5], cu_seqlens=args[5])),
        Row('gated_linear_attention', lambda d: (*qkv(d), gate(d)), gla.gated_linear_attention),
        Row('gated_delta_rule', lambda d: (*delta(d), -d(2, 64, 2).abs(), d(2, 64, 2).sigmoid()),
            gated_delta.gated_delta_rule),
        Row('linear_attention', positive, linear_attention.linear_attention),
        Row('rank_augmented', lambda d: [d(2, 64, 2, 16) for _ in range(5)],
            lambda q, k, v, lepe, gate: linear_attention.rank_augmented(q, k, v, height=8, width=8, lepe=lepe,
                                                                        gate=gate)),
        Row('selective_scan', lambda d: (*sequence(d), d(32), d(32)), lambda *args: scan.selective_scan(*args, True)),
        Row('selective_scan_2d', over_map, lambda *args: scan.selective_scan_2d(*args, directions=2)),
        Row('ssd', lambda d: (*mamba(d, 2, 64), d(2)), lambda *args: ssd.ssd(*args[:5], D=args[5])),
        Row('ssd, packed', lambda d: (*mamba(d, 1, 128), d(2), cuts(d)),
            lambda *args: ssd.ssd(*args[:5], D=args[5], cu_seqlens=args[6])),
        Row('ssd_step', lambda d: (*mamba(d, 2), _wide(d(2, 2, 16, 16)), d(2)),
            lambda *args: ssd.ssd_step(*args[:6], D=args[6])),
        Row('ssd_step_', lambda d: (*mamba(d, 2), _wide(d(2, 2, 16, 16)), d(2)),
            lambda *args: ssd.ssd_step_(*args[:6], D=args[6]), False),
    ]  # fmt: skip


def _token_rows() -> list[Row]:
    """The ops on rows of channels and on maps."""
    heads = lambda d, n: [d(2, 64, 2, 32) for _ in range(n)]  # noqa: E731
    image = lambda d: d(2, 32, 8, 8).to(memory_format=torch.channels_last)  # noqa: E731
    Norm = tail.Norm
    return [
        Row('rms_norm', lambda d: (d(2, 64, 64), d(64)), norm.rms_norm),
        Row('rms_norm, residual', lambda d: (d(2, 64, 64), d(64), d(2, 64, 64)),
            lambda x, w, r: norm.rms_norm(x, w, 1e-6, r)),
        Row('layer_norm', lambda d: (d(2, 64, 64), d(64), d(64)), norm.layer_norm),
        Row('layer_norm, residual and gamma', lambda d: (d(2, 64, 64), d(64), d(64), d(2, 64, 64), d(64)),
            lambda x, w, b, r, gamma: norm.layer_norm(x, w, b, 1e-6, r, gamma=gamma)),
        Row('gated_rms_norm', lambda d: (d(2, 64, 2, 32), d(32), d(2, 64, 2, 32)), norm.gated_rms_norm),
        Row('leaky_layer_norm', lambda d: (d(2, 64, 2, 32), d(2, 32), d(2, 32)), norm.leaky_layer_norm, False),
        Row('group_norm', lambda d: (image(d), d(32), d(32)), lambda x, w, b: groups.group_norm(x, 8, w, b, silu=True)),
        Row('swiglu', lambda d: (d(2, 64, 128),), swiglu.swiglu),
        Row('geglu', lambda d: (d(2, 64, 128),), swiglu.geglu),
        Row('swiglu_linear', lambda d: (d(2, 64, 64), d(128, 64)), swiglu.swiglu_linear, False),
        Row('log_gates', lambda d: (d(2, 64, 16), d(64, 16), d(64)), mix.log_gates),
        Row('gated_local_mix', lambda d: (*heads(d, 3), d(32), d(32), d(64)),
            lambda o, local, gate, a, b, bias: mix.gated_local_mix(o, local, gate, a, b, gate_logits=True,
                                                                   gate_bias=bias)),
        Row('block_tail', lambda d: (d(2, 64, 64), *heads(d, 3), None, d(32), d(32), d(64, 64), Norm(d(64)), d(128, 64),
                                     d(64, 64), Norm(d(64))), tail.block_tail, False),
        Row('causal_conv', lambda d: (d(2, 64, 64), d(64, 4), d(64)),
            lambda x, w, b: causal_conv.causal_conv(x, w, b, activation='silu')),
        Row('causal_conv_step_', lambda d: (d(2, 64), d(64, 4), d(64), d(2, 64, 4)), causal_conv.causal_conv_step_,
            False),
        Row('depthwise_conv2d', lambda d: (d(2, 8, 8, 32), d(32, 1, 3, 3), d(32)), depthwise.depthwise_conv2d),
        Row('wavelet_conv2d', lambda d: (image(d), d(128, 1, 3, 3)), wavelet.wavelet_conv2d),
        Row('haar_analysis', lambda d: (image(d),), wavelet.haar_analysis),
        Row('haar_synthesis', lambda d: (image(d),), wavelet.haar_synthesis),
        Row('conv_norm', lambda d: (d(2, 3, 16, 16), d(64, 3, 4, 4), d(64), d(64), d(64)),
            lambda *args: conv_norm.conv_norm(*args, stride=4), False),
        Row('apply_rope', lambda d: (d(2, 2, 64, 32), _wide(d(64, 32)), _wide(d(64, 32))), rope.apply_rope),
        Row('axial_rope_tables', lambda d: (d(1).device,),
            lambda device: rope.axial_rope_tables(8, 8, 32, device=device), False),
    ]  # fmt: skip


def _decode_rows() -> list[Row]:
    """One token of one layer with 2 key heads, 4 heads of 32 channels and 128 channels in all."""
    place = lambda d: torch.ones(1, dtype=torch.int64, device=d(1).device)  # noqa: E731
    buffers = lambda d: (d(1, 2, 16, 32), d(1, 2, 16, 32))  # noqa: E731
    return [
        Row('token_linear', lambda d: (d(1, 128), d(64, 128), d(64), d(1, 64)), decode.token_linear, False),
        Row('token_swiglu', lambda d: (d(1, 128), d(64, 128), d(64, 128)), decode.token_swiglu, False),
        Row('token_projections_', lambda d: (d(1, 128), [d(64, 128), d(32, 128)], [None, None], d(64, 4), d(64),
                                             d(1, 64, 4)), decode.token_projections_, False),
        Row('mamba2_step_', lambda d: (d(1, 2 * 6 * 32 + 4), _wide(d(1, 4, 32, 32)), d(4), d(4), d(4), d(32), 1e-5, 2),
            decode.mamba2_step_, False),
        Row('rotate_and_store_', lambda d: (d(1, 2, 2, 32), d(1, 2, 32), d(1, 2, 32), d(1, 32), d(1, 32), *buffers(d),
                                            place(d)), decode.rotate_and_store_, False),
        Row('decode_attention', lambda d: (d(1, 4, 32), *buffers(d), place(d)), decode.decode_attention, False),
    ]  # fmt: skip


def rows() -> list[Row]:
    """Every public op on one small shape, and PyTorch's own LayerNorm for scale."""
    yardstick = Row(YARDSTICK, lambda d: (d(2, 64, 64), d(64), d(64)), lambda x, w, b: F.layer_norm(x, (64,), w, b))
    return [yardstick, *_token_rows(), *_scan_rows(), *_decode_rows()]


def _selected(wanted: str | None) -> list[Row]:
    ops = list(dict.fromkeys(row.name.split(',')[0] for row in rows() if row.name != YARDSTICK))
    names = wanted.split(',') if wanted else [name for name in ops if name != _BY_NAME]
    for name in names:
        if name not in ops:
            raise ZooError(f'unknown name {name!r}: --ops takes {", ".join(ops)}')
    return [row for row in rows() if row.name.split(',')[0] in (*names, YARDSTICK)]


def _steps(row: Row, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """What is timed, by pass; no memory is shared between the two."""
    rng = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, device=device).to(dtype)  # noqa: E731
    steps = {}
    for what in ('fwd', 'fwd+bwd') if row.backward else ('fwd',):
        arguments = row.make(draw)
        if row.backward:
            float_ = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
            arguments = [x.detach().requires_grad_() if float_(x) else x for x in arguments]
        if what == 'fwd':
            steps[what] = partial(row.call, *arguments)
        else:
            steps[what] = forward_backward(row.call, tuple(arguments))
    return steps


def _first_call(what: str, step: Callable, device: str) -> float | str:
    """Milliseconds, most of them compilation, or the error; the backward pass stays in the calling thread."""
    try:
        with torch.set_grad_enabled(what != 'fwd'), torch.autograd.set_multithreading_enabled(False):
            return round(wall_ms(step, device), 1)
    except Exception as error:
        recover(device, error)
        return in_words(error)


def bench_launch(args: argparse.Namespace) -> dict:
    """Run `zoo bench kernels --launch`.

    Args:
        args: the parsed command line.

    Returns:
        Conditions, and per op and pass: median_us and min_us of a call over the rounds, first_call_ms, or an `error`.
    """
    start = time.perf_counter()
    chosen = _selected(args.ops)
    steps = {(r.name, p): s for r in chosen for p, s in _steps(r, args.device, DTYPES[args.dtype]).items()}
    steps = {key: step for key, step in steps.items() if args.backward or key[1] == 'fwd'}
    result = {
        'bench': 'launch',
        **conditions(args.device),
        'dtype': args.dtype,
        'compile': 'nothing',
        'calls_between_waits': _CALLS,
        'rounds': min(args.repeats, _ROUNDS),
        'what': 'microseconds of the host per call' if args.device.startswith('cuda') else 'the work itself included',
        'complete': False,
        'results': [],
    }
    # Kernels are compiled side by side, one after the other they would take most of the time; the first few calls alone
    # load what all compilations share.
    threads = min(_THREADS, os.cpu_count() or 1) if args.device.startswith('cuda') else 1
    call, keys = lambda key: _first_call(key[1], steps[key], args.device), list(steps)
    with ThreadPoolExecutor(threads) as pool:
        first = [*map(call, keys[:3]), *pool.map(call, keys[3:])]
    result['first_calls_s'] = round(time.perf_counter() - start, 1)
    for (name, what), cold in zip(steps, first):
        row = {'op': name, 'pass': what}
        result['results'].append(row)
        if isinstance(cold, str):
            row['error'] = cold
            continue
        with torch.set_grad_enabled(what != 'fwd'):
            times = host_us(steps[name, what], _CALLS, result['rounds'], args.device)
        row |= {'median_us': round(statistics.median(times), 1), 'min_us': round(min(times), 1), 'first_call_ms': cold}
    result['seconds'] = round(time.perf_counter() - start, 1)
    result['complete'] = True
    _print(result)
    write_json(args.output, result)
    return result


def _print(result: dict) -> None:
    table = Table(title=f'Host time of one call, {result["dtype"]}, {result["device"]}, {result["seconds"]} s in all')
    for column in ('op', 'fwd us', 'min', 'fwd+bwd us', 'min'):
        table.add_column(column, no_wrap=True, justify='left' if column == 'op' else 'right')
    found = {(row['op'], row['pass']): row for row in result['results']}
    for name in dict.fromkeys(row['op'] for row in result['results']):
        cells = []
        for what in ('fwd', 'fwd+bwd'):
            row = found.get((name, what), {})
            cells += [f'{row[key]:.1f}' if key in row else '' for key in ('median_us', 'min_us')]
        table.add_row(name, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table)
    for row in result['results']:
        if 'error' in row:
            print(f'  {row["op"]}, {row["pass"]}: {row["error"]}')
