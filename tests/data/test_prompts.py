"""Prompts of every text family, encoded for real: the tensors and the pictures are those of diffusers' pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.data.decoder import LatentDecoder
from lightning_prune.data.encoders import TextEncoder
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import initial_noise, sample_images
from lightning_prune.diffusion.solvers import Sampler
from tests.data.text_pipelines import FAMILIES, LATENT, PIXELS, T5_TOKENS, family, save_pipeline

pytest.importorskip("transformers")

CAPTIONS = ["abc", "a ba dog", "zzz"]
SCALE, STEPS = 4.0, 2
CHOOSES_LENGTH = {"pixart", "pixart_sigma", "sd3", "flux"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save_pipeline(name, root / name) for name in FAMILIES}


def loaded(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoder(name: str, folder: Path) -> TextEncoder:
    return TextEncoder(str(folder), max_tokens=T5_TOKENS if name in CHOOSES_LENGTH else None)


def theirs(name: str, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Conditions of the captions and of the empty prompt, from the family's own method with guidance on."""
    given: dict[str, Any] = {"prompt": CAPTIONS, "device": "cpu", "num_images_per_prompt": 1}
    known = inspect.signature(pipeline.encode_prompt).parameters
    given |= {"prompt_2": CAPTIONS, "prompt_3": CAPTIONS, "max_sequence_length": T5_TOKENS}
    given |= {"do_classifier_free_guidance": True, "negative_prompt": [""] * len(CAPTIONS)}
    found = pipeline.encode_prompt(**{key: value for key, value in given.items() if key in known})
    if name == "flux":  # guided by calling twice
        empty = pipeline.encode_prompt("", "", max_sequence_length=T5_TOKENS)
        return {"prompt_embeds": (found[0], empty[0]), "pooled_prompt_embeds": (found[1], empty[1])}
    if name.startswith("pixart"):
        return {"prompt_embeds": (found[0], found[2]), "mask": (found[1], found[3])}
    pairs = {"prompt_embeds": (found[0], found[1])}
    return pairs if len(found) == 2 else {**pairs, "pooled_prompt_embeds": (found[2], found[3])}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(name: str, folders: dict[str, Path]) -> None:
    expected = theirs(name, loaded(folders[name]))
    ours = encoder(name, folders[name])
    found, empty = ours.encode(CAPTIONS), ours.encode([""] * len(CAPTIONS))
    assert found.keys() == expected.keys()
    for key, (prompt, without) in expected.items():
        assert torch.equal(found[key], prompt), key
        assert len(found[key]) == len(CAPTIONS)
        assert torch.equal(empty[key], without.expand_as(empty[key])), key
        assert key == "mask" or not torch.equal(found[key][0], found[key][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_have_the_shapes_the_network_takes(name: str, folders: dict[str, Path]) -> None:
    denoiser: Any = family(name).load(folders[name])
    found = encoder(name, folders[name]).encode(CAPTIONS)
    for key, shape in denoiser.condition_shapes().items():
        assert found[key].shape[-1] == shape[-1] or key == "mask"


def process(name: str) -> Process:
    if name == "sd21":
        return Process("scaled_linear", "v", 1000, 0.00085, 0.012, clip_sample=False)
    return family(name).process()


def network(name: str, folder: Path, null: Path) -> Denoiser:
    arguments = {**family(name).arguments, "null_prompt": str(null)}
    return family(name).family(weights=str(folder), **arguments).eval()


def pictures(name: str, pipeline: Any, noise: Tensor) -> Tensor:
    """What the pipeline draws for the captions, [B, 3, H, W] in [0, 1]."""
    given: dict[str, Any] = {"guidance_scale": SCALE, "latents": noise}
    if name == "flux":
        packed = pipeline._pack_latents(noise, len(noise), 4, LATENT, LATENT)
        given = {"true_cfg_scale": SCALE, "guidance_scale": 3.5, "latents": packed}
        given["negative_prompt"] = [""] * len(CAPTIONS)
        given["sigmas"] = [1.0, 0.001]  # its own are spaced otherwise
    if name == "sdxl":
        given["negative_prompt"] = None  # zeros, as it was trained
    if name.startswith("pixart"):
        given |= {"use_resolution_binning": False, "clean_caption": False}
    if name in CHOOSES_LENGTH:
        given["max_sequence_length"] = T5_TOKENS
    shape = {"height": PIXELS, "width": PIXELS, "num_inference_steps": STEPS}
    known = inspect.signature(type(pipeline).__call__).parameters
    given = {key: value for key, value in given.items() if key in known}
    found: Tensor = pipeline(CAPTIONS, **shape, **given, output_type="pt").images
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_from_cached_prompts_are_those_of_the_pipeline(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ours, ids = encoder(name, folders[name]), torch.arange(len(CAPTIONS))
    empty = {key: value[0].float().contiguous() for key, value in ours.encode([""]).items()}
    if name == "sdxl":
        empty = {key: torch.zeros_like(value) for key, value in empty.items()}
    save_file(empty, tmp_path / "null.safetensors")
    denoiser = network(name, folders[name], tmp_path / "null.safetensors")
    flow = family(name).is_flow
    sampler = Sampler("flow-euler", STEPS, SCALE) if flow else Sampler("ddim", STEPS, SCALE, spacing="leading")
    latents = sample_images(denoiser, process(name), ids, ours.encode(CAPTIONS), sampler)
    decoded = LatentDecoder(str(folders[name]), batch_size=2).decode(latents)
    expected = pictures(name, loaded(folders[name]), initial_noise(ids, denoiser.sample_shape))
    assert decoded.shape == (len(CAPTIONS), 3, PIXELS, PIXELS)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), expected, rtol=1e-3, atol=1e-3)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2, "another prompt, another picture"
