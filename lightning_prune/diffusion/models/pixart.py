"""PixArt: diffusers' `PixArtTransformer2DModel`, text-conditional (Chen et al. 2023; PixArt-alpha and -Sigma)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin, PixArtTransformer2DModel
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.text import TextDenoiser
from lightning_prune.diffusion.models.transformer_blocks import transformer_blocks

_PIXELS_PER_LATENT = 8
_PARTS = (("A", "attn1"), ("C", "attn2"), ("F", "ff"))


class PixArt(TextDenoiser):
    """A diffusion transformer with cross-attention to a masked T5 prompt.

    Costs are counted with 120 tokens as in PixArt-alpha; `text_tokens: 300` is PixArt-Sigma's. Networks that are told
    the size of the image get `resolution` [B, 2] and `aspect_ratio` [B, 1] from the condition, or those of the sample.
    """

    network_class: ClassVar[type[ModelMixin]] = PixArtTransformer2DModel
    usual_tokens: ClassVar[int] = 120

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
        return {"prompt_embeds": (self.text_tokens, self.stored.caption_channels), "mask": (self.text_tokens,)}

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        parts = self.parts(cond)
        output: Tensor = self.network(
            x,
            encoder_hidden_states=parts["prompt_embeds"],
            encoder_attention_mask=parts["mask"],
            timestep=t,
            added_cond_kwargs=self._size(x, parts),
        ).sample
        # A learned variance, where there is one, is in the channels behind the prediction.
        return output[:, : x.shape[1]]

    def _size(self, x: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (_PIXELS_PER_LATENT * side for side in x.shape[-2:])
        usual = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {
            key: parts[key].to(x.dtype) if key in parts else x.new_tensor(value).expand(len(x), -1)
            for key, value in usual.items()
        }

    def default_dense(self) -> Sequence[str]:
        """Patch, timestep, size and caption embeddings, modulation and output projection."""
        return (r"pos_embed\..*", r"adaln_single\..*", r"caption_projection\..*", r"proj_out")

    def blocks(self, granularity: str) -> BlockGraph:
        """Transformer blocks ("block"), or their two attentions and feed-forward parts ("half")."""
        names = [f"transformer_blocks.{i}" for i in range(self.stored.num_layers)]
        return transformer_blocks(names, _PARTS, granularity)
