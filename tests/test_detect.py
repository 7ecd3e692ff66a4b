"""Detectors on backbones by name, their training on COCO files and drawn scenes, and what they write."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from zoo.heads.detect import Detector, LevelAnchors, Neck, Resize

import zoo
from zoo.checkpoints import read_checkpoint
from zoo.cli import main
from zoo.data import BoxAugment, CocoObjects, DrawnObjects, HubObjects
from zoo.data._coco import draw_mask, segmentation_problem
from zoo.tasks.detect import Detect, build_map

ROOT = next(Path(base) / 'configs' for base in zoo.__path__ if (Path(base) / 'configs').is_dir())
CONFIGS = sorted((ROOT / 'detect').glob('*.yaml'))
KINDS = ('retinanet', 'faster_rcnn', 'mask_rcnn', 'ssdlite')


def objects(count, height, width, classes=3):
    boxes = torch.rand(count, 4) * 20
    boxes[:, 2:] += boxes[:, :2] + 10
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = True
    return dict(boxes=boxes, labels=torch.arange(count) % classes, masks=masks)


def coco_folder(folder, change=lambda split, content: None, images=4):
    """Rectangles on noise in COCO's layout; some of the images are upright."""
    rng = np.random.default_rng(0)
    (folder / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        (folder / split).mkdir()
        content = {'images': [], 'annotations': [], 'categories': [{'id': 7, 'name': 'cat'}, {'id': 3, 'name': 'dog'}]}
        for number in range(images):
            width, height = (64, 48) if number % 2 else (48, 64)
            name = f'{number + 1:012d}.png'
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / split / name)
            content['images'].append({'id': number + 1, 'file_name': name, 'width': width, 'height': height})
            for place in range(2):
                x, y, w, h = 4.0 + 20 * place, 6.0, 18.0, 20.0
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                entry = {'id': len(content['annotations']), 'image_id': number + 1, 'category_id': (3, 7)[place]}
                entry |= {'bbox': [x, y, w, h], 'segmentation': [corners], 'area': w * h, 'iscrowd': 0}
                content['annotations'].append(entry)
        change(split, content)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return folder


# heads


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['test_vig_hier', 'test_vig', 'resnet10t'])
def test_detector(kind, name):
    """Every parameter trains, an image without objects is no obstacle, detections fit their images."""
    net = Detector(kind, name, 3, neck=Neck(width=16), resize=Resize(64, 96))
    images = [torch.rand(3, 64, 64), torch.randint(256, (3, 64, 64) if kind == 'ssdlite' else (3, 60, 80)).byte()]
    losses = net(images, [objects(3, 64, 64), objects(0, *images[1].shape[1:])])
    sum(losses.values()).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    net.eval()
    with torch.no_grad():
        found = net([torch.rand(3, 50, 70)])[0]
    assert len(found['boxes']) == len(found['labels']) == len(found['scores'])
    if len(found['boxes']):
        assert found['labels'].min() >= 0 and found['labels'].max() < 3
        assert found['boxes'][:, 2].max() <= 70 and found['boxes'][:, 3].max() <= 50
    if kind == 'mask_rcnn':
        assert found['masks'].shape == (len(found['boxes']), 50, 70) and found['masks'].dtype == torch.bool


@pytest.mark.parametrize('kind', KINDS)
def test_detector_in_bf16(kind):
    """Under autocast what boxes are made of stays fp32; 1000 pixels do not fit 8 bits."""
    net = Detector(kind, 'test_ravlt', 3, neck=Neck(width=16), resize=Resize(96, 96))
    seen = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        losses = net([torch.rand(3, 96, 96)] * 2, [objects(3, 96, 96)] * 2)
        assert torch.bfloat16 in seen
        assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
        found = net.eval()([torch.rand(3, 96, 96)])[0]
    assert found['boxes'].dtype == found['scores'].dtype == torch.float32


