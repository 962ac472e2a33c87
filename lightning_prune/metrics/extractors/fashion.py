"""The embedded Fashion-MNIST classifier as an extractor."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lightning_prune.checksums import sha256
from lightning_prune.metrics.extractors.base import Extracted, NetworkExtractor
from lightning_prune.metrics.fashion import EXTRACTOR_FOLDER, FEATURES, FashionClassifier, load_classifier


class FashionExtractor(NetworkExtractor):
    """96 features and 10 class scores of grey 32x32 images.

    Args:
        weights: folder with `model.safetensors` and `card.json`; by default the one in the package.
        batch_size: images that go through the network at once.
    """

    name = "fashion_classifier"
    metric = "fd_fashion"
    kernel_metric = "kd_fashion"
    dimensions = FEATURES
    resize = "none"
    channels: tuple[int, ...] = (1,)
    size: tuple[int, int] | None = (32, 32)
    network: FashionClassifier

    def __init__(self, weights: str | Path | None = None, batch_size: int = 500) -> None:
        folder = Path(weights) if weights else EXTRACTOR_FOLDER
        super().__init__(load_classifier(folder), batch_size)
        self.sha256 = sha256(folder / "model.safetensors")

    def extract_batch(self, images: Tensor) -> Extracted:
        features = self.network.features(images)
        return Extracted(features, self.network.head(features))
