"""`lightning_prune plan`: what a config would do, before anything is queued: from shapes, without weights or GPU."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, cast

from lightning_prune.blocks import BlockGraph
from lightning_prune.cli import plan_text
from lightning_prune.cli.export import build_module
from lightning_prune.cli.preflight import parse
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.diffusion.solvers import Sampler, SamplerName, usual_solver
from lightning_prune.metrics.macs import Ledger, macs_per_image
from lightning_prune.metrics.reach import (
    EXPLANATIONS,
    Axis,
    Reach,
    block_table,
    gate_reach,
    graphs,
    reached_macs,
    reached_parameters,
    weight_reach,
    width_groups,
    width_reach,
)
from lightning_prune.metrics.training_memory import TrainingMemory, activation_bytes, optimizer_bytes
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.module import PruningModule
from lightning_prune.protocols import InputError, Plan
from lightning_prune.pruning.masks import masked_layers, patterns_now, select_units

SCHEMA = 1
_METHODS: Mapping[Axis, str] = {"weights": "SparseDM", "widths": "MosaicDiff", "gates": "DiPGO"}
_USUAL_GROUP = 4
_SINGLE, _HALF = 4, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(args: Sequence[str]) -> int:
    """Parse `args`, print the plan and return the exit status."""
    parser = _Parser(prog="lightning_prune plan", description=__doc__, allow_abbrev=False, epilog=_EPILOG)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="config of the run; options of fit may follow and win")
    add("--json", action="store_true", help="print JSON, every layer included")
    add("--macs_kept", type=float, metavar="X", help="fail unless at most this fraction of the dense MACs is left")
    options, rest = parser.parse_known_args(list(args))
    config = parse(["fit", "--config", options.config, *rest])
    with without_weights():
        module = build_module(config)
        result = describe(module, config, options.config)
    _check(result["target"], options.macs_kept)
    print(json.dumps(result, indent=2) if options.json else plan_text.render(result))
    return 0


_EPILOG = "Exit status 2, with the reason, when the target cannot be reached."


def _check(target: Mapping[str, Any], macs_kept: float | None) -> None:
    """Raises `InputError` when more than `macs_kept` is left at the target."""
    if macs_kept is None or target["macs_kept"] <= macs_kept:
        return
    raise InputError(
        f"--macs_kept: {macs_kept:g} cannot be reached: {target['text']} on everything {target['method']} may touch "
        f"here leaves {target['macs_kept']:.4f}"
    )


def describe(module: PruningModule, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The plan of a module built without weights, as `--json` prints it."""
    denoiser = module.denoiser
    ledger, plan, sampler = module.ledger(), module.planned(), sampler_of(config, module)
    calls = sampler.calls(module.process)
    # Gates pay by what masks leave; under the other axes masks are what is planned.
    masks = patterns_now(denoiser.network) if plan.axis == "gates" else {}
    phases = trajectory_cost(denoiser, module.process, sampler).phases
    per_image = sum(macs_per_image(int(p.ledger.kept(masks)), p.calls, sampler.guidance) for p in phases)
    return {
        "schema": SCHEMA,
        "config": source,
        "method": type(module).__name__,
        "network": _network(denoiser, ledger),
        "sampling": {**asdict(sampler), "solver": sampler.describe(), "calls": calls, "macs_per_image": per_image},
        "reach": _reaches(denoiser, ledger, module),
        "target": _target(module, plan, per_image),
        "training_memory": _memory(module, plan, config),
        "blocks": {name: _blocks(denoiser, ledger, graph) for name, graph in graphs(denoiser)[0].items()},
    }


def sampler_of(config: Mapping[str, Any], module: PruningModule) -> Sampler:
    """The sampler of the method or of the config's report; 20 steps without guidance where there is neither."""
    own = getattr(module, "sampler", None)
    if isinstance(own, Sampler):
        return own
    settings: dict[str, Any] = {}
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        if str(callback.get("class_path", "")).endswith("EfficiencyReport"):
            settings = callback.get("init_args") or {}
    usual = usual_solver(module.process)
    name = usual if module.process.is_flow else settings.get("sampler") or usual
    return Sampler(cast(SamplerName, name), settings.get("steps", 20), settings.get("guidance", 1.0))


def _network(denoiser: Denoiser, ledger: Ledger) -> dict[str, Any]:
    parameters = sum(p.numel() for p in denoiser.parameters())
    return {
        "class": type(denoiser.network).__name__,
        "weights": denoiser.weights,
        "sample_shape": list(denoiser.sample_shape),
        "parameters": parameters,
        "bytes": _SINGLE * parameters,
        "macs_per_call": {convention: ledger.macs(convention) for convention in ("linear", "module", "aten")},
        "layers": dict(Counter(unit.kind for unit in denoiser.anatomy())),
        "width_groups": dict(Counter(group.kind for group in width_groups(denoiser)[0])),
    }


