"""A picture of where masks still change: layers by training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchvision.utils import save_image

from lightning_prune.callbacks.capability import require
from lightning_prune.protocols import SparsityControl

_PREFIX = "flip_rate/"
_CELL, _LINE, _COLUMNS = 8, 1, 200  # pixels; columns at most


class MaskMap(Callback):
    """Write `masks/flips.png`, the share of each layer's mask that changed at each logged step, and log it to W&B.

    Rows are layers, the first on top; columns are logged steps, of more than 200 their means. The brightest cell is the
    largest rate.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[int] = []
        self._rates: list[dict[str, float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, SparsityControl, self)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "rates": self._rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._rates = list(state_dict["steps"]), list(state_dict["rates"])

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # Values of a step are known once it is over.
        self._note(trainer)

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was noted."""
        self._note(trainer)
        if not trainer.is_global_zero or not self._rates:
            return
        layers = list(self._rates[-1])
        # A layer that a stage of a ramp left dense has no mask to change.
        rates = _shortened(torch.tensor([[at.get(layer, 0.0) for at in self._rates] for layer in layers]))
        picture = map_picture(rates)
        folder = Path(trainer.default_root_dir) / "masks"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(picture, folder / "flips.png")
        span = f"steps {self._steps[0]} to {self._steps[-1]}"
        caption = f"{span}; brightest {rates.max():.3g}; layers from the top: {' '.join(layers)}"
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("mask flips", [picture.permute(1, 2, 0).numpy()], caption=[caption])

    def _note(self, trainer: pl.Trainer) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        metrics = trainer.callback_metrics.items()
        found = {name.removeprefix(_PREFIX): float(rate) for name, rate in metrics if name.startswith(_PREFIX)}
        if not found or step % every or (self._steps and step <= self._steps[-1]):
            return
        self._steps.append(step)
        self._rates.append(found)


def _shortened(rates: Tensor) -> Tensor:
    """Rates [layers, steps] as means over at most 200 equal spans of steps."""
    spans = rates.tensor_split(min(_COLUMNS, rates.shape[1]), dim=1)
    return torch.stack([span.mean(dim=1) for span in spans], dim=1)


def map_picture(rates: Tensor) -> Tensor:
    """Rates [layers, columns] as an image, float [3, H, W] in [0, 1]; the largest is white."""
    cells = rates / rates.max().clamp_min(torch.finfo(rates.dtype).tiny)
    cells = (0.1 + 0.9 * cells).repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    for line in range(_LINE):
        cells[line::_CELL] = 0
    return cells.expand(3, -1, -1).contiguous()
