"""Blocks and what runs: the closure of the paper on chains, U-Nets and the published Stable Diffusion 1.5."""

import json
import random
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from lightning_prune.blocks import Block, BlockCosts, BlockGraph, GateSchedule, Row, State
from lightning_prune.diffusion.gating import install
from lightning_prune.diffusion.models.unet_blocks import unet_blocks
from lightning_prune.diffusion.recall import stored_tensors
from lightning_prune.metrics.block_costs import block_costs
from lightning_prune.metrics.macs import Ledger, count, ledger_of
from lightning_prune.metrics.macs_trace import trace
from lightning_prune.protocols import InputError
from tests.factories import tiny_dit, tiny_unet

RELEASED = json.loads((Path(__file__).parent / "assets" / "dipgo_released_gates_sd15_080.json").read_text())
CHAIN = BlockGraph("block", (Block("a", ("a",)), Block("b", ("b",), ("a",)), Block("c", ("c",), ("b",))), ("c",))
SD_15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@cache
def sd15() -> tuple[Any, Ledger]:
    with torch.device("meta"):
        network = UNet2DConditionModel(**SD_15)
        x, t, text = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)
    return network, count(network, x, t, text)


@cache
def sd15_graph(granularity: str) -> tuple[BlockGraph, BlockCosts]:
    network, ledger = sd15()
    graph = unet_blocks(network, granularity)
    return graph, block_costs(ledger, graph, "module")


def test_the_closure_of_a_chain() -> None:
    assert CHAIN.running([1, 1, 1]) == (True, True, True)
    assert CHAIN.running([1, 0, 1]) == (False, False, True)
    assert CHAIN.states([1, 0, 1]) == (State.REMOVED, State.REUSED, State.RUN)
    assert CHAIN.running([1, 1, 0]) == (False, False, False)


@pytest.mark.parametrize("make", [lambda: tiny_dit().blocks("block"), lambda: tiny_unet().blocks("fine")])
def test_closing_is_idempotent_and_keeps_order(make: Any) -> None:
    graph, draw = make(), random.Random(0)
    for _ in range(50):
        gates = [draw.random() < 0.6 for _ in graph.names]
        runs = graph.running(gates)
        assert graph.running(runs) == runs, "what runs needs no closing"
        assert all(gate or not run for gate, run in zip(gates, runs, strict=True))
        position = draw.randrange(len(graph))
        more = graph.running([gate or i == position for i, gate in enumerate(gates)])
        assert all(after or not before for before, after in zip(runs, more, strict=True)), "opening removes nothing"


def test_a_residual_makes_blocks_independent() -> None:
    graph = tiny_dit().blocks("block").in_mode("residual")
    assert graph.running([1, 0]) == (True, False)
    with pytest.raises(InputError, match="granularity half has residual"):
        tiny_dit().blocks("half").in_mode("output")
    with pytest.raises(InputError, match="granularity coarse has output"):
        tiny_unet().blocks("coarse").in_mode("residual")


def test_producers_of_stable_diffusion() -> None:
    graph, _ = sd15_graph("coarse")
    assert graph.names == tuple(RELEASED["names"])
    assert {b.name: set(b.producers) for b in graph.blocks} == {
        "D0": set(), "D1": {"D0"}, "D2": {"D1"}, "D3": {"D2"}, "M": {"D3"}, "U3": {"M", "D3", "D2"},
        "U2": {"U3", "D2", "D1"}, "U1": {"U2", "D1", "D0"}, "U0": {"U1", "D0"},
    }  # fmt: skip


