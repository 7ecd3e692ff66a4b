"""Shards of tar files: every sample once, order and resume, what they must not hold."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from pictures import SMALL, picture

from zoo.data import TarShards
from zoo.data.shards import expand_shards, read_shard
from zoo.errors import ZooError


def write_shard(path, samples):
    with tarfile.open(path, 'w') as tar:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        samples = []
        for key in range(8):
            label = (number * 8 + key) % 5
            about = json.dumps({'label': label, 'title': 'x'}).encode()
            name = f'{number}{key}'
            samples += [
                (f'{name}.jpg', picture(rng, form='JPEG')),
                (f'{name}.cls', b'%d' % label),
                (f'{name}.json', about),
            ]
        write_shard(tmp_path / f's-{number}.tar', samples)
    return tmp_path


def stream(folder, **kwargs):
    pattern = f'{folder}/s-{{0..2}}.tar'
    options = {'num_classes': 5, 'train_samples': 24, 'shuffle_buffer': 6, **SMALL, **kwargs}
    data = TarShards(pattern, pattern, **options)
    data.setup()
    return data


@pytest.mark.parametrize('workers', [0, 2])
def test_shards_evaluate_every_sample_once(shards, workers):
    data = stream(shards, num_workers=workers)
    names = [n for b in data.val_dataloader() for n in b['name']]
    assert len(names) == len(set(names)) == 24


@pytest.mark.parametrize('workers', [0, 2, 3])
def test_shards_epoch_has_a_known_length(shards, workers):
    data = stream(shards, num_workers=workers)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 6 and all(len(b['target']) == 4 for b in batches)
    data.set_epoch(1)
    assert [b['name'] for b in loader] != [b['name'] for b in batches]
    data.set_epoch(0)
    assert [b['name'] for b in loader] == [b['name'] for b in batches]


@pytest.mark.parametrize('workers', [0, 2, 3])
@pytest.mark.parametrize('done', [1, 2, 5])
def test_shards_resume_in_mid_epoch(shards, workers, done):
    whole = list(stream(shards, num_workers=workers).train_dataloader())
    data = stream(shards, num_workers=workers)
    data.load_state_dict({'epoch': 0, 'batches': done})
    rest = list(data.train_dataloader())
    assert len(rest) == 6 - done
    for a, b in zip(whole[done:], rest):
        assert a['name'] == b['name'] and torch.equal(a['image'], b['image'])


def test_shards_ranks_read_different_shards(shards):
    data = stream(shards)
    names = []
    for rank in range(3):
        dataset = data._dataset('val', lambda image: torch.zeros(1), None)
        dataset.rank, dataset.world_size = rank, 3
        names += [s['name'] for s in dataset]
    assert len(names) == len(set(names)) == 24


def test_shards_labels_from_json(shards):
    data = stream(shards, label_key='label')
    assert sorted({t for b in data.val_dataloader() for t in b['target'].tolist()}) == [0, 1, 2, 3, 4]
    with pytest.raises(ZooError, match="no class number .json key 'absent'"):
        list(stream(shards, label_key='absent').val_dataloader())


def test_shards_label_out_of_range(shards):
    with pytest.raises(ZooError, match='label 4, but data.num_classes is 4'):
        list(stream(shards, num_classes=4).val_dataloader())


def test_shards_unreadable_image(tmp_path, shards):
    rng = np.random.default_rng(1)
    samples = [(f'{k}.{e}', d) for k in range(8) for e, d in (('jpg', picture(rng, form='JPEG')), ('cls', b'1'))]
    samples[4] = ('2.jpg', b'broken')
    write_shard(tmp_path / 's-1.tar', samples)
    data = stream(tmp_path)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert all(len(b['target']) == 4 for b in train)
    assert sum(len(b['target']) for b in val) == 23
    assert 's-1.tar:2' in [f for b in val for f in b['failures']][0][0]


@pytest.mark.parametrize(('ending', 'workers'), [('pkl', 0), ('pickle', 1), ('pyd', 0), ('pth', 0), ('npy', 0)])
def test_shards_refuse_pickles(tmp_path, ending, workers):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    rng = np.random.default_rng(0)
    samples = [('0.jpg', picture(rng, form='JPEG')), ('0.cls', b'1'), (f'0.{ending}', pickle.dumps(Evil()))]
    for number in range(3):
        write_shard(tmp_path / f's-{number}.tar', samples)
    with pytest.raises(ZooError, match=f'refused 0.{ending}'):
        list(stream(tmp_path, num_workers=workers).val_dataloader())
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('address', ['pipe:touch {ran}', 'pipe: cat x.tar', 'gs://bucket/x.tar', 'file:x.tar'])
def test_shards_refuse_commands(tmp_path, address):
    with pytest.raises(ZooError, match='refused shard address'):
        expand_shards(address.replace('{ran}', str(tmp_path / 'ran')))
    assert not (tmp_path / 'ran').exists()


def test_shards_missing_and_cut_off(tmp_path, shards):
    with pytest.raises(ZooError, match='1 of 4 shards do not exist, the first is .*s-3.tar'):
        expand_shards(f'{shards}/s-{{0..3}}.tar')
    assert [p.rsplit('/', 1)[1] for p in expand_shards(f'{shards}/s-*.tar')] == ['s-0.tar', 's-1.tar', 's-2.tar']
    whole = (shards / 's-0.tar').read_bytes()
    (tmp_path / 'cut.tar').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ZooError, match='cut.tar is cut off'):
        list(read_shard(str(tmp_path / 'cut.tar')))


def test_shards_cannot_hide_members(tmp_path):
    write_shard(tmp_path / 'x.tar', [('../../0.jpg', b''), ('0.PKL', b'')])
    with pytest.raises(ZooError, match='refused 0.PKL'):
        list(read_shard(str(tmp_path / 'x.tar')))
