"""Which strategies and precisions a method can be trained under: what cannot work is refused at the start, by name."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_prune.protocols import InputError
from lightning_prune.sharding.strategy import FSDP2
from lightning_prune.sharding.zero import ZeRO


def check_strategy(
    strategy: Strategy, method: str, whole_for: str | None, compiled: bool, fitting: bool, precision: str
) -> None:
    """Refuse a strategy that would train something else than was asked for, or hang.

    Args:
        strategy: the trainer's.
        method: name of the method's class.
        whole_for: what the method needs its network in one piece for; None if it can be spread over processes.
        compiled: whether the training forward is compiled.
        fitting: whether the run trains.
        precision: the trainer's.

    Raises:
        InputError: naming the strategy and what to write instead.
    """
    key = f"trainer.strategy: {type(strategy).__name__}"
    if isinstance(strategy, FSDPStrategy):
        raise InputError(f"{key} flattens weights, so that no rows are left to mask; write fsdp2")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise InputError(f"{key}: layers are spread by rows alone and saved in one file here; write fsdp2")
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeRO):
        raise InputError(f"{key} saves folders in place, without averages; write zero1, zero2 or zero3")
    if isinstance(strategy, (FSDP2, ZeRO)) and whole_for is not None:
        raise InputError(f"{key}: {method} needs its network in one piece {whole_for}; write ddp")
    if isinstance(strategy, (FSDP2, ZeRO)) and compiled:
        raise InputError(f"model.compile: true gathers no weights under {type(strategy).__name__}; write false")
    if isinstance(strategy, ZeRO) and not fitting:
        raise InputError(f"{key} is for training; write ddp to evaluate")
    if isinstance(strategy, ZeRO) and precision != "32-true":
        raise InputError(
            f"trainer.precision: {precision} under DeepSpeed rounds the weights themselves, which masks and averages "
            "are made of; write 32-true, or strategy fsdp2"
        )


def check_precision(precision: str) -> None:
    """Refuse a precision that rounds the weights themselves, for methods that train or measure them, and double.

    Raises:
        InputError: naming what to write instead.
    """
    if precision == "64-true":
        raise InputError("trainer.precision: 64-true: data and noise are in float32; write 32-true")
    if precision in ("bf16-true", "16-true"):
        raise InputError(
            f"trainer.precision: {precision} rounds the weights themselves, which masks, averages and statistics are "
            f"made of; write {precision.removesuffix('-true')}-mixed (predict takes {precision})"
        )
