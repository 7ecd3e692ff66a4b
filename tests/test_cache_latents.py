"""Captioned images, buckets of aspect ratios, and caches of latents."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.cli import main
from zoo.data import CachedLatents, CaptionedImages, Framing
from zoo.data.captions import find_buckets, open_captions
from zoo.data.sampling import BucketBatches
from zoo.errors import ZooError
from zoo.tasks._denoising import Frame, load_pipeline
from zoo.tools.cache_latents import plan_shards

# framing and buckets


def test_buckets_keep_the_area():
    framing = Framing(size=512, bucket_step=64, max_ratio=2)
    assert (512, 512) in framing.buckets and len(framing.buckets) > 4
    for height, width in framing.buckets:
        assert height % 64 == width % 64 == 0 and height * width <= 512**2
        assert max(height, width) / min(height, width) <= 2 and (width, height) in framing.buckets
        assert height * width > 0.8 * 512**2
    for height, width in ((512, 512), (1000, 500), (300, 1000), (77, 80)):
        chosen = framing.buckets[framing.bucket(height, width)]
        best = min(framing.buckets, key=lambda b: abs(math.log(b[0] / b[1]) - math.log(height / width)))
        assert chosen == best
    assert Framing(size=64).buckets == [(64, 64)]


@pytest.mark.parametrize(('height', 'width'), [(40, 40), (30, 61), (61, 30), (16, 16), (7, 9)])
def test_crop_is_the_centre_of_the_resized_image(height, width):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels, sizes = Framing(size=16, interpolation='bilinear')(image)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32 and -1 <= pixels.min() <= pixels.max() <= 1
    scale = max(16 / height, 16 / width)
    inner = (max(16, round(height * scale)), max(16, round(width * scale)))
    top, left = (inner[0] - 16) // 2, (inner[1] - 16) // 2
    assert sizes.tolist() == [height, width, top, left, 16, 16]
    expected = np.asarray(image.resize(inner[::-1], Image.Resampling.BILINEAR))[top : top + 16, left : left + 16]
    torch.testing.assert_close(
        (pixels + 1) * 127.5, torch.tensor(expected.copy()).permute(2, 0, 1).float(), atol=2, rtol=0
    )


def test_square_is_opencvs_resize():
    """Cubic interpolation with a = -0.75 between the four neighbours, no filter: written out for one row."""
    rng = np.random.default_rng(0)
    row = rng.integers(60, 190, 12, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(row[None, :, None], (8, 12, 3)).copy())
    pixels, _ = Framing(size=8, resize='square', antialias=False)(image)

    def weight(x, a=-0.75):
        x = abs(x)
        return (
            (a + 2) * x**3 - (a + 3) * x**2 + 1
            if x <= 1
            else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            if x < 2
            else 0
        )

    for place in range(8):
        at = (place + 0.5) * 12 / 8 - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        value = sum(weight(at - i) * float(row[min(max(i, 0), 11)]) for i in near)
        assert float((pixels[0, 3, place] + 1) * 127.5) == pytest.approx(value, abs=1)


def test_flips_mirror_the_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 30, 3), dtype=np.uint8))
    (plain, sizes), (flipped, mirrored) = (Framing(size=16, hflip=p)(image) for p in (0.0, 1.0))
    assert torch.equal(flipped, plain.flip(-1)) and mirrored[3] == 30 - 16 - sizes[3]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'size': 500}, 'multiple of 8'),
        ({'size': 64, 'bucket_step': 48}, 'divides framing.size 64'),
        ({'resize': 'square', 'bucket_step': 64}, 'resize: crop'),
        ({'max_ratio': 0.5}, 'at least 1'),
    ],
)
def test_framings_that_cannot_be(settings, message):
    with pytest.raises(ZooError, match=message):
        Framing(**settings)


# the order of batches


def test_batches_of_one_bucket_in_keyed_order():
    buckets = [i % 3 for i in range(50)]
    batches = list(BucketBatches(buckets, 4, 1, shuffle=True))
    assert len(batches) == len(BucketBatches(buckets, 4, 1, shuffle=True)) == 4 * 3
    for batch in batches:
        assert len(batch) == 4 and len({buckets[i] for _, i in batch}) == 1
    seen = [i for batch in batches for _, i in batch]
    assert len(set(seen)) == len(seen)
    again, later, other = (BucketBatches(buckets, 4, seed, shuffle=True) for seed in (1, 1, 2))
    later.set_epoch(1)
    assert list(again) == batches
    assert [[i for _, i in b] for b in later] != [[i for _, i in b] for b in batches] and list(other) != batches
    resumed = BucketBatches(buckets, 4, 1, shuffle=True)
    resumed.resume(0, 5)
    assert list(resumed) == batches[5:]
    resumed.set_epoch(1)
    assert list(resumed) == list(later)


def test_ranks_share_batches():
    buckets = [i % 2 for i in range(40)]
    parts = [list(BucketBatches(buckets, 3, 1, True, rank, 2)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 6
    for one, two in zip(*parts):
        assert {buckets[i] for _, i in one} == {buckets[i] for _, i in two} and not set(one) & set(two)
    held = [list(BucketBatches(buckets, 3, 1, False, rank, 2)) for rank in (0, 1)]
    assert sorted(i for part in held for batch in part for _, i in batch) == list(range(40))
    assert [len(p) for p in held] == [len(BucketBatches(buckets, 3, 1, False, rank, 2)) for rank in (0, 1)]


# captions


def tar_of(folder, path, described=False):
    with tarfile.open(path, 'w') as tar:
        for image in sorted(folder.glob('*.png')):
            caption = image.with_suffix('.txt').read_text()
            text = json.dumps({'text': caption}) if described else caption
            for name, data in (
                (image.name, image.read_bytes()),
                (f'{image.stem}.{"json" if described else "txt"}', text.encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def parquet_of(folder, path):
    datasets = pytest.importorskip('datasets')
    images = sorted(folder.glob('*.png'))
    rows = {'image': [Image.open(p) for p in images], 'text': [p.with_suffix('.txt').read_text() for p in images]}
    features = datasets.Features({'image': datasets.Image(), 'text': datasets.Value('string')})
    path.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / 'train.parquet')
    return path


def test_every_place_gives_the_same(tmp_path):
    folder = tiny_pipelines.captioned_folder(tmp_path / 'images')
    plain = open_captions(str(folder))
    images = [plain.open(i) for i in range(len(plain))]
    assert len(images) == 6 and images[0][1] == 'caption a x'
    rows = [{'file_name': p.name, 'text': p.with_suffix('.txt').read_text()} for p in sorted(folder.glob('*.png'))]
    tars = [tar_of(folder, tmp_path / 'a.tar'), tar_of(folder, tmp_path / 'b.tar', described=True)]
    listed = tmp_path / 'listed'
    folder.rename(listed)
    (listed / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    cache = str(tmp_path / 'cache')
    places = [*map(str, tars), str(listed), str(parquet_of(listed, tmp_path / 'rows'))]
    for place in places:
        source = open_captions(place, cache_dir=cache)
        assert len(source) == 6
        for index, (image, caption) in enumerate(images):
            found, text = source.open(index)
            assert text == caption and source.name(index)
            if place != places[2]:  # the files of the first source have moved
                assert found.size == image.size
    (tmp_path / 'captions.json').write_text(json.dumps([f'other {i}' for i in range(6)]))
    source = open_captions(places[3], captions=str(tmp_path / 'captions.json'), cache_dir=cache)
    assert source.open(4)[1] == 'other 4'
    assert len(open_captions(f'{tmp_path}/{{a,b}}.tar')) == 12


def test_captions_that_are_not_there(tmp_path):
    folder = tiny_pipelines.captioned_folder(tmp_path / 'images', 2)
    rows = parquet_of(folder, tmp_path / 'rows')
    (tmp_path / 'captions.json').write_text('["one"]')
    (tmp_path / 'empty').mkdir()
    tar_of(folder, tmp_path / 'a.tar')
    (tmp_path / 'cut.tar').write_bytes((tmp_path / 'a.tar').read_bytes()[:700])
    cache = {'cache_dir': str(tmp_path / 'cache')}
    for place, options, message in (
        (tmp_path / 'empty', {}, 'no images with captions'),
        (tmp_path / 'none.tar', {}, 'do not exist'),
        ('http://example.org/a.tar', {}, 'download'),
        (tmp_path / 'cut.tar', {}, 'cut off'),
        (rows, {'caption_column': 'words', **cache}, 'set data.caption_column'),
        (rows, {'image_column': 'picture', **cache}, 'set data.image_column'),
        (rows, {'captions': str(tmp_path / 'captions.json'), **cache}, '1 texts for 2 rows'),
        (folder, {'captions': str(tmp_path / 'captions.json')}, 'whose rows have numbers'),
    ):
        with pytest.raises(ZooError, match=message):
            open_captions(str(place), **options)


def test_unreadable_images_are_replaced_in_their_bucket(tmp_path):
    folder = tiny_pipelines.captioned_folder(tmp_path / 'images', 12)
    (folder / '01.png').write_bytes((folder / '01.png').read_bytes()[:60])
    data = CaptionedImages(
        str(folder), framing=Framing(size=32, bucket_step=8), val_fraction=0.1, batch_size=2, num_workers=0
    )
    data.setup()
    shapes, failures, seen = set(), [], 0
    for batch in data.train_dataloader():
        assert batch['image'].shape[0] == 2 == len(batch['caption']) == len(batch['sizes'])
        assert batch['sizes'][:, 4:].tolist() == [list(batch['image'].shape[-2:])] * 2
        shapes.add(tuple(batch['image'].shape[-2:]))
        failures += batch['failures']
        seen += 2
    assert len(shapes) > 1 and seen >= 8
    held = [name for batch in data.val_dataloader() for name in batch['name']]
    assert len(held) == 1
    if not any('01' in name for name in held):
        assert [name for name, _ in failures] == [str(folder / '01.png')]


# caches


@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pipelines')
    for kind in ('sd15', 'sdxl'):
        tiny_pipelines.pipeline(kind).save_pretrained(folder / kind)
    tiny_pipelines.captioned_folder(folder / 'images', 10)
    return folder


def cache_arguments(pipelines, target, kind='sd15', *more):
    args = ['cache-latents', f'--pipeline={pipelines / kind}', f'--data={pipelines / "images"}', f'--output={target}']
    return [*args, '--size=32', '--bucket-step=8', '--shard-size=2', '--batch-size=2', '--num-workers=0', *more]


def test_shards_hold_one_bucket_each():
    assert plan_shards([1, 0, 1, 1, 0], 2) == [[1, 4], [0, 2], [3]]


@pytest.mark.parametrize('kind', ['sd15', 'sdxl'])
def test_cache_is_what_the_pipeline_encodes(kind, pipelines, tmp_path):
    assert main(cache_arguments(pipelines, tmp_path / 'cache', kind)) == 0
    data = CachedLatents(str(tmp_path / 'cache'), val_fraction=0.2, batch_size=2, num_workers=0)
    frame = Frame(load_pipeline(pipelines / kind))
    frame.check(data)
    source = open_captions(str(pipelines / 'images'))
    framing = Framing(size=32, bucket_step=8)
    buckets = find_buckets(source, framing)
    by_caption: dict = {}
    for index in range(len(source)):
        image, caption = source.open(index)
        pixels, sizes = framing(image.convert('RGB'), buckets[index])
        mean, std = frame.encode_images(pixels[None])
        by_caption.setdefault(caption, []).append((mean, std, sizes, frame.encode_texts([caption])))
    rows = 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for row in range(len(batch['name'])):
                rows += 1
                near = [
                    one
                    for many in by_caption.values()
                    for one in many
                    if one[0].shape == batch['latent_mean'][row : row + 1].shape
                    and (one[0] - batch['latent_mean'][row].float()).abs().max() < 2e-3
                ]
                assert len(near) == 1
                mean, std, sizes, texts = near[0]
                torch.testing.assert_close(batch['latent_std'][row].float(), std[0], atol=2e-3, rtol=2e-3)
                assert batch['sizes'][row].tolist() == sizes.tolist()
                for key, value in texts.items():
                    torch.testing.assert_close(batch[key][row].float(), value[0], atol=2e-3, rtol=2e-3)
    assert rows >= 8
    step = frame.draw(batch, 0.5, torch.Generator().manual_seed(0))
    assert step.noisy.shape[1] == 4 and ('added_cond_kwargs' in step.condition) == (kind == 'sdxl')
    expected = frame.encode_nothing()
    for key, value in data.null.items():
        torch.testing.assert_close(value.float(), expected[key], atol=2e-3, rtol=2e-3)


def test_a_stopped_cache_goes_on(pipelines, tmp_path, capsys, monkeypatch):
    import zoo.tools.cache_latents as tool

    whole, target = tmp_path / 'whole', tmp_path / 'cache'
    assert main(cache_arguments(pipelines, whole)) == 0
    encode, count = tool.encode_shard, []

    def stopped(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patched:
        patched.setattr(tool, 'encode_shard', stopped)
        with pytest.raises(KeyboardInterrupt):
            main(cache_arguments(pipelines, target))
    there = {p.name: p.stat().st_mtime_ns for p in target.glob('0*.safetensors')}
    assert len(there) == 2
    with pytest.raises(ZooError, match='not finished'):
        CachedLatents(str(target)).setup()
    assert main(cache_arguments(pipelines, target)) == 0
    assert '2 of them there already' in capsys.readouterr().out
    assert all((target / name).stat().st_mtime_ns == time for name, time in there.items())
    ours, theirs = (json.loads((f / 'index.json').read_text()) for f in (target, whole))
    assert ours == theirs and ours['samples'] == 10
    for shard in ours['shards']:
        one, two = (load_file(f / shard['file']) for f in (target, whole))
        assert all(torch.equal(one[k], two[k]) for k in two)
    assert main(cache_arguments(pipelines, target)) == 0
    assert not list(target.glob('.*'))


def test_caches_of_something_else(pipelines, tmp_path, capsys):
    target = tmp_path / 'cache'
    assert main(cache_arguments(pipelines, target, 'sd15', '--limit=4')) == 0
    capsys.readouterr()
    for args, message in (
        (cache_arguments(pipelines, target), 'samples 4, not 10'),
        (cache_arguments(pipelines, target, 'sd15', '--limit=4', '--size=16'), 'size 32, not 16'),
        (cache_arguments(pipelines, target, 'sdxl', '--limit=4'), 'pipeline'),
        (cache_arguments(pipelines, pipelines / 'images'), 'neither empty nor a cache'),
        (cache_arguments(pipelines, tmp_path / 'none', 'sd15', '--shard-size=0'), 'positive'),
        (cache_arguments(pipelines, tmp_path / 'other', 'nothing'), 'cannot load a diffusers pipeline'),
        (cache_arguments(pipelines, tmp_path / 'other', 'sd15', '--device=gpu'), '--device gpu'),
        (cache_arguments(pipelines, target / 'plan.json'), 'neither empty nor a cache'),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'other').exists()  # a mistake leaves nothing that the right command would stumble over
    with pytest.raises(ZooError, match='make one for it'):
        Frame(load_pipeline(pipelines / 'sdxl')).check(CachedLatents(str(target)))
    (target / '00001.safetensors').unlink()
    with pytest.raises(ZooError, match='lacks 1 of'):
        CachedLatents(str(target)).setup()
    with pytest.raises(ZooError, match='make one: zoo cache-latents'):
        CachedLatents(str(tmp_path)).setup()


def test_unreadable_images_are_left_out(pipelines, tmp_path, capsys):
    folder = tiny_pipelines.captioned_folder(tmp_path / 'images', 5, sizes=((40, 40), (56, 30)))
    for name in ('01', '03'):  # all of one bucket, and its headers can be read
        (folder / f'{name}.png').write_bytes((folder / f'{name}.png').read_bytes()[:400])
    args = cache_arguments(pipelines, tmp_path / 'cache')
    args[2] = f'--data={folder}'
    assert main(args) == 0
    out = capsys.readouterr().out
    assert '3 samples cached, 2 unreadable ones left out' in out and '01.png' in out
    data = CachedLatents(str(tmp_path / 'cache'), val_fraction=0.34, batch_size=1, num_workers=0)
    data.setup()
    assert (
        sum(len(b['name']) for b in data.train_dataloader()) + sum(len(b['name']) for b in data.val_dataloader()) == 3
    )


def test_distils_from_a_cache(pipelines, tmp_path):
    assert main(cache_arguments(pipelines, tmp_path / 'cache')) == 0
    args = ['fit', '--model=zoo.tasks.DistillUNet', f'--model.teacher={pipelines / "sd15"}']
    args += ['--model.guidance_dropout=0.5', '--model.optim.lr_per=null', '--data=zoo.data.CachedLatents']
    args += [
        f'--data.path={tmp_path / "cache"}',
        '--data.batch_size=2',
        '--data.num_workers=1',
        '--data.val_fraction=0.2',
    ]
    args += ['--trainer.max_steps=4', '--trainer.max_epochs=-1', '--trainer.accelerator=cpu', '--run.monitor=val/loss']
    args += ['--run.mode=min', f'--run.root={tmp_path}', '--run.name=cached', '--run.threads=1']
    assert main(args) == 0
    assert (tmp_path / 'cached' / 'linfusion' / 'config.json').is_file()
    teacher = load_pipeline(pipelines / 'sd15').unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    found = load_file(tmp_path / 'cached' / 'linfusion' / 'diffusion_pytorch_model.safetensors')['0.to_q.weight']
    assert 0 < (found - teacher.to_q.weight).abs().max() < 0.1, 'not the teacher, four steps later'
