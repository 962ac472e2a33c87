"""SparseDM and Dense under stages 1 to 3 of DeepSpeed in two gloo processes, beside DDP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import smoke
from tests.distributed.smoke import INVARIANT, checkpoint, close, metrics

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is missing; make deepspeed-test"
    ),
]
RAMP = {
    "class_path": "lightning_prune.callbacks.SparsityRamp",
    "init_args": {"chain": ["3:4", "2:4"], "reached_at": 0.5},
}
ON_CPU = {"DS_ACCELERATOR": "cpu"}
STAGES = (1, 2, 3)


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"class_path": "tests.distributed.zero_on_cpu.ZeroOnCPU", "init_args": {"stage": stage, **settings}}


def fit(root: Path, name: str, strategy: Any, *arguments: str, **settings: Any) -> Path:
    given = {"gradient_clip_val": 0.5, "environment": ON_CPU, **settings}
    if "config" not in settings:
        # A decay strong enough that a run without it differs.
        arguments = ("--model.init_args.decay", "0.05", *arguments)
        given = {"callbacks": [RAMP, INVARIANT], **given}
    return smoke.fit(root, name, strategy, *arguments, **given)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, averages and optimizer states of two checkpoints."""
    close(a["state_dict"], b["state_dict"])
    close(a["current_model_state"], b["current_model_state"])
    close(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])
    assert int(a["averaging_state"]["n_averaged"]) == int(b["averaging_state"]["n_averaged"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def replicated(root: Path) -> Path:
    return fit(root, "ddp", "ddp")


@pytest.fixture(scope="module")
def spread(root: Path) -> dict[int, Path]:
    return {stage: fit(root, f"zero{stage}", zero(stage)) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_masks(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    names = ("loss", "val_loss")
    assert metrics(spread[stage], *names) == pytest.approx(metrics(replicated, *names), rel=1e-4)
    assert metrics(spread[stage], "mask_violations") == [0.0] * 4


@pytest.mark.parametrize("stage", STAGES)
def test_one_checkpoint_for_all(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    same(checkpoint(replicated), checkpoint(spread[stage]))


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_holds_the_pattern(replicated: Path, spread: dict[int, Path], stage: int) -> None:
    import lightning_prune

    ours, theirs = (lightning_prune.load(run / "artifact").state_dict() for run in (spread[stage], replicated))
    masked = {name for name, tensor in theirs.items() if (tensor == 0).float().mean() == 0.5}
    assert masked
    for name in masked:
        assert int(((ours[name].unflatten(1, (-1, 4)) != 0).sum(-1) > 2).sum()) == 0
        assert ((ours[name] == 0) == (theirs[name] == 0)).float().mean() > 0.999


def test_a_run_goes_on_under_another_stage(spread: dict[int, Path], root: Path) -> None:
    longer: dict[str, Any] = {"max_steps": 6, "limit_val_batches": 0}
    last = {stage: str(spread[stage] / "checkpoints" / "last.ckpt") for stage in STAGES}
    a = fit(root, "2-to-3", zero(3), "--ckpt_path", last[2], **longer)
    b = fit(root, "3-to-2", zero(2), "--ckpt_path", last[3], **longer)
    same(checkpoint(a), checkpoint(b))
    assert checkpoint(a)["global_step"] == 6


def test_small_weights_that_stage_3_keeps_whole(replicated: Path, root: Path) -> None:
    same(checkpoint(replicated), checkpoint(fit(root, "whole", zero(3, keep_whole=None))))


def test_accumulated_gradients_are_divided_once(root: Path) -> None:
    """Adam would not notice."""
    settings: dict[str, Any] = {
        "config": "dense_dit",
        "callbacks": [],
        "limit_val_batches": 0,
        "gradient_clip_val": None,
    }
    given = (
        *("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.1"),
        *("--trainer.accumulate_grad_batches", "2", "--model.init_args.optimizer.momentum", "0.9"),
    )
    a, b = (fit(root, f"sgd-{name}", s, *given, **settings) for name, s in (("ddp", "ddp"), ("zero2", zero(2))))
    close(checkpoint(a)["state_dict"], checkpoint(b)["state_dict"])
    close(checkpoint(a)["optimizer_states"][0]["state"], checkpoint(b)["optimizer_states"][0]["state"])


def test_optimizers_of_whole_weights_are_refused(root: Path) -> None:
    optimizer = ("--model.init_args.optimizer", "timm.optim.Muon")
    done = smoke.command(root, "muon", zero(2), *optimizer, environment=ON_CPU)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "model.optimizer: Muon under DeepSpeed" in done.stderr
