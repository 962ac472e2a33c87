"""The GPU measurements: without a GPU they say so and end well; at toy size they run on a CPU to the end.

What a command of ten minutes needs is here as well: cells that are kept as they come, failures that stay their own.
"""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.protocols import InputError

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("measure", "networks", "write_table"))


def load_measure() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_measure"] = module
    spec.loader.exec_module(module)
    return module


measure: Any = load_measure()
FOUND = {"arms": {"dense": {"median_ms": 2.0}, "2:4": {"median_ms": 1.0}}, "ratio": {"2:4": 0.5}}


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_without_a_gpu_it_says_so(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(script, monkeypatch) == 0
    assert capsys.readouterr().out.strip() == "skipped: no CUDA device"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_toy_runs_to_its_json(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, "--toy", "--repeats", "2") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cells"]
    assert all("failed" not in cell for cell in result["cells"])
    assert all(cell["arms"].keys() > {"dense"} for cell in result["cells"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_what_the_default_begins_first_fits_into_its_minutes(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[0]) <= 8
    names = [line.split("  ")[-1] for line in lines]
    assert len(set(names)) == len(names), "a name is the key that files are merged by"


def cells(*names: str, make: Callable[[], Any] = lambda: FOUND, minutes: float = 1.0) -> list[Any]:
    return [measure.Cell(name, {"batch": 1}, minutes, make, name.split()[-1]) for name in names]


def go(plan: list[Any], *options: str) -> int:
    found: int = measure.measure("x", lambda *_: plan, measure.parser("").parse_args(["--toy", *options]))
    return found


def kept(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "gpu_x.json").read_text())
    assert all(cell["run"] < len(content["runs"]) for cell in content["cells"])
    return {cell["name"]: cell for cell in content["cells"]}


def test_several_commands_fill_one_file_and_repeat_nothing(tmp_path: Path) -> None:
    plan, where = cells("a eager", "b eager", "b compiled"), ("--results", str(tmp_path))
    assert go(plan, *where, "--only", "a ") == 0
    assert list(kept(tmp_path)) == ["a eager"]
    assert go(plan, *where, "--modes", "eager") == 0
    assert list(kept(tmp_path)) == ["a eager", "b eager"]

    def never() -> None:
        raise AssertionError("is there already")

    assert go([*cells("a eager", make=never), *plan], *where) == 0
    assert list(kept(tmp_path)) == ["a eager", "b eager", "b compiled"]
    found = kept(tmp_path)["b eager"]
    assert {**found, "run": 0} == {"name": "b eager", "batch": 1, "mode": "eager", **FOUND, "run": 0}


def test_what_another_gpu_measured_is_measured_here(tmp_path: Path) -> None:
    plan, where = cells("a eager"), ("--results", str(tmp_path))
    go(plan, *where)
    content = json.loads((tmp_path / "gpu_x.json").read_text())
    content["runs"][0]["machine"]["gpu"] = "another"
    (tmp_path / "gpu_x.json").write_text(json.dumps(content))
    go(plan, *where)
    assert kept(tmp_path)["a eager"]["run"] == 1


def test_a_killed_command_keeps_what_it_had(tmp_path: Path) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    plan = [*cells("a eager"), *cells("b eager", make=killed)]
    with pytest.raises(KeyboardInterrupt):
        go(plan, "--results", str(tmp_path))
    assert list(kept(tmp_path)) == ["a eager"]


@pytest.mark.parametrize(
    "error", [InputError("x: still compiles"), torch.OutOfMemoryError(""), ValueError("odd\nmore")]
)
def test_a_failure_is_its_cell_s_own_and_is_tried_again(error: Exception, tmp_path: Path) -> None:
    def fails() -> None:
        raise error

    where = ("--results", str(tmp_path))
    assert go([*cells("a eager", make=fails), *cells("b eager")], *where) == 0
    reason = (str(error).splitlines() or [""])[0]
    assert kept(tmp_path)["a eager"]["failed"] == f"{type(error).__name__}: {reason}"
    assert kept(tmp_path)["b eager"]["ratio"] == {"2:4": 0.5}
    assert go(cells("a eager", make=fails), *where) == 1
    assert go(cells("a eager"), *where) == 0
    assert "failed" not in kept(tmp_path)["a eager"]


def test_no_cell_begins_that_would_end_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [*cells("long eager", minutes=9.0), *cells("short eager", minutes=0.5)]
    assert go(plan, "--results", str(tmp_path), "--minutes", "5") == 0
    assert list(kept(tmp_path)) == ["short eager"]
    assert "never begun without --minutes 9: long eager" in capsys.readouterr().out


def test_the_table_shows_every_cell_and_what_it_was_measured_with(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("a|b")

    def slow() -> Any:
        return measure.timed({"dense": lambda: None, "2:4": lambda: None}, 4) | {"saving_kept": {"2:4": 0.5}}

    go([*cells("a eager", make=slow), *cells("b eager", make=fails)], "--results", str(tmp_path))
    content = json.loads((tmp_path / "gpu_x.json").read_text())
    content["runs"][0]["machine"] |= {"gpu": "NVIDIA H200", "driver": "580"}
    (tmp_path / "gpu_x.json").write_text(json.dumps(content))
    lines = runpy.run_path(str(FOLDER / "write_table.py"))["markdown"](tmp_path).splitlines()
    assert lines[0] == "**x**"
    assert "NVIDIA H200, driver 580, torch" in lines[2]
    assert lines[-2].startswith("| a eager | 0 | dense ")
    assert lines[-2].endswith("| 2:4 0.500 |")
    assert lines[-1] == "| b eager | 0 | failed: ValueError: a/b | | |"
    assert runpy.run_path(str(FOLDER / "write_table.py"))["markdown"](tmp_path / "none") == ""


def test_savings_are_held_against_those_of_macs() -> None:
    found = measure.savings_kept({"slim": 0.6, "other": 0.9}, {"slim": 0.5, "dense": 1.0})
    assert found == {"slim": pytest.approx(0.8)}


def test_cells_of_other_commits_are_measured_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, names = ("--results", str(tmp_path), "--minutes", "1.5"), ("a eager", "b eager")
    monkeypatch.setattr(measure, "commit", lambda: "old")
    for _ in names:
        go(cells(*names), *where)
    monkeypatch.setattr(measure, "commit", lambda: "new")
    again = cells(*names, make=lambda: {**FOUND, "ratio": {"2:4": 0.7}})
    go(again, *where)
    assert {cell["ratio"]["2:4"] for cell in kept(tmp_path).values()} == {0.5}
    for _ in names:
        go(again, *where, "--again")
    assert {cell["ratio"]["2:4"] for cell in kept(tmp_path).values()} == {0.7}


@pytest.fixture
def _no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_no_graphs")
def test_eager_seconds_never_pass_for_compiled_ones() -> None:
    x = torch.ones(2)
    compiled = torch.compile(lambda value: value + 1, backend="eager", dynamic=False)
    found = measure.timed({"dense": lambda: compiled(x)}, 2, "compiled")
    assert found["graphs"] == {"dense": 1}
    with pytest.raises(InputError, match="torch compiled nothing of 2:4"):
        measure.timed({"dense": lambda: compiled(x[:1]), "2:4": lambda: x + 1}, 2, "compiled")


@torch._dynamo.config.patch(recompile_limit=8)  # which some libraries raise when they are imported
@pytest.mark.usefixtures("_no_graphs")
@pytest.mark.parametrize("forgets", [True, False])
def test_every_compiled_cell_starts_without_graphs(
    forgets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch keeps eight graphs of one function; of more cells the others would be eager, and are refused."""

    def add(value: torch.Tensor) -> torch.Tensor:
        return value + 1

    def made(size: int) -> Any:
        x, run = torch.ones(size), torch.compile(add, backend="eager", dynamic=False)
        return measure.timed({"dense": lambda: run(x)}, 2, "compiled")

    if not forgets:
        monkeypatch.setattr(measure, "forget", lambda: None)
    plan = [cell for size in range(2, 14) for cell in cells(f"{size} compiled", make=partial(made, size))]
    assert go(plan, "--results", str(tmp_path)) == 0
    assert forgets != any("failed" in cell for cell in kept(tmp_path).values())
