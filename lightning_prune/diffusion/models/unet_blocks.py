"""The blocks of diffusers' U-Nets, coarse and fine, from their layout alone."""

from __future__ import annotations

from typing import Any

from lightning_prune.blocks import Block, BlockGraph
from lightning_prune.protocols import InputError


def unet_blocks(network: Any, granularity: str) -> BlockGraph:
    """The blocks of a U-Net with `down_blocks`, a `mid_block` and `up_blocks`.

    "coarse": a stage is a block; D0, D1, ... M ..., U1, U0, with U0 the last to run. "fine": a pair of resnet and
    attention is, and a downsampler; an upsampler belongs to the last pair of its stage; d1, ... m, ... u0, where u_i
    reads the skip connection that d_i makes. What a skipped block gave last is reused whole.

    Raises:
        InputError: another granularity, or stages with skip connections of images.
    """
    if any(hasattr(stage, "skip_conv") for stage in [*network.down_blocks, *network.up_blocks]):
        raise InputError("granularity: U-Nets whose stages pass images on beside features have no gates")
    if granularity == "coarse":
        return _coarse(network)
    if granularity == "fine":
        return _fine(network)
    raise InputError(f"granularity: {granularity!r}: a U-Net has coarse and fine")


def _coarse(network: Any) -> BlockGraph:
    blocks: list[Block] = []
    skips: list[str | None] = [None]  # who made each skip tensor; the first is the first convolution's
    last: str | None = None
    for i, stage in enumerate(network.down_blocks):
        blocks.append(Block(f"D{i}", (f"down_blocks.{i}",), (last,) if last else ()))
        last = f"D{i}"
        skips += [last] * (len(stage.resnets) + len(_layers(stage, "downsamplers")))
    if network.mid_block is not None:
        blocks.append(Block("M", ("mid_block",), (last,) if last else ()))
        last = "M"
    for i, stage in enumerate(network.up_blocks):
        count = len(stage.resnets)
        read = [last, *reversed(skips[-count:])]
        skips = skips[:-count]
        last = f"U{len(network.up_blocks) - 1 - i}"
        blocks.append(Block(last, (f"up_blocks.{i}",), tuple(dict.fromkeys(name for name in read if name))))
    assert last is not None
    return BlockGraph("coarse", tuple(blocks), (last,))


def _fine(network: Any) -> BlockGraph:
    blocks: list[Block] = []
    last: str | None = None
    branches = [b for i, stage in enumerate(network.down_blocks) for b in _down_branches(stage, f"down_blocks.{i}")]
    for number, modules in enumerate(branches, start=1):
        blocks.append(Block(f"d{number}", modules, (last,) if last else ()))
        last = f"d{number}"
    if network.mid_block is not None:
        blocks.append(Block(f"m{len(branches) + 1}", ("mid_block",), (last,) if last else ()))
        last = blocks[-1].name
    up = [b for i, stage in enumerate(network.up_blocks) for b in _up_branches(stage, f"up_blocks.{i}")]
    for number, modules in zip(reversed(range(len(up))), up, strict=True):
        read = (last, f"d{number}" if number else None)
        last = f"u{number}"
        blocks.append(Block(last, modules, tuple(name for name in read if name)))
    assert last is not None
    return BlockGraph("fine", tuple(blocks), (last,))


def _down_branches(stage: Any, name: str) -> list[tuple[str, ...]]:
    samplers = [(f"{name}.downsamplers.{i}",) for i in range(len(_layers(stage, "downsamplers")))]
    return [*_pairs(stage, name), *samplers]


def _up_branches(stage: Any, name: str) -> list[tuple[str, ...]]:
    *others, final = _pairs(stage, name)
    samplers = tuple(f"{name}.upsamplers.{i}" for i in range(len(_layers(stage, "upsamplers"))))
    return [*others, (*final, *samplers)]


def _pairs(stage: Any, name: str) -> list[tuple[str, ...]]:
    attentions = _layers(stage, "attentions")
    return [
        (f"{name}.resnets.{i}", f"{name}.attentions.{i}") if i < len(attentions) else (f"{name}.resnets.{i}",)
        for i in range(len(stage.resnets))
    ]


def _layers(stage: Any, name: str) -> list[Any]:
    return list(getattr(stage, name, None) or [])
