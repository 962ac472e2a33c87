"""Published sizes of real networks, to the digit, from their configurations on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.metrics.macs import Convention, Ledger, count, ledger_of, macs_per_image
from lightning_prune.metrics.macs_trace import Trace, trace
from lightning_prune.protocols import Sparsity

GIGA = 1e9


class UViT(nn.Module):
    """U-ViT-S/2 for unconditional 32x32 images (Bao et al. 2023): a transformer with long skips."""

    def __init__(self, width: int = 512, depth: int = 12, heads: int = 8, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (32 // patch) ** 2, width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, skip=False) for _ in range(depth // 2))
        self.mid_block = UViTBlock(width, heads, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, 3 * patch**2)
        self.final = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        width = self.pos_embed.shape[-1]
        frequencies = 10000.0 ** (-torch.arange(width // 2, device=x.device) / (width // 2))
        angles = t[:, None, None] * frequencies
        time, patches = torch.cat([angles.cos(), angles.sin()], -1), self.patch_embed(x).flatten(2).mT
        tokens = torch.cat([time, patches], 1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder(self.norm(tokens))[:, 1:]
        image = F.fold(patches.mT, (x.shape[-1],) * 2, self.patch, stride=self.patch)
        output: Tensor = self.final(image)
        return output


class UViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


def meta(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="meta")


def meta_ids(batch: int = 1) -> Tensor:
    return torch.zeros(batch, dtype=torch.long, device="meta")


class Published(NamedTuple):
    """A network with the inputs of one call and the figures known for it."""

    build: Callable[[], Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: int
    giga: dict[Convention, float]


DIT_XL_2 = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
SD_15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD_21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART_ALPHA_1024 = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "patch_size": 2,
    "norm_elementwise_affine": False,
}

PUBLISHED = {
    "DiT-XL/2 256": Published(
        lambda: DiTTransformer2DModel(**DIT_XL_2),
        (meta(1, 4, 32, 32),),
        {"timestep": meta_ids(), "class_labels": meta_ids()},
        749_826_464,
        {"linear": 114.4390, "module": 114.4566, "aten": 118.6668},
    ),
    "SD-1.5 512": Published(
        lambda: UNet2DConditionModel(**SD_15),
        (meta(1, 4, 64, 64), meta_ids(), meta(1, 77, 768)),
        {},
        859_520_964,
        {"module": 338.8316, "aten": 401.6367},
    ),
    "SD-2.1 768": Published(
        lambda: UNet2DConditionModel(**SD_21),
        (meta(1, 4, 96, 96), meta_ids(), meta(1, 77, 1024)),
        {},
        865_910_724,
        {"module": 760.9311, "aten": 1074.5529},
    ),
    "SDXL 1024": Published(
        lambda: UNet2DConditionModel(**SDXL),
        (meta(1, 4, 128, 128), meta_ids(), meta(1, 77, 2048)),
        {"added_cond_kwargs": {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)}},
        2_567_463_684,
        {"module": 2989.7514, "aten": 3380.6182},
    ),
    "PixArt-alpha 1024": Published(
        lambda: PixArtTransformer2DModel(**PIXART_ALPHA_1024),
        (meta(1, 4, 128, 128), meta(1, 120, 4096), meta_ids()),
        {
            "added_cond_kwargs": {"resolution": meta(1, 2), "aspect_ratio": meta(1, 1)},
            "encoder_attention_mask": meta(1, 120),
        },
        611_349_152,
        {"module": 2140.9952, "aten": 3254.7618},
    ),
    "U-ViT-S/2 32": Published(UViT, (meta(1, 3, 32, 32), meta(1)), {}, 44_255_328, {"linear": 11.3216, "aten": 12.201}),
}
FIGURES = [(name, convention) for name, network in PUBLISHED.items() for convention in network.giga]


@cache
def published_trace(name: str) -> tuple[nn.Module, Trace]:
    published = PUBLISHED[name]
    with torch.device("meta"):
        network = published.build()
    return network, trace(network, lambda: network(*published.args, **published.kwargs))


@cache
def published_ledger(name: str) -> Ledger:
    return ledger_of(*published_trace(name))


def digits(figure: float) -> int:
    return len(str(figure).partition(".")[2])


@pytest.mark.parametrize(("name", "convention"), FIGURES)
def test_published_figures_to_the_digit(name: str, convention: Convention) -> None:
    figure = PUBLISHED[name].giga[convention]
    assert round(published_ledger(name).macs(convention) / GIGA, digits(figure)) == figure


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_agree_at_the_dispatcher_layer_by_layer(name: str) -> None:
    _, record = published_trace(name)
    assert {s: n for s, n in record.products.items() if n} == dict(record.dispatched)
    assert sum(record.dispatched.values()) == published_ledger(name).macs()
    assert published_ledger(name).by_kind()["other"] == 0
    assert published_ledger(name).parameters == PUBLISHED[name].parameters


def test_count_is_the_ledger_of_a_trace() -> None:
    name = "U-ViT-S/2 32"
    network, published = published_trace(name)[0], PUBLISHED[name]
    assert count(network, *published.args, **published.kwargs) == published_ledger(name)


# Stages in the order down, mid, up; what is left is the shell: first and last convolution, time embedding.
STAGES: dict[str, dict[Convention, list[float]]] = {
    "SD-1.5 512": {
        "module": [32.9392, 31.3169, 31.4594, 3.7791, 6.0285, 12.9049, 75.1374, 79.1231, 66.0427],
        "aten": [54.7755, 34.1819, 31.8852, 3.7782, 6.0498, 12.9024, 75.7724, 83.4118, 98.7832],
    },
    "SD-2.1 768": {
        "module": [74.0310, 70.3163, 70.4989, 8.4990, 13.4209, 29.0300, 168.6322, 177.8069, 148.4727],
        "aten": [183.5724, 84.3183, 72.4038, 8.4967, 13.4987, 29.0243, 171.4810, 198.7899, 312.7534],
    },
    "SDXL 1024": {
        "module": [64.24, 185.88, 672.63, 369.88, 1126.41, 407.42, 162.89],
        "aten": [64.17, 273.29, 730.18, 398.65, 1212.71, 538.49, 162.74],
    },
}
SHELLS = {"SD-1.5 512": 0.1004, "SD-2.1 768": 0.2233, "SDXL 1024": 0.40}


def stages(ledger: Ledger, convention: Convention, levels: int) -> list[int]:
    names = [f"down_blocks.{i}" for i in range(levels)] + ["mid_block"]
    return [ledger.inside(name, convention) for name in names + [f"up_blocks.{i}" for i in range(levels)]]


@pytest.mark.parametrize(("name", "convention"), [(name, c) for name in STAGES for c in STAGES[name]])
def test_stages_of_u_nets(name: str, convention: Convention) -> None:
    expected = STAGES[name][convention]
    found = stages(published_ledger(name), convention, len(expected) // 2)
    places = 2 if name.startswith("SDXL") else 4
    assert [round(macs / GIGA, places) for macs in found] == expected


@pytest.mark.parametrize("name", STAGES)
def test_shells_of_u_nets(name: str) -> None:
    ledger = published_ledger(name)
    shell = ledger.macs("module") - sum(stages(ledger, "module", len(STAGES[name]["module"]) // 2))
    assert round(shell / GIGA, digits(SHELLS[name])) == SHELLS[name]


def test_dit_differs_from_the_reference_network_by_its_repeated_timestep_embedders() -> None:
    """118.62 (and 114.39 without attention) are of the network with one embedder; diffusers runs 29."""
    ledger, tokens, width, depth = published_ledger("DiT-XL/2 256"), 256, 1152, 28
    by_layer = ledger.by_layer()

    embedder = 256 * width + width * width
    embedders = [n for layer, n in by_layer.items() if ".timestep_embedder." in layer]
    # One in each block, and that of block 0 once more for the output layer.
    assert sum(embedders) == (depth + 1) * embedder

    matmuls = 12 * width**2 * tokens + 2 * tokens**2 * width
    modulation = 6 * width**2
    blocks = depth * (matmuls + modulation)
    output = 2 * width**2 + tokens * width * 4 * 8
    patches = tokens * width * 4 * 4
    assert ledger.macs() == blocks + output + patches + 29 * embedder

    reference = ledger.macs() - 28 * embedder
    without_attention = reference - ledger.by_kind()["attention"]
    assert [round(n / GIGA, 2) for n in (ledger.macs(), reference, without_attention)] == [
        118.67,
        118.62,
        114.39,
    ]
    # Leaving the last embedder and the patch convolution out as well, products of blocks and output alone, is
    # too little to change those digits.
    assert round((blocks + output) / GIGA, 2) == 118.62


def test_parts_of_transformer_blocks() -> None:
    dit, pixart = published_ledger("DiT-XL/2 256"), published_ledger("PixArt-alpha 1024")
    block = "transformer_blocks.1"
    giga = [dit.inside(f"{block}.{part}") / GIGA for part in ("attn1", "ff", "norm1")]
    assert [round(n, 4) for n in (*giga, dit.inside(block) / GIGA)] == [1.5099, 2.7179, 0.0096, 4.2374]
    parts = ("attn1", "attn2", "ff")
    assert [round(pixart.inside(f"{block}.{p}") / GIGA, 4) for p in parts] == [60.3980, 12.3226, 43.4865]
    module = [round(pixart.inside(f"{block}.{p}", "module") / GIGA, 4) for p in parts]
    assert module == [21.7433, 11.1901, 43.4865]


def test_uvit_under_two_of_four() -> None:
    """Every block layer but skip_linear keeps 6.946 of 12.201 G; every one of them masked, less."""
    ledger = published_ledger("U-ViT-S/2 32")
    blocks = [row.layer for row in ledger.rows if "block" in row.layer and row.kind == "linear"]
    released = {name: Sparsity(2, 4) for name in blocks if "skip_linear" not in name}
    assert round(float(ledger.kept(released)) / GIGA, 3) == 6.946
    assert round(float(ledger.kept(released, "linear")) / GIGA, 3) == 6.067
    everything = dict.fromkeys(blocks, Sparsity(2, 4))
    assert round(float(ledger.kept(everything, "linear")) / GIGA, 3) == 5.662
    assert ledger.accelerable(everything) == ledger.masked(everything) == sum(ledger.by_layer()[b] for b in blocks)


def test_published_images() -> None:
    """50 steps of SD-1.5 and SD-2.1, one pass each; 20 steps of PixArt-alpha with guidance; 250 of DiT."""
    sd15, pixart = published_ledger("SD-1.5 512"), published_ledger("PixArt-alpha 1024")
    assert macs_per_image(sd15.macs("module"), 50) // 10**10 == 1694
    assert macs_per_image(published_ledger("SD-2.1 768").macs("module"), 50) // 10**10 == 3804
    assert macs_per_image(pixart.macs("module"), 20, guidance=4.5) // 10**10 == 8563
    assert macs_per_image(published_ledger("DiT-XL/2 256").macs(), 250) // 10**10 == 2966
