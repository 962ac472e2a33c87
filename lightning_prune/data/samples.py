"""One split of a data set: what the loader reads from and what evaluation compares with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_prune.seeds import derive

Split = Literal["train", "reference", "held_out"]
Sample = dict[str, Any]


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Sample indices [size] of one shuffled epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive(seed, epoch)))


class Samples(Dataset[Sample], ABC):
    """Samples `{"x": float [C, H, W], "cond": ..., "id": int64}`, addressed by position.

    Attributes:
        images: uint8 pictures, as a tensor [N, C, H, W] or as something that gives one when sliced.
        labels: int64 [N]; zeros where there are no classes.
    """

    images: Any
    labels: Tensor

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Several samples at once, as the loader asks for them."""

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of `x` [C, H, W]."""

    @abstractmethod
    def first(self, count: int) -> Samples:
        """The first `count` samples."""

    def at_epoch(self, seed: int, epoch: int) -> Samples:
        """The samples as this epoch sees them: what is random about one is drawn from (seed, epoch, position)."""
        return self

    def order(self, seed: int, epoch: int) -> Tensor:
        """Positions [N] in the order of one shuffled epoch."""
        return epoch_order(len(self), seed, epoch)

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        """What samples are conditioned on, as a batch without `x`; nothing is decoded for it."""
        return {"cond": self.labels[indices], "id": torch.tensor(indices)}

    @staticmethod
    def collate(samples: list[Sample]) -> dict[str, Any]:
        """A batch. Names of damaged files that samples stand in for are listed, not stacked."""
        damaged = [name for sample in samples for name in sample.pop("damaged", ())]
        batch: dict[str, Any] = default_collate(samples)
        return {**batch, "damaged": damaged} if damaged else batch
