"""A gated denoiser: what runs, what is reused, what it equals, and that taking the gates out leaves no trace."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import SkippedStep, gated
from lightning_prune.diffusion.gating import GatedPart, install, remove
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import initial_noise, integrate, sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.unroll import Unroll
from lightning_prune.metrics.block_costs import block_costs, traced_costs
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError, Sparsity, StepAware
from lightning_prune.pruning.masks import MaskSet, select_units
from tests.factories import tiny_dit, tiny_unet

PROCESS = Process(schedule="cosine", prediction="v")
SAMPLER = Sampler(steps=5)
IDS, LABELS = torch.arange(3), torch.tensor([0, 4, 9])
KINDS: list[Any] = [
    pytest.param(tiny_dit, "block", "residual", id="dit block residual"),
    pytest.param(tiny_dit, "block", "output", id="dit block output"),
    pytest.param(tiny_dit, "half", "residual", id="dit half"),
    pytest.param(tiny_unet, "coarse", "output", id="unet coarse"),
    pytest.param(tiny_unet, "fine", "output", id="unet fine"),
]


def draw(denoiser: Denoiser, sampler: Sampler = SAMPLER, process: Process = PROCESS) -> Tensor:
    return sample_images(denoiser, process, IDS, LABELS, sampler)


def schedule(
    denoiser: Denoiser, granularity: str, mode: Any, share: float, steps: int = 5, seed: int = 1
) -> GateSchedule:
    graph, chance = denoiser.blocks(granularity), random.Random(seed)
    return GateSchedule.of(graph, mode, [[chance.random() < share for _ in graph.names] for _ in range(steps)])


def running_modules(network: nn.Module, call: Callable[[], Any]) -> set[str]:
    """Names of the modules without children that compute during a call."""
    seen: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in network.named_modules()
        if not list(module.children())
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_all_gates_open_is_the_dense_network_bit_for_bit(make: Any, granularity: str, mode: Any) -> None:
    dense = make()
    full = gated(dense, schedule(dense, granularity, mode, 1.1), PROCESS)
    assert torch.equal(draw(full), draw(dense))


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_taking_the_gates_out_restores_everything(make: Any, granularity: str, mode: Any) -> None:
    dense = make()
    before, kinds, names = draw(dense), [type(m) for m in dense.modules()], list(dense.state_dict())
    pruned = gated(dense, schedule(dense, granularity, mode, 0.4), PROCESS)
    assert not torch.equal(draw(pruned), before)
    assert torch.equal(draw(dense), before), "the dense one is untouched beside it"
    install(dense.network, dense.blocks(granularity), mode)
    assert any(isinstance(m, GatedPart) for m in dense.modules())
    assert torch.equal(draw(dense), before), "gates that nobody sets do nothing"
    remove(dense.network)
    assert [type(m) for m in dense.modules()] == kinds
    assert list(dense.state_dict()) == names
    assert not [key for m in dense.modules() for key in vars(m) if key == "_gating"]
    assert torch.equal(draw(dense), before)


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_weights_are_shared_and_copies_stand_alone(make: Any, granularity: str, mode: Any) -> None:
    dense = make()
    pruned = gated(dense, schedule(dense, granularity, mode, 0.5), PROCESS)
    assert {id(p) for p in pruned.parameters()} == {id(p) for p in dense.parameters()}
    assert list(pruned.state_dict()) == list(dense.state_dict())
    copy, image = deepcopy(pruned), draw(pruned)
    with torch.no_grad():
        next(iter(dense.network.parameters())).zero_()
    assert torch.equal(draw(copy), image)


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_training_gives_what_the_schedule_gives(make: Any, granularity: str, mode: Any, reuse: Any) -> None:
    dense = make()
    for seed in range(3):
        chosen = replace(schedule(dense, granularity, mode, 0.6, seed=seed), reuse=reuse)
        expected = draw(gated(dense, chosen, PROCESS))
        unroll = Unroll(dense, granularity, mode, PROCESS, SAMPLER, reuse=reuse)
        run = torch.tensor(chosen.rows).float().requires_grad_()
        image = unroll(initial_noise(IDS, dense.sample_shape), LABELS, run)
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-6)
        each = unroll(initial_noise(IDS, dense.sample_shape), LABELS, run[:, None].expand(-1, 3, -1))
        torch.testing.assert_close(each, expected, rtol=0, atol=2e-6)
        closed = torch.ones(5)
        closed[3] = 0
        left_out = replace(chosen, rows=(*chosen.rows[:3], (False,) * len(chosen.blocks), chosen.rows[4]))
        image = unroll(initial_noise(IDS, dense.sample_shape), LABELS, run, closed)
        torch.testing.assert_close(image, draw(gated(dense, left_out, PROCESS)), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_the_gradient_of_a_gate_is_the_difference_it_makes(make: Any, granularity: str, mode: Any) -> None:
    """Along a blend between 0 and 1 the loss is smooth, so finite differences have to agree; so does recomputing."""
    dense = make().double()
    noise = initial_noise(IDS, dense.sample_shape).double()
    sampler = Sampler(steps=3)
    run = torch.full((3, len(dense.blocks(granularity))), 0.7, dtype=torch.float64)
    process = Process(schedule="cosine", prediction="v", clip_sample=False)
    gradients = []
    for steps, blocks in ((True, False), (False, False), (True, True)):
        unroll = Unroll(dense, granularity, mode, process, sampler, steps, blocks)
        gate = run.clone().requires_grad_()
        unroll(noise, LABELS, gate).square().sum().backward()
        gradients.append(gate.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-9, atol=1e-12)
    assert gradients[0] is not None
    assert not gradients[0][0].any(), "the first step always runs"
    if mode == "output":
        return  # the output's gate acts in two places and is counted in one, see Unroll
    opened = torch.ones_like(run)
    opened[1, 0], opened[2, -1] = 0, 0
    gate = opened.clone().requires_grad_()
    unroll(noise, LABELS, gate).square().sum().backward()
    step = torch.zeros_like(run)
    step[1, 0], step[2, 1] = 1e-5, -2e-5
    with torch.no_grad():
        values = [unroll(noise, LABELS, opened + s).square().sum() for s in (step, -step)]
    assert gate.grad is not None
    slope = (values[0] - values[1]) / 2
    torch.testing.assert_close(slope, (gate.grad * step).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_a_gate_of_a_whole_step_is_worth_what_it_changes(reuse: Any) -> None:
    """A gate of the last step, under a loss linear in the samples: exactly the difference between run and left out.

    Along lines a step that is skipped changes what the one before it gives, so a shut gate begins elsewhere.
    """
    dense = tiny_dit().double()
    noise = initial_noise(IDS, dense.sample_shape).double()
    process = Process(schedule="cosine", prediction="v", clip_sample=False)
    unroll = Unroll(dense, "half", "residual", process, Sampler(steps=4), reuse=reuse)
    weights = torch.randn(noise.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = torch.ones(4, len(dense.blocks("half")), dtype=torch.float64)
    run[3, 0], run[2, 1] = 0, 0

    def loss(gates: Tensor) -> Tensor:
        return (unroll(noise, LABELS, run.clone().requires_grad_(), gates) * weights).sum()

    with torch.no_grad():
        difference = loss(torch.tensor([1.0, 1, 1, 1]).double()) - loss(torch.tensor([1.0, 1, 1, 0]).double())
    for last in (1.0,) if reuse == "linear" else (0.0, 1.0):
        gates = torch.tensor([1, 1, 1, last], dtype=torch.float64, requires_grad=True)
        loss(gates).backward()
        assert gates.grad is not None
        torch.testing.assert_close(gates.grad[3], difference, rtol=1e-9, atol=0)
        assert gates.grad[1:3].abs().min() > 0


def test_skipping_the_last_block_runs_nothing_and_repeats_the_prediction() -> None:
    dense = tiny_unet()
    graph = dense.blocks("coarse")
    chosen = GateSchedule.of(graph, "output", [[1] * 5, [1, 1, 1, 1, 0]])
    assert chosen.rows[1] == (False,) * 5
    pruned: Any = gated(dense, chosen)
    x, t = torch.randn(2, 3, 1, 32, 32), torch.tensor([900, 900, 900])
    pruned.at_step(0, 2)
    first = pruned(x[0], t, LABELS)
    pruned.at_step(1, 2)
    assert running_modules(pruned.network, lambda: pruned(x[1], t - 500, LABELS)) == set()
    pruned.at_step(1, 2)
    assert torch.equal(pruned(x[1], t - 500, LABELS), first)


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_only_what_a_later_step_reads_is_stored(make: Any, granularity: str, mode: Any, reuse: Any) -> None:
    dense = make()
    names = dense.blocks(granularity).names
    full, nothing = (True,) * len(names), (False,) * len(names)
    partial = next(rows for rows in schedule(dense, granularity, mode, 0.7).rows[1:] if any(rows) and not all(rows))
    for rows in ((full, nothing, full, nothing, full), (full, full, partial, full, nothing)):
        pruned: Any = gated(dense, GateSchedule(granularity, mode, names, rows, reuse), PROCESS)
        image = draw(pruned)
        stored = {name for name, slot in zip(names, pruned._slots[0], strict=True) if slot is not None}
        assert stored == {name for name, runs in zip(names, partial, strict=True) if not runs and partial in rows}
        pruned._stored = (full,) * len(rows)
        assert torch.equal(draw(pruned), image)
        assert all(slot is not None for slot in pruned._slots[0])


def test_only_what_the_closure_says_computes() -> None:
    dense = tiny_unet()
    graph = dense.blocks("fine")
    row = tuple(name in ("u0", "u1", "d1") for name in graph.names)
    pruned: Any = gated(dense, GateSchedule("fine", "output", graph.names, (graph.full(), row)), PROCESS)
    x, t = torch.randn(3, 1, 32, 32), torch.tensor([900, 900, 900])
    pruned.at_step(0, 2)
    pruned(x, t, LABELS)
    pruned.at_step(1, 2)
    ran = running_modules(pruned.network, lambda: pruned(x, t, LABELS))
    inside = {name for block in graph.blocks for name in block.modules}
    allowed = {name for block, runs in zip(graph.blocks, row, strict=True) if runs for name in block.modules}
    for name in ran:
        owners = {module for module in inside if f"{name}.".startswith(f"{module}.")}
        assert owners <= allowed, f"{name} computes"
    assert any(name.startswith("up_blocks.1.resnets.1") for name in ran)


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_copies_follow_the_network_to_another_device_and_type(make: Any, granularity: str, mode: Any) -> None:
    """The device is known only after a module was built; moving replaces buffers, such as DiT's positions."""
    dense = make()
    unroll = Unroll(dense, granularity, mode, PROCESS, SAMPLER)
    pruned = gated(dense, schedule(dense, granularity, mode, 0.5), PROCESS)
    copies = (unroll.denoiser, pruned)
    dense.double()
    assert {t.dtype for copy in copies for t in (*copy.parameters(), *copy.buffers())} == {torch.float64}
    dense.to("meta")
    assert {t.device.type for copy in copies for t in (*copy.parameters(), *copy.buffers())} == {"meta"}


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_counted_macs_are_those_of_the_costs(make: Any, granularity: str, mode: Any) -> None:
    dense = make()
    chosen = schedule(dense, granularity, mode, 0.5)
    partial = next(row for row in chosen.rows if any(row) and not all(row))
    late = replace(chosen, rows=(*[chosen.rows[0]] * 3, partial, chosen.rows[0]))
    costs = traced_costs(dense, granularity, mode)
    for one in (chosen, late):
        counted = trajectory_cost(gated(dense, one, PROCESS), PROCESS, SAMPLER).macs()
        assert counted == sum(costs.step(row) for row in one.rows)
        assert counted < trajectory_cost(dense, PROCESS, SAMPLER).macs()


