"""The scheduler's job that this process belongs to: a SLURM job or array task, a sweep's trial, a torchrun."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

_INTERACTIVE = ("bash", "interactive")


@dataclass(frozen=True)
class Job:
    """What names a run over all of its starts.

    Attributes:
        name: the same at every start and on every process, and of no other run.
        restarted: this start may find what an earlier one left.
    """

    name: str
    restarted: bool


def current_job() -> Job | None:
    """The job this process was started by; None where somebody typed the command."""
    if trial := sweep_trial():
        return Job(trial, restarted=True)
    if in_slurm():
        return Job(slurm_job(), restarted=int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0)
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Job(run, restarted=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    return None


def sweep_trial() -> str | None:
    """The W&B run id that an agent gave to this trial of a sweep."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def in_slurm() -> bool:
    """Whether a batch job or `srun` started this process. A shell inside an allocation is no job of ours."""
    environment = os.environ
    return {"SLURM_JOB_ID", "SLURM_NTASKS"} <= environment.keys() and environment.get(
        "SLURM_JOB_NAME"
    ) not in _INTERACTIVE


def slurm_job() -> str:
    """The id that `scontrol` and people use: "12", or "12_3" for an array's task."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def outside_srun() -> bool:
    """Whether this is a batch script's own process although the job has several tasks."""
    return in_slurm() and int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_STEP_ID" not in os.environ


def requeue() -> str | None:
    """Ask SLURM to start this job again. Returns what it objected to, or None."""
    try:
        done = subprocess.run(["scontrol", "requeue", slurm_job()], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"scontrol ended with {done.returncode}") if done.returncode else None
