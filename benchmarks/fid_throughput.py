"""Images a second through Inception and into moments: ours against torch-fidelity's, interleaved.

    python benchmarks/fid_throughput.py

Same weights, same images in memory, same batch size, same threads. torch-fidelity runs its own loop and statistics
without worker processes, which on images in memory only cost it time. The last line is JSON; `ratio` is our images a
second over torch-fidelity's, by the medians; `difference` is the largest one between the two sets of features.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.utils import get_featuresdict_from_dataset

from lightning_prune.metrics.extractors.inception import InceptionExtractor, build_network
from lightning_prune.metrics.extractors.inception_weights import cached_file, read_weights
from lightning_prune.metrics.frechet import Moments
from lightning_prune.metrics.latency import interleaved_seconds
from lightning_prune.metrics.machine import machine


class Images(Dataset[Tensor]):
    """Images in memory, as torch-fidelity wants them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def ours(weights: Path, images: Tensor, batch: int, device: str) -> Callable[[], Tensor]:
    """A function that extracts features, reduces them to moments and returns the features."""
    extractor = InceptionExtractor(weights, batch_size=batch).to(device)

    def run() -> Tensor:
        features = extractor.extract(images).features
        Moments.of(features)
        return features

    return run


def torch_fidelity(weights: Path, images: Tensor, batch: int, device: str) -> Callable[[], Tensor]:
    """The same by torch-fidelity."""
    network, cuda = build_network(read_weights(weights), ["2048"]).to(device), device == "cuda"

    def run() -> Tensor:
        features: Tensor = get_featuresdict_from_dataset(Images(images), network, batch, cuda, True, False)["2048"]
        fid_features_to_statistics(features)
        return features

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=cached_file(), help="made by lightning_prune prefetch inception"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    torch.set_num_threads(options.threads)
    shape = (options.images, 3, options.size, options.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    arguments = (options.weights, images, options.batch, options.device)
    arms = {"ours": ours(*arguments), "torch_fidelity": torch_fidelity(*arguments)}
    features: dict[str, Tensor] = {}
    seconds = interleaved_seconds(
        {name: lambda name=name, run=run: features.update({name: run()}) for name, run in arms.items()},
        options.repeats,
    )
    rates = {name: options.images / statistics.median(values) for name, values in seconds.items()}
    result = {
        "ratio": rates["ours"] / rates["torch_fidelity"],
        "images_per_second": rates,
        "seconds": seconds,
        "difference": float((features["ours"] - features["torch_fidelity"]).abs().max()),
        **{key: getattr(options, key) for key in ("images", "size", "batch", "repeats", "threads", "device")},
        "torch": torch.__version__,
        "machine": machine(torch.device(options.device)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
