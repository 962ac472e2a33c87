"""UNet2D: diffusers' `UNet2DModel`, the DDPM U-Net (Ho et al. 2020), class-conditional by an embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.diffusion.models.unet_blocks import unet_blocks


class UNet2D(Denoiser):
    """A convolutional U-Net; its last class embedding, if it has any, stands for "no class"."""

    network_class: ClassVar[type[ModelMixin]] = UNet2DModel

    def __init__(
        self, weights: str | None = None, config: dict[str, Any] | None = None, subfolder: str | None = None
    ) -> None:
        super().__init__(weights, config, subfolder)
        stored = self.stored
        self.sample_shape = (stored.in_channels, stored.sample_size, stored.sample_size)
        self.num_classes = (stored.num_class_embeds or 1) - 1

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        labels = cond if self.network.class_embedding is not None else None
        output: Tensor = self.network(x, timestep=t, class_labels=labels).sample
        return output[:, : x.shape[1]]

    def default_dense(self) -> Sequence[str]:
        """First and last convolution and the timestep and class embeddings."""
        return (r"conv_in", r"conv_out", r"time_embedding\..*", r".*time_emb_proj")

    def blocks(self, granularity: str) -> BlockGraph:
        """Stages ("coarse"), or pairs of resnet and attention and downsamplers ("fine")."""
        return unet_blocks(self.network, granularity)
