"""Score networks: draw conditional samples from equal noise, compare their features with a reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.drift import Drift, drift, joined
from lightning_prune.metrics.extractors import Extracted, FeatureExtractor, load_extractor
from lightning_prune.metrics.features import warn_if_rank_deficient
from lightning_prune.metrics.frechet import Distance, Moments, distance, precision_recall
from lightning_prune.metrics.inception_score import inception_score
from lightning_prune.metrics.kid import kernel_distance
from lightning_prune.metrics.lpips import Lpips
from lightning_prune.metrics.protocol import Protocol
from lightning_prune.metrics.reference import (
    Reference,
    cached_reference,
    compute_reference,
    extract_all,
    read_reference,
)
from lightning_prune.metrics.samples import (
    conditions_of,
    decoder_of,
    pictures_of,
    prompts_of,
    real_images,
    require_pictures,
)
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError, LatentData, RealImages, ReferenceData
from lightning_prune.world import World

Draw = Callable[[Tensor, Condition], Tensor]
DEFAULT_EXTRACTOR = "fashion_classifier"
_IMAGES_AT_ONCE = 800  # of those decoded as they are needed; whole batches of the extractors of natural images
Further = Literal["kernel", "spatial", "inception_score", "precision_recall"]


@dataclass(frozen=True)
class Measurement:
    """What samples are compared with, and by which measures.

    Args:
        extractor: network whose features are compared; see `lightning_prune.metrics.extractors`.
        weights: file of its weights, where it does not ship with the package.
        reference: file of moments to compare with, our own or pytorch-fid's or ADM's; null for the data's own split.
        reference_samples: how many images of the reference split, and at most of the held-out one; null for all. With
            a `reference` that does not say it, how many images that is of.
        further: measures beside the Frechet distance: "kernel" (KID), "spatial" (sFID), "inception_score",
            "precision_recall"; see `docs/metrics.md`.
        lpips_weights: file of torchvision's AlexNet; with it drift from the dense network has LPIPS too.
    """

    extractor: str = DEFAULT_EXTRACTOR
    weights: str | None = None
    reference: str | None = None
    reference_samples: int | None = None
    further: list[Further] = field(default_factory=list)
    lpips_weights: str | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn.

    Args:
        samples: number of samples; labels are balanced over the classes, prompts are those of held-out samples.
        sampler: solver, steps and guidance.
        seed: seed of the starting noise.
        batch_size: samples drawn at once, by one process.
        name: name of the protocol.
    """

    samples: int = 1000
    sampler: Sampler = field(default_factory=lambda: Sampler(steps=10))
    seed: int = 0
    batch_size: int = 100
    name: str = "quick-v1"

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(f"samples: {self.samples} are too few for a distance, at least 2 are needed")


