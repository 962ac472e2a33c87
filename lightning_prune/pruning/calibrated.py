"""N:M masks and weights from second moments of what layers read: scores of single weights, and exact compensation.

For a weight W [m, n] whose inputs X [rows, n] have H = X^T X:

* Wanda (Sun et al. 2024) keeps the largest |W_ij| sqrt(H_jj): what an entry adds to the outputs.
* Optimal Brain Surgeon (Hassibi and Stork 1993; in groups of M, SparseGPT: Frantar and Alistarh 2023) keeps the largest
  W_ij^2 / [H^-1]_jj: what the outputs lose when the other entries of the row make up for this one.

Both are the magnitude of the weight times a scale of its column, so masks can follow weights that train. Whatever was
removed, the entries K of a row that stay are best refitted to W_i: H_:K (H_KK)^-1, a least-squares problem a row.

Columns are tap-major here, (kh, kw, I) of a convolution, so that M consecutive ones are a group; a last one belongs to
the bias, where there is one. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.protocols import PrunableUnit, Sparsity, WidthGroup
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.nm import nm_mask
from lightning_prune.pruning.obs import Layer

ColumnScore = Literal["wanda", "obs"]
_ENTRIES_AT_ONCE = 1 << 24


def input_groups(network: nn.Module, units: Sequence[PrunableUnit]) -> list[WidthGroup]:
    """The inputs of layers, as `Curvature` takes them: nothing is cut with them."""
    groups = []
    for unit in units:
        weight = network.get_submodule(unit.name).get_parameter("weight")
        taps = weight[0, 0].numel()
        groups.append(WidthGroup(unit.name, "inputs", unit.name, weight.shape[1], 1, taps, ()))
    return groups


def layer_problem(network: nn.Module, group: WidthGroup, curvature: Curvature, damping: float) -> Layer:
    """The least-squares problem of a layer [m, n], its bias a last column of the weight where it has one."""
    module = network.get_submodule(group.name)
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    columns = _tap_major(weight.detach().cpu().double())
    order = torch.arange(group.units * group.taps).view(group.units, group.taps).T.flatten()
    if bias is not None:
        columns = torch.cat([columns, bias.detach().cpu().double()[:, None]], 1)
        order = torch.cat([order, torch.tensor([group.units * group.taps])])
    moments = curvature.mean(group, [1.0])
    return Layer.of(columns, moments[order][:, order], damping, group.name)


def column_scale(problem: Layer, weight: Tensor, score: ColumnScore) -> Tensor:
    """Factors of |W|, one a column, that make it the score [1, I] or [1, I, kh, kw]; float32, mean 1.

    0 where the input is always zero.
    """
    count = weight[0].numel()
    if score == "wanda":
        scale = problem.hessian.diagonal()[:count].sqrt()
    else:
        scale = problem.inverse().diagonal()[:count].rsqrt()
    scale = torch.where(problem.dead[:count], 0.0, scale)
    return _from_tap_major((scale / scale.mean())[None], weight).float()


def obs_mask(problem: Layer, columns: int, sparsity: Sparsity) -> Tensor:
    """Which of the first `columns` stay [m, columns], group by group, each row making up for what went before.

    From left to right every group loses its M - N entries of smallest W_ij^2 / [H^-1]_jj, with H of the columns from
    there on, which take over what they can, as SparseGPT does. H is the same for all rows, so its inverse is too.
    """
    factor = torch.linalg.cholesky(problem.inverse(), upper=True)
    weight, keep = problem.weight.clone(), torch.ones(len(problem.weight), columns, dtype=torch.bool)
    for start in range(0, columns, sparsity.m):
        span = slice(start, start + sparsity.m)
        kept = nm_mask(weight[:, span] / factor.diagonal()[span], sparsity)
        keep[:, span] = kept
        for column in range(start, start + sparsity.m):
            error = torch.where(kept[:, column - start], 0.0, weight[:, column]) / factor[column, column]
            weight[:, column:] -= error[:, None] * factor[column, column:]
    return keep


def refit(problem: Layer, keep: Tensor) -> Tensor:
    """The weight [m, n] with which the columns that stay come closest to the layer's outputs; 0 where none stays.

    Args:
        problem: the layer.
        keep: entries that stay [m, k], equally many in each row; columns behind the k-th all stay.
    """
    rest = problem.weight.shape[1] - keep.shape[1]
    whole = torch.cat([keep, keep.new_ones(len(keep), rest)], 1)
    width = int(whole[0].sum())
    columns = whole.nonzero()[:, 1].view(len(keep), width)
    target = problem.weight @ problem.hessian
    found = torch.zeros_like(problem.weight)
    for rows in torch.arange(len(keep)).split(max(1, _ENTRIES_AT_ONCE // width**2)):
        chosen = columns[rows]
        factor = torch.linalg.cholesky(problem.hessian[chosen[:, :, None], chosen[:, None, :]])
        solved = torch.cholesky_solve(target[rows].gather(1, chosen)[:, :, None], factor)
        found[rows] = found[rows].scatter(1, chosen, solved[:, :, 0])
    return found


def removal_error(problem: Layer, weight: Tensor) -> float:
    """|X W^T - X V^T|^2 over |X W^T|^2 for a weight V [m, n]: the share of the layer's output that is lost."""
    change = problem.weight - weight
    energy = float(((problem.weight @ problem.hessian) * problem.weight).sum())
    return float(((change @ problem.hessian) * change).sum()) / max(energy, 1e-30)


def mask_columns(mask: Tensor) -> Tensor:
    """A mask of a weight's shape as columns [m, n]."""
    return _tap_major(mask)


@torch.no_grad()
def write_weight(module: nn.Module, columns: Tensor) -> None:
    """Put columns [m, n], the bias last where there is one, into a layer, in place."""
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    count = weight[0].numel()
    weight.copy_(_from_tap_major(columns[:, :count], weight))
    if bias is not None:
        bias.copy_(columns[:, count])


def _tap_major(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).flatten(1)


def _from_tap_major(columns: Tensor, weight: Tensor) -> Tensor:
    """Columns [rows, n] in the shape of a weight with as many rows."""
    shape = (len(columns), *weight.shape[2:], weight.shape[1])
    return columns.reshape(shape).movedim(-1, 1)
