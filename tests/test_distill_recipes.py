"""Recipes of distillation on tiny models, teachers that are trained first, several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_distill_vlm import DATA, STAGES, arguments, tiny_teacher

import zoo
from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.runs import resolve_config

CONFIGS = next(Path(base) / 'configs' for base in zoo.__path__ if (Path(base) / 'configs').is_dir())
RECIPES = sorted((CONFIGS / 'distill_vlm').glob('*.yaml'))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Folder of a tiny teacher."""
    folder = tmp_path_factory.mktemp('teacher')
    for part in tiny_teacher():
        part.save_pretrained(folder)
    return folder


def conversations(folder):
    """Two questions about one picture, as JSON lines."""
    Image.new('RGB', (40, 40), 'red').save(folder / 'red.png')
    told = [{'from': 'human', 'value': '<image>what colour is it ?'}, {'from': 'gpt', 'value': 'red'}]
    path = folder / 'rows.jsonl'
    path.write_text((json.dumps({'image': 'red.png', 'conversations': told}) + '\n') * 8)
    return path


def tiny_hovle(folder):
    """A HoVLE of four layers with random weights and its tokenizer, as published."""
    from vlm_folders import BEHIND, published_tokenizer

    from zoo.vlm import HoVLEConfig, HoVLEForConditionalGeneration

    folder.mkdir()
    model, ids = published_tokenizer(folder)
    size = model.get_piece_size() + len(BEHIND)
    part = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2}
    first = {'num_hidden_layers': 2, 'patch_size': 7, 'image_size': 28, 'llm_vocab_size': size, 'llm_hidden_size': 32}
    HoVLEForConditionalGeneration(
        HoVLEConfig(
            embedding_config=part | first | {'img_context_token_id': ids['<IMG_CONTEXT>']},
            llm_config=part | {'num_hidden_layers': 2, 'vocab_size': size, 'pad_token_id': 2},
            force_image_size=28,
            dynamic_image_size=True,
            use_thumbnail=True,
            max_dynamic_patch=4,
            template='internlm2-chat',
        )
    ).save_pretrained(folder)
    return folder


def shrunk(path, stages):
    """A recipe's stages, one step each."""
    few = [
        {
            **s,
            'max_steps': 1,
            'wsd': {'warmup': 0, 'stable': None, 'decay': 0},
            'softmax_layers': [0] if s.get('softmax_layers') else [],
        }
        for s in stages
    ]
    for one in few:
        if one.get('lora'):
            one['lora'] = {**one['lora'], 'targets': one['lora']['targets'].replace('text_model', 'language_model')}
    return few


STUDENTS = [p for p in RECIPES if not p.stem.startswith('teacher')]
LONG = ('cifar10', 'mmmamba_linear')  # the first trains its teacher, the hybrid shows what the second does
TOGETHER = [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LONG)) for p in STUDENTS]


def test_quickstarts_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config('quickstart') == CONFIGS / 'quickstart.yaml'
    assert resolve_config('distill_vlm/quickstart') == CONFIGS / 'distill_vlm' / 'quickstart.yaml'


