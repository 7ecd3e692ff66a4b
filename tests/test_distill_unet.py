"""Training and distilling UNets: losses, students, runs that resume, recipes that start, errors that name the fix."""

import csv
import json
from pathlib import Path

import pytest
import tiny_diffusion
import tiny_pipelines
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from zoo.backbones.linfusion import LinFusion

import zoo
from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.diffusion.class_to_image import ClassToImagePipeline, build_class_unet
from zoo.errors import ZooError
from zoo.tasks import DistillUNet, TrainUNet
from zoo.tasks._denoising import Frame, load_pipeline
from zoo.tasks._unet_judge import Judge, JudgeNet, Verdict, moved, trained_judge
from zoo.tasks._unet_student import Features, Student, Weights, losses, self_attention

CONFIGS = next(Path(base) / 'configs' for base in zoo.__path__ if (Path(base) / 'configs').is_dir())
UNET = {
    'sample_size': 8,
    'in_channels': 1,
    'out_channels': 1,
    'block_out_channels': [16, 16],
    'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D'],
    'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D'],
    'layers_per_block': 1,
    'cross_attention_dim': 16,
    'attention_head_dim': 2,
    'norm_num_groups': 4,
}
SAMPLES = {'count': 20, 'steps': 1, 'rows': 1, 'sizes': [16], 'sizes_count': 10, 'judge': {'widths': [8], 'epochs': 1}}
COMMON = [
    '--seed_everything=3',
    '--data=zoo.data.Digits',
    '--data.batch_size=16',
    '--data.num_workers=0',
    '--data.cache=memory',
    '--data.transform_on=device',
    '--data.view={size: 8, channels: 1, crop_pct: 1.0, mean: [0.5], std: [0.5]}',
    '--data.augment={scale: [1.0, 1.0], ratio: [1.0, 1.0], hflip: 0.0, color_jitter: null}',
    '--model.optim.lr_per=null',
    '--model.ema={decay: 0.5}',
    f'--model.samples={json.dumps(SAMPLES)}',
    '--trainer.accelerator=cpu',
    '--trainer.max_epochs=2',
    '--trainer.limit_train_batches=3',
    '--trainer.limit_val_batches=1',
    '--trainer.limit_test_batches=1',
    '--trainer.log_every_n_steps=1',
    '--run.monitor=val/loss',
    '--run.mode=min',
    '--run.threads=1',
]


def train_arguments(folder, *more):
    model = ['--model=zoo.tasks.TrainUNet', f'--model.unet={json.dumps(UNET)}']
    return ['fit', *model, *COMMON, f'--run.root={folder}', '--run.name=trained', *more]


