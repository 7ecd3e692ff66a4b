"""Trains configs/vig_tiny_cifar10.yaml in fp32, bf16 and fp16, and a Transformer beside it, at once on one GPU.

    python tests/gpu/compare_precisions.py --data FOLDER_OF_PARQUET --epochs 10 --output docs/results

Writes vig-tiny-cifar10-precisions.json (conditions, loss curve and final accuracy of every run) and a plot of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RUNS = {
    'vig_tiny fp32': ('vig_tiny_patch16_224', '32-true'),
    'vig_tiny bf16': ('vig_tiny_patch16_224', 'bf16-mixed'),
    'vig_tiny fp16': ('vig_tiny_patch16_224', '16-mixed'),
    'deit_tiny fp32': ('deit_tiny_patch16_224', '32-true'),
    'deit_tiny bf16': ('deit_tiny_patch16_224', 'bf16-mixed'),
}


def start(name: str, folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    net, precision = RUNS[name]
    command = [sys.executable, str(ROOT / 'train.py'), 'fit', '--config', str(ROOT / 'configs/vig_tiny_cifar10.yaml')]
    command += ['--model.net', net, '--trainer.precision', precision, '--data.path', str(Path(args.data).resolve())]
    command += ['--trainer.max_epochs', str(args.epochs), '--data.num_workers', str(args.workers)]
    command += ['--run.root', str(folder), '--run.name', name.replace(' ', '-'), '--run.test_after_fit', 'false']
    log = open(folder / f'{name.replace(" ", "-")}.log', 'w')
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def read_curves(folder: Path, name: str) -> dict[str, list]:
    """Columns step -> value of the metrics that matter, from the run's metrics.csv."""
    curves: dict[str, list] = {}
    file = folder / name.replace(' ', '-') / 'metrics.csv'
    if not file.is_file():
        return curves
    for row in csv.DictReader(file.open()):
        for key in ('train/loss_step', 'train/loss_epoch', 'val/loss', 'val/top1', 'val/raw_top1'):
            if row.get(key):
                curves.setdefault(key, []).append([int(row['step']), float(row[key])])
    return curves


def plot(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, result in results.items():
        for axis, key in ((left, 'train/loss_epoch'), (right, 'val/top1')):
            points = result['curves'].get(key, [])
            style = '--' if 'deit' in name else '-'
            scale = 100 if key == 'val/top1' else 1
            axis.plot([p[0] for p in points], [scale * p[1] for p in points], style, label=name, marker='.')
    left.set(title='Training loss', xlabel='optimizer step', ylabel='cross-entropy, smoothed labels')
    right.set(title='Validation top-1', xlabel='optimizer step', ylabel='%')
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='folder with the train and test parquet files of CIFAR-10')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--workers', type=int, default=3, help='data workers of each run')
    parser.add_argument('--timeout', type=float, default=1800, help='seconds after which runs are ended')
    parser.add_argument('--output', type=Path, default=ROOT / 'docs/results')
    args = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp()), time.time()
    processes = {name: start(name, folder, args) for name in RUNS}
    while any(p.poll() is None for p in processes.values()) and time.time() - began < args.timeout:
        time.sleep(1)
    results, failed = {}, False
    for name, process in processes.items():
        ended = process.poll()
        if ended is None:
            process.kill()
        curves = read_curves(folder, name)
        losses = [loss for _, loss in curves.get('train/loss_step', [])]
        top1 = curves.get('val/top1', [[0, float('nan')]])[-1][1]
        results[name] = {
            'exit_code': ended,
            'final_top1': top1,
            'all_finite': bool(losses) and all(map(math.isfinite, losses)),
            'curves': curves,
        }
        failed |= ended != 0 or not results[name]['all_finite']
        print(f'{name:16} exit {ended}  top-1 {100 * top1:.2f} %  finite {results[name]["all_finite"]}')
        if ended != 0:
            print((folder / f'{name.replace(" ", "-")}.log').read_text()[-1500:])
    args.output.mkdir(parents=True, exist_ok=True)
    conditions = {
        'what': 'CIFAR-10 at 32 px, patch 4, runs side by side on one GPU',
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
        'torch': torch.__version__,
        'epochs': args.epochs,
        'seconds_for_all': round(time.time() - began, 1),
    }
    stem = args.output / 'vig-tiny-cifar10-precisions'
    stem.with_suffix('.json').write_text(json.dumps({**conditions, 'runs': results}, indent=1) + '\n')
    plot(results, stem.with_suffix('.png'))
    return int(failed)


if __name__ == '__main__':
    raise SystemExit(main())
