"""Classification heads: their formulas, every layout of features, frozen training, checkpoints that rebuild them."""

import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from zoo.heads.classify import (
    HEADS,
    Headed,
    LinearHead,
    MatryoshkaHead,
    MomentHead,
    create_classifier,
    knn_votes,
    nested_dims,
    nested_loss,
    tokens_and_pooled,
)

from zoo.checkpoints import load_net, read_checkpoint
from zoo.cli import main
from zoo.errors import ZooError
from zoo.tasks import Classify
from zoo.tasks.classify import build_net, load_backbone
from zoo.tasks.optim import Optim, build_optimizer

# a token model, pyramids of ours in both layouts, timm's: NCHW, NHWC, prefix tokens, another width behind the pooling
NETS = {
    'test_vig': {'img_size': 32, 'patch_size': 8},
    'test_vig_hier': {},
    'test_ravlt': {},
    'test_mobilemamba': {},
    'test_convnext': {},
    'test_vit': {'img_size': 32, 'patch_size': 8},
    'mobilenetv3_small_050': {},
    'swin_tiny_patch4_window7_224': {'img_size': 32, 'embed_dim': 8, 'depths': (1, 1), 'num_heads': (1, 1)},
    'deit_tiny_distilled_patch16_224': {'img_size': 32, 'embed_dim': 24, 'depth': 1, 'num_heads': 1},
}
OPTIONS = {
    'linear': {'batch_norm': True},
    'moment': {'hidden': 64, 'num_heads': 4},
    'matryoshka': {'dims': [8, 16], 'embed_dim': 20},
}


@pytest.mark.parametrize('name', NETS)
def test_tokens_average_to_the_pooled_features(name):
    net = timm.create_model(name, num_classes=0, **NETS[name]).eval()
    x = torch.randn(2, 3, 64 if 'img_size' not in NETS[name] else 32, 64 if 'img_size' not in NETS[name] else 32)
    features = net.forward_features(x)
    tokens, pooled = tokens_and_pooled(net, features)
    assert tokens.shape[0] == 2 and tokens.shape[2] == net.num_features
    assert pooled.shape == (2, getattr(net, 'head_hidden_size', net.num_features))
    torch.testing.assert_close(pooled, net(x))
    if name in ('test_vig', 'test_vig_hier', 'swin_tiny_patch4_window7_224'):  # nothing but the mean comes between
        torch.testing.assert_close(tokens.mean(1), pooled)
    if name in ('test_vit', 'deit_tiny_distilled_patch16_224'):
        assert tokens.shape[1] == features.shape[1] - net.num_prefix_tokens


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', ['test_vig', 'mobilenetv3_small_050', 'deit_tiny_distilled_patch16_224'])
def test_every_head_on_every_kind_of_backbone(name, head):
    net = create_classifier(name, 5, head, OPTIONS[head], freeze='backbone', **NETS[name])
    x = torch.randn(3, 3, 32, 32) if 'img_size' in NETS[name] else torch.randn(3, 3, 64, 64)
    outputs = net.train()(x)
    nested_loss(F.cross_entropy, outputs, torch.tensor([0, 1, 2]), net.head.loss_weights).backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.head.parameters())
    net.eval()
    assert net(x).shape == (3, 5)
    torch.testing.assert_close(net.nested(x)[-1], net(x))


def published_moments(head, tokens, pooled):
    """The published head, head by head."""
    x = tokens @ head.proj.weight.T + head.proj.bias
    parts = [F.layer_norm(p, p.shape[-1:], head.norm.weight, head.norm.bias) for p in x.chunk(head.num_heads, dim=-1)]
    found = []
    for a, b in zip(parts, parts[1:]):
        if head.centre == 'image':
            a, b = (v - v.mean((1, 2), keepdim=True) for v in (a, b))
        else:
            a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
        matrix = torch.stack([sum(torch.outer(u, v) for u, v in zip(p, q)) / len(p) for p, q in zip(a, b)])
        found.append(matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12))
    second = head.reduce(torch.stack(found, 1)).flatten(1)
    return (head.first(pooled) + head.second(second)) / 2


