"""Periodic quality and cost: the Frechet distance of samples and the MACs kept, on a schedule, while training."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.capability import check_sampling, require
from lightning_prune.callbacks.progress import sampling_progress
from lightning_prune.callbacks.stop_on_signal import stop_between_batches
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.solvers import Sampler, SamplerName
from lightning_prune.metrics.evaluation import Evaluator, Measurement, SamplingSettings
from lightning_prune.metrics.frechet import Distance
from lightning_prune.protocols import CostModel, ImageSampler, VariantSource


class DistanceEvaluation(Callback):
    """Log the Frechet distance with its interval, and the MACs kept, at the end of every n-th validation pass.

    The averaged weights are in place then. Samples come from their own seeds, so training is not disturbed.

    Args:
        samples: number of samples.
        steps: sampling steps.
        guidance: guidance scale; 1 is none.
        every_n_validations: validation passes between evaluations.
        batch_size: samples drawn at once.
        measurement: what samples are compared with, and how; null is `fd_fashion` alone.
        sampler: the solver.
    """

    def __init__(
        self,
        samples: int = 500,
        steps: int = 10,
        guidance: float = 1.0,
        every_n_validations: int = 1,
        batch_size: int = 100,
        measurement: Measurement | None = None,
        sampler: SamplerName = "ddim",
    ) -> None:
        super().__init__()
        chosen = Sampler(sampler, steps, guidance)
        self.settings = SamplingSettings(samples, chosen, batch_size=batch_size, name="during-training")
        self.every_n_validations = every_n_validations
        self.measurement = measurement or Measurement()
        self._passes = 0
        self._evaluator: Evaluator | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, ImageSampler, self)
        check_sampling(trainer, pl_module, self.settings.sampler, self)
        self._evaluator = Evaluator(trainer.datamodule, self.measurement)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, int]:
        return {"passes": self._passes}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._passes = state_dict["passes"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._passes += 1
        if self._passes % self.every_n_validations == 0:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_distance(trainer, pl_module)
        if isinstance(pl_module, CostModel):
            kept = {f"macs_kept_{name}": value for name, value in pl_module.kept_fraction().items()}
            pl_module.log_dict(kept, rank_zero_only=True)

    def _log_distance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module, settings = require(pl_module, ImageSampler, self), self.settings
        source = require(pl_module, VariantSource, self)
        assert self._evaluator is not None
        with torch.random.fork_rng(devices=[]), sampling_progress(trainer, "sampling", settings.samples) as advance:

            def draw(ids: torch.Tensor, cond: Condition) -> torch.Tensor:
                stop_between_batches(trainer)
                images = module.sample_images(ids, cond, settings.sampler)
                advance(len(ids))
                return images

            draws = {"result": draw}
            score = self._evaluator.to(pl_module.device).score(draws, settings, source.process, source.weights_kind)[
                "result"
            ]
        name = score.metric
        values = {f"{name}_low": score.fd.low, f"{name}_high": score.fd.high}
        values |= {key: found.value if isinstance(found, Distance) else found for key, found in score.further.items()}
        if score.accuracy is not None:
            values["sample_accuracy"] = score.accuracy
        pl_module.log(name, score.fd.value, prog_bar=True, rank_zero_only=True)
        pl_module.log_dict(values, rank_zero_only=True)
