"""fit, validate, test and predict through the command line, and the parts of the classification task."""

import csv
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import zoo
from zoo.checkpoints import load_net, read_checkpoint
from zoo.cli import main
from zoo.data import Digits, View
from zoo.runs import fresh_run, newest_run, one_device, resolve_config, spell_null
from zoo.tasks import Classify, Distill, Optim, Schedule
from zoo.tasks.classify import Ema, Mix, build_ema, build_loss
from zoo.tasks.distill import Teacher
from zoo.tasks.nonfinite import first_nonfinite
from zoo.tasks.optim import UpdateSchedule, build_optimizer

MODEL = ['--model=zoo.tasks.Classify', '--model.net=test_vit', '--model.net_kwargs={img_size: 16, patch_size: 4}']
DATA = ['--data=zoo.data.Digits', '--data.view.size=16', '--data.batch_size=32', '--data.num_workers=0']
TRAINER = ['--trainer.max_epochs=1', '--trainer.limit_train_batches=4', '--trainer.accelerator=cpu']
TINY = ['fit', *MODEL, '--model.num_classes=10', *DATA, *TRAINER, '--run.threads=1', '--trainer.log_every_n_steps=1']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# a whole run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run: its folder and what it printed."""
    root, lines = tmp_path_factory.mktemp('runs'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('zoo.runs.say', lines.append)
        assert main([*TINY, '--model.ema={decay: 0.5}', f'--run.root={root}', '--run.name=tiny']) == 0
    return root / 'tiny', '\n'.join(lines).splitlines()


def test_fit_leaves_everything_behind(run):
    folder, _ = run
    files = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
    expected = {'config.yaml', 'metrics.csv', 'checkpoints/best.ckpt', 'checkpoints/last.ckpt'}
    expected |= {f'report/{name}' for name in ('curves.png', 'confusion.png', 'mistakes.png', 'per_class.csv')}
    assert expected <= files
    assert any(f.startswith('tensorboard/events') for f in files)
    for path in folder.glob('report/*.png'):
        assert len(Image.open(path).convert('L').getcolors(1 << 16)) > 10, f'{path.name} is blank'
    with open(folder / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [r['step'] for r in rows if r['train/loss_step']] == ['0', '1', '2', '3']
    assert {'val/top1', 'val/top5', 'val/loss', 'val/raw_top1', 'test/top1', 'lr'} <= set(rows[0])
    assert all(float(r['train/images_per_s']) > 0 for r in rows if r['train/loss_epoch'])
    with open(folder / 'report' / 'per_class.csv', newline='') as file:
        assert sum(int(r['images']) for r in csv.DictReader(file)) == 360


def test_last_lines_say_result_places_and_next_command(run):
    folder, lines = run
    result, places, report, predict = lines[-4:]
    score = float(result.removeprefix('test accuracy: ').removesuffix(' %'))
    assert result == f'test accuracy: {score:.2f} %'
    assert str(folder) in places and 'best.ckpt' in places and 'curves.png' in report
    assert f'predict --ckpt_path {folder}/checkpoints/best.ckpt --images {folder}/samples' in predict
    with open(folder / 'metrics.csv', newline='') as file:
        measured = [r['test/top1'] for r in csv.DictReader(file) if r['test/top1']]
    assert score == pytest.approx(100 * float(measured[0]), abs=0.01)


def test_printed_predict_command(run, here):
    folder, lines = run
    arguments = lines[-1].split(' predict ')[1].split()
    (here / 'bad.jpg').write_bytes(b'no')
    # a run of many processes: shares of the images would overwrite one another's tables
    two = ['--trainer.devices=2', '--trainer.strategy=ddp']
    assert main(['predict', *arguments, 'bad.jpg', '--output=out', *two]) == 0
    with open('out/predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and rows[-1]['error'] and not rows[-1]['prediction_1']
    net, about = load_net(folder / 'checkpoints' / 'best.ckpt')
    image = Image.open(rows[0]['file']).convert('RGB')
    from zoo.data.transforms import eval_transform

    probability = net(eval_transform(View(**about['view']))(image)[None]).softmax(-1)[0]
    assert rows[0]['prediction_1'] == about['class_names'][probability.argmax()]
    assert float(rows[0]['confidence_1']) == pytest.approx(probability.max().item(), abs=1e-3)
    assert Image.open('out/contact_sheet.png').width > 500


@pytest.mark.parametrize('given, used', [('auto', 1), (8, 1), (-1, 1), ('3', 1), ([2, 3], [2]), ('2,3', [2])])
def test_predict_takes_one_device(given, used):
    assert one_device(given) == used


def test_test_and_validate_a_checkpoint(run, here, capsys):
    folder, lines = run
    best = folder / 'checkpoints' / 'best.ckpt'
    assert main(['test', f'--ckpt_path={best}', '--output=out']) == 0
    assert lines[-4] in capsys.readouterr().out
    assert (here / 'out' / 'confusion.png').is_file()
    assert main(['validate', f'--ckpt_path={best}']) == 0
    assert 'validation accuracy: ' in capsys.readouterr().out


def test_a_checkpoint_alone_is_enough(run, here):
    folder, _ = run
    lone = here / 'lone.ckpt'
    lone.write_bytes((folder / 'checkpoints' / 'best.ckpt').read_bytes())
    assert main(['predict', f'--ckpt_path={lone}', f'--images={folder}/samples']) == 0
    assert (here / 'predictions' / 'predictions.csv').is_file()
    task = Classify.load_from_checkpoint(lone, weights_only=True)
    assert task.net.num_classes == 10 and task.ema is not None
    state = read_checkpoint(lone)['state_dict']
    averaged, _ = load_net(lone)
    raw, _ = load_net(lone, ema=False)
    assert torch.equal(averaged.head.weight, state['ema.module.head.weight'])
    assert torch.equal(raw.head.weight, state['net.head.weight'])
    assert not torch.equal(raw.head.weight, averaged.head.weight)


def test_saved_config_starts_the_same_run(run, here):
    folder, _ = run
    saved = yaml.safe_load((folder / 'config.yaml').read_text())
    assert saved['model']['init_args']['schedule']['name'] == 'cosine', 'defaults are written out'
    assert main(['fit', f'--config={folder}/config.yaml', '--run.root=again']) == 0
    again = read_checkpoint(here / 'again' / 'tiny' / 'checkpoints' / 'last.ckpt')['state_dict']
    for key, value in read_checkpoint(folder / 'checkpoints' / 'last.ckpt')['state_dict'].items():
        assert torch.equal(value, again[key]), key


# configs and arguments


def test_packaged_configs_by_name():
    for name in ('quickstart', 'configs/quickstart.yaml', 'quickstart.yaml'):
        assert resolve_config(name).name == 'quickstart.yaml'
    for name in ('vig_tiny_patch16_224', 'classify/vig_tiny_patch16_224', 'configs/classify/vig_tiny_patch16_224.yaml'):
        assert resolve_config(name).parts[-2:] == ('classify', 'vig_tiny_patch16_224.yaml')


def test_print_config(capsys):
    assert main(['fit', '--config=quickstart', '--model.optim.lr=0.125', '--print_config']) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed['model']['init_args']['optim']['lr'] == 0.125
    assert printed['model']['init_args']['smoothing'] == 0.1


def test_null_reaches_nested_settings(capsys):
    assert spell_null(['--model.optim.eps', 'null', '--x=1']) == ['--model.optim={"eps": null}', '--x=1']
    assert spell_null(['--model.init_args.ema=null']) == ['--model.init_args.ema=null']
    wanted = ['--model.optim.lr_per=null', '--data.augment.auto_augment=null', '--model.ema=null']
    assert main(['fit', '--config=vig_tiny_patch16_224', *wanted, '--print_config']) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed['model']['init_args']['optim']['lr_per'] is None
    assert printed['model']['init_args']['optim']['weight_decay'] == 0.05, (
        'its neighbours keep the values of the config'
    )
    assert printed['data']['init_args']['augment']['auto_augment'] is None
    assert printed['model']['init_args']['ema'] is None


MISTAKES = {
    'command': (['fitt'], 'did you mean fit'),
    'nothing to run': (['fit'], '--config quickstart'),
    'config': (['fit', '--config', 'quikstart'], 'close: quickstart'),
    'option': (['fit', '--config=quickstart', '--model.optim.lrr=1'], 'optim.lrr'),
    'type': (['fit', '--config=quickstart', '--model.optim.lr=fast'], "Expected a <class 'float'>. Got value: fast"),
    'choice': (['fit', '--config=quickstart', '--model.schedule.name=cosin'], 'cosin'),
    'trainer option': (['fit', '--config=quickstart', '--trainer.max_epohcs=3'], 'max_epohcs'),
    'model': (['fit', '--config=quickstart', '--model.net=test_vigg'], "'test_vigg'; close: test_vig"),
    'model argument': (['fit', '--config=quickstart', '--model.net_kwargs={dpeth: 3}'], 'dpeth'),
    'optimizer': ([*TINY, '--model.optim.name=adamww'], "no optimizer 'adamww'"),
    'classes': ([*TINY, '--model.num_classes=7'], 'the data has 10 classes, the model 7: set --model.num_classes 10'),
    'path': (['fit', '--config=vig_tiny_patch16_224', '--data.path=/nowhere', '--trainer.devices=1',
              '--trainer.accelerator=cpu'], 'no such folder: /nowhere'),
    'no data': (['fit', *MODEL], 'no data'),
    'odd batch': ([*TINY, '--model.mix.mixup=0.5', '--data.batch_size=31'], 'even data.batch_size, not 31'),
    'checkpoint': ([*TINY, '--ckpt_path=gone.ckpt'], 'no such checkpoint: gone.ckpt'),
    'no run': (['test', '--config=quickstart', '--ckpt_path=best'], 'no run of quickstart'),
    'images': (['predict', '--config=quickstart'], '--images FILE_OR_FOLDER'),
    'one class': ([*TINY, '--model.num_classes=1'], 'num_classes must be at least 2, not 1'),
    'half average': ([*TINY, '--model.ema={decay: 0.9}', '--trainer.precision=bf16-true'], 'precision bf16-mixed'),
    'teacher': ([*TINY, '--model.distill.teacher=test_vitt'], 'test_vitt'),
}  # fmt: skip


@pytest.mark.parametrize('arguments, message', MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_one_screen(arguments, message, here, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert 'Traceback' not in error and len(error.splitlines()) < 15
    assert not list(here.rglob('*.ckpt')), 'training started'


def test_runs_never_share_a_folder(here):
    for name in ('a', 'a-2'):
        assert fresh_run('runs', 'a').name == name
        (here / 'runs' / name / 'checkpoints').mkdir(parents=True)
    assert newest_run('runs', 'a') is None
    (here / 'runs' / 'a-2' / 'checkpoints' / 'last.ckpt').touch()
    assert newest_run('runs', 'a').name == 'a-2'


def test_overview_is_one_screen_and_cheap():
    code = (
        'import sys, zoo.cli; zoo.cli.main(["--help"]); '
        'print([m for m in ("lightning", "transformers", "datasets", "webdataset") if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=zoo.__path__[-1])
    assert done.stdout.splitlines()[-1] == '[]', done.stdout + done.stderr
    assert len(done.stdout.splitlines()) < 30 and 'predict' in done.stdout


def test_error_in_a_worker_is_short(here, capsys):
    """A worker wraps what it raises in its traceback; the user sees the message alone."""
    import io
    import tarfile

    with tarfile.open('x.tar', 'w') as tar:
        for name, data in (('0.jpg', b'x'), ('0.pkl', b'x')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    streams = ['--data=zoo.data.TarShards', '--data.train=x.tar', '--data.val=x.tar', '--data.num_classes=10']
    streams += ['--data.train_samples=64', '--data.batch_size=2', '--data.num_workers=1']
    assert main(['fit', *MODEL, '--model.num_classes=10', *streams, *TRAINER]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: refused 0.pkl in x.tar') and 'Traceback' not in error


def test_strict_stops_the_run(here, capsys):
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (here / 'd' / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new('RGB', (20, 20)).save(here / 'd' / split / name / f'{number}.png')
    (here / 'd' / 'train' / 'a' / '1.png').write_bytes(b'x')
    data = ['--data=zoo.data.ImageFolder', '--data.path=d', '--data.view.size=16', '--data.batch_size=4']
    arguments = ['fit', *MODEL, '--model.num_classes=2', *data, '--data.num_workers=0', *TRAINER]
    with pytest.warns(RuntimeWarning, match='d/train/a/1.png'):
        assert main(arguments) == 0
    assert main([*arguments, '--data.strict=true']) == 2
    assert 'd/train/a/1.png' in capsys.readouterr().err


# a loss that is not finite


@pytest.mark.parametrize('poison', ['output', 'parameter'])
def test_nan_stops_with_step_batch_and_module(poison, here, capsys, monkeypatch):
    start = Classify.on_train_batch_start

    def poisoned(self, batch, batch_idx):
        start(self, batch, batch_idx)
        if self.global_step == 2:
            if poison == 'output':
                self.net.blocks[3].mlp.fc1.register_forward_hook(lambda m, i, o: o * float('inf'))
            else:
                nn.init.constant_(self.net.blocks[3].mlp.fc1.bias, float('nan'))

    monkeypatch.setattr(Classify, 'on_train_batch_start', poisoned)
    assert main(TINY) == 1
    error = capsys.readouterr().err
    assert 'not finite at step 2 (epoch 0, batch 2)' in error and 'Traceback' not in error
    named = 'module blocks.3.mlp.fc1 (Linear)' if poison == 'output' else 'parameter blocks.3.mlp.fc1.bias'
    assert named in error
    assert 'batch: digit-' in error


def test_first_nonfinite_names_input_and_loss():
    net = nn.Linear(2, 2)
    assert 'input' in first_nonfinite(net, lambda: None, torch.full((1, 2), float('nan')))
    x = torch.ones(1, 2)
    assert 'loss function' in first_nonfinite(net, lambda: net(x), x)


# the parts of the task


def schedule_of(total, steps_per_epoch, factor=1.0, lr=1.0, **kwargs):
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr * factor)
    schedule = UpdateSchedule(optimizer, Schedule(**kwargs), factor, total, steps_per_epoch)
    rates = []
    for step in range(total + 1):
        schedule.apply(step)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def test_cosine_with_warmup():
    rates = schedule_of(100, 10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    assert rates[0] == pytest.approx(0.1) and rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx((1 + 0.01) / 2), 'the cosine spans what the warm-up leaves'
    assert rates[100] == pytest.approx(0.01)
    assert max(rates) == rates[20] and rates[20:] == sorted(rates[20:], reverse=True)
    hidden = schedule_of(100, 10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, warmup_prefix=False)
    assert hidden[50] == pytest.approx((1 + 0.01) / 2)


def test_milestones_after_a_warmup_in_steps():
    rates = schedule_of(
        40, 10, name='multistep', milestones=(2, 3), warmup_steps=5, warmup_lr=0.0, warmup_prefix=False, decay_rate=0.1
    )
    assert rates[:7] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert rates[19] == 1 and rates[20] == rates[29] == pytest.approx(0.1) and rates[30] == pytest.approx(0.01)


@pytest.mark.parametrize('name', ['cosine', 'step', 'poly', 'wsd', 'constant'])
def test_schedules_scale_with_the_batch(name):
    once = schedule_of(50, 5, 1.0, name=name, warmup_epochs=1, warmup_lr=0.1, min_lr=0.01, decay_epochs=2)
    twice = schedule_of(50, 5, 2.0, name=name, warmup_epochs=1, warmup_lr=0.1, min_lr=0.01, decay_epochs=2)
    assert twice == pytest.approx([2 * rate for rate in once])


def test_optimizer_groups():
    net = timm.create_model('test_vit', num_classes=10)
    optimizer = build_optimizer(net, Optim(lr=1e-3, lr_per=512, weight_decay=0.1, betas=(0.8, 0.9)), 1024)
    by_parameter = {id(p): g for g in optimizer.param_groups for p in g['params']}
    groups = {name: by_parameter[id(p)] for name, p in net.named_parameters()}
    assert groups['head.weight']['weight_decay'] == 0.1
    assert groups['head.bias']['weight_decay'] == groups['norm.weight']['weight_decay'] == 0
    for name in net.no_weight_decay() & set(groups):
        assert groups[name]['weight_decay'] == 0
    assert {g['lr'] for g in optimizer.param_groups} == {2e-3} and groups['head.bias']['betas'] == (0.8, 0.9)
    decayed = build_optimizer(net, Optim(layer_decay=0.5), 512)
    scales = {g['lr_scale'] for g in decayed.param_groups}
    assert max(scales) == 1 and len(scales) > 3


@pytest.mark.parametrize('loss', ['ce', 'bce'])
@pytest.mark.parametrize('mix', [Mix(), Mix(mixup=0.8, cutmix=1.0)])
def test_losses(loss, mix):
    criterion, mixup = build_loss(loss, 0.1, mix, 10)
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    if mixup:
        images, target = mixup(images, target)
        assert target.shape == (4, 10) and target.sum(-1) == pytest.approx(torch.ones(4))
    right = torch.zeros(4, 10)
    right[range(4), torch.arange(4)] = 5
    assert torch.isfinite(criterion(right, target))
    assert mixup or criterion(right, target) < criterion(-right, target)


def test_ema_warmup_and_value():
    net = nn.Linear(1, 1, bias=False)
    plain, warm = build_ema(net, Ema(decay=0.9)), build_ema(net, Ema(decay=0.9999, warmup=True))
    assert warm.get_decay(2) < warm.get_decay(10) < warm.get_decay(1000) < 0.9999
    assert plain.get_decay(10) == 0.9
    with torch.no_grad():
        before = plain.module.weight.clone()
        net.weight.add_(1.0)
    plain.update(net, step=10)
    assert plain.module.weight == pytest.approx((0.9 * before + 0.1 * net.weight).detach())
    assert not any(p.requires_grad for p in plain.parameters())


def test_distillation_losses():
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
    kwargs = {'img_size': 16, 'patch_size': 4}
    soft = Teacher(Distill('test_vit', kwargs, pretrained=False, temperature=2.0), 10, mean, std)
    hard = Teacher(Distill('test_vit', kwargs, pretrained=False, mode='hard'), 10, mean, std)
    images = torch.randn(4, 3, 16, 16)
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    cfg = soft.net.pretrained_cfg
    seen = (pixels - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    answer = soft.net(seen)
    assert torch.allclose(soft(images), answer, atol=1e-5), "the teacher gets the teacher's normalisation"
    assert soft.loss(answer, images).abs() < 1e-6 < soft.loss(-answer, images)
    expected = nn.functional.cross_entropy(answer, hard(images).argmax(-1))
    assert hard.loss(answer, images) == pytest.approx(expected.item())
    shared, added = Distill('test_vit', weight=0.25), Distill('test_vit', weight=5.0, label_weight=1.0)
    assert shared.combine(2.0, 4.0) == 2.5 and added.combine(2.0, 4.0) == 22.0


def test_teacher_of_another_size():
    teacher = Teacher(Distill('test_resnet', pretrained=False, size=48), 10, (0.0,) * 3, (1.0,) * 3)
    sizes = []
    teacher.net.register_forward_pre_hook(lambda net, args: sizes.append(tuple(args[0].shape[-2:])))
    teacher(torch.rand(2, 3, 64, 64)), teacher(torch.rand(2, 3, 48, 48))
    assert sizes == [(48, 48), (48, 48)]


@pytest.mark.parametrize('mode', ['soft', 'hard'])
def test_distillation_run(mode, here):
    distill = (
        f'{{teacher: test_vit2, pretrained: false, mode: {mode}, teacher_kwargs: {{img_size: 16, patch_size: 4}}}}'
    )
    assert main([*TINY, f'--model.distill={distill}', '--run.test_after_fit=false']) == 0
    state = read_checkpoint(here / 'runs' / 'run' / 'checkpoints' / 'last.ckpt')['state_dict']
    assert all(key.startswith('net.') for key in state if not key.startswith(('val_', 'test_'))), 'teacher was saved'


def test_accumulation_counts_optimizer_steps(here):
    arguments = ['--trainer.accumulate_grad_batches=2', '--trainer.max_epochs=2', '--run.test_after_fit=false']
    assert main([*TINY, *arguments, '--model.optim.lr=0.1', '--model.schedule.name=constant']) == 0
    saved = read_checkpoint(here / 'runs' / 'run' / 'checkpoints' / 'last.ckpt')
    assert saved['global_step'] == 4
    # 32 images x 2 batches are 1/8 of the 512 that lr is given for
    assert saved['optimizer_states'][0]['param_groups'][0]['lr'] == pytest.approx(0.1 * 64 / 512)


def test_max_steps_without_max_epochs(here):
    arguments = [a for a in TINY if 'max_epochs' not in a]
    assert main([*arguments, '--trainer.max_steps=6', '--run.test_after_fit=false']) == 0
    assert read_checkpoint(here / 'runs' / 'run' / 'checkpoints' / 'last.ckpt')['global_step'] == 6


def test_bf16_and_channels_last(here):
    assert main([*TINY, '--trainer.precision=bf16-mixed', '--model.channels_last=true', '--model.loss=bce']) == 0


def test_digits_learn(here):
    """A few seconds of training are far better than guessing."""
    assert main(['fit', '--config=quickstart', '--trainer.max_epochs=3']) == 0
    with open(here / 'runs' / 'quickstart' / 'metrics.csv', newline='') as file:
        measured = [float(r['test/top1']) for r in csv.DictReader(file) if r['test/top1']]
    assert measured[-1] > 0.5


@pytest.mark.slow
def test_quickstart(here, capsys):
    assert main(['fit', '--config=quickstart']) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('test accuracy: '))
    assert float(line.split()[2]) >= 97.5


@pytest.mark.slow
def test_compile(here):
    assert main([*TINY, '--model.compile=true']) == 0


def test_digits_module_needs_no_trainer():
    data = Digits(batch_size=4, num_workers=0, view=View(size=8))
    data.setup()
    assert next(iter(data.test_dataloader()))['image'].shape == (4, 3, 8, 8)


def write_classes(folder, names):
    for split in ('train', 'val'):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new('RGB', (16, 16), (120 * number, 60, 90)).save(folder / split / name / f'{i}.png')
    return folder


def test_a_checkpoint_meets_data_with_other_classes(here, capsys):
    """Labels are positions: the same name in another place would be counted as wrong, or worse, as right."""
    first = write_classes(here / 'first', ['ant', 'bee', 'cat'])
    folders = ['--data=zoo.data.ImageFolder', '--data.view.size=16', '--data.num_workers=0', '--data.batch_size=2']
    common = [*folders, *TRAINER, '--run.threads=1', '--run.test_after_fit=false']
    assert main(['fit', *MODEL, '--model.num_classes=3', *common, f'--data.path={first}']) == 0
    last = ['--ckpt_path', 'runs/run/checkpoints/last.ckpt']
    for verb in ('validate', 'fit'):
        other = write_classes(here / f'{verb}-shifted', ['aardvark', 'ant', 'bee'])
        assert main([verb, *last, f'--data.path={other}']) == 2
        assert "'ant' is number 1 here and number 0 there" in capsys.readouterr().err
    renamed = write_classes(here / 'renamed', ['ant', 'bee', 'cow'])
    changed = [f'--data.path={renamed}', '--data.view.crop_pct=0.5', '--data.batch_size=3']
    with pytest.warns(UserWarning) as told:
        assert main(['validate', *last, *changed]) == 0
    words = ' '.join(str(w.message) for w in told)
    assert "number 2 is 'cow', not 'cat'" in words and 'crop_pct 0.875 (now 0.5)' in words
    assert 'images of this epoch' not in words
    (renamed / 'val' / 'ant' / '0.png').write_bytes(b'no image')
    with pytest.warns(RuntimeWarning, match='skipped unreadable'):
        assert main(['validate', *last, *changed]) == 0
    assert '1 unreadable images were skipped\nvalidation accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_metrics_add_up_in_fp32(dtype):
    task = Classify('test_vit', num_classes=3).to(dtype=dtype)
    loss = task.val_metrics['loss']
    for _ in range(400):
        loss.update(torch.tensor(1.2345), weight=257)
    assert task.net.get_classifier().weight.dtype == dtype
    assert float(loss.compute()) == pytest.approx(1.2345, rel=1e-5)


@pytest.mark.parametrize('ema', [None, {'decay': 0.5}])
def test_a_backbone_takes_the_weights_of_a_run(ema, here):
    task = Classify('test_vig', num_classes=4, ema=ema)
    for parameter in task.net.parameters():
        parameter.data.add_(0.01)  # the average is another
    torch.save({'state_dict': task.state_dict(), 'hyper_parameters': dict(task.hparams)}, 'best.ckpt')
    net = timm.create_model('test_vig', num_classes=4, checkpoint_path='best.ckpt').eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(images), task.eval()(images))


def test_resume_with_another_optimizer_or_head(run, here, capsys):
    last = ['--ckpt_path', str(run[0] / 'checkpoints' / 'last.ckpt')]
    kept = {name: (run[0] / name).read_bytes() for name in ('config.yaml', 'metrics.csv')}
    mistakes = (('--model.optim.name=lion', 'optim.name adamw'), ('--model.freeze=backbone', 'model.freeze None'))
    for change, message in mistakes:
        assert main(['fit', *last, '--trainer.max_epochs=2', change]) == 2
        assert message in capsys.readouterr().err
        assert kept == {name: (run[0] / name).read_bytes() for name in kept}
