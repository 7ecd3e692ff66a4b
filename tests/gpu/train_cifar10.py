"""Trains the networks of configs/cifar10 at once on the GPUs of this machine, and compares them.

    python tests/gpu/train_cifar10.py --data FOLDER_OF_PARQUET --epochs 16 --output docs/results

Writes cifar10.json (conditions; curves, final accuracy, images per second and peak memory of every run) and
cifar10.png, both again and again while the runs go on: what is stopped keeps what it has. `--alone` first times a
training step of every run with a GPU to itself, because images per second of runs that share one say little. `--keep`
adds to the file of an earlier call with the same epochs: its other runs stay as they are, under its conditions.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from zoo.tools._timing import conditions, interleaved, write_json  # noqa: E402

_METRICS = ('train/loss_epoch', 'val/loss', 'val/top1', 'val/raw_top1', 'train/images_per_s', 'train/peak_mib')


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        config: File in configs/cifar10, without its ending.
        cost: Rough time of an epoch next to the other runs, to share out the GPUs.
        overrides: Options that differ from the config.
    """

    config: str
    cost: float
    overrides: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        named = [o.split('=')[1] for o in self.overrides if o.startswith('--trainer.precision=')]
        return named[0] if named else self.settings()['trainer']['precision']

    def settings(self) -> dict:
        return yaml.safe_load((ROOT / 'configs' / 'cifar10' / f'{self.config}.yaml').read_text())


FP32, FP16 = ('--trainer.precision=32-true',), ('--trainer.precision=16-mixed',)
RUNS = {
    'ViG-H-T': Run('vig_hier_tiny_cifar10', 10),
    'RAVLT-T': Run('ravlt_tiny_cifar10', 10),
    'ViG-T fp32': Run('vig_tiny_cifar10', 8, FP32),
    'MobileMamba-T2': Run('mobilemamba_t2_cifar10', 6),
    'ViG-T': Run('vig_tiny_cifar10', 5),
    'ViG-T fp16': Run('vig_tiny_cifar10', 5, FP16),
    'ConvNeXt-atto': Run('convnext_atto_cifar10', 4),
    'DeiT-tiny fp32': Run('deit_tiny_cifar10', 4, FP32),
    'ResNet-18': Run('resnet18_cifar10', 3),
    'DeiT-tiny': Run('deit_tiny_cifar10', 3),
    'DeiT-tiny fp16': Run('deit_tiny_cifar10', 3, FP16),
}


def folder_name(label: str) -> str:
    return label.lower().replace(' ', '-')


def share_out(labels: list[str], gpus: int) -> dict[str, int]:
    """A GPU for every run: the longest first, each to the one with least to do."""
    load, chosen = [0.0] * gpus, {}
    for label in sorted(labels, key=lambda n: -RUNS[n].cost):
        chosen[label] = load.index(min(load))
        load[chosen[label]] += RUNS[label].cost
    return chosen


