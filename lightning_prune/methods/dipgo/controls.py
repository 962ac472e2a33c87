"""What a schedule is compared with, at no more than its budget: plain samplers with fewer steps, and rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_prune.blocks import BlockCosts, BlockGraph, CacheMode, GateSchedule, Reuse, Row
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler, most_steps
from lightning_prune.diffusion.variants import Variant
from lightning_prune.protocols import InputError
from lightning_prune.pruning.budget import solve

Control = Literal[
    "fewer-steps", "kept-steps", "dpm-solver++", "dpm-solver++-kept", "whole-steps", "uniform-reuse", "random-gates"
]
# Compared with where nothing is said, as far as the sampler and the process have them.
_USUAL: tuple[Control, ...] = (
    "fewer-steps",
    "kept-steps",
    "dpm-solver++",
    "dpm-solver++-kept",
    "uniform-reuse",
    "random-gates",
)
# Times the largest score: full steps come before any part of another.
_CERTAIN = 1e3


@dataclass(frozen=True)
class GateProblem:
    """What a search is over: a network's blocks under a cache mode, their costs, a process and a sampler."""

    graph: BlockGraph
    mode: CacheMode
    costs: BlockCosts
    process: Process
    sampler: Sampler
    reuse: Reuse = "last"

    @property
    def steps(self) -> int:
        """Network calls of a trajectory."""
        return self.sampler.calls(self.process)

    def schedule(self, rows: Sequence[Row]) -> GateSchedule:
        return GateSchedule(self.graph.granularity, self.mode, self.graph.names, tuple(rows), self.reuse)

    def affordable_steps(self, budget: float) -> int:
        """How many dense network calls cost at most a budget; at least one."""
        return max(1, int(budget * self.steps + 1e-9))


def budget_name(budget: float) -> str:
    """A budget in rows and names of files: as short as says it exactly."""
    short = f"{budget:g}"
    return short if float(short) == budget else repr(budget)


def controls(
    asked: Sequence[Control] | None, sampler: Sampler, process: Process, reuse: Reuse = "last"
) -> list[Control]:
    """The controls asked for; None is the usual ones that there are for a sampler and a process.

    With linear reuse, full steps at equal distances are among them: lines are drawn through these, too.

    Raises:
        InputError: one asked for that there is not.
    """
    if asked is None:
        usual: tuple[Control, ...] = (*_USUAL, "whole-steps") if reuse == "linear" else _USUAL
        if sampler.name == "dpm-solver++":  # whose own controls are these already
            usual = tuple(name for name in usual if not name.startswith("dpm-solver++"))
        return [name for name in usual if _lacking(name, sampler, process) is None]
    for name in asked:
        if reason := _lacking(name, sampler, process):
            raise InputError(f"model.compare: {name}: {reason}")
    return list(asked)


def _lacking(name: Control, sampler: Sampler, process: Process) -> str | None:
    """Why there is no such control; None if there is."""
    try:
        if name.endswith("kept") or name == "kept-steps":
            replace(sampler, steps=1, timesteps=(0,))
        if name.startswith("dpm-solver++"):
            Sampler("dpm-solver++", 1).calls(process)
    except InputError as error:
        return str(error)
    return None


def control(
    name: Control, denoiser: Denoiser, problem: GateProblem, budget: float, learned: GateSchedule, seed: int = 0
) -> tuple[str, Variant]:
    """A row to report beside a schedule: its name, and what draws it.

    * fewer-steps: the same sampler with as many steps as the budget pays the network calls for.
    * kept-steps: the same sampler on the timesteps of the steps that the schedule keeps most of.
    * dpm-solver++: DPM-Solver++ with as many steps as the budget pays for.
    * dpm-solver++-kept: DPM-Solver++ on the timesteps of the steps that the schedule keeps most of.
    * whole-steps, uniform-reuse, random-gates: schedules of a rule, see `rule`.
    """
    count = problem.affordable_steps(budget)
    label = _steps(count)
    if name == "fewer-steps":
        sampler = most_steps(problem.sampler, problem.process, count)
        return f"{sampler.name} {_steps(sampler.steps)}", Variant(denoiser, sampler)
    if name == "kept-steps":
        return f"{problem.sampler.name} {label} kept", Variant(denoiser, kept_steps(problem, learned, count))
    if name == "dpm-solver++":
        sampler = Sampler("dpm-solver++", count, problem.sampler.guidance)
        return f"dpm-solver++ {label}", Variant(denoiser, sampler)
    if name == "dpm-solver++-kept":
        sampler = replace(kept_steps(problem, learned, count), name="dpm-solver++")
        return f"dpm-solver++ {label} kept", Variant(denoiser, sampler)
    found = rule(name, problem, budget, seed)
    return f"{name} {budget_name(budget)}", Variant(gated(denoiser, found, problem.process))


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def kept_steps(problem: GateProblem, schedule: GateSchedule, count: int) -> Sampler:
    """The sampler on the `count` steps that a schedule keeps most MACs of, the first among them."""
    visited = problem.sampler.visited(problem.process).tolist()
    chosen = sorted(_by_cost(problem, schedule.rows)[:count])
    return replace(problem.sampler, steps=len(chosen), timesteps=tuple(int(visited[step]) for step in chosen))


