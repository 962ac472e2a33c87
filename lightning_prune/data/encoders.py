"""What turns pictures into latents and captions into embeddings: the parts of a diffusers pipeline."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from lightning_prune.protocols import InputError

# What `encode_prompt` of a pipeline returns, under the names that denoisers know conditions by; None is left out.
PROMPTS: Mapping[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds",),
    "StableDiffusionXLPipeline": ("prompt_embeds", None, "pooled_prompt_embeds"),
    "StableDiffusion3Pipeline": ("prompt_embeds", None, "pooled_prompt_embeds"),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "PixArtAlphaPipeline": ("prompt_embeds", "mask"),
    "PixArtSigmaPipeline": ("prompt_embeds", "mask"),
}
_TEXT_PARTS = ("text_encoder", "tokenizer", "scheduler")  # names of the parts a text encoder needs begin with these


@contextmanager
def _named(pipeline: str, part: str) -> Iterator[None]:
    """Errors of loading as one line that names the pipeline and its part."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"pipeline: {pipeline}: {part}: {' '.join(str(error).split())[:200]}") from error


def components(pipeline: str) -> dict[str, Any]:
    """The parts of a pipeline by name, from its `model_index.json`; empty where there is an autoencoder alone.

    Raises:
        InputError: neither a folder of either kind nor a repository of either on the hub.
    """
    folder = Path(pipeline)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        if (folder / "config.json").exists():
            return {}
        raise InputError(f"pipeline: {folder}: neither model_index.json nor config.json in it")
    with _named(pipeline, "model_index.json"):
        stored: dict[str, Any] = json.loads((folder / "model_index.json").read_text()) if folder.is_dir() else {}
        return stored or _components_on_hub(pipeline)


def _components_on_hub(repository: str) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(Path(hf_hub_download(repository, "model_index.json")).read_text())
    except OSError:
        hf_hub_download(repository, "config.json")  # autoencoders that replace a pipeline's own lie alone
        return {}
    return stored


def autoencoder_place(pipeline: str) -> dict[str, str]:
    """Where the autoencoder of a pipeline is: its subfolder, or nothing for a folder that holds it alone.

    Raises:
        InputError: a pipeline without one.
    """
    parts = components(pipeline)
    if parts and not (parts.get("vae") or [None])[0]:
        named = ", ".join(name for name, part in parts.items() if isinstance(part, list | tuple) and part[0])
        raise InputError(f"pipeline: {pipeline}: no vae in it, but {named}")
    return {"subfolder": "vae"} if parts else {}


def autoencoder_config(pipeline: str) -> dict[str, Any]:
    """The configuration of a pipeline's autoencoder; no weights are read.

    Raises:
        InputError: there is none, or a network of another kind.
    """
    where = autoencoder_place(pipeline)
    with _named(pipeline, "vae"):
        config = dict(diffusers.AutoencoderKL.load_config(pipeline, **where))
        name = str(config.get("_class_name"))
        if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
            raise InputError(f"pipeline: {pipeline}: holds a {name}, expected an autoencoder of diffusers")
    return config


def load_autoencoder(pipeline: str) -> Any:
    """The autoencoder of a pipeline, or of a folder of its own, in evaluation mode and without gradients.

    Raises:
        InputError: there is none, or its weights are missing or damaged.
    """
    config, where = autoencoder_config(pipeline), autoencoder_place(pipeline)
    with _named(pipeline, "vae"):
        network = getattr(diffusers, config["_class_name"]).from_pretrained(pipeline, use_safetensors=True, **where)
    return network.eval().requires_grad_(False)


