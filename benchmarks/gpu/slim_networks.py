"""MosaicDiff at true sizes: seconds of slim networks against their MACs, and what pruning DiT-XL/2 costs.

    python benchmarks/gpu/slim_networks.py

Widths are cut evenly; which units go does not matter for time. `macs_kept` stands beside the ratio of seconds.
Pruning is statistics of all layers in five stages on random latents, then even surgery at a third of the MACs and
recalibration, run once; what the measured allocation probes is not in it. It is done on the first blocks of DiT-XL/2
alone (`--layers`, of 28), as all of them take longer than ten minutes: orders of removal cost in
proportion to blocks, recalibration to their square. It stands beside sampling with the dense network of as many blocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from lightning_prune.diffusion.conditions import move
from lightning_prune.diffusion.gating import sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff.plan import draw_in_bins, refine, sampling_grid, stages_for
from lightning_prune.methods.mosaicdiff.pruner import Pruner
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.mosaicdiff.sensitivity import Probe
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.structural import Width, slim

sys.path.insert(0, str(Path(__file__).parent))
from measure import MODES, Cell, Facts, measure, once, parser, savings_kept, timed
from networks import inputs, network, timed_calls

REMOVED = (0.25, 0.5)
RECALIBRATED = 256  # images
PROCESS = Process(clip_sample=False)
# Minutes of a cell, eager and compiled, and the batch sizes.
LARGE = {"DiT-XL/2": (0.2, 2.2), "SDXL": (0.4, 7.5)}
TOYS = {"toy transformer": (0.0, 0.0), "toy U-Net": (0.0, 0.0)}
# Small batches wait for the CPU that launches kernels, whatever the networks cost.
BATCHES, TOY_BATCHES = {"DiT-XL/2": (64, 8, 1), "SDXL": (8, 1)}, (2,)


def thinner(denoiser: Denoiser, share: float) -> tuple[Denoiser, float]:
    """The denoiser with a share of every width gone, and the share of its MACs that is left."""
    groups = list(denoiser.groups())
    widths = {g.name: Width(tuple(range(max(1, round((1 - share) * g.units))))) for g in groups}
    thin = sharing_copy(denoiser)
    thin.network = slim(denoiser.network, groups, widths)
    return thin, count_denoiser(thin).macs() / count_denoiser(denoiser).macs()


@lru_cache(maxsize=1)
def arms_of(name: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Denoiser], dict[str, float]]:
    """The dense and the slim networks, and the share of MACs that each of these keeps; cells share them."""
    dense = network(name, device, dtype)
    thin = {f"{share:g} of widths gone": thinner(dense, share) for share in REMOVED}
    networks = {"dense": dense, **{arm: denoiser for arm, (denoiser, _) in thin.items()}}
    return networks, {arm: kept for arm, (_, kept) in thin.items()}


def prune(denoiser: Denoiser, steps: int, batches: int, batch: int) -> Callable[[], object]:
    """Statistics of all stages and layers on random latents, then a recipe at a third of the MACs."""
    sampler, recipe = Sampler(steps=steps), Recipe(allocation="uniform", stages=min(5, steps))
    device = next(denoiser.parameters()).device

    def run() -> object:
        grid, visited = sampling_grid(PROCESS, sampler), sampler.visited(PROCESS)
        bins = refine([stages_for(recipe, grid, 1.0)])
        curvature = Curvature(denoiser.network, denoiser.groups(), len(bins))
        generator, kept = torch.Generator().manual_seed(0), []
        for _ in range(batches):
            bin_of, t = draw_in_bins(bins, visited, PROCESS, batch, generator)
            x, _, cond = inputs(denoiser, batch)
            with torch.no_grad(), curvature.collecting(bin_of):
                denoiser(x, t.to(device), cond)
            if len(kept) * batch < RECALIBRATED:
                # A data module's batches are on the CPU, and so is the noise that is added to them later.
                kept.append((x.cpu(), move(cond, "cpu")))
        probe = Probe(denoiser, PROCESS, sampler, denoiser.blank_condition(2, device))
        return Pruner(denoiser, PROCESS, sampler, bins, curvature, 1.0, 1e-3, probe, kept=kept).prune(recipe, 0.33)

    return run


def sample(denoiser: Denoiser, steps: int, images: int) -> Callable[[], object]:
    """Images of the dense network."""
    cond = denoiser.blank_condition(images, "cpu")
    return lambda: sample_images(denoiser, PROCESS, torch.arange(images), cond, Sampler(steps=steps))


def cost_of_pruning(options: argparse.Namespace, device: torch.device) -> Facts:
    """One pruning beside turns of sampling."""
    steps, batches, batch, images = sizes(options.toy)
    name, changes = ("toy transformer", {}) if options.toy else ("DiT-XL/2", {"num_layers": options.layers})
    denoiser = network(name, device, torch.float32, **changes)
    found = timed({"dense": sample(denoiser, steps, images)}, 2)
    pruning = once(prune(denoiser, steps, batches, batch), device)
    found["arms"]["pruning"] = pruning
    found["ratio"]["pruning"] = pruning["median_ms"] / found["arms"]["dense"]["median_ms"]
    return found


def sizes(toy: bool) -> tuple[int, int, int, int]:
    """Steps of the trajectory, calibration batches, samples of a batch, and images that are sampled."""
    return (4, 2, 8, 2) if toy else (50, 16, 32, 32)


def cells(options: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    """Calls of slim networks, eager and compiled; between them pruning."""
    dtype = torch.float32 if options.toy else torch.bfloat16

    def found(name: str, batch: int, mode: str) -> Facts:
        arms, kept = arms_of(name, dtype, device)
        timed_arms = timed_calls(arms, batch, mode, options.repeats)
        return {"macs_kept": kept, "saving_kept": savings_kept(timed_arms["ratio"], kept), **timed_arms}

    def calls(names: dict[str, tuple[float, float]], mode: str) -> Iterator[Cell]:
        pairs = [(name, batch) for name in names for batch in (TOY_BATCHES if options.toy else BATCHES[name])]
        for name, batch in pairs:
            make, minutes = partial(found, name, batch, mode), names[name]
            about = {"network": name, "batch": batch}
            yield Cell(f"{name}, batch {batch}, {mode}", about, minutes[MODES.index(mode)], make, mode)

    yield from calls(TOYS if options.toy else LARGE, "eager")
    if not options.toy:
        yield from calls({"DiT-XL/2": LARGE["DiT-XL/2"]}, "compiled")
    steps, batches, batch, images = sizes(options.toy)
    about = {
        "network": "toy transformer" if options.toy else "DiT-XL/2",
        "blocks": 2 if options.toy else options.layers,
        "blocks_in_full": 2 if options.toy else 28,
        "images_sampled": images,
        "calibration": batches * batch,
        "recalibrated_on": min(RECALIBRATED, batches * batch),
        "steps": steps,
    }
    minutes = 0.0 if options.toy else 5.0 * options.layers / 7
    name = f"pruning {about['blocks']} of {about['blocks_in_full']} blocks of {about['network']}"
    yield Cell(name, about, minutes, partial(cost_of_pruning, options, device))
    if not options.toy:
        yield from calls({"SDXL": LARGE["SDXL"]}, "compiled")


def main() -> int:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=7, help="blocks of DiT-XL/2 that are pruned; default 7 of 28")
    return measure("slim_networks", cells, options.parse_args())


if __name__ == "__main__":
    sys.exit(main())
