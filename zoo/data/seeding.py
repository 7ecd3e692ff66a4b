"""Randomness as a function of (seed, epoch, index).

No generator state has to be stored to resume a run: whoever needs random numbers derives a seed from where it stands.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


def run_seed() -> int:
    """The seed of this run as `seed_everything` left it for every process, or 0."""
    return int(os.environ.get('PL_GLOBAL_SEED', 0))


def derive_seed(*key: int) -> int:
    """A 63-bit seed from non-negative integers; neighbouring keys give unrelated seeds."""
    # the length is part of the entropy because NumPy pads it with zeros: (1,) and (1, 0) would be the same
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch (CPU, and CUDA where it is in use) from `key`."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed formats a stack trace on every call while CUDA is present and not initialised
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Runs a block with every CPU generator seeded from `key`, then puts the former states back."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
