"""Solvers: all reach the data they are told of, follow listed timesteps, and refuse what they cannot take."""

import pytest
import torch
from diffusers import DDIMScheduler

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import Predict, initial_noise, integrate, noise_stream, sample_images
from lightning_prune.diffusion.solvers import Sampler, SamplerName, make_solver
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError, StepAware
from tests.factories import tiny_dit

LABELS = torch.zeros(1, dtype=torch.long)
MEAN, VARIANCE = 0.4, 0.01


def process_of(name: SamplerName) -> Process:
    return Process("flow", "flow", clip_sample=False, shift=3.0) if name == "flow-euler" else Process("cosine", "v")


def gaussian(process: Process) -> Predict:
    """The best network for data drawn from N(MEAN, VARIANCE)."""

    def predict(x: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        signal, sigma = process.coefficients(t, x)
        gain = signal * VARIANCE / (signal**2 * VARIANCE + sigma**2)
        x0 = MEAN + gain * (x - signal * MEAN)
        return process.target(x0, (x - signal * x0) / sigma, t)

    return predict


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "euler", "plms", "flow-euler"])
def test_every_solver_reaches_the_data(name: SamplerName) -> None:
    process = process_of(name)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    samples = integrate(gaussian(process), process, noise, LABELS, Sampler(name, 200))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert samples.std().item() == pytest.approx(VARIANCE**0.5, rel=0.15)


def test_euler_maruyama_reaches_the_data_where_the_released_sampler_does() -> None:
    """Written down anew in the continuous time of the released code, in double precision, on noise of its own."""
    process = Process("linear", "epsilon", clip_sample=False)
    draw = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(4000, 1, generator=draw)

    found = integrate(gaussian(process), process, noise(), LABELS, Sampler("euler-maruyama", 1000), draw=noise)

    grid = torch.cat([torch.zeros(1), torch.linspace(1e-3, 1, 1000)]).double()
    x = noise().double()
    for t, before in zip(grid.flip(0), grid.flip(0)[1:], strict=False):
        beta, dt = 0.1 + 19.9 * t, t - before
        signal_2 = (-0.1 * t - 19.9 * t**2 / 2).exp()
        variance = signal_2 * VARIANCE + 1 - signal_2
        score = -(x - signal_2.sqrt() * MEAN) / variance
        x = x + dt * (beta / 2 * x + beta * score) + (beta * dt).sqrt() * (noise() if before > 0 else 0)

    assert found.mean().item() == pytest.approx(x.mean().item(), abs=0.005) == pytest.approx(MEAN, abs=0.01)
    assert found.std().item() == pytest.approx(x.std().item(), rel=0.05) == pytest.approx(VARIANCE**0.5, rel=0.05)


def test_a_step_of_euler_maruyama_by_hand() -> None:
    process = Process("linear", "epsilon", clip_sample=False)
    solver = make_solver(Sampler("euler-maruyama", 2), process, lambda: torch.full((1, 1), 0.7))
    assert solver.timesteps.tolist() == [999, 499]
    x, noise, abar = torch.full((1, 1), 0.3), torch.full((1, 1), -1.2), process.alphas_cumprod
    beta = float(1 - abar[999] / abar[499])
    wanted = 0.3 + beta / 2 * 0.3 + beta * 1.2 / float((1 - abar[999]) ** 0.5) + beta**0.5 * 0.7
    assert solver.step(noise, solver.timesteps[0], x).item() == pytest.approx(wanted, rel=1e-5)
    beta = float(1 - abar[499])
    wanted = 0.3 + beta / 2 * 0.3 + beta * 1.2 / beta**0.5
    assert solver.step(noise, solver.timesteps[1], x).item() == pytest.approx(wanted, rel=1e-5)


