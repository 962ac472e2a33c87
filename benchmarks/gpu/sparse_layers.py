"""2:4 against dense, layer by layer, at the shapes of real transformer blocks.

    python benchmarks/gpu/sparse_layers.py

Each layer of U-ViT-S/2, U-ViT-L/2, DiT-XL/2, and of Stable Diffusion 1.5's and XL's transformer blocks, in bfloat16 and
float16, for 1 to 64 images, eager and compiled, in interleaved turns of some calls in a row, so that launching and
waiting hide less of a small kernel. Cells that lose are there like those that win.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.export.semi_structured import accelerate
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.nm import nm_mask

sys.path.insert(0, str(Path(__file__).parent))
from measure import MODES, Cell, Facts, measure, parser, timed


@dataclass(frozen=True)
class Shape:
    """A linear layer of a network: outputs, inputs, and rows that one image gives it."""

    network: str
    layer: str
    outputs: int
    inputs: int
    tokens: int


def _block(network: str, width: int, hidden: int, tokens: int, fused: bool) -> Iterator[Shape]:
    yield Shape(network, "qkv" if fused else "q", 3 * width if fused else width, width, tokens)
    yield Shape(network, "attention output", width, width, tokens)
    yield Shape(network, "feed-forward in", hidden, width, tokens)
    yield Shape(network, "feed-forward out", width, 4 * width, tokens)


SHAPES = [
    *_block("DiT-XL/2", 1152, 4608, 256, False),
    *_block("SDXL, 32 x 32", 1280, 10240, 1024, False),
    *_block("SDXL, 64 x 64", 640, 5120, 4096, False),
    *_block("SD-1.5, 64 x 64", 320, 2560, 4096, False),
    *_block("SD-1.5, 32 x 32", 640, 5120, 1024, False),
    *_block("SD-1.5, 16 x 16", 1280, 10240, 256, False),
    *_block("U-ViT-L/2", 1024, 4096, 258, True),
    *_block("U-ViT-S/2", 512, 2048, 257, True),
]
TOYS = [Shape("toy", "square", 64, 64, 8)]
BATCHES, TOY_BATCHES = (16, 1, 64, 4), (1, 2)
CALLS = 20
MINUTES = {"eager": 0.02, "compiled": 0.15}


def arms(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, mode: str) -> dict[str, Any]:
    """A dense and a 2:4 layer on the same input; on a CPU, for toys, the second is dense with zeros."""
    x = torch.randn(batch * shape.tokens, shape.inputs, device=device, dtype=dtype)
    dense, sparse = (nn.Sequential(nn.Linear(shape.inputs, shape.outputs)).to(device, dtype) for _ in range(2))
    weight = sparse[0].get_parameter("weight")
    weight.data.mul_(nm_mask(weight, Sparsity(2, 4)))
    if device.type == "cuda":
        accelerate(sparse, ("0",), device)

    def call(network: Any) -> Callable[[], object]:
        run = torch.compile(network, dynamic=False) if mode == "compiled" else network

        @torch.no_grad()
        def calls() -> None:
            for _ in range(CALLS):
                run(x)

        return calls

    return {"dense": call(dense), "2:4": call(sparse)}


def cells(options: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    """bfloat16 before float16, eager before compiled, 16 images before other numbers."""
    shapes, batches = (TOYS, TOY_BATCHES) if options.toy else (SHAPES, BATCHES)
    dtypes = (torch.bfloat16,) if options.toy else (torch.bfloat16, torch.float16)

    def found(shape: Shape, batch: int, dtype: torch.dtype, mode: str) -> Facts:
        return timed(arms(shape, batch, dtype, device, mode), options.repeats, mode, calls=CALLS)

    for dtype, mode, batch, shape in product(dtypes, MODES[:1] if options.toy else MODES, batches, shapes):
        kind = str(dtype).removeprefix("torch.")
        about = {**vars(shape), "dtype": kind, "batch": batch, "calls_in_a_row": CALLS}
        name = f"{shape.network}, {shape.layer}, {kind}, batch {batch}, {mode}"
        yield Cell(name, about, MINUTES[mode], partial(found, shape, batch, dtype, mode), mode)


if __name__ == "__main__":
    sys.exit(measure("sparse_layers", cells, parser(__doc__).parse_args()))
