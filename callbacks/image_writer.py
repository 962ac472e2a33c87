"""What `predict` leaves: one PNG a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.metrics.samples import pictures_of, require_pictures


class ImageWriter(Callback):
    """Write predicted images as `<folder>/<sample id>-class-<label>.png`, or `<sample id>.png` where there are prompts.

    Args:
        folder: where to; null is `predictions/` in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "predict":
            require_pictures(getattr(trainer, "datamodule", None), type(self).__name__)

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
