"""The table of DiP-GO: learned schedules and what they are compared with at equal cost, DDIM-50.

    python benchmarks/table_dipgo.py --estimate
    python benchmarks/table_dipgo.py [--device cuda]
    python benchmarks/table_dipgo.py --write-card

Core: three seeds, the transformer at budgets 0.5, 0.35 and 0.2 of the MACs and the U-Net at 0.35. A run is one search
and draws its own controls, so all rows of a budget and seed share noise. Minutes are estimates until a run has said
better.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tables import ROOT, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
STEPS = 50
BUDGETS = (0.5, 0.35, 0.2)
MINUTES = {"fashion_dit": 25.0, "fashion_unet": 60.0}
CONTROLS = ("ddim-fewer-steps", "ddim-kept-steps", "dpm-solver++")
# Searches of the transformer at 0.35 with other switches: config by variant.
EXTENSION = {
    "dipgo-block": "dipgo/fashion_dit_block.yaml",
    "dipgo-output": "dipgo/fashion_dit_output.yaml",
    "dipgo-paper": "dipgo/fashion_dit_paper.yaml",
    "whole-steps": "baselines/whole-steps.yaml",
    "greedy": "baselines/greedy-gates.yaml",
    "genetic": "baselines/genetic-gates.yaml",
}


def jobs() -> Iterator[Job]:
    """Every run of the table."""
    for budget in BUDGETS:
        for seed in SEEDS:
            yield _search("fashion_dit", "dipgo/fashion_dit.yaml", budget, seed)
    for seed in SEEDS:
        yield _search("fashion_unet", "dipgo/fashion_unet.yaml", 0.35, seed)
    for budget in (0.5, 0.2):
        yield _search("fashion_unet", "dipgo/fashion_unet.yaml", budget, 0, "extension")
    for variant, config in EXTENSION.items():
        row = "dipgo" if variant.startswith("dipgo") else config.split("/")[1].removesuffix(".yaml")
        row = {"greedy-gates": "greedy", "genetic-gates": "genetic"}.get(row, row)
        yield Job(
            name=f"fashion_dit-{variant}-0.35-0",
            network="fashion_dit",
            rows={f"{row} 0.35": variant},
            target="0.35",
            seed=0,
            config=config,
            options=("--model.budget=0.35", "--model.compare=[]"),
            tier="extension",
            minutes=15.0,
        )


def _search(network: str, config: str, budget: float, seed: int, tier: str = "core") -> Job:
    count = int(budget * STEPS + 1e-9)
    names = (f"ddim {count} steps", f"ddim {count} steps kept", f"dpm-solver++ {count} steps")
    rules = {f"{rule} {budget:g}": rule for rule in ("uniform-reuse", "random-gates")}
    return Job(
        name=f"{network}-dipgo-{budget:g}-{seed}",
        network=network,
        rows={"dense": "dense", **dict(zip(names, CONTROLS, strict=True)), **rules, f"dipgo {budget:g}": "dipgo"},
        target=f"{budget:g}",
        seed=seed,
        config=config,
        options=(f"--model.budget={budget:g}",),
        tier=tier,
        minutes=MINUTES[network],
    )


def markdown(table: Table) -> str:
    """Rows by network and budget: distance, and the paired difference of the learned schedule of that seed from it."""
    lines = [
        "| network | budget | variant | seed | fd_fashion (95 %) | dipgo less this, paired | MACs kept |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(table, row) for row in table.rows]
    return "\n".join(lines)


def _line(table: Table, row: Row) -> str:
    wanted = (row["network"], row["target"], row["seed"], "dipgo")
    learned = [r for r in table.rows if (r["network"], r["target"], r["seed"], r["variant"]) == wanted]
    paired = table.difference(learned[0], row) if learned and learned[0] is not row else None
    kept = row["macs_per_image"] / row["macs_per_image_dense"]
    cells = [row["network"], row["target"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    return f"| {' | '.join(cells)} | {100 * kept:.1f} % |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "dipgo" / "README.md"
    sys.exit(run_table(Table.read("dipgo", "macs_kept"), list(jobs()), card, markdown))
