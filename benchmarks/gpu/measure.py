"""What the GPU measurements share: cells that are measured one by one and kept as they come, and facts of a run.

A script plans its cells, the most worthwhile first. Each is written when it is there, into the file that earlier
commands began, so what a command had no time for the next one goes on with. A cell that fails says why and no other
suffers.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import RESULTS, commit

from lightning_prune.files import written_whole
from lightning_prune.metrics.latency import Arms, call_memory, graphs_compiled, interleaved_seconds, warm_up
from lightning_prune.metrics.machine import machine, versions
from lightning_prune.protocols import InputError

SKIPPED = "skipped: no CUDA device"
MODES = ("eager", "compiled")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A measurement to be made.

    Attributes:
        name: no other cell of the script has it.
        about: what is measured, for the result.
        minutes: what it takes on an H200, a guess until it was seen there.
        make: measures.
        mode: "eager" or "compiled".
    """

    name: str
    about: Facts
    minutes: float
    make: Callable[[], Facts]
    mode: str = "eager"


Plan = Callable[[argparse.Namespace, torch.device], Iterable[Cell]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every measurement has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--toy", action="store_true", help="tiny shapes, on the CPU too; writes nothing by default")
    made.add_argument("--repeats", type=int, default=20, help="turns of every measurement; default 20")
    made.add_argument("--only", default="", metavar="TEXT", help="only cells whose name holds this text")
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default both")
    made.add_argument("--minutes", type=float, default=8.0, help="start no cell that would end later; default 8")
    made.add_argument("--results", type=Path, metavar="DIR", help="where gpu_<script>.json is; default: beside this")
    made.add_argument("--again", action="store_true", help="measure cells of other commits again")
    made.add_argument("--list", action="store_true", help="print the cells and their estimated minutes; run nothing")
    return made


def measure(script: str, plan: Plan, options: argparse.Namespace) -> int:
    """Make the cells of a plan that are missing, as far as time goes. Returns the exit status."""
    device = torch.device("cpu") if options.list else device_or_none(options.toy)
    if device is None:
        return 0
    began = time.monotonic()
    chosen = [cell for cell in plan(options, device) if options.only in cell.name and cell.mode in options.modes]
    if options.list:
        for cell in chosen:
            print(f"{cell.minutes:6.2f} minutes  {cell.name}")
        return 0
    folder = options.results or (None if options.toy else RESULTS)
    results = Results(folder and folder / f"gpu_{script}.json", facts(device))
    missing = [cell for cell in chosen if not results.has(cell.name, options.again)]
    late = []
    for cell in missing:
        if (time.monotonic() - began) / 60 + cell.minutes > options.minutes:
            late.append(cell)
            continue
        found = attempt(cell)
        print(f"{cell.name}: {shown(found)}", flush=True)
        results.add({"name": cell.name, **cell.about, "mode": cell.mode, **found})
    print(f"{len(chosen) - len(missing)} of {len(chosen)} cells were there, {len(results.made)} are new")
    if late:
        minutes = sum(cell.minutes for cell in late)
        print(f"left out for --minutes: {len(late)}, about {minutes:.0f} minutes; the same command goes on with them")
    for cell in late:
        if cell.minutes > options.minutes:
            print(f"never begun without --minutes {cell.minutes:g}: {cell.name}")
    print(json.dumps({"schema": 1, **results.run, "cells": results.made}))
    return 1 if results.made and all("failed" in cell for cell in results.made) else 0


def device_or_none(toy: bool) -> torch.device | None:
    """The device to measure on; None, and a word about it, where there is no GPU and toys were not asked for."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if toy:
        return torch.device("cpu")
    print(SKIPPED)
    return None


@dataclass
class Results:
    """The cells of one script in their file: `runs` are commands with their machine, a cell names its own by number.

    Attributes:
        file: None keeps nothing.
        run: facts of this command.
        made: cells of this command.
    """

    file: Path | None
    run: Facts
    made: list[Facts] = field(default_factory=list)

    def __post_init__(self) -> None:
        there = self.file is not None and self.file.exists()
        content = json.loads(self.file.read_text()) if self.file and there else {"runs": [], "cells": []}
        self.runs: list[Facts] = content["runs"]
        self.cells: dict[str, Facts] = {cell["name"]: cell for cell in content["cells"]}

    def has(self, name: str, by_this_code: bool = False) -> bool:
        """Whether a cell was measured on this kind of GPU and this torch. What failed is tried again."""
        known = self.cells.get(name)
        if known is None or "failed" in known:
            return False
        made = self.runs[known["run"]]
        return _kind(made) == _kind(self.run) and (not by_this_code or made.get("commit") == self.run["commit"])

    def add(self, cell: Facts) -> None:
        """Take a cell and write the file, whole or not at all."""
        self.made.append(cell)
        if self.run not in self.runs:
            self.runs.append(self.run)
        self.cells[cell["name"]] = {**cell, "run": self.runs.index(self.run)}
        if self.file is None:
            return
        content = {"schema": 1, "runs": self.runs, "cells": list(self.cells.values())}
        with written_whole(self.file) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")


def _kind(run: Facts) -> tuple[Any, Any]:
    return run["machine"]["gpu"], run["versions"]["torch"]


def facts(device: torch.device) -> Facts:
    """When, by which command and with what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {**machine(device), "driver": driver() if device.type == "cuda" else None},
        "versions": versions(),
        "commit": commit(),
    }


