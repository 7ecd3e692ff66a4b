"""InternLM2's tokenizer, read from a sentencepiece model that is trained here, against sentencepiece itself."""

import json
import random
import re

import pytest
from transformers import AutoTokenizer
from vlm_folders import BEHIND, RENAMED, TEXT, published_tokenizer

from zoo.errors import ZooError
from zoo.vlm.tokenizer import InternLM2Tokenizer

STRINGS = [
    'Hello world',
    ' leading',
    '   many leading',
    'two  and   three    spaces ',
    'new\nline\n\n  indented',
    'tab\there\r\n',
    '日本語と中文 emoji 😀👨‍👩‍👧 ünï e\u0301',
    '▁literal▁',
    'a' * 17,
    ' ' * 20,
    '1234567 3.14',
    '[UNUSED_TOKEN_0] a[UNUSED_TOKEN_1]b',
    '\u00a0nbsp\u200b\x00\x7f',
    '<0x41> <unk',
    '',
]
PROMPT = '<|im_start|>system\nTwo  spaces<|im_end|><|im_start|>user\n<img><IMG_CONTEXT></img>\nHi there 😀<|im_end|>'


@pytest.fixture(scope='module', params=[True, False], ids=['dummy_prefix', 'no_prefix'])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    model, ids = published_tokenizer(folder, request.param)
    return folder, model, ids, InternLM2Tokenizer.from_pretrained(folder)


def fuzz(count):
    rng = random.Random(0)
    letters, corpus = 'abcdeinort  \n\n.,()0123_-`é你😀▁', '\n'.join(TEXT)
    for k in range(count):
        if k % 2:
            yield ''.join(rng.choice(letters) for _ in range(rng.randint(1, 40)))
        else:
            start = rng.randrange(len(corpus))
            text = corpus[start : start + rng.randint(1, 80)]
            place = rng.randrange(len(text))
            yield text[:place] + text[place] * rng.randint(1, 9) + text[place:]


def test_encodes_and_decodes_as_sentencepiece(pair):
    _, model, _, tokenizer = pair
    for text in (*STRINGS, *fuzz(1500)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == model.encode(text), repr(text)
        assert tokenizer.decode(ids) == model.decode(ids), repr(text)


def test_special_tokens_cut_the_text(pair):
    """Every stretch between special tokens is encoded as a text of its own, as the published tokenizer does."""
    _, model, ids, tokenizer = pair
    expected = [ids['<s>']]
    for part in re.split(f'({"|".join(map(re.escape, (*RENAMED, *BEHIND)))})', PROMPT):
        expected += [ids[part]] if part in ids else model.encode(part)
    assert tokenizer(PROMPT).input_ids == expected
    assert tokenizer.decode(expected) == '<s>' + PROMPT
    shown = tokenizer.decode(expected, skip_special_tokens=True)
    assert re.fullmatch('system\nTwo  spaces ?user\n ?\nHi there 😀', shown)
    assert tokenizer('[UNUSED_TOKEN_3]', add_special_tokens=False).input_ids != [ids['<|im_start|>']]


def test_ids_and_settings_of_the_folder(pair):
    _, _, ids, tokenizer = pair
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert set(ids) == set(tokenizer.all_special_tokens)
    assert tokenizer.model_max_length == 8192 and tokenizer.padding_side == 'left' and tokenizer.pad_token == '</s>'
    batch = tokenizer(['a', 'a longer text'], padding=True)
    assert batch.attention_mask[0][0] == 0 and batch.input_ids[0][0] == ids['</s>']
    assert tokenizer('a', add_special_tokens=False).input_ids == tokenizer('a').input_ids[1:]


def test_saved_tokenizer_needs_nothing_of_ours(pair, tmp_path):
    _, _, _, tokenizer = pair
    tokenizer.save_pretrained(tmp_path)
    for loader in (InternLM2Tokenizer, AutoTokenizer):
        again = loader.from_pretrained(tmp_path)
        ids = again(PROMPT).input_ids
        assert ids == tokenizer(PROMPT).input_ids and again.decode(ids) == '<s>' + PROMPT
        assert again.padding_side == 'left' and again.all_special_tokens == tokenizer.all_special_tokens


def test_ids_from_older_files(tmp_path):
    """Folders without added_tokens_decoder list their ids in added_tokens.json."""
    _, ids = published_tokenizer(tmp_path)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    del config['added_tokens_decoder']
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    (tmp_path / 'added_tokens.json').write_text(json.dumps({t: i for t, i in ids.items() if i > 2}))
    tokenizer = InternLM2Tokenizer.from_pretrained(tmp_path)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ZooError, match=r'neither tokenizer.json nor tokenizer.model'):
        InternLM2Tokenizer.from_pretrained(tmp_path)
    (tmp_path / 'tokenizer.model').write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ZooError, match='LFS'):
        InternLM2Tokenizer.from_pretrained(tmp_path)
    published_tokenizer(tmp_path)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    config['added_tokens_decoder']['999'] = {'content': '<img>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    with pytest.raises(ZooError, match="'<img>' of the tokenizer has two ids"):
        InternLM2Tokenizer.from_pretrained(tmp_path)
