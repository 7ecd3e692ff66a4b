"""How times are measured: warm-up, medians over interleaved repeats, and the conditions beside them."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import zoo
from zoo._graphs import record
from zoo.tools.doctor import cpu_name, driver, gpus, version

Step = Callable[[], object]

_L2_FLUSH_BYTES = 256 * 2**20


def sync(device: str) -> None:
    """Wait for the device, where it has a queue.

    Args:
        device: such as `cpu` or `cuda`.
    """
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    elif device.startswith('mps'):
        torch.mps.synchronize()


def wall_ms(step: Step, device: str) -> float:
    """Milliseconds of one call, its queued work included.

    Args:
        step: what to time.
        device: where it runs.
    """
    sync(device)
    start = time.perf_counter()
    step()
    sync(device)
    return (time.perf_counter() - start) * 1e3


class _Events:
    """One call between two CUDA events, the L2 cache overwritten before: launch included, cold data."""

    def __init__(self):
        self._scratch = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device='cuda')

    def __call__(self, step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._scratch.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def interleaved(steps: dict[str, Step], device: str, warmup: int, repeats: int) -> dict[str, dict]:
    """Time several things side by side, one call of each in turn, so that a busy machine hits all alike.

    Args:
        steps: what to time, by name.
        device: where they run; CUDA is timed with events, anything else with the wall clock.
        warmup: calls of each before the first counted one, besides the first call, which is timed apart.
        repeats: counted calls of each.

    Returns:
        Per name: cold_ms (the first call), median_ms, min_ms, p10_ms, p90_ms, repeats.
    """
    cold = {name: wall_ms(step, device) for name, step in steps.items()}
    for step in [s for s in steps.values() for _ in range(warmup)]:
        step()
    timer = _Events() if device.startswith('cuda') else (lambda step: wall_ms(step, device))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timer(step))
    return {name: {'cold_ms': round(cold[name], 3), **_summary(ms)} for name, ms in times.items()}


def _summary(ms: list[float]) -> dict:
    ordered = sorted(ms)
    return {
        'median_ms': round(statistics.median(ordered), 4),
        'min_ms': round(ordered[0], 4),
        'p10_ms': round(ordered[len(ordered) // 10], 4),
        'p90_ms': round(ordered[(len(ordered) * 9) // 10], 4),
        'repeats': len(ordered),
    }


def graph_ms(steps: list[Step], repeats: int) -> float:
    """Median milliseconds per call inside a captured CUDA graph, which leaves out the launch on the host.

    Args:
        steps: the same computation on different inputs, so that the L2 cache does not hold them all.
        repeats: replays of the whole graph.
    """

    def all_steps() -> None:
        for step in steps:
            step()

    graph, _ = record(all_steps)
    graph.replay()
    timer = _Events()
    return statistics.median(timer(graph.replay) for _ in range(repeats)) / len(steps)


def host_us(step: Step, calls: int = 20, rounds: int = 3, device: str = 'cuda') -> list[float]:
    """Microseconds that the host needs to enqueue one call, the device's work not waited for.

    Args:
        step: what to call; few enough kernels that `calls` times as many fit the queue.
        calls: in a round; the device is waited for in between.
        rounds: how many times are measured.
        device: where it runs; on a CPU the work itself is in the time.

    Returns:
        Microseconds per call of every round.
    """
    times = []
    for _ in range(rounds):
        sync(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - start) / calls * 1e6)
    sync(device)
    return times


def write_json(path: Path | None, result: dict) -> None:
    """Replace a result file in one step, so that a run that is stopped leaves a whole one.

    Args:
        path: where; its folder is made. None writes nothing.
        result: what.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    partial.write_text(json.dumps(result, indent=2) + '\n')
    partial.replace(path)


def copy_gb_per_s(device: str, mib: int) -> float:
    """Bandwidth of a large device-to-device copy, bytes read plus bytes written.

    Args:
        device: where to copy.
        mib: size of the block; large against every cache.
    """
    source = torch.empty(mib * 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timed = interleaved({'copy': lambda: target.copy_(source)}, device, warmup=2, repeats=10)
    return 2 * source.numel() / (timed['copy']['median_ms'] * 1e-3) / 1e9


def matmul_tflops(device: str, size: int = 8192) -> float:
    """Rate of a large bf16 matrix product, with which a GPU whose clocks are held down gives itself away.

    Args:
        device: where to multiply.
        size: rows and columns.
    """
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    timed = interleaved({'matmul': lambda: a @ b}, device, warmup=10, repeats=20)
    return 2 * size**3 / (timed['matmul']['median_ms'] * 1e-3) / 1e12


def gpu_rates(device: str) -> dict:
    """What this GPU does right now: `copy_gb_per_s` and `bf16_matmul_tflops`, measured, the floors of everything else.

    Args:
        device: a CUDA device; for any other the answer is empty.
    """
    if not device.startswith('cuda'):
        return {}
    bandwidth = statistics.median(copy_gb_per_s(device, 1024) for _ in range(3))
    return {'copy_gb_per_s': round(bandwidth, 1), 'bf16_matmul_tflops': round(matmul_tflops(device), 1)}


def rates_in_words(rates: dict) -> str:
    """A line for the log from what `gpu_rates` found."""
    words = {'copy_gb_per_s': 'copy bandwidth {} GB/s', 'bf16_matmul_tflops': 'bf16 matrix product {} TFLOP/s'}
    return ', '.join(words[key].format(value) for key, value in rates.items())


def commit() -> str | None:
    """Commit of the checkout this package runs from, `-dirty` appended for uncommitted changes; None elsewhere."""
    root = Path(zoo.__file__).resolve().parent.parent
    if not (root / '.git').exists():
        return None
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() or None


def conditions(device: str) -> dict:
    """What a reader must know to compare a time with another one.

    Args:
        device: where things run.
    """
    on_gpu = device.startswith('cuda')
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'),
        'device': gpus()[0]['name'] if on_gpu else cpu_name(),
        'device_kind': device,
        'driver': driver() if on_gpu else None,
        'cuda': torch.version.cuda if on_gpu else None,
        'threads': torch.get_num_threads(),
        'load_before': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'tf32_matmul': torch.backends.cuda.matmul.allow_tf32 if on_gpu else None,
        'tf32_cudnn': torch.backends.cudnn.allow_tf32 if on_gpu else None,
        'versions': {
            'linear-zoo': zoo.__version__,
            'torch': torch.__version__,
            **{p: version(p) for p in ('triton', 'timm', 'flash-linear-attention')},
        },
        'commit': commit(),
    }
