"""A whole trajectory under gates, differentiable in the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_prune.blocks import CacheMode, Reuse
from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gated import SkippedStep, tell
from lightning_prune.diffusion.gating import install, sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import blended, flatten, unflatten
from lightning_prune.diffusion.samplers import guided, trajectory
from lightning_prune.diffusion.solvers import Sampler

Gates = tuple[Tensor, Tensor, Tensor]  # of blocks [..., N], of the whole step [...], and whether the next runs [...]


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
        reuse: what skipped blocks and steps give.
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
        reuse: Reuse = "last",
    ) -> None:
        self.graph = denoiser.blocks(granularity).in_mode(mode)
        self.denoiser = sharing_copy(denoiser).eval()
        self.gating = install(self.denoiser.network, self.graph, mode, reuse)
        self.gating.checkpoint = checkpoint_blocks
        self.process, self.sampler, self.checkpoint_steps = process, sampler, checkpoint_steps
        self.skipped_step = SkippedStep(process, reuse)
        tell(self.skipped_step, sampler, process)
        outputs = self.graph.names if self.graph.independent else self.graph.outputs
        self._outputs = [self.graph.names.index(name) for name in outputs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Unroll:
        return self

    @property
    def steps(self) -> int:
        """Network calls of a trajectory."""
        return self.sampler.calls(self.process)

    def __call__(self, noise: Tensor, cond: Condition, run: Tensor, steps: Tensor | None = None) -> Tensor:
        """Samples of the shape of `noise` [B, ...].

        Args:
            noise: starting noise.
            cond: condition of the batch.
            run: which blocks run, [T, N] or [T, B, N], closed; the first step runs in full whatever its row says.
            steps: gates of whole steps, [T] or [T, B]; what `run` says holds where they are open. None opens all.
        """
        weight = next(self.denoiser.parameters())
        whole = torch.ones_like(run[..., 0]) if steps is None else steps
        state: Any = ([None] * len(self.graph), None)
        index = -1

        def enter(step: int) -> None:
            nonlocal index
            index = step

        def goes_on(step: int) -> Tensor:
            """Whether the step after this one runs anything; after the last nothing is skipped.

            Without a gradient: a gate is worth what its own step gives.
            """
            after = step + 1
            found = whole[after] * self._any(run[after]) if after < len(run) else torch.ones_like(whole[step])
            return found.detach()

        def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            nonlocal state
            gates = run[index], whole[index], goes_on(index)
            prediction, state = self._step(x.to(weight.dtype), t, cond, gates, state, index)
            return prediction.to(x.dtype)

        family = self.denoiser
        both = guided(predict, family.null_condition, self.sampler.guidance, family.guide)
        return trajectory(both, self.process, noise, cond, self.sampler, enter)

    def _step(self, x: Tensor, t: Tensor, cond: Condition, gates: Gates, state: Any, step: int) -> tuple[Tensor, Any]:
        """One network call; `state` is what blocks stored and what a wholly skipped step would reuse."""
        tensors: list[Tensor] = []
        spec = flatten(state, tensors)
        after: Any = None

        def call(x: Tensor, t: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            nonlocal after
            row, whole, goes_on, *stored = inputs
            given = unflatten(spec, tuple(stored))
            prediction, following = self._blended(x, t, cond, (row, whole, goes_on), given, step)
            found = [prediction]
            after = flatten(following, found)
            return tuple(found)

        if not tensors:  # no gate acts at the first step
            with torch.no_grad():
                found = call(x, t, *gates)
        elif self.checkpoint_steps and gates[0].requires_grad and torch.is_grad_enabled():
            # Reentrant: the other kind keeps a graph of every step, whose nodes scatter the heap.
            found = checkpoint(call, x, t, *gates, *tensors, use_reentrant=True, preserve_rng_state=False)
        else:
            found = call(x, t, *gates, *tensors)
        return found[0], unflatten(after, found)

    def _blended(
        self, x: Tensor, t: Tensor, cond: Condition, gates: Gates, state: Any, step: int
    ) -> tuple[Tensor, Any]:
        slots, memory = state
        skipped, clock = self.skipped_step, self.skipped_step.clock(t)
        if memory is None:
            prediction, following = self.gating.step(
                lambda: self.denoiser(x, t, cond), self.graph.full(), list(slots), clock
            )
            return prediction, (following, skipped.remember(None, prediction, x, t))
        row, whole, goes_on = gates
        prediction, following = self.gating.step(
            lambda: self.denoiser(x, t, cond), self._inside(row), list(slots), clock, whole
        )
        runs = whole * self._any(row)
        after = skipped.remember(memory, prediction, x, t, runs)
        if skipped.holds:  # before a skipped step the line begins already
            line = skipped.predict(skipped.remember(memory, prediction, x, t), x, t, step)
            prediction = blended(goes_on, prediction, line)
        return blended(runs, prediction, skipped.predict(memory, x, t, step)), (following, after)

    def _any(self, row: Tensor) -> Tensor:
        """Whether any block runs [...], 0 or 1 in value."""
        return 1 - (1 - row[..., self._outputs]).prod(dim=-1)

    def _inside(self, row: Tensor) -> Tensor:
        """Gates inside the network. One that decides alone whether the step runs acts there, and counts once."""
        deciding = torch.zeros_like(row)
        if self.graph.independent:
            opened = row.detach()
            deciding = opened * (opened.sum(dim=-1, keepdim=True) == 1)
        else:
            deciding[..., self._outputs] = 1
        return row * (1 - deciding) + row.detach() * deciding
