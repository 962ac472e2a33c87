"""What the GPU measurements share: a device or a word why not, the facts of a run, where results go."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lightning_prune.metrics.latency import Arms, call_memory, interleaved_seconds
from lightning_prune.metrics.machine import machine, versions

RESULTS = Path(__file__).parents[1] / "results"
SKIPPED = "skipped: no CUDA device"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every measurement has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--toy", action="store_true", help="tiny shapes, on the CPU too; writes nothing")
    made.add_argument("--repeats", type=int, default=20, help="turns of every measurement")
    return made


def device_or_none(toy: bool) -> torch.device | None:
    """The device to measure on; None, and a word about it, where there is no GPU and toys were not asked for."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if toy:
        return torch.device("cpu")
    print(SKIPPED)
    return None


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_ms": 1e3 * statistics.median(seconds), "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def cell(arms: Arms, repeats: int, against: str = "dense") -> dict[str, Any]:
    """Every arm's milliseconds, and its median ratio to the arm `against` within turns; below 1 is faster."""
    seconds = interleaved_seconds(arms, repeats)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds[against], strict=True))
        for name, times in seconds.items()
        if name != against
    }
    return {"arms": {name: summary(times) for name, times in seconds.items()}, "ratio": ratios}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak beyond what is there before; None without CUDA, or if it fails."""
    try:
        return call_memory(call, device)
    except RuntimeError:
        return None


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell, or why there is none: out of memory or no kernel is a result as well."""
    try:
        return make()
    except (RuntimeError, NotImplementedError) as error:
        return {"failed": str(error).splitlines()[0]}


def write(name: str, device: torch.device, cells: Sequence[Mapping[str, Any]], toy: bool) -> int:
    """Print the result as one line of JSON and, unless it is a toy, keep it in `gpu_<name>.json`."""
    result = {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python {' '.join(sys.argv)}",
        "machine": machine(device),
        "versions": versions(),
        "cells": list(cells),
    }
    if device.type == "cuda" and not toy:
        (RESULTS / f"gpu_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0
