"""The two networks that `bench` compares, and what it has them do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition, move
from lightning_prune.diffusion.gated import StepGated, begin
from lightning_prune.diffusion.gating import sharing_copy
from lightning_prune.diffusion.models import Denoiser, families
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import Predict, guided, in_type, initial_noise, integrate
from lightning_prune.diffusion.solvers import Deterministic, Sampler, make_solver, usual_solver
from lightning_prune.export import load, switchable
from lightning_prune.export.artifact import MANIFEST, read_manifest
from lightning_prune.export.packed import sparse_layers
from lightning_prune.export.semi_structured import accelerate, stored_bytes
from lightning_prune.metrics.macs import count_denoiser, macs_per_image
from lightning_prune.metrics.samples import conditions_of
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError, Sparsity, StepAware
from lightning_prune.pruning.masks import baked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Task:
    """What is timed: one network call, or with `steps` a whole trajectory, of the usual solver or of `solver`.

    Raises:
        InputError: a solver or a number of steps the process does not have.
    """

    process: Process
    steps: int | None = None
    guidance: float | None = None
    solver: Deterministic | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            make_solver(self.sampler, self.process)

    @property
    def sampler(self) -> Sampler:
        """The trajectory's; of a single step for one network call."""
        solver = self.solver or usual_solver(self.process)
        return Sampler(solver, steps=1 if self.steps is None else self.steps, guidance=self.scale)

    @property
    def scale(self) -> float:
        """Guidance scale; 1 is none."""
        return 1.0 if self.guidance is None else self.guidance

    def describe(self) -> dict[str, Any]:
        """What is timed, for the result."""
        if self.steps is None:
            return {"name": "one network call"}
        return {"name": "trajectory", "sampler": self.sampler.describe(), "steps": self.steps, "guidance": self.scale}

    def arm(self, denoiser: Denoiser, mode: str, batch: int) -> Callable[[], Tensor]:
        """A function that does it once for `batch` images on the denoiser's device, in its type."""
        weight = next(denoiser.parameters())
        if self.steps is None and isinstance(denoiser, StepAware):
            raise InputError("--steps: the artifact works step by step; time a whole trajectory, with --steps N")
        predict: Predict = _compiled(denoiser) if mode == "compiled" else denoiser
        noise = initial_noise(torch.arange(batch), denoiser.sample_shape).to(weight.device)
        cond = denoiser.blank_condition(batch, weight.device)
        if denoiser.num_classes:
            cond = move(conditions_of(None, torch.arange(batch), denoiser.num_classes), weight.device)
        if self.steps is None:
            return _call(predict, noise.to(weight.dtype), cond)
        return self._trajectory(predict, denoiser, noise, cond)

    def _trajectory(self, predict: Predict, denoiser: Denoiser, noise: Tensor, cond: Condition) -> Callable[[], Tensor]:
        begin(denoiser, self.sampler, self.process)
        calls = self.sampler.calls(self.process)

        stepped: Any = predict

        def enter(index: int) -> None:
            if isinstance(stepped, StepAware):
                stepped.at_step(index, calls)

        typed = in_type(predict, next(denoiser.parameters()).dtype)
        both = guided(typed, denoiser.null_condition, self.scale, denoiser.guide)
        return lambda: integrate(both, self.process, noise, cond, self.sampler, enter)


def _compiled(denoiser: Any) -> Predict:
    """Compiled in the first call. Shapes are fixed, so the compiler may rely on them."""
    if not isinstance(denoiser, StepGated):
        compiled: Predict = torch.compile(denoiser, dynamic=False)
        return compiled
    beside = sharing_copy(denoiser)
    beside.compile_paths(dynamic=False)
    return beside


def _call(predict: Predict, x: Tensor, cond: Condition) -> Callable[[], Tensor]:
    t = torch.full((len(x),), 500, device=x.device)

    @torch.no_grad()
    def call() -> Tensor:
        return predict(x, t, cond)

    return call


