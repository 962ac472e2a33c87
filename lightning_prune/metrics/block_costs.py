"""What the blocks of a network cost, from its ledger."""

from __future__ import annotations

from lightning_prune.blocks import BlockCosts, BlockGraph
from lightning_prune.metrics.macs import Convention, Ledger


def block_costs(ledger: Ledger, graph: BlockGraph, convention: Convention = "aten") -> BlockCosts:
    """MACs of every block of `graph`, in its cache mode, and of what is outside all blocks."""
    blocks = tuple(sum(ledger.inside(name, convention) for name in block.modules) for block in graph.blocks)
    shell = ledger.macs(convention) - sum(blocks)
    return BlockCosts(blocks, shell, idle=shell if graph.independent else 0)