def test_anchors_have_the_true_stride():
    """Of a level of 13 cells made from 25 of stride 32: torchvision's guess is 61."""
    anchors = LevelAnchors([64], 4, 1, (1.0,))
    images = type('Images', (), {'image_sizes': [(800, 800)], 'tensors': torch.zeros(1, 3, 800, 800)})()
    centres = anchors(images, [torch.zeros(1, 8, 13, 13, dtype=torch.bfloat16)])[0].view(13, 13, 2, 2).mean(2)
    assert centres.dtype == torch.float32
    torch.testing.assert_close(centres[0, :, 0], 64.0 * torch.arange(13))


def test_perfect_detections_score_one():
    metric = build_map(masks=True, per_class=True)
    for count in (3, 1):
        truth = objects(count, 64, 64)
        metric.update([{**truth, 'scores': torch.ones(count)}], [truth])
    scores = metric.compute()
    assert scores['bbox_map'] == 1 and scores['segm_map'] == 1


# COCO files


def test_coco_entries(tmp_path):
    """Labels follow the ids of the categories, boxes and masks agree, a crowd trains nobody."""

    def change(split, content):
        crowd = {'counts': [0, 64 * 48], 'size': [64, 48]}
        content['annotations'][0] |= {'iscrowd': 1, 'segmentation': crowd}

    data = CocoObjects(str(coco_folder(tmp_path / 'coco', change)), batch_size=2, num_workers=0)
    data.augment = BoxAugment(sizes=(96,), hflip=1.0)
    data.setup()
    data.use_masks()
    assert data.class_names == ['dog', 'cat'] and data.category_ids == [3, 7] and data.malformed == 0
    batch = next(iter(data.val_dataloader()))
    target = batch['target'][0]
    assert target['image_id'] == 1 and target['iscrowd'].tolist() == [True, False]
    assert target['masks'][0].all() and target['masks'][1].sum() == 18 * 20
    assert target['boxes'].tolist() == [[4, 6, 22, 26], [24, 6, 42, 26]] and target['labels'].tolist() == [0, 1]
    for batch in data.train_dataloader():
        heights = {image.shape[1] > image.shape[2] for image in batch['image']}
        assert len(heights) == 1  # upright and lying images do not meet
        for image, target in zip(batch['image'], batch['target']):
            assert min(image.shape[1:]) == 96
            for box, mask in zip(target['boxes'], target['masks']):
                rows, columns = mask.nonzero().unbind(1)
                drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                torch.testing.assert_close(drawn.float(), box, atol=1.01, rtol=0)
    assert sum(len(t['boxes']) for b in data.train_dataloader() for t in b['target']) == 7


def test_evaluation_needs_no_training_split(tmp_path):
    folder = coco_folder(tmp_path / 'coco', images=2)
    shutil.rmtree(folder / 'train2017')
    data = CocoObjects(str(folder), batch_size=2, num_workers=0)
    data.setup()
    assert len(next(iter(data.test_dataloader()))['image']) == 2
    with pytest.raises(zoo.errors.ZooError, match=r'no such folder: .*train2017\nGive the folder'):
        data.train_dataloader()
    wished = CocoObjects(str(folder), test='test2017', num_workers=0)
    wished.setup()
    with pytest.raises(zoo.errors.ZooError, match='test2017'):  # not the validation split in its place
        wished.test_dataloader()


def spoil(split, content):
    if split == 'train2017':
        content['annotations'][0]['bbox'] = [4, 6, -18, 20]
        content['annotations'][1]['category_id'] = 99
        content['annotations'][2]['image_id'] = [1000]
        content['annotations'][3]['bbox'] = [4, 'x', 3, 3]
        del content['annotations'][4]['bbox']
        content['images'][3]['width'] = 0
        content['annotations'][5]['segmentation'] = [[1, 2, 3]]


