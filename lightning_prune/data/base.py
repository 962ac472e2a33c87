"""The base of every data module: splits, loaders, the checks before a run, and samples for methods that calibrate."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_prune.data.loader import ResumableLoader, WorkerKind
from lightning_prune.data.samples import Samples, Split
from lightning_prune.protocols import InputError
from lightning_prune.seeds import run_seed

log = logging.getLogger("lightning_prune.data")


class DataModule(pl.LightningDataModule, ABC):
    """A data set in three splits: train, the reference that distances are from, and held-out samples.

    Batches are dictionaries: `x` float [B, C, H, W] in [-1, 1], `cond` int64 [B] (zeros where there are no classes; a
    dictionary of tensors where text was encoded), `id` int64 [B], the position in the split, and `caption`, a list of
    strings, where pictures have captions.

    Args:
        batch_size: samples per process and batch.
        seed: seed of order and augmentation; null takes that of `seed_everything`.
        workers: worker threads or processes of the loader; 0 reads between the steps.
        validation_samples: held-out images that one validation pass reads.
        worker_kind: "threads" or "processes".
    """

    num_classes: int
    name: str

    def __init__(
        self,
        batch_size: int = 64,
        seed: int | None = None,
        workers: int = 0,
        validation_samples: int = 512,
        worker_kind: WorkerKind = "threads",
    ) -> None:
        super().__init__()
        self.batch_size, self.workers, self.worker_kind = batch_size, workers, worker_kind
        self.seed = run_seed() if seed is None else seed
        self.validation_samples = validation_samples
        self.damaged: dict[str, None] = {}
        self._splits: dict[Split, Samples] = {}

    @abstractmethod
    def read(self, split: Split) -> Samples:
        """Find one split. Raises `InputError` naming the file that is missing or damaged."""

    def split(self, split: Split) -> Samples:
        """One split, found once."""
        if split not in self._splits:
            self._splits[split] = self.read(split)
        return self._splits[split]

    # Before a run

    def setup(self, stage: str) -> None:
        """Refuse data that the network cannot take, before anything is computed."""
        denoiser = getattr(self.trainer.lightning_module, "denoiser", None) if self.trainer else None
        if denoiser is not None:
            self.check_fits(denoiser, self.split("train" if stage == "fit" else "held_out"))

    def check_fits(self, denoiser: Any, samples: Samples) -> None:
        """Compare shape and classes with what the network was built for.

        Raises:
            InputError: another shape or another number of classes.
        """
        network = denoiser.weights or type(denoiser.network).__name__
        if samples.shape != tuple(denoiser.sample_shape):
            given, wanted = ("x".join(map(str, shape)) for shape in (samples.shape, denoiser.sample_shape))
            raise InputError(f"data: {self.name} gives samples of {given}, but {network} takes {wanted}")
        self._check_conditions(denoiser, network)
        if denoiser.num_classes and self.num_classes != denoiser.num_classes:
            raise InputError(
                f"data: {self.name} has {self.num_classes or 'no'} classes, but {network} was built for "
                f"{denoiser.num_classes}"
            )

    def _check_conditions(self, denoiser: Any, network: str) -> None:
        wanted = denoiser.condition_shapes() if hasattr(denoiser, "condition_shapes") else {}
        given = self.condition_shapes
        if wanted and not given:
            raise InputError(
                f"data: {network} takes embedded prompts, and {self.name} has none; encode its captions with "
                "`lightning_prune cache-latents` and train on data.CachedLatents"
            )
        if given and not wanted:
            raise InputError(f"data: {self.name} comes with embedded prompts, but {network} takes none")
        for key, shape in wanted.items():
            if key not in given:
                raise InputError(f"data: {network} takes {key}; {self.name} has {', '.join(given)}")
            if len(shape) > 1 and given[key][-1] != shape[-1]:
                raise InputError(f"data: {key} of {self.name} is {given[key][-1]} wide, {network} takes {shape[-1]}")

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample's `cond`, by key, where it is a dictionary; empty where it is a label."""
        return {}

    # Loaders

    def _loader(self, split: Split, shuffle: bool, limit: int | None = None) -> ResumableLoader:
        data = self.split(split)
        data = data if limit is None else data.first(limit)
        size = self.batch_size if shuffle else min(self.batch_size, len(data))
        return self._load(data, size, self.seed, shuffle)

    def _load(self, data: Samples, size: int, seed: int, shuffle: bool, augment: bool | None = None) -> ResumableLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ResumableLoader(
            data, size, seed, shuffle, rank, world, self.workers, self.worker_kind, augment, self.skipped
        )

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False, limit=self.validation_samples)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False)

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader("held_out", shuffle=False, limit=self.validation_samples)

    # Samples for methods that calibrate or search

    def calibration_batches(self, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
        """`count` batches of training samples, sharded over ranks, neither mirrored nor cropped at random.

        A pure function of (count, seed) and of batch size times world size; training's own order is untouched.
        """
        return islice(_endless(self._load(self.split("train"), self.batch_size, seed, True, augment=False)), count)

    def prompts(self, count: int, seed: int = 0) -> dict[str, Any]:
        """`cond`, `id` and, where there are captions, `caption` of `count` training samples, as one batch without `x`.

        The same on every rank. Samples repeat only where `count` exceeds the set.
        """
        data = self.split("train")
        indices: list[int] = []
        while len(indices) < count:
            indices += data.order(seed, len(indices) // len(data))[: count - len(indices)].tolist()
        return data.conditions(indices)

    # Damaged files

    def skipped(self, names: list[str]) -> None:
        """Count files that cannot be read, each once; say so, and list them in `damaged.txt` in the run folder."""
        new = [name for name in names if name not in self.damaged]
        for name in new:
            self.damaged[name] = None
            log.warning("%s: damaged, skipped (%d so far)", name, len(self.damaged))
        if new and self.trainer:
            folder = Path(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "damaged.txt").open("a") as stream:
                stream.writelines(f"{name}\n" for name in new)

    def teardown(self, stage: str) -> None:
        if self.damaged:
            log.warning("%d damaged files were skipped; other samples stood in for them", len(self.damaged))


def _endless(loader: ResumableLoader) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader
