"""Data modules: splits, order, clear errors, unreadable files, streams."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from pictures import SMALL, picture
from PIL import Image

from zoo.data import Augment, Digits, HubImages, ImageFolder, ImageList, TarShards, View
from zoo.data.base import ListSource
from zoo.data.cache import CachedSource, DeviceTransform
from zoo.data.hub import open_cell
from zoo.data.sampling import EpochSampler, KeyedDataset
from zoo.data.seeding import derive_seed, keyed_randomness, keyed_uniform
from zoo.errors import ZooError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for name in ('ant', 'bee', 'cat'):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f'{number}.png').write_bytes(picture(rng))
    return tmp_path


# digits


def test_digits_split_is_fixed_and_disjoint():
    data = Digits(**SMALL)
    data.setup()
    assert {k: len(v) for k, v in data.splits.items()} == {'train': 1257, 'val': 180, 'test': 360}
    names = {k: {v.name(i) for i in range(len(v))} for k, v in data.splits.items()}
    assert not names['train'] & names['test'] and not names['train'] & names['val'] and not names['val'] & names['test']
    assert [data.splits['test'].name(i) for i in (0, 1, 359)] == ['digit-0003', 'digit-0007', 'digit-1796']
    counts = np.bincount([data.splits['test'].load(i)[1] for i in range(360)])
    assert counts.tolist() == [36] * 10


def test_loading_does_not_depend_on_workers():
    def first(workers):
        data = Digits(**{**SMALL, 'num_workers': workers}, augment=Augment(rotate=20, re_prob=1.0))
        data.setup()
        loader = iter(data.train_dataloader())
        return [next(loader) for _ in range(3)]

    torch.manual_seed(1)
    a = first(0)
    torch.manual_seed(2)
    for x, y in zip(a, first(2)):
        assert x['name'] == y['name'] and torch.equal(x['image'], y['image'])


def test_loading_leaves_global_randomness_alone():
    data = Digits(**SMALL)
    data.setup()
    loader = iter(data.train_dataloader())
    torch.manual_seed(5)
    next(loader)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


# order and randomness


def test_sampler_permutes_by_epoch_and_resumes():
    sampler = EpochSampler(10, seed=1, shuffle=True)
    first = [i for _, i in sampler]
    sampler.set_epoch(1)
    second = [i for _, i in sampler]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    sampler.resume(1, 4)
    sampler.set_epoch(1)
    assert [i for _, i in sampler] == second[4:] and len(sampler) == 10
    sampler.set_epoch(2)
    assert len(list(sampler)) == 10, 'the position is the resumed epoch only'


@pytest.mark.parametrize('shuffle', [True, False])
def test_ranks_share_without_overlap(shuffle):
    parts = [[i for _, i in EpochSampler(11, 0, shuffle, rank, 3)] for rank in range(3)]
    seen = [i for part in parts for i in part]
    assert len(seen) == len(set(seen)) == (9 if shuffle else 11)
    if shuffle:
        assert {len(p) for p in parts} == {3}


@pytest.mark.parametrize('world', [1, 2])
def test_repeated_augmentation(world):
    """Each image thrice, copies side by side over the ranks, as timm's sampler has it; another draw for each copy."""
    parts = [list(EpochSampler(12, 0, True, rank, world, repeats=3)) for rank in range(world)]
    keys = [key for keys in zip(*parts, strict=True) for key in keys]
    images = [index for _, index, _ in keys]
    assert len(set(images)) == 4 and all(len(set(images[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert [copy for *_, copy in keys] == 4 * [0, 1, 2]
    once = [index for _, index in EpochSampler(12, 0, True)]
    assert images[::3] == once[:4]
    assert [len(key) for key in EpochSampler(12, 0, False, repeats=3)] == 12 * [2], 'evaluation sees every image once'
    resumed = EpochSampler(12, 0, True, 0, world, repeats=3)
    resumed.resume(0, 2)
    assert list(resumed) == parts[0][2:]

    class Pictures:
        name = staticmethod(str)
        load = staticmethod(lambda index: (Image.new('RGB', (8, 8)), index))

        def __len__(self):
            return 12

    data = KeyedDataset(Pictures(), lambda image: torch.rand(1).item())
    assert len({data[key]['image'] for key in keys}) == 12
    assert data[keys[0]]['image'] == data[keys[0]]['image']


def test_seeds_differ_by_every_part_of_the_key():
    seeds = {derive_seed(*key) for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0))}
    assert len(seeds) == 5
    with keyed_randomness(1, 2):
        a = torch.rand(1), np.random.rand()
    with keyed_randomness(1, 2):
        b = torch.rand(1), np.random.rand()
    assert a == b


# folders


def test_folder(folder):
    data = ImageFolder(str(folder), **SMALL)
    data.setup()
    assert data.class_names == ['ant', 'bee', 'cat'] and len(data.splits['train']) == 12
    batch = next(iter(data.train_dataloader()))
    assert batch['image'].shape == (4, 3, 16, 16) and batch['target'].dtype == torch.long
    assert sum(len(b['target']) for b in data.test_dataloader()) == 6, 'without a test folder, test reads val'


def test_folder_of_classes_is_split(folder):
    data = ImageFolder(str(folder / 'train'), val_fraction=0.25, **SMALL)
    data.setup()
    train, val = data.splits['train'], data.splits['val']
    assert (len(train), len(val)) == (9, 3)
    assert not {train.name(i) for i in range(9)} & {val.name(i) for i in range(3)}


def test_missing_path(tmp_path):
    with pytest.raises(ZooError, match='no such folder.*nowhere'):
        ImageFolder(str(tmp_path / 'nowhere'), **SMALL).setup()


def test_empty_class_folder(folder):
    (folder / 'train' / 'dog').mkdir()
    (folder / 'val' / 'dog').mkdir()
    with pytest.raises(ZooError, match='1 of 4 class folders.*hold no image: dog'):
        ImageFolder(str(folder), **SMALL).setup()


def test_different_classes(folder):
    (folder / 'val' / 'cat').rename(folder / 'val' / 'cow')
    with pytest.raises(ZooError, match='different classes(.|\n)*only in train: cat\n *only in val: cow'):
        ImageFolder(str(folder), **SMALL).setup()


def test_batch_larger_than_split(folder):
    data = ImageFolder(str(folder), **{**SMALL, 'batch_size': 64})
    data.setup()
    with pytest.raises(ZooError, match='12 images.*fewer than one batch of 64'):
        data.train_dataloader()


# unreadable images


@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'gone'])
def test_unreadable_is_replaced_in_training_and_counted(folder, damage):
    data = ImageFolder(str(folder), **{**SMALL, 'batch_size': 12})
    data.setup()
    path = folder / 'train' / 'bee' / '2.png'
    contents = {'cut': path.read_bytes()[:200], 'text': b'not an image', 'empty': b''}
    path.unlink()
    if damage != 'gone':
        path.write_bytes(contents[damage])
    batch = next(iter(data.train_dataloader()))
    assert len(batch['target']) == 12, 'a batch keeps its size'
    assert [name for name, _ in batch['failures']] == [str(path)]
    with pytest.warns(RuntimeWarning, match='skipped unreadable image .*bee/2.png.*1 so far'):
        data.report_failures(batch['failures'])
    assert data.skipped == 1


