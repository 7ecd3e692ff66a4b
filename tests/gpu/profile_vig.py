"""Where the GPU time of a model goes: its kernels by time, for a forward pass and a training step, eager and compiled.

    python tests/gpu/profile_vig.py [MODEL] [--size 224] [--batch 256] [--top 14] [--modes eager,compiled]
        [--passes infer,train]

MODEL is a name of `zoo.create_model` or of timm. bf16 autocast, random images. Per row: share of
the GPU time, microseconds in one pass, launches in one pass, name. `wall` is the time of a pass measured with events,
so what it exceeds the sum of the kernels by is time in which the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import zoo

PASSES = 4


def build(name: str, size: int) -> torch.nn.Module:
    model = zoo.create_model(name) if name in zoo.list_models() else timm.create_model(name, img_size=size)
    return model.cuda()


def step_of(model: torch.nn.Module, x: torch.Tensor, train: bool, compiled: bool):
    """A function that runs one forward pass, or one training step without an optimizer."""
    model.train(train)
    run = torch.compile(model, fullgraph=True) if compiled else model
    target = torch.randint(0, 1000, (x.shape[0],), device=x.device)

    def infer():
        with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16):
            run(x)

    def training():
        with torch.autocast('cuda', torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return training if train else infer


def wall_ms(step, repeats: int = 10) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def table(step, top: int) -> tuple[float, int, list[tuple[float, int, str]]]:
    """Sum of the kernels in us, their number, and the largest of them by name, per pass."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(PASSES):
            step()
        torch.cuda.synchronize()
    times, counts = defaultdict(float), defaultdict(int)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time_total / PASSES
            counts[event.name] += 1
    rows = sorted(((us, counts[name] // PASSES, name) for name, us in times.items()), reverse=True)
    return sum(times.values()), sum(counts.values()) // PASSES, rows[:top]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('model', nargs='?', default='vig_tiny_patch16_224')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--top', type=int, default=14)
    parser.add_argument('--modes', default='eager,compiled')
    parser.add_argument('--passes', default='infer,train')
    args = parser.parse_args()
    x = torch.randn(args.batch, 3, args.size, args.size, device='cuda')
    for train in (False, True):
        for compiled in (False, True):
            pass_name, mode = ('train' if train else 'infer'), ('compiled' if compiled else 'eager')
            if pass_name not in args.passes.split(',') or mode not in args.modes.split(','):
                continue
            torch._dynamo.reset()
            torch.cuda.reset_peak_memory_stats()
            step = step_of(build(args.model, args.size), x, train, compiled)
            for _ in range(3):
                step()
            wall = wall_ms(step)
            total, launches, rows = table(step, args.top)
            memory = torch.cuda.max_memory_allocated() / 2**30
            title = f'{args.model} {args.size} px, batch {args.batch}, {pass_name} {mode}'
            print(f'== {title}: wall {wall:.2f} ms, kernels {total / 1e3:.2f} ms in {launches} launches, '
                  f'{args.batch / wall * 1e3:.0f} img/s, peak {memory:.2f} GiB', flush=True)  # fmt: skip
            for us, count, name in rows:
                print(f'{us / total:6.1%} {us:9.0f} us {count:5d} x  {name[:100]}', flush=True)


if __name__ == '__main__':
    main()
