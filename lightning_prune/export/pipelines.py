"""A schedule of gates in a stock diffusers pipeline, put in and taken out again."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_prune.diffusion.gated import GatedPaths, SkippedStep
from lightning_prune.diffusion.gating import install, remove
from lightning_prune.diffusion.models import families
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import describe_scheduler, holds
from lightning_prune.export.gates import read_gates
from lightning_prune.protocols import InputError

_COMPONENTS = ("transformer", "unet")
_ROUNDING = 0.005  # of timesteps in half precision
_OFFSET = 1.5  # timesteps: schedulers count from 0 or from 1


class GatedPipelineNetwork(GatedPaths):
    """The class of a pipeline's network has this in front of its own while it runs a schedule.

    Steps are counted, not looked up by timestep: solvers may visit one twice. A trajectory ends with its last call, or
    when the pipeline sets its scheduler's timesteps anew, so after one that was broken off the next begins afresh. What
    it is called at has to be the scheduler's timestep of that step.
    """

    _suited: Callable[[], Any]  # the pipeline's scheduler as it is now, if the schedule is for it
    _timesteps: Any
    _visited: list[float]
    _found_at: tuple[float, ...] | None
    _calls_a_step: int
    _count: int
    _last: dict[int, Any]

    # A network that is compiled as a whole would get a graph for every step; `compile_paths` makes one a pattern.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, t = _sample_and_timestep(args, kwargs)
        step, turn = self._next_call(t)
        row, skipped = self.schedule.rows[step], self._skipped_step
        if any(row):
            self._last[turn] = self.run(step, turn, skipped.clock(t), *args, **kwargs)
            # What a network says of its variance, in further channels, stays as it is.
            prediction = self._last[turn][0][:, : x.shape[1]]
            self._memory[turn] = skipped.remember(self._memory.get(turn), prediction, x, t)
        if not self.on_line(step):
            return self._last[turn]
        return _with_prediction(self._last[turn], skipped.predict(self._memory[turn], x, t, step))

    def _next_call(self, t: Tensor) -> tuple[int, int]:
        """Step and turn of this call at timesteps `t` [B]."""
        scheduler = self._suited()
        timesteps = scheduler.timesteps
        if timesteps is not self._timesteps or self._count == self._calls_a_step * self.schedule.steps:
            if len(timesteps) != self.schedule.steps:
                raise InputError(
                    f"num_inference_steps: the schedule of gates is for {self.schedule.steps} network calls, "
                    f"not {len(timesteps)}"
                )
            self._timesteps, self._visited, self._count = timesteps, timesteps.tolist(), 0
            self._check_visited()
            self._skipped_step.visits(self._visited, holds(scheduler))
            self._last.clear()
            self.forget()
        step, turn = divmod(self._count, self._calls_a_step)
        # The first calls tell a part of a trajectory and another number of calls; each look makes a device wait.
        if (
            self._count <= self._calls_a_step
            and abs(float(t[0]) - self._visited[step]) > _ROUNDING * self._visited[step]
        ):
            self._timesteps = None  # the next call begins a trajectory
            raise InputError(
                f"timestep: {float(t[0]):g} in call {turn + 1} of step {step}, which is at {self._visited[step]:g}: "
                "the schedule of gates is for whole trajectories, and calls_a_step says how often a step calls the "
                "network"
            )
        self._count += 1
        return step, turn

    def _check_visited(self) -> None:
        """Refuse other timesteps than those of the search, by more than an offset of the scheduler makes."""
        for step, (ours, theirs) in enumerate(zip(self._found_at or (), self._visited, strict=bool(self._found_at))):
            if abs(ours - theirs) > _OFFSET + _ROUNDING * ours:
                self._timesteps = None
                raise InputError(
                    f"timesteps: step {step} is at {theirs:g}, but the schedule of gates was found with it at "
                    f"{ours:g}; remap_to runs it anyway"
                )


def enable_gates(pipeline: Any, file: str | Path, calls_a_step: int = 1, remap_to: int | None = None) -> None:
    """Run a pipeline's network under the schedule of a `gates.json` until `disable_gates`.

    A step skipped as a whole goes on with the last x_0 and noise, or along a line, as the schedule says. The network's
    `compile_paths` then compiles every pattern of gates, one graph each: `pipe.transformer.compile_paths()`. As
    long as it has gates, a network that was compiled as a whole runs uncompiled.

    Args:
        pipeline: a diffusers pipeline with a `transformer` or `unet` of a family known here.
        file: the schedule.
        calls_a_step: network calls a step: 1, or 2 where guidance calls twice instead of doubling the batch.
        remap_to: stretch the schedule to this number of network calls, of whatever solver the pipeline has, at no
            greater share of its MACs; of gates, where the file is of a version that did not say what blocks cost.

    Raises:
        InputError: no such network or one that hooks have changed, a schedule for another architecture, another noise
            schedule or another solver, also one that the pipeline is given later; when run, another number of steps or
            a part of a trajectory. Weights are not compared, as a pipeline may hold them in another precision, nor is
            the guidance scale or the noise that DDIM may draw (`eta`), which pipelines are told when they are called.
    """
    found, network = read_gates(Path(file)), _network(pipeline)
    if calls_a_step < 1:
        raise InputError(f"calls_a_step: {calls_a_step} is not positive")
    held = ref(pipeline)  # which holds the network

    def suited() -> Any:
        scheduler: Any = getattr(held(), "scheduler", None)
        _check_scheduler(Path(file), found.scheduler, scheduler, any_solver=remap_to is not None)
        return scheduler

    suited()
    if remap_to is not None and found.costs is None:
        warnings.warn(f"{file}: does not say what blocks cost, so remapping counts them alike", stacklevel=2)
    schedule = found.schedule if remap_to is None else found.schedule.remapped(remap_to, found.costs)
    graph = _family(network).blocks(_Seen(network), schedule.granularity)
    found.check_blocks(Path(file), graph)
    found.check_network(Path(file), type(network).__name__, network.config)
    disable_gates(pipeline)
    for name in ["", *(name for block in graph.blocks for name in block.modules)]:
        if "forward" in vars(network.get_submodule(name)):
            where = f"{type(network).__name__} {name}".strip()
            raise InputError(f"{where}: something has hooked its forward, as offloading does; enable gates before that")
    gating = install(network, graph, schedule.cache_mode, schedule.reuse)
    # Under its own name, which diffusers writes where it is saved.
    network.__class__ = type(type(network).__name__, (GatedPipelineNetwork, type(network)), {})
    network.take(schedule, gating, SkippedStep(_process(pipeline.scheduler), schedule.reuse, keeps_noise=True))
    network._suited, network._timesteps, network._calls_a_step = suited, None, calls_a_step
    network._visited, network._count, network._last = [], 0, {}
    network._found_at = None if remap_to is not None else found.timesteps


def _check_scheduler(file: Path, found_for: Mapping[str, Any], scheduler: Any, any_solver: bool) -> None:
    if scheduler is None:
        raise InputError(f"{file}: the pipeline that the gates were put in is gone, and its scheduler with it")
    ours, theirs = str(found_for.get("solver", "")), describe_scheduler(scheduler)
    if ", timesteps " in ours:  # a pipeline is told them when it is called
        ours, theirs = (words.split(", ")[0] for words in (ours, theirs))
    if ours and ours != theirs and not any_solver:
        raise InputError(f"{file}: found for {ours}, the pipeline's scheduler is {theirs}; remap_to runs it anyway")
    compared = {key: value for key, value in found_for.items() if key != "solver"}
    if compared.get("beta_schedule") == "squaredcos_cap_v2":
        compared = {key: value for key, value in compared.items() if key not in ("beta_start", "beta_end")}
    for key, value in compared.items():
        theirs = scheduler.config.get(key, value)
        if theirs != value and not (isinstance(theirs, float) and math.isclose(theirs, value, rel_tol=1e-6)):
            raise InputError(f"{file}: found for {key} {value}, the pipeline's scheduler has {theirs}")


def disable_gates(pipeline: Any) -> None:
    """Take the gates out; the pipeline gives what it gave before, bit for bit.

    Raises:
        InputError: something has hooked the network since, and holds on to its gated forward.
    """
    network = _network(pipeline)
    if isinstance(network, GatedPipelineNetwork) and "forward" in vars(network):
        name = type(network).__name__
        raise InputError(f"{name}: something has hooked its forward since gates were enabled; remove those hooks first")
    remove(network)
    if isinstance(network, GatedPipelineNetwork):
        network.__class__ = type(network).__bases__[1]
        for owner in (GatedPipelineNetwork, GatedPaths):
            for name in inspect.get_annotations(owner):
                delattr(network, name)


def _process(scheduler: Any) -> Process | None:
    """How the pipeline's predictions are read; None where its scheduler describes no process known here."""
    config = {"clip_sample": False, **scheduler.config}
    try:
        return Process.from_scheduler(config, getattr(scheduler, "alphas_cumprod", None))
    except InputError:
        return None


