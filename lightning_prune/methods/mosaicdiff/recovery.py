"""A short training of slim stages that were pruned without any, to be reported apart from them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.conditions import replace, rows_of
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.solvers import Deterministic, Sampler
from lightning_prune.diffusion.variants import Variant
from lightning_prune.methods.mosaicdiff.plan import check_calls, draw_in_bins, sampler_of
from lightning_prune.module import Batch, PruningModule
from lightning_prune.protocols import InputError
from lightning_prune.pruning.frozen import Frozen
from lightning_prune.pruning.stages import stages_of


class Recovery(PruningModule):
    """Stages of an artifact learn the dense network's predictions on noised data, each at its own timesteps.

    What stages share stays shared. The report has the dense network, the stages as they were pruned, and these.

    Args:
        denoiser: stages to train; `class_path: lightning_prune.load` with a `path` takes those of an artifact.
        process: the process of the dense network.
        teacher: the dense network that they were cut from.
        sampler: the solver that the stages were made for.
        kwargs: the optimizer and what else every module takes.
    """

    whole_for = "to keep what stages share in one piece"

    def __init__(
        self, denoiser: Denoiser, process: Process, teacher: Denoiser, sampler: Deterministic = "ddim", **kwargs: Any
    ) -> None:
        super().__init__(denoiser, process, **kwargs)
        if not isinstance(denoiser, StagedDenoiser):
            raise InputError("model.denoiser: is no artifact of stages, so there is nothing to recover")
        for what in ("sample_shape", "num_classes"):
            if getattr(teacher, what) != getattr(denoiser, what):
                raise InputError(f"model.teacher: its {what} {getattr(teacher, what)} is not {getattr(denoiser, what)}")
        self.stages = stages_of(denoiser.lengths)
        self.predict_sampler = sampler_of(sampler, denoiser.steps, process)
        self.visited = self.predict_sampler.visited(process)
        self._start = Frozen(deepcopy(denoiser))
        self._teacher = Frozen(teacher)
        denoiser.train().requires_grad_(True)  # an artifact comes in evaluation mode

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse another number of network calls than stages were made for."""
        if len(self.stages) > 1:
            check_calls(sampler, self.process, len(self.visited))

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x0, cond = batch["x"], batch["cond"]
        if len(x0) < len(self.stages):
            raise InputError(f"data.batch_size: {len(x0)} samples for {len(self.stages)} stages; each needs one")
        stage_of, t = draw_in_bins(self.stages, self.visited, self.process, len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype)
        if self.label_dropout > 0:
            drop = torch.rand(len(x0), generator=generator, device=generator.device) < self.label_dropout
            cond = replace(cond, drop, self.denoiser.null_condition(cond))
        x_t = self.process.add_noise(x0, noise, t)
        with torch.no_grad():
            wanted = self._teacher.on(self.device)(x_t, t, cond)
        errors, staged = [], cast(StagedDenoiser, self.denoiser)
        for number, stage in enumerate(self.stages):
            chosen = torch.nonzero(stage_of == number).flatten().to(x_t.device)
            staged.at_step(stage.first, staged.steps)
            predicted = self.denoise(x_t[chosen], t[chosen], rows_of(cond, chosen))
            errors.append(mse_loss(predicted, wanted[chosen]) * stage.steps / staged.steps)
        return torch.stack(errors).sum(), {}

    def variants(self) -> dict[str, Variant]:
        """The dense network, the stages as they were pruned, and as they are now."""
        dense, start = self._teacher.on(self.device), self._start.on(self.device)
        return {"dense": Variant(dense), "training-free": Variant(start), "recovered": Variant(self.whole_denoiser())}
