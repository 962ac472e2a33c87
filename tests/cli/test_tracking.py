"""A W&B server that refuses, hangs or answers 500: the run ends as usual and its record is complete."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import wandb

from lightning_prune.callbacks.artifact_writer import tracked_name
from lightning_prune.cli import loggers, main
from lightning_prune.cli.loggers import TrackedRun
from lightning_prune.cli.run_folder import RunSettings

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dense_dit.yaml"


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "wandb_unreachable.py"


def endpoint(kind: str) -> AbstractContextManager[str]:
    """A server of that kind of trouble; its address."""
    spec = importlib.util.spec_from_file_location("wandb_unreachable", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: AbstractContextManager[str] = module.endpoint(kind)
    return found


def records(run: Path) -> list[dict[str, Any]]:
    record = max((run / "wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    program = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [program, "leet", "inspect", "--json", str(record)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(loggers, "_ANSWER_WITHIN", 0.5)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("kind", ["refusing", "hanging", "broken"])
def test_a_silent_server_makes_the_run_an_offline_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with pytest.warns(UserWarning, match="recorded offline"):
            logger = TrackedRun(RunSettings(wandb="online"), tmp_path / "x")
        assert logger._offline


@pytest.mark.usefixtures("online")
@pytest.mark.filterwarnings("ignore:.*recorded offline")
@pytest.mark.parametrize("kind", ["broken", "stalling", "dying"])
def test_a_run_against_a_server_in_trouble_ends_with_a_complete_record(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers 500, one that opens no run, and one that falls silent once a run is open."""
    monkeypatch.setattr(loggers, "_OPENS_WITHIN", 3.0)
    monkeypatch.setattr(loggers, "_PATIENCE", 3.0)
    with endpoint(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tags = ["--run.wandb", "online", "--run.group", "g", "--run.tags", "[a, b]"]
        assert main(["fit", "--config", str(SMOKE), "--run.root", str(tmp_path), "--run.name", "x", *tags]) == 0
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = records(tmp_path / "x")
    text = json.dumps(found)
    assert [r["exit"].get("exit_code", 0) for r in found if r["type"] == "exit"] == [0]
    history = [r["history"].get("item", r["history"]) for r in found if r["type"] == "history"]
    assert sorted(item["trainer/global_step"] for item in history if "loss" in item) == [0, 1]
    (run,) = [r["run"] for r in found if r["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["tags"]) == ("g", "fit", ["a", "b"])
    assert "report._type" in text
    assert '"pruning.json"' in text, "the manifest, as an artifact"


def test_a_healthy_server_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with endpoint("dying") as url:  # it is well until a run was opened
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert not TrackedRun(RunSettings(wandb="online"), tmp_path / "x")._offline


@pytest.mark.parametrize("name", ["run", "seed 0, 7:8 (again)", "gr\u00f6\u00dfer"])
def test_any_name_of_a_run_makes_one_that_wandb_takes(name: str) -> None:
    assert wandb.Artifact(tracked_name(Path(name)), type="manifest").name.startswith(name[0])
