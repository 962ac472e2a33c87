"""Runs on the cluster: configs whose steps last, signals at chosen steps, and what has to be equal at the end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.cluster.slurm import ROOT, SCRIPTS, Cluster, wait

CONFIGS = ROOT / "configs"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def config(folder: Path, name: str, source: str, callbacks: list[dict[str, Any]], **trainer: Any) -> Path:
    """A copy of a config with other callbacks and trainer settings."""
    content = yaml.safe_load((CONFIGS / source).read_text())
    content["run"] = {"name": name, "root": str(folder / "runs"), "checkpoint_every": 1000}
    content["trainer"] |= {"callbacks": callbacks, "enable_progress_bar": False, "log_every_n_steps": 1, **trainer}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    path = name if "." in name else f"lightning_prune.callbacks.{name}"
    return {"class_path": path, "init_args": arguments}


def paced(cluster: Cluster, name: str, steps: int = 12, **pace: Any) -> tuple[Path, Path]:
    """A config of SparseDM with a ramp, averaging and validation, whose steps last; and the file that tells them."""
    told = cluster.jobs / f"{name}.step"
    callbacks = [
        callback("SparsityRamp", chain=["3:4", "2:4"], reached_at=0.5),
        callback("DistanceEvaluation", samples=20, steps=1),
        callback("MaskInvariant"),
        callback("tests.cluster.pace.Pace", file=str(told), **pace),
    ]
    file = config(
        cluster.jobs, name, "smoke/sparsedm_dit.yaml", callbacks,
        max_steps=steps, val_check_interval=4, limit_val_batches=1, strategy="ddp",
    )  # fmt: skip
    return file, told


def left(run: Path) -> dict[str, Any]:
    """What has to be equal between runs: tensors of the last checkpoint and of the artifact's manifest, the metrics."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    manifest = json.loads((run / "artifact" / "pruning.json").read_text())
    return {
        "averaged": checkpoint["state_dict"],
        "weights": checkpoint["current_model_state"],
        "optimizer": checkpoint["optimizer_states"][0]["state"],
        "masks": manifest["masks"],
        "files": manifest["files"],
        "metrics": (run / "metrics.csv").read_text(),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


def wandb_ids(run: Path) -> list[str]:
    return [folder.name.rsplit("-", 1)[1] for folder in sorted((run / "wandb").glob("offline-run-*"))]


def started_again(cluster: Cluster, job: str, run: Path, starts: int) -> None:
    """The job was requeued as often as it should, and all its starts are one run."""
    assert int(cluster.fields(job)["Restarts"]) == starts
    assert len(wandb_ids(run)) == starts + 1
    assert len(set(wandb_ids(run))) == 1


def undisturbed(cluster: Cluster, name: str, **pace: Any) -> dict[str, Any]:
    """What the run of `paced` leaves that nobody stops."""
    file, _ = paced(cluster, name, seconds=0, **pace)
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch", file)
    assert cluster.end(job) == ["COMPLETED"], cluster.output()
    return left(cluster.jobs / "runs" / f"{name}-{job}")


def reached(told: Path, step: int) -> bool:
    return told.exists() and int(told.read_text() or 0) >= step


def restarted(cluster: Cluster, job: str, times: int) -> bool:
    return int(cluster.fields(job)["Restarts"]) > times


def signalled(cluster: Cluster, name: str, at: list[int], **pace: Any) -> tuple[str, Path]:
    """Run a job and send it SIGUSR1 at the given steps; the job and its run."""
    file, told = paced(cluster, name, **pace)
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch", file)
    for restarts, step in enumerate(at):
        wait(partial(reached, told, step), 400, cluster.output)
        cluster.call("scancel", "--signal=USR1", job)
        wait(partial(restarted, cluster, job, restarts), 200, cluster.output)
        told.unlink()  # a start that has not made a step of its own may have nobody to hear the next signal
    assert cluster.end(job) == ["COMPLETED"], cluster.output()
    return job, cluster.jobs / "runs" / f"{name}-{job}"
