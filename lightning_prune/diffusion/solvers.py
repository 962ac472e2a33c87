"""Solvers behind one interface: diffusers' schedulers, DDIM over any list of timesteps, and Euler-Maruyama.

diffusers' own DDIM steps by a fixed stride whatever its timesteps are, so it cannot run the timesteps that a schedule
of gates keeps; ours goes from each timestep to the next in the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import InputError

# What starting noise alone decides, so that networks can be compared sample by sample at every step.
Deterministic = Literal["ddim", "dpm-solver++", "euler", "plms", "flow-euler"]
SamplerName = Literal[Deterministic, "euler-maruyama"]
# Standard normal noise for one more step of a trajectory, of its shape.
Draw = Callable[[], Tensor]
Spacing = Literal["trailing", "leading", "linspace"]

_WORDS: dict[SamplerName, str] = {
    "ddim": "DDIM eta=0",
    "dpm-solver++": "DPM-Solver++(2M)",
    "euler": "Euler",
    "plms": "PLMS",
    "flow-euler": "flow Euler",
    "euler-maruyama": "Euler-Maruyama of the reverse SDE",
}
_SCHEDULERS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm-solver++",
    "EulerDiscreteScheduler": "euler",
    "PNDMScheduler": "plms",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
}

# What makes another solver of a scheduler; how it spaces its timesteps is seen from these.
_USUAL = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "euler_at_final": False}

# Solvers of first order, which hold x_0 over a step.
HOLDING: tuple[SamplerName, ...] = ("ddim", "euler", "flow-euler")


@dataclass(frozen=True)
class Sampler:
    """How a trajectory is run.

    Args:
        name: the solver; "flow-euler" goes with the flow process, the others with all the rest. "euler-maruyama" draws
            noise at every step but the last, and takes some hundred of them.
        steps: sampling steps; with `timesteps` their count.
        guidance: classifier-free guidance scale; 1 is none.
        timesteps: the timesteps to visit, falling; null spaces `steps` of them. DDIM, DPM-Solver++ and Euler only.
        spacing: how `steps` timesteps are spaced, in diffusers' terms.

    Raises:
        InputError: no step, or timesteps that do not fall, are not `steps` many or that the solver cannot take.
    """

    name: SamplerName = "ddim"
    steps: int = 20
    guidance: float = 1.0
    timesteps: tuple[int, ...] | None = None
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: {self.steps} sampling steps; an image takes at least one")
        if self.timesteps is None:
            return
        if self.name not in ("ddim", "dpm-solver++", "euler"):
            raise InputError(f"timesteps: {self.name} takes no list of timesteps")
        if len(self.timesteps) != self.steps:
            raise InputError(f"timesteps: {len(self.timesteps)} are listed, but steps is {self.steps}")
        if any(later >= earlier for earlier, later in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise InputError("timesteps: they have to fall from each to the next")

    @property
    def draws_noise(self) -> bool:
        """Whether steps draw noise."""
        return self.name == "euler-maruyama"

    def calls(self, process: Process) -> int:
        """Network calls of a trajectory, a guided pair as one; PLMS makes one more than it has steps."""
        return len(self.visited(process))

    def visited(self, process: Process) -> Tensor:
        """The timestep of every network call of a trajectory, falling [K]."""
        return make_solver(self, process).timesteps

    def describe(self) -> str:
        """The solver in a few words, for protocols."""
        if self.timesteps is not None:
            return f"{_WORDS[self.name]}, timesteps {' '.join(map(str, self.timesteps))}"
        return _WORDS[self.name] if self.name == "flow-euler" else f"{_WORDS[self.name]}, {self.spacing}"


def describe_scheduler(scheduler: Any) -> str:
    """A pipeline's scheduler in the words of `Sampler.describe`; the name of its class where no sampler is like it."""
    name = type(scheduler).__name__
    if name not in _SCHEDULERS:
        return name
    for key, usual in _USUAL.items():
        if (found := scheduler.config.get(key, usual)) != usual:
            return f"{name} of {key} {found}"
    return Sampler(_SCHEDULERS[name], spacing=scheduler.config.get("timestep_spacing", "trailing")).describe()


