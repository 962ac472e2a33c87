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
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from records import ROOT
from tables import UNTIMED, Job, Row, Table, distance_cell, run_table
from verdicts import CONTROL, against_rivals, chains, control_of, of_dense, runs, several

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.metrics.macs import Convention, count_denoiser
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import select_units

SEEDS = (0, 1, 2)
STEPS = {"fashion_dit": 300, "fashion_unet": 200}
MINUTES = {"fashion_dit": 5.5, "fashion_unet": 7.0}  # of two cores, as rows have taken in the median
# The dense network at no more MACs an image than 2:4 leaves.
FEWER_STEPS = {"fashion_dit": "dense, 10 steps", "fashion_unet": "dense, 10 steps"}
# Variant by config; all are the same method with other switches.
CORE = {
    "asp-retrained": "baselines/asp.yaml",
    "ste": "baselines/ste.yaml",
    "sr-ste": "baselines/sr-ste.yaml",
    "sparsedm-fixed": "sparsedm/fashion_dit_fixed.yaml",
    "sparsedm-progressive": "sparsedm/fashion_dit_progressive.yaml",
}
SMALL = {"fashion_dit": "baselines/small-dense.yaml", "fashion_unet": "baselines/small-dense-unet.yaml"}
# MACs that 2:4 for every layer leaves of the transformer's, as patterns by layer are allotted them.
ALLOCATED = "0.5453"
# Share of MACs that structural pruning removes to be left with those of 2:4.
REMOVED = {"fashion_dit": 0.455, "fashion_unet": 0.498}
EXTENSION = {
    "gradual-magnitude": "baselines/gradual-magnitude.yaml",
    "random-nm": "baselines/random-nm.yaml",
    "fixed-nm": "baselines/fixed-nm.yaml",
    "sparsedm-progressive-distilled": "sparsedm/fashion_dit_progressive.yaml",
    "sparsedm-progressive-fifths": "sparsedm/fashion_dit_progressive_fifths.yaml",
    "sparsedm-progressive-fifths-distilled": "sparsedm/fashion_dit_progressive_fifths.yaml",
    "sparsedm-fixed-constant": "sparsedm/fashion_dit_fixed.yaml",
    "sparsedm-progressive-constant": "sparsedm/fashion_dit_progressive.yaml",
    "sparsedm-progressive-fifths-constant": "sparsedm/fashion_dit_progressive_fifths.yaml",
    "sparsedm-progressive-eighths-constant": "sparsedm/fashion_dit_progressive_eighths.yaml",
    "sparsedm-fixed-published-loss": "sparsedm/fashion_dit_fixed.yaml",
    "sparsedm-freeze": "sparsedm/fashion_dit_freeze.yaml",
    "sparsedm-features": "sparsedm/fashion_dit_features.yaml",
    "sparsedm-min-snr": "sparsedm/fashion_dit_min_snr.yaml",
    "sparsedm-guided": "sparsedm/fashion_dit_guided.yaml",
    "sparsedm-wanda": "sparsedm/fashion_dit_wanda.yaml",
    "sparsedm-calibrated": "sparsedm/fashion_dit_calibrated.yaml",
    "sparsedm-calibrated-logarithmic": "sparsedm/fashion_dit_calibrated.yaml",
    "sparsedm-calibrated-lr-5e-4": "sparsedm/fashion_dit_calibrated.yaml",
    "sparsedm-calibrated-frozen": "sparsedm/fashion_dit_calibrated_frozen.yaml",
    "sparsedm-allocated": "sparsedm/fashion_dit_allocated.yaml",
    "sparsedm-calibrated-allocated": "sparsedm/fashion_dit_calibrated_allocated.yaml",
}
# The same of both networks.
EXTENSION_OF_BOTH = {
    "asp-retrained-taught": "baselines/asp.yaml",
    "ste-taught": "baselines/ste.yaml",
    "sparsedm-fixed-distilled": "sparsedm/fashion_dit_fixed.yaml",
}
DISTILL_ONLY = ("--model.noise_weight=0.0",)
# Baselines have no teacher as published; these have SparseDM's.
TAUGHT = ("--model.distill_weight=1.0",)
# Under the cosine the last fifth, which alone is 2:4, has next to no learning rate; the paper's rate is constant.
CONSTANT = ("--model.lr_schedule=constant",)
# What variants set beside their config.
SWITCHES = {
    "asp-retrained-taught": TAUGHT,
    "ste-taught": TAUGHT,
    "sparsedm-fixed-distilled": DISTILL_ONLY,
    "sparsedm-progressive-distilled": DISTILL_ONLY,
    "sparsedm-progressive-fifths-distilled": DISTILL_ONLY,
    "sparsedm-fixed-constant": CONSTANT,
    "sparsedm-progressive-constant": CONSTANT,
    "sparsedm-progressive-fifths-constant": CONSTANT,
    "sparsedm-progressive-eighths-constant": CONSTANT,
    "sparsedm-fixed-published-loss": ("--model.distill_weight=0.1",),
    "sparsedm-calibrated-logarithmic": ("--model.calibration.weighting=logarithmic",),
    # The rate of all others was chosen for masks that begin at a distance of 50, not of 10.
    "sparsedm-calibrated-lr-5e-4": ("--model.optimizer.lr=5e-4",),
}
# Strengths of the decay beside the 2e-4 of all others; the rate of flips is what it is chosen by (Hu et al. 2024).
# None at all is ste-taught.
DECAYS = ("2e-6", "2e-5", "2e-3")
EXTENSION |= {f"sparsedm-fixed-decay-{decay}": "sparsedm/fashion_dit_fixed.yaml" for decay in DECAYS}
SWITCHES |= {f"sparsedm-fixed-decay-{decay}": (f"--model.decay={decay}",) for decay in DECAYS}
NOTE = (
    "Differences are paired and means over the seeds that both have, their number in brackets; intervals are over "
    "samples, not over seeds. The dense control is fine-tuned for as many steps with the losses of sparsedm-fixed: "
    "that of the data and a teacher's. Variants named distilled have the teacher's alone; asp-retrained, ste, sr-ste, "
    "gradual-magnitude, fixed-nm and random-nm that of the data alone, as published, unless named taught. Variants "
    "named long have a long control, those named constant one of their constant rate, and what trains nothing the "
    "dense start."
)
LEGEND = (
    "Flips: share of mask entries that change in a step, over the last tenth of the steps, where the learning rate is "
    "nearly 0 (but for variants named constant), and over all; of the dense control those that 2:4 masks would have. "
    "Hu et al. (2024) choose the decay by the ratio of the two, which stands there for runs that are 2:4 from first to "
    "last. Minutes: the whole run, on a shared machine; rows of one run have the same."
)
# Variants with a pattern for each layer.
BY_LAYER = ("sparsedm-allocated", "sparsedm-calibrated-allocated", "sparsedm-calibrated-long")
UNET = (
    "--model.denoiser=lightning_prune.diffusion.models.unet2d.UNet2D",
    "--model.denoiser.weights=embedded:fashion_unet",
)


