"""A callback that makes a small run last, one process behind the other, and says where it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Pace(Callback):
    """Wait at every step, longer on one process; the first process writes the step to `file`.

    Args:
        file: file that holds the number of steps done.
        seconds: time to wait at a step.
        slow_rank: process that waits `extra` longer.
        extra: how much longer, in seconds.
    """

    def __init__(self, file: str, seconds: float = 0.1, slow_rank: int = 0, extra: float = 0.0) -> None:
        self.file, self.seconds, self.slow_rank, self.extra = Path(file), seconds, slow_rank, extra

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.file.write_text(str(trainer.global_step))
        time.sleep(self.seconds + self.extra * (trainer.global_rank == self.slow_rank))
