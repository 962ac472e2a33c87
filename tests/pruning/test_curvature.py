"""Streamed second moments against those of all rows at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.curvature import Curvature

GROUPS = [WidthGroup("0", "channels", "1", 6, 1, 1, ()), WidthGroup("3", "norm-groups", "3", 2, 2, 9, ())]


class Network(nn.Sequential):
    """A linear layer that reads 6 channels, then a convolution that reads 4."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), nn.Linear(6, 16), nn.Unflatten(-1, (4, 4)), nn.Conv2d(4, 3, 3, padding=1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("spill", [False, True])
def test_streamed_equals_all_at_once(spill: bool, tmp_path: Path) -> None:
    net, x = network(), torch.randn(10, 4, 6)
    bins = torch.arange(10) % 3
    curvature = Curvature(net, GROUPS, 3, tmp_path / "run" if spill else None)
    with curvature.collecting(bins[:4]):
        net(x[:4])
    with curvature.collecting(bins[4:]):
        net(x[4:])
    net(x)
    hidden = net[2](net[1](x))
    for index in range(3):
        flat = F.pad(x[bins == index].flatten(0, 1), (0, 1), value=1.0)
        assert torch.allclose(curvature.sums["0"][index], flat.T @ flat, rtol=1e-5, atol=1e-5)
        unfolded = F.unfold(hidden[bins == index], 3, padding=1).transpose(1, 2).flatten(0, 1)
        flat = F.pad(unfolded, (0, 1), value=1.0)
        assert torch.allclose(curvature.sums["3"][index], flat.T @ flat, rtol=1e-5, atol=1e-4)
    assert curvature.rows.tolist() == [[16, 64], [12, 48], [12, 48]]
    assert not list(tmp_path.rglob(".statistics*")), "the mapped file is gone from the folder"


def test_moments_are_of_single_precision_where_the_network_computes_in_half() -> None:
    net, x = network(), torch.randn(10, 4, 6)
    curvature = Curvature(net, GROUPS, 1)
    with torch.autocast("cpu", torch.bfloat16), curvature.collecting(torch.zeros(10, dtype=torch.long)):
        net(x)
    flat = F.pad(x.flatten(0, 1), (0, 1), value=1.0)
    assert torch.allclose(curvature.sums["0"][0], flat.T @ flat, rtol=1e-5, atol=1e-5)
    assert torch.linalg.eigvalsh(curvature.sums["3"][0].double()).min() > -1e-4


def test_the_error_of_a_layer_is_in_its_moments() -> None:
    net, x = network(), torch.randn(10, 4, 6)
    curvature = Curvature(net, GROUPS, 1)
    with curvature.collecting(torch.zeros(10, dtype=torch.long)):
        net(x)
    hidden, conv = net[2](net[1](x)), net[3]
    change = torch.randn_like(conv.weight)
    true = F.conv2d(hidden, change, padding=1).square().sum() / curvature.rows[0, 1]
    flat = F.pad(change.flatten(1), (0, 1)).double()
    assert torch.allclose(((flat @ curvature.mean(GROUPS[1], [1.0])) * flat).sum(), true.double(), rtol=1e-4)


def test_weights_and_means() -> None:
    net, x = network(), torch.randn(4, 4, 6)
    plain, weighted = Curvature(net, GROUPS, 2), Curvature(net, GROUPS, 2)
    with plain.collecting(torch.tensor([0, 0, 1, 1])):
        net(x)
    with weighted.collecting(torch.tensor([0, 0, 1, 1]), torch.tensor([4.0, 4.0, 1.0, 1.0])):
        net(x)
    assert torch.allclose(weighted.sums["3"][0], 4 * plain.sums["3"][0], rtol=1e-4)
    assert torch.allclose(weighted.sums["3"][1], plain.sums["3"][1], rtol=1e-4)
    parts = [plain.mean(GROUPS[0], w) for w in ([1.0, 0.0], [0.0, 1.0], [3.0, 1.0])]
    assert torch.allclose(parts[2], 0.75 * parts[0] + 0.25 * parts[1])


def test_statistics_that_the_disk_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=rf"{tmp_path}: no room for .* GB of statistics: No space left on device"):
        Curvature(network(), GROUPS, 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_room_for_statistics_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, offset, size: taken.append(size))
    kept = Curvature(network(), GROUPS, 2, tmp_path)
    assert sum(taken) == sum(4 * sums.numel() for sums in kept.sums.values())


def test_state_round_trip_and_what_does_not_fit() -> None:
    net, x = network(), torch.randn(4, 4, 6)
    first, second = Curvature(net, GROUPS, 2), Curvature(net, GROUPS, 2)
    with first.collecting(torch.tensor([0, 0, 1, 1])):
        net(x)
    second.load(first.state())
    assert torch.equal(first.mean(GROUPS[1], [1.0, 1.0]), second.mean(GROUPS[1], [1.0, 1.0]))
    assert all(first.state()["sums"][name] is sums for name, sums in first.sums.items()), "nothing is copied"
    doubled = first.state(lambda tensor: tensor.mul_(2))
    assert torch.equal(doubled["sums"]["0"], 2 * first.sums["0"])
    first.sum_over(lambda tensor: tensor.mul_(2))
    assert all(torch.equal(doubled["sums"][name], sums) for name, sums in first.sums.items())
    assert torch.equal(doubled["rows"], first.rows)
    with pytest.raises(InputError, match="do not fit"):
        Curvature(net, GROUPS, 3).load(first.state())
    with pytest.raises(InputError, match="seen no sample"):
        Curvature(net, GROUPS, 2).mean(GROUPS[0], [1.0, 1.0])