def distill_arguments(folder, teacher, *more):
    model = ['--model=zoo.tasks.DistillUNet', f'--model.teacher={teacher}', '--model.init=[teacher, random]']
    return ['fit', *model, *COMMON, f'--run.root={folder}', '--run.name=distilled', *more]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run that trained a tiny class-conditional UNet."""
    folder = tmp_path_factory.mktemp('trained')
    assert main(train_arguments(folder)) == 0
    return folder / 'trained'


@pytest.fixture(scope='module')
def distilled(trained, tmp_path_factory):
    """The folder of a run that distilled it twice."""
    folder = tmp_path_factory.mktemp('distilled')
    assert main(distill_arguments(folder, trained / 'model')) == 0
    return folder / 'distilled'


# losses and students


def class_frame(prediction='v_prediction', classes=3):
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    unet = build_class_unet(UNET, classes)
    scheduler = DDPMScheduler(prediction_type=prediction)
    pipeline = ClassToImagePipeline(unet, scheduler, {str(i): f'class {i}' for i in range(classes)})
    pipeline.set_progress_bar_config(disable=True)
    return Frame(pipeline)


def class_batch(count=4, classes=3):
    return {'image': torch.rand(count, 1, 8, 8) * 2 - 1, 'target': torch.arange(count) % classes}


def test_losses_are_the_formula_in_fp32():
    torch.manual_seed(0)
    out, target, wanted = torch.randn(3, 2, 1, 8, 8)
    ours, theirs = [torch.randn(2, 16, 8), torch.randn(2, 4, 8)], [torch.randn(2, 16, 8), torch.randn(2, 4, 8)]
    with torch.autocast('cpu', torch.bfloat16):
        found = losses(out, ours, target, wanted, theirs, Weights())
    layers = sum(F.mse_loss(a, b) for a, b in zip(ours, theirs)) / 2
    expected = F.mse_loss(out, target) + 0.5 * F.mse_loss(out, wanted) + 0.5 * layers
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.layers.mean(), layers)
    with pytest.raises(ValueError):
        losses(out, ours[:1], target, wanted, theirs, Weights())


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
def test_noise_error_is_that_of_the_noise(prediction):
    """Found through the outputs' definitions, whatever is predicted."""
    frame, batch = class_frame(prediction), class_batch()
    step = frame.draw(batch, generator=torch.Generator().manual_seed(1))
    alpha = frame.scheduler.alphas_cumprod[step.timesteps].view(-1, 1, 1, 1)
    a, s = alpha.sqrt(), (1 - alpha).sqrt()

    def noise_of(value):
        if prediction == 'epsilon':
            return value
        return a * value + s * step.noisy if prediction == 'v_prediction' else (step.noisy - a * value) / s

    found = step.target + 0.1 * torch.randn_like(step.target)
    expected = (noise_of(found) - noise_of(step.target)).square().flatten(1).mean(1)
    torch.testing.assert_close(frame.noise_error(found, step), expected, rtol=1e-3, atol=1e-6)
    mixed = (step.noisy - s * noise_of(step.target))[step.timesteps < 900]
    torch.testing.assert_close(mixed, (a * batch['image'])[step.timesteps < 900], rtol=1e-3, atol=1e-4)


def test_draws_are_keyed_by_their_generator():
    frame, batch = class_frame(), class_batch()
    one, same, other = (frame.draw(batch, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.noisy, same.noisy) and not torch.equal(one.noisy, other.noisy)
    assert 0 <= int(one.timesteps.min()) and int(one.timesteps.max()) < 1000


def test_dropped_classes_become_none():
    frame, batch = class_frame(), class_batch()
    lost = torch.tensor([True, False, True, False])
    found = frame.condition(batch, lost)['encoder_hidden_states']
    kept, none = frame.pipeline.encode(batch['target']), frame.pipeline.encode(torch.full((4,), 3))
    assert torch.equal(found[1::2], kept[1::2]) and torch.equal(found[::2], none[::2])
    assert not torch.equal(kept[::2], none[::2])
    drawn = frame.draw(class_batch(1000), 0.25).condition['encoder_hidden_states']
    assert (drawn == none[:1]).flatten(1).all(1).float().mean() == pytest.approx(0.25, abs=0.06)


def test_student_shares_all_but_its_attention():
    teacher = tiny_diffusion.unet()
    before = tiny_diffusion.step(teacher)
    for init in ('teacher', 'random'):
        student = Student(teacher, init, None, mixed=True)
        theirs = {id(p) for p in teacher.parameters()}
        own = {name for name, p in student.unet.named_parameters() if id(p) not in theirs}
        assert own and all('attn1' in name for name in own)
        assert {n for n, p in student.unet.named_parameters() if p.requires_grad} == own
        assert list(student.linear.layers) == list(self_attention(teacher))
        ours, original = (next(iter(found.values())) for found in (student.linear.layers, self_attention(teacher)))
        assert torch.equal(ours.to_q.weight, original.to_q.weight) == (init == 'teacher')
    assert torch.equal(tiny_diffusion.step(teacher), before), 'making students has changed the teacher'


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients_reach_every_layer(checkpointing):
    """Each loss alone, too; and recomputed activations leave nothing behind."""
    teacher = tiny_diffusion.unet().requires_grad_(False)
    student = Student(teacher, 'teacher', 8, mixed=False)
    plain = Student(teacher, 'teacher', 8, mixed=False)
    plain.linear.load_state_dict(student.linear.state_dict())
    if checkpointing:
        student.unet.enable_gradient_checkpointing()
        student.unet.train()
    latents, t, text = tiny_diffusion.inputs()
    wanted, theirs = Features(self_attention(teacher)).run(lambda: teacher(latents, t, text).sample)
    assert len(theirs) == 7
    for weights in (Weights(), Weights(1, 0, 0), Weights(0, 1, 0), Weights(0, 0, 1)):
        grads = []
        for one in (student, plain):
            one.linear.zero_grad()
            out, ours = one.features.run(lambda one=one: one.unet(latents, t, text).sample)
            losses(out, ours, latents, wanted, theirs, weights).loss.backward()
            assert not one.features.found
            grads.append({n: p.grad for n, p in one.linear.named_parameters()})
        assert all(g is not None and g.abs().sum() > 0 for n, g in grads[0].items() if '_.' not in n)
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, grads[1][name], msg=name)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.slow
def test_compiled_student_gives_the_same_features():
    teacher = tiny_diffusion.unet().requires_grad_(False)
    student = Student(teacher, 'teacher', -1, mixed=False)
    latents, t, text = tiny_diffusion.inputs()
    compiled = torch.compile(student.unet, backend='eager')
    out, ours = student.features.run(lambda: student.unet(latents, t, text).sample)
    for _ in range(2):
        found, features = student.features.run(lambda: compiled(latents, t, text).sample)
        torch.testing.assert_close(found, out)
        assert len(features) == len(ours) == 7
        for a, b in zip(features, ours):
            torch.testing.assert_close(a, b)


