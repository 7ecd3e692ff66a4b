"""Data with masks: layouts, transforms that keep image and mask together, and bad masks named and counted."""

import random

import numpy as np
import pytest
import torch
from mask_folders import ade, cityscapes
from PIL import Image

from zoo.data import Cityscapes, DrawnMasks, HubMasks, MaskAugment, MaskFolder, MaskView
from zoo.data._mask_transforms import EvalMasks, TrainMasks, distort
from zoo.data.segmentation import label_table
from zoo.errors import ZooError

VIEW = MaskView(crop=(32, 48), short=64)


def batches(data, split='train'):
    data.setup()
    return list(getattr(data, f'{split}_dataloader')())


# transforms


def coded(height, width):
    """An image whose colour says which of 9 regions a pixel is in, and the mask of the regions."""
    mask = np.add.outer(np.arange(height) * 3 // height * 3, np.arange(width) * 3 // width).astype(np.uint8)
    return Image.fromarray(np.stack([mask * 28] * 3, -1)), mask


@pytest.mark.parametrize('shape', [(60, 100), (100, 60), (31, 33)])
@pytest.mark.parametrize('scale', [(0.5, 2.0), (0.2, 0.3), (1.0, 1.0)])
def test_image_and_mask_stay_together(shape, scale):
    image, mask = coded(*shape)
    view = MaskView(crop=(32, 48), short=64, mean=(0, 0, 0), std=(1, 1, 1))
    transform = TrainMasks(view, MaskAugment(scale=scale, vflip=0.5, photometric=False))
    agree = []
    for seed in range(12):
        random.seed(seed)
        pixels, target = transform(image, mask)
        assert pixels.shape == (3, 32, 48) and pixels.dtype == torch.float32
        assert target.shape == (32, 48) and target.dtype == torch.uint8
        inside = target != 255
        assert (pixels[:, ~inside] == 0).all()
        regions = (pixels[0] * 255 / 28).round()
        agree.append((regions[inside] == target[inside]).float().mean())
    assert np.mean(agree) > 0.85 and np.min(agree) > 0.75  # blended borders between regions disagree


def test_crops_are_not_of_one_class():
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, :16] = 1
    transform = TrainMasks(MaskView(crop=(20, 20), short=None), MaskAugment(scale=(1, 1), most_of_a_class=0.8))
    alone = 0
    for seed in range(40):
        random.seed(seed)
        alone += len(transform(Image.new('RGB', (64, 64)), mask)[1].unique()) == 1
    assert alone < 20, 'without the rule about 33 of 40 are'


def test_crops_are_evenly_spread():
    transform = TrainMasks(MaskView(crop=(8, 8), short=None), MaskAugment(scale=(1, 1), most_of_a_class=1, hflip=0))
    mask = np.arange(16, dtype=np.uint8)[None].repeat(16, 0)
    random.seed(0)
    corners = [int(transform(Image.new('RGB', (16, 16)), mask)[1][0, 0]) for _ in range(300)]
    assert set(corners) == set(range(9))


@pytest.mark.parametrize(('size', 'expected'), [((100, 80), (80, 64)), ((80, 100), (64, 80)), ((1000, 50), (200, 10))])
def test_evaluation_keeps_the_mask(size, expected):
    image, mask = coded(*size[::-1])
    pixels, target = EvalMasks(MaskView(short=64, long=200))(image, mask)
    assert pixels.shape == (3, *expected[::-1]) and np.array_equal(target.numpy(), mask)


def test_distortion_changes_colours_only():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    random.seed(1)
    found = [np.asarray(distort(image), int) for _ in range(60)]
    shifts = [np.abs(f - np.asarray(image, int)).mean() for f in found]
    assert found[0].shape == (20, 20, 3) and sum(s == 0 for s in shifts) < 15 and max(shifts) > 20
    grey = Image.fromarray(np.full((4, 4, 3), 128, np.uint8))
    for _ in range(20):  # saturation and hue leave grey as it is
        pixels = np.asarray(distort(grey))
        assert (pixels == pixels[..., :1]).all()


