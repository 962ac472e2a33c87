"""What `predict` leaves: one PNG a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image

from lightning_prune.callbacks.capability import check_sampling, require
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.solvers import Sampler, SamplerName, usual_solver
from lightning_prune.metrics.samples import pictures_of
from lightning_prune.protocols import Predictor


class ImageWriter(Callback):
    """Write predicted images as `<folder>/<sample id>-class-<label>.png`, or `<sample id>.png` where there are prompts.

    A schedule of gates draws with the sampler it was found for, whatever is said here.

    Args:
        folder: where to; null is `predictions/` in the run folder.
        sampler: the solver; null is DDIM, or Euler for a flow process.
        steps: sampling steps.
        guidance: guidance scale; 1 is none.
    """

    def __init__(
        self,
        folder: str | None = None,
        sampler: SamplerName | None = None,
        steps: int = 20,
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.folder, self.sampler, self.steps, self.guidance = folder, sampler, steps, guidance

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        module = require(pl_module, Predictor, self)
        solver = self.sampler or usual_solver(module.process)
        module.predict_sampler = Sampler(solver, self.steps, self.guidance)
        check_sampling(trainer, pl_module, module.predict_sampler, self)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        ids, images = outputs
        folder = Path(self.folder or Path(trainer.default_root_dir) / "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        pictures = pictures_of(getattr(trainer, "datamodule", None), images)
        for sample, ending, picture in zip(ids.tolist(), _endings(batch["cond"], len(ids)), pictures, strict=True):
            save_image((picture.clamp(-1, 1) + 1) / 2, folder / f"{sample:06d}{ending}.png")


def _endings(cond: Condition, count: int) -> list[str]:
    return [f"-class-{label}" for label in cond.tolist()] if isinstance(cond, Tensor) else [""] * count
