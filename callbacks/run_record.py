"""The resolved config where people look for it: in the run folder, in every checkpoint and in W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger


class RunRecord(Callback):
    """Write `config.yaml` when a run starts, and put the same text into checkpoints and W&B.

    Args:
        config: the resolved configuration as YAML.
    """

    def __init__(self, config: str = "") -> None:
        super().__init__()
        self.config = config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        if not file.exists():  # a resumed run keeps what it was started with
            file.write_text(self.config)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(self.config) or {}, allow_val_change=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
