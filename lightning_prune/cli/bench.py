"""`lightning_prune bench`: time an artifact against the dense network, in turns, at the shapes and types it runs at."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from lightning_prune.cli import bench_text
from lightning_prune.cli.bench_networks import DTYPES, Pair, Task, load_pair
from lightning_prune.diffusion.solvers import Deterministic
from lightning_prune.metrics.latency import (
    INTERVAL,
    Timing,
    call_memory,
    fewest_turns,
    graphs_compiled,
    interleaved_seconds,
    paired_ratio,
)
from lightning_prune.metrics.machine import machine, versions
from lightning_prune.protocols import InputError

SCHEMA = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(args: Sequence[str]) -> int:
    """Parse `args`, measure, print and store the result. Returns the exit status."""
    options = parse(args)
    device = usable_device(options.device, options.dtype)
    # Before any work of our own, so that the load average is that of others.
    facts = {"machine": machine(device), "versions": versions()}
    pair = load_pair(options.artifact, options.against, options.subfolder)
    task = Task(pair.process(), options.steps, options.guidance, options.sampler)
    result = {
        "schema": SCHEMA,
        "command": shlex.join(["lightning_prune", "bench", *args]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        **pair.describe(),
        "task": task.describe(),
        "macs": pair.macs(task),
        "repeats": options.repeats,
        "interval": INTERVAL,
        "cells": [],
    }
    print(bench_text.head(result), flush=True)
    for cell in measured_cells(pair, task, device, options):
        result["cells"].append(cell)
        print(bench_text.line(cell, result["macs"]), flush=True)
    print(bench_text.notes(result))
    if options.json:
        write(result, options.json)
    return 0


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The options, checked as far as that goes without loading anything."""
    parser = _Parser(prog="lightning_prune bench", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--artifact", required=True, type=Path, metavar="FOLDER", help="the pruned network: runs/<name>/artifact")
    against = "the dense network: a diffusers folder, a hub id or embedded:<name>; default: the base in the manifest"
    add("--against", metavar="WHERE", help=against)
    add("--subfolder", help="component of --against where that is a pipeline, for example transformer")
    add("--batch", nargs="+", type=int, default=[1, 8, 64], metavar="B", help="images at once; default 1 8 64")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="default float32")
    add("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"], help="default eager")
    add("--device", default="cpu", help="cpu, cuda or cuda:<index>; default cpu")
    add("--repeats", type=int, default=20, metavar="N", help="turns of every measurement; default 20")
    add("--steps", type=int, metavar="N", help="time a whole trajectory of N steps; default: one network call")
    add("--sampler", choices=get_args(Deterministic), help="its solver; default ddim, or flow-euler for a flow")
    add("--guidance", type=float, metavar="W", help="guidance scale of the trajectory; default 1, none")
    add("--json", type=Path, metavar="FILE", help="file to write the result to; must not exist")
    options = parser.parse_args(list(args))
    for several in ("batch", "dtype", "modes"):
        setattr(options, several, list(dict.fromkeys(getattr(options, several))))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if min(options.batch) < 1:
        raise InputError(f"--batch: {min(options.batch)} images; at least 1")
    cells, turns = _count(options), options.repeats
    if turns < fewest_turns(cells):
        raise InputError(f"--repeats: {turns} give no 95 % interval for {cells} cells; at least {fewest_turns(cells)}")
    for option in ("guidance", "sampler"):
        if getattr(options, option) is not None and options.steps is None:
            raise InputError(f"--{option}: one network call has none; give --steps for a whole trajectory")
    if options.json and options.json.exists():
        raise InputError(f"--json: {options.json} exists already")
    if options.json and not options.json.parent.is_dir():
        raise InputError(f"--json: {options.json.parent} is no folder")


def _count(options: argparse.Namespace) -> int:
    """Cells of the table."""
    return len(options.batch) * len(options.dtype) * len(options.modes)


def usable_device(name: str, dtypes: Sequence[str]) -> torch.device:
    """The device of that name, made the current one.

    Raises:
        InputError: no such device here, one whose seconds and memory nobody reads here, or a type it lacks.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: {name!r} is no device") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"--device: {name}: only cpu and cuda can be timed")
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name}: torch sees {torch.cuda.device_count()} such GPUs here")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    if "bfloat16" in dtypes and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has no such arithmetic")
    return device


def measured_cells(
    pair: Pair, task: Task, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A cell for every batch size, type and mode; those of one batch size and type are measured in turns."""
    for dtype in options.dtype:
        with _explained(device, dtype, "both networks together do"):
            placed = pair.placed(device, DTYPES[dtype])
        for batch in options.batch:
            with _explained(device, dtype, f"--batch {batch} does"):
                yield from _cells(placed, task, batch, dtype, options)


def _cells(pair: Pair, task: Task, batch: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    modes: list[str] = options.modes
    if "compiled" in modes:
        # Torch keeps few graphs of one function and then quietly runs it eagerly; every cell starts with none.
        torch.compiler.reset()
    before = graphs_compiled()
    arms = {f"{mode} {n}": task.arm(net, mode, batch) for mode in modes for n, net in pair.networks().items()}
    seconds = interleaved_seconds(arms, options.repeats, warm_up_calls=1 if task.steps else 3)
    graphs = graphs_compiled() - before
    if "compiled" in modes and graphs == 0:
        raise InputError("--modes compiled: torch compiled nothing here; is TORCHDYNAMO_DISABLE set?")
    memory = {key: call_memory(arm, pair.device) for key, arm in arms.items()}
    timings = {key: Timing(tuple(values)) for key, values in seconds.items()}
    return [
        {
            "batch": batch,
            "dtype": dtype,
            "mode": mode,
            **compared(timings[f"{mode} dense"], timings[f"{mode} pruned"], batch, _count(options)),
            "graphs": graphs if mode == "compiled" else None,
            "sparse_layers": pair.sparse,
            "peak_memory_bytes": {n: _sum(pair.bytes(n), memory[f"{mode} {n}"]) for n in pair.networks()},
        }
        for mode in modes
    ]


def _sum(weights: int, call: int | None) -> int | None:
    return None if call is None else weights + call


def compared(dense: Timing, pruned: Timing, batch: int, cells: int) -> dict[str, Any]:
    """Both networks' seconds, their ratio as one of so many in the table, and what may be said of it."""
    ratio = paired_ratio(pruned, dense, cells)
    return {
        "dense": _row(dense, batch),
        "pruned": _row(pruned, batch),
        "seconds_ratio": asdict(ratio),
        "verdict": ratio.verdict,
    }


def _row(timing: Timing, batch: int) -> dict[str, Any]:
    return {
        "median_seconds": timing.median,
        "quartiles": list(timing.quartiles),
        "images_per_second": batch / timing.median,
        "seconds": list(timing.seconds),
    }


@contextmanager
def _explained(device: torch.device, dtype: str, what: str) -> Iterator[None]:
    """Turn what a machine cannot do into one line that names the option."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"--device {device}: {what} not fit into its memory in {dtype}") from error
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, TorchDynamoException):
            raise InputError(f"--modes compiled: torch cannot compile this network here: {first}") from error
        if "not implemented for" in first:
            raise InputError(f"--dtype {dtype}: {device} cannot compute in it: {first}") from error
        raise


def write(result: Mapping[str, Any], file: Path) -> None:
    """Write the result, whole or not at all."""
    partial = file.with_name(f".{file.name}-partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.rename(file)