def test_costs_of_a_masked_network_are_those_under_its_masks() -> None:
    masked = tiny_dit()
    unmasked = traced_costs(masked, "half", "residual")
    MaskSet(masked.network, select_units(masked.anatomy(), None, masked.default_dense(), 4), Sparsity(2, 4))
    costs = traced_costs(masked, "half", "residual")
    chosen = schedule(masked, "half", "residual", 0.5)
    counted = trajectory_cost(gated(masked, chosen, PROCESS), PROCESS, SAMPLER).macs()
    assert counted == sum(costs.step(row) for row in chosen.rows)
    assert all(now < before for now, before in zip(costs.blocks, unmasked.blocks, strict=True))
    assert costs.shell == unmasked.shell, "nothing outside the blocks is masked here"


@pytest.mark.parametrize("granularity", ["coarse", "fine"])
def test_traced_costs_are_those_of_the_modules(granularity: str) -> None:
    dense = tiny_unet()
    assert traced_costs(dense, granularity, "output") == block_costs(count_denoiser(dense), dense.blocks(granularity))


def predictor(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return torch.sin(3 * x) * 0.8 + 0.1 * torch.cos(t.view(-1, 1).to(x.dtype) / 90)


KEPT = [0, 7, 13, 19, 20, 21, 26, 32, 39, 48]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_whole_step_reuse_under_ddim_is_ddim_on_the_kept_steps(prediction: Any) -> None:
    process = Process("scaled_linear", prediction, beta_start=0.00085, beta_end=0.012, clip_sample=False)
    process._alphas_cumprod = process.alphas_cumprod.double()
    skipped, index = SkippedStep(process), -1
    memory: Any = None
    full = tuple(range(981, 0, -20))
    assert [full[i] for i in KEPT] == [981, 841, 721, 601, 581, 561, 461, 341, 201, 21]

    def enter(step: int) -> None:
        nonlocal index
        index = step

    def reusing(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        nonlocal memory
        if index not in KEPT:
            return skipped.predict(memory, x, t, index)
        memory = skipped.remember(memory, predictor(x, t, cond), x, t)
        return predictor(x, t, cond)

    noise = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = torch.zeros(4)
    ours = integrate(reusing, process, noise, cond, Sampler("ddim", 50, timesteps=full), enter)
    plain = Sampler("ddim", 10, timesteps=tuple(full[i] for i in KEPT))
    assert float((ours - integrate(predictor, process, noise, cond, plain)).abs().max()) < 1e-12


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_a_skipped_step_in_half_precision_is_finite_and_of_the_type_it_was_given(reuse: Any) -> None:
    process = Process("linear", "v")
    skipped, x = SkippedStep(process, reuse), torch.full((2, 1, 4, 4), 0.5, dtype=torch.bfloat16)
    memory = skipped.remember(None, 0.1 * x, x, torch.tensor([0, 900]))
    found = skipped.predict(memory, x, torch.tensor([0, 800]), 1)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()


def test_skipping_all_but_the_first_step_holds_the_noise() -> None:
    process = Process("linear", "epsilon", clip_sample=False)
    dense = tiny_unet()
    graph = dense.blocks("coarse")
    pruned = gated(dense, GateSchedule.of(graph, "output", [[1] * 5] + [[0] * 5] * 4), process)
    torch.testing.assert_close(
        draw(pruned, process=process), draw(dense, Sampler(steps=1), process), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["dpm-solver++", "euler", "plms"])
def test_other_solvers_count_their_calls(name: Any) -> None:
    process = Process("linear", "epsilon", clip_sample=False)
    dense, sampler = tiny_unet(), Sampler(name, 5)
    calls = sampler.calls(process)
    chosen = schedule(dense, "coarse", "output", 0.8, steps=calls)
    image = draw(gated(dense, chosen, process), sampler, process)
    assert torch.isfinite(image).all()
    with pytest.raises(InputError, match=f"for {calls} network calls, this sampler makes"):
        draw(gated(dense, chosen, process), Sampler(name, 9), process)


def test_plms_makes_a_call_more_than_it_has_steps() -> None:
    process = Process("scaled_linear", "epsilon", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    visited = Sampler("plms", 50, spacing="leading").visited(process).tolist()
    assert len(visited) == 51
    assert visited[:4] == [981, 961, 961, 941]
    assert Sampler("ddim", 50, spacing="leading").visited(process).tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_guidance_batched_and_in_turn_agree(make: Any, granularity: str, mode: Any) -> None:
    dense = make()
    chosen = schedule(dense, granularity, mode, 0.5)
    together = draw(gated(dense, chosen, PROCESS), Sampler(steps=5, guidance=2.0))
    pruned: Any = gated(dense, chosen, PROCESS)

    def in_turn(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        one: Tensor = pruned(x, t, cond)
        other: Tensor = pruned(x, t, pruned.null_condition(cond))
        return other + 2.0 * (one - other)

    noise = initial_noise(IDS, dense.sample_shape)
    pruned.eval()
    apart = integrate(in_turn, PROCESS, noise, LABELS, SAMPLER, lambda index: pruned.at_step(index, 5))
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_every_pattern_is_a_graph_without_breaks(make: Any, granularity: str, mode: Any, reuse: Any) -> None:
    dense = make()
    pruned: Any = gated(dense, replace(schedule(dense, granularity, mode, 0.5, steps=3), reuse=reuse), PROCESS)
    x, t = torch.randn(3, 1, 32, 32), torch.tensor([900, 900, 900])
    with torch.no_grad():
        for step, row in enumerate(pruned.schedule.rows):
            pruned.at_step(step, 3)
            pruned(x, t, LABELS)
            if any(row):
                found = torch._dynamo.explain(pruned.path(row, pruned._stored[step]))(
                    pruned._slots[0], pruned._skipped_step.clock(t), x, t, LABELS
                )
                assert (found.graph_count, found.graph_break_count) == (1, 0)
                torch._dynamo.reset()


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@torch._dynamo.config.patch(recompile_limit=8)  # which some libraries raise when they are imported
@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_compiled_paths_give_the_same_images_from_one_graph_each(reuse: Any) -> None:
    dense = tiny_dit()
    chosen = replace(schedule(dense, "half", "residual", 0.5, steps=30), reuse=reuse)
    assert len(chosen.patterns()) > torch._dynamo.config.recompile_limit, "more than one code object would get"
    pruned: Any = gated(dense, chosen, PROCESS)
    expected = draw(pruned, Sampler(steps=30))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pruned.compile_paths(backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(draw(pruned, Sampler(steps=30)), expected, rtol=0, atol=1e-6)
    assert compiled_graphs() == graphs_needed(chosen)
    torch._dynamo.reset()


@torch._dynamo.config.patch(recompile_limit=8)
@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize(("make", "granularity", "mode"), KINDS)
def test_no_trajectory_after_the_first_compiles_anything(make: Any, granularity: str, mode: Any, reuse: Any) -> None:
    """Nor does a step, whichever steps stored what it reads."""
    dense = make()
    chosen = replace(schedule(dense, granularity, mode, 0.7, steps=3), reuse=reuse)
    full, one, other = chosen.rows
    rows = (full, one, other, other, one, full, other, one)
    chosen = replace(chosen, rows=rows)
    pruned: Any = gated(dense, chosen, PROCESS)
    expected = draw(pruned, Sampler(steps=len(rows)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pruned.compile_paths(backend="eager", fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(draw(pruned, Sampler(steps=len(rows))), expected, rtol=0, atol=1e-5)
        assert compiled_graphs() == graphs_needed(chosen)
    torch._dynamo.reset()


def graphs_needed(chosen: GateSchedule) -> int:
    """One a pattern; where lines are drawn, one more for the first step, before which nothing is stored."""
    again = chosen.reuse == "linear" and any(map(all, chosen.rows[1:]))
    return len([row for row in chosen.patterns() if any(row)]) + again


def test_a_schedule_of_other_blocks_is_refused() -> None:
    chosen = GateSchedule("block", "residual", ("B0", "B1", "B2"), ((True,) * 3,))
    with pytest.raises(InputError, match="B0 B1 B2 of the schedule are not the network's, B0 B1"):
        gated(tiny_dit(), chosen)


def test_it_is_step_aware_and_of_its_family() -> None:
    dense: Any = tiny_dit()
    pruned: Any = gated(dense, schedule(dense, "block", "residual", 0.5))
    assert isinstance(pruned, StepAware)
    assert isinstance(pruned, type(dense))
    assert not isinstance(dense, StepAware)
