"""Contrastive training: towers, losses, chunks, teachers, evaluation, runs from configs, resuming, errors."""

import json
import math
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from test_resume import ROOT, assert_same, final_state
from zoo.heads.contrast import (
    ImageTower,
    LinearTextTower,
    TextTower,
    WordTokenizer,
    build_tokenizer,
    build_towers,
    config_folder,
    register_configs,
)

import zoo
from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.data.captioned_shapes import class_names
from zoo.errors import ZooError
from zoo.report import plot_confusion
from zoo.tasks import Contrast
from zoo.tasks._contrast_evaluate import Retrieval, ZeroShot, ZeroShotAccuracy, classifier, linear_probe
from zoo.tasks._contrast_losses import (
    DistillTowers,
    Tokens,
    build_loss,
    contrastive_loss,
    distill_losses,
    encode,
    encode_texts,
)
from zoo.tasks._contrast_report import plot_retrieved, plot_similarity

WORDS = 'the a red blue circle square at left right'
IMAGE = {'name': 'test_vig', 'kwargs': {'img_size': 32, 'patch_size': 8, 'depth': 1}}
TEXT = {'kind': 'linear', 'width': 32, 'heads': 2, 'layers': 1, 'context_length': 8, 'words': WORDS}


def tiny(**kwargs):
    """A pair of towers."""
    image = ImageTower(**{**IMAGE, **kwargs.pop('image', {})})
    return build_towers(image=image, text=TextTower(**{**TEXT, **kwargs.pop('text', {})}), embed_dim=16, **kwargs)


# towers


def test_open_clip_builds_our_backbone_from_json(tmp_path):
    """A JSON config of the user's, after nothing but `import zoo`."""
    config = json.loads((config_folder() / 'vig_small_patch16_224_clip.json').read_text())
    config['text_cfg'].update(width=64, heads=2, layers=1)
    (tmp_path / 'my_vig_clip.json').write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms('my_vig_clip')
    assert type(model.visual.trunk).__name__ == 'ViG' and model.visual.trunk.num_features == 384
    image = preprocess(Image.new('RGB', (300, 200))).unsqueeze(0)
    text = open_clip.get_tokenizer('my_vig_clip')(['a dog', 'a cat'])
    with torch.no_grad():
        assert model.get_logits(image, text)[0].shape == (1, 2)


def test_register_configs_is_idempotent():
    names = register_configs()
    assert 'vig_small_patch16_224_clip' in names and register_configs() == names
    assert set(names) <= set(open_clip.list_models())
    for name in names:
        assert open_clip.get_model_config(name)['vision_cfg']['timm_model_name'] in zoo.list_models()
        assert open_clip.get_model_config(name)['vision_cfg']['image_size'] == 224


@pytest.mark.parametrize('kind', ['softmax', 'linear'])
@pytest.mark.parametrize('causal', [True, False])
def test_text_tower_ignores_padding(kind, causal):
    text = TextTower(**{**TEXT, 'kind': kind, 'causal': causal})
    net, tokenizer = tiny(text={'kind': kind, 'causal': causal}).eval(), build_tokenizer(None, text)
    ids = tokenizer(['the red circle', 'a square'])
    assert ids.shape == (2, 8) and (ids[0] > 0).sum() == 5
    whole = net.encode_text(ids)
    alone = net.encode_text(ids[1:])
    assert torch.allclose(whole[1:], alone, atol=1e-5)
    if kind == 'linear':
        assert torch.allclose(whole, net.encode_text(ids[:, :5]), atol=1e-5), 'padding is seen'


@pytest.mark.parametrize('causal', [True, False])
def test_linear_tower_reads_the_order_of_words(causal):
    net, tokenizer = tiny(text={'causal': causal}), WordTokenizer(WORDS, 8)
    net.text.positional_embedding.data.zero_()  # only the scan is left to tell them apart
    a, b = net.encode_text(tokenizer(['red circle left square', 'square left circle red']))
    assert (a - b).abs().max() > 1e-5
    if causal:  # a state that is read at the end sees all words
        ids = tokenizer(['red circle'])
        embedded = net.text.token_embedding(ids).detach().requires_grad_()
        net.text.token_embedding.forward = lambda _: embedded
        net.text(ids).square().sum().backward()
        assert (embedded.grad[0, :4].abs().amax(-1) > 0).all() and (embedded.grad[0, 4:] == 0).all()