def _sample_and_timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The noisy sample [B, ...] and the timestep [B] of a call."""
    named = kwargs["sample"] if "sample" in kwargs else kwargs.get("hidden_states")
    x: Tensor = args[0] if args else named  # type: ignore[assignment]
    t = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=x.device)
    return x, t.expand(len(x))


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """A network's `output` with another prediction in it."""
    rest = output[0][:, prediction.shape[1] :]
    whole = torch.cat([prediction, rest], dim=1) if rest.shape[1] else prediction
    return (whole,) if isinstance(output, tuple) else type(output)(sample=whole)


class _Seen:
    """As much of a denoiser as describing its blocks takes: a network that is there already."""

    def __init__(self, network: Any) -> None:
        self.network, self.stored = network, network.config


def _network(pipeline: Any) -> Any:
    """The pipeline's network; of a compiled one that which was compiled."""
    for name in _COMPONENTS:
        if (found := getattr(pipeline, name, None)) is not None:
            return getattr(found, "_orig_mod", found)
    raise InputError(f"{type(pipeline).__name__}: has neither of {', '.join(_COMPONENTS)}")


def _family(network: Any) -> Any:
    known = {cls.__name__ for cls in type(network).__mro__} & families().keys()
    if not known:
        raise InputError(f"{type(network).__name__}: no backbone is known for it")
    return families()[known.pop()]
