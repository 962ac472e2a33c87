"""What is stored of skipped values and read in their place."""

import itertools
from typing import Any

import pytest
import torch

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import SkippedStep, gated
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import blended, flatten, read, store, unflatten
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.protocols import InputError
from tests.factories import tiny_dit

CLOCK = torch.tensor([0.0, 1.0])


def line(clock: torch.Tensor) -> torch.Tensor:
    return 3 * clock.view(-1, 1) - 2


def test_a_line_is_continued_exactly_and_not_too_far() -> None:
    slot = store("linear", None, line(CLOCK), CLOCK)
    assert torch.equal(read(slot, CLOCK + 5), line(CLOCK)), "one value says nothing of a direction"
    slot = store("linear", slot, line(CLOCK + 2), CLOCK + 2)
    torch.testing.assert_close(read(slot, CLOCK + 3), line(CLOCK + 3))
    assert torch.equal(read(slot, CLOCK + 100), read(slot, CLOCK + 8)), "three times the distance of the two points"
    twice = store("linear", slot, line(CLOCK + 9), CLOCK + 2)
    assert torch.equal(read(twice, CLOCK + 3), line(CLOCK + 9)), "a timestep visited twice has no direction either"


def test_the_last_value_stays() -> None:
    slot = store("last", store("last", None, line(CLOCK), CLOCK), line(CLOCK + 2), CLOCK + 2)
    assert torch.equal(read(slot, CLOCK + 9), line(CLOCK + 2))


@pytest.mark.parametrize("reuse", ["last", "linear"])
def test_gates_store_a_sample_or_leave_it(reuse: Any) -> None:
    before = store(reuse, store(reuse, None, line(CLOCK), CLOCK), line(CLOCK + 1), CLOCK + 1)
    after = store(reuse, before, line(CLOCK + 2), CLOCK + 2)
    mixed = store(reuse, before, line(CLOCK + 2), CLOCK + 2, torch.tensor([1.0, 0.0]))
    for part, new, old in zip(mixed, after, before, strict=True):
        assert torch.equal(part[0], new[0])
        assert torch.equal(part[1], old[1])


def test_a_tensor_that_occurs_twice_is_blended_once() -> None:
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    found = blended(torch.tensor(0.25), (one, (one, other)), (other, (other, one)))
    assert found[0] is found[1][0]
    tensors: list[torch.Tensor] = []
    places = flatten(found, tensors)
    assert len(tensors) == 2
    assert unflatten(places, tuple(tensors))[1][1] is tensors[1]


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_skipped_steps_along_a_line_solve_exactly_what_moves_along_one(name: str) -> None:
    """A network whose x_0 is linear in the clock: a few steps of it give what a thousand give."""
    if name == "flow":
        process = Process("flow", "flow", clip_sample=False)
        schedule = [1000.0, 950.0, 900.0, 850.0, 700.0, 600.0, 450.0, 300.0, 200.0, 120.0]
    else:
        process = Process("scaled_linear", "v", beta_start=0.00085, beta_end=0.012, clip_sample=False)
        schedule = [999.0, 950.0, 900.0, 850.0, 700.0, 600.0, 450.0, 300.0, 200.0, 120.0]
    skipped, runs = SkippedStep(process, "linear"), [0, 1, 3, 5, 7]
    skipped.visits([*schedule, 49.0], holds=True)

    def predictor(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x0 = 0.3 * process.clock(t).view(-1, 1) + torch.zeros_like(x)
        return process.target(x0, process.noise_in(x, x0, t), t)

    def stepped(x: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, following: float) -> torch.Tensor:
        return process.add_noise(*process.x0_and_noise(prediction, x, t), torch.full_like(t, following))

    noise = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, plain, memory = noise, noise, None
    for step, (now, following) in enumerate(itertools.pairwise([*schedule, 49.0])):
        t = torch.full((3,), now)
        plain = stepped(plain, predictor(plain, t), t, following)
        if step in runs:
            memory = skipped.remember(memory, predictor(ours, t), ours, t)
        prediction = skipped.predict(memory, ours, t, step) if step else predictor(ours, t)
        ours = stepped(ours, prediction, t, following)
    fine = noise
    for now in range(int(schedule[0]), 49, -1):
        t = torch.full((3,), float(now))
        fine = stepped(fine, predictor(fine, t), t, now - 1.0)
    assert float((ours - fine).abs().max()) < 0.02 * float((plain - fine).abs().max())


def test_lines_need_to_know_how_predictions_are_read() -> None:
    dense = tiny_dit()
    graph = dense.blocks("half")
    schedule = GateSchedule.of(graph, "residual", [[1] * 4, [0] * 4, [1] * 4, [0] * 4], "linear")
    with pytest.raises(InputError, match="linear reuse needs the process"):
        gated(dense, schedule)
    with pytest.raises(InputError, match="reuse: 'cubic' is none of last, linear"):
        GateSchedule.of(graph, "residual", [[1] * 4], "cubic")  # type: ignore[arg-type]
    process = Process(schedule="cosine", prediction="v")
    ids, labels = torch.arange(2), torch.tensor([1, 2])
    last = GateSchedule.of(graph, "residual", schedule.rows)
    images = [sample_images(gated(dense, s, process), process, ids, labels, Sampler(steps=4)) for s in (schedule, last)]
    assert not torch.equal(*images)


@pytest.mark.parametrize("process", [Process("flow", "flow"), Process("cosine", "v")])
def test_the_clock_is_finite_and_runs_towards_the_sample(process: Process) -> None:
    clock = process.clock(process.grid())
    assert torch.isfinite(clock).all()
    assert (clock.diff() <= 0).all()
