"""Pictures: the result's samples beside the dense network's, from equal seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lightning_prune.callbacks.capability import check_sampling, require
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler, SamplerName
from lightning_prune.diffusion.variants import Variant
from lightning_prune.metrics.samples import conditions_of, pictures_of
from lightning_prune.protocols import VariantSource


class SampleGrid(Callback):
    """Write `samples/step-<n>.png` at validation and `samples/final.png` at the end, and log both to W&B.

    A row per network: the last is the one that trains, those above it are what it is compared with. A column is a
    class, or the prompt of a held-out sample.

    Args:
        columns: samples a row; one class, or held-out prompt, after the other.
        steps: sampling steps.
        guidance: guidance scale; 1 is none.
        every_n_validations: validation passes between grids.
        sampler: the solver.
    """

    def __init__(
        self,
        columns: int = 10,
        steps: int = 10,
        guidance: float = 1.0,
        every_n_validations: int = 1,
        sampler: SamplerName = "ddim",
    ) -> None:
        super().__init__()
        self.columns, self.sampler = columns, Sampler(sampler, steps, guidance)
        self.every_n_validations = every_n_validations
        self._passes = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, VariantSource, self)
        check_sampling(trainer, pl_module, self.sampler, self)

    def state_dict(self) -> dict[str, int]:
        return {"passes": self._passes}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._passes = state_dict["passes"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._passes += 1
        if self._passes % self.every_n_validations == 0:
            self._draw(trainer, pl_module, f"step-{trainer.global_step:06d}", rows=2)

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final grid; called with the averaged weights in place."""
        self._draw(trainer, pl_module, "final", rows=None)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, rows: int | None) -> None:
        module = require(pl_module, VariantSource, self)
        variants = list(module.variants().items())  # together: one may be gathered from all processes
        if not trainer.is_global_zero:
            return
        if rows is not None and len(variants) > rows:
            variants = [variants[0], variants[-1]]
        with torch.random.fork_rng(devices=[]):
            images = torch.cat([self._row(trainer, module, variant) for _, variant in variants])
        grid = make_grid((images.clamp(-1, 1) + 1) / 2, nrow=self.columns, padding=2, pad_value=0.5)
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, folder / f"{name}.png")
        self._log(trainer, name, grid, [row for row, _ in variants])

    def _row(self, trainer: pl.Trainer, module: VariantSource, variant: Variant) -> Tensor:
        ids, data = torch.arange(self.columns), getattr(trainer, "datamodule", None)
        cond = conditions_of(data, ids, variant.denoiser.num_classes)
        samples = sample_images(variant.denoiser, module.process, ids, cond, variant.sampler or self.sampler)
        return pictures_of(data, samples).cpu()

    def _log(self, trainer: pl.Trainer, name: str, grid: Tensor, rows: list[str]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                caption = f"{name}; rows: {', '.join(rows)}"
                image: Any = grid.permute(1, 2, 0).numpy()
                logger.log_image("samples", [image], step=trainer.global_step, caption=[caption])
