"""A seeded loader whose order is a pure function of (seed, batches consumed, rank), so it resumes in mid-epoch."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lightning_prune.data.samples import Samples
from lightning_prune.protocols import InputError
from lightning_prune.world import World

WorkerKind = Literal["threads", "processes"]
_AHEAD = 2  # batches read ahead, per worker


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
    """Batches of a split, sharded over ranks, whose position is one integer.

    Lightning saves and restores the position through `state_dict`, so a run stopped in mid-epoch sees exactly
    the batches it had not seen. It is no `DataLoader`, so no strategy replaces its sampler. Batches come in order
    whatever reads them, and only those handed out are counted: reading ahead loses nothing.

    Args:
        dataset: the split.
        batch_size: samples per rank and batch.
        seed: seed of the order.
        shuffle: draw a new order each epoch; the last, incomplete batch is dropped then. Without it every sample is
            read, in the batches that a single process would see; some twice, where they do not divide by `world`.
        rank: this process.
        world: number of processes.
        workers: worker threads or processes; 0 reads in this thread.
        worker_kind: what workers are. Decoding pictures lets other threads run, so threads do where pictures are
            read; processes are for data sets in Python.
        augment: whether random crops and mirroring are drawn anew each epoch; shuffled loaders do by default.
        on_damaged: told the names of damaged files that a batch has other samples for.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        worker_kind: WorkerKind = "threads",
        augment: bool | None = None,
        on_damaged: Callable[[list[str]], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"data.batch_size: {batch_size} is not positive")
        size = len(dataset)
        span = batch_size * world
        self.batches = size // span if shuffle else -(-size // span)
        if self.batches == 0:
            raise InputError(f"data.batch_size: {batch_size} on {world} processes exceeds the {size} samples")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.rank, self.world, self.workers, self.worker_kind = rank, world, workers, worker_kind
        self.augment = shuffle if augment is None else augment
        self.on_damaged = on_damaged
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
        order = self.dataset.order(self.seed, epoch) if self.shuffle else torch.arange(len(self.dataset))
        slices = _Slice(order, self.batch_size, self.rank, self.world, start, stop, not self.shuffle)
        data = self.dataset.at_epoch(self.seed, epoch) if self.augment else self.dataset
        for batch in self._read(data, slices):
            if damaged := batch.pop("damaged", None):
                self._tell(damaged)
            # Counted before it is handed out: a checkpoint written after this batch resumes behind it.
            self.consumed += 1
            yield batch

    def _read(self, data: Samples, slices: _Slice) -> Iterator[dict[str, Any]]:
        if self.workers and self.worker_kind == "threads":
            yield from read_ahead(lambda indices: data.collate(data.__getitems__(indices)), slices, self.workers)
            return
        try:
            yield from DataLoader(data, batch_sampler=slices, num_workers=self.workers, collate_fn=data.collate)
        except InputError as error:
            # A worker process hands on its whole traceback as the message; the last line is the message.
            message = str(error).strip().splitlines()[-1]
            raise InputError(re.sub(r"^[\w.]+: ", "", message) if self.workers else message) from error

    def _tell(self, damaged: list[str]) -> None:
        if self.on_damaged is not None:
            self.on_damaged(damaged)

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed, "batch_size": self.batch_size, "world": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position; with another batch size or world the samples seen are kept, rounded down."""
        samples = state["consumed"] * state["batch_size"] * state["world"]
        self.consumed = samples // (self.batch_size * self.world)


def read_ahead(
    read: Callable[[list[int]], dict[str, Any]], batches: Iterable[list[int]], threads: int
) -> Iterator[dict[str, Any]]:
    """`read(indices)` of every batch, in order, computed by `threads` threads ahead of time."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    coming, waiting = iter(batches), deque[Future[dict[str, Any]]]()
    try:
        waiting.extend(pool.submit(read, indices) for indices in islice(coming, _AHEAD * threads))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, indices) for indices in islice(coming, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