def test_linear_tower_is_locked_from_the_front():
    net = tiny(text={'layers': 2}).text
    assert isinstance(net, LinearTextTower)
    net.lock()
    assert not any(p.requires_grad for p in net.parameters())
    net.lock(unlocked_layers=1)
    free = {n for n, p in net.named_parameters() if p.requires_grad and not n.startswith('blocks.1.')}
    assert free == {'ln_final.weight', 'ln_final.bias', 'text_projection'}
    assert all(p.requires_grad for p in net.blocks[1].parameters())


def test_tower_in_the_place_of_an_open_clip_models(tmp_path):
    config = {
        'embed_dim': 24,
        'vision_cfg': {'timm_model_name': 'test_vig', 'timm_pool': 'avg', 'image_size': 96},
        'text_cfg': {'width': 32, 'heads': 2, 'layers': 1, 'context_length': 16},
    }
    (tmp_path / 'small_clip.json').write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    net = build_towers('small_clip', image=ImageTower(**IMAGE))
    assert net.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 24)
    assert net.encode_text(build_tokenizer('small_clip', None)(['a dog'])).shape == (1, 24)
    with pytest.raises(ZooError, match='embed_dim is 24'):
        build_towers('small_clip', embed_dim=32)


def test_errors_name_what_to_type():
    for call, words in (
        (lambda: build_towers('ViT-B-23'), 'ViT-B-32'),
        (lambda: build_towers(), 'model.image and model.text'),
        (lambda: tiny(image={'name': 'test_vik'}), 'test_vig'),
        (lambda: tiny(image={'kwargs': {'depht': 3}}), 'depht'),
        (lambda: tiny(image={'pretrained': True}), 'cannot build the image tower test_vig'),
        (lambda: tiny(text={'width': 30, 'heads': 4}), 'text.width 30'),
        (lambda: WordTokenizer(WORDS, 8)(['a green circle']), "'green' in 'a green circle'"),
        (lambda: ZeroShot(templates=['a photo']), r'\{\}'),
        (lambda: ZeroShot(templates=['a {} of {place}']), 'no other braces'),
        (lambda: ZeroShot(templates='opnai'), 'openai or simple'),
        (lambda: DistillTowers('ViT-B-32', logits=0), 'one of feature'),
        (lambda: build_towers('ViT-B-32', 'nowhere'), 'openai'),
    ):
        with pytest.raises(ZooError, match=words):
            call()


# losses


