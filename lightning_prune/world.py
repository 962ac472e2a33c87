"""Work shared over processes in whole batches.

A batch is computed by one process, and is the batch that a single process would compute, so results are the same to
the last bit for any number of processes. Every process takes equally many turns, because networks may be sharded and
then compute together; where batches do not divide, some are computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or a world of one."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def turns(self, batches: int) -> int:
        """Turns in which all processes together see each of `batches` batches at least once."""
        return -(-batches // self.size)

    def batch(self, turn: int, batches: int) -> int:
        """Which of `batches` batches this process takes in a turn."""
        return (turn * self.size + self.rank) % batches

    def share(self, batches: int) -> Iterator[int]:
        """The batches that this process takes, in order."""
        return (self.batch(turn, batches) for turn in range(self.turns(batches)))

    def gather(self, part: T) -> list[T]:
        """What every process has, by rank, on every process."""
        gathered: list[Any] = [part]
        if self.size > 1:
            gathered = [None] * self.size
            distributed.all_gather_object(gathered, part)
        return gathered

    def merge(self, parts: dict[int, T]) -> list[T]:
        """What all processes computed, by batch, in the order of batches, on every process."""
        merged: dict[int, T] = {}
        for part in self.gather(parts):
            merged.update(part)
        return [merged[index] for index in sorted(merged)]
