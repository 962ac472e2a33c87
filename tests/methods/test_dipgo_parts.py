"""The parts of DiP-GO: the published network and its start, losses, gates at a budget."""

import itertools
from typing import Any

import pytest
import torch

from lightning_prune.blocks import BlockCosts
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import initial_noise, sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.unroll import Unroll
from lightning_prune.methods.dipgo.consistency import ConsistencyLoss, consistency, structural_similarity
from lightning_prune.methods.dipgo.gate_sampling import budgeted_gates, budgeted_scores, published_gates, systematic
from lightning_prune.methods.dipgo.pruner import QueryPruner
from lightning_prune.pruning.budget import solve
from tests.factories import tiny_unet
from tests.pruning.test_gates import GRAPHS
from tests.test_blocks import sd15_graph
from tests.traffic import Traffic


def test_the_published_network_has_its_published_size() -> None:
    with torch.device("meta"):
        pruner = QueryPruner(50, 9)
        released = QueryPruner(50, 9, encoder="none")
    assert sum(p.numel() for p in pruner.parameters()) == 37_852_676
    assert sum(p.numel() for p in released.parameters()) == 37_852_676 - 526_976


@pytest.mark.parametrize("encoder", ["none", "self", "cross"])
def test_it_starts_by_keeping_everything(encoder: str) -> None:
    torch.manual_seed(0)
    pruner = QueryPruner(4, 3, width=16, encoder=encoder)  # type: ignore[arg-type]
    assert torch.allclose(torch.sigmoid(pruner()), torch.tensor(0.7311), atol=1e-4)
    assert pruner().shape == (4, 3)


def test_the_encoder_is_applied() -> None:
    torch.manual_seed(0)
    pruner = QueryPruner(4, 3, width=16, encoder="self").eval()
    torch.nn.init.normal_(pruner.heads.weights[-1])
    before = pruner().detach()
    with torch.no_grad():
        pruner.queries[0].mul_(3)
    changed = (pruner() - before).abs() > 1e-7
    assert changed[0].all(), "all blocks of the step see it"
    assert not changed[1:].any(), "other steps do not"


def test_the_published_start_has_no_consistency_gradient() -> None:
    """Which is why the published search has to wait for the sparsity loss alone to shut the first gates."""
    denoiser = tiny_unet()
    process, sampler = Process(schedule="cosine", prediction="v"), Sampler(steps=3)
    unroll = Unroll(denoiser, "coarse", "output", process, sampler)
    scores = torch.ones(3, 5, requires_grad=True)
    drawn = published_gates(scores, unroll.graph, BlockCosts((1,) * 5, 1))
    noise, labels = initial_noise(torch.arange(2), denoiser.sample_shape), torch.tensor([1, 2])
    student = unroll(noise, labels, drawn.run)
    teacher = sample_images(denoiser, process, torch.arange(2), labels, sampler)
    assert torch.equal(student, teacher)
    losses: tuple[ConsistencyLoss, ...] = ("mse", "ssim")
    for loss in losses:
        value = consistency(student, teacher, loss)
        scores.grad = torch.ones_like(scores)
        value.backward(retain_graph=True)
        assert abs(float(value.detach())) < 1e-6
        assert float((scores.grad - 1).abs().max()) < 1e-6


def test_budgeted_gates_have_one_from_the_first_step() -> None:
    denoiser = tiny_unet()
    process, sampler = Process(schedule="cosine", prediction="v"), Sampler(steps=3)
    unroll = Unroll(denoiser, "coarse", "output", process, sampler)
    scores = torch.zeros(3, 5, requires_grad=True)
    uniforms = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    drawn = budgeted_gates(scores, torch.tensor([0.6, 0.8]), uniforms, unroll.graph, BlockCosts((1,) * 5, 1))
    noise, labels = initial_noise(torch.arange(2), denoiser.sample_shape), torch.tensor([1, 2])
    teacher = sample_images(denoiser, process, torch.arange(2), labels, sampler)
    consistency(unroll(noise, labels, drawn.run), teacher, "mse").backward()
    assert scores.grad is not None
    assert float(scores.grad[1:].abs().max()) > 0
    assert not scores.grad[0].any()


@pytest.mark.parametrize("make", GRAPHS)
def test_gates_drawn_at_a_budget_cost_it(make: Any) -> None:
    graph = make()
    costs = BlockCosts(tuple(range(3, 3 + len(graph))), 1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, len(graph), generator=generator)
    for budget in (0.3, 0.6, 0.9):
        uniforms = torch.rand(64, 20, len(graph), generator=generator)
        drawn = budgeted_gates(scores, torch.full((64,), budget), uniforms, graph, costs)
        assert drawn.steps is None
        assert float(drawn.cost.detach()) == pytest.approx(budget, abs=1e-4)
        rows = drawn.run.detach().transpose(0, 1).round().bool().tolist()
        kept = [costs.kept([graph.full(), *map(tuple, sample[1:])]) for sample in rows]
        assert sum(kept) / len(kept) == pytest.approx(budget, abs=0.03)


