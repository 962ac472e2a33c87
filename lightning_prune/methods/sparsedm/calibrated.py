"""The part of SparseDM that calibrates: batches become statistics, statistics masks, patterns and weights."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, distributed

from lightning_prune.diffusion.conditions import move
from lightning_prune.methods.sparsedm.calibration import Allocation, Calibration, Statistics, logarithmic_weights
from lightning_prune.methods.sparsedm.scores import CALIBRATED, MaskScores
from lightning_prune.module import Batch, PruningModule
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import MaskSet, Patterns, fitting


class Calibrated(PruningModule):
    """Calibration ahead of training, or in place of it.

    The attributes below are the method's to set.
    """

    masks: MaskSet
    mask_scores: MaskScores
    calibration: Calibration
    allocation: Allocation | None
    one_shot: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patterns: dict[str, Sparsity] = {}
        self._statistics: Statistics | None = None
        self._seen: dict[str, Any] | None = None
        self._ready = False

    @property
    @abstractmethod
    def pattern(self) -> Sparsity | None:
        """The pattern to reach."""

    @abstractmethod
    def sample_weights(self, t: Tensor) -> Tensor:
        """Weight of each sample [B] in the loss at timesteps `t` [B]."""

    @abstractmethod
    def set_sparsity(self, sparsity: Patterns) -> None:
        """Change the pattern in place."""

    @property
    def is_calibrated(self) -> bool:
        """Whether masks, patterns or weights come from statistics."""
        return self.mask_scores in CALIBRATED or self.calibration.compensate or self.allocation is not None

    def allotted(self, sparsity: Patterns) -> Patterns:
        """What a pattern means for each layer where patterns were allocated: the target stands for them.

        On the way there no layer gets a sparser one than its own.
        """
        if not self._patterns or not isinstance(sparsity, Sparsity):
            return sparsity
        return {re.escape(name): self._denser(name, own, sparsity) for name, own in self._patterns.items()}

    def _denser(self, name: str, own: Sparsity, sparsity: Sparsity) -> Sparsity | None:
        """A layer's own pattern or, on the way there, a denser one; dense where that does not divide its inputs."""
        if sparsity == self.pattern:
            return own
        stage = fitting(self.masks.layers[name], sparsity)
        return None if stage is None else max(stage, own, key=lambda pattern: pattern.density)

    # Moments of a run

    def on_fit_start(self) -> None:
        if self.one_shot and self.trainer.max_epochs != 1:
            raise InputError("model.one_shot: sees the data once; set trainer.max_epochs: 1 and limit_train_batches")
        if self.is_calibrated and not self._ready and not self.one_shot:
            self._calibrate()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        if not self.one_shot:
            return super().training_step(batch, batch_idx)
        self._see(batch, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        self.log("samples", float(len(batch["x"])))
        if self.trainer.is_last_batch:
            # Within the step, so that any checkpoint behind it holds the result; statistics alone are of its precision.
            with torch.autocast(self.device.type, enabled=False):
                self._prune_once()
        return None

    def configure_optimizers(self) -> Any:
        """None where nothing is trained."""
        return ([], []) if self.one_shot else super().configure_optimizers()

    def _see(self, batch: Batch, index: int) -> None:
        """Add a batch to the statistics, noised as the loss would; magnitudes alone need none."""
        if not self.is_calibrated:
            return
        if self._statistics is None:
            self._statistics = self._begin()
        x_t, t, cond, _ = self.diffuse(batch, self.step_generator(5, index))
        by_loss = self.calibration.weighting == "loss"
        weights = self.sample_weights(t) if by_loss else logarithmic_weights(self.process.grid(), t)
        self._statistics.see(x_t, t, cond, weights)

    def _begin(self) -> Statistics:
        """Statistics of nothing yet, or of what an interrupted run had seen."""
        folder = Path(self.trainer.default_root_dir)
        statistics = Statistics(self.denoiser, self.masks, self.mask_scores, self.calibration, folder)
        if self._seen is not None:
            # Summed over processes when they were saved, so they stay with one of them.
            statistics.load(self._seen, self.global_rank == 0)
        self._seen = None
        return statistics

    def _calibrate(self) -> None:
        """Look at batches of a loader of its own, so that the run's is not moved on."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise InputError("data: calibration needs a data module")
        loader = iter(datamodule.train_dataloader())
        for index in range(self.calibration.batches):
            batch = next(loader, None)
            if batch is None:
                break
            self._see({**batch, "x": batch["x"].to(self.device), "cond": move(batch["cond"], self.device)}, index)
        self._prune()

    def _prune(self) -> None:
        """From statistics to masks, patterns and weights; all processes call it together."""
        if self.is_calibrated:
            self._prune_by(self._statistics or self._begin())
            self._statistics = None
        else:
            self.set_sparsity(self.pattern)
        self._ready = True
        self.weights_changed()

    def _prune_by(self, statistics: Statistics) -> None:
        if self.trainer.world_size > 1:
            statistics.sum_over(self._summed)
        if scales := statistics.scales():
            self.masks.set_scales(self.trainer.strategy.broadcast(scales))
        if self.allocation is not None:
            ledger = self.ledger()
            chosen, _ = statistics.allocate(self.allocation, ledger.by_layer(), ledger.macs(), self._averaged)
            self._patterns = self.trainer.strategy.broadcast(chosen)
        self.set_sparsity(self.pattern)
        if self.calibration.compensate:
            lost = statistics.compensate()
            self._share_weights()
            self._say(f"calibration: {len(lost)} layers refitted, {sum(lost.values()) / len(lost):.4f} of output lost")
        if self.allocation is not None:
            kept = self.kept_fraction()["aten"]
            self._say(f"allocation: {kept:.4f} of MACs kept, budget {self.allocation.budget:g}")

    def _share_weights(self) -> None:
        """Take the first process' weights: factorisations of other machines may differ in their last digits."""
        if self.trainer.world_size > 1:
            for parameter in self.denoiser.parameters():
                distributed.broadcast(parameter.data, 0)

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            Console().print(text, highlight=False)

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on each of them."""
        if self.trainer.world_size == 1:
            return tensor.clone()
        total: Tensor = self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")
        return total.cpu()

    def _averaged(self, tensor: Tensor) -> Tensor:
        return self._summed(tensor) / self.trainer.world_size

    def on_train_end(self) -> None:
        self._prune_once()  # a run that went on behind its last batch
        super().on_train_end()

    def _prune_once(self) -> None:
        if self.one_shot and not self._ready:
            self._prune()

    def artifact_files(self) -> dict[str, str]:
        """The pattern of every layer, where they were allocated."""
        if self.allocation is None:
            return {}
        content = {
            "budget": self.allocation.budget,
            "macs_kept": self.kept_fraction()["aten"],
            "patterns": {name: str(pattern) for name, pattern in self._patterns.items()},
        }
        return {"allocation.json": json.dumps(content, indent=2) + "\n"}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._ready:
            checkpoint["calibrated"] = {
                "scales": {name: layer.scale for name, layer in self.masks.layers.items() if layer.scale is not None},
                "patterns": {name: str(pattern) for name, pattern in self._patterns.items()},
            }
        elif self._statistics is not None:
            checkpoint["statistics"] = self._statistics.state(self._summed if self.trainer.world_size > 1 else None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seen = checkpoint.get("statistics")
        if self._seen is not None and (self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING):
            raise InputError("ckpt_path: its calibration has not ended, so there is no result yet; go on with `fit`")
        if (calibrated := checkpoint.get("calibrated")) is not None:
            for name, scale in calibrated["scales"].items():
                self.masks.layers[name].set_scale(scale)
            self._patterns = {name: Sparsity.parse(text) for name, text in calibrated["patterns"].items()}
            self.set_sparsity(self.pattern)
            self._ready = True
