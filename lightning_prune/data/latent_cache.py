"""Making a latent cache: shard by shard, so that a run that was stopped goes on at the shard it was stopped in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.checksums import sha256
from lightning_prune.data.base import DataModule
from lightning_prune.data.encoders import LatentEncoder, TextEncoder
from lightning_prune.data.latent_files import MANIFEST, NULL_PROMPT, PROGRESS, Manifest, Shard, write_shard
from lightning_prune.data.loader import read_ahead
from lightning_prune.data.samples import Samples, Split
from lightning_prune.files import written_whole
from lightning_prune.protocols import InputError

SPLITS: tuple[Split, ...] = ("train", "held_out")
Stored = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class CacheSettings:
    """How pictures and captions are encoded.

    Args:
        pipeline: diffusers folder of a whole pipeline, or of its autoencoder alone where there are no captions; or a
            hub id. Captions of the data are encoded with the pipeline's text encoders.
        output: folder of the cache.
        stored: type that latents and embeddings are stored in; they are computed in float32.
        flip: encode the mirror image of every picture too, so that training can mirror.
        batch_size: pictures encoded at once.
        shard_size: samples a file; what is lost when the command is stopped.
        max_tokens: length of the prompt, where the pipeline lets one choose; null for its default.
        scale: factor of latents, for denoisers that were trained with another than the autoencoder's own; null takes
            that one. Decoders read it in the cache.
        device: "cpu", "cuda" and so on; null takes a GPU where there is one.
    """

    pipeline: str
    output: str
    stored: Stored = "float16"
    flip: bool = False
    batch_size: int = 16
    shard_size: int = 512
    max_tokens: int | None = None
    scale: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not positive")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise InputError(f"scale: {self.scale} is not positive and finite")

    def chosen_device(self) -> str:
        """The device asked for, or a GPU where there is one."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