# the judge


def test_judge_learns_and_is_kept(tmp_path):
    from zoo.data.transforms import View

    data = zoo.data.Digits(num_workers=0, view=View(size=8, channels=1, crop_pct=1.0, mean=(0.5,), std=(0.5,)))
    data.setup()
    (images, targets), (held, truth) = data.whole('train'), data.whole('test')
    assert len(images) == 1257 and len(held) == 360 and images.min() == -1 and images.max() == 1
    settings = Judge(widths=(16, 32), epochs=4)
    net = trained_judge(settings, images, targets, 10, tmp_path / 'judge.safetensors')
    written = (tmp_path / 'judge.safetensors').stat().st_mtime_ns
    again = trained_judge(settings, images, targets, 10, tmp_path / 'judge.safetensors')
    assert (tmp_path / 'judge.safetensors').stat().st_mtime_ns == written
    torch.testing.assert_close(again(held), net(held))
    verdict = Verdict(net, images)
    right, distance = verdict(held, truth)
    assert right > 0.9
    noise = verdict(torch.rand_like(held) * 2 - 1, truth)
    assert noise[0] < 0.4 and noise[1] > 10 * distance, 'noise is judged like digits'
    assert verdict(held, (truth + 1) % 10)[0] < 0.1
    large = F.interpolate(held, scale_factor=2, mode='nearest')
    assert verdict(large, truth)[0] == pytest.approx(right, abs=0.03)
    trained_judge(Judge(widths=(16, 32), epochs=1), images, targets, 10, tmp_path / 'judge.safetensors')
    assert (tmp_path / 'judge.safetensors').stat().st_mtime_ns != written, 'other settings, the same judge'


def test_shifts_repeat_borders():
    images = torch.arange(25.0).view(1, 1, 5, 5).expand(64, -1, -1, -1)
    found = moved(images, 1, True)
    assert found.shape == images.shape and {float(v) for v in found[:, 0, 2, 2]} > {12.0, 6.0, 18.0}
    assert torch.equal(moved(images, 0, False), images)
    assert JudgeNet(1, 3, (4, 8))(images).shape == (64, 3)


# sampling


