"""DiP-GO at the size of Stable Diffusion 1.5, 512 pixels, 50 DDIM steps: sampling under gates, and a search step.

    python benchmarks/gpu/gated_sampling.py

Arms at a budget of 0.35: the dense network, whole steps skipped, DeepCache's shallow reuse at equal cost, and random
gates, whose patterns are many; eager, and compiled one graph a pattern. `macs_kept` stands beside the ratio of seconds.
Random gates compile up to a graph a step, which the default `--minutes` never begins.
A search step is one unrolled trajectory forwards and backwards with whole steps checkpointed, beside dense sampling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from lightning_prune.blocks import GateSchedule
from lightning_prune.cli.bench_networks import Task
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import initial_noise
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.unroll import Unroll
from lightning_prune.methods.dipgo.controls import Control, GateProblem, rule
from lightning_prune.metrics.block_costs import traced_costs
from lightning_prune.metrics.latency import call_memory

sys.path.insert(0, str(Path(__file__).parent))
from measure import Cell, Facts, measure, parser, savings_kept, timed
from networks import network

PROCESS = Process(clip_sample=False)
# By rule, the minutes that compiling its patterns and the dense network may take.
RULES: dict[Control, float] = {"whole-steps": 2.5, "uniform-reuse": 4.0, "random-gates": 40.0}
BUDGET = 0.35


@lru_cache(maxsize=1)
def problem_of(name: str, steps: int, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, GateProblem]:
    """The dense network, and what a search on it is over; cells share them."""
    denoiser = network(name, device, dtype)
    graph, costs = denoiser.blocks("fine").in_mode("output"), traced_costs(denoiser, "fine", "output")
    return denoiser, GateProblem(graph, "output", costs, PROCESS, Sampler(steps=steps))


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


def cells(options: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    """Sampling eagerly, a search step, and sampling compiled, the fewest patterns first."""
    steps, batch = (6, 2) if options.toy else (50, 16)
    dtype = torch.float32 if options.toy else torch.bfloat16
    name = "toy U-Net" if options.toy else "SD-1.5"
    repeats, task = max(2, options.repeats // 4), Task(PROCESS, steps)

    def sampled(rules: tuple[Control, ...], mode: str) -> Facts:
        denoiser, problem = problem_of(name, steps, device, dtype)
        schedules: dict[str, GateSchedule] = {one: rule(one, problem, BUDGET) for one in rules}
        arms = {"dense": denoiser, **{one: gated(denoiser, schedules[one], PROCESS) for one in rules}}
        about = {
            "macs_kept": {one: problem.costs.kept(schedule.rows) for one, schedule in schedules.items()},
            "patterns": {one: len(schedule.patterns()) for one, schedule in schedules.items()},
        }
        found = timed({one: task.arm(arm, mode, batch) for one, arm in arms.items()}, repeats, mode)
        return {**about, "saving_kept": savings_kept(found["ratio"], about["macs_kept"]), **found}

    def searched() -> Facts:
        denoiser, problem = problem_of(name, steps, device, dtype)
        step = search_step(denoiser, problem, 1)
        found = timed({"dense": task.arm(denoiser, "eager", 1), "search step": step}, 2)
        return {**found, "peak_bytes": call_memory(step, device)}

    about = {"network": name, "batch": batch, "steps": steps}
    yield Cell(f"{name}, all rules, eager", about, 1.5, partial(sampled, tuple(RULES), "eager"))
    yield Cell(f"{name}, search step", {**about, "batch": 1}, 1.5, searched)
    if not options.toy:
        for one, minutes in RULES.items():
            yield Cell(f"{name}, {one}, compiled", about, minutes, partial(sampled, (one,), "compiled"), "compiled")


if __name__ == "__main__":
    sys.exit(measure("gated_sampling", cells, parser(__doc__).parse_args()))