@pytest.mark.parametrize('path', TOGETHER, ids=lambda p: p.stem)
def test_recipe_goes_through_its_stages(path, teacher, tmp_path, monkeypatch, capsys):
    from test_configs import parquet
    from vlm_folders import tiny_llava

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    data, init = config['data'], config['model']['init_args']
    args = [f'--model.stages={json.dumps(shrunk(path, init["stages"]))}', '--trainer.precision=32-true']
    args += ['--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.strategy=auto', '--data.num_workers=0']
    args += ['--run.test_after_fit=false', '--run.threads=1', '--data.batch_size=2']
    args += ['--trainer.limit_val_batches=1', '--trainer.num_sanity_val_steps=0']
    if data['class_path'] == 'zoo.data.Shapes':
        args += [f'--model.teacher={teacher}', '--data.patch_size=12']
    elif data['class_path'] == 'zoo.data.ImageQuestions':  # with its teacher
        images = [
            f'--data.images.path={parquet(tmp_path / "data", 10)}',
            f'--data.images.cache_dir={tmp_path / "cache"}',
        ]
        images += ['--data.images.num_workers=0']
        first = [*images, '--data.num_workers=0', '--data.batch_size=2', '--trainer.max_epochs=1']
        first += ['--trainer.precision=32-true', '--trainer.limit_train_batches=1', '--run.test_after_fit=false']
        recipe = CONFIGS / 'distill_vlm' / 'teacher_cifar10.yaml'
        args += [*images, f'--model.teacher={recipe}', f'--model.teacher_arguments={json.dumps(first)}']
    else:
        folder = tmp_path / 'teacher'
        tiny_hovle(folder) if 'HoVLE' in init['teacher'] else tiny_llava(folder)
        args += [f'--model.teacher={folder}', f'--data.processor={folder}', f'--data.train={conversations(tmp_path)}']
        args += ['--data.val_fraction=0.25']
    assert main(['fit', f'--config={path}', *args]) == 0, capsys.readouterr().err
    run = tmp_path / 'runs' / config['run']['name']
    for stage in init['stages']:
        assert (run / 'stages' / f'{stage["name"]}.safetensors').is_file()
        assert (run / stage['name'] / 'config.json').is_file() == (stage['loss'] == 'logits')


@pytest.mark.slow
def test_teacher_is_trained_first_and_once(tmp_path, capfd):
    layers = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'hidden_size': 16, 'intermediate_size': 16}
    vision = {
        'model_type': 'siglip_vision_model',
        'image_size': 48,
        'patch_size': 12,
        'vision_use_head': False,
        **layers,
    }
    net = {'model_type': 'llava', 'vision_feature_layer': -1, 'vision_feature_select_strategy': 'full'}
    net |= {'image_seq_length': 16, 'vision_config': vision, 'text_config': {'model_type': 'llama', **layers}}
    recipe = {
        'model': {'class_path': 'zoo.tasks.FinetuneVLM', 'init_args': {'net': net}},
        'data': {'class_path': 'zoo.data.Shapes', 'init_args': DATA},
        'trainer': {'max_epochs': 5, 'accelerator': 'cpu'},
        'run': {'monitor': 'val/exact', 'threads': 1},
    }
    path = tmp_path / 'tiny_teacher.yaml'
    path.write_text(yaml.safe_dump(recipe))
    stages = [{**STAGES[0], 'max_steps': 1, 'wsd': {}}]
    shorter = ['--trainer.max_epochs=1', '--run.test_after_fit=false']
    args = [*arguments(tmp_path, path, stages=stages, teacher_arguments=shorter), '--trainer.limit_val_batches=0']
    assert main(args) == 0
    assert 'training the teacher first' in capfd.readouterr().out
    assert read_checkpoint(tmp_path / 'tiny_teacher' / 'checkpoints' / 'last.ckpt')['global_step'] == 5
    assert (tmp_path / 'run' / 'stages' / 'new.safetensors').is_file()
    assert main(args) == 0
    out = capfd.readouterr().out
    assert 'training the teacher first' not in out and f'teacher: {tmp_path / "tiny_teacher" / "model"}/' in out
    assert (tmp_path / 'run-2' / 'stages' / 'new.safetensors').is_file()


@pytest.mark.slow
def test_teacher_that_cannot_be_trained(tmp_path, capfd):
    (tmp_path / 'broken.yaml').write_text('model: {class_path: zoo.tasks.FinetuneVLM}')
    assert main(arguments(tmp_path, tmp_path / 'broken.yaml')) == 1
    assert 'training the teacher failed (exit code 2)' in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes(teacher, tmp_path):
    """DistributedDataParallel is made anew for the parameters of each stage."""
    args = arguments(tmp_path, teacher)[1:]
    args += ['--trainer.devices=2', '--trainer.strategy=ddp', '--data.train_images=40', '--run.test_after_fit=false']
    done = subprocess.run([sys.executable, '-m', 'zoo', 'fit', *args], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in (tmp_path / 'run' / 'stages').iterdir()} == {s['name'] for s in STAGES}
    assert done.stdout.count('at its start') == len(STAGES), 'a table is printed by more than one process'