def _reaches(denoiser: Denoiser, ledger: Ledger, module: PruningModule) -> list[dict[str, Any]]:
    (groups, uncut), (found, ungated) = width_groups(denoiser), graphs(denoiser)
    chosen = masked_layers(denoiser.network)
    m = next((layer.sparsity.m for layer in chosen.values() if layer.sparsity), _USUAL_GROUP)
    names = set(chosen) or {u.name for u in select_units(denoiser.anatomy(), None, denoiser.default_dense(), m)}
    rows: list[tuple[Axis, str, list[Reach], BlockGraph | None]]
    rows = [("weights", f"groups of {m} inputs", weight_reach(denoiser, names, m), None)]
    if not uncut:
        rows.append(("widths", "inner widths", width_reach(denoiser, groups), None))
    rows += [("gates", name, gate_reach(denoiser, graph), graph) for name, graph in found.items()]
    refused: list[tuple[Axis, str]] = [("widths", uncut), ("gates", ungated)]
    return [
        *(_reach(denoiser, ledger, *row) for row in rows),
        *({"axis": axis, "method": _METHODS[axis], "what": why, "macs_share": 0.0} for axis, why in refused if why),
    ]


def _reach(
    denoiser: Denoiser, ledger: Ledger, axis: Axis, what: str, entries: list[Reach], graph: BlockGraph | None
) -> dict[str, Any]:
    macs = ledger.by_layer()
    reasons = {
        entry.reason: [e.layer for e in entries if e.reason == entry.reason] for entry in entries if entry.reason
    }
    return {
        "axis": axis,
        "method": _METHODS[axis],
        "what": what,
        "blocks": None if graph is None else len(graph),
        "layers": len(entries),
        "layers_touched": sum(entry.touched for entry in entries),
        "macs_share": reached_macs(denoiser, ledger, entries, axis, graph) / ledger.macs(),
        "parameters_share": reached_parameters(denoiser, entries) / ledger.parameters,
        "not_touched": {
            reason: {
                "why": EXPLANATIONS[reason],
                "layers": len(names),
                "macs_share": sum(macs.get(name, 0) for name in names) / ledger.macs(),
                "names": names,
            }
            for reason, names in reasons.items()
        },
        "touched": [entry.layer for entry in entries if entry.touched],
    }


def _target(module: PruningModule, plan: Plan, per_image: int) -> dict[str, Any]:
    before = sum(p.numel() for p in module.denoiser.parameters())
    # Zeros and skipped blocks are stored; of widths only the run knows what is left, in all stages together.
    stored = None if plan.parameters_kept is None else _SINGLE * before
    return {
        "method": type(module).__name__,
        "axis": plan.axis,
        "text": plan.target,
        "touched": len(plan.touched),
        "macs_kept": plan.macs_kept,
        "macs_per_image_before": per_image,
        "macs_per_image_after": round(per_image * plan.macs_kept),
        "parameters_before": before,
        "parameters_after": plan.parameters_kept,
        "bytes_before": _SINGLE * before,
        "bytes_after": stored,
    }


def _memory(module: PruningModule, plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """One step on one device; weights and what belongs to them in single precision, as mixed precision keeps them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in module.parameters())
    masks = sum(layer.weight.nbytes for layer in masked_layers(module.denoiser.network).values())
    precision = str((config.get("trainer") or {}).get("precision") or "32-true")
    batch = ((config.get("data") or {}).get("init_args") or {}).get("batch_size", 1)
    memory = TrainingMemory(
        weights=weights,
        gradients=sum(p.nbytes for p in trained),
        optimizer=optimizer_bytes(module._optimizer.value, trained),
        average=0 if module.ema_decay is None else weights,
        teacher=sum(p.nbytes for p in module.denoiser.parameters()) if plan.holds_teacher else 0,
        masks=masks,
        activations=activation_bytes(module.denoiser, batch, _HALF if "16" in precision else _SINGLE),
    )
    return {**asdict(memory), "total": memory.total, "batch_size": batch, "precision": precision}


def _blocks(denoiser: Denoiser, ledger: Ledger, graph: BlockGraph) -> dict[str, Any]:
    rows = block_table(denoiser, ledger, graph)
    inside = {c: sum(row.macs[c] for row in rows) for c in ("module", "aten")}
    total = {c: ledger.macs(c) for c in ("module", "aten")}
    return {
        "rows": [_plain(row) for row in rows],
        "shell": {c: total[c] - inside[c] for c in total},
        "total": total,
        "parameters": ledger.parameters,
        "cache_modes": list(graph.cache_modes),
    }


def _plain(row: Any) -> dict[str, Any]:
    return {"name": row.name, **row.macs, "parameters": row.parameters, "gamma": row.saved_with_it}
