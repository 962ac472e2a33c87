"""Cached latents: training without an autoencoder and without text encoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.data.augment import Draw
from lightning_prune.data.base import DataModule
from lightning_prune.data.latent_files import MANIFEST, NULL_PROMPT, Manifest, ShardReader
from lightning_prune.data.loader import WorkerKind
from lightning_prune.data.samples import Sample, Samples, Split
from lightning_prune.protocols import InputError
from lightning_prune.seeds import derive

_STREAM = 2  # apart from the order of an epoch and from mirroring


@dataclass
class LatentSamples(Samples):
    """Latents of a split, read from its shards as they are asked for.

    Attributes:
        reader: the shards.
        manifest: what they hold.
        flip: take the mirror image's latent half of the time while training.
        draw: draw latents from their distribution while training; their mean otherwise.
        count: samples used, from the first.
        epoch: (seed, epoch) that is drawn from; None draws nothing.
    """

    reader: ShardReader
    manifest: Manifest
    flip: bool
    draw: bool
    count: int
    epoch: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def images(self) -> Any:
        raise InputError(
            "data: cached latents hold no pictures to compare with; give measurement.reference, a file of moments"
        )

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Numbers of the classes, int64 [N]."""
        return self.reader.whole("labels")[: self.count]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.manifest.sample_shape)

    def first(self, count: int) -> LatentSamples:
        return replace(self, count=min(count, self.count))

    def at_epoch(self, seed: int, epoch: int) -> LatentSamples:
        return replace(self, epoch=(seed, epoch))

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        mirrored = [self.flip and self.epoch is not None and Draw.of(*self.epoch, i).mirrored for i in indices]
        return [
            self._sample(index, "_mirrored" if flipped else "")
            for index, flipped in zip(indices, mirrored, strict=True)
        ]

    def _sample(self, index: int, suffix: str) -> Sample:
        drawn = self.draw and self.epoch is not None
        names = [f"mean{suffix}", *([f"std{suffix}"] if drawn else []), *self._condition_names]
        (found,) = self.reader.rows(names, [index])
        latent = found[f"mean{suffix}"].float()
        if drawn and self.epoch is not None:
            generator = torch.Generator().manual_seed(derive(*self.epoch, index, _STREAM))
            latent = latent + found[f"std{suffix}"].float() * torch.randn(latent.shape, generator=generator)
        scale, shift = (torch.tensor(value).view(-1, 1, 1) for value in (self.manifest.scale, self.manifest.shift))
        return {"x": (latent - shift) * scale, "cond": self._condition(found), "id": torch.tensor(index)}

    @property
    def _condition_names(self) -> list[str]:
        return [*self.manifest.conditions] or ["labels"]

    def _condition(self, found: dict[str, Tensor]) -> Any:
        """Labels, or embeddings in float32 by name."""
        if not self.manifest.conditions:
            return found["labels"]
        return {name: found[name].float() for name in self.manifest.conditions}

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        rows = self.reader.rows(self._condition_names, indices)
        samples = [{"cond": self._condition(row), "id": torch.tensor(i)} for i, row in zip(indices, rows, strict=True)]
        return self.collate(samples)


class CachedLatents(DataModule):
    """What `lightning_prune cache-latents` wrote.

    `cond` is the class, or, where captions were encoded, a dictionary of `prompt_embeds` and what else the network
    takes; `null_prompt.safetensors` in the folder is the empty prompt, for the `null_prompt` of a denoiser.

    Args:
        root: folder of the cache.
        flip: take mirror images half of the time while training; the cache has to have been made with `--flip true`.
        draw: draw latents from the autoencoder's distribution while training, instead of its mean.
        verify: compare every shard with its checksum before the run.
        batch_size: samples per process and batch.
        seed: seed of order, mirroring and draws; null takes that of `seed_everything`.
        workers: worker threads or processes of the loader; 0 reads between the steps.
        validation_samples: held-out samples that one validation pass reads.
        worker_kind: "threads" or "processes".
    """

    def __init__(
        self,
        root: str,
        flip: bool = False,
        draw: bool = True,
        verify: bool = True,
        batch_size: int = 64,
        seed: int | None = None,
        workers: int = 0,
        validation_samples: int = 512,
        worker_kind: WorkerKind = "threads",
    ) -> None:
        super().__init__(batch_size, seed, workers, validation_samples, worker_kind)
        self.root, self.flip, self.draw, self.verify = Path(root), flip, draw, verify

    @cached_property
    def manifest(self) -> Manifest:
        """What the cache holds. Raises `InputError` if it is missing, damaged or cannot be used as asked."""
        manifest = Manifest.read(self.root / MANIFEST)
        if self.flip and not manifest.settings["flip"]:
            raise InputError(f"data.flip: {self.root} was made without mirror images; run cache-latents --flip true")
        return manifest

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; 0 for none."""
        return self.manifest.num_classes

    @property
    def name(self) -> str:  # type: ignore[override]
        """What the latents are of."""
        return f"latents of {self.manifest.name}"

    @property
    def null_prompt(self) -> Path | None:
        """The file with the conditions of the empty prompt, where captions were encoded."""
        return self.root / NULL_PROMPT if self.manifest.null_prompt else None

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample's condition, by key; empty where samples have labels."""
        return {name: tuple(shape) for name, shape in self.manifest.conditions.items()}

    def prepare_data(self) -> None:
        """Compare checksums; one process of each machine does."""
        for shards in self.manifest.splits.values():
            for shard in shards:
                if self.verify:
                    shard.check(self.root)

    def read(self, split: Split) -> LatentSamples:
        shards = self.manifest.splits["train" if split == "reference" else split]
        reader = ShardReader(self.root, shards)
        for number in range(len(shards)):
            reader.file(number)  # a shard that is not there is named now, not in mid-epoch
        distributed = "std" in reader.file(0).keys()  # noqa: SIM118 (no mapping)
        return LatentSamples(reader, self.manifest, self.flip, self.draw and distributed, len(reader))
