"""Distillation of vision-language models: losses, stages, hand-over, resuming, and the students that come out."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.errors import ZooError
from zoo.tasks._distill_evaluate import spread_order
from zoo.tasks._distill_losses import HeadsLoss, logits_loss, positions
from zoo.tasks._distill_report import ALL, Measured, margin_kept
from zoo.tasks._distill_stages import Plan, Stage, set_trainable, stage_optimizer
from zoo.tasks._distill_student import Student, hidden_states, output_head, rebuild

DATA = {
    'batch_size': 4,
    'train_images': 20,
    'val_images': 4,
    'test_images': 12,
    'ask': ['colour', 'count'],
    'num_workers': 0,
}
STAGES = [
    {'name': 'new', 'train': ['new'], 'max_steps': 3, 'optim': {'lr': 1e-2}, 'wsd': {'warmup': 1, 'decay': 1}},
    {'name': 'qkv', 'train': ['new', 'qkv'], 'max_steps': 3, 'optim': {'lr': 5e-3}, 'wsd': {'warmup': 1}},
    {
        'name': 'linear',
        'loss': 'logits',
        'train': ['new', 'qkv'],
        'freeze': ['dt_bias', 'A_log_bias'],
        'max_steps': 3,
        'kl_reduction': 'sum',
        'optim': {'lr': 1e-3},
    },
    {
        'name': 'hybrid',
        'loss': 'logits',
        'train': ['new', 'lora'],
        'max_steps': 3,
        'softmax_layers': [0, 2],
        'start_from': 'qkv',
        'ce_weight': 0.5,
        'lora': {'r': 2, 'dropout': 0.1, 'targets': ['v_proj', 'up_proj']},
    },
]


def tiny_teacher(seed=0):
    """A LLaVA for the shapes data set, with weights large enough that attention matters."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from zoo.data.shapes import Shapes

    processor = Shapes().processor
    text = {'model_type': 'llama', 'vocab_size': len(processor.tokenizer), 'hidden_size': 32, 'intermediate_size': 48}
    text |= {'num_hidden_layers': 4, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'pad_token_id': 0}
    text |= {'bos_token_id': None, 'eos_token_id': 2, 'max_position_embeddings': 256}
    vision = {'model_type': 'siglip_vision_model', 'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1}
    vision |= {'num_attention_heads': 2, 'image_size': 48, 'patch_size': 12, 'vision_use_head': False}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=5,
            vision_feature_layer=-1,
            vision_feature_select_strategy='full',
            image_seq_length=16,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model.requires_grad_(False).eval(), processor


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Folder of a tiny teacher."""
    folder = tmp_path_factory.mktemp('teacher')
    model, processor = tiny_teacher()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def batch():
    """Model inputs and labels of two padded samples."""
    from zoo.data.chat import model_inputs
    from zoo.data.shapes import Shapes

    data = Shapes(**{**DATA, 'val_images': 8, 'batch_size': 8})
    data.setup()
    found = next(iter(data.val_dataloader()))
    assert not found['attention_mask'].all(), 'nothing is padded'
    return model_inputs(found), found['labels']


def arguments(folder, teacher, name='run', stages=STAGES, **more):
    """Command line of a tiny run."""
    model = {
        'teacher': str(teacher),
        'stages': stages,
        'chunk': 32,
        'report': {'sweep_questions': 8, 'speed_tokens': 3},
    }
    config = {
        'seed_everything': 3,
        'model': {'class_path': 'zoo.tasks.DistillVLM', 'init_args': {**model, **more}},
        'data': {'class_path': 'zoo.data.Shapes', 'init_args': DATA},
        'trainer': {'max_epochs': -1, 'accelerator': 'cpu', 'log_every_n_steps': 1, 'gradient_clip_val': 2.0},
        'run': {'name': name, 'root': str(folder), 'save_every_n_steps': 1, 'monitor': 'val/kl', 'mode': 'min'},
    }
    path = folder / f'{name}.yaml'
    path.write_text(yaml.safe_dump(config))
    return ['fit', f'--config={path}', '--run.threads=1']


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
    """The folder of an uninterrupted run."""
    root = tmp_path_factory.mktemp('whole')
    assert main(arguments(root, teacher)) == 0
    return root / 'run'


# losses


@pytest.mark.parametrize('which', ['all', 'tokens', 'answers'])
@pytest.mark.parametrize('reduction', ['token', 'sum'])
def test_logits_loss_is_the_formula(which, reduction):
    student, teacher = torch.randn(2, 7, 16, requires_grad=True), torch.randn(2, 7, 12)
    heads = torch.nn.Linear(16, 50).requires_grad_(False), torch.nn.Linear(12, 50).requires_grad_(False)
    labels, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7)
    labels[0, :3], mask[1, 5:] = -100, 0
    rows = []

    def counted(head):
        return lambda x: rows.append(len(x)) or head(x)

    keep = positions(which, mask, labels)
    options = dict(keep=keep, labels=labels, reduction=reduction, kl_weight=0.7, ce_weight=0.3, chunk=3)
    found = logits_loss(student, teacher, counted(heads[0]), counted(heads[1]), **options)
    gradient = torch.autograd.grad(2 * found.loss, student)[0]
    assert max(rows) == 3, 'logits of more than a chunk of positions'

    ours, theirs = heads[0](student).log_softmax(-1), heads[1](teacher).log_softmax(-1)
    weight = {'all': torch.ones(2, 7), 'tokens': mask, 'answers': F.pad(labels[:, 1:] != -100, (0, 1)).float()}[which]
    kl = (theirs.exp() * (theirs - ours)).sum(-1) * weight
    ce = F.cross_entropy(ours[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = 0.7 * kl.sum() / (weight.sum() if reduction == 'token' else 2) + 0.3 * ce
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(2 * expected, student)[0])
    torch.testing.assert_close(found.kl, kl.sum() / weight.sum())
    same = (ours.argmax(-1) == theirs.argmax(-1)) * weight
    torch.testing.assert_close(found.agreement, same.sum() / weight.sum())


def test_published_reduction_is_batchmean():
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    head = torch.nn.Linear(8, 20)
    found = logits_loss(student, teacher, head, head, reduction='sum', chunk=4).loss
    published = torch.nn.KLDivLoss(reduction='batchmean')(head(student).log_softmax(-1), head(teacher).softmax(-1))
    torch.testing.assert_close(found, published)


@pytest.mark.parametrize('which', ['all', 'tokens'])
def test_heads_loss_is_the_formula(which, batch):
    from zoo.linearizer import capture

    model, _ = tiny_teacher()
    inputs, _ = batch
    mask = inputs['attention_mask']
    student = Student(model, 'mamba2', {}, Stage('s', train=['new', 'qkv']), seed=1)
    loss = HeadsLoss(student.mixers, mask, positions(which, mask, None), 1000.0)
    with torch.no_grad(), capture(model, student.mixers, loss):
        hidden_states(model, inputs)
    trained = [p for p in student.named_parameters().values() if p.requires_grad]
    (3 * loss.total()).backward()
    gradients = [p.grad.clone() for p in trained]
    assert all(p.grad is None for n, p in student.named_parameters().items() if 'o_proj' in n)

    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
    expected = []
    for i, mixer in student.mixers.items():
        error = (mixer.heads(seen.inputs[i], padding_mask=mask) - seen.heads[i]).square().mean((-1, -2))
        expected.append(error.mean() if which == 'all' else error[mask.bool()].mean())
    total = 1000 * sum(expected) / 4
    torch.testing.assert_close(loss.total(), total)
    for found, wanted in zip(gradients, torch.autograd.grad(3 * total, trained)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_hidden_states_give_the_logits_without_computing_them(batch):
    model, _ = tiny_teacher()
    inputs, _ = batch
    torch.testing.assert_close(output_head(model)(hidden_states(model, inputs)), model(**inputs).logits)


# stages


def stage(name, **settings):
    return Stage(name, **settings)


@pytest.mark.parametrize(
    ('stages', 'options', 'message'),
    [
        ([], {}, 'no stages'),
        ([stage('a'), stage('a')], {}, 'names of their own'),
        ([stage('a', start_from='b'), stage('b')], {}, 'no earlier stage'),
        ([stage('a'), stage('b')], {'only': 'c'}, "no stage 'c'; the stages are a, b"),
        ([stage('a'), stage('b')], {'only': 'b'}, '--model.start_from runs/NAME/stages/a.safetensors'),
        ([stage('a', loss='logits')], {}, '--model.from_scratch true'),
        ([stage('a', train=['everything'])], {}, 'roles are new, qkv, output, lora'),
        ([stage('a', softmax_layers=[0])], {}, 'belong to logits stages'),
        ([stage('a', max_steps=5, wsd={'warmup': 4, 'decay': 2})], {}, 'longer than its 5 steps'),
        ([stage('a', train=['new', 'lora'])], {}, 'both'),
        ([stage('a', loss='logits', lora={}, train=['lora']), stage('b')], {'from_scratch': True}, 'last stage'),
    ],
)
def test_plans_that_cannot_be(stages, options, message):
    with pytest.raises(ZooError, match=message.replace('(', r'\(')):
        Plan(stages, **options)


def test_stages_share_the_steps_of_a_run():
    plan = Plan([stage('a', max_steps=3), stage('b', max_steps=2), stage('c', loss='logits', max_steps=4)])
    assert plan.total_steps == 9
    assert [plan.index_at(step) for step in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert plan.before == {'a': None, 'b': 'a', 'c': 'b'}


def test_schedule_and_weight_decay():
    settings = stage('a', max_steps=20, optim={'lr': 0.1, 'weight_decay': 0.05}, wsd={'warmup': 4, 'decay': 8})
    student = Student(tiny_teacher()[0], 'mamba2', {}, settings, seed=0)
    named = student.named_parameters()
    optimizer, schedule = stage_optimizer(named, settings, 1)
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    trained = {name: decay[id(p)] for name, p in named.items() if id(p) in decay}
    exempt = {
        name.rsplit('.', 2)[-1] if 'conv1d' not in name else 'conv1d.bias' for name, d in trained.items() if not d
    }
    assert exempt == {'dt_bias', 'A_log_bias', 'conv1d.bias'}
    assert any('g_norm.weight' in name for name, d in trained.items() if d)
    assert not any('q_proj' in name or 'o_proj' in name for name in trained)
    rates = []
    for step in range(21):
        schedule.apply(step)
        rates.append(optimizer.param_groups[-1]['lr'])
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert rates[4:13] == pytest.approx([0.1] * 9)
    assert rates[16] == pytest.approx(0.05) and rates[20] == 0
    assert rates[12:] == sorted(rates[12:], reverse=True)


def test_published_second_stage_never_decays():
    settings = stage('a', max_steps=20000, wsd={'warmup': 5000, 'stable': 40000, 'decay': 5000})
    parameter = {'x': torch.nn.Parameter(torch.zeros(2, 2))}
    _, schedule = stage_optimizer(parameter, settings, 1)
    assert schedule.factor(2500) == 0.5 and schedule.factor(19999) == 1


def test_unknown_frozen_parameter_is_named():
    with pytest.raises(ZooError, match=r"freezes \['dtbias'\]"):
        Student(tiny_teacher()[0], 'mamba2', {}, stage('a', freeze=['dtbias']), seed=0)


def test_student_shares_with_the_teacher_but_owns_its_mixers(batch):
    model, _ = tiny_teacher()
    before = {name: p.clone() for name, p in model.named_parameters()}
    student = Student(model, 'mamba2', {}, stage('a', train=['new', 'qkv', 'output']), seed=0)
    own = {p.data_ptr() for p in student.named_parameters().values()}
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not own & theirs
    rest = {p.data_ptr() for p in student.model.parameters()} - own
    assert rest <= theirs
    with torch.no_grad():
        for p in student.named_parameters().values():
            p.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_merged_lora_is_the_same_function(batch):
    model, _ = tiny_teacher()
    inputs, _ = batch
    before = model(**inputs).logits
    lora = {'r': 2, 'targets': ['v_proj', 'up_proj']}
    student = Student(model, 'mamba2', {}, stage('a', loss='logits', train=['lora'], lora=lora), seed=0)
    tensors = {n: torch.randn_like(p) / 4 if 'lora_' in n else p for n, p in student.named_parameters().items()}
    with torch.no_grad():
        for name, p in student.named_parameters().items():
            p.copy_(tensors[name])
    merged = rebuild(student, tensors)
    assert not any('lora' in name for name, _ in merged.named_parameters())
    wanted = student.model(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 0.1
    assert torch.equal(model(**inputs).logits, before), 'the teacher was changed'


# runs


def test_run_leaves_students_and_reports(whole, teacher, batch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import zoo.vlm  # noqa: F401

    for name in ('linear', 'hybrid'):
        assert AutoProcessor.from_pretrained(whole / name).tokenizer.get_vocab()
    model = tiny_teacher()[0]
    linear = AutoModelForImageTextToText.from_pretrained(whole / 'linear').eval()
    tensors = load_file(whole / 'stages' / 'linear.safetensors')
    same = rebuild(Student(model, 'mamba2', {}, Stage('linear', loss='logits'), seed=0), tensors)
    assert torch.equal(linear(**batch[0]).logits, same(**batch[0]).logits)
    table = json.loads((whole / 'report' / 'table.json').read_text())
    assert [m['name'] for m in table['models']] == ['teacher', 'linear', 'hybrid']
    assert [m['softmax_layers'] for m in table['models']] == [4, 0, 2]
    assert all(sum(m['questions'].values()) == DATA['test_images'] for m in table['models'])
    assert table['models'][1]['state_bytes'] < table['models'][2]['state_bytes'] < table['models'][0]['state_bytes']
    # with all layers put back the student is the teacher
    assert [m['softmax_layers'] for m in table['sweep']] == [0, 1, 2, 3, 4]
    assert table['sweep'][-1]['questions'] == dict(list(table['sweep'][0]['questions'].items()))
    for figure in ('layers.png', 'kl.png', 'softmax_layers.png'):
        assert (whole / 'report' / figure).stat().st_size > 5000


def test_stages_train_what_they_say(whole, teacher):
    files = {name: load_file(whole / 'stages' / f'{name}.safetensors') for name in ('new', 'qkv', 'linear', 'hybrid')}
    theirs = dict(tiny_teacher()[0].named_parameters())

    def changed(one, other, ending):
        return {not torch.equal(files[one][k], files[other][k]) for k in files[other] if k.endswith(ending)}

    for i in range(4):
        for part in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
            original = theirs[f'model.language_model.layers.{i}.self_attn.{part}.weight']
            assert torch.equal(files['new'][f'mixers.{i}.{part}.weight'], original)
            assert torch.equal(files['qkv'][f'mixers.{i}.{part}.weight'], original) == (part == 'o_proj')
    assert changed('new', 'qkv', 'dt_bias') == changed('qkv', 'linear', 'g_proj.weight') == {True}
    # published stage-3 files lack these two; here every file has all of a mixer
    assert changed('qkv', 'linear', 'dt_bias') == changed('qkv', 'linear', 'A_log_bias') == {False}
    hybrid = files['hybrid']
    assert {name.split('.')[1] for name in hybrid if name.startswith('mixers')} == {'1', '3'}
    assert torch.equal(hybrid['mixers.1.q_proj.weight'], files['qkv']['mixers.1.q_proj.weight'])
    assert any('adapters' in name and 'up_proj' in name for name in hybrid)
    state = read_checkpoint(whole / 'checkpoints' / 'last.ckpt')['state_dict']
    assert not any('embed' in name or 'norm1' in name for name in state), 'a checkpoint holds tensors of the teacher'


def test_first_step_of_each_stage_logs_its_start(whole):
    with open(whole / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    starts = {int(r['step']): float(r['stage/start_kl']) for r in rows if r['stage/start_kl']}
    assert list(starts) == [0, 3, 6, 9]
    layers = [int(r['step']) for r in rows if r['layers/00']]
    assert layers == list(range(6))
    # the start of a logits stage and its first training loss are the same batch
    kl = {int(r['step']): float(r['train/kl']) for r in rows if r['train/loss_step'] and r['train/kl']}
    assert kl[6] == pytest.approx(starts[6], rel=1e-5)


def test_resumes_to_the_bit_in_every_stage(whole, teacher, tmp_path, monkeypatch):
    from zoo.tasks import DistillVLM

    class Killed(BaseException):
        pass

    start = DistillVLM.on_train_batch_start
    args = [*arguments(tmp_path, teacher), '--run.test_after_fit=false', '--ckpt_path=last']
    for step in (2, 3, 5, 8, 11):  # 3: the first stage is finished, the second not entered

        def killed(self, batch, batch_idx, step=step):
            if self.global_step == step:
                raise Killed
            start(self, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(DistillVLM, 'on_train_batch_start', killed)
            with pytest.raises(Killed):
                main(args)
        assert read_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.ckpt')['global_step'] == step
    assert main(args) == 0
    for name in ('new', 'qkv', 'linear', 'hybrid'):
        ours, theirs = (load_file(f / 'stages' / f'{name}.safetensors') for f in (tmp_path / 'run', whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name
    ours, theirs = (read_checkpoint(f / 'checkpoints' / 'last.ckpt') for f in (tmp_path / 'run', whole))
    assert ours['global_step'] == theirs['global_step'] == 12
    for a, b in zip(ours['optimizer_states'][0]['state'].values(), theirs['optimizer_states'][0]['state'].values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in b)


def test_one_stage_alone(whole, teacher, tmp_path, capsys):
    args = [*arguments(tmp_path, teacher), '--run.test_after_fit=false', '--model.stage=linear']
    assert main([*args, f'--model.start_from={whole / "stages" / "qkv.safetensors"}']) == 0
    ours, theirs = (load_file(f / 'stages' / 'linear.safetensors') for f in (tmp_path / 'run', whole))
    key = 'mixers.0.dt_bias'  # frozen in this stage: it is the predecessor's
    assert torch.equal(ours[key], theirs[key])
    assert not (tmp_path / 'run' / 'stages' / 'qkv.safetensors').exists()
    assert main(args) == 2
    assert '--model.start_from runs/NAME/stages/qkv.safetensors' in capsys.readouterr().err
    assert main([*args, f'--model.start_from={whole / "stages" / "new.safetensors"}']) == 2
    assert "holds weights of stage 'new', this run goes on of stage 'qkv'" in capsys.readouterr().err
    assert main([*args, f'--model.start_from={whole / "checkpoints" / "last.ckpt"}']) == 2
    assert "holds weights of stage 'hybrid'" in capsys.readouterr().err
    assert main([*args, '--model.start_from=nowhere.safetensors']) == 2
    assert 'no such file: nowhere.safetensors' in capsys.readouterr().err


def test_wrong_teachers(teacher, tmp_path, capsys):
    assert main(arguments(tmp_path, tmp_path / 'nowhere')) == 2
    assert 'no teacher at' in capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    assert main(arguments(tmp_path, tmp_path / 'empty')) == 2
    assert 'no config.json' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'stages').exists()


def test_tokenizer_of_another_teacher(tmp_path, capsys):
    from zoo.data._words import word_processor

    model, _ = tiny_teacher()
    model.save_pretrained(tmp_path / 'other')
    word_processor(['some', 'other', 'words'], 48, 12).save_pretrained(tmp_path / 'other')
    assert main(arguments(tmp_path, tmp_path / 'other')) == 2
    assert "the data's tokenizer is not the teacher's" in capsys.readouterr().err


def test_bad_rows_are_counted_and_do_not_stop_the_report(teacher, tmp_path, capsys):
    def row(answer, **more):
        told = [{'from': 'human', 'value': 'what colour is it ?'}, {'from': 'gpt', 'value': answer}]
        return json.dumps({'conversations': told, **more})

    bad, long = row('red', image='nowhere.png'), row('red ' * 50)
    for name, rows in (('train', [row('red'), bad, long, row('blue')]), ('val', [bad, bad, long, row('red')])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(rows))
    args = arguments(tmp_path, teacher, stages=[{**STAGES[2], 'max_steps': 2}], from_scratch=True)
    config = yaml.safe_load((tmp_path / 'run.yaml').read_text())
    init = {'train': str(tmp_path / 'train.jsonl'), 'val': str(tmp_path / 'val.jsonl'), 'processor': str(teacher)}
    init |= {'batch_size': 4, 'eval_batch_size': 2, 'num_workers': 0, 'max_length': 40}
    config['data'] = {'class_path': 'zoo.data.Conversations', 'init_args': init}
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    assert main(args) == 0
    shown = capsys.readouterr()
    assert (
        '3 unreadable samples were skipped' in shown.out and '2 samples were longer than data.max_length' in shown.out
    )
    table = json.loads((tmp_path / 'run' / 'report' / 'table.json').read_text())
    assert table['models'][0]['questions'] == {'all': 1} and table['models'][1]['tokens_per_s'] > 0
    assert sum(line.startswith('│ all') for line in shown.out.splitlines()) == 1
    config['data']['init_args'] |= {'train': init['val'], 'val': init['train'], 'image_root': str(teacher)}
    rows = [bad] * 8
    (tmp_path / 'val.jsonl').write_text('\n'.join(rows))
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    assert main([*args, '--model.stages', json.dumps([{**STAGES[2], 'max_steps': 99}])]) == 2
    assert 'not one usable sample in 8 batches; for instance' in capsys.readouterr().err


def test_other_verbs_say_what_to_do(teacher, tmp_path, capsys):
    for verb in ('validate', 'test', 'predict'):
        assert main([verb, *arguments(tmp_path, teacher)[1:]]) == 2
        assert 'evaluate them with zoo eval-vlm RUN/hybrid' in capsys.readouterr().err


def test_softmax_layer_that_is_not_there(teacher, tmp_path, capsys):
    stages = [STAGES[0], {**STAGES[2], 'softmax_layers': [4]}]
    assert main([*arguments(tmp_path, teacher, stages=stages), '--trainer.limit_val_batches=0']) == 2
    assert 'keeps softmax in layers [4]; the teacher has 0 to 3' in capsys.readouterr().err


@pytest.mark.slow
def test_accumulation_of_a_stage(teacher, tmp_path):
    stages = [{**STAGES[0], 'accumulate': 2}, {**STAGES[1], 'accumulate': 1}]
    args = [*arguments(tmp_path, teacher, stages=stages), '--run.test_after_fit=false']
    assert main(args) == 0
    loops = read_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.ckpt')['loops']['fit_loop']
    assert loops['epoch_loop.batch_progress']['total']['ready'] == 8  # 2 + 2 + 1 (end of the epoch), then 3


# the report


def test_margin_kept():
    teacher = Measured('teacher', 4, 4, {'a': 90, 'b': 60}, {'a': 100, 'b': 100})
    student = Measured('linear', 0, 4, {'a': 80, 'b': 60}, {'a': 100, 'b': 100})
    chance = {'a': 0.5, 'b': 0.25}
    assert margin_kept(student, teacher, chance, 'a') == pytest.approx(0.3 / 0.4)
    assert margin_kept(student, teacher, chance, 'b') == 1
    assert margin_kept(student, teacher, chance, ALL) == pytest.approx((0.70 - 0.375) / (0.75 - 0.375))
    assert margin_kept(student, student, {'a': 0.9}, 'a') is None


@pytest.mark.parametrize('count', [1, 4, 6, 32])
def test_spread_order_visits_every_layer(count):
    order = spread_order(count)
    assert sorted(order) == list(range(count)) and order[0] == 0
    if count == 32:
        assert sorted(order[:8]) == list(range(0, 32, 4))


def test_set_trainable_by_role():
    student = Student(tiny_teacher()[0], 'mamba2', {}, stage('a'), seed=0)
    set_trainable(student.mixers, [], stage('b', train=['output']))
    names = {n.split('.', 2)[2] for n, p in student.named_parameters().items() if p.requires_grad}
    assert names == {'o_proj.weight'}
