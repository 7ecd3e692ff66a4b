"""Interrupted runs: what comes out after a resume equals, bit by bit, what an uninterrupted run gives."""

import csv
import io
import os
import resource
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.checkpoints import AtomicCheckpointIO, damage, newest_whole, read_checkpoint
from zoo.cli import main
from zoo.errors import RunError, ZooError

ROOT = Path(zoo.__file__).parents[1]

# every source of randomness that a recipe can switch on, and workers that read ahead
COMMON = [
    '--seed_everything=3',
    '--model=zoo.tasks.Classify',
    '--model.net=test_vit',
    '--model.num_classes=10',
    '--model.net_kwargs={img_size: 16, patch_size: 4, drop_path_rate: 0.2, drop_rate: 0.1}',
    '--model.optim.lr_per=null',
    '--model.schedule.warmup_epochs=1',
    '--model.mix.mixup=0.8',
    '--model.mix.cutmix=1.0',
    '--model.ema={decay: 0.9, warmup: true}',
    '--data.batch_size=16',
    '--data.num_workers=2',
    '--data.view.size=16',
    '--data.augment.re_prob=0.5',
    '--data.augment.rotate=10',
    '--trainer.max_epochs=3',
    '--trainer.limit_train_batches=7',
    '--trainer.limit_val_batches=1',
    '--trainer.accelerator=cpu',
    '--trainer.gradient_clip_val=1',
    '--trainer.log_every_n_steps=1',
    '--run.save_every_n_steps=2',
    '--run.test_after_fit=false',
    '--run.threads=1',
]


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """Five shards of thirty small images."""
    folder, rng = tmp_path_factory.mktemp('shards'), np.random.default_rng(0)
    for number in range(5):
        with tarfile.open(folder / f'part-{number}.tar', 'w') as tar:
            for key in range(30):
                image, label = io.BytesIO(), int(rng.integers(10))
                Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(image, 'PNG')
                unreadable = key == 7
                for ending, data in (('png', image.getvalue()[: 40 if unreadable else None]), ('cls', b'%d' % label)):
                    member = tarfile.TarInfo(f'{number}-{key:03d}.{ending}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def data_arguments(kind, shards):
    if kind == 'digits':
        return ['--data=zoo.data.Digits']
    pattern = f'{shards}/part-{{0..4}}.tar'
    streams = [f'--data.train={pattern}', f'--data.val={pattern}', '--data.num_classes=10', '--data.train_samples=150']
    return ['--data=zoo.data.TarShards', *streams, '--data.shuffle_buffer=20']


def arguments(kind, shards, name, root):
    return ['fit', *data_arguments(kind, shards), *COMMON, f'--run.name={name}', f'--run.root={root}']


def interrupted(args, signal_name, step):
    """Runs the command in a process that, before the given optimizer step, sends a signal to itself and its workers."""
    program = f"""
        import os, subprocess, sys
        sys.path.insert(0, {str(ROOT)!r})
        from zoo.cli import main
        from zoo.tasks import Classify
        start = Classify.on_train_batch_start
        def signalled(self, batch, batch_idx):
            if self.global_step == {step}:
                # from another process, as a scheduler does it
                subprocess.run(['kill', '-{signal_name.removeprefix('SIG')}', '--', f'-{{os.getpgrp()}}'])
            start(self, batch, batch_idx)
        Classify.on_train_batch_start = signalled
        sys.exit(main({args!r}))
    """
    code = textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300, start_new_session=True
    )


def assert_same(a, b, path=''):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f'{path} differs by {(a - b).abs().max()}'
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{path}/{i}')
    else:
        assert a == b, f'{path}: {a} and {b}'


def final_state(root, name):
    checkpoint = read_checkpoint(root / name / 'checkpoints' / 'last.ckpt')
    return {k: checkpoint[k] for k in ('global_step', 'state_dict', 'optimizer_states')}


@pytest.fixture(scope='module')
def whole(shards, tmp_path_factory):
    """Final states of uninterrupted runs."""
    root = tmp_path_factory.mktemp('whole')
    states = {}
    for kind in ('digits', 'shards'):
        assert main(arguments(kind, shards, kind, root)) == 0
        states[kind] = final_state(root, kind)
        assert states[kind]['global_step'] == 21
        assert any(k.startswith('ema.') for k in states[kind]['state_dict'])
    return states


@pytest.mark.parametrize(
    ('kind', 'step', 'more'),
    [
        ('digits', 11, []),
        ('shards', 10, []),
        ('digits', 10, ['--trainer.max_epochs=-1', '--trainer.max_steps=21']),
        ('digits', 7, ['--trainer.max_epochs=-1', '--trainer.max_steps=21']),
    ],
    ids=['digits', 'shards', 'max_steps', 'max_steps-epoch-end'],
)
def test_kill_9(kind, step, more, shards, whole, tmp_path):
    args = [*arguments(kind, shards, 'run', tmp_path), *more]
    killed = interrupted(args, 'SIGKILL', step)
    assert killed.returncode == -9, killed.stderr
    saved = read_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.ckpt')
    assert 7 <= saved['global_step'] <= step
    assert saved['global_step'] % 7 or step == 7, 'not in mid-epoch'
    assert main([*args, '--ckpt_path=last']) == 0
    assert_same(final_state(tmp_path, 'run'), whole[kind])
    with open(tmp_path / 'run' / 'metrics.csv', newline='') as file:
        steps = [int(row['step']) for row in csv.DictReader(file) if row['train/loss_step']]
    assert steps == list(range(21)), 'metrics.csv does not hold every step once'


