"""Width surgery: slim equals masked, nothing cut changes nothing, costs fall as predicted, tensors are shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.widths import width_groups
from lightning_prune.metrics.macs import Ledger, count
from lightning_prune.protocols import InputError, WidthGroup
from lightning_prune.pruning.stages import channels_removed, heads_removed, published_sparsities, stage_means
from lightning_prune.pruning.structural import Width, masked, slim
from tests.factories import UNET_CONFIG, tiny_dit, tiny_unet
from tests.pruning.test_stages import divided

CONDITIONED: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
FAMILIES = ["dit", "unet2d", "scale-shift", "conditioned"]


def network_and_inputs(family: str) -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    t = torch.tensor([3, 700])
    if family == "dit":
        return tiny_dit().network, {"hidden_states": torch.randn(2, 1, 32, 32), "timestep": t, "class_labels": t % 10}
    if family == "conditioned":
        hidden = {"sample": torch.randn(2, 2, 16, 16), "encoder_hidden_states": torch.randn(2, 5, 12)}
        return UNet2DConditionModel(**CONDITIONED), {**hidden, "timestep": t}
    changes = {"resnet_time_scale_shift": "scale_shift"} if family == "scale-shift" else {}
    network = UNet2DModel(**{**UNET_CONFIG, **changes})
    return network, {"sample": torch.randn(2, 1, 32, 32), "timestep": t, "class_labels": t % 10}


def output(network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.eval()(**inputs).sample
    return found


def some_width(network: nn.Module, group: WidthGroup, kept: tuple[int, ...]) -> Width:
    """A width with output weights of its own, as compensation leaves them."""
    layer = network.get_submodule(group.output)
    generator = torch.Generator().manual_seed(len(kept))
    rows = len(layer.get_parameter("weight"))
    weight = torch.randn(rows, len(kept) * group.columns, generator=generator) * 0.05
    return Width(kept, weight, torch.randn(rows, generator=generator) * 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_slim_equals_masked(family: str) -> None:
    network, inputs = network_and_inputs(family)
    groups = width_groups(network)
    dense = output(network, inputs)
    for group in groups:
        kept = tuple(range(0, group.units, 2)) if group.units > 2 else (1,)
        for width in (Width(kept), some_width(network, group, kept)):
            with masked(network, group, width):
                expected = output(network, inputs)
            assert not torch.allclose(expected, dense, atol=1e-6), f"{group.name} does nothing"
            found = output(slim(network, groups, {group.name: width}), inputs)
            assert (found - expected).abs().max() < 1e-5, group.name
    assert torch.equal(output(network, inputs), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_changes_nothing(family: str) -> None:
    network, inputs = network_and_inputs(family)
    groups = width_groups(network)
    whole = slim(network, groups, {group.name: Width(tuple(range(group.units))) for group in groups})
    assert torch.equal(output(whole, inputs), output(network, inputs))
    assert {p.data_ptr() for p in whole.parameters()} == {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_cut_is_shared_and_what_is_cut_is_smaller(family: str) -> None:
    network, inputs = network_and_inputs(family)
    groups = width_groups(network)
    copy = slim(network, groups, {group.name: Width((0,)) for group in groups})
    cut = {c.parameter for group in groups for c in group.cuts}
    assert cut
    for name, parameter in network.named_parameters():
        other = copy.get_parameter(name)
        assert (other is parameter) == (name not in cut)
        assert other.numel() <= parameter.numel()
    assert torch.isfinite(output(copy, inputs)).all()
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_unit_saves_its_share(family: str) -> None:
    """MACs are linear in the units that stay, so predictions from the dense ledger are exact."""
    network, inputs = network_and_inputs(family)
    dense = count(network, **inputs)
    for group in width_groups(network):
        layers = {c.parameter.rpartition(".")[0] for c in group.cuts} | {group.name}
        by_layer = dense.by_layer()
        per_unit = sum(by_layer.get(layer, 0) for layer in layers) // group.units
        kept = group.units // 2
        ledger = count(slim(network, [group], {group.name: Width(tuple(range(kept)))}), **inputs)
        assert dense.macs() - ledger.macs() == (group.units - kept) * per_unit


def test_anatomy_of_a_transformer() -> None:
    groups = tiny_dit().groups()
    assert [(g.name, g.kind, g.units, g.channels) for g in groups[:2]] == [
        ("transformer_blocks.0.attn1", "heads", 2, 16),
        ("transformer_blocks.0.ff", "channels", 128, 1),
    ]
    assert groups[0].output == "transformer_blocks.0.attn1.to_out.0"
    assert {c.parameter for c in groups[1].cuts} == {
        "transformer_blocks.0.ff.net.0.proj.weight",
        "transformer_blocks.0.ff.net.0.proj.bias",
        "transformer_blocks.0.ff.net.2.weight",
    }


def test_anatomy_of_a_unet() -> None:
    groups = {g.name: g for g in tiny_unet().groups()}
    resnet = groups["down_blocks.0.resnets.0"]
    assert (resnet.kind, resnet.units, resnet.channels, resnet.taps) == ("norm-groups", 4, 2, 9)
    assert {c.parameter.split(".", 4)[4] for c in resnet.cuts} == {
        *("conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias"),
        *("time_emb_proj.weight", "time_emb_proj.bias", "conv2.weight"),
    }
    assert groups["mid_block.attentions.0"].kind == "heads"


def test_the_two_halves_of_a_gate_go_together() -> None:
    network = UNet2DConditionModel(**CONDITIONED)
    group = next(g for g in width_groups(network) if g.kind == "channels")
    first = next(c for c in group.cuts if c.parameter.endswith("net.0.proj.weight"))
    assert first.repeats == 2
    projection = network.get_parameter(first.parameter)
    cut = slim(network, [group], {group.name: Width((0, 3))}).get_parameter(first.parameter)
    half = len(projection) // 2
    assert torch.equal(cut, projection[[0, 3, half, half + 3]])


def test_a_single_head_is_no_group_and_an_empty_width_is_refused() -> None:
    network = DiT(config={**dict(tiny_dit().config()), "num_attention_heads": 1}).network
    groups = width_groups(network)
    assert {g.kind for g in groups} == {"channels"}
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.ff .* cannot keep \[\]"):
        slim(network, groups, {groups[0].name: Width(())})
    with pytest.raises(InputError, match="nothing: no width group"):
        slim(network, groups, {"nothing": Width((0,))})


def test_the_embedded_networks_have_groups() -> None:
    dit = DiT(weights="embedded:fashion_dit").groups()
    assert [(g.kind, g.units) for g in dit] == [("heads", 4), ("channels", 512)] * 6
    unet = UNet2D(
        config={
            **UNET_CONFIG,
            "block_out_channels": [16, 32, 80, 112],
            "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
            "norm_num_groups": 8,
            "attention_head_dim": 16,
        }
    ).groups()
    assert {(g.kind, g.units) for g in unet} == {("norm-groups", 8), ("heads", 7)}


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = build()
    return network


def dit_xl() -> nn.Module:
    return on_meta(
        lambda: DiTTransformer2DModel(
            num_layers=28,
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            sample_size=32,
            num_embeds_ada_norm=1000,
        )
    )


def dit_xl_ledger(network: nn.Module) -> Ledger:
    inputs = {
        "timestep": torch.zeros(1, device="meta"),
        "class_labels": torch.zeros(1, dtype=torch.long, device="meta"),
    }
    return count(network, torch.zeros(1, 4, 32, 32, device="meta"), **inputs)


def test_dit_xl_2_has_the_published_targets() -> None:
    network = dit_xl()
    groups = width_groups(network)
    assert [(g.kind, g.units) for g in groups] == [("heads", 16), ("channels", 4608)] * 28
    matrices = [c.parameter for g in groups for c in g.cuts if c.parameter.endswith("weight")]
    assert sum(network.get_parameter(name).numel() for name in matrices) == 445_906_944
    slimmer = slim(network, groups, {g.name: Width(tuple(range(g.units // 2))) for g in groups})
    ledger = dit_xl_ledger(slimmer)
    attention = 28 * 2 * 256 * 256 * 1152
    assert ledger.by_kind()["attention"] == attention // 2
    assert dit_xl_ledger(network).macs() - ledger.macs() == (445_906_944 * 256 + attention) // 2


@pytest.mark.parametrize(("steps", "average", "dense", "tera"), [(50, 0.33, 5.72, 3.9205), (20, 0.30, 2.29, 1.6411)])
def test_the_two_rows_of_the_paper_from_slimmed_networks(steps: int, average: float, dense: float, tera: float) -> None:
    """3.92 T and 1.64 T: the printed dense total times what is left of the linear layers that are cut."""
    _, stages, score = divided("linear", steps)
    sparsities = published_sparsities(stage_means(score, stages), stages, average)
    kept = sum(stage.steps * retained(sparsity) for stage, sparsity in zip(stages, sparsities, strict=True))
    assert dense * kept / steps == pytest.approx(tera, abs=1e-4)


def retained(sparsity: float) -> float:
    """What is left of the MACs of the layers that are cut, counted on DiT-XL/2 and its slim copy."""
    network = dit_xl()
    groups = width_groups(network)

    def linear(one: nn.Module) -> int:
        by_layer = dit_xl_ledger(one).by_layer("linear")
        return sum(macs for name, macs in by_layer.items() if ".attn1." in name or ".ff." in name)

    cut = {"heads": heads_removed, "channels": channels_removed}
    widths = {g.name: Width(tuple(range(g.units - cut[g.kind](g.units, sparsity)))) for g in groups}
    return linear(slim(network, groups, widths)) / linear(network)


@pytest.mark.parametrize(("sparsity", "share"), [(0.2, 0.8042), (0.3, 0.7167), (0.4, 0.6083), (0.5, 0.5)])
def test_what_slim_networks_retain_at_a_ratio(sparsity: float, share: float) -> None:
    assert retained(sparsity) == pytest.approx(share, abs=1e-4)


def test_a_network_cut_uniformly_by_30_percent_is_the_row_of_diff_pruning() -> None:
    assert round(retained(0.3) * 5.72, 2) == 4.10


def test_sdxl_has_the_published_targets() -> None:
    network = on_meta(
        lambda: UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    )
    groups = width_groups(network)
    heads = [g for g in groups if g.kind == "heads"]
    channels = [g for g in groups if g.kind == "channels"]
    assert len(heads) == 2 * 70
    assert {(g.units, g.channels) for g in heads} == {(10, 64), (20, 64)}
    assert sorted(g.units for g in channels) == [2560] * 10 + [5120] * 60
    matrices = {c.parameter for g in (*heads, *channels) for c in g.cuts if c.parameter.endswith("weight")}
    assert sum(network.get_parameter(name).numel() for name in matrices) == pytest.approx(2.18e9, rel=0.01)
    slimmer = slim(network, groups, {g.name: Width((0, 1)) for g in groups})
    block = slimmer.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0")
    assert block.attn1.heads == 2
    assert block.ff.net[0].proj.weight.shape == (4, 640)
