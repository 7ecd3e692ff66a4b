"""zoo list, info, configs, doctor and validate, as a user runs them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.cli import main
from zoo.errors import ZooError
from zoo.registry import PUBLISHED_TOP1
from zoo.tools.doctor import op_families
from zoo.tools.models import cli_configs, cli_info, cli_list, config_files, describe
from zoo.tools.validate import cli_validate


def test_list(capsys):
    assert cli_list([]) == 0
    out = capsys.readouterr().out
    for name in zoo.list_models():
        assert name in out
    assert cli_list(['vig_hier*', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r['name'] for r in rows] == zoo.list_models('vig_hier*')
    assert cli_list(['--capability', 'pretrained', '--json']) == 0
    assert {r['name'] for r in json.loads(capsys.readouterr().out)} == set(PUBLISHED_TOP1)
    with pytest.raises(ZooError, match='zoo list'):
        cli_list(['nothing_like_this*'])


# Multiply-accumulates at 224 px in G, counted from the formulas: everything but the scans, the scans.
MACS = {
    'vig_tiny_patch16_224': (1.11, 0.09),
    'vig_small_patch16_224': (4.37, 0.17),
    'vig_base_patch16_224': (17.32, 0.35),
    'vig_hier_tiny_224': (4.41, 0.13),
    'vig_hier_small_224': (8.61, 0.22),
    'vig_hier_base_224': (15.36, 0.29),
}


@pytest.mark.parametrize('name', MACS)
def test_macs_include_the_scan(name):
    info = describe(name)
    rest, scan = MACS[name]
    assert info['scan_macs'] / 1e9 == pytest.approx(scan, abs=0.006)
    assert (info['macs'] - info['scan_macs']) / 1e9 == pytest.approx(rest, abs=0.011)


def test_macs_at_another_size():
    info = describe('vig_tiny_patch16_224', (1024, 1024))
    assert (info['macs'] - info['scan_macs']) / 1e9 == pytest.approx(23.2, abs=0.1)
    assert info['scan_macs'] / 1e9 == pytest.approx(1.8, abs=0.05)


def test_info(capsys):
    assert cli_info(['vig_hier_tiny_224']) == 0
    out = capsys.readouterr().out
    for word in ('28.60 M', 'scan', 'hustvl/ViG', 'vig_h_t_82p8acc.pth', 'apache-2.0', '82.8', 'linear', 'bicubic'):
        assert word in out, word
    assert cli_info(['test_vig', '--json', '--img-size', '64', '96']) == 0
    info = json.loads(capsys.readouterr().out)
    assert info['input_size'] == [3, 64, 96] and info['weights'] is None and info['token_mixers']
    assert cli_info(['deit_tiny_patch16_224']) == 0
    assert 'fb_in1k' in capsys.readouterr().out
    with pytest.raises(ZooError, match='Did you mean'):
        cli_info(['vig_tiny_patch16'])


def test_configs(capsys):
    assert 'quickstart' in config_files()
    assert cli_configs([]) == 0
    out = capsys.readouterr().out
    for name, path in config_files().items():
        assert name in out
        assert path.read_text().startswith('#'), f'{path} opens with what it reproduces'
    assert cli_configs(['configs/quickstart.yaml']) == 0
    assert capsys.readouterr().out == config_files()['quickstart'].read_text()
    with pytest.raises(ZooError, match='quickstart'):
        cli_configs(['no-such'])


def doctor(*argv):
    """In a process of its own, without Triton's interpreter, which the tests switch on."""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    code = f'from zoo.tools.doctor import cli_doctor; cli_doctor({list(argv)!r})'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout


def test_doctor():
    out = doctor()
    for word in (torch.__version__, timm.__version__, 'triton', 'cuda', 'driver', 'gpu', 'python', 'os'):
        assert word in out, word
    report = json.loads(doctor('--json'))
    assert 'gla' in op_families() and set(report['kernels']) == set(op_families())
    for paths in report['kernels'].values():
        assert paths['cpu'].startswith('torch') and 'BROKEN' not in str(paths)


@pytest.mark.parametrize('verb', ['list', 'info', 'configs', 'doctor', 'export', 'bench', 'probe'])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, '--help'])
    assert stop.value.code == 0
    assert f'usage: zoo {verb}' in capsys.readouterr().out


