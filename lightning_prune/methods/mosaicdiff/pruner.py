"""From second moments to slim stages: orders of removal, allocation, refit and surgery. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition, move, rows_of
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.samplers import guided
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff import evolution, relaxation
from lightning_prune.methods.mosaicdiff.first_order import diff_pruning
from lightning_prune.methods.mosaicdiff.plan import sampling_grid, share_of_bins, stages_for
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.mosaicdiff.seconds import Costs
from lightning_prune.methods.mosaicdiff.sensitivity import Probe, measured_errors
from lightning_prune.metrics.macs import Ledger, count_denoiser
from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.allocation import (
    Problem,
    Removed,
    dynamic,
    give_back,
    profile_rule,
    rising,
    solve_level,
    uniform_in_stages,
)
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.obs import Layer, Removal, columns_of, greedy_removal, removal_in_order
from lightning_prune.pruning.recalibration import Match, recalibrate
from lightning_prune.pruning.stages import Grid, Stage, published_sparsities, stage_means
from lightning_prune.pruning.structural import Width, slim
from lightning_prune.seeds import derive

_IMAGES_AT_ONCE = 16
_IMAGES_OF_GRADIENTS = 128


@dataclass(frozen=True)
class Pruned:
    """A result: the stages, and what is to be said about them."""

    denoiser: StagedDenoiser
    stages: list[Stage]
    problem: Problem
    removed: Removed


@dataclass
class Pruner:
    """Makes results of recipes from the statistics of one calibration.

    Args:
        dense: the dense denoiser, which stays as it is.
        process: its process.
        sampler: the sampler whose run is made cheaper.
        bins: parts of the trajectory that statistics were kept apart for.
        curvature: second moments by bin.
        power: mean square v of clean data.
        damping: of the second moments, relative to their mean diagonal.
        probe: trajectories of the dense network, for allocations that measure; made when first needed.
        seed: seed of the random criterion and of searches.
        kept: batches of calibration images and their conditions, for layers to be recalibrated on.
        importance: first-order importance [bins, units] by group, for the "taylor" criterion.
        facts: further entries of the manifest.
        costs: seconds of a call and its units, for targets that are a share of seconds; null means MACs.
        curves: measured errors that recipes share.
    """

    dense: Denoiser
    process: Process
    sampler: Sampler
    bins: Sequence[Stage]
    curvature: Curvature
    power: float
    damping: float
    probe: Probe
    seed: int = 0
    kept: Sequence[tuple[Tensor, Condition]] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    costs: Costs | None = None
    curves: dict[Any, Tensor] = field(default_factory=dict)
    _known: dict[Any, Removal] = field(default_factory=dict)
    _first_order: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups: list[WidthGroup] = list(self.dense.groups())
        self.grid = sampling_grid(self.process, self.sampler)
        ledger = count_denoiser(self.dense)
        self.unit_macs = [unit_macs(ledger, group) for group in self.groups]
        self.call_macs = ledger.macs()

    def prune(self, recipe: Recipe, target: float) -> Pruned:
        """The stages of a recipe with a share `target` of the sampling run's MACs removed.

        Raises:
            InputError: a target out of reach, naming the largest within it.
        """
        stages = stages_for(recipe, self.grid, self.power)
        removals = self.removals(stages, recipe)
        problem = self.problem(stages, recipe, removals)
        if recipe.allocation == "measured" and recipe.sensitivity != "layer":
            problem = replace(problem, errors=measured_errors(self, stages, recipe, removals, problem))
        timed = None if self.costs is None else in_seconds(problem, self.costs)
        removed = self._allocate(recipe, target, stages, removals, timed or problem)
        score = self.grid.score(self.power, recipe.snr_weight)
        facts = {
            "recipe": asdict(recipe),
            "power": self.power,
            "stage_scores": stage_means(score, stages),
            "step_scores": (score / score.max()).clamp(0, 1).flip(0).tolist(),
            "timesteps": self.sampler.visited(self.process).tolist(),
            "macs_per_image": problem.macs(removed) * (1 if self.sampler.guidance == 1.0 else 2),
            "macs_removed": 1 - problem.macs(removed) / problem.dense_macs,
            "dense_macs_per_call": problem.call_macs,
            "macs_per_call": [replace(problem, steps=[1], errors=[[]]).macs([row]) for row in removed],
            **({} if timed is None else {"predicted_seconds_removed": 1 - timed.macs(removed) / timed.dense_macs}),
            **self.facts,
        }
        denoiser = self.build(stages, recipe, removals, removed, facts)
        if recipe.compensate and recipe.recalibrate:
            self.recalibrate(denoiser, stages, removed, recipe.match)
        denoiser.facts["parameters"] = parameters_of(self.dense, denoiser)
        return Pruned(denoiser, stages, problem, removed)

    # Orders of removal

    def layer(self, stage: Stage, group: WidthGroup, affine: bool) -> Layer:
        """The least-squares problem of a group's output layer over a stage."""
        output = self.dense.network.get_submodule(group.output)
        weight = output.get_parameter("weight").detach().cpu().flatten(1)
        moments = self.curvature.mean(group, share_of_bins(stage, self.bins))
        bias = output._parameters.get("bias")
        if affine and bias is not None:
            weight = torch.cat([weight, bias.detach().cpu()[:, None]], 1)
        else:
            moments = moments[:-1, :-1]
        return Layer.of(weight, moments, self.damping, group.output)

    def removals(self, stages: Sequence[Stage], recipe: Recipe) -> list[list[Removal]]:
        """Order and errors of removal, by stage and group; errors are relative to the layer's output."""
        whole = Stage(0, len(self.grid))
        shared = [self._removal(whole, group, recipe, None) for group in self.groups] if recipe.nested else None
        return [
            [
                self._removal(stage, group, recipe, shared[g].order if shared else None)
                for g, group in enumerate(self.groups)
            ]
            for stage in stages
        ]

    def _removal(self, stage: Stage, group: WidthGroup, recipe: Recipe, order: Sequence[int] | None) -> Removal:
        """Recipes that ask for the same removal share it."""
        key = (stage, group.name, recipe.criterion, recipe.compensate, recipe.affine, order)
        if key not in self._known:
            self._known[key] = self._find_removal(stage, group, recipe, order)
        return self._known[key]

    def _find_removal(self, stage: Stage, group: WidthGroup, recipe: Recipe, order: Sequence[int] | None) -> Removal:
        layer = self.layer(stage, group, recipe.affine)
        if order is None and recipe.criterion != "obs":
            order = self._order(stage, group, recipe, layer)
        if order is None:
            found = greedy_removal(layer, group.units, group.columns)
            if not recipe.compensate:
                found = removal_in_order(layer, found.order, group.columns, compensate=False)
        else:
            found = removal_in_order(layer, order, group.columns, recipe.compensate)
        energy = float(((layer.weight @ layer.hessian) * layer.weight).sum())
        return Removal(found.order, rising(found.errors / max(energy, 1e-30)))

    def _order(self, stage: Stage, group: WidthGroup, recipe: Recipe, layer: Layer) -> list[int]:
        if recipe.criterion == "random":
            parts = (self.seed, 71, stage.first, self.groups.index(group))
            generator = torch.Generator().manual_seed(derive(*parts))
            return torch.randperm(group.units, generator=generator).tolist()[:-1]
        if recipe.criterion == "taylor":
            weights = torch.tensor(share_of_bins(stage, self.bins), dtype=torch.float64)
            scores = weights @ self.importance[group.name]
        elif recipe.criterion == "diff-pruning":
            scores = self._diff_pruning()[group.name]
        else:
            columns = layer.weight[:, : group.units * group.columns]
            scores = columns.square().sum(0).view(group.units, -1).sum(1)
        order: list[int] = scores.argsort(stable=True).tolist()
        return order[:-1]

    def _diff_pruning(self) -> dict[str, Tensor]:
        """Of the first kept images; the same for all stages."""
        if not self._first_order:
            x0, cond = self.kept[0]
            x0, cond = x0[:_IMAGES_OF_GRADIENTS], rows_of(cond, slice(_IMAGES_OF_GRADIENTS))
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(derive(self.seed, 74)))
            device = next(self.dense.parameters()).device
            moved = x0.to(device), move(cond, device), noise.to(device)
            self._first_order = diff_pruning(self.dense, self.groups, self.process, *moved)
        return self._first_order

    # Allocation

    def problem(self, stages: Sequence[Stage], recipe: Recipe, removals: list[list[Removal]]) -> Problem:
        """What there is to allocate, with relative errors of single layers summed over the steps of a stage."""
        errors = [[removal.errors * s.steps for removal in row] for s, row in zip(stages, removals, strict=True)]
        steps = [stage.steps for stage in stages]
        return Problem(self.groups, self.unit_macs, self.call_macs, steps, errors, recipe.maximum)

    def _allocate(
        self, recipe: Recipe, target: float, stages: list[Stage], removals: list[list[Removal]], problem: Problem
    ) -> Removed:
        if recipe.sparsity is not None:
            return uniform_in_stages(problem, rule_of(recipe, stages, self.grid, self.power)(recipe.sparsity))
        budget = problem.budget(target)
        if recipe.allocation in ("published", "uniform"):
            return solve_level(problem, rule_of(recipe, stages, self.grid, self.power), budget)[1]
        if recipe.allocation == "evolution":
            drift = self.drift_of(stages, recipe, removals)
            return evolution.search(problem, budget, drift, recipe.evaluations, derive(self.seed, 72))
        if recipe.allocation == "learned":
            continuous = relaxation.learn(self.dense, self.probe, problem, removals, stages, budget, recipe.evaluations)
            return give_back(problem, continuous, budget)
        return dynamic(problem, budget)

    def drift_of(self, stages: list[Stage], recipe: Recipe, removals: list[list[Removal]]) -> Any:
        """From an allocation to the mean squared difference of its images from the dense network's."""
        return lambda removed: self.probe.drift(self.build(stages, recipe, removals, removed, {}))

    # Surgery

    def width(
        self, stage: Stage, group: WidthGroup, recipe: Recipe, removal: Removal, count: int, layer: Layer | None = None
    ) -> Width:
        """What stays of a group when the first `count` units of the order go."""
        kept = removal.kept(count)
        if count == 0 or not recipe.compensate:
            return Width(kept)
        layer = layer or self.layer(stage, group, recipe.affine)
        total = layer.weight.shape[1]
        refit = layer.refit(columns_of(kept, group.columns, total, group.units))
        inner = len(kept) * group.columns
        return Width(kept, refit[:, :inner].float(), refit[:, inner].float() if refit.shape[1] > inner else None)

    def build(
        self,
        stages: Sequence[Stage],
        recipe: Recipe,
        removals: list[list[Removal]],
        removed: Removed,
        facts: Mapping[str, Any],
    ) -> StagedDenoiser:
        """Slim networks for an allocation."""
        networks = []
        for stage, orders, row in zip(stages, removals, removed, strict=True):
            widths = {
                group.name: self.width(stage, group, recipe, order, count)
                for group, order, count in zip(self.groups, orders, row, strict=True)
                if count
            }
            networks.append(slim(self.dense.network, self.groups, widths))
        denoiser = StagedDenoiser(self.dense, networks, [stage.steps for stage in stages], facts)
        return denoiser.eval().requires_grad_(False)

    def recalibrate(self, denoiser: StagedDenoiser, stages: Sequence[Stage], removed: Removed, match: Match) -> None:
        """Refit the layers that were cut on what they read in their own stage's network."""
        assert self.kept, "there are no images to recalibrate on"
        for stage, network, row in zip(stages, denoiser.networks, removed, strict=True):
            cut = [group for group, count in zip(self.groups, row, strict=True) if count]
            samples = self.samples(stage)

            def call(
                one: Denoiser, batch: int, samples: Sequence[tuple[Tensor, Tensor, Condition]] = samples
            ) -> Tensor:
                return guided(one, one.null_condition, self.sampler.guidance, one.guide)(*samples[batch])

            denoiser.at_step(stage.first, denoiser.steps)
            run, run_dense = partial(call, denoiser), partial(call, self.dense)
            batches, folder = len(samples), self.curvature.folder
            recalibrate(network, run, self.dense.network, run_dense, batches, cut, self.damping, match, folder)

    def samples(self, stage: Stage) -> list[tuple[Tensor, Tensor, Condition]]:
        """The kept images noised to the steps of a stage in turn, their timesteps, and their conditions, in batches."""
        device = next(self.dense.parameters()).device
        visited = self.sampler.visited(self.process)[stage.first : stage.end]
        generator = torch.Generator().manual_seed(derive(self.seed, 73, stage.first))
        found, first = [], 0
        for x0, cond in self._kept_in_parts():
            t = visited[(first + torch.arange(len(x0))) % len(visited)]
            t = t if self.process.is_flow else t.long()
            x_t = self.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
            found.append((x_t.to(device), t.to(device), move(cond, device)))
            first += len(x0)
        return found

    def _kept_in_parts(self) -> Iterator[tuple[Tensor, Condition]]:
        """The kept images, few enough at a time for what networks hold meanwhile to stay small."""
        for x0, cond in self.kept:
            for index in torch.arange(len(x0)).split(_IMAGES_AT_ONCE):
                yield x0[index], rows_of(cond, index)