def test_cascades_of_stable_diffusion() -> None:
    coarse, costs = sd15_graph("coarse")
    gone = {n: {m for m, r in zip(coarse.names, coarse.running([k != n for k in coarse.names]), strict=True) if not r}
            for n in coarse.names}  # fmt: skip
    assert gone["U0"] == set(coarse.names)
    assert gone["U1"] == {"U1", "U2", "U3", "M", "D3", "D2", "D1"}
    assert gone["U2"] == {"U2", "U3", "M", "D3", "D2"}
    assert gone["U3"] == {"U3", "M", "D3"}
    assert all(gone[n] == {n} for n in ("M", "D3", "D2", "D1", "D0"))
    expected = (0.0972, 0.0924, 0.0928, 0.0112, 0.0178, 0.0670, 0.3816, 0.7076, 0.9997)
    assert costs.cascade_shares(coarse) == pytest.approx(expected, abs=5e-5)
    fine, costs = sd15_graph("fine")
    assert fine.names == (*(f"d{i}" for i in range(1, 12)), "m12", *(f"u{i}" for i in reversed(range(12))))
    shares = dict(zip(fine.names, costs.cascade_shares(fine), strict=True))
    published = [0.9997, 0.9389, 0.8308, 0.7104, 0.6083, 0.5050, 0.3844, 0.2821, 0.1784, 0.0698, 0.0469, 0.0324]
    assert [shares[f"u{i}"] for i in range(12)] == pytest.approx(published, abs=5e-5)


def test_sparsity_losses_of_stable_diffusion_at_all_keep() -> None:
    coarse, costs = sd15_graph("coarse")
    assert sum(costs.cascade_shares(coarse)) == pytest.approx(2.4674, abs=5e-5)
    assert sum(costs.blocks) / costs.dense == pytest.approx(0.9997037733830676, rel=1e-9)
    fine, fine_costs = sd15_graph("fine")
    assert sum(fine_costs.cascade_shares(fine)) == pytest.approx(5.8985, abs=5e-5)


def test_the_released_gates() -> None:
    graph, costs = sd15_graph("coarse")
    schedule = GateSchedule.of(graph, "output", RELEASED["keep"])
    assert schedule.rows == tuple(tuple(map(bool, row)) for row in RELEASED["keep"]), "they are closed already"
    assert sum(map(sum, schedule.rows)) == 89
    assert len(schedule.patterns()) == 3
    assert schedule.kept_steps() == [0, 7, 13, 19, 20, 21, 26, 32, 39, 48]
    assert not schedule.skips_only_whole_steps()
    gated = sum(c for row in schedule.rows for c, runs in zip(costs.blocks, row, strict=True) if runs) / 50
    assert (gated + costs.shell) / 1e9 == pytest.approx(67.7711, abs=1e-4)
    assert (gated + costs.shell) / costs.dense == pytest.approx(0.2000, abs=5e-5)
    assert costs.kept(schedule.rows) == pytest.approx(0.1998, abs=5e-5), "skipped steps skip the shell too"


def test_the_released_gates_replayed_on_the_network() -> None:
    """What runs on meta tensors, counted in the published convention."""
    graph, costs = sd15_graph("coarse")
    with torch.device("meta"):
        network = UNet2DConditionModel(**SD_15)
        x, t, text = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)
    gating, slots, spent = install(network, graph, "output"), [None] * len(graph), []
    rows, counted = GateSchedule.of(graph, "output", RELEASED["keep"]).rows, {}
    for row in rows:
        if row not in counted and any(row):
            replayed = partial(replay, gating, network, row, slots, (x, t, text))
            counted[row] = ledger_of(network, trace(network, replayed)).macs("module")
        spent.append(counted.get(row, 0))
    assert len(counted) == 2
    shell = costs.shell * sum(not any(row) for row in rows)  # the published count leaves it in skipped steps
    assert (sum(spent) + shell) / 50 / 1e9 == pytest.approx(67.7711, abs=1e-4)
    assert (sum(spent) + shell) / 50 / costs.dense == pytest.approx(0.2000, abs=5e-5)


def replay(gating: Any, network: Any, row: Row, slots: list[Any], inputs: tuple[Any, ...]) -> Any:
    """A step of these blocks; values it stores are left in `slots` for the next."""
    with torch.no_grad():
        output, slots[:] = gating.step(lambda: network(*inputs), row, slots, inputs[1])
    return output


def test_cache_of_stable_diffusion() -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**SD_15).half()
        x, t, text = torch.zeros(2, 4, 64, 64).half(), torch.zeros(2), torch.zeros(2, 77, 768).half()
    graph = unet_blocks(network, "coarse")
    gating = install(network, graph, "output")
    with torch.no_grad():
        _, slots = gating.step(lambda: network(x, t, text), graph.full(), [None] * len(graph), t)
    assert sum(tensor.numel() for tensor in stored_tensors(slots)) == 2 * 10_977_280  # 43.9 MB in half precision


