"""Strategies: the shipped ones parse on top of a config, what cannot work is refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from timm.optim.muon import Muon

from lightning_prune.cli import main
from lightning_prune.methods.sparsedm.calibration import Calibration
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import masked_layers
from lightning_prune.sharding import FSDP2, ZeRO, check_optimizer, check_strategy
from lightning_prune.sharding.network import entries, skeleton, whole
from tests.factories import tiny_dit, tiny_sparsedm, tiny_unet

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("file", sorted((CONFIGS / "strategies").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_strategy_parses_on_top_of_a_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"] == {"deepspeed": "zero2"}.get(
        file.stem, file.stem
    )


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (FSDPStrategy, {}, "FSDPStrategy"),
        (ModelParallelStrategy, {}, "write fsdp2"),
        (DeepSpeedStrategy, {}, "DeepSpeedStrategy saves folders"),
        (ZeRO, {"whole_for": "to cut"}, "Method needs its network in one piece to cut; write ddp"),
        (ZeRO, {"compiled": True}, r"model\.compile"),
        (ZeRO, {"fitting": False}, "write ddp to evaluate"),
        (ZeRO, {"precision": "bf16-mixed"}, r"trainer\.precision: bf16-mixed"),
        (ZeRO, {}, None),
        (FSDP2, {"whole_for": "to cut"}, "Method needs its network in one piece to cut; write ddp"),
        (FSDP2, {"compiled": True}, r"model\.compile"),
        (DDPStrategy, {"whole_for": "to cut", "compiled": True}, None),
        (SingleDeviceStrategy, {"whole_for": "to cut"}, None),
        (FSDP2, {}, None),
    ],
)
def test_what_cannot_work_is_refused_by_name(cls: type[Strategy], settings: dict[str, Any], named: str | None) -> None:
    strategy = cls.__new__(cls)  # DeepSpeed's constructor wants DeepSpeed
    given: dict[str, Any] = {"whole_for": None, "compiled": False, "fitting": True, "precision": "32-true", **settings}
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


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("dipgo_dit", "DiPGO needs its network in one piece to call its blocks"),
        ("dipgo_rule", "GateRule needs its network in one piece to call its blocks"),
        ("mosaicdiff_dit", "MosaicDiff needs its network in one piece to cut units"),
    ],
)
def test_methods_that_need_the_whole_network_say_what_for(
    config: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", str(CONFIGS / "smoke" / f"{config}.yaml"), "--run.root", str(tmp_path / "runs")]
    assert main([*command, "--trainer.strategy", "fsdp2"]) == 2
    said = capsys.readouterr().err
    assert "trainer.strategy: FSDP2" in said
    assert named in said
    assert not (tmp_path / "runs").exists()


def test_a_network_in_one_piece_has_the_masks_of_the_weights_now() -> None:
    """Those of the structure are of the weights at its making."""
    module = tiny_sparsedm()
    structure = skeleton(module.denoiser)
    with torch.no_grad():
        for parameter in module.denoiser.parameters():
            parameter.copy_(torch.randn_like(parameter))
    module.weights_changed()
    copy = masked_layers(whole(module.denoiser, structure, torch.device("cpu")).network)
    assert copy.keys() == module.masks.layers.keys()
    for name, layer in module.masks.layers.items():
        assert torch.equal(copy[name].effective_weight(), layer.effective_weight())
    module.set_sparsity(Sparsity(1, 4))
    copy = masked_layers(whole(module.denoiser, structure, torch.device("cpu")).network)
    assert {str(layer.sparsity) for layer in copy.values()} == {"1:4"}


def test_deepspeed_steps_on_flat_pieces() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    check_optimizer(torch.optim.AdamW([weight]))
    with pytest.raises(InputError, match="Muon under DeepSpeed"):
        check_optimizer(Muon([weight]))
    with pytest.raises(InputError, match="several groups"):
        check_optimizer(torch.optim.SGD([{"params": [weight]}, {"params": [torch.nn.Parameter(torch.zeros(2))]}]))


def test_deepspeed_that_is_missing_and_stages_that_are_none_are_one_line() -> None:
    with pytest.raises(InputError, match="stage 4"):
        ZeRO(stage=4)
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(InputError, match=r"pip install 'lightning_prune\[deepspeed\]'"):
            ZeRO()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"freeze_masks_at": 0.5}, r"model\.freeze_masks_at"),
        ({"mask_scores": "obs", "calibration": Calibration(compensate=True)}, r"model\.calibration\.compensate"),
    ],
)
def test_what_reaches_past_deepspeed_is_refused(arguments: dict[str, Any], named: str) -> None:
    module = tiny_sparsedm(**arguments)
    module._trainer = SimpleNamespace(strategy=ZeRO.__new__(ZeRO))  # type: ignore[assignment]
    with pytest.raises(InputError, match=named):
        module.setup("fit")


def test_modules_entered_from_outside_their_block_are_found() -> None:
    for denoiser, expected in ((tiny_dit(), ["transformer_blocks.0.norm1.emb"]), (tiny_unet(), [])):
        x, t = torch.zeros(1, *denoiser.sample_shape), torch.zeros(1, dtype=torch.long)
        with entries(denoiser.network) as found, torch.no_grad():
            denoiser(x, t, t)
        assert found == expected
