"""A schedule of gates in a stock diffusers pipeline, put in and taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import SkippedStep
from lightning_prune.diffusion.gating import Gating, install, remove
from lightning_prune.diffusion.models import families
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import Slot
from lightning_prune.diffusion.solvers import describe_scheduler
from lightning_prune.export.gates import read_gates
from lightning_prune.protocols import InputError

_COMPONENTS = ("transformer", "unet")


class GatedPipelineNetwork(nn.Module):
    """The class of a pipeline's network has this in front of its own while it runs a schedule.

    Steps are counted, not looked up by timestep: solvers may visit one twice. A trajectory ends with its last call,
    so one that is broken off needs `enable_gates` again.
    """

    _schedule: GateSchedule
    _gating: Gating
    _scheduler: Any
    _calls_a_step: int
    _count: int
    _slots: dict[int, list[Slot]]
    _skipped_step: SkippedStep
    _memory: dict[int, Slot]
    _last: dict[int, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step, turn = divmod(self._count, self._calls_a_step)
        if self._count == 0:
            self._check_steps()
            self._slots, self._memory, self._last = {}, {}, {}
        self._count = (self._count + 1) % (self._calls_a_step * self._schedule.steps)
        row = self._schedule.rows[step]
        x, t = _sample_and_timestep(args, kwargs)
        if not any(row):
            prediction = self._skipped_step.predict(self._memory[turn], x, t)
            return _with_prediction(self._last[turn], prediction)
        slots, clock = self._slots.get(turn, [None] * len(row)), self._skipped_step.clock(t)
        plain = super().forward
        output, self._slots[turn] = self._gating.step(lambda: plain(*args, **kwargs), row, slots, clock)
        # What a network says of its variance, in further channels, stays as it is.
        prediction = output[0][:, : x.shape[1]]
        self._memory[turn] = self._skipped_step.remember(self._memory.get(turn), prediction, x, t)
        self._last[turn] = output
        return output

    def _check_steps(self) -> None:
        calls = len(self._scheduler.timesteps)
        if calls != self._schedule.steps:
            raise InputError(
                f"num_inference_steps: the schedule of gates is for {self._schedule.steps} network calls, not {calls}"
            )


def enable_gates(pipeline: Any, file: str | Path, calls_a_step: int = 1, remap_to: int | None = None) -> None:
    """Run a pipeline's network under the schedule of a `gates.json` until `disable_gates`.

    A step skipped as a whole goes on with the last x_0 and noise, or along a line, as the schedule says.

    Args:
        pipeline: a diffusers pipeline with a `transformer` or `unet` of a family known here.
        file: the schedule.
        calls_a_step: network calls a step: 1, or 2 where guidance calls twice instead of doubling the batch.
        remap_to: stretch the schedule to this number of network calls, of whatever solver the pipeline has, at no
            greater share of gates, for what blocks cost is not counted here.

    Raises:
        InputError: no such network, a schedule for other blocks, another noise schedule or another solver; when run,
            another number of steps. Weights are not compared: a pipeline may hold them in another precision.
    """
    found, network = read_gates(Path(file)), _network(pipeline)
    _check_scheduler(Path(file), found.scheduler, pipeline.scheduler, any_solver=remap_to is not None)
    schedule = found.schedule if remap_to is None else found.schedule.remapped(remap_to)
    graph = _family(network).blocks(_Seen(network), schedule.granularity)
    if graph.names != schedule.blocks:
        raise InputError(f"{file}: its blocks {' '.join(schedule.blocks)} are not the network's")
    disable_gates(pipeline)
    network._skipped_step = SkippedStep(_process(pipeline.scheduler), schedule.reuse)
    network._gating = install(network, graph, schedule.cache_mode, schedule.reuse)
    network._schedule, network._scheduler, network._calls_a_step = schedule, pipeline.scheduler, calls_a_step
    network._count, network._slots, network._memory, network._last = 0, {}, {}, {}
    network.__class__ = type(f"Gated{type(network).__name__}", (GatedPipelineNetwork, type(network)), {})


def _check_scheduler(file: Path, found_for: Mapping[str, Any], scheduler: Any, any_solver: bool) -> None:
    for key in ("prediction_type", "beta_schedule"):
        theirs = scheduler.config.get(key)
        if key in found_for and theirs != found_for[key]:
            raise InputError(f"{file}: found for {key} {found_for[key]}, the pipeline's scheduler has {theirs}")
    ours, theirs = str(found_for.get("solver", "")), describe_scheduler(scheduler)
    if ", timesteps " in ours:  # a pipeline is told them when it is called
        ours, theirs = (words.split(", ")[0] for words in (ours, theirs))
    if ours and ours != theirs and not any_solver:
        raise InputError(f"{file}: found for {ours}, the pipeline's scheduler is {theirs}; remap_to runs it anyway")


def disable_gates(pipeline: Any) -> None:
    """Take the gates out; the pipeline gives what it gave before, bit for bit."""
    network = _network(pipeline)
    remove(network)
    if isinstance(network, GatedPipelineNetwork):
        network.__class__ = type(network).__bases__[1]
        for name in inspect.get_annotations(GatedPipelineNetwork):
            delattr(network, name)


def _process(scheduler: Any) -> Process | None:
    """How the pipeline's predictions are read; None where its scheduler describes no process known here."""
    config = {"clip_sample": False, **scheduler.config}
    try:
        return Process.from_scheduler(config)
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
    for name in _COMPONENTS:
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    raise InputError(f"{type(pipeline).__name__}: has neither of {', '.join(_COMPONENTS)}")


def _family(network: Any) -> Any:
    known = {cls.__name__ for cls in type(network).__mro__} & families().keys()
    if not known:
        raise InputError(f"{type(network).__name__}: no backbone is known for it")
    return families()[known.pop()]
