"""The table of DiP-GO: learned schedules and what they are compared with at equal cost.

    python benchmarks/table_dipgo.py --estimate
    python benchmarks/table_dipgo.py [--device cuda]
    python benchmarks/table_dipgo.py --write-card

Core: three seeds of the search, the transformer at budgets 0.5, 0.35, 0.2 and 0.1 of the MACs of DDIM-50, the U-Net at
0.35 of those of DDIM-20, which is what two CPU cores can pay. All samples are drawn from the same noise, so what no
search has a part in is drawn once; drift of searches is measured with the first seed. Minutes are estimates until a
run has said better.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from records import ROOT
from tables import UNTIMED, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
STEPS = {"fashion_dit": 50, "fashion_unet": 20}
BUDGETS = (0.2, 0.1, 0.35, 0.5)
MINUTES = {"fashion_dit": 20.0, "fashion_unet": 15.0}
MINUTES_DRAWN = 6.0  # of the dense network's images
MINUTES_OF_PAPER = 75.0  # its thousand steps
# Rows of the search under that solver, 20 steps of it; their protocol is another, so they stand beside each other.
ON_DPM = "-on-dpm-solver++"
# Rows that belong to a search other than the table's: one whose teacher takes as many steps as the sampler, and those
# of code before lines were held over steps, and before budgets were not rounded; the card says more.
OTHERS = ("-plain-teacher", "-first-order", "-rounded")
# What schedules are compared with in the card, in the order of its columns.
COMPARED = (
    "dpm-solver++-kept-steps",
    "dpm-solver++",
    "whole-steps",
    "uniform-reuse",
    "random-gates",
    "ddim-fewer-steps",
    "dense",
)
# Baselines reuse and measure as the table's searches do.
ALIKE = ("--model.reuse=linear", "--model.loss=ssim+l1")
# The baselines' configs are of the transformer.
ON_UNET = (
    "--model.denoiser=lightning_prune.diffusion.models.unet2d.UNet2D",
    "--model.denoiser.weights=embedded:fashion_unet",
    "--model.sampler.steps=20",
    "--model.granularity=fine",
    "--model.cache_mode=output",
    "--trainer.callbacks.init_args.steps=20",
)
DPM = (
    "--model.sampler.name=dpm-solver++",
    "--model.sampler.steps=20",
    "--trainer.callbacks.init_args.sampler=dpm-solver++",
    "--trainer.callbacks.init_args.steps=20",
)
# Other searches of the transformer, one switch away from the table's: config and options by variant.
EXTENSION = {
    "dipgo-last": ("dipgo/fashion_dit.yaml", ("--model.reuse=last",)),
    "dipgo-unrefined": ("dipgo/fashion_dit.yaml", ("--model.refine=0", "--model.full_steps=false")),
    # As many batches to measure with, and nothing learned.
    "refined-only": ("dipgo/fashion_dit.yaml", ("--trainer.max_steps=4", "--model.optimizer.init_args.lr=0")),
    "dipgo-parts-of-steps": ("dipgo/fashion_dit.yaml", ("--model.full_steps=false",)),
    "dipgo-blocks-alone": ("dipgo/fashion_dit.yaml", ("--model.step_gates=false",)),
    "dipgo-block": ("dipgo/fashion_dit_block.yaml", ()),
    "dipgo-output": ("dipgo/fashion_dit_output.yaml", ()),
    "dipgo-paper": ("dipgo/fashion_dit_paper.yaml", ()),
    "greedy": ("baselines/greedy-gates.yaml", (*ALIKE, "--model.teacher_steps=250")),
    "genetic": ("baselines/genetic-gates.yaml", (*ALIKE, "--model.teacher_steps=250")),
}


def jobs() -> Iterator[Job]:
    """Every run of the table."""
    for seed in SEEDS:
        for budget in BUDGETS:
            yield _search("fashion_dit", "dipgo/fashion_dit.yaml", budget, seed)
        yield _search("fashion_unet", "dipgo/fashion_unet.yaml", 0.35, seed)
    for budget in BUDGETS:
        yield _without_search("fashion_dit", budget)
    yield _without_search("fashion_unet", 0.35)
    for budget in (0.2, 0.5):
        yield _search("fashion_unet", "dipgo/fashion_unet.yaml", budget, 0, "extension")
        yield _without_search("fashion_unet", budget, "extension")
    for seed in SEEDS:
        yield _search("fashion_dit", "dipgo/fashion_dit.yaml", 0.06, seed, "extension")
    yield _without_search("fashion_dit", 0.06, "extension")
    for variant, (config, options) in EXTENSION.items():
        yield _other(variant, config, options, 0.2)
    for network, budget in (("fashion_unet", 0.35), ("fashion_dit", 0.2)):
        yield _other("dipgo-plain-teacher", f"dipgo/{network}.yaml", ("--model.teacher_steps=null",), budget, network)
    for variant in ("dipgo-parts-of-steps", "refined-only"):
        yield _other(variant, *EXTENSION[variant], 0.1)
    for budget in (0.35, 0.5):
        yield _on_dpm(budget)
        yield _whole_steps_on_dpm(budget)


def _search(network: str, config: str, budget: float, seed: int, tier: str = "core") -> Job:
    """A search, and at equal cost what depends on it."""
    count = int(budget * STEPS[network] + 1e-9)
    beside = {
        f"ddim {count} steps kept": "ddim-kept-steps",
        f"dpm-solver++ {count} steps kept": "dpm-solver++-kept-steps",
    }
    return Job(
        name=f"{network}-dipgo-{budget:g}-{seed}",
        network=network,
        rows={**beside, f"dipgo {budget:g}": "dipgo"},
        target=f"{budget:g}",
        seed=seed,
        config=config,
        options=(f"--model.budget={budget:g}", _scored(beside, seed == 0), *UNTIMED),
        tier=tier,
        minutes=MINUTES[network],
    )


def _without_search(network: str, budget: float, tier: str = "core") -> Job:
    """What no search has a part in: plain samplers, random gates, and full steps at equal distances.

    Between these run no blocks or, where the budget pays for it in every step, the shallowest branch.
    """
    count = int(budget * STEPS[network] + 1e-9)
    # Up to a tenth no branch is paid for in every step, and the two rules are one.
    rules = ["whole-steps", *(["uniform-reuse"] if budget > 0.1 else [])]
    rows = {f"ddim {count} steps": "ddim-fewer-steps", f"dpm-solver++ {count} steps": "dpm-solver++"}
    rows |= {f"{rule} {budget:g}": rule for rule in (*rules, "random-gates")}
    if budget == (BUDGETS[0] if network == "fashion_dit" else 0.35):
        rows["dense"] = "dense"
    beside = _scored(row for row in rows if row != "dense")
    compare = f"--model.compare={json.dumps(['fewer-steps', 'dpm-solver++', *rules])}"
    on = ON_UNET if network == "fashion_unet" else ()
    return Job(
        name=f"{network}-without-search-{budget:g}-0",
        network=network,
        rows=rows,
        target=f"{budget:g}",
        seed=0,
        config="baselines/random-gates.yaml",
        options=(f"--model.budget={budget:g}", compare, *ALIKE, *on, beside, *UNTIMED),
        tier=tier,
        minutes=MINUTES_DRAWN * (1 + (2 + len(rules)) * budget),
    )


def _whole_steps_on_dpm(budget: float) -> Job:
    variant = f"whole-steps{ON_DPM}"
    return Job(
        name=f"fashion_dit-{variant.replace('++', '')}-{budget:g}-0",
        network="fashion_dit",
        rows={f"whole-steps {budget:g}": variant},
        target=f"{budget:g}",
        seed=0,
        config="baselines/whole-steps.yaml",
        options=(f"--model.budget={budget:g}", "--model.compare=[]", *ALIKE, *DPM, _scored([], drift=False), *UNTIMED),
        tier="extension",
        minutes=1 + 10 * budget,
    )


def _other(variant: str, config: str, options: tuple[str, ...], budget: float, network: str = "fashion_dit") -> Job:
    row = "dipgo" if config.startswith("dipgo") else Path(config).stem
    row = {"greedy-gates": "greedy", "genetic-gates": "genetic"}.get(row, row)
    return Job(
        name=f"{network}-{variant}-{budget:g}-0",
        network=network,
        rows={f"{row} {budget:g}": variant},
        target=f"{budget:g}",
        seed=0,
        config=config,
        options=(f"--model.budget={budget:g}", "--model.compare=[]", *options, _scored([]), *UNTIMED),
        tier="extension",
        minutes=MINUTES_OF_PAPER if variant == "dipgo-paper" else 8.0,
    )


def _on_dpm(budget: float) -> Job:
    """A search for a better sampler than the table's, against that sampler with fewer steps."""
    count = int(budget * 20 + 1e-9)
    beside = {"dense": "dense", f"dpm-solver++ {count} steps": "fewer-steps"}
    beside |= {f"dpm-solver++ {count} steps kept": "kept-steps"}
    return Job(
        name=f"fashion_dit-dpm-{budget:g}-0",
        network="fashion_dit",
        rows={row: f"{variant}{ON_DPM}" for row, variant in {**beside, f"dipgo {budget:g}": "dipgo"}.items()},
        target=f"{budget:g}",
        seed=0,
        config="dipgo/fashion_dit_dpm.yaml",
        options=(f"--model.budget={budget:g}", _scored(beside, drift=False), *UNTIMED),
        tier="extension",
        minutes=12.0,
    )


