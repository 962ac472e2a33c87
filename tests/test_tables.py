"""The driver of the tables: rows are kept, runs that are there are not made again, pairs are found across runs."""

import dataclasses
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tables: Any = load("tables")
FACTS = {"device": "cpu", "minutes": 1.0, "command": "lightning_prune fit", "commit": "abc"}


def test_what_recalibration_would_hide_is_compared_without_it() -> None:
    mosaicdiff: Any = load("table_mosaicdiff")
    jobs = {job.name: job for job in mosaicdiff.jobs()}
    for name in ("fashion_dit-guidance-1.5-weighted-0", "fashion_dit-not-recalibrated-own-states-0.33-0"):
        assert any('recalibrate": false' in option for option in jobs[name].options if "recipe" in option)
        assert list(jobs[name].rows.values())[-1].startswith("not-recalibrated-")
    assert "not-recalibrated-guidance-1.5" in jobs["fashion_dit-guidance-1.5-0"].rows.values()
    assert "not-recalibrated" in jobs["fashion_dit-switches-0.33-0"].rows.values()
    names = [mosaicdiff._fewer_steps(target) for target in (0.2, 0.33, 0.5)]
    assert names == ["dense, 16 steps", "dense, 13 steps", "dense, 10 steps"]


def job(variant: str, seed: int = 0) -> Any:
    return tables.Job(variant, "fashion_dit", {"result": variant}, "2:4", seed, "x.yaml", minutes=30)


def report(value: float) -> dict[str, Any]:
    distance = {"value": value, "low": value - 1, "high": value + 1, "samples": 4, "protocol": "p"}
    row = {"name": "result", "fd_fashion": distance, "macs_per_image": 10, "macs_kept": 0.5, "convention": "aten"}
    drift = {"value": 0.1, "low": 0.0, "high": 0.2}
    pair = {"name": "result", "against": "dense", "mse": drift}
    return {"comparisons": [pair], "rows": [{**row, "name": "dense", "macs_per_image": 20, "macs_kept": 1.0}, row]}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def test_rows_are_on_disk_unique_and_as_the_schema_has_them(results: Path) -> None:
    table = tables.Table.read("method", "pattern")
    for value in (5.0, 6.0):
        table.add(job("ste"), report(value), {"result": torch.zeros(4)}, FACTS)
    (row,) = json.loads((results / "method.json").read_text())
    assert row["fd_fashion"]["value"] == 6
    assert (row["macs_per_image"], row["macs_per_image_dense"]) == (10, 20)
    assert row.keys() == {
        *(
            "schema",
            "network",
            "method",
            "variant",
            "target",
            "target_kind",
            "tier",
            "seed",
            "sample_seed",
            "fd_fashion",
        ),
        *("macs_per_image", "macs_per_image_dense", "convention", "device", "minutes", "command", "commit"),
        "drift_mse",
    }
    again = tables.Table.read("method", "pattern")
    assert again.has(job("ste"))
    assert not again.has(job("ste", seed=1))
    assert not again.has(job("asp"))


def test_rows_of_different_runs_are_paired_by_sample(results: Path) -> None:
    table = tables.Table.read("method", "pattern")
    influence = torch.tensor([0.0, 1.0, 2.0, 3.0])
    table.add(job("a"), report(5.0), {"result": influence}, FACTS)
    table.add(job("b"), report(7.0), {"result": influence + 1}, FACTS)
    a, b = tables.Table.read("method", "pattern").rows
    # Influences that differ by a constant leave no doubt about the difference, however wide each interval is.
    assert table.difference(b, a) == pytest.approx((2.0, 2.0, 2.0))
    assert table.difference(b, {**a, "sample_seed": 1}) is None


def found(variant: str, values: list[float], seed: int = 0) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """A job and what its run left: the distance is the mean of `values`, one a sample."""
    influence = torch.tensor(values, dtype=torch.float64)
    return job(variant, seed), report(float(influence.mean())), {"result": influence}


