"""Flux: diffusers' `FluxTransformer2DModel` (Black Forest Labs 2024), a flow network on patches of 2 x 2 latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.text import TextDenoiser
from lightning_prune.protocols import InputError

_PATCH = 2


class Flux(TextDenoiser):
    """A transformer of joint blocks, then single ones. Samples stay [B, C, H, W] outside; patches are made here.

    Costs are counted with 512 tokens of T5.

    Args:
        weights: as for every denoiser.
        config: as for every denoiser.
        subfolder: as for every denoiser.
        null_prompt: as for every text denoiser.
        text_tokens: as for every text denoiser.
        sample_size: height and width of a latent; the stored configuration has none. 128 is 1024 pixels.
        embedded_guidance: scale told to a guidance-distilled network (FLUX.1-dev); no second call.
    """

    network_class: ClassVar[type[ModelMixin]] = FluxTransformer2DModel
    timestep_scale: ClassVar[int] = 1000
    usual_tokens: ClassVar[int] = 512

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        null_prompt: str | None = None,
        text_tokens: int | None = None,
        sample_size: int = 128,
        embedded_guidance: float = 3.5,
    ) -> None:
        super().__init__(weights, config, subfolder, null_prompt, text_tokens)
        stored = self.stored
        if sample_size < _PATCH or sample_size % _PATCH:
            raise InputError(f"denoiser.sample_size: {sample_size} is no multiple of the patch, {_PATCH}")
        if stored.out_channels not in (None, stored.in_channels):
            raise InputError(
                f"denoiser: takes {stored.in_channels} channels and predicts {stored.out_channels}: networks for "
                "inpainting or control, which see more than the noisy sample, are not supported"
            )
        self.sample_size, self.embedded_guidance = sample_size, embedded_guidance
        self.sample_shape = (stored.in_channels // _PATCH**2, sample_size, sample_size)

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self.stored
        return {
            "prompt_embeds": (self.text_tokens, stored.joint_attention_dim),
            "pooled_prompt_embeds": (stored.pooled_projection_dim,),
        }

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        parts = self.parts(cond)
        rows, columns = (side // _PATCH for side in x.shape[-2:])
        prompt = parts["prompt_embeds"]
        output: Tensor = self.network(
            # Channels of a patch run (channel, row, column), as diffusers' pipeline packs them.
            pixel_unshuffle(x, _PATCH).flatten(2).mT,
            encoder_hidden_states=prompt,
            pooled_projections=parts["pooled_prompt_embeds"],
            timestep=t.to(x.dtype) / self.timestep_scale,
            img_ids=_positions(rows, columns, x),
            txt_ids=x.new_zeros(prompt.shape[1], 3),
            guidance=x.new_full((len(x),), self.embedded_guidance) if self.stored.guidance_embeds else None,
        ).sample
        return pixel_shuffle(output.mT.unflatten(2, (rows, columns)), _PATCH)

    def default_dense(self) -> Sequence[str]:
        """Patch, timestep and prompt embeddings, modulation and output projection."""
        return (
            r"x_embedder",
            r"time_text_embed\..*",
            r"context_embedder",
            r".*norm1?(_context)?\.linear",
            r"norm_out\..*",
            r"proj_out",
        )

    def blocks(self, granularity: str) -> BlockGraph:
        """None: a joint block hands image and prompt on together, and a gate stores what one stream was given."""
        raise InputError(f"granularity: {type(self).__name__}: joint blocks of image and prompt have no gates yet")

    def arguments(self) -> dict[str, Any]:
        own = {"sample_size": self.sample_size, "embedded_guidance": self.embedded_guidance}
        return {**super().arguments(), **own}


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Ids (0, row, column) of patches in row order [rows * columns, 3]."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(like.dtype)
