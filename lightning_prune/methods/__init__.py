"""One folder per method; methods never import each other."""

from __future__ import annotations

import importlib
import pkgutil


def discover() -> None:
    """Import every method, so that its short class name is known; a new folder is found by itself."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
