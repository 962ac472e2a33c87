"""What is matched between the masked network and the dense one besides plain predictions, and at which timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.conditions import Condition, stack
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.recall import flatten
from lightning_prune.metrics.reach import graphs
from lightning_prune.protocols import InputError

Weighting = Literal["uniform", "min-snr"]
Predict = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Distillation:
    """Switches of the distillation term.

    Args:
        weighting: of timesteps: "uniform", or "min-snr" (Hang et al. 2023), the error of x_0 weighted by
            min(SNR, `snr_cap`), brought to a mean of 1 over the training timesteps.
        snr_cap: gamma of "min-snr".
        features: weight of the blocks' outputs, each relative to the power of the dense one's; 0 matches none.
        blocks: granularity of these blocks, such as "block" or "coarse"; null takes the family's first.
        guidance: lowest and highest scale of guidance; what is matched is then the guided prediction at a scale drawn
            for each sample, from conditional and unconditional inputs of both networks. Null matches the prediction.

    Raises:
        InputError: values out of range.
    """

    weighting: Weighting = "uniform"
    snr_cap: float = 5.0
    features: float = 0.0
    blocks: str | None = None
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.snr_cap < math.inf:
            raise InputError(f"model.distillation.snr_cap: {self.snr_cap:g} is not positive")
        if not 0 <= self.features < math.inf:
            raise InputError(f"model.distillation.features: {self.features:g} is negative or not finite")
        if self.blocks is not None and self.features == 0:
            raise InputError("model.distillation.blocks: model.distillation.features is 0, so no block is matched")
        if self.guidance is not None and not 0 <= self.guidance[0] <= self.guidance[1] < math.inf:
            raise InputError(f"model.distillation.guidance: {list(self.guidance)} is no range of scales")


def timestep_weights(process: Process, weighting: Weighting, snr_cap: float, t: Tensor) -> Tensor:
    """Weights [B] of an error of the prediction at timesteps `t` [B], 1 on average over the training timesteps."""
    if weighting == "uniform":
        return torch.ones(len(t), device=t.device)
    every = process.grid().to(t.device)
    return _min_snr(process, snr_cap, t) / _min_snr(process, snr_cap, every).mean()


def _min_snr(process: Process, cap: float, t: Tensor) -> Tensor:
    signal, sigma = process.coefficients(t, torch.empty(len(t), device=t.device))
    snr = (signal / sigma).square()
    if process.prediction == "epsilon":  # its error is that of x_0 by a factor of a / s
        return (cap / snr).clamp(max=1.0)
    # The error of x_0 is s times that of v, and of the flow's velocity.
    factor = 1.0 if process.prediction == "x0" else sigma.square()
    return snr.clamp(max=cap) * factor


def draw_scales(bounds: tuple[float, float], batch: int, generator: Generator, like: Tensor) -> Tensor:
    """Scales of guidance, uniform between the bounds, shaped to broadcast against `like` [B, ...]."""
    drawn = torch.rand(batch, generator=generator, device=generator.device)
    low, high = bounds
    return (low + (high - low) * drawn).to(like).view(-1, *[1] * (like.ndim - 1))


def predict_guided(
    predict: Predict, family: Denoiser, x: Tensor, t: Tensor, cond: Condition, scale: Any
) -> tuple[Tensor, Tensor]:
    """The conditional prediction and the guided one, from one doubled batch, by the family's rule."""
    both = predict(torch.cat([x, x]), torch.cat([t, t]), stack(cond, family.null_condition(cond)))
    conditional, unconditional = both.chunk(2)
    return conditional, family.guide(conditional, unconditional, scale)


def feature_modules(denoiser: Denoiser, granularity: str | None) -> list[str]:
    """Names of the modules whose outputs are those of the blocks.

    Raises:
        InputError: a granularity the family does not have, or a family that describes no blocks.
    """
    if granularity is not None:
        return [block.modules[-1] for block in denoiser.blocks(granularity).blocks]
    found, refusal = graphs(denoiser)
    if not found:
        raise InputError(f"model.distillation.features: {refusal}")
    return [block.modules[-1] for block in next(iter(found.values())).blocks]


@contextmanager
def watching(network: nn.Module, modules: Sequence[str]) -> Iterator[list[Tensor]]:
    """Tensors that modules give while the network runs, in running order; one that is given twice is there once."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for name in modules:
            hook = network.get_submodule(name).register_forward_hook(lambda m, a, output: _take(output, seen))
            hooks.callback(hook.remove)
        yield seen


def _take(output: Any, seen: list[Tensor]) -> None:
    flatten(output, seen)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over tensors of |s - T|^2 / |T|^2."""
    losses = [mse_loss(s, t) / t.square().mean().clamp(min=1e-12) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()
