"""What `predict` leaves: one PNG a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torchvision.utils import save_image


class ImageWriter(Callback):
    """Write predicted images as `<folder>/<sample id>-class-<label>.png`.

    Args:
        folder: where to; null is `predictions/` in the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder

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
        for sample, label, image in zip(ids.tolist(), batch["cond"].tolist(), images, strict=True):
            save_image((image.clamp(-1, 1) + 1) / 2, folder / f"{sample:06d}-class-{label}.png")
