"""Calibration batches and prompts: pure functions, shared over ranks, no trace in training."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_prune.data import EmbeddedFashion


def data(rank: int = 0, world: int = 1, batch_size: int = 32) -> EmbeddedFashion:
    module = EmbeddedFashion(batch_size=batch_size, seed=0)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return module


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def test_calibration_batches_are_a_function_of_the_seed() -> None:
    module = data()
    first = ids(module.calibration_batches(3, seed=1))
    assert [len(batch) for batch in first] == [32, 32, 32]
    assert ids(module.calibration_batches(3, seed=1)) == first
    assert ids(module.calibration_batches(2, seed=1)) == first[:2]
    assert ids(module.calibration_batches(3, seed=2)) != first


def test_ranks_share_calibration_batches() -> None:
    whole = ids(data(batch_size=32).calibration_batches(3, seed=1))
    ranks = [ids(data(rank, 2, batch_size=16).calibration_batches(3, seed=1)) for rank in (0, 1)]
    for one, first, second in zip(whole, *ranks, strict=True):
        assert sorted(one) == sorted([*first, *second])


def test_more_batches_than_an_epoch_has_go_on_into_the_next() -> None:
    found = ids(data(batch_size=9000).calibration_batches(5))
    assert len(found) == 5
    assert len({tuple(batch) for batch in found}) == 5


def test_training_sees_what_it_would_have_seen() -> None:
    module = data()
    expected = next(iter(data().train_dataloader()))
    list(module.calibration_batches(2, seed=0))
    module.prompts(10)
    assert torch.equal(next(iter(module.train_dataloader()))["x"], expected["x"])


def test_prompts_are_labels_and_the_same_on_every_rank() -> None:
    prompts = data().prompts(40, seed=3)
    labels = EmbeddedFashion().split("train").labels
    assert torch.equal(prompts["cond"], labels[prompts["id"]])
    assert torch.equal(data(1, 2).prompts(40, seed=3)["id"], prompts["id"])
    assert torch.equal(data().prompts(20, seed=3)["id"], prompts["id"][:20])
