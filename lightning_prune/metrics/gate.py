"""Quality gates: a condition on a distance that holds only if the upper end of its interval does.

fd_fashion<=12              the distance of the result
fd_fashion<=dense+0.5       its paired difference from another row
fd_fashion<=dense+5%        the same, in per cent of that row's distance
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.metrics.evaluation import Score
from lightning_prune.metrics.frechet import Distance, paired_difference
from lightning_prune.protocols import GateNotMet, InputError

_NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?"


@dataclass(frozen=True)
class Gate:
    """`metric` of the result is at most `margin` (per cent of the row's if `relative`) above `row`, or above 0."""

    text: str
    metric: str
    row: str | None
    margin: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a condition. Raises `InputError` when it is none."""
        if match := re.fullmatch(rf"\s*(\w+)\s*<=\s*({_NUMBER})\s*", text):
            return cls(text.strip(), match[1], None, float(match[2]))
        pattern = rf"\s*(\w+)\s*<=\s*([A-Za-z][^+]*?)\s*(?:\+\s*({_NUMBER})\s*(%?))?\s*"
        if match := re.fullmatch(pattern, text):
            return cls(text.strip(), match[1], match[2], float(match[3] or 0), match[4] == "%")
        raise InputError(f"gate: {text!r}: expected a condition such as fd_fashion<=dense+0.5 or fd_fashion<=12")

    def check_names(self, metric: str, rows: list[str]) -> None:
        """Raise `InputError` if the metric is not the one measured or the row not one of those reported."""
        if self.metric != metric:
            raise InputError(f"gate: {self.metric}: this config measures {metric}")
        if self.row is not None and self.row not in rows[:-1]:
            raise InputError(f"gate: {self.row}: no such row to compare with; there are: {', '.join(rows[:-1])}")

    def check(self, scores: Mapping[str, Score]) -> str:
        """What was found, in a line.

        Raises:
            GateNotMet: the upper end of the interval exceeds the margin.
            InputError: see `check_names`.
        """
        rows = list(scores)
        result = scores[rows[-1]]
        self.check_names(result.metric, rows)
        found: Distance = result.fd
        margin, what = self.margin, f"{self.metric} of {rows[-1]}"
        if self.row is not None:
            found = paired_difference(result.fd, scores[self.row].fd)
            margin *= scores[self.row].fd.value / 100 if self.relative else 1
            what += f" less that of {self.row}"
        line = f"{what} is {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], allowed {margin:.3f}: {self.text}"
        if found.high > margin:
            raise GateNotMet(line)
        return line
