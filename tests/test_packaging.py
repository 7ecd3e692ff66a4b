"""What is installed: one top-level name, every folder, and a package that works away from the checkout."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip('tomli', reason='reading pyproject.toml needs Python 3.11 or tomli')

ROOT = Path(__file__).resolve().parent.parent
HOUSES = ('zoo', 'backbones', 'heads', 'kernels', 'configs')


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def setuptools_table():
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']


def folders_with(suffix):
    """Packages that own at least one file of this suffix, as they are named once installed."""
    found = set()
    for house in HOUSES:
        for path in (ROOT / house).rglob(f'*{suffix}'):
            parts = path.parent.relative_to(ROOT).parts
            found.add('.'.join(parts if parts[0] == 'zoo' else ('zoo', *parts)))
    return found


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that no build folder appears in the checkout."""
    source = tmp_path_factory.mktemp('source')
    files = run('git', '-C', str(ROOT), 'ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp('wheel')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(out), str(source))
    (built,) = out.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def target(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp('target')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', str(folder), str(wheel))
    return folder


def away(code, target, folder):
    """Run code where only the installed copy can be found: the checkout and editable installs are hidden."""
    prelude = f"""
        import sys
        sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]
        sys.path = [p for p in sys.path if p not in ('', {str(ROOT)!r})]
    """
    env = dict(os.environ, PYTHONPATH=str(target))
    return run(sys.executable, '-c', textwrap.dedent(prelude) + textwrap.dedent(code), env=env, cwd=folder)


def test_zoo_is_the_only_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0] for n in names if '.dist-info/' not in n} == {'zoo'}
    assert 'zoo/kernels/gla.py' in names and 'zoo/backbones/vig.py' in names
    assert any(n.startswith('zoo/configs/') and n.endswith('.yaml') for n in names)


def test_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for house in HOUSES:
        for suffix in ('.py', '.yaml'):
            for path in (ROOT / house).rglob(f'*{suffix}'):
                parts = path.relative_to(ROOT).parts
                assert '/'.join(parts if house == 'zoo' else ('zoo', *parts)) in names


def test_packages_cover_every_folder():
    table = setuptools_table()
    packages, data = set(table['packages']), table['package-data']
    assert folders_with('.py') <= packages
    assert folders_with('.yaml') <= packages
    for package in folders_with('.yaml'):
        assert '*.yaml' in data.get(package, []), f'package-data lacks {package}'


def test_flat_folders_have_no_init():
    """A top-level package `kernels` would hide Hugging Face's package of that name and break transformers."""
    for house in HOUSES[1:]:
        assert not list((ROOT / house).rglob('__init__.py'))


def test_installed_copy_works(target, tmp_path):
    out = away(
        """
        import torch
        import zoo, zoo.kernels.gla, zoo.backbones.vig
        from zoo.tools.models import config_files
        print(zoo.__file__, zoo.kernels.gla.__file__, sep='\\n')
        model = zoo.create_model('test_vig', num_classes=3).eval()
        print(tuple(model(torch.zeros(1, 3, 64, 64)).shape), 'quickstart' in config_files())
        """,
        target,
        tmp_path,
    ).splitlines()
    assert Path(out[0]) == target / 'zoo' / '__init__.py'
    assert Path(out[1]) == target / 'zoo' / 'kernels' / 'gla.py'
    assert out[2] == '(1, 3) True'


def test_installed_command_works(target, tmp_path):
    out = away(
        """
        from zoo.cli import main
        for argv in (['list'], ['configs'], ['info', 'vig_tiny_patch16_224'], ['doctor']):
            assert main(argv) == 0
        """,
        target,
        tmp_path,
    )
    assert 'vig_hier_base_224' in out and 'quickstart' in out and 'hustvl/ViG' in out and 'kernel path' in out


def test_one_spelling_registers_ops_once(tmp_path):
    """`import kernels` from the checkout's root must not be how anything of ours is imported."""
    pattern = ('import kernels', 'from kernels', 'import backbones', 'from backbones', 'import heads', 'from heads')
    for house in HOUSES:
        for path in (ROOT / house).rglob('*.py'):
            lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
            assert not [line for line in lines if line.startswith(pattern)], path


def test_transformers_still_imports_beside_a_checkout():
    code = 'import zoo, transformers; from transformers import AutoModel; print("fine")'
    assert 'fine' in run(sys.executable, '-c', code, cwd=ROOT)
