"""What families that are conditioned on text share.

A condition is a mapping, batch first. Its keys are those of diffusers' pipelines: `prompt_embeds` [B, L, D],
`pooled_prompt_embeds` [B, P], `mask` [B, L] with 1 for a token of the prompt, and what a family names besides. Keys
that a family has no use for are left alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models.base import Denoiser
from lightning_prune.diffusion.pretrained import read_tensors
from lightning_prune.protocols import InputError

ZEROS = "zeros"


class TextDenoiser(Denoiser):
    """A backbone conditioned on text embeddings; it holds no text encoder.

    Args:
        weights: as for every denoiser.
        config: as for every denoiser.
        subfolder: as for every denoiser.
        null_prompt: what stands for "no prompt" in guidance and label dropout: a safetensors file with the tensors
            of the empty prompt, under the keys of a condition, with or without a batch dimension of 1; or "zeros".
        text_tokens: length of the prompt that costs are counted with; null is the usual one of the family.
    """

    num_classes = 0
    usual_tokens: ClassVar[int] = 77
    usual_null: ClassVar[str | None] = None
    # What of a condition belongs to the prompt; the rest, such as an image's size, stays as it is without one.
    prompt_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds", "mask")

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        null_prompt: str | None = None,
        text_tokens: int | None = None,
    ) -> None:
        super().__init__(weights, config, subfolder)
        self.null_prompt = null_prompt or self.usual_null
        self.text_tokens = text_tokens or self.usual_tokens
        self._null: dict[str, Tensor] | None = None

    @abstractmethod
    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one sample's condition, by the keys this family cannot do without."""

    def blank_condition(self, batch: int, device: torch.device | str) -> Condition:
        """Zeros of the right shapes, under a mask that hides nothing."""
        dtype = next(self.network.parameters()).dtype
        return {
            key: (torch.ones if key == "mask" else torch.zeros)(batch, *shape, device=device, dtype=dtype)
            for key, shape in self.condition_shapes().items()
        }

    def null_condition(self, cond: Condition) -> Condition:
        """The condition of the empty prompt, in the places of `cond` that belong to the prompt.

        Raises:
            InputError: there is no empty prompt, or its file lacks a key or has another shape.
        """
        parts = self.parts(cond)
        return {key: self._null_part(key, value) if key in self.prompt_keys else value for key, value in parts.items()}

    def _null_part(self, key: str, like: Tensor) -> Tensor:
        if self.null_prompt == ZEROS:
            return torch.zeros_like(like)
        null = self._null_tensors().get(key)
        if null is None:
            raise InputError(f"{self.null_prompt}: holds no {key}")
        if null.shape not in (like.shape[1:], (1, *like.shape[1:])):
            raise InputError(
                f"{self.null_prompt}: {key} is {list(null.shape)}, that of a prompt {list(like.shape[1:])}"
            )
        return null.to(like).reshape(1, *like.shape[1:]).expand_as(like)

    def _null_tensors(self) -> dict[str, Tensor]:
        if self.null_prompt is None:
            raise InputError(
                "denoiser.null_prompt: guidance and label dropout need the embedding of the empty prompt; give the "
                "safetensors file that holds it"
            )
        if self._null is None:
            self._null = read_tensors(Path(self.null_prompt))
        return self._null

    def parts(self, cond: Condition) -> Mapping[str, Tensor]:
        """`cond` as a mapping that holds what this family needs, in the network's type; caches may be in another.

        Raises:
            InputError: labels instead of prompts, or a key that is missing or of another width.
        """
        if isinstance(cond, Tensor):
            raise InputError(f"cond: {type(self).__name__} takes embedded prompts by name, not class labels")
        for key, shape in self.condition_shapes().items():
            if key not in cond:
                raise InputError(f"cond: {type(self).__name__} needs {key}; the batch holds {', '.join(sorted(cond))}")
            if cond[key].shape[-1] != shape[-1] and key != "mask":
                raise InputError(f"cond.{key}: last dimension {cond[key].shape[-1]}, the network takes {shape[-1]}")
        dtype = next(self.network.parameters()).dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}

    def arguments(self) -> dict[str, Any]:
        given = {"null_prompt": self.null_prompt, "text_tokens": self.text_tokens}
        usual = {"null_prompt": self.usual_null, "text_tokens": self.usual_tokens}
        return {key: value for key, value in given.items() if value != usual[key]}
