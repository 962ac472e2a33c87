"""A ramp is a pure function of the step, exact at its ends."""

import pytest

from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.ramps import check_chain, staged

CHAIN = [Sparsity.parse(p) for p in ("31:32", "15:16", "7:8", "3:4", "2:4")]


def test_the_published_boundaries() -> None:
    changes = [s for s in range(1, 500) if staged(s, 500, CHAIN, 0.8) != staged(s - 1, 500, CHAIN, 0.8)]
    assert changes == [100, 200, 300, 400]


@pytest.mark.parametrize("total", [1, 7, 400, 12345])
@pytest.mark.parametrize("reached_at", [0.0, 0.25, 0.8])
def test_ends(total: int, reached_at: float) -> None:
    first_of_last = int(total * reached_at)
    if total:
        assert staged(total - 1, total, CHAIN, reached_at) == CHAIN[-1]
    assert staged(first_of_last, total, CHAIN, reached_at) == CHAIN[-1]
    if first_of_last >= len(CHAIN):
        assert staged(0, total, CHAIN, reached_at) == CHAIN[0]
        assert staged(first_of_last - 1, total, CHAIN, reached_at) == CHAIN[-2]


def test_sparsity_never_falls() -> None:
    fractions = [staged(step, 97, CHAIN, 0.7).fraction for step in range(120)]
    assert fractions == sorted(fractions)


def test_one_step_holds_from_the_start() -> None:
    assert staged(0, 100, [Sparsity(2, 4)], 0.8) == Sparsity(2, 4)


@pytest.mark.parametrize(
    ("chain", "reached_at", "message"),
    [
        ([], 0.5, "at least one"),
        (["2:4", "3:4"], 0.5, "denser"),
        (["2:4"], 1.5, "reached_at"),
        (["3:4", "2:4"], 1.0, "never hold"),
    ],
)
def test_bad_chains(chain: list[str], reached_at: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_chain([Sparsity.parse(p) for p in chain], reached_at)
