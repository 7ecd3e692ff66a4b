"""Latents and text embeddings that `zoo cache-latents` has computed: VAE and text encoders leave the training loop.

A cache is a folder with

    index.json                 what was cached and how, and the shards: file, samples, height and width of the latents
    00000.safetensors          per sample: mean, std (C, h, w) of the VAE's latents before scaling, sizes (6),
                               prompt_embeds (T, D), pooled_embeds (P) where the pipeline has them; names and captions
                               in the metadata
    empty.safetensors          prompt_embeds and pooled_embeds of what guidance is against
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.base import ResumableData, hold_out, loader_options
from zoo.data.captions import bucket_sampler
from zoo.data.sampling import BucketBatches
from zoo.errors import ZooError

INDEX, EMPTY = 'index.json', 'empty.safetensors'
KEYS = ('mean', 'std', 'prompt_embeds', 'pooled_embeds', 'sizes')
_NAMES = {'mean': 'latent_mean', 'std': 'latent_std'}  # in batches


class _Rows(Dataset):
    """Batches of samples from shards of safetensors.

    Args:
        folder: The cache.
        shards: Entries of its index.
        where: int64 (N, 2): shard and row of every sample.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], where: np.ndarray) -> None:
        self.folder, self.shards, self.where = folder, shards, where
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'opened': {}}  # every process opens files itself

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        from safetensors import safe_open

        rows: list[dict[str, Tensor]] = []
        for _, index in keys:
            shard, row = self.where[index].tolist()
            if shard not in self.opened:
                self.opened[shard] = safe_open(self.folder / self.shards[shard]['file'], 'pt')
            file = self.opened[shard]
            rows.append({key: file.get_slice(key)[row : row + 1] for key in file.keys()})
        batch: dict[str, Any] = {_NAMES.get(key, key): torch.cat([row[key] for row in rows]) for key in rows[0]}
        places = [self.where[index].tolist() for _, index in keys]
        return {**batch, 'name': [f'{self.shards[s]["file"]} row {r}' for s, r in places], 'failures': []}


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class CachedLatents(ResumableData):
    """A cache of `zoo cache-latents`; batches share a size, so that buckets of aspect ratios work.

    Args:
        path: The cache's folder.
        val_fraction: Share of the samples held out for validation.
        batch_size: Samples per step and process.
        num_workers: Loader processes.
    """

    noun = 'sample'
    encoded = True

    def __init__(self, path: str, val_fraction: float = 0.005, batch_size: int = 8, num_workers: int = 2) -> None:
        super().__init__(batch_size, num_workers, strict=True)
        self.path, self.val_fraction = Path(path).expanduser(), val_fraction
        self.index: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.index:
            return
        file = self.path / INDEX
        if not file.is_file():
            unfinished = (self.path / 'plan.json').is_file()
            hint = (
                'it is not finished: run the same zoo cache-latents again'
                if unfinished
                else 'make one: zoo cache-latents'
            )
            raise ZooError(f'{self.path} holds no cache of latents; {hint}')
        self.index = json.loads(file.read_text())
        shards = self.index['shards']
        if missing := [s['file'] for s in shards if not (self.path / s['file']).is_file()]:
            raise ZooError(f'{self.path} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}')
        counts = [s['samples'] for s in shards]
        places = [np.stack([np.full(c, i), np.arange(c)], 1) for i, c in enumerate(counts) if c]
        self.where = np.concatenate(places) if places else np.empty((0, 2), int)
        sizes = sorted({(s['height'], s['width']) for s in shards})
        numbers = np.array([sizes.index((s['height'], s['width'])) for s in shards])
        if len(self.where) < 2:
            raise ZooError(f'{self.path} holds {len(self.where)} samples')
        self.split = dict(zip(('train', 'val'), map(np.array, hold_out(len(self.where), self.val_fraction))))
        self.buckets = {name: numbers[self.where[chosen, 0]].tolist() for name, chosen in self.split.items()}

    @property
    def null(self) -> dict[str, Tensor]:
        """Embeddings of what guidance is against, (1, ...)."""
        from safetensors.torch import load_file

        return {key: value[None] for key, value in load_file(self.path / EMPTY).items()}

    def check(self, frame: Any) -> None:
        """Raises ZooError where the cache is not for a pipeline.

        Args:
            frame: A zoo.tasks frame; it is told what the dropped captions become.
        """
        self.setup()
        mine = {key: self.index[key] for key in ('latent_channels', 'embed_width', 'scaling_factor')}
        for key, theirs in frame.encoding().items():
            if mine[key] != theirs:
                raise ZooError(
                    f'the cache {self.path} was made with {self.index["pipeline"]} ({key} {mine[key]}), the pipeline '
                    f'here has {key} {theirs}: make one for it with zoo cache-latents'
                )
        if frame.needs_sizes and not self.index['pooled_width']:
            raise ZooError(f'the pipeline needs pooled embeddings, which {self.path} does not hold')
        frame.null = self.null

    def train_dataloader(self) -> DataLoader:
        return self._loader('train', bucket_sampler(self.buckets['train'], self, shuffle=True))

    def val_dataloader(self) -> DataLoader:
        return self._loader('val', bucket_sampler(self.buckets['val'], self, shuffle=False))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _loader(self, split: str, sampler: BucketBatches) -> DataLoader:
        rows = _Rows(self.path, self.index['shards'], self.where[self.split[split]])
        return DataLoader(rows, batch_sampler=sampler, collate_fn=_as_it_is, **loader_options(self.num_workers))
