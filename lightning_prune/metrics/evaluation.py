"""Score a denoiser: draw balanced conditional samples, compare their features with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checksums import sha256
from lightning_prune.diffusion.process import Process
from lightning_prune.metrics.fashion import EXTRACTOR_FOLDER, FashionClassifier, extract, load_classifier
from lightning_prune.metrics.frechet import Distance, Moments, distance
from lightning_prune.metrics.protocol import Protocol
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError, ReferenceData

Draw = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn.

    Args:
        samples: number of samples; labels are balanced over the classes.
        steps: network evaluations a sample.
        guidance: classifier-free guidance scale; 1 is none.
        seed: seed of the starting noise.
        batch_size: samples drawn at once; it has no effect on them.
        name: name of the protocol.
    """

    samples: int = 1000
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 100
    name: str = "quick-v1"


@dataclass(frozen=True)
class Score:
    """What one evaluation gives: the distance, the share of samples classified as their label, and features."""

    fd: Distance
    accuracy: float
    protocol: Protocol
    features: Tensor = field(repr=False)

    def row(self) -> dict[str, Any]:
        """The value as reports store it."""
        return {
            "value": self.fd.value,
            "low": self.fd.low,
            "high": self.fd.high,
            "samples": len(self.features),
            "protocol": self.protocol.hash,
        }


class FashionEvaluator:
    """Computes `fd_fashion` of samples against the held-out reference of a Fashion-MNIST data module."""

    def __init__(self, data: ReferenceData) -> None:
        if getattr(data, "name", None) != "fashion":
            raise InputError(f"data: fd_fashion compares with Fashion-MNIST, got {type(data).__name__}")
        self.data = data
        self.extractor: FashionClassifier = load_classifier()

    @cached_property
    def reference_features(self) -> Tensor:
        """Features [N, D] of the reference images."""
        return self._features_of(self.data.split("reference").images)

    @cached_property
    def reference(self) -> Moments:
        """Moments of the reference images."""
        return Moments.of(self.reference_features)

    def _features_of(self, images: Tensor) -> Tensor:
        return extract(self.extractor, images)[0]

    def distance_of(self, images: Tensor) -> Distance:
        """The distance of uint8 `images` [N, C, H, W] from the reference."""
        return distance(self._features_of(images), self.reference)

    def floor(self) -> Distance:
        """The distance of the held-out real images from the reference: no model can be expected below it."""
        return self.distance_of(self.data.split("held_out").images)

    def protocol(self, settings: SamplingSettings, process: Process, weights: str) -> Protocol:
        """The protocol of a score drawn with `settings` from networks trained on `process`."""
        return Protocol(
            name=settings.name,
            samples=settings.samples,
            sampler="DDIM eta=0, trailing",
            process=process.describe(),
            steps=settings.steps,
            guidance=settings.guidance,
            sample_seed=settings.seed,
            extractor="fashion_classifier",
            extractor_sha256=sha256(EXTRACTOR_FOLDER / "model.safetensors"),
            reference="fashion reference split",
            reference_samples=self.reference.samples,
            weights=weights,
        )

    def score(self, draw: Draw, settings: SamplingSettings, process: Process, weights: str) -> Score:
        """Draw `settings.samples` images through `draw(ids, labels)` and score them.

        `weights` says which weights drew them ("averaged" or "last"), for the protocol.

        Raises:
            InputError: images that are not finite.
        """
        labels = balanced_labels(settings.samples, self.data.num_classes)
        features, hits = [], 0
        for ids in torch.arange(settings.samples).split(settings.batch_size):
            images = draw(ids, labels[ids])
            if not torch.isfinite(images).all():
                raise InputError("sampled images are not finite; the weights they were drawn with are broken")
            pooled, logits = extract(self.extractor, to_uint8(images).cpu())
            features.append(pooled)
            hits += int((logits.argmax(dim=1) == labels[ids]).sum())
        stacked = torch.cat(features)
        return Score(
            distance(stacked, self.reference),
            hits / settings.samples,
            self.protocol(settings, process, weights),
            stacked,
        )


def balanced_labels(samples: int, num_classes: int) -> Tensor:
    """Labels [samples] that cycle through the classes, so every prefix is as balanced as it can be."""
    return torch.arange(samples) % max(1, num_classes)
