"""The checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lightning_prune.callbacks.progress import steps_done


class LastCheckpoint(Checkpoint):
    """Write `checkpoints/last.ckpt` every n optimizer steps, or batches where nothing is trained, and after the last.

    The last one is written before averaged weights are copied into the network, so a longer run can go on from it;
    `ModelCheckpoint(save_last=True)` writes it after that, or not at all. Add a `ModelCheckpoint` to keep more.

    Args:
        every_n_steps: optimizer steps between checkpoints.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = steps_done(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = steps_done(trainer)
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self._saved_at:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if (last or trainer.should_stop) and steps_done(trainer) != self._saved_at:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", weights_only=False)
        self._saved_at = steps_done(trainer)
        # What was logged up to a checkpoint must be on disk with it, or a resumed record has a hole.
        for logger in trainer.loggers:
            logger.save()
