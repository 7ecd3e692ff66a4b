"""Every command line of the README is run: the quickstart whole, the rest shortened by the rules below.

A line is split at `&&`. Each piece must match exactly one rule of `RULES`, or the test fails: a new command in the
README needs a rule here that says how it is run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_pipelines import captioned_folder, pipeline
from vlm_folders import tiny_mmmamba

import zoo  # noqa: F401  registers the models
from zoo.diffusion import LinFusion

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')

TWO_STEPS = (
    '--trainer.max_steps=2 --trainer.limit_val_batches=1 --run.test_after_fit=false --trainer.accelerator=cpu '
    '--trainer.devices=1 --trainer.num_nodes=1 --trainer.precision=32-true --data.batch_size=2 --data.num_workers=0 '
    '--data.view.size=32 --model.num_classes=2'
).split()
TWO_MORE_STEPS = ['--trainer.max_steps=4', *TWO_STEPS[1:]]
UNTRAINED_TEACHER = ['--model.distill.pretrained=false', '--model.distill.teacher_kwargs={"img_size": 32}']
BRIEFLY = ['--repeats=1', '--warmup=0']


def without_cuda(words):
    return words if torch.cuda.is_available() else [w.replace('cuda', 'cpu') for w in words]


# Pattern of a piece -> how it is run here; None: not run, because this very test run stands for it.
RULES = {
    r'python3 -m venv \S+|\. \S+/activate': None,
    r'(python -m )?pip install .*': None,
    r'(python -m )?pytest.*': None,
    r'python train\.py fit --config configs/quickstart\.yaml': lambda w: w,
    r'(python train\.py|zoo) (predict|test|validate) --ckpt_path runs/quickstart/.*': lambda w: w,
    r'(python train\.py|zoo) fit --config configs/classify/\S+( --data\.path \S+)?': lambda w: w + TWO_STEPS,
    r'(python train\.py|zoo) fit .* --ckpt_path last': lambda w: w + TWO_MORE_STEPS,
    r'(python train\.py|zoo) fit .* --model\.distill\.teacher .*': lambda w: w + TWO_STEPS + UNTRAINED_TEACHER,
    r'zoo (list|info|configs|doctor)( \S+)*': lambda w: w,
    r'zoo validate \S+ --data \S+': lambda w: w + f'--checkpoint {w[2]}.pth --img-size 32 --workers 0'.split(),
    r'zoo export test_\w+ .*': lambda w: w,
    r'zoo bench models .*': lambda w: w + [*BRIEFLY, '--models=test_vig', '--peers=test_vit', '--img-size=160'],
    r'zoo bench kernels .*': lambda w: without_cuda(w) + [*BRIEFLY, '--shapes=vig_small_224'],
    r'zoo bench vlm .*': lambda w: without_cuda(w) + '--quick --rows linear --lengths 64 --tokens 4'.split(),
    # tests/test_distill_vlm.py takes every recipe of that folder through its stages
    r'python train\.py fit --config configs/distill_vlm/\S+ --data\.train \S+': None,
    r'zoo (chat|eval-vlm) FOLDER .*': lambda w: w,
    # slow tests of tests/test_distill_vlm.py and tests/test_distill_unet.py run these whole
    r'python train\.py fit --config configs/distill_(vlm|unet)/quickstart\.yaml': None,
    # their own tests take two steps from every config of these folders
    r'python train\.py fit --config configs/(segment|detect|contrast)/quickstart\.yaml': None,
    r'zoo probe --fit probe/quickstart .*': lambda w: w + ['--steps=2', '--trainer.max_epochs=1'],
    r'zoo generate-image PIPELINE .*': lambda w: w,
    r'zoo cache-latents --pipeline PIPELINE .*': lambda w: w + ['--size=32', '--bucket-step=8'],
}


def blocks(*languages):
    return re.findall(rf'^```(?:{"|".join(languages)})\n(.*?)^```', README, flags=re.M | re.S)


def commands():
    """The pieces of all shell lines, in order, once each."""
    found = []
    for block in blocks('bash', 'sh', 'shell', 'console'):
        for line in block.replace('\\\n', ' ').splitlines():
            line = line.split(' #')[0].removeprefix('$ ').strip()
            if line and not line.startswith('#'):
                found += [piece.strip() for piece in line.split('&&')]
    return list(dict.fromkeys(found))


def rule_of(command):
    matching = [pattern for pattern in RULES if re.fullmatch(pattern, command)]
    assert len(matching) == 1, f'{command!r} of the README matches {len(matching)} rules of tests/test_readme.py'
    return RULES[matching[0]]


RUN = [c for c in commands() if any(re.fullmatch(p, c) and RULES[p] for p in RULES)]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder that looks like the checkout and holds what the README takes for granted: a tiny data/imagenet."""
    folder = tmp_path_factory.mktemp('readme')
    for name in ('train.py', 'configs'):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label in ('left', 'right'):
            (folder / 'data' / 'imagenet' / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / 'data' / 'imagenet' / split / label / f'{i}.png')
    made = pipeline()
    LinFusion.attach(made)
    made.save_pretrained(folder / 'PIPELINE')
    captioned_folder(folder / 'images')
    (folder / 'FOLDER').mkdir()
    tiny_mmmamba(folder / 'FOLDER')
    picture = folder / 'photo.jpg'
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture)
    row = {'image': picture.name, 'question': 'What colour is it?', 'answer': 'red'}
    (folder / 'questions.jsonl').write_text(json.dumps(row) + '\n')
    for command in commands():
        if command.startswith('zoo validate '):
            name = command.split()[2]
            torch.save(timm.create_model(name, num_classes=2).state_dict(), folder / f'{name}.pth')
    return folder


