"""Guidance as each family's own pipeline does it: our samples beside those of diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.routing import PipelineRouter, StagedDenoiser
from lightning_prune.diffusion.samplers import guided, initial_noise, sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.protocols import InputError
from lightning_prune.pruning.structural import Width, slim
from tests.backbones import BACKBONES, LATENT_DIT, TEXT, Backbone

BY_NAME = {backbone.name: backbone for backbone in BACKBONES}
PIPELINES = ["sd15", "sd21", "sdxl", "pixart", "sd3", "flux"]
IDS = torch.arange(2)
SCALE, STEPS = 4.0, 2


def empty_prompt(folder: Path, cond: dict[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
    """A file with the embedding of the empty prompt, and what a pipeline is given for it."""
    generator = torch.Generator().manual_seed(9)
    null = {key: torch.randn(value.shape[1:], generator=generator) for key, value in cond.items()}
    if "mask" in null:
        null["mask"] = (torch.arange(len(null["mask"])) < 2).float()
    save_file(null, folder / "null.safetensors")
    return folder / "null.safetensors", {key: value.expand(len(IDS), *value.shape) for key, value in null.items()}


def pipeline_images(backbone: Backbone, pipeline: Any, noise: Tensor, cond: Any, null: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    named = {"prompt_embeds": cond["prompt_embeds"], "negative_prompt_embeds": null["prompt_embeds"]}
    if "pooled_prompt_embeds" in cond:
        named |= {"pooled_prompt_embeds": cond["pooled_prompt_embeds"]}
        named |= {"negative_pooled_prompt_embeds": null["pooled_prompt_embeds"]}
    if "mask" in cond:
        named |= {"prompt_attention_mask": cond["mask"], "negative_prompt_attention_mask": null["mask"]}
        named |= {"negative_prompt": None, "use_resolution_binning": False}
    latents = noise
    scale: dict[str, Any] = {"guidance_scale": SCALE}
    if backbone.name == "flux":
        side = noise.shape[-1]
        latents = pipeline._pack_latents(noise, len(noise), noise.shape[1], side, side)
        # Its own noise levels are spaced otherwise; both get those of the flow process.
        scale = {"true_cfg_scale": SCALE, "guidance_scale": 3.5, "sigmas": [1.0, 0.001]}
    size = 8 * noise.shape[-1]
    images = pipeline(
        **named, **scale, latents=latents, num_inference_steps=STEPS, height=size, width=size, output_type="latent"
    ).images
    if backbone.name == "flux":
        images = pipeline._unpack_latents(images, size, size, 8)
    result: Tensor = images
    return result


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_those_of_the_families_own_pipeline(name: str, tmp_path: Path) -> None:
    backbone = BY_NAME[name]
    folder = backbone.save(tmp_path / "pipeline")
    cond: Any = backbone.condition(backbone.load(folder), len(IDS))
    file, null = empty_prompt(tmp_path, cond)
    denoiser = backbone.family(weights=str(folder), **{**backbone.arguments, "null_prompt": str(file)})
    process = backbone.process()
    if backbone.is_flow:
        sampler = Sampler("flow-euler", STEPS, SCALE)
    else:
        sampler = Sampler("ddim", STEPS, SCALE, spacing="leading")
    ours = sample_images(denoiser, process, IDS, cond, sampler)
    assert backbone.pipeline is not None
    pipeline = backbone.pipeline(backbone.network())
    theirs = pipeline_images(backbone, pipeline, initial_noise(IDS, denoiser.sample_shape), cond, null)
    unguided = sample_images(denoiser, process, IDS, cond, Sampler(sampler.name, STEPS, 1.0, spacing=sampler.spacing))
    assert not torch.allclose(unguided, theirs, atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def put_in_stages(pipeline: Any, component: str, denoiser: StagedDenoiser, timesteps: list[float]) -> list[int]:
    """Stages in place of the pipeline's network; returns the list that calls of stages are noted in."""
    setattr(pipeline, component, PipelineRouter(denoiser, timesteps))
    called: list[int] = []
    for number, network in enumerate(denoiser.networks):
        network.register_forward_pre_hook(lambda *_, n=number: called.append(n))
    return called


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_drop_into_the_families_own_pipeline(name: str, tmp_path: Path) -> None:
    """Each stage is called for its own steps, and the pipeline draws what staged sampling draws."""
    backbone = BY_NAME[name]
    folder = backbone.save(tmp_path / "pipeline")
    dense = backbone.load(folder)
    cond: Any = backbone.condition(dense, len(IDS))
    file, null = empty_prompt(tmp_path, cond)
    dense = backbone.family(weights=str(folder), **{**backbone.arguments, "null_prompt": str(file)}).eval()
    sampler = Sampler("flow-euler" if backbone.is_flow else "ddim", STEPS, SCALE, spacing="leading")
    noise = initial_noise(IDS, dense.sample_shape)
    assert backbone.pipeline is not None
    pipeline = backbone.pipeline(backbone.network())
    plain = pipeline_images(backbone, pipeline, noise, cond, null)
    timesteps = pipeline.scheduler.timesteps.tolist()
    calls = 2 if name == "flux" else 1  # it guides in two calls, the others in one of a doubled batch

    uncut = StagedDenoiser(dense, [dense.network, slim(dense.network, dense.groups(), {})], (1, 1))
    called = put_in_stages(pipeline, backbone.component, uncut, timesteps)
    assert torch.equal(pipeline_images(backbone, pipeline, noise, cond, null), plain)
    assert called == [0] * calls + [1] * calls

    widths = {group.name: Width(tuple(range(group.units - 1))) for group in dense.groups() if group.units > 1}
    # The first stage: where sigmas are set by hand, the last step is nearly nothing.
    cut = StagedDenoiser(dense, [slim(dense.network, dense.groups(), widths), dense.network], (1, 1)).eval()
    called = put_in_stages(pipeline, backbone.component, cut, timesteps)
    theirs = pipeline_images(backbone, pipeline, noise, cond, null)
    assert called == [0] * calls + [1] * calls
    assert not torch.allclose(theirs, plain, atol=1e-3)
    ours = sample_images(cut, backbone.process(), IDS, cond, sampler)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("argument", "channels"), [(None, 4), (3, 3)])
