"""A run stopped in mid-epoch and resumed ends with the same weights as one that was not."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_prune.callbacks import DistanceEvaluation, LastCheckpoint, SparsityRamp
from lightning_prune.data import EmbeddedFashion
from lightning_prune.data.arrays import LabelledImages
from lightning_prune.data.loader import ResumableLoader
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.dense import Dense
from tests.factories import fit, tiny_dit, tiny_sparsedm


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def sparsedm() -> Any:
    return tiny_sparsedm(label_dropout=0.2, lr_schedule="cosine", warmup_steps=2, decay=1e-3)


def dense() -> Any:
    return Dense(tiny_dit(), Process(schedule="cosine", prediction="v"), label_dropout=0.2)


class SaveAt(Checkpoint):
    """Writes one checkpoint in mid-epoch; a Checkpoint runs after weight averaging."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("make", [sparsedm, dense])
def test_resumed_in_mid_epoch_equals_uninterrupted(make: Any, tmp_path: Path) -> None:
    def ramp() -> list[Any]:
        return [SparsityRamp(["3:4", "2:4"], 0.5)] if make is sparsedm else []

    whole = make()
    fit(whole, tmp_path / "whole", max_steps=8, callbacks=ramp())
    fit(
        make(),
        tmp_path / "first",
        max_steps=8,
        callbacks=[*ramp(), SaveAt(3, tmp_path / "three.ckpt")],
        enable_checkpointing=True,
    )
    resumed = make()
    torch.manual_seed(12345)  # the state of torch's own generator must not matter
    fit(resumed, tmp_path / "second", tmp_path / "three.ckpt", max_steps=8, callbacks=ramp())
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


@pytest.mark.parametrize("compile_", [False, True])
def test_a_finished_run_can_be_made_longer(compile_: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last.ckpt` of 4 steps, extended to 6, equals 6 steps; a compiled network leaves no trace in it."""
    monkeypatch.setattr(torch, "compile", lambda network: network)

    def module() -> Any:
        return tiny_sparsedm(label_dropout=0.2, compile=compile_)

    whole, longer = module(), module()
    fit(whole, tmp_path / "whole", max_steps=6)
    fit(module(), tmp_path / "run", max_steps=4, callbacks=[LastCheckpoint(3)], enable_checkpointing=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert not [name for name in torch.load(last, weights_only=True)["state_dict"] if "_compiled" in name]
    fit(longer, tmp_path / "again", last, max_steps=6)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(longer).items())


def test_seeds_differ(tmp_path: Path) -> None:
    first, second = tiny_sparsedm(seed=0), tiny_sparsedm(seed=1)
    fit(first, tmp_path / "first", max_steps=1)
    fit(second, tmp_path / "second", max_steps=1)
    expected = weights(first)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    plain, evaluated = sparsedm(), sparsedm()
    fit(plain, tmp_path / "plain", max_steps=4)
    fit(
        evaluated,
        tmp_path / "evaluated",
        max_steps=4,
        val_check_interval=1,
        limit_val_batches=1,
        callbacks=[DistanceEvaluation(samples=10, steps=1)],
    )
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(evaluated).items())


def batches(loader: ResumableLoader, count: int) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    while len(found) < count:
        for batch in loader:
            found.append(batch["x"])
            if len(found) == count:
                break
    return found


def test_the_loader_resumes_behind_the_last_batch_it_handed_out() -> None:
    data = EmbeddedFashion().split("held_out")
    whole = batches(ResumableLoader(data, 300, seed=3), 15)
    first = ResumableLoader(data, 300, seed=3)
    batches(first, 8)
    second = ResumableLoader(data, 300, seed=3)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(batches(second, 7), whole[8:], strict=True))


def test_a_short_pass_goes_on_into_the_next_epoch() -> None:
    data = EmbeddedFashion().split("held_out")
    loader = ResumableLoader(data, 500, seed=2)
    found = [next(iter_) for iter_ in [iter(loader)] for _ in range(3)]
    rest = [batch["x"] for batch in loader]
    assert len(found) == 3
    assert len(rest) == len(loader) == 4
    assert torch.equal(rest[1], batches(ResumableLoader(data, 500, seed=2), 5)[4])


@pytest.mark.parametrize(("samples", "world"), [(33, 2), (8, 2), (40, 3), (5, 4)])
def test_in_order_ranks_read_the_batches_of_one_process(samples: int, world: int) -> None:
    data = EmbeddedFashion().split("held_out")
    short = LabelledImages(data.images[:samples], data.labels[:samples])
    one = [b["id"].tolist() for b in ResumableLoader(short, 8, shuffle=False)]
    ranks = [
        [b["id"].tolist() for b in ResumableLoader(short, 8, shuffle=False, rank=rank, world=world)]
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "or processes wait for each other for ever"
    assert sorted({tuple(batch) for batches in ranks for batch in batches}) == sorted(tuple(batch) for batch in one)


def test_ranks_share_an_epoch_without_overlap() -> None:
    data = EmbeddedFashion().split("held_out")
    one = batches(ResumableLoader(data, 64, seed=1), 4)
    parts = [batches(ResumableLoader(data, 32, seed=1, rank=rank, world=2), 4) for rank in (0, 1)]
    for index, batch in enumerate(one):
        both = torch.cat([parts[0][index], parts[1][index]]).flatten(1).sum(1).sort().values
        assert torch.equal(both, batch.flatten(1).sum(1).sort().values)


def test_epochs_differ_and_seeds_differ() -> None:
    data = EmbeddedFashion().split("held_out")
    two_epochs = batches(ResumableLoader(data, 1000, seed=0), 4)
    assert not torch.equal(two_epochs[0], two_epochs[2])
    assert not torch.equal(two_epochs[0], batches(ResumableLoader(data, 1000, seed=1), 1)[0])