def latent_factors(config: Mapping[str, Any], scale: float | None = None) -> tuple[list[float], list[float]]:
    """Scale and shift of an autoencoder's latents, a value a channel or one for all: (latent - shift) scale.

    A given `scale` takes the place of the configuration's.

    Raises:
        InputError: a scale for an autoencoder that has one for each channel.
    """
    factor, deviations = float(config.get("scaling_factor") or 1.0), config.get("latents_std")
    if scale is not None and deviations is not None:
        raise InputError("scale: this autoencoder scales its channels one by one")
    own = [factor] if deviations is None else [factor / value for value in deviations]
    return own if scale is None else [scale], list(config.get("latents_mean") or [config.get("shift_factor") or 0.0])


def fingerprint(network: Any) -> str:
    """Checksum of all weights of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LatentEncoder:
    """The autoencoder of a pipeline.

    Attributes:
        shift: subtracted from a latent, one value a channel or one for all.
        scale: what the difference is multiplied with to give what a denoiser sees.

    Args:
        pipeline: folder in diffusers layout, of a whole pipeline or of the autoencoder alone, or a hub id.
        device: where it computes.
        scale: factor of latents, where it is not the one of the autoencoder's configuration.
    """

    def __init__(self, pipeline: str, device: torch.device | str = "cpu", scale: float | None = None) -> None:
        self.network: Any = load_autoencoder(pipeline).to(device)
        self.device = torch.device(device)
        self.scale, self.shift = latent_factors(self.network.config, scale)

    @property
    def fingerprint(self) -> str:
        """Checksum of all weights."""
        return fingerprint(self.network)

    @torch.no_grad()
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`mean` [B, C, h, w], and `std` where latents are distributed, of pictures [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: pictures the autoencoder cannot take.
        """
        try:
            encoded = self.network.encode(x.to(self.device))
        except RuntimeError as error:
            shape, reason = "x".join(map(str, x.shape[1:])), " ".join(str(error).split())[:150]
            raise InputError(f"data: the autoencoder cannot take pictures of {shape}: {reason}") from error
        if hasattr(encoded, "latent_dist"):
            return {"mean": encoded.latent_dist.mean.cpu(), "std": encoded.latent_dist.std.cpu()}
        return {"mean": encoded.latent.cpu()}


class TextEncoder:
    """Tokenizers and text encoders of a pipeline, run by the pipeline's own `encode_prompt`.

    Args:
        pipeline: folder of a whole pipeline, or a hub id.
        device: where they compute.
        max_tokens: longest prompt, where the pipeline lets one choose; null for its default.
    """

    def __init__(self, pipeline: str, device: torch.device | str = "cpu", max_tokens: int | None = None) -> None:
        parts = components(pipeline)
        name = str(parts.get("_class_name"))
        if name not in PROMPTS:
            raise InputError(f"pipeline: {pipeline}: captions are encoded for {', '.join(PROMPTS)}, not for {name}")
        present = [key for key, part in parts.items() if isinstance(part, list | tuple) and part[0]]
        for needed in ("text_encoder", "tokenizer"):
            if needed not in present:
                raise InputError(f"pipeline: {pipeline}: no {needed} in it, but {', '.join(present)}")
        unused = {key: None for key in present if not key.startswith(_TEXT_PARTS)}
        with _named(pipeline, "text encoder"):
            loaded = diffusers.DiffusionPipeline.from_pretrained(pipeline, use_safetensors=True, **unused)
        self.pipeline = loaded.to(device)
        self.keys, self.max_tokens, self.device = PROMPTS[name], max_tokens, torch.device(device)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Conditions of captions, batch first: `prompt_embeds` [B, L, D] and what else the denoiser takes."""
        given = {
            "prompt": captions,
            "prompt_2": None,
            "prompt_3": None,
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        if self.max_tokens is not None:
            given["max_sequence_length"] = self.max_tokens
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        if self.max_tokens is not None and "max_sequence_length" not in known:
            raise InputError(f"max_tokens: {type(self.pipeline).__name__} has a prompt of fixed length")
        found = self.pipeline.encode_prompt(**{key: value for key, value in given.items() if key in known})
        named = zip(self.keys, found, strict=False)
        return {key: tensor.cpu() for key, tensor in named if key is not None}
