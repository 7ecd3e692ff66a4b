"""Tiling, prompts and batches of HoVLE's processor, and conversations on a tiny model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PretrainedConfig
from vlm_folders import noise, published_config, published_tokenizer, tiny_llava

from zoo.errors import ZooError
from zoo.vlm import processing
from zoo.vlm.chat import ChatMixin, Conversation, answer, chat, load_vlm, prompt
from zoo.vlm.processing import CHAT_TEMPLATES, SYSTEM_MESSAGE, HoVLEImageProcessor, HoVLEProcessor, read_image

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    published_tokenizer(folder)
    published_config(folder)
    return folder


@pytest.fixture(scope='module')
def processor(published):
    return HoVLEProcessor.from_pretrained(published)


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp('llava')
    tiny_llava(folder)
    return folder


def grid_of(width, height, most=12, side=448):
    """The rule of the specification, written out: closest aspect, later grids win ties if the image is large enough."""
    grids = sorted(((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most), key=np.prod)
    best, least = (1, 1), float('inf')
    for i, j in grids:
        off = abs(width / height - i / j)
        if off < least or (off == least and width * height > 0.5 * side**2 * i * j):
            best, least = (i, j), off
    return best


def tiles_by_pillow(image, side=448):
    columns, rows = grid_of(*image.size)
    large = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    tiles = [
        large.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255 for tile in tiles])


@pytest.mark.parametrize('size', [(300, 200), (448, 448), (1000, 1000), (1600, 400), (33, 777)])
def test_tiles_are_those_of_pillow(size):
    image = noise(*size)
    found = HoVLEImageProcessor()(image, return_tensors='pt')
    expected = tiles_by_pillow(image)
    assert found['pixel_values'].shape == expected.shape and found['num_patches'].tolist() == [len(expected)]
    levels = (found['pixel_values'] * STD + MEAN - expected).abs() * 255
    assert levels.max() <= 2.01 and levels.mean() < 0.05  # two roundings to 8 bits, one per pass of the filter


def test_grids_for_every_aspect():
    tiler = HoVLEImageProcessor()
    sizes = {(w, h) for w in range(20, 2000, 90) for h in range(20, 2000, 90)} | {(w * 7, 448) for w in range(1, 600)}
    ties = [(448, 448), (896, 896), (640, 640), (448, 896), (500, 1000), (2000, 1000), (317, 317), (633, 633)]
    for width, height in (*sizes, *ties):
        columns, rows = grid_of(width, height)
        tiles = columns * rows
        assert tiler.get_number_of_image_patches(height, width) == tiles + (tiles > 1), (width, height)
    assert grid_of(448, 448) == (1, 1) and grid_of(900, 900) == (2, 2) and grid_of(5000, 5000) == (3, 3)


def test_images_of_one_size_are_batched_as_one_by_one():
    images = [noise(300, 200, 1), noise(90, 400, 2), noise(300, 200, 3)]
    tiler = HoVLEImageProcessor(max_patches=4)
    together = tiler(images, return_tensors='pt')
    alone = [tiler(image, return_tensors='pt')['pixel_values'] for image in images]
    assert together['num_patches'].tolist() == [len(tiles) for tiles in alone]
    assert torch.equal(together['pixel_values'], torch.cat(alone))


def test_settings_change_the_tiles():
    image = noise(1600, 800)
    assert len(HoVLEImageProcessor(use_thumbnail=False)(image)['pixel_values']) == 8
    assert len(HoVLEImageProcessor()(image, max_patches=2)['pixel_values']) == 3
    assert len(HoVLEImageProcessor(crop_to_patches=False)(image)['pixel_values']) == 1
    assert HoVLEImageProcessor(size=28)(image, return_tensors='pt')['pixel_values'].shape[-2:] == (28, 28)
    assert HoVLEImageProcessor(use_thumbnail=False).get_number_of_image_patches(800, 1600) == 8


def test_every_kind_of_image(tmp_path):
    image = noise(60, 40)
    image.save(tmp_path / 'a.png')
    kinds = [image, tmp_path / 'a.png', str(tmp_path / 'a.png'), (tmp_path / 'a.png').read_bytes(), np.array(image)]
    tiler = HoVLEImageProcessor(size=28)
    values = [tiler([kind], return_tensors='pt')['pixel_values'] for kind in kinds]
    assert all(torch.equal(values[0], v) for v in values)
    assert read_image(Image.new('RGBA', (4, 4))).mode == read_image(Image.new('L', (4, 4))).mode == 'RGB'
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / 'turned.jpg', exif=turned)
    assert read_image(tmp_path / 'turned.jpg').size == (40, 60)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:200])
    for bad in (tmp_path / 'cut.png', str(tmp_path / 'missing.png'), b'no image', 'http://127.0.0.1:9/a.png'):
        with pytest.raises(ZooError, match='cannot read image'):
            tiler([bad])
    with pytest.raises(ZooError, match='cannot read image: .* not int'):
        read_image(5)


def test_image_tokens_and_left_padding(processor):
    texts = ['<image>\nWhat?', 'One <image> and <image>', 'no picture']
    images = [noise(300, 200), [noise(1600, 400), noise(20, 20)], []]
    out = processor(images=images, text=texts, padding=True, return_tensors='pt')
    tiles = [7, 5 + 1, 0]
    assert (out['input_ids'] == processor.image_token_id).sum(1).tolist() == [256 * n for n in tiles]
    assert out['pixel_values'].shape == (sum(tiles), 3, 448, 448) and set(out) == set(processor.model_input_names)
    assert out['attention_mask'][:, -1].tolist() == [1, 1, 1] and out['attention_mask'][2, 0] == 0
    written = '<s>One <img>' + '<IMG_CONTEXT>' * 1280 + '</img> and <img>' + '<IMG_CONTEXT>' * 256 + '</img>'
    assert processor.tokenizer.decode(out['input_ids'][1][out['attention_mask'][1].bool()]) == written
    flat = processor(images=[images[0], *images[1]], text=texts, padding=True, return_tensors='pt')
    assert all(torch.equal(flat[key], out[key]) for key in out)
    right = processor(text=['a', 'longer text'], padding=True, padding_side='right', return_tensors='pt')
    assert right['attention_mask'][0].tolist()[-1] == 0 and 'pixel_values' not in right
    assert processor(text='<s>a')['input_ids'] == processor(text='a')['input_ids']
    assert processor(images=noise(20, 20), return_tensors='pt')['pixel_values'].shape == (1, 3, 448, 448)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(text='<image><image>', images=[noise(20, 20)]), 'have 2 <image>, but 1 images'),
        (dict(text='nothing', images=noise(20, 20)), 'have 0 <image>, but 1 images'),
        (dict(text=['<image>', 'b'], images=[[], [noise(20, 20)]]), 'text 0 has 1 <image>, but 0 images'),
        (dict(text=['<image>', 'b'], images=[[noise(20, 20)]]), '1 lists of images for 2 texts'),
        (dict(text='<image>', images='missing.png'), 'cannot read image missing.png'),
        (dict(text='<img><IMG_CONTEXT><IMG_CONTEXT></img>', images=noise(9, 9)), 'once for an image'),
        (dict(text='a long text', max_length=3), 'max_length is 3'),
        (dict(text='<image>', images=noise(20, 20), max_length=99, truncation=True), '256 of them of images'),
    ],
)
def test_mistakes_are_named(processor, arguments, message):
    with pytest.raises(ZooError, match=message):
        processor(**arguments)


def test_truncation_and_configured_length(processor, published):
    ids = processor(text='a long text')['input_ids'][0]
    assert processor(text='a long text', max_length=3, truncation=True)['input_ids'] == [ids[:3]]
    short = HoVLEProcessor.from_pretrained(published, max_length=5)
    assert short(text='a')['input_ids']
    with pytest.raises(ZooError, match='max_length is 5'):
        short(text='a text that is far too long')


def test_chat_template(processor):
    image = noise(20, 20)
    messages = [
        {'role': 'user', 'content': [{'type': 'image', 'image': image}, {'type': 'text', 'text': 'What?'}]},
        {'role': 'assistant', 'content': 'A cat.'},
        {'role': 'user', 'content': 'Sure?'},
    ]
    expected = (
        f'<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|><|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>'
        '<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|>'
    )
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    shown = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == expected + '<|im_start|>assistant\n'
    short = processor.apply_chat_template([{'role': 'system', 'content': 'S'}, messages[2]], tokenize=False)
    assert short == '<|im_start|>system\nS<|im_end|><|im_start|>user\nSure?<|im_end|>'
    out = processor.apply_chat_template(
        [messages[:2], messages[1:2]],
        tokenize=True,
        return_dict=True,
        return_tensors='pt',
        return_assistant_tokens_mask=True,
        processor_kwargs={'padding': True},
    )
    assert out['pixel_values'].shape[0] == 1 and out['input_ids'][0, 0] == processor.tokenizer.bos_token_id
    for ids, mask in zip(out['input_ids'], torch.as_tensor(out['assistant_masks'])):
        assert processor.tokenizer.decode(ids[mask.bool()]) == 'A cat.<|im_end|>'


def test_save_and_load(processor, tmp_path):
    changed = HoVLEProcessor(HoVLEImageProcessor(size=28, max_patches=6), processor.tokenizer, None, 4, max_length=90)
    changed.save_pretrained(tmp_path)
    again = HoVLEProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == changed.image_processor.to_dict()
    assert (again.max_length, again.image_seq_length, again.chat_template) == (90, 4, changed.chat_template)
    inputs = dict(images=noise(64, 28), text='<image> a', return_tensors='pt')
    first, second = changed(**inputs), again(**inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


class SomeConfig(PretrainedConfig):
    model_type = 'zoo_test_processing'


def test_auto_classes(published, tmp_path, processor):
    AutoConfig.register('zoo_test_processing', SomeConfig, exist_ok=True)
    processing.register(SomeConfig)
    folder = tmp_path / 'published'
    folder.mkdir()
    for file in published.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    published_config(folder, model_type='zoo_test_processing')
    assert isinstance(AutoProcessor.from_pretrained(folder), HoVLEProcessor)
    assert AutoTokenizer.from_pretrained(folder)('a').input_ids == processor.tokenizer('a').input_ids
    processor.save_pretrained(tmp_path / 'saved')
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / 'saved'), HoVLEProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / 'saved'), HoVLEImageProcessor)


def test_published_config_decides(tmp_path):
    published_tokenizer(tmp_path)
    published_config(tmp_path, force_image_size=224, max_dynamic_patch=6, dynamic_image_size=False)
    loaded = HoVLEProcessor.from_pretrained(tmp_path)
    assert loaded.image_seq_length == 64 and loaded.chat_template == CHAT_TEMPLATES['internlm2-chat']
    assert loaded(images=noise(500, 20), text='<image>', return_tensors='pt')['pixel_values'].shape == (1, 3, 224, 224)
    published_config(tmp_path, template='vicuna')
    with pytest.raises(ZooError, match="unknown chat template 'vicuna'"):
        HoVLEProcessor.from_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llava'}))
    with pytest.raises(ZooError, match='not of HoVLE'):
        HoVLEProcessor.from_pretrained(tmp_path)


def test_prompts(processor, llava):
    pictures = [noise(20, 20), noise(20, 20)]
    shown = prompt(processor, Conversation([('user', 'See <image>, <image>: which?')], pictures))
    assert shown.endswith('<|im_start|>user\nSee <image>, <image>: which?<|im_end|><|im_start|>assistant\n')
    shown = prompt(processor, Conversation([('user', 'Which?')], pictures))
    assert '<|im_start|>user\n<image>\n<image>\nWhich?<|im_end|>' in shown
    _, other = load_vlm(llava, 'cpu')
    assert prompt(other, Conversation([('user', 'what ?')], pictures[:1])) == 'USER <image> what ? ASSISTANT '
    other.chat_template = other.tokenizer.chat_template = None
    assert prompt(other, Conversation([('user', 'what ?')], pictures[:1])) == '<image>\nwhat ?\n'
    with pytest.raises(ZooError, match='has 1 <image>, but 2 images'):
        prompt(processor, Conversation([('user', '<image>')], pictures))


def test_chat_on_a_tiny_model(llava, tmp_path, capsys, monkeypatch):
    from zoo.cli import main

    model, processor = load_vlm(llava, 'cpu')
    picture = noise(40, 40)
    first, history = chat(model, processor, 'what colour is it ?', picture, max_new_tokens=4)
    assert history == [('<image>\nwhat colour is it ?', first)] and first
    second, history = chat(model, processor, 'how many ?', picture, history, max_new_tokens=4)
    assert history[1] == ('how many ?', second)
    turns = [('user', 'what colour is it ?'), ('assistant', first), ('user', 'how many ?')]
    assert [second] == answer(model, processor, [Conversation(turns, [picture])], max_new_tokens=4)

    class Talking(ChatMixin, type(model)):
        pass

    model.__class__ = Talking
    assert model.chat(processor, 'what colour is it ?', picture, max_new_tokens=4)[0] == first
    questions = ['what colour is it ?', 'how many ?', 'what is it ?']
    batch = [Conversation([('user', q)], [picture]) for q in questions]
    together = answer(model, processor, batch, max_new_tokens=4)
    assert together == [answer(model, processor, [c], max_new_tokens=4)[0] for c in batch]
    picture.save(tmp_path / 'a.png')
    arguments = ['chat', str(llava), '--image', str(tmp_path / 'a.png'), '--device', 'cpu', '--max-new-tokens', '4']
    assert main([*arguments, 'what colour is it ?']) == 0
    assert capsys.readouterr().out.strip() == first
    typed = iter(['what colour is it ?', 'how many ?', ''])
    monkeypatch.setattr('builtins.input', lambda _: next(typed))
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [first, second]
    assert main(['chat', str(tmp_path / 'nowhere'), 'hello']) == 2
    assert 'nowhere: it is no folder with a config.json' in capsys.readouterr().err
    assert main(['chat', str(llava), '--image', 'missing.png', 'hello']) == 2
    assert 'cannot read image missing.png' in capsys.readouterr().err
