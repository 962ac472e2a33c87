"""Blocks of a network, what they depend on, and what runs and costs when some of them are skipped.

A *gate* says whether a block computes at a sampling step (1) or gives what it gave last (0). Whether an open gate
computes also depends on the network: nothing runs whose result nobody reads. Rows of gates that already say so are
called *running*.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from typing import Literal, get_args

from lightning_prune.protocols import InputError

CacheMode = Literal["output", "residual"]
Reuse = Literal["last", "linear"]
Row = tuple[bool, ...]


class State(Enum):
    """What becomes of a block at a step."""

    RUN = "run"
    REUSED = "reused"  # its last output is read
    REMOVED = "removed"  # nobody reads it


@dataclass(frozen=True)
class Block:
    """A part of a network that a gate may skip.

    Attributes:
        name: short name, unique in its graph.
        modules: qualified names of the modules it is made of, in the order in which they run. The last one's
            output is the block's; those before it hand a hidden state on.
        producers: names of the blocks whose output it reads, skip connections included.
        increment: whether the network itself adds the block's output to what the block read.
    """

    name: str
    modules: tuple[str, ...]
    producers: tuple[str, ...] = ()
    increment: bool = False


@dataclass(frozen=True)
class BlockGraph:
    """The blocks of a network in the order in which they run.

    Attributes:
        granularity: what a block is: "coarse" or "fine" of a U-Net, "block" or "half" of a transformer.
        blocks: the blocks; a block's producers come before it.
        outputs: names of the blocks that the layers behind all blocks read.
        cache_modes: what may be kept of a skipped block: its "output", or the "residual" it adds to its input.
        independent: whether every block is read whatever its neighbours do, as in the residual mode.
    """

    granularity: str
    blocks: tuple[Block, ...]
    outputs: tuple[str, ...]
    cache_modes: tuple[CacheMode, ...] = ("output",)
    independent: bool = False

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def in_mode(self, mode: CacheMode) -> BlockGraph:
        """The graph under a cache mode. A residual flows past its block, so none depends on another then.

        Raises:
            InputError: a mode these blocks do not have.
        """
        if mode not in self.cache_modes:
            raise InputError(f"cache_mode: {mode}: granularity {self.granularity} has {', '.join(self.cache_modes)}")
        return replace(self, independent=mode == "residual")

    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each block the positions of those that read it; -1 stands for the network's output."""
        readers: list[list[int]] = [[-1] if self.independent or n in self.outputs else [] for n in self.names]
        if not self.independent:
            for position, block in enumerate(self.blocks):
                for producer in block.producers:
                    readers[self.names.index(producer)].append(position)
        return tuple(tuple(found) for found in readers)

    def running(self, gates: Sequence[bool | int]) -> Row:
        """Which blocks compute under a row of gates: those with an open gate that something running reads."""
        consumers, runs = self.consumers(), [False] * len(self)
        for position in reversed(range(len(self))):
            runs[position] = bool(gates[position]) and any(c < 0 or runs[c] for c in consumers[position])
        return tuple(runs)

    def states(self, gates: Sequence[bool | int]) -> tuple[State, ...]:
        """What becomes of every block under a row of gates."""
        consumers, runs = self.consumers(), self.running(gates)
        read = [any(c < 0 or runs[c] for c in readers) for readers in consumers]
        return tuple(
            State.RUN if run else State.REUSED if needed else State.REMOVED
            for run, needed in zip(runs, read, strict=True)
        )

    def full(self) -> Row:
        """The row in which everything runs."""
        return (True,) * len(self)


