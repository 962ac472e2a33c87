"""How a callback asks a module for what it needs."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning_prune.protocols import InputError

Capability = TypeVar("Capability")


def require(module: Any, capability: type[Capability], asking: object) -> Capability:
    """`module` as `capability`. Raises `InputError` saying which callback misses what."""
    if not isinstance(module, capability):
        raise InputError(
            f"trainer.callbacks: {type(asking).__name__} needs a module with {capability.__name__}, "
            f"which {type(module).__name__} has not"
        )
    return module
