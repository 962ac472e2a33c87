"""Where the score of every gate comes from. Shapes: T steps, N blocks, D width of a query.

A score is the logit of keeping: sigmoid(score) is the softmax of (skip, keep) logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

Encoder = Literal["none", "self", "cross"]
_HIDDEN = 128
_DROPOUT = 0.1


class _Single(nn.Module):
    """Stays in single precision whatever a trainer converts: steps of 1e-4 around 1 would round to nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def kept(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if found.dtype in (torch.float16, torch.bfloat16) else found

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self


class ScoreTable(_Single):
    """One free score a gate, all equal at first."""

    def __init__(self, steps: int, blocks: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(steps, blocks))

    def forward(self) -> Tensor:
        """Scores [T, N]."""
        return self.scores


class QueryPruner(_Single):
    """The published network: a learned query a gate, an encoder over queries, a head a gate.

    Args:
        steps: T.
        blocks: N.
        width: D.
        encoder: attention over the blocks of a step ("self"), over the steps of a block ("cross"), or none, which is
            what the released code amounts to.
    """

    def __init__(self, steps: int, blocks: int, width: int = 512, encoder: Encoder = "self") -> None:
        super().__init__()
        self.shape = (steps, blocks)
        self.queries = nn.Parameter(torch.randn(steps * blocks, width))
        self.encoder = None if encoder == "none" else QueryEncoder(width)
        self.across_steps = encoder == "cross"
        self.heads = GateHeads(steps * blocks, width)

    def forward(self) -> Tensor:
        """Scores [T, N]."""
        queries = self.queries.view(*self.shape, -1)
        if self.encoder is not None:
            queries = queries.transpose(0, 1) if self.across_steps else queries
            queries = self.encoder(queries)
            queries = queries.transpose(0, 1) if self.across_steps else queries
        skip, keep = self.heads(queries.reshape(len(self.queries), -1)).unbind(-1)
        scores: Tensor = keep - skip
        return scores.view(self.shape)


class QueryEncoder(nn.Module):
    """A transformer layer with one head; values are projected after mixing, attention has no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(width, _HIDDEN, bias=False) for _ in range(2))
        self.value = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, tokens, D]."""
        weights = (self.query(x) @ self.key(x).mT / math.sqrt(_HIDDEN)).softmax(dim=-1)
        x = self.norms[0](x + self.dropout(self.value(weights @ x)))
        encoded: Tensor = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return encoded


class GateHeads(nn.Module):
    """A perceptron of three layers for every gate, which says "keep" with logits (0, 1) at first."""

    def __init__(self, gates: int, width: int) -> None:
        super().__init__()
        sizes = [(width, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 2)]
        self.weights = nn.ParameterList(
            torch.empty(gates, *size).uniform_(-1, 1) / math.sqrt(size[0]) for size in sizes
        )
        self.biases = nn.ParameterList(torch.empty(gates, 1, o).uniform_(-1, 1) / math.sqrt(i) for i, o in sizes)
        with torch.no_grad():
            self.weights[-1].zero_()
            self.biases[-1].copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (skip, keep) [gates, 2] for queries [gates, D]."""
        x = x.unsqueeze(1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if layer else x, weight)
        return x.squeeze(1)
