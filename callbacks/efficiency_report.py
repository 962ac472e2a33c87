"""The end of a run: what was gained and lost, measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_prune.callbacks.capability import check_sampling, require
from lightning_prune.callbacks.progress import sampling_progress
from lightning_prune.callbacks.run_record import RunRecord
from lightning_prune.callbacks.stop_on_signal import stop_between_batches
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gated import check_solver
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler, SamplerName
from lightning_prune.diffusion.variants import Variant
from lightning_prune.export.artifact import load
from lightning_prune.export.report import (
    Cost,
    build_report,
    costs,
    headings,
    metric_of,
    objective,
    row,
    seconds_per_image,
    table_cells,
    with_fewer_steps,
    write_report,
)
from lightning_prune.metrics.evaluation import Evaluator, Measurement, SamplingSettings, Score
from lightning_prune.metrics.samples import conditions_of
from lightning_prune.protocols import InputError, Remarks, SparsityControl, StepAware, VariantSource


class EfficiencyReport(Callback):
    """Score every network the method reports, under one protocol and equal seeds; write the report.

    `fit` leaves `report.json` and `report.md` in the run folder, `test` leaves `report-test.json` and its like.

    Args:
        samples: samples a network.
        steps: sampling steps.
        guidance: guidance scale; 1 is none.
        protocol: name of the protocol.
        timed_images: images drawn at once when seconds are measured.
        timed_repeats: turns of the interleaved measurement.
        batch_size: samples drawn at once, by one process.
        measurement: what samples are compared with, and how; null is `fd_fashion` alone.
        beside: artifacts of other runs to report beside this one's networks, folders by row name.
        sampler: the solver.
        sample_seed: seed of the starting noise.
        fewer_steps: also report the first network, the dense one, with as many steps as the result's MACs and 0.2 % of
            the dense run's allow.
        budget: fraction of MACs that the result may keep, for the `objective` of a sweep; null is no limit.
        rows: names of the rows to report beside the result, whose scores take the time; null is all.
    """

    def __init__(
        self,
        samples: int = 1000,
        steps: int = 10,
        guidance: float = 1.0,
        protocol: str = "quick-v1",
        timed_images: int = 64,
        timed_repeats: int = 3,
        batch_size: int = 100,
        measurement: Measurement | None = None,
        beside: dict[str, str] | None = None,
        sampler: SamplerName = "ddim",
        sample_seed: int = 0,
        fewer_steps: bool = False,
        budget: float | None = None,
        rows: list[str] | None = None,
    ) -> None:
        super().__init__()
        if budget is not None and not 0 < budget <= 1:
            raise InputError(f"EfficiencyReport.budget: {budget} is not in (0, 1]")
        self.budget = budget
        self.settings = SamplingSettings(samples, Sampler(sampler, steps, guidance), sample_seed, batch_size, protocol)
        self.timed_images, self.timed_repeats = timed_images, timed_repeats
        self.measurement = measurement or Measurement()
        self.beside = beside or {}
        self.fewer_steps, self.rows = fewer_steps, rows
        self.scores: dict[str, Score] = {}
        self._others: dict[str, Denoiser] = {}
        self._evaluator: Evaluator | None = None

    @property
    def evaluator(self) -> Evaluator:
        """What scores; there is one once the trainer has set the callback up."""
        assert self._evaluator is not None
        return self._evaluator

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require(pl_module, VariantSource, self)
        check_sampling(trainer, pl_module, self.settings.sampler, self)
        self._others = {name: load(folder) for name, folder in self.beside.items()}
        for name, network in self._others.items():
            _check_calls(name, network, pl_module.process, self.settings.sampler)  # type: ignore[arg-type]
            check_solver(network, self.settings.sampler, pl_module.process)  # type: ignore[arg-type]
        self._evaluator = Evaluator(trainer.datamodule, self.measurement)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rows is None:
            return
        names = self._names(require(pl_module, VariantSource, self))
        for name in self.rows:
            # The row of fewer steps is named by their number, which the result's MACs give.
            if name not in names and not (self.fewer_steps and name.startswith(f"{names[0]}, ")):
                raise InputError(f"EfficiencyReport.rows: {name!r} is none of {', '.join(names)}")

    def on_result(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report; called with the final, averaged weights in place."""
        self._report(trainer, pl_module, "report")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module, "report-test")

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        source = require(pl_module, VariantSource, self)
        variants = self._variants(source, pl_module.device)
        if self.fewer_steps:
            variants = with_fewer_steps(variants, source.process, self.settings.sampler)
        *rest, result = variants
        reported = {name: variants[name] for name in [*filter(self._reported, rest), result]}
        # Relative to the first network, reported or not; the others are not even made.
        found = costs(
            {rest[0]: variants[rest[0]], **reported} if rest else reported, source.process, self.settings.sampler
        )
        variants = reported
        self.evaluator.to(pl_module.device)
        with torch.random.fork_rng(devices=[]):
            self.scores = self._scored(trainer, source, variants)
            # Together: layers may be spread over processes.
            density = pl_module.density_by_layer() if isinstance(pl_module, SparsityControl) else {}
            if trainer.is_global_zero:
                report = self._write(trainer, pl_module, variants, found, name)
                _log_tables(trainer, density, report)
                _log_result(trainer, report, self.budget)

    def row_names(self, source: VariantSource) -> list[str]:
        """Names of the rows: the method's networks, other runs' before the last, which is the result."""
        *rest, result = self._names(source)
        return [*filter(self._reported, rest), result]

    def _names(self, source: VariantSource) -> list[str]:
        *rest, result = source.variants()
        return [*rest, *self.beside, result]

    def _reported(self, name: str) -> bool:
        return self.rows is None or name in self.rows

    def _variants(self, source: VariantSource, device: torch.device) -> dict[str, Variant]:
        networks = source.variants()  # once: networks may be copies, or gathered from all processes
        *rest, result = networks
        others = {name: Variant(network.to(device)) for name, network in self._others.items()}
        return {**{name: networks[name] for name in rest}, **others, result: networks[result]}

    def _scored(self, trainer: pl.Trainer, source: VariantSource, variants: Mapping[str, Variant]) -> dict[str, Score]:
        settings, world = self.settings, trainer.world_size
        with sampling_progress(trainer, "evaluating", settings.samples * len(variants)) as advance:

            def draw(variant: Variant, ids: torch.Tensor, cond: Condition) -> torch.Tensor:
                stop_between_batches(trainer)
                sampler = variant.sampler or settings.sampler
                images = sample_images(variant.denoiser, source.process, ids, cond, sampler, settings.seed)
                advance(len(ids) * world)
                return images

            draws = {name: partial(draw, variant) for name, variant in variants.items()}
            return self.evaluator.score(draws, settings, source.process, source.weights_kind)

    def _write(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        variants: Mapping[str, Variant],
        found: Mapping[str, Cost],
        name: str,
    ) -> dict[str, Any]:
        process, folder = require(pl_module, VariantSource, self).process, Path(trainer.default_root_dir)
        sampler, first = self.settings.sampler, next(iter(variants.values())).denoiser
        cond = conditions_of(self.evaluator.data, torch.arange(self.timed_images), first.num_classes)
        seconds = seconds_per_image(variants, process, sampler, self.timed_images, self.timed_repeats, cond)
        rows = [row(key, self.scores[key], found[key], seconds[key], v.sampler) for key, v in variants.items()]
        method = type(pl_module).__name__.lower()
        report = build_report(method, _config(trainer), rows, self.scores, self.evaluator.floor())
        notes = _notes(report, found, self.fewer_steps)
        notes += pl_module.remarks() if isinstance(pl_module, Remarks) else []
        write_report(report, notes, self.scores, folder, name)
        _print(report, notes, folder, name)
        return report