def test_malformed_entries_are_counted_and_named(tmp_path):
    folder = coco_folder(tmp_path / 'coco', spoil)
    data = CocoObjects(str(folder), batch_size=1, num_workers=0)
    with pytest.warns(RuntimeWarning) as caught:
        data.setup()
    words = str(caught[0].message)
    # the image without a width takes its two annotations with it
    assert data.malformed == 8 and 'instances_train2017.json: 8 malformed entries left out' in words
    assert 'images[3] (id 4): is 0 x 64 pixels' in words or 'images[3] (id 4): is 0 x 48 pixels' in words
    assert 'annotations[0] (id 0): bbox [4, 6, -18, 20] is empty' in words and '... and 5 more' in words
    with pytest.warns(RuntimeWarning, match='a polygon needs pairs of numbers'):
        data.use_masks()
    assert data.malformed == 9
    strict = CocoObjects(str(folder), strict=True)
    with pytest.raises(zoo.errors.ZooError, match='8 malformed entries'):
        strict.setup()


@pytest.mark.parametrize(
    'segmentation, words',
    [
        ({'size': [64, 48], 'counts': [3, -5, 3074]}, 'the runs are not those of 64 x 48 pixels'),
        ({'size': [64, 48], 'counts': [3, 5]}, 'the runs are not'),  # the rest would be whatever is in memory
        ({'size': [64, 48], 'counts': ''}, 'the runs are not'),
        ({'size': [64, 48], 'counts': 'nonsense!'}, 'the runs are not'),
        ({'size': [64, 48], 'counts': ['a', 3072]}, 'the runs are not'),
        ({'size': [48, 64], 'counts': [0, 3072]}, r'a mask of \[48, 64\] in an image of 64 x 48'),
        ([[4, 6, 1e9, 6, 1e9, 1e9]], r'a polygon reaches 4 .. 1e\+09 in an image of 48 x 64'),  # would end the process
    ],
)
def test_masks_that_cannot_be_drawn_are_named(tmp_path, segmentation, words):
    def change(split, content):
        content['annotations'][1]['segmentation'] = segmentation

    data = CocoObjects(str(coco_folder(tmp_path / 'coco', change, images=1)), batch_size=1, num_workers=0)
    data.setup()
    with pytest.warns(RuntimeWarning, match=rf'(?s)instances_\w+2017.json: 1 malformed.*annotations\[1\]: {words}'):
        data.use_masks()
    assert data.malformed == 2  # one in either split
    assert [len(batch['target'][0]['masks']) for batch in data.val_dataloader()] == [1]


def test_compressed_runs_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    tools = pytest.importorskip('pycocotools.mask')
    for share in (0.001, 0.5, 0.999):
        mask = np.asfortranarray((rng.random((61, 47)) < share).astype(np.uint8))
        runs = tools.encode(mask)
        value = {'size': [61, 47], 'counts': runs['counts'].decode()}
        assert segmentation_problem(value, 61, 47) is None and (draw_mask(value, 61, 47) == mask).all()
        assert segmentation_problem(value | {'counts': value['counts'][:-1]}, 61, 47)


def test_unreadable_images_are_counted_and_named(tmp_path):
    folder = coco_folder(tmp_path / 'coco')
    (folder / 'val2017' / f'{1:012d}.png').write_bytes(b'not an image')
    Image.new('RGB', (10, 10)).save(folder / 'val2017' / f'{2:012d}.png')
    data = CocoObjects(str(folder), num_workers=0)
    data.setup()
    failures = [f for batch in data.val_dataloader() for f in batch['failures']]
    assert [name for name, _ in failures] == [str(folder / 'val2017' / f'{n:012d}.png') for n in (1, 2)]
    assert 'the image is 10 x 10 pixels, its annotations are for 64 x 48' in failures[1][1]


