"""A masked training step against a dense one at the true size of DiT-XL/2.

    python benchmarks/gpu/training.py

bfloat16 autocast, random weights, which serve for time. Masks are derived again after every optimizer step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.process import Process
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units

sys.path.insert(0, str(Path(__file__).parent))
from measure import Cell, Facts, measure, parser, timed
from networks import network


def step(name: str, masked: bool, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that runs one optimizer step on a fixed batch."""
    denoiser, process, masks = (
        network(name, device, torch.float32).requires_grad_(True).train(),
        Process(clip_sample=False),
        None,
    )
    if masked:
        units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
        masks = MaskSet(denoiser.network, units, Sparsity(2, 4))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-5)
    x0, noise = torch.randn(2, batch, *denoiser.sample_shape, device=device)
    t = torch.randint(0, process.timesteps, (batch,), device=device)
    labels = torch.randint(0, denoiser.num_classes, (batch,), device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = mse_loss(denoiser(process.add_noise(x0, noise, t), t, labels), process.target(x0, noise, t))
        loss.backward()
        if masks is not None:
            masks.add_decay(2e-4)
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None:
            masks.refresh()

    return run


def cells(options: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    """A step at two batch sizes."""
    name, batches = ("toy transformer", (2,)) if options.toy else ("DiT-XL/2", (64, 32))

    def found(batch: int) -> Facts:
        arms = {"dense": step(name, False, batch, device), "masked": step(name, True, batch, device)}
        made = timed(arms, options.repeats)
        rates = {arm: 1e3 * batch / times["median_ms"] for arm, times in made["arms"].items()}
        return {**made, "images_per_second": rates}

    for batch in batches:
        yield Cell(f"{name}, batch {batch}", {"network": name, "batch": batch}, 1.5, partial(found, batch))


if __name__ == "__main__":
    sys.exit(measure("training", cells, parser(__doc__).parse_args()))