@pytest.mark.parametrize('step', [9, 13], ids=['mid-epoch', 'last-batch'])
def test_sigterm_saves_and_exits_143(step, shards, whole, tmp_path):
    args = [a for a in arguments('digits', shards, 'run', tmp_path) if 'save_every' not in a]
    stopped = interrupted(args, 'SIGTERM', step)
    assert stopped.returncode == 143, stopped.stderr
    last = tmp_path / 'run' / 'checkpoints' / 'last.ckpt'
    assert f'--ckpt_path {last}' in stopped.stdout
    assert read_checkpoint(last)['global_step'] == step + 1, 'the batch was not finished before saving'
    # the printed command: the config that was saved with the run is all it needs
    assert main(['fit', f'--ckpt_path={last}']) == 0
    assert_same(final_state(tmp_path, 'run'), whole['digits'])


@pytest.fixture
def short(shards, tmp_path):
    """A finished run of one epoch with all its checkpoints, and the arguments that go on with it."""
    args = [*arguments('digits', shards, 'run', tmp_path), '--data.num_workers=0', '--trainer.max_epochs=1']
    assert main(args) == 0
    folder = tmp_path / 'run' / 'checkpoints'
    assert {p.name for p in folder.glob('*.ckpt')} == {'last.ckpt', 'previous.ckpt', 'best.ckpt'}
    return folder, [*args, '--trainer.max_epochs=2']


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def test_truncated_checkpoint_is_named(short, capsys):
    folder, args = short
    truncate(folder / 'last.ckpt')
    assert main([*args, f'--ckpt_path={folder / "last.ckpt"}']) == 2
    error = capsys.readouterr().err
    assert 'last.ckpt is cut off or damaged' in error and 'best.ckpt' in error
    assert 'Traceback' not in error


def test_last_falls_back_to_newest_whole(short, capsys):
    folder, args = short
    truncate(folder / 'last.ckpt')
    truncate(folder / 'best.ckpt')
    assert newest_whole(folder)[0].name == 'previous.ckpt'
    assert main([*args, '--ckpt_path=last']) == 0
    assert read_checkpoint(folder / 'last.ckpt')['global_step'] == 14


def test_every_checkpoint_damaged(short, capsys):
    folder, args = short
    for path in folder.glob('*.ckpt'):
        truncate(path)
    assert main([*args, '--ckpt_path=last']) == 2
    assert 'every checkpoint' in capsys.readouterr().err


def test_last_without_a_run_starts_from_scratch(shards, tmp_path, capsys):
    args = [*arguments('digits', shards, 'new', tmp_path), '--data.num_workers=0', '--trainer.max_epochs=1']
    assert main([*args, '--ckpt_path=last']) == 0
    assert 'starting from scratch' in capsys.readouterr().out
    assert (tmp_path / 'new' / 'checkpoints' / 'last.ckpt').is_file()


def test_command_line_beats_checkpoint(short):
    folder, args = short
    before = read_checkpoint(folder / 'last.ckpt')['optimizer_states'][0]['param_groups']
    assert max(g['weight_decay'] for g in before) == 0.05
    changed = ['--model.optim.weight_decay=0.3', '--model.schedule.min_lr=1e-4', '--model.optim.betas=[0.8, 0.9]']
    assert main([*args, *changed, '--ckpt_path=last']) == 0
    after = read_checkpoint(folder / 'last.ckpt')
    groups = after['optimizer_states'][0]['param_groups']
    assert max(g['weight_decay'] for g in groups) == 0.3
    assert tuple(groups[0]['betas']) == (0.8, 0.9)
    assert groups[0]['lr'] == pytest.approx(1e-4)
    assert after['hyper_parameters']['optim']['weight_decay'] == 0.3


def test_checkpoint_does_not_choose_the_network(short, capsys):
    folder, args = short
    other = ['--model.net=test_vit2', f'--ckpt_path={folder / "last.ckpt"}']
    assert main([*args, *other]) == 2
    assert 'the checkpoint holds model.net test_vit, the config asks for test_vit2' in capsys.readouterr().err


def test_ema_can_be_switched(short):
    folder, args = short
    assert main([*args, '--model.ema=null', '--ckpt_path=last']) == 0
    assert not any(k.startswith('ema.') for k in read_checkpoint(folder / 'last.ckpt')['state_dict'])
    assert main([*args, '--trainer.max_epochs=3', '--ckpt_path=last']) == 0
    assert any(k.startswith('ema.') for k in read_checkpoint(folder / 'last.ckpt')['state_dict'])


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    target = tmp_path / 'last.ckpt'
    io_plugin = AtomicCheckpointIO()
    io_plugin.save_checkpoint({'weights': torch.ones(1000)}, target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, hard)
    )  # the kernel refuses to write further, as a full disk does
    try:
        with pytest.raises(RunError, match='former last.ckpt is untouched'):
            io_plugin.save_checkpoint({'weights': torch.zeros(1_000_000)}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert damage(target) is None
    assert torch.equal(read_checkpoint(target)['weights'], torch.ones(1000))
    assert [p.name for p in tmp_path.iterdir()] == ['last.ckpt'], 'temporary files are left'


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / '.last.ckpt.tmp-1').write_bytes(b'half')
    AtomicCheckpointIO().save_checkpoint({'weights': torch.ones(3)}, tmp_path / 'last.ckpt')
    assert [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


def test_flipped_bit_is_found(tmp_path):
    target = tmp_path / 'last.ckpt'
    AtomicCheckpointIO().save_checkpoint({'weights': torch.ones(100_000)}, target)
    assert damage(target) is None
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    assert 'checksum' in damage(target)


def test_pickles_are_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)

    torch.save({'state_dict': Evil()}, tmp_path / 'evil.ckpt')
    with pytest.raises(ZooError, match='cannot be loaded safely|can be loaded safely'):
        read_checkpoint(tmp_path / 'evil.ckpt')
    assert not (tmp_path / 'ran').exists()
