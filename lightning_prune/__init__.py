"""Cheaper sampling from pretrained diffusion models. Importing this package imports nothing heavy."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from lightning_prune.export import load

        return load
    raise AttributeError(f"module 'lightning_prune' has no attribute {name!r}")
