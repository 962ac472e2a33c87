"""A denoiser that runs a schedule of gates."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.blocks import GateSchedule, Row
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gating import Gating, Value, install, sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import InputError

Path = Callable[[Tensor, Tensor, Condition, list[Value]], tuple[Tensor, list[Value]]]


class Reuse:
    """How the prediction of a wholly skipped step follows from the last one.

    With a process that is read as x_0 and noise: both stay, so DDIM that skips steps is DDIM on the steps that are
    left, whatever the network predicts. Without one the prediction itself stays; for plain noise prediction the two
    are the same, and the latter is exact.
    """

    def __init__(self, process: Process | None) -> None:
        constant = process is None or (process.prediction == "epsilon" and not process.clip_sample)
        self.process = None if constant else process

    def remember(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """What has to be kept of a prediction at `x`, `t`."""
        return (prediction,) if self.process is None else self.process.x0_and_noise(prediction, x, t)

    def predict(self, memory: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """The prediction at a later `t`."""
        return memory[0] if self.process is None else self.process.target(memory[0], memory[1], t)


class _Compiled(dict[Row, Path]):
    """Compiled paths, which belong to one network and are not copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled()


class StepGated(nn.Module):
    """The class of a gated denoiser has this in front of its family's."""

    schedule: GateSchedule
    _gating: Gating
    _reuse: Reuse
    _paths: _Compiled
    _index: int
    _turn: int
    _slots: dict[int, list[Value]]
    _memory: dict[int, tuple[Tensor, ...]]

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
            return self._reuse.predict(self._memory[turn], t)
        slots = self._slots.get(turn, [None] * len(self.schedule.blocks))
        path = self._paths.get(row) or self.path(row)
        prediction, self._slots[turn] = path(x, t, cond, slots)
        self._memory[turn] = self._reuse.remember(prediction, x, t)
        return prediction

    def path(self, row: Row) -> Path:
        """The step in which these blocks run, as a function of the values stored: a code object of its own.

        The compiler keeps few graphs of one code object; this way each pattern of gates has its own.
        """

        def run(x: Tensor, t: Tensor, cond: Condition, slots: list[Value]) -> tuple[Tensor, list[Value]]:
            plain = super(StepGated, self).forward
            return self._gating.step(lambda: plain(x, t, cond), row, slots)

        name = "step_" + "".join(str(int(runs)) for runs in row)
        return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)

    def compile_paths(self, **options: Any) -> None:
        """Compile every pattern of gates from now on, each in its first call; options are `torch.compile`'s."""
        for row in self.schedule.patterns():
            if any(row):
                self._paths[row] = torch.compile(self.path(row), **options)


def gated(denoiser: Denoiser, schedule: GateSchedule, process: Process | None = None) -> Denoiser:
    """A denoiser that runs a schedule, beside an untouched one with the same weights.

    Args:
        denoiser: the dense network, whose parameters are shared, not copied.
        schedule: which blocks run at which step.
        process: how predictions are read, for steps that are skipped as a whole; see `Reuse`.

    Raises:
        InputError: a schedule for other blocks.
    """
    graph = denoiser.blocks(schedule.granularity)
    if graph.names != schedule.blocks:
        raise InputError(
            f"gates: blocks {' '.join(schedule.blocks)} of the schedule are not the network's, {' '.join(graph.names)}"
        )
    copy: Any = sharing_copy(denoiser)
    gating = install(copy.network, graph, schedule.cache_mode)
    family: Any = type(copy)
    copy.__class__ = _gated_family(family)
    copy.schedule, copy._gating, copy._reuse = schedule, gating, Reuse(process)
    copy._paths, copy._index, copy._turn, copy._slots, copy._memory = _Compiled(), 0, 0, {}, {}
    result: Denoiser = copy
    return result


@cache
def _gated_family(family: type[Denoiser]) -> type[Denoiser]:
    return type(f"Gated{family.__name__}", (StepGated, family), {})
