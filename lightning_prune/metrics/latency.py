"""Seconds, measured interleaved: arms take turns, so drift of the machine falls on all of them alike.

Two arms are compared by their ratios within turns. Their median comes with a 95 % interval from order statistics: the
k-th smallest and k-th largest ratio, k as the sign test has it. It assumes turns to be independent and nothing of how
seconds are distributed, whose tail is long on any machine that does other work. Of twenty comparisons of equals one
would come out as a difference, so a table of several widens its intervals to hold together (Bonferroni).
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb, log2

import torch

from lightning_prune.protocols import InputError

Arms = Mapping[str, Callable[[], object]]

INTERVAL = "median of the ratios within turns; order statistics (sign test), 95 % for all cells together (Bonferroni)"
_TAIL = 0.025


@dataclass(frozen=True)
class Timing:
    """Seconds of the calls of one arm, in the order of turns; at least two."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds of a call."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """Seconds of one arm over those of another, measured in turns, and its 95 % interval; below 1 is faster."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What may be said: "speed-up", "slower", or "no measurable difference" if the interval holds 1."""
        if self.low <= 1 <= self.high:
            return "no measurable difference"
        return "speed-up" if self.high < 1 else "slower"


def paired_ratio(arm: Timing, base: Timing, comparisons: int = 1) -> Ratio:
    """Seconds of `arm` over those of `base`, turn by turn, as one of so many comparisons; see `INTERVAL`.

    Raises:
        InputError: fewer turns than the interval takes.
    """
    ratios = [a / b for a, b in zip(arm.seconds, base.seconds, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios, comparisons))


def median_interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """The narrowest order statistics that hold the median; with 95 % confidence in all of so many comparisons."""
    count, tail, rank = len(values), 0.0, 0
    if count < fewest_turns(comparisons):
        raise InputError(f"repeats: {count} give no 95 % interval; at least {fewest_turns(comparisons)}")
    # P(fewer than k of the values lie below the median) is binomial; k grows while both tails stay under 5 %.
    while (tail := tail + comb(count, rank) / 2**count) <= _TAIL / comparisons:
        rank += 1
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def fewest_turns(comparisons: int = 1) -> int:
    """Turns below which not even the smallest and the largest ratio are far enough apart."""
    return ceil(log2(comparisons / _TAIL))


def interleaved_seconds(arms: Arms, repeats: int = 5, warm_up_calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every arm, in turns, once every arm is warm (see `warm_up`)."""
    warm_up(arms, warm_up_calls)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in turn_order(list(arms), turn):
            start = _now()
            arms[name]()
            seconds[name].append(_now() - start)
    return seconds


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """The order of arms in a turn: by Latin squares in which each follows every other equally often (Williams 1949).

    A call finds in the caches what the one before left there. Were every other turn only reversed, the first and the
    last of four arms would follow themselves every other time and those between never. Every square deals its places
    anew, lest the order keep step with something else the machine does.
    """
    count = len(names)
    # An odd number of arms takes a square and its mirror image.
    square, row = divmod(turn, 2 * count if count % 2 else count)
    dealt = random.Random(square).sample(list(names), count)
    zigzag = [row + (place + 1) // 2 * (1 if place % 2 else -1) for place in range(count)]
    order = [dealt[place % count] for place in zigzag]
    return order if row < count else order[::-1]


def interleaved_medians(arms: Arms, repeats: int = 5) -> dict[str, float]:
    """Median seconds of a call by arm; see `interleaved_seconds`."""
    return {name: statistics.median(times) for name, times in interleaved_seconds(arms, repeats).items()}


def warm_up(arms: Arms, calls: int = 1, most: int = 12) -> None:
    """Call every arm at least `calls` times, and until a call makes torch compile nothing more.

    Raises:
        InputError: an arm for which torch still compiles in call `most`.
    """
    for name, call in arms.items():
        for done in range(1, most + 1):
            before = graphs_compiled()
            call()
            if graphs_compiled() == before and done >= calls:
                break
        else:
            raise InputError(f"{name}: torch still compiles after {most} calls, so there is no steady state to time")


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    # Looked up, not imported: whoever compiles nothing does not pay for importing the compiler.
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils else 0


def call_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call of a warm arm allocates at its peak, beyond what is there before; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _now() -> float:
    """The clock, once the device has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
