"""The checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_prune.callbacks.progress import steps_done


class LastCheckpoint(Checkpoint):
    """Write `checkpoints/last.ckpt` every n optimizer steps, before a validation pass and after the last step.

    Where nothing is trained, batches count for steps.

    The last one is written before averaged weights are copied into the network, so a longer run can go on from it;
    `ModelCheckpoint(save_last=True)` writes it after that, or not at all. Add a `ModelCheckpoint` to keep more.
    One written before a validation pass resumes with that pass, so a run stopped in evaluation loses nothing.

    Args:
        every_n_steps: optimizer steps between checkpoints.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._saved_at = 0
        self._validation_ahead = False
        self._records_due = False

    def file(self, trainer: pl.Trainer) -> Path:
        """Where the checkpoint is written: a file, or a folder under strategies that share the writing."""
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now; called on all processes."""
        trainer.save_checkpoint(self.file(trainer), weights_only=False)
        self._saved_at = steps_done(trainer)
        self._records_due = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = steps_done(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save_records(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = steps_done(trainer)
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self._saved_at:
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validation_ahead = True
        try:
            self.save(trainer)
        finally:
            self._validation_ahead = False
        self._save_records(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if (last or trainer.should_stop) and steps_done(trainer) != self._saved_at:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_records(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_ahead:
            # Lightning resumes with a validation pass only if a batch of it was begun and not finished.
            begun = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
            # Set, not counted up: a run that resumed like this stays one ahead, and would not be recognised again.
            begun["ready"] = begun["started"] = begun["completed"] + 1

    def _save_records(self, trainer: pl.Trainer) -> None:
        """What was logged up to a checkpoint must be on disk with it, or a resumed record has a hole.

        Called behind the step, because Lightning logs its values after the hooks at its end.
        """
        if self._records_due:
            for logger in trainer.loggers:
                logger.save()
        self._records_due = False
