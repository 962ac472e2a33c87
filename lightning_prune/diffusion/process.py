"""The forward process: how data become noise, what the network is asked for, and how its answer is read.

    x_t = a_t x_0 + s_t eps

Variance-preserving processes have a_t = sqrt(abar_t) and s_t = sqrt(1 - abar_t) (Ho et al. 2020, equation 4), with
coefficients from diffusers' `DDPMScheduler`, so a schedule means here what it means there. The flow process has
a_t = 1 - s_t (Lipman et al. 2023; Esser et al. 2024), and its `t` is 1000 s_t, a float, as diffusers' networks expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lightning_prune.protocols import InputError

Schedule = Literal["linear", "scaled_linear", "cosine", "flow"]
Prediction = Literal["epsilon", "v", "x0", "flow"]

_DIFFUSERS_SCHEDULE: dict[Schedule, str] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
_FAR = 10.0
_Table = Literal["grid", "coefficients", "clock"]
_DIFFUSERS_PREDICTION: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


class Process:
    """A discrete-time process.

    Args:
        schedule: noise schedule, by its usual name.
        prediction: what the network outputs: the noise, v = a eps - s x_0 (Salimans and Ho 2022), x_0, or, for the
            flow schedule and for it alone, eps - x_0.
        timesteps: number of training timesteps.
        beta_start: first beta of the linear schedules.
        beta_end: last beta of the linear schedules.
        clip_sample: whether samplers clip the predicted x_0 to [-1, 1]; true for pixels, false for latents.
        shift: of the flow schedule: noise levels s become shift s / (1 + (shift - 1) s).
    """

    def __init__(
        self,
        schedule: Schedule = "linear",
        prediction: Prediction = "epsilon",
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
        shift: float = 1.0,
    ) -> None:
        if timesteps < 2:
            raise InputError(f"process.timesteps: {timesteps} is too few, at least 2 are needed")
        if (schedule == "flow") != (prediction == "flow"):
            raise InputError(f"process.prediction: {prediction!r} does not go with the schedule {schedule!r}")
        if shift <= 0:
            raise InputError(f"process.shift: {shift} is not positive")
        self.prediction = prediction
        self.timesteps = timesteps
        self.clip_sample = clip_sample
        self.shift = shift
        self.is_flow = schedule == "flow"
        self._tables: dict[tuple[str, torch.device, torch.dtype | None], Tensor] = {}
        self.scheduler_config: dict[str, Any]
        if self.is_flow:
            self.scheduler_config = {"num_train_timesteps": timesteps, "shift": shift, "clip_sample": clip_sample}
            return
        self.scheduler_config = {
            "num_train_timesteps": timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": _DIFFUSERS_SCHEDULE[schedule],
            "prediction_type": _DIFFUSERS_PREDICTION[prediction],
            "clip_sample": clip_sample,
        }
        self._alphas_cumprod: Tensor = DDPMScheduler(**self.scheduler_config).alphas_cumprod

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], alphas_cumprod: Tensor | None = None) -> Process:
        """The process whose `scheduler_config` is `config`, as artifacts record it.

        Args:
            config: of a process, or of a scheduler of diffusers.
            alphas_cumprod: where a scheduler has others than its schedule gives, as betas rescaled to zero signal do.

        Raises:
            InputError: a schedule, a prediction or a key that is not there or that no process has.
        """
        schedules = {theirs: ours for ours, theirs in _DIFFUSERS_SCHEDULE.items()}
        predictions = {theirs: ours for ours, theirs in _DIFFUSERS_PREDICTION.items()}
        try:
            if "shift" in config:
                return cls(
                    "flow",
                    "flow",
                    config["num_train_timesteps"],
                    clip_sample=config["clip_sample"],
                    shift=config["shift"],
                )
            found = cls(
                schedules[config["beta_schedule"]],
                predictions[config["prediction_type"]],
                config["num_train_timesteps"],
                config["beta_start"],
                config["beta_end"],
                config["clip_sample"],
            )
        except KeyError as error:
            raise InputError(f"sampler: {error} is missing or describes no process known here") from error
        if alphas_cumprod is not None:
            found._alphas_cumprod = alphas_cumprod
        return found

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_t [timesteps]. Raises `InputError` for the flow process, which has none."""
        if self.is_flow:
            raise InputError("process.schedule: the flow process has no cumulative alphas")
        return self._alphas_cumprod

    def grid(self) -> Tensor:
        """Every training timestep [timesteps], from clean to noisy, as the network sees it."""
        if not self.is_flow:
            return torch.arange(self.timesteps)
        level = torch.arange(1, self.timesteps + 1, dtype=torch.float64) / self.timesteps
        shifted = self.shift * level / (1 + (self.shift - 1) * level)
        return (self.timesteps * shifted).float()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a_t, s_t) for `t` [B], shaped to broadcast against `like` [B, ...].

        They have single precision at least: in half a signal of 0.9999 is 1, and there would be no noise to divide by.
        """
        shape, dtype = (-1, *[1] * (like.ndim - 1)), torch.promote_types(like.dtype, torch.float32)
        if self.is_flow:
            level = t.to(like.device, dtype) / self.timesteps
            return (1 - level).view(shape), level.view(shape)
        signal, sigma = self._table("coefficients", like.device, dtype)[:, t.long()]
        return signal.view(shape), sigma.view(shape)

    def _table(self, name: _Table, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Values of every timestep [..., timesteps] on `device`, made and copied there once.

        Every copy makes the device wait, and a skipped step does little but look values up.
        """
        if (name, device, dtype) not in self._tables:
            with torch.inference_mode(False):  # what is made for a validation pass serves training, too
                self._tables[name, device, dtype] = self._values(name, dtype).to(device)
        return self._tables[name, device, dtype]

    def _values(self, name: _Table, dtype: torch.dtype | None) -> Tensor:
        if name == "grid":
            return self.grid()
        abar = self.alphas_cumprod if dtype is None else self.alphas_cumprod.to(dtype)
        if name == "clock":
            return ((abar / (1 - abar)).log() / 2).clamp(-_FAR, _FAR)
        return torch.stack([abar.sqrt(), (1 - abar).sqrt()])

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean `x0` [B, ...], `noise` of the same shape and `t` [B]; in the type of `x0`."""
        signal, sigma = self.coefficients(t, x0)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output at x_t."""
        return self._target(x0, noise, *self.coefficients(t, x0))

    def _target(self, x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        return noise - x0 if self.prediction == "flow" else signal * noise - sigma * x0

    def prediction_of(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The prediction at `x` = x_t that stands for `x0`, which is clipped where asked for."""
        signal, sigma = self.coefficients(t, x)
        x0 = self._clip(x0)
        return self._target(x0, (x - signal * x0) / sigma, signal, sigma)

    def clipped(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The prediction at `x` = x_t whose x_0 is that of `prediction`, clipped where asked for."""
        if not self.clip_sample:
            return prediction
        return self.prediction_of(self._x0(prediction, x, *self.coefficients(t, x)), x, t)

    def _clip(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if self.clip_sample else x0

    def x0_and_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and eps that a network's `prediction` at `x` = x_t stands for; x_0 is clipped where asked for.

        A clipped x_0 comes with the noise that belongs to it; the two would drift apart, badly so under guidance.
        """
        signal, sigma = self.coefficients(t, x)
        x0 = self._clip(self._x0(prediction, x, signal, sigma))
        return x0, (x - signal * x0) / sigma

    def clipped_x0_and_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The same as diffusers' DDIM reads it: x_0 is clipped, the noise is that of the x_0 before."""
        x0 = self._x0(prediction, x, *self.coefficients(t, x))
        noise = prediction if self.prediction == "epsilon" else self.noise_in(x, x0, t)
        return self._clip(x0), noise

    def _x0(self, prediction: Tensor, x: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / signal
        if self.prediction == "x0":
            return prediction
        if self.prediction == "flow":
            return x - sigma * prediction
        return signal * x - sigma * prediction

    def noise_in(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The noise with which `x0` makes `x` at `t` [B]."""
        signal, sigma = self.coefficients(t, x)
        return (x - signal * x0) / sigma

    def describe(self) -> str:
        """The process in a few words, for protocols."""
        clipping = "clipped with its noise" if self.clip_sample else "not clipped"
        if self.is_flow:
            return f"flow of {self.timesteps}, shift {self.shift:g}, x0 {clipping}"
        betas = f"{self.scheduler_config['beta_schedule']} schedule of {self.timesteps}"
        return f"{betas}, {self.prediction}-prediction, x0 {clipping}"

    def clock(self, t: Tensor) -> Tensor:
        """Where `t` [B] is on the axis along which predictions move most evenly: half the log signal-to-noise ratio.

        Bounded, as pure noise would be infinitely far away; minus the noise level for the flow process.
        """
        if self.is_flow:
            return -t.float() / self.timesteps
        return self._table("clock", t.device)[t.long()]

    def held_clock(self, t: Tensor, following: Tensor) -> Tensor:
        """Where on the axis an x_0 is that, held from `t` [B] to `following` [B], does what one does that moves evenly.

        In a solution x_0 counts by the growth of the ratio of signal to noise (Lu et al. 2022, DPM-Solver++, equation
        8), so that is the mean of the axis by these weights.
        """
        if self.is_flow:
            high, low = -self.clock(t).double(), -self.clock(following).double().clamp(max=0)
            ratio = (high / low.clamp(min=1e-9)).clamp(min=1 + 1e-6)
            return (-high * ratio.log() / (ratio - 1)).float()
        now = self.clock(t).double()
        gap = (self.clock(following).double() - now).clamp(min=1e-6)
        return (now + gap / -torch.expm1(-gap) - 1).float()

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Timesteps [batch], uniform over the training grid, on the generator's device."""
        index = torch.randint(0, self.timesteps, (batch,), generator=generator, device=generator.device)
        return self._table("grid", index.device)[index] if self.is_flow else index
