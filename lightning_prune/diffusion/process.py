"""The forward process: noise schedule, training target, and how a prediction is read.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        (Ho et al. 2020, equation 4)

The coefficients come from diffusers' `DDPMScheduler`, so a schedule means here what it means there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lightning_prune.protocols import InputError

Schedule = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["epsilon", "v", "x0"]

_DIFFUSERS_SCHEDULE: dict[Schedule, str] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
_DIFFUSERS_PREDICTION: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


class Process:
    """A discrete-time variance-preserving process.

    Args:
        schedule: noise schedule, by its usual name.
        prediction: what the network outputs: the noise, v = sqrt(abar) eps - sqrt(1 - abar) x_0
            (Salimans and Ho 2022), or x_0.
        timesteps: number of training timesteps.
        beta_start: first beta of the linear schedules.
        beta_end: last beta of the linear schedules.
        clip_sample: whether samplers clip the predicted x_0 to [-1, 1]; true for pixels, false for latents.
    """

    def __init__(
        self,
        schedule: Schedule = "linear",
        prediction: Prediction = "epsilon",
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
    ) -> None:
        if timesteps < 2:
            raise InputError(f"process.timesteps: {timesteps} is too few, at least 2 are needed")
        self.prediction = prediction
        self.timesteps = timesteps
        self.clip_sample = clip_sample
        self.scheduler_config: dict[str, Any] = {
            "num_train_timesteps": timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": _DIFFUSERS_SCHEDULE[schedule],
            "prediction_type": _DIFFUSERS_PREDICTION[prediction],
            "clip_sample": clip_sample,
        }
        self.alphas_cumprod: Tensor = DDPMScheduler(**self.scheduler_config).alphas_cumprod

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> Process:
        """The process whose `scheduler_config` is `config`, as artefacts record it.

        Raises:
            InputError: a schedule, a prediction or a key that is not there or that no process has.
        """
        schedules = {theirs: ours for ours, theirs in _DIFFUSERS_SCHEDULE.items()}
        predictions = {theirs: ours for ours, theirs in _DIFFUSERS_PREDICTION.items()}
        try:
            return cls(
                schedules[config["beta_schedule"]],
                predictions[config["prediction_type"]],
                config["num_train_timesteps"],
                config["beta_start"],
                config["beta_end"],
                config["clip_sample"],
            )
        except KeyError as error:
            raise InputError(f"sampler: {error} is missing or describes no process known here") from error

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(abar_t), sqrt(1 - abar_t)) for `t` [B], shaped to broadcast against `like` [B, ...]."""
        abar = self.alphas_cumprod.to(like.device)[t].to(like.dtype)
        shape = (-1, *[1] * (like.ndim - 1))
        return abar.sqrt().view(shape), (1 - abar).sqrt().view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean `x0` [B, ...], `noise` of the same shape and integer `t` [B]."""
        signal, sigma = self.coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output at x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma = self.coefficients(t, x0)
        return signal * noise - sigma * x0

    def describe(self) -> str:
        """The process in a few words, for protocols."""
        betas = f"{self.scheduler_config['beta_schedule']} schedule of {self.timesteps}"
        clipping = "clipped with its noise" if self.clip_sample else "not clipped"
        return f"{betas}, {self.prediction}-prediction, x0 {clipping}"

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform integer timesteps [batch] on the generator's device."""
        return torch.randint(0, self.timesteps, (batch,), generator=generator, device=generator.device)
