"""Leave a run without loss when it is asked to stop: before its time limit, or when it is preempted."""

from __future__ import annotations

from signal import Signals
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from lightning_prune import jobs, signals
from lightning_prune.callbacks.last_checkpoint import LastCheckpoint
from lightning_prune.signals import Stopped


class StopOnSignal(Checkpoint):
    """Stop at the next step boundary after a signal, on all processes together, and be requeued.

    SIGUSR1, which SLURM sends ahead of a time limit, asks for another start; SIGTERM only stops. Handlers note the
    signal, processes agree on it after a step, and `LastCheckpoint` writes. What a step logs is logged after its end,
    so the run is left at the hook that follows. While networks are evaluated nothing is trained: the checkpoint
    written before goes on from there, and an evaluation ends between two batches.

    It is a `Checkpoint` because those run last: the step is averaged before it is saved.

    Args:
        every_n_steps: optimizer steps between the questions whether to stop; each is one number between processes.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._group: Any = None
        self._stopping: Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning's own handlers, in place by now, send to other processes from within.
        signals.listen()
        if distributed.is_available() and distributed.is_initialized():
            # Beside the strategy's group: on a GPU the question must not wait for the device.
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if accumulating or (trainer.global_step % self.every_n_steps and trainer.global_step != trainer.max_steps):
            return
        self._stopping = self._agreed()
        if self._stopping is not None:
            _checkpoint(trainer).save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._leave_if_stopping(trainer)

    # `LastCheckpoint` has saved at the start of the validation pass, so the pass is not lost either.
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _fitting(trainer):
            self._leave_if_stopping(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if _fitting(trainer):
            self.between_batches(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_if_stopping(trainer)

    def between_batches(self, trainer: pl.Trainer) -> None:
        """Leave here if a signal came while evaluating; all processes ask equally often."""
        self._stopping = self._stopping or self._agreed()
        self._leave_if_stopping(trainer)

    def _agreed(self) -> Signals | None:
        """The signal that some process got. A wish to be requeued prevails."""
        wish = {None: 0, signals.STOP: 1, signals.REQUEUE: 2}
        found = torch.tensor(wish[signals.received()])
        if self._group is not None:
            distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=self._group)
        return {number: signum for signum, number in wish.items()}[int(found)]

    def _leave_if_stopping(self, trainer: pl.Trainer) -> None:
        if self._stopping is None:
            return
        file = _checkpoint(trainer).file(trainer)
        message = f"stopped by {self._stopping.name} at step {trainer.global_step}; goes on from {file}"
        if trainer.is_global_zero:
            _close_records(trainer)
            message += _requeued(self._stopping)
        if self._group is not None:
            # A process that ends takes the others with it, so all wait for the first to have asked SLURM.
            distributed.barrier(group=self._group)
        raise Stopped(message, self._stopping)


def stop_between_batches(trainer: pl.Trainer) -> None:
    """For callbacks that evaluate for minutes: end here if a signal came. All processes call it equally often."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal):
            callback.between_batches(trainer)


def _fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _checkpoint(trainer: pl.Trainer) -> LastCheckpoint:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            return callback
    raise AssertionError("StopOnSignal is added together with LastCheckpoint")


def _close_records(trainer: pl.Trainer) -> None:
    """Everything on disk: once SLURM has been asked, processes are killed without further notice."""
    for logger in trainer.loggers:
        logger.save()
        logger.finalize("stopped")
        if isinstance(logger, WandbLogger):
            logger.experiment.mark_preempting()
            logger.experiment.finish(exit_code=1)


def _requeued(signum: Signals) -> str:
    if signum != signals.REQUEUE or not jobs.in_slurm():
        return ""
    objection = jobs.requeue()
    return f"; SLURM would not requeue it: {objection}" if objection else f"; job {jobs.slurm_job()} is requeued"