def features(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_losses_are_their_formulas():
    image, text, scale, bias = features(5, 8), features(5, 8), torch.tensor(7.0), torch.tensor(-2.0)
    logits = 7 * image @ text.T
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert torch.allclose(contrastive_loss(build_loss('clip'), image, text, scale, None), expected)
    signs = 2 * torch.eye(5) - 1
    expected = -F.logsigmoid(signs * (logits - 2)).sum() / 5
    assert torch.allclose(contrastive_loss(build_loss('siglip'), image, text, scale, bias), expected)


def test_distillation_losses_are_their_formulas():
    student, teacher = ((features(4, 8), features(4, 8), torch.tensor(scale)) for scale in (5.0, 9.0))
    settings = DistillTowers('ViT-B-32', feature=1, similarity=1, logits=1)
    found = distill_losses(settings, student, teacher, None)
    (image, text, scale), (image_t, text_t, scale_t) = student, teacher
    pairs = ((image, image_t), (text, text_t))
    assert torch.allclose(found['feature'], sum(((a - b) ** 2).sum(-1).mean() for a, b in pairs))
    assert torch.allclose(found['similarity'], sum(((a @ a.T - b @ b.T) ** 2).mean() for a, b in pairs))
    ours, theirs = scale * image @ text.T, scale_t * image_t @ text_t.T
    both = ((ours, theirs), (ours.T, theirs.T))
    expected = sum(-(b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in both) / 2
    assert torch.allclose(found['logits'], expected, atol=1e-6)
    same = distill_losses(settings, student, student, None)
    assert float(same['feature']) == float(same['similarity']) == 0


@pytest.mark.parametrize('image', ['test_vig', 'test_mobilemamba'])
def test_chunks_give_the_gradients_of_the_whole_batch(image):
    """Dropout included: random numbers are drawn again. Batch norms see chunks, so they are in evaluation mode here."""
    kwargs = {'kwargs': IMAGE['kwargs'] if image == 'test_vig' else {}}
    net = tiny(image={'name': image, **kwargs}).double()
    net.visual.head[0].p = 0.0
    net.visual.trunk.eval()
    images, captions = torch.randn(7, 3, 32, 32, dtype=torch.double), ['red circle', 'a square', 'left'] * 2 + ['right']
    tokens, grads = Tokens(WordTokenizer(WORDS, 8)), {}
    for chunk in (None, 3, 1):
        net.zero_grad()
        a = F.normalize(encode(net.visual, images, chunk), dim=-1)
        b = F.normalize(encode_texts(net.text, tokens, captions, chunk, images.device), dim=-1)
        contrastive_loss(build_loss('clip'), a, b, net.logit_scale.exp(), None).backward()
        grads[chunk] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert len(grads[None]) == sum(1 for _ in net.parameters())
    for chunk in (3, 1):
        for name, grad in grads[None].items():
            assert torch.allclose(grads[chunk][name], grad, rtol=1e-7, atol=1e-10), f'{name} with chunks of {chunk}'


def test_chunks_with_dropout_and_batch_norm():
    """The second pass draws the same dropout, and does not move the running statistics again."""
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5), torch.nn.Linear(6, 2)
    tower = torch.nn.Sequential(*layers)
    x, seen = torch.randn(6, 3, 8, 8), []
    tower[3].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
    encode(tower, x, 3).square().sum().backward()
    first, again = seen[:2], seen[2:]
    assert len(again) == 2 and all(any(torch.equal(a, b) for b in again) for a in first)
    mean, plain = tower[1].running_mean.clone(), torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        for part in x.split(3):
            plain(tower[0](part))
    assert torch.allclose(mean, plain.running_mean) and int(tower[1].num_batches_tracked) == 2
    assert tower[1].momentum == 0.1


def test_chunks_hold_one_chunk():
    """What autograd keeps does not grow with the batch."""
    tower = tiny().visual
    held = []
    for count in (8, 32):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel() * (tensor.dtype == torch.float32)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encode(tower, torch.randn(count, 3, 32, 32), 4)
        held.append(kept / count)
    assert held[1] <= held[0] <= 2 * 3 * 32 * 32, 'more than the inputs is kept'


def test_equal_captions_are_encoded_once():
    net, tokens, rows = tiny().text, Tokens(WordTokenizer(WORDS, 8), most=3), []
    net.register_forward_pre_hook(lambda m, inputs: rows.append(len(inputs[0])))
    out = encode_texts(net, tokens, ['red', 'blue', 'red', 'red'], None, torch.device('cpu'))
    assert rows == [2] and torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    tokens(['a', 'the', 'circle'])
    assert len(tokens.known) == 3, 'the memory is not bounded'


# evaluation


def test_retrieval_counts_equal_captions_as_one():
    rng = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(40, 6, generator=rng), dim=-1) for _ in range(2))
    captions = [str(i % 13) for i in range(40)]
    text = text[:13].repeat(4, 1)[:40]
    metric = Retrieval()
    for part in (slice(0, 17), slice(17, 40)):
        metric.update(image[part], text[part], captions[part])
    found, cosines = metric.compute(), (image @ text[:13].T).numpy()
    for cut in (1, 5, 10):
        i2t = np.mean([i % 13 in np.argsort(-cosines[i])[:cut] for i in range(40)])
        t2i = np.mean([any(i % 13 == c for i in np.argsort(-cosines[:, c])[:cut]) for c in range(13)])
        assert float(found[f'i2t_r{cut}']) == pytest.approx(i2t) and float(found[f't2i_r{cut}']) == pytest.approx(t2i)


def test_collapsed_features_retrieve_nothing():
    metric = Retrieval()
    metric.update(torch.ones(4, 1), torch.ones(4, 1), list('abcd'))
    assert all(float(v) == (1 if k.endswith(('r5', 'r10')) else 0) for k, v in metric.compute().items())