@dataclass(frozen=True)
class Pair:
    """A dense network and the artifact made from it.

    Attributes:
        against: where the dense one comes from.
        folder: the artifact's.
        manifest: the artifact's.
        sparse: layers of the pruned one that a sparse kernel runs.
    """

    dense: Denoiser
    pruned: Denoiser
    against: str
    folder: Path
    manifest: Mapping[str, Any]
    sparse: int = 0

    def networks(self) -> dict[str, Denoiser]:
        """Both by name."""
        return {"dense": self.dense, "pruned": self.pruned}

    @property
    def device(self) -> torch.device:
        return next(self.pruned.parameters()).device

    @property
    def masks(self) -> dict[str, Sparsity]:
        """Patterns of the layers under a mask, by name."""
        patterns = self.manifest.get(switchable.KEY) or self.manifest.get("masks", {})
        return {name: Sparsity.parse(text) for name, text in patterns.items() if text}

    def process(self) -> Process:
        """The process the artifact samples; a default one, which takes as long, where it records none."""
        sampler = self.manifest.get("sampler")
        return Process.from_scheduler(sampler) if sampler else Process()

    def placed(self, device: torch.device, dtype: torch.dtype) -> Pair:
        """Copies of both on a device and in a type."""
        dense, pruned = (deepcopy(network).to(device, dtype) for network in (self.dense, self.pruned))
        if layers := sparse_layers(self.manifest, device, dtype):
            accelerate(pruned.network, layers, device)
        return replace(self, dense=dense, pruned=pruned, sparse=len(layers))

    def bytes(self, name: str) -> int:
        """Memory that parameters and buffers of one network take."""
        network = self.networks()[name]
        return sum(stored_bytes(tensor) for tensor in [*network.parameters(), *network.buffers()])

    def describe(self) -> dict[str, Any]:
        """Both networks, for the result."""
        patterns = Counter(str(sparsity) for sparsity in self.masks.values())
        artifact = {"folder": str(self.folder), "method": self.manifest.get("method", []), "masked": dict(patterns)}
        return {"dense": self.against, "pruned": artifact}

    def macs(self, task: Task) -> dict[str, Any]:
        """MACs an image of both; those of masked layers count n/m, whether or not a kernel saves the rest."""
        calls = task.sampler.calls(task.process)
        dense = macs_per_image(count_denoiser(self.dense).macs(), calls, task.scale)
        # An artifact with zeros in the place of masks says where these were.
        phases = trajectory_cost(self.pruned, task.process, task.sampler).phases
        kept = [macs_per_image(p.ledger.kept(p.masks or self.masks), p.calls, task.scale) for p in phases]
        pruned = sum(kept, Fraction(0))
        return {
            "convention": "aten",
            "dense_per_image": dense,
            "pruned_per_image": float(pruned),
            "ratio": float(pruned / dense),
            # Unless they are packed and there is a kernel, masked layers run as dense ones with zeros.
            "theoretical": bool(self.masks),
        }


def load_pair(folder: Path, against: str | None, subfolder: str | None) -> Pair:
    """Load an artifact and the dense network to compare it with, of one family.

    Raises:
        InputError: either cannot be loaded, no dense network is known, or it makes other images.
    """
    pruned, manifest = load(folder), read_manifest(folder)
    if switchable.KEY in manifest:  # under the pattern it comes with, whose masks are then not applied in every call
        pruned = baked(pruned)
    source = against or manifest["base"].get("weights")
    if source is None:
        raise InputError(f"{folder / MANIFEST}: records no base; name the dense network with --against")
    try:
        family = families()[manifest["base"]["class"]]
        dense = family(weights=source, subfolder=subfolder).eval()
    except InputError as error:
        hint = "" if against else f" (the base in {folder / MANIFEST}; --against names another)"
        raise InputError(f"--against: {error}{hint}") from error
    for what in ("sample_shape", "num_classes"):
        if getattr(dense, what) != getattr(pruned, what):
            raise InputError(f"--against: {source}: {what} {getattr(dense, what)}, of {folder} {getattr(pruned, what)}")
    return Pair(dense, pruned, source, folder, manifest)
