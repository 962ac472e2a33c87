"""The scripts in slurm/ on a real SLURM: two nodes, time limits, signals, arrays."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.runs import (
    TWO_NODES,
    callback,
    config,
    equal,
    left,
    paced,
    reached,
    restarted,
    signalled,
    started_again,
    undisturbed,
    wandb_ids,
)
from tests.cluster.slurm import ROOT, SCRIPTS, Cluster, wait
from tests.sweeps.standin import serving
from tests.sweeps.test_sweeps import create

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> dict[str, Any]:
    return undisturbed(cluster, "whole")


def test_two_nodes_end_with_the_weights_of_two_processes(cluster: Cluster) -> None:
    """The quick start, shortened; once on two nodes, once by two tasks of one."""
    callbacks = [callback("SparsityRamp", chain=["3:4", "2:4"], reached_at=0.5), callback("MaskInvariant")]
    file = config(cluster.jobs, "quick", "quickstart.yaml", callbacks, max_steps=4, limit_val_batches=0, strategy="ddp")
    jobs = [
        cluster.submit(*size, SCRIPTS / "train.sbatch", file)
        for size in (TWO_NODES, ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=1"))
    ]
    assert cluster.end(*jobs) == ["COMPLETED"] * 2, cluster.output()
    two_nodes, one_node = (left(cluster.jobs / "runs" / f"quick-{job}") for job in jobs)
    assert equal(two_nodes, one_node)


def test_a_signal_loses_nothing(cluster: Cluster, whole: dict[str, Any]) -> None:
    """Twice, at different steps, with one process behind the other."""
    job, run = signalled(cluster, "signalled", [2, 7], seconds=0.2, slow_rank=1, extra=0.3)
    started_again(cluster, job, run, 2)
    assert equal(left(run), whole)


def test_a_time_limit_loses_nothing(cluster: Cluster, whole: dict[str, Any]) -> None:
    """The limit is brought near once steps are done, however long this machine takes to start."""
    file, told = paced(cluster, "limited", seconds=8)
    job = cluster.submit(*TWO_NODES, "--time=60", "--signal=SIGUSR1@30", SCRIPTS / "train.sbatch", file)
    wait(partial(reached, told, 3), 400, cluster.output)
    hours, minutes, seconds = (int(part) for part in cluster.fields(job)["RunTime"].split(":"))
    assert (hours, seconds < 60) == (0, True)
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1}")
    wait(partial(restarted, cluster, job, 0), 200, cluster.output)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.end(job) == ["COMPLETED"], cluster.output()
    run = cluster.jobs / "runs" / f"limited-{job}"
    started_again(cluster, job, run, int(cluster.fields(job)["Restarts"]))
    assert equal(left(run), whole)


def test_tasks_of_an_array_do_not_mix(cluster: Cluster) -> None:
    callbacks = [callback("MaskInvariant")]
    file = config(cluster.jobs, "array", "smoke/sparsedm_dit.yaml", callbacks, max_steps=2, limit_val_batches=0)
    script = cluster.jobs / "array.sbatch"
    text = (SCRIPTS / "train.sbatch").read_text()
    script.write_text(text.replace('"${@:2}"', '"${@:2}" --model.init_args.seed "$SLURM_ARRAY_TASK_ID"'))
    job = cluster.submit("--array=1-2", script, file)
    assert cluster.end(f"{job}_1", f"{job}_2") == ["COMPLETED"] * 2, cluster.output()
    runs = [cluster.jobs / "runs" / f"array-{job}_{task}" for task in (1, 2)]
    assert sorted(p for p in (cluster.jobs / "runs").glob("array-*")) == runs
    assert [yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["seed"] for run in runs] == [1, 2]
    assert len({wandb_ids(run)[0] for run in runs}) == 2
    assert not equal(left(runs[0])["weights"], left(runs[1])["weights"])


def test_one_and_two_nodes_draw_the_same_images_and_find_the_same_distance(
    cluster: Cluster, whole: dict[str, Any]
) -> None:
    (run,) = (cluster.jobs / "runs").glob("whole-*")
    report = callback("EfficiencyReport", samples=220, steps=2, protocol="cluster", timed_images=2, timed_repeats=1)
    file = config(cluster.jobs, "evaluated", "smoke/sparsedm_dit.yaml", [report], limit_test_batches=2)
    given = (SCRIPTS / "evaluate.sbatch", file, run / "checkpoints" / "last.ckpt")
    jobs = [cluster.submit(*size, *given) for size in (("--nodes=1",), TWO_NODES)]
    assert cluster.end(*jobs) == ["COMPLETED"] * 2, cluster.output()
    one, two = (
        json.loads((cluster.jobs / "runs" / f"evaluated-{job}" / "report-test.json").read_text()) for job in jobs
    )
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["fd_fashion"] == b["fd_fashion"]


def test_submit_puts_a_run_on_two_nodes(cluster: Cluster) -> None:
    """`lightning_prune submit` itself, with an option that the site's settings would decide otherwise."""
    callbacks = [callback("MaskInvariant")]
    file = config(cluster.jobs, "sent", "smoke/sparsedm_dit.yaml", callbacks, max_steps=2, limit_val_batches=0)
    python = (cluster.folder / "env.sh").read_text().partition("(")[2].partition(" ")[0]
    site = cluster.folder / "site.sh"
    site.write_text((cluster.folder / "env.sh").read_text() + "export SBATCH_TIMELIMIT=20 SBATCH_JOB_NAME=site\n")
    command = [python, "-m", "lightning_prune", "submit", "--config", str(file), "--nodes", "2", "--env", str(site)]
    said = cluster.call("env", f"PYTHONPATH={ROOT}", *command, "--job-name", "mine", "--trainer.strategy", "ddp")
    job = said.split()[-1]
    assert said == f"submitted job {job}\n"
    assert cluster.end(job) == ["COMPLETED"], cluster.output()
    fields = cluster.fields(job)
    assert (fields["NumNodes"], fields["JobName"], fields["TimeLimit"]) == ("2", "mine", "00:20:00")
    assert (cluster.jobs / "runs" / f"sent-{job}" / "artifact" / "pruning.json").exists()