def test_numbers_of_files():
    assert label_table(True)[[0, 1, 150, 255]].tolist() == [255, 0, 149, 255] and label_table(False) is None
    assert label_table(False, {7: 0, 9: 1})[[0, 7, 8, 9]].tolist() == [255, 0, 255, 1]
    for reduce_zero_label, labels in ((True, {7: 0}), (False, {256: 0}), (False, {0: -1})):
        with pytest.raises(ZooError, match='data.labels'):
            label_table(reduce_zero_label, labels)


# layouts


def test_ade_layout(tmp_path):
    data = MaskFolder(str(ade(tmp_path)), batch_size=2, num_workers=0, view=VIEW)
    batch = batches(data)[0]
    assert data.num_classes == 150 and data.class_names[:2] == ['class 1', 'class 2']
    assert batch['image'].shape == (2, 3, 32, 48) and batch['mask'].shape == (2, 32, 48)
    assert not batch['failures'] and set(batch['mask'].unique().tolist()) <= {*range(150), 255}
    found = batches(data, 'val')
    assert len(found) == 4 and found[0]['mask'].shape == (1, 70, 90) and found[0]['image'].shape == (1, 3, 64, 82)
    raw = np.asarray(Image.open(tmp_path / 'annotations' / 'validation' / '0.png'))
    assert np.array_equal(found[0]['mask'][0].numpy(), np.where(raw == 0, 255, raw - 1))


def test_training_is_a_function_of_seed_and_epoch(tmp_path):
    ade(tmp_path)
    a, b = (batches(MaskFolder(str(tmp_path), batch_size=2, num_workers=n, view=VIEW)) for n in (0, 1))
    assert all(torch.equal(x['image'], y['image']) and torch.equal(x['mask'], y['mask']) for x, y in zip(a, b))


def test_images_of_several_sizes(tmp_path):
    ade(tmp_path)
    Image.new('RGB', (50, 50)).save(tmp_path / 'images' / 'validation' / '0.jpg')
    Image.new('L', (50, 50)).save(tmp_path / 'annotations' / 'validation' / '0.png')
    data = MaskFolder(str(tmp_path), batch_size=2, eval_batch_size=2, num_workers=0, view=VIEW)
    first, second = batches(data, 'val')
    assert isinstance(first['image'], list) and [i.shape[-1] for i in first['image']] == [64, 82]
    assert second['image'].shape == (2, 3, 64, 82)


def test_bad_masks_are_named_and_counted(tmp_path):
    folder = ade(tmp_path, images=6) / 'annotations' / 'validation'
    (folder / '0.png').unlink()
    Image.new('L', (9, 9)).save(folder / '1.png')
    Image.new('RGB', (90, 70)).save(folder / '2.png')
    Image.new('L', (90, 70), 200).save(folder / '3.png')
    (folder / '4.png').write_bytes(b'no image')
    data = MaskFolder(str(tmp_path), batch_size=2, eval_batch_size=6, num_workers=0, view=VIEW)
    (batch,) = batches(data, 'val')
    assert len(batch['name']) == 1 and batch['name'][0].endswith('5.jpg')
    reasons = dict(batch['failures'])
    assert [name[-5:] for name in reasons] == ['0.jpg', '1.jpg', '2.jpg', '3.jpg', '4.jpg']
    for reason, text in zip(reasons.values(), ('no such mask', '9 x 9', 'mode RGB', 'holds 199', 'cannot identify')):
        assert text in reason and 'annotations/validation' in reason
    with pytest.warns(RuntimeWarning, match='9 x 9 pixels, the image 90 x 70'):
        data.report_failures(batch['failures'])
    assert data.skipped == 5
    data.strict = True
    with pytest.raises(ZooError, match=r'0\.jpg'):
        data.report_failures(batch['failures'])


def test_bad_masks_in_training_are_replaced(tmp_path):
    folder = ade(tmp_path) / 'annotations' / 'training'
    Image.new('L', (9, 9)).save(folder / '1.png')
    found = batches(MaskFolder(str(tmp_path), batch_size=4, num_workers=0, view=VIEW))
    assert found[0]['image'].shape[0] == 4 and len(found[0]['failures']) >= 1


