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


def keyed_uniform(seed: int, epochs: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """Random numbers for many samples at once, a function of (seed, epoch, index) alone.

    Args:
        seed: Seed of the run.
        epochs: int64 (B,).
        indices: int64 (B,).
        count: Numbers per sample.

    Returns:
        fp32 (B, count) in [0, 1): the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over the key, 24 bits each.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    key = mixed(epochs.numpy().astype(np.uint64) * golden + np.uint64(derive_seed(seed)))
    key = mixed(key + indices.numpy().astype(np.uint64) * golden)
    bits = mixed(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return torch.from_numpy(((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24))


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
