"""MosaicDiff at true sizes: seconds of slim networks against their MACs, and what pruning DiT-XL/2 costs.

    python benchmarks/gpu/slim_networks.py

Widths are cut evenly; which units go does not matter for time. `macs_kept` stands beside the ratio of seconds.
Pruning is statistics of all layers in five stages on random latents, then even surgery at a third of the MACs; what the
measured allocation probes is not in it. It stands beside sampling with the dense network.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lightning_prune.diffusion.gating import sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff.plan import draw_in_bins, refine, sampling_grid, stages_for, visited_timesteps
from lightning_prune.methods.mosaicdiff.pruner import Pruner
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.mosaicdiff.sensitivity import Probe
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.structural import Width, slim

sys.path.insert(0, str(Path(__file__).parent))
from measure import attempt, cell, device_or_none, parser, peak_bytes, write
from networks import inputs, network, timed

REMOVED = (0.25, 0.5)
RECALIBRATED = 256  # images
PROCESS = Process(clip_sample=False)


def thinner(denoiser: Denoiser, share: float) -> tuple[Denoiser, float]:
    """The denoiser with a share of every width gone, and the share of its MACs that is left."""
    groups = list(denoiser.groups())
    widths = {g.name: Width(tuple(range(max(1, round((1 - share) * g.units))))) for g in groups}
    thin = sharing_copy(denoiser)
    thin.network = slim(denoiser.network, groups, widths)
    return thin, count_denoiser(thin).macs() / count_denoiser(denoiser).macs()


def prune(denoiser: Denoiser, steps: int, batches: int, batch: int) -> Callable[[], object]:
    """Statistics of all stages and layers on random latents, then a recipe at a third of the MACs."""
    sampler, recipe = Sampler(steps=steps), Recipe(allocation="uniform", stages=min(5, steps))
    device = next(denoiser.parameters()).device

    def run() -> object:
        grid, visited = sampling_grid(PROCESS, sampler), visited_timesteps(PROCESS, sampler)
        bins = refine([stages_for(recipe, grid, 1.0)])
        curvature = Curvature(denoiser.network, denoiser.groups(), len(bins))
        generator, kept = torch.Generator().manual_seed(0), []
        for _ in range(batches):
            bin_of, t = draw_in_bins(bins, visited, PROCESS, batch, generator)
            x, _, cond = inputs(denoiser, batch)
            with torch.no_grad(), curvature.collecting(bin_of):
                denoiser(x, t.to(device), cond)
            if len(kept) * batch < RECALIBRATED:
                kept.append((x, cond))
        probe = Probe(denoiser, PROCESS, sampler, denoiser.blank_condition(2, device))
        return Pruner(denoiser, PROCESS, sampler, bins, curvature, 1.0, 1e-3, probe, kept=kept).prune(recipe, 0.33)

    return run


def sample(denoiser: Denoiser, steps: int, images: int) -> Callable[[], object]:
    """Images of the dense network."""
    cond = denoiser.blank_condition(images, "cpu")
    return lambda: sample_images(denoiser, PROCESS, torch.arange(images), cond, Sampler(steps=steps))


def main() -> int:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    device = device_or_none(options.toy)
    if device is None:
        return 0
    names = ("toy transformer", "toy U-Net") if options.toy else ("DiT-XL/2", "SDXL")
    cells = []
    for name, batch in product(names, (2,) if options.toy else (1, 8)):
        dense = network(name, device, torch.float32 if options.toy else torch.bfloat16)
        thin = {f"{share:g} of widths gone": thinner(dense, share) for share in REMOVED}
        for compiled in (False,) if options.toy else (False, True):
            arms = {"dense": dense, **{arm: denoiser for arm, (denoiser, _) in thin.items()}}
            found = timed(arms, batch, compiled, options.repeats)
            kept = {arm: share for arm, (_, share) in thin.items()}
            cells.append({"network": name, "batch": batch, "compiled": compiled, "macs_kept": kept, **found})
            print(cells[-1], flush=True)
        torch.compiler.reset()
    cells.append(_cost_of_pruning(device, options.toy))
    print(cells[-1], flush=True)
    return write("slim_networks", device, cells, options.toy)


def _cost_of_pruning(device: torch.device, toy: bool) -> dict[str, Any]:
    steps, batches, batch, images = (4, 2, 8, 2) if toy else (50, 16, 32, 32)
    denoiser = network("toy transformer" if toy else "DiT-XL/2", device, torch.float32)
    pruning = prune(denoiser, steps, batches, batch)
    about = {"network": "pruning", "images_sampled": images, "calibration": batches * batch, "steps": steps}
    return {
        **about,
        "peak_bytes": peak_bytes(pruning, device),
        **attempt(lambda: cell({"dense": sample(denoiser, steps, images), "pruning": pruning}, 2)),
    }


if __name__ == "__main__":
    sys.exit(main())