def test_zero_shot_accuracy_and_classifier():
    metric, logits, target = ZeroShotAccuracy(), torch.randn(50, 8), torch.randint(8, (50,))
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(logits[part], target[part])
    found = metric.compute()
    assert float(found['top1']) == pytest.approx(float((logits.argmax(1) == target).float().mean()))
    top5 = (logits.topk(5).indices == target[:, None]).any(1)
    assert float(found['top5']) == pytest.approx(float(top5.float().mean()))
    assert float(found['loss']) == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-5)
    net, tokenizer = tiny().eval(), WordTokenizer(WORDS, 8)
    weights = classifier(net, tokenizer, ['red circle', 'square'], ZeroShot(['the {}', 'a {} at left']), 'cpu')
    parts = F.normalize(net.encode_text(tokenizer(['the square', 'a square at left'])), dim=-1).mean(0)
    assert torch.allclose(weights[:, 1], F.normalize(parts, dim=0), atol=1e-5)


def test_linear_probe_separates_what_is_separable():
    target = torch.arange(300) % 3
    train = torch.randn(300, 10) + 4 * F.one_hot(target, 10)
    with torch.inference_mode():
        test = torch.randn(90, 10) + 4 * F.one_hot(target[:90], 10)
        accuracy, decay = linear_probe((train, target), (test, target[:90]), 3)
        chance, _ = linear_probe((torch.randn(300, 10), target), (test, target[:90]), 3)
    assert accuracy > 0.95 and decay > 0 and chance < 0.7


# data


# runs

TINY_RUN = [
    '--seed_everything=3',
    '--model=zoo.tasks.Contrast',
    '--model.image={name: test_vig, kwargs: {img_size: 48, patch_size: 16, depth: 1, drop_path_rate: 0.2}}',
    '--model.text={kind: linear, width: 32, heads: 2, layers: 1, context_length: 12, words: the a of at that is '
    'picture something red green blue yellow purple cyan orange white circle square triangle diamond plus cross ring '
    'moon top middle bottom left center right}',
    '--model.embed_dim=16',
    '--model.zero_shot.templates=["the {}", "a picture of the {}"]',
    '--model.optim.lr_per=null',
    '--model.schedule.warmup_epochs=1',
    '--trainer.accelerator=cpu',
    '--trainer.max_epochs=2',
    '--trainer.log_every_n_steps=1',
    '--run.threads=1',
]
SHAPES = ['--data=zoo.data.CaptionedShapes', '--data.train_images=64', '--data.val_images=24', '--data.test_images=40']
SHAPES += ['--data.batch_size=16', '--data.num_workers=0']


