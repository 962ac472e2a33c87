"""What masks are derived from where it is not the magnitude of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.pruning.masks import MaskedLayer
from lightning_prune.seeds import derive

MaskScores = Literal["magnitude", "wanda", "obs", "random", "position"]
CALIBRATED = ("wanda", "obs")


def fixed_scores(kind: MaskScores, layers: Mapping[str, MaskedLayer], seed: int) -> dict[str, Tensor] | None:
    """Scores by layer that do not follow the weights; None for magnitudes, scaled by calibration or not, which do.

    "random" draws them once from `seed`; "position" keeps the last n of every m, the fixed pattern of the published
    code. Both are floors that any way of choosing must beat.
    """
    if kind == "magnitude" or kind in CALIBRATED:
        return None
    if kind == "position":
        return {name: _positions(layer.weight) for name, layer in layers.items()}
    return {name: _random(layer.weight, derive(seed, 2, index)) for index, (name, layer) in enumerate(layers.items())}


def _positions(weight: Tensor) -> Tensor:
    rising = torch.arange(1, weight.shape[1] + 1, dtype=torch.float32)
    return rising.view(1, -1, *[1] * (weight.ndim - 2)).expand_as(weight)


def _random(weight: Tensor, seed: int) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
