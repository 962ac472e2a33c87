"""The embedded Fashion-MNIST classifier as an extractor; the Frechet distance on its features is `fd_fashion`.

It is never called FID: its features are 96-dimensional and know clothes only, which is why two cores compute it
in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune.checksums import sha256
from lightning_prune.metrics.extractors.base import Extracted, NetworkExtractor
from lightning_prune.pixels import to_unit_range
from lightning_prune.protocols import InputError

EXTRACTOR_FOLDER = Path(__file__).parents[2] / "assets" / "fashion_classifier"
FEATURES = 96


class FashionClassifier(nn.Module):
    """A convolutional classifier of 32x32 grey images, ten classes, 96-dimensional features."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 32), (32, 64), (64, 64)]
        self.body = nn.Sequential(*[self._stage(i, o) for i, o in widths], nn.Flatten())
        self.embed = nn.Sequential(nn.Linear(64 * 4 * 4, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(FEATURES, 10))

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(), nn.MaxPool2d(2)
        )

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 96] of uint8 `images` [B, 1, 32, 32], before their non-linearity."""
        embedded: Tensor = self.embed(self.body(to_unit_range(images)))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, 10] of uint8 `images` [B, 1, 32, 32]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def save_classifier(network: FashionClassifier, folder: Path, test_accuracy: float) -> None:
    """Write weights and a small card with the checksum and the accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, file)
    card = {"features": FEATURES, "test_accuracy": test_accuracy, "sha256": sha256(file)}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def load_classifier(folder: Path = EXTRACTOR_FOLDER) -> FashionClassifier:
    """Read the classifier, checked against its checksum. Raises `InputError` naming a missing or damaged file."""
    file = folder / "model.safetensors"
    network = FashionClassifier()
    try:
        card = json.loads((folder / "card.json").read_text())
        if sha256(file) != card["sha256"]:
            raise InputError(f"{file}: checksum differs from card.json; the extractor is damaged")
        network.load_state_dict(load_file(file))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: missing or damaged feature extractor") from error
    return network.eval().requires_grad_(False)


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