def test_unreadable_is_left_out_in_evaluation(folder):
    (folder / 'val' / 'ant' / '0.png').write_bytes(b'x')
    data = ImageFolder(str(folder), **SMALL)
    data.setup()
    batches = list(data.val_dataloader())
    assert sum(len(b['target']) for b in batches) == 5
    assert sum(len(b['failures']) for b in batches) == 1


def test_strict_names_the_file(folder):
    (folder / 'val' / 'ant' / '0.png').write_bytes(b'x')
    data = ImageFolder(str(folder), strict=True, **SMALL)
    data.setup()
    with pytest.raises(ZooError, match='val/ant/0.png'):
        for batch in data.val_dataloader():
            data.report_failures(batch['failures'])


def test_warnings_do_not_flood(folder):
    data = ImageFolder(str(folder), **SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        data.report_failures([(f'{i}.png', 'bad') for i in range(2000)])
    assert data.skipped == 2000 and len(caught) == 5


def test_a_split_of_bad_images_does_not_hang():
    class Bad:
        def __len__(self):
            return 3

        def name(self, index):
            return f'bad-{index}'

        def load(self, index):
            raise OSError('broken')

    sample = KeyedDataset(Bad(), None, substitute=True)[(0, 1)]
    assert sample['image'] is None and 1 < len(sample['failures']) < 20


# views


def test_grey_view():
    view = View(size=8, channels=1)
    assert len(view.mean) == 1 and view.mode == 'L'
    data = Digits(**{**SMALL, 'view': view})
    data.setup()
    assert next(iter(data.train_dataloader()))['image'].shape == (4, 1, 8, 8)


@pytest.mark.parametrize('wrong', [{'channels': 2}, {'size': 0}, {'crop_pct': 1.5}, {'mean': (0.5, 0.5)}])
def test_wrong_view(wrong):
    with pytest.raises(ZooError, match='view'):
        View(**wrong)


# loose images


def test_image_list(folder, tmp_path):
    data = ImageList([str(folder / 'val'), str(folder / 'train' / 'ant' / '0.png')], View(size=16))
    data.setup()
    assert sum(len(b['name']) for b in data.predict_dataloader()) == 7
    with pytest.raises(ZooError, match='no such file or folder'):
        ImageList([str(tmp_path / 'gone.png')], View()).setup()
    (tmp_path / 'void').mkdir()
    with pytest.raises(ZooError, match='holds no image'):
        ImageList([str(tmp_path / 'void')], View()).setup()


# Hugging Face data sets


@pytest.fixture
def parquet(tmp_path):
    datasets = pytest.importorskip('datasets')
    rng = np.random.default_rng(0)
    features = datasets.Features({'img': datasets.Image(), 'label': datasets.ClassLabel(names=['no', 'yes'])})
    for split, count in (('train', 20), ('test', 6)):
        rows = {'img': [{'bytes': picture(rng), 'path': None} for _ in range(count)], 'label': [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f'{split}.parquet')
    return tmp_path


def test_local_parquet(parquet, tmp_path):
    data = HubImages(str(parquet), cache_dir=str(tmp_path / 'cache'), **SMALL)
    data.setup()
    assert data.class_names == ['no', 'yes']
    assert {k: len(v) for k, v in data.splits.items()} == {'train': 18, 'test': 6, 'val': 2}
    batch = next(iter(data.train_dataloader()))
    assert batch['image'].shape == (4, 3, 16, 16) and set(batch['target'].tolist()) <= {0, 1}


def test_parquet_with_string_labels_and_a_bad_image(tmp_path):
    datasets = pytest.importorskip('datasets')
    rng = np.random.default_rng(0)
    rows = {'picture': [{'bytes': picture(rng), 'path': None} for _ in range(8)], 'kind': ['b', 'a'] * 4}
    rows['picture'][3]['bytes'] = b'broken'
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / 'train.parquet')
    wrong = HubImages(str(tmp_path), cache_dir=str(tmp_path / 'cache'), **SMALL)
    with pytest.raises(ZooError, match='set --data.label_column; the columns are picture, kind'):
        wrong.setup()
    data = HubImages(str(tmp_path), label_column='kind', cache_dir=str(tmp_path / 'cache'), val_fraction=0.1, **SMALL)
    data.setup()
    assert data.class_names == ['a', 'b']
    failures = [f for split in ('train', 'val') for b in data._eval_loader(split) for f in b['failures']]
    assert len(failures) == 1 and 'row 3' in failures[0][0]


def test_a_row_without_an_image_is_one_bad_row():
    for cell in (None, {'bytes': None, 'path': None}, {}):
        with pytest.raises(ValueError, match='there is no image'):
            open_cell(cell)


def test_parquet_is_missing(tmp_path):
    with pytest.raises(ZooError, match='no such file or folder'):
        HubImages(str(tmp_path / 'gone'), **SMALL).setup()
    with pytest.raises(ZooError, match='holds none of train'):
        HubImages(str(tmp_path), **SMALL).setup()


# decoded images in memory, transforms on the device


@pytest.fixture
def spoilt(folder):
    (folder / 'train' / 'bee' / '1.png').write_bytes(b'not an image')
    return folder


def batches(loader):
    return [{**b, 'image': b['image'].clone()} for b in loader]


@pytest.mark.parametrize('workers', [0, 2])
def test_cached_images_are_the_same(spoilt, workers):
    """The same batches, substitutes of the unreadable one and its report included."""
    found = []
    for cache in (None, 'memory'):
        data = ImageFolder(str(spoilt), **{**SMALL, 'num_workers': workers}, cache=cache)
        data.setup()
        found.append(batches(data.train_dataloader()) + batches(data.val_dataloader()))
    for plain, cached in zip(*found):
        assert torch.equal(plain['image'], cached['image']) and torch.equal(plain['target'], cached['target'])
        assert plain['name'] == cached['name'] and len(plain['failures']) == len(cached['failures'])
    assert sum(len(b['failures']) for b in found[1]) == 1


def test_cache_keeps_images_of_any_size_and_mode():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((3, 5), (7, 2), (3, 5))]
    source = ListSource([(str(i), i) for i in range(3)], lambda name: Image.fromarray(arrays[int(name)]))
    for mode in ('L', 'RGB'):
        cached = CachedSource(source, mode)
        assert cached.size is None and len(cached) == 3
        for i, array in enumerate(arrays):
            image, target = cached.load(i)
            assert image.mode == mode and target == i
            assert np.array_equal(np.array(image), np.array(Image.fromarray(array).convert(mode)))


