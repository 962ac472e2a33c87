"""Optimal Brain Surgeon over groups of input columns of one layer (Hassibi and Stork 1993; Guo et al. 2025).

For a weight W [m, n] whose inputs X [rows, n] have H = X^T X and P = H^-1, the group G of columns whose removal costs
least is the one with the smallest

    score(G) = trace( W_G (P_GG)^-1 W_G^T )

and the columns that stay then take over what they can. Two facts make it fast and exact:

* Scores only need P and A = W^T W. Removing G changes both by products of their own rows,

      P <- P - P_:G T     A <- A - A_:G T - T^T A_G: + T^T A_GG T     T = (P_GG)^-1 P_G:

  so the weights are not touched while the order is found, and for single columns the products of a whole block of
  removals are carried out at once.
* Whatever the order was, the surviving columns K equal the least-squares refit W H_:K (H_KK)^-1: one Cholesky solve.

All of it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.protocols import InputError

_BLOCK = 64
_FALLBACK = 1e-2


@dataclass(frozen=True)
class Removal:
    """In which order the units of a layer go, and what it costs.

    Attributes:
        order: unit numbers, the first to go first [units - 1]; the last unit always stays.
        errors: squared error of the layer's outputs, summed over the calibration rows, after the removal of the
            first k units, for k = 0 .. units - 1; float64.
    """

    order: tuple[int, ...]
    errors: Tensor

    @property
    def units(self) -> int:
        return len(self.order) + 1

    def kept(self, removed: int) -> tuple[int, ...]:
        """Numbers of the units that stay when the first `removed` of the order go, ascending."""
        if not 0 <= removed <= len(self.order):
            raise InputError(f"pruning: {removed} of {self.units} units cannot be removed; one has to stay")
        gone = set(self.order[:removed])
        return tuple(unit for unit in range(self.units) if unit not in gone)


@dataclass(frozen=True)
class Layer:
    """The least-squares problem of one layer, made fit to be factorised.

    Attributes:
        weight: W [m, n], float64; columns whose input is always zero are zero.
        hessian: H [n, n], float64, positive definite.
        dead: columns whose input is always zero [n].
    """

    weight: Tensor
    hessian: Tensor
    dead: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, damping: float = 1e-3, name: str = "layer") -> Layer:
        """Damp `hessian` by `damping` of its mean diagonal; dead inputs get a diagonal of 1 and no weight.

        Where the factorisation fails all the same, damping is raised tenfold until it does not, from 1e-2 on.

        Raises:
            InputError: statistics or damping that are not finite, or no input that is ever different from zero.
        """
        h, w = hessian.double().clone(), weight.double().clone()
        if not math.isfinite(damping):
            raise InputError(f"calibration: damping {damping} is not finite")
        if not torch.isfinite(h).all():
            raise InputError(f"calibration: the inputs of {name} are not finite")
        dead = h.diagonal() <= 0
        if dead.all():
            raise InputError(f"calibration: the inputs of {name} are always zero, so there is nothing to fit")
        w[:, dead] = 0
        mean = h.diagonal()[~dead].mean()
        h.diagonal()[dead] = mean
        while True:
            damped = h.clone()
            damped.diagonal().add_(damping * mean)
            if int(torch.linalg.cholesky_ex(damped).info) == 0:
                return cls(w, damped, dead)
            damping = max(10 * damping, _FALLBACK)

    def inverse(self) -> Tensor:
        """P = H^-1 [n, n]."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))

    def refit(self, columns: Sequence[int] | Tensor) -> Tensor:
        """W_K [m, |K|]: the weights with which the columns K alone come closest to the layer's outputs."""
        kept = torch.as_tensor(columns, device=self.weight.device)
        if len(kept) == len(self.hessian):
            return self.weight
        factor = torch.linalg.cholesky(self.hessian[kept][:, kept])
        return torch.cholesky_solve(self.hessian[kept] @ self.weight.T, factor).T

    def error(self, columns: Sequence[int] | Tensor, weight: Tensor) -> float:
        """|X W^T - X_K W_K^T|^2 for the columns K with weights W_K [m, |K|]."""
        difference = self.weight.clone()
        difference[:, torch.as_tensor(columns, device=weight.device)] -= weight
        return float(((difference @ self.hessian) * difference).sum())


def columns_of(units: Sequence[int], channels: int, total: int, removable: int) -> Tensor:
    """Columns that stay with the given units of `channels` columns each, and those behind the last unit.

    Args:
        units: units that stay.
        channels: columns of a unit.
        total: columns of the layer; those from units * channels on belong to no unit and always stay.
        removable: number of all units.
    """
    kept = torch.tensor(list(units), dtype=torch.long)
    inside = (kept[:, None] * channels + torch.arange(channels)).flatten()
    return torch.cat([inside, torch.arange(removable * channels, total)])


