"""What a schedule is compared with, at no more than its budget: plain samplers with fewer steps, and rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_prune.blocks import BlockCosts, BlockGraph, CacheMode, GateSchedule, Row
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler, make_solver
from lightning_prune.diffusion.variants import Variant
from lightning_prune.protocols import InputError
from lightning_prune.pruning.budget import solve

Control = Literal["fewer-steps", "kept-steps", "dpm-solver++", "whole-steps", "uniform-reuse", "random-gates"]


@dataclass(frozen=True)
class GateProblem:
    """What a search is over: a network's blocks under a cache mode, their costs, a process and a sampler."""

    graph: BlockGraph
    mode: CacheMode
    costs: BlockCosts
    process: Process
    sampler: Sampler

    @property
    def steps(self) -> int:
        """Network calls of a trajectory."""
        return self.sampler.calls(self.process)

    def schedule(self, rows: Sequence[Row]) -> GateSchedule:
        return GateSchedule(self.graph.granularity, self.mode, self.graph.names, tuple(rows))

    def affordable_steps(self, budget: float) -> int:
        """How many dense steps cost at most a budget; at least one."""
        return max(1, int(budget * self.steps + 1e-9))


def control(
    name: Control, denoiser: Denoiser, problem: GateProblem, budget: float, learned: GateSchedule, seed: int = 0
) -> tuple[str, Variant]:
    """A row to report beside a schedule: its name, and what draws it.

    * fewer-steps: the same sampler with as many steps as the budget pays for.
    * kept-steps: the same sampler on the timesteps of the steps that the schedule keeps most of.
    * dpm-solver++: DPM-Solver++ with as many steps as the budget pays for.
    * whole-steps, uniform-reuse, random-gates: schedules of a rule, see `rule`.
    """
    count = problem.affordable_steps(budget)
    label = f"{count} step" if count == 1 else f"{count} steps"
    if name == "fewer-steps":
        sampler = replace(problem.sampler, steps=count, timesteps=None)
        return f"{problem.sampler.name} {label}", Variant(denoiser, sampler)
    if name == "kept-steps":
        return f"{problem.sampler.name} {label} kept", Variant(denoiser, kept_steps(problem, learned, count))
    if name == "dpm-solver++":
        sampler = Sampler("dpm-solver++", count, problem.sampler.guidance)
        return f"dpm-solver++ {label}", Variant(denoiser, sampler)
    found = rule(name, problem, budget, seed)
    return name.replace("-", " "), Variant(gated(denoiser, found, problem.process), problem.sampler)


def kept_steps(problem: GateProblem, schedule: GateSchedule, count: int) -> Sampler:
    """The sampler on the `count` steps that a schedule keeps most MACs of, the first among them."""
    visited = make_solver(problem.sampler, problem.process).timesteps.tolist()
    weight = [problem.costs.step(row) for row in schedule.rows]
    best = sorted(range(1, len(visited)), key=lambda step: (-weight[step], step))[: count - 1]
    chosen = sorted({0, *best})
    return replace(problem.sampler, steps=len(chosen), timesteps=tuple(int(visited[step]) for step in chosen))


def rule(name: Control, problem: GateProblem, budget: float, seed: int = 0) -> GateSchedule:
    """A schedule that no search found.

    * whole-steps: full steps at equal distances, the others skipped as a whole where outputs are reused, and without
      any block where residuals are.
    * uniform-reuse: the same, but the skipped steps run the blocks next to the output, as many as the budget pays for
      (DeepCache, Ma et al. 2024; FORA, Selvaraju et al. 2024, where it pays for none).
    * random-gates: the solver with random scores.
    """
    if name == "random-gates":
        draw = random.Random(seed)
        scores = [[draw.random() for _ in problem.graph.names] for _ in range(problem.steps)]
        return problem.schedule(solve(scores, problem.graph, problem.costs, budget))
    depths = range(len(problem.graph)) if name == "uniform-reuse" else range(1)
    best: tuple[int, Sequence[Row]] | None = None
    for depth in depths:
        shallow = problem.graph.running([i >= len(problem.graph) - depth for i in range(len(problem.graph))])
        rows = _interleaved(problem, shallow, budget)
        # The deepest shallow steps that still leave half of what whole steps get.
        if rows is not None and (best is None or sum(map(all, rows)) * 2 >= best[0]):
            best = (best[0] if best else sum(map(all, rows)), rows)
    if best is None:
        raise InputError(f"budget: {budget:g} is out of reach of {name}")
    return problem.schedule(best[1])


def _interleaved(problem: GateProblem, shallow: Row, budget: float) -> list[Row] | None:
    """As many full steps as the budget pays for at equal distances, `shallow` ones between them."""
    steps, total = problem.steps, budget * problem.costs.dense * problem.steps * (1 + 1e-12)
    cheap = problem.costs.step(shallow)
    count = int((total - steps * cheap) // max(1, problem.costs.dense - cheap)) if cheap < problem.costs.dense else 0
    if count < 1:
        return None
    full = {round(i * steps / min(count, steps)) for i in range(min(count, steps))}
    return [problem.graph.full() if step in full else shallow for step in range(steps)]
