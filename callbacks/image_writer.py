"""What `predict` leaves: one PNG a sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image

from lightning_prune.callbacks.capability import check_sampling, require
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.solvers import SamplerName
from lightning_prune.metrics.samples import pictures_of
from lightning_prune.protocols import Predictor


class ImageWriter(Callback):
    """Write predicted images as `<folder>/<sample id>-class-<label>.png`, or `<sample id>.png` where there are prompts.

    What is null is as the method has it: the sampler that its result was made for, else 20 steps of DDIM, or of Euler
    for a flow process, without guidance.

    Args:
        folder: where to; null is `predictions/` in the run folder.
        sampler: the solver.
        steps: sampling steps.
        guidance: guidance scale; 1 is none.
    """

    def __init__(
        self,
        folder: str | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        asked = {"name": sampler, "steps": steps, "guidance": guidance}
        self.asked: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        module = require(pl_module, Predictor, self)
        module.predict_sampler = replace(module.predict_sampler, **self.asked)
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
