"""The table of what was measured on GPUs: from `gpu_*.json` into `benchmarks/README.md`, between its markers.

    python benchmarks/gpu/write_table.py

A line for every cell: what was timed, medians with quartiles, the ratio to dense, the share of the MACs' saving that is
kept; above them GPU, driver, torch, date and command of every run. Cells that lose or failed stand there like others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import RESULTS, write_card

CARD = RESULTS.parent / "README.md"
Facts = dict[str, Any]


def markdown(folder: Path) -> str:
    """The runs and cells of every results file in a folder; nothing where there is none."""
    return "\n\n".join(
        "\n".join(_script(file.stem.removeprefix("gpu_"), json.loads(file.read_text())))
        for file in sorted(folder.glob("gpu_*.json"))
    )


def _script(name: str, content: Facts) -> Iterator[str]:
    yield f"**{name}**"
    yield ""
    for number, run in enumerate(content["runs"]):
        machine = run["machine"]
        about = f"{machine['gpu']}, driver {machine['driver']}, torch {run['versions']['torch']}, {run['date'][:10]}"
        yield f"* run {number}: {about}, {run.get('commit', 'unknown')}: `{run['command']}`"
    yield ""
    yield "| cell | run | ms, median [quartiles] | ratio to dense | saving kept |"
    yield "|---|---|---|---|---|"
    yield from (_line(cell) for cell in content["cells"])


def _line(cell: Facts) -> str:
    if "failed" in cell:
        return f"| {cell['name']} | {cell['run']} | failed: {cell['failed'].replace('|', '/')} | | |"
    times = "; ".join(f"{arm} {_milliseconds(found)}" for arm, found in cell["arms"].items())
    ratios, kept = (_values(cell.get(key, {})) for key in ("ratio", "saving_kept"))
    return f"| {cell['name']} | {cell['run']} | {times} | {ratios} | {kept} |"


def _milliseconds(found: dict[str, Any]) -> str:
    return f"{found['median_ms']:.4g} [{found['low_ms']:.4g}, {found['high_ms']:.4g}]"


def _values(named: dict[str, float]) -> str:
    return "; ".join(f"{name} {value:.3f}" for name, value in named.items())


if __name__ == "__main__":
    write_card(CARD, markdown(RESULTS))
