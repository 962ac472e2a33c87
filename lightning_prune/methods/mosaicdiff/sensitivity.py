"""What pruning a layer of a stage does to the network's output and to the final image, measured.

Relative errors of layers know their order of removal but not how much the layer matters. The error of the prediction
is measured at a few widths of every layer and stage, on states of the dense network's own trajectories, and lies
between them in proportion to the layer's error; stages are weighed by how far images drift when one alone is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition, move, stack
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.samplers import OnStep, Predict, guided, initial_noise, integrate
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.protocols import WidthGroup
from lightning_prune.pruning.allocation import Problem, rising
from lightning_prune.pruning.obs import Removal
from lightning_prune.pruning.replay import Replay
from lightning_prune.pruning.stages import Stage
from lightning_prune.pruning.structural import Width, masked, slim

if TYPE_CHECKING:
    from lightning_prune.methods.mosaicdiff.pruner import Pruner
    from lightning_prune.methods.mosaicdiff.recipe import Recipe

_SHARES = (1 / 3, 2 / 3)
_STEPS_PER_STAGE = 2
# Errors of early steps change which image is drawn more than how good it is, so drift alone weighs them too high.
_DRIFT_SHARE = 0.25


@dataclass
class Probe:
    """A few trajectories of the dense network, from noise that no evaluation uses.

    Args:
        dense: the dense denoiser.
        process: its process.
        sampler: the sampler.
        cond: one condition per image [N].
        seed: seed of the starting noise.
    """

    dense: Denoiser
    process: Process
    sampler: Sampler
    cond: Condition
    seed: int = 0
    _states: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _final: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.dense.parameters()).device

    @property
    def images(self) -> int:
        """Number of trajectories."""
        return len(self.cond) if isinstance(self.cond, Tensor) else len(next(iter(self.cond.values())))

    def states(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input [N, ...], timesteps [N] and guided prediction [N, ...] of the dense network at a step."""
        self._trace()
        return self._states[step]

    def final(self) -> Tensor:
        """Images of the dense network [N, ...]."""
        self._trace()
        assert self._final is not None
        return self._final

    def drift(self, denoiser: StagedDenoiser, first: int = 0) -> float:
        """Mean squared difference of a staged network's images from the dense network's.

        Args:
            denoiser: the stages.
            first: the first step at which they differ from the dense network; those before it are not computed again.
        """
        final, calls, now = self.final(), self.sampler.calls(self.process), [0]
        staged = guided(denoiser, denoiser.null_condition, self.sampler.guidance, denoiser.guide)

        def on_step(index: int) -> None:
            denoiser.at_step(index, calls)
            now[0] = index

        def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return staged(x, t, cond) if now[0] >= first else self._states[now[0]][2]

        return float((self._sample(predict, on_step) - final).square().mean())

    def predict(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The dense network's guided prediction, whatever is masked in it."""
        return guided(self.dense, self.dense.null_condition, self.sampler.guidance, self.dense.guide)(x, t, cond)

    def _trace(self) -> None:
        if self._final is not None:
            return

        def record(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            output = self.predict(x, t, cond)
            self._states.append((x, t, output))
            return output

        self._final = self._sample(record)

    def _sample(self, predict: Predict, on_step: OnStep | None = None) -> Tensor:
        noise = initial_noise(torch.arange(self.images), self.dense.sample_shape, self.seed).to(self.device)
        return integrate(predict, self.process, noise, move(self.cond, self.device), self.sampler, on_step)


@torch.no_grad()
def output_error(probe: Probe, steps: Sequence[int], group: WidthGroup, width: Width, replay: Replay) -> float:
    """Mean squared error of the prediction over the states of some steps, with a group masked to a width.

    `replay` keeps what the dense network gives up to the group.
    """
    x, t, expected = (torch.cat(parts) for parts in zip(*(probe.states(step) for step in steps), strict=True))
    cond = own = move(probe.cond, probe.device)
    for _ in steps[1:]:
        cond = stack(cond, own)
    with masked(probe.dense.network, group, width), replay.until(group.name, tuple(steps)):
        return float((probe.predict(x, t, cond) - expected).square().mean())


def steps_to_probe(stage: Stage) -> list[int]:
    """Up to two steps that stand for a stage."""
    count = min(_STEPS_PER_STAGE, stage.steps)
    return [stage.first + int((i + 0.5) * stage.steps / count) for i in range(count)]


def measured_errors(
    pruner: Pruner, stages: Sequence[Stage], recipe: Recipe, removals: list[list[Removal]], problem: Problem
) -> list[list[Tensor]]:
    """Cost of removing the first k units of each group in each stage [units], comparable over both."""
    found = []
    for stage, orders in zip(stages, removals, strict=True):
        replay = Replay(pruner.dense.network, [group.name for group in pruner.groups], pruner.curvature.folder)
        curves = [_curve(pruner, stage, recipe, g, order, problem.most(g), replay) for g, order in enumerate(orders)]
        weight = float(stage.steps)
        if recipe.sensitivity in ("balanced", "final"):
            drift = _drift_per_error(pruner, stages, stage, recipe, orders, curves, problem)
            share = 1.0 if recipe.sensitivity == "final" else _DRIFT_SHARE
            weight = weight ** (1 - share) * drift**share
        found.append([curve * weight for curve in curves])
    return found


def _curve(
    pruner: Pruner, stage: Stage, recipe: Recipe, number: int, removal: Removal, most: int, replay: Replay
) -> Tensor:
    """Output error of removing the first k units of one group, interpolated between measured widths."""
    group = pruner.groups[number]
    key = (stage, group.name, removal.order, recipe.compensate, recipe.affine, most)
    if key not in pruner.curves:
        pruner.curves[key] = _measure(pruner, stage, recipe, group, removal, most, replay)
    return pruner.curves[key]


def _measure(
    pruner: Pruner, stage: Stage, recipe: Recipe, group: WidthGroup, removal: Removal, most: int, replay: Replay
) -> Tensor:
    layer = pruner.layer(stage, group, recipe.affine) if recipe.compensate else None
    counts = sorted({max(1, round(share * most)) for share in _SHARES} | {most}) if most else []
    own, measured = [], []
    for count in counts:
        width = pruner.width(stage, group, recipe, removal, count, layer)
        own.append(max(float(removal.errors[count]), 1e-20))
        measured.append(max(output_error(pruner.probe, steps_to_probe(stage), group, width, replay), 1e-20))
    return interpolated(removal.errors, own, measured)


def interpolated(errors: Tensor, own: Sequence[float], measured: Sequence[float]) -> Tensor:
    """Errors of a layer [units] scaled to measured ones; the factor is interpolated over the layer's own error."""
    if not own:
        return errors.clone()
    levels = errors.clamp(min=1e-20).log().numpy()
    factor = np.interp(levels, np.log(own), np.log(measured) - np.log(own))
    scaled = errors * torch.from_numpy(np.exp(factor))
    return rising(scaled)


def _drift_per_error(
    pruner: Pruner,
    stages: Sequence[Stage],
    stage: Stage,
    recipe: Recipe,
    orders: Sequence[Removal],
    curves: Sequence[Tensor],
    problem: Problem,
) -> float:
    """Drift of final images over the summed output error, when this stage alone loses half of every width."""
    counts = [max(1, problem.most(g) // 2) if problem.most(g) else 0 for g in range(len(curves))]
    widths = {
        group.name: pruner.width(stage, group, recipe, order, count)
        for group, order, count in zip(pruner.groups, orders, counts, strict=True)
        if count
    }
    dense = pruner.dense.network
    networks = [slim(dense, pruner.groups, widths) if s == stage else dense for s in stages]
    one = StagedDenoiser(pruner.dense, networks, [s.steps for s in stages])
    error = sum(float(curve[count]) for curve, count in zip(curves, counts, strict=True))
    return pruner.probe.drift(one, stage.first) / max(error, 1e-30)
