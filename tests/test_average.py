"""The moving average of weights: to the bit what torch's formula gives, where the network trains, without waiting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_prune.sharding import WeightAverage
from lightning_prune.sharding import average as module
from tests.factories import tiny_dit
from tests.traffic import Traffic


def averaged(network: nn.Module, device: str = "cpu", decay: float = 0.9) -> Any:
    callback = WeightAverage(decay)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    callback.setup(trainer, network, "fit")  # type: ignore[arg-type]
    return callback._average_model


def moved(network: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("at_once", [3, 64])
def test_it_is_torch_s_average_to_the_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    network = tiny_dit().network
    ours, theirs = averaged(network), AveragedModel(network, avg_fn=get_ema_avg_fn(0.9), use_buffers=False)
    for seed in range(4):
        moved(network, seed)
        ours.update_parameters(network)
        theirs.update_parameters(network)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_goes_on_from_a_checkpoint() -> None:
    network = tiny_dit().network
    whole = averaged(network)
    moved(network, 0)
    whole.update_parameters(network)
    resumed = averaged(network)
    resumed.load_state_dict(whole.state_dict())
    moved(network, 1)
    for average in (whole, resumed):
        average.update_parameters(network)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert int(resumed.n_averaged) == 2


def test_it_is_where_the_network_will_train_and_reads_nothing_from_there() -> None:
    network = tiny_dit().network
    assert {p.device.type for p in averaged(network, "meta").parameters()} == {"meta"}
    average = averaged(network)
    average.update_parameters(network)
    with Traffic() as traffic:
        average.update_parameters(network)
    assert traffic.reads == 0


def test_checkpoints_name_it_as_lightning_s() -> None:
    assert WeightAverage(0.9).state_key == EMAWeightAveraging(decay=0.9).state_key