class CacheWriter:
    """Encodes the train and the held-out split of a data module into a folder.

    Shards hold fixed stretches of a split, encoded in fixed batches, so what was done before a stop and what is done
    after it are the bytes of an uninterrupted run.

    Args:
        data: where pictures, labels and captions come from.
        settings: how they are encoded.
        source: what identifies `data`, for the manifest: a cache is continued with equal settings only.
    """

    def __init__(self, data: DataModule, settings: CacheSettings, source: Mapping[str, Any]) -> None:
        self.data, self.settings, self.root = data, settings, Path(settings.output)
        self.splits = {split: data.split(split) for split in SPLITS}
        self.vae = LatentEncoder(settings.pipeline, settings.chosen_device(), settings.scale)
        self.text: TextEncoder | None = None
        if "caption" in self.splits["train"].conditions([0]):
            self.text = TextEncoder(settings.pipeline, settings.chosen_device(), settings.max_tokens)
        self._dtype: torch.dtype = getattr(torch, settings.stored)
        self._sources = {
            "data": dict(source),
            "pipeline": settings.pipeline,
            "autoencoder_sha256": self.vae.fingerprint,
            **{
                key: getattr(settings, key)
                for key in ("stored", "flip", "batch_size", "shard_size", "max_tokens", "scale")
            },
            "samples": {split: len(samples) for split, samples in self.splits.items()},
        }

    @property
    def total(self) -> int:
        """Samples of all splits."""
        return sum(len(samples) for samples in self.splits.values())

    def write(self, advance: Callable[[int], None] = lambda samples: None) -> Manifest:
        """Write what is missing; `advance` is told how many samples are done, those found there included.

        Raises:
            InputError: the folder holds a cache that was made with other settings, or cannot be written.
        """
        manifest = self._begun()
        for leftover in self.root.glob("*.partial"):  # of a process that was killed while it wrote
            leftover.unlink()
        done = {shard.file: shard for shard in chain.from_iterable(manifest.splits.values())}
        for split, number, first, end in self._stretches():
            file = f"{split}-{number:05d}.safetensors"
            if file not in done or not _intact(self.root, done[file]):
                done[file] = self._encode(split, file, first, end)
                _with_shards(manifest, done).write(self.root / PROGRESS)
            advance(end - first)
        return self._finished(_with_shards(manifest, done))

    def _begun(self) -> Manifest:
        """The manifest to go on with: of a finished cache, of one that was begun, or a new one."""
        for name in (MANIFEST, PROGRESS):
            if (self.root / name).exists():
                manifest = Manifest.read(self.root / name)
                for key, value in self._sources.items():
                    if manifest.settings.get(key) != value:
                        raise InputError(
                            f"{self.root / name}: made with {key} {manifest.settings.get(key)}, not {value}; "
                            "give another --output"
                        )
                return manifest
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise InputError(f"output: {self.root} exists and holds no latents; give another --output")
        return self._new()

    def _new(self) -> Manifest:
        """A manifest without shards. One sample is encoded for its shapes, before anything is written."""
        tensors, _ = self._batch(self.splits["train"], [0])
        labels = ("mean", "std", "mean_mirrored", "std_mirrored", "labels")
        manifest = Manifest(
            settings=self._sources,
            name=self.data.name,
            num_classes=self.data.num_classes,
            sample_shape=list(tensors["mean"].shape[1:]),
            scale=self.vae.scale,
            shift=self.vae.shift,
            conditions={key: list(value.shape[1:]) for key, value in tensors.items() if key not in labels},
            splits={split: [] for split in SPLITS},
        )
        manifest.write(self.root / PROGRESS)
        return manifest

    def _stretches(self) -> Iterator[tuple[Split, int, int, int]]:
        size = self.settings.shard_size
        for split, samples in self.splits.items():
            for number, first in enumerate(range(0, len(samples), size)):
                yield split, number, first, min(first + size, len(samples))

    def _encode(self, split: Split, file: str, first: int, end: int) -> Shard:
        size = self.settings.batch_size
        batches = [list(range(start, min(start + size, end))) for start in range(first, end, size)]
        parts = [self._encoded(batch) for batch in self._read(self.splits[split], batches)]
        tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        return write_shard(self.root, file, tensors, sorted({name for _, damaged in parts for name in damaged}))

    def _read(self, samples: Samples, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        return read_ahead(lambda i: samples.collate(samples.__getitems__(i)), batches, max(1, self.data.workers))

    def _batch(self, samples: Samples, indices: list[int]) -> tuple[dict[str, Tensor], list[str]]:
        return self._encoded(samples.collate(samples.__getitems__(indices)))

    def _encoded(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a batch as they are stored, and names of damaged pictures that others stand in for."""
        tensors = self.vae.encode(batch["x"])
        if self.settings.flip:
            mirrored = self.vae.encode(batch["x"].flip(-1))
            tensors |= {f"{name}_mirrored": tensor for name, tensor in mirrored.items()}
        if self.text is not None:
            tensors |= self.text.encode(list(batch["caption"]))
        stored = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        damaged: list[str] = batch.get("damaged", [])
        self.data.skipped(damaged)
        return {**stored, "labels": batch["cond"]}, damaged

    def _finished(self, manifest: Manifest) -> Manifest:
        if self.text is not None:
            empty = {name: tensor[0].to(self._dtype).contiguous() for name, tensor in self.text.encode([""]).items()}
            with written_whole(self.root / NULL_PROMPT) as partial:
                save_file(empty, partial)
            manifest.null_prompt = sha256(self.root / NULL_PROMPT)
        manifest.write(self.root / MANIFEST)
        (self.root / PROGRESS).unlink(missing_ok=True)
        return manifest


def _with_shards(manifest: Manifest, done: Mapping[str, Shard]) -> Manifest:
    """The manifest listing the shards that are done, in order."""
    named = {str(split): [done[file] for file in sorted(done) if file.startswith(f"{split}-")] for split in SPLITS}
    return replace(manifest, splits=named)


def _intact(root: Path, shard: Shard) -> bool:
    try:
        shard.check(root)
    except InputError:
        return False
    return True
