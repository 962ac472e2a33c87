"""Pictures: which block runs at which step, and how much of each step is left."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchvision.utils import save_image

from lightning_prune.blocks import BlockCosts, GateSchedule
from lightning_prune.callbacks.capability import require
from lightning_prune.protocols import GateSource

_CELL, _LINE, _BARS = 12, 1, 48  # pixels


class GateMap(Callback):
    """Write `gates/<budget>.png` for every schedule found, and log them to W&B with the kept MACs of every step.

    Columns are steps, the noisiest first; rows are blocks, the first to run on top. A cell is bright where the block
    runs. The bars underneath are the MACs that each step keeps.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, GateSource, self)

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what was found."""
        if not trainer.is_global_zero:
            return
        source = require(pl_module, GateSource, self)
        folder = Path(trainer.default_root_dir) / "gates"
        folder.mkdir(parents=True, exist_ok=True)
        for name, schedule in source.schedules().items():
            picture = gate_picture(schedule, source.costs)
            save_image(picture, folder / f"{name}.png")
            self._log(trainer, name, schedule, source.costs, picture)

    def _log(self, trainer: pl.Trainer, name: str, schedule: GateSchedule, costs: BlockCosts, picture: Tensor) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                caption = f"budget {name}; blocks from the top: {' '.join(schedule.blocks)}"
                logger.log_image("gates", [picture.permute(1, 2, 0).numpy()], caption=[caption])
                kept = [[step, costs.step(row) / costs.dense] for step, row in enumerate(schedule.rows)]
                logger.log_table(f"kept by step, {name}", columns=["step", "macs_kept"], data=kept)


def gate_picture(schedule: GateSchedule, costs: BlockCosts) -> Tensor:
    """The map over the bars, float [3, H, W] in [0, 1]."""
    runs = torch.tensor(schedule.rows, dtype=torch.float32).T
    cells = 0.15 + 0.75 * runs.repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    for line in range(_LINE):
        cells[line::_CELL], cells[:, line::_CELL] = 0, 0
    kept = torch.tensor([costs.step(row) / costs.dense for row in schedule.rows])
    height = torch.arange(_BARS, 0, -1).view(-1, 1) / _BARS
    bars = (height <= kept.view(1, -1)).float().repeat_interleave(_CELL, 1) * 0.6
    bars[:, ::_CELL] = 0
    gap = torch.zeros(_CELL // 2, cells.shape[1])
    return torch.cat([cells, gap, bars]).expand(3, -1, -1).contiguous()
