"""`gates.json`: a schedule of gates as a file, and what it belongs to.

A schedule is found for one network, scheduler, number of network calls and kind of guidance, and says so by a
fingerprint. Elsewhere it is refused, or remapped to another solver and number of steps when asked; a pipeline, which
may hold the weights in another precision, is asked for its blocks and scheduler alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.block_costs import traced_costs
from lightning_prune.protocols import InputError

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
    """

    schedule: GateSchedule
    fingerprint: str
    scheduler: Mapping[str, Any]
    guidance: float
    budget: float
    macs_kept: Mapping[str, float]

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
        rows = ",\n    ".join(json.dumps([int(runs) for runs in row]) for row in self.schedule.rows)
        return json.dumps(content, indent=2)[:-2] + f',\n  "gates": [\n    {rows}\n  ]\n}}\n'


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
    rows = tuple(tuple(bool(gate) for gate in row) for row in content["gates"])
    if len(rows) != content["num_inference_steps"]:
        raise InputError(f"{file}: {len(rows)} rows of gates for {content['num_inference_steps']} steps")
    try:
        settings = content["granularity"], content["cache_mode"], tuple(content["blocks"])
        schedule = GateSchedule(*settings, rows, content.get("reuse", "last"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    names = ("fingerprint", "scheduler", "guidance", "budget", "macs_kept")
    return GateFile(schedule, *(content[name] for name in names))


def solver_config(sampler: Sampler, process: Process) -> dict[str, Any]:
    """Solver and noise schedule, as `gates.json` records them."""
    return {"solver": sampler.describe(), **process.scheduler_config}


def fingerprint(denoiser: Denoiser, scheduler: Mapping[str, Any], calls: int, guidance: float) -> str:
    """SHA-256 of the network's configuration and weights, the scheduler, the calls, and whether there is guidance."""
    digest = hashlib.sha256()
    facts = [denoiser.network_class.__name__, denoiser.config(), dict(scheduler), calls, guidance != 1.0]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(denoiser.network.state_dict().items()):
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
    if fingerprint(denoiser, scheduler, own.steps, guidance) != found.fingerprint:
        raise InputError(f"{file}: the schedule is for other weights, another process or another kind of guidance")
    if remap and calls != own.steps:
        own = own.remapped(calls, traced_costs(denoiser, own.granularity, own.cache_mode))
    return gated(denoiser, own, process, solver)