@pytest.mark.parametrize('centre', ['image', 'channel'])
def test_moment_head_is_the_published_one(centre):
    head = MomentHead(24, 20, 7, hidden=64, num_heads=4, centre=centre).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    tokens, pooled = torch.randn(3, 9, 24).double(), torch.randn(3, 20).double()
    torch.testing.assert_close(head(tokens, pooled), published_moments(head, tokens, pooled))
    shuffled = tokens[:, torch.randperm(9)]
    torch.testing.assert_close(head(shuffled, pooled), head(tokens, pooled))  # moments know no order


def test_moment_head_has_the_published_sizes():
    """3 x 31 x 31 values for 512 channels in 4 heads; 3.65 M parameters in its two classifiers for ViT-B and 1000."""
    head = MomentHead(768, 768, 1000)
    assert head.second.in_features == 2883
    classifiers = sum(p.numel() for part in (head.first, head.second) for p in part.parameters())
    assert round(classifiers / 1e6, 2) == 3.65


def test_second_moments_tell_what_means_do_not():
    """Two classes with equal means of tokens, whose channels are correlated or not."""
    torch.manual_seed(0)
    noise, target = torch.randn(256, 16, 8), torch.arange(256) % 2
    noise = noise - noise.mean(1, keepdim=True)
    tokens = torch.where(target.view(-1, 1, 1).bool(), noise, noise[..., :1].expand_as(noise))
    pooled = tokens.mean(1)
    found = {}
    for name in ('linear', 'moment'):
        torch.manual_seed(0)
        head = HEADS[name](8, 8, 2, **({'hidden': 32, 'num_heads': 2} if name == 'moment' else {}))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(60):
            loss = F.cross_entropy(head(tokens[:128], pooled[:128]), target[:128])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = (head(tokens[128:], pooled[128:]).argmax(1) == target[128:]).float().mean()
    assert found['moment'] > 0.95 and found['linear'] < 0.65


def test_matryoshka_nests():
    pooled, target = torch.randn(6, 20), torch.randint(4, (6,))
    for efficient in (False, True):
        head = MatryoshkaHead(0, 20, 4, dims=[2, 8, 20], efficient=efficient)
        outputs = head.train()(None, pooled)
        assert len(outputs) == 3
        for d, logits in zip(head.dims, outputs):
            changed = torch.cat([pooled[:, :d], torch.randn(6, 20 - d)], 1)
            index = head.dims.index(d)
            assert torch.equal(head.nested(None, changed)[index], logits)  # nothing behind the first d is read
        total = sum(F.cross_entropy(logits, target) for logits in outputs)
        torch.testing.assert_close(nested_loss(F.cross_entropy, outputs, target, head.loss_weights), total)
        assert torch.equal(head.eval()(None, pooled), outputs[-1])
    shared = head.classifiers[0]  # MRL-E: columns of one matrix
    torch.testing.assert_close(outputs[0], pooled[:, :2] @ shared.weight[:, :2].T + shared.bias)
    assert nested_dims(64) == [8, 16, 32, 64] and nested_dims(80) == [8, 16, 32, 64, 80] and nested_dims(6) == [6]


