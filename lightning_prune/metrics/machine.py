"""What a result was computed with; without the machine, seconds say nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_prune import __version__

_CPU_FILE = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, the cores and threads used, and the GPU if `device` is one.

    `load_average` is that of the last minute: what else was running, if it is asked for before any work. It is None
    where the system keeps none.
    """
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def cpu_name() -> str:
    """The model of the processor, as the system names it."""
    lines = _CPU_FILE.read_text().splitlines() if _CPU_FILE.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> float | None:
    """Processes that ran or waited to, on average over the last minute; Windows does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of everything that decides what a run computes and how fast."""
    libraries = {name: metadata.version(name) for name in ("torch", "lightning", "diffusers", "numpy")}
    return {"lightning_prune": __version__, "python": platform.python_version()} | libraries