def rule_of(recipe: Recipe, stages: Sequence[Stage], grid: Grid, power: float) -> Callable[[float], list[float]]:
    """From S to the sparsity of each stage, for recipes that have one for all layers."""
    if recipe.profile is not None:
        return profile_rule(recipe.profile, recipe.maximum)
    if recipe.allocation == "uniform":
        return lambda average: [average] * len(stages)
    means = stage_means(grid.score(power, recipe.snr_weight), stages)
    return lambda average: published_sparsities(means, stages, average, recipe.maximum)


def shape_problem(dense: Denoiser, grid: Grid, power: float, recipe: Recipe) -> Problem:
    """What there is to remove by a recipe, with no errors: known before there are statistics."""
    groups, ledger = list(dense.groups()), count_denoiser(dense)
    stages = stages_for(recipe, grid, power)
    errors = [[torch.zeros(group.units) for group in groups] for _ in stages]
    units = [unit_macs(ledger, group) for group in groups]
    return Problem(groups, units, ledger.macs(), [s.steps for s in stages], errors, recipe.maximum)


def expected_removal(
    dense: Denoiser, grid: Grid, power: float, recipe: Recipe, target: float, costs: Costs | None = None
) -> tuple[Problem, Removed]:
    """What a recipe would remove; recipes that measure are taken as uniform, whose MACs they share.

    The target is a share of MACs, or of the seconds in `costs`.

    Raises:
        InputError: the target is out of reach; the message names the largest share that is not.
    """
    problem, stages = shape_problem(dense, grid, power, recipe), stages_for(recipe, grid, power)
    follows = recipe if recipe.allocation == "published" else replace(recipe, allocation="uniform")
    rule = rule_of(follows, stages, grid, power)
    if recipe.sparsity is not None:
        return problem, uniform_in_stages(problem, rule(recipe.sparsity))
    solved = problem if costs is None else in_seconds(problem, costs)
    return problem, solve_level(solved, rule, solved.budget(target))[1]


