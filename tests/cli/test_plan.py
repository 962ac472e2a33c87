"""`plan`: figures of the published networks, agreement with what a run does, and what cannot be reached."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_prune.cli import main, plan_text
from lightning_prune.cli.export import build_module
from lightning_prune.diffusion.models.uvit import UViT
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.metrics.macs import weight_statistics
from lightning_prune.metrics.training_memory import activation_bytes, optimizer_bytes
from lightning_prune.pruning.masks import baked
from tests.backbones import BACKBONES, Backbone
from tests.factories import DIT_CONFIG, tiny_dit

SMOKE = sorted((Path(__file__).parents[2] / "configs" / "smoke").glob("*.yaml"))
MODELS = "lightning_prune.diffusion.models"
SD_15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def config(folder: Path, family: str, arguments: dict[str, Any], **settings: Any) -> Path:
    """A config file of SparseDM on a network."""
    content = {
        "model": {
            "class_path": "lightning_prune.methods.sparsedm.SparseDM",
            "init_args": {
                "denoiser": {"class_path": f"{MODELS}.{family}", "init_args": arguments},
                "process": {"class_path": "lightning_prune.diffusion.process.Process"},
                **settings,
            },
        },
        "data": {"class_path": "lightning_prune.data.EmbeddedFashion", "init_args": {"batch_size": 4}},
        "trainer": {
            "max_steps": 10,
            "callbacks": [
                {"class_path": "lightning_prune.callbacks.EfficiencyReport", "init_args": {"steps": 5, "guidance": 2.0}}
            ],
        },
    }
    file = folder / "x.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def plan(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> dict[str, Any]:
    assert main(["plan", "--config", str(file), "--json", *options]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def refusal(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> str:
    assert main(["plan", "--config", str(file), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("lightning_prune: error:")]
    assert len(lines) == 1
    return lines[0]


# name: G module, G aten, M parameters, gamma; of Stable Diffusion 1.5 at 512 pixels
COARSE = {
    "D0": (32.9392, 54.7755, 10.5245, 0.0972),
    "D1": (31.3169, 34.1819, 36.8186, 0.0924),
    "D2": (31.4594, 31.8852, 139.9923, 0.0928),
    "D3": (3.7791, 3.7782, 62.2771, 0.0112),
    "M": (6.0285, 6.0498, 97.0381, 0.0178),
    "U3": (12.9049, 12.9024, 162.2413, 0.0670),
    "U2": (75.1374, 75.7724, 258.3309, 0.3816),
    "U1": (79.1231, 83.4118, 71.4131, 0.7076),
    "U0": (66.0427, 98.7832, 18.8106, 0.9997),
}
FINE_GAMMA = ".9997 .9389 .8308 .7104 .6083 .5050 .3844 .2821 .1784 .0698 .0469 .0324"


def test_the_published_block_table_of_stable_diffusion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, config(tmp_path, "unet2d_condition.UNet2DCondition", {"config": SD_15}))
    coarse = found["blocks"]["coarse"]
    figures = {
        row["name"]: (
            round(row["module"] / 1e9, 4),
            round(row["aten"] / 1e9, 4),
            round(row["parameters"] / 1e6, 4),
            round(row["gamma"], 4),
        )
        for row in coarse["rows"]
    }
    assert figures == COARSE
    assert round(coarse["shell"]["module"] / 1e9, 4) == 0.1004
    assert (round(coarse["total"]["module"] / 1e9, 4), round(coarse["total"]["aten"] / 1e9, 4)) == (338.8316, 401.6367)
    gammas = [row["gamma"] for row in found["blocks"]["fine"]["rows"] if row["name"].startswith("u")]
    assert [round(gamma, 4) for gamma in reversed(gammas)] == [float(text) for text in FINE_GAMMA.split()]
    text = plan_text.render(found)
    assert "U2             75.1374  22.18    75.7724  18.87   258.3309   0.3816" in text
    assert "859.52 M" in text


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: b.name)
def test_the_plan_of_every_family_is_what_a_run_has(
    backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reached layers, MACs and zeros at the target agree with the network that is really built and masked."""
    arguments = {"config": dict(backbone.config), **backbone.arguments}
    family = f"{backbone.family.__module__.rpartition('.')[2]}.{backbone.family.__name__}"
    file = config(tmp_path, family, arguments)
    found = plan(capsys, file)
    real: Any = build_module({"model": yaml.safe_load(file.read_text())["model"]})
    with torch.no_grad():
        for parameter in real.denoiser.parameters():
            parameter.uniform_(0.1, 1)
    real.weights_changed()
    target = found["target"]
    assert target["parameters_after"] == weight_statistics(baked(real.denoiser)).nonzero
    assert target["parameters_before"] == sum(p.numel() for p in real.denoiser.parameters())
    assert target["macs_kept"] == real.kept_fraction()["aten"]
    assert target["macs_per_image_before"] == 2 * 5 * real.ledger().macs()
    weights = found["reach"][0]
    assert weights["touched"] == list(real.masks.layers)
    assert target["macs_kept"] == pytest.approx(1 - weights["macs_share"] / 2)
    layers = len(weights["touched"]) + sum(rest["layers"] for rest in weights["not_touched"].values())
    assert layers == len(real.denoiser.anatomy())


