"""Stages of the sampling trajectory and their sparsities, from the noise schedule alone (Guo et al. 2025).

    x_t = a_t x_0 + b_t eps,   v = |x_0|^2 / d
    E[MSE(t)]  = v (1 - a_t)^2 + b_t^2                                              (theorem 1)
    E[Grad(t)] = E[MSE(t)] - E[MSE(t - 1)]
    score(t)   = Grad(t) / max Grad + lambda' ln SNR(t) / max |ln SNR|              SNR = a^2 / b^2

A grid has K points, counted from the clean end; point K is the noisiest, visited first. `a_0 = 1` lies in front of it.
All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.protocols import InputError

MAXIMUM = 0.9


@dataclass(frozen=True)
class Grid:
    """A path from clean to noisy, at the points a sampler visits.

    Attributes:
        positions: timesteps counted from 1, ascending [K].
        signal: a at the clean end and at every position, float64 [K + 1].
        noise: b at the same, float64 [K + 1].
    """

    positions: tuple[int, ...]
    signal: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def expected_mse(self, power: float = 1.0) -> Tensor:
        """E[MSE] at every position [K], for clean data of mean square `power`."""
        return self._mse(power)[1:]

    def expected_gradient(self, power: float = 1.0) -> Tensor:
        """E[Grad] at every position [K]: how much the error falls on the way to the next cleaner point."""
        return self._mse(power).diff()

    def log_snr(self) -> Tensor:
        """ln SNR at every position [K]."""
        return 2 * (self.signal[1:].log() - self.noise[1:].log())

    def score(self, power: float = 1.0, snr_weight: float = 0.0) -> Tensor:
        """The normalised score [K]; `snr_weight` is lambda'."""
        gradient, snr = self.expected_gradient(power), self.log_snr()
        scaled = gradient / gradient.max()
        return scaled if snr_weight == 0 else scaled + snr_weight * snr / snr.abs().max()

    def _mse(self, power: float) -> Tensor:
        return power * (1 - self.signal) ** 2 + self.noise**2


def variance_preserving(alphas_cumprod: Tensor, positions: Sequence[int]) -> Grid:
    """The grid of a schedule `alphas_cumprod` [T] at timesteps counted from 1."""
    chosen = alphas_cumprod.double()[torch.tensor(list(positions)) - 1]
    abar = torch.cat([torch.ones(1, dtype=torch.float64), chosen])
    return Grid(tuple(positions), abar.sqrt(), (1 - abar).sqrt())


def flow(sigmas: Tensor, positions: Sequence[int]) -> Grid:
    """The grid of a rectified flow, x = (1 - sigma) x_0 + sigma eps, for `sigmas` [K] in (0, 1), ascending."""
    noise = torch.cat([torch.zeros(1, dtype=torch.float64), sigmas.double()])
    # A path that ends in pure noise has no finite SNR there.
    return Grid(tuple(positions), (1 - noise).clamp(min=1e-6), noise)


def uniform_positions(timesteps: int, steps: int) -> list[int]:
    """T i / K for i = 1 .. K: the points a sampler of K steps with "trailing" spacing visits.

    Scored point i stands for the i-th visited step from the clean end under any spacing.
    """
    if not 1 <= steps <= timesteps:
        raise InputError(f"steps: {steps} sampling steps, but the process has {timesteps}")
    return [round(timesteps * i / steps) for i in range(1, steps + 1)]


@dataclass(frozen=True)
class Stage:
    """A contiguous part of the trajectory, in the sampler's order: step 0 is the noisiest.

    Attributes:
        first: index of its first step.
        steps: number of its steps, at least 1.
    """

    first: int
    steps: int

    @property
    def end(self) -> int:
        """Index of the first step behind it."""
        return self.first + self.steps

    def points(self, total: int) -> slice:
        """Its points on a grid of `total`, which counts from the clean end."""
        return slice(total - self.end, total - self.first)


def stages_of(lengths: Sequence[int]) -> list[Stage]:
    """Stages of the given numbers of steps, one after the other; those of none are left out."""
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Stage(first, steps) for first, steps in zip(firsts, lengths, strict=True) if steps > 0]


def stage_at(stages: Sequence[Stage], index: int) -> int:
    """Number of the stage that step `index` belongs to."""
    for number, stage in enumerate(stages):
        if stage.first <= index < stage.end:
            return number
    raise InputError(f"stages: step {index} is in none of the stages, which end at step {stages[-1].end}")


def equal_stages(steps: int, count: int) -> list[Stage]:
    """`count` stages of equal length, the noisiest ones longer by one step where they do not divide."""
    if not 1 <= count <= steps:
        raise InputError(f"stages: {count} stages of {steps} sampling steps; at least one step each is needed")
    return stages_of([steps // count + (i < steps % count) for i in range(count)])


def published_stages(score: Tensor, gradient: Tensor, threshold: float = 0.55) -> list[Stage]:
    """Early, middle and late stage: the middle one is where the score reaches `threshold` of its maximum.

    Where that is no single interval, the one around the steepest point is kept; an empty early or late stage is
    merged with the middle one, so there are one to three.

    Args:
        score: score of every point [K], from the clean end.
        gradient: E[Grad] of every point [K].
        threshold: M.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"stages.threshold: {threshold} is not in (0, 1]")
    inside = score >= threshold * score.max()
    peak = int(gradient.argmax())
    low = high = peak if inside[peak] else int(score.argmax())
    while low > 0 and inside[low - 1]:
        low -= 1
    while high + 1 < len(score) and inside[high + 1]:
        high += 1
    return stages_of([len(score) - 1 - high, high - low + 1, low])


def stage_means(score: Tensor, stages: Sequence[Stage]) -> list[float]:
    """m_i: the mean over a stage of the score, clipped to [0, 1] of its maximum."""
    share = (score / score.max()).clamp(0, 1)
    return [float(share[stage.points(len(score))].mean()) for stage in stages]


def published_sparsities(
    means: Sequence[float], stages: Sequence[Stage], average: float, maximum: float = MAXIMUM
) -> list[float]:
    """Sparsities proportional to 1 - m_i whose mean over steps is `average`.

    One that would pass `maximum` stops there and the others carry the excess.

    Raises:
        InputError: an average outside [0, maximum].
    """
    if not 0 <= average <= maximum:
        raise InputError(f"sparsity: an average of {average:g} is not in [0, {maximum:g}]")
    found: dict[int, float] = {}
    while True:
        free = [i for i in range(len(stages)) if i not in found]
        needed = average * sum(s.steps for s in stages) - sum(stages[i].steps * found[i] for i in found)
        weight = math.fsum(stages[i].steps * (1 - means[i]) for i in free)
        # A stage whose score is 1 throughout, as one stage of one step, has no weight of its own.
        each = {
            i: needed * (1 - means[i]) / weight if weight > 0 else needed / sum(stages[j].steps for j in free)
            for i in free
        }
        over = [i for i in free if each[i] > maximum]
        if not over:
            return [found.get(i, each.get(i, 0.0)) for i in range(len(stages))]
        found |= dict.fromkeys(over, maximum)


def heads_removed(heads: int, sparsity: float) -> int:
    """Attention heads removed at a sparsity: floored, as in the published counts; one head always stays."""
    return min(heads - 1, math.floor(heads * sparsity + 1e-9))


def channels_removed(channels: int, sparsity: float) -> int:
    """Channels removed at a sparsity: to the nearest; one channel always stays."""
    return min(channels - 1, round(channels * sparsity))
