"""The table of SparseDM and its rivals at 2:4, equal steps, three seeds.

    python benchmarks/table_sparsedm.py --estimate
    python benchmarks/table_sparsedm.py [--device cuda]
    python benchmarks/table_sparsedm.py --write-card

Fine-tuning is 600 steps of 64 on the transformer and 300 on the U-Net, with one learning rate for all variants.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tables import ROOT, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
MINUTES = {"fashion_dit": 11.0, "fashion_unet": 9.0}
# Variant by config; all are the same method with other switches.
CORE = {
    "asp-retrained": "baselines/asp.yaml",
    "ste": "baselines/ste.yaml",
    "sr-ste": "baselines/sr-ste.yaml",
    "sparsedm-fixed": "sparsedm/fashion_dit_fixed.yaml",
    "sparsedm-progressive": "sparsedm/fashion_dit_progressive.yaml",
    "small-dense": "baselines/small-dense.yaml",
}
EXTENSION = {
    "gradual-magnitude": "baselines/gradual-magnitude.yaml",
    "random-nm": "baselines/random-nm.yaml",
    "fixed-nm": "baselines/fixed-nm.yaml",
    "sparsedm-freeze": "sparsedm/fashion_dit_freeze.yaml",
    "sparsedm-several": "sparsedm/fashion_dit_several.yaml",
}
UNET = (
    "--model.denoiser=lightning_prune.diffusion.models.unet2d.UNet2D",
    "--model.denoiser.weights=embedded:fashion_unet",
    "--trainer.max_steps=300",
    "--trainer.val_check_interval=300",
)


# The longer run, what it is held against, and what was tried to bring it within the dense fine-tuned network.
SHORT = ("--trainer.max_steps=600", "--trainer.val_check_interval=600")
LONG = {
    "sparsedm-long": (),
    "sparsedm-600": SHORT,
    "sparsedm-600-distill-only": (*SHORT, "--model.noise_weight=0.0"),
    "sparsedm-600-muon": (*SHORT, "--model.optimizer=timm.optim.muon.Muon", "--model.optimizer.lr=0.003"),
    "sparsedm-600-freeze": (*SHORT, "--model.freeze_masks_at=0.85"),
}


def jobs() -> Iterator[Job]:
    """Every run of the table."""
    yield _long("dense-fine-tuned-long", "baselines/dense-fine-tuned.yaml", ())
    for variant, options in LONG.items():
        yield _long(variant, "sparsedm/fashion_dit_2to4.yaml", options)
    for network in ("fashion_dit", "fashion_unet"):
        for seed in SEEDS:
            yield _control(network, seed)
            for variant, config in CORE.items():
                if (network, variant) == ("fashion_unet", "small-dense"):
                    continue  # its smaller self has no config yet
                yield _job(network, variant, config, seed, "core")
    for variant, config in EXTENSION.items():
        yield _job("fashion_dit", variant, config, 0, "extension")


def _control(network: str, seed: int) -> Job:
    options = UNET if network == "fashion_unet" else ("--trainer.max_steps=600", "--trainer.val_check_interval=600")
    rows = {"dense": "dense", "dense fine-tuned": "dense-fine-tuned"}
    learning_rate = ("--model.optimizer.lr=0.0015",)
    return Job(
        name=f"{network}-dense-fine-tuned-{seed}",
        network=network,
        rows=rows,
        target="4:4",
        seed=seed,
        config="baselines/dense-fine-tuned.yaml",
        options=options + learning_rate,
        minutes=MINUTES[network],
    )


def _long(variant: str, config: str, options: tuple[str, ...]) -> Job:
    dense = variant == "dense-fine-tuned-long"
    return Job(
        name=f"fashion_dit-{variant}-0",
        network="fashion_dit",
        rows={"dense fine-tuned" if dense else "sparsedm 2:4": variant},
        target="4:4" if dense else "2:4",
        seed=0,
        config=config,
        options=options,
        tier="extension",
        minutes=15.0,
    )


def _job(network: str, variant: str, config: str, seed: int, tier: str) -> Job:
    rows = {"small dense" if variant == "small-dense" else "sparsedm 2:4": variant}
    if variant == "asp-retrained":
        rows["one-shot 2:4"] = "one-shot"
    return Job(
        name=f"{network}-{variant}-{seed}",
        network=network,
        rows=rows,
        target="2:4",
        seed=seed,
        config=config,
        options=UNET if network == "fashion_unet" else (),
        tier=tier,
        minutes=MINUTES[network],
    )


def markdown(table: Table) -> str:
    """Rows by network: distance, and the paired difference from the dense fine-tuned network of the same seed."""
    lines = [
        "| network | variant | seed | fd_fashion (95 %) | less dense fine-tuned, paired | MACs an image |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(table, row) for row in table.rows]
    return "\n".join(lines)


def _line(table: Table, row: Row) -> str:
    long = "-long" in row["variant"] or "-600" in row["variant"]
    control = "dense-fine-tuned-long" if long else "dense-fine-tuned"
    wanted = (row["network"], row["seed"], control)
    controls = [other for other in table.rows if (other["network"], other["seed"], other["variant"]) == wanted]
    paired = table.difference(row, controls[0]) if controls and controls[0] is not row else None
    cells = [row["network"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    return f"| {' | '.join(cells)} | {row['macs_per_image'] / 1e9:.2f} G |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "sparsedm" / "README.md"
    sys.exit(run_table(Table.read("sparsedm", "pattern"), list(jobs()), card, markdown))
