"""A denoiser that runs a schedule of gates."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.blocks import GateSchedule, Reuse, Row
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gating import Gating, install, sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import Slot, Value, read, store
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.protocols import InputError

Path = Callable[[Tensor, Tensor, Condition, list[Slot]], tuple[Tensor, list[Slot]]]


class SkippedStep:
    """How the prediction of a wholly skipped step follows from those before.

    The last one is read as x_0 and noise: both stay, so DDIM that skips steps is DDIM on the steps that are left,
    whatever the network predicts. For plain noise prediction the prediction itself stays, which is the same, and
    exact. With linear reuse x_0 goes on along the line through the last two, and the noise is what x then holds.

    Args:
        process: how predictions are read; None lets the prediction itself stay.
        reuse: "last" or "linear".

    Raises:
        InputError: linear reuse without a process.
    """

    def __init__(self, process: Process | None, reuse: Reuse = "last") -> None:
        if process is None and reuse == "linear":
            raise InputError("gates: linear reuse needs the process, which says how predictions are read")
        constant = process is None or (process.prediction == "epsilon" and not process.clip_sample)
        self.process = None if constant and reuse == "last" else process
        self.reuse: Reuse = reuse

    def clock(self, t: Tensor) -> Tensor:
        """Where `t` [B] is on the axis of linear reuse."""
        return t.float() if self.reuse == "last" or self.process is None else self.process.clock(t)

    def remember(self, slot: Slot, prediction: Tensor, x: Tensor, t: Tensor, gate: Tensor | None = None) -> Slot:
        """What is stored once there is a prediction at `x`, `t`; with a gate [] or [B], to that degree."""
        return store(self.reuse, slot, self._read(prediction, x, t), self.clock(t), gate)

    def predict(self, slot: Slot, x: Tensor, t: Tensor) -> Tensor:
        """The prediction at a later `x`, `t`, in the type of `x`."""
        stored = read(slot, self.clock(t))
        if self.process is None:
            prediction: Tensor = stored[0]
            return prediction
        x0: Tensor = stored[0]
        if self.reuse == "last":
            return self.process.target(x0, stored[1], t).to(x.dtype)
        x0 = x0.clamp(-1, 1) if self.process.clip_sample else x0
        return self.process.target(x0, self.process.noise_in(x, x0, t), t).to(x.dtype)

    def _read(self, prediction: Tensor, x: Tensor, t: Tensor) -> Value:
        if self.process is None:
            return (prediction,)
        x0, noise = self.process.x0_and_noise(prediction, x, t)
        return (x0, noise) if self.reuse == "last" else (x0,)


class _Compiled(dict[Row, Path]):
    """Compiled paths, which belong to one network and are not copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled()


class StepGated(nn.Module):
    """The class of a gated denoiser has this in front of its family's."""

    schedule: GateSchedule
    solver: str | None  # what the schedule was found for, in the words of `Sampler.describe`
    _gating: Gating
    _skipped_step: SkippedStep
    _paths: _Compiled
    _index: int
    _turn: int
    _slots: dict[int, list[Slot]]
    _memory: dict[int, Slot]

    def at_step(self, index: int, calls: int) -> None:
        """Take the gates of step `index` for the next calls. Raises `InputError` for another number of steps."""
        if calls != self.schedule.steps:
            raise InputError(
                f"gates: the schedule is for {self.schedule.steps} network calls, this sampler makes {calls}; "
                "a schedule can be remapped when asked"
            )
        if index == 0:
            self._slots, self._memory = {}, {}
        self._index, self._turn = index, 0

    def phase(self, index: int, calls: int) -> Hashable:
        """The blocks that run."""
        return self.schedule.rows[index]

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        # Guidance that calls twice a step has values of its own for each of the two.
        turn, row = self._turn, self.schedule.rows[self._index]
        self._turn += 1
        if not any(row):
            return self._skipped_step.predict(self._memory[turn], x, t)
        slots = self._slots.get(turn, [None] * len(self.schedule.blocks))
        path = self._paths.get(row) or self.path(row)
        prediction, self._slots[turn] = path(x, t, cond, slots)
        self._memory[turn] = self._skipped_step.remember(self._memory.get(turn), prediction, x, t)
        return prediction

    def path(self, row: Row) -> Path:
        """The step in which these blocks run, as a function of the values stored: a code object of its own.

        The compiler keeps few graphs of one code object; this way each pattern of gates has its own.
        """

        def run(x: Tensor, t: Tensor, cond: Condition, slots: list[Slot]) -> tuple[Tensor, list[Slot]]:
            plain = super(StepGated, self).forward
            return self._gating.step(lambda: plain(x, t, cond), row, slots, self._skipped_step.clock(t))

        name = "step_" + "".join(str(int(runs)) for runs in row)
        return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)

    def compile_paths(self, **options: Any) -> None:
        """Compile every pattern of gates from now on, each in its first call; options are `torch.compile`'s."""
        for row in self.schedule.patterns():
            if any(row):
                self._paths[row] = torch.compile(self.path(row), **options)


def gated(
    denoiser: Denoiser, schedule: GateSchedule, process: Process | None = None, solver: str | None = None
) -> Denoiser:
    """A denoiser that runs a schedule, beside an untouched one with the same weights.

    Args:
        denoiser: the dense network, whose parameters are shared, not copied.
        schedule: which blocks run at which step.
        process: how predictions are read, for steps that are skipped as a whole; see `SkippedStep`.
        solver: the only solver it is to be sampled by, in the words of `Sampler.describe`; None leaves that open.

    Raises:
        InputError: a schedule for other blocks, or linear reuse without a process.
    """
    graph = denoiser.blocks(schedule.granularity)
    if graph.names != schedule.blocks:
        raise InputError(
            f"gates: blocks {' '.join(schedule.blocks)} of the schedule are not the network's, {' '.join(graph.names)}"
        )
    copy: Any = sharing_copy(denoiser)
    gating = install(copy.network, graph, schedule.cache_mode, schedule.reuse)
    family: Any = type(copy)
    copy.__class__ = _gated_family(family)
    copy.schedule, copy.solver, copy._gating = schedule, solver, gating
    copy._skipped_step = SkippedStep(process, schedule.reuse)
    copy._paths, copy._index, copy._turn, copy._slots, copy._memory = _Compiled(), 0, 0, {}, {}
    result: Denoiser = copy
    return result


def check_solver(denoiser: nn.Module, sampler: Sampler) -> None:
    """Raise `InputError` where a denoiser runs a schedule of gates that was found for another solver."""
    if isinstance(denoiser, StepGated) and denoiser.solver not in (None, sampler.describe()):
        raise InputError(f"gates: the schedule is for {denoiser.solver}, not {sampler.describe()}")


@cache
def _gated_family(family: type[Denoiser]) -> type[Denoiser]:
    return type(f"Gated{family.__name__}", (StepGated, family), {})