def test_knn_votes_like_a_loop():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(7, 6, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    votes = knn_votes(bank, labels, queries, 3, ks=(1, 5, 100), chunk=3)
    for k in (1, 5, 100):
        for i, query in enumerate(queries):
            cosine = F.cosine_similarity(bank, query[None])
            expected = torch.zeros(3)
            for j in cosine.argsort(descending=True)[:k]:
                expected[labels[j]] += (cosine[j] / 0.07).exp()
            torch.testing.assert_close(votes[k][i], expected, rtol=1e-4, atol=1e-4)
    assert (knn_votes(bank, labels, bank, 3, ks=(1,))[1].argmax(1) == labels).all()


def test_without_a_wish_the_model_is_timms_own():
    assert type(build_net('test_vit', 3, False, {})) is type(timm.create_model('test_vit'))
    assert isinstance(build_net('test_vit', 3, False, {}, freeze='backbone'), Headed)
    assert isinstance(build_net('test_vit', 3, False, {}, head_kwargs={'batch_norm': True}).head, LinearHead)


@pytest.mark.parametrize(
    ('head', 'options', 'word'),
    [
        ('moment', {'num_heads': 3}, 'multiple of num_heads'),
        ('matryoshka', {'dims': [8, 4]}, 'must rise'),
        ('matryoshka', {'dims': [8, 4096]}, 'must rise within'),
        ('matryoshka', {'dims': [8], 'loss_weights': [1, 2]}, 'loss_weights'),
        ('linear', {'batchnorm': True}, 'does not take'),
    ],
)
def test_wrong_options_are_named(head, options, word):
    with pytest.raises(ZooError, match=word):
        build_net('test_vit', 3, False, {}, head, options)


def test_layer_decay_reaches_the_backbone_through_the_head():
    net = create_classifier('test_vig', 3, 'moment', {'hidden': 64})
    plain = timm.create_model('test_vig', num_classes=3)
    settings = Optim(lr=1.0, lr_per=None, layer_decay=0.5)

    def scales(model):
        names = {id(p): n for n, p in model.named_parameters()}
        groups = build_optimizer(model, settings, 64).param_groups
        return {names[id(p)]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}

    headed, own = scales(net), scales(plain)
    for name, value in own.items():
        if not name.startswith('head'):
            ratio = headed[f'backbone.{name}'][0] / value[0]
            assert ratio in (0.5, 1.0) and headed[f'backbone.{name}'][1] == value[1], name
    assert headed['head.second.weight'][0] == 1.0


# runs

RUN = [
    'fit',
    '--seed_everything=3',
    '--model=zoo.tasks.Classify',
    '--model.num_classes=10',
    '--model.optim.lr_per=null',
    '--model.schedule.warmup_epochs=0',
    '--data=zoo.data.Digits',
    '--data.batch_size=32',
    '--data.num_workers=0',
    '--data.view.size=16',
    '--trainer.limit_train_batches=3',
    '--trainer.limit_val_batches=1',
    '--trainer.limit_test_batches=1',
    '--trainer.accelerator=cpu',
    '--trainer.enable_progress_bar=false',
    '--run.threads=1',
]
NET = ['--model.net=test_vit', '--model.net_kwargs={img_size: 16, patch_size: 4}']


def test_a_run_rebuilds_resumes_exports_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ['--model.head=matryoshka', '--model.head_kwargs={embed_dim: 32, batch_norm: true}', '--run.name=a']
    assert main([*RUN, *NET, *own, '--model.ema={decay: 0.5}', '--trainer.max_epochs=2']) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert ' % (by features used, 8: ' in out and ' %, 32: ' in out
    rows = (tmp_path / 'runs/a/metrics.csv').read_text().splitlines()
    assert {'val/top1_8', 'val/top1_16', 'val/top1_32'} <= set(rows[0].split(','))
    # the end of the first epoch, resumed elsewhere, ends like the run that went on
    shutil.copytree(tmp_path / 'runs/a', tmp_path / 'runs/b')
    (tmp_path / 'runs/b/checkpoints/last.ckpt').unlink()
    again = ['fit', '--ckpt_path=runs/b/checkpoints/previous.ckpt', '--run.test_after_fit=false']
    assert main(again) == 0, capsys.readouterr().err
    a, b = (read_checkpoint(tmp_path / f'runs/{name}/checkpoints/last.ckpt') for name in 'ab')
    assert a['global_step'] == b['global_step'] == 6 and a['state_dict'].keys() == b['state_dict'].keys()
    assert all(torch.equal(value, b['state_dict'][key]) for key, value in a['state_dict'].items())
    # the checkpoint is enough for everything else
    best = tmp_path / 'runs/a/checkpoints/best.ckpt'
    export = ['export', 'test_vit', '--checkpoint', str(best), '--format', 'safetensors', '--output', 'a.safetensors']
    assert main(export) == 0 and (tmp_path / 'a.safetensors').is_file()
    lone = shutil.copy(best, tmp_path / 'lone.ckpt')  # without its config
    assert main(['predict', f'--ckpt_path={lone}', '--images', 'runs/a/samples', '--output=p']) == 0
    assert (tmp_path / 'p/predictions.csv').read_text().count('\n') == 13
    capsys.readouterr()
    assert main(['test', f'--ckpt_path={best}', '--model.head=moment', '--model.head_kwargs={}']) == 2
    assert 'model.head matryoshka' in capsys.readouterr().err


@pytest.mark.parametrize('head', ['linear', 'moment'])
def test_a_frozen_run_moves_the_head_alone(head, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = [f'--model.head={head}', f'--model.head_kwargs={yaml.safe_dump(OPTIONS[head], default_flow_style=True)}']
    own += ['--model.freeze=backbone', '--model.ema={decay: 0.5}', '--trainer.max_epochs=1', '--run.name=a']
    own += ['--model.net_kwargs={img_size: 16, patch_size: 4, drop_path_rate: 0.5}', '--run.test_after_fit=false']
    assert main([*RUN, *NET, *own]) == 0, capsys.readouterr().err
    last = tmp_path / 'runs/a/checkpoints/last.ckpt'
    net, described = load_net(last)
    assert isinstance(net.head, HEADS[head]) and net.frozen and described['net'] == 'test_vit'
    state = read_checkpoint(last)['state_dict']
    averaged = {k.removeprefix('ema.module.'): v for k, v in state.items() if k.startswith('ema.module.')}
    for key, value in averaged.items():
        if key.startswith('backbone.'):  # never moved, so the average is the same, bit by bit
            assert torch.equal(value, state[f'net.{key}'])
    assert any(not torch.equal(v, state[f'net.{k}']) for k, v in averaged.items() if k.startswith('head.'))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(net.train().features(x)[1], net.features(x)[1])  # no drop path where nothing is trained


@pytest.mark.parametrize('head', HEADS)
def test_exports(head, tmp_path):
    net = create_classifier('test_vit', 5, head, OPTIONS[head], **NETS['test_vit']).eval()
    program = torch.export.export(
        net, (torch.randn(2, 3, 32, 32),), dynamic_shapes={'x': {0: torch.export.Dim.DYNAMIC}}
    )
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_init_takes_the_backbone_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *NET, '--model.ema={decay: 0.5}', '--trainer.max_epochs=1', '--run.name=first']) == 0
    first = 'runs/first/checkpoints/last.ckpt'
    own = ['--model.freeze=backbone', '--model.head=moment', '--model.head_kwargs={hidden: 64}']
    own += [f'--model.init={first}', '--trainer.max_epochs=1', '--run.name=second', '--run.test_after_fit=false']
    assert main([*RUN, *NET, *own]) == 0, capsys.readouterr().err
    averaged = load_net(first)[0].state_dict()
    second = load_net('runs/second/checkpoints/last.ckpt')[0].backbone.state_dict()
    assert all(torch.equal(v, averaged[k]) for k, v in second.items())
    (tmp_path / 'runs/first').rename(tmp_path / 'runs/gone')  # a checkpoint needs nothing but itself
    assert main(['fit', '--ckpt_path=runs/second/checkpoints/last.ckpt', '--trainer.max_epochs=2']) == 0
    capsys.readouterr()
    other = [*RUN, '--model.net=test_vig', '--model.net_kwargs={img_size: 16, patch_size: 4}', '--run.name=third']
    assert main([*other, '--model.init=runs/gone/checkpoints/last.ckpt', '--trainer.max_epochs=1']) == 2
    assert 'another backbone' in capsys.readouterr().err


def test_init_of_a_plain_classifier_keeps_its_own_classes(tmp_path):
    task = Classify('test_vit', 4, {'img_size': 16, 'patch_size': 4})
    torch.save({'state_dict': {f'net.{k}': v for k, v in task.net.state_dict().items()}}, tmp_path / 'a.ckpt')
    net = build_net('test_vit', 6, False, {'img_size': 16, 'patch_size': 4})
    before = copy.deepcopy(net.head.state_dict())
    load_backbone(net, str(tmp_path / 'a.ckpt'))
    assert all(torch.equal(v, before[k]) for k, v in net.head.state_dict().items())
    assert torch.equal(net.patch_embed.proj.weight, task.net.patch_embed.proj.weight)
