"""A denoiser that runs a schedule of gates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
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
from lightning_prune.diffusion.solvers import HOLDING, Sampler
from lightning_prune.protocols import InputError

Path = Callable[..., tuple[Any, list[Slot]]]  # of stored values, the clock, and what the network is called with


class SkippedStep:
    """How the prediction of a wholly skipped step follows from those before.

    The last one is read as x_0 and noise: both stay, so DDIM that skips steps is DDIM on the steps that are left,
    whatever the network predicts (but for clipping under guidance, which is of each half of a pair). For plain noise
    prediction the prediction itself stays, which is the same, and exact. With linear reuse x_0 goes on along the line
    through the last two; the noise is what x then holds. Solvers of first order hold x_0 over a step: they are given
    the one that, held, does what the line does, and the step before one that is skipped is theirs to begin with.
    Solvers of higher order draw lines of their own.

    Args:
        process: how predictions are read; None lets the prediction itself stay.
        reuse: "last" or "linear".
        keeps_noise: whether steps go on with the noise from before x_0 was clipped, as those of diffusers' DDIM do.

    Raises:
        InputError: linear reuse without a process.
    """

    def __init__(self, process: Process | None, reuse: Reuse = "last", keeps_noise: bool = False) -> None:
        if process is None and reuse == "linear":
            raise InputError("gates: linear reuse needs the process, which says how predictions are read")
        constant = process is None or (process.prediction == "epsilon" and not process.clip_sample)
        self.process = None if constant and reuse == "last" else process
        self.reuse: Reuse = reuse
        self.keeps_noise = keeps_noise
        self._held_clocks: Tensor | None = None

    def visits(self, timesteps: Sequence[float], holds: bool) -> None:
        """Be told of a trajectory's timesteps, and whether its solver holds x_0 over a step."""
        self._held_clocks = None
        if holds and self.reuse == "linear" and self.process is not None:
            visited = torch.tensor(timesteps)
            with torch.inference_mode(False):
                self._held_clocks = self.process.held_clock(visited[:-1], visited[1:])

    @property
    def holds(self) -> bool:
        """Whether x_0 of a line is held over steps."""
        return self._held_clocks is not None

    def clock(self, t: Tensor) -> Tensor:
        """Where `t` [B] is on the axis of linear reuse."""
        return t.float() if self.reuse == "last" or self.process is None else self.process.clock(t)

    def remember(self, slot: Slot, prediction: Tensor, x: Tensor, t: Tensor, gate: Tensor | None = None) -> Slot:
        """What is stored once there is a prediction at `x`, `t`; with a gate [] or [B], to that degree."""
        return store(self.reuse, slot, self._read(prediction, x, t), self.clock(t), gate)

    def predict(self, slot: Slot, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The prediction at a later `x`, `t` of step `step`, in the type of `x`."""
        stored = read(slot, self._line_clock(t, step))
        if self.process is None:
            prediction: Tensor = stored[0]
            return prediction
        x0: Tensor = stored[0]
        if self.reuse == "last":
            return self.process.target(x0, stored[1], t).to(x.dtype)
        return self.process.prediction_of(x0, x, t).to(x.dtype)

    def _line_clock(self, t: Tensor, step: int) -> Tensor:
        """Where the line is read at step `step`, for `t` [B]; x_0 of the last step is the sample and is not held."""
        if self._held_clocks is None or step == len(self._held_clocks):
            return self.clock(t)
        if self._held_clocks.device != t.device:
            with torch.inference_mode(False):
                self._held_clocks = self._held_clocks.to(t.device)
        return self._held_clocks[step].expand(len(t))

    def _read(self, prediction: Tensor, x: Tensor, t: Tensor) -> Value:
        if self.process is None:
            return (prediction,)
        read_as = self.process.clipped_x0_and_noise if self.keeps_noise else self.process.x0_and_noise
        x0, noise = read_as(prediction, x, t)
        return (x0, noise) if self.reuse == "last" else (x0,)


class _Compiled(dict[Row, Path]):
    """Compiled paths, which belong to one network and are not copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled()


class GatedPaths(nn.Module):
    """A network that runs a schedule has this in front of its own class: a static path for every pattern of gates.

    Calls of one step, of which sequential guidance makes two, have stored values of their own, by their `turn`.
    """

    schedule: GateSchedule
    _gating: Gating
    _skipped_step: SkippedStep
    _stored: tuple[Row, ...]  # by step
    _paths: _Compiled
    _slots: dict[int, list[Slot]]
    _memory: dict[int, Slot]

    def take(self, schedule: GateSchedule, gating: Gating, skipped_step: SkippedStep) -> None:
        """Run `schedule` from now on."""
        self.schedule, self._gating, self._skipped_step = schedule, gating, skipped_step
        self._stored, self._paths = schedule.stored_blocks(), _Compiled()
        self.forget()

    def forget(self) -> None:
        """Begin a trajectory: nothing is stored."""
        self._slots, self._memory = {}, {}

    def on_line(self, step: int) -> bool:
        """Whether what a step gives is read from the line: it, or where x_0 is held the one after it, is skipped."""
        skipped = [not any(row) for row in self.schedule.rows[step : step + 2]]
        return skipped[0] or (self._skipped_step.holds and step > 0 and any(skipped))

    def run(self, step: int, turn: int, clock: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the network gives with the blocks of a step, whose values are stored for the turn."""
        row = self.schedule.rows[step]
        path = self._paths.get(row) or self.path(row, self._stored[step])
        output, self._slots[turn] = path(self._slots.get(turn, [None] * len(row)), clock, *args, **kwargs)
        return output

    def path(self, row: Row, stores: Row) -> Path:
        """The step in which these blocks run, and these store, as a function of the values stored: code of its own.

        The compiler keeps few graphs of one code object; this way each pattern of gates has its own.
        """

        def run(slots: list[Slot], clock: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, list[Slot]]:
            plain = super(GatedPaths, self).forward
            return self._gating.step(lambda: plain(*args, **kwargs), row, slots, clock, stores=stores)

        name = "step_" + "".join(str(int(runs)) for runs in row)
        return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)

    def compile_paths(self, **options: Any) -> None:
        """Compile every pattern of gates from now on, each in its first call; options are `torch.compile`'s.

        Each stores what its first step does, lest it take two graphs.
        """
        for row in self.schedule.patterns():
            if any(row):
                self._paths[row] = torch.compile(self.path(row, self._stored[self.schedule.rows.index(row)]), **options)


@dataclass(frozen=True)
class MadeFor:
    """How a schedule's network is to be sampled.

    Attributes:
        solver: in the words of `Sampler.describe`.
        guided: whether the guidance scale is other than 1.
        process: its `scheduler_config`.
    """

    solver: str
    guided: bool
    process: Mapping[str, Any]

    @classmethod
    def of(cls, sampler: Sampler, process: Process) -> MadeFor:
        return cls(sampler.describe(), sampler.guidance != 1.0, process.scheduler_config)


class StepGated(GatedPaths):
    """The class of a gated denoiser has this in front of its family's."""

    made_for: MadeFor | None  # None where a search or a comparison draws
    _index: int
    _turn: int

    def at_step(self, index: int, calls: int) -> None:
        """Take the gates of step `index` for the next calls. Raises `InputError` for another number of steps."""
        if calls != self.schedule.steps:
            raise InputError(
                f"gates: the schedule is for {self.schedule.steps} network calls, this sampler makes {calls}; "
                "a schedule can be remapped when asked"
            )
        if index == 0:
            self.forget()
        self._index, self._turn = index, 0

    def phase(self, index: int, calls: int) -> Hashable:
        """The blocks that run."""
        return self.schedule.rows[index]

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        # Guidance that calls twice a step has values of its own for each of the two.
        turn, row = self._turn, self.schedule.rows[self._index]
        if turn > 1:
            raise InputError("gates: a third call of one step; `at_step` has to be told of every step")
        if turn not in self._memory and self._index:
            raise InputError(f"gates: call {turn + 1} of step {self._index} reads what no step before it has stored")
        self._turn += 1
        prediction: Tensor | None = None
        if any(row):
            prediction = self.run(self._index, turn, self._skipped_step.clock(t), x, t, cond)
            self._memory[turn] = self._skipped_step.remember(self._memory.get(turn), prediction, x, t)
        if prediction is None or self.on_line(self._index):
            return self._skipped_step.predict(self._memory[turn], x, t, self._index)
        return prediction


def gated(
    denoiser: Denoiser, schedule: GateSchedule, process: Process | None = None, made_for: MadeFor | None = None
) -> Denoiser:
    """A denoiser that runs a schedule, beside an untouched one with the same weights.

    Args:
        denoiser: the dense network, whose parameters are shared, not copied.
        schedule: which blocks run at which step.
        process: how predictions are read, for steps that are skipped as a whole; see `SkippedStep`.
        made_for: the only way in which it is to be sampled; None leaves that open.

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
    copy.take(schedule, gating, SkippedStep(process, schedule.reuse))
    copy.made_for, copy._index, copy._turn = made_for, 0, 0
    result: Denoiser = copy
    return result


def begin(denoiser: nn.Module, sampler: Sampler, process: Process) -> None:
    """Tell a denoiser that runs gates what it is to be sampled by. Raises what `check_solver` does."""
    check_solver(denoiser, sampler, process)
    if isinstance(denoiser, StepGated):
        tell(denoiser._skipped_step, sampler, process)


def tell(skipped_step: SkippedStep, sampler: Sampler, process: Process) -> None:
    """Tell skipped steps of a sampler's trajectory."""
    skipped_step.visits(sampler.visited(process).tolist(), sampler.name in HOLDING)


def check_solver(denoiser: nn.Module, sampler: Sampler, process: Process) -> None:
    """Raise `InputError` where a denoiser runs a schedule found for another solver, process or kind of guidance."""
    wanted = denoiser.made_for if isinstance(denoiser, StepGated) else None
    if wanted is None:
        return
    given = MadeFor.of(sampler, process)
    if wanted.solver != given.solver:
        raise InputError(f"gates: the schedule is for {wanted.solver}, not {given.solver}")
    if wanted.guided != given.guided:
        kinds = {True: "guidance", False: "no guidance (scale 1)"}
        raise InputError(f"gates: the schedule is for {kinds[wanted.guided]}, not {kinds[given.guided]}")
    if wanted.process != given.process:
        keys = wanted.process.keys() | given.process.keys()
        other = min(key for key in keys if wanted.process.get(key) != given.process.get(key))
        ours, theirs = wanted.process.get(other), given.process.get(other)
        raise InputError(f"gates: the schedule is for {other} {ours}, the process has {theirs}")


@cache
def _gated_family(family: type[Denoiser]) -> type[Denoiser]:
    return type(f"Gated{family.__name__}", (StepGated, family), {})
