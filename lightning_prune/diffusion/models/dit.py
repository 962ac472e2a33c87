"""DiT: diffusers' `DiTTransformer2DModel`, class-conditional (Peebles and Xie 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.diffusion.models.transformer_blocks import transformer_blocks
from lightning_prune.protocols import InputError

_PARTS = (("A", "attn1"), ("F", "ff"))


class DiT(Denoiser):
    """A diffusion transformer with adaptive layer norm, as stored by diffusers.

    Args:
        weights: as for every denoiser.
        config: as for every denoiser.
        subfolder: as for every denoiser.
        guided_channels: channels that guidance acts on; the others are the conditional prediction's. null is all of a
            sample's, four for latents, as in diffusers' pipeline; 3 is the rule of the authors' own code
            (facebookresearch/DiT), to compare with figures reported from it.
    """

    network_class: ClassVar[type[ModelMixin]] = DiTTransformer2DModel

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        guided_channels: int | None = None,
    ) -> None:
        super().__init__(weights, config, subfolder)
        stored = self.stored
        self.sample_shape = (stored.in_channels, stored.sample_size, stored.sample_size)
        self.num_classes = stored.num_embeds_ada_norm
        if guided_channels is not None and not 1 <= guided_channels <= stored.in_channels:
            raise InputError(f"denoiser.guided_channels: {guided_channels} of {stored.in_channels}")
        self.guided_channels = guided_channels
        # Each diffusers block drops labels on its own in training mode, so one sample would be conditional in
        # some blocks and not in others. Label dropout is the method's, once per sample.
        for layer in self.network.modules():
            if isinstance(layer, LabelEmbedding):
                layer.dropout_prob = 0.0

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        # A learned variance, where there is one, is in the channels behind the prediction.
        output: Tensor = self.network(x, timestep=t, class_labels=cond).sample
        return output[:, : x.shape[1]]

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """uncond + w (cond - uncond) in the first `guided_channels` of the channels."""
        guided = super().guide(conditional, unconditional, scale)
        count = self.guided_channels or guided.shape[1]
        return torch.cat([guided[:, :count], conditional[:, count:]], dim=1)

    def arguments(self) -> dict[str, Any]:
        return {} if self.guided_channels is None else {"guided_channels": self.guided_channels}

    def default_dense(self) -> Sequence[str]:
        """Patch embedding, timestep and label embedding, modulation and output projection."""
        return (r"pos_embed\..*", r".*norm1\..*", r"proj_out_[12]")

    def blocks(self, granularity: str) -> BlockGraph:
        """Transformer blocks ("block"), or their attention and feed-forward parts ("half")."""
        names = [f"transformer_blocks.{i}" for i in range(self.stored.num_layers)]
        return transformer_blocks(names, _PARTS, granularity)
