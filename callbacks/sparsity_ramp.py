"""Progressive sparsity: change the pattern in place at optimizer steps that a ramp decides."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.capability import require
from lightning_prune.protocols import InputError, Sparsity, SparsityControl
from lightning_prune.pruning.ramps import check_chain, staged


class SparsityRamp(Callback):
    """Walk along a chain of patterns while training.

    The pattern is a function of the optimizer step alone, so a resumed run needs no state to go on with it, and
    changing it touches neither weights, nor optimizer, nor averaged weights.

    Args:
        chain: patterns in order, for example ["31:32", "15:16", "7:8", "3:4", "2:4"]; one pattern is one-step.
        reached_at: fraction of the training steps at which the last pattern begins.
    """

    def __init__(self, chain: list[str], reached_at: float = 0.8) -> None:
        super().__init__()
        self.chain = [Sparsity.parse(pattern) for pattern in chain]
        self.reached_at = reached_at
        check_chain(self.chain, reached_at)
        self._current: Sparsity | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        module = require(pl_module, SparsityControl, self)
        ramps = [callback for callback in trainer.callbacks if isinstance(callback, SparsityRamp)]  # type: ignore[attr-defined]
        if len(ramps) > 1:
            raise InputError(f"trainer.callbacks: {len(ramps)} times SparsityRamp; a run has one")
        if getattr(pl_module, "one_shot", False):
            raise InputError("SparsityRamp: with model.one_shot nothing is trained")
        for pattern in self.chain:
            module.check_sparsity(pattern)
        target = getattr(pl_module, "target_sparsity", self.chain[-1])
        if target != self.chain[-1]:
            raise InputError(f"SparsityRamp.chain ends at {self.chain[-1]}, but model.sparsity is {target}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.estimated_stepping_batches == float("inf"):
            raise InputError("SparsityRamp needs trainer.max_steps or max_epochs to know how long the run is")
        self._current = None
        self._apply(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that stopped early is reported and stored at the pattern it aimed at.
        require(pl_module, SparsityControl, self).set_sparsity(self.chain[-1])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("sparsity", self._apply(trainer, pl_module).fraction, prog_bar=True)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Sparsity:
        total = int(trainer.estimated_stepping_batches)
        wanted = staged(trainer.global_step, total, self.chain, self.reached_at)
        if wanted != self._current:
            require(pl_module, SparsityControl, self).set_sparsity(wanted)
            self._current = wanted
        return wanted
