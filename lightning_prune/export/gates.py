"""`gates.json`: a schedule of gates as a file, and what it belongs to.

A schedule is found for one network, scheduler, number of network calls and kind of guidance, and says so by a
fingerprint. Elsewhere it is refused, or remapped to another solver and number of steps when asked; a pipeline, which
may hold the weights in another precision, is asked for its blocks and scheduler alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.blocks import BlockCosts, BlockGraph, GateSchedule
from lightning_prune.diffusion.gated import MadeFor, gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.block_costs import traced_costs
from lightning_prune.protocols import InputError
from lightning_prune.pruning.masks import effective_weights

GATES = "gates.json"
SCHEMA = 1
_KEYS = (
    "schema", "fingerprint", "scheduler", "num_inference_steps", "guidance", "granularity", "cache_mode", "blocks",
    "gates", "budget", "macs_kept",
)  # fmt: skip


@dataclass(frozen=True)
class GateFile:
    """The content of `gates.json`.

    Attributes:
        schedule: the gates.
        fingerprint: what they were found for; see `fingerprint`.
        scheduler: its solver and the process' scheduler configuration.
        guidance: guidance scale.
        budget: fraction of MACs aimed at.
        macs_kept: fractions of MACs realised, by convention.
        costs: MACs of the blocks in the `aten` convention; None in files of versions that did not write them.
        network: class and configuration of the network; None in files of versions that did not write them.
        seconds_kept: fraction of the time of network calls, as measured where a search had a budget of seconds.
        timesteps: of the network calls; None in files of versions that did not write them.
    """

    schedule: GateSchedule
    fingerprint: str
    scheduler: Mapping[str, Any]
    guidance: float
    budget: float
    macs_kept: Mapping[str, float]
    costs: BlockCosts | None = None
    seconds_kept: float | None = None
    network: Mapping[str, Any] | None = None
    timesteps: tuple[float, ...] | None = None

    def text(self) -> str:
        """As JSON, a row of gates a line."""
        content = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "scheduler": dict(self.scheduler),
            "num_inference_steps": self.schedule.steps,
            "guidance": self.guidance,
            "granularity": self.schedule.granularity,
            "cache_mode": self.schedule.cache_mode,
            "reuse": self.schedule.reuse,
            "blocks": list(self.schedule.blocks),
            "budget": self.budget,
            "macs_kept": dict(self.macs_kept),
        }
        if self.timesteps is not None:
            content["timesteps"] = list(self.timesteps)
        if self.seconds_kept is not None:
            content["seconds_kept"] = self.seconds_kept
        if self.network is not None:
            content["network"] = dict(self.network)
        if self.costs is not None:
            content["block_macs"] = {"blocks": list(self.costs.blocks), "outside": self.costs.shell}
        rows = ",\n    ".join(json.dumps([int(runs) for runs in row]) for row in self.schedule.rows)
        return json.dumps(content, indent=2)[:-2] + f',\n  "gates": [\n    {rows}\n  ]\n}}\n'

    def check_blocks(self, file: Path, graph: BlockGraph) -> None:
        """Raise `InputError` for gates of other blocks than a network's, or open ones whose blocks nothing reads."""
        if graph.names != self.schedule.blocks:
            raise InputError(f"{file}: its blocks {' '.join(self.schedule.blocks)} are not the network's")
        wired = graph.in_mode(self.schedule.cache_mode)
        for step, row in enumerate(self.schedule.rows):
            if wired.running(row) != row:
                raise InputError(f"{file}: gates of step {step} are open for blocks that nothing reads which runs")

    def check_network(self, file: Path, name: str, config: Mapping[str, Any]) -> None:
        """Raise `InputError` for a network of another class or configuration; keys that one of them lacks are new."""
        if self.network is None:
            return
        if name != self.network["class"]:
            raise InputError(f"{file}: found for a {self.network['class']}, not a {name}")
        theirs = _plain(config)
        for key, value in self.network["config"].items():
            if theirs.get(key, value) != value:
                raise InputError(f"{file}: found for a network of {key} {value}, not {theirs[key]}")


def network_of(denoiser: Denoiser) -> dict[str, Any]:
    """Class and configuration of a network, as `gates.json` records them."""
    return {"class": denoiser.network_class.__name__, "config": _plain(denoiser.config())}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration of diffusers what describes the network, as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if k[0] != "_"}, default=str))
    return found


def gates_of(budget: str) -> str:
    """Name of the file with the schedule of a further budget."""
    return f"gates-{budget}.json"