# What was tried to bring 2:4 nearer to the dense fine-tuned network than the longer run does: on the quick start, whose
# rows are of protocol quick-v1 and stand beside each other, not beside the rest.
TRIED = {
    "quick-start": (),
    "quick-start-distill-only": DISTILL_ONLY,
    "quick-start-muon": ("--model.optimizer=timm.optim.muon.Muon", "--model.optimizer.lr=0.003"),
    "quick-start-freeze": ("--model.freeze_masks_at=0.85",),
}


def jobs() -> Iterator[Job]:
    """Every run of the table, the longer runs last."""
    for seed in SEEDS:
        for network in STEPS:
            yield _control(network, seed)
            for variant, config in CORE.items():
                yield _job(network, variant, config, seed, "core")
            yield _small(network, seed)
    for network in STEPS:
        for variant, config in EXTENSION_OF_BOTH.items():
            yield _job(network, variant, config, 0, "extension")
    for variant, config in EXTENSION.items():
        yield _job("fashion_dit", variant, config, 0, "extension")
    yield _constant_control()
    yield _several()
    for pattern in ("7:8", "1:4"):
        yield _fixed("sparsedm-fixed", pattern)
    for variant in ("asp-retrained", "sr-ste"):
        yield _fixed(variant, "1:4")
    for network in STEPS:
        yield _one_shot(
            network, "calibrated-one-shot", "calibrated one-shot at 2:4", "baselines/calibrated-one-shot.yaml"
        )
        removed = f"--model.target={REMOVED[network]}"
        config = "baselines/one-network-diff-pruning.yaml"
        yield _one_shot(network, "diff-pruning-one-shot", "mosaicdiff uniform", config, (removed,))
        yield _diff_pruning(network)
    for variant, options in TRIED.items():
        yield _single(variant, "quickstart.yaml", 5.0, options)
    yield _single("dense-fine-tuned-long", "baselines/dense-fine-tuned.yaml", 15.0)
    yield _single("sparsedm-long", "sparsedm/fashion_dit_2to4.yaml", 18.0)
    yield _single("sparsedm-long-distilled", "sparsedm/fashion_dit_2to4.yaml", 18.0, DISTILL_ONLY)
    yield _single(
        "sparsedm-calibrated-long",
        "sparsedm/fashion_dit_calibrated_long.yaml",
        30.0,
        ("--trainer.callbacks.init_args.rows=[]",),
    )
    yield _single(
        "sparsedm-calibrated-long-2:4",
        "sparsedm/fashion_dit_calibrated_long.yaml",
        30.0,
        ("--model.allocation=null", "--trainer.callbacks.init_args.rows=[]"),
    )


