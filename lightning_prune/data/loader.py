"""A seeded loader whose order is a pure function of (seed, batches consumed, rank), so it resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_prune.protocols import InputError
from lightning_prune.seeds import derive
from lightning_prune.world import World


def epoch_order(size: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    """Sample indices [size] of one epoch."""
    if not shuffle:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive(seed, epoch)))


class _Slice:
    """The batches of one rank in one epoch, from batch `start` on."""

    def __init__(
        self, order: torch.Tensor, batch_size: int, rank: int, world: int, start: int, count: int, whole: bool
    ) -> None:
        self.order, self.batch_size, self.rank, self.world = order, batch_size, rank, world
        self.start, self.count, self.whole = start, count, whole

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(self.start, self.count):
            yield (self._whole(index) if self.whole else self._share(index)).tolist()

    def _share(self, index: int) -> torch.Tensor:
        """This rank's share of one global batch: the union over ranks is the same set at every step."""
        span = self.batch_size * self.world
        return self.order[index * span : (index + 1) * span][self.rank :: self.world]

    def _whole(self, index: int) -> torch.Tensor:
        """One of the batches a single process would see, so that what it computes is the same to the last bit."""
        chosen = World(self.rank, self.world).batch(index, -(-len(self.order) // self.batch_size))
        return self.order[chosen * self.batch_size : (chosen + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.count - self.start


class ResumableLoader:
    """Batches of a map-style dataset, sharded over ranks, whose position is one integer.

    Lightning saves and restores the position through `state_dict`, so a run stopped in mid-epoch sees exactly
    the batches it had not seen. It is no `DataLoader`, so no strategy replaces its sampler.

    Args:
        dataset: map-style dataset.
        batch_size: samples per rank and batch.
        seed: seed of the order.
        shuffle: draw a new order each epoch; the last, incomplete batch is dropped then. Without it every sample is
            read, in the batches that a single process would see; some twice, where they do not divide by `world`.
        rank: this process.
        world: number of processes.
        workers: worker processes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"data.batch_size: {batch_size} is not positive")
        size = len(dataset)  # type: ignore[arg-type]
        span = batch_size * world
        self.batches = size // span if shuffle else -(-size // span)
        if self.batches == 0:
            raise InputError(f"data.batch_size: {batch_size} on {world} processes exceeds the {size} samples")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.rank, self.world, self.workers = rank, world, workers
        self.consumed = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        """One pass of `len(self)` batches from the present position, on into the next epoch if need be."""
        if not self.shuffle:
            self.consumed = 0
        end = self.consumed + self.batches
        while self.consumed < end:
            yield from self._rest_of_epoch(end)

    def _rest_of_epoch(self, end: int) -> Iterator[Any]:
        epoch, start = divmod(self.consumed, self.batches)
        stop = min(self.batches, end - epoch * self.batches)
        order = epoch_order(len(self.dataset), self.seed, epoch, self.shuffle)  # type: ignore[arg-type]
        slices = _Slice(order, self.batch_size, self.rank, self.world, start, stop, not self.shuffle)
        for batch in DataLoader(self.dataset, batch_sampler=slices, num_workers=self.workers):
            # Counted before it is handed out: a checkpoint written after this batch resumes behind it.
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed, "batch_size": self.batch_size, "world": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position; with another batch size or world the samples seen are kept, rounded down."""
        samples = state["consumed"] * state["batch_size"] * state["world"]
        self.consumed = samples // (self.batch_size * self.world)
