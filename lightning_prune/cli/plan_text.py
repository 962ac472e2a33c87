"""The plan as people read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MEMORY = ("weights", "gradients", "optimizer", "average", "teacher", "masks", "activations")
_PATTERNS_SHOWN = 4


def render(plan: Mapping[str, Any]) -> str:
    """The whole plan."""
    return "\n".join([*_head(plan), *_reach(plan), *_target(plan), *_training(plan), *_block_tables(plan)])


def _head(plan: Mapping[str, Any]) -> Iterator[str]:
    network, sampling = plan["network"], plan["sampling"]
    call = network["macs_per_call"]
    layers = ", ".join(f"{count} {kind}" for kind, count in network["layers"].items())
    groups = ", ".join(f"{count} of {kind}" for kind, count in network["width_groups"].items()) or "none"
    yield f"{plan['config']}: {plan['method']} on {network['class']} ({network['weights'] or 'not pretrained'})"
    yield f"  parameters   {_millions(network['parameters'])}, {_gib(network['bytes'])} in single precision"
    conventions = ", ".join(f"{_giga(call[name])} ({name})" for name in ("aten", "module", "linear"))
    yield f"  one call     MACs: {conventions}"
    yield f"  an image     {sampling['solver']}, {sampling['calls']} calls, guidance {sampling['guidance']:g}: " + (
        f"{_giga(sampling['macs_per_image'])} MACs (aten)"
    )
    yield f"  anatomy      layers: {layers}; width groups: {groups}; sample {_shape(network['sample_shape'])}"


def _reach(plan: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "What each method may touch, of the MACs of a sampling run and of the parameters"
    for reach in plan["reach"]:
        name = f"  {reach['method']:<11}{reach['axis']:<9}"
        if "layers" not in reach:
            yield f"{name}nothing: {reach['what']}"
            continue
        count = (
            f"{reach['blocks']} blocks" if reach["blocks"] else f"{reach['layers_touched']} of {reach['layers']} layers"
        )
        what = f"{count} ({reach['what']})"
        yield f"{name}{what:<42}{_percent(reach['macs_share'])} {_percent(reach['parameters_share'])}"
        for reason, rest in reach["not_touched"].items():
            yield f"      not {reason}: {rest['layers']} layers, {_percent(rest['macs_share']).strip()}: {rest['why']}"
            yield f"          {_patterns(rest['names'])}"


def _target(plan: Mapping[str, Any]) -> Iterator[str]:
    target = plan["target"]
    yield ""
    yield f"At the target of this config, {target['text']}" + (
        f" on {target['touched']} units" if target["touched"] else ""
    )
    yield f"  MACs an image   {_giga(target['macs_per_image_before'])} to {_giga(target['macs_per_image_after'])} " + (
        f"({target['macs_kept']:.4f} kept)"
    )
    if target["parameters_after"] is None:
        yield f"  parameters      {_millions(target['parameters_before'])}; what is left, the run decides"
        return
    yield f"  parameters      {_millions(target['parameters_before'])} to {_millions(target['parameters_after'])}"
    sizes = f"{_gib(target['bytes_before'])} to {_gib(target['bytes_after'])}"
    yield f"  weights         {sizes} in single precision (zeros and skipped blocks are stored like anything else)"


def _training(plan: Mapping[str, Any]) -> Iterator[str]:
    memory = plan["training_memory"]
    parts = ", ".join(f"{name} {_gib(memory[name])}" for name in _MEMORY if memory[name])
    yield ""
    at = f"at batch size {memory['batch_size']}, {memory['precision']}"
    yield f"Training memory, about {_gib(memory['total'])} a device {at}"
    yield f"  {parts}; without workspaces, or the saving of activation checkpointing or sharding"


def _block_tables(plan: Mapping[str, Any]) -> Iterator[str]:
    for granularity, table in plan["blocks"].items():
        yield ""
        modes = " or ".join(table["cache_modes"])
        yield f"Blocks, {granularity}: a skipped one gives its last {modes}; gamma is what one call saves with it"
        yield f"  {'block':<12}{'G module':>10}{'%':>7}{'G aten':>11}{'%':>7}{'params M':>11}{'gamma':>9}"
        total = table["total"]
        for name, row in _collapsed(table["rows"]):
            yield _row(name, row, total) + f"{row['parameters'] / 1e6:>11.4f}{row['gamma']:>9.4f}"
        yield _row("shell", table["shell"], total)
        yield _row("total", total, total) + f"{table['parameters'] / 1e6:>11.4f}"


def _row(name: str, row: Mapping[str, Any], total: Mapping[str, int]) -> str:
    shares = [f"{100 * row[c] / total[c]:>7.2f}" for c in ("module", "aten")]
    return f"  {name:<12}{row['module'] / 1e9:>10.4f}{shares[0]}{row['aten'] / 1e9:>11.4f}{shares[1]}"


def _collapsed(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows with their names; a run of three or more that differ in nothing else is one."""
    start = 0
    while start < len(rows):
        end = start
        while end + 1 < len(rows) and _figures(rows[end + 1]) == _figures(rows[start]):
            end += 1
        if end - start >= 2:
            yield f"{rows[start]['name']}...{rows[end]['name']}", rows[start]
        else:
            yield from ((row["name"], row) for row in rows[start : end + 1])
        start = end + 1


def _figures(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["module"], row["aten"], row["parameters"], row["gamma"]


def _patterns(names: Sequence[str]) -> str:
    """Names with their numbers left out, the most frequent first."""
    counted = Counter(re.sub(r"\.\d+", ".*", name) for name in names).most_common()
    shown = [f"{name} x{count}" if count > 1 else name for name, count in counted[:_PATTERNS_SHOWN]]
    more = f" and {len(counted) - _PATTERNS_SHOWN} more" if len(counted) > _PATTERNS_SHOWN else ""
    return ", ".join(shown) + more


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _giga(macs: float) -> str:
    return f"{macs / 1e12:,.4f} T" if macs >= 1e13 else f"{macs / 1e9:,.4f} G"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:6.2f} %"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