@dataclass(frozen=True)
class Score:
    """What one evaluation gives.

    Attributes:
        metric: name of the distance, after its extractor.
        fd: the distance.
        accuracy: share of samples classified as their label, where the extractor knows the labels.
        protocol: how it was measured.
        drift: per-image differences from the first network drawn beside it; None for that one.
        features: features [N, D] of the samples.
        further: other measures asked for, by name: with an interval where they have one.
    """

    metric: str
    fd: Distance
    accuracy: float | None
    protocol: Protocol
    drift: Drift | None
    features: Tensor = field(repr=False)
    further: dict[str, Distance | float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The value as reports store it."""
        return {
            "value": self.fd.value,
            "low": self.fd.low,
            "high": self.fd.high,
            "samples": len(self.features),
            "protocol": self.protocol.hash,
        }


@dataclass(frozen=True)
class _Drawn:
    """What a sampler gave for a batch, and the pictures in it."""

    samples: Tensor
    pictures: Tensor


@dataclass
class _Part:
    """What one batch gives of one network."""

    extracted: Extracted
    hits: int | None
    drift: Drift | None


class Evaluator:
    """Computes the Frechet distance of samples against the reference split of a data module.

    Samples are shared over processes in whole batches, so every process ends with the same value, which is that of
    a single process.

    Args:
        data: where the reference comes from.
        measurement: what is measured.
    """

    def __init__(self, data: ReferenceData, measurement: Measurement | None = None) -> None:
        require_pictures(data, "a distance")
        chosen = measurement or Measurement()
        self.data, self.measurement = data, chosen
        self.perceptual = Lpips(chosen.lpips_weights) if chosen.lpips_weights else None
        self.extractor: FeatureExtractor = load_extractor(chosen.extractor, chosen.weights)
        if self.extractor.name == DEFAULT_EXTRACTOR and getattr(data, "name", None) != "fashion":
            raise InputError(
                f"data: fd_fashion compares with Fashion-MNIST, got {type(data).__name__}; choose another "
                "measurement.extractor"
            )
        if chosen.reference is not None:
            _ = self._reference  # a wrong file is refused before a run begins, not after it

    def to(self, device: torch.device | str) -> Evaluator:
        """Move the networks that evaluate."""
        self.extractor.to(device)
        if isinstance(self.data, LatentData):
            self.data.decoder.to(device)
        if self.perceptual is not None:
            self.perceptual.to(device)
        return self

    def _real(self, split: str) -> Iterator[Tensor]:
        """Real images uint8 [n, C, H, W] of a split, in parts."""
        return _parts(real_images(self.data, split).images, self.measurement.reference_samples)

    @cached_property
    def _reference(self) -> Reference:
        """Moments of the reference; those of a large extractor are kept on disk, as they take minutes."""
        if self.measurement.reference is not None:
            file = Path(self.measurement.reference)
            return read_reference(file, self.extractor, self.measurement.reference_samples)
        name = _identified(real_images(self.data, "reference"), self.measurement.reference_samples)
        if self.extractor.name == DEFAULT_EXTRACTOR:
            return compute_reference(self.extractor, self._real("reference"), name)
        return cached_reference(self.extractor, name, lambda: self._real("reference"))

    @property
    def reference(self) -> Moments:
        """Moments of the reference images."""
        return self._reference.moments

    @cached_property
    def reference_features(self) -> Tensor:
        """Features [N, D] of the reference images."""
        if (file := self.measurement.reference) is not None:
            raise InputError(f"further: {file} holds moments, but this measure needs reference images")
        return extract_all(self.extractor, self._real("reference")).features

    def distance_of(self, images: Tensor) -> Distance:
        """The distance of uint8 `images` [N, C, H, W] from the reference."""
        return distance(self.extractor.extract(images).features, self.reference)

    def floor(self) -> Distance:
        """The distance of the held-out real images from the reference: no model can be expected below it."""
        return distance(extract_all(self.extractor, self._real("held_out")).features, self.reference)

    def protocol(self, settings: SamplingSettings, process: Process, weights: str) -> Protocol:
        """The protocol of a score drawn with `settings` from networks trained on `process`."""
        return Protocol(
            name=settings.name,
            samples=settings.samples,
            sampler=settings.sampler.describe(),
            process=process.describe(),
            steps=settings.sampler.steps,
            guidance=settings.sampler.guidance,
            sample_seed=settings.seed,
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            reference=self._reference.data,
            reference_samples=self.reference.samples,
            weights=weights,
            resize=self.extractor.resize,
            rank_deficient=warn_if_rank_deficient(self.extractor.metric, settings.samples, self.extractor.dimensions),
            prompts=prompts_of(self.data),
            decoder=decoder_of(self.data),
        )

    def score(
        self, draws: Mapping[str, Draw], settings: SamplingSettings, process: Process, weights: str
    ) -> dict[str, Score]:
        """Draw `settings.samples` samples through each `draw(ids, conditions)` and score their images, by name.

        The first is what the others' drift is measured from. `weights` says which weights drew ("averaged" or
        "last"), for the protocol.

        Raises:
            InputError: images that are not finite.
        """
        batches = torch.arange(settings.samples).split(settings.batch_size)
        world = World.current()
        own = {index: self._batch(draws, batches[index]) for index in world.share(len(batches))}
        parts = world.merge(own)
        protocol = self.protocol(settings, process, weights)
        return {name: self._joined([part[name] for part in parts], protocol) for name in draws}

    def _batch(self, draws: Mapping[str, Draw], ids: Tensor) -> dict[str, _Part]:
        cond = conditions_of(self.data, ids, self.data.num_classes)
        parts: dict[str, _Part] = {}
        first: _Drawn | None = None
        for name, draw in draws.items():
            samples = draw(ids, cond)
            if not torch.isfinite(samples).all():
                raise InputError("sampled images are not finite; the weights they were drawn with are broken")
            drawn = _Drawn(samples, pictures_of(self.data, samples))
            parts[name] = self._part(drawn, cond, first)
            first = drawn if first is None else first
        return parts

    def _part(self, drawn: _Drawn, cond: Condition, dense: _Drawn | None) -> _Part:
        found = self.extractor.extract(to_uint8(drawn.pictures))
        hits = None
        if self.extractor.name == DEFAULT_EXTRACTOR and found.logits is not None:
            hits = int((found.logits.argmax(dim=1) == cond).sum())
        # Processes send each other what is kept here, so only what somebody asked for is.
        logits = found.logits if "inception_score" in self.measurement.further else None
        spatial = found.spatial if "spatial" in self.measurement.further else None
        found = Extracted(found.features, logits, spatial)
        return _Part(found, hits, None if dense is None else self._drift(drawn, dense))

    def _drift(self, drawn: _Drawn, dense: _Drawn) -> Drift:
        return drift(drawn.pictures, dense.pictures, self.perceptual, (drawn.samples, dense.samples))

    def _joined(self, parts: list[_Part], protocol: Protocol) -> Score:
        extracted = Extracted.concatenate([part.extracted for part in parts])
        hits = [part.hits for part in parts if part.hits is not None]
        drifts = [part.drift for part in parts if part.drift is not None]
        return Score(
            metric=self.extractor.metric,
            fd=distance(extracted.features, self.reference),
            accuracy=sum(hits) / len(extracted.features) if hits else None,
            protocol=protocol,
            drift=joined(drifts) if drifts else None,
            features=extracted.features,
            further=self._further(extracted),
        )

    def _further(self, found: Extracted) -> dict[str, Distance | float]:
        values: dict[str, Distance | float] = {}
        for name in self.measurement.further:
            if name == "kernel":
                values[self.extractor.kernel_metric] = kernel_distance(found.features, self.reference_features)
            elif name == "spatial":
                values["sfid"] = self._spatial(found)
            elif name == "inception_score":
                values["inception_score"] = inception_score(found.logits)
            else:
                values["precision"], values["recall"] = precision_recall(
                    found.features, self.reference_features[: len(found.features)]
                )
        return values

    def _spatial(self, found: Extracted) -> Distance:
        if found.spatial is None or self._reference.spatial is None:
            raise InputError(f"further: {self.extractor.name} has no spatial features, so there is no sFID")
        return distance(found.spatial, self._reference.spatial)


def _parts(images: Any, count: int | None) -> Iterator[Tensor]:
    """The first `count` images; all at once where they are in memory already."""
    if isinstance(images, Tensor):
        yield images[:count]
        return
    end = len(images) if count is None else min(count, len(images))
    for start in range(0, end, _IMAGES_AT_ONCE):
        part: Tensor = images[start : min(start + _IMAGES_AT_ONCE, end)]
        if len(part):
            yield part


def _identified(real: RealImages, count: int | None) -> str:
    """Which images they are, in words that no other images share."""
    if real.identity is not None:
        found = len(real.images) if count is None else min(count, len(real.images))
        return f"{real.name}, {found} images, {real.identity}"
    digest, found = hashlib.sha256(), 0
    for part in _parts(real.images, count):
        digest.update(part.numpy().tobytes())
        found += len(part)
    return f"{real.name}, {found} images, sha256 {digest.hexdigest()}"
