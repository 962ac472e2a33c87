"""Where a run writes: one folder that no second run overwrites."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_prune.jobs import current_job
from lightning_prune.protocols import InputError

_ENV = "LIGHTNING_PRUNE_RUN_FOLDER"
_created: list[Path] = []


@dataclass
class RunSettings:
    """Where and under which name a run is recorded.

    Args:
        root: folder that holds all runs.
        name: folder of this run inside `root`; if it exists, a number is appended.
        wandb: "offline" writes a W&B record to disk, "online" also sends it, "disabled" writes none.
        project: W&B project.
        group: W&B group; null is the id of the job array, if there is one.
        job_type: W&B job type.
        tags: W&B tags.
        checkpoint_every: optimizer steps between checkpoints.
    """

    root: str = "runs"
    name: str = "run"
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "lightning_prune"
    group: str | None = None
    job_type: str = "fit"
    tags: list[str] | None = None
    checkpoint_every: int = 500


def resolve(settings: RunSettings, ckpt_path: str | None) -> Path:
    """The folder of this run, not yet created.

    A checkpoint inside `<root>/<name>` or a numbered sibling continues in its own folder; otherwise an existing
    folder is left alone and the next free number is taken. Processes that one command starts agree through the
    environment; those that a scheduler starts cannot, side by side or one after the other, and share `<name>-<job>`.

    Raises:
        InputError: the folder cannot be written.
    """
    if chosen := os.environ.get(_ENV):
        return Path(chosen)
    base = Path(settings.root) / settings.name
    folder = _resumed(settings, ckpt_path) or _of_job(base) or _next_free(base)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"run.root: cannot write to {existing}")
    os.environ[_ENV] = str(folder)
    return folder


def checkpoint_to_resume(folder: Path) -> Path | None:
    """What an earlier start of the same job left to go on from.

    Raises:
        InputError: the job starts for the first time, but a run is in its folder: two of one name in one job, or a
            scheduler that counts from 1 again.
    """
    job, last = current_job(), folder / "checkpoints" / "last.ckpt"
    if job is None or not last.exists():
        return None
    if not job.restarted:
        raise InputError(f"run.name: {folder} holds a run already; give each fit of a job a name of its own")
    return last


def create(folder: Path) -> None:
    """Create the folder of a run that is about to begin."""
    if not folder.exists():
        _created.append(folder)
    folder.mkdir(parents=True, exist_ok=True)


def discard_unused() -> None:
    """Remove a folder created for a run that ended before it did anything."""
    for folder in _created:
        if not any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "samples")):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent.exists() and not any(folder.parent.iterdir()):
                folder.parent.rmdir()


def forget() -> None:
    """Let the next command in this process choose a folder of its own."""
    os.environ.pop(_ENV, None)
    _created.clear()


def _resumed(settings: RunSettings, ckpt_path: str | None) -> Path | None:
    if ckpt_path is None:
        return None
    root = Path(settings.root).resolve()
    for parent in Path(ckpt_path).resolve().parents:
        if parent.parent == root and re.fullmatch(re.escape(settings.name) + r"(-\d+)?", parent.name):
            return Path(settings.root) / parent.name
    return None


def _of_job(base: Path) -> Path | None:
    job = current_job()
    return base.with_name(f"{base.name}-{job.name}") if job else None


def _next_free(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
