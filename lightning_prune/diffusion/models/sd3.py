"""SD3: diffusers' `SD3Transformer2DModel`, Stable Diffusion 3 and 3.5 (Esser et al. 2024), a flow network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin, SD3Transformer2DModel
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.text import TextDenoiser
from lightning_prune.protocols import InputError


class SD3(TextDenoiser):
    """A transformer whose blocks attend over image and prompt jointly.

    Costs are counted with 333 tokens: 77 of the two CLIP encoders, 256 of T5.
    """

    network_class: ClassVar[type[ModelMixin]] = SD3Transformer2DModel
    usual_tokens: ClassVar[int] = 333

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        null_prompt: str | None = None,
        text_tokens: int | None = None,
    ) -> None:
        super().__init__(weights, config, subfolder, null_prompt, text_tokens)
        self.sample_shape = (self.stored.in_channels, self.stored.sample_size, self.stored.sample_size)

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self.stored
        return {
            "prompt_embeds": (self.text_tokens, stored.joint_attention_dim),
            "pooled_prompt_embeds": (stored.pooled_projection_dim,),
        }

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        parts = self.parts(cond)
        output: Tensor = self.network(
            x,
            encoder_hidden_states=parts["prompt_embeds"],
            pooled_projections=parts["pooled_prompt_embeds"],
            timestep=t,
        ).sample
        return output

    def default_dense(self) -> Sequence[str]:
        """Patch, timestep and prompt embeddings, modulation and output projection."""
        return (
            r"pos_embed\..*",
            r"time_text_embed\..*",
            r"context_embedder",
            r".*norm1(_context)?\.linear",
            r"norm_out\..*",
            r"proj_out",
        )

    def blocks(self, granularity: str) -> BlockGraph:
        """None: a joint block hands image and prompt on together, and a gate stores what one stream was given."""
        raise InputError(f"granularity: {type(self).__name__}: joint blocks of image and prompt have no gates yet")