@pytest.mark.parametrize('train_ids', [False, True])
def test_cityscapes_layout(tmp_path, train_ids):
    data = Cityscapes(str(cityscapes(tmp_path, train_ids)), batch_size=2, num_workers=0, view=VIEW)
    batch = batches(data, 'val')[0]
    assert data.num_classes == 19 and data.class_names[13] == 'car'
    labels = np.asarray(Image.open(next((tmp_path / 'gtFine' / 'val').rglob('*labelIds.png'))))
    mask = batch['mask'][0].numpy()
    if train_ids:
        assert np.array_equal(mask, labels % 19)
    else:
        for label, number in ((7, 0), (26, 13), (33, 18), (0, 255), (29, 255)):
            assert (mask[labels == label] == number).all()
    assert batches(data)[0]['image'].shape == (2, 3, 32, 48)


def test_hub_layout(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'annotation': datasets.Image()})
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]
        masks = [Image.fromarray(rng.integers(0, 5, (40, 50), dtype=np.uint8)) for _ in range(3)]
        masks[1] = masks[1].resize((20, 20))
        rows = datasets.Dataset.from_dict({'image': images, 'annotation': masks}, features=features)
        rows.to_parquet(tmp_path / f'{split}.parquet')
    options = dict(batch_size=2, num_workers=0, view=VIEW, cache_dir=str(tmp_path / 'cache'))
    data = HubMasks(str(tmp_path), num_classes=4, reduce_zero_label=True, **options)
    found = batches(data, 'val')
    assert [len(b['name']) for b in found] == [1, 0, 1]
    assert (
        'row 1' in found[1]['failures'][0][0]
        and 'column annotation: the mask has 20 x 20' in found[1]['failures'][0][1]
    )
    assert set(found[0]['mask'].unique().tolist()) == {0, 1, 2, 3, 255}
    with pytest.raises(ZooError, match='set --data.mask_column'):
        HubMasks(str(tmp_path), num_classes=4, mask_column='masks', **options).setup()


def test_drawn_scenes():
    data = DrawnMasks(size=40, train_images=6, val_images=2, batch_size=2, num_workers=0, view=MaskView((40, 40), None))
    batch = batches(data)[0]
    assert batch['image'].shape == (2, 3, 40, 40) and 0 in batch['mask'] and batch['mask'].max() < 7
    again = DrawnMasks(size=40, val_images=2, batch_size=2, num_workers=0, view=MaskView((40, 40), None))
    assert torch.equal(batches(data, 'val')[0]['image'], batches(again, 'val')[0]['image'])
    assert data.class_names[0] == 'ground' and data.num_classes == 7


def test_folders_that_are_wrong(tmp_path):
    with pytest.raises(ZooError, match='no such folder'):
        MaskFolder(str(tmp_path / 'none')).setup()
    ade(tmp_path)
    (tmp_path / 'objectInfo150.txt').unlink()
    with pytest.raises(ZooError, match='does not say which classes there are: give data.num_classes'):
        MaskFolder(str(tmp_path)).setup()
    with pytest.raises(ZooError, match='has 1 names, data.num_classes is 2'):
        MaskFolder(str(tmp_path), num_classes=2, class_names=['a']).setup()
    data = MaskFolder(str(tmp_path), num_classes=150, masks='images')
    with pytest.raises(ZooError, match='none of the 4 images .* has a mask: .*0.png was expected'):
        data.setup()
    with pytest.raises(ZooError, match='no such folder: .*leftImg8bit'):
        Cityscapes(str(tmp_path)).setup()
    with pytest.raises(ZooError, match='lower data.batch_size'):
        batches(MaskFolder(str(tmp_path), num_classes=150, batch_size=20, num_workers=0))


def test_one_folder_is_split(tmp_path):
    source = ade(tmp_path / 'a', images=10)
    (tmp_path / 'b').mkdir()
    for kind in ('images', 'annotations'):
        (source / kind / 'training').rename(tmp_path / 'b' / kind)
    data = MaskFolder(str(tmp_path / 'b'), num_classes=150, val_fraction=0.2, batch_size=2, num_workers=0)
    data.setup()
    assert (len(data.splits['train']), len(data.splits['val'])) == (8, 2)