def test_noise_of_steps_is_that_of_the_sample_whatever_it_is_drawn_with() -> None:
    model, process, sampler = tiny_dit().eval(), Process("linear"), Sampler("euler-maruyama", 5)
    ids, labels = torch.arange(4), torch.arange(4) % 2
    together = sample_images(model, process, ids, labels, sampler, seed=3)
    alone = [sample_images(model, process, ids[i : i + 1], labels[i : i + 1], sampler, seed=3) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    other = sample_images(model, process, ids, labels, sampler, seed=4)
    assert not torch.allclose(together, other, atol=0.1)


def test_noise_goes_on_where_the_starting_noise_ends_and_never_repeats() -> None:
    draw = noise_stream(torch.tensor([5, 9]), (2, 3), seed=1)
    drawn = [draw() for _ in range(3)]
    assert torch.equal(drawn[0], initial_noise(torch.tensor([5, 9]), (2, 3), seed=1))
    assert len({tensor.flatten()[0].item() for tensor in drawn}) == 3


def test_without_noise_to_draw_euler_maruyama_is_refused() -> None:
    process = Process("linear")
    with pytest.raises(InputError, match="euler-maruyama draws noise at every step"):
        integrate(gaussian(process), process, torch.zeros(1, 1), LABELS, Sampler("euler-maruyama", 5))


def test_listed_timesteps_are_visited_and_those_of_the_grid_change_nothing() -> None:
    process = Process("cosine", "v")
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    spaced = integrate(gaussian(process), process, noise, LABELS, Sampler("ddim", 4))
    listed = Sampler("ddim", 4, timesteps=(999, 749, 499, 249))
    assert torch.equal(integrate(gaussian(process), process, noise, LABELS, listed), spaced)
    uneven = make_solver(Sampler("ddim", 3, timesteps=(999, 400, 3)), process)
    assert uneven.timesteps.tolist() == [999, 400, 3]


def test_a_ddim_step_goes_to_the_next_timestep_of_the_list() -> None:
    # From exact predictions of one x_0 and noise, x at the second timestep is x_0 noised to it.
    process = Process("linear", "epsilon", clip_sample=False)
    x0, noise = torch.full((1, 1), 0.3), torch.full((1, 1), -1.2)
    solver = make_solver(Sampler("ddim", 2, timesteps=(900, 123)), process)
    x = process.add_noise(x0, noise, torch.tensor([900]))
    following = solver.step(noise, solver.timesteps[0], x)
    torch.testing.assert_close(following, process.add_noise(x0, noise, torch.tensor([123])))
    torch.testing.assert_close(solver.step(noise, solver.timesteps[1], following), x0)


@pytest.mark.parametrize(("steps", "first", "last"), [(50, 981, 1), (20, 951, 1)])
def test_leading_spacing_is_that_of_stable_diffusion(steps: int, first: int, last: int) -> None:
    timesteps = Sampler("ddim", steps, spacing="leading").visited(Process()).tolist()
    assert (timesteps[0], timesteps[-1]) == (first, last)
    scheduler = DDIMScheduler(steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    assert timesteps == scheduler.timesteps.tolist()


def test_plms_makes_one_call_more_than_it_has_steps() -> None:
    assert Sampler("plms", 50).calls(Process()) == 51


def test_noise_levels_of_the_flow_are_shifted() -> None:
    process = Process("flow", "flow", shift=3.0)
    assert process.grid()[[499, 999]].tolist() == pytest.approx([750, 1000])
    x0, noise = torch.full((1, 1), 2.0), torch.full((1, 1), -1.0)
    x = process.add_noise(x0, noise, torch.tensor([750.0]))
    assert x.item() == pytest.approx(0.25 * 2 - 0.75)
    assert process.target(x0, noise, torch.tensor([750.0])).item() == -3


def test_a_flow_process_survives_the_manifest() -> None:
    process = Process("flow", "flow", clip_sample=False, shift=3.0)
    again = Process.from_scheduler(process.scheduler_config)
    assert again.describe() == process.describe()
    assert torch.equal(again.grid(), process.grid())


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_predictions_are_read_as_they_were_asked_for(prediction: str) -> None:
    flow = prediction == "flow"
    process = Process("flow" if flow else "linear", prediction, clip_sample=False)  # type: ignore[arg-type]
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), process.grid()[torch.tensor([100, 500, 900])]
    target = process.target(x0, noise, t)
    for found, true in zip(process.x0_and_noise(target, process.add_noise(x0, noise, t), t), (x0, noise), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampler(steps=0), "0 sampling steps"),
        (lambda: Sampler("plms", 2, timesteps=(5, 1)), "plms takes no list"),
        (lambda: Sampler(steps=3, timesteps=(5, 1)), "2 are listed, but steps is 3"),
        (lambda: Sampler(steps=2, timesteps=(5, 5)), "have to fall"),
        (
            lambda: make_solver(Sampler(steps=1, timesteps=(1000,)), Process()),
            "timestep 1000, but the process has 1000",
        ),
        (lambda: make_solver(Sampler("flow-euler"), Process()), "flow-euler cannot sample a noise-schedule process"),
        (lambda: make_solver(Sampler(), Process("flow", "flow")), "ddim cannot sample a flow process"),
        (lambda: Process("flow", "v"), "'v' does not go with the schedule 'flow'"),
        (lambda: Process(prediction="flow"), "'flow' does not go with the schedule 'linear'"),
        (lambda: Process("flow", "flow", shift=0), "shift: 0 is not positive"),
        (lambda: Process("flow", "flow").alphas_cumprod, "no cumulative alphas"),
    ],
)
def test_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()


class EverySecond(DiT):
    """A denoiser that does its work at even steps only and gives zeros at odd ones."""

    seen: list[tuple[int, int]]
    works: bool

    def at_step(self, index: int, calls: int) -> None:
        self.seen.append((index, calls))
        self.works = index % 2 == 0

    def phase(self, index: int, calls: int) -> bool:
        return index % 2 == 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        return super().forward(x, t, cond) if self.works else torch.zeros_like(x)


def test_a_denoiser_hears_of_every_step_and_is_charged_for_what_it_does() -> None:
    process, denoiser = Process("cosine", "v"), tiny_dit()
    full = trajectory_cost(denoiser, process, Sampler(steps=5)).macs()
    denoiser.__class__ = EverySecond
    assert isinstance(denoiser, EverySecond)
    assert isinstance(denoiser, StepAware)
    denoiser.seen = []
    sample_images(denoiser, process, torch.arange(2), torch.zeros(2, dtype=torch.long), Sampler(steps=5))
    assert denoiser.seen == [(index, 5) for index in range(5)]
    assert trajectory_cost(denoiser, process, Sampler(steps=5)).macs() == full * 3 / 5
    assert trajectory_cost(denoiser, process, Sampler(steps=5, guidance=2.0)).macs() == full * 6 / 5