def test_pipeline_round_trip_and_noise(tmp_path):
    frame = class_frame()
    frame.pipeline.save_pretrained(tmp_path / 'model')
    assert json.loads((tmp_path / 'model' / 'model_index.json').read_text())['unet'][0] == 'diffusers'
    again = load_pipeline(tmp_path / 'model')
    assert isinstance(again, ClassToImagePipeline) and again.class_names == ['class 0', 'class 1', 'class 2']
    options = {'num_inference_steps': 2, 'output_type': 'pt'}
    images = [p([0, 2], generator=torch.Generator().manual_seed(0), **options).images for p in (frame.pipeline, again)]
    assert torch.equal(*images) and images[0].shape == (2, 1, 8, 8) and images[0].abs().max() <= 1
    guided = [
        again([1], guidance_scale=g, generator=torch.Generator().manual_seed(0), **options).images for g in (1, 5)
    ]
    assert not torch.equal(*guided)
    assert again([1], height=16, width=12, **options).images.shape == (1, 1, 16, 12)
    assert again([1]).images[0].size == (8, 8)
    with pytest.raises(ZooError, match='within 0..2'):
        again([3])
    with pytest.raises(ZooError, match='multiples of 2'):
        again([0], height=9)


# runs


def test_training_leaves_a_pipeline(trained):
    pipeline = load_pipeline(trained / 'model')
    assert pipeline.class_names == [str(i) for i in range(10)]
    state = read_checkpoint(trained / 'checkpoints' / 'last.ckpt')['state_dict']
    averaged = {k.removeprefix('ema.module.'): v for k, v in state.items() if k.startswith('ema.module.')}
    raw = {k.removeprefix('net.'): v for k, v in state.items() if k.startswith('net.')}
    ours = pipeline.unet.state_dict()
    assert ours.keys() == averaged.keys() == raw.keys()
    assert all(torch.equal(ours[k], averaged[k]) for k in ours) and not all(torch.equal(ours[k], raw[k]) for k in ours)
    assert (trained / 'report' / 'samples.png').is_file() and (trained / 'report' / 'curves.png').is_file()


def test_a_linear_unet_from_nothing(tmp_path):
    net = json.dumps({**UNET, 'projection_mid_dim': 'div:4'})
    short = ['--trainer.max_steps=1', '--trainer.max_epochs=-1', '--model.samples.count=0', f'--model.unet={net}']
    assert main(train_arguments(tmp_path, *short)) == 0
    made = load_pipeline(tmp_path / 'trained' / 'model').unet
    assert type(made).__name__ == 'LinearUNet2DConditionModel'
    assert {entry['projection_mid_dim'] for entry in LinFusion.of(made).config.modules_list} == {4}


def test_distillation_leaves_students_and_a_table(distilled, trained):
    state = read_checkpoint(distilled / 'checkpoints' / 'last.ckpt')['state_dict']
    assert not any('conv_in' in key for key in state), 'the frozen rest is in the checkpoint'
    for init in ('teacher', 'random'):
        tensors = load_file(distilled / f'linfusion-{init}' / 'diffusion_pytorch_model.safetensors')
        prefix = f'ema.module.{init}.'
        averaged = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert tensors.keys() == averaged.keys() and all(torch.equal(tensors[k], averaged[k]) for k in tensors)
        assert not torch.equal(tensors['0.to_q.weight'], state[f'layers.{init}.0.to_q.weight'])
        pipeline = load_pipeline(trained / 'model')
        linear = LinFusion.attach(pipeline, distilled / f'linfusion-{init}')
        assert all(torch.equal(linear.state_dict()[k], tensors[k]) for k in tensors)
    table = json.loads((distilled / 'report' / 'table.json').read_text())
    rows = {(row['name'], row['size']): row for row in table['rows']}
    assert len(rows) == 2 + 2 * 2 + 3
    assert rows['real, held out', 8]['samples'] == 360
    for name in ('student, teacher init', 'student, random init'):
        row, start = rows[name, 8], rows[name.replace('student', 'undistilled'), 8]
        assert row['samples'] == 20 and rows[name, 16]['samples'] == 10 and 0 <= row['accuracy'] <= 1
        assert row['noise_mse'] > 0 and row['output'] != start['output']
    random, start = (rows[n, 8] for n in ('student, random init', 'undistilled, random init'))
    assert random['features'] < start['features'], 'six steps have not brought a random student nearer'
    assert (distilled / 'report' / 'samples.png').is_file() and (distilled / 'judge.safetensors').is_file()


