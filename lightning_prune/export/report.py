"""The report of a run: one table whose rows share a protocol, as JSON, as Markdown and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler, most_steps
from lightning_prune.diffusion.variants import Variant
from lightning_prune.metrics.evaluation import Score
from lightning_prune.metrics.frechet import Distance, paired_difference
from lightning_prune.metrics.latency import interleaved_medians
from lightning_prune.metrics.machine import versions
from lightning_prune.metrics.macs import weight_statistics
from lightning_prune.metrics.trajectory import TrajectoryCost, trajectory_cost
from lightning_prune.protocols import InputError
from lightning_prune.pruning.masks import baked

SCHEMA = 1
_EQUAL = Fraction(2, 1000)
"""Costs this near to each other, as a share of the dense run's, count as equal."""


@dataclass(frozen=True)
class Cost:
    """What one network costs: MACs of an image in a convention, parameters, and its masked share.

    `macs_kept` is relative to the first network of the table, the dense one.
    """

    macs_per_image: int
    macs_kept: float
    masked_share: float
    parameters: int
    nonzero_parameters: int


def costs(variants: Mapping[str, Variant], process: Process, sampler: Sampler) -> dict[str, Cost]:
    """Cost of one image of each network in the `aten` convention; masked layers keep n/m of their products."""
    found = {name: trajectory_cost(v.denoiser, process, v.sampler or sampler) for name, v in variants.items()}
    dense = next(iter(found.values())).macs()
    return {name: _cost(variants[name], trajectory, dense) for name, trajectory in found.items()}


def with_fewer_steps(variants: Mapping[str, Variant], process: Process, sampler: Sampler) -> dict[str, Variant]:
    """The control at equal cost: before the last network, the first with as many steps as the last one's MACs allow.

    A result stays a little below its budget, so the control may exceed its MACs by 0.2 % of the first network's: ten of
    twenty steps stand beside half of the MACs.
    """
    *rest, result = variants
    first = variants[rest[0]]
    budget = trajectory_cost(variants[result].denoiser, process, variants[result].sampler or sampler).macs()
    whole = trajectory_cost(first.denoiser, process, sampler).macs()
    calls = int((budget + _EQUAL * whole) * sampler.calls(process) / whole)
    fewer = most_steps(sampler, process, calls)
    control = {f"{rest[0]}, {fewer.steps} steps": Variant(first.denoiser, fewer)}
    return {**{name: variants[name] for name in rest}, **control, result: variants[result]}


def _cost(variant: Variant, trajectory: TrajectoryCost, dense: Fraction) -> Cost:
    weights = weight_statistics(baked(variant.denoiser))
    return Cost(
        macs_per_image=int(trajectory.macs()),
        macs_kept=float(trajectory.macs() / dense),
        masked_share=float(trajectory.masked_share()),
        parameters=weights.parameters,
        nonzero_parameters=weights.nonzero,
    )


def seconds_per_image(
    variants: Mapping[str, Variant], process: Process, sampler: Sampler, images: int, repeats: int, cond: Condition
) -> dict[str, float]:
    """Median seconds an image of each network, all in one interleaved measurement on baked weights.

    As many `images` as `cond` has conditions are drawn at once. Arms take turns, so all are held together; what no mask
    changes they share with the networks.
    """
    ids = torch.arange(images)

    def arm(variant: Variant) -> Any:
        plain = baked(variant.denoiser)
        return lambda: sample_images(plain, process, ids, cond, variant.sampler or sampler)

    medians = interleaved_medians({name: arm(variant) for name, variant in variants.items()}, repeats)
    return {name: seconds / images for name, seconds in medians.items()}


def row(name: str, score: Score, costs: Cost, seconds: float, own: Sampler | None = None) -> dict[str, Any]:
    """One row of `report.json`; `own` is its sampler where that is not the protocol's."""
    return {
        "name": name,
        **({"sampler": f"{own.describe()}, {own.steps} steps, guidance {own.guidance:g}"} if own else {}),
        score.metric: score.row(),
        "macs_per_image": costs.macs_per_image,
        "macs_kept": costs.macs_kept,
        "convention": "aten",
        "params": costs.parameters,
        "nonzero_params": costs.nonzero_parameters,
        "seconds_per_image": seconds,
        **({"further": {name: _stored(found) for name, found in score.further.items()}} if score.further else {}),
    }


def _stored(found: Distance | float) -> dict[str, float] | float:
    return _interval(found) if isinstance(found, Distance) else found


def build_report(
    method: str,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Score],
    floor: Distance,
) -> dict[str, Any]:
    """The content of `report.json`.

    Raises:
        InputError: rows of different protocols, which no table may mix.
    """
    protocols = {score.protocol.hash: score.protocol.content() for score in scores.values()}
    if len(protocols) != 1:
        raise InputError(f"report: rows of {len(protocols)} protocols cannot stand in one table: {sorted(protocols)}")
    return {
        "schema": SCHEMA,
        "method": method,
        "config": dict(config),
        "versions": versions(),
        "protocols": protocols,
        "floor": {"value": floor.value, "low": floor.low, "high": floor.high, "samples": len(floor.influence)},
        "rows": [dict(r) for r in rows],
        "comparisons": comparisons(scores),
    }


