"""Tiny random pipelines in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

TEXT_WIDTH, LATENT_CHANNELS = 8, 2


def tiny_autoencoder() -> AutoencoderKL:
    """Halves height and width."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=0.25,
        shift_factor=0.5,
    )


def save_autoencoder(folder: Path) -> Path:
    tiny_autoencoder().save_pretrained(folder)
    return folder


def save_text_pipeline(folder: Path) -> Path:
    """A Stable Diffusion whose parts have a few thousand weights; its tokenizer knows letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    made = folder.parent / "tokenizer-files"
    made.mkdir(parents=True)
    (made / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (made / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = CLIPTokenizer(str(made / "vocab.json"), str(made / "merges.txt"), model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        tiny_autoencoder(),
        CLIPTextModel(config),
        tokenizer,
        unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        **parts,
    ).save_pretrained(folder)
    return folder