@pytest.mark.parametrize(
    'content, words',
    [
        ('{', 'is not JSON'),
        ('[]', "has no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', 'no usable images'),
        (None, 'cannot read annotations'),
    ],
)
def test_unusable_annotations(tmp_path, content, words):
    folder = coco_folder(tmp_path / 'coco')
    file = folder / 'annotations' / 'instances_train2017.json'
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(zoo.errors.ZooError, match=words):
        CocoObjects(str(folder)).setup()


@pytest.mark.parametrize('box_format', ['xywh', 'xyxy'])
def test_hub_objects(tmp_path, box_format):
    """Boxes in either form, categories by name, bad boxes counted and named."""
    datasets = pytest.importorskip('datasets')
    number, kind = datasets.Value('float32'), datasets.ClassLabel(names=['cat', 'dog'])
    objects = {name: datasets.Sequence(part) for name, part in (('area', number), ('category', kind))}
    objects['bbox'] = datasets.Sequence(datasets.Sequence(number))
    features = datasets.Features({'image': datasets.Image(), 'objects': objects})
    boxes = {'xyxy': [[4.0, 6, 22, 26], [9.0, 9, 9, 30]], 'xywh': [[4.0, 6, 18, 20], [0.0] * 4]}[box_format]
    row = {'bbox': boxes, 'area': [360.0, 1.0], 'category': [1, 0]}
    for split in ('train', 'validation'):
        rows = {'image': [Image.new('RGB', (48, 64))] * 2, 'objects': [row] * 2}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f'{split}.parquet')
    cache = str(tmp_path / 'cache')
    data = HubObjects(str(tmp_path), box_format=box_format, cache_dir=cache, batch_size=2, num_workers=0)
    with pytest.warns(RuntimeWarning, match='train: 2 malformed entries left out\n  row 0, object 1: bbox'):
        data.setup()
    assert data.class_names == ['cat', 'dog'] and data.malformed == 4
    target = next(iter(data.val_dataloader()))['target'][1]
    assert target['boxes'].tolist() == [[4, 6, 22, 26]] and target['labels'].tolist() == [1]
    assert target['area'].tolist() == [360] and target['image_id'] == 1
    assert next(iter(data.train_dataloader()))['image'][0].shape[0] == 3


def test_augmentations_keep_boxes_on_objects():
    """After crops, distortions and resizing a box still frames the visible part of its mask."""
    augment = BoxAugment(sizes=(160, 192), max_size=256, crop=True, iou_crop=True, photometric=True)
    data = DrawnObjects(size=448, train_images=8, batch_size=4, num_workers=0, augment=augment)
    data.setup()
    data.use_masks()
    checked = 0
    for batch in data.train_dataloader():
        for image, target in zip(batch['image'], batch['target']):
            assert max(image.shape[1:]) <= 256 and target['masks'].shape[1:] == image.shape[1:]
            for box, mask in zip(target['boxes'], target['masks']):
                if mask.any():
                    rows, columns = mask.nonzero().unbind(1)
                    drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                    assert (drawn[:2] >= box[:2] - 1.5).all() and (drawn[2:] <= box[2:] + 1.5).all()
                    checked += 1
    assert checked > 8


# the task


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detect')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


TINY = ['--trainer.accelerator=cpu', '--data.train_images=8', '--data.val_images=4', '--data.test_images=4']
TINY += ['--data.batch_size=2', '--data.size=64', '--model.resize.size=64', '--data.augment.sizes=[64]']
MASKS = ['--model.detector=mask_rcnn', '--model.neck.width=16', '--model.neck.out_indices=[1,2]']
MASKS += ['--model.options={"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}']


@pytest.fixture(scope='module')
def run(here):
    """A Mask R-CNN after two epochs of four steps."""
    config = str(ROOT / 'detect' / 'quickstart.yaml')
    assert main(['fit', f'--config={config}', *TINY, *MASKS, '--trainer.max_epochs=2', '--run.name=masks']) == 0
    return here / 'runs' / 'masks'


def test_fit_leaves_a_report(run):
    rows = list(csv.DictReader((run / 'metrics.csv').open()))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {'train/loss_mask', 'train/loss_objectness', 'train/loss_box_reg', 'val/map50', 'val/mask_map'} <= logged
    report = run / 'report'
    for name in ('curves.png', 'validation.png', 'detections.png'):
        Image.open(report / name).verify()
    assert [row['class'] for row in csv.DictReader((report / 'per_class.csv').open())] == list(
        zoo.data._drawing.CLASSES
    )


