"""Small folders in the layouts of ADE20K and Cityscapes, filled with noise."""

import numpy as np
from PIL import Image


def _save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ade(root, images=4, size=(70, 90)):
    """ADEChallengeData2016 with 150 classes; class numbers of the files go from 0 (none) to 150."""
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for number in range(images):
            _save(rng.integers(0, 256, (*size, 3), dtype=np.uint8), root / 'images' / split / f'{number}.jpg')
            blocks = rng.integers(0, 151, (size[0] // 10, size[1] // 10), dtype=np.uint8)
            _save(np.kron(blocks, np.ones((10, 10), np.uint8)), root / 'annotations' / split / f'{number}.png')
    rows = [f'{number}\t0.1\t10\t2\tclass {number}, other name' for number in range(1, 151)]
    (root / 'objectInfo150.txt').write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tName', *rows]) + '\n')
    return root


def cityscapes(root, train_ids=False, size=(64, 128)):
    """Two images a split, in two cities; masks hold label numbers or, with train_ids, class numbers."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for city in ('aachen', 'bochum'):
            stem = f'{city}_000000_000019'
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            _save(pixels, root / 'leftImg8bit' / split / city / f'{stem}_leftImg8bit.png')
            labels = rng.integers(0, 34, size, dtype=np.uint8)
            folder = root / 'gtFine' / split / city
            _save(labels, folder / f'{stem}_gtFine_labelIds.png')
            if train_ids:
                _save(labels % 19, folder / f'{stem}_gtFine_labelTrainIds.png')
    return root