def _by_cost(problem: GateProblem, rows: Sequence[Row]) -> list[int]:
    """The first step, and after it the others by what they cost, dearest first."""
    weight = [problem.costs.step(row) for row in rows]
    return [0, *sorted(range(1, len(rows)), key=lambda step: (-weight[step], step))]


def as_whole_steps(
    problem: GateProblem, rows: Sequence[Row], scores: Sequence[Sequence[float]], budget: float
) -> tuple[Row, ...]:
    """The steps that a schedule keeps most of in full, and with what is left of the budget a part of the next one.

    Args:
        problem: blocks, costs and sampler.
        rows: the schedule, whose first step is full.
        scores: by which the blocks of that part are chosen [T][N].
        budget: fraction of MACs that is not exceeded.
    """
    order, count = _by_cost(problem, rows), problem.affordable_steps(budget)
    full, allowed = set(order[:count]), set(order[: count + 1])
    none = (False,) * len(problem.graph)
    within = [problem.graph.full() if step in allowed else none for step in range(len(rows))]
    certain = _CERTAIN * (1 + max(abs(score) for row in scores for score in row))
    worth = [[certain] * len(none) if step in full else list(row) for step, row in enumerate(scores)]
    return solve(worth, problem.graph, problem.costs, budget, within=within)


def rule(name: Control, problem: GateProblem, budget: float, seed: int = 0) -> GateSchedule:
    """A schedule that no search found.

    * whole-steps: full steps at equal distances; the others run no block.
    * uniform-reuse: full steps at equal distances; the others run the shallowest branch, the fewest blocks around the
      output, as DeepCache does on U-Nets (Ma et al. 2024), or none where the budget does not pay for these.
    * random-gates: the solver with random scores.

    Raises:
        InputError: a budget that does not pay for the first step.
    """
    if name == "random-gates":
        draw = random.Random(seed)
        scores = [[draw.random() for _ in problem.graph.names] for _ in range(problem.steps)]
        return problem.schedule(solve(scores, problem.graph, problem.costs, budget))
    if name == "whole-steps":
        rows = _interleaved(problem, (False,) * len(problem.graph), budget)
    else:
        branches = (shallow(problem.graph, depth) for depth in (1, 0))
        rows = next((rows for branch in branches if (rows := _interleaved(problem, branch, budget))), None)
    if rows is None:
        raise InputError(f"budget: {budget:g} is out of reach of {name}")
    return problem.schedule(rows)


def shallow(graph: BlockGraph, depth: int) -> Row:
    """The `depth` blocks that run last, and those they read which depend on no other block."""
    inside = set(graph.names[len(graph) - depth :])
    read = {name for block in graph.blocks if block.name in inside for name in block.producers}
    for block in graph.blocks:
        if block.name in read and inside.issuperset(block.producers):
            inside.add(block.name)
    return graph.running([name in inside for name in graph.names])


def _interleaved(problem: GateProblem, between: Row, budget: float) -> list[Row] | None:
    """As many full steps as the budget pays for at equal distances, and a row for those between them."""
    steps, total = problem.steps, budget * problem.costs.dense * problem.steps * (1 + 1e-12)
    cheap = problem.costs.step(between)
    count = int((total - steps * cheap) // max(1, problem.costs.dense - cheap)) if cheap < problem.costs.dense else 0
    if count < 1:
        return None
    full = {round(i * steps / min(count, steps)) for i in range(min(count, steps))}
    return [problem.graph.full() if step in full else between for step in range(steps)]
