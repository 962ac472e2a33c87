"""What the tables of all methods share: runs that are missing are made, each leaves rows, rows make the README's table.

A job is one `lightning_prune fit`; every row of its report that the job names becomes a row of the results file. Rows
are unique by (network, variant, target, seed, sample_seed), so an interrupted table goes on where it stopped, whatever
the device; rows repeated on another one have a file of their own. Beside
`<method>.json` lies `<method>-influence.safetensors`: each sample's influence on each row's distance, which pairs rows
of different runs that were drawn from equal seeds.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from records import RESULTS, ROOT, commit, write_card

# Seconds of a run beside others mean nothing, so the report, the last callback of a config, times one image alone.
UNTIMED = ("--trainer.callbacks.init_args.timed_images=1", "--trainer.callbacks.init_args.timed_repeats=1")
KEY = ("network", "variant", "target", "seed", "sample_seed")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run and the rows it leaves.

    Attributes:
        name: name of its run folder.
        network: "fashion_dit" or "fashion_unet".
        rows: variant by the name of the row in the report; the same network under two names is two rows.
        target: what the variants aim at, as the results file writes it.
        seed: seed of the run.
        config: file below `configs/`.
        options: further command-line options; "{after}" in them is the run folder of the job in `after`.
        tier: "core" or "extension".
        minutes: what it takes on two CPU cores, for `--estimate`.
        after: job that must have been run before, because its artifact is read.
        target_kind: what `target` is, where it is not what the table's targets are.
    """

    name: str
    network: str
    rows: dict[str, str]
    target: str
    seed: int
    config: str
    options: tuple[str, ...] = ()
    tier: str = "core"
    minutes: float = 0.0
    after: str | None = None
    sample_seed: int = 0
    target_kind: str | None = None


