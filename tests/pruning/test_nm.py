"""Properties of N:M masks, and the vectors of the specification (section 14)."""

from collections import Counter

import pytest
import torch

from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.nm import from_groups, nm_mask, to_groups, violations

RATIOS = ["31:32", "15:16", "7:8", "6:8", "5:8", "4:8", "3:4", "2:4", "1:4", "1:8", "1:16", "1:32"]


def mask_of(row: list[float], pattern: str) -> list[int]:
    return nm_mask(torch.tensor([row]), Sparsity.parse(pattern))[0].int().tolist()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("2:4", [0, 1, 1, 0]), ("1:4", [0, 1, 0, 0]), ("3:4", [0, 1, 1, 1]), ("4:4", [1, 1, 1, 1])],
)
def test_specified_row(pattern: str, expected: list[int]) -> None:
    assert mask_of([0.1, -0.4, 0.3, 0.2], pattern) == expected


@pytest.mark.parametrize("m", range(1, 17))
def test_kernels_of_2_to_4_read_what_never_keeps_more_of_four(m: int) -> None:
    """The worst case of every aligned four: of each group as many as it may keep, there."""
    for n in range(1, m + 1):
        overlaps = [Counter(place // m for place in range(start, start + 4)).values() for start in range(0, 4 * m, 4)]
        worst = max(sum(min(n, inside) for inside in overlap) for overlap in overlaps)
        assert Sparsity(n, m).is_within_2to4 == (worst <= 2), (n, m)


@pytest.mark.parametrize("pattern", RATIOS)
@pytest.mark.parametrize("shape", [(6, 64), (5, 32, 3, 3)])
@pytest.mark.parametrize("kind", ["normal", "zeros", "tied"])
def test_every_group_keeps_exactly_n(pattern: str, shape: tuple[int, ...], kind: str) -> None:
    sparsity = Sparsity.parse(pattern)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = {"normal": weight, "zeros": torch.zeros(shape), "tied": weight.sign()}[kind]
    kept = to_groups(nm_mask(weight, sparsity), sparsity.m).sum(-1)
    assert (kept == sparsity.n).all()


@pytest.mark.parametrize("pattern", RATIOS)
def test_kept_magnitudes_dominate_pruned_ones(pattern: str) -> None:
    sparsity = Sparsity.parse(pattern)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    groups, mask = to_groups(weight.abs(), sparsity.m), to_groups(nm_mask(weight, sparsity), sparsity.m)
    smallest_kept = groups.masked_fill(~mask, torch.inf).amin(-1)
    largest_pruned = groups.masked_fill(mask, -torch.inf).amax(-1)
    assert (smallest_kept >= largest_pruned).all()


def test_of_equal_magnitudes_the_lower_position_is_kept() -> None:
    assert mask_of([1.0, -1.0, 1.0, 1.0], "2:4") == [1, 1, 0, 0]
    assert mask_of([0.0] * 32, "15:16") == ([1] * 15 + [0]) * 2


def test_conv_groups_are_consecutive_input_channels_at_one_tap() -> None:
    weight = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    mask = nm_mask(weight, Sparsity(2, 4))
    assert (mask.sum(dim=1) == 4).all()
    assert (mask[:, :4].sum(dim=1) == 2).all()
    assert (mask[:, 4:].sum(dim=1) == 2).all()


def test_input_dimension_must_divide() -> None:
    with pytest.raises(InputError, match="3 is no multiple of 4"):
        nm_mask(torch.randn(3, 3, 3, 3), Sparsity(2, 4))


def test_masks_of_one_m_are_nested() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    for n in range(1, 8):
        assert (nm_mask(weight, Sparsity(n, 8)) <= nm_mask(weight, Sparsity(n + 1, 8))).all()


def test_four_of_eight_is_not_two_of_four() -> None:
    weight = torch.tensor([[4.0, 3, 2, 1, 0.1, 0.1, 0.1, 0.1]])
    assert nm_mask(weight, Sparsity(4, 8))[0, :4].sum() == 4


def test_groups_round_trip() -> None:
    for weight in (torch.randn(3, 8), torch.randn(3, 8, 2, 2)):
        assert torch.equal(from_groups(to_groups(weight, 4)), weight)


def test_violations_counts_overfull_groups() -> None:
    weight = torch.tensor([[1.0, 2, 3, 0, 0, 0, 1, 1]])
    assert violations(weight, Sparsity(2, 4)) == 1
    assert violations(torch.zeros(2, 8), Sparsity(2, 4)) == 0


@pytest.mark.parametrize("text", ["5:4", "0:4", "2", "a:b", "-1:4", ""])
def test_bad_patterns_name_themselves(text: str) -> None:
    with pytest.raises(InputError, match="sparsity"):
        Sparsity.parse(text)


def test_sparsity_speaks_of_the_fraction_removed() -> None:
    sparsity = Sparsity.parse("1:4")
    assert (sparsity.density, sparsity.fraction, str(sparsity)) == (0.25, 0.75, "1:4")
