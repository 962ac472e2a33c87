"""Masks are only worth something if they hold: count violations after every optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.capability import require
from lightning_prune.protocols import InputError, SparsityControl


class MaskInvariant(Callback):
    """Log `mask_violations`, the groups that did not hold their pattern, summed over all steps so far.

    A sum, so that steps between two logged ones count too.

    Args:
        stop: end the run with an error at the first violation.
    """

    def __init__(self, stop: bool = True) -> None:
        super().__init__()
        self.stop = stop
        self._total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self._total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._total = state_dict["total"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, SparsityControl, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer, pl_module, compare=False)
        pl_module.log("mask_violations", float(self._total), rank_zero_only=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The averaged weights are in place here; masks of other weights count as violations.
        self._check(trainer, pl_module, compare=True)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, compare: bool) -> None:
        count = require(pl_module, SparsityControl, self).mask_violations(compare)
        self._total += count
        if count and self.stop:
            if not all(bool(torch.isfinite(weight).all()) for weight in pl_module.parameters()):
                raise InputError(f"weights are not finite at step {trainer.global_step}; lower the learning rate")
            raise RuntimeError(f"{count} groups do not hold their sparsity pattern at step {trainer.global_step}")
