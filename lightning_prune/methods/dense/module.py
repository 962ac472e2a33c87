"""Pretraining, dense fine-tuning and small networks from a teacher, by plain denoising."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.routing import check_one_stage
from lightning_prune.diffusion.variants import Variant
from lightning_prune.methods.dense.inherit import inherit
from lightning_prune.module import Batch, PruningModule
from lightning_prune.protocols import InputError
from lightning_prune.pruning.frozen import Frozen
from lightning_prune.pruning.masks import check_unmasked


class Dense(PruningModule):
    """All weights, no masks: mean squared error to the process' target (Ho et al. 2020, equation 14).

    Args:
        denoiser: the network to train; `class_path: lightning_prune.load` with a `path` takes that of an artifact, such
            as one that was cut.
        teacher: a pretrained network whose predictions it learns from as well, to compare pruning with a smaller
            network of equal cost; null is none.
        distill_weight: weight of the teacher's part of the loss.
        from_teacher: begin with the teacher's tensors wherever name and shape agree, instead of at random.
        teacher_blocks: with `from_teacher`, the numbers of the teacher's blocks that the network's own begin with, one
            each, such as [0, 2, 4] for three of six; null takes those of the same name.
    """

    whole_for = None

    def __init__(
        self,
        denoiser: Denoiser,
        *args: Any,
        teacher: Denoiser | None = None,
        distill_weight: float = 1.0,
        from_teacher: bool = False,
        teacher_blocks: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(denoiser, *args, **kwargs)
        check_one_stage(denoiser)
        check_unmasked(denoiser.network)
        denoiser.train()  # one that was loaded from an artifact comes in evaluation mode
        if distill_weight < 0:
            raise InputError(f"model.distill_weight: {distill_weight} is negative")
        for what in ("sample_shape", "num_classes") if teacher is not None else ():
            if getattr(teacher, what) != getattr(denoiser, what):
                raise InputError(f"model.teacher: its {what} {getattr(teacher, what)} is not {getattr(denoiser, what)}")
        if from_teacher and teacher is None:
            raise InputError("model.from_teacher: there is no model.teacher to begin with")
        if teacher_blocks is not None and not from_teacher:
            raise InputError("model.teacher_blocks: they are taken over only with model.from_teacher: true")
        self.inherited = inherit(denoiser, teacher, teacher_blocks) if teacher is not None and from_teacher else 0.0
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
