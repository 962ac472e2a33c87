"""The table of MosaicDiff: allocations and baselines at equal MACs, training-free, three seeds.

    python benchmarks/table_mosaicdiff.py --estimate
    python benchmarks/table_mosaicdiff.py [--device cuda]
    python benchmarks/table_mosaicdiff.py --write-card

A run makes every allocation of one target from one calibration, and reports the dense network with fewer steps
beside them. Targets are the share of the dense sampling run's MACs that is removed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tables import ROOT, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
TARGETS = {"fashion_dit": (0.2, 0.33, 0.5), "fashion_unet": (0.33,)}
MINUTES = {"fashion_dit": 40.0, "fashion_unet": 60.0}  # not measured: ten rows of 2,000 images of 20 steps
STEPS = 20
RESULT = "mosaicdiff measured"
ONE_NETWORK = {
    "one-network-obs": {"allocation": "uniform", "stages": 1},
    "one-network-magnitude": {"allocation": "uniform", "stages": 1, "criterion": "magnitude", "compensate": False},
    "one-network-taylor": {"allocation": "uniform", "stages": 1, "criterion": "taylor", "compensate": False},
    "one-network-random": {"allocation": "uniform", "stages": 1, "criterion": "random", "compensate": False},
}
CORE = {
    "published": {"allocation": "published"},
    "uniform-per-stage": {"allocation": "uniform"},
    "measured-on-outputs": {"allocation": "measured", "stages": 5, "sensitivity": "output"},
    **ONE_NETWORK,
}
# What a recipe switches: these share a calibration. What the calibration switches needs a run of its own.
EXTENSION = {
    "evolution": {"allocation": "evolution", "stages": 5},
    "learned": {"allocation": "learned", "stages": 5, "evaluations": 60},
    "affine": {"allocation": "measured", "stages": 5, "affine": True},
    "nested": {"allocation": "measured", "stages": 5, "nested": True},
    "three-stages": {"allocation": "measured"},
    "ten-stages": {"allocation": "measured", "stages": 10},
    "layer-errors": {"allocation": "measured", "stages": 5, "sensitivity": "layer"},
    "published-snr": {"allocation": "published", "snr_weight": 0.05},
}
CALIBRATIONS = {
    "own-states": ("--model.calibration=sampler", "--trainer.limit_train_batches=4"),
    "undamped": ("--model.damping=0.0",),
}
GUIDANCES = (1.5, 2.0)


def jobs() -> Iterator[Job]:
    """Every run of the table."""
    for network, targets in TARGETS.items():
        for seed in SEEDS:
            for target in targets:
                yield _job(f"{network}-{target:g}-{seed}", network, target, seed, CORE, {RESULT: "measured"}, "core")
    yield _job("fashion_dit-switches-0.33-0", "fashion_dit", 0.33, 0, EXTENSION, {}, "extension")
    for name, options in CALIBRATIONS.items():
        yield _job(
            f"fashion_dit-{name}-0.33-0", "fashion_dit", 0.33, 0, {}, {RESULT: name}, "extension", options, minutes=15
        )
    for scale in GUIDANCES:
        options = (f"--model.guidance={scale:g}", *_report(f"guidance: {scale:g}"))
        for weighted in (False, True):
            name = f"guidance-{scale:g}" + ("-weighted" if weighted else "")
            rows = {RESULT: f"measured-{name}"}
            if not weighted:
                rows |= {"dense": f"dense-{name}", "published": f"published-{name}"}
            rivals = {} if weighted else {"published": CORE["published"]}
            further = (*options, *(("--model.guidance_weighted=true",) if weighted else ()))
            yield _job(f"fashion_dit-{name}-0", "fashion_dit", 0.33, 0, rivals, rows, "extension", further, minutes=60)


def _report(*further: str) -> tuple[str, ...]:
    """The report's settings, as one option: `trainer.callbacks` is a list."""
    settings = ", ".join(("samples: 2000", f"steps: {STEPS}", "protocol: table-v1", "fewer_steps: true", *further))
    callback = f"{{class_path: lightning_prune.callbacks.EfficiencyReport, init_args: {{{settings}}}}}"
    return (f"--trainer.callbacks=[{callback}]",)


def _job(
    name: str,
    network: str,
    target: float,
    seed: int,
    rivals: dict[str, dict[str, object]],
    rows: dict[str, str],
    tier: str,
    options: tuple[str, ...] = (),
    minutes: float | None = None,
) -> Job:
    """A run; every rival is a row of its own name, and `rows` names the others."""
    named = {rival: rows.get(rival, rival) for rival in rivals} | rows
    if tier == "core":
        # A whole number of steps that costs no more than the result, which is a little below its budget.
        steps = int((1 - target) * STEPS - 1e-9)
        named |= {"dense": "dense", f"dense, {steps} steps": "dense-fewer-steps"}
    return Job(
        name=name,
        network=network,
        rows=named,
        target=f"{target:g}",
        seed=seed,
        config=f"mosaicdiff/{network}.yaml",
        options=(
            f"--model.target={target:g}",
            f"--model.rivals={json.dumps(rivals)}",
            *(options if any("callbacks" in o for o in options) else (*options, *_report())),
        ),
        tier=tier,
        minutes=MINUTES[network] if minutes is None else float(minutes),
    )


def markdown(table: Table) -> str:
    """Rows by network and target: distance, paired difference from the dense network, MACs removed."""
    lines = [
        "| network | target | variant | seed | fd_fashion (95 %) | less dense, paired | MACs removed |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(table, row) for row in table.rows)])


def _line(table: Table, row: Row) -> str:
    wanted = (row["network"], row["seed"], row["target"], "dense")
    dense = [o for o in table.rows if (o["network"], o["seed"], o["target"], o["variant"]) == wanted]
    paired = table.difference(row, dense[0]) if dense and dense[0] is not row else None
    removed = 1 - row["macs_per_image"] / row["macs_per_image_dense"]
    cells = [row["network"], row["target"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    return f"| {' | '.join(cells)} | {removed:.4f} |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "mosaicdiff" / "README.md"
    sys.exit(run_table(Table.read("mosaicdiff", "macs_removed"), list(jobs()), card, markdown))
