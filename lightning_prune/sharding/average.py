"""Moving averages of weights: of whole networks, and of those that are spread over processes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

from lightning_prune.pruning.shards import forget_whole, full, held
from lightning_prune.sharding.zero import ZeRO

_AT_ONCE = 64  # tensors that are averaged together; what that takes for a moment is the size of these


class _Average(AveragedModel):
    """torch's averaged copy, updated in few kernels and without waiting for the device, to the same bits."""

    def __init__(self, module: nn.Module, device: torch.device, decay: float) -> None:
        super().__init__(module, device=device, avg_fn=None, use_buffers=False)
        self.decay = decay
        self._is_first: bool | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * weight; the first time the weight itself."""
        if self._is_first is None:
            self._is_first = int(self.n_averaged) == 0  # the one wait: a checkpoint may have set it
        averages, weights = list[Tensor](self.module.parameters()), list[Tensor](model.parameters())
        for begin in range(0, len(averages), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            _blend(averages[part], weights[part], 0.0 if self._is_first else self.decay)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1
        self._is_first = False

    def restart(self) -> None:
        """Let the next weights be the average."""
        self.n_averaged.zero_()
        self._is_first = True


def _blend(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    if decay == 0:
        torch._foreach_copy_(averages, weights)
        return
    # Rounded as the plain formula is; interpolating in place rounds otherwise.
    added = torch._foreach_mul(weights, 1 - decay)
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, added)


class WeightAverage(EMAWeightAveraging):
    """`EMAWeightAveraging` whose copy is where the network trains, with the same arithmetic and the same checkpoint.

    Lightning's makes the copy before the network is moved, so on a GPU all weights would go to the CPU every step.

    Args:
        decay: decay of the moving average.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, decay=decay)
        self.decay = decay

    @property
    def state_key(self) -> str:
        """The one that Lightning's has in checkpoints."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = _Average(pl_module, trainer.strategy.root_device, self.decay)

    def restart(self) -> None:
        """Forget what was averaged: the next weights are the average, and those after them are added to it."""
        assert isinstance(self._average_model, _Average)
        self._average_model.restart()


class _LocalAverage:
    """Averages of a module's parameters, each process those of its own shards: averaging is element by element."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = {name: held(p).detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * weight; the first time the weight itself."""
        for name, parameter in module.named_parameters():
            average, now = self.tensors[name], held(parameter)
            average.copy_(now if self.updates == 0 else average * self.decay + now * (1 - self.decay))
        self.updates += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            current = held(parameter).detach().clone()
            held(parameter).copy_(self.tensors[name])
            self.tensors[name].copy_(current)
            forget_whole(parameter)


class ShardedAverage(EMAWeightAveraging):
    """`EMAWeightAveraging` under FSDP2 and DeepSpeed, with the same arithmetic and the same checkpoint.

    Lightning's copies the module before it is sharded, whole, on every process, and reads weights that stage 3 of
    DeepSpeed keeps elsewhere.

    Args:
        decay: decay of the moving average.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, decay=decay)
        self.decay = decay
        self._average: _LocalAverage | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: parameters are sharded after this."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average = _LocalAverage(pl_module, self.decay)
        self._average_model: Any = self._average  # what the inherited hooks update

    @property
    def average(self) -> _LocalAverage:
        """What is averaged; there is one once fitting has started."""
        assert self._average is not None
        return self._average

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        parameters = pl_module.named_parameters()
        averaged = {name: full(p, self.average.tensors[name]).cpu() for name, p in parameters}
        checkpoint["current_model_state"] = checkpoint["state_dict"]  # empty but on the first process
        if checkpoint["state_dict"]:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.average.updates)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The strategy has put the checkpoint's `state_dict`, which is the average, into the module by now.
        self._average = self._average_model = _LocalAverage(pl_module, self.decay)
        if "current_model_state" not in checkpoint:
            return
        self.average.updates = int(checkpoint["averaging_state"]["n_averaged"])
        current: dict[str, Any] = checkpoint["current_model_state"]
        if isinstance(trainer.strategy, ZeRO):
            trainer.strategy.load_model_state_dict({"state_dict": current})
        else:
            set_model_state_dict(pl_module, current, options=StateDictOptions(full_state_dict=True))

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        self.average.swap(pl_module)

    def _copy_average_to_current(self, pl_module: pl.LightningModule) -> None:
        self.average.swap(pl_module)
