"""Small real things that many tests need: a two-block DiT, a small U-Net, a fit of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.sparsedm import SparseDM

DIT_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_embeds_ada_norm": 10,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 11,
}


def tiny_dit(seed: int = 0) -> DiT:
    pl.seed_everything(seed, verbose=False)
    return DiT(config=DIT_CONFIG)


def tiny_unet(seed: int = 0) -> UNet2D:
    pl.seed_everything(seed, verbose=False)
    return UNet2D(config=UNET_CONFIG)


def tiny_sparsedm(**arguments: Any) -> SparseDM:
    """SparseDM on the two-block DiT."""
    return SparseDM(tiny_dit(), Process(schedule="cosine", prediction="v"), **arguments)


def fit(
    module: pl.LightningModule,
    folder: Path,
    ckpt_path: Path | None = None,
    data: pl.LightningDataModule | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Fit on the embedded data, batches of eight, or on `data`, with the given Trainer arguments."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    runner = pl.Trainer(**{**settings, **trainer})
    given = data or EmbeddedFashion(batch_size=8, validation_samples=16)
    runner.fit(module, datamodule=given, ckpt_path=ckpt_path)
    return runner