def greedy_removal(layer: Layer, units: int, channels: int) -> Removal:
    """The greedy order: each time the unit goes whose removal costs least, with exact compensation in between."""
    p, a = layer.inverse(), layer.weight.T @ layer.weight
    if channels == 1:
        return _single_columns(p, a, units)
    return _groups(p, a, units, channels)


def removal_in_order(layer: Layer, order: Sequence[int], channels: int, compensate: bool = True) -> Removal:
    """A removal in a given order [units - 1], with the errors it has, compensated or not."""
    if compensate:
        return Removal(tuple(order), _compensated(layer, order, channels))
    errors = [0.0]
    gone = torch.zeros_like(layer.weight)
    for unit in order:
        span = slice(unit * channels, (unit + 1) * channels)
        gone[:, span] = layer.weight[:, span]
        errors.append(float(((gone @ layer.hessian) * gone).sum()))
    return Removal(tuple(order), torch.tensor(errors, dtype=torch.float64))


def _compensated(layer: Layer, order: Sequence[int], channels: int) -> Tensor:
    """Errors of removing the first k units of a given order [units].

    With R the removed columns and P = H^-1, the error is trace(W_R P_RR^-1 W_R^T); along an order, one Cholesky factor
    of P holds those of all its beginnings.
    """
    columns = (torch.tensor(list(order), dtype=torch.long)[:, None] * channels + torch.arange(channels)).flatten()
    columns = columns.to(layer.weight.device)
    factor = torch.linalg.cholesky(layer.inverse()[columns][:, columns])
    solved = torch.linalg.solve_triangular(factor, layer.weight[:, columns].T, upper=False)
    errors = solved.square().sum(1).view(len(order), channels).sum(1).cumsum(0)
    return torch.cat([errors.new_zeros(1), errors]).cpu()


def _groups(p: Tensor, a: Tensor, units: int, channels: int) -> Removal:
    """Few large groups, one after the other; P and A are updated in full each time."""
    left, gone, scores = list(range(units)), [], [0.0]
    span = torch.arange(channels, device=p.device)
    for _ in range(units - 1):
        unit, score = _choose(p, a, left, span)
        columns = unit * channels + span
        t = torch.linalg.solve(p[columns][:, columns], p[columns])
        a_rows = a[columns]
        a = a - a_rows.T @ t - t.T @ a_rows + t.T @ a_rows[:, columns] @ t
        p = p - p[columns].T @ t
        left.remove(unit)
        gone.append(unit)
        scores.append(score)
    return Removal(tuple(gone), torch.tensor(scores, dtype=torch.float64).cumsum(0))


def _choose(p: Tensor, a: Tensor, candidates: list[int], span: Tensor) -> tuple[int, float]:
    columns = torch.tensor(candidates, device=p.device)[:, None] * len(span) + span
    rows, across = columns[:, :, None], columns[:, None, :]
    solved = torch.linalg.solve(p[rows, across], a[rows, across])
    scores = solved.diagonal(dim1=1, dim2=2).sum(1)
    best = int(scores.argmin())
    return candidates[best], float(scores[best])


def _single_columns(p: Tensor, a: Tensor, units: int) -> Removal:
    """Many single columns: rank-one changes are gathered and applied a block at a time.

    Within a block the current matrices are P - R^T T and A - B^T T - T^T B, with a row in R, T, B for each removal.
    """
    names = torch.arange(len(p), device=p.device)
    removable = names < units
    gone: list[int] = []
    scores: list[Tensor] = [p.new_zeros(())]
    while len(gone) < units - 1:
        count = min(_BLOCK, units - 1 - len(gone))
        r, t, b = (p.new_empty(count, len(p)) for _ in range(3))
        p_diagonal, a_diagonal = p.diagonal().clone(), a.diagonal().clone()
        open_ = torch.where(removable, 0.0, torch.inf).to(p.dtype)
        for k in range(count):
            found = (a_diagonal / p_diagonal + open_).argmin()
            i = int(found)
            scores.append(a_diagonal[i] / p_diagonal[i])
            r[k] = p[i] - r[:k, i] @ t[:k]
            t[k] = r[k] / r[k, i]
            row = a[i] - b[:k, i] @ t[:k] - t[:k, i] @ b[:k]
            b[k] = row - 0.5 * row[i] * t[k]
            p_diagonal -= r[k] * t[k]
            a_diagonal -= 2 * b[k] * t[k]
            open_[i], p_diagonal[i] = torch.inf, 1.0
            gone.append(int(names[i]))
        stays = ~torch.isin(names, torch.tensor(gone[-count:], device=names.device))
        r, t, b = r[:, stays], t[:, stays], b[:, stays]
        p = p[stays][:, stays].sub_(r.T @ t)
        change = b.T @ t
        a = a[stays][:, stays].sub_(change).sub_(change.T)
        names, removable = names[stays], removable[stays]
    return Removal(tuple(gone), torch.stack(scores).cumsum(0).cpu())