@dataclass
class Table:
    """The rows of one method's table, on disk after every job.

    Attributes:
        method: name of the results file.
        target_kind: what targets are: "pattern", "macs_kept" or "macs_removed".
        folder: where the results file is; None is `RESULTS`.
        device: of rows that repeat the table's and have a file of their own, `<method>-<device>.json`.
    """

    method: str
    target_kind: str
    folder: Path | None = None
    device: str | None = None
    rows: list[Row] = field(default_factory=list)
    influence: dict[str, Tensor] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self._named(".json")

    @property
    def influence_file(self) -> Path:
        return self._named("-influence.safetensors")

    def _named(self, rest: str) -> Path:
        return (self.folder or RESULTS) / f"{self.method}{f'-{self.device}' if self.device else ''}{rest}"

    @classmethod
    def read(cls, method: str, target_kind: str, folder: Path | None = None, device: str | None = None) -> Table:
        """The table as far as it was made."""
        table = cls(method, target_kind, folder, device)
        if table.file.exists():
            table.rows = json.loads(table.file.read_text())
        if table.influence_file.exists():
            table.influence = load_file(table.influence_file)
        return table

    def has(self, job: Job) -> bool:
        """Whether every row of a job is there."""
        return len(self.of(job)) == len(job.rows)

    def of(self, job: Job) -> list[Row]:
        """The rows of a job that are there."""
        wanted = {_key(_identity(job, variant)) for variant in job.rows.values()}
        return [row for row in self.rows if _key(row) in wanted]

    def add(self, job: Job, report: Row, influence: dict[str, Tensor], facts: Row, again: bool = False) -> None:
        """Take the rows of a finished run and write the table; `again` keeps the minutes of rows that are there."""
        by_name = {row["name"]: row for row in report["rows"]}
        first = report["rows"][0]
        dense = round(first["macs_per_image"] / first["macs_kept"])
        for name, variant in job.rows.items():
            row = self._row(job, variant, by_name[name], dense) | _drift(report, name) | facts
            if known := [old for old in self.rows if _key(old) == _key(row) and again]:
                row |= {"minutes": known[0]["minutes"]}
            self.rows = [old for old in self.rows if _key(old) != _key(row)] + [row]
            self.influence[_text(row)] = influence[name]
        self.rows.sort(key=lambda row: str(_key(row)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.influence_file, lambda file: save_file(self.influence, file))
        _replace(self.file, lambda file: file.write_text(json.dumps(self.rows, indent=1) + "\n"))

    def _row(self, job: Job, variant: str, found: Row, dense: int) -> Row:
        return {
            "schema": 1,
            **_identity(job, variant),
            "method": self.method,
            "target_kind": job.target_kind or self.target_kind,
            "tier": job.tier,
            "fd_fashion": found["fd_fashion"],
            "macs_per_image": found["macs_per_image"],
            "macs_per_image_dense": dense,
            "convention": found["convention"],
        }

    def difference(self, row: Row, against: Row, other: Table | None = None) -> tuple[float, float, float] | None:
        """Paired difference of two rows of equal sample seeds with its 95 % interval; None where nothing pairs them.

        `against` is a row of `other`, where that is another table.
        """
        a, b = self.influence.get(_text(row)), (other or self).influence.get(_text(against))
        if a is None or b is None or len(a) != len(b) or row["sample_seed"] != against["sample_seed"]:
            return None
        if row["fd_fashion"]["protocol"] != against["fd_fashion"]["protocol"]:
            return None
        value = row["fd_fashion"]["value"] - against["fd_fashion"]["value"]
        margin = 1.96 * float((a - b).double().std()) / math.sqrt(len(a))
        return value, value - margin, value + margin

    def mean_difference(self, pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float, float] | None:
        """Mean of the paired differences of rows drawn from equal noise, with its 95 % interval over samples."""
        pairs = [(row, against) for row, against in pairs if self.difference(row, against) is not None]
        if not pairs:
            return None
        values = [row["fd_fashion"]["value"] - against["fd_fashion"]["value"] for row, against in pairs]
        influence = [self.influence[_text(row)] - self.influence[_text(against)] for row, against in pairs]
        apart = torch.stack(influence).double().mean(dim=0)
        value, margin = sum(values) / len(values), 1.96 * float(apart.std()) / math.sqrt(len(apart))
        return value, value - margin, value + margin


def _drift(report: Row, name: str) -> Row:
    """How far a row's images are from the dense network's, a mean squared difference, where the report has both."""
    pairs = [c for c in report["comparisons"] if (c["name"], c["against"]) == (name, "dense") and "mse" in c]
    return {"drift_mse": pairs[0]["mse"]} if pairs else {}


def _identity(job: Job, variant: str) -> Row:
    return {
        "network": job.network,
        "variant": variant,
        "target": job.target,
        "seed": job.seed,
        "sample_seed": job.sample_seed,
    }


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _text(row: Row) -> str:
    return " | ".join(map(str, _key(row)))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    partial = file.with_name(f".{file.name}-partial")
    write(partial)
    partial.replace(file)


def run_table(
    table: Table, jobs: Sequence[Job], card: Path, markdown: Callable[[Table], str], args: Sequence[str] | None = None
) -> int:
    """The command line of a table: run what is missing, or with `--estimate` say what that would take.

    `markdown` makes the table that stands in `card` between `<!-- table -->` and `<!-- end of table -->`.
    """
    options = _options(table.method, card, args)
    if options.results:
        table = Table.read(table.method, table.target_kind, options.results)
    if options.write_card:
        write_card(card, markdown(table))
        return 0
    chosen = [job for job in jobs if options.tier in (None, job.tier) and (options.only or "") in job.name]
    filled, runs = table, options.runs
    if options.repeat:
        # Runs of their own: the folders of the first time hold what is to be repeated.
        filled = Table.read(table.method, table.target_kind, table.folder, options.device)
        runs = runs / f"repeated-{options.device}"
    missing = [job for job in chosen if not filled.has(job)]
    hours = sum(job.minutes for job in missing) / 60
    print(f"{len(missing)} of {len(chosen)} runs are missing, about {hours:.1f} hours of two CPU cores", flush=True)
    if options.estimate:
        for job in missing:
            print(f"  {job.name}: {', '.join(job.rows.values())} ({job.tier}, {job.minutes:g} minutes)")
        return 0
    until = time.monotonic() + 60 * options.minutes
    machine = Machine(runs, options.device, options.jobs, until)
    failed = run_jobs(filled, with_those_before(missing, jobs, machine), machine)
    if options.repeat:
        print("\n".join(repeated(table, filled, chosen)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _options(method: str, card: Path, args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Rows of benchmarks/results/{method}.json.")
    parser.add_argument("--estimate", action="store_true", help="print the missing rows and their hours; run nothing")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tier", choices=["core", "extension"], help="only rows of one tier")
    parser.add_argument("--only", help="only jobs whose name holds this text")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="where run folders go")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"where {method}.json is read and written")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side; their output goes to logs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later than that; default: no end")
    repeat = f"make rows again, into {method}-<device>.json, and say whether they agree with the table's"
    parser.add_argument("--repeat", action="store_true", help=repeat)
    parser.add_argument("--write-card", action="store_true", help=f"write the table into {card.name}; run nothing")
    options = parser.parse_args(args)
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} runs; at least 1")
    return options


@dataclass(frozen=True)
class Machine:
    """Where runs are made: their folders, "cpu" or "cuda", how many at a time, and until when one may begin."""

    runs: Path
    device: str
    jobs: int = 1
    until: float = math.inf


def with_those_before(missing: Sequence[Job], jobs: Sequence[Job], machine: Machine) -> list[Job]:
    """The missing jobs, each after the one whose artifact it reads, where that one's run is not there as it is now."""
    by_name, found = {job.name: job for job in jobs}, dict[str, Job]()

    def take(job: Job) -> None:
        before = by_name.get(job.after or "")
        done = before is not None and (machine.runs / before.name / "report.json").exists()
        if before is not None and not (done and _is_of(before, machine)):
            take(before)
        found[job.name] = job

    for job in missing:
        take(job)
    return list(found.values())


def run_jobs(table: Table, jobs: Sequence[Job], machine: Machine) -> list[str]:
    """Run jobs, some at a time, and take their rows one after the other; names of those that did not end well."""
    waiting, running, failed = list(jobs), dict[Future[float | None], Job](), list[str]()
    with ThreadPoolExecutor(machine.jobs) as pool:
        while waiting or running:
            if waiting and time.monotonic() > machine.until:
                print(f"{len(waiting)} runs were left out for --minutes; the same command goes on with them")
                waiting.clear()
            unfinished = {job.name for job in [*waiting, *running.values()]}
            ready = [job for job in waiting if job.after not in unfinished]
            for job in ready[: machine.jobs - len(running)]:
                waiting.remove(job)
                if job.after in failed:
                    failed.append(job.name)
                else:
                    running[pool.submit(_run, job, machine)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                minutes = future.result()
                if minutes is None:
                    failed.append(job.name)
                elif not table.has(job):  # else it was run for its artifact
                    _take(table, job, machine, minutes)
    return failed


def _run(job: Job, machine: Machine) -> float | None:
    """Run a job, resuming it if it was interrupted. Minutes; 0 if it was there, None if it did not end well."""
    folder, began = machine.runs / job.name, time.monotonic()
    if folder.exists() and not _is_of(job, machine):
        print(f"{job.name}: {folder} was made by another command or config; move it away", file=sys.stderr, flush=True)
        return None
    if (folder / "report.json").exists():
        return 0.0
    print(f"== {job.name}", flush=True)
    machine.runs.mkdir(parents=True, exist_ok=True)
    _note(job, machine).write_text(_origin(job, machine))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    resumed = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
    command = [sys.executable, "-m", "lightning_prune", *_command(job, machine), *resumed]
    if machine.jobs == 1:
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    else:
        log = machine.runs / f"{job.name}.log"
        # Runs that all took every core would wait for each other.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // machine.jobs))}
        with log.open("a") as stream:
            status = subprocess.run(
                command, cwd=ROOT, check=False, stdout=stream, stderr=subprocess.STDOUT, env=threads | dict(os.environ)
            ).returncode
        if status != 0:
            print(f"{job.name}: ended with {status}, see {log}", file=sys.stderr, flush=True)
    return (time.monotonic() - began) / 60 if status == 0 else None


def _note(job: Job, machine: Machine) -> Path:
    """What says, beside a run folder, how it was made."""
    return machine.runs / f"{job.name}.made-by"


def _origin(job: Job, machine: Machine) -> str:
    """The command of a job, and its config as it is now: a folder of another one holds other results."""
    config = ROOT / "configs" / job.config
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else "no config"
    return f"{shlex.join(_command(job, machine))}\n{job.config} {digest}\n"


def _is_of(job: Job, machine: Machine) -> bool:
    note = _note(job, machine)
    return note.exists() and note.read_text() == _origin(job, machine)


def _command(job: Job, machine: Machine) -> list[str]:
    command = ["fit", "--config", f"configs/{job.config}", "--seed_everything", str(job.seed)]
    command += ["--run.root", str(machine.runs), "--run.name", job.name]
    command += [option.replace("{after}", str(machine.runs / (job.after or ""))) for option in job.options]
    return command + (["--trainer.accelerator", "gpu"] if machine.device == "cuda" else [])


def _take(table: Table, job: Job, machine: Machine, minutes: float) -> None:
    """Take the rows of a finished run."""
    folder = machine.runs / job.name
    facts = {
        "device": machine.device,
        "minutes": round(minutes, 1),
        "command": f"lightning_prune {shlex.join(_command(job, machine))}".replace(f"{ROOT}/", ""),
        "commit": commit(),
        **logged_flips(folder / "metrics.csv"),
    }
    report = json.loads((folder / "report.json").read_text())
    table.add(job, report, load_file(folder / "report-influence.safetensors"), facts, again=minutes == 0)


def repeated(table: Table, again: Table, jobs: Sequence[Job]) -> Iterator[str]:
    """A line for every row that was made a second time: both values, and whether their paired interval holds 0."""
    known = {_key(row): row for row in table.rows}
    for row in (row for job in jobs for row in again.of(job)):
        first = known.get(_key(row))
        if first is None:
            yield f"{_text(row)}: {row['device']} {distance_cell(row)}; the table has no such row"
            continue
        values = f"{first['device']} {distance_cell(first)}, {row['device']} {distance_cell(row)}"
        paired = again.difference(row, first, table)
        if paired is None:
            yield f"{_text(row)}: {values}; nothing pairs them"
        else:
            agree = "0 is inside" if paired[1] <= 0 <= paired[2] else "0 is outside"
            yield f"{_text(row)}: {values}; paired difference {interval(paired)}, {agree}"


def logged_flips(metrics: Path) -> Row:
    """The mean share of masks that flip at a step, over the last tenth of the logged steps and over all; or nothing."""
    with metrics.open() as stream:
        logged = [float(row["flip_rate"]) for row in csv.DictReader(stream) if row.get("flip_rate")]
    last = logged[-max(1, len(logged) // 10) :]
    return {"flip_rate": sum(last) / len(last), "mean_flip_rate": sum(logged) / len(logged)} if last else {}


def interval(value: tuple[float, float, float] | None) -> str:
    """A value with its interval, as cells hold it."""
    return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def distance_cell(row: Row) -> str:
    """The distance of a row with its interval."""
    found = row["fd_fashion"]
    return interval((found["value"], found["low"], found["high"]))
