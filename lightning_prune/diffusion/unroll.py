"""A whole trajectory under gates, differentiable in the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_prune.blocks import CacheMode
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gated import Reuse
from lightning_prune.diffusion.gating import Value, flatten, install, per_sample, sharing_copy, unflatten
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import guided, trajectory
from lightning_prune.diffusion.solvers import Sampler


class Unroll:
    """Samples whose every step blends fresh and stored values by gates, in value what the schedule would give.

    What the backward pass needs of a step is recomputed from the latent and the stored values it began with, so
    memory grows with the number of steps by these alone.

    Args:
        denoiser: the frozen network; its weights are shared.
        granularity: of the blocks.
        mode: what skipped blocks reuse.
        process: how predictions are read.
        sampler: the trajectory.
        checkpoint_steps: recompute steps in the backward pass instead of storing what they computed.
        checkpoint_blocks: recompute blocks inside a step, too.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        granularity: str,
        mode: CacheMode,
        process: Process,
        sampler: Sampler,
        checkpoint_steps: bool = True,
        checkpoint_blocks: bool = False,
    ) -> None:
        self.graph = denoiser.blocks(granularity).in_mode(mode)
        self.denoiser = sharing_copy(denoiser).eval()
        self.gating = install(self.denoiser.network, self.graph, mode)
        self.gating.checkpoint = checkpoint_blocks
        self.process, self.sampler, self.checkpoint_steps = process, sampler, checkpoint_steps
        self.reuse = Reuse(process)
        outputs = self.graph.names if self.graph.independent else self.graph.outputs
        self._outputs = [self.graph.names.index(name) for name in outputs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Unroll:
        return self

    @property
    def steps(self) -> int:
        """Network calls of a trajectory."""
        return self.sampler.calls(self.process)

    def __call__(self, noise: Tensor, cond: Condition, run: Tensor) -> Tensor:
        """Samples of the shape of `noise` [B, ...].

        Args:
            noise: starting noise.
            cond: condition of the batch.
            run: which blocks run, [T, N] or [T, B, N], closed; the first step runs in full whatever its row says.
        """
        weight = next(self.denoiser.parameters())
        state: Any = ([None] * len(self.graph), None)
        index = -1

        def enter(step: int) -> None:
            nonlocal index
            index = step

        def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            nonlocal state
            prediction, state = self._step(x.to(weight.dtype), t, cond, run[index], state)
            return prediction.to(x.dtype)

        family = self.denoiser
        both = guided(predict, family.null_condition, self.sampler.guidance, family.guide)
        return trajectory(both, self.process, noise, cond, self.sampler, enter)

    def _step(self, x: Tensor, t: Tensor, cond: Condition, row: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One network call; `state` is what blocks stored and what a wholly skipped step would reuse."""
        tensors: list[Tensor] = []
        spec = flatten(state, tensors)
        after: Any = None

        def call(x: Tensor, t: Tensor, row: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal after
            prediction, following = self._blended(x, t, cond, row, unflatten(spec, tensors))
            found = [prediction]
            after = flatten(following, found)
            return tuple(found)

        if not tensors:  # no gate acts at the first step
            with torch.no_grad():
                found = call(x, t, row)
        elif self.checkpoint_steps and row.requires_grad and torch.is_grad_enabled():
            found = checkpoint(call, x, t, row, *tensors, use_reentrant=True, preserve_rng_state=False)
        else:
            found = call(x, t, row, *tensors)
        return found[0], unflatten(after, found)

    def _blended(self, x: Tensor, t: Tensor, cond: Condition, row: Tensor, state: Any) -> tuple[Tensor, Any]:
        slots, memory = state
        first = all(slot is None for slot in slots)
        runs = per_sample(self._runs(row), x)
        keep: Any = self.graph.full() if first else self._inside(row)
        # Where the step is skipped, what the network makes of it says what a gate is worth, and nothing about x.
        seen = x if first else torch.where(runs > 0, x, x.detach())
        live = None if first or not self.graph.independent else runs.detach() > 0
        prediction, following = self.gating.step(lambda: self.denoiser(seen, t, cond), keep, list(slots), live)
        fresh = self.reuse.remember(prediction, seen, t)
        if first:
            return prediction, (following, fresh)
        kept = tuple(self._mixed(runs, new, old) for new, old in zip(fresh, memory, strict=True))
        return self._mixed(runs, prediction, self.reuse.predict(memory, t)), (following, kept)

    def _runs(self, row: Tensor) -> Tensor:
        """Whether anything runs [...], 0 or 1 in value; a gate that is open alone has all of its gradient."""
        return 1 - (1 - row[..., self._outputs]).prod(dim=-1)

    def _mixed(self, runs: Tensor, fresh: Tensor, stored: Tensor) -> Tensor:
        """`fresh` where the step runs, else `stored`; what gates would make of a step that is skipped counts, too."""
        found = runs * fresh + (1 - runs) * stored
        return found + (1 - runs.detach()) * (fresh - fresh.detach()) if self.graph.independent else found

    def _inside(self, row: Tensor) -> Tensor:
        """Gates inside the network. One that decides alone whether the step runs acts there, and counts once."""
        deciding = torch.zeros_like(row)
        if self.graph.independent:
            opened = row.detach()
            deciding = opened * (opened.sum(dim=-1, keepdim=True) == 1)
        else:
            deciding[..., self._outputs] = 1
        return row * (1 - deciding) + row.detach() * deciding


def stored_bytes(slots: list[Value]) -> int:
    """Bytes of the distinct tensors in stored values."""
    tensors: list[Tensor] = []
    flatten(slots, tensors)
    return sum(tensor.nbytes for tensor in tensors)
