"""The table of MosaicDiff: allocations and baselines at equal MACs, training-free, three seeds.

    python benchmarks/table_mosaicdiff.py --estimate
    python benchmarks/table_mosaicdiff.py [--device cuda]
    python benchmarks/table_mosaicdiff.py --write-card

A run makes several allocations of one target from one calibration. Targets are the share of the dense sampling run's
MACs that is removed. All samples are drawn from the same noise, so what no seed has a part in is drawn once, and so
are baselines that are far behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from records import ROOT
from tables import UNTIMED, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
TARGETS = {"fashion_dit": (0.33, 0.5, 0.2), "fashion_unet": (0.33,)}
MINUTES_A_ROW = {"fashion_dit": 1.5, "fashion_unet": 5.0}
MINUTES_TO_RECOVER = 4.0
STEPS = 20
RESULT = "mosaicdiff measured"
Recipes = dict[str, dict[str, object]]
CORE: Recipes = {
    "published": {"allocation": "published"},
    "uniform-per-stage": {"allocation": "uniform"},
}
ONE_NETWORK = {"allocation": "uniform", "stages": 1}
BASELINES: Recipes = {
    "published-not-recalibrated": {"allocation": "published", "recalibrate": False},
    "one-network-magnitude": {**ONE_NETWORK, "criterion": "magnitude", "compensate": False},
    "one-network-taylor": {**ONE_NETWORK, "criterion": "taylor", "compensate": False},
    "one-network-random": {**ONE_NETWORK, "criterion": "random", "compensate": False},
}
EVEN = {"allocation": "uniform", "stages": 5}
MEASURED = {"allocation": "measured", "stages": 5}
# Layers are recalibrated alike whatever their statistics were: what those switch is seen without.
NOT_RECALIBRATED = {**MEASURED, "recalibrate": False}
# The rule word for word, where damping is none.
AS_PUBLISHED: Recipes = {"published-as-published": BASELINES["published-not-recalibrated"]}
# What a recipe switches: these share a calibration. What the calibration switches needs a run of its own.
EXTENSION: Recipes = {
    "uniform-not-recalibrated": {"allocation": "uniform", "recalibrate": False},
    "not-recalibrated": NOT_RECALIBRATED,
    "power-matched": {**MEASURED, "match": "power"},
    "not-matched": {**MEASURED, "match": "none"},
    "outputs": {**MEASURED, "sensitivity": "output"},
    "final-images": {**MEASURED, "sensitivity": "final"},
    "layer-errors": {**MEASURED, "sensitivity": "layer"},
    "evolution": {"allocation": "evolution", "stages": 5},
    "learned": {"allocation": "learned", "stages": 5, "evaluations": 60},
    "not-recalibrated-bias-compensated": {**NOT_RECALIBRATED, "affine": True},
    "nested": {**MEASURED, "nested": True},
    "ten-stages": {**MEASURED, "stages": 10},
    "published-snr": {"allocation": "published", "snr_weight": 0.05},
}
# Early or late? Layers cut alike, stages not.
PROFILES: Recipes = {
    name: {"allocation": "uniform", "stages": 5, "profile": profile}
    for name, profile in {
        "profile-early-heavy": [1.3, 1.15, 1.0, 0.85, 0.7],
        "profile-late-heavy": [0.7, 0.85, 1.0, 1.15, 1.3],
        "profile-middle-heavy": [0.8, 1.0, 1.4, 1.0, 0.8],
    }.items()
}
CALIBRATIONS = {
    "not-recalibrated-own-states": (
        f"--model.recipe={json.dumps(NOT_RECALIBRATED)}",
        "--model.calibration=sampler",
        "--trainer.limit_train_batches=4",
    ),
    "undamped": ("--model.damping=0.0",),
}
WEIGHTED = ("--model.guidance_weighted=true", f"--model.recipe={json.dumps(NOT_RECALIBRATED)}")
GUIDANCES = (1.5, 2.0)


def jobs() -> Iterator[Job]:
    """Every run of the table."""
    for seed in SEEDS:
        for network, targets in TARGETS.items():
            for target in targets:
                yield _core(network, target, seed)
    for seed in SEEDS:
        for network, targets in TARGETS.items():
            for target in targets:
                yield _even(network, target, seed)
    for network, targets in TARGETS.items():
        for target in targets:
            yield _baselines(network, target)
    yield _job("fashion_dit-switches-0.33-0", 0.33, EXTENSION, {}, tier="extension")
    yield _job("fashion_dit-profiles-0.33-0", 0.33, PROFILES, {}, tier="extension")
    for name, options in CALIBRATIONS.items():
        rivals = AS_PUBLISHED if name == "undamped" else {}
        yield _job(f"fashion_dit-{name}-0.33-0", 0.33, rivals, {RESULT: name}, tier="extension", options=options)
    yield _recovered()
    for scale in GUIDANCES:
        options = (f"--model.guidance={scale:g}",)
        for weighted in (False, True):
            name = f"guidance-{scale:g}" + ("-weighted" if weighted else "")
            rows = {RESULT: f"not-recalibrated-{name}" if weighted else f"measured-{name}"}
            if not weighted:
                rows["not-recalibrated"] = f"not-recalibrated-{name}"
                alike = {**{rival: rival for rival in CORE}, "dense": "dense", _fewer_steps(0.33): "dense-fewer-steps"}
                rows |= {row: f"{variant}-{name}" for row, variant in alike.items()}
            rivals = {} if weighted else {**CORE, "not-recalibrated": NOT_RECALIBRATED}
            further = (*options, *(WEIGHTED if weighted else ()))
            report = (f"guidance: {scale:g}",)
            yield _job(f"fashion_dit-{name}-0", 0.33, rivals, rows, tier="extension", options=further, report=report)


def _core(network: str, target: float, seed: int) -> Job:
    """The result and its rivals."""
    rows = {RESULT: "measured"}
    if seed == 0 and target == TARGETS[network][0]:
        rows["dense"] = "dense"
    return _job(f"{network}-{target:g}-{seed}", target, CORE, rows, network=network, seed=seed)


def _even(network: str, target: float, seed: int) -> Job:
    """Even widths in as many stages as the result has: what its stages alone are worth."""
    options = (f"--model.recipe={json.dumps(EVEN)}",)
    name, rows = f"{network}-even-{target:g}-{seed}", {"mosaicdiff uniform": "uniform-five-stages"}
    return _job(name, target, {}, rows, network=network, seed=seed, options=options, result="mosaicdiff uniform")


def _recovered() -> Job:
    """The stages of a core run, trained for the steps of the config; apart from what is training-free."""
    return Job(
        name="fashion_dit-recovered-0.33-0",
        network="fashion_dit",
        rows={"recovered": "measured-recovered-300-steps"},
        target="0.33",
        seed=0,
        config="mosaicdiff/fashion_dit_recovered.yaml",
        options=(
            "--model.denoiser.path={after}/artifact",
            "--trainer.max_steps=300",
            "--trainer.callbacks.init_args.rows=[]",
            *UNTIMED,
        ),
        tier="extension",
        minutes=MINUTES_A_ROW["fashion_dit"] + MINUTES_TO_RECOVER,
        after="fashion_dit-0.33-0",
    )


def _baselines(network: str, target: float) -> Job:
    """Networks that are the same in all steps, and the dense one with fewer steps."""
    rows = {_fewer_steps(target): "dense-fewer-steps", "mosaicdiff uniform": "one-network-obs"}
    options = (f"--model.recipe={json.dumps(ONE_NETWORK)}",)
    name = f"{network}-baselines-{target:g}-0"
    return _job(name, target, BASELINES, rows, network=network, options=options, result="mosaicdiff uniform")


def _fewer_steps(target: float) -> str:
    """The report's name of the control: as many whole steps as the target leaves."""
    return f"dense, {int((1 - target) * STEPS + 1e-9)} steps"