def reach(found: dict[str, Any], axis: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [entry for entry in found["reach"] if entry["axis"] == axis]
    return entries[0]


def test_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shape, tie, fused heads and convolutions each have their own."""
    uvit = {"config": {"img_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}}
    found = plan(capsys, config(tmp_path, "uvit.UViT", uvit, dense_layers=["decoder_pred"]))
    assert reach(found, "weights")["not_touched"]["shape"]["names"] == ["patch_embed.proj", "final_layer"]
    assert reach(found, "weights")["not_touched"]["kept"]["names"] == ["decoder_pred"]
    assert set(reach(found, "widths")["not_touched"]["fused"]["names"]) == {
        f"{block}.attn.{layer}" for block in ("in_blocks.0", "mid_block", "out_blocks.0") for layer in ("qkv", "proj")
    }
    by_name = {backbone.name: backbone for backbone in BACKBONES}
    sd21 = {"config": dict(by_name["sd21"].config), "text_tokens": 5}
    widths = reach(plan(capsys, config(tmp_path, "unet2d_condition.UNet2DCondition", sd21)), "widths")["not_touched"]
    assert "down_blocks.0.attentions.0.proj_in" in widths["tie"]["names"]
    assert "down_blocks.0.downsamplers.0.conv" in widths["convolution"]["names"]
    sd3 = {"config": dict(by_name["sd3"].config), "text_tokens": 5}
    found = plan(capsys, config(tmp_path, "sd3.SD3", sd3))
    assert "transformer_blocks.0.attn.to_q" in reach(found, "widths")["not_touched"]["fused"]["names"]
    assert "joint blocks" in reach(found, "gates")["what"]
    assert reach(found, "gates")["macs_share"] == 0


def test_no_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **DIT_CONFIG}))
    found = plan(capsys, config(tmp_path, "dit.DiT", {"weights": str(stored)}))
    assert found["network"]["parameters"] == sum(p.numel() for p in tiny_dit().parameters())


def test_options_of_fit_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, "dit.DiT", {"config": DIT_CONFIG})
    dense = plan(capsys, file, "--model.init_args.sparsity", "1:1")
    assert dense["target"]["macs_kept"] == 1
    assert plan(capsys, file, "--model.init_args.sparsity", "1:4")["target"]["macs_kept"] < 0.6
    assert plan(capsys, file, "--data.init_args.batch_size", "8")["training_memory"]["batch_size"] == 8


def test_a_target_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, "dit.DiT", {"config": DIT_CONFIG})
    kept = plan(capsys, file)["target"]["macs_kept"]
    plan(capsys, file, "--macs_kept", str(kept))
    line = refusal(capsys, file, "--macs_kept", str(kept - 0.01))
    assert "cannot be reached: 2:4 on everything SparseDM may touch" in line
    assert f"{kept:.4f}" in line
    assert "no layer is left to mask in groups of 4096" in refusal(capsys, file, "--model.init_args.sparsity", "2:4096")


@pytest.mark.parametrize("option", [["--no_such"], ["--macs_kept", "half"], ["--model.init_args.sparsity", "5:4"]])
def test_bad_options(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert option[-1].lstrip("-") in refusal(capsys, config(tmp_path, "dit.DiT", {"config": DIT_CONFIG}), *option)


def test_a_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in refusal(capsys, tmp_path / "none.yaml")


# Memory


@cache
def skeleton() -> UViT:
    with without_weights():
        return UViT(config={"img_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2})


def saved_by_a_real_step(denoiser: UViT, batch: int) -> int:
    """Bytes that a step on real tensors saves, parameters and duplicates left out."""
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in own:
            saved[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoiser(torch.randn(batch, *denoiser.sample_shape), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_activations_are_what_a_real_step_saves() -> None:
    real = saved_by_a_real_step(UViT(config={"img_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}), batch=3)
    assert activation_bytes(skeleton(), 3, 4) == pytest.approx(real, rel=0.03)
    assert activation_bytes(skeleton(), 6, 2) == activation_bytes(skeleton(), 3, 4)


@pytest.mark.parametrize(("make", "copies"), [(torch.optim.AdamW, 2), (torch.optim.SGD, 0), (torch.optim.Adagrad, 1)])
def test_optimizer_state(make: Any, copies: int) -> None:
    parameters = list(skeleton().parameters())
    size = sum(p.nbytes for p in parameters)
    assert optimizer_bytes(make, parameters) == pytest.approx(copies * size, rel=0.01, abs=1)


@pytest.mark.parametrize("file", SMOKE, ids=lambda p: p.stem)
def test_every_smoke_config_is_planned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, file)
    assert 0 < found["target"]["macs_kept"] <= 1
    assert found["training_memory"]["total"] > 0
    assert found["method"] in plan_text.render(found)
