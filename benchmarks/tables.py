"""What the tables of all methods share: runs that are missing are made, each leaves rows, rows make the README's table.

A job is one `lightning_prune fit`; every row of its report that the job names becomes a row of the results file. Rows
are unique by (network, variant, target, seed, sample_seed), so an interrupted table goes on where it stopped. Beside
`<method>.json` lies `<method>-influence.safetensors`: each sample's influence on each row's distance, which pairs rows
of different runs that were drawn from equal seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


@dataclass
class Table:
    """The rows of one method's table, on disk after every job.

    Attributes:
        method: name of the results file.
        target_kind: what targets are: "pattern", "macs_kept" or "macs_removed".
    """

    method: str
    target_kind: str
    rows: list[Row] = field(default_factory=list)
    influence: dict[str, Tensor] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.method}.json"

    @property
    def influence_file(self) -> Path:
        return RESULTS / f"{self.method}-influence.safetensors"

    @classmethod
    def read(cls, method: str, target_kind: str) -> Table:
        """The table as far as it was made."""
        table = cls(method, target_kind)
        if table.file.exists():
            table.rows = json.loads(table.file.read_text())
        if table.influence_file.exists():
            table.influence = load_file(table.influence_file)
        return table

    def has(self, job: Job) -> bool:
        """Whether every row of a job is there."""
        present = {_key(row) for row in self.rows}
        return all(_key(_identity(job, variant)) in present for variant in job.rows.values())

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
        RESULTS.mkdir(exist_ok=True)
        _replace(self.influence_file, lambda file: save_file(self.influence, file))
        _replace(self.file, lambda file: file.write_text(json.dumps(self.rows, indent=1) + "\n"))

    def _row(self, job: Job, variant: str, found: Row, dense: int) -> Row:
        return {
            "schema": 1,
            **_identity(job, variant),
            "method": self.method,
            "target_kind": self.target_kind,
            "tier": job.tier,
            "fd_fashion": found["fd_fashion"],
            "macs_per_image": found["macs_per_image"],
            "macs_per_image_dense": dense,
            "convention": found["convention"],
        }

    def difference(self, row: Row, against: Row) -> tuple[float, float, float] | None:
        """Paired difference of two rows of equal sample seeds with its 95 % interval; None where nothing pairs them."""
        a, b = self.influence.get(_text(row)), self.influence.get(_text(against))
        if a is None or b is None or len(a) != len(b) or row["sample_seed"] != against["sample_seed"]:
            return None
        if row["fd_fashion"]["protocol"] != against["fd_fashion"]["protocol"]:
            return None
        value = row["fd_fashion"]["value"] - against["fd_fashion"]["value"]
        margin = 1.96 * float((a - b).double().std()) / math.sqrt(len(a))
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
    parser = argparse.ArgumentParser(description=f"Rows of benchmarks/results/{table.method}.json.")
    parser.add_argument("--estimate", action="store_true", help="print the missing rows and their hours; run nothing")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tier", choices=["core", "extension"], help="only rows of one tier")
    parser.add_argument("--only", help="only jobs whose name holds this text")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tables", help="where run folders go")
    parser.add_argument("--write-card", action="store_true", help=f"write the table into {card.name}; run nothing")
    options = parser.parse_args(args)
    if options.write_card:
        write_card(card, markdown(table))
        return 0
    chosen = [job for job in jobs if options.tier in (None, job.tier) and (options.only or "") in job.name]
    missing = [job for job in chosen if not table.has(job)]
    hours = sum(job.minutes for job in missing) / 60
    print(f"{len(missing)} of {len(chosen)} runs are missing, about {hours:.1f} hours of two CPU cores", flush=True)
    if options.estimate:
        for job in missing:
            print(f"  {job.name}: {', '.join(job.rows.values())} ({job.tier}, {job.minutes:g} minutes)")
        return 0
    failed = [job.name for job in missing if not _run(table, job, options.runs, options.device)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(table: Table, job: Job, runs: Path, device: str) -> bool:
    """Run a job, resuming it if it was interrupted, and take its rows. Returns whether it ended well."""
    folder = runs / job.name
    command = ["fit", "--config", f"configs/{job.config}", "--seed_everything", str(job.seed)]
    command += ["--run.root", str(runs), "--run.name", job.name]
    command += [option.replace("{after}", str(runs / (job.after or ""))) for option in job.options]
    command += ["--trainer.accelerator", "gpu"] if device == "cuda" else []
    checkpoint = folder / "checkpoints" / "last.ckpt"
    resumed = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
    began, again = time.monotonic(), (folder / "report.json").exists()
    if not again:
        print(f"== {job.name}", flush=True)
        ended = subprocess.run([sys.executable, "-m", "lightning_prune", *command, *resumed], cwd=ROOT, check=False)
        if ended.returncode != 0:
            return False
    facts = {
        "device": device,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "command": f"lightning_prune {shlex.join(command)}".replace(f"{ROOT}/", ""),
        "commit": _commit(),
        **final_flip_rate(folder / "metrics.csv"),
    }
    report = json.loads((folder / "report.json").read_text())
    table.add(job, report, load_file(folder / "report-influence.safetensors"), facts, again)
    return True


def final_flip_rate(metrics: Path) -> Row:
    """The mean share of masks that flip at a step, over the last tenth of the steps it was logged at; or nothing."""
    with metrics.open() as stream:
        logged = [float(row["flip_rate"]) for row in csv.DictReader(stream) if row.get("flip_rate")]
    last = logged[-max(1, len(logged) // 10) :]
    return {"flip_rate": sum(last) / len(last)} if last else {}


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lightning_prune", "callbacks", "configs")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def write_card(card: Path, table: str) -> None:
    """Put `table` between the markers of a card. Raises `ValueError` if it has none."""
    begin, end = "<!-- table -->", "<!-- end of table -->"
    text = card.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{card}: has no {begin} ... {end}")
    head, rest = text.split(begin, 1)
    card.write_text(f"{head}{begin}\n{table.strip()}\n{end}{rest.split(end, 1)[1]}")


def interval(value: tuple[float, float, float] | None) -> str:
    """A value with its interval, as cells hold it."""
    return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def distance_cell(row: Row) -> str:
    """The distance of a row with its interval."""
    found = row["fd_fashion"]
    return interval((found["value"], found["low"], found["high"]))
