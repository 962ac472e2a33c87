"""PruningModule: the plumbing every method shares. A method returns a loss and values to log, nothing more."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_prune.diffusion.conditions import Condition, move, replace
from lightning_prune.diffusion.gated import StepGated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import OnStep, sample_images
from lightning_prune.diffusion.solvers import Sampler, usual_solver
from lightning_prune.diffusion.variants import Variant
from lightning_prune.metrics.macs import Ledger, count_denoiser
from lightning_prune.protocols import InputError, Plan, ResultHook, TaskBar
from lightning_prune.pruning.frozen import Frozen, Shared
from lightning_prune.pruning.masks import patterns_now
from lightning_prune.seeds import derive, run_seed
from lightning_prune.sharding import (
    FSDP2,
    ShardedAverage,
    WeightAverage,
    ZeRO,
    check_optimizer,
    check_precision,
    check_strategy,
)
from lightning_prune.sharding.network import entries, is_sharded, shard, skeleton, whole

Batch = Mapping[str, Any]
LrSchedule = Literal["constant", "constant-from-zero", "cosine", "linear"]


def lr_factor(step: int, total: float, warmup: int, schedule: LrSchedule) -> float:
    """Learning-rate multiplier at `step` (from 0): linear warm-up over `warmup` steps, then the schedule to 0.

    "constant-from-zero" spends the first step at 0, as the code of U-ViT and SparseDM does.
    """
    if schedule == "constant-from-zero":
        return min(1.0, step / max(1, warmup))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant" or not math.isfinite(total):
        return 1.0
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress


class PruningModule(pl.LightningModule):
    """Denoiser, diffusion process, weight averaging, optimizer and sampling.

    Randomness of training step k is seeded by (seed, k, rank), so a resumed run draws what the uninterrupted one
    would have drawn, and evaluation cannot disturb it.

    Args:
        denoiser: the network to train or prune.
        process: forward process and training target.
        optimizer: callable that makes the optimizer from the parameters.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        ema_decay: decay of the exponential moving average of the weights; null for none.
        label_dropout: probability that a sample's label is replaced by "no class", for guidance.
        seed: seed of timesteps, noise and label dropout; null takes that of `seed_everything`.
        compile: run the training forward through torch.compile.
    """

    whole_for: ClassVar[str | None] = "for what it does with it"
    """What the method needs its network in one piece for; None if processes may share it (FSDP2, DeepSpeed)."""
    takes_half: ClassVar[bool] = False
    """Whether it trains and evaluates on a network of half precision; all sample from one."""
    steps_between_checks: ClassVar[int] = 50
    """How often the loss is seen to be finite: reading it waits for the device."""

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: LrSchedule = "constant",
        warmup_steps: int = 0,
        ema_decay: float | None = 0.999,
        label_dropout: float = 0.0,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise InputError(f"model.label_dropout: {label_dropout} is not in [0, 1)")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise InputError(f"model.ema_decay: {ema_decay} is not in (0, 1)")
        if warmup_steps < 0:
            raise InputError(f"model.warmup_steps: {warmup_steps} is negative")
        if isinstance(denoiser, StepGated):
            raise InputError("model.denoiser: it has gates already, for one sampler; begin with the network without")
        self.denoiser = denoiser
        self.process = process
        # The command line's callable refers to the command line, trainer and all.
        self._optimizer = Shared(optimizer)
        self.lr_schedule: LrSchedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.ema_decay = ema_decay
        self.label_dropout = label_dropout
        self.seed = run_seed() if seed is None else seed
        if self.seed < 0:
            raise InputError(f"model.seed: {self.seed} is negative")
        self.predict_sampler = Sampler(usual_solver(process))
        self.compile_training = compile
        self._compiled: Callable[..., Tensor] | None = None
        self._ledger: Ledger | None = None
        self._structure: Frozen[Denoiser] | None = None

    # What a method provides

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of a batch and further values to log, drawing randomness from `generator` alone."""

    def weights_changed(self) -> None:
        """Called whenever weights were changed in place: after a step, after averaging swaps, after loading."""

    # Training

    def denoise(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The denoiser's output; compiled while training where asked for."""
        if not (self.training and self.compile_training):
            return self.denoiser(x, t, cond)  # type: ignore[no-any-return]
        if self._compiled is None:
            # The function, not the module: a compiled module would register itself and enter the state dict.
            self._compiled = torch.compile(self.denoiser.forward)
        return self._compiled(x, t, cond)

    def diffuse(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """Noise a batch. Returns x_t [B, C, H, W], t [B], the condition after its dropout, and the target."""
        x0, cond = batch["x"], batch["cond"]
        t = self.process.draw_timesteps(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype)
        if self.label_dropout > 0:
            drop = torch.rand(len(x0), generator=generator, device=generator.device) < self.label_dropout
            cond = replace(cond, drop, self.denoiser.null_condition(cond))
        return self.process.add_noise(x0, noise, t), t, cond, self.process.target(x0, noise, t)

    def step_generator(self, stream: int, index: int) -> torch.Generator:
        """Generator of one step; it also seeds torch's own, which dropout layers draw from."""
        step_seed = derive(self.seed, stream, index, self.global_rank)
        torch.manual_seed(step_seed)
        return torch.Generator(device=self.device).manual_seed(step_seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        index = self.trainer.fit_loop.epoch_loop.total_batch_idx
        loss, values = self.loss(batch, self.step_generator(0, index))
        if index % self.steps_between_checks == 0 and not torch.isfinite(loss):
            raise InputError(f"loss is {loss.item()} at step {self.global_step}; lower the learning rate")
        self.log("loss", loss, prog_bar=True)
        self.log_dict(values)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._held_out_loss("val_loss", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._held_out_loss("test_loss", batch, batch_idx)

    def _held_out_loss(self, name: str, batch: Batch, batch_idx: int) -> None:
        with torch.random.fork_rng(devices=[]):
            loss, _ = self.loss(batch, self.step_generator(1, batch_idx))
        self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=len(batch["x"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Sample ids [B] and images [B, C, H, W] in [-1, 1], or latents, for the conditions of the batch."""
        ids = batch["id"].cpu()
        return ids, self.sample_images(ids, move(batch["cond"], "cpu"), self.predict_sampler)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        try:
            optimizer = self._optimizer.value([p for p in self.parameters() if p.requires_grad])
        except ValueError as error:
            raise InputError(f"model.optimizer: {error}") from error
        if isinstance(self.trainer.strategy, ZeRO):
            check_optimizer(optimizer)
        constant = self.lr_schedule.startswith("constant")
        total = math.inf if constant else self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, total, self.warmup_steps, self.lr_schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        # The first hook of a run, before processes wait for each other.
        fitting, strategy = self.trainer.state.fn == TrainerFn.FITTING, self.trainer.strategy
        precision = str(self.trainer.precision)
        check_strategy(strategy, type(self).__name__, self.whole_for, self.compile_training, fitting, precision)
        if not self.takes_half and self.trainer.state.fn != TrainerFn.PREDICTING:
            check_precision(precision)
        # Added behind the user's callbacks: those that evaluate at the end of a validation epoch run before this
        # one swaps the averaged weights out again. Masks are derived from weights, so buffers are not averaged.
        if self.ema_decay is None or not fitting:
            return []
        if isinstance(strategy, (FSDP2, ZeRO)):
            return [ShardedAverage(self.ema_decay)]
        return [WeightAverage(self.ema_decay)]

    # Sharding

    def shard(self, mesh: Any) -> None:
        """Spread the denoiser over the processes of a device mesh; the strategy calls it.

        Without a mesh another engine spreads it after this.
        """
        with entries(self.denoiser.network) as entered:
            self._ledger = count_denoiser(self.denoiser)  # it traces a call, which is another one once sharded
        self._structure = Frozen(skeleton(self.denoiser))
        if mesh is not None:
            shard(self.denoiser.network, mesh, entered)

    def whole_denoiser(self) -> Denoiser:
        """The denoiser in one piece: itself, or where it is spread a copy; all processes call it together."""
        if self._structure is None or not is_sharded(self.denoiser):
            return self.denoiser
        return whole(self.denoiser, self._structure.value, self.device).eval()

    # Sampling

    def sample_images(
        self, ids: Tensor, cond: Condition, sampler: Sampler, seed: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] for sample `ids` [B] and their conditions."""
        return sample_images(self.denoiser, self.process, ids, cond, sampler, seed, on_step)

    @property
    def weights_kind(self) -> str:
        """Which weights are evaluated and stored: "averaged" or "last"."""
        return "last" if self.ema_decay is None else "averaged"

    def variants(self) -> dict[str, Variant]:
        """Networks to report beside each other, by row name: the dense one first, this method's result last.

        All processes call it together. None of the networks is sharded, so one process alone may compute with them.
        """
        return {"result": Variant(self.whole_denoiser())}

    def progress(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show work of `total` parts on the trainer's progress bar, where it can; yields what advances it."""
        bar = self.trainer.progress_bar_callback
        return bar.task(description, total) if isinstance(bar, TaskBar) else nullcontext(lambda parts: None)

    # Planned

    def planned(self) -> Plan:
        """What this method would leave at its target; here the network as it is."""
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        return Plan(axis="none", target="dense", touched=(), macs_kept=1.0, parameters_kept=parameters)

    # CostModel

    def ledger(self) -> Ledger:
        """MACs of one call of the denoiser, masks not applied; counted once."""
        if self._ledger is None:
            self._ledger = count_denoiser(self.denoiser)
        return self._ledger

    def kept_fraction(self) -> dict[str, float]:
        """Share of the dense network's MACs that one call costs now, by convention."""
        return {"aten": float(self.ledger().kept_share(patterns_now(self.denoiser.network)))}

    # Moments at which weights change in place

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.weights_changed()

    def on_train_start(self) -> None:
        self.weights_changed()

    def on_train_end(self) -> None:
        # Lightning calls the module after every callback, so weight averaging has copied its weights by now.
        self.write_results(self.trainer)

    def write_results(self, trainer: pl.Trainer) -> None:
        """Let callbacks work on the final weights, which are in place."""
        self.weights_changed()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResultHook):
                callback.on_result(trainer, self)

    def on_validation_epoch_start(self) -> None:
        self.weights_changed()

    def on_validation_epoch_end(self) -> None:
        self.weights_changed()

    def on_test_epoch_start(self) -> None:
        self.weights_changed()

    def on_predict_epoch_start(self) -> None:
        self.weights_changed()
