"""Score an embedded network: is it good enough that pruning it means something?

    python -m lightning_prune.assets.quality fashion_dit --root <folder with the idx files>

Writes `scores.json` beside the network's weights: distance, accuracy of conditional samples without and with
guidance, recall, nearest training images, and the distance of one-shot 2:4.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.data.fashion import FashionMNIST
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import load
from lightning_prune.metrics.evaluation import Evaluator, SamplingSettings, Score
from lightning_prune.metrics.frechet import precision_recall
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units

ASSETS = Path(__file__).parent
PROCESS = Process(schedule="cosine", prediction="v")


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", help="folder in lightning_prune/assets, or any artifact folder")
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    folder = ASSETS / options.network if (ASSETS / options.network).exists() else Path(options.network)
    scores = quality(load(folder), FashionMNIST(root=options.root), options.samples, options.steps, options.guidance)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def quality(denoiser: Denoiser, data: FashionMNIST, samples: int, steps: int, guidance: float) -> dict[str, Any]:
    """All scores of a network, by name."""
    evaluator = Evaluator(data)
    plain, images = _score(evaluator, denoiser, SamplingSettings(samples, Sampler(steps=steps), name="table-v1"))
    with_guidance = Sampler(steps=steps, guidance=guidance)
    guided, _ = _score(evaluator, denoiser, SamplingSettings(samples, with_guidance, name="table-v1"))
    precision, recall = precision_recall(plain.features, evaluator.reference_features[:samples])
    floor = evaluator.floor()
    units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
    masks = MaskSet(denoiser.network, units, Sparsity(2, 4))
    one_shot, _ = _score(evaluator, denoiser, SamplingSettings(samples, Sampler(steps=steps), name="table-v1"))
    masks.set_sparsity(None)
    train = data.split("train").images
    return {
        "protocol": plain.protocol.content(),
        "fd_fashion": plain.row(),
        "floor": {"value": floor.value, "low": floor.low, "high": floor.high, "samples": len(floor.influence)},
        "one_shot_2to4": one_shot.row(),
        "guided": {"guidance": guidance, "fd_fashion": guided.row(), "accuracy": guided.accuracy},
        "accuracy": plain.accuracy,
        "precision": precision,
        "recall": recall,
        "nearest_training_image": {
            "samples": _summary(nearest(images, train)),
            "held_out": _summary(nearest(data.split("held_out").images, train)),
        },
    }


def _score(evaluator: Evaluator, denoiser: Denoiser, settings: SamplingSettings) -> tuple[Score, Tensor]:
    drawn: list[Tensor] = []

    def draw(ids: Tensor, labels: Tensor) -> Tensor:
        images = sample_images(denoiser, PROCESS, ids, labels, settings.sampler)
        drawn.append(to_uint8(images))
        return images

    return evaluator.score({"network": draw}, settings, PROCESS, "averaged")["network"], torch.cat(drawn)


def nearest(images: Tensor, train: Tensor) -> Tensor:
    """Root-mean-square grey-level difference [N] of each image to the nearest training image."""
    flat, support = images.flatten(1).float(), train.flatten(1).float()
    best = [torch.cdist(part, support).amin(dim=1) for part in flat.split(250)]
    distances: Tensor = torch.cat(best) / flat.shape[1] ** 0.5
    return distances


def _summary(distances: Tensor) -> dict[str, float]:
    at = {"minimum": 0.0, "percentile_1": 0.01, "median": 0.5}
    return {name: round(float(distances.quantile(q)), 3) for name, q in at.items()}


if __name__ == "__main__":
    main()
