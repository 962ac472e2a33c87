"""Shipped sweep files are what `wandb sweep` accepts and the command line parses; a real agent runs a grid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.cli import main
from lightning_prune.export.report import objective
from tests.sweeps.standin import Server, grid, serving

CONFIGS = Path(__file__).parents[2] / "configs"
ROOT = CONFIGS.parent
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


def wandb(folder: Path, url: str, *arguments: str) -> str:
    """Run the real client against the stand-in; what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment = {
        **kept, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "HOME": str(folder), "WANDB_DIR": str(folder),
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), *arguments],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=900, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def create(file: Path, folder: Path, url: str) -> str:
    """`wandb sweep`; the path that it says an agent is given."""
    said = wandb(folder, url, "sweep", str(file))
    found = re.search(r"wandb agent (\S+)", said)
    assert found, said
    return found[1]


def samples(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter sets a sweep could draw: the corners of its ranges, the first and the last of its choices."""
    return [
        {n: p["values"][end] if "values" in p else (p["min"], p["max"])[end] for n, p in parameters.items()}
        for end in (0, -1)
    ]


def test_there_are_sweeps_of_every_kind() -> None:
    contents = [yaml.safe_load(file.read_text()) for file in SWEEPS]
    assert {content["method"] for content in contents} == {"grid", "random", "bayes"}
    assert any("early_terminate" in content for content in contents)
    assert all(content["metric"]["goal"] == "minimize" for content in contents)


def test_the_client_accepts_every_shipped_sweep(tmp_path: Path) -> None:
    with serving() as (server, url):
        for file in SWEEPS:
            assert create(file, tmp_path, url).endswith("/sweep1")
            assert server.config["parameters"].keys() == yaml.safe_load(file.read_text())["parameters"].keys()


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_every_trial_parses(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(file.read_text())
    command = content["command"]
    assert command[:5] == ["${env}", "${interpreter}", "-m", "lightning_prune", "fit"]
    monkeypatch.chdir(ROOT)
    for trial in samples(content["parameters"]):
        given = [f"--{name}={value}" for name, value in trial.items()]
        with pytest.raises(SystemExit) as stop:
            main([*command[4:-1], *given, "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["run"]["wandb"] == "online"
        for name, value in trial.items():
            found = printed
            for key in name.split("."):
                found = found[key]
            assert found == value


@pytest.mark.timeout(1200)
def test_a_real_agent_runs_a_grid_and_stops(tmp_path: Path) -> None:
    content = yaml.safe_load((CONFIGS / "sweeps" / "sparsedm_grid.yaml").read_text())
    content["parameters"] = {"model.init_args.sparsity": {"values": ["3:4", "2:4"]}}
    base = yaml.safe_load((CONFIGS / "smoke" / "sparsedm_dit.yaml").read_text())
    base["trainer"] |= {"callbacks": [_report()], "max_steps": 1, "limit_val_batches": 0}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content["command"][6:9] = [str(tmp_path / "base.yaml"), "--run.wandb", "offline"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with serving() as (server, url):
        path = create(tmp_path / "sweep.yaml", tmp_path, url)
        wandb(tmp_path, url, "agent", path)
        assert list(server.given.values()) == grid(content["parameters"])
    runs = [tmp_path / "runs" / f"smoke-sparsedm-dit-{trial}" for trial in server.given]
    assert sorted((tmp_path / "runs").iterdir()) == sorted(runs)
    for run, trial in zip(runs, server.given.values(), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["model"]["init_args"]["sparsity"] == trial["model.init_args.sparsity"]
        (record,) = (run / "wandb").glob("offline-run-*")
        assert record.name.endswith(f"-{run.name.rpartition('-')[2]}"), "the run that the agent announced"
        assert "objective" in (run / "metrics.csv").read_text().splitlines()[0]
    assert main(["pareto", str(tmp_path / "runs")]) == 0


def _report() -> dict[str, Any]:
    settings = {"samples": 120, "steps": 1, "protocol": "smoke", "timed_images": 2, "timed_repeats": 1, "budget": 0.7}
    return {"class_path": "lightning_prune.callbacks.EfficiencyReport", "init_args": settings}


def test_the_objective_prefers_what_keeps_to_the_budget() -> None:
    assert objective(5.0, 0.55, None) == objective(5.0, 0.55, 0.6) == objective(5.0, 0.6, 0.6) == 5.0
    assert objective(5.0, 0.66, 0.6) == pytest.approx(10.0)
    assert objective(5.0, 0.61, 0.6) < objective(5.0, 0.62, 0.6)


def test_the_stand_in_orders_a_grid_as_the_server_does() -> None:
    assert grid({"b": {"values": [1, 2]}, "a": {"values": [3, 4]}}) == [
        {"a": 3, "b": 1}, {"a": 3, "b": 2}, {"a": 4, "b": 1}, {"a": 4, "b": 2},
    ]  # fmt: skip
    assert Server().answer("query { viewer { id } }", {})["viewer"]["username"] == "someone"