@pytest.mark.parametrize("make", GRAPHS)
def test_gates_of_steps_and_blocks_cost_the_budget_together(make: Any) -> None:
    graph = make()
    costs = BlockCosts(tuple(range(3, 3 + len(graph))), 1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, len(graph) + 1, generator=generator)
    for budget in (0.3, 0.6):
        uniforms = torch.rand(256, 20, len(graph) + 1, generator=generator)
        drawn = budgeted_gates(scores, torch.full((256,), budget), uniforms, graph, costs)
        assert float(drawn.cost.detach()) == pytest.approx(budget, abs=1e-4)
        assert drawn.steps is not None
        rows = (drawn.run * drawn.steps[..., None]).detach().transpose(0, 1).round().bool().tolist()
        kept = [costs.kept([graph.full(), *map(tuple, sample[1:])]) for sample in rows]
        assert sum(kept) / len(kept) == pytest.approx(budget, abs=0.03)


def test_gates_are_drawn_without_reading_a_number_from_the_device() -> None:
    graph, uniforms = GRAPHS[3](), torch.rand(2, 4, 5)
    with Traffic() as traffic:
        budgeted_gates(
            torch.zeros(4, 5, requires_grad=True), uniforms[:, 0, 0], uniforms, graph, BlockCosts((1,) * 4, 1)
        )
    assert traffic.reads == 0


def test_systematic_draws_have_their_probabilities_and_are_even() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.6, 0.4]).expand(2000, -1)
    phases = (torch.arange(2000) + 0.5) / 2000
    drawn = systematic(probabilities, phases)
    torch.testing.assert_close(drawn.float().mean(0), probabilities[0], rtol=0, atol=2e-3)
    assert (drawn.sum(-1) == 3).all()
    even = systematic(torch.full((20,), 0.25), torch.tensor(0.5)).nonzero().flatten()
    assert set(even.diff().tolist()) == {4}


def test_a_schedule_has_the_steps_of_the_density_and_spends_the_budget() -> None:
    graph = GRAPHS[3]()
    costs = BlockCosts((4, 7, 4, 7), 1)
    scores = torch.zeros(21, 5, dtype=torch.float64)
    scores[:, :4] = 6
    blocks, steps = budgeted_scores(scores, 0.25, graph, costs)
    assert steps is not None
    rows = solve(blocks.tolist(), graph, costs, 0.25, step_scores=steps.tolist())
    kept = [step for step, row in enumerate(rows) if sum(row) >= 3]
    gaps = {later - sooner for sooner, later in itertools.pairwise(kept)}
    assert gaps <= {4, 5}, kept
    assert 0.25 - 4 / (costs.dense * 21) < costs.kept(rows) <= 0.25


@pytest.mark.parametrize("make", GRAPHS)
def test_gates_gain_only_by_what_they_are_worth_beyond_their_price(make: Any) -> None:
    """A rise of all scores in proportion to cost changes no gate, so no loss has a gradient that way."""
    graph = make()
    costs = BlockCosts(tuple(range(3, 3 + len(graph))), 1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, len(graph), generator=generator, dtype=torch.float64).requires_grad_()
    uniforms = torch.rand(5, 6, len(graph), generator=generator, dtype=torch.float64)
    budgets = torch.full((5,), 0.5, dtype=torch.float64)
    worth = torch.rand(6, 5, len(graph), generator=generator, dtype=torch.float64)
    drawn = budgeted_gates(scores, budgets, uniforms, graph, costs)
    (gradient,) = torch.autograd.grad((drawn.run * worth).sum(), scores)
    prices = torch.tensor(costs.blocks, dtype=torch.float64)
    assert float((gradient * prices).sum().abs()) < 1e-6 * float((gradient.abs() * prices).sum())
    assert float(gradient.abs().max()) > 0


def test_the_published_sparsity_loss_at_all_keep() -> None:
    graph, costs = sd15_graph("coarse")
    drawn = published_gates(torch.ones(50, 9), graph, costs)
    assert float(drawn.cost.detach()) == pytest.approx(2.4674, abs=5e-5)
    without = published_gates(torch.ones(50, 9), graph, costs, cascades=False)
    assert float(without.cost) == pytest.approx(9)


def test_the_similarity_of_an_image_with_itself_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 20, 20, generator=generator)
    assert float(structural_similarity(a, a)) == pytest.approx(1, abs=1e-5)
    assert float(structural_similarity(a, 1 - a)) < 0.5


@pytest.mark.parametrize("loss", ["mse", "l1", "ssim", "ssim+l1"])
def test_losses_are_zero_for_equal_images_and_grow(loss: ConsistencyLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.rand(2, 2, 1, 16, 16, generator=generator)
    values = [float(consistency(a + scale * noise, a, loss)) for scale in (0, 0.1, 0.4)]
    assert values[0] == pytest.approx(0, abs=1e-5)
    assert values[0] < values[1] < values[2]
