"""Quality gates speak of the upper end of an interval."""

from typing import Any

import pytest
import torch

from lightning_prune.metrics.evaluation import Score
from lightning_prune.metrics.frechet import Distance
from lightning_prune.metrics.gate import Gate
from lightning_prune.protocols import GateNotMet, InputError


def score(value: float, noise: torch.Tensor) -> Score:
    unused: Any = None
    return Score("fd_fashion", Distance(value, noise), None, unused, None, noise)


NOISE = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 10
SCORES = {
    "dense": score(10.0, NOISE),
    "one-shot 2:4": score(40.0, 3 * NOISE),
    "sparsedm 2:4": score(10.2, NOISE * 1.01),
}


@pytest.mark.parametrize(
    "text",
    ["fd_fashion<=dense+0.5", "fd_fashion <= dense + 5%", "fd_fashion<=12", "fd_fashion<=one-shot 2:4"],
)
def test_conditions_that_hold(text: str) -> None:
    assert text in Gate.parse(text).check(SCORES)


@pytest.mark.parametrize(
    "text", ["fd_fashion<=dense", "fd_fashion<=dense+1%", "fd_fashion<=10.5", "fd_fashion<=dense+0.2"]
)
def test_conditions_that_do_not(text: str) -> None:
    # 10.2 is below 10.5, and exactly 0.2 above dense, but the upper ends of the intervals are not.
    with pytest.raises(GateNotMet, match="sparsedm 2:4"):
        Gate.parse(text).check(SCORES)


def test_the_pairing_is_what_lets_a_difference_be_small() -> None:
    unpaired = {"dense": SCORES["dense"], "sparsedm 2:4": score(10.2, NOISE.flip(0) * 1.01)}
    with pytest.raises(GateNotMet):
        Gate.parse("fd_fashion<=dense+0.5").check(unpaired)


@pytest.mark.parametrize("text", ["", "fd_fashion", "fd_fashion<dense", "fd_fashion<=dense+x", "fd_fashion<=dense-1"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(InputError, match="gate: "):
        Gate.parse(text).check(SCORES)


@pytest.mark.parametrize(("text", "named"), [("fid<=12", "fid"), ("fd_fashion<=sparse", "sparse")])
def test_names_that_do_not_exist(text: str, named: str) -> None:
    with pytest.raises(InputError, match=f"gate: {named}"):
        Gate.parse(text).check(SCORES)
