"""The table of SparseDM and its rivals at 2:4, equal steps, three seeds.

    python benchmarks/table_sparsedm.py --estimate
    python benchmarks/table_sparsedm.py [--device cuda]
    python benchmarks/table_sparsedm.py --write-card

Fine-tuning is 300 steps of 64 on the transformer and 200 on the U-Net, with one learning rate for all variants.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tables import ROOT, Job, Row, Table, distance_cell, interval, run_table

SEEDS = (0, 1, 2)
STEPS = {"fashion_dit": 300, "fashion_unet": 200}
MINUTES = {"fashion_dit": 4.5, "fashion_unet": 6.0}
# The dense network at no more MACs an image than 2:4 leaves.
FEWER_STEPS = {"fashion_dit": "dense, 10 steps", "fashion_unet": "dense, 10 steps"}
# Variant by config; all are the same method with other switches.
CORE = {
    "asp-retrained": "baselines/asp.yaml",
    "ste": "baselines/ste.yaml",
    "sr-ste": "baselines/sr-ste.yaml",
    "sparsedm-fixed": "sparsedm/fashion_dit_fixed.yaml",
    "sparsedm-progressive": "sparsedm/fashion_dit_progressive.yaml",
    "sparsedm-distilled": "sparsedm/fashion_dit_progressive.yaml",
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
)


# What was tried to bring 2:4 nearer to the dense fine-tuned network than the longer run does: on the quick start, whose
# rows are of protocol quick-v1 and stand beside each other, not beside the rest.
TRIED = {
    "quick-start": (),
    "quick-start-distill-only": ("--model.noise_weight=0.0",),
    "quick-start-muon": ("--model.optimizer=timm.optim.muon.Muon", "--model.optimizer.lr=0.003"),
    "quick-start-freeze": ("--model.freeze_masks_at=0.85",),
}


def jobs() -> Iterator[Job]:
    """Every run of the table, the longer runs last."""
    for seed in SEEDS:
        for network in STEPS:
            yield _control(network, seed)
            for variant, config in CORE.items():
                if (network, variant) == ("fashion_unet", "small-dense"):
                    continue  # its smaller self has no config yet
                yield _job(network, variant, config, seed, "core")
    for variant, config in EXTENSION.items():
        yield _job("fashion_dit", variant, config, 0, "extension")
    for variant, options in TRIED.items():
        yield _single(variant, "quickstart.yaml", 5.0, options)
    yield _single("dense-fine-tuned-long", "baselines/dense-fine-tuned.yaml", 15.0)
    yield _single("sparsedm-long", "sparsedm/fashion_dit_2to4.yaml", 18.0)
    yield _single("sparsedm-long-distilled", "sparsedm/fashion_dit_2to4.yaml", 18.0, ("--model.noise_weight=0.0",))


def _options(network: str, rows: Iterable[str]) -> tuple[str, ...]:
    """What all runs of the table share, whatever their configs say, and the rows that are scored beside the result."""
    steps = STEPS[network]
    return (
        *(UNET if network == "fashion_unet" else ()),
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        "--model.warmup_steps=20",
        "--model.ema_decay=0.98",
        f"--trainer.callbacks.init_args.rows={json.dumps(list(rows))}",
    )


def _control(network: str, seed: int) -> Job:
    """The dense network, fine-tuned with everything that the others get but masks."""
    return Job(
        name=f"{network}-dense-fine-tuned-{seed}",
        network=network,
        rows={"dense": "dense", "dense fine-tuned": "dense-fine-tuned"},
        target="4:4",
        seed=seed,
        config="baselines/dense-fine-tuned.yaml",
        options=(*_options(network, ["dense"]), "--trainer.precision=32-true", "--model.compile=false"),
        minutes=MINUTES[network],
    )


def _single(variant: str, config: str, minutes: float, options: tuple[str, ...] = ()) -> Job:
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
        minutes=minutes,
    )


def _job(network: str, variant: str, config: str, seed: int, tier: str) -> Job:
    result = "small dense" if variant == "small-dense" else "sparsedm 2:4"
    beside = {}
    if variant == "asp-retrained":
        beside = {"one-shot 2:4": "one-shot", FEWER_STEPS[network]: "fewer-steps"}
    distilled = ("--model.noise_weight=0.0",) if variant == "sparsedm-distilled" else ()
    return Job(
        name=f"{network}-{variant}-{seed}",
        network=network,
        rows={**beside, result: variant},
        target="2:4",
        seed=seed,
        config=config,
        options=(*_options(network, beside), *distilled),
        tier=tier,
        minutes=MINUTES[network],
    )


def markdown(table: Table) -> str:
    """A table for each protocol: distance, and the paired difference from the dense fine-tuned network of the seed."""
    protocols = dict.fromkeys((row["fd_fashion"]["protocol"], row["fd_fashion"]["samples"]) for row in table.rows)
    return "\n\n".join(_of_protocol(table, *protocol) for protocol in protocols)


def _of_protocol(table: Table, protocol: str, samples: int) -> str:
    lines = [
        f"Protocol {protocol}, {samples:,} images:",
        "",
        "| network | variant | seed | fd_fashion (95 %) | less dense fine-tuned, paired | MACs an image |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(table, row) for row in table.rows if row["fd_fashion"]["protocol"] == protocol]
    return "\n".join(lines)


def _line(table: Table, row: Row) -> str:
    control = "dense-fine-tuned-long" if "-long" in row["variant"] else "dense-fine-tuned"
    wanted = (row["network"], row["seed"], control)
    controls = [other for other in table.rows if (other["network"], other["seed"], other["variant"]) == wanted]
    paired = table.difference(row, controls[0]) if controls and controls[0] is not row else None
    cells = [row["network"], row["variant"], str(row["seed"]), distance_cell(row), interval(paired)]
    return f"| {' | '.join(cells)} | {row['macs_per_image'] / 1e9:.2f} G |"


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "sparsedm" / "README.md"
    sys.exit(run_table(Table.read("sparsedm", "pattern"), list(jobs()), card, markdown))