@torch.no_grad()
def test_dit_guides_four_channels_or_three(argument: int | None, channels: int) -> None:
    """diffusers' pipeline guides all four of a latent, the authors' code the first three."""
    torch.manual_seed(0)
    denoiser = DiT(config=LATENT_DIT, guided_channels=argument).eval()
    torch.nn.init.normal_(denoiser.network.get_parameter("proj_out_2.weight"), std=0.1)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([1, 2])
    output = guided(denoiser, denoiser.null_condition, SCALE, denoiser.guide)(x, t, cond)
    conditional, without = denoiser(x, t, cond), denoiser(x, t, torch.tensor([10, 10]))
    expected = without + SCALE * (conditional - without)
    torch.testing.assert_close(output[:, :channels], expected[:, :channels])
    torch.testing.assert_close(output[:, channels:], conditional[:, channels:])
    assert not torch.allclose(expected, conditional, atol=1e-3)


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_guided_channels_that_is_not_there(count: int) -> None:
    with pytest.raises(InputError, match="guided_channels"):
        DiT(config=LATENT_DIT, guided_channels=count)


def test_guidance_without_the_empty_prompt_says_what_is_missing() -> None:
    backbone = BY_NAME["pixart"]
    denoiser = backbone.family(config=dict(backbone.config), text_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"denoiser\.null_prompt"):
        denoiser.null_condition(backbone.condition(denoiser, 2))


def test_an_empty_prompt_that_does_not_fit(tmp_path: Path) -> None:
    backbone = BY_NAME["pixart"]
    file = tmp_path / "null.safetensors"
    save_file({"prompt_embeds": torch.zeros(7, 12)}, file)
    arguments: dict[str, Any] = {**TEXT, "null_prompt": str(file)}
    denoiser = backbone.family(config=dict(backbone.config), **arguments)
    cond = backbone.condition(denoiser, 2)
    with pytest.raises(InputError, match=r"null\.safetensors: prompt_embeds is \[7, 12\]"):
        denoiser.null_condition(cond)
    save_file({"prompt_embeds": torch.zeros(5, 12)}, file)
    denoiser = backbone.family(config=dict(backbone.config), **arguments)
    with pytest.raises(InputError, match=r"null\.safetensors: holds no mask"):
        denoiser.null_condition(cond)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: torch.zeros(2, dtype=torch.long), "class labels"),
        (lambda c: {k: v for k, v in c.items() if k != "mask"}, "needs mask"),
        (lambda c: {**c, "prompt_embeds": c["prompt_embeds"][..., :-1]}, r"prompt_embeds: last dimension 11"),
    ],
)
def test_a_condition_that_the_network_cannot_take(change: Any, named: str) -> None:
    backbone = BY_NAME["pixart"]
    denoiser = backbone.build()
    batch = backbone.batch(denoiser)
    with pytest.raises(InputError, match=named):
        denoiser(batch["x"], torch.tensor([1, 1]), change(batch["cond"]))
