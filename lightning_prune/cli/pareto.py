"""`lightning_prune pareto`: the results of many runs in one table, and which of them no other beats in both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_prune.export.report import metric_of
from lightning_prune.files import written_whole
from lightning_prune.protocols import InputError


@dataclass(frozen=True)
class Point:
    """The result of one run.

    Attributes:
        run: name of the run folder.
        name: name of the row.
        distance: Frechet distance.
        low: lower end of its 95 % interval.
        high: upper end.
        macs_kept: fraction of the dense network's MACs that an image costs.
    """

    run: str
    name: str
    distance: float
    low: float
    high: float
    macs_kept: float


def run(args: Sequence[str]) -> int:
    """Parse `args`, print the table and write it as JSON where asked. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lightning_prune pareto", description=__doc__, exit_on_error=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(list(args))
    metric, points = read(options.runs)
    best = front(points)
    _print(metric, points, best)
    if options.output:
        rows = [{**vars(point), "on_front": point in best} for point in points]
        with written_whole(options.output) as partial:
            partial.write_text(json.dumps({"schema": 1, "metric": metric, "rows": rows}, indent=1) + "\n")
    return 0


def read(folders: Iterable[Path]) -> tuple[str, list[Point]]:
    """The metric and the results of all runs in `folders`, the cheapest first.

    Raises:
        InputError: a folder without a report, or reports of several protocols, which no table may mix.
    """
    reports = {file: _load(file) for folder in folders for file in _reports(folder)}
    protocols = {protocol: file for file, report in reports.items() for protocol in report["protocols"]}
    if len(protocols) > 1:
        (one, first), (other, second), *_ = protocols.items()
        raise InputError(f"pareto: {first} is of protocol {one}, {second} of {other}: no table may mix them")
    metric = metric_of(next(iter(reports.values())))
    points = [_point(file.parent.name, report["rows"][-1], metric) for file, report in reports.items()]
    return metric, sorted(points, key=lambda point: (point.macs_kept, point.distance))


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other is at least as good as in cost and distance, and better in one."""

    def beaten(point: Point) -> bool:
        return any(
            (other.macs_kept, other.distance) != (point.macs_kept, point.distance)
            and other.macs_kept <= point.macs_kept
            and other.distance <= point.distance
            for other in points
        )

    return [point for point in points if not beaten(point)]


def _reports(folder: Path) -> list[Path]:
    found = [folder / "report.json"] if (folder / "report.json").exists() else sorted(folder.glob("*/report.json"))
    if not found:
        raise InputError(f"pareto: {folder}: neither holds a report.json nor folders with one")
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        report["protocols"], report["rows"][-1]["macs_kept"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"pareto: {file}: cannot be read as a report") from error
    return report


def _point(run: str, row: dict[str, Any], metric: str) -> Point:
    distance = row[metric]
    return Point(run, row["name"], distance["value"], distance["low"], distance["high"], row["macs_kept"])


def _print(metric: str, points: Sequence[Point], best: Sequence[Point]) -> None:
    table = Table(title="* no other run is cheaper and at least as good, or as cheap and better")
    for heading in ("", "run", "result", f"{metric} (95 %)", "MACs kept"):
        table.add_column(heading)
    for point in points:
        distance = f"{point.distance:.3f} [{point.low:.3f}, {point.high:.3f}]"
        table.add_row("*" if point in best else "", point.run, point.name, distance, f"{100 * point.macs_kept:.1f} %")
    Console().print(table)