def _scored(rows: Iterable[str], drift: bool = True) -> str:
    """The rows to draw; drift is measured from the dense network's images, which have to be drawn for it every time."""
    return f"--trainer.callbacks.init_args.rows={json.dumps([*(['dense'] if drift else []), *rows])}"


def markdown(table: Table) -> str:
    """What schedules gain over controls of equal cost; folded away all rows, and those that no job makes any more."""
    made = [row for job in jobs() for row in table.of(job)]
    now, earlier = [[row for row in table.rows if (row in made) is known] for known in (True, False)]
    folded = _folded(f"All {len(now)} rows, with drift", _lines(table, now))
    if earlier:
        folded += _folded(f"{len(earlier)} rows that no job makes any more, of earlier code", _lines(table, earlier))
    return "\n".join([*_compared(table), *folded])


def _folded(summary: str, lines: list[str]) -> list[str]:
    return ["", "<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def _compared(table: Table) -> list[str]:
    """Distance of every learned schedule, and that less the distance of each control, paired."""
    lines = [f"| network | budget | seed | dipgo | {' | '.join(COMPARED)} |", "|---" * (4 + len(COMPARED)) + "|"]
    for learned in table.rows:
        if learned["variant"] != "dipgo":
            continue
        cells = [learned["network"], learned["target"], str(learned["seed"]), f"{learned['fd_fashion']['value']:.2f}"]
        for control in COMPARED:
            other = _control(table, learned, control)
            cells.append(interval(table.difference(learned, other)) if other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _control(table: Table, learned: Row, variant: str) -> Row | None:
    """The control of a schedule; those that no search has a part in are of the first seed, dense ones of any budget."""
    rows = [r for r in table.rows if r["network"] == learned["network"] and r["variant"] == variant]
    if variant == "dense":
        return rows[0] if rows else None
    seed = learned["seed"] if variant.endswith("-kept-steps") else 0
    return next((r for r in rows if (r["target"], r["seed"]) == (learned["target"], seed)), None)


def _lines(table: Table, rows: Iterable[Row]) -> list[str]:
    return [
        "| network | budget | variant | seed | fd_fashion (95 %) | dipgo less this, paired | drift (95 %) | MACs |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(table, row) for row in rows),
    ]


def _line(table: Table, row: Row) -> str:
    ours = "dipgo" + next((kind for kind in (ON_DPM, *OTHERS) if row["variant"].endswith(kind)), "")
    wanted = (row["network"], row["target"], row["seed"], ours)
    learned = [r for r in table.rows if (r["network"], r["target"], r["seed"], r["variant"]) == wanted]
    paired = table.difference(learned[0], row) if learned and learned[0] is not row else None
    kept = row["macs_per_image"] / row["macs_per_image_dense"]
    cells = [row["network"], row["target"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    drift = row.get("drift_mse")
    cells.append(f"{drift['value']:.5f} [{drift['low']:.5f}, {drift['high']:.5f}]" if drift else "")
    return f"| {' | '.join(cells)} | {100 * kept:.1f} % |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "dipgo" / "README.md"
    sys.exit(run_table(Table.read("dipgo", "macs_kept"), list(jobs()), card, markdown))
