"""DiP-GO at the size of Stable Diffusion 1.5, 512 pixels, 50 DDIM steps: sampling under gates, and a search step.

    python benchmarks/gpu/gated_sampling.py

Arms at a budget of 0.35: the dense network, whole steps skipped, DeepCache's shallow reuse at equal cost, and random
gates, whose patterns are many; eager, and compiled one graph a pattern. `macs_kept` stands beside the ratio of seconds.
A search step is one unrolled trajectory forwards and backwards with whole steps checkpointed, beside dense sampling.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_prune.cli.bench_networks import Task
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import initial_noise
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.unroll import Unroll
from lightning_prune.methods.dipgo.controls import Control, GateProblem, rule
from lightning_prune.metrics.block_costs import traced_costs

sys.path.insert(0, str(Path(__file__).parent))
from measure import attempt, cell, device_or_none, parser, peak_bytes, write
from networks import network

PROCESS = Process(clip_sample=False)
RULES: tuple[Control, ...] = ("whole-steps", "uniform-reuse", "random-gates")
BUDGET = 0.35


def search_step(denoiser: Denoiser, problem: GateProblem, batch: int) -> Callable[[], object]:
    """One trajectory forwards and backwards in the gates."""
    unroll = Unroll(denoiser, problem.graph.granularity, problem.mode, PROCESS, problem.sampler)
    weight = next(denoiser.parameters())
    noise = initial_noise(torch.arange(batch), denoiser.sample_shape).to(weight)
    cond = denoiser.blank_condition(batch, weight.device)

    def run() -> object:
        gates = torch.ones(problem.steps, len(problem.graph), device=weight.device, requires_grad=True)
        unroll(noise, cond, gates).square().mean().backward()
        return gates.grad

    return run


def main() -> int:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    device = device_or_none(options.toy)
    if device is None:
        return 0
    steps, batch = (6, 2) if options.toy else (50, 4)
    dtype = torch.float32 if options.toy else torch.bfloat16
    name = "toy U-Net" if options.toy else "SD-1.5"
    denoiser = network(name, device, dtype)
    graph, costs = denoiser.blocks("fine").in_mode("output"), traced_costs(denoiser, "fine", "output")
    problem = GateProblem(graph, "output", costs, PROCESS, Sampler(steps=steps))
    schedules = {name: rule(name, problem, BUDGET) for name in RULES}
    kept = {name: costs.kept(schedule.rows) for name, schedule in schedules.items()}
    arms = {"dense": denoiser, **{name: gated(denoiser, schedule, PROCESS) for name, schedule in schedules.items()}}
    repeats, cells, task = max(2, options.repeats // 4), [], Task(PROCESS, steps)
    for mode in ("eager",) if options.toy else ("eager", "compiled"):
        found = attempt(
            lambda: cell({name: task.arm(arm, mode, batch) for name, arm in arms.items()}, repeats)  # noqa: B023
        )
        cells.append({"network": name, "batch": batch, "steps": steps, "mode": mode, "macs_kept": kept, **found})
        print(cells[-1], flush=True)
    step = search_step(denoiser, problem, 1)
    cells.append(
        {
            "network": f"{name}, search",
            "batch": 1,
            "steps": steps,
            "peak_bytes": peak_bytes(step, device),
            **attempt(lambda: cell({"dense": task.arm(denoiser, "eager", 1), "search step": step}, 2)),
        }
    )
    return write("gated_sampling", device, cells, options.toy)


if __name__ == "__main__":
    sys.exit(main())
