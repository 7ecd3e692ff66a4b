"""Small noisy images as files, and the options of a data module that reads them quickly."""

import io

import numpy as np
from PIL import Image

from zoo.data import View

SMALL = {'view': View(size=16), 'batch_size': 4, 'num_workers': 0}


def picture(rng, size=(20, 24), form='PNG'):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()
