"""SparseDM as a LightningModule: plumbing between masks, teacher and loss."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Generator, Tensor
from torch.optim import Optimizer

from lightning_prune.diffusion.conditions import Condition
from lightning_prune.diffusion.gating import sharing_copy
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.text import TextDenoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import check_one_stage
from lightning_prune.diffusion.variants import Variant
from lightning_prune.methods.sparsedm.calibrated import Calibrated
from lightning_prune.methods.sparsedm.calibration import Allocation, Calibration
from lightning_prune.methods.sparsedm.distillation import (
    Distillation,
    draw_scales,
    feature_loss,
    feature_modules,
    predict_guided,
    timestep_weights,
    watching,
)
from lightning_prune.methods.sparsedm.loss import sparsedm_loss
from lightning_prune.methods.sparsedm.scores import MaskScores, fixed_scores
from lightning_prune.module import Batch, LrSchedule
from lightning_prune.protocols import InputError, Plan, Sparsity
from lightning_prune.pruning.frozen import Frozen
from lightning_prune.pruning.masks import (
    MaskSet,
    Pattern,
    Patterns,
    check_unmasked,
    flip_rates,
    parse_pattern,
    select_units,
)
from lightning_prune.seeds import derive
from lightning_prune.sharding import WeightAverage, ZeRO


class SparseDM(Calibrated):
    """Fine-tune under N:M masks with a straight-through gradient and distillation from the dense start.

    Args:
        denoiser: the pretrained dense network; it is also the teacher.
        process: forward process and training target.
        optimizer: callable that makes the optimizer from the parameters.
        sparsity: the pattern aimed at, "n:m"; without a ramp it holds from the first step. With n == m, as in "4:4",
            training is dense under the same loss: the control of a pruned result. The flips it logs are those that
            masks of m/2:m would have.
        layers: regular expressions of the layers to mask; null masks every Linear and Conv2d that divides.
        dense_layers: regular expressions of layers to leave dense; null takes the backbone's own (embeddings,
            modulation, output).
        decay: strength of the sparse-refined term lambda (1 - m) W added to unscaled gradients; 0 is plain
            straight-through.
        noise_weight: weight of the noise-prediction loss.
        distill_weight: weight of the distillation loss; 0 runs no teacher. What `also` distils from the dense path has
            this weight too, and 1 where it is 0.
        also: further patterns that the one set of weights learns at the same time, such as ["6:8"]: every step runs the
            dense path, the target and one of these, each distilled from the dense path.
        distillation: what is distilled besides plain predictions, and at which timesteps.
        mask_scores: what masks are derived from at every step: the magnitude of the weights; "wanda" and "obs" scale it
            by what the inputs of each column were on calibration batches; "random" and "position" are fixed and serve
            as floors.
        calibration: how statistics are taken, for "wanda", "obs" and `allocation`, and whether weights are refitted.
        one_shot: train nothing: the run's batches calibrate, and the network is pruned after the last one. Set
            `trainer.max_epochs: 1` and `trainer.limit_train_batches`.
        allocation: patterns by layer under a budget of MACs, in place of `sparsity` for all.
        freeze_masks_at: fraction of the steps from which masks no longer follow the weights, and pruned weights get no
            gradient: 0 is ASP's retraining, 0.85 a late freeze; null is never. Under a ramp every pattern's freeze when
            it begins. The average begins again at every freeze.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        ema_decay: decay of the moving average of the dense shadow weights; null for none.
        label_dropout: probability that a label is replaced by "no class".
        seed: seed of timesteps, noise and label dropout; null takes that of `seed_everything`.
        compile: run the training forward through torch.compile.
    """

    whole_for = None

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
        also: list[str] | None = None,
        distillation: Distillation = Distillation(),  # noqa: B008 - frozen
        mask_scores: MaskScores = "magnitude",
        calibration: Calibration = Calibration(),  # noqa: B008 - frozen
        one_shot: bool = False,
        allocation: Allocation | None = None,
        freeze_masks_at: float | None = None,
        lr_schedule: LrSchedule = "constant",
        warmup_steps: int = 0,
        ema_decay: float | None = 0.999,
        label_dropout: float = 0.0,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        check_one_stage(denoiser)
        check_unmasked(denoiser.network)
        denoiser.train()  # one that was loaded from an artifact comes in evaluation mode
        average = None if one_shot else ema_decay
        super().__init__(denoiser, process, optimizer, lr_schedule, warmup_steps, average, label_dropout, seed, compile)
        self.mask_scores, self.calibration, self.allocation = mask_scores, calibration, allocation
        self.one_shot = one_shot
        self.automatic_optimization = not one_shot
        for name, weight in (("noise_weight", noise_weight), ("distill_weight", distill_weight), ("decay", decay)):
            if not 0 <= weight < math.inf:
                raise InputError(f"model.{name}: {weight} is negative or not finite")
        if noise_weight == distill_weight == 0:
            raise InputError("model.noise_weight and model.distill_weight are both 0: there is nothing to learn from")
        if freeze_masks_at is not None and not 0 <= freeze_masks_at < 1:
            raise InputError(f"model.freeze_masks_at: {freeze_masks_at} is not in [0, 1)")
        if one_shot and (freeze_masks_at is not None or also):
            raise InputError(f"model.{'also' if also else 'freeze_masks_at'}: with model.one_shot nothing is trained")
        if distillation.features > 0 and compile:
            raise InputError("model.compile: outputs of blocks cannot be matched in a compiled network")
        if distill_weight == 0 and distillation != Distillation():
            raise InputError("model.distillation: model.distill_weight is 0, so nothing is distilled")
        prompted = isinstance(denoiser, TextDenoiser) and denoiser.condition_shapes()
        if distillation.guidance is not None and not (denoiser.num_classes or prompted):
            raise InputError("model.distillation.guidance: the network takes no condition to guide by")
        if also and (distillation.features > 0 or distillation.guidance is not None or allocation is not None):
            raise InputError("model.also: several patterns have no allocation, features or guidance yet")
        if also and (freeze_masks_at is not None or mask_scores != "magnitude"):
            raise InputError("model.also: masks of several patterns follow the magnitude of the weights to the end")
        if calibration.weighting != "loss" and not self.is_calibrated:
            raise InputError("model.calibration.weighting: nothing is calibrated")
        if also and calibration.compensate:
            raise InputError(
                "model.calibration.compensate: writes zeros into the weights, which model.also computes with"
            )
        self.target_sparsity = Sparsity.parse(sparsity)
        self.also = check_also([Sparsity.parse(pattern) for pattern in also or []], self.target_sparsity)
        self.freeze_masks_at = freeze_masks_at
        self.decay, self.noise_weight, self.distill_weight = decay, noise_weight, distill_weight
        self.distillation = distillation
        self._features = feature_modules(denoiser, distillation.blocks) if distillation.features > 0 else []
        self._dense = Frozen(deepcopy(denoiser))
        exclude = denoiser.default_dense() if dense_layers is None else dense_layers
        self._units = select_units(denoiser.anatomy(), layers, exclude, self.target_sparsity.m)
        self.masks = MaskSet(denoiser.network, self._units, self.pattern)
        for pattern in self.also:
            self.masks.check_sparsity(pattern)
        self._fix_scores(self.seed)
        if self.pattern is None and (self.is_calibrated or one_shot):
            raise InputError(f"model.sparsity: {self.target_sparsity} is dense, so there is nothing to calibrate for")
        self._now: Sparsity | None = self.pattern
        self._flips: dict[str, float] = {}
        self._before: dict[str, Tensor] | None = None
        self._decays_by_loss = False

    @property
    def pattern(self) -> Sparsity | None:
        """The pattern to reach; None for n == m, the dense control."""
        return None if self.target_sparsity.is_dense else self.target_sparsity

    @property
    def target(self) -> str:
        """What is aimed at, in words."""
        if self.allocation is not None:
            return f"{self.allocation.budget:g} of MACs"
        return str(self.target_sparsity)

    @property
    def result_name(self) -> str:
        """Row name of the result."""
        calibrated = "calibrated " if self.is_calibrated else ""
        return f"{calibrated}one-shot at {self.target}" if self.one_shot else f"sparsedm {self.target}"

    def _fix_scores(self, seed: int) -> None:
        self._scored_by = seed
        if (scores := fixed_scores(self.mask_scores, self.masks.layers, seed)) is not None:
            self.masks.set_scores(scores)

    # Training

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, cond, target = self.diffuse(batch, generator)
        weights = self._distill_weights(t)
        if self.also and self.training:
            return self._loss_of_several(x_t, t, cond, target, weights, generator)
        if self.distill_weight == 0:
            return sparsedm_loss(self.denoise(x_t, t, cond), target, None, self.noise_weight, 0.0)
        scale = None
        if self.distillation.guidance is not None:
            scale = draw_scales(self.distillation.guidance, len(x_t), generator, x_t)
        names = self._features if self.training else []
        dense = self._dense.on(self.device)
        with watching(dense.network, names) as wanted, torch.no_grad():
            _, teacher = self._predictions(dense, dense, x_t, t, cond, scale)
        with watching(self.denoiser.network, names) as given:
            student, matched = self._predictions(self.denoise, self.denoiser, x_t, t, cond, scale)
        total, parts = sparsedm_loss(student, target, teacher, self.noise_weight, self.distill_weight, weights, matched)
        if names:
            features = feature_loss(given, wanted)
            total, parts["feature_loss"] = total + self.distillation.features * features, features.detach()
        return total, parts

    def _predictions(
        self, predict: Any, family: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The prediction, and what distillation compares: the same, or the guided one at `scale`."""
        if scale is not None:
            return predict_guided(predict, family, x_t, t, cond, scale)
        prediction: Tensor = predict(x_t, t, cond)
        return prediction, prediction

    def _distill_weights(self, t: Tensor) -> Tensor | None:
        """Weights [B] of the distillation term at timesteps `t` [B]; None is 1."""
        if self.distillation.weighting == "uniform":
            return None
        return timestep_weights(self.process, self.distillation.weighting, self.distillation.snr_cap, t)

    def sample_weights(self, t: Tensor) -> Tensor:
        """Weight of each sample [B] in the loss at timesteps `t` [B], noise prediction and distillation together."""
        settings = self.distillation
        weights = timestep_weights(self.process, settings.weighting, settings.snr_cap, t)
        return self.noise_weight + self.distill_weight * weights

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        if loss is None or not self._decays_by_loss:
            return loss
        return loss + self.decay * self.masks.collected_decay()

    def setup(self, stage: str) -> None:
        # DeepSpeed keeps gradients where no hook sees them; the same gradient comes through a term of the loss.
        self._decays_by_loss = self.decay > 0 and isinstance(self.trainer.strategy, ZeRO)
        if self._decays_by_loss:
            self.masks.collect_decay()
        if self.freeze_masks_at is not None and isinstance(self.trainer.strategy, ZeRO):
            raise InputError("model.freeze_masks_at: gradients are out of reach under DeepSpeed; use DDP")
        if self.calibration.compensate and isinstance(self.trainer.strategy, ZeRO):
            raise InputError("model.calibration.compensate: DeepSpeed goes on with weights of its own; use DDP")

    def _loss_of_several(
        self, x_t: Tensor, t: Tensor, cond: Condition, target: Tensor, sampled: Tensor | None, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The dense path against target and teacher; the target's pattern and one further against the dense path."""
        teacher = None
        if self.distill_weight > 0:
            with torch.no_grad():
                teacher = self._dense.on(self.device)(x_t, t, cond)
        self.masks.set_sparsity(None)
        dense = self.denoise(x_t, t, cond)
        total, values = sparsedm_loss(dense, target, teacher, self.noise_weight, self.distill_weight, sampled)
        # From the step's seed, not its generator: a number drawn on the device would be waited for.
        chance = random.Random(derive(generator.initial_seed(), 6))
        for pattern in (chance.choice(self.also), self._now):
            self.masks.set_sparsity(pattern)
            student = self.denoise(x_t, t, cond)
            strength = self.distill_weight or 1.0
            loss, parts = sparsedm_loss(student, target, dense.detach(), self.noise_weight, strength, sampled)
            total = total + loss
        return total / 3, {f"dense_{name}": value for name, value in values.items()} | parts

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Lightning calls this after unscaling and before clipping, so the term has the same strength under any
        # loss scale and is added once per optimizer step under gradient accumulation. An optimizer that unscales
        # inside its own step is refused at the start.
        if self.masks.frozen:
            self.masks.mask_gradients()
        elif self.decay > 0 and not self._decays_by_loss:
            self.masks.add_decay(self.decay)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.freeze_masks_at is not None and not self.masks.frozen:
            total = self.trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise InputError("model.freeze_masks_at needs trainer.max_steps or max_epochs")
            # A dense stage has no masks to freeze.
            if self.trainer.global_step >= int(self.freeze_masks_at * total) and self.masks.masks():
                self.masks.freeze()
                self._restart_average()

    def _restart_average(self) -> None:
        """Weights of other masks are of no use under those that stay."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAverage):
                callback.restart()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._flips:
            self.log("flip_rate", sum(self._flips.values()) / len(self._flips))
            self.log_dict({f"flip_rate/{name}": value for name, value in self._flips.items()})
            self._flips = {}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = {"of": self._marks(), "scored_by": self._scored_by}
        if self.freeze_masks_at is not None:
            checkpoint["frozen_masks"] = self.masks.frozen_masks()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, value in (checkpoint["masks"]["of"] if "masks" in checkpoint else {}).items():
            if value != (own := self._marks()[key]):
                raise InputError(f"ckpt_path: was made with {key} {value}, which is {own} now")
        super().on_load_checkpoint(checkpoint)
        if "masks" in checkpoint and checkpoint["masks"]["scored_by"] != self._scored_by:
            # Scores that were drawn are drawn again by the seed of the run.
            self._fix_scores(checkpoint["masks"]["scored_by"])
            self.masks.refresh()
        if "frozen_masks" in checkpoint:
            self.masks.restore(checkpoint["frozen_masks"])

    def _marks(self) -> dict[str, Any]:
        """What a checkpoint must agree in, by key of the config; plain values."""
        allocation = None if self.allocation is None else asdict(self.allocation)
        names = " ".join(self.masks.layers).encode()
        return {
            "model.layers": f"{len(self.masks.layers)} layers ({hashlib.sha256(names).hexdigest()[:8]})",
            "model.mask_scores": self.mask_scores,
            "model.calibration.compensate": self.calibration.compensate,
            "model.calibration.weighting": self.calibration.weighting,
            # Weights are refitted for one pattern.
            "model.sparsity": str(self.target_sparsity) if self.calibration.compensate else None,
            "model.allocation": json.dumps(allocation),
        }

    def on_fit_start(self) -> None:
        fused = any(group.get("fused") for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        if self.decay > 0 and fused and self.trainer.precision == "16-mixed":
            raise InputError(
                "model.optimizer: with fused: true and trainer.precision 16-mixed the optimizer unscales inside its "
                "step and divides the decay away; use bf16-mixed, fused: false or decay: 0"
            )
        super().on_fit_start()

    def weights_changed(self) -> None:
        if self.pattern is None:
            self._watch_dense()
        elif self._is_logged_step():
            self._flips = self.masks.flips()
        self.masks.refresh()

    def _watch_dense(self) -> None:
        """The flips of masks that a dense run would have: a decay is chosen by what share of them is left."""
        half = self.target_sparsity.m // 2
        if half == 0 or self._trainer is None or not self._trainer.training:
            return
        now, before = partial(self.masks.derived, Sparsity(half, self.target_sparsity.m)), self._before
        if before is not None and self._is_logged_step():
            self._flips = flip_rates(before, now())
        self._before = now() if self._is_logged_step(ahead=1) else None

    def _is_logged_step(self, ahead: int = 0) -> bool:
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return False
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (trainer.global_step + 1 + ahead) % every == 0  # this step is counted once it is over

    # Planned

    def planned(self) -> Plan:
        """Masks of the target on every chosen layer; a network on the meta device will do.

        Patterns by layer are known only after calibration; until then the budget stands for what they keep.
        """
        patterns = {} if self.pattern is None else dict.fromkeys(self.masks.layers, self.pattern)
        zeros = sum(self.masks.layers[name].weight.numel() * s.fraction for name, s in patterns.items())
        parameters = round(sum(p.numel() for p in self.denoiser.parameters()) - zeros)
        kept = float(self.ledger().kept_share(patterns))
        return Plan(
            axis="weights",
            target=self.target,
            touched=tuple(self.masks.layers),
            macs_kept=kept if self.allocation is None else self.allocation.budget,
            parameters_kept=parameters if self.allocation is None else None,
            holds_teacher=self.distill_weight > 0,
        )

    def shard(self, mesh: Any) -> None:
        if self.is_calibrated or self.one_shot:
            raise InputError("model.calibration: weights and masks from statistics cannot be sharded yet; use DDP")
        if self.freeze_masks_at is not None or self.mask_scores != "magnitude":
            key = "mask_scores" if self.freeze_masks_at is None else "freeze_masks_at"
            raise InputError(f"model.{key}: masks that do not follow the weights cannot be sharded; use DDP")
        super().shard(mesh)

    # SparsityControl

    def set_sparsity(self, sparsity: Patterns) -> None:
        """Change the pattern of every masked layer, or by regular expressions over names, in place; None is dense.

        Patterns are "n:m", (n, m) or `Sparsity`.

        Where patterns were allocated, the target stands for them, and on the way there no layer gets a sparser one
        than its own.
        """
        if isinstance(sparsity, Mapping):
            self.masks.set_sparsity(sparsity)
            return
        pattern = parse_pattern(sparsity)
        self.masks.set_sparsity(self.allotted(pattern))
        self._now = pattern

    def check_sparsity(self, sparsity: Pattern) -> None:
        if self.calibration.compensate and parse_pattern(sparsity) != self.pattern:
            raise InputError(f"model.calibration.compensate: refits for {self.target}, so {sparsity} cannot come first")
        self.masks.check_sparsity(sparsity)

    def density_by_layer(self) -> Mapping[str, float]:
        return self.masks.density_by_layer()

    def mask_violations(self, compare: bool = False) -> int:
        return self.masks.violations(compare)

    # Results

    def variants(self) -> dict[str, Variant]:
        """The dense start, the same under one-shot magnitude masks, and the result."""
        dense, whole = self._dense.on(self.device), self.whole_denoiser()
        if self.pattern is None:
            return {"dense": Variant(dense), "dense fine-tuned": Variant(whole)}
        under: dict[str, tuple[Denoiser, Sparsity | None]] = {
            f"one-shot {self.target_sparsity}": (dense, self.target_sparsity)
        }
        under |= {f"sparsedm at {name}": (whole, pattern) for name, pattern in self._further()}
        # Their masks are as large as the network, and grids, artifacts and names of rows need none of them.
        masked = {name: Variant.later(partial(self._under, *given)) for name, given in under.items()}
        return {"dense": Variant(dense), **masked, self.result_name: Variant(whole)}

    def _further(self) -> list[tuple[str, Sparsity | None]]:
        """Patterns besides the target that the weights were trained for, by name."""
        return [("dense", None), *((str(pattern), pattern) for pattern in self.also)] if self.also else []

    def _under(self, network: Denoiser, pattern: Sparsity | None) -> Denoiser:
        """A network under a pattern, with masks of its own and the same weights."""
        copy = sharing_copy(network)
        MaskSet(copy.network, self._units, pattern)
        return copy


def check_also(also: Sequence[Sparsity], target: Sparsity) -> list[Sparsity]:
    """`also`, if `target` keeps nothing that one of them prunes, and none is dense. Raises `InputError` otherwise.

    What is among the r smallest of a group is among the r smallest of any part of it.
    """
    for pattern in also:
        if pattern.is_dense or pattern.density <= target.density:
            raise InputError(f"model.also: {pattern} does not lie between dense, which is always trained, and {target}")
        if pattern.m % target.m or (pattern.m > target.m and pattern.m - pattern.n > target.m - target.n):
            raise InputError(f"model.also: {target} may keep what {pattern} prunes; masks have to be nested")
    return list(also)
