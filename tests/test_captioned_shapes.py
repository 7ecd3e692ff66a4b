"""Drawn shapes with captions: what training shows and names, and what it must not."""

import torch

from zoo.data._scenes import COLOURS, SHAPES
from zoo.data.captioned_shapes import CaptionedShapes, class_names, pairs_of


def test_drawn_splits_share_no_pair():
    sets = [set(pairs_of(split)) for split in ('train', 'val', 'test')]
    assert [len(s) for s in sets] == [48, 8, 8] and len(set.union(*sets)) == 64
    data = CaptionedShapes(train_images=256, val_images=8, test_images=8, batch_size=32, num_workers=0)
    names, palette = class_names(), torch.tensor(list(COLOURS.values()))
    for loader, pairs in zip((data.train_dataloader(), data.val_dataloader(), data.test_dataloader()), sets):
        for batch in loader:
            held = batch['target'] < 0
            assert set(batch['target'][~held].tolist()) <= pairs and batch['image'].shape[1:] == (3, 48, 48)
            assert held.any() if len(pairs) > 8 else not held.any()
            for image, caption, target in zip(batch['image'], batch['caption'], batch['target'].tolist()):
                said = {w for w in caption.split() if w in ' '.join(names).split()}
                if target >= 0:
                    assert said and said <= set(names[target].split())
                    continue
                (word,) = said  # a shape of no colour that has a name, or a blot of this colour
                pixels = (image * 0.3 + 0.2) * 255
                cells = pixels.unflatten(1, (3, 16)).unflatten(3, (3, 16)).permute(1, 3, 2, 4, 0).flatten(2, 3)
                brightest = cells.amax((2, 3)).flatten().argmax()
                seen = cells.flatten(0, 1)[brightest]
                seen = seen[seen.amax(1) > 0.8 * seen.max()].median(0).values
                distance = (palette - seen).norm(dim=1)
                assert distance.min() > 60 if word in SHAPES else list(COLOURS)[distance.argmin()] == word


def test_drawn_shapes_are_functions_of_seed_and_epoch():
    settings = dict(train_images=8, batch_size=8, num_workers=0)
    a, b, c = (CaptionedShapes(**settings, seed=seed).train_dataloader() for seed in (0, 0, 1))
    first, same, other = (next(iter(loader)) for loader in (a, b, c))
    assert torch.equal(first['image'], same['image']) and first['caption'] == same['caption']
    a.sampler.set_epoch(1)
    assert not torch.equal(first['image'], other['image']) and next(iter(a))['caption'] != first['caption']