def device_folder(folder, **kwargs):
    data = ImageFolder(str(folder), **{**SMALL, **kwargs}, cache='memory', transform_on='device')
    data.setup()
    return data


def on_device(data, loader):
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=None)


@pytest.mark.parametrize('channels', [1, 3])
def test_device_evaluation_is_that_of_the_worker(folder, channels):
    view = View(size=16, crop_pct=0.8, channels=channels)
    device = device_folder(folder, view=view, augment=PLAIN)
    worker = ImageFolder(str(folder), **{**SMALL, 'view': view})
    worker.setup()
    for a, b in zip(on_device(device, device.val_dataloader()), worker.val_dataloader()):
        assert a['name'] == b['name'] and a['image'].shape == b['image'].shape and 'uniform' not in a
        assert (a['image'] - b['image']).abs().max() < 0.03, 'a uint8 step of rounding, divided by std'


def test_device_crop_of_the_whole_image_is_the_image(folder):
    """Scale 1 on square images: pixel for pixel, mirrored with hflip 1."""
    for path in folder.rglob('*.png'):
        Image.open(path).resize((16, 16)).save(path)
    whole = device_folder(folder, augment=PLAIN)
    mirrored = device_folder(folder, augment=dataclasses.replace(PLAIN, hflip=1.0))
    raw = {whole.splits['train'].name(i): np.array(whole.splits['train'].load(i)[0]) for i in range(12)}
    for a, b in zip(on_device(whole, whole.train_dataloader()), on_device(mirrored, mirrored.train_dataloader())):
        assert torch.allclose(a['image'], b['image'].flip(-1), atol=1e-4)
        std, mean = (torch.tensor(x).view(3, 1, 1) for x in (whole.view.std, whole.view.mean))
        for image, name in zip(a['image'], a['name']):
            expected = torch.from_numpy(raw[name]).permute(2, 0, 1)
            assert torch.allclose((image * std + mean) * 255, expected.float(), atol=1e-2)


