"""What a feature extractor gives, and the checks on images that all of them share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_prune.protocols import InputError


@dataclass(frozen=True)
class Extracted:
    """What an extractor gives for N images, on the CPU in float32.

    Attributes:
        features: pooled features [N, D].
        logits: class scores [N, K]; None where the network has no class layer.
        spatial: flattened spatial features [N, S], for sFID; None where the network defines none.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[Extracted]) -> Extracted:
        """One value of the parts of consecutive batches."""

        def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            return torch.cat(present) if present else None

        return cls(
            torch.cat([part.features for part in parts]),
            join([part.logits for part in parts]),
            join([part.spatial for part in parts]),
        )

    def cpu(self) -> Extracted:
        """The same on the CPU, in float32."""
        logits = None if self.logits is None else self.logits.float().cpu()
        spatial = None if self.spatial is None else self.spatial.float().cpu()
        return Extracted(self.features.float().cpu(), logits, spatial)


@runtime_checkable
class FeatureExtractor(Protocol):
    """A network whose features distances are computed on.

    Attributes:
        name: what protocols and reports call it, for example "inception-2015-12-05".
        metric: what the Frechet distance on its features is called; only one extractor may call it "fid".
        kernel_metric: what the kernel distance on its features is called.
        sha256: checksum of its weights.
        dimensions: number of features.
        resize: how images reach the network's input size, in words, for the protocol.
        channels: numbers of channels it takes; networks of natural images repeat grey.
    """

    name: str
    metric: str
    kernel_metric: str
    sha256: str
    dimensions: int
    resize: str
    channels: tuple[int, ...]

    def extract(self, images: Tensor) -> Extracted:
        """Features of uint8 `images` [N, C, H, W]. Raises `InputError` for images it does not take."""

    def to(self, device: torch.device | str) -> Self:
        """Move the network; images follow it, what is extracted comes back to the CPU."""


class NetworkExtractor(ABC):
    """Runs a network over images in batches; a subclass says what it gives for one batch.

    Args:
        network: put into evaluation mode, without gradients.
        batch_size: images that go through the network at once.
    """

    name: str
    metric: str
    kernel_metric: str
    sha256: str
    dimensions: int
    resize: str
    channels: tuple[int, ...] = (1, 3)
    size: tuple[int, int] | None = None  # None: any

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network = network.eval().requires_grad_(False)
        self.batch_size = batch_size

    def to(self, device: torch.device | str) -> Self:
        """Move the network; images follow it, what is extracted comes back to the CPU."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def extract(self, images: Tensor) -> Extracted:
        """Features of uint8 `images` [N, C, H, W].

        Raises:
            InputError: images of a type, number of channels or size that this extractor does not take.
        """
        check_images(images, self.name, self.channels, self.size)
        device = next(self.network.parameters()).device
        parts = [self.extract_batch(part.to(device)).cpu() for part in images.split(self.batch_size)]
        return Extracted.concatenate(parts)

    @abstractmethod
    def extract_batch(self, images: Tensor) -> Extracted:
        """The same for one batch that is on the network's device and has been checked."""


def check_images(
    images: Tensor, name: str, channels: tuple[int, ...] = (1, 3), size: tuple[int, int] | None = None
) -> None:
    """Raise `InputError` unless `images` are uint8 [N, C, H, W] with C in `channels` and, if given, (H, W) = `size`."""
    height, width = size or ("H", "W")
    wanted = f"uint8 [N, {' or '.join(map(str, channels))}, {height}, {width}]"
    found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    fits = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] in channels and images.numel() > 0
    if not fits or (size is not None and tuple(images.shape[2:]) != size):
        raise InputError(f"images: {name} takes {wanted}, got {found}")


def to_rgb(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] of `images` [N, 1 or 3, H, W]; grey is repeated."""
    return images.expand(-1, 3, -1, -1)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes in name order, so that the container does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