def _options(network: str, rows: Iterable[str]) -> tuple[str, ...]:
    """What all runs of the table share, whatever their configs say, and the rows that are scored beside the result."""
    return (*(UNET if network == "fashion_unet" else ()), *_training(network, rows))


def _training(network: str, rows: Iterable[str] = ()) -> tuple[str, ...]:
    """The same for a network that the config names itself."""
    steps = STEPS[network]
    return (
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        "--model.warmup_steps=20",
        "--model.ema_decay=0.98",
        f"--trainer.callbacks.init_args.rows={json.dumps(list(rows))}",
        *UNTIMED,
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


def _constant_control() -> Job:
    """The dense network, fine-tuned at the constant rate that some variants have."""
    job = _control("fashion_dit", 0)
    return replace(
        job,
        name="fashion_dit-dense-fine-tuned-constant-0",
        rows={"dense fine-tuned": "dense-fine-tuned-constant"},
        options=(*_options("fashion_dit", []), "--trainer.precision=32-true", "--model.compile=false", *CONSTANT),
        tier="extension",
    )


def _single(variant: str, config: str, minutes: float, options: tuple[str, ...] = ()) -> Job:
    dense = variant == "dense-fine-tuned-long"
    job = Job(
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
    return _allocated(job) if variant in BY_LAYER else job


def _allocated(job: Job) -> Job:
    """A pattern for each layer at the MACs that 2:4 for all would leave: no layer need be 2:4."""
    (variant,) = job.rows.values()
    rows = {f"sparsedm {ALLOCATED} of MACs": variant}
    return replace(job, rows=rows, target=ALLOCATED, target_kind="macs_kept")


def _fixed(variant: str, pattern: str) -> Job:
    """Another ratio: 7:8 for one set of weights at several to be held against, 1:4 as a harsher one."""
    return replace(
        _job("fashion_dit", f"{variant}-{pattern}", CORE[variant], 0, "extension"),
        rows={f"sparsedm {pattern}": f"{variant}-{pattern}"},
        target=pattern,
        options=(*_options("fashion_dit", []), f"--model.sparsity={pattern}"),
    )


def _several() -> Job:
    """One set of weights for dense, 7:8 and 2:4, to be held against runs of one ratio each."""
    rows = {f"sparsedm at {name}": f"sparsedm-several-at-{name}" for name in ("dense", "7:8")}
    job = _job("fashion_dit", "sparsedm-several", "sparsedm/fashion_dit_several.yaml", 0, "extension")
    return replace(
        job, rows={**rows, **job.rows}, options=_options("fashion_dit", rows), minutes=3 * MINUTES["fashion_dit"]
    )


def _small(network: str, seed: int) -> Job:
    """A smaller dense network of about equal MACs, which begins with what it can take over."""
    return Job(
        name=f"{network}-small-dense-{seed}",
        network=network,
        rows={"small dense": "small-dense"},
        target="2:4",
        seed=seed,
        config=SMALL[network],
        options=_training(network),
        minutes=MINUTES[network],
    )


def _one_shot(network: str, variant: str, row: str, config: str, options: tuple[str, ...] = ()) -> Job:
    """A run that calibrates and trains nothing, and the dense network drawn from weights that are no average either."""
    unet = UNET if network == "fashion_unet" else ()
    return Job(
        name=f"{network}-{variant}-0",
        network=network,
        rows={"dense": control_of(variant), row: variant},
        target="2:4",
        seed=0,
        config=config,
        options=(*unet, *options, '--trainer.callbacks.init_args.rows=["dense"]', *UNTIMED),
        tier="extension",
        minutes=MINUTES[network],
    )


def _diff_pruning(network: str) -> Job:
    """The structurally pruned network, fine-tuned like the others."""
    teacher = tuple(option.replace("model.denoiser", "model.teacher") for option in UNET)
    return Job(
        name=f"{network}-diff-pruning-0",
        network=network,
        rows={"small dense": "diff-pruning"},
        target="2:4",
        seed=0,
        config="baselines/diff-pruning.yaml",
        options=(
            *(teacher if network == "fashion_unet" else ()),
            *_training(network),
            "--model.denoiser.path={after}/artifact",
        ),
        tier="extension",
        minutes=MINUTES[network],
        after=f"{network}-diff-pruning-one-shot-0",
    )


def _job(network: str, variant: str, config: str, seed: int, tier: str) -> Job:
    beside = {}
    if variant == "asp-retrained":
        beside = {"one-shot 2:4": "one-shot", FEWER_STEPS[network]: "fewer-steps"}
    job = Job(
        name=f"{network}-{variant}-{seed}",
        network=network,
        rows={**beside, "sparsedm 2:4": variant},
        target="2:4",
        seed=seed,
        config=config,
        options=(*_options(network, beside), *SWITCHES.get(variant, ())),
        tier=tier,
        minutes=MINUTES[network],
    )
    return _allocated(job) if variant in BY_LAYER else job


def markdown(table: Table) -> str:
    """What the rows say, then all of them, folded away, and what 2:4 keeps in each convention."""
    named = dict.fromkeys(row["variant"] for row in table.rows)
    measured = [variant for variant in named if variant not in (CONTROL, "dense") and control_of(variant) != variant]
    parts = {
        "Less the dense control": of_dense(table, measured),
        "Less each rival": against_rivals(table),
        "Chains of ratios": chains(table),
        "One set of weights at several ratios": several(table),
    }
    said = [NOTE, *(f"{title}:\n\n" + "\n".join(lines) for title, lines in parts.items() if len(lines) > 2)]
    rows = "\n\n".join(_of_protocol(table, *protocol) for protocol in _protocols(table))
    folded = f"<details>\n<summary>All {len(table.rows)} rows</summary>\n\n{rows}\n\n{LEGEND}\n\n</details>"
    return "\n\n".join([*said, folded, conventions()])


def _protocols(table: Table) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["fd_fashion"]["protocol"], row["fd_fashion"]["samples"]) for row in table.rows))


