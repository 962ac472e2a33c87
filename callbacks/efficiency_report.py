"""The end of a run: what was gained and lost, measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_prune.callbacks.capability import require
from lightning_prune.callbacks.progress import sampling_progress
from lightning_prune.callbacks.run_record import RunRecord
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.export.report import (
    Cost,
    build_report,
    cost,
    row,
    seconds_per_image,
    table_cells,
    write_report,
)
from lightning_prune.metrics.evaluation import FashionEvaluator, SamplingSettings, Score
from lightning_prune.protocols import SparsityControl, VariantSource


class EfficiencyReport(Callback):
    """Score every network the method reports, under one protocol and equal seeds; write the report.

    Args:
        samples: samples a network.
        steps: DDIM steps.
        guidance: guidance scale; 1 is none.
        protocol: name of the protocol.
        timed_images: images drawn at once when seconds are measured.
        timed_repeats: turns of the interleaved measurement.
    """

    def __init__(
        self,
        samples: int = 1000,
        steps: int = 10,
        guidance: float = 1.0,
        protocol: str = "quick-v1",
        timed_images: int = 64,
        timed_repeats: int = 3,
    ) -> None:
        super().__init__()
        self.settings = SamplingSettings(samples=samples, steps=steps, guidance=guidance, name=protocol)
        self.timed_images, self.timed_repeats = timed_images, timed_repeats
        self._evaluator: FashionEvaluator | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, VariantSource, self)
        self._evaluator = FashionEvaluator(trainer.datamodule)  # type: ignore[attr-defined]

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report; called with the final, averaged weights in place."""
        if not trainer.is_global_zero:
            return
        source, folder = require(pl_module, VariantSource, self), Path(trainer.default_root_dir)
        variants = source.variants()
        with torch.random.fork_rng(devices=[]):
            scores = self._scores(trainer, source, variants)
            seconds = seconds_per_image(variants, source.process, self.settings, self.timed_images, self.timed_repeats)
        costs = {name: cost(denoiser, self.settings) for name, denoiser in variants.items()}
        rows = [row(name, scores[name], costs[name], seconds[name]) for name in variants]
        assert self._evaluator is not None
        method = type(pl_module).__name__.lower()
        report = build_report(method, _config(trainer), rows, list(scores.values()), self._evaluator.floor())
        notes = _notes(report, costs)
        write_report(report, notes, folder)
        _print(report, notes, folder)
        _log_tables(trainer, pl_module, report)

    def _scores(self, trainer: pl.Trainer, source: VariantSource, variants: Mapping[str, Denoiser]) -> dict[str, Score]:
        assert self._evaluator is not None
        settings, scores = self.settings, {}
        with sampling_progress(trainer, "evaluating", settings.samples * len(variants)) as advance:
            for name, denoiser in variants.items():

                def draw(ids: torch.Tensor, labels: torch.Tensor, network: Denoiser = denoiser) -> torch.Tensor:
                    images = sample_images(network, source.process, ids, labels, settings.steps, settings.guidance)
                    advance(len(ids))
                    return images

                scores[name] = self._evaluator.score(draw, settings, source.process, source.weights_kind)
        return scores


def _config(trainer: pl.Trainer) -> dict[str, Any]:
    records = [c for c in trainer.callbacks if isinstance(c, RunRecord)]  # type: ignore[attr-defined]
    return yaml.safe_load(records[0].config) or {} if records else {}


def _notes(report: Mapping[str, Any], costs: Mapping[str, Cost]) -> list[str]:
    floor = report["floor"]
    notes = [
        f"floor {floor['value']:.3f}: the distance of {floor['samples']} held-out real images from the reference; "
        "no model can be expected below it (a distance rises as the count falls)"
    ]
    last = costs[list(costs)[-1]]
    if last.masked_share > 0:
        notes.append(
            f"masked layers hold {100 * last.masked_share:.1f} % of all MACs; theirs fall to the pattern's share, "
            "everything else is untouched"
        )
        notes.append(
            "MACs under N:M are theoretical here: without a sparse kernel the masked network takes as long as the "
            "dense one, as the measured seconds say"
        )
    return notes


def _print(report: Mapping[str, Any], notes: list[str], folder: Path) -> None:
    table = Table(title=f"{folder}: what was gained, what was lost")
    for heading in ("network", "fd_fashion (95 %)", "MACs an image", "kept", "non-zero parameters", "s an image"):
        table.add_column(heading)
    for cells in table_cells(report):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    console.print(f"  report {folder / 'report.md'}   artifact {folder / 'artifact'}", highlight=False)


def _log_tables(trainer: pl.Trainer, pl_module: pl.LightningModule, report: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        columns = ["network", "fd_fashion", "low", "high", "macs_per_image", "macs_kept", "seconds_per_image"]
        logger.log_table("report", columns=columns, data=[_flat(r) for r in report["rows"]])
        if isinstance(pl_module, SparsityControl):
            density = [[name, value] for name, value in pl_module.density_by_layer().items()]
            logger.log_table("density", columns=["layer", "density"], data=density)


def _flat(r: Mapping[str, Any]) -> list[Any]:
    fd = r["fd_fashion"]
    return [
        r["name"],
        fd["value"],
        fd["low"],
        fd["high"],
        r["macs_per_image"],
        r["macs_kept"],
        r["seconds_per_image"],
    ]
