"""Schedules without gradients: rules, and searches that only draw samples. The baselines of `DiPGO`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.blocks import CacheMode, GateSchedule, Reuse
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.dipgo.batches import own_batches, stored
from lightning_prune.methods.dipgo.consistency import ConsistencyLoss
from lightning_prune.methods.dipgo.controls import Control, GateProblem, budget_name, rule
from lightning_prune.methods.dipgo.module import DiPGO
from lightning_prune.module import Batch
from lightning_prune.protocols import InputError
from lightning_prune.pruning.budget import solve
from lightning_prune.seeds import derive
from lightning_prune.world import World

Scores = list[list[float]]
Loss = Callable[[GateSchedule], float]


class GateRule(DiPGO):
    """A schedule by a rule, or by a search that measures the consistency of samples on calibration batches.

    Nothing trains: every training batch is a calibration batch, and the search runs in the last step of the one epoch
    (`max_epochs: 1`, `limit_train_batches`).

    Args:
        denoiser: the pretrained network.
        process: its forward process.
        sampler: the trajectory that gates are for.
        search: "random-gates", "uniform-reuse" or "whole-steps" are rules, see `controls.rule`; "greedy" scores a
            gate by what shutting it alone costs; "genetic" breeds scores.
        granularity: what a gate is for, as in `DiPGO`.
        cache_mode: what a skipped block gives.
        budget: fraction of the dense trajectory's MACs that the result may keep.
        further_budgets: budgets of further schedules.
        loss: consistency of samples.
        reuse: what skipped blocks and steps give.
        teacher_steps: steps in which the dense samples are drawn, as in `DiPGO`.
        population: schedules a generation of the genetic search.
        generations: generations of the genetic search.
        compare: rows to report beside the result.
        seed: seed of the search; null takes that of `seed_everything`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        sampler: Sampler,
        search: Literal["random-gates", "uniform-reuse", "whole-steps", "greedy", "genetic"],
        granularity: str = "block",
        cache_mode: CacheMode = "residual",
        budget: float = 0.5,
        further_budgets: list[float] | None = None,
        loss: ConsistencyLoss = "mse",
        reuse: Reuse = "last",
        teacher_steps: int | None = None,
        population: int = 16,
        generations: int = 10,
        compare: list[Control] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            denoiser, process, sampler, granularity=granularity, cache_mode=cache_mode, budget=budget,
            further_budgets=further_budgets, loss=loss, reuse=reuse, teacher_steps=teacher_steps, step_gates=False,
            compare=compare or [], seed=seed,
        )  # fmt: skip
        if population < 2 or generations < 1:
            raise InputError(f"model.population: {population} schedules over {generations} generations are no search")
        self.automatic_optimization = False
        self.search, self.population, self.generations = search, population, generations
        self.pruner.requires_grad_(False)
        self._calibration: list[Batch] = []
        self._has_searched = search not in ("greedy", "genetic")

    def configure_optimizers(self) -> Any:
        """None, as nothing trains."""
        return []

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        if self.search not in ("greedy", "genetic"):
            return
        self._calibration.append({"id": batch["id"], "cond": batch["cond"]})
        # Within the step, so that the checkpoint behind it holds the result: resumed there, an epoch has no end.
        if self.trainer.is_last_batch:
            self._search()

    def _search(self) -> None:
        batches = [self._on_device(batch) for batch in self._calibration]
        loss, chance = self.measured(batches), random.Random(derive(self.seed, 6))
        if self.search == "greedy":
            self._found(shut_alone(loss, self.problem))
        elif self.search == "genetic":
            self._found(bred(loss, self.problem, self.budget, self.population, self.generations, chance))
        self._calibration.clear()
        self._has_searched = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["has_searched"] = self._has_searched
        checkpoint["calibration"] = World.current().gather(stored(self._calibration))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._calibration = own_batches(checkpoint.get("calibration"))
        self._has_searched = bool(checkpoint.get("has_searched", True))

    def on_train_end(self) -> None:
        if not self._has_searched:
            rank_zero_warn(f"model.search: {self.search} follows the last batch of an epoch, so nothing was searched")
        super().on_train_end()

    def _found(self, scores: Scores) -> None:
        with torch.no_grad():
            self.pruner.scores.copy_(torch.tensor(scores))  # type: ignore[operator]

    def schedules(self) -> dict[str, GateSchedule]:
        if self.search == "greedy" or self.search == "genetic":
            return super().schedules()
        budgets = sorted(self.budgets, key=lambda budget: budget == self.budget)
        return {budget_name(budget): rule(self.search, self.problem, budget, self.seed) for budget in budgets}

    def result_name(self, budget: str) -> str:
        """Name of the row of a budget's schedule."""
        return f"{self.search} {budget}"


def shut_alone(loss: Loss, problem: GateProblem) -> Scores:
    """Scores [T, N]: the loss with that gate alone shut, its cascade with it."""
    full = [problem.graph.full() for _ in range(problem.steps)]
    scores: Scores = [[0.0] * len(problem.graph) for _ in full]
    for step in range(1, problem.steps):
        for position in range(len(problem.graph)):
            row = problem.graph.running([i != position for i in range(len(problem.graph))])
            scores[step][position] = loss(problem.schedule([*full[:step], row, *full[step + 1 :]]))
    return scores


def bred(
    loss: Loss, problem: GateProblem, budget: float, population: int, generations: int, chance: random.Random
) -> Scores:
    """Scores of the best schedule of a genetic search.

    Individuals are scores, which the solver turns into schedules, so all keep the budget. A generation keeps its
    better half and fills up with children: every step's scores from one parent or the other, one in ten drawn anew.
    """

    def drawn() -> Scores:
        return [[chance.random() for _ in problem.graph.names] for _ in range(problem.steps)]

    def ranked(individuals: list[Scores]) -> list[Scores]:
        return sorted(individuals, key=lambda scores: loss(_schedule(scores, problem, budget)))

    living = ranked([drawn() for _ in range(population)])
    for _ in range(generations):
        parents = living[: max(2, population // 2)]
        pairs = [chance.sample(parents, 2) for _ in range(population - len(parents))]
        children = [_child(one, other, chance) for one, other in pairs]
        living = ranked([*parents, *children])
    return living[0]


def _schedule(scores: Scores, problem: GateProblem, budget: float) -> GateSchedule:
    return problem.schedule(solve(scores, problem.graph, problem.costs, budget))


def _child(one: Scores, other: Scores, chance: random.Random) -> Scores:
    mixed = [chance.choice(rows) for rows in zip(one, other, strict=True)]
    return [[chance.random() if chance.random() < 0.1 else score for score in row] for row in mixed]
