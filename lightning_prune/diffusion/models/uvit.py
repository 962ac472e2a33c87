"""UViT: U-ViT (Bao et al. 2023), unconditional, class-conditional or text-conditional; loads the public checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.diffusion.models.text import TextDenoiser
from lightning_prune.diffusion.models.transformer_blocks import transformer_blocks
from lightning_prune.diffusion.models.uvit_network import Block, UViTModel
from lightning_prune.protocols import WidthCut, WidthGroup

_PARTS = (("A", "attn"), ("F", "mlp"))


class UViT(TextDenoiser):
    """A transformer with long skips. `weights` may be a public checkpoint, a `.pth` file; `config` is needed then.

    With classes, the last row of the label table stands for "no class".

    Args:
        weights: as for every denoiser.
        config: as for every denoiser.
        subfolder: as for every denoiser.
        null_prompt: as for every text denoiser.
        text_tokens: as for every text denoiser.
        first_timestep: what the network calls the least noisy timestep, 0 of the process: 0 for checkpoints of the
            continuous process, which read 999 times the time, 1 for those of the discrete one, which count 1 to 1000.
        mask_skip_linear: whether the layers that merge skips are among those that are masked by default.
    """

    network_class: ClassVar[type[ModelMixin]] = UViTModel

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        null_prompt: str | None = None,
        text_tokens: int | None = None,
        first_timestep: int = 0,
        mask_skip_linear: bool = False,
    ) -> None:
        super().__init__(weights, config, subfolder, null_prompt, text_tokens)
        self.first_timestep, self.mask_skip_linear = first_timestep, mask_skip_linear
        stored = self.stored
        self.sample_shape = (stored.in_chans, stored.img_size, stored.img_size)
        self.num_classes = max(0, stored.num_classes - 1)
        self.takes_text = stored.clip_dim is not None

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        if not self.takes_text:
            return {}
        return {"prompt_embeds": (self.stored.num_clip_token, self.stored.clip_dim)}

    def blank_condition(self, batch: int, device: torch.device | str) -> Condition:
        """Of the kind this network takes; one without condition takes labels and ignores them."""
        return (TextDenoiser if self.takes_text else Denoiser).blank_condition(self, batch, device)

    def null_condition(self, cond: Condition) -> Condition:
        return (TextDenoiser if self.takes_text else Denoiser).null_condition(self, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t = t + self.first_timestep
        if self.takes_text:
            output: Tensor = self.network(x, t, prompt=self.parts(cond)["prompt_embeds"])
        else:
            output = self.network(x, t, labels=cond if self.network.label_emb is not None else None)
        return output

    def arguments(self) -> dict[str, Any]:
        own = {"first_timestep": self.first_timestep} if self.first_timestep else {}
        own |= {"mask_skip_linear": True} if self.mask_skip_linear else {}
        return {**super().arguments(), **own}

    def default_dense(self) -> Sequence[str]:
        """Patch, timestep and prompt embeddings, the layers that merge skips, decoder and last convolution.

        Skips stay dense as in SparseDM's release, whose masked tensors are the four of every block; `mask_skip_linear`
        masks them, too.
        """
        stored = self.stored
        optional = {
            r".*skip_linear": stored.skip and not self.mask_skip_linear,
            r"time_embed\..*": stored.mlp_time_embed,
            r"context_embed": self.takes_text,
            r"final_layer": stored.conv,
        }
        return (r"patch_embed\..*", r"decoder_pred", *(pattern for pattern, there in optional.items() if there))

    def groups(self) -> Sequence[WidthGroup]:
        """Hidden channels of the feed-forward parts; queries, keys and values are fused in one layer."""
        blocks = [name for name, module in self.network.named_modules() if isinstance(module, Block)]
        return [_hidden_channels(f"{name}.mlp", self.network.get_submodule(f"{name}.mlp.fc2")) for name in blocks]

    def blocks(self, granularity: str) -> BlockGraph:
        """Blocks ("block"), the last half of which read an early one besides, or their two parts ("half")."""
        half = self.stored.depth // 2
        ahead, behind = [f"in_blocks.{i}" for i in range(half)], [f"out_blocks.{i}" for i in range(half)]
        chain = transformer_blocks([*ahead, "mid_block", *behind], _PARTS, granularity)
        if granularity == "half" or not self.stored.skip:
            return chain
        # The first of the last half merges in what the last of the first half gave, and so on outwards.
        skips = {half + 1 + i: f"B{half - 1 - i}" for i in range(half)}
        blocks = [
            replace(block, producers=(*block.producers, skips[i])) if i in skips else block
            for i, block in enumerate(chain.blocks)
        ]
        return replace(chain, blocks=tuple(blocks))


def _hidden_channels(name: str, output: Any) -> WidthGroup:
    rows = (WidthCut(f"{name}.fc1.weight", 0), WidthCut(f"{name}.fc1.bias", 0))
    cuts = (*rows, WidthCut(f"{name}.fc2.weight", 1))
    return WidthGroup(name, "channels", f"{name}.fc2", output.in_features, 1, 1, cuts)
