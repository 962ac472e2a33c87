"""One line that says how far a run is: steps, loss, sparsity, time left; also while it samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = ("loss", "sparsity", "val_loss", "fd_fashion")
_SECONDS = 0.5  # between two readings of values, each of which waits for the device


def steps_done(trainer: pl.Trainer) -> int:
    """Optimizer steps so far; batches where a module trains nothing."""
    if trainer.optimizers:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


class StepProgress(ProgressBar):
    """A rich progress bar over optimizer steps instead of epochs, with a second line while sampling."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._read_at = float("-inf")

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _start(self) -> Progress | None:
        if self._enabled and self._progress is None and self.trainer.is_global_zero:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            self._progress.start()
        return self._progress

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._training, self._read_at = None, None, float("-inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if progress := self._start():
            total = trainer.estimated_stepping_batches
            self._training = progress.add_task(
                "training", total=None if total == float("inf") else total, completed=steps_done(trainer), values=""
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=steps_done(trainer))
            if time.monotonic() - self._read_at >= _SECONDS:
                self._show_values(trainer)

    def _show_values(self, trainer: pl.Trainer) -> None:
        if self._progress is not None and self._training is not None:
            metrics = trainer.progress_bar_metrics
            values = "  ".join(f"{k} {float(metrics[k]):.3g}" for k in SHOWN if k in metrics)
            self._progress.update(self._training, values=values)
            self._read_at = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The line stands still for as long as the pass takes.
        self._show_values(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_values(trainer)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a task of `total` parts; yields a function that advances it by a number of parts."""
        standing = self._progress is not None
        progress = self._start()
        if progress is None:
            yield lambda parts: None
            return
        task = progress.add_task(description, total=total, values="")
        try:
            yield lambda parts: progress.advance(task, parts)
        finally:
            progress.remove_task(task)
            if not standing:
                self._stop()


@contextmanager
def sampling_progress(trainer: pl.Trainer, description: str, total: int) -> Iterator[Any]:
    """The trainer's progress bar as a task, or a function that does nothing where there is no such bar."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, StepProgress):
        with bar.task(description, total) as advance:
            yield advance
    else:
        yield lambda parts: None
