"""The base of in-memory data modules: uint8 images and labels, scaled to [-1, 1] when read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.data.augment import Draw
from lightning_prune.data.base import DataModule
from lightning_prune.data.samples import Sample, Samples, Split
from lightning_prune.pixels import to_unit_range

__all__ = ["ArrayData", "LabelledImages", "Split"]


@dataclass
class LabelledImages(Samples):
    """uint8 `images` [N, C, H, W] with integer `labels` [N].

    Attributes:
        flip: mirror half of the images while training.
        epoch: (seed, epoch) that mirroring is drawn from; None mirrors nothing.
    """

    images: Tensor
    labels: Tensor
    flip: bool = False
    epoch: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        images = self.images[indices]
        if self.flip and self.epoch is not None:
            mirrored = torch.tensor([Draw.of(*self.epoch, index).mirrored for index in indices])
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        x, cond = to_unit_range(images), self.labels[indices]
        ids = torch.tensor(indices)
        return [{"x": a, "cond": b, "id": i} for a, b, i in zip(x, cond, ids, strict=True)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def first(self, count: int) -> LabelledImages:
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def at_epoch(self, seed: int, epoch: int) -> LabelledImages:
        return replace(self, epoch=(seed, epoch))


class ArrayData(DataModule):
    """A data set that fits in memory. `batch_size` and the other arguments are those of every data module."""

    @abstractmethod
    def read(self, split: Split) -> LabelledImages:
        """Read one split from disk. Raises `InputError` naming the file that is missing or damaged."""