def read_gates(file: Path) -> GateFile:
    """Read `gates.json`.

    Raises:
        InputError: a missing or damaged file, one of a newer schema, or gates that are no schedule.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        schema = int(content["schema"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: missing or damaged") from error
    if schema > SCHEMA:
        raise InputError(f"{file}: schema {schema} is newer than this version reads ({SCHEMA}); update lightning_prune")
    if missing := [key for key in _KEYS if key not in content]:
        raise InputError(f"{file}: {missing[0]} is missing")
    for key, right in _RIGHT.items():
        if key in content and not right(content[key]):
            raise InputError(f"{file}: {key}: {json.dumps(content[key])[:60]} is not what it should be")
    rows = tuple(tuple(bool(gate) for gate in row) for row in content["gates"])
    if len(rows) != content["num_inference_steps"]:
        raise InputError(f"{file}: {len(rows)} rows of gates for {content['num_inference_steps']} steps")
    if len(content.get("timesteps", rows)) != len(rows):
        raise InputError(f"{file}: {len(content['timesteps'])} timesteps for {len(rows)} rows of gates")
    try:
        settings = content["granularity"], content["cache_mode"], tuple(content["blocks"])
        schedule = GateSchedule(*settings, rows, content.get("reuse", "last"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return GateFile(
        schedule=schedule,
        fingerprint=content["fingerprint"],
        scheduler=content["scheduler"],
        guidance=content["guidance"],
        budget=content["budget"],
        macs_kept=content["macs_kept"],
        costs=_block_costs(file, content),
        seconds_kept=content.get("seconds_kept"),
        network=content.get("network"),
        timesteps=tuple(content["timesteps"]) if "timesteps" in content else None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_gates(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(gate, int) and gate in (0, 1) for gate in row) for row in value
    )


def _is_network(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class"), str) and isinstance(value.get("config"), dict)


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str),
    "scheduler": lambda value: isinstance(value, dict) and isinstance(value.get("solver"), str),
    "guidance": _is_number,
    "granularity": lambda value: isinstance(value, str),
    "blocks": _is_names,
    "gates": _is_gates,
    "budget": lambda value: _is_number(value) and 0 < value <= 1,
    "macs_kept": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "seconds_kept": _is_number,
    "network": _is_network,
    "timesteps": lambda value: isinstance(value, list) and all(map(_is_number, value)),
}


def _block_costs(file: Path, content: Mapping[str, Any]) -> BlockCosts | None:
    if "block_macs" not in content:
        return None
    try:
        costs = BlockCosts(
            tuple(int(n) for n in content["block_macs"]["blocks"]), int(content["block_macs"]["outside"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: block_macs: not MACs of blocks and outside of them") from error
    if len(costs.blocks) != len(content["blocks"]):
        raise InputError(f"{file}: block_macs: {len(costs.blocks)} for {len(content['blocks'])} blocks")
    return costs


def solver_config(sampler: Sampler, process: Process) -> dict[str, Any]:
    """Solver and noise schedule, as `gates.json` records them."""
    return {"solver": sampler.describe(), **process.scheduler_config}


def fingerprint(denoiser: Denoiser, scheduler: Mapping[str, Any], calls: int, guidance: float) -> str:
    """SHA-256 of the network's class and weights, the scheduler, the calls, and whether there is guidance.

    Weights count as the network computes with them and artifacts store them, with zeros where they are masked. The
    configuration is compared on its own: a newer diffusers may have added keys to it.
    """
    digest = hashlib.sha256()
    facts = [denoiser.network_class.__name__, dict(scheduler), calls, guidance != 1.0]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted((denoiser.network.state_dict() | effective_weights(denoiser.network)).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def apply_gates(
    denoiser: Denoiser, file: Path, process: Process, sampler: Sampler | None = None, remap: bool = False
) -> Denoiser:
    """The denoiser under the schedule of a file, beside the untouched one.

    Args:
        denoiser: the network the schedule was found for.
        file: `gates.json`, or the file of a further budget.
        process: how predictions are read.
        sampler: the sampler it is to run with; null is the schedule's own.
        remap: stretch the schedule to another sampler, number of steps or guidance instead of refusing it.

    Raises:
        InputError: a damaged file, or a schedule for another network, scheduler, number of steps or guidance.
    """
    found = read_gates(file)
    own, calls = found.schedule, found.schedule.steps if sampler is None else sampler.calls(process)
    solver = found.scheduler.get("solver") if sampler is None else sampler.describe()
    guidance = found.guidance if sampler is None or remap else sampler.guidance
    if not remap and solver != found.scheduler.get("solver"):
        raise InputError(f"{file}: the schedule is for {found.scheduler.get('solver')}, not {solver}")
    if not remap and calls != own.steps:
        raise InputError(f"{file}: the schedule is for {own.steps} network calls, not {calls}")
    scheduler = {"solver": found.scheduler.get("solver"), **process.scheduler_config}
    known = not any(p.is_meta for p in denoiser.parameters())  # a plan has shapes alone
    if known and fingerprint(denoiser, scheduler, own.steps, guidance) != found.fingerprint:
        raise InputError(f"{file}: the schedule is for other weights, another process or another kind of guidance")
    found.check_network(file, denoiser.network_class.__name__, denoiser.config())
    found.check_blocks(file, denoiser.blocks(own.granularity))
    if remap and calls != own.steps:
        own = own.remapped(calls, traced_costs(denoiser, own.granularity, own.cache_mode))
    guided = (found.guidance if sampler is None else sampler.guidance) != 1.0
    return gated(denoiser, own, process, MadeFor(str(solver), guided, process.scheduler_config))
