"""One file per backbone family. A file loads its networks and describes their anatomy; nothing else knows them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from lightning_prune.diffusion.models.base import Denoiser

__all__ = ["Denoiser", "families"]


def families() -> dict[str, type[Denoiser]]:
    """Every known family by the name of its network's class; a new file in this folder is found by itself.

    A family of one's own counts once its module is imported.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {family.network_class.__name__: family for family in _descendants(Denoiser)}


def _descendants(base: type[Denoiser]) -> Iterator[type[Denoiser]]:
    """Subclasses that name a network of their own; shared bases do not."""
    for family in base.__subclasses__():
        if "network_class" in vars(family):
            yield family
        yield from _descendants(family)
