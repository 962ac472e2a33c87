"""One file per backbone family. A file loads its networks and describes their anatomy; nothing else knows them."""

from __future__ import annotations

import importlib
import pkgutil

from lightning_prune.diffusion.models.base import Denoiser

__all__ = ["Denoiser", "families"]


def families() -> dict[str, type[Denoiser]]:
    """Every known family by the name of its diffusers class; a new file in this folder is found by itself."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = [family for family in Denoiser.__subclasses__() if "network_class" in vars(family)]
    return {family.network_class.__name__: family for family in found}
