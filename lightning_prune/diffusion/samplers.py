"""Sampling: one loop for evaluation, search and export.

Timesteps are addressed by step index; the starting noise of sample `i` is a function of its id alone and is drawn
on the CPU, so images do not depend on batch size, device count or world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import InputError
from lightning_prune.seeds import derive

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def initial_noise(ids: Tensor, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard normal noise [len(ids), *shape] on the CPU; row i depends on (seed, ids[i]) alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(derive(seed, int(i)))) for i in ids.tolist()]
    return torch.stack(rows)


def guided(predict: Predict, null_condition: Callable[[Any], Any], guidance: float) -> Predict:
    """Classifier-free guidance, uncond + w (cond - uncond) (Ho and Salimans 2022), in one doubled batch.

    A scale of 1 is the conditional prediction alone and costs one call.
    """
    if guidance == 1.0:
        return predict

    def both(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        stacked = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, null_condition(cond)]))
        conditional, unconditional = stacked.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return both


def ddim_scheduler(process: Process, steps: int) -> DDIMScheduler:
    """diffusers' deterministic DDIM on `steps` timesteps that end at the noisiest one ("trailing" spacing)."""
    if not 1 <= steps <= process.timesteps:
        raise InputError(f"steps: {steps} sampling steps, but the process has {process.timesteps}")
    scheduler = DDIMScheduler(**process.scheduler_config, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    process: Process,
    noise: Tensor,
    cond: Tensor,
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, equation 12 with eta = 0).

    Args:
        predict: network prediction for (x_t [B, ...], t [B], cond [B]).
        process: the forward process the network was trained on.
        noise: starting noise [B, C, H, W], on the device to sample on.
        cond: labels [B].
        steps: number of network evaluations.
        on_step: called with each step index before it runs.

    Returns:
        Samples of the shape of `noise`.
    """
    scheduler = ddim_scheduler(process, steps)
    x = noise
    for index, t in enumerate(scheduler.timesteps.tolist()):
        if on_step is not None:
            on_step(index)
        output = predict(x, torch.full((len(x),), t, device=x.device, dtype=torch.long), cond)
        # A clipped x_0 needs the noise that belongs to it; the two would drift apart, badly so under guidance.
        x = scheduler.step(output, t, x, eta=0.0, use_clipped_model_output=process.clip_sample).prev_sample
    return x


def sample_images(
    denoiser: Denoiser,
    process: Process,
    ids: Tensor,
    labels: Tensor,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Samples [B, C, H, W] of `denoiser` for sample `ids` [B] and `labels` [B], on the denoiser's device.

    The denoiser is left in the mode it was in.
    """
    device = next(denoiser.parameters()).device
    was_training = denoiser.training
    denoiser.eval()
    try:
        noise = initial_noise(ids, denoiser.sample_shape, seed).to(device)
        predict = guided(denoiser, denoiser.null_condition, guidance)
        return ddim_sample(predict, process, noise, labels.to(device), steps, on_step)
    finally:
        denoiser.train(was_training)
