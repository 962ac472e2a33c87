"""`pareto`: the front over reports of many runs; protocols do not mix."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.cli.pareto import Point, front


def report(root: Path, name: str, distance: float, kept: float, protocol: str = "p") -> Path:
    interval = {"value": distance, "low": distance - 1, "high": distance + 1, "samples": 10, "protocol": protocol}
    rows = [{"name": "dense", "fd_fashion": interval, "macs_kept": 1.0},
            {"name": name, "fd_fashion": interval, "macs_kept": kept}]  # fmt: skip
    (root / name).mkdir(parents=True)
    (root / name / "report.json").write_text(json.dumps({"schema": 1, "protocols": {protocol: {}}, "rows": rows}))
    return root / name


def test_the_table_marks_what_nothing_beats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for name, distance, kept in [("cheap", 9, 0.3), ("middle", 6, 0.5), ("worse", 7, 0.5), ("best", 4, 0.9)]:
        report(runs, name, distance, kept)
    assert main(["pareto", str(runs), "--output", str(tmp_path / "front.json")]) == 0
    rows = json.loads((tmp_path / "front.json").read_text())["rows"]
    assert [(row["run"], row["on_front"]) for row in rows] == [
        ("cheap", True), ("middle", True), ("worse", False), ("best", True),
    ]  # fmt: skip
    assert "6.000 [5.000, 7.000]" in capsys.readouterr().out


def test_the_front_is_what_pairwise_comparison_leaves() -> None:
    draw = random.Random(0)
    points = [Point(str(i), "", draw.randint(1, 6), 0, 0, draw.randint(1, 6)) for i in range(40)]
    best = front(points)
    assert best
    for point in points:
        beaten = [
            o for o in points
            if o.macs_kept <= point.macs_kept and o.distance <= point.distance
            and (o.macs_kept < point.macs_kept or o.distance < point.distance)
        ]  # fmt: skip
        assert (point in best) == (not beaten)


def test_protocols_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [report(tmp_path, "a", 1, 1), report(tmp_path, "b", 1, 1, protocol="q")]
    assert main(["pareto", *map(str, runs)]) == 2
    assert "no table may mix" in capsys.readouterr().err


def test_no_report_and_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pareto", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (report(tmp_path, "a", 1, 1) / "report.json").write_text("{}")
    assert main(["pareto", str(tmp_path)]) == 2
    assert "a/report.json" in capsys.readouterr().err