def in_seconds(problem: Problem, costs: Costs) -> Problem:
    """The same problem in measured seconds."""
    return replace(problem, unit_macs=costs.units, call_macs=costs.call, unit="seconds")


def parameters_of(dense: Denoiser, staged: StagedDenoiser) -> dict[str, int]:
    """Parameters of the dense network, of all stages with what they share once, and of as many whole networks."""
    return {
        "dense": sum(p.numel() for p in dense.parameters()),
        "shared": sum(p.numel() for p in staged.parameters()),
        "stitched": sum(p.numel() for network in staged.networks for p in network.parameters()),
    }


def parameters_held(dense: Denoiser, problem: Problem, removed: Removed, recipe: Recipe) -> int:
    """Parameters of all stages together, those that none cuts once."""
    parameters = dict(dense.network.named_parameters())
    cut = {cut.parameter for group in problem.groups for cut in group.cuts}
    biases = [len(parameters[b]) if (b := f"{g.output}.bias") in parameters else 0 for g in problem.groups]
    units = [sum(parameters[c.parameter].numel() for c in group.cuts) // group.units for group in problem.groups]
    kept = sum(
        unit * (group.units - count)
        for row in removed
        for unit, group, count in zip(units, problem.groups, row, strict=True)
    )
    if recipe.refits_biases:
        kept += sum(bias for row in removed for bias, count in zip(biases, row, strict=True) if count)
        # A layer that no stage leaves whole holds its dense bias nowhere.
        kept -= sum(bias for g, bias in enumerate(biases) if all(row[g] for row in removed))
    return sum(p.numel() for name, p in parameters.items() if name not in cut) + kept


def unit_macs(ledger: Ledger, group: WidthGroup) -> int:
    """MACs that one unit of a group costs in one call: its share of every layer that shrinks with it.

    Raises:
        InputError: a layer whose MACs are no multiple of the units.
    """
    by_layer = ledger.by_layer()
    names = {cut.parameter.rpartition(".")[0] for cut in group.cuts} | {group.name}
    total = sum(by_layer.get(name, 0) for name in names)
    if total % group.units:
        raise InputError(f"pruning: {group.name}: {total} MACs do not divide into {group.units} units")
    return total // group.units
