"""The networks that are timed, at their true sizes with random weights, which serve for time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d_condition import UNet2DCondition
from lightning_prune.diffusion.models.uvit import UViT

sys.path.insert(0, str(Path(__file__).parent))
from measure import Facts, timed

_DIT_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
_UVIT = {"img_size": 32, "patch_size": 2, "in_chans": 4, "mlp_ratio": 4, "num_classes": 1001}
_SD = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
NETWORKS: dict[str, tuple[type[Denoiser], dict[str, Any]]] = {
    "DiT-XL/2": (DiT, _DIT_XL),
    "U-ViT-S/2": (UViT, _UVIT | {"embed_dim": 512, "depth": 12, "num_heads": 8}),
    "U-ViT-L/2": (UViT, _UVIT | {"embed_dim": 1024, "depth": 20, "num_heads": 16}),
    "SD-1.5": (UNet2DCondition, _SD),
    "SDXL": (UNet2DCondition, _SDXL),
    "toy transformer": (
        DiT,
        _DIT_XL | {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8},
    ),
    "toy U-Net": (UNet2DCondition, _SMALL_UNET),
}


def network(name: str, device: torch.device, dtype: torch.dtype, **changes: Any) -> Denoiser:
    """A frozen denoiser with random weights, made on the device; `changes` are of its configuration."""
    family, config = NETWORKS[name]
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = family(config=config | changes)
    return denoiser.to(device, dtype).eval().requires_grad_(False)


def inputs(denoiser: Denoiser, batch: int) -> tuple[Tensor, Tensor, Condition]:
    """x_t [B, ...], t [B] and conditions for one call, in the network's type."""
    weight = next(denoiser.parameters())
    x = torch.randn(batch, *denoiser.sample_shape, device=weight.device, dtype=weight.dtype)
    cond = denoiser.blank_condition(batch, weight.device)
    return x, torch.full((batch,), 500, device=weight.device), cond


def one_call(denoiser: Denoiser, batch: int, mode: str) -> Callable[[], object]:
    """One network call."""
    given = inputs(denoiser, batch)
    run: Any = torch.compile(denoiser, dynamic=False) if mode == "compiled" else denoiser

    @torch.no_grad()
    def once() -> object:
        return run(*given)

    return once


def timed_calls(arms: Mapping[str, Denoiser], batch: int, mode: str, repeats: int) -> Facts:
    """One call of every arm, in turns."""
    return timed({name: one_call(arm, batch, mode) for name, arm in arms.items()}, repeats, mode)
