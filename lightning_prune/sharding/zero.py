"""DeepSpeed as a strategy of the trainer: `trainer.strategy: zero1`, `zero2` or `zero3`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.protocols import InputError
from lightning_prune.pruning.shards import forget_whole, full, held, in_pieces, is_spread, piece_of, shape

ELEMENTWISE = ("Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers of torch to which a weight's neighbours do not matter: DeepSpeed steps on flattened pieces."""


class ZeRO(DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy` in full precision, with the one checkpoint that every other strategy reads.

    Optimizer states (stage 1), gradients too (2) and parameters too (3) are spread over all processes. A folder of
    shards, DeepSpeed's own checkpoint, is written in place, so that a job killed meanwhile would have nothing to go on
    from.

    Args:
        stage: 1, 2 or 3.
        process_group_backend: "nccl", "gloo" or null for what fits the device.
    """

    def __init__(self, stage: int = 2, process_group_backend: str | None = None) -> None:
        if stage not in (1, 2, 3):
            raise InputError(f"trainer.strategy: stage {stage} of DeepSpeed is not 1, 2 or 3")
        try:
            super().__init__(stage=stage, process_group_backend=process_group_backend)
        except Exception as error:
            if "deepspeed" not in str(error).lower():
                raise
            raise InputError(
                "trainer.strategy: DeepSpeed is not installed; pip install 'lightning_prune[deepspeed]'"
            ) from error

    def setup(self, trainer: pl.Trainer) -> None:
        module: Any = self.lightning_module
        if self.zero_stage_3:
            module.shard(None)
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Both Lightning and DeepSpeed would divide by the batches accumulated.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # One file: all processes gather, the first one writes

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @torch.no_grad()
    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self._module
        spread = {name: self._kept(full(p)) for name, p in module.named_parameters() if is_spread(p)}
        return {**module.state_dict(), **spread} if self.is_global_zero else {}

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put whole weights into what this process holds, and into the copy that the optimizer steps on."""
        state, module = checkpoint["state_dict"], self._module
        for name, parameter in module.named_parameters():
            _write(parameter, state[name].to(self.root_device))
        for name, buffer in module.named_buffers():
            if name in state:
                buffer.copy_(state[name])

    @torch.no_grad()
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the torch optimizer inside, by parameter instead of by flat piece."""
        inner = self._inner
        groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
        trained = list(self._trained())
        groups[0]["params"] = list(range(len(trained)))
        state: dict[int, dict[str, Any]] = {}
        flat = self._flat[0]
        for key, value in inner.state.get(flat, {}).items():
            whole = isinstance(value, Tensor) and value.shape == flat.shape
            for index, parameter in enumerate(trained):
                gathered = self._kept(_state_of(parameter, key)) if whole else _copied(value)
                state.setdefault(index, {})[key] = gathered
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved, inner, trained = checkpoint["optimizer_states"][0], self._inner, list(self._trained())
        for group, values in zip(inner.param_groups, saved["param_groups"], strict=False):
            group.update({key: value for key, value in values.items() if key != "params"})
        if not saved["state"]:
            return
        example, size = saved["state"][0], shape(trained[0])
        whole = [key for key, value in example.items() if isinstance(value, Tensor) and value.shape == size]
        for flat in self._flat:
            zeros = {key: torch.zeros_like(flat) for key in whole}
            inner.state[flat] = {key: _copied(value) for key, value in example.items()} | zeros
        self._link()
        for index, parameter in enumerate(trained):
            for key in whole:
                _write_state(parameter, saved["state"][index][key].to(self.root_device), key)

    def _kept(self, whole: Tensor) -> Tensor | None:
        return whole.cpu() if self.is_global_zero else None

    @property
    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trained(self) -> Iterator[Any]:
        return (p for p in self._module.parameters() if p.requires_grad)

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    @property
    def _inner(self) -> Optimizer:
        return self._zero.optimizer  # type: ignore[no-any-return]

    @property
    def _flat(self) -> list[Tensor]:
        """The pieces that the optimizer of this process steps on."""
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups)

    def _link(self) -> None:
        if not self.zero_stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what looks at a whole weight, as Muon does, or treats parameters in groups.

    Raises:
        InputError: naming the optimizer.
    """
    name = type(optimizer).__name__
    if name not in ELEMENTWISE or not type(optimizer).__module__.startswith("torch.optim"):
        raise InputError(
            f"model.optimizer: {name} under DeepSpeed would step on flattened pieces; write AdamW or fsdp2"
        )
    if len(optimizer.param_groups) != 1:
        raise InputError(f"model.optimizer: {name} has several groups of parameters; under DeepSpeed write one")


def _write(parameter: Any, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not in_pieces(parameter):
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        return
    piece = piece_of(parameter, value)
    held(parameter).copy_(piece)
    forget_whole(parameter)
    if hasattr(parameter, "_z3_optimizer"):
        safe_set_local_fp32_param(parameter, piece)


def _state_of(parameter: Any, key: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if in_pieces(parameter):
        return full(parameter, safe_get_local_optimizer_state(parameter, key))
    return safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]


def _write_state(parameter: Any, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if in_pieces(parameter):
        safe_set_local_optimizer_state(parameter, piece_of(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


for _stage in (1, 2, 3):
    if f"zero{_stage}" not in StrategyRegistry:
        StrategyRegistry.register(f"zero{_stage}", ZeRO, description=f"{ZeRO.__doc__} Stage {_stage}.", stage=_stage)