def test_device_crops_keep_to_scale_and_image():
    augment = Augment(scale=(0.3, 0.6), ratio=(0.5, 2.0), hflip=0.25, color_jitter=None)
    transform = DeviceTransform(View(size=9), augment)
    index = torch.arange(4000)
    uniform = keyed_uniform(3, torch.zeros_like(index), index, DeviceTransform.RANDOM_NUMBERS)
    grid = transform.crops(uniform, (30, 40))
    width, height = (grid[:, 0, -1, 0] - grid[:, 0, 0, 0]) / 2, (grid[:, -1, 0, 1] - grid[:, 0, 0, 1]) / 2
    w, h = width.abs() * 40 * 9 / 8, height * 30 * 9 / 8  # between the centres of the outer pixels: 8 of 9
    assert grid.abs().max() <= 1 and (width < 0).float().mean() == pytest.approx(0.25, abs=0.03)
    area, ratio = w * h / 1200, w / h
    assert 0.299 < area.min() < 0.32 and 0.58 < area.max() < 0.601 and area.mean() == pytest.approx(0.45, abs=0.01)
    assert 0.499 < ratio.min() < 0.53 and 1.9 < ratio.max() < 2.001


def test_keyed_uniform_is_uniform_and_keyed():
    epochs, index = torch.zeros(20000, dtype=torch.long), torch.arange(20000)
    a = keyed_uniform(0, epochs, index, 3)
    assert a.dtype == torch.float32 and 0 <= a.min() and a.max() < 1
    assert torch.allclose(a.mean(0), torch.full((3,), 0.5), atol=0.01)
    assert torch.allclose(a.var(0), torch.full((3,), 1 / 12), atol=0.002)
    others = [keyed_uniform(1, epochs, index, 3), keyed_uniform(0, epochs + 1, index, 3), a.roll(1, 0), a.roll(1, 1)]
    for b in others:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.02
    assert torch.equal(a[7:9], keyed_uniform(0, epochs[7:9], index[7:9], 3)), 'not of the rest of the batch'


