"""lmms-eval's own runner, in an environment of its own, on a local task with a tiny model of ours."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from vlm_folders import tiny_mmmamba

from zoo.vlm.chat import Conversation, answer, load_vlm

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ('red', 'green', 'blue')
TASK = """\
task: zoo_colours
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
  do_sample: false
process_results: !function utils.results
metric_list:
  - metric: right
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = """\
def visual(doc):
    return [doc['image'].convert('RGB')]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc['question']

def results(doc, results):
    return {'right': float(results[0] == doc['answer'])}

def mean(values):
    return sum(values) / len(values)
"""


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def environment(folder):
    """A virtual environment that sees this one's packages, with lmms-eval and this package on top; its python."""
    run(sys.executable, '-m', 'venv', '--without-pip', folder / 'venv')
    python = folder / 'venv' / 'bin' / 'python'
    own = Path(run(python, '-c', 'import site; print(site.getsitepackages()[0])').strip())
    (own / 'parent.pth').write_text('\n'.join(site.getsitepackages()))
    source = folder / 'source'
    files = run('git', '-C', ROOT, 'ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')
    for name in filter(None, files):
        if (ROOT / name).is_file() and name.split('/')[0] not in ('docs', 'tests'):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run(python, '-m', 'pip', 'install', '-q', 'lmms-eval>=0.7')
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--force-reinstall', source)
    return python


@pytest.mark.slow
@pytest.mark.net
def test_lmms_eval_runs_our_model(tmp_path):
    """Needs a package index: lmms-eval's pins differ from ours."""
    import datasets

    model = tmp_path / 'model'
    model.mkdir()
    tiny_mmmamba(model)
    pictures = [Image.new('RGB', (28, 28), c) for c in COLOURS]
    questions = ['what colour is it ?', 'what is it ?', 'how many ?']
    loaded = load_vlm(model, 'cpu')
    said = [
        answer(*loaded, [Conversation([('user', q)], [p])], max_new_tokens=3)[0] for q, p in zip(questions, pictures)
    ]
    answers = [said[0], 'no such answer', said[2]]
    table = datasets.Dataset.from_dict({'image': pictures, 'question': questions, 'answer': answers})
    table.cast_column('image', datasets.Image()).to_parquet(str(tmp_path / 'test.parquet'))
    task = tmp_path / 'tasks' / 'zoo_colours'
    task.mkdir(parents=True)
    (task / 'zoo_colours.yaml').write_text(TASK.replace('DATA', str(tmp_path / 'test.parquet')))
    (task / 'utils.py').write_text(UTILS)

    python = environment(tmp_path)
    settings = {'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': ''}
    command = ['-m', 'lmms_eval', '--model', 'zoo', '--model_args', f'pretrained={model}', '--tasks', 'zoo_colours']
    command += ['--include_path', tmp_path / 'tasks', '--batch_size', '2', '--device', 'cpu', '--log_samples']
    out = run(python, *command, '--output_path', tmp_path / 'out', cwd=tmp_path, env=os.environ | settings)
    results = list((tmp_path / 'out').rglob('*results.json'))
    assert len(results) == 1, out[-3000:]  # its exit code is 0 whatever happens
    assert json.loads(results[0].read_text())['results']['zoo_colours']['right,none'] == pytest.approx(2 / 3)
    (samples,) = (tmp_path / 'out').rglob('*samples*.jsonl')
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row['doc_id'])
    assert [row['filtered_resps'][0] for row in rows] == said
