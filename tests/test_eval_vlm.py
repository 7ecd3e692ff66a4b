"""zoo eval-vlm and the plug-ins: rows, scores, batches, files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from vlm_folders import tiny_llava, tiny_mmmamba

from zoo.cli import main
from zoo.errors import ZooError
from zoo.tools import eval_vlm
from zoo.tools._vlm_rows import BadRow, open_rows, questions_of
from zoo.tools._vlm_scores import exact_match, normalise_vqa, vqa_accuracy
from zoo.vlm.chat import Conversation, answer, load_vlm

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ('red', 'green', 'blue')


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp('llava')
    tiny_llava(folder)
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Questions in both forms, with and without images, and four bad rows."""
    folder = tmp_path_factory.mktemp('data')
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new('RGB', (30 + i, 30), colour).save(folder / f'{colour}.png')
        rows.append({'image': f'{colour}.png', 'question': 'what colour is it ?', 'answer': colour, 'type': 'colour'})
    turns = ['<image>\nhow many ?', 'one', 'what colour ?', 'red']
    speakers = ('human', 'gpt') * 2
    said = [{'from': s, 'value': v} for s, v in zip(speakers, turns)]
    rows.append({'image': str(folder / 'red.png'), 'conversations': said, 'type': 'talk'})
    rows.append({'question': 'how many ?', 'answers': [{'answer': 'two'}] * 10, 'type': 'text'})
    bad = [{'image': 'none.png', 'question': 'q', 'answer': 'a'}, {'question': 'q'}, [1], {'conversations': said[:1]}]
    text = ''.join(json.dumps(row) + '\n' for row in rows + bad) + '{broken\n'
    (folder / 'rows.jsonl').write_text(text)
    return folder / 'rows.jsonl'


def run(llava, data, *arguments):
    return main(['eval-vlm', str(llava), '--data', str(data), '--device', 'cpu', '--max-new-tokens', '3', *arguments])


def test_results_by_hand(llava, data, tmp_path, capsys):
    out = tmp_path / 'out'
    metrics = ('--metrics', 'exact', 'vqa', 'perplexity', '--batch-size', '4')
    assert run(llava, data, '--output', str(out), *metrics) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / 'results.json').read_text())
    rows = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    assert results['all']['questions'] == len(rows) == 6 and results['rows'] == 10
    assert {k: v['questions'] for k, v in results['by_type'].items()} == {'colour': 3, 'talk': 2, 'text': 1}
    assert results['all']['exact'] == pytest.approx(100 * sum(r['exact'] for r in rows) / 6, abs=1e-3)
    names = [bad['name'] for bad in results['bad']]
    assert results['bad_rows'] == 5 and names == [f'rows.jsonl:{i}' for i in (6, 7, 8, 9, 10)]
    reasons = ' '.join(bad['reason'] for bad in results['bad'])
    for word in ('none.png', 'has no answer', 'not an object', 'is not JSON'):
        assert word in reasons
    assert 'rows.jsonl:6' in shown and 'exact match' in shown and 'colour' in shown
    assert Image.open(out / 'mistakes.png').size[0] > 200
    assert sorted(f.name for f in out.iterdir()) == ['mistakes.png', 'predictions.jsonl', 'results.json']

    model, processor = load_vlm(llava, 'cpu')
    by_name = {row['name']: row for row in rows}
    images = [Image.open(data.parent / 'red.png')]
    alone = answer(model, processor, [Conversation([('user', 'what colour is it ?')], images)], max_new_tokens=3)
    assert by_name['rows.jsonl:1']['said'] == alone[0]
    talk = [('user', '<image>\nhow many ?'), ('assistant', 'one'), ('user', 'what colour ?')]
    alone = answer(model, processor, [Conversation(talk, images)], max_new_tokens=3)
    assert by_name['rows.jsonl:4 answer 2']['said'] == alone[0]
    row = by_name['rows.jsonl:1']
    inputs = processor(text='USER <image> what colour is it ? ASSISTANT red</s>', images=images, return_tensors='pt')
    ids = inputs['input_ids'][0]
    with torch.no_grad():
        logits = torch.log_softmax(model(**inputs).logits[0].float(), -1)
    expected = -sum(float(logits[i - 1, ids[i]]) for i in (len(ids) - 2, len(ids) - 1))
    assert row['tokens'] == 2 and row['nll'] == pytest.approx(expected, rel=1e-4)
    total = sum(r['nll'] for r in rows) / sum(r['tokens'] for r in rows)
    assert results['all']['perplexity'] == pytest.approx(2.718281828**total, rel=1e-4)


