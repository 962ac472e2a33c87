"""What MosaicDiff's allocations measure, against networks that were really cut, and what its searches make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff import MosaicDiff, Recipe, evolution, first_order, relaxation
from lightning_prune.methods.mosaicdiff.sensitivity import Probe, output_error, steps_to_probe
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.pruning.allocation import Problem, Removed, profile_rule
from lightning_prune.pruning.obs import Removal
from lightning_prune.pruning.replay import Replay
from lightning_prune.pruning.stages import equal_stages
from lightning_prune.pruning.structural import Width, slim
from tests.factories import tiny_dit
from tests.methods.test_mosaicdiff import PROCESS, calibrate, module

GENERATOR = torch.Generator().manual_seed(0)


def probe(denoiser: Any) -> Probe:
    return Probe(denoiser, PROCESS, Sampler(steps=4), torch.tensor([1, 5, 9]))


def test_the_error_of_a_masked_group_is_that_of_the_slim_network() -> None:
    dense = tiny_dit()
    groups, seen = list(dense.groups()), probe(dense)
    for group in (groups[0], groups[-1]):
        kept = tuple(range(0, group.units, 2))
        weight = dense.network.get_submodule(group.output).get_parameter("weight")
        refit = torch.randn(len(weight), len(kept) * group.columns, generator=GENERATOR) / 8
        width = Width(kept, refit)
        found = output_error(seen, [1, 2], group, width, Replay(dense.network, [g.name for g in groups]))
        network = slim(dense.network, groups, {group.name: width})
        x, t, expected = (torch.cat(parts) for parts in zip(seen.states(1), seen.states(2), strict=True))
        with torch.no_grad():
            cut = type(dense)(config=dense.config(), **dense.arguments())
            cut.network = network
            wanted = float((cut.eval()(x, t, torch.tensor([1, 5, 9] * 2)) - expected).square().mean())
        assert wanted > 0
        assert found == pytest.approx(wanted, rel=1e-3)


def problem(dense: Any, stages: int = 2) -> Problem:
    groups = list(dense.groups())
    errors = [[torch.linspace(0, 1, group.units, dtype=torch.float64) for group in groups] for _ in range(stages)]
    return Problem(groups, [10] * len(groups), 1000, [4 // stages] * stages, errors, 0.9)


def test_learned_widths_spare_the_layer_that_the_output_hangs_on() -> None:
    dense = tiny_dit()
    groups = list(dense.groups())
    idle, busy = (g for g, group in enumerate(groups) if group.kind == "channels")
    with torch.no_grad():  # a layer that does nothing, so all of it may go
        for name in ("weight", "bias"):
            dense.network.get_submodule(groups[idle].output).get_parameter(name).zero_()
    task, stages = problem(dense), equal_stages(4, 2)
    removals = [[Removal(tuple(range(g.units - 1)), torch.zeros(g.units)) for g in groups] for _ in stages]
    budget = task.dense_macs - sum(4 * 10 * g.units for g in groups) // 3
    alike = relaxation.learn(dense, probe(dense), task, removals, stages, budget, 1)
    learned = relaxation.learn(dense, probe(dense), task, removals, stages, budget, 40)
    for row, before in zip(learned, alike, strict=True):
        assert row[idle] > before[idle]
        assert row[busy] < before[busy]
    assert task.macs(learned) <= budget


def test_evolution_gives_the_best_that_it_saw_and_gets_nearer() -> None:
    dense = tiny_dit()
    task = problem(dense)
    budget = task.dense_macs - sum(4 * 10 * g.units for g in task.groups) // 3
    seen: list[float] = []

    def drift(removed: Removed) -> float:
        """Units of the first stage are dear."""
        seen.append(float(10 * sum(removed[0]) + sum(removed[1])))
        return seen[-1]

    found = evolution.search(task, budget, drift, 30, 0)
    assert drift(found) == min(seen)
    assert min(seen) < 0.9 * seen[0]
    assert task.macs(found) <= budget


def test_the_first_order_criterion_lets_units_go_that_nothing_depends_on(tmp_path: Path) -> None:
    pruned = module(recipe=Recipe("uniform", stages=1, criterion="taylor", compensate=False))
    group = pruned.denoiser.groups()[-1]
    weight = pruned.denoiser.network.get_submodule(group.output).get_parameter("weight")
    idle = [3, 7, 11]
    with torch.no_grad():
        weight[:, idle] = 0
    calibrate(pruned, tmp_path, 1)
    importance = pruned._importance[group.name].sum(0)
    assert torch.equal(importance[idle], torch.zeros(3, dtype=torch.float64))
    assert (importance > 0).sum() == group.units - 3
    network = pruned.results()[pruned.result_name].denoiser.networks[0]
    left = network.get_submodule(group.output).get_parameter("weight")
    assert (left != 0).any(0).all(), "the idle ones went first"


def test_diff_pruning_adds_up_weight_times_gradient_over_informative_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_dit()
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(4, *dense.sample_shape, generator=generator) for _ in range(2))
    labels, groups = torch.arange(4), list(dense.groups())
    seen: list[int] = []
    losses = {0: 1.0, 10: 0.5, 20: 0.04}  # of its largest 4 % at the third, which no longer counts

    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        t = 10 * len(seen)
        seen.append(t)
        own: Tensor = (predicted - target).square().mean()
        return own / own.detach() * losses[t] / first_order._of_noise(PROCESS, torch.tensor([t]))

    monkeypatch.setattr(first_order, "mse_loss", loss)
    found = first_order.diff_pruning(dense, groups, PROCESS, x0, labels, noise)
    assert seen == [0, 10, 20]
    expected = {name: torch.zeros_like(p) for name, p in dense.network.named_parameters()}
    for step in (0, 10):
        t = torch.full((4,), step)
        error = (dense(PROCESS.add_noise(x0, noise, t), t, labels) - PROCESS.target(x0, noise, t)).square().mean()
        dense.zero_grad()
        (error / error.detach() * losses[step]).backward()
        for name, parameter in dense.network.named_parameters():
            expected[name] += 0 if parameter.grad is None else parameter.grad
    group = next(g for g in groups if g.kind == "heads")
    parts = dict(dense.network.named_parameters())
    for unit in range(group.units):
        rows = slice(unit * group.channels, (unit + 1) * group.channels)
        total = torch.zeros(())
        for cut in group.cuts:
            product = (parts[cut.parameter] * expected[cut.parameter]).detach().abs()
            total = total + (product[rows] if cut.dim == 0 else product[:, rows]).sum()
        assert float(found[group.name][unit]) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_loss_of_a_prediction_is_that_of_the_noise_it_implies(prediction: Any) -> None:
    process, t = Process(prediction=prediction, clip_sample=False), torch.full((4,), 300)
    generator = torch.Generator().manual_seed(2)
    x0, noise, wrong = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(3))
    target, x_t = process.target(x0, noise, t), process.add_noise(x0, noise, t)
    _, implied = process.x0_and_noise(target + 0.1 * wrong, x_t, t)
    own = float((0.1 * wrong).square().mean())
    assert own * first_order._of_noise(process, t) == pytest.approx(float((implied - noise).square().mean()), rel=1e-3)


def test_units_that_nothing_depends_on_go_first_by_diff_pruning_too(tmp_path: Path) -> None:
    pruned = module(recipe=Recipe("uniform", stages=1, criterion="diff-pruning", compensate=False))
    group = pruned.denoiser.groups()[-1]
    idle = [3, 7, 11]
    with torch.no_grad():
        for cut in group.cuts:
            weight = pruned.denoiser.network.get_parameter(cut.parameter)
            weight.movedim(cut.dim, 0)[idle] = 0
    calibrate(pruned, tmp_path, 1)
    network = pruned.results()[pruned.result_name].denoiser.networks[0]
    left = network.get_submodule(group.output).get_parameter("weight")
    assert (left != 0).any(0).all(), "the idle ones went first"
    assert all(p.grad is None for p in pruned.denoiser.parameters())


def test_a_profile_cuts_stages_in_proportion_and_meets_the_target(tmp_path: Path) -> None:
    recipe = Recipe("uniform", stages=2, profile=(1.5, 0.5))
    pruned = calibrate(module(recipe=recipe), tmp_path, 1).results()["mosaicdiff uniform"]
    early, late = pruned.removed
    wide = [g for g, group in enumerate(pruned.problem.groups) if group.kind == "channels"]
    assert all(early[g] / late[g] == pytest.approx(3, rel=0.15) for g in wide)
    assert 0.25 <= pruned.denoiser.facts["macs_removed"] < 0.27
    assert profile_rule([1.5, 0.5], 0.9)(0.9) == [0.9, 0.9], "everything is within reach"
    assert profile_rule([1.5, 0.5], 0.9)(0.45) == [0.9, 0.5]


def first_batch() -> Tensor:
    batch: Tensor = next(iter(EmbeddedFashion(batch_size=8).train_dataloader()))["x"]
    return batch


def test_the_power_of_the_data_is_measured(tmp_path: Path) -> None:
    pruned = calibrate(module(), tmp_path, 1)
    facts = pruned.results()[pruned.result_name].denoiser.facts
    assert facts["power"] == pytest.approx(float(first_batch().square().mean()), rel=1e-6)
    given = calibrate(module(power=0.5), tmp_path, 1)
    assert given.results()[given.result_name].denoiser.facts["power"] == 0.5


def test_guidance_costs_two_calls_a_step(tmp_path: Path) -> None:
    pruned: MosaicDiff = calibrate(module(guidance=2.0), tmp_path, 1)
    staged = pruned.results()[pruned.result_name].denoiser
    plain = trajectory_cost(staged, PROCESS, Sampler(steps=4)).macs()
    assert staged.facts["macs_per_image"] == trajectory_cost(staged, PROCESS, Sampler(steps=4, guidance=2.0)).macs()
    assert staged.facts["macs_per_image"] == 2 * plain


def test_drift_is_between_images_and_starts_where_networks_differ() -> None:
    dense = tiny_dit()
    group = list(dense.groups())[-1]
    cut = slim(dense.network, list(dense.groups()), {group.name: Width((0, 1))})
    late = StagedDenoiser(dense, [dense.network, cut], [2, 2]).eval()
    seen, ids = probe(dense), torch.arange(3)
    labels = torch.tensor([1, 5, 9])
    own, plain = (sample_images(one, PROCESS, ids, labels, Sampler(steps=4), 0) for one in (late, dense))
    assert seen.drift(late, 2) == seen.drift(late)
    assert seen.drift(late) == pytest.approx(float((own - plain).square().mean()), rel=1e-5)
    assert seen.drift(late) > 0
    assert steps_to_probe(equal_stages(4, 1)[0]) == [1, 3]
