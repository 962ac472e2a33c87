"""SparseDM as a LightningModule: plumbing between masks, teacher and loss."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.sparsedm.loss import sparsedm_loss
from lightning_prune.module import Batch, LrSchedule, PruningModule
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.frozen import Frozen
from lightning_prune.pruning.masks import MaskSet, select_units


class SparseDM(PruningModule):
    """Fine-tune under N:M masks with a straight-through gradient and distillation from the dense start.

    Args:
        denoiser: the pretrained dense network; it is also the teacher.
        process: forward process and training target.
        optimizer: callable that makes the optimizer from the parameters.
        sparsity: the pattern aimed at, "n:m"; without a ramp it holds from the first step. With n == m, as in "4:4",
            training is dense under the same loss: the control of a pruned result.
        layers: regular expressions of the layers to mask; null masks every Linear and Conv2d that divides.
        dense_layers: regular expressions of layers to leave dense; null takes the backbone's own (embeddings,
            modulation, output).
        decay: strength of the sparse-refined term lambda (1 - m) W added to unscaled gradients; 0 is plain
            straight-through.
        noise_weight: weight of the noise-prediction loss.
        distill_weight: weight of the distillation loss; 0 runs no teacher.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        ema_decay: decay of the moving average of the dense shadow weights; null for none.
        label_dropout: probability that a label is replaced by "no class".
        seed: seed of timesteps, noise and label dropout; null takes that of `seed_everything`.
        compile: run the training forward through torch.compile.
    """

    shardable = True

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        sparsity: str = "2:4",
        layers: list[str] | None = None,
        dense_layers: list[str] | None = None,
        decay: float = 2e-4,
        noise_weight: float = 1.0,
        distill_weight: float = 0.1,
        lr_schedule: LrSchedule = "constant",
        warmup_steps: int = 0,
        ema_decay: float | None = 0.999,
        label_dropout: float = 0.0,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            denoiser, process, optimizer, lr_schedule, warmup_steps, ema_decay, label_dropout, seed, compile
        )
        for name, weight in (("noise_weight", noise_weight), ("distill_weight", distill_weight), ("decay", decay)):
            if weight < 0:
                raise InputError(f"model.{name}: {weight} is negative")
        if noise_weight == distill_weight == 0:
            raise InputError("model.noise_weight and model.distill_weight are both 0: there is nothing to learn from")
        self.target_sparsity = Sparsity.parse(sparsity)
        self.decay, self.noise_weight, self.distill_weight = decay, noise_weight, distill_weight
        self._dense = Frozen(deepcopy(denoiser))
        exclude = denoiser.default_dense() if dense_layers is None else dense_layers
        self._units = select_units(denoiser.anatomy(), layers, exclude, self.target_sparsity.m)
        self.masks = MaskSet(denoiser.network, self._units, self._pattern)

    @property
    def _pattern(self) -> Sparsity | None:
        """The pattern to reach; None for n == m, the dense control."""
        return None if self.target_sparsity.is_dense else self.target_sparsity

    # Training

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, cond, target = self.diffuse(batch, generator)
        teacher = None
        if self.distill_weight > 0:
            with torch.no_grad():
                teacher = self._dense.on(self.device)(x_t, t, cond)
        student = self.denoise(x_t, t, cond)
        return sparsedm_loss(student, target, teacher, self.noise_weight, self.distill_weight)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Lightning calls this after unscaling and before clipping, so the term has the same strength under any
        # loss scale and is added once per optimizer step under gradient accumulation. An optimizer that unscales
        # inside its own step is refused at the start.
        if self.decay > 0:
            self.masks.add_decay(self.decay)

    def on_fit_start(self) -> None:
        fused = any(group.get("fused") for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        if self.decay > 0 and fused and self.trainer.precision == "16-mixed":
            raise InputError(
                "model.optimizer: with fused: true and trainer.precision 16-mixed the optimizer unscales inside its "
                "step and divides the decay away; use bf16-mixed, fused: false or decay: 0"
            )

    def weights_changed(self) -> None:
        self.masks.refresh()

    # SparsityControl

    def set_sparsity(self, sparsity: Sparsity | None) -> None:
        """Change the pattern of every masked layer in place; None computes densely."""
        self.masks.set_sparsity(sparsity)

    def density_by_layer(self) -> Mapping[str, float]:
        return self.masks.density_by_layer()

    def mask_violations(self, compare: bool = False) -> int:
        return self.masks.violations(compare)

    # Results

    def variants(self) -> dict[str, Denoiser]:
        """The dense start, the same under one-shot magnitude masks, and the result."""
        dense = self._dense.on(self.device)
        if self._pattern is None:
            return {"dense": dense, "dense fine-tuned": self.whole_denoiser()}
        one_shot = deepcopy(dense)
        MaskSet(one_shot.network, self._units, self.target_sparsity)
        target = str(self.target_sparsity)
        return {"dense": dense, f"one-shot {target}": one_shot, f"sparsedm {target}": self.whole_denoiser()}