@pytest.mark.parametrize('hybrid', [False, True], ids=['linear', 'hybrid'])
def test_our_own_model_from_its_published_layout(hybrid, data, tmp_path):
    """Batches padded on the left answer as single questions do, whatever the number of tiles."""
    folder = tmp_path / 'model'
    folder.mkdir()
    tiny_mmmamba(folder, hybrid)
    out = tmp_path / 'out'
    assert run(folder, data, '--output', str(out), '--metrics', 'exact', 'perplexity', '--batch-size', '5') == 0
    rows = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    model, processor = load_vlm(folder, 'cpu')
    for row, colour in zip(sorted(rows, key=lambda row: row['name'])[:3], COLOURS):
        asked = Conversation([('user', row['question'])], [data.parent / f'{colour}.png'])
        assert answer(model, processor, [asked], max_new_tokens=3) == [row['said']]
    results = json.loads((out / 'results.json').read_text())
    assert results['all']['questions'] == 6 and results['bad_rows'] == 5 and results['all']['perplexity'] > 1


def test_a_model_that_knows_the_answer(llava, data, tmp_path, monkeypatch):
    monkeypatch.setattr('zoo.vlm.chat.answer', lambda m, p, c, **k: ['Red.' for _ in c])
    out = tmp_path / 'out'
    assert run(llava, data, '--output', str(out)) == 0
    results = json.loads((out / 'results.json').read_text())
    assert results['by_type']['colour']['exact'] == pytest.approx(33.333) and results['by_type']['talk']['exact'] == 50


def test_limit_draws_the_same_rows(llava, data, tmp_path):
    names = []
    for seed in ('0', '0', '2'):
        out = tmp_path / f'{len(names)}'
        assert run(llava, data, '--limit', '3', '--seed', seed, '--output', str(out), '--metrics', 'exact') == 0
        names.append([json.loads(line)['name'] for line in (out / 'predictions.jsonl').read_text().splitlines()])
        assert json.loads((out / 'results.json').read_text())['rows'] == 3
    assert names[0] == names[1] and len({tuple(n) for n in names}) > 1


def test_batches_do_not_change_answers(llava, data, tmp_path):
    said = []
    for size in ('1', '3'):
        out = tmp_path / size
        assert run(llava, data, '--batch-size', size, '--output', str(out), '--metrics', 'exact') == 0
        rows = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
        said.append({row['name']: row['said'] for row in rows})
    assert said[0] == said[1] and len(set(said[0].values())) > 1


def test_tables(llava, tmp_path):
    import datasets

    pictures = [Image.new('RGB', (28, 28), c) for c in COLOURS]
    columns = {'image': pictures, 'question': ['what colour ?'] * 3, 'answers': [[c] * 10 for c in COLOURS]}
    table = datasets.Dataset.from_dict(columns).cast_column('image', datasets.Image())
    table.to_parquet(str(tmp_path / 'test.parquet'))
    several = {'images': [[p, p] for p in pictures], 'question': ['same ?'] * 3, 'answer': ['one'] * 3}
    table = datasets.Dataset.from_dict(several).cast_column('images', datasets.List(datasets.Image()))
    (tmp_path / 'folder').mkdir()
    table.to_parquet(str(tmp_path / 'folder' / 'validation-0.parquet'))
    assert run(llava, tmp_path / 'test.parquet', '--output', str(tmp_path / 'a'), '--json') == 0
    assert run(llava, tmp_path / 'folder', '--split', 'validation', '--output', str(tmp_path / 'b')) == 0
    for name in 'ab':
        results = json.loads((tmp_path / name / 'results.json').read_text())
        assert results['all']['questions'] == 3 and not results['bad_rows']
    with pytest.raises(ZooError, match='give another --split'):
        open_rows(str(tmp_path / 'folder'), 'test', None, None)