def _job(
    name: str,
    target: float,
    rivals: Recipes,
    rows: dict[str, str],
    *,
    network: str = "fashion_dit",
    seed: int = 0,
    tier: str = "core",
    options: tuple[str, ...] = (),
    report: tuple[str, ...] = (),
    result: str = RESULT,
) -> Job:
    """A run; every rival is a row of its own name, and `rows` names the others."""
    named = {rival: rows.get(rival, rival) for rival in rivals} | rows
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
            *options,
            _report([row for row in named if row != result], report),
        ),
        tier=tier,
        # The result is drawn in every run.
        minutes=MINUTES_A_ROW[network] * len({*named, result}) * (2 if report else 1) + 1,
    )


def _report(rows: list[str], further: tuple[str, ...]) -> str:
    """The report's settings, as one option: `trainer.callbacks` is a list."""
    fixed = ("samples: 2000", f"steps: {STEPS}", "protocol: table-v1", "timed_images: 16", "timed_repeats: 1")
    settings = ", ".join((*fixed, "fewer_steps: true", f"rows: {json.dumps(rows)}", *further))
    callback = f"{{class_path: lightning_prune.callbacks.EfficiencyReport, init_args: {{{settings}}}}}"
    return f"--trainer.callbacks=[{callback}]"


def markdown(table: Table) -> str:
    """Rows by network and target: distance, paired difference of that seed's measured allocation from it, MACs."""
    lines = [
        "| network | target | variant | seed | fd_fashion (95 %) | measured less this, paired | MACs removed |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(table.rows, key=lambda r: (r["network"], r["target"], r["tier"], r["fd_fashion"]["value"]))
    return "\n".join([*lines, *(_line(table, row) for row in order)])


def _line(table: Table, row: Row) -> str:
    wanted = (row["network"], row["seed"], row["target"], "measured")
    result = [o for o in table.rows if (o["network"], o["seed"], o["target"], o["variant"]) == wanted]
    paired = table.difference(result[0], row) if result and result[0] is not row else None
    removed = 1 - row["macs_per_image"] / row["macs_per_image_dense"]
    cells = [row["network"], row["target"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    return f"| {' | '.join(cells)} | {removed:.4f} |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "mosaicdiff" / "README.md"
    sys.exit(run_table(Table.read("mosaicdiff", "macs_removed"), list(jobs()), card, markdown))