def holds(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler is of first order, and holds x_0 over a step."""
    return _SCHEDULERS.get(type(scheduler).__name__) in HOLDING


def usual_solver(process: Process) -> SamplerName:
    """What samples a process where nothing else is said."""
    return "flow-euler" if process.is_flow else "ddim"


class Solver(Protocol):
    """What the sampling loop needs: diffusers' schedulers, narrowed."""

    timesteps: Tensor
    init_noise_sigma: float

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor: ...

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor: ...


def most_steps(sampler: Sampler, process: Process, calls: int) -> Sampler:
    """The sampler with as many evenly spaced steps as make at most `calls` network calls, at least one step."""
    for steps in range(min(calls, process.timesteps), 1, -1):
        fewer = replace(sampler, steps=steps, timesteps=None)
        if fewer.calls(process) <= calls:
            return fewer
    return replace(sampler, steps=1, timesteps=None)


def make_solver(sampler: Sampler, process: Process, draw: Draw | None = None) -> Solver:
    """A fresh solver for one trajectory; `draw` is for those that draw noise.

    Raises:
        InputError: a solver of the other kind of process, or more steps or later timesteps than the process has.
    """
    if (sampler.name == "flow-euler") != process.is_flow:
        kind = "flow" if process.is_flow else "noise-schedule"
        raise InputError(f"sampler: {sampler.name} cannot sample a {kind} process")
    last = max(sampler.timesteps or (0,))
    if sampler.steps > process.timesteps or last >= process.timesteps or min(sampler.timesteps or (0,)) < 0:
        asked = f"timestep {last}" if sampler.timesteps else f"{sampler.steps} sampling steps"
        raise InputError(f"steps: {asked}, but the process has {process.timesteps}")
    if sampler.name == "ddim":
        return DDIM(sampler, process)
    return EulerMaruyama(sampler, process, draw) if sampler.draws_noise else _Diffusers(sampler, process)


class DDIM:
    """Deterministic DDIM (Song et al. 2021, equation 12 with eta = 0) over any falling timesteps, ending at x_0."""

    init_noise_sigma = 1.0

    def __init__(self, sampler: Sampler, process: Process) -> None:
        listed = sampler.timesteps
        self.process = process
        self.timesteps = torch.tensor(listed) if listed else _spaced(sampler.steps, sampler.spacing, process.timesteps)
        self._position = {t: position for position, t in enumerate(self.timesteps.tolist())}
        self._visited = self.timesteps  # on the device of the images, once there are any

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """As it is: the process preserves variance."""
        return x

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """x at the next timestep [B, ...] from the prediction at `t` (a scalar)."""
        if self._visited.device != x.device:
            self._visited = self.timesteps.to(x.device)
        position = self._position[int(t)]
        now, following = self._visited[position : position + 1], self._visited[position + 1 : position + 2]
        x0, noise = self.process.x0_and_noise(output, x, now)
        return x0 if not len(following) else self.process.add_noise(x0, noise, following)


@lru_cache
def _spaced(steps: int, spacing: Spacing, timesteps: int) -> Tensor:
    offset = 1 if spacing == "leading" else 0
    scheduler = DDIMScheduler(num_train_timesteps=timesteps, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    result: Tensor = scheduler.timesteps
    return result.clamp(max=timesteps - 1)


class EulerMaruyama:
    """Euler-Maruyama on the reverse SDE of the process (Song et al. 2021, Score-Based Generative Modeling, equation 6).

        x' = x + beta / 2 x + beta score + sqrt(beta) z,    score = -eps / s,    beta = 1 - abar_t / abar_t'

    from each timestep t to the next one t', with no z in the last step. In as many steps as the process has timesteps,
    beta is that of training: the sampler of pixels in U-ViT and SparseDM. eps is of the clipped x_0 where the process
    clips, which theirs does not.
    """

    init_noise_sigma = 1.0

    def __init__(self, sampler: Sampler, process: Process, draw: Draw | None = None) -> None:
        self.process, self.draw = process, draw
        self.timesteps = _spaced(sampler.steps, sampler.spacing, process.timesteps)
        abar = process.alphas_cumprod.double()[self.timesteps]
        ahead = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
        self._betas = dict(zip(self.timesteps.tolist(), (1 - abar / ahead).tolist(), strict=True))

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """As it is: the process preserves variance."""
        return x

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """x at the next timestep [B, ...] from the prediction at `t` (a scalar).

        Raises:
            InputError: there is nothing to draw noise from.
        """
        if self.draw is None:
            raise InputError("sampler: euler-maruyama draws noise at every step, and here no noise is drawn")
        beta, times = self._betas[int(t)], t.to(x.device).expand(len(x))
        noise = self.process.x0_and_noise(output, x, times)[1]
        _, sigma = self.process.coefficients(times, x)
        following: Tensor = (1 + beta / 2) * x - beta / sigma * noise
        return following if t == self.timesteps[-1] else following + beta**0.5 * self.draw()


class _Diffusers:
    """A stock scheduler of diffusers; clipping is the loop's."""

    def __init__(self, sampler: Sampler, process: Process) -> None:
        config = {key: value for key, value in process.scheduler_config.items() if key != "clip_sample"}
        self.scheduler: Any = _stock(sampler, config)
        listed = {"timesteps": list(sampler.timesteps)} if sampler.timesteps else {"num_inference_steps": sampler.steps}
        self.scheduler.set_timesteps(**listed)
        self.timesteps: Tensor = self.scheduler.timesteps
        self.init_noise_sigma = float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        scaled: Tensor = self.scheduler.scale_model_input(x, t)
        return scaled

    def step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        following: Tensor = self.scheduler.step(output, t, x).prev_sample
        return following


def _stock(sampler: Sampler, config: dict[str, Any]) -> Any:
    if sampler.name == "flow-euler":
        return FlowMatchEulerDiscreteScheduler(**config)
    spaced = config | {"timestep_spacing": sampler.spacing, "steps_offset": int(sampler.spacing == "leading")}
    if sampler.name == "dpm-solver++":
        return DPMSolverMultistepScheduler(**spaced)
    if sampler.name == "euler":
        return EulerDiscreteScheduler(**spaced)
    return PNDMScheduler(**spaced, skip_prk_steps=True)