@dataclass(frozen=True)
class BlockCosts:
    """MACs of one network call by block.

    Attributes:
        blocks: of each block alone.
        shell: of everything outside the blocks, which runs at a step if any block does.
    """

    blocks: tuple[int, ...]
    shell: int

    @property
    def dense(self) -> int:
        return sum(self.blocks) + self.shell

    def step(self, running: Sequence[bool]) -> int:
        """MACs of a step in which these blocks run."""
        found = sum(cost for cost, runs in zip(self.blocks, running, strict=True) if runs)
        return found + self.shell if any(running) else 0

    def kept(self, rows: Sequence[Sequence[bool]]) -> float:
        """MACs of a trajectory over those of the dense one."""
        return sum(self.step(row) for row in rows) / (self.dense * len(rows))

    def cascade_shares(self, graph: BlockGraph) -> tuple[float, ...]:
        """gamma: for each block the share of a call's MACs in blocks that closing its gate alone saves."""
        shares = []
        for position in range(len(graph)):
            gates = [i != position for i in range(len(graph))]
            saved = [c for c, runs in zip(self.blocks, graph.running(gates), strict=True) if not runs]
            shares.append(sum(saved) / self.dense)
        return tuple(shares)


@dataclass(frozen=True)
class GateSchedule:
    """Which blocks run at which step of a sampler: the result of a search, or a rule's.

    Attributes:
        granularity: of the blocks.
        cache_mode: what skipped blocks reuse.
        blocks: names of the blocks.
        rows: running rows by step [T][N], the noisiest step first; that one runs in full.
        reuse: what skipped blocks and steps give: what they gave "last", or the line through the last two ("linear").

    Raises:
        InputError: no steps, a first step with skipped blocks, or rows of another length.
    """

    granularity: str
    cache_mode: CacheMode
    blocks: tuple[str, ...]
    rows: tuple[Row, ...]
    reuse: Reuse = "last"

    def __post_init__(self) -> None:
        if self.cache_mode not in get_args(CacheMode):
            raise InputError(f"cache_mode: {self.cache_mode!r} is none of {', '.join(get_args(CacheMode))}")
        if self.reuse not in get_args(Reuse):
            raise InputError(f"reuse: {self.reuse!r} is none of {', '.join(get_args(Reuse))}")
        if not self.rows or not all(self.rows[0]):
            raise InputError("gates: the first step runs in full, as there is nothing to reuse yet")
        for step, row in enumerate(self.rows):
            if len(row) != len(self.blocks):
                raise InputError(f"gates: step {step} has {len(row)} gates for {len(self.blocks)} blocks")

    @classmethod
    def of(
        cls, graph: BlockGraph, mode: CacheMode, gates: Sequence[Sequence[bool | int]], reuse: Reuse = "last"
    ) -> GateSchedule:
        """The schedule of a map of gates [T][N]; gates that cannot run are closed, the first step is opened."""
        wired = graph.in_mode(mode)
        rows = tuple(wired.running(row) for row in gates)
        return cls(graph.granularity, mode, graph.names, (graph.full(), *rows[1:]), reuse)

    @property
    def steps(self) -> int:
        return len(self.rows)

    def patterns(self) -> tuple[Row, ...]:
        """The distinct rows, in order of first use."""
        return tuple(dict.fromkeys(self.rows))

    def kept_steps(self) -> list[int]:
        """Steps in which anything runs."""
        return [step for step, row in enumerate(self.rows) if any(row)]

    def stored_blocks(self) -> tuple[Row, ...]:
        """Which blocks store their values, by step [T][N]: the last that run before a step reads them, two for a line.

        Of steps with the same gates the first stores what any of them does, so that one step of every kind can be run
        after the other, as where costs are counted.
        """
        points = 1 if self.reuse == "last" else 2
        wanted, found = [0] * len(self.blocks), []
        for row in reversed(self.rows):
            found.append(tuple(runs and left > 0 for runs, left in zip(row, wanted, strict=True)))
            if any(row):  # a step that leaves out everything reads no block
                wanted = [max(0, left - 1) if runs else points for runs, left in zip(row, wanted, strict=True)]
        found.reverse()
        alike: dict[Row, Row] = {}
        for row, own in zip(self.rows, found, strict=True):
            alike[row] = tuple(map(any, zip(alike.get(row, own), own, strict=True)))
        return tuple(alike.pop(row, own) for row, own in zip(self.rows, found, strict=True))

    def skips_only_whole_steps(self) -> bool:
        """Whether every step runs in full or not at all: a plain sampler with fewer steps, in other words."""
        return all(all(row) or not any(row) for row in self.rows)

    def remapped(self, steps: int, costs: BlockCosts | None = None) -> GateSchedule:
        """The schedule stretched to another number of steps: each takes the row of the nearest position.

        Where they keep a greater share of MACs than the schedule did, some are replaced by cheaper ones; dearer ones
        take what is left of it. Where the first step alone keeps more, which runs in full, a warning says so.

        Args:
            steps: network calls.
            costs: MACs of the blocks; None counts every block alike.

        Raises:
            InputError: no steps.
        """
        if steps < 1:
            raise InputError(f"gates: cannot be remapped to {steps} steps")
        costs = costs or BlockCosts((1,) * len(self.blocks), 0)
        scale = (self.steps - 1) / max(1, steps - 1)
        places, kept = [round(step * scale) for step in range(steps)], costs.kept(self.rows)
        running = _running_share([costs.step(row) for row in self.rows])
        rows, spread = [self.rows[place] for place in places], [running[place] for place in places]
        share = kept * (1 + 1e-9)
        found = _filled(_within(rows, self.patterns(), costs, share, spread), self.patterns(), costs, share, spread)
        if costs.kept(found) > kept * (1 + 1e-9):
            warnings.warn(
                f"gates: remapped to {steps} steps the schedule keeps {costs.kept(found):.3f} of the MACs, "
                f"not {kept:.3f}, as its first step runs in full",
                stacklevel=2,
            )
        return replace(self, rows=tuple(found))