def objective(distance: float, macs_kept: float, budget: float | None) -> float:
    """What a sweep minimises: the distance, doubled for every tenth of the budget that MACs exceed it by.

    Smooth in the excess, so that a search learns where the limit is, and steep enough to stay within it.
    """
    excess = 0.0 if budget is None else max(0.0, macs_kept / budget - 1)
    return float(distance * 2 ** (10 * excess))


def comparisons(scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """Paired by sample: every network against the first, with the drift of its images, and the last against all."""
    first, *others = scores
    if not others:
        return []
    pairs = [(name, first) for name in others] + [(others[-1], name) for name in others[:-1]]
    return [_comparison(scores, name, against, against == first) for name, against in pairs]


def _comparison(scores: Mapping[str, Score], name: str, against: str, with_drift: bool) -> dict[str, Any]:
    score = scores[name]
    difference = _interval(paired_difference(score.fd, scores[against].fd))
    drift = score.drift.summary() if with_drift and score.drift else {}
    return {"name": name, "against": against, score.metric: difference, **drift}


def _interval(found: Distance) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def metric_of(report: Mapping[str, Any]) -> str:
    """Name of the distance in a report's rows."""
    row: Mapping[str, Any] = report["rows"][0]
    return next(key for key, value in row.items() if isinstance(value, dict) and "protocol" in value)


def to_markdown(report: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The report as a table for people."""
    (protocol,) = report["protocols"].values()
    lines = [
        f"# {report['method']}",
        "",
        *_table(headings(report), table_cells(report)),
        "",
        *_comparison_lines(report),
        *_further_lines(report),
        *[f"* {note}" for note in notes],
        f"* protocol {protocol['name']}: {protocol['samples']} images, {protocol['sampler']}, "
        f"{protocol['process']}, "
        f"{protocol['steps']} steps, guidance {protocol['guidance']:g}, {protocol['weights']} weights; "
        f"interval: {protocol['interval']}; hash {next(iter(report['protocols']))}",
    ]
    lines += [f"* {key}: {protocol[key]}" for key in ("prompts", "decoder") if key in protocol]
    if "decoder" in protocol:
        lines.append(f"* compared with: {protocol['reference']}")
    if protocol["rank_deficient"]:
        lines.append("* rank-deficient: no more samples than features, so the distance says little")
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *[f"| {' | '.join(row)} |" for row in cells]]


def _comparison_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["comparisons"]:
        return []
    metric = metric_of(report)
    titles = {metric: f"{metric} (95 %)", "psnr": "PSNR (dB)", "ssim": "SSIM", "mse": "MSE", "lpips": "LPIPS"}
    measured = [key for key in titles if key in report["comparisons"][0]]
    heads = ["difference, same seeds", *(titles[key] for key in measured)]
    cells = [
        [f"{c['name']} less {c['against']}", *(_cell(c[key]) if key in c else "" for key in measured)]
        for c in report["comparisons"]
    ]
    return [*_table(heads, cells), ""]


def _further_lines(report: Mapping[str, Any]) -> list[str]:
    names = list(report["rows"][0].get("further", {}))
    if not names:
        return []
    cells = [[r["name"], *(_cell(r["further"][name]) for name in names)] for r in report["rows"]]
    return [*_table(["network", *names], cells), ""]


def _cell(found: Mapping[str, float] | float) -> str:
    if isinstance(found, float):
        return f"{found:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def headings(report: Mapping[str, Any]) -> list[str]:
    """Headings of the columns of `table_cells`."""
    metric = metric_of(report)
    return ["network", f"{metric} (95 %)", "MACs an image (aten)", "kept", "non-zero parameters", "seconds an image"]


def table_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells of each row, as text."""
    metric = metric_of(report)
    return [
        [
            r["name"],
            _cell(r[metric]),
            f"{r['macs_per_image'] / 1e9:.3f} G",
            f"{100 * r['macs_kept']:.1f} %",
            f"{r['nonzero_params'] / 1e6:.2f} M of {r['params'] / 1e6:.2f} M",
            f"{r['seconds_per_image']:.4f}",
        ]
        for r in report["rows"]
    ]


def write_report(
    report: Mapping[str, Any], notes: Sequence[str], scores: Mapping[str, Score], folder: Path, name: str = "report"
) -> None:
    """Write `<name>.json` and `<name>.md` into `folder`, made if need be.

    `<name>-influence.safetensors` beside them holds each sample's influence on the distance, by row, from which
    networks of different runs are compared in pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    influence = {row: score.fd.influence.float().contiguous() for row, score in scores.items()}
    save_file(influence, folder / f"{name}-influence.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"{name}.md").write_text(to_markdown(report, notes))