def execute(words, folder):
    command = 'import sys; from zoo.cli import main; sys.argv[0] = "zoo"; sys.exit(main())'
    program = {'python': [sys.executable], 'zoo': [sys.executable, '-c', command]}[words[0]]
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    done = subprocess.run([*program, *words[1:]], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def quickstart(place):
    start = time.perf_counter()
    out = execute('python train.py fit --config configs/quickstart.yaml'.split(), place)
    return out, time.perf_counter() - start


def test_every_command_has_one_rule():
    for command in commands():
        rule_of(command)
    assert 'python train.py fit --config configs/quickstart.yaml' in commands()
    assert 'python -m pytest' in commands()


def test_quickstart(quickstart, place):
    """The main job: at least 97.5 % on the held-out scans, and the last lines say where things are."""
    out, seconds = quickstart
    accuracy = float(re.findall(r'^test accuracy: (\d+\.\d\d) %$', out, flags=re.M)[-1])
    assert accuracy >= 97.5
    assert 'predict' in '\n'.join(out.splitlines()[-12:])
    run = place / 'runs' / 'quickstart'
    assert {'best.ckpt', 'last.ckpt'} <= {p.name for p in (run / 'checkpoints').iterdir()}
    assert list(run.rglob('*.csv')) and list(run.rglob('events.out.tfevents*')) and len(list(run.rglob('*.png'))) >= 3
    assert seconds < 600, 'three minutes are promised on an idle machine with two cores'


@pytest.mark.parametrize('command', [c for c in RUN if 'configs/quickstart' not in c])
def test_command(command, place, request):
    words = rule_of(command)(shlex.split(command))
    if 'runs/quickstart' in command:
        request.getfixturevalue('quickstart')
    if command.endswith('--ckpt_path last'):
        first = command.removesuffix(' --ckpt_path last')
        config = first.split('--config configs/classify/')[1].split('.yaml')[0]
        if not (place / 'runs' / config).exists():
            execute(rule_of(first)(shlex.split(first)), place)
    out = execute(words, place)
    for option, path in zip(words, words[1:]):
        if option == '--output':
            assert (place / path).exists()
    assert out.strip()


def test_python_blocks_compile_and_import():
    for block in blocks('python'):
        compile(block, 'README.md', 'exec')
        for line in block.splitlines():
            if re.match(r'(import|from) ', line):
                exec(line, {})


def test_figures_and_links_exist():
    for page in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').rglob('*.md')):
        for target in re.findall(r'\]\((?!https?://|#)([^)#]+)', page.read_text(encoding='utf-8')):
            assert (page.parent / target).exists(), f'{page.relative_to(ROOT)} links to {target}'


def test_table_of_models_is_true():
    """Parameters and operations in the README are those that `zoo info` counts."""
    from zoo.tools.models import describe

    rows = re.findall(r'^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) G \| ([\d.]+) \|', README, flags=re.M)
    assert len(rows) >= 6
    for name, params, macs, top1 in rows:
        info = describe(name)
        assert info['params'] / 1e6 == pytest.approx(float(params), abs=0.06)
        assert info['macs'] / 1e9 == pytest.approx(float(macs), abs=0.011)
        assert info['published_top1'] == float(top1)
