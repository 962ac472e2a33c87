"""How a callback asks a module, and the data, for what it needs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.metrics.samples import conditions_of, has_prompts, require_pictures
from lightning_prune.protocols import InputError, SamplerBound, VariantSource

Capability = TypeVar("Capability")


def require(module: Any, capability: type[Capability], asking: object) -> Capability:
    """`module` as `capability`. Raises `InputError` saying which callback misses what."""
    if not isinstance(module, capability):
        raise InputError(
            f"trainer.callbacks: {type(asking).__name__} needs a module with {capability.__name__}, "
            f"which {type(module).__name__} has not"
        )
    return module


def check_sampling(trainer: Any, module: Any, sampler: Sampler, asking: object) -> None:
    """Refuse before a run what could not be drawn or shown when it ends.

    Raises:
        InputError: a solver that the process does not have, or that the module's result is not for; latents that
            nothing decodes; guidance by prompts without the empty prompt, or with one of another length.
    """
    data = getattr(trainer, "datamodule", None)
    require_pictures(data, type(asking).__name__)
    sampler.calls(require(module, VariantSource, asking).process)
    if isinstance(module, SamplerBound):
        try:
            module.check_sampler(sampler)
        except InputError as error:
            raise InputError(f"trainer.callbacks: {type(asking).__name__} {error}") from error
    if sampler.guidance != 1 and has_prompts(data) and hasattr(module, "denoiser"):
        module.denoiser.null_condition(conditions_of(data, torch.arange(1), 0))
