"""UNet2DCondition: diffusers' `UNet2DConditionModel`: Stable Diffusion 1.x and 2.x (Rombach et al. 2022), SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.text import ZEROS, TextDenoiser
from lightning_prune.diffusion.models.unet_blocks import unet_blocks
from lightning_prune.protocols import InputError

_PIXELS_PER_LATENT = 8
_SIZES = 6
_NEEDS_MORE_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")


class UNet2DCondition(TextDenoiser):
    """A U-Net with cross-attention to a prompt; SDXL's also takes a pooled prompt and the sizes of the image.

    Without `time_ids` [B, 6] in the condition (original height and width, top and left of the crop, height and width
    aimed at, in pixels) an SDXL network is told that the image was made at its size and not cropped.
    """

    network_class: ClassVar[type[ModelMixin]] = UNet2DConditionModel

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        null_prompt: str | None = None,
        text_tokens: int | None = None,
    ) -> None:
        super().__init__(weights, config, subfolder, null_prompt, text_tokens)
        stored = self.stored
        _check_inputs(stored)
        self.sized = stored.addition_embed_type == "text_time"
        # SDXL was trained with zeros for a dropped prompt; SD 1.x and 2.x with the embedding of "".
        self.null_prompt = null_prompt or (ZEROS if self.sized else None)
        self.sample_shape = (stored.in_channels, stored.sample_size, stored.sample_size)

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self.stored
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (self.text_tokens, _width(stored.cross_attention_dim))}
        if self.sized:
            sizes = _SIZES * stored.addition_time_embed_dim
            shapes["pooled_prompt_embeds"] = (stored.projection_class_embeddings_input_dim - sizes,)
        return shapes

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        parts, added = self.parts(cond), None
        if self.sized:
            added = {"text_embeds": parts["pooled_prompt_embeds"], "time_ids": self._time_ids(x, parts)}
        prompt = parts["prompt_embeds"]
        output: Tensor = self.network(x, t, encoder_hidden_states=prompt, added_cond_kwargs=added).sample
        return output

    def _time_ids(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        if "time_ids" in parts:
            return parts["time_ids"].to(x.dtype)
        height, width = (_PIXELS_PER_LATENT * side for side in x.shape[-2:])
        return torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype).expand(len(x), -1)

    def default_dense(self) -> Sequence[str]:
        """First and last convolution, and the embeddings of timestep, pooled prompt and sizes."""
        added = (r"add_embedding\..*",) if self.sized else ()
        return (r"conv_in", r"conv_out", r"time_embedding\..*", r".*time_emb_proj", *added)

    def blocks(self, granularity: str) -> BlockGraph:
        """Stages ("coarse"), or pairs of resnet and attention and downsamplers ("fine")."""
        return unet_blocks(self.network, granularity)

    def arguments(self) -> dict[str, Any]:
        usual = ZEROS if self.sized else None
        return {k: v for k, v in super().arguments().items() if k != "null_prompt" or v != usual}


def _width(cross_attention_dim: Any) -> int:
    """Of the prompt's embedding; diffusers also takes one per stage, which are equal wherever one prompt is used."""
    width: int = cross_attention_dim if isinstance(cross_attention_dim, int) else cross_attention_dim[0]
    return width


def _check_inputs(stored: Any) -> None:
    """Refuse networks that need inputs besides a noisy sample, a timestep and a prompt."""
    for key in _NEEDS_MORE_INPUTS:
        if getattr(stored, key, None) is not None:
            raise InputError(f"denoiser: {key} {getattr(stored, key)!r}: U-Nets with this input are not supported")
    if stored.addition_embed_type not in (None, "text_time"):
        raise InputError(f"denoiser: addition_embed_type {stored.addition_embed_type!r} is not supported")
    if stored.in_channels != stored.out_channels:
        raise InputError(
            f"denoiser: takes {stored.in_channels} channels and predicts {stored.out_channels}: networks for "
            "inpainting or upscaling, which see more than the noisy sample, are not supported"
        )