def test_agents_of_an_array_share_a_sweep_and_run_trials_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """The shipped script and W&B's own agents; parameters of a trial reach both nodes."""
    content = yaml.safe_load((ROOT / "configs" / "sweeps" / "sparsedm_grid.yaml").read_text())
    content["parameters"] = {"model.init_args.sparsity": {"values": ["3:4", "2:4"]}}
    base = config(
        cluster.jobs, "swept", "smoke/sparsedm_dit.yaml", [], max_steps=1, limit_val_batches=0, strategy="ddp"
    )
    content["command"][6:9] = [str(base), "--run.wandb", "offline"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with serving() as (server, url):
        path = create(tmp_path / "sweep.yaml", tmp_path, url)
        site = cluster.folder / "sweep-env.sh"
        settings = f"WANDB_BASE_URL={url} WANDB_API_KEY={'0' * 40} PATH={Path(sys.executable).parent}:$PATH"
        offline = "WANDB_MODE=offline "
        site.write_text((cluster.folder / "env.sh").read_text().replace(offline, "") + f"export {settings}\n")
        sbatch = ("sbatch", "--parsable", "--array=0-1", *TWO_NODES, SCRIPTS / "sweep.sbatch", path, "1")
        job = cluster.call("env", f"LIGHTNING_PRUNE_ENV={site}", *sbatch).strip()
        assert cluster.end(f"{job}_0", f"{job}_1") == ["COMPLETED"] * 2, cluster.output()
        given = server.given
    assert list(given.values()) == [{"model.init_args.sparsity": pattern} for pattern in ("3:4", "2:4")]
    for trial, parameters in given.items():
        run = cluster.jobs / "runs" / f"swept-{trial}"
        written = yaml.safe_load((run / "config.yaml").read_text())
        assert written["model"]["init_args"]["sparsity"] == parameters["model.init_args.sparsity"]
        assert (written["trainer"]["num_nodes"], str(written["trainer"]["devices"])) == (2, "1")
        manifest = json.loads((run / "artifact" / "pruning.json").read_text())
        assert set(manifest["masks"].values()) == {parameters["model.init_args.sparsity"]}