def fit(root, name, *more):
    return ['fit', *TINY_RUN, f'--run.root={root}', f'--run.name={name}', *more]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The root of a whole run named `run`."""
    root = tmp_path_factory.mktemp('contrast')
    assert main(fit(root, 'run', *SHAPES, '--model.ema={decay: 0.9}', '--model.chunk=5')) == 0
    return root


def test_fit_writes_a_report(finished):
    report = finished / 'run' / 'report'
    for name in ('curves.png', 'similarity.png', 'retrieved.png', 'confusion.png', 'mistakes.png'):
        with Image.open(report / name) as picture:
            assert min(picture.size) > 200
    found = json.loads((report / 'contrast.json').read_text())
    assert found['classes'] == 64 and 0 <= found['test/top1'] <= found['test/top5'] <= 1
    assert 0 <= found['test/i2t_r1'] <= found['test/i2t_r5'] <= found['test/i2t_r10'] <= 1
    assert math.isfinite(found['test/loss']) and found['versions']['open_clip'] == open_clip.__version__


def test_validate_test_and_predict(finished, tmp_path, capsys):
    best, samples = finished / 'run' / 'checkpoints' / 'best.ckpt', finished / 'run' / 'samples'
    assert main(['validate', f'--ckpt_path={best}']) == 0
    assert 'validation zero-shot accuracy among 64 classes' in capsys.readouterr().out
    assert main(['test', f'--ckpt_path={best}', f'--output={tmp_path / "report"}']) == 0
    assert (tmp_path / 'report' / 'contrast.json').is_file()
    assert main(['predict', f'--ckpt_path={best}', '--images', str(samples), f'--output={tmp_path / "a"}']) == 0
    rows = (tmp_path / 'a' / 'predictions.csv').read_text().splitlines()
    assert len(rows) == 13 and {row.split(',')[1] for row in rows[1:]} <= set(class_names())
    other = ['--model.zero_shot.classes=[red elephant]', '--images', str(samples), f'--output={tmp_path / "b"}']
    capsys.readouterr()
    assert main(['predict', f'--ckpt_path={best}', *other]) == 2
    assert "'elephant'" in capsys.readouterr().err


def test_resumed_run_equals_the_whole_run(finished, tmp_path, monkeypatch):
    """Killed in mid-epoch; dropped paths, chunks, averages and drawn images are those of the uninterrupted run."""
    args = fit(tmp_path, 'run', *SHAPES, '--model.ema={decay: 0.9}', '--model.chunk=5', '--run.test_after_fit=false')
    args.append('--run.save_every_n_steps=2')
    start = Contrast.on_train_batch_start

    def killed(self, batch, batch_idx):
        if self.global_step == 7:
            raise KeyError('killed')
        start(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(KeyError, match='killed'):
        patched.setattr(Contrast, 'on_train_batch_start', killed)
        main(args)
    assert read_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.ckpt')['global_step'] == 6  # 4 steps make an epoch
    assert main([*args, '--ckpt_path=last']) == 0
    assert_same(final_state(tmp_path, 'run'), final_state(finished, 'run'))


def test_checkpoint_does_not_choose_the_towers(finished, capsys):
    last = finished / 'run' / 'checkpoints' / 'last.ckpt'
    assert main(fit(finished, 'other', *SHAPES, '--model.embed_dim=8', f'--ckpt_path={last}')) == 2
    assert 'the checkpoint holds model.embed_dim 16' in capsys.readouterr().err


def test_labelled_images_and_a_probe(tmp_path, capsys):
    """Any data module with labels, its captions being templates."""
    words = ' '.join(['a', 'digit', *map(str, range(10))])
    more = ['--data=zoo.data.Digits', '--data.view.size=16', '--data.batch_size=64', '--data.num_workers=0']
    more += ['--model.image={name: test_vig, kwargs: {img_size: 16, patch_size: 4, depth: 1}}']
    more += [f'--model.text={{kind: softmax, width: 32, heads: 2, layers: 1, context_length: 6, words: {words}}}']
    more += ['--model.zero_shot.templates=["a {}", "digit {}"]', '--model.probe=true', '--model.loss=siglip']
    assert main(fit(tmp_path, 'run', *more, '--trainer.limit_train_batches=4', '--trainer.max_epochs=1')) == 0
    assert 'linear probe of the same features' in capsys.readouterr().out
    found = json.loads((tmp_path / 'run' / 'report' / 'contrast.json').read_text())
    assert found['test/probe_top1'] > 0.3 and 'test/i2t_r1' not in found and found['test/loss'] > 0
    assert (tmp_path / 'run' / 'report' / 'retrieved.png').is_file()


@pytest.fixture(scope='module')
def small_clip(tmp_path_factory):
    """A small model that open_clip knows by name, and its weights."""
    folder = tmp_path_factory.mktemp('small')
    config = {
        'embed_dim': 24,
        'vision_cfg': {'timm_model_name': 'test_vit', 'timm_pool': 'avg', 'image_size': 160},
        'text_cfg': {'width': 32, 'heads': 2, 'layers': 1, 'context_length': 16},
    }
    (folder / 'teacher_clip.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.save(open_clip.create_model('teacher_clip', force_custom_text=True).state_dict(), folder / 'weights.pt')
    return 'teacher_clip', str(folder / 'weights.pt')


def test_teacher_and_frozen_tower(small_clip, tmp_path):
    """The student nears a teacher of another width; a frozen text tower keeps its weights to the bit."""
    name, weights = small_clip
    more = [*SHAPES, '--run.test_after_fit=false', f'--model.net={name}', f'--model.pretrained={weights}']
    more += ['--model.text=null', '--model.embed_dim=null', '--model.freeze=text']
    more += [f'--model.distill={{teacher: {name}, pretrained: {weights}, feature: 1.0, similarity: 1.0, logits: 1.0}}']
    assert main(fit(tmp_path, 'lit', *more)) == 0
    state = torch.load(tmp_path / 'lit' / 'checkpoints' / 'last.ckpt', weights_only=True)['state_dict']
    given = torch.load(weights, weights_only=True)
    kept = [key for key in given if key.startswith('text.')]
    assert kept and all(torch.equal(state[f'net.{key}'], given[key]) for key in kept)
    metrics = (tmp_path / 'lit' / 'metrics.csv').read_text().splitlines()[0]
    assert all(f'train/{part}' in metrics for part in ('contrastive', 'feature', 'similarity', 'logits'))


def test_projections_to_a_wider_teacher_are_trained(small_clip):
    name, weights = small_clip
    distill = {'teacher': name, 'pretrained': weights, 'feature': 1.0}
    task = Contrast(image=IMAGE, text=TEXT, embed_dim=16, distill=distill)
    assert task.net.to_teacher['image'].weight.shape == (24, 16)
    assert not hasattr(Contrast(image=IMAGE, text=TEXT, embed_dim=24, distill={'teacher': name}).net, 'to_teacher')


FREE = [('image', {'visual.head.', 'text.', 'logit_scale'}), ('text', {'visual.', 'logit_scale'})]


@pytest.mark.parametrize(('freeze', 'free'), FREE)
def test_frozen_towers(freeze, free):
    task = Contrast(image=IMAGE, text=TEXT, embed_dim=16, freeze=freeze).train()
    trained = {name for name, p in task.net.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in task.net.named_parameters() if n.startswith(tuple(free))}
    frozen = task.net.text if freeze == 'text' else task.net.visual.trunk
    assert not frozen.training and task.net.visual.head.training


@pytest.mark.parametrize('ema', [None, {'decay': 0.9}])
def test_scale_is_kept_within_bounds(ema):
    task = Contrast(image=IMAGE, text=TEXT, embed_dim=16, max_scale=50.0, ema=ema)
    for value, kept in ((9.0, 50.0), (-1.0, 1.0)):
        scales = [net.logit_scale.data.fill_(value) for net in (task.net, task.eval_net)]
        task.clamp_scale()
        assert [float(scale.exp()) for scale in scales] == pytest.approx([kept, kept])
    task.net.logit_scale.data.fill_(4.0)
    with pytest.warns(UserWarning, match='54.6.*cuts to 50: --model.max_scale 55'):
        task.on_fit_start()


def write_pairs(folder, count=6):
    """Images beside their captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f'{number}.png')
        words = ('red' if number % 2 else 'blue', 'ring' if number > 2 else 'moon')
        (folder / f'{number}.txt').write_text(' '.join(('the', *words)))
    return folder


