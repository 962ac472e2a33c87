"""Where the stages of recipes lie on a sampler's trajectory, and which timesteps they are calibrated at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler, SamplerName, most_steps
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.protocols import InputError
from lightning_prune.pruning.stages import (
    Grid,
    Stage,
    equal_stages,
    flow,
    published_stages,
    stages_of,
    uniform_positions,
    variance_preserving,
)


def sampler_of(name: SamplerName, calls: int, process: Process) -> Sampler:
    """The solver in as many steps as make `calls` network calls; PLMS makes one more than it has steps.

    Raises:
        InputError: no number of steps makes as many.
    """
    sampler = most_steps(Sampler(name, calls), process, calls)
    if sampler.calls(process) != calls:
        raise InputError(f"model.sampler: no number of {name} steps makes the {calls} network calls of the stages")
    return sampler


def check_calls(drawn: Sampler, process: Process, calls: int) -> None:
    """Refuse a sampler of another number of network calls than stages were made for.

    Another solver or guidance of as many calls costs the same share.
    """
    if (theirs := drawn.calls(process)) != calls:
        raise InputError(
            f"draws in {theirs} network calls ({drawn.describe()}, {drawn.steps} steps), "
            f"but model.steps makes stages for {calls}"
        )


def sampling_grid(process: Process, sampler: Sampler) -> Grid:
    """The grid that a sampler's stages are scored on: uniform, or the sampler's own timesteps where they are listed."""
    visited = sampler.visited(process)
    if process.is_flow:
        levels = visited.double().flip(0) / process.timesteps
        return flow(levels, [round(float(level) * process.timesteps) for level in levels])
    if sampler.timesteps is not None:
        return variance_preserving(process.alphas_cumprod, [int(t) + 1 for t in visited.flip(0)])
    return variance_preserving(process.alphas_cumprod, uniform_positions(process.timesteps, len(visited)))


def stages_for(recipe: Recipe, grid: Grid, power: float) -> list[Stage]:
    """The stages of a recipe. `power` is the mean square v of clean data."""
    if recipe.stages is not None:
        return equal_stages(len(grid), recipe.stages)
    score = grid.score(power, recipe.snr_weight)
    return published_stages(score, grid.expected_gradient(power), recipe.threshold)


def refine(partitions: Iterable[Sequence[Stage]]) -> list[Stage]:
    """The coarsest stages that every stage of every partition is a union of."""
    ends = sorted({stage.end for stages in partitions for stage in stages})
    return stages_of([end - start for start, end in zip([0, *ends], ends, strict=False)])


def share_of_bins(stage: Stage, bins: Sequence[Stage]) -> list[float]:
    """How many steps of a stage lie in each bin."""
    return [float(max(0, min(stage.end, b.end) - max(stage.first, b.first))) for b in bins]


def timesteps_of(stage: Stage, visited: Tensor, process: Process) -> Tensor:
    """Every training timestep of a stage: from its first visited one down to the next stage's, which is excluded.

    The last stage reaches down to the clean end.
    """
    grid = process.grid()
    below = float(visited[stage.end]) if stage.end < len(visited) else -1.0
    inside = grid[(grid <= float(visited[stage.first])) & (grid > below)]
    return inside if len(inside) else visited[stage.first : stage.end]


def draw_in_bins(
    bins: Sequence[Stage], visited: Tensor, process: Process, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bin [batch] and timestep [batch] of each sample: bins in turn, timesteps uniform inside."""
    bin_of = torch.arange(batch) % len(bins)
    options = [timesteps_of(b, visited, process) for b in bins]
    uniform = torch.rand(batch, generator=generator, device=generator.device).cpu()
    chosen = [options[b][int(u * len(options[b]))] for b, u in zip(bin_of.tolist(), uniform.tolist(), strict=True)]
    return bin_of, torch.stack(chosen).to(generator.device)
