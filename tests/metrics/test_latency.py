"""Latency: the order arms run in, when they count as warm, and what is concluded from their seconds."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations
from statistics import median

import pytest
import torch

from lightning_prune.metrics import latency
from lightning_prune.metrics.latency import (
    Timing,
    call_memory,
    fewest_turns,
    graphs_compiled,
    interleaved_medians,
    interleaved_seconds,
    median_interval,
    paired_ratio,
    turn_order,
    warm_up,
)
from lightning_prune.protocols import InputError


class FakeMachine:
    """A clock that moves only when an arm runs, and a record of which arms ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time, self.graphs = 0.0, 0
        self.ran: list[str] = []
        monkeypatch.setattr(latency, "_now", lambda: self.time)
        monkeypatch.setattr(latency, "graphs_compiled", lambda: self.graphs)

    def arm(self, name: str, seconds: float = 1.0, compiles: int = 0) -> Callable[[], None]:
        """An arm of fixed seconds whose first `compiles` calls each make a graph."""

        def call() -> None:
            self.graphs += self.ran.count(name) < compiles
            self.ran.append(name)
            self.time += seconds

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(monkeypatch)


def test_arms_take_turns(fake: FakeMachine) -> None:
    seconds = interleaved_seconds({"a": fake.arm("a", 1.0), "b": fake.arm("b", 2.0)}, repeats=4)
    assert fake.ran[:2] == ["a", "b"]
    first, second, third, fourth = zip(fake.ran[2::2], fake.ran[3::2], strict=True)
    assert {first, second} == {third, fourth} == {("a", "b"), ("b", "a")}
    assert seconds == {"a": [1.0] * 4, "b": [2.0] * 4}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_every_arm_follows_every_other_equally_often(count: int) -> None:
    names = "abcdef"[:count]
    turns = [turn_order(names, turn) for turn in range(2 * count)]
    assert all(sorted(turn) == list(names) for turn in turns)
    follows = Counter(pair for turn in turns for pair in pairwise(turn))
    assert follows == Counter(dict.fromkeys(permutations(names, 2), 2))


def test_squares_differ_and_are_the_same_every_time() -> None:
    orders = ["".join(turn_order("abcd", turn)) for turn in range(0, 80, 4)]
    assert len(set(orders)) > 10
    assert orders == ["".join(turn_order("abcd", turn)) for turn in range(0, 80, 4)]


def test_medians(fake: FakeMachine) -> None:
    assert interleaved_medians({"a": fake.arm("a", 0.5)}, repeats=4) == {"a": 0.5}


@pytest.mark.parametrize(("calls", "compiles", "expected"), [(1, 0, 1), (3, 0, 3), (1, 1, 2), (1, 3, 4), (3, 1, 3)])
def test_warm_up_goes_on_until_nothing_is_compiled(fake: FakeMachine, calls: int, compiles: int, expected: int) -> None:
    warm_up({"a": fake.arm("a", compiles=compiles)}, calls)
    assert len(fake.ran) == expected


def test_an_arm_that_never_settles_is_refused(fake: FakeMachine) -> None:
    with pytest.raises(InputError, match="compiled dense: torch still compiles after 4 calls"):
        warm_up({"compiled dense": fake.arm("a", compiles=100)}, most=4)


def test_compiling_is_not_among_the_seconds(fake: FakeMachine) -> None:
    assert len(interleaved_seconds({"a": fake.arm("a", compiles=2)}, repeats=5)["a"]) == 5
    assert len(fake.ran) == 3 + 5


def test_graphs_are_counted_only_once_the_compiler_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils", raising=False)
    assert graphs_compiled() == 0


def test_graphs_are_those_torch_compiles() -> None:
    before = graphs_compiled()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    double(torch.ones(3))
    assert graphs_compiled() == before + 1
    double(torch.ones(4))
    assert graphs_compiled() == before + 2


def test_timing() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (30, 10), (100, 40)])
def test_ranks_are_those_of_published_tables(count: int, rank: int) -> None:
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert median_interval(values) == (rank, count + 1 - rank)


@pytest.mark.parametrize("count", [6, 15, 40])
def test_the_interval_covers(count: int) -> None:
    """The median of a skewed distribution is in the interval in at least 95 of 100 samples."""
    draw = random.Random(1)
    trials, hits = 2000, 0
    for _ in range(trials):
        low, high = median_interval([draw.lognormvariate(0.0, 1.0) for _ in range(count)])
        hits += low <= 1.0 <= high
    assert hits / trials > 0.94


def test_several_comparisons_hold_together() -> None:
    """Of tables that compare equals eight times, at least 95 of 100 show no difference at all."""
    draw = random.Random(2)
    clean = 0
    for _ in range(500):
        tables = [median_interval([draw.gauss(0.0, 1.0) for _ in range(20)], comparisons=8) for _ in range(8)]
        clean += all(low <= 0.0 <= high for low, high in tables)
    assert clean / 500 > 0.94


@pytest.mark.parametrize(("comparisons", "turns"), [(1, 6), (2, 7), (8, 9), (12, 9), (13, 10)])
def test_too_few_turns_for_an_interval(comparisons: int, turns: int) -> None:
    assert fewest_turns(comparisons) == turns
    values = [float(value) for value in range(turns)]
    assert median_interval(values, comparisons) == (0.0, turns - 1.0)
    with pytest.raises(InputError, match=f"{turns - 1} give no 95 % interval; at least {turns}"):
        median_interval(values[1:], comparisons)


def test_a_ratio_is_taken_within_turns() -> None:
    """A machine that slows down tenfold half-way changes seconds and not ratios."""
    base = Timing((1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 10.0))
    arm = Timing(tuple(0.5 * s for s in base.seconds))
    ratio = paired_ratio(arm, base)
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.8, 0.82, 0.85, 0.9, 0.95, 0.99], "speed-up"),
        ([1.01, 1.02, 1.05, 1.1, 1.2, 1.3], "slower"),
        ([0.7, 0.75, 0.8, 0.85, 0.9, 1.001], "no measurable difference"),
        ([0.999, 1.2, 1.3, 1.4, 1.5, 1.6], "no measurable difference"),
        ([1.0] * 6, "no measurable difference"),
    ],
)
def test_verdicts(ratios: list[float], verdict: str) -> None:
    ratio = paired_ratio(Timing(tuple(ratios)), Timing((1.0,) * len(ratios)))
    assert ratio.value == median(ratios)
    assert ratio.verdict == verdict


def test_no_memory_figures_without_cuda() -> None:
    assert call_memory(lambda: pytest.fail("was called"), torch.device("cpu")) is None


@pytest.mark.gpu
def test_memory_of_a_call_is_what_it_adds() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(1 << 20, device=device)
    assert call_memory(lambda: x * 2, device) == x.nbytes
