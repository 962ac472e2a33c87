"""A tiny network of every backbone family, and the pipeline folders they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from lightning_prune.data.base import DataModule
from lightning_prune.data.samples import Samples, Split
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.models import Denoiser, families
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.flux import Flux
from lightning_prune.diffusion.models.pixart import PixArt
from lightning_prune.diffusion.models.sd3 import SD3
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.models.unet2d_condition import UNet2DCondition
from lightning_prune.diffusion.models.uvit import UViT
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from tests.factories import DIT_CONFIG, UNET_CONFIG

TOKENS = 5
SD_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SD2_CONFIG = SD_CONFIG | {"attention_head_dim": [2, 4], "use_linear_projection": True}
SDXL_CONFIG = SD2_CONFIG | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
PIXART_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "patch_size": 2,
}
SD3_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}
FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": [2, 2, 4],
    "guidance_embeds": True,
}
UVIT_CONFIG: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}
LATENT_DIT = DIT_CONFIG | {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8}


@dataclass(frozen=True)
class Backbone:
    """One tiny network: its family, configuration and the pipeline it belongs to."""

    name: str
    family: type[Denoiser]
    config: Mapping[str, Any]
    component: str = ""
    pipeline: Callable[[Any], Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_flow: bool = False
    shift: float = 1.0

    def network(self, seed: int = 0) -> Any:
        """A random network of the stock class. Parameters that start as zeros are random too, so that all matter."""
        torch.manual_seed(seed)
        network = self.family.network_class(**self.config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return network

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the pipeline, or the network alone where there is no pipeline for it."""
        network = self.network(seed)
        (self.pipeline(network) if self.pipeline else network).save_pretrained(folder)
        return folder

    def load(self, folder: Path) -> Denoiser:
        return self.family(weights=str(folder), **self.arguments).eval()

    def build(self, seed: int = 0) -> Denoiser:
        torch.manual_seed(seed)
        return self.family(config=dict(self.config), **self.arguments)

    def process(self) -> Process:
        """The process its pipeline samples."""
        if self.is_flow:
            return Process("flow", "flow", clip_sample=False, shift=self.shift)
        return Process("scaled_linear", "epsilon", 1000, 0.00085, 0.012, clip_sample=False)

    def sampler(self, steps: int = 2, guidance: float = 1.0) -> Sampler:
        """A sampler that goes with it."""
        return Sampler("flow-euler" if self.is_flow else "ddim", steps, guidance)

    def condition(self, denoiser: Denoiser, batch: int, seed: int = 0) -> Condition:
        """Random labels or prompts; masks hide the last token."""
        generator = torch.Generator().manual_seed(seed)
        blank = denoiser.blank_condition(batch, "cpu")
        if isinstance(blank, Tensor):
            return torch.randint(0, max(1, denoiser.num_classes), (batch,), generator=generator)
        random = {key: torch.randn(value.shape, generator=generator) for key, value in blank.items()}
        if "mask" in random:
            random["mask"] = torch.ones_like(random["mask"])
            random["mask"][:, -1] = 0
        return random

    def batch(self, denoiser: Denoiser, size: int = 2, seed: int = 0) -> dict[str, Any]:
        """A training batch."""
        x = torch.randn(size, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        return {"x": x, "cond": self.condition(denoiser, size, seed), "id": torch.arange(size)}


class TinySamples(Samples):
    """Random samples of the kind a network takes; labels or prompts."""

    def __init__(self, samples: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
        self.samples, self._shape = samples, shape
        self.labels = torch.zeros(len(samples), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [dict(self.samples[index]) for index in indices]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def first(self, count: int) -> TinySamples:
        return TinySamples(self.samples[:count], self._shape)

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        return {key: value for key, value in self.collate(self.__getitems__(indices)).items() if key != "x"}


class TinyData(DataModule):
    """The same few samples in every split, two to a batch."""

    name = "tiny"

    def __init__(self, backbone: Backbone, denoiser: Denoiser, samples: int = 4) -> None:
        super().__init__(batch_size=2, seed=0)
        self.num_classes = denoiser.num_classes
        rows = [_first(backbone.batch(denoiser, 1, seed), seed) for seed in range(samples)]
        self._all = TinySamples(rows, tuple(denoiser.sample_shape))

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        cond = self._all.samples[0]["cond"]
        return {key: tuple(value.shape) for key, value in cond.items()} if isinstance(cond, dict) else {}

    def read(self, split: Split) -> TinySamples:
        return self._all


def _first(batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
    cond = batch["cond"]
    one = cond[0] if isinstance(cond, Tensor) else {key: value[0] for key, value in cond.items()}
    return {"x": batch["x"][0], "cond": one, "id": torch.tensor(seed)}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
    )  # fmt: skip


def tiny_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(latent_channels=channels, block_out_channels=(8,), norm_num_groups=4)


def _stable_diffusion(network: Any) -> Any:
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=network, scheduler=ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(network: Any) -> Any:
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=network,
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip


def _pixart(network: Any) -> Any:
    return PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=ddim())


def _sd3(network: Any) -> Any:
    return StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _flux(network: Any) -> Any:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=network,
    )  # fmt: skip


TEXT = {"text_tokens": TOKENS, "null_prompt": "zeros"}
BACKBONES = [
    Backbone("dit", DiT, LATENT_DIT, "transformer", lambda n: DiTPipeline(n, tiny_vae(4), ddim())),
    Backbone("ddpm", UNet2D, UNET_CONFIG, "unet", lambda n: DDPMPipeline(n, DDIMScheduler())),
    Backbone("sd15", UNet2DCondition, SD_CONFIG, "unet", _stable_diffusion, TEXT),
    Backbone("sd21", UNet2DCondition, SD2_CONFIG, "unet", _stable_diffusion, TEXT),
    Backbone("sdxl", UNet2DCondition, SDXL_CONFIG, "unet", _sdxl, TEXT),
    Backbone("pixart", PixArt, PIXART_CONFIG, "transformer", _pixart, TEXT),
    Backbone("sd3", SD3, SD3_CONFIG, "transformer", _sd3, TEXT, is_flow=True, shift=3.0),
    Backbone("flux", Flux, FLUX_CONFIG, "transformer", _flux, TEXT | {"sample_size": 8}, is_flow=True),
    Backbone("uvit", UViT, UVIT_CONFIG),
    Backbone("uvit_classes", UViT, UVIT_CONFIG | {"num_classes": 11, "mlp_time_embed": True, "conv": False}),
    Backbone("uvit_text", UViT, UVIT_CONFIG | {"clip_dim": 12, "num_clip_token": TOKENS}, arguments=TEXT),
]


def uncovered_families() -> set[str]:
    """Families in the package without a tiny network here."""
    return {family.__name__ for family in families().values() if family.__module__.startswith("lightning_prune.")} - {
        backbone.family.__name__ for backbone in BACKBONES
    }
