"""What `predict` leaves: one PNG a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torchvision.utils import save_image


class ImageWriter(BasePredictionWriter):
    """Write predicted images as `<folder>/<sample id>-class-<label>.png`.

    Args:
        folder: where to; null is `predictions/` in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: tuple[Tensor, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        ids, images = prediction
        folder = Path(self.folder or Path(trainer.default_root_dir) / "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        labels = batch["cond"].tolist()
        for sample, label, image in zip(ids.tolist(), labels, images, strict=True):
            save_image((image.clamp(-1, 1) + 1) / 2, folder / f"{sample:06d}-class-{label}.png")
