"""Images with captions: what is malformed is named and counted. Layouts are tested in test_cache_latents.py."""

import sys
import tarfile

import pytest
from PIL import Image

from zoo.data.captions import CaptionedImages, open_captions
from zoo.data.framing import Framing
from zoo.errors import ZooError


def pairs(folder, count=6):
    """Images beside their captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new('RGB', (40, 48), (number, 0, 0)).save(folder / f'{number}.png')
        (folder / f'{number}.txt').write_text(f'caption {number}')
    return folder


def test_images_without_a_caption_are_counted(tmp_path):
    folder = pairs(tmp_path / 'data')
    (folder / '1.txt').write_bytes(b'caf\xe9')
    (folder / '2.txt').unlink()
    (folder / '3.json').write_text('{"text": "of another layout"}')
    with pytest.warns(RuntimeWarning, match=r'(?s)data: 2 images without a caption left out.*1\.txt.*2\.txt'):
        assert len(open_captions(str(folder))) == 4
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('0.png', '0.txt', '2.png', '3.png', '3.json', '4.txt'):
            tar.add(folder / name, name)
    with pytest.warns(RuntimeWarning, match=r'a\.tar: 1 images without a caption left out\s+2: neither'):
        assert len(open_captions(str(tmp_path / 'a.tar'))) == 2
    (folder / 'metadata.jsonl').write_bytes(b'{"file_name": "0.png", "text": "caf\xe9"}')
    with pytest.raises(ZooError, match='line 1'):
        open_captions(str(folder))


def test_empty_cells_are_named_and_counted(tmp_path):
    """A table without a caption or an image in a row; neither is a text `None`, nor the end of the run."""
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    folder = pairs(tmp_path / 'data', 4)
    cells = [{'bytes': (folder / f'{i}.png').read_bytes(), 'path': None} for i in range(4)]
    rows = {'image': [cells[0], None, *cells[2:]], 'caption': ['a', 'b', None, 'd'], 'several': [['a', 'b']] * 4}
    parquet.write_table(pyarrow.table(rows), folder / 'train.parquet')
    data = CaptionedImages(str(folder), framing=Framing(size=32), batch_size=4, num_workers=0, val_fraction=0.0)
    data.sources = {'val': open_captions(str(folder))}
    data.buckets = {'val': [0] * 4}
    (batch,) = data.val_dataloader()
    assert batch['caption'] == ['a', 'd']
    assert [(name[-5:], error) for name, error in batch['failures']] == [
        ('row 1', 'ValueError: there is no image'),
        ('row 2', 'ValueError: column caption holds None, which is no text'),
    ]
    with pytest.raises(ZooError, match='column several holds list, not texts'):
        open_captions(str(folder), caption_column='several')


def test_shards_without_their_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'braceexpand', None)
    with pytest.raises(ZooError, match='linear-zoo\\[data\\]'):
        open_captions(str(tmp_path / 'a.tar'))
