"""The base of in-memory data modules: uint8 images and labels, padded and scaled to [-1, 1] when read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune.data.loader import ResumableLoader
from lightning_prune.pixels import to_unit_range
from lightning_prune.seeds import run_seed

Split = Literal["train", "reference", "held_out"]


@dataclass
class LabelledImages(Dataset[dict[str, Tensor]]):
    """uint8 `images` [N, C, H, W] with integer `labels` [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        x, cond = to_unit_range(self.images[indices]), self.labels[indices]
        ids = torch.tensor(indices)
        return [{"x": a, "cond": b, "id": i} for a, b, i in zip(x, cond, ids, strict=True)]


class ArrayData(pl.LightningDataModule, ABC):
    """A data set that fits in memory.

    Batches are dictionaries: `x` float [B, C, H, W] in [-1, 1], `cond` int64 [B] and `id` int64 [B], the position
    in the split.

    Args:
        batch_size: samples per process and batch.
        seed: seed of the order; null takes that of `seed_everything`.
        workers: worker processes of the loader; in-memory data needs none.
        validation_samples: held-out images that one validation pass reads.
    """

    num_classes: int
    name: str

    def __init__(
        self, batch_size: int = 64, seed: int | None = None, workers: int = 0, validation_samples: int = 512
    ) -> None:
        super().__init__()
        self.batch_size, self.workers = batch_size, workers
        self.seed = run_seed() if seed is None else seed
        self.validation_samples = validation_samples
        self._splits: dict[Split, LabelledImages] = {}

    @abstractmethod
    def read(self, split: Split) -> LabelledImages:
        """Read one split from disk. Raises `InputError` naming the file that is missing or damaged."""

    def split(self, split: Split) -> LabelledImages:
        """One split, read once."""
        if split not in self._splits:
            self._splits[split] = self.read(split)
        return self._splits[split]

    def _loader(self, split: Split, shuffle: bool, limit: int | None = None) -> ResumableLoader:
        data = self.split(split)
        if limit is not None:
            data = LabelledImages(data.images[:limit], data.labels[:limit])
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        size = self.batch_size if shuffle else min(self.batch_size, len(data))
        return ResumableLoader(data, size, self.seed, shuffle, rank, world, self.workers)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False, limit=self.validation_samples)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False)

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False, limit=self.validation_samples)
