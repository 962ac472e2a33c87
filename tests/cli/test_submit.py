"""`submit`: the shipped script at the size asked for, checked before it queues; and what a job's environment means."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune import cli, jobs
from lightning_prune.cli import main, run_folder
from lightning_prune.cli.run_folder import RunSettings
from lightning_prune.cli.submit import SCRIPTS, render
from lightning_prune.protocols import InputError

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "sparsedm_dit.yaml"
LATENTS = {"class_path": "lightning_prune.data.CachedLatents"}


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    assert len({line.partition("=")[0] for line in lines}) == len(lines), "an option twice"
    return dict(line.partition("=")[::2] for line in lines)


def arguments(script: str, folder: Path, size: dict[str, str]) -> list[str]:
    """What a script calls srun with, found by running it."""
    env = folder / "env.sh"
    env.write_text('LIGHTNING_PRUNE=(lp)\nsrun() { printf "%s\\n" "$@"; }\n')
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "LIGHTNING_PRUNE_ENV": str(env), **size},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_dry_run_prints_the_script_that_starts_a_task_on_each_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["submit", "--config", str(SMOKE), "--nodes", "2", "--devices", "4", "--time", "30", "--dry-run"]
    assert main([*command, "--env", str(_site(tmp_path)), "--run.name", "a b"]) == 0
    script = capsys.readouterr().out
    found = directives(script)
    assert (found["nodes"], found["ntasks-per-node"], found["time"]) == ("2", "4", "30")
    assert "gpus-per-node" not in found, "the config asks for CPUs"
    assert found["signal"] == directives((SCRIPTS / "train.sbatch").read_text())["signal"]
    script = script.replace(f"export LIGHTNING_PRUNE_ENV={tmp_path / 'site.sh'}", "")
    called = arguments(script, tmp_path, {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"})
    assert called[1:] == [
        "lp", "fit", "--config", str(SMOKE), "--trainer.num_nodes", "2", "--trainer.devices", "4", "--run.name", "a b",
    ]  # fmt: skip


def _site(folder: Path) -> Path:
    file = folder / "site.sh"
    file.write_text("")
    return file


@pytest.mark.parametrize("name", ["train", "evaluate", "sweep"])
def test_scripts_say_how_they_are_called_and_name_no_port(name: str) -> None:
    text = (SCRIPTS / f"{name}.sbatch").read_text()
    assert "PORT" not in text
    assert directives(text)["ntasks-per-node"] == directives(text)["gpus-per-node"]
    done = subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sbatch")], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "LIGHTNING_PRUNE_ENV": "/dev/null"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr
    assert f"slurm/{name}.sbatch" in done.stderr


def test_what_was_rendered_keeps_every_other_line() -> None:
    text = (SCRIPTS / "train.sbatch").read_text()
    rendered = render(text, {"nodes": "3", "gpus-per-node": None, "account": "x"}, ["c.yaml"], Path("/e"))
    assert directives(rendered) == {
        **{k: v for k, v in directives(text).items() if k != "gpus-per-node"}, "nodes": "3", "account": "x",
    }  # fmt: skip
    removed = {line for line in text.splitlines() if line not in rendered.splitlines()}
    assert removed == {"#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1"}
    assert shlex.split(rendered.splitlines()[rendered.splitlines().index("set -- c.yaml")])[2:] == ["c.yaml"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"denoiser.weights": "/no/such/folder"}, "denoiser.init_args.weights: /no/such/folder"),
        ({"denoiser.weights": "embedded:nothing"}, "embedded:nothing"),
        ({"denoiser.weights": "nobody/nothing"}, "not in the cache of the hub"),
        ({"data": {"class_path": "lightning_prune.data.FashionMNIST", "init_args": {"root": "/no/data"}}}, "/no/data"),
        ({"data": LATENTS | {"init_args": {"root": ".", "decoder": {"pipeline": "/no/vae"}}}}, "pipeline: /no/vae"),
        ({"measurement": {"reference": "/no/moments.npz"}}, "/no/moments.npz"),
        ({"measurement": {"extractor": "inception"}}, "prefetch inception"),
        ({"beside": {"other": "/no/artifact"}}, "/no/artifact"),
        ({"sparsity": "5:4"}, "5:4"),
    ],
)
def test_what_is_missing_is_refused_before_it_queues(
    change: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("lightning_prune.cli.submit._submit", lambda *_: pytest.fail("was submitted"))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(_changed(change)))
    assert main(["submit", "--config", str(tmp_path / "x.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [named in line for line in lines if line.startswith("lightning_prune: error:")] == [True]


def _changed(change: dict[str, Any]) -> Any:
    config = yaml.safe_load(SMOKE.read_text())
    report = {"class_path": "lightning_prune.callbacks.EfficiencyReport", "init_args": {}}
    config["trainer"]["callbacks"] = [report]
    for key, value in change.items():
        if key == "denoiser.weights":
            config["model"]["init_args"]["denoiser"]["init_args"] = {"weights": value}
        elif key == "data":
            config["data"] = value
        elif key == "sparsity":
            config["model"]["init_args"]["sparsity"] = value
        else:
            report["init_args"] = {key: value}
    return config


def test_no_sbatch_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "--config", str(SMOKE)]) == 2
    assert "--dry-run" in capsys.readouterr().err


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "x", **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_a_job_has_one_folder_and_an_interactive_shell_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(root=str(tmp_path), name="x")

    def folder() -> str:
        run_folder.forget()
        return run_folder.resolve(settings, None).name

    slurm(monkeypatch)
    (tmp_path / "x-7").mkdir()
    assert folder() == "x-7"
    slurm(monkeypatch, ARRAY_JOB_ID="5", ARRAY_TASK_ID="2")
    assert folder() == "x-5_2"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    assert folder() == "x-trial"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    slurm(monkeypatch, JOB_NAME="bash")
    assert folder() == "x"
    run_folder.forget()


def test_a_first_start_does_not_go_on_from_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch)
    assert run_folder.checkpoint_to_resume(tmp_path) is None
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    with pytest.raises(InputError, match=r"run\.name"):
        run_folder.checkpoint_to_resume(tmp_path)
    slurm(monkeypatch, RESTART_COUNT="1")
    assert run_folder.checkpoint_to_resume(tmp_path) == last
    monkeypatch.delenv("SLURM_JOB_ID")
    assert run_folder.checkpoint_to_resume(tmp_path) is None


def test_several_tasks_without_srun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(monkeypatch, NTASKS="2")
    assert main(["fit", "--config", str(SMOKE)]) == 2
    assert "SLURM_NTASKS is 2, but this was started without srun" in capsys.readouterr().err


def test_a_sweeps_trial_becomes_srun_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda _, command: called.append(command))
    slurm(monkeypatch, NTASKS="2", JOB_NUM_NODES="2", NTASKS_PER_NODE="1")
    monkeypatch.setenv("LIGHTNING_PRUNE_SRUN", "srun --kill-on-bad-exit=1")
    cli._through_srun(["fit", "--model.x", "1"])
    assert called[0][:2] == ["srun", "--kill-on-bad-exit=1"]
    assert called[0][-7:] == ["fit", "--model.x", "1", "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    cli._through_srun(["fit"])
    assert len(called) == 1


def test_what_scontrol_objects_to_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm(monkeypatch)
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\necho "$@ disabled" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert jobs.requeue() == "requeue 7 disabled"
