"""The files of a latent cache: shards in safetensors with checksums, and the manifest that lists them.

latents.json                    what it is made from, splits, shards with their checksums; there once all is done
progress.json                   the same while it is being made
train-00000.safetensors ...     mean [n, C, h, w], std, labels [n], conditions; `<name>_mirrored` of mirror images
null_prompt.safetensors         the conditions of the empty prompt, where captions were encoded
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.checksums import sha256
from lightning_prune.files import written_whole
from lightning_prune.protocols import InputError

MANIFEST, PROGRESS, NULL_PROMPT = "latents.json", "progress.json", "null_prompt.safetensors"
SCHEMA = 1


@dataclass
class Shard:
    """One file of samples."""

    file: str
    samples: int
    sha256: str
    damaged: list[str] = field(default_factory=list)

    def check(self, root: Path) -> None:
        """Raise `InputError` if the file is missing or not the one that was written."""
        if not (root / self.file).is_file():
            raise InputError(f"{root / self.file}: missing; run cache-latents again to make it")
        if sha256(root / self.file) != self.sha256:
            raise InputError(f"{root / self.file}: checksum differs from {MANIFEST}; delete it and run cache-latents")


@dataclass
class Manifest:
    """What a cache holds.

    Attributes:
        settings: what the bytes of the shards depend on.
        name: name of the data set.
        num_classes: number of classes, 0 for none.
        sample_shape: shape of a latent [C, h, w].
        scale: what a shifted latent is multiplied with, a value a channel or one for all.
        shift: what is subtracted before.
        conditions: shape of one sample's condition, by key; empty for labels.
        splits: shards of each split, in order.
        null_prompt: checksum of the empty prompt's file, where captions were encoded.
    """

    settings: dict[str, Any]
    name: str
    num_classes: int
    sample_shape: list[int]
    scale: list[float]
    shift: list[float]
    conditions: dict[str, list[int]]
    splits: dict[str, list[Shard]]
    null_prompt: str | None = None
    schema: int = SCHEMA

    def write(self, file: Path) -> None:
        with written_whole(file) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read what `write` wrote. Raises `InputError` if the file is missing, damaged or of a newer schema."""
        try:
            content = json.loads(file.read_text())
            if content["schema"] > SCHEMA:
                raise InputError(f"{file}: schema {content['schema']} is newer than this program's {SCHEMA}")
            splits = {key: [Shard(**shard) for shard in shards] for key, shards in content.pop("splits").items()}
            return cls(**content, splits=splits)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: missing or damaged; cache-latents writes it when it is done") from error

    @property
    def damaged(self) -> list[str]:
        """Files that could not be read when the cache was made."""
        return [name for shards in self.splits.values() for shard in shards for name in shard.damaged]


def write_shard(root: Path, file: str, tensors: Mapping[str, Tensor], damaged: list[str]) -> Shard:
    """Write one shard whole and give its entry for the manifest. The same tensors give the same bytes."""
    with written_whole(root / file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    return Shard(file, len(next(iter(tensors.values()))), sha256(root / file), damaged)


class ShardReader:
    """Reads single samples out of a split's shards, which stay on disk.

    Args:
        root: folder of the cache.
        shards: shards of the split.
    """

    def __init__(self, root: Path, shards: list[Shard]) -> None:
        self.root, self.shards = root, shards
        self.starts = torch.tensor([0, *(shard.samples for shard in shards)]).cumsum(0)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def file(self, number: int) -> Any:
        """A shard, opened once. Raises `InputError` if it is missing or no safetensors file."""
        if number not in self._open:
            path = self.root / self.shards[number].file
            try:
                self._open[number] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: missing or damaged shard") from error
        return self._open[number]

    def rows(self, names: list[str], indices: list[int]) -> Iterator[dict[str, Tensor]]:
        """The named tensors of each sample."""
        places = torch.bucketize(torch.tensor(indices), self.starts[1:], right=True).tolist()
        for index, number in zip(indices, places, strict=True):
            file, row = self.file(number), index - int(self.starts[number])
            try:
                yield {name: file.get_slice(name)[row : row + 1][0] for name in names}
            except (OSError, SafetensorError, IndexError) as error:
                raise InputError(f"{self.root / self.shards[number].file}: damaged shard") from error

    def whole(self, name: str) -> Tensor:
        """One tensor of all samples."""
        return torch.cat([self.file(number).get_tensor(name) for number in range(len(self.shards))])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to worker processes