def test_differences_over_seeds_are_averaged_sample_by_sample(results: Path) -> None:
    """Noise that a sample has in both seeds with opposite signs is gone from the mean."""
    table = tables.Table.read("method", "pattern")
    for seed, noise in ((0, [1.0, -1.0, 2.0, -2.0]), (1, [-1.0, 1.0, -2.0, 2.0])):
        table.add(*found("ours", [4.0 + value for value in noise], seed), FACTS)
        table.add(*found("theirs", [3.0] * 4, seed), FACTS)
    pairs = [
        tuple(r for r in table.rows if (r["variant"], r["seed"]) == (v, s)) for s in (0, 1) for v in ("ours", "theirs")
    ]
    (a, b, c, d) = (one for (one,) in pairs)
    assert table.mean_difference([(a, b), (c, d)]) == pytest.approx((1.0, 1.0, 1.0))
    assert table.mean_difference([(a, b)])[2] > 2
    assert table.mean_difference([]) is None


def test_the_table_says_within_and_ahead_as_the_protocol_means_them(results: Path) -> None:
    verdicts: Any = load("verdicts")
    table = tables.Table.read("method", "pattern")
    scatter = [-0.02, 0.02, -0.02, 0.02]
    rows = {
        "dense": [10.0] * 4,
        "dense-fine-tuned": [10.0] * 4,
        "sparsedm-fixed": [10.4 + value for value in scatter],
        "sparsedm-progressive": [10.6 + value for value in scatter],
        "ste": [10.41 + value / 2 for value in scatter],
        "sparsedm-several-at-dense": [11.1] * 4,
    }
    for variant, values in rows.items():
        table.add(*found(variant, values), FACTS)
    # A second seed whose control was measured otherwise counts nowhere.
    other = report(10.0)
    other["rows"][1]["fd_fashion"]["protocol"] = "q"
    table.add(job("dense-fine-tuned", 1), other, {"result": torch.zeros(4)}, FACTS)
    table.add(*found("sparsedm-fixed", [30.0] * 4, 1), FACTS)
    table.add(*found("ste", [10.41] * 4, 1), FACTS)
    lines = verdicts.of_dense(table, ["sparsedm-fixed", "sparsedm-progressive"])
    assert "| sparsedm-fixed | 1 | 10.40 |" in lines[2]
    assert [line.rsplit("|", 2)[1].strip() for line in lines[2:]] == ["within", "not within"]
    (fixed, progressive) = verdicts.against_rivals(table)[2:]
    assert "| 9.79 [9.78, 9.80] (2) |" in fixed
    assert "| 0.19 [0.18, 0.20] (1) |" in progressive
    (chain,) = verdicts.chains(table)[2:]
    assert chain.endswith("| 0.20 [0.20, 0.20] (1) | one ratio |")
    (several,) = verdicts.several(table)[2:]
    assert several.endswith("| 11.0 | not within 10 % |")


def test_without_the_dense_row_nothing_is_said_within(results: Path) -> None:
    verdicts: Any = load("verdicts")
    table = tables.Table.read("method", "pattern")
    for variant in ("dense-fine-tuned", "ste", "calibrated-one-shot", "calibrated-one-shot-dense"):
        table.add(*found(variant, [10.0] * 4), FACTS)
    lines = verdicts.of_dense(table, ["ste", "calibrated-one-shot"])[2:]
    assert [line.rsplit("|", 2)[1].strip() for line in lines] == ["", "within"]


def test_what_trains_nothing_is_held_against_the_dense_network_of_its_run() -> None:
    sparsedm: Any = load("table_sparsedm")
    jobs = {one.name: one for one in sparsedm.jobs()}
    rows = jobs["fashion_dit-calibrated-one-shot-0"].rows
    assert rows == {"dense": "calibrated-one-shot-dense", "calibrated one-shot at 2:4": "calibrated-one-shot"}
    assert load("verdicts").control_of("calibrated-one-shot") == "calibrated-one-shot-dense"


