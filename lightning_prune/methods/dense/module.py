"""Pretraining and dense fine-tuning by plain denoising."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.variants import Variant
from lightning_prune.module import Batch, PruningModule
from lightning_prune.pruning.frozen import Frozen


class Dense(PruningModule):
    """All weights, no masks: mean squared error to the process' target (Ho et al. 2020, equation 14)."""

    shardable = True

    def __init__(self, denoiser: Denoiser, *args: Any, **kwargs: Any) -> None:
        super().__init__(denoiser, *args, **kwargs)
        self._start = Frozen(deepcopy(denoiser)) if denoiser.weights is not None else None

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, cond, target = self.diffuse(batch, generator)
        return mse_loss(self.denoise(x_t, t, cond), target), {}

    def variants(self) -> dict[str, Variant]:
        """The network it started from, if there was one, and the one it trained."""
        if self._start is None:
            return {"dense": Variant(self.whole_denoiser())}
        return {"dense": Variant(self._start.on(self.device)), "dense fine-tuned": Variant(self.whole_denoiser())}
