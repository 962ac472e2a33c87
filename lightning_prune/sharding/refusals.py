"""Which strategies a method can be trained under: what cannot work is refused at the start, by name."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_prune.protocols import InputError
from lightning_prune.sharding.strategy import FSDP2


def check_strategy(strategy: Strategy, method: str, sharded: bool, compiled: bool) -> None:
    """Refuse a strategy that would train something else than was asked for, or hang.

    Args:
        strategy: the trainer's.
        method: name of the method's class.
        sharded: whether the method can be trained while its network is spread over processes.
        compiled: whether the training forward is compiled.

    Raises:
        InputError: naming the strategy and what to write instead.
    """
    key = f"trainer.strategy: {type(strategy).__name__}"
    if isinstance(strategy, FSDPStrategy):
        raise InputError(f"{key} flattens weights, so that no rows are left to mask; write fsdp2")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise InputError(f"{key}: layers are spread by rows alone and saved in one file here; write fsdp2")
    if isinstance(strategy, DeepSpeedStrategy):
        raise InputError(f"{key} hides gradients and averages from the module and saves folders; write fsdp2")
    if isinstance(strategy, FSDP2) and not sharded:
        raise InputError(f"{key}: {method} needs its network in one piece; write ddp")
    if isinstance(strategy, FSDP2) and compiled:
        raise InputError("model.compile: true gathers no weights under fsdp2; write false")