def _within(
    rows: Sequence[Row], patterns: Sequence[Row], costs: BlockCosts, share: float, spread: Sequence[float]
) -> list[Row]:
    """Rows that keep at most a share of the MACs, but for the first: one after the other becomes a cheaper pattern.

    The smallest change that is enough is made, or the greatest there is; of equal ones, that after which MACs are
    spread over the steps most as they should be: `spread` has, of all, those up to every step.
    """
    none = (False,) * len(costs.blocks)
    cheaper = sorted({*patterns, none}, key=costs.step)
    found, spent = list(rows), [costs.step(row) for row in rows]
    while (excess := sum(spent) - share * costs.dense * len(rows)) > 0:
        saved = {
            (step, row): spent[step] - costs.step(row)
            for step in range(1, len(rows))
            for row in cheaper
            if costs.step(row) < spent[step]
        }
        if not saved:
            break
        enough = [amount for amount in saved.values() if amount >= excess]
        wanted = min(enough) if enough else max(saved.values())
        changes = [change for change, amount in saved.items() if amount == wanted]
        step, row = min(changes, key=lambda change: _distance(spent, change[0], saved[change], spread))
        found[step], spent[step] = row, costs.step(row)
    return found


def _filled(
    rows: Sequence[Row], patterns: Sequence[Row], costs: BlockCosts, share: float, spread: Sequence[float]
) -> list[Row]:
    """Rows that use what is left of a share of the MACs, one after the other becoming the dearest pattern that fits.

    Of several steps the one after which MACs are spread most as they should be.
    """
    found, spent = list(rows), [costs.step(row) for row in rows]
    while True:
        left = share * costs.dense * len(rows) - sum(spent)
        added = {
            (step, row): costs.step(row) - spent[step]
            for step in range(1, len(rows))
            for row in patterns
            if spent[step] < costs.step(row) <= spent[step] + left
        }
        if not added:
            return found
        dearest = max(added.values())
        changes = [change for change, amount in added.items() if amount == dearest]
        step, row = min(changes, key=lambda change: _distance(spent, change[0], -dearest, spread))
        found[step], spent[step] = row, costs.step(row)


def _running_share(spent: Sequence[int]) -> list[float]:
    """Of all MACs, those up to every step."""
    return [part / sum(spent) for part in accumulate(spent)]


def _distance(spent: Sequence[int], step: int, saved: int, spread: Sequence[float]) -> float:
    """How far the running share of MACs is from `spread` once a step saves some."""
    after = _running_share([cost - saved * (index == step) for index, cost in enumerate(spent)])
    return sum(abs(one - other) for one, other in zip(after, spread, strict=True))
