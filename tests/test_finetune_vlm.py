"""Training of a vision-language model from nothing: run folder, report, exported folder, resume, adapters, errors."""

import csv
import json

import pytest
import torch

from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.data import Shapes
from zoo.data.chat import Sample, model_inputs
from zoo.errors import ZooError
from zoo.tasks import FinetuneVLM
from zoo.tasks.vlm import Lora, Tally, add_lora, answer_logits, build_vlm, generate_answers, save_folder

TEXT = {'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2}
TEXT |= {'num_attention_heads': 2, 'num_key_value_heads': 1, 'initializer_range': 0.1}
VISION = {'model_type': 'siglip_vision_model', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 1}
VISION |= {'num_attention_heads': 2, 'image_size': 48, 'patch_size': 16, 'vision_use_head': False}
NET = {'model_type': 'llava', 'text_config': TEXT, 'vision_config': VISION}
NET |= {'vision_feature_layer': -1, 'vision_feature_select_strategy': 'full'}

COMMON = [
    '--seed_everything=3',
    '--model=zoo.tasks.FinetuneVLM',
    f'--model.net={json.dumps(NET)}',
    '--model.optim={lr: 5e-3, lr_per: null}',
    '--model.schedule.warmup_epochs=0.2',
    '--model.ema={decay: 0.9, warmup: true}',
    '--model.max_new_tokens=4',
    '--data=zoo.data.Shapes',
    '--data.patch_size=16',
    '--data.batch_size=4',
    '--data.ask=[colour, count, position, relation]',
    '--data.train_images=40',
    '--data.val_images=16',
    '--data.test_images=16',
    '--data.num_workers=0',
    '--trainer.max_epochs=2',
    '--trainer.accelerator=cpu',
    '--trainer.gradient_clip_val=1',
    '--run.monitor=val/exact',
    '--run.threads=1',
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run of 20 steps."""
    root = tmp_path_factory.mktemp('runs')
    assert main(['fit', *COMMON, f'--run.root={root}', '--run.name=whole']) == 0
    return root / 'whole'


def test_run_folder(run, capsys):
    assert {p.name for p in (run / 'checkpoints').iterdir()} == {'best.ckpt', 'last.ckpt', 'previous.ckpt'}
    report = {p.name for p in (run / 'report').iterdir()}
    assert report == {'curves.png', 'exact_match.csv', 'mistakes.png', 'answers.jsonl'}
    with open(run / 'report' / 'exact_match.csv', newline='') as file:
        table = {row['type']: row for row in csv.DictReader(file)}
    assert list(table) == ['colour', 'count', 'position', 'relation', 'all']
    assert table['colour']['chance'] == '0.1250'
    answers = [json.loads(line) for line in (run / 'report' / 'answers.jsonl').read_text().splitlines()]
    right = sum(row['answer'] == row['truth'] for row in answers)
    assert len(answers) == 16 and float(table['all']['exact_match']) == pytest.approx(right / 16, abs=1e-4)
    with open(run / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    losses = [float(row['train/loss_epoch']) for row in rows if row['train/loss_epoch']]
    assert losses[1] < losses[0]
    assert any(row['val/exact_relation'] for row in rows)
    assert main(['test', f'--ckpt_path={run / "checkpoints" / "best.ckpt"}', f'--output={run / "again"}']) == 0
    out = capsys.readouterr().out
    assert f'test exact match: {100 * right / 16:.2f} %  (colour ' in out
    assert (run / 'again' / 'mistakes.png').is_file()


def test_exported_folder_answers_alike(run):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(run / 'model').eval()
    processor = AutoProcessor.from_pretrained(run / 'model')
    data = Shapes(patch_size=16, test_images=16, num_workers=0)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    said = generate_answers(model, batch['prompts'], processor.tokenizer, 4)
    written = [json.loads(line)['answer'] for line in (run / 'report' / 'answers.jsonl').read_text().splitlines()]
    assert said == written
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert len(processor.tokenizer) == model.config.text_config.vocab_size


def test_forced_exact_match_is_that_of_generation(run):
    """Whether every true token is the most probable one behind true ones, and whether generation gives the answer."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(run / 'model').eval()
    data = Shapes(patch_size=16, test_images=64, num_workers=0, eval_batch_size=64)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    said = generate_answers(model, batch['prompts'], data.processor.tokenizer, 4)
    assert forced(model, batch) == [a == t[0] for a, t in zip(said, batch['answer'])]
    # with its own words for truth; a network this raw seldom ends an answer, so the end is left out
    own = [Sample([(q[0], answer)], [image]) for q, answer, image in zip(batch['question'], said, batch['image'])]
    assert all(forced(model, data.encoder()(own)[0], but_end=True))


@torch.no_grad()
def forced(model, batch, but_end=False):
    logits, target, turns = answer_logits(model, batch)
    ignored = (turns < 0) | (but_end & (target == model.generation_config.eos_token_id))
    return ((logits.argmax(-1) == target) | ignored).all(1).tolist()


def test_resume_is_bit_exact(run, tmp_path, monkeypatch):
    args = ['fit', *COMMON, f'--run.root={tmp_path}', '--run.name=cut', '--run.save_every_n_steps=3']
    args += ['--run.test_after_fit=false', '--trainer.enable_progress_bar=false']
    start = FinetuneVLM.on_train_batch_start

    def killed(self, batch, batch_idx):
        if self.global_step == 8:
            raise RuntimeError('killed')
        start(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match='killed'):
        patched.setattr(FinetuneVLM, 'on_train_batch_start', killed)
        main(args)
    assert read_checkpoint(tmp_path / 'cut' / 'checkpoints' / 'last.ckpt')['global_step'] == 6
    assert main([*args, '--ckpt_path=last']) == 0
    mine, theirs = (read_checkpoint(f / 'checkpoints' / 'last.ckpt') for f in (tmp_path / 'cut', run))
    assert mine['global_step'] == theirs['global_step'] == 20
    assert mine['state_dict'].keys() == theirs['state_dict'].keys()
    assert any(key.startswith('ema.') for key in mine['state_dict'])
    for key, value in mine['state_dict'].items():
        assert torch.equal(value, theirs['state_dict'][key]), key
    assert (tmp_path / 'cut' / 'model' / 'config.json').is_file(), 'exported without a test too'


@pytest.fixture(scope='module')
def batch():
    data = Shapes(patch_size=16, batch_size=4, train_images=8, num_workers=0)
    data.setup()
    return data.processor, next(iter(data.train_dataloader()))


def test_logits_are_those_of_the_whole_sequence(batch):
    processor, batch = batch
    net = build_vlm(NET, processor).eval()
    with torch.no_grad():
        logits, target, turns = answer_logits(net, batch)
        whole = net(**model_inputs(batch)).logits[:, :-1]
    answer = batch['labels'][:, 1:] >= 0
    assert torch.equal(batch['labels'][:, 1:][answer], target[target >= 0])
    assert torch.allclose(whole[answer], logits[target >= 0], atol=1e-5)
    assert torch.equal(target >= 0, turns >= 0) and int(turns.max()) == len(batch['answer'][0]) - 1


def test_lora_trains_adapters_and_exports_them_merged(batch, tmp_path):
    pytest.importorskip('peft')
    from transformers import AutoModelForImageTextToText

    processor, batch = batch
    net = add_lora(build_vlm(NET, processor), Lora(r=2, alpha=4, targets=['q_proj', 'v_proj']))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained and all('lora_' in name for name in trained)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        logits, target, _ = answer_logits(net, batch)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    save_folder(net.eval(), processor, tmp_path / 'model')
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / 'model').eval()
    with torch.no_grad():
        assert torch.allclose(answer_logits(merged, batch)[0], answer_logits(net, batch)[0], atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ['model'], 'temporary files are left'


@pytest.mark.parametrize(
    ('net', 'words'),
    [
        ({**NET, 'model_type': 'lava'}, "'lava' is no model type of transformers; close: llava"),
        ('/nowhere', 'cannot load a vision-language model from /nowhere'),
        ({**NET, 'text_config': {**TEXT, 'num_attention_heads': 'two'}}, 'cannot build a llava model'),
    ],
)
def test_models_that_cannot_be_built(net, words, batch):
    with pytest.raises(ZooError, match=words):
        build_vlm(net, batch[0])


def test_mismatches_are_refused_before_training(tmp_path, capsys):
    small = {**NET, 'text_config': {**TEXT, 'vocab_size': 20}}
    args = ['fit', *COMMON, f'--run.root={tmp_path}']
    assert main([*args, f'--model.net={json.dumps(small)}']) == 2
    assert 'the processor has 43 tokens, the model (llava) only 20' in capsys.readouterr().err
    others = [a for a in COMMON if not a.startswith('--data')]
    assert main(['fit', *others, '--data=zoo.data.Digits', f'--run.root={tmp_path}']) == 2
    assert 'Digits has no conversations' in capsys.readouterr().err


def test_tally():
    tally = Tally()
    for kind, right in (('a', True), ('a', False), ('b', True)):
        tally.add(kind, right)
    assert (tally.exact('a'), tally.exact('b'), tally.exact()) == (0.5, 1.0, pytest.approx(2 / 3))