def test_captions_alone(tmp_path, capsys):
    """No classes: retrieval is what there is; an unreadable image is named and counted."""
    folder = write_pairs(tmp_path / 'data')
    (folder / '1.png').write_bytes(b'not an image')
    more = ['--data=zoo.data.CaptionedImages', f'--data.train={folder}', f'--data.val={folder}', '--data.num_workers=0']
    more += ['--data.framing={size: 48, crop_area: [0.5, 1.0]}', '--data.batch_size=3', '--run.monitor=val/i2t_r1']
    (tmp_path / 'broken').mkdir()
    for number in range(3):
        (tmp_path / 'broken' / f'{number}.png').write_bytes(b'not an image')
        (tmp_path / 'broken' / f'{number}.txt').write_text('the red ring')
    assert main(fit(tmp_path, 'broken', *more, f'--data.train={tmp_path / "broken"}')) == 2
    assert 'none of the images and captions of a batch' in capsys.readouterr().err
    with pytest.warns(RuntimeWarning, match=r'skipped unreadable image .*1\.png'):
        assert main(fit(tmp_path, 'run', *more)) == 0
    out = capsys.readouterr().out
    assert 'image to text' in out and 'zero-shot' not in out
    best = tmp_path / 'run' / 'checkpoints' / 'best.ckpt'
    assert main(['predict', f'--ckpt_path={best}', '--images', str(folder / '0.png')]) == 2
    assert '--model.zero_shot.classes' in capsys.readouterr().err
    named = ['--model.zero_shot.classes=[red ring, blue moon]', '--images', str(folder / '0.png')]
    assert main(['predict', f'--ckpt_path={best}', *named, f'--output={tmp_path}']) == 0
    row = (tmp_path / 'predictions.csv').read_text().splitlines()[1].split(',')
    assert {row[1], row[3]} == {'red ring', 'blue moon'}, 'classes named now do not take the place of learned ones'


