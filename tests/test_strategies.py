"""Strategies: the shipped ones parse on top of a config, what cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_prune.cli import main
from lightning_prune.protocols import InputError
from lightning_prune.sharding import FSDP2, check_strategy
from lightning_prune.sharding.network import entries, skeleton
from tests.factories import tiny_dit, tiny_sparsedm, tiny_unet

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted((CONFIGS / "strategies").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_strategy_parses_on_top_of_a_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"] == file.stem


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (FSDPStrategy, {}, "FSDPStrategy"),
        (ModelParallelStrategy, {}, "write fsdp2"),
        (DeepSpeedStrategy, {}, "DeepSpeedStrategy"),
        (FSDP2, {"sharded": False}, "Method needs its network in one piece"),
        (FSDP2, {"compiled": True}, r"model\.compile"),
        (DDPStrategy, {"sharded": False, "compiled": True}, None),
        (SingleDeviceStrategy, {"sharded": False}, None),
        (FSDP2, {}, None),
    ],
)
def test_what_cannot_work_is_refused_by_name(cls: type[Strategy], settings: dict[str, Any], named: str | None) -> None:
    strategy = cls.__new__(cls)  # DeepSpeed's constructor wants DeepSpeed
    given = {"sharded": True, "compiled": False, **settings}
    if named is None:
        check_strategy(strategy, "Method", **given)
    else:
        with pytest.raises(InputError, match=named):
            check_strategy(strategy, "Method", **given)


def test_a_refused_strategy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", str(CONFIGS / "smoke" / "sparsedm_dit.yaml"), "--run.root", str(tmp_path / "runs")]
    assert main([*command, "--trainer.strategy", "fsdp2", "--model.init_args.compile", "true"]) == 2
    assert "model.compile" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_skeleton_has_structure_and_buffers_but_no_weights() -> None:
    module = tiny_sparsedm()
    copy = skeleton(module.denoiser)
    assert all(p.is_meta for p in copy.parameters())
    assert not any(p.is_meta for p in module.denoiser.parameters())
    assert not any(b.is_meta for b in copy.buffers())
    assert [type(m) for m in copy.modules()] == [type(m) for m in module.denoiser.modules()]


def test_modules_entered_from_outside_their_block_are_found() -> None:
    import torch

    for denoiser, expected in ((tiny_dit(), ["transformer_blocks.0.norm1.emb"]), (tiny_unet(), [])):
        x, t = torch.zeros(1, *denoiser.sample_shape), torch.zeros(1, dtype=torch.long)
        with entries(denoiser.network) as found, torch.no_grad():
            denoiser(x, t, t)
        assert found == expected