def test_device_transforms_resume_and_replace(spoilt):
    """Random numbers follow epoch and index, not the place in the run; unreadable images are replaced and reported."""
    data = device_folder(spoilt, augment=Augment(color_jitter=None))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    whole = on_device(data, loader)
    loader.sampler.resume(1, 4)
    for a, b in zip(whole[1:], on_device(data, loader)):
        assert a['name'] == b['name'] and torch.equal(a['image'], b['image'])
    loader.sampler.set_epoch(2)
    assert not torch.equal(whole[0]['image'], on_device(data, loader)[0]['image'])
    assert sum(len(b['failures']) for b in whole) == 1 and all(len(b['image']) == 4 for b in whole)


def test_device_transforms_say_what_they_cannot_do(folder):
    simple = {**SMALL, 'augment': Augment(color_jitter=None)}
    with pytest.raises(ZooError, match='cache: memory'):
        ImageFolder(str(folder), **simple, transform_on='device')
    with pytest.raises(ZooError, match='auto_augment, augment.re_prob, augment.color_jitter'):
        device_folder(folder, augment=Augment(auto_augment='rand-m9', re_prob=0.1))
    with pytest.raises(ZooError, match='20 x 24 pixels are too large for view.size 8'):
        device_folder(folder, **{**simple, 'view': View(size=8)})
    Image.new('RGB', (9, 9)).save(folder / 'train' / 'ant' / '0.png')
    with pytest.raises(ZooError, match='train split differ'):
        device_folder(folder, **simple)
    with pytest.raises(ZooError, match='streams'):
        TarShards('a.tar', 'b.tar', num_classes=2, train_samples=8, cache='memory')