def test_malformed_captions_are_named_and_counted(tmp_path, capsys):
    rows = ['{"file_name": "0.png", "text": "a"}', '{"text": "b"}', 'not json', '{"file_name": "1.png"}', '7']
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(rows))
    assert main(fit(tmp_path, 'run', '--data=zoo.data.CaptionedImages', f'--data.train={tmp_path}')) == 2
    error = capsys.readouterr().err
    assert 'metadata.jsonl' in error and '4 of 5' in error and "line 2: no 'file_name'" in error and 'line 3' in error
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_reports_show_captions_as_they_are(tmp_path):
    """What would be a formula to matplotlib, and a wrong one, is a caption here."""
    image, names = Image.new('RGB', (8, 8)), ['from $_5 to $_9', 'ring']
    images = [(image, torch.eye(2)[i], name) for i, name in enumerate(names)]
    plot_similarity(images, tmp_path / 'similarity.png', dict(zip(names, torch.eye(2))))
    plot_retrieved(images, names, torch.eye(2), tmp_path / 'retrieved.png')
    plot_confusion(np.eye(2, dtype=int), names, tmp_path / 'confusion.png')
    assert len(list(tmp_path.glob('*.png'))) == 3


def test_size_that_a_tower_does_not_take(tmp_path, capsys):
    image = '--model.image={name: test_vig, kwargs: {in_chans: 1}}'
    assert main(fit(tmp_path, 'run', *SHAPES, image)) == 2
    assert 'does not take 3 x 48 x 48 pixels' in capsys.readouterr().err


CONFIGS = sorted(config_folder().parent.glob('*.yaml'))
# siglip and clip have nothing that lit and distill have not
TWO_STEPS = [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in ('clip', 'siglip'))) for p in CONFIGS]


@pytest.mark.parametrize('path', TWO_STEPS, ids=lambda p: p.stem)
def test_config_takes_two_steps(path, small_clip, tmp_path, capsys):
    from test_configs import parquet

    config = yaml.safe_load(path.read_text())
    task, data = config['model']['init_args'], config['data']['class_path'].rsplit('.', 1)[-1]
    name, _ = small_clip
    more = ['--trainer.max_steps=2', '--trainer.limit_val_batches=1', '--run.test_after_fit=false']
    more += ['--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.strategy=auto']
    more += ['--trainer.precision=32-true', '--data.num_workers=0']
    if data == 'CaptionedImages':
        more += [f'--data.train={write_pairs(tmp_path / "data")}', '--data.framing.size=32', '--data.batch_size=2']
        more += ['--data.val_fraction=0.3', '--model.zero_shot={classes: [dog, cat], templates: simple}']
    elif data == 'HubImages':
        more += [f'--data.path={parquet(tmp_path, 10)}', f'--data.cache_dir={tmp_path / "cache"}']
        more += ['--data.batch_size=4']
    else:
        more += ['--data.train_images=8', '--data.val_images=8', '--data.batch_size=4']
    if 'net' in task:
        more += [f'--model.net={name}', '--model.pretrained=null']
        more += ['--model.image={name: test_vig, kwargs: {img_size: 32, patch_size: 8}, pretrained: false}']
    elif data == 'CaptionedImages':
        more += ['--model.image={name: test_vig, kwargs: {img_size: 32, patch_size: 8}, pretrained: false}']
    if task.get('text') and not task['text'].get('words'):
        more += ['--model.text.width=32', '--model.text.heads=2', '--model.text.layers=1']
    if task.get('distill'):
        more += [f'--model.distill.teacher={name}', '--model.distill.pretrained=null']
    assert main(['fit', f'--config={path}', f'--run.root={tmp_path}', *more]) == 0, capsys.readouterr().err
    saved = yaml.safe_load((tmp_path / config['run']['name'] / 'config.yaml').read_text())
    assert saved['trainer']['max_steps'] == 2


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['clip', 'siglip'])
def test_two_processes_have_the_gradients_of_one(loss, tmp_path):
    states = []
    for devices, batch in ((1, 32), (2, 16)):
        args = fit(tmp_path, f'run{devices}', *SHAPES, '--model.chunk=7', f'--model.loss={loss}')
        args += ['--trainer.max_epochs=1']
        args += [f'--data.batch_size={batch}', f'--trainer.devices={devices}', '--run.test_after_fit=false']
        args += ['--model.image.kwargs.drop_path_rate=0', f'--trainer.strategy={"ddp" if devices > 1 else "auto"}']
        # processes are started with the arguments of this one
        command = [sys.executable, str(ROOT / 'train.py'), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        states.append(read_checkpoint(tmp_path / f'run{devices}' / 'checkpoints' / 'last.ckpt'))
    for one, two in zip(*(state['optimizer_states'][0]['state'].values() for state in states)):
        assert torch.allclose(one['exp_avg'], two['exp_avg'], rtol=1e-4, atol=1e-6 * float(one['exp_avg'].abs().max()))