def test_the_estimate_runs_nothing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tables.Table.read("method", "pattern")
    table.add(job("a"), report(5.0), {"result": torch.zeros(4)}, FACTS)
    jobs = [job("a"), job("b"), job("c")]
    assert tables.run_table(table, jobs, results / "README.md", str, ["--estimate"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 runs are missing, about 1.0 hours" in printed
    assert "a:" not in printed
    assert list(results.glob("runs")) == []


def test_a_job_reads_the_artifact_of_the_one_before(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(tables.subprocess, "run", run)
    second = dataclasses.replace(job("b"), options=("--weights={after}/artifact",), after="a")
    table = tables.Table.read("method", "pattern")
    assert tables.run_table(table, [second], results / "README.md", str, ["--runs", str(results / "runs")]) == 1
    assert f"--weights={results / 'runs' / 'a'}/artifact" in commands[0]


class Fits:
    """A stand-in for `lightning_prune fit`: every run leaves a report with the distance `value`.

    Runs in `fail` end badly. A run in `pair` goes on only when the other one of the pair has begun too.
    """

    def __init__(self, value: float = 5.0, fail: str = "", pair: str = "") -> None:
        self.value, self.fail, self.pair, self.ended = value, fail, pair, list[str]()
        self.running, self.most, self.one = 0, 0, threading.Lock()
        self.both = threading.Barrier(2)

    def __call__(self, command: list[str], **_: Any) -> Any:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")
        root, name = (Path(command[command.index(f"--run.{what}") + 1]) for what in ("root", "name"))
        with self.one:
            self.running += 1
            self.most = max(self.most, self.running)
        if name.name in self.pair:
            self.both.wait(timeout=60)
        with self.one:
            self.running -= 1
            self.ended.append(name.name)
        if name.name in self.fail:
            return subprocess.CompletedProcess(command, 1)
        (root / name).mkdir(parents=True)
        (root / name / "report.json").write_text(json.dumps(report(self.value)))
        (root / name / "metrics.csv").write_text("step\n")
        save_file({"result": torch.arange(4.0)}, root / name / "report-influence.safetensors")
        return subprocess.CompletedProcess(command, 0)


def go(results: Path, jobs: list[Any], *options: str) -> int:
    """A command on a table in `results`, whose runs are beside it."""
    arguments = ["--runs", str(results / "runs"), *options]
    table = tables.Table.read("method", "pattern")
    found: int = tables.run_table(table, jobs, results / "README.md", str, arguments)
    return found


def after(name: str, before: str) -> Any:
    return dataclasses.replace(job(name), after=before)


def test_runs_go_side_by_side_and_each_leaves_its_row(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fits(pair="ab")
    monkeypatch.setattr(tables.subprocess, "run", fits)
    jobs = [job(name) for name in "abcdef"]
    assert go(results, jobs, "--jobs", "2") == 0
    assert fits.most == 2
    assert [row["variant"] for row in json.loads((results / "method.json").read_text())] == list("abcdef")
    assert go(results, jobs, "--jobs", "2") == 0
    assert sorted(fits.ended) == list("abcdef"), "what is there is not run again"


def test_a_folder_of_another_command_is_not_taken_for_the_run(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = Fits()
    monkeypatch.setattr(tables.subprocess, "run", fits)
    monkeypatch.setattr(tables, "ROOT", results)
    config = results / "configs" / "x.yaml"
    config.parent.mkdir()
    config.write_text("model: 1")
    assert go(results, [job("a"), job("b")]) == 0
    (results / "method.json").unlink()
    config.write_text("model: 2")
    assert go(results, [job("a")]) == 1
    assert "a was made by another command or config; move it away" in capsys.readouterr().err
    config.write_text("model: 1")
    assert go(results, [dataclasses.replace(job("b"), options=("--x=1",))]) == 1
    (results / "runs" / "a.made-by").unlink()
    assert go(results, [job("a")]) == 1, "nobody knows what made it"
    assert fits.ended == ["a", "b"]
    assert go(results, [job("b")]) == 0
    assert [row["variant"] for row in json.loads((results / "method.json").read_text())] == ["b"]
    config.write_text("model: 2")
    assert go(results, [job("b"), after("c", "b")]) == 1
    assert fits.ended == ["a", "b"], "what would read the artifact of another command is not run"


@pytest.mark.parametrize("count", ["1", "4"])
def test_a_run_waits_for_the_one_it_reads(count: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fits()
    monkeypatch.setattr(tables.subprocess, "run", fits)
    assert go(results, [after("c", "b"), after("b", "a"), job("a"), job("d")], "--jobs", count) == 0
    assert [name for name in fits.ended if name != "d"] == ["a", "b", "c"]


def test_no_run_begins_late(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fits, clock = Fits(), itertools.count()
    monkeypatch.setattr(tables.subprocess, "run", fits)
    # Every look at the clock takes half a minute.
    monkeypatch.setattr(tables, "time", SimpleNamespace(monotonic=lambda: 30.0 * next(clock)))
    assert go(results, [job(name) for name in "abcd"], "--minutes", "2.1") == 0
    assert fits.ended == ["a", "b"]
    assert "2 runs were left out for --minutes" in capsys.readouterr().out


def test_what_reads_a_failed_run_is_not_begun(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = Fits(fail="a")
    monkeypatch.setattr(tables.subprocess, "run", fits)
    assert go(results, [job("a"), after("b", "a"), after("c", "b"), job("d")], "--jobs", "3") == 1
    assert sorted(fits.ended) == ["a", "d"]
    assert "failed: a, b, c" in capsys.readouterr().err


def test_a_run_that_is_read_is_made_where_only_its_row_is_there(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.subprocess, "run", Fits(5.0))
    assert go(results, [job("a")]) == 0
    shutil.rmtree(results / "runs")
    monkeypatch.setattr(tables.subprocess, "run", (fits := Fits(9.0)))
    assert go(results, [job("a"), after("b", "a")]) == 0
    assert fits.ended == ["a", "b"]
    values = {row["variant"]: row["fd_fashion"]["value"] for row in json.loads((results / "method.json").read_text())}
    assert values == {"a": 5.0, "b": 9.0}, "a row that is there stays"


def test_results_go_where_they_are_asked_to(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.subprocess, "run", Fits())
    elsewhere = results / "deep" / "elsewhere"
    assert go(results, [job("a")], "--results", str(elsewhere)) == 0
    assert {file.name for file in elsewhere.iterdir()} == {"method.json", "method-influence.safetensors"}
    assert not (results / "method.json").exists()


@pytest.mark.parametrize(("second", "verdict"), [(5.0, "0 is inside"), (6.5, "0 is outside")])
def test_a_row_repeated_on_another_device_is_held_against_the_first(
    second: float, verdict: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables.subprocess, "run", Fits(5.0))
    assert go(results, [job("a"), job("b")]) == 0
    before = (results / "method.json").read_text()
    monkeypatch.setattr(tables.subprocess, "run", (fits := Fits(second)))
    command = ("--repeat", "--device", "cuda", "--only", "a")
    assert go(results, [job("a"), job("b")], *command) == 0
    assert fits.ended == ["a"]
    assert (results / "method.json").read_text() == before
    (row,) = json.loads((results / "method-cuda.json").read_text())
    assert row["device"] == "cuda"
    assert row.keys() == json.loads(before)[0].keys()
    line = capsys.readouterr().out.splitlines()[-1]
    difference = second - 5
    assert f"cpu 5.00 [4.00, 6.00], cuda {second:.2f}" in line
    # Every sample has the same influence in both runs, so the interval has no width.
    assert line.endswith(f"paired difference {difference:.2f} [{difference:.2f}, {difference:.2f}], {verdict}")
    assert go(results, [job("a"), job("b")], *command) == 0
    assert fits.ended == ["a"], "what was repeated is only compared"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_the_card_holds_the_table_between_its_markers(results: Path) -> None:
    card = results / "README.md"
    card.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    tables.write_card(card, "| new |")
    tables.write_card(card, "| newer |")
    assert card.read_text() == "before\n<!-- table -->\n| newer |\n<!-- end of table -->\nafter\n"
    card.write_text("no markers")
    with pytest.raises(ValueError, match="has no <!-- table -->"):
        tables.write_card(card, "")


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("table_*.py")))
def test_jobs_of_every_table_name_configs_that_exist_and_rows_once(name: str) -> None:
    found = list(load(name).jobs())
    assert all((ROOT / "configs" / one.config).is_file() for one in found)
    assert len({one.name for one in found}) == len(found)
    keys = [
        (one.network, variant, one.target, one.seed, one.sample_seed) for one in found for variant in one.rows.values()
    ]
    assert len(set(keys)) == len(keys)
    order = [one.name for one in found]
    assert all(order.index(one.after) < order.index(one.name) for one in found if one.after is not None)
    core = sum(one.minutes for one in found if one.tier == "core")
    assert core <= 10.5 * 60, "a core table takes about ten hours of two cores"


def test_the_flip_rate_at_the_end_is_that_of_the_last_tenth(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,flip_rate\n" + "".join(f"{i},{i}\n{i},\n" for i in range(20)))
    assert tables.logged_flips(file) == {"flip_rate": 18.5, "mean_flip_rate": 9.5}
    file.write_text("step,loss\n1,2\n")
    assert tables.logged_flips(file) == {}