def _of_protocol(table: Table, protocol: str, samples: int) -> str:
    lines = [
        f"Protocol {protocol}, {samples:,} images:",
        "",
        "| network | variant | seed | fd_fashion (95 %) | MACs | flips at the end | mean | of dense's | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(table, row) for row in table.rows if row["fd_fashion"]["protocol"] == protocol]
    return "\n".join(lines)


def _line(table: Table, row: Row) -> str:
    cells = [row["network"], row["variant"], str(row["seed"]), distance_cell(row)]
    cells += [f"{row['macs_per_image'] / 1e9:.2f} G", *_flips(table, row), f"{row['minutes']:g}"]
    return f"| {' | '.join(cells)} |"


def _flips(table: Table, row: Row) -> list[str]:
    """Flips at the end of a run, on average, and these over the dense control's; blank where nothing is trained."""
    if "one-shot" in row["variant"] or row["variant"] in ("dense", "fewer-steps") or "flip_rate" not in row:
        return ["", "", ""]
    mean, control = row.get("mean_flip_rate"), runs(table, row["network"], control_of(row["variant"])).get(row["seed"])
    comparable = row["variant"] in ("ste", "sr-ste", "ste-taught") or row["variant"].startswith("sparsedm-fixed")
    if row["target"] != "2:4" or not comparable:
        control = None
    of_dense = mean / control["mean_flip_rate"] if control and mean and control.get("mean_flip_rate") else None
    shown = [f"{value:.0e}" if value is not None else "" for value in (row["flip_rate"], mean)]
    return [*shown, f"{of_dense:.2f}" if of_dense is not None else ""]


def conventions() -> str:
    """What 2:4 keeps of a call's MACs, in every convention."""
    lines = ["| network | convention | dense, MACs a call | kept under 2:4 |", "|---|---|---|---|"]
    for network, denoiser in (("fashion_dit", DiT(weights="embedded:fashion_dit")), ("fashion_unet", _unet())):
        ledger = count_denoiser(denoiser)
        units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
        masks = {unit.name: Sparsity(2, 4) for unit in units}
        for convention in get_args(Convention):
            share = float(ledger.kept_share(masks, convention))
            lines.append(f"| {network} | {convention} | {ledger.macs(convention) / 1e6:.2f} M | {100 * share:.2f} % |")
    return "\n".join(lines)


def _unet() -> Denoiser:
    return UNet2D(weights="embedded:fashion_unet")


if __name__ == "__main__":
    card = ROOT / "lightning_prune" / "methods" / "sparsedm" / "README.md"
    sys.exit(run_table(Table.read("sparsedm", "pattern"), list(jobs()), card, markdown))
