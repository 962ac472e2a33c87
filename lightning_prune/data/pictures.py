"""Pictures decoded when they are read, and what happens when one cannot be."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_prune.data.augment import Draw, ImageTransform
from lightning_prune.data.samples import Sample, Samples
from lightning_prune.pixels import to_unit_range
from lightning_prune.protocols import InputError

OnDamage = Literal["stop", "skip"]
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DamagedPicture(InputError):
    """A picture that cannot be decoded. A worker process hands it on by its message alone."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class Pictures(ABC):
    """Pictures of a data set in a fixed order.

    Attributes:
        labels: int64 [N]; zeros where there are no classes.
        classes: names of the classes, in the order of their numbers; empty where there are none.
        captions: a caption for each picture, or None.
    """

    labels: Tensor
    classes: Sequence[str] = ()
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        """Number of the picture's class."""
        return int(self.labels[index])

    def caption(self, index: int) -> str | None:
        """The picture's caption; None where pictures have none."""
        return None if self.captions is None else self.captions[index]

    @abstractmethod
    def name(self, index: int) -> str:
        """The file, or what else identifies a picture to its owner."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The picture; may leave decoding for later."""

    def read(self, index: int, transform: ImageTransform, draw: Draw | None) -> Tensor:
        """uint8 [C, H, W]. Raises `DamagedPicture` if it cannot be decoded."""
        try:
            with self.open(index) as picture:
                return transform(picture, draw)
        except _UNREADABLE as error:
            name, reason = self.name(index), " ".join(str(error).split())
            raise DamagedPicture(f"{name}: damaged picture ({reason})", name) from error


@dataclass
class FilePictures(Pictures):
    """Pictures in files of their own."""

    files: list[Path]
    labels: Tensor
    classes: Sequence[str] = ()
    captions: Sequence[str] | None = None

    def name(self, index: int) -> str:
        return str(self.files[index])

    def open(self, index: int) -> Image.Image:
        return Image.open(self.files[index])


@dataclass
class DecodedImages(Samples):
    """A split: some of the pictures, decoded and transformed as they are asked for.

    With `on_damage="skip"` the next readable picture of the split stands in for a damaged one, so batches keep their
    size and their order on every rank.

    Attributes:
        pictures: all pictures.
        positions: which of them, int64 [N].
        transform: how they are brought to one shape.
        on_damage: "stop" raises at a damaged picture, "skip" takes another.
        epoch: (seed, epoch) that crops and mirroring are drawn from; None draws nothing.
    """

    pictures: Pictures
    positions: Tensor
    transform: ImageTransform
    on_damage: OnDamage = "stop"
    epoch: tuple[int, int] | None = None

    @property
    def images(self) -> DecodedPixels:
        """uint8 pictures [N, C, H, W], decoded when sliced."""
        return DecodedPixels(self)

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Numbers of the classes, int64 [N]."""
        return self.pictures.labels[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> Sample:
        damaged: list[str] = []
        for step in range(len(self)):
            used = self.stand_in(index, step)
            try:
                return self._whole(used) | ({"damaged": damaged} if damaged else {})
            except DamagedPicture as error:
                if self.on_damage == "stop":
                    raise
                damaged.append(error.name)
        raise InputError(f"{damaged[0]}: damaged, and so is every other picture of this split")

    def stand_in(self, index: int, step: int) -> int:
        """Which sample is tried at the `step`-th attempt to read one."""
        return (index + step) % len(self)

    def _whole(self, index: int) -> Sample:
        draw = None if self.epoch is None else Draw.of(*self.epoch, index)
        position = int(self.positions[index])
        pixels = self.pictures.read(position, self.transform, draw)
        label, caption = torch.tensor(self.pictures.label(position)), self.pictures.caption(position)
        sample = {"x": to_unit_range(pixels), "cond": label, "id": torch.tensor(index)}
        return sample if caption is None else {**sample, "caption": caption}

    def pixels(self, index: int) -> Tensor | None:
        """uint8 [C, H, W] of one picture, neither mirrored nor cropped at random; None if damaged and skipped."""
        try:
            return self.pictures.read(int(self.positions[index]), self.transform, None)
        except DamagedPicture:
            if self.on_damage == "stop":
                raise
            return None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.transform.channels, self.transform.size, self.transform.size)

    def first(self, count: int) -> DecodedImages:
        return replace(self, positions=self.positions[:count])

    def at_epoch(self, seed: int, epoch: int) -> DecodedImages:
        return replace(self, epoch=(seed, epoch))

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        positions = [int(self.positions[index]) for index in indices]
        labels = torch.tensor([self.pictures.label(position) for position in positions])
        captions = [self.pictures.caption(position) for position in positions]
        found = {"cond": labels, "id": torch.tensor(indices)}
        return found if None in captions else {**found, "caption": captions}


@dataclass
class DecodedPixels:
    """The uint8 pictures [N, C, H, W] of a split, decoded when sliced, without damaged ones that may be skipped."""

    split: DecodedImages

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[Tensor]:
        found = (self.split.pixels(index) for index in range(len(self)))
        return (pixels for pixels in found if pixels is not None)

    def __getitem__(self, chosen: slice) -> Tensor:
        """Pictures of a slice as one tensor, uint8 [n, C, H, W]."""
        found = [self.split.pixels(index) for index in range(*chosen.indices(len(self)))]
        readable = [pixels for pixels in found if pixels is not None]
        return torch.stack(readable) if readable else torch.zeros(0, *self.split.shape, dtype=torch.uint8)


def stratified(labels: Tensor, names: Sequence[str]) -> Tensor:
    """Positions in an order of which every beginning holds the classes in their proportions.

    Within a class the order is that of the names' checksums: the same on every machine, whatever the folder.
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    ranked = sorted(range(len(names)), key=lambda i: (int(labels[i]), digests[i], i))
    sizes = torch.bincount(labels).tolist() if len(labels) else []
    seen = [0] * len(sizes)
    place: list[tuple[float, int]] = []
    for position in ranked:
        label = int(labels[position])
        place.append(((seen[label] + 0.5) / sizes[label], position))
        seen[label] += 1
    return torch.tensor([position for _, position in sorted(place)], dtype=torch.long)
