"""Gates as tensors agree with gates as bools, and their expectation with counting."""

import itertools
from typing import Any

import pytest
import torch

from lightning_prune.blocks import BlockCosts, BlockGraph
from lightning_prune.pruning.gates import expected_cost, released_closure, running, straight_through
from tests.factories import tiny_dit, tiny_unet
from tests.traffic import Traffic

GRAPHS: list[Any] = [
    lambda: tiny_unet().blocks("coarse"),
    lambda: tiny_unet().blocks("fine"),
    lambda: tiny_dit().blocks("block"),
    lambda: tiny_dit().blocks("half"),
    lambda: tiny_dit().blocks("block").in_mode("residual"),
]


def every_row(graph: BlockGraph) -> torch.Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(graph))))


@pytest.mark.parametrize("make", GRAPHS)
def test_hard_gates_run_as_the_closure_says(make: Any) -> None:
    graph = make()
    rows = every_row(graph)
    expected = torch.tensor([graph.running(row.bool().tolist()) for row in rows]).float()
    assert torch.equal(running(rows, graph), expected)


@pytest.mark.parametrize("make", GRAPHS)
def test_the_expected_cost_is_the_mean_over_all_rows(make: Any) -> None:
    graph = make()
    costs = BlockCosts(tuple(range(3, 3 + 7 * len(graph), 7)), shell=5)
    probabilities = torch.rand(len(graph), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = every_row(graph).double()
    weights = torch.where(rows > 0, probabilities, 1 - probabilities).prod(dim=-1)
    steps = [float(costs.step(graph.running(row.bool().tolist()))) for row in rows]
    cost = torch.tensor(steps, dtype=torch.float64) / costs.dense
    found = expected_cost(running(probabilities, graph), graph, costs)
    assert float(found) == pytest.approx(float((weights * cost).sum()), rel=1e-12)
    assert float(expected_cost(torch.ones(len(graph)), graph, costs)) == pytest.approx(1)


def test_straight_through_is_hard_in_value_and_soft_in_gradient() -> None:
    soft = torch.tensor([0.2, 0.9], requires_grad=True)
    gate = straight_through(soft, (soft > 0.5).float())
    assert gate.tolist() == [0, 1]
    (gate * torch.tensor([3.0, 5.0])).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [3, 5]


@pytest.mark.parametrize("make", GRAPHS[:3])
def test_the_published_closure_has_the_same_values(make: Any) -> None:
    graph = make()
    for row in every_row(graph):
        closed = released_closure(torch.stack([1 - row, row], dim=-1), graph)
        assert closed[:, 1].bool().tolist() == list(graph.running(row.bool().tolist()))
        assert torch.equal(closed.sum(-1), torch.ones(len(graph)))


def test_the_published_closure_moves_the_gradient_to_the_reader() -> None:
    graph = tiny_dit().blocks("block")
    gates = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    released_closure(gates, graph)[0, 1].backward()
    assert gates.grad is not None
    assert gates.grad[:, 1].tolist() == [0, 2], "the reader's keep counts twice, the block's own not at all"


def test_the_published_closure_reads_no_gate_one_by_one() -> None:
    graph = tiny_unet().blocks("coarse")
    gates = torch.stack([torch.ones(len(graph)), torch.zeros(len(graph))], dim=-1).requires_grad_()
    with Traffic() as traffic:
        released_closure(gates, graph)
    assert traffic.reads == 0


def test_costs_are_brought_to_the_device_once_and_serve_training_after_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, costs = tiny_dit().blocks("block"), BlockCosts((3, 31), shell=17)
    made, tensor = [], torch.tensor

    def counted(*given: Any, **settings: Any) -> torch.Tensor:
        made.append(given)
        return tensor(*given, **settings)

    monkeypatch.setattr(torch, "tensor", counted)
    with torch.inference_mode():
        expected_cost(torch.rand(5, 2), graph, costs)
    run = torch.rand(5, 2, requires_grad=True)
    for _ in range(3):
        expected_cost(run, graph, costs).sum().backward()
    assert len(made) == 1
    assert run.grad is not None