def test_mistakes_in_the_arguments(llava, data, tmp_path, capsys):
    cases = [
        (['--data', 'missing.jsonl'], 'cannot read missing.jsonl'),
        (['--data', './nothing'], 'no such file or folder'),
        (['--data', str(data), '--limit', '0'], '--limit takes a positive number'),
        (['--data', str(data), '--images', str(tmp_path), '--limit', '1', '--seed', '5'], 'no question of'),
    ]
    for arguments, message in cases:
        assert main(['eval-vlm', str(llava), '--device', 'cpu', *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / 'a.json').write_text('{"a": 1}')
    assert main(['eval-vlm', str(llava), '--data', str(tmp_path / 'a.json')]) == 2
    assert 'not a list of rows' in capsys.readouterr().err
    (tmp_path / 'model').mkdir()
    assert main(['eval-vlm', str(tmp_path / 'model'), '--data', str(data)]) == 2
    assert 'cannot load' in capsys.readouterr().err
    assert not (tmp_path / 'runs').exists()


def test_rows_of_other_forms():
    messages = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'Q'}]
    (question,) = questions_of({'messages': [*messages, {'role': 'assistant', 'content': 'A'}]}, 'n', None)
    assert question.turns == [('system', 'S'), ('user', 'Q')] and question.answers == ['A']
    (question,) = questions_of({'prompt': 'Q', 'label': 3, 'images': ['a', 'b']}, 'n', Path('/x'))
    assert question.answers == ['3'] and question.images == ['/x/a', '/x/b']
    for row in ({'conversations': [{'from': 'gpt', 'value': 'A'}]}, {'conversations': [{'from': 'x', 'value': 'A'}]}):
        with pytest.raises(BadRow):
            questions_of(row, 'n', None)


def test_scores():
    assert exact_match(' Two  dogs. ', ['two dogs']) == 1 and exact_match('two', ['dogs']) == 0
    expected = {
        'The two  Dogs.': '2 dogs',
        'dont': "don't",
        '1,000': '1000',
        '3.5': '3.5',
        'x/y': 'x y',
        'a / b': 'b',
        'hello, world': 'hello world',
        'None': '0',
        'shouldnt\n': "shouldn't",
        '': '',
    }
    assert {text: normalise_vqa(text) for text in expected} == expected
    answers = ['yes'] * 2 + ['no'] * 8
    assert vqa_accuracy('No', answers) == 1
    # of ten leave-one-out groups, two hold one other "yes" and eight hold both
    assert vqa_accuracy('yes.', answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy('maybe', answers) == 0 and vqa_accuracy('The red', ['red']) == 1


def test_a_batch_that_the_processor_refuses(llava, data, tmp_path, monkeypatch):
    """One bad question does not take the others of its batch with it."""
    original = eval_vlm.Evaluation._score

    def score(self, batch):
        if any('many' in question.turns[-1][1] for question, _ in batch):
            raise ZooError('the processor refuses: too many')
        return original(self, batch)

    monkeypatch.setattr(eval_vlm.Evaluation, '_score', score)
    assert run(llava, data, '--output', str(tmp_path / 'out'), '--metrics', 'exact') == 0
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['all']['questions'] == 4 and results['bad_rows'] == 7


def test_vlmevalkit_adapter(llava, data):
    """The class inherits VLMEvalKit's base where it is installed; its interface is generate_inner alone."""
    from zoo.integrations.vlmevalkit import ZooVLM

    adapter = ZooVLM(str(llava), device='cpu', max_new_tokens=3)
    path = str(data.parent / 'red.png')
    message = [{'type': 'image', 'value': path}, {'type': 'text', 'value': 'what colour is it ?'}]
    model, processor = load_vlm(llava, 'cpu')
    conversation = Conversation([('user', '<image>\nwhat colour is it ?')], [path])
    assert adapter.generate_inner(message) == answer(model, processor, [conversation], max_new_tokens=3)[0]
    talk = [{'role': 'user', 'content': message}, {'role': 'assistant', 'content': [{'type': 'text', 'value': 'red'}]}]
    talk.append({'role': 'user', 'content': [{'type': 'text', 'value': 'how many ?'}]})
    assert isinstance(adapter.chat_inner(talk), str)