def test_written_detections_are_what_coco_evaluates(run, here):
    """The file of a test gives pycocotools alone the same mean average precision."""
    assert main(['test', f'--ckpt_path={run}/checkpoints/best.ckpt', '--output=tested']) == 0
    data = DrawnObjects(size=64, test_images=4, num_workers=0)
    data.setup()
    truth = {'images': [], 'annotations': [], 'categories': [{'id': i} for i in data.category_ids]}
    metric = build_map(masks=False)
    found = json.loads((here / 'tested' / 'detections.json').read_text())
    assert found and {'image_id', 'category_id', 'bbox', 'score', 'segmentation'} <= found[0].keys()
    for index in range(4):
        _, target = data.splits['test'].load(index, 0, False)
        truth['images'].append({'id': index, 'height': 64, 'width': 64})
        rows = [row for row in found if row['image_id'] == index]
        boxes = torch.tensor([row['bbox'] for row in rows]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([row['score'] for row in rows])
        labels = torch.tensor([row['category_id'] - 1 for row in rows], dtype=torch.long)
        metric.update([dict(boxes=boxes, scores=scores, labels=labels)], [target])
        for (left, top, right, bottom), label, area in zip(*(target[k].tolist() for k in ('boxes', 'labels', 'area'))):
            box = [left, top, right - left, bottom - top]
            entry = {'id': len(truth['annotations']) + 1, 'image_id': index, 'category_id': label + 1, 'bbox': box}
            truth['annotations'].append({**entry, 'area': area, 'iscrowd': 0})
    (here / 'truth.json').write_text(json.dumps(truth))
    coco = COCO(str(here / 'truth.json'))
    judge = COCOeval(coco, coco.loadRes(str(here / 'tested' / 'detections.json')), 'bbox')
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert judge.stats[0] == pytest.approx(float(metric.compute()['map']), abs=1e-6)


def test_predict(run, here, capsys):
    (here / 'bad.jpg').write_bytes(b'no image')
    arguments = [f'--ckpt_path={run}/checkpoints/best.ckpt', '--images', f'{run}/samples', 'bad.jpg', '--output=found']
    with pytest.warns(RuntimeWarning, match='skipped unreadable image bad.jpg'):
        assert main(['predict', *arguments]) == 0
    assert '4 images, 1 unreadable' in capsys.readouterr().out
    about = json.loads((here / 'found' / 'images.json').read_text())
    assert about['unreadable'][0]['file_name'] == 'bad.jpg' and [c['name'] for c in about['categories']]
    assert [entry['id'] for entry in about['images']] == [0, 1, 2, 3]  # files are called 00.png and so on
    results = json.loads((here / 'found' / 'detections.json').read_text())
    assert {row['image_id'] for row in results} <= {0, 1, 2, 3}
    assert len(list((here / 'found' / 'drawn').glob('*.png'))) == 4


def test_resumed_run_is_the_same_run(run, here):
    """Stopped in mid-epoch and resumed: every weight as if it had never stopped."""
    config = str(ROOT / 'detect' / 'quickstart.yaml')
    arguments = [f'--config={config}', *TINY, '--trainer.max_epochs=2', '--run.test_after_fit=false']
    arguments += ['--model.neck.width=16', '--run.save_every_n_steps=3', '--model.ema.decay=0.9']
    assert main(['fit', *arguments, '--run.name=whole']) == 0
    assert main(['fit', *arguments, '--run.name=parts']) == 0
    parts = here / 'runs' / 'parts' / 'checkpoints'
    middle = [p for p in parts.glob('*.ckpt') if read_checkpoint(p)['global_step'] % 4]
    assert middle, 'no checkpoint of the middle of an epoch was kept'
    assert main(['fit', *arguments, '--run.name=parts', f'--ckpt_path={middle[0]}']) == 0
    whole, again = (
        read_checkpoint(here / 'runs' / name / 'checkpoints' / 'last.ckpt')['state_dict'] for name in ('whole', 'parts')
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--model.net=vig_hier_tny_224'], 'Did you mean vig_hier_tiny_224'),
        (['--model.num_classes=4'], 'set --model.num_classes 6'),
        (['--model.detector=ssdlite', '--model.neck.out_indices=[2,3]'], '--data.augment.square true'),
        (['--model.options={"score_thresh": 0.1, "no_such": 1}'], 'retinanet has no options no_such'),
        (['--model.neck.frozen=9'], 'frozen=9'),
        (['--data.most=20'], 'most 20 within 1..8'),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else '',
)
def test_mistakes_fit_on_a_screen(here, arguments, words, capsys):
    config = str(ROOT / 'detect' / 'quickstart.yaml')
    assert main(['fit', f'--config={config}', *TINY, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) < 20


def test_divergence_is_named(tmp_path):
    model = Detect('test_ravlt', 6, neck=Neck(width=16), resize=Resize(64, 64))
    data = DrawnObjects(size=64, batch_size=2, num_workers=0, augment=BoxAugment(sizes=(64,)))
    model.net.model.head.regression_head.bbox_reg.bias.data.fill_(float('nan'))
    trainer = Trainer(
        max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    with pytest.raises(zoo.errors.RunError, match='bbox_regression is not finite at step 0') as caught:
        trainer.fit(model, datamodule=data)
    assert 'parameter model.head.regression_head.bbox_reg.bias' in str(caught.value)


def test_missing_pycocotools(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pycocotools', None)
    with pytest.raises(zoo.errors.ZooError, match=r'pip install "linear-zoo\[detect\]"'):
        Detect('test_ravlt', 6)


# configs

# the test variant of each family, so that a default run need not train tens of millions of parameters
TESTED = {'ravlt': 'test_ravlt', 'vig_hier': 'test_vig_hier', 'vig_': 'test_vig', 'mobilemamba': 'test_mobilemamba'}


def two_steps(path, folder, tiny):
    config = yaml.safe_load(path.read_text())
    size = 96 if config['model']['init_args']['detector'] == 'ssdlite' else 64
    overrides = ['--trainer.max_steps=2', '--trainer.limit_val_batches=1', '--run.test_after_fit=false']
    overrides += ['--trainer.accelerator=cpu', '--trainer.devices=1', '--trainer.num_nodes=1']
    overrides += ['--trainer.precision=32-true', '--trainer.enable_checkpointing=false', '--data.num_workers=0']
    overrides += [f'--data.augment.sizes=[{size}]', f'--model.resize.size={size}', '--data.batch_size=2']
    if config['data']['class_path'].endswith('CocoObjects'):
        data = coco_folder(folder / 'coco')
        overrides += [f'--data.path={data}', '--model.num_classes=2', '--model.pretrained=false']
    else:
        overrides += ['--data.train_images=8', '--data.val_images=4', f'--data.size={size}']
    net = config['model']['init_args']['net']
    if tiny and not net.startswith('test_'):
        overrides += [f'--model.net={next(v for k, v in TESTED.items() if net.startswith(k))}', '--model.neck.width=16']
    return config, overrides


# a 3x recipe is its 1x recipe with another schedule and another augmentation
RECIPES = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * p.stem.endswith('_3x')) for p in CONFIGS]


@pytest.mark.parametrize('tiny', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['small', 'as it is'])
@pytest.mark.parametrize('path', RECIPES)
def test_config_takes_two_steps(path, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, overrides = two_steps(path, tmp_path, tiny)
    assert main(['fit', f'--config={path}', *overrides]) == 0, capsys.readouterr().err
    saved = yaml.safe_load((tmp_path / 'runs' / config['run']['name'] / 'config.yaml').read_text())
    assert path.stem in config['run']['name'] and saved['trainer']['max_steps'] == 2
    assert saved['model']['init_args']['detector'] == config['model']['init_args']['detector']
