"""What people take away from a run: the artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from lightning_prune.callbacks.capability import require
from lightning_prune.export.artifact import save_artifact
from lightning_prune.protocols import ArtifactFiles, VariantSource


class ArtifactWriter(Callback):
    """Write `artifact/` from the final weights; the results of a report of this run go into its manifest."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, VariantSource, self)

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the artifact; called with the averaged weights in place, after reports."""
        source, folder = require(pl_module, VariantSource, self), Path(trainer.default_root_dir)
        result = list(source.variants().values())[-1].denoiser  # together: it may be gathered from all processes
        if not trainer.is_global_zero:
            return
        details = {"sampler": source.process.scheduler_config, **_results(folder / "report.json")}
        files = pl_module.artifact_files() if isinstance(pl_module, ArtifactFiles) else {}
        save_artifact(result, folder / "artifact", type(pl_module).__name__.lower(), details, files)
        _track(trainer, folder)


def _track(trainer: pl.Trainer, folder: Path) -> None:
    """The manifest and the report as a W&B artifact of the run; weights stay where they are."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            tracked = wandb.Artifact(tracked_name(folder), type="manifest")
            for file in (folder / "artifact" / "pruning.json", folder / "report.json"):
                if file.exists():
                    tracked.add_file(str(file))
            logger.experiment.log_artifact(tracked)


def tracked_name(folder: Path) -> str:
    """The W&B artifact's name; a run may have characters in its own that W&B allows in none."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', folder.name)}-manifest"


def _results(report: Path) -> dict[str, Any]:
    if not report.exists():
        return {"protocol": {}, "results": {}}
    content = json.loads(report.read_text())
    return {"protocol": content["protocols"], "results": content["rows"][-1]}