def test_distillation_logs_its_parts(distilled):
    with open(distilled / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    for split in ('train', 'val'):
        for init in ('teacher', 'random'):
            assert any(row[f'{split}/{init}/features'] for row in rows)
    first = next(row for row in rows if row['train/teacher/output'])
    assert float(first['train/teacher/output']) < float(first['train/random/output'])
    total = sum(
        w * float(first[f'train/{init}/{k}'])
        for init in ('teacher', 'random')
        for k, w in (('target', 1), ('output', 0.5), ('features', 0.5))
    )
    assert total == pytest.approx(float(first['train/loss_step']), rel=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize('task', [TrainUNet, DistillUNet])
def test_resumes_to_the_bit(task, trained, distilled, tmp_path, monkeypatch):
    training = task is TrainUNet
    args = train_arguments(tmp_path) if training else distill_arguments(tmp_path, trained / 'model')
    args += ['--ckpt_path=last', '--run.save_every_n_steps=1', '--run.test_after_fit=false']
    start = task.on_train_batch_start

    def killed(self, batch, batch_idx):
        if self.global_step == 4:
            raise Killed
        start(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(task, 'on_train_batch_start', killed)
        with pytest.raises(Killed):
            main(args)
    name = 'trained' if training else 'distilled'
    assert read_checkpoint(tmp_path / name / 'checkpoints' / 'last.ckpt')['global_step'] == 4
    assert main(args) == 0
    whole = trained if training else distilled
    ours, theirs = (read_checkpoint(f / 'checkpoints' / 'last.ckpt') for f in (tmp_path / name, whole))
    assert ours['global_step'] == theirs['global_step'] == 6
    assert all(torch.equal(ours['state_dict'][k], v) for k, v in theirs['state_dict'].items())
    file = 'model/unet' if training else 'linfusion-random'
    ours, theirs = (load_file(f / file / 'diffusion_pytorch_model.safetensors') for f in (tmp_path / name, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_students_side_by_side_are_those_of_runs_alone(trained, distilled, tmp_path):
    args = distill_arguments(tmp_path, trained / 'model', '--model.init=random', '--run.test_after_fit=false')
    assert main(args) == 0
    alone = load_file(tmp_path / 'distilled' / 'linfusion' / 'diffusion_pytorch_model.safetensors')
    both = load_file(distilled / 'linfusion-random' / 'diffusion_pytorch_model.safetensors')
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-4, atol=1e-6)


# recipes


@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    """A folder of tiny pipelines and captioned images."""
    folder = tmp_path_factory.mktemp('pipelines')
    for kind in ('sd15', 'sd21', 'sdxl'):
        tiny_pipelines.pipeline(kind).save_pretrained(folder / kind)
    tiny_pipelines.captioned_folder(folder / 'images', 8)
    return folder


SHORT = ['--trainer.max_steps=2', '--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.strategy=auto']
SHORT += ['--trainer.precision=32-true', '--trainer.accumulate_grad_batches=1', '--run.threads=1']
SHORT += ['--data.batch_size=2', '--data.num_workers=0']


@pytest.mark.parametrize('kind', ['sd15', pytest.param('sd21', marks=pytest.mark.slow), 'sdxl'])
def test_recipe_starts(kind, pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / 'distill_unet' / f'{kind}.yaml'
    args = [f'--model.teacher={pipelines / kind}', f'--data.train={pipelines / "images"}', '--data.val_fraction=0.25']
    args += ['--data.framing.size=16', '--trainer.val_check_interval=1', '--model.samples.steps=1']
    assert main(['fit', f'--config={path}', *SHORT, *args]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / 'runs' / kind / 'linfusion' / 'config.json').read_text())
    expected = {'sdxl': [2, 4]}.get(kind, [None])
    assert sorted({entry['projection_mid_dim'] for entry in config['modules_list']}, key=str) == expected
    assert (tmp_path / 'runs' / kind / 'report' / 'samples.png').is_file()
    recipe = yaml.safe_load(path.read_text())
    trainer, data = recipe['trainer'], recipe['data']['init_args']
    total = trainer['devices'] * trainer['accumulate_grad_batches'] * data['batch_size']
    published = {'sd15': (512, '16-mixed', 96), 'sd21': (768, 'bf16-mixed', 96), 'sdxl': (1024, '16-mixed', 64)}
    assert (data['framing']['size'], trainer['precision'], total) == published[kind]
    assert recipe['model']['init_args']['optim']['lr'] == 1e-4


QUICK = ['--model.samples={count: 10, steps: 1, rows: 1, sizes_count: 10, judge: {widths: [4], epochs: 1}}']
QUICK += [*SHORT, '--trainer.limit_val_batches=1', '--trainer.limit_test_batches=1']


def images(name, folder):
    """Command line of the data of a recipe."""
    from test_configs import parquet

    if name != 'cifar10':
        return []
    data = folder / 'data'
    data = data if data.is_dir() else parquet(data, 10)
    return [f'--data.path={data}', f'--data.cache_dir={folder / "cache"}', '--trainer.val_check_interval=1']


@pytest.mark.parametrize('name', [pytest.param('cifar10', marks=pytest.mark.slow), 'digits'])
def test_small_recipe_starts(name, tmp_path, monkeypatch, capsys):
    """The recipe of the teacher, with a smaller UNet, and that of its students behind it."""
    monkeypatch.chdir(tmp_path)
    teacher = CONFIGS / 'distill_unet' / f'teacher_unet_{name}.yaml'
    net = yaml.safe_load(teacher.read_text())['model']['init_args']['unet']
    small = [16] * len(net['block_out_channels'])
    args = [f'--model.unet={json.dumps({**net, "block_out_channels": small, "norm_num_groups": 4})}']
    args += [*images(name, tmp_path), *QUICK]
    assert main(['fit', f'--config={teacher}', *args]) == 0, capsys.readouterr().err
    student = CONFIGS / 'distill_unet' / ('cifar10.yaml' if name == 'cifar10' else 'quickstart.yaml')
    args = [f'--model.teacher=runs/teacher_unet_{name}/model', *images(name, tmp_path), *QUICK]
    assert main(['fit', f'--config={student}', *args]) == 0, capsys.readouterr().err
    recipe = yaml.safe_load(student.read_text())
    rows = json.loads((tmp_path / 'runs' / recipe['run']['name'] / 'report' / 'table.json').read_text())['rows']
    assert {row['size'] for row in rows} == ({32, 64} if name == 'cifar10' else {8})
    assert recipe['model']['init_args']['teacher'].endswith(f'distill_unet/{teacher.name}')


@pytest.mark.slow
def test_quickstart_trains_its_teacher_first_and_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    first = [a for a in QUICK if not a.startswith('--model.samples')] + ['--run.test_after_fit=false']
    teacher = CONFIGS / 'distill_unet' / 'teacher_unet_digits.yaml'
    args = [f'--config={CONFIGS / "distill_unet" / "quickstart.yaml"}', f'--model.teacher={teacher}', *QUICK]
    args += [f'--model.teacher_arguments={json.dumps(first)}']
    assert main(['fit', *args]) == 0, capfd.readouterr().err
    assert 'training the teacher first' in capfd.readouterr().out
    assert (tmp_path / 'runs' / 'teacher_unet_digits' / 'model' / 'model_index.json').is_file()
    assert main(['fit', *args]) == 0
    assert 'training the teacher first' not in capfd.readouterr().out


@pytest.mark.slow
def test_quickstart_reaches_its_floors(tmp_path, monkeypatch):
    """Nothing shortened: what the head of the config says."""
    monkeypatch.chdir(tmp_path)
    teacher = CONFIGS / 'distill_unet' / 'teacher_unet_digits.yaml'
    assert main(['fit', f'--config={CONFIGS / "distill_unet" / "quickstart.yaml"}', f'--model.teacher={teacher}']) == 0
    table = json.loads((tmp_path / 'runs' / 'quickstart_unet' / 'report' / 'table.json').read_text())
    real, teacher, student, start = table['rows']
    assert real['accuracy'] >= 0.97 and teacher['accuracy'] >= 0.95 and teacher['samples'] == 300
    assert student['accuracy'] >= teacher['accuracy'] - 0.03
    assert student['output'] < 0.5 * start['output'] and student['features'] < 0.5 * start['features']
    assert student['frechet'] < 1.5 * teacher['frechet'] < 10


def test_text_conditional_teacher(pipelines, tmp_path):
    """A new UNet in a pipeline's latents, buckets of aspect ratios, captions dropped."""
    net = json.dumps({**tiny_diffusion.UNET, 'layers_per_block': 1})
    args = ['fit', '--model=zoo.tasks.TrainUNet', f'--model.pipeline={pipelines / "sd15"}', f'--model.unet={net}']
    args += ['--model.guidance_dropout=0.5', '--model.samples={prompts: [a cat], steps: 1}']
    args += ['--data=zoo.data.CaptionedImages', f'--data.train={pipelines / "images"}', *SHORT]
    args += ['--data.framing={size: 32, bucket_step: 16, hflip: 0.5}', '--data.val_fraction=0.25']
    args += [f'--run.root={tmp_path}', '--run.name=text', '--trainer.max_epochs=-1']
    assert main(args) == 0
    made = load_pipeline(tmp_path / 'text' / 'model')
    assert not torch.equal(made.unet.conv_in.weight, load_pipeline(pipelines / 'sd15').unet.conv_in.weight)
    assert torch.equal(made.vae.encoder.conv_in.weight, load_pipeline(pipelines / 'sd15').vae.encoder.conv_in.weight)
    assert (tmp_path / 'text' / 'report' / 'samples.png').is_file()


def test_guidance_is_against_what_the_pipeline_takes(pipelines):
    for kind, zeros in (('sd15', False), ('sdxl', True)):
        frame = Frame(load_pipeline(pipelines / kind))
        batch = {'caption': ['a', 'b'], 'sizes': torch.tensor([[40, 40, 0, 0, 16, 16]] * 2)}
        found = frame.condition(batch, torch.tensor([True, False]))
        text = found['encoder_hidden_states']
        assert torch.equal(text[1:], frame.encode_texts(['a', 'b'])['prompt_embeds'][1:])
        if zeros:
            assert not text[0].any() and not found['added_cond_kwargs']['text_embeds'][0].any()
            assert found['added_cond_kwargs']['time_ids'].shape == (2, 6)
        else:
            assert torch.equal(text[:1], frame.encode_texts([''])['prompt_embeds'])


# mistakes


def test_mistakes_are_named(trained, distilled, pipelines, tmp_path, capsys):
    base = distill_arguments(tmp_path, trained / 'model')
    text = ['--model=zoo.tasks.DistillUNet', f'--model.teacher={pipelines / "sd15"}', *COMMON, f'--run.root={tmp_path}']
    for args, message in (
        ([*base, '--data.view.mean=[0.4]'], 'set view.mean and view.std to 0.5'),
        ([*base, '--data.view={channels: 3, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}'], '--data.view.channels 1'),
        ([*base, '--model.init=[random, random]'], 'must be teacher, random, or a list of both'),
        ([*base, '--model.projection_mid_dim=div:x'], 'div:x'),
        ([*base, '--model.guidance_dropout=1.5'], 'within 0..1'),
        ([*base, f'--model.teacher={tmp_path}'], 'cannot load a diffusers pipeline'),
        (['fit', *text], 'take zoo.data.CaptionedImages or zoo.data.CachedLatents'),
        ([*train_arguments(tmp_path), '--model.unet=null'], 'nothing to train'),
        ([*train_arguments(tmp_path), '--model.unet.layers=3'], 'cannot build a UNet2DConditionModel'),
        (
            [*base, '--model.init=random', f'--ckpt_path={distilled / "checkpoints" / "last.ckpt"}'],
            'checkpoint has init',
        ),
    ):
        assert main(args) == 2, message
        assert message in capsys.readouterr().err
