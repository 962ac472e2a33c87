"""Sampling: one loop for evaluation, search and export.

Steps are addressed by index; the noise of sample `i` is a function of its id alone and is drawn on the CPU, so images
do not depend on batch size, device count or world size. Clipping happens here, the same for every solver.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition, move, stack
from lightning_prune.diffusion.gated import begin
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.base import guide_every_channel
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Draw, Sampler, make_solver
from lightning_prune.protocols import StepAware
from lightning_prune.seeds import derive

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
OnStep = Callable[[int], None]
Guide = Callable[[Tensor, Tensor, float], Tensor]


def initial_noise(ids: Tensor, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard normal noise [len(ids), *shape] on the CPU; row i depends on (seed, ids[i]) alone."""
    return noise_stream(ids, shape, seed)()


def noise_stream(ids: Tensor, shape: tuple[int, ...], seed: int = 0) -> Draw:
    """Draws `initial_noise` first, then more of its kind at every call."""
    generators = [torch.Generator().manual_seed(derive(seed, i)) for i in ids.tolist()]

    def draw() -> Tensor:
        # In single precision whatever the default is, which a trainer of half precision changes.
        return torch.stack([torch.randn(shape, generator=own, dtype=torch.float32) for own in generators])

    return draw


def guided(
    predict: Predict,
    null_condition: Callable[[Condition], Condition],
    guidance: float,
    guide: Guide = guide_every_channel,
) -> Predict:
    """Classifier-free guidance in one doubled batch; `guide` is the family's rule (`Denoiser.guide`).

    A scale of 1 is the conditional prediction alone and costs one call.
    """
    if guidance == 1.0:
        return predict

    def both(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        stacked = predict(torch.cat([x, x]), torch.cat([t, t]), stack(cond, null_condition(cond)))
        conditional, unconditional = stacked.chunk(2)
        return guide(conditional, unconditional, guidance)

    return both


def trajectory(
    predict: Predict,
    process: Process,
    noise: Tensor,
    cond: Condition,
    sampler: Sampler,
    on_step: OnStep | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Run a sampler's steps, with gradients where they are enabled; guidance is `predict`'s.

    Args:
        predict: network prediction for (x_t [B, ...], t [B], cond).
        process: the forward process the network was trained on.
        noise: starting noise [B, C, H, W], on the device to sample on.
        cond: condition of the batch.
        sampler: solver and timesteps.
        on_step: called with each step index before it runs.
        draw: noise of the shape of `noise`, on its device, for samplers that draw some at every step.

    Returns:
        Samples of the shape of `noise`.
    """
    solver = make_solver(sampler, process, draw)
    x = noise * solver.init_noise_sigma
    visited = solver.timesteps.to(x.device)  # all at once: every copy makes the device wait
    for index, t in enumerate(solver.timesteps):
        if on_step is not None:
            on_step(index)
        seen = solver.scale_model_input(x, t)
        times = visited[index].expand(len(x))
        output = process.clipped(predict(seen, times if process.is_flow else times.long(), cond), seen, times)
        x = solver.step(output, t, x)
    return x


# A trajectory without gradients.
integrate = torch.no_grad()(trajectory)


def sample_images(
    denoiser: Denoiser,
    process: Process,
    ids: Tensor,
    cond: Condition,
    sampler: Sampler,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples [B, C, H, W] of `denoiser` for sample `ids` [B] and their conditions, on the denoiser's device.

    The denoiser is left in the mode it was in. One whose work depends on the step is told each before it runs.

    Raises:
        InputError: gates for another solver or number of network calls.
    """
    begin(denoiser, sampler, process)
    device = next(denoiser.parameters()).device
    calls = sampler.calls(process)
    was_training = denoiser.training

    def enter(index: int) -> None:
        if isinstance(denoiser, StepAware):
            denoiser.at_step(index, calls)
        if on_step is not None:
            on_step(index)

    denoiser.eval()
    try:
        stream = noise_stream(ids, denoiser.sample_shape, seed)
        noise = stream().to(device)
        dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
        predict = guided(in_type(denoiser, dtype), denoiser.null_condition, sampler.guidance, denoiser.guide)
        return integrate(predict, process, noise, move(cond, device), sampler, enter, lambda: stream().to(device))
    finally:
        denoiser.train(was_training)


def in_type(network: Predict, dtype: torch.dtype) -> Predict:
    """A network of any precision behind images of single precision, which rounding at every step would wear out."""

    def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return network(x.to(dtype), t, cond).to(x.dtype)

    return predict
