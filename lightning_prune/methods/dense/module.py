"""Pretraining, dense fine-tuning and small networks from a teacher, by plain denoising."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.variants import Variant
from lightning_prune.module import Batch, PruningModule
from lightning_prune.protocols import InputError
from lightning_prune.pruning.frozen import Frozen


class Dense(PruningModule):
    """All weights, no masks: mean squared error to the process' target (Ho et al. 2020, equation 14).

    Args:
        denoiser: the network to train.
        teacher: a pretrained network whose predictions it learns from as well, to compare pruning with a smaller
            network of equal cost; null is none.
        distill_weight: weight of the teacher's part of the loss.
    """

    whole_for = None

    def __init__(
        self,
        denoiser: Denoiser,
        *args: Any,
        teacher: Denoiser | None = None,
        distill_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(denoiser, *args, **kwargs)
        if distill_weight < 0:
            raise InputError(f"model.distill_weight: {distill_weight} is negative")
        for what in ("sample_shape", "num_classes") if teacher is not None else ():
            if getattr(teacher, what) != getattr(denoiser, what):
                raise InputError(f"model.teacher: its {what} {getattr(teacher, what)} is not {getattr(denoiser, what)}")
        self._start = Frozen(deepcopy(denoiser)) if denoiser.weights is not None else None
        self._teacher = None if teacher is None else Frozen(teacher)
        self.distill_weight = distill_weight

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, cond, target = self.diffuse(batch, generator)
        prediction = self.denoise(x_t, t, cond)
        loss = mse_loss(prediction, target)
        if self._teacher is None:
            return loss, {}
        with torch.no_grad():
            distilled = self._teacher.on(self.device)(x_t, t, cond)
        distance = mse_loss(prediction, distilled)
        return loss + self.distill_weight * distance, {"denoise_loss": loss.detach(), "distill_loss": distance.detach()}

    def variants(self) -> dict[str, Variant]:
        """The network it started from or learned from, if there was one, and the one it trained."""
        if self._teacher is not None:
            return {"dense": Variant(self._teacher.on(self.device)), "small dense": Variant(self.whole_denoiser())}
        if self._start is None:
            return {"dense": Variant(self.whole_denoiser())}
        return {"dense": Variant(self._start.on(self.device)), "dense fine-tuned": Variant(self.whole_denoiser())}
