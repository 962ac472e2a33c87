"""What `bench` prints: a head, a line for every cell as it is measured, and what the figures do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]

_ROW = "{:>5}  {:<8}  {:<8}  {:<26}  {:<26}  {:<19}  {:<22}  {:<10}  {}"
_HEADINGS = ("batch", "dtype", "mode", "dense ms", "pruned ms", "images/s", "seconds ratio", "MACs ratio", "result")


def head(result: Result) -> str:
    """What is compared, on what, and the headings of the table."""
    pruned, macs, task = result["pruned"], result["macs"], result["task"]
    masked = ", ".join(f"{count} layers under {pattern}" for pattern, count in pruned["masked"].items())
    what = task["name"]
    if "steps" in task:
        what += f" of {task['steps']} steps, guidance {task['guidance']:g}"
    lines = [
        f"dense    {result['dense']}",
        f"pruned   {pruned['folder']} ({', '.join(pruned['method'])}; {masked or 'no layer masked'})",
        f"timed    {what}, on {_machine(result['machine'])}",
        f"with     {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"MACs     {_giga(macs['dense_per_image'])} dense, {_giga(macs['pruned_per_image'])} pruned an image "
        f"({macs['convention']})",
        "",
        _ROW.format(*_HEADINGS),
    ]
    return "\n".join(lines)


def line(cell: Result, macs: Result) -> str:
    """One cell of the table."""
    ratio = cell["seconds_ratio"]
    return _ROW.format(
        cell["batch"],
        cell["dtype"],
        cell["mode"],
        _milliseconds(cell["dense"]),
        _milliseconds(cell["pruned"]),
        f"{cell['dense']['images_per_second']:.4g} / {cell['pruned']['images_per_second']:.4g}",
        f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        f"{macs['ratio']:.3f}",
        verdict(cell) + _memory(cell["peak_memory_bytes"]),
    )


def verdict(cell: Result) -> str:
    """What the seconds allow to be said, in words."""
    ratio = float(cell["seconds_ratio"]["value"])
    if cell["verdict"] == "speed-up":
        return f"speed-up {1 / ratio:.2f}x"
    return f"slower: takes {ratio:.2f}x the seconds" if cell["verdict"] == "slower" else str(cell["verdict"])


def notes(result: Result) -> str:
    """How to read the table."""
    lines = [
        "",
        f"* milliseconds: median of {result['repeats']} calls in turns, with quartiles; ratios: pruned over dense",
        f"* seconds ratio: {result['interval']}",
    ]
    if result["macs"]["theoretical"]:
        lines += [_kernels({cell["dtype"]: cell["sparse_layers"] for cell in result["cells"]})]
    machine = result["machine"]
    if (machine["load_average"] or 0) > machine["cores"] / 2:
        lines.append(
            f"* the machine was busy before this began (load average {machine['load_average']:.2f}, {machine['cores']} "
            "cores): measure again on an idle one before relying on it"
        )
    if any(cell["peak_memory_bytes"]["dense"] is not None for cell in result["cells"]):
        lines.append("* peak memory: weights and buffers, and what one call allocates beyond them")
    return "\n".join(lines)


def _kernels(layers: dict[str, int]) -> str:
    """What computed the masked layers, from the number by type that a sparse kernel ran."""
    ran = ", ".join(f"{count} layers in {dtype}" for dtype, count in layers.items() if count)
    if ran:
        return f"* a sparse kernel ran {ran}; the other masked layers were computed as dense layers with zeros"
    return (
        "* the MACs of masked layers are theoretical: no sparse kernel ran, so they were computed as dense layers with "
        "zeros"
    )


def _machine(machine: Result) -> str:
    host = f"{machine['cpu']}, {machine['cores']} cores, torch threads {machine['threads']}"
    name = f"{machine['gpu']} (CUDA {machine['cuda']}; {host})" if machine["gpu"] else host
    load = machine["load_average"]
    return name if load is None else f"{name}, load average before {load:.2f}"


def _milliseconds(row: Result) -> str:
    median, low, high = (_three_digits(1e3 * s) for s in (row["median_seconds"], *row["quartiles"]))
    return f"{median} [{low}, {high}]"


def _three_digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.4g} G"


def _memory(peak: Result) -> str:
    if peak["dense"] is None:
        return ""
    return f"; peak memory {peak['dense'] / 2**20:.1f} / {peak['pruned'] / 2**20:.1f} MiB"
