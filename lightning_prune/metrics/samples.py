"""Samples as they are drawn and as they are seen: their conditions from the data, their pictures through its decoder.

Data are asked for what they have, so anything with a split serves; none at all means class labels and pictures.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.protocols import InputError, LatentData, RealImages


def conditions_of(data: Any, ids: Tensor, num_classes: int) -> Condition:
    """Conditions of sample `ids` [B], each a function of its id alone.

    Sample i has the prompt of held-out sample i, counted round, where data come with embedded prompts; else class
    i modulo `num_classes`, so every run of consecutive ids is as balanced as it can be.
    """
    if not has_prompts(data):
        return ids % max(1, num_classes)
    held_out = data.split("held_out")
    return held_out.conditions([index % len(held_out) for index in ids.tolist()])["cond"]


def has_prompts(data: Any) -> bool:
    """Whether conditions are embedded prompts."""
    return bool(getattr(data, "condition_shapes", None))


def prompts_of(data: Any) -> str | None:
    """Which prompts samples are drawn for, for protocols; None where they have labels."""
    if not has_prompts(data):
        return None
    checksum = f", sha256 {data.checksum('held_out')}" if hasattr(data, "checksum") else ""
    return f"{data.name} held-out split, {len(data.split('held_out'))} prompts{checksum}"


def require_pictures(data: Any, asking: str) -> None:
    """Raise `InputError` naming the key if samples are latents and nothing decodes them."""
    if isinstance(data, LatentData) and data.decoder is None:
        raise InputError(
            f"data.decoder: {asking} needs one, as samples of {type(data).__name__} are latents; name the pipeline "
            "whose autoencoder makes pictures of them: --data.decoder.pipeline=<folder or hub id>"
        )


def pictures_of(data: Any, samples: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] of what a sampler gives [B, ...], on the same device."""
    if not isinstance(data, LatentData):
        return samples
    require_pictures(data, "showing samples")
    pictures: Tensor = data.decoder.to(samples.device).decode(samples)
    return pictures


def decoder_of(data: Any) -> str | None:
    """What makes pictures of latents, for protocols; None where samples are pictures."""
    if not isinstance(data, LatentData):
        return None
    described: str = data.decoder.describe()
    return described


def real_images(data: Any, split: str) -> RealImages:
    """Real images of a split that samples are compared with."""
    if isinstance(data, LatentData):
        return data.real_images(split)
    return RealImages(data.split(split).images, f"{data.name} {split} split")
