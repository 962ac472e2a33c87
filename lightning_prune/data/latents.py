"""Cached latents: training without an autoencoder and without text encoders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.data.augment import Draw
from lightning_prune.data.base import DataModule
from lightning_prune.data.decoder import LatentDecoder
from lightning_prune.data.latent_files import MANIFEST, NULL_PROMPT, Manifest, ShardReader
from lightning_prune.data.loader import WorkerKind
from lightning_prune.data.samples import Sample, Samples, Split
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError, RealImages
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
            "data: cached latents hold no pictures to compare with; give data.pictures, data.decoder or "
            "measurement.reference, a file of moments"
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


@dataclass(frozen=True)
class DecodedLatents:
    """The uint8 pictures [N, 3, H, W] that a decoder makes of a split's latents, when sliced."""

    samples: LatentSamples
    decoder: LatentDecoder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, chosen: slice) -> Tensor:
        """Pictures of a slice as one tensor on the CPU, uint8 [n, 3, H, W]."""
        indices, size = range(*chosen.indices(len(self))), self.decoder.batch_size
        batches = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
        return torch.cat([self._pictures(batch) for batch in batches])

    def _pictures(self, indices: list[int]) -> Tensor:
        latents = torch.stack([sample["x"] for sample in self.samples.__getitems__(indices)])
        return to_uint8(self.decoder.decode(latents)).cpu()


class CachedLatents(DataModule):
    """What `lightning_prune cache-latents` wrote.

    `cond` is the class, or, where captions were encoded, a dictionary of `prompt_embeds` and what else the network
    takes; `null_prompt.safetensors` in the folder is the empty prompt, for the `null_prompt` of a denoiser.

    Grids, distances and `predict` need `decoder`. Distances compare with `pictures` where they are given, else with
    what the decoder makes of real pictures' latents, and say which.

    Args:
        root: folder of the cache.
        decoder: the autoencoder that makes pictures of latents; null where no picture is asked for.
        pictures: the data that the latents were made from, or other real pictures of their size, to compare with; its
            reference and held-out split are used.
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
        decoder: LatentDecoder | None = None,
        pictures: DataModule | None = None,
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
        self.decoder, self.pictures = decoder, pictures

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
        """Compare checksums, and see that the decoder and the pictures are here; one process of each machine does."""
        for shards in self.manifest.splits.values():
            for shard in shards:
                if self.verify:
                    shard.check(self.root)
        if self.decoder is not None:
            self.decoder.fetch()
        if self.pictures is not None:
            self.pictures.prepare_data()

    def setup(self, stage: str) -> None:
        """Refuse a network, a decoder or pictures that do not fit the latents."""
        super().setup(stage)
        if self.decoder is not None:
            self.decoder.adopt(self.root, self.manifest)
            self._check_pictures(self.decoder)

    def _check_pictures(self, decoder: LatentDecoder) -> None:
        decoded = decoder.picture_shape(tuple(self.manifest.sample_shape))
        found = None if self.pictures is None else self.pictures.split("reference").shape
        if decoded is not None and found is not None and found != decoded:
            ours, theirs = ("x".join(map(str, shape)) for shape in (found, decoded))
            raise InputError(f"data.pictures: pictures of {ours}, but decoded latents are {theirs}")

    def real_images(self, split: Split) -> RealImages:
        """Real pictures of a split, or what the decoder makes of the latents of such.

        Raises:
            InputError: neither `pictures` nor a `decoder` was given.
        """
        if self.pictures is not None:
            return RealImages(self.pictures.split(split).images, f"{self.pictures.name} {split} split")
        samples = self.read(split)
        if self.decoder is None:
            return RealImages(samples.images, self.name)
        identity = f"sha256 of latents {self.checksum(split)}, decoded by {self.decoder.describe()}"
        return RealImages(DecodedLatents(samples, self.decoder), f"decoded {self.name} {split} split", identity)

    def checksum(self, split: Split) -> str:
        """What identifies the latents and conditions of a split."""
        shards = self.manifest.splits[_stored(split)]
        return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def read(self, split: Split) -> LatentSamples:
        shards = self.manifest.splits[_stored(split)]
        reader = ShardReader(self.root, shards)
        for number in range(len(shards)):
            reader.file(number)  # a shard that is not there is named now, not in mid-epoch
        distributed = "std" in reader.file(0).keys()  # noqa: SIM118 (no mapping)
        return LatentSamples(reader, self.manifest, self.flip, self.draw and distributed, len(reader))


def _stored(split: Split) -> str:
    """The split whose latents serve: by the convention of FID the reference is the training set."""
    return "train" if split == "reference" else split
