"""Whole tiny pipelines of every text family: text encoders, tokenizers, network and autoencoder, all random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, StableDiffusionPipeline

from tests.backbones import BACKBONES, Backbone, ddim

BY_NAME = {backbone.name: backbone for backbone in BACKBONES}
FAMILIES = ["sd15", "sd21", "sdxl", "pixart", "pixart_sigma", "sd3", "flux"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CLIP_TOKENS, T5_TOKENS = 9, 11
LATENT, PIXELS = 8, 64


def family(name: str) -> Backbone:
    """The tiny network of a family; both PixArts have the same."""
    return BY_NAME["pixart" if name == "pixart_sigma" else name]


def save_pipeline(name: str, folder: Path) -> Path:
    """Write a pipeline whose every part is there and random."""
    torch.manual_seed(0)
    backbone = family(name)
    assert backbone.pipeline is not None
    network = backbone.network()
    if name == "pixart_sigma":
        pipeline: Any = PixArtSigmaPipeline(None, None, None, network, ddim())
    else:
        pipeline = backbone.pipeline(network)
    if isinstance(pipeline, StableDiffusionPipeline) and name == "sd21":
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    words = _text_parts(name, folder.parent / f"{folder.name}-files")
    pipeline.register_modules(vae=autoencoder(shifted=name in ("sd3", "flux")), **words)
    pipeline.save_pretrained(folder)
    return folder


def autoencoder(shifted: bool = False) -> AutoencoderKL:
    """Eight pixels to a latent, as the real ones have; the latents of SD3 and Flux are shifted."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=PIXELS,
        scaling_factor=0.5,
        shift_factor=0.25 if shifted else None,
    )


def _text_parts(name: str, files: Path) -> dict[str, Any]:
    if name in ("sd15", "sd21"):
        return {"text_encoder": clip(12), "tokenizer": clip_tokenizer(files)}
    if name.startswith("pixart"):
        return {"text_encoder": t5(12), "tokenizer": t5_tokenizer()}
    if name == "flux":
        clips = {"text_encoder": clip(8), "tokenizer": clip_tokenizer(files)}
        return {**clips, "text_encoder_2": t5(12), "tokenizer_2": t5_tokenizer()}
    first = clip(4) if name == "sdxl" else clip(4, projection=4)
    clips = {"text_encoder": first, "text_encoder_2": clip(8, projection=8 if name == "sdxl" else 4)}
    clips |= {key: clip_tokenizer(files) for key in ("tokenizer", "tokenizer_2")}
    return clips if name == "sdxl" else {**clips, "text_encoder_3": t5(12), "tokenizer_3": t5_tokenizer()}


def clip_tokenizer(files: Path) -> Any:
    """Knows letters."""
    from transformers import CLIPTokenizer

    files.mkdir(parents=True, exist_ok=True)
    (files / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(_clip_words())}))
    (files / "merges.txt").write_text("#version: 0.2\na b\n")
    return CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=CLIP_TOKENS)


def _clip_words() -> list[str]:
    return [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ab", "<|startoftext|>", "<|endoftext|>"]


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIP text model, with a projection where one is asked for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = _clip_words()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection or width,
        num_hidden_layers=2,  # the last but one is what SDXL and SD3 read
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    encoder: Any = (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)
    return encoder.eval()


def t5_tokenizer() -> Any:
    """Knows letters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def t5(width: int) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=4 + len(LETTERS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    encoder: Any = T5EncoderModel(config)
    return encoder.eval()
