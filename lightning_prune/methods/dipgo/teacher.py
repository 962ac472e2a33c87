"""The dense network's samples that pruned ones are compared with, each drawn once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition

Key = tuple[int, int]


class Teacher:
    """Draws dense samples and keeps them, by starting noise and sample.

    A checkpoint holds them: drawn again in another batch they could differ in the last bit.

    Args:
        draw: dense samples [B, ...] for ids of starting noise [B] and conditions.
    """

    def __init__(self, draw: Callable[[Tensor, Condition], Tensor]) -> None:
        self._draw = draw
        self._kept: dict[Key, Tensor] = {}

    def images(self, noise_ids: Tensor, ids: Tensor, cond: Condition) -> Tensor:
        """Dense samples [B, ...] for starting noises and the samples whose conditions `cond` are."""
        keys = list(zip(noise_ids.tolist(), ids.tolist(), strict=True))
        if any(key not in self._kept for key in keys):
            drawn = self._draw(noise_ids.cpu(), cond)
            for key, image in zip(keys, drawn.cpu(), strict=True):
                self._kept.setdefault(key, image)
        return torch.stack([self._kept[key] for key in keys]).to(ids.device)

    def state(self) -> dict[str, Any]:
        """What is kept, as tensors."""
        if not self._kept:
            return {}
        return {"keys": torch.tensor(list(self._kept)), "images": torch.stack(list(self._kept.values()))}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep what `state` gave, too."""
        if state:
            keys = [(int(noise), int(sample)) for noise, sample in state["keys"].tolist()]
            self._kept |= dict(zip(keys, state["images"].clone().unbind(0), strict=True))
