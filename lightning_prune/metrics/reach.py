"""What each way of pruning may touch in a network, and why it may not touch the rest: from shapes alone.

There are three ways: masks on *weights*, cuts of inner *widths*, and *gates* on blocks at a step. Each partitions the
weighted layers of a network into those it reaches and those it does not, with a reason for the latter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_prune.blocks import BlockGraph
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.metrics.block_costs import block_costs
from lightning_prune.metrics.macs import Convention, Ledger
from lightning_prune.protocols import InputError, WidthGroup

Axis = Literal["weights", "widths", "gates"]
Reason = Literal["", "shape", "tie", "fused", "convolution", "kept", "shell"]

EXPLANATIONS: Mapping[Reason, str] = {
    "shape": "the input dimension does not divide by the pattern",
    "tie": "its width is that of the stream all blocks share",
    "fused": "several projections, or image and prompt, share one tensor or its heads",
    "convolution": "a convolution's channels are those of its stage; only inner ones of ResNet blocks can go",
    "kept": "embedding, modulation or output, or left out by the config",
    "shell": "outside all blocks: it runs at every step in which anything does",
}


@dataclass(frozen=True)
class Reach:
    """One layer under one way of pruning.

    Attributes:
        layer: qualified name.
        touched: whether that way may change what it costs.
        reason: why not; empty where it may.
    """

    layer: str
    touched: bool
    reason: Reason = ""


def weight_reach(denoiser: Denoiser, chosen: Collection[str], m: int) -> list[Reach]:
    """Masks on groups of m inputs, for the layers that were `chosen`."""
    return [
        Reach(unit.name, True)
        if unit.name in chosen
        else Reach(unit.name, False, "shape" if unit.group_size % m else "kept")
        for unit in denoiser.anatomy()
    ]


def width_groups(denoiser: Denoiser) -> tuple[Sequence[WidthGroup], str]:
    """The inner widths that the family describes, and why they cannot be cut where that is so."""
    try:
        return denoiser.groups(), ""
    except InputError as error:
        return (), str(error)


def width_reach(denoiser: Denoiser, groups: Sequence[WidthGroup]) -> list[Reach]:
    """Cuts of inner widths."""
    layers = {cut.parameter.rpartition(".")[0] for group in groups for cut in group.cuts}
    return [
        Reach(unit.name, True) if unit.name in layers else Reach(unit.name, False, _why_whole(denoiser, unit.name))
        for unit in denoiser.anatomy()
    ]


def _why_whole(denoiser: Denoiser, name: str) -> Reason:
    if any(re.fullmatch(pattern, name) for pattern in denoiser.default_dense()):
        return "kept"
    if isinstance(denoiser.network.get_submodule(name), nn.Conv2d):
        return "convolution"
    # Attention that has heads of its own is a width group; what is left shares them. Flux's single blocks read
    # attention and feed-forward channels side by side.
    owner = denoiser.network.get_submodule(name.rpartition(".")[0].removesuffix(".to_out"))
    joint = any(hasattr(owner, part) for part in ("to_q", "qkv", "proj_mlp"))
    return "fused" if joint else "tie"


def gate_reach(denoiser: Denoiser, graph: BlockGraph) -> list[Reach]:
    """Gates on the blocks of a graph."""
    inside = tuple(f"{module}." for block in graph.blocks for module in block.modules)
    return [
        Reach(unit.name, True) if f"{unit.name}.".startswith(inside) else Reach(unit.name, False, "shell")
        for unit in denoiser.anatomy()
    ]


def graphs(denoiser: Denoiser) -> tuple[dict[str, BlockGraph], str]:
    """The family's block graphs by granularity, and why there is none where that is so."""
    found, refusal = {}, ""
    for granularity in ("coarse", "fine", "block", "half"):
        try:
            found[granularity] = denoiser.blocks(granularity)
        except InputError as error:
            refusal = str(error)
    return found, "" if found else refusal


def reached_macs(
    denoiser: Denoiser, ledger: Ledger, reach: Sequence[Reach], axis: Axis, graph: BlockGraph | None
) -> int:
    """MACs (aten) of what is touched: with heads and with blocks go the attention products in them."""
    if axis == "gates":
        assert graph is not None
        return sum(block_costs(ledger, graph).blocks)
    touched = {entry.layer for entry in reach if entry.touched}
    if axis == "widths":
        heads = {group.name for group in denoiser.groups() if group.kind == "heads"}
        touched |= {row.layer for row in ledger.rows if row.kind == "attention" and row.layer in heads}
    return sum(row.macs() for row in ledger.rows if row.layer in touched)


def reached_parameters(denoiser: Denoiser, reach: Sequence[Reach]) -> int:
    """Parameters of touched layers, biases included."""
    layers = [denoiser.network.get_submodule(entry.layer) for entry in reach if entry.touched]
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))


@dataclass(frozen=True)
class BlockRow:
    """One block of a graph: its MACs in two conventions, its parameters, and what goes with it (gamma)."""

    name: str
    macs: Mapping[Convention, int]
    parameters: int
    saved_with_it: float


def block_table(denoiser: Denoiser, ledger: Ledger, graph: BlockGraph) -> list[BlockRow]:
    """Every block of a graph; gamma is in the `module` convention, as published."""
    conventions: tuple[Convention, ...] = ("module", "aten")
    costs = {convention: block_costs(ledger, graph, convention) for convention in conventions}
    shares = costs["module"].cascade_shares(graph)
    return [
        BlockRow(
            block.name,
            {convention: costs[convention].blocks[i] for convention in conventions},
            sum(p.numel() for name in block.modules for p in denoiser.network.get_submodule(name).parameters()),
            shares[i],
        )
        for i, block in enumerate(graph.blocks)
    ]
