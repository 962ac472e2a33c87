"""Gates as tensors: which blocks run, and what that costs, differentiably.

Shapes: gates [..., N], one for each block in running order; leading dimensions are steps and samples.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_prune.blocks import BlockCosts, BlockGraph


def straight_through(probabilities: Tensor, hard: Tensor) -> Tensor:
    """`hard` in value, `probabilities` in gradient (Bengio et al. 2013)."""
    # In this order the value is exactly 0 or 1.
    return (hard - probabilities.detach()) + probabilities


def running(gates: Tensor, graph: BlockGraph) -> Tensor:
    """How much each block runs [..., N]: its gate times whether something that runs reads it.

    Exact for gates of 0 and 1. For independent probabilities it is the probability of running wherever the readers
    of a block are nested, so that one of them runs whenever another does; U-Nets and chains are of that kind.
    """
    consumers = graph.consumers()
    found: list[Tensor] = [gates[..., 0]] * len(graph)
    for position in reversed(range(len(graph))):
        gate, readers = gates[..., position], consumers[position]
        if -1 in readers:
            found[position] = gate
        elif readers:
            need = torch.stack([found[c] for c in readers]).amax(dim=0)
            found[position] = gate * need
        else:
            found[position] = torch.zeros_like(gate)
    return torch.stack(found, dim=-1)


def expected_cost(run: Tensor, graph: BlockGraph, costs: BlockCosts) -> Tensor:
    """MACs of steps [...] over those of a dense one, exact in expectation for probabilities of running [..., N].

    No product is counted twice, so it is 1 where everything runs.
    """
    shares = _shares(costs, run.dtype, run.device)
    return (run * shares).sum(dim=-1) + any_runs(run, graph) * (costs.shell / costs.dense)


@lru_cache
def _shares(costs: BlockCosts, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Share of every block [N] in a call, brought to the device once: a search asks many times a step."""
    with torch.inference_mode(False):  # what is made for a validation pass serves training, too
        return torch.tensor(costs.blocks, dtype=dtype, device=device) / costs.dense


def any_runs(run: Tensor, graph: BlockGraph) -> Tensor:
    """Probability [...] that anything runs at all."""
    if graph.independent:
        return 1 - (1 - run).prod(dim=-1)
    last = [graph.names.index(name) for name in graph.outputs]
    return 1 - (1 - run[..., last]).prod(dim=-1)


def released_closure(gates: Tensor, graph: BlockGraph) -> Tensor:
    """The published training's closure of gates [N, 2] of (skip, keep), one-hot in value.

    From the output inwards, a block that only skipped blocks read takes p c + c from the skipped reader c if its own
    gate p keeps, p c if it skips already: the value becomes "skip", the gradient goes to the reader.
    """
    consumers = graph.consumers()
    closed = list(gates.unbind(0))
    # Read once: which gates skip follows from their values alone.
    skips = [skip == 1 for skip, _ in gates.detach().tolist()]
    for position in reversed(range(len(graph))):
        readers = consumers[position]
        if -1 in readers or not all(skips[c] for c in readers):
            continue
        reader, own = closed[readers[-1]], closed[position]
        closed[position] = own * reader if skips[position] else own * reader + reader
        skips[position] = True
    return torch.stack(closed)
