"""The loggers of a run: a CSV file that survives a resume, and W&B."""

from __future__ import annotations

import csv
import os
import secrets
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_prune import jobs
from lightning_prune.cli.run_folder import RunSettings

_ROWS_BETWEEN_SAVES = 50
_ANSWER_WITHIN = 3.0
"""Seconds in which a W&B server has to answer at the start."""
_OPENS_WITHIN = 20.0
"""Seconds in which a server that answers has to open a run."""
_PATIENCE = 60.0
"""Seconds in which it has to take the rest of a record at the end."""


class MetricsFile(Logger):
    """`metrics.csv` of a run: one row per logged step.

    Lightning's own CSV logger deletes the file when a run starts again in its folder. Here a resumed run keeps what
    was logged before the first row it logs itself, so the file reads as if it had never stopped. Training and
    validation log at one step, in that order.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.csv"
        self._rows: list[dict[str, Any]] | None = None
        self._unsaved = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run record keeps the config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        at = 0 if step is None else step
        if self._rows is None:
            self._rows = [row for row in self._read() if _before(row, at, metrics)]
        self._rows.append({"step": at, **{k: v for k, v in metrics.items() if k != "step"}})
        self._unsaved += 1
        if self._unsaved >= _ROWS_BETWEEN_SAVES:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._rows or not self._unsaved:
            return
        columns = ["step", *sorted(set().union(*self._rows) - {"step"})]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self._rows)
        partial.replace(self.file)
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(stream)]


def _before(row: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> bool:
    """Whether an earlier start logged `row` before `metrics` at `step`: other values at the same step are older."""
    found = int(row["step"])
    return found < step or (found == step and not (row.keys() & metrics.keys()) - {"step", "epoch"})


def run_loggers(settings: RunSettings, folder: Path) -> list[Logger]:
    """`metrics.csv` in the run folder, and W&B unless disabled."""
    chosen: list[Logger] = [MetricsFile(folder)]
    if settings.wandb != "disabled":
        chosen.append(TrackedRun(settings, folder))
    return chosen


class TrackedRun(WandbLogger):
    """The W&B run of a run folder. Training neither waits for a server nor loses a record to it.

    A server that does not answer at the start, or opens no run, makes it an offline one. One that stops answering later
    is given a minute at the end. The record on disk is complete either way, and `wandb sync` sends it.

    Args:
        settings: how the run is recorded.
        folder: folder of the run.
    """

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        offline = settings.wandb == "offline"
        if not offline and getattr(rank_zero_only, "rank", 0) == 0 and (silence := _silence()):
            warnings.warn(
                f"{silence}; recorded offline, wandb sync {folder}/wandb/offline-run-* sends it", stacklevel=2
            )
            offline = True
        super().__init__(
            project=settings.project,
            name=folder.name,
            save_dir=folder,
            offline=offline,
            id=wandb_id(folder),
            group=settings.group or os.environ.get("SLURM_ARRAY_JOB_ID"),
            job_type=settings.job_type,
            tags=settings.tags,
            settings=wandb.Settings(**_bounded()),
        )

    @property
    def experiment(self) -> Any:
        """The W&B run, opened when it is first asked for."""
        opened: Any = WandbLogger.experiment.fget  # type: ignore[attr-defined]
        try:
            return opened(self)
        except wandb.errors.CommError as error:
            if self._offline:
                raise
            said = str(error).partition("\n")[0]
            warnings.warn(f"{said}; recorded offline, `wandb sync` sends it", stacklevel=2)
            self._offline = True
            self._wandb_init["mode"] = "offline"
            return opened(self)


def _bounded() -> dict[str, Any]:
    """Settings that bound what W&B waits for, as far as this version has them."""
    bounds = {"init_timeout": _OPENS_WITHIN, "finish_timeout": _PATIENCE}
    return {name: seconds for name, seconds in bounds.items() if hasattr(wandb.Settings(), name)}


def _silence() -> str | None:
    """Why the W&B server cannot be used now, in words; None if it answers."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/healthz", timeout=_ANSWER_WITHIN):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"W&B at {url} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"W&B at {url} does not answer: {error}"


def wandb_id(folder: Path) -> str:
    """The W&B id of a run: a sweep's agent chose it, or it is that of the first start, so that W&B sees one run."""
    if trial := jobs.sweep_trial():
        return trial
    earlier = sorted((folder / "wandb").glob("*run-*-*"))
    return earlier[0].name.rsplit("-", 1)[1] if earlier else secrets.token_hex(4)
