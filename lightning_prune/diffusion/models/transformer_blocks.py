"""The blocks of transformers whose blocks follow each other on one stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.blocks import Block, BlockGraph
from lightning_prune.protocols import InputError


def transformer_blocks(names: Sequence[str], parts: Sequence[tuple[str, str]], granularity: str) -> BlockGraph:
    """Blocks of a chain ("block"), or the parts of each that add to the stream ("half").

    Args:
        names: qualified names of the blocks, in running order.
        parts: a letter and the name inside a block of each part; modulation and residual stay with the block.
        granularity: "block" or "half".

    Raises:
        InputError: another granularity.
    """
    if granularity == "block":
        whole = [Block(f"B{i}", (name,), (f"B{i - 1}",) if i else ()) for i, name in enumerate(names)]
        return BlockGraph("block", tuple(whole), (f"B{len(names) - 1}",), ("residual", "output"))
    if granularity != "half":
        raise InputError(f"granularity: {granularity!r}: this transformer has block and half")
    found = [(f"{letter}{i}", f"{name}.{part}") for i, name in enumerate(names) for letter, part in parts]
    halves = tuple(Block(name, (module,), increment=True) for name, module in found)
    return BlockGraph("half", halves, tuple(name for name, _ in found), ("residual",), independent=True)