def _check_calls(name: str, network: Denoiser, process: Process, sampler: Sampler) -> None:
    """Refuse now what could not be drawn when the run ends."""
    if isinstance(network, StepAware):
        try:
            network.at_step(0, sampler.calls(process))
        except InputError as error:
            raise InputError(f"EfficiencyReport.beside: {name}: {error}") from error


def _config(trainer: pl.Trainer) -> dict[str, Any]:
    records = [c for c in trainer.callbacks if isinstance(c, RunRecord)]  # type: ignore[attr-defined]
    return yaml.safe_load(records[0].config) or {} if records else {}


def _notes(report: Mapping[str, Any], found: Mapping[str, Cost], fewer_steps: bool) -> list[str]:
    floor = report["floor"]
    notes = [
        f"floor {floor['value']:.3f}: the distance of {floor['samples']} held-out real images from the reference; "
        "no model can be expected below it (a distance rises as the count falls)"
    ]
    last = found[list(found)[-1]]
    if fewer_steps:
        notes.append("the first network with fewer steps has at most 0.2 % of its own run's MACs more than the result")
    if last.masked_share > 0:
        notes.append(
            f"masked layers hold {100 * last.masked_share:.1f} % of all MACs; theirs fall to the pattern's share, "
            "everything else is untouched"
        )
        notes.append(
            "MACs under N:M are theoretical here: without a sparse kernel the masked network takes as long as the "
            "dense one, as the measured seconds say"
        )
    if any("decoder" in protocol for protocol in report["protocols"].values()):
        notes.append(
            "MACs and seconds are those of sampling latents; decoding them costs every row the same and is left out"
        )
    return notes


def _print(report: Mapping[str, Any], notes: list[str], folder: Path, name: str) -> None:
    table = Table(title=f"{folder}: what was gained, what was lost")
    for heading in headings(report):
        table.add_column(heading)
    for cells in table_cells(report):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    console.print(f"  report {folder / name}.md   artifact {folder / 'artifact'}", highlight=False)


def _log_tables(trainer: pl.Trainer, density: Mapping[str, float], report: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        metric = metric_of(report)
        columns = ["network", metric, "low", "high", "macs_per_image", "macs_kept", "seconds_per_image"]
        logger.log_table("report", columns=columns, data=[_flat(r, metric) for r in report["rows"]])
        if density:
            logger.log_table("density", columns=["layer", "density"], data=[list(item) for item in density.items()])


def _log_result(trainer: pl.Trainer, report: Mapping[str, Any], budget: float | None) -> None:
    """The result as numbers that a sweep can aim at."""
    result, metric = report["rows"][-1], metric_of(report)
    value, kept = result[metric]["value"], result["macs_kept"]
    values = {"result_distance": value, "result_macs_kept": kept, "objective": objective(value, kept, budget)}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()


def _flat(r: Mapping[str, Any], metric: str) -> list[Any]:
    distance = [r[metric][key] for key in ("value", "low", "high")]
    return [r["name"], *distance, r["macs_per_image"], r["macs_kept"], r["seconds_per_image"]]
