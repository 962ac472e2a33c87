"""Feature extractors by name. Weights are local files; nothing here downloads."""

from __future__ import annotations

from pathlib import Path

from lightning_prune.metrics.extractors.base import Extracted, FeatureExtractor
from lightning_prune.protocols import InputError

__all__ = ["Extracted", "FeatureExtractor", "load_extractor"]


def load_extractor(name: str, weights: str | Path | None = None) -> FeatureExtractor:
    """The extractor called `name`: "fashion_classifier", "inception-2015-12-05", or "timm/<network>".

    `weights` is a local file or folder. The embedded classifier and a prefetched Inception do without.

    Raises:
        InputError: no such extractor; weights missing, damaged or of another network.
    """
    # Imports wait for their use: torch-fidelity and timm take seconds.
    family, _, architecture = name.partition("/")
    if name == "fashion_classifier":
        from lightning_prune.metrics.extractors.fashion import FashionExtractor

        return FashionExtractor(weights)
    if name in ("inception", "inception-2015-12-05"):
        from lightning_prune.metrics.extractors.inception import InceptionExtractor

        return InceptionExtractor(weights)
    if family == "timm" and architecture:
        from lightning_prune.metrics.extractors.timm import TimmExtractor

        return TimmExtractor(architecture, weights)
    raise InputError(f"extractor {name!r}: expected fashion_classifier, inception-2015-12-05 or timm/<network>")
