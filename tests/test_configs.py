"""Every packaged config starts, takes two optimisation steps on generated images, and says what a config has to say."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

import zoo
from zoo.cli import main

ROOT = next(Path(base) / 'configs' for base in zoo.__path__ if (Path(base) / 'configs').is_dir())
CONFIGS = sorted(ROOT.rglob('*.yaml'))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes, four images a split."""
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('left', 'right'):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


def parquet(folder, classes):
    """A Hugging Face data set on disk: two images per class and split."""
    datasets, rng = pytest.importorskip('datasets'), np.random.default_rng(0)
    names = [str(number) for number in range(classes)]
    features = datasets.Features({'img': datasets.Image(), 'label': datasets.ClassLabel(names=names)})
    for split in ('train', 'test'):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2 * classes)]
        rows = {'img': images, 'label': [i % classes for i in range(2 * classes)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{split}.parquet')
    return folder


def test_configs_are_found():
    assert {p.stem for p in CONFIGS} >= {'quickstart', 'vig_tiny_patch16_224', 'vig_hier_base_224'}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: str(p.relative_to(ROOT).with_suffix('')))
def test_header(path):
    head = path.read_text().split('\n\n')[0]
    assert all(line.startswith('#') for line in head.splitlines())
    for word in ('Reproduces', 'Expects', 'Run '):
        assert word in head, f'{path.name} does not say what it {word.strip().lower()}'
    assert re.search(r'Takes|Hardware', head)
    assert f'--config configs/{path.relative_to(ROOT)}' in head


# Recipes that differ from another only in widths, sizes, numbers of the schedule, or one option.
TWINS = [f'mobilemamba_{v}{kd}' for v in ('t4', 's6', 'b1', 'b2', 'b4') for kd in ('', '_kd')]
TWINS += ['matryoshka_vig_tiny', 'vig_hier_tiny_cifar10_half']
OWN = ('contrast', 'detect', 'distill_', 'segment')  # these have tests of their own
IMAGES = [p for p in CONFIGS if not p.parent.name.startswith(OWN)]
TWO_STEPS = [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in TWINS)) for p in IMAGES]


@pytest.mark.parametrize('path', TWO_STEPS, ids=lambda p: str(p.relative_to(ROOT).with_suffix('')))
def test_takes_two_steps(path, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    big = any(
        word in path.stem for word in ('base', 'hier', 'ravlt')
    )  # a gigabyte of optimizer state: not worth writing here
    overrides = ['--trainer.max_steps=2', '--trainer.limit_val_batches=1', '--run.test_after_fit=false']
    overrides += [
        '--trainer.accelerator=cpu',
        '--trainer.devices=1',
        '--trainer.num_nodes=1',
        '--trainer.precision=32-true',
    ]
    if config['data']['class_path'].endswith('ImageFolder'):
        overrides += [f'--data.path={images}', '--data.batch_size=2', '--data.num_workers=0', '--data.view.size=32']
        overrides += ['--model.num_classes=2']
    if config['data']['class_path'].endswith('HubImages'):
        classes = config['model']['init_args']['num_classes']
        classes = max([classes - 1, *config['data']['init_args'].get('classes', [])]) + 1
        overrides += [f'--data.path={parquet(tmp_path / "data", classes)}', f'--data.cache_dir={tmp_path / "cache"}']
        overrides += ['--data.batch_size=2', '--data.num_workers=0']
    if config['data']['class_path'].endswith('ImageQuestions'):
        overrides += [
            f'--data.images.path={parquet(tmp_path / "data", 10)}',
            '--data.batch_size=2',
            '--data.num_workers=0',
        ]
        overrides += [f'--data.images.cache_dir={tmp_path / "cache"}']
    if config['data']['class_path'].endswith('Shapes'):
        overrides += ['--data.train_images=4', '--data.val_images=4', '--data.batch_size=2', '--data.num_workers=0']
    if config['model']['init_args'].get('distill'):
        overrides += [
            '--model.distill.teacher=test_resnet',
            '--model.distill.pretrained=false',
            '--model.distill.size=32',
        ]
    if config['model']['init_args'].get('pretrained'):
        overrides += ['--model.pretrained=false']
    if config['model']['init_args']['net'].startswith('vit_base'):
        overrides += ['--model.net_kwargs={img_size: 32, depth: 1}']
    overrides += ['--trainer.enable_checkpointing=false'] if big else []
    if path.stem in ('ravlt_base', 'ravlt_large'):  # deeper than what the small ones show
        overrides += ['--model.net_kwargs={drop_path_rate: 0.4, depths: [1, 1, 1, 1]}']
    assert main(['fit', f'--config={path}', *overrides]) == 0, capsys.readouterr().err
    run = tmp_path / 'runs' / config['run']['name']
    assert (run / 'checkpoints' / 'last.ckpt').is_file() or big
    saved = yaml.safe_load((run / 'config.yaml').read_text())
    assert saved['trainer']['max_steps'] == 2
    assert saved['model']['init_args']['optim']['weight_decay'] == config['model']['init_args']['optim']['weight_decay']


def test_cifar10_is_one_recipe():
    """Networks are compared, so nothing else may differ: not even the seed."""
    recipes = []
    for path in sorted((ROOT / 'cifar10').glob('*.yaml')):
        config = yaml.safe_load(path.read_text())
        assert config['run'].pop('name') == path.stem
        for own in ('net', 'net_kwargs', 'channels_last'):
            config['model']['init_args'].pop(own)
        recipes.append(config)
    assert len(recipes) >= 7 and all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize('path', sorted((ROOT / 'classify').glob('*.yaml')), ids=lambda p: p.stem)
def test_recipe_is_named_after_its_model(path):
    config = yaml.safe_load(path.read_text())
    net, kd = config['model']['init_args']['net'], bool(config['model']['init_args'].get('distill'))
    assert path.stem == config['run']['name'] == net + '_kd' * kd
    assert timm.is_model(net)
    trainer, data = config['trainer'], config['data']['init_args']
    assert data['batch_size'] * trainer['devices'] * trainer['num_nodes'] == 1024
    assert data['view']['size'] == timm.get_pretrained_cfg(net).input_size[-1]
    assert data['view']['crop_pct'] == timm.get_pretrained_cfg(net).crop_pct
