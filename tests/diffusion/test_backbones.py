"""One conformance suite for every backbone family: storing, loading, conditions, and the untouched network's output."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.diffusion import conditions
from lightning_prune.diffusion.gating import install, remove
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.uvit import UViT
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.export import load, save_artifact
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units
from lightning_prune.pruning.structural import Width, slim
from tests.backbones import BACKBONES, TOKENS, Backbone, uncovered_families

every_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: b.name)
TEXT = [b for b in BACKBONES if b.arguments]


def inputs(backbone: Backbone, denoiser: Denoiser) -> tuple[Tensor, Tensor, Any]:
    batch = backbone.batch(denoiser)
    return batch["x"], torch.tensor([3, 700]), batch["cond"]


def stock_output(backbone: Backbone, network: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """What a user of the untouched network calls; for Flux with patches made as its pipeline makes them."""
    side = x.shape[-1]
    if backbone.name == "dit":
        output = network(x, timestep=t, class_labels=cond).sample[:, :4]
    elif backbone.name == "ddpm":
        output = network(x, t, class_labels=cond).sample
    elif backbone.name in ("sd15", "sd21"):
        output = network(x, t, cond["prompt_embeds"]).sample
    elif backbone.name == "sdxl":
        ids = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * len(x))
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": ids}
        output = network(x, t, cond["prompt_embeds"], added_cond_kwargs=added).sample
    elif backbone.name == "pixart":
        added = {"resolution": None, "aspect_ratio": None}
        prompt, mask = cond["prompt_embeds"], cond["mask"]
        output = network(x, prompt, t, added_cond_kwargs=added, encoder_attention_mask=mask).sample[:, :4]
    elif backbone.name == "sd3":
        output = network(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], t).sample
    elif backbone.name == "flux":
        from diffusers import FluxPipeline

        packed = network(
            FluxPipeline._pack_latents(x, len(x), x.shape[1], side, side),
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            timestep=t / 1000,
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x), side // 2, side // 2, x.device, x.dtype),
            txt_ids=torch.zeros(TOKENS, 3),
            guidance=torch.full((len(x),), 3.5),
        ).sample
        output = FluxPipeline._unpack_latents(packed, 8 * side, 8 * side, 8)
    elif backbone.name == "uvit_text":
        output = network(x, t, prompt=cond["prompt_embeds"])
    else:
        output = network(x, t, labels=cond)
    result: Tensor = output
    return result


def test_every_family_has_a_tiny_network() -> None:
    assert uncovered_families() == set()


@every_backbone
@torch.no_grad()
def test_a_stored_pipeline_gives_the_untouched_networks_output(backbone: Backbone, tmp_path: Path) -> None:
    """Bit for bit: as loaded, and with every mask dense."""
    denoiser = backbone.load(backbone.save(tmp_path))
    assert type(denoiser.network) is backbone.family.network_class
    stock_class: Any = backbone.family.network_class
    stock = stock_class.from_pretrained(tmp_path, subfolder=backbone.component or None).eval()
    x, t, cond = inputs(backbone, denoiser)
    expected = stock_output(backbone, stock, x, t, cond)
    assert expected.std() > 0
    assert expected.shape == x.shape
    assert torch.equal(denoiser(x, t, cond), expected)
    masks = MaskSet(denoiser.network, [u for u in denoiser.anatomy() if u.group_size % 4 == 0], Sparsity(2, 4))
    assert not torch.equal(denoiser(x, t, cond), expected)
    masks.set_sparsity(None)
    assert torch.equal(denoiser(x, t, cond), expected)


@every_backbone
def test_every_weight_takes_part(backbone: Backbone) -> None:
    """A layer that the adapter leaves out would get no gradient."""
    denoiser = backbone.build()
    denoiser.network.load_state_dict(backbone.network().state_dict())
    x, t, cond = inputs(backbone, denoiser)
    denoiser(x, t, cond).square().mean().backward()
    idle = {name for name, p in denoiser.network.named_parameters() if p.grad is None or not p.grad.any()}
    # The last joint block of SD3 gives no prompt on, so nothing asks on its behalf.
    queries = {
        f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj.bias", "add_q_proj.weight", "norm_added_q.weight")
    }
    assert idle == (queries if backbone.name == "sd3" else set())


@every_backbone
@torch.no_grad()
def test_conditions(backbone: Backbone) -> None:
    """Stacked conditions act row by row, and the null condition is of the same kind."""
    denoiser = backbone.build().eval()
    denoiser.network.load_state_dict(backbone.network().state_dict())
    x, t, cond = inputs(backbone, denoiser)
    null = denoiser.null_condition(cond)
    both = denoiser(torch.cat([x, x]), torch.cat([t, t]), conditions.stack(cond, null))
    torch.testing.assert_close(both[:2], denoiser(x, t, cond), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[2:], denoiser(x, t, null), rtol=1e-4, atol=1e-5)
    mixed = conditions.replace(cond, torch.tensor([False, True]), null)
    torch.testing.assert_close(denoiser(x, t, mixed), torch.stack([both[0], both[3]]), rtol=1e-4, atol=1e-5)
    if backbone.name != "uvit":
        assert not torch.allclose(both[:2], both[2:])


@every_backbone
def test_anatomy_and_default_dense(backbone: Backbone) -> None:
    """Names are those of the network, patterns match, and masks reach most of the products."""
    denoiser = backbone.build()
    units = denoiser.anatomy()
    for unit in units:
        weight = denoiser.network.get_parameter(unit.parameters[0])
        assert weight.shape[1] == unit.group_size
    chosen = select_units(units, None, denoiser.default_dense(), 4)
    assert 0 < len(chosen) < len(units)
    ledger = count_denoiser(denoiser)
    assert ledger.masked_share({unit.name: Sparsity(2, 4) for unit in chosen}) > 0.5


@every_backbone
def test_counted_without_weights(backbone: Backbone, tmp_path: Path) -> None:
    """A skeleton of a stored network costs what the network costs, and reads no weight file."""
    backbone.save(tmp_path)
    whole = count_denoiser(backbone.load(tmp_path))
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with without_weights():
        skeleton = backbone.load(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert count_denoiser(skeleton) == whole


@every_backbone
@torch.no_grad()
def test_an_artifact_is_the_same_network(backbone: Backbone, tmp_path: Path) -> None:
    denoiser = backbone.build().eval()
    x, t, cond = inputs(backbone, denoiser)
    again = load(save_artifact(denoiser, tmp_path / "artifact", "dense", {}))
    assert type(again) is type(denoiser)
    assert again.arguments() == denoiser.arguments()
    assert again.sample_shape == denoiser.sample_shape
    assert torch.equal(again(x, t, cond), denoiser(x, t, cond))


@every_backbone
@torch.no_grad()
def test_open_gates_change_nothing_and_closed_ones_do(backbone: Backbone) -> None:
    denoiser = backbone.build().eval()
    denoiser.network.load_state_dict(backbone.network().state_dict())
    if backbone.name in ("sd3", "flux"):
        with pytest.raises(InputError, match="joint blocks of image and prompt have no gates"):
            denoiser.blocks("block")
        return
    x, t, cond = inputs(backbone, denoiser)
    expected, later = denoiser(x, t, cond), denoiser(x, t - 2, cond)
    unet = "mid_block" in dict(denoiser.network.named_children()) and not isinstance(denoiser, UViT)
    for granularity in ("coarse", "fine") if unet else ("block", "half"):
        graph = denoiser.blocks(granularity)
        for mode in graph.cache_modes:
            gating = install(denoiser.network, graph, mode)
            wired = graph.in_mode(mode)
            assert torch.equal(denoiser(x, t, cond), expected)
            output, slots = gating.step(lambda: denoiser(x, t, cond), graph.full(), gating.slots, t.float())
            assert torch.equal(output, expected)
            again, _ = gating.step(lambda: denoiser(x, t - 2, cond), graph.full(), slots, t.float())
            assert torch.equal(again, later)
            for position in range(len(graph)):
                row = wired.running([i != position for i in range(len(graph))])
                skipped, _ = gating.step(lambda: denoiser(x, t - 2, cond), row, slots, t.float())
                assert not torch.equal(skipped, later), f"{granularity} {mode}: {graph.names[position]} has no effect"
            remove(denoiser.network)


@every_backbone
@torch.no_grad()
def test_full_widths_change_nothing_and_cut_ones_fit(backbone: Backbone) -> None:
    denoiser = backbone.build().eval()
    denoiser.network.load_state_dict(backbone.network().state_dict())
    x, t, cond = inputs(backbone, denoiser)
    expected, groups = denoiser(x, t, cond), denoiser.groups()
    whole = copy(denoiser, slim(denoiser.network, groups, {g.name: Width(tuple(range(g.units))) for g in groups}))
    assert torch.equal(whole(x, t, cond), expected)
    if groups:
        cut = copy(denoiser, slim(denoiser.network, groups, {g.name: Width(tuple(range(1, g.units))) for g in groups}))
        assert cut(x, t, cond).shape == expected.shape
        assert not torch.equal(cut(x, t, cond), expected)
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())


def copy(denoiser: Denoiser, network: Any) -> Denoiser:
    """The denoiser around another network."""
    found = deepcopy(denoiser)
    found.network = network
    return found
