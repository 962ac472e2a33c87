"""Stages as stock diffusers folders through `lightning_prune export`, or a refusal that names the width."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from lightning_prune.cli import main
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.export import save_artifact
from lightning_prune.pruning.structural import Width, slim
from tests.factories import tiny_dit


def artifact(folder: Path, cut: dict[str, Width]) -> StagedDenoiser:
    dense = tiny_dit()
    networks = [slim(dense.network, dense.groups(), {}), slim(dense.network, dense.groups(), cut)]
    stages = StagedDenoiser(dense, networks, [2, 2]).eval()
    save_artifact(stages, folder, "mosaicdiff", {})
    return stages


def export(tmp_path: Path) -> int:
    source, output = str(tmp_path / "artifact"), str(tmp_path / "stock")
    return main(["export", "--format", "homogeneous", "--artifact", source, "--output", output])


def test_full_widths_are_read_by_diffusers(tmp_path: Path) -> None:
    stages = artifact(tmp_path / "artifact", {})
    assert export(tmp_path) == 0
    x, t, cond = torch.randn(2, *stages.sample_shape), torch.tensor([5, 700]), torch.tensor([1, 2])
    for number, network in enumerate(stages.networks):
        stock = DiTTransformer2DModel.from_pretrained(tmp_path / "stock" / f"stage-{number}").eval()
        with torch.no_grad():
            assert torch.equal(stock(x, t, cond).sample, network(x, t, cond).sample)


def test_a_width_no_configuration_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = tiny_dit().groups()[0]
    artifact(tmp_path / "artifact", {group.name: Width(tuple(range(group.units - 1)))})
    assert export(tmp_path) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"stage 1 keeps {group.units - 1} of {group.units} {group.kind} of {group.name}" in line
    assert not (tmp_path / "stock").exists()


def test_an_artifact_without_stages_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_artifact(tiny_dit(), tmp_path / "artifact", "dense", {})
    assert export(tmp_path) == 2
    assert "holds no stages" in capsys.readouterr().err.strip().splitlines()[-1]
