"""The stage table as text; stages, widths and the cost-error curve as plain SVG, which needs no plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.sax.saxutils import escape

from lightning_prune.methods.mosaicdiff.pruner import Pruned
from lightning_prune.protocols import InputError
from lightning_prune.pruning.allocation import dynamic

_CELL, _LABEL, _TOP = 26, 260, 40
_LEFT, _WIDTH, _HEIGHT = 60, 360, 200


def stage_table(pruned: Pruned) -> list[dict[str, Any]]:
    """A row per stage: steps, timesteps, mean published score, units removed by kind of width, MACs of a call kept."""
    timesteps = pruned.denoiser.facts["timesteps"]
    rows = []
    for number, (stage, removed) in enumerate(zip(pruned.stages, pruned.removed, strict=True)):
        row: dict[str, Any] = {
            "stage": number,
            "steps": stage.steps,
            "timesteps": f"{timesteps[stage.first]:g}..{timesteps[stage.end - 1]:g}",
            "score": float(pruned.denoiser.facts["stage_scores"][number]),
        }
        for kind in sorted({group.kind for group in pruned.problem.groups}):
            pairs = [(k, g.units) for k, g in zip(removed, pruned.problem.groups, strict=True) if g.kind == kind]
            row[f"{kind} removed"] = sum(k for k, _ in pairs) / sum(units for _, units in pairs)
        row["macs kept"] = pruned.denoiser.facts["macs_per_call"][number] / pruned.problem.call_macs
        rows.append(row)
    return rows


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table in columns, for the terminal."""
    heads = list(rows[0])
    cells = [heads, *[[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def widths_table(pruned: Pruned) -> list[dict[str, Any]]:
    """A row per stage and group: units, and how many stay."""
    return [
        {"stage": number, "group": group.name, "kind": group.kind, "units": group.units, "kept": group.units - k}
        for number, row in enumerate(pruned.removed)
        for group, k in zip(pruned.problem.groups, row, strict=True)
    ]


def cost_error_curve(pruned: Pruned, points: int = 10) -> list[dict[str, float]]:
    """Least predicted error at several shares of MACs removed, by dynamic programming on the allocation's errors."""
    curve = []
    for i in range(1, points + 1):
        target = i / (points + 1)
        try:
            budget = pruned.problem.budget(target)
        except InputError:
            break
        removed = dynamic(pruned.problem, budget, levels=16, buckets=2000)
        realised = 1 - pruned.problem.macs(removed) / pruned.problem.dense_macs
        curve.append({"macs_removed": realised, "error": pruned.problem.error(removed)})
    return curve


def allocation_svg(pruned: Pruned, title: str) -> str:
    """A cell per stage and group, darker the more of it stays, with the share that stays."""
    groups, stages = pruned.problem.groups, pruned.stages
    columns = [_LABEL + 60 * i for i in range(len(stages))]
    width, height = _LABEL + 60 * len(stages) + 10, _TOP + _CELL * len(groups) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="6" y="16" font-size="13">{escape(title)}: share of units kept</text>',
    ]
    for x, stage in zip(columns, stages, strict=True):
        parts.append(f'<text x="{x + 6}" y="{_TOP - 6}">{stage.first}..{stage.end - 1}</text>')
    for g, group in enumerate(groups):
        y = _TOP + _CELL * g
        parts.append(f'<text x="6" y="{y + 17}">{escape(group.name)}</text>')
        for x, row in zip(columns, pruned.removed, strict=True):
            parts.append(_cell(x, y, 1 - row[g] / group.units))
    return "\n".join([*parts, "</svg>"]) + "\n"


def cost_error_svg(pruned: Pruned, curve: Sequence[dict[str, float]], title: str) -> str:
    """Least predicted error over the share of MACs removed; the circle is the allocation that was made."""
    problem = pruned.problem
    own = (1 - problem.macs(pruned.removed) / problem.dense_macs, problem.error(pruned.removed))
    points = [(0.0, 0.0), *((point["macs_removed"], point["error"]) for point in curve)]
    top = max([y for _, y in points] + [own[1]]) or 1.0

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + _WIDTH * point[0], _TOP + _HEIGHT * (1 - point[1] / top)

    x, y = at(own)
    drawn = [
        _polyline(map(at, points), "rgb(55,55,245)"),
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="black"/>',
    ]
    return _plot(f"{title}: least predicted error", "share of MACs removed", 1.0, top, drawn)


def stages_svg(pruned: Pruned, title: str) -> str:
    """The published score of every step (blue) and the share of MACs that its stage keeps (black)."""
    scores = [float(score) for score in pruned.denoiser.facts["step_scores"]]
    count = len(scores)

    def at(step: float, value: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * step / count, _TOP + _HEIGHT * (1 - value)

    kept = [macs / pruned.problem.call_macs for macs in pruned.denoiser.facts["macs_per_call"]]
    corners = [at(end, share) for s, share in zip(pruned.stages, kept, strict=True) for end in (s.first, s.end)]
    drawn = [
        _polyline((at(step + 0.5, score) for step, score in enumerate(scores)), "rgb(55,55,245)"),
        _polyline(corners, "black"),
    ]
    return _plot(f"{title}: score (blue), MACs kept (black)", "sampling step", count, 1.0, drawn)


def _plot(title: str, caption: str, right: float, top: float, drawn: Sequence[str]) -> str:
    """Axes from 0 to `right` and from 0 to `top`, and what is drawn between them."""
    bottom = _TOP + _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{bottom + 44}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_LEFT + _WIDTH + 20}" height="{bottom + 44}" fill="white"/>',
        f'<text x="6" y="16" font-size="13">{escape(title)}</text>',
        f'<path d="M{_LEFT},{_TOP} V{bottom} H{_LEFT + _WIDTH}" fill="none" stroke="black"/>',
        *(f'<text x="{_LEFT + _WIDTH * i / 4 - 8:g}" y="{bottom + 16}">{right * i / 4:g}</text>' for i in range(5)),
        *(f'<text x="6" y="{_TOP + _HEIGHT * (1 - i / 2) + 4:g}">{top * i / 2:.3g}</text>' for i in range(3)),
        f'<text x="{_LEFT + _WIDTH // 2 - 60}" y="{bottom + 34}">{escape(caption)}</text>',
    ]
    return "\n".join([*parts, *drawn, "</svg>"]) + "\n"


def _polyline(points: Iterable[tuple[float, float]], colour: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{colour}"/>'


def _cell(x: int, y: int, kept: float) -> str:
    shade, ink = round(245 - 190 * kept), "white" if kept > 0.6 else "black"
    return (
        f'<rect x="{x}" y="{y}" width="58" height="{_CELL - 2}" fill="rgb({shade},{shade},245)"/>'
        f'<text x="{x + 16}" y="{y + 17}" fill="{ink}">{kept:.2f}</text>'
    )
