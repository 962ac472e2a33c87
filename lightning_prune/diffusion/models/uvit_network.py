"""The network U-ViT (Bao et al. 2023, "All are Worth Words"), on timm's layers.

Parameters have the names of the public checkpoints, so these load as they are. Shapes: B samples, C channels, L tokens,
D their width.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

_LONGEST_PERIOD = 10000.0
_INIT_STD = 0.02


class UViTModel(ModelMixin, ConfigMixin):
    """A vision transformer over time, condition and patches alike, with long skips from its first half to its last.

    Arguments have the names of the public configurations.

    Args:
        img_size: height and width of a sample.
        patch_size: side of a patch.
        in_chans: channels of a sample.
        embed_dim: D.
        depth: blocks besides the middle one, an even number.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward part over D.
        qkv_bias: whether the fused projection to queries, keys and values has a bias.
        mlp_time_embed: whether the sinusoid of the timestep passes through two layers.
        num_classes: rows of the label table, the last of them for "no class"; 0 or less is none.
        clip_dim: width of a prompt's embedding; null is a network without prompt.
        num_clip_token: length of the prompt.
        conv: whether a 3x3 convolution follows the last layer.
        skip: whether there are long skips.
    """

    # Public checkpoints have none; SparseDM's code trains them from zero.
    may_be_missing = r".*\.attn\.qkv\.bias"

    @register_to_config
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        clip_dim: int | None = None,
        num_clip_token: int = 77,
        conv: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        _check(img_size, patch_size, embed_dim, depth, num_heads, num_classes, clip_dim)
        width = embed_dim

        def block(with_skip: bool) -> Block:
            return Block(width, num_heads, mlp_ratio, qkv_bias, with_skip)

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, width)
        layers = (nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.time_embed = nn.Sequential(*layers) if mlp_time_embed else nn.Identity()
        self.label_emb = nn.Embedding(num_classes, width) if num_classes > 0 else None
        self.context_embed = nn.Linear(clip_dim, width) if clip_dim else None
        self.extras = 1 + (num_classes > 0) + (num_clip_token if clip_dim else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (img_size // patch_size) ** 2, width))
        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        trunc_normal_(self.pos_embed, std=_INIT_STD)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=_INIT_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Prediction [B, C, H, W] at timesteps `t` [B] for `labels` [B] or `prompt` [B, L, clip_dim]."""
        patches = self.patch_embed(x)
        tokens = torch.cat([*self._extra_tokens(t, labels, prompt), patches], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, self.extras :]
        output: Tensor = self.final_layer(self._unpatch(patches, x))
        return output

    def _extra_tokens(self, t: Tensor, labels: Tensor | None, prompt: Tensor | None) -> list[Tensor]:
        """The label first, then the time, then the prompt, each [B, ., D]."""
        width = self.pos_embed.shape[-1]
        time = self.time_embed(sinusoid(t, width).to(self.pos_embed.dtype))[:, None]
        tokens = [time] if self.label_emb is None else [self.label_emb(labels)[:, None], time]
        return tokens if self.context_embed is None else [*tokens, self.context_embed(prompt)]

    def _unpatch(self, patches: Tensor, like: Tensor) -> Tensor:
        """[B, L, p * p * C] in (row, column, channel) order to the shape of `like`."""
        side = self.config.patch_size
        rows, columns = (length // side for length in like.shape[-2:])
        grid = patches.unflatten(-1, (side, side, -1)).unflatten(1, (rows, columns))
        image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)
        return image


class Block(nn.Module):
    """Attention and feed-forward part before norms; with `skip`, tokens of an early block are merged in first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Embedding [B, width] of timesteps: cosines, then sines, of frequencies from 1 down to 1 / 10000."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _check(
    img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, num_classes: int, clip_dim: int | None
) -> None:
    if img_size % patch_size:
        raise ValueError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
    if embed_dim % num_heads or embed_dim % 2:
        raise ValueError(f"embed_dim {embed_dim} is odd or no multiple of num_heads {num_heads}")
    if depth % 2:
        raise ValueError(f"depth {depth} is odd; long skips join its halves")
    if num_classes > 0 and clip_dim:
        raise ValueError("num_classes and clip_dim are both given; a network has classes or prompts")
