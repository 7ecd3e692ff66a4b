"""Segmentation: heads, published layouts, windows and sizes, scores, and the task through the command line."""

import csv
from pathlib import Path

import pytest
import timm
import torch
import yaml
from mask_folders import ade, cityscapes
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex
from zoo.heads.segment import load_published

import zoo
from zoo.checkpoints import load_net
from zoo.cli import main
from zoo.errors import ZooError
from zoo.tasks import Segment
from zoo.tasks._segment_inference import Inference, MaskScores, infer, slide
from zoo.tasks._segment_report import overlay, palette
from zoo.tasks.optim import Optim, build_optimizer
from zoo.tasks.segment import Auxiliary, Maps, SegmentHead, build_segmentor, pixel_loss

SMALL = {'channels': 16, 'fpn_channels': 16}


def small(net, name='fpn', kwargs=None, **maps):
    head = SegmentHead(name=name, auxiliary=Auxiliary(channels=8, level=1), **SMALL)
    return build_segmentor(net, 5, Maps(width=16, **maps), head, kwargs or {})


# heads


@pytest.mark.parametrize('head', ['fpn', 'uper'])
@pytest.mark.parametrize(
    ('net', 'kwargs', 'maps', 'stride'),
    [
        ('test_ravlt', {}, {'norms': True}, 4),
        ('test_mobilemamba', {}, {'finer': 1}, 8),
        ('test_vig', {'img_size': 64}, {}, 4),
        ('test_vig_hier', {}, {'out_indices': [1, 2, 3]}, 8),
        ('test_resnet', {}, {}, 4),
        ('test_vit', {'img_size': 64, 'dynamic_img_size': True}, {}, 4),
    ],
    ids=lambda v: v if isinstance(v, str) else '',
)
def test_any_backbone_by_name(head, net, kwargs, maps, stride):
    segmentor = small(net, head, kwargs, **maps).eval()
    images = torch.randn(2, 3, 64, 64)
    logits, auxiliary = segmentor(images, auxiliary=True)
    assert logits.shape == (2, 5, 64 // stride, 64 // stride)
    assert auxiliary.shape == (2, 5, 64 // (2 * stride), 64 // (2 * stride))
    assert torch.equal(segmentor(images), logits)
    logits.square().mean().backward()
    used = [n for n, p in segmentor.named_parameters() if p.grad is not None]
    assert any(n.startswith('pyramid.backbone') for n in used) and any(n.startswith('head') for n in used)


@pytest.mark.parametrize('head', ['fpn', 'uper'])
def test_odd_sizes(head):
    assert small('test_ravlt', head).eval()(torch.randn(1, 3, 75, 101)).shape == (1, 5, 19, 26)


@pytest.mark.parametrize(('net', 'kwargs'), [('test_ravlt', {}), ('test_vig', {'img_size': 32}), ('test_resnet', {})])
def test_layer_decay_reaches_the_backbone(net, kwargs):
    segmentor = small(net, kwargs=kwargs)
    names = {id(p): n for n, p in segmentor.named_parameters()}

    def scales(decay):
        groups = build_optimizer(segmentor, Optim(layer_decay=decay), 512).param_groups
        return {names[id(p)]: g['lr_scale'] for g in groups for p in g['params']}

    found = scales(0.5)
    assert found.keys() == set(names.values())
    heads = {v for n, v in found.items() if n.startswith(('head.', 'auxiliary.'))}
    backbone = [v for n, v in found.items() if n.startswith('pyramid.backbone')]
    assert heads == {1.0} and min(backbone) < 0.2, 'the whole backbone is one layer'
    segmentor.backbone_lr = True
    found = scales(0.1)
    slow = {n for n, v in found.items() if v != 1.0}
    assert slow == {n for n in found if n.startswith(('pyramid.', 'head.fpn.'))}
    assert all(found[n] == pytest.approx(0.1) for n in slow)


def test_wrong_settings_are_named():
    with pytest.raises(ZooError, match='no model named'):
        build_segmentor('ravlt_tiney', 5, Maps(), SegmentHead(), {})
    with pytest.raises(ZooError, match='auxiliary.level 7'):
        build_segmentor('test_ravlt', 5, Maps(), SegmentHead(auxiliary=Auxiliary(level=7)), {})
    with pytest.raises(ZooError, match='both set the learning rates'):
        Segment('test_ravlt', 5, backbone_lr=0.1, optim=Optim(layer_decay=0.9))
    for wrong in (0, 847):  # of ADE20K's full set, whose masks would wrap around
        with pytest.raises(ZooError, match=f'num_classes {wrong} must be within 1 .. 255'):
            Segment('test_ravlt', wrong)
    with pytest.raises(ZooError, match='2 values for 5 classes'):
        Segment('test_ravlt', 5, class_weights=[1.0, 2.0])


# published files

LITERAL = {
    'fpn': {
        'backbone.patch_embed.proj.0.weight': (8, 3, 3, 3),
        'backbone.extra_norms.3.norm.bias': (64,),
        'backbone.layers.2.blocks.1.attn.qkvo.weight': (192, 48, 1, 1),
        'neck.lateral_convs.3.conv.weight': (16, 64, 1, 1),
        'neck.fpn_convs.0.conv.bias': (16,),
        'decode_head.scale_heads.0.0.conv.weight': (16, 16, 3, 3),
        'decode_head.scale_heads.3.4.bn.running_var': (16,),
        'decode_head.conv_seg.bias': (5,),
    },
    'uper': {
        'decode_head.psp_modules.3.1.conv.weight': (16, 64, 1, 1),
        'decode_head.bottleneck.conv.weight': (16, 128, 3, 3),
        'decode_head.lateral_convs.2.bn.weight': (16,),
        'decode_head.fpn_bottleneck.conv.weight': (16, 64, 3, 3),
        'auxiliary_head.convs.0.conv.weight': (8, 32, 3, 3),
        'auxiliary_head.conv_seg.weight': (5, 8, 1, 1),
    },
}


def published(segmentor):
    """A file as mmsegmentation would have saved it, with random values."""
    state = {}
    for name, value in segmentor.state_dict().items():
        parts = name.split('.')
        if parts[:2] == ['pyramid', 'norms']:
            name = f'backbone.extra_norms.{parts[2]}.norm.{parts[3]}'
        elif parts[0] == 'pyramid':
            name = '.'.join(['backbone', *parts[3:]])
        elif parts[:2] == ['head', 'fpn']:
            name = f'neck.{parts[2]}.{parts[3]}.conv.{parts[4]}'
        else:
            name = '.'.join([{'head': 'decode_head', 'auxiliary': 'auxiliary_head'}[parts[0]], *parts[1:]])
        keep = name.endswith(('RoPE.angle', 'num_batches_tracked'))
        state[name] = value.clone() if keep else torch.rand_like(value, dtype=torch.float32) * 0.1 + 0.01
    return {'meta': {'epoch': 3}, 'state_dict': state}


@pytest.mark.parametrize('head', ['fpn', 'uper'])
def test_published_layout(head):
    source = small('test_ravlt', head, norms=True)
    file = published(source)
    for key, shape in LITERAL[head].items():
        assert tuple(file['state_dict'][key].shape) == shape, key
    target = small('test_ravlt', head, norms=True).eval()
    load_published(target, file)
    state = target.state_dict()
    assert torch.equal(state['pyramid.norms.3.bias'], file['state_dict']['backbone.extra_norms.3.norm.bias'])
    for name in ('conv_seg.weight', 'fpn_bottleneck.bn.running_mean', 'scale_heads.2.2.conv.weight'):
        if f'head.{name}' in state:
            assert torch.equal(state[f'head.{name}'], file['state_dict'][f'decode_head.{name}'])
    # files without the counters of BatchNorm, and a segmentor without the auxiliary head
    bare = {k: v for k, v in file['state_dict'].items() if not k.endswith('num_batches_tracked')}
    plain = build_segmentor('test_ravlt', 5, Maps(norms=True), SegmentHead(name=head, **SMALL), {}).eval()
    load_published(plain, bare)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(images), target(images))


def test_published_files_that_do_not_fit(tmp_path):
    file = published(small('test_ravlt', norms=True))
    state = file['state_dict']
    state['decode_head.conv_seg.bias'] = torch.zeros(7)
    del state['neck.fpn_convs.1.conv.weight']
    with pytest.raises(ValueError, match=r'missing \(1\): head.fpn.fpn_convs.1.weight\n.*file \(7,\), model \(5,\)'):
        load_published(small('test_ravlt', norms=True), file)
    with pytest.raises(ValueError, match=r'unexpected \(8\): pyramid.norms'):
        load_published(small('test_ravlt'), published(small('test_ravlt', norms=True)))
    with pytest.raises(ZooError, match='cannot load model.published .*none.pth'):
        Segment('test_ravlt', 5, published=str(tmp_path / 'none.pth'))
    torch.save(published(source := small('test_ravlt', norms=True)), tmp_path / 'good.pth')
    head = SegmentHead(auxiliary=Auxiliary(channels=8, level=1), **SMALL)
    loaded = Segment('test_ravlt', 5, published=str(tmp_path / 'good.pth'), maps=Maps(norms=True), head=head)
    assert loaded.net.state_dict().keys() == source.state_dict().keys()
    torch.save(file, tmp_path / 'file.pth')
    with pytest.raises(ZooError, match='model.published .*these weights do not fit'):
        Segment('test_ravlt', 5, published=str(tmp_path / 'file.pth'))


PUBLISHED = [('tiny', 18, None), ('small', 28, 55), ('base', 51, 77), ('large', 98, 125)]


@pytest.mark.parametrize(
    ('variant', 'fpn', 'uper'),
    [pytest.param(*row, marks=[pytest.mark.slow] * (row[0] in ('base', 'large'))) for row in PUBLISHED],
)
def test_published_parameter_counts(variant, fpn, uper):
    """In millions, as in RAVLT's table; UPerNet's with the auxiliary head."""
    for head, millions in ((SegmentHead(), fpn), (SegmentHead(name='uper', auxiliary=Auxiliary()), uper)):
        if millions:
            with torch.device('meta'):
                segmentor = build_segmentor(f'ravlt_{variant}', 150, Maps(norms=True), head, {})
            assert round(sum(p.numel() for p in segmentor.parameters()) / 1e6) == millions


def test_published_parameter_count_of_mobilemamba():
    """19.8 million with the fixed wavelet filters and the classifier of 80 classes, which their file keeps."""
    with torch.device('meta'):
        segmentor = build_segmentor('mobilemamba_b4', 150, Maps(), SegmentHead(), {})
    filters = sum(b.numel() for n, b in segmentor.named_buffers() if 'wt_filter' in n)
    classifier = 448 * 80 + 80 + 2 * 448
    assert filters and round((sum(p.numel() for p in segmentor.parameters()) + filters + classifier) / 1e6, 1) == 19.8


# inference and scores


class Pointwise(nn.Module):
    """A class for every pixel from its colour alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('size', [(40, 56), (16, 70), (33, 33)])
def test_windows_cover_the_image_once_on_average(size):
    net, images = Pointwise().eval(), torch.randn(2, 3, *size)
    settings = Inference(mode='slide', crop=(24, 24), stride=(15, 17), windows=3)
    with torch.no_grad():
        assert torch.allclose(slide(net, images, settings), net(images), atol=1e-5)


def test_windows_see_nothing_outside():
    seen = []

    def net(x):
        seen.append(tuple(x.shape))
        return x[:, :2]

    slide(net, torch.randn(1, 3, 30, 50), Inference(mode='slide', crop=(20, 20), stride=(10, 15), windows=100))
    assert seen == [(6, 3, 20, 20)]  # rows from 0 and 10; columns from 0, 15 and 30


def test_sizes_and_mirroring_are_averaged():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, padding=1).eval()  # not symmetric
    images = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6), (48, 48), mode='bilinear')
    settings = Inference(scales=(0.5, 1.0, 1.5), flip=True)
    with torch.no_grad():
        found = infer(net, images, settings, augmented=True)
        assert torch.allclose(infer(net, images.flip(-1), settings, augmented=True).flip(-1), found, atol=1e-4)
        assert torch.allclose(found.exp().sum(1), torch.ones(1, 48, 48), atol=1e-4)
        assert torch.equal(infer(net, images, settings), net(images)), 'validation is at one size'
        one = infer(net, images, Inference(flip=True), augmented=True).exp()
        both = (net(images).softmax(1) + net(images.flip(-1)).softmax(1).flip(-1)) / 2
        assert torch.allclose(one, both, atol=1e-6)


def test_wrong_inference_settings():
    for settings in ({'stride': (600, 10)}, {'scales': ()}, {'windows': 0}):
        with pytest.raises(ZooError, match='inference'):
            Inference(**settings)


def test_scores():
    truth = torch.tensor([[[0, 0, 1, 1], [0, 2, 2, 255]]])
    guess = torch.tensor([[[0, 1, 1, 1], [0, 2, 0, 0]]])
    scores = MaskScores(4, ignore_index=255, validate_args=False)
    scores.update(guess[..., :2], truth[..., :2])
    scores.update(guess[..., 2:], truth[..., 2:])
    table = scores.compute()
    assert table['iou'].tolist()[:3] == pytest.approx([2 / 4, 2 / 3, 1 / 2]) and table['iou'].isnan()[3]
    assert float(table['miou']) == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert float(table['pixel_accuracy']) == pytest.approx(5 / 7)
    assert float(table['mean_accuracy']) == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 6, (3, 20, 20), generator=generator)
    guess = torch.randint(0, 6, (3, 20, 20), generator=generator)
    scores = MaskScores(6, ignore_index=255, validate_args=False)
    scores.update(guess, truth)
    assert torch.allclose(scores.compute()['miou'], MulticlassJaccardIndex(6)(guess, truth))


def test_loss_ignores():
    logits = torch.randn(2, 3, 4, 4)
    masks = torch.randint(0, 3, (2, 4, 4))
    masks[0] = 255
    assert torch.allclose(pixel_loss(logits, masks), nn.functional.cross_entropy(logits[1:], masks[1:]))
    masks[:] = 255
    assert float(pixel_loss(logits, masks)) == 0


def test_overlay_shows_classes_and_borders():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, 4:] = 2
    drawn = overlay(Image.new('RGB', (4, 4)), mask.numpy(), palette(3))
    assert drawn.size == (8, 8) and drawn.getpixel((4, 3)) == (255, 255, 255)
    assert drawn.getpixel((1, 1)) != drawn.getpixel((6, 1))
    assert len({tuple(c) for c in palette(150)[:150].tolist()}) == 150


# the task

TINY = [
    'fit',
    '--seed_everything=1',
    '--model=zoo.tasks.Segment',
    '--model.net=test_ravlt',
    '--model.num_classes=7',
    '--model.net_kwargs={drop_path_rate: 0.1}',
    '--model.maps.norms=true',
    '--model.head={channels: 8, fpn_channels: 8, auxiliary: {channels: 8}}',
    '--model.optim={lr: 1e-3, lr_per: null}',
    '--model.schedule.warmup_epochs=0.5',
    '--model.ema={decay: 0.9, warmup: true}',
    '--data=zoo.data.DrawnMasks',
    '--data.size=40',
    '--data.train_images=12',
    '--data.val_images=3',
    '--data.test_images=3',
    '--data.batch_size=4',
    '--data.eval_batch_size=2',
    '--data.num_workers=0',
    '--data.view={crop: [32, 32], short: null}',
    '--trainer.max_epochs=2',
    '--trainer.accelerator=cpu',
    '--trainer.log_every_n_steps=1',
    '--trainer.enable_progress_bar=false',
    '--run.monitor=val/miou',
    '--run.save_every_n_steps=1',
    '--run.threads=1',
]


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    assert main([*TINY, f'--run.root={root}', '--run.name=tiny']) == 0
    return root / 'tiny'


def test_fit_leaves_pictures_and_tables(fitted):
    report = fitted / 'report'
    for name in ('curves', 'validation', 'overlays', 'worst', 'confusion'):
        with Image.open(report / f'{name}.png') as image:
            assert min(image.size) > 100, name
    with open(report / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [r['class'] for r in rows][:2] == ['ground', 'circle'] and sum(int(r['pixels']) for r in rows) == 3 * 40 * 40
    assert len(list((fitted / 'samples').glob('*.png'))) == 3
    with open(fitted / 'metrics.csv', newline='') as file:
        assert {'val/miou', 'val/pixel_accuracy', 'train/auxiliary_loss'} <= set(next(csv.reader(file)))


def test_test_validate_and_predict(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = fitted / 'checkpoints' / 'best.ckpt'
    assert main(['validate', f'--ckpt_path={checkpoint}', f'--output={tmp_path / "v"}']) == 0
    assert 'validation mIoU:' in capsys.readouterr().out and (tmp_path / 'v' / 'validation.png').is_file()
    sliding = '--model.inference={mode: slide, crop: [24, 24], stride: [16, 16], scales: [0.75, 1.0], flip: true}'
    assert main(['test', f'--ckpt_path={checkpoint}', sliding, f'--output={tmp_path / "t"}']) == 0
    assert 'test mIoU:' in capsys.readouterr().out and (tmp_path / 't' / 'worst.png').is_file()
    # a lone checkpoint, one broken file and two images of one name
    lone, images = tmp_path / 'lone.ckpt', tmp_path / 'images'
    lone.write_bytes(checkpoint.read_bytes())
    (images / 'more').mkdir(parents=True)
    Image.new('RGB', (50, 30), 'red').save(images / 'a.png')
    Image.new('L', (20, 33)).save(images / 'more' / 'a.png')
    (images / 'bad.png').write_bytes(b'no')
    assert main(['predict', f'--ckpt_path={lone}', f'--images={images}', '--output=out', '--batch_size=2']) == 0
    assert '2 images, 1 unreadable' in capsys.readouterr().out
    with Image.open('out/masks/a.png') as mask:
        assert mask.mode == 'P' and mask.size == (50, 30) and max(mask.tobytes()) < 7
    assert {p.name for p in (tmp_path / 'out' / 'overlays').iterdir()} == {'a.png', 'a-2.png'}
    with open('out/predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and sum(bool(r['error']) for r in rows) == 1
    with pytest.raises(ZooError, match='of the task Segment, not a classifier'):
        load_net(lone)
    module = Segment.load_from_checkpoint(lone, weights_only=True).eval()
    assert module(torch.randn(1, 3, 32, 32)).shape == (1, 7, 8, 8)


def test_resume_is_exact(fitted, tmp_path, monkeypatch):
    """Stopped in mid-epoch and gone on with: the state is that of the run that was never stopped."""
    start = Segment.on_train_batch_start

    def interrupted(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyboardInterrupt
        start(self, batch, batch_idx)

    arguments = [*TINY, f'--run.root={tmp_path}', '--run.name=again', '--run.test_after_fit=false']
    with monkeypatch.context() as patch:
        patch.setattr(Segment, 'on_train_batch_start', interrupted)
        assert main(arguments) == 130
    assert main([*arguments, '--ckpt_path=last']) == 0
    states = [
        torch.load(folder / 'checkpoints' / 'last.ckpt', weights_only=True) for folder in (fitted, tmp_path / 'again')
    ]
    assert states[0]['global_step'] == states[1]['global_step'] == 6
    for key, value in states[0]['state_dict'].items():
        assert torch.equal(value, states[1]['state_dict'][key]), key
    assert states[0]['optimizer_states'][0]['state'][0]['exp_avg'].equal(
        states[1]['optimizer_states'][0]['state'][0]['exp_avg']
    )


def test_mistakes_are_explained(fitted, capsys):
    assert main([*TINY, '--model.num_classes=5', f'--run.root={fitted.parent}']) == 2
    assert 'the data has 7 classes, the model 5' in capsys.readouterr().err
    checkpoint = fitted / 'checkpoints' / 'best.ckpt'
    assert main(['test', f'--ckpt_path={checkpoint}', '--model.head.name=uper']) == 2
    assert 'the checkpoint holds model.head.name fpn, the config asks for uper' in capsys.readouterr().err


def test_divergence_is_named(tmp_path, capsys):
    arguments = [*TINY, f'--run.root={tmp_path}', '--model.optim={lr: 1e30, lr_per: null}', '--model.ema=null']
    assert main(arguments) == 1
    assert 'the loss is not finite at step' in capsys.readouterr().err


# configs

ROOT = next(Path(base) / 'configs' for base in zoo.__path__ if (Path(base) / 'configs').is_dir())
CONFIGS = sorted((ROOT / 'segment').glob('*.yaml'))
RUN = ('quickstart', 'ravlt_small_fpn', 'ravlt_small_uper_cityscapes', 'mobilemamba_b4_fpn')  # the others are twins


@pytest.mark.parametrize(
    'path', [pytest.param(p, marks=[pytest.mark.slow] * (p.stem not in RUN), id=p.stem) for p in CONFIGS]
)
def test_config_takes_two_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    init = config['model']['init_args']
    overrides = ['--trainer.max_steps=2', '--trainer.limit_val_batches=1', '--run.test_after_fit=false']
    overrides += ['--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.precision=32-true']
    overrides += ['--trainer.sync_batchnorm=false', '--data.batch_size=2', '--data.num_workers=0']
    overrides += ['--data.view.crop=[64, 64]', '--data.view.short=64', '--trainer.enable_progress_bar=false']
    if path.stem == 'quickstart':
        overrides += ['--data.train_images=4', '--data.val_images=2']
    else:
        folder = (
            cityscapes(tmp_path / 'd') if config['data']['class_path'].endswith('Cityscapes') else ade(tmp_path / 'd')
        )
        # without a gigabyte of optimizer state on disk, and without the hub
        overrides += [f'--data.path={folder}', '--trainer.enable_checkpointing=false', '--model.pretrained=false']
        overrides += ['--trainer.val_check_interval=1']
        assert timm.is_model(init['net']) and init['pretrained'] is True
        assert config['run']['name'] == path.stem and path.stem.startswith(init['net'])
    assert main(['fit', f'--config={path}', *overrides]) == 0, capsys.readouterr().err
    assert 'val mIoU' in capsys.readouterr().out