def driver() -> str | None:
    """Version of the GPU's driver, where a program tells."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def attempt(cell: Cell) -> Facts:
    """What a cell measures, or why there is nothing: out of memory or no kernel is a result as well."""
    try:
        found = cell.make()
    # Kernels, drivers and compilers raise what they like; a script of many cells outlives all of it.
    except Exception as error:
        lines = str(error).splitlines() or [""]
        found = {"failed": f"{type(error).__name__}: {lines[0]}"}
    if cell.mode == "compiled" or "failed" in found:
        forget()
    return found


def forget() -> None:
    """Drop compiled graphs, of which torch keeps few for one function before it quietly runs it eagerly, and memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(arms: Arms, repeats: int, mode: str = "eager", against: str = "dense", calls: int = 1) -> Facts:
    """Every arm's milliseconds, and its median ratio to the arm `against` within turns; below 1 is faster.

    Args:
        arms: what is timed; each makes `calls` calls.
        repeats: turns.
        mode: "compiled" arms have to compile, or it would be eager ones that are timed.
        against: the arm that others are held against.
        calls: by which milliseconds are divided.

    Raises:
        InputError: an arm that compiles nothing though it should.
    """
    graphs = {name: _graphs(name, call) for name, call in arms.items()} if mode == "compiled" else {}
    if eager := [name for name, count in graphs.items() if not count]:
        raise InputError(f"compiled: torch compiled nothing of {', '.join(eager)}")
    seconds = interleaved_seconds(arms, repeats)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds[against], strict=True))
        for name, times in seconds.items()
        if name != against
    }
    shown = {name: summary([one / calls for one in times]) for name, times in seconds.items()}
    return {"arms": shown, "ratio": ratios, **({"graphs": graphs} if graphs else {})}


def savings_kept(ratio: Mapping[str, float], macs_kept: Mapping[str, float]) -> dict[str, float]:
    """Share of what an arm saves in MACs that it saves in time, too; the target is 0.9."""
    return {name: (1 - ratio[name]) / (1 - kept) for name, kept in macs_kept.items() if name in ratio and kept < 1}


def _graphs(name: str, call: Callable[[], object]) -> int:
    before = graphs_compiled()
    warm_up({name: call})
    return graphs_compiled() - before


def once(call: Callable[[], object], device: torch.device) -> Facts:
    """Seconds and peak memory of one cold call, for what takes too long to be repeated."""
    began = time.perf_counter()
    peak = call_memory(call, device)  # waits for the device
    if device.type != "cuda":
        call()
    return {**summary([time.perf_counter() - began]), "peak_bytes": peak}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds; of a single turn all are the same."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * list(seconds)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "turns": len(seconds),
    }


def shown(found: Facts) -> str:
    """A cell in a line."""
    if "failed" in found:
        return f"failed: {found['failed']}"
    times = (f"{name} {arm['median_ms']:.4g} ms" for name, arm in found["arms"].items())
    ratios = (f"{name} {value:.3f} of dense" for name, value in found["ratio"].items())
    return ", ".join([*times, *ratios])
