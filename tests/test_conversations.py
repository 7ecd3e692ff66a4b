"""Conversations from disk: any processor, labels on answers alone, bad rows named, too long ones counted."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import Conversations, Digits, ImageQuestions, conversations
from zoo.data._words import CHAT_TEMPLATE, word_processor, word_tokenizer
from zoo.data.chat import IGNORED, ChatEncoder, Sample, check_tokens, model_inputs, turn_numbers
from zoo.errors import ZooError

WORDS = 'what is it this a red dog cat two things and'.split()


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(kind):
    if kind == 'llava':
        return word_processor(WORDS, 28, 7)
    if kind == 'idefics3':
        from transformers import Idefics3ImageProcessor, Idefics3Processor

        tokenizer = word_tokenizer([*WORDS, '<fake_token_around_image>', '<end_of_utterance>', '<global-img>'])
        images = Idefics3ImageProcessor(
            size={'longest_edge': 28}, max_image_size={'longest_edge': 28}, do_image_splitting=False
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_tokens(['<|image_pad|>', '<|video_pad|>', '<|vision_start|>', '<|vision_end|>'], special_tokens=True)
    tokenizer.image_token, tokenizer.video_token = '<|image_pad|>', '<|video_pad|>'
    images = Qwen2VLImageProcessor(patch_size=7, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56)
    template = CHAT_TEMPLATE.replace('<image>', '<|vision_start|><|image_pad|><|vision_end|>')
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


MIXED = [
    Sample([('<image>\nwhat is it', 'a red dog'), ('what is this', 'cat')], [picture(30, 40)], 'one'),
    Sample([('what is it', 'two things')], [], 'text'),
    Sample(
        [('<image> and <image> what', 'a cat'), ('<image>what is this', 'red')],
        [picture(20, 20), picture(28, 28), picture(40, 20)],
        'three',
    ),
]


def answers_in(batch, tokenizer):
    turns = turn_numbers(batch['labels'])
    found = []
    for row, numbers in enumerate(turns):
        found.append([tokenizer.decode(batch['labels'][row][numbers == t]) for t in range(int(numbers.max()) + 1)])
    return found


@pytest.mark.parametrize('kind', ['llava', 'idefics3', 'qwen2_vl'])
def test_labels_are_the_answers(kind):
    """Several images, several turns and text-only rows in one batch."""
    made = processor(kind)
    batch, left_out = ChatEncoder(made, max_length=200, prompts=True)(MIXED)
    assert not left_out and not batch['failures']
    expected = [[f'{answer} <end>' for _, answer in sample.turns] for sample in MIXED]
    assert answers_in(batch, made.tokenizer) == expected
    ids, labels = batch['input_ids'], batch['labels']
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    mask = batch['attention_mask']
    assert torch.equal(mask, mask.cummin(1).values), 'not padded on the right'
    prompts = batch['prompts']
    assert torch.equal(prompts['attention_mask'], prompts['attention_mask'].cummax(1).values), 'not padded on the left'
    said = [text.removesuffix('<assistant>') != text for text in made.tokenizer.batch_decode(prompts['input_ids'])]
    assert len(said) == 5 and all(said)
    assert set(model_inputs(batch)) == set(prompts)
    text_only, _ = ChatEncoder(made, max_length=200)(MIXED[1:2])
    assert 'pixel_values' not in text_only


def test_template_without_end_gets_the_end_token():
    made = processor('llava')
    template = "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    template += "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
    encoder = ChatEncoder(made, max_length=200, chat_template=template)
    assert encoder.render(MIXED[1])[0] == 'user: what is it assistant: two things<end> '
    batch, _ = encoder(MIXED[1:2])
    assert answers_in(batch, made.tokenizer) == [['two things <end>']]


def test_too_long_samples():
    made = processor('llava')
    batch, left_out = ChatEncoder(made, max_length=40)(MIXED)
    assert left_out == [2] and batch['name'] == ['one', 'text'] and batch['dropped'] == [('three', 62)]
    with pytest.raises(ZooError, match='three has 62 tokens, more than data.max_length 40'):
        ChatEncoder(made, max_length=40, too_long='error')(MIXED)


def test_mismatched_processor_is_refused():
    from transformers import LlamaConfig, LlavaConfig

    made = processor('llava')
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=len(made.tokenizer)), image_token_index=5)
    check_tokens(made, config)
    config.text_config.vocab_size -= 1
    with pytest.raises(ZooError, match='the processor has 17 tokens, the model .* only 16'):
        check_tokens(made, config)
    config.text_config.vocab_size, config.image_token_id = 100, 7
    with pytest.raises(ZooError, match='writes images as token 5 .* expects 7'):
        check_tokens(made, config)


# files


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A processor, images and rows, of which some are bad in every way."""
    root = tmp_path_factory.mktemp('chat')
    processor('llava').save_pretrained(root / 'processor')
    for number in range(6):
        picture(30, 40, number).save(root / f'{number}.png')
    (root / 'broken.png').write_bytes((root / '0.png').read_bytes()[:60])
    rows = [turn(f'{i % 6}.png', 'what is it', 'a red dog') for i in range(20)]
    rows[1] = {'conversations': [say('human', 'what is it'), say('gpt', 'two things')]}
    rows[2] = {'messages': [{'role': 'user', 'content': 'what'}, {'role': 'assistant', 'content': 'cat'}]}
    rows[3] = {'image': '1.png', 'question': 'what is this', 'answer': 'cat', 'question_type': 'animal'}
    (root / 'good.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
    bad = [
        ('{"image": ', 'JSONDecodeError'),
        (json.dumps({'image': '0.png'}), 'no conversations'),
        (json.dumps(turn('nowhere.png', 'what', 'cat')), 'FileNotFoundError'),
        (json.dumps(turn('broken.png', 'what', 'cat')), 'OSError'),
        (json.dumps(turn('0.png', '<image><image>what', 'cat')), '2 <image> placeholders, but 1 images'),
        (json.dumps({'conversations': [say('gpt', 'cat')]}), "message 0 is from 'gpt' where a question is due"),
        (json.dumps({'conversations': [say('human', 'what')]}), 'does not end with an answer'),
        ('[1, 2]', 'not an object'),
        (json.dumps({'conversations': 'what'}), 'the conversation is not a list of messages'),
        (json.dumps({'conversations': [say('human', 'what'), say('gpt', None)]}), 'message 1 has no text but NoneType'),
        (
            json.dumps({'messages': [{'role': 'user', 'content': [{'type': 'video'}]}, {'role': 'assistant'}]}),
            'message 0 has a video, neither text nor image',
        ),
    ]
    (root / 'bad.jsonl').write_text('\n'.join([line for line, _ in bad] + [json.dumps(rows[0])] * 4) + '\n')
    return root, [words for _, words in bad]


def say(who, text):
    return {'from': who, 'value': text}


def turn(image, question, answer):
    return {'image': image, 'conversations': [say('human', question), say('gpt', answer)]}


def module(root, train='good.jsonl', **kwargs):
    options = {'batch_size': 4, 'num_workers': 0, **kwargs}
    data = Conversations(str(root / train), str(root / 'processor'), **options)
    data.setup()
    return data


def test_json_lines(folder):
    data = module(folder[0], val_fraction=0.2)
    assert (len(data.splits['train']), len(data.splits['val'])) == (16, 4)
    data = module(folder[0], val=str(folder[0] / 'good.jsonl'))
    batches = list(data.val_dataloader())
    names = [name for batch in batches for name in batch['name']]
    assert names[:2] == [f'{folder[0]}/good.jsonl:1', f'{folder[0]}/good.jsonl:3'], 'empty lines count'
    assert answers_in(batches[0], data.processor.tokenizer) == [
        ['a red dog <end>'],
        ['two things <end>'],
        ['cat <end>'],
        ['cat <end>'],
    ]
    assert batches[0]['question_type'] == [['all'], ['all'], ['all'], ['animal']]
    assert len(batches[0]['pixel_values']) == 2


def test_order_is_keyed_and_batches_keep_their_size(folder):
    one, two = (
        list(module(folder[0], 'bad.jsonl', val=str(folder[0] / 'good.jsonl')).train_dataloader()) for _ in '12'
    )
    assert [b['name'] for b in one] == [b['name'] for b in two]
    assert all(len(b['name']) == 4 for b in one), 'other rows take the place of bad ones'


def test_bad_rows_are_named(folder):
    root, words = folder
    data = module(root, val=str(root / 'bad.jsonl'))
    batches = list(data.val_dataloader())
    failures = [f for batch in batches for f in batch['failures']]
    assert [name for name, _ in failures] == [f'{root}/bad.jsonl:{i}' for i in range(1, 12)]
    for (_, error), word in zip(failures, words):
        assert word in error
    assert sum(len(batch['name']) for batch in batches) == 4
    with pytest.warns(RuntimeWarning, match=r'skipped unreadable sample .*bad.jsonl:1 .JSONDecodeError'):
        data.report_failures(failures)
    data.report_failures(failures)
    assert data.skipped == 11, 'a row that is met again counts once'
    data.strict = True
    with pytest.raises(ZooError, match='unreadable sample: .*bad.jsonl:1'):
        data.report_failures(failures)


@pytest.mark.parametrize('indent', [None, 1])
def test_one_list_as_llava_publishes_it(folder, indent):
    root = folder[0]
    rows = [turn('1.png', 'what is it', 'a red dog'), turn('nowhere.png', 'what', 'cat'), 'no row']
    (root / 'list.json').write_text(json.dumps(rows, indent=indent))
    batch = next(iter(module(root, val=str(root / 'list.json')).val_dataloader()))
    assert batch['name'] == [f'{root}/list.json row 0'] and len(batch['pixel_values']) == 1
    assert [name for name, _ in batch['failures']] == [f'{root}/list.json row 1', f'{root}/list.json row 2']
    (root / 'lines.json').write_text((root / 'good.jsonl').read_text())
    assert len(module(root, 'lines.json', val=str(root / 'list.json')).splits['train']) == 20
    (root / 'cut.json').write_text(json.dumps(rows)[:-5])
    with pytest.raises(ZooError, match='cut.json is no list of JSON rows'):
        module(root, 'cut.json')


def test_data_that_are_wrong_as_a_whole(folder):
    data = module(folder[0], val=str(folder[0] / 'good.jsonl'), image_root=str(folder[0] / 'processor'))
    data.splits['train'] = data.splits['val'] = conversations._Part(data.splits['train'], [0, 5, 6, 7])
    batch = next(iter(data.train_dataloader()))
    assert not batch['name'] and len(batch['failures']) > 4
    with pytest.warns(RuntimeWarning, match='3 so far'):
        data.count_unusable(batch)
    with pytest.raises(ZooError, match='not one usable sample in 8 batches; .*png'):
        for _ in range(9):
            data.count_unusable(batch, training=True)
    data = module(folder[0], val=str(folder[0] / 'good.jsonl'), max_length=4)
    batch = next(iter(data.train_dataloader()))
    with pytest.warns(RuntimeWarning, match='left out .*good.jsonl:.* tokens, data.max_length is 4; 1 so far'):
        data.count_unusable(batch)
    assert data.dropped == len(dict(batch['dropped'])) > 4


def test_data_set(folder, tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(
        {
            'image': datasets.Image(),
            'conversations': [{'from': datasets.Value('string'), 'value': datasets.Value('string')}],
        }
    )
    rows = {
        'image': [picture(20, 20), None, picture(30, 20)],
        'conversations': [
            turn('', 'what is it', answer)['conversations'] for answer in ('cat', 'two things', 'red dog')
        ],
    }
    for split in ('train', 'test'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f'{split}-0.parquet')
    data = Conversations(
        str(tmp_path),
        str(folder[0] / 'processor'),
        num_workers=0,
        batch_size=1,
        val_fraction=0.3,
        cache_dir=str(tmp_path),
    )
    data.setup()
    assert {split: len(source) for split, source in data.splits.items()} == {'train': 2, 'val': 1, 'test': 3}
    batch = next(iter(module_loader(data, 'test', 3)))
    assert not batch['failures'] and len(batch['pixel_values']) == 2
    assert answers_in(batch, data.processor.tokenizer) == [['cat <end>'], ['two things <end>'], ['red dog <end>']]


def module_loader(data, split, batch_size):
    data.eval_batch_size = batch_size
    return data._loader(split, data._sampler(split, shuffle=False), data.encoder())


@pytest.fixture(scope='module')
def shards(folder):
    """Three shards of ten conversations; one without image, one broken, one without text."""
    root = folder[0] / 'shards'
    root.mkdir()
    for number in range(3):
        with tarfile.open(root / f'part-{number}.tar', 'w') as tar:
            for key in range(10):
                image = io.BytesIO()
                picture(20, 20, 10 * number + key).save(image, 'PNG')
                data = image.getvalue()[: 50 if key == 4 else None]
                row = json.dumps(turn(None, 'what is it', 'a red dog')).encode()
                members = {'png': data, 'json': row}
                members.pop({3: 'png', 5: 'json'}.get(key, ''), None)
                for ending, content in members.items():
                    member = tarfile.TarInfo(f'{number}-{key}.{ending}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f'{root}/part-{{0..2}}.tar'


def test_shards(folder, shards):
    data = Conversations(
        shards,
        str(folder[0] / 'processor'),
        val=shards,
        train_samples=24,
        batch_size=4,
        num_workers=0,
        shuffle_buffer=8,
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 6 and all(len(b['name']) == 4 for b in batches), 'bad samples are replaced'
    again = list(data.train_dataloader())
    assert [b['name'] for b in batches] == [b['name'] for b in again]
    data._resume_at = (0, 2)
    assert [b['name'] for b in data.train_dataloader()] == [b['name'] for b in batches[2:]]
    val = list(data.val_dataloader())
    failures = [name for batch in val for name, _ in batch['failures']]
    assert len(failures) == 6 and failures[0].endswith('part-0.tar:0-4')
    assert sum(len(b['name']) for b in val) == 24
    assert any(len(b['pixel_values']) < len(b['name']) for b in val), 'text-only samples are allowed'


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'train': 'nowhere.jsonl'}, 'no such file: .*nowhere.jsonl'),
        ({'image_root': '/nowhere'}, 'no such folder: /nowhere'),
        ({'chat_template': '/nowhere.jinja'}, 'no such file: /nowhere.jinja'),
        ({'train': 'part.tar'}, 'need --data.val and --data.train_samples'),
    ],
)
def test_bad_settings(folder, change, words):
    with pytest.raises(ZooError, match=words):
        module(folder[0], **change)


def test_missing_processor(folder):
    data = Conversations(str(folder[0] / 'good.jsonl'), './nowhere')
    with pytest.raises(ZooError, match='no such folder: ./nowhere'):
        _ = data.processor


# labelled images


def test_image_questions():
    data = ImageQuestions(Digits(), size=8, patch_size=4, batch_size=4, num_workers=0, hflip=0.5, shift=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch['question'][0] == ['<image>what is this'] and data.chance() == {'class': 0.1}
    assert answers_in(batch, data.processor.tokenizer) == [[f'{a[0]} <end>'] for a in batch['answer']]
    source = data.splits['train']
    pixels = [np.array(source.load_many([(epoch, 7)])[0].images[0]) for epoch in (0, 0, 1, 2, 3)]
    assert np.array_equal(pixels[0], pixels[1]), 'the same epoch and index are moved alike'
    assert not all(np.array_equal(pixels[0], other) for other in pixels[2:])
