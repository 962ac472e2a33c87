"""DDIM: what a step does, and that it agrees with diffusers' own."""

import pytest
import torch
from diffusers import DDIMScheduler

from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import guided, initial_noise, integrate, sample_images
from lightning_prune.diffusion.solvers import Sampler, make_solver
from lightning_prune.protocols import InputError
from tests.backbones import BACKBONES, Backbone
from tests.traffic import Traffic

STEPS = 5


def run(process: Process, value: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sample with a network that always predicts x_0 = `value`; the result and every x_t the network saw."""
    seen: list[torch.Tensor] = []

    def predict(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        signal, sigma = process.coefficients(t, x)
        x0 = torch.full_like(x, value)
        return process.target(x0, (x - signal * x0) / sigma, t)

    noise = initial_noise(torch.arange(3), (1, 4, 4))
    return integrate(predict, process, noise, torch.zeros(3, dtype=torch.long), Sampler(steps=STEPS)), seen


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_prediction_outside_the_range_ends_at_its_edge(prediction: str) -> None:
    process = Process(schedule="cosine", prediction=prediction)  # type: ignore[arg-type]
    result, _ = run(process, 3.0)
    torch.testing.assert_close(result, torch.ones_like(result))


def test_the_noise_of_a_clipped_step_belongs_to_the_clipped_image() -> None:
    # With x_0 at the edge, what is left of x_t is noise; one and the same at every step from then on.
    process = Process(schedule="cosine", prediction="v", clip_sample=True)
    _, seen = run(process, 3.0)
    timesteps = Sampler(steps=STEPS).visited(process)
    noises = []
    for x, t in zip(seen[1:], timesteps[1:], strict=True):
        signal, sigma = process.coefficients(t.repeat(len(x)), x)
        noises.append((x - signal) / sigma)
    for later in noises[1:]:
        torch.testing.assert_close(later, noises[0], rtol=1e-4, atol=1e-4)


def test_without_clipping_a_step_is_that_of_diffusers() -> None:
    process = Process(schedule="linear", prediction="epsilon", clip_sample=False)
    noise = initial_noise(torch.arange(2), (1, 4, 4))
    reference = DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    reference.set_timesteps(STEPS)
    x = noise
    for t in reference.timesteps:
        x = reference.step(torch.tanh(x), t, x).prev_sample
    labels = torch.zeros(2, dtype=torch.long)
    ours = integrate(lambda x, t, cond: torch.tanh(x), process, noise, labels, Sampler(steps=STEPS))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-6)


def test_guidance_extrapolates_from_the_prediction_without_a_class() -> None:
    def predict(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return cond.float().view(-1, 1).expand_as(x)

    x, t, cond = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.tensor([1, 4])
    output = guided(predict, lambda c: torch.full_like(c, 10), 2.0)(x, t, cond)
    assert output[:, 0].tolist() == [2 * 1 - 10, 2 * 4 - 10]


def test_noise_depends_on_the_id_alone() -> None:
    together = initial_noise(torch.arange(4), (1, 4, 4))
    apart = initial_noise(torch.tensor([3, 1]), (1, 4, 4))
    assert torch.equal(together[[3, 1]], apart)
    assert not torch.equal(together[0], together[1])


def test_more_steps_than_the_process_has_are_refused() -> None:
    with pytest.raises(InputError, match="1001 sampling steps"):
        make_solver(Sampler(steps=1001), Process())


def test_a_trajectory_copies_nothing_to_the_device_step_by_step() -> None:
    """The meta device stands for any other: what is copied there does not grow with the number of steps."""

    def copies(steps: int) -> int:
        process = Process("cosine", "v")
        noise, cond = torch.empty(2, 1, 4, 4, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
        with Traffic() as traffic:
            integrate(lambda x, t, cond: torch.zeros_like(x), process, noise, cond, Sampler(steps=steps))
        return int(traffic.copies)

    assert copies(9) == copies(3) == 3  # timesteps for the network and for the solver, and the noise schedule


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_what_validation_brought_to_a_device_serves_training(schedule: str) -> None:
    process = Process(schedule, "flow" if schedule == "flow" else "v")  # type: ignore[arg-type]
    x, generator = torch.empty(2, 1, 4, 4, device="meta"), torch.Generator()
    t = process.draw_timesteps(2, generator).to("meta")
    with torch.inference_mode():
        process.coefficients(t, x)
        process.clock(t)
        process.draw_timesteps(2, generator)
    prediction = torch.empty_like(x, requires_grad=True)
    with Traffic() as traffic:
        process.x0_and_noise(prediction, x, t)[1].sum().backward()
    assert traffic.copies == 0
    assert prediction.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_noise_at_the_cleanest_timestep(dtype: torch.dtype) -> None:
    process, t = Process("linear", "epsilon"), torch.tensor([0, 999])
    half, single = (torch.ones(2, 1, 2, 2, dtype=kind) for kind in (dtype, torch.float32))
    for found, expected in zip(process.coefficients(t, half), process.coefficients(t, single), strict=True):
        assert torch.equal(found, expected)
    assert process.add_noise(half, half, t).dtype == dtype
    assert torch.isfinite(process.noise_in(half, half, t)).all()


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name)
def test_networks_of_half_precision_draw_nearly_the_same_images(backbone: Backbone) -> None:
    denoiser = backbone.build()
    cond, sampler = backbone.condition(denoiser, 2), backbone.sampler(guidance=1.5)

    def draw() -> torch.Tensor:
        return sample_images(denoiser, backbone.process(), torch.arange(2), cond, sampler)

    expected, _ = draw(), denoiser.to(torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as a trainer of half precision does around a step
    try:
        found = draw()
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert float((found - expected).square().mean().sqrt()) < 0.1 * float(expected.square().mean().sqrt())
