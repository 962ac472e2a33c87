"""Masks are only worth something if they hold: count violations after every optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.capability import require
from lightning_prune.protocols import SparsityControl


class MaskInvariant(Callback):
    """Log `mask_violations`, the groups of the computed weights that do not hold their pattern.

    Args:
        stop: end the run with an error at the first violation.
    """

    def __init__(self, stop: bool = True) -> None:
        super().__init__()
        self.stop = stop

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, SparsityControl, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer, pl_module, "mask_violations")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The averaged weights are in place here, so this checks their masks.
        self._check(trainer, pl_module, "mask_violations_averaged")

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        count = require(pl_module, SparsityControl, self).mask_violations()
        pl_module.log(name, float(count), rank_zero_only=True)
        if count and self.stop:
            raise RuntimeError(f"{count} groups do not hold their sparsity pattern at step {trainer.global_step}")
