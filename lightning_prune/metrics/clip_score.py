"""CLIP score (Hessel et al. 2021) with a local transformers CLIP, and an interval. Higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_prune.metrics.extractors.base import check_images, to_rgb
from lightning_prune.metrics.frechet import Distance
from lightning_prune.protocols import InputError


class ClipScorer:
    """100 max(cos(image, caption), 0), averaged over pairs.

    Args:
        folder: a transformers CLIP with its processor, weights in safetensors; nothing is downloaded.
        batch_size: pairs that go through the network at once.

    Raises:
        InputError: transformers is not installed, or the folder is not such a model.
    """

    def __init__(self, folder: str | Path, batch_size: int = 50) -> None:
        self.model, self.processor = load_clip(Path(folder))
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, images: Tensor, captions: Sequence[str]) -> Distance:
        """Mean score of uint8 `images` [N, 1 or 3, H, W] and their N captions; the interval is that of a mean.

        Raises:
            InputError: images of another type or shape, fewer than two, or another number of captions.
        """
        check_images(images, "CLIP score")
        if len(images) < 2 or len(captions) != len(images):
            raise InputError(f"CLIP score: {len(images)} images (at least two) and {len(captions)} captions")
        scores = torch.cat(
            [
                self._pairs(images[start : start + self.batch_size], captions[start : start + self.batch_size])
                for start in range(0, len(images), self.batch_size)
            ]
        )
        return Distance(float(scores.mean()), scores - scores.mean())

    def _pairs(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(captions), images=list(to_rgb(images)), return_tensors="pt", padding=True, truncation=True
        )
        outputs = self.model(**inputs.to(self.model.device))
        return 100 * cosine_similarity(outputs.image_embeds, outputs.text_embeds).double().clamp(min=0).cpu()


def load_clip(folder: Path) -> tuple[Any, Any]:
    """Model and processor out of a local folder."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise InputError("CLIP score needs transformers: pip install 'lightning_prune[text]'") from error
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; CLIP score takes a local transformers CLIP")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its readers do
        raise InputError(f"{folder}: not a transformers CLIP with its processor and safetensors weights") from error
    return model.eval().requires_grad_(False), processor