def test_a_schedule_is_closed_and_begins_in_full() -> None:
    schedule = GateSchedule.of(CHAIN, "output", [[0, 0, 0], [1, 0, 1]])
    assert schedule.rows == ((True, True, True), (False, False, True))
    with pytest.raises(InputError, match="first step"):
        GateSchedule("block", "output", ("a",), ((False,),))
    with pytest.raises(InputError, match="2 gates for 1 blocks"):
        GateSchedule("block", "output", ("a",), ((True,), (True, True)))


def test_remapping_keeps_the_place_in_the_trajectory() -> None:
    schedule = GateSchedule.of(CHAIN, "output", [[1, 1, 1], *[[0, 0, 1]] * 4, *[[0, 0, 0]] * 4, [1, 1, 1]])
    assert schedule.remapped(10) == schedule
    nearest = [schedule.rows[round(step / 2)] for step in range(19)]
    found = schedule.remapped(19).rows
    # What the nearest rows keep less than the schedule did pays for one more step in full, where most is missing.
    assert [step for step, row in enumerate(found) if row != nearest[step]] == [9]
    assert all(found[9])
    even = GateSchedule.of(CHAIN, "output", [[1, 1, 1], [0, 0, 1]] * 5)
    costs = BlockCosts((5, 4, 1), 2)
    assert even.remapped(20, costs).rows[::2] == even.rows


@pytest.mark.parametrize("steps", [5, 10, 11, 13, 25, 49, 51, 99])
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_remapping_keeps_no_greater_share_of_macs(steps: int, kind: str) -> None:
    between = [0, 0, 0] if kind == "whole" else [0, 0, 1]
    schedule = GateSchedule.of(CHAIN, "output", [between if step % 5 else [1, 1, 1] for step in range(50)])
    costs = BlockCosts((50, 40, 10), 3)
    found = schedule.remapped(steps, costs).rows
    assert costs.kept(found) <= costs.kept(schedule.rows) + 1e-9
    assert costs.kept(found) > costs.kept(schedule.rows) - costs.dense / (costs.dense * steps)
    assert all(found[0])
    assert {*found} <= {*schedule.rows, (False,) * 3}
    if (steps, kind) == (11, "whole"):  # nearest are full ones to the first five
        assert [step for step, row in enumerate(found) if all(row)] == [0, 4]


@pytest.mark.parametrize("steps", [10, 20, 25, 30, 40, 100])
@pytest.mark.parametrize("kept", [range(0, 50, 5), (0, 1, 2, 5, 9, 14, 22, 29, 38, 47)])
def test_remapping_uses_the_share_that_there_is(steps: int, kept: Sequence[int]) -> None:
    """Ten of fifty whole steps, so every fifth: no fewer, wherever the nearest rows lie."""
    schedule = GateSchedule.of(CHAIN, "output", [[int(step in kept)] * 3 for step in range(50)])
    assert len(schedule.remapped(steps).kept_steps()) == steps // 5


def test_remapping_to_too_few_steps_says_what_they_keep() -> None:
    schedule = GateSchedule.of(CHAIN, "output", [[0, 0, 0] if step % 5 else [1, 1, 1] for step in range(50)])
    with pytest.warns(UserWarning, match=r"remapped to 3 steps the schedule keeps 0\.333 of the MACs, not 0\.200"):
        assert schedule.remapped(3).rows == (CHAIN.full(), (False,) * 3, (False,) * 3)


@pytest.mark.parametrize(
    ("reuse", "stored"), [("last", "11 00 00 01 00 00 00 10 00 00"), ("linear", "11 01 00 01 00 00 10 10 00 00")]
)
def test_blocks_store_in_the_steps_before_one_that_reads_them(reuse: Any, stored: str) -> None:
    """And in the first step of every pattern, for those after it."""
    gates = ("11", "11", "00", "11", "10", "00", "11", "11", "01", "11")
    rows = tuple(tuple(gate == "1" for gate in row) for row in gates)
    schedule = GateSchedule("half", "residual", ("A0", "F0"), rows, reuse)
    assert " ".join("".join(str(int(one)) for one in row) for row in schedule.stored_blocks()) == stored
