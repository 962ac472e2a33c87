"""Controls and baselines: rules at equal cost, searches that only draw samples."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_prune.blocks import BlockCosts, CacheMode, GateSchedule
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.dipgo import GateRule
from lightning_prune.methods.dipgo.controls import (
    Control,
    GateProblem,
    as_whole_steps,
    kept_steps,
    rule,
    shallow,
)
from lightning_prune.methods.dipgo.refine import Changes, refined
from lightning_prune.methods.dipgo.rules import bred, shut_alone
from lightning_prune.metrics.block_costs import traced_costs
from lightning_prune.protocols import InputError
from lightning_prune.pruning.budget import solve
from tests.factories import fit, tiny_dit, tiny_unet
from tests.test_blocks import sd15_graph

PROCESS = Process(schedule="cosine", prediction="v")


def problem(make: Any = tiny_unet, granularity: str = "fine", mode: Any = "output", steps: int = 10) -> GateProblem:
    graph = make().blocks(granularity).in_mode(mode)
    costs = BlockCosts(tuple(range(5, 5 + len(graph))), 1)
    return GateProblem(graph, mode, costs, PROCESS, Sampler(steps=steps))


@pytest.mark.parametrize("name", ["whole-steps", "uniform-reuse", "random-gates"])
@pytest.mark.parametrize("budget", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("kind", [("fine", "output"), ("coarse", "output"), ("half", "residual"), ("block", "output")])
def test_rules_keep_their_budget(name: Control, budget: float, kind: Any) -> None:
    given = problem(tiny_unet if kind[0] in ("fine", "coarse") else tiny_dit, kind[0], kind[1], 20)
    found = rule(name, given, budget)
    assert given.costs.kept(found.rows) <= budget + 1e-12
    assert all(given.graph.running(row) == row for row in found.rows)
    if name == "whole-steps":
        assert found.skips_only_whole_steps()
        full = [step for step, row in enumerate(found.rows) if all(row)]
        gaps = [b - a for a, b in zip(full, [*full[1:], 20], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_shallow_rows_are_those_of_deepcache() -> None:
    graph, _ = sd15_graph("coarse")
    ran = [{n for n, runs in zip(graph.names, shallow(graph, depth), strict=True) if runs} for depth in (1, 2, 3)]
    assert ran == [{"U0", "D0"}, {"U0", "U1", "D0", "D1"}, {"U0", "U1", "U2", "D0", "D1", "D2"}]
    fine, _ = sd15_graph("fine")
    names = {n for n, runs in zip(fine.names, shallow(fine, 3), strict=True) if runs}
    assert names == {"u0", "u1", "u2", "d1", "d2"}


def test_the_kept_steps_of_a_schedule_of_whole_steps_are_its_own() -> None:
    given = problem(steps=10)
    rows = [given.graph.full() if step in (0, 3, 8) else (False,) * len(given.graph) for step in range(10)]
    sampler = kept_steps(given, given.schedule(rows), 3)
    assert sampler.timesteps == (999, 699, 199)
    with pytest.raises(InputError, match="out of reach"):
        rule("whole-steps", given, 0.05)


@pytest.mark.parametrize("budget", [0.25, 0.35, 0.5])
@pytest.mark.parametrize("kind", [("fine", "output"), ("half", "residual")])
def test_the_dearest_steps_in_full_and_a_part_of_the_next(budget: float, kind: Any) -> None:
    given = problem(tiny_unet if kind[0] == "fine" else tiny_dit, *kind)
    draw = random.Random(3)
    scores = [[draw.random() for _ in given.graph.names] for _ in range(10)]
    rows = solve(scores, given.graph, given.costs, 0.6)
    found = as_whole_steps(given, rows, scores, budget)
    gate = max(given.costs.blocks) / (10 * given.costs.dense)
    assert budget - gate < given.costs.kept(found) <= budget + 1e-12
    full = {step for step, row in enumerate(found) if all(row)}
    assert len(full) == given.affordable_steps(budget)
    left = [given.costs.step(rows[step]) for step in range(10) if step not in full]
    assert min(given.costs.step(rows[step]) for step in full - {0}) >= max(left)
    assert sum(map(any, found)) - len(full) <= 1
    assert all(given.graph.running(row) == row for row in found)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("kind", ["dit", "unet", "sd15"])
def test_real_costs_pay_for_as_many_full_steps_as_the_budget_has(budget: float, kind: str) -> None:
    """Rounding of costs must not turn one of them into a few gates."""
    mode: CacheMode = "output"
    if kind == "sd15":
        graph, costs = sd15_graph("coarse")
    else:
        family, granularity, mode = (DiT, "half", "residual") if kind == "dit" else (UNet2D, "fine", mode)
        network = family(weights=f"embedded:fashion_{kind}")
        graph, costs = network.blocks(granularity).in_mode(mode), traced_costs(network, granularity, mode)
    given = GateProblem(graph, mode, costs, PROCESS, Sampler(steps=50))
    even = rule("whole-steps", given, budget).rows
    draw = random.Random(5)
    rows = as_whole_steps(given, even, [[draw.random() for _ in graph.names] for _ in range(50)], budget)
    assert sum(map(all, rows)) == sum(map(any, rows)) == 50 * budget
    assert costs.kept(rows) == pytest.approx(budget, abs=1e-9)


def test_refining_begins_with_the_best_start_and_stays_within_a_gate_of_the_budget() -> None:
    given = problem(tiny_dit, "half", "residual")
    draw = random.Random(4)
    wanted = [[draw.random() for _ in given.graph.names] for _ in range(10)]
    loss = distance_from(wanted)
    starts = [solve([[draw.random() for _ in row] for row in wanted], given.graph, given.costs, 0.4) for _ in range(3)]
    best = min(loss(given.schedule(rows)) for rows in starts)
    unchanged = refined(loss, given, starts, 0.4, 0, random.Random(0))
    assert loss(given.schedule(unchanged)) == best
    found = refined(loss, given, starts, 0.4, 200, random.Random(0))
    assert loss(given.schedule(found)) < best
    gate = max(given.costs.blocks) / (10 * given.costs.dense)
    assert 0.4 - gate <= given.costs.kept(found) <= 0.4


def test_refining_opens_nothing_in_steps_that_are_skipped() -> None:
    given = problem(tiny_dit, "half", "residual")
    none = (False,) * len(given.graph)
    rows = [given.graph.full() if step in (0, 3, 6) else none for step in range(10)]
    wanted = [[0.0 if step in (3, 6) else 1.0 for _ in none] for step in range(10)]  # all would rather run elsewhere
    found = refined(distance_from(wanted), given, [rows], 0.3, 200, random.Random(0))
    assert sorted(map(sum, found)) == sorted(map(sum, rows))
    assert [step for step in (3, 6) if any(found[step])] == []


def test_without_trades_rows_move_and_stay_what_they_are() -> None:
    given = problem(tiny_dit, "half", "residual")
    draw = random.Random(4)
    wanted = [[draw.random() for _ in given.graph.names] for _ in range(10)]
    start = solve([[draw.random() for _ in row] for row in wanted], given.graph, given.costs, 0.4)
    found = refined(distance_from(wanted), given, [start], 0.4, 200, random.Random(0), Changes(trade_gates=False))
    assert found != start
    assert sorted(found) == sorted(start)


def distance_from(best: list[list[float]]) -> Any:
    def loss(schedule: GateSchedule) -> float:
        pairs = [
            pair for row, wanted in zip(schedule.rows, best, strict=True) for pair in zip(row, wanted, strict=True)
        ]
        return sum(worth for runs, worth in pairs if not runs)

    return loss


def test_shutting_alone_finds_what_each_gate_is_worth() -> None:
    given = problem(tiny_dit, "half", "residual", steps=4)
    chance = random.Random(0)
    worth = [[chance.random() for _ in given.graph.names] for _ in range(4)]
    scores = shut_alone(distance_from(worth), given)
    assert scores[0] == [0.0] * 4
    assert scores[1:] == worth[1:]


def test_breeding_improves_on_its_first_generation() -> None:
    given = problem(tiny_dit, "half", "residual", steps=12)
    chance = random.Random(0)
    worth = [[chance.random() for _ in given.graph.names] for _ in range(12)]
    loss, budget = distance_from(worth), 0.5

    def best(generations: int) -> float:
        scores = bred(loss, given, budget, 12, generations, random.Random(1))
        return float(loss(given.schedule(solve(scores, given.graph, given.costs, budget))))

    assert best(12) < best(1)


@pytest.mark.parametrize("search", ["random-gates", "uniform-reuse", "whole-steps", "greedy", "genetic"])
def test_every_search_ends_with_a_schedule_within_its_budget(search: str, tmp_path: Path) -> None:
    module = GateRule(
        tiny_unet(), PROCESS, Sampler(steps=4), search, "coarse", "output", 0.6, population=3, generations=1  # type: ignore[arg-type]
    )  # fmt: skip
    fit(module, tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=1)
    assert module.kept_fraction()["aten"] <= 0.6
    assert list(module.variants()) == ["dense", f"{search} 0.6"]
    if search == "greedy":
        scores = module.pruner.scores
        assert isinstance(scores, torch.Tensor)
        assert float(scores[1:].min()) >= 0
        assert float(scores[1:].max()) > 0


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_search_stopped_at_a_batch_is_taken_up_with_all_batches(stopped_at: int, tmp_path: Path) -> None:
    class Save(Checkpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == stopped_at:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def greedy(**trainer: Any) -> GateRule:
        module = GateRule(tiny_dit(), PROCESS, Sampler(steps=3), "greedy", "half", "residual", 0.6)
        fit(module, tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=2, **trainer)
        return module

    whole = greedy(callbacks=[Save()], enable_checkpointing=True)
    assert float(whole.pruner.scores.max()) > 0
    resumed = greedy(ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.state_dict()["pruner.scores"], whole.state_dict()["pruner.scores"])
    assert resumed.schedules() == whole.schedules()
