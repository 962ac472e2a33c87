"""Pretraining and dense fine-tuning by plain denoising."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.module import Batch, PruningModule


class Dense(PruningModule):
    """All weights, no masks: mean squared error to the process' target (Ho et al. 2020, equation 14)."""

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, cond, target = self.diffuse(batch, generator)
        return mse_loss(self.predict(x_t, t, cond), target), {}
