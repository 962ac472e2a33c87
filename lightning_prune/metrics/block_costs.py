"""What the blocks of a network cost."""

from __future__ import annotations

from typing import Any

from lightning_prune.blocks import BlockCosts, BlockGraph, CacheMode, GateSchedule
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.metrics.macs import Convention, Ledger, count_denoiser


def block_costs(ledger: Ledger, graph: BlockGraph, convention: Convention = "aten") -> BlockCosts:
    """MACs of the modules of every block, and of what is outside all blocks.

    Right where a block's modules work for it alone; `traced_costs` needs no such thing.
    """
    blocks = tuple(sum(ledger.inside(name, convention) for name in block.modules) for block in graph.blocks)
    shell = ledger.macs(convention) - sum(blocks)
    return BlockCosts(blocks, shell)


def traced_costs(denoiser: Denoiser, granularity: str, mode: CacheMode, convention: Convention = "aten") -> BlockCosts:
    """MACs that skipping each block alone saves in one call for one image, by tracing it skipped.

    A module inside a block may also work for the layers behind all blocks, as the embedding of DiT's first block
    does; that part stays with the shell.
    """
    graph = denoiser.blocks(granularity).in_mode(mode)
    dense = count_denoiser(denoiser).macs(convention)
    blocks = []
    for position in range(len(graph)):
        row = tuple(i != position for i in range(len(graph)))
        pruned: Any = gated(denoiser, GateSchedule(granularity, mode, graph.names, (graph.full(), row)))
        for step in (0, 1):
            pruned.at_step(step, 2)
            ledger = count_denoiser(pruned)
        blocks.append(dense - ledger.macs(convention))
    shell = dense - sum(blocks)
    return BlockCosts(tuple(blocks), shell)