def start(label: str, gpu: int, folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    run, name = RUNS[label], folder_name(label)
    command = [sys.executable, str(ROOT / 'train.py'), 'fit', '--config', f'configs/cifar10/{run.config}.yaml']
    command += [f'--data.path={Path(args.data).resolve()}', f'--data.cache_dir={folder / "datasets"}']
    command += [f'--data.num_workers={args.workers}', f'--trainer.max_epochs={args.epochs}', *run.overrides]
    command += [f'--run.root={folder}', f'--run.name={name}', '--run.test_after_fit=false', '--run.threads=1']
    command += ['--trainer.enable_checkpointing=false', '--trainer.enable_progress_bar=false', *args.option]
    seen = os.environ.get('CUDA_VISIBLE_DEVICES')  # of the devices that this process sees, the one with number `gpu`
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': seen.split(',')[gpu] if seen else str(gpu), 'OMP_NUM_THREADS': '1'}
    with open(folder / f'{name}.log', 'w') as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Let the datasets library convert the files once, before everybody asks for it."""
    from zoo.data import HubImages

    HubImages(str(Path(args.data).resolve()), val='test', cache_dir=str(folder / 'datasets')).setup()


def alone(label: str, repeats: int) -> dict:
    """Training step of a run's network with the GPU to itself: AdamW, no EMA, data on the device already."""
    from zoo.tasks import Classify

    run = RUNS[label]
    settings = run.settings()
    task = settings['model']['init_args']
    torch.manual_seed(0)
    layout = torch.channels_last if task['channels_last'] else torch.contiguous_format
    net = (
        Classify(task['net'], num_classes=10, net_kwargs=task['net_kwargs']).net.cuda().to(memory_format=layout).train()
    )
    batch = settings['data']['init_args']['batch_size']
    x = torch.randn(batch, 3, 32, 32, device='cuda').to(memory_format=layout)
    y = torch.randint(0, 10, (batch,), device='cuda')
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    dtype = {'bf16-mixed': torch.bfloat16, '16-mixed': torch.float16}.get(run.precision)

    def step() -> None:
        with torch.autocast('cuda', dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed = interleaved({'step': step}, 'cuda', 5, repeats)['step']
    parameters = sum(p.numel() for p in net.parameters())
    return {'parameters': parameters, 'alone': {**timed, 'images_per_s': round(batch / timed['median_ms'] * 1e3, 1)}}


def read_curves(file: Path) -> dict[str, list[list[float]]]:
    """[epoch from 1, value] pairs of the metrics of each epoch; [] where a kill cut a row off."""
    curves: dict[str, list] = {}
    if not file.is_file():
        return curves
    with file.open(newline='') as rows:
        for row in csv.DictReader(rows):
            for key in _METRICS:
                if row.get(key) and row.get('epoch'):
                    curves.setdefault(key, []).append([int(float(row['epoch'])) + 1, round(float(row[key]), 5)])
    return curves


def collect(labels: list[str], processes: dict[str, subprocess.Popen], folder: Path, epochs: int) -> dict[str, dict]:
    """What every run has so far."""
    found = {}
    for label in labels:
        curves = read_curves(folder / folder_name(label) / 'metrics.csv')
        run, top1 = RUNS[label], curves.get('val/top1', [])
        rates = sorted(v for _, v in curves.get('train/images_per_s', []))
        losses = [v for key in ('train/loss_epoch', 'val/loss') for _, v in curves.get(key, [])]
        found[label] = {
            'config': f'configs/cifar10/{run.config}.yaml',
            'precision': run.precision,
            'exit_code': processes[label].poll() if label in processes else None,
            'epochs_done': len(top1),
            'final_top1': top1[-1][1] if len(top1) == epochs else None,
            'last_top1': top1[-1][1] if top1 else None,
            'images_per_s_shared': rates[len(rates) // 2] if rates else None,
            'peak_mib': max((v for _, v in curves.get('train/peak_mib', [])), default=None),
            'all_finite': bool(losses) and all(map(math.isfinite, losses)),
            'curves': {k: v for k, v in curves.items() if k not in ('train/images_per_s', 'train/peak_mib')},
        }
    return found


def plot(runs: dict[str, dict], path: Path) -> None:
    """Networks above, precisions below; training loss on the left, accuracy on the right."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    precise = {n.rsplit(' ', 1)[0] for n in runs if n.endswith((' fp32', ' fp16'))}
    rows = ['one recipe, bf16 autocast', *(['precisions'] if precise else [])]
    figure, axes = plt.subplots(len(rows), 2, figsize=(12, 4.5 * len(rows)), squeeze=False)
    for number, (label, run) in enumerate(runs.items()):
        base = label.rsplit(' ', 1)[0] if label.endswith((' fp32', ' fp16')) else label
        places = ([0] if base == label else []) + ([1] if base in precise else [])
        style = '--' if base in ('DeiT-tiny', 'ResNet-18', 'ConvNeXt-atto') else '-'
        for row in places:
            for axis, key, scale in ((axes[row, 0], 'train/loss_epoch', 1), (axes[row, 1], 'val/top1', 100)):
                points = run['curves'].get(key, [])
                name = f'{label} bf16' if row and base == label else label
                line = [scale * p[1] for p in points]
                axis.plot([p[0] for p in points], line, style, color=f'C{number % 10}', label=name, linewidth=1.4)
    for row, title in enumerate(rows):
        axes[row, 0].set(title=f'training loss: {title}', xlabel='epoch', ylabel='cross-entropy, smoothed labels')
        axes[row, 1].set(title=f'top-1 on 10,000 test images: {title}', xlabel='epoch', ylabel='%')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    partial = path.with_name(f'.{path.name}')
    figure.savefig(partial, dpi=110, format='png')
    plt.close(figure)
    partial.replace(path)


def show(result: dict) -> None:
    for label, run in result['runs'].items():
        top1 = f'{100 * run["last_top1"]:.2f} %' if run['last_top1'] is not None else 'none'
        rate = run.get('alone', {}).get('images_per_s') or run['images_per_s_shared']
        print(f'{label:16} {run["epochs_done"]:3} epochs  top-1 {top1:8}  {rate} images/s  {run["peak_mib"]} MiB  '
              f'exit {run["exit_code"]}', flush=True)  # fmt: skip


def differences(runs: dict[str, dict]) -> dict[str, float]:
    """Points of final top-1 of half-precision runs above the fp32 run of the same network."""
    found = {}
    for label, run in runs.items():
        base = label.removesuffix(' fp16')
        full = runs.get(f'{base} fp32')
        if full and run is not full and None not in (run['final_top1'], full['final_top1']):
            found[label] = round(100 * (run['final_top1'] - full['final_top1']), 2)
    return found


def earlier(file: Path, epochs: int) -> dict[str, dict]:
    """Runs of an earlier call, each with the command and the versions under which it ran."""
    if not file.is_file():
        return {}
    former = json.loads(file.read_text())
    if former['epochs'] != epochs:
        raise SystemExit(f'{file} has {former["epochs"]} epochs, this call {epochs}: choose another --output')
    about = {k: former[k] for k in ('date', 'device', 'command', 'commit', 'versions')}
    return {label: {'earlier': about, **run} for label, run in former['runs'].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='folder with the train and test parquet files of CIFAR-10')
    parser.add_argument('--epochs', type=int, default=16)
    parser.add_argument('--runs', help=f'some of {", ".join(RUNS)}; default: all')
    parser.add_argument('--workers', type=int, default=3, help='processes that decode the images of a run, once')
    parser.add_argument('--timeout', type=float, default=3600, help='seconds after which runs are ended')
    parser.add_argument('--alone', action='store_true', help='time a training step of every run by itself first')
    parser.add_argument(
        '--option', action='append', default=[], help='passed to every run, such as --trainer.max_steps=9'
    )
    parser.add_argument('--keep', action='store_true', help='keep the other runs of the file that is there')
    parser.add_argument('--output', type=Path, default=ROOT / 'docs/results')
    args = parser.parse_args()
    kept = earlier(args.output / 'cifar10.json', args.epochs) if args.keep else {}
    began, folder = time.time(), Path(tempfile.mkdtemp(prefix='cifar10-'))
    labels = args.runs.split(',') if args.runs else list(RUNS)
    gpus = max(1, torch.cuda.device_count())
    result = {
        'what': f'CIFAR-10 at 32 px, {len(labels)} runs side by side on {gpus} GPU(s)',
        'command': ' '.join(sys.argv).replace(str(args.output), 'FOLDER'),
        **conditions('cuda' if torch.cuda.is_available() else 'cpu'),
        'gpus': gpus,
        'epochs': args.epochs,
        'runs': {},
    }
    prepare(folder, args)
    steps = {}
    for label in labels if args.alone else []:
        steps[label] = alone(label, 20)
        print(label, json.dumps(steps[label]), flush=True)
        torch.cuda.empty_cache()
    chosen = share_out(labels, gpus)
    processes = {label: start(label, chosen[label], folder, args) for label in labels}
    drawn = time.time()

    def save() -> None:
        runs = collect(labels, processes, folder, args.epochs)
        found = {n: {**steps.get(n, {}), 'gpu': chosen[n], **run} for n, run in runs.items()}
        result['runs'] = {n: found.get(n) or kept[n] for n in RUNS if n in found or n in kept}
        result['points_over_fp32'] = differences(result['runs'])
        result['seconds'] = round(time.time() - began, 1)
        write_json(args.output / 'cifar10.json', result)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while any(p.poll() is None for p in processes.values()) and time.time() - began < args.timeout:
            time.sleep(5)
            save()
            if time.time() - drawn > 60:
                drawn = time.time()
                print(f'--- {drawn - began:.0f} s', flush=True)
                show(result)
                plot(result['runs'], args.output / 'cifar10.png')
    finally:
        save()  # before anything is ended: exit_code null means that the time was over
        for process in processes.values():
            process.kill()
        plot(result['runs'], args.output / 'cifar10.png')
    for label, run in result['runs'].items():
        if label in processes and run['exit_code'] not in (0, None):
            print(label, (folder / f'{folder_name(label)}.log').read_text()[-1500:])
    show(result)
    print('points over fp32:', result['points_over_fp32'])
    ran = [run for run in result['runs'].values() if 'earlier' not in run]
    return int(any(run['exit_code'] != 0 or not run['all_finite'] for run in ran))


if __name__ == '__main__':
    raise SystemExit(main())