def test_a_mistake_takes_one_screen_and_exit_code_2():
    code = 'import sys; from zoo.cli import main; sys.exit(main(["info", "vig_tinny"]))'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 2
    assert 'Traceback' not in run.stderr and len(run.stderr.splitlines()) < 5 and 'zoo list' in run.stderr


CLASSES = 4


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pictures of one colour per class, in class folders under val/."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.RandomState(0)
    for c in range(CLASSES):
        for i in range(3):
            path = root / 'val' / f'class{c}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(40 + 55 * c, 5, (70, 90, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """test_vig with a head that answers class 2, then 1, then 0, then 3, whatever it sees."""
    model = timm.create_model('test_vig', num_classes=CLASSES)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 0.0]))
    path = tmp_path_factory.mktemp('weights') / 'w.pth'
    torch.save({'model': model.state_dict()}, path)
    return path


def validate(folder, checkpoint, *more):
    argv = ['test_vig', '--data', str(folder), '--checkpoint', str(checkpoint), '--device', 'cpu', '--workers', '0']
    return cli_validate([*argv, *more])


def test_validate(folder, checkpoint, tmp_path, capsys):
    assert validate(folder, checkpoint, '--json', '--output', str(tmp_path / 'r' / 'result.json')) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / 'r' / 'result.json').read_text())
    assert (result['images'], result['top1'], result['top5']) == (3 * CLASSES, 25.0, 100.0)
    cfg = timm.models.get_pretrained_cfg('test_vig')
    assert result['transform']['input_size'] == list(cfg.input_size)
    assert result['transform']['crop_pct'] == cfg.crop_pct and result['transform']['mean'] == list(cfg.mean)
    assert validate(folder / 'val', checkpoint, '--img-size', '64', '--limit', '8', '--amp', '--workers', '1') == 0
    out = capsys.readouterr().out
    assert '8 images' in out and '64x64' in out and '25.00 %' in out


def test_validate_by_name_prints_the_published_top1(tmp_path, capsys):
    """From the name alone: the label order is that of the sorted folders, the published number stands beside."""
    rng = np.random.RandomState(0)
    for c in range(1000):
        path = tmp_path / 'data' / f'n{c:08d}' / 'x.png'
        path.parent.mkdir(parents=True)
        if c % 250 == 0:
            Image.fromarray(rng.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        else:
            Image.new('RGB', (8, 8)).save(path)
    model = timm.create_model('vig_tiny_patch16_224')
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_((torch.arange(1000) == 500).float())
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    argv = ['vig_tiny_patch16_224', '--data', str(tmp_path / 'data'), '--checkpoint', str(tmp_path / 'w.pth')]
    assert cli_validate([*argv, '--limit', '4', '--img-size', '64', '--workers', '0', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert 'measured  25.00 %' in out and 'published 77.2 %' in out


def test_validate_mistakes(folder, checkpoint, tmp_path):
    with pytest.raises(ZooError, match='no such folder'):
        validate(tmp_path / 'absent', checkpoint)
    (tmp_path / 'two' / 'a').mkdir(parents=True)
    (tmp_path / 'two' / 'b').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'two' / 'a' / 'x.png')
    with pytest.raises(ZooError, match='b'):
        validate(tmp_path / 'two', checkpoint)
    Image.new('RGB', (8, 8)).save(tmp_path / 'two' / 'b' / 'x.png')
    with pytest.raises(ZooError, match='2 class folders.*4 classes'):
        validate(tmp_path / 'two', checkpoint)
    with pytest.raises(ZooError, match='--limit'):
        validate(folder, checkpoint, '--limit', '0')
    with pytest.raises(ZooError, match='unknown model'):
        cli_validate(['nope', '--data', str(folder)])


@pytest.mark.parametrize('workers', ['0', '1'])
def test_validate_names_a_broken_image(folder, checkpoint, tmp_path, workers):
    import shutil

    shutil.copytree(folder, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / 'class1' / '1.png').write_bytes(b'not a picture')
    with pytest.raises(ZooError, match=r'^cannot read image .*class1.1\.png'):
        validate(tmp_path / 'data', checkpoint, '--workers', workers)
