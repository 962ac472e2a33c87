"""MosaicDiff as a LightningModule: one training batch is one calibration batch, pruning follows the last one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_prune.checksums import DIGESTS, digest_of
from lightning_prune.diffusion.conditions import Condition, move, rows_of, stack
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import OnStep, guided, integrate, sample_images
from lightning_prune.diffusion.solvers import Deterministic, Sampler
from lightning_prune.diffusion.variants import Variant
from lightning_prune.methods.mosaicdiff import drawings
from lightning_prune.methods.mosaicdiff.plan import (
    check_calls,
    draw_in_bins,
    refine,
    sampling_grid,
    stages_for,
)
from lightning_prune.methods.mosaicdiff.pruner import Pruned, Pruner, expected_removal, parameters_held
from lightning_prune.methods.mosaicdiff.recipe import Recipe
from lightning_prune.methods.mosaicdiff.saving import stream_checkpoints
from lightning_prune.methods.mosaicdiff.seconds import Costs, measured_costs
from lightning_prune.methods.mosaicdiff.sensitivity import Probe
from lightning_prune.module import Batch, PruningModule
from lightning_prune.protocols import InputError, Plan
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.frozen import Shared
from lightning_prune.pruning.masks import check_unmasked
from lightning_prune.pruning.stages import Stage, stage_at, stages_of
from lightning_prune.seeds import derive
from lightning_prune.world import World


class MosaicDiff(PruningModule):
    """Slim networks for stages of the sampling run, by group Optimal Brain Surgeon; no weight is trained.

    Every batch adds to the second moments of all layers and stages in one pass of the dense network; when the epoch
    ends they are pruned. Set `trainer.max_epochs: 1` and `trainer.limit_train_batches`.

    Args:
        denoiser: the pretrained dense network.
        process: its process.
        target: share of the dense sampling run's MACs (aten) to remove, or of what else `target_of` says.
        recipe: how; the result of the run.
        rivals: further recipes to report beside it, from the same statistics, by row name.
        sampler: the solver whose run is made cheaper.
        steps: its steps.
        guidance: its guidance scale; any but 1 calibrates on conditional and unconditional inputs.
        calibration: what the network sees: real images, noised, or the states of its own sampling runs.
        guidance_weighted: weigh conditional inputs by w^2 and unconditional ones by (w - 1)^2.
        power: mean square of clean data; null measures it on the first batch.
        damping: of the second moments, relative to their mean diagonal.
        probe_images: images that allocations measure with.
        recalibration_images: calibration images that are kept, for pruned layers to be refitted on what they read in
            their own network.
        target_of: what the target is a share of: MACs, or seconds as measured on this machine when the run starts,
            where two runs may differ. What is planned is planned in MACs.
        spill: keep statistics, and outputs of layers that are needed later, in files of the run folder instead of in
            memory.
        seed: seed of timesteps and noise; null takes that of `seed_everything`.
    """

    whole_for = "to cut units out of whole layers"

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        target: float = 0.33,
        recipe: Recipe = Recipe(),  # noqa: B008 - frozen
        rivals: dict[str, Recipe] | None = None,
        sampler: Deterministic = "ddim",
        steps: int = 20,
        guidance: float = 1.0,
        calibration: Literal["noised", "sampler"] = "noised",
        guidance_weighted: bool = False,
        power: float | None = None,
        damping: float = 1e-3,
        probe_images: int = 16,
        recalibration_images: int = 256,
        target_of: Literal["macs", "seconds"] = "macs",
        spill: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(denoiser, process, ema_decay=None, seed=seed)
        self.automatic_optimization = False
        if not 0 <= target < 1:
            raise InputError(f"model.target: {target:g} is not a share of MACs in [0, 1)")
        if not 0 <= damping < math.inf:
            raise InputError(f"model.damping: {damping:g} is negative or not finite")
        if power is not None and not 0 < power < math.inf:
            raise InputError(f"model.power: {power:g} is not positive and finite")
        if probe_images < 1:
            raise InputError(f"model.probe_images: {probe_images} is not positive")
        if recalibration_images < 1:
            raise InputError(f"model.recalibration_images: {recalibration_images} is not positive")
        if guidance_weighted and guidance == 1.0:
            raise InputError("model.guidance_weighted: there is no guidance to weigh by; set model.guidance")
        if calibration == "sampler" and any(r.criterion == "taylor" for r in (recipe, *(rivals or {}).values())):
            raise InputError("model.calibration: recipe.criterion 'taylor' needs gradients on images: 'noised'")
        check_unmasked(denoiser.network)
        if not denoiser.groups():
            raise InputError("model.denoiser: the network has no width that can be cut")
        self.target, self.recipe, self.rivals = target, recipe, dict(rivals or {})
        _check_names(self.rivals, self.result_name)
        self.sampler = self.predict_sampler = Sampler(sampler, steps, guidance)
        self.calibration, self.guidance_weighted = calibration, guidance_weighted
        self.power, self.damping, self.probe_images = power, damping, probe_images
        self.target_of: Literal["macs", "seconds"] = target_of
        self.recalibration_images, self.spill = recalibration_images, spill
        self.grid = sampling_grid(process, self.sampler)
        # Refuses stages that the sampler has no steps for before any work is done.
        for each in self._recipes().values():
            stages_for(each, self.grid, power or 1.0)
        self._bins: list[Stage] = []
        self._curvature: Curvature | None = None
        self._importance: dict[str, Tensor] = {}
        self._probe_cond: Condition | None = None
        self._kept: list[tuple[Tensor, Condition]] = []
        self._seen_images = 0
        self._costs: Costs | None = None
        self._summed = self._calibrated = False
        self._pruned: Shared[dict[str, Pruned]] = Shared({})

    @property
    def result_name(self) -> str:
        """Row name of the result."""
        return f"mosaicdiff {self.recipe.allocation}"

    def _recipes(self) -> dict[str, Recipe]:
        """Every recipe by row name, the result's last."""
        return self.rivals | {self.result_name: self.recipe}

    # Calibration

    def configure_optimizers(self) -> Any:
        """None: nothing is trained."""
        return [], []

    def setup(self, stage: str) -> None:
        stream_checkpoints(self.trainer.strategy)

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse another number of network calls than stages are made for."""
        if any(recipe.stages != 1 for recipe in self._recipes().values()):
            check_calls(sampler, self.process, len(self.grid))

    def on_fit_start(self) -> None:
        for key in ("limit_train_batches", "max_steps"):
            if getattr(self.trainer, key) == 0:
                raise InputError(f"trainer.{key}: 0 leaves nothing to calibrate on")
        if (epochs := self.trainer.max_epochs) != 1:
            # No optimizer steps are counted, so trainer.max_steps would never end a run.
            raise InputError(f"trainer.max_epochs: {epochs}: calibration sees the data once; set 1")
        if self._curvature is None:
            self._begin(self._first_batch())

    def _first_batch(self) -> Batch:
        """The first training batch, from a loader of its own, so that the run's is not moved on."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None:
            raise InputError("data: MosaicDiff needs a data module")
        batch: Batch | None = next(iter(datamodule.train_dataloader()), None)
        if batch is None:
            raise InputError("data: there is no training batch (trainer.limit_train_batches) to calibrate on")
        if len(batch["x"]) > 1 and bool((batch["x"] == batch["x"][:1]).all()):
            raise InputError("data: all images of the first batch are equal, so there is nothing to calibrate on")
        return batch

    def _begin(self, batch: Batch) -> None:
        if self.power is None:
            # The same on every process, or their stages would differ.
            power = self.trainer.strategy.reduce(batch["x"].square().mean().to(self.device), reduce_op="mean")
            self.power = float(power)
        self._costs = self._measured_costs()
        for recipe in self._recipes().values():
            expected_removal(self.denoiser, self.grid, self.power, recipe, self.target, self._costs)
        self._probe_cond = self._same_everywhere(move(rows_of(batch["cond"], slice(self.probe_images)), self.device))
        partitions = [stages_for(recipe, self.grid, self.power) for recipe in self._recipes().values()]
        self._make_statistics(refine(partitions))
        if len(batch["x"]) < len(self._bins) and self.calibration == "noised":
            raise InputError(f"data.batch_size: {len(batch['x'])} samples for {len(self._bins)} stages; each needs one")

    def _same_everywhere(self, cond: Condition) -> Condition:
        return move(self.trainer.strategy.broadcast(cond), "cpu")

    def _make_statistics(self, bins: list[Stage]) -> None:
        folder = Path(self.trainer.default_root_dir) if self.spill and self._trainer is not None else None
        groups = self.denoiser.groups()
        self._bins = bins
        self._curvature = Curvature(self.denoiser.network, groups, len(bins), folder)
        self._importance = {g.name: torch.zeros(len(bins), g.units, dtype=torch.float64) for g in groups}

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The dense network's own loss, for validation."""
        x_t, t, cond, target = self.diffuse(batch, generator)
        return mse_loss(self.denoise(x_t, t, cond), target), {}

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        index = self.trainer.fit_loop.epoch_loop.total_batch_idx
        generator = self.step_generator(0, index)
        self.denoiser.eval()
        if self.calibration == "noised":
            self._see_noised(batch, generator)
        else:
            self._see_own_states(batch, index)
        self._keep(batch)
        self._seen_images = (self._seen_images + digest_of(batch["x"])) % DIGESTS

    def _keep(self, batch: Batch) -> None:
        """Hold the first images, for recalibration."""
        missing = self.recalibration_images - sum(len(x0) for x0, _ in self._kept)
        if missing > 0:
            self._kept.append((batch["x"][:missing].cpu(), move(rows_of(batch["cond"], slice(missing)), "cpu")))

    def _see_noised(self, batch: Batch, generator: torch.Generator) -> None:
        """One pass over a batch of real images, noised into all stages in turn."""
        x0, cond = batch["x"], batch["cond"]
        visited = self.sampler.visited(self.process)
        bin_of, t = draw_in_bins(self._bins, visited, self.process, len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype)
        x_t, target = self.process.add_noise(x0, noise, t), self.process.target(x0, noise, t)
        if self._wants_gradients():
            self._add_importance(x_t, t, cond, target, bin_of)
        with torch.no_grad(), self._collecting(bin_of):
            predicted = self._both(x_t, t, cond)[: len(x0)]
        self.log("loss", mse_loss(predicted, target), prog_bar=True)

    def _both(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network on conditional inputs, under guidance followed by unconditional ones."""
        if self.sampler.guidance == 1.0:
            return self.denoiser(x, t, cond)  # type: ignore[no-any-return]
        both = stack(cond, self.denoiser.null_condition(cond))
        return self.denoiser(torch.cat([x, x]), torch.cat([t, t]), both)  # type: ignore[no-any-return]

    def _collecting(self, bin_of: Tensor) -> Any:
        assert self._curvature is not None
        scale, count = self.sampler.guidance, len(bin_of)
        if scale == 1.0:
            return self._curvature.collecting(bin_of)
        weights = torch.ones(2 * count)
        if self.guidance_weighted:
            weights = torch.cat([torch.full((count,), scale**2), torch.full((count,), (scale - 1) ** 2)])
        return self._curvature.collecting(torch.cat([bin_of, bin_of]), weights)

    def _see_own_states(self, batch: Batch, index: int) -> None:
        """Sampling runs of the dense network for the batch's conditions."""
        x0, now = batch["x"], [0]
        generator = self.step_generator(2, index)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype)
        plain = guided(self.denoiser, self.denoiser.null_condition, self.sampler.guidance, self.denoiser.guide)

        def predict(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            bin_of = torch.full((len(x),), stage_at(self._bins, now[0]))
            with self._collecting(bin_of):
                return plain(x, t, cond)

        integrate(predict, self.process, noise, batch["cond"], self.sampler, lambda step: now.__setitem__(0, step))
        self.log("samples", float(len(x0)))

    def _wants_gradients(self) -> bool:
        return any(recipe.criterion == "taylor" for recipe in self._recipes().values())

    def _add_importance(self, x: Tensor, t: Tensor, cond: Condition, target: Tensor, bin_of: Tensor) -> None:
        """First-order change of each bin's loss when a unit's weights in the layer that reads it become zero."""
        groups = self.denoiser.groups()
        weights = [self.denoiser.network.get_submodule(g.output).get_parameter("weight") for g in groups]
        for index in bin_of.unique().tolist():
            chosen = torch.nonzero(bin_of == index).flatten().to(x.device)
            with torch.enable_grad():
                predicted = self.denoiser(x[chosen], t[chosen], rows_of(cond, chosen))
                gradients = torch.autograd.grad(mse_loss(predicted, target[chosen]), weights)
            for group, weight, gradient in zip(groups, weights, gradients, strict=True):
                change = (weight * gradient).detach().flatten(1).sum(0).view(group.units, -1).sum(1)
                self._importance[group.name][index] += change.abs().double().cpu()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._curvature is None:
            return
        checkpoint["mosaicdiff"] = {
            "bins": [stage.steps for stage in self._bins],
            "power": self.power,
            "cond": self._probe_cond,
            "kept": self._kept,
            "calibrated_on": self._images_of_all(),
            "seed": self.seed,
            "costs": None if self._costs is None else asdict(self._costs),
            "importance": self._importance_of_all(),
            **self._curvature.state(None if self._alone() else self._sum),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("mosaicdiff")
        if state is None:
            return
        self.power, self._probe_cond = state["power"], state["cond"]
        # The run's own, or a network would be cut otherwise wherever it is cut again; older checkpoints have none.
        self.seed = state.get("seed", self.seed)
        self._kept = [(x0, cond) for x0, cond in state["kept"]]
        if (costs := state.get("costs")) is not None:
            self._costs = Costs(costs["call"], tuple(costs["units"]))
        self._make_statistics(stages_of(state["bins"]))
        needed = refine(stages_for(recipe, self.grid, self.power or 1.0) for recipe in self._recipes().values())
        if needed != self._bins:
            raise InputError("ckpt_path: its statistics were kept apart at other stages than these recipes have")
        # While more is to come, what all processes have seen stays with one of them.
        self._summed = not self._calibrating()
        if self._summed or self.global_rank == 0:
            assert self._curvature is not None
            self._curvature.load(state)
            self._importance = dict(state["importance"])
            self._seen_images = int(state["calibrated_on"], 16)
        if self._wants_gradients() and state["rows"].any() and not any(v.any() for v in state["importance"].values()):
            raise InputError("ckpt_path: was calibrated without gradients, which recipe.criterion 'taylor' needs")

    def _alone(self) -> bool:
        """Whether statistics are of all processes already."""
        return self._summed or self._trainer is None or self.trainer.world_size == 1

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on each of them; the tensor may be overwritten."""
        total: Tensor = self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")
        return total.cpu()

    def _importance_of_all(self) -> dict[str, Tensor]:
        alone, own = self._alone(), self._importance
        return {name: values.clone() if alone else self._sum(values.clone()) for name, values in own.items()}

    def _images_of_all(self) -> str:
        """The digest of the calibration images of all processes, in hexadecimal."""
        parts = [self._seen_images] if self._alone() else World.current().gather(self._seen_images)
        return f"{sum(parts) % DIGESTS:064x}"

    # Results

    def results(self) -> dict[str, Pruned]:
        """Every recipe's result by row name; nothing before calibration has ended."""
        if not self._pruned.value and self._curvature is not None and not self._calibrating():
            # A test run asks in inference mode, where nothing could be learned from gradients.
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._pruned.value = self._prune()
        return self._pruned.value

    def _calibrating(self) -> bool:
        """Whether batches may follow. Callbacks that ask on one process only must not set off a sum over all."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return fitting and not self._calibrated

    def _prune(self) -> dict[str, Pruned]:
        assert self._curvature is not None
        assert self._probe_cond is not None
        if not self._summed:
            self._importance = self._importance_of_all()
            self._seen_images = int(self._images_of_all(), 16)
            if not self._alone():
                self._curvature.sum_over(self._sum)
            # The first process', or stages would differ.
            self._kept = self.trainer.strategy.broadcast(self._kept) if self._trainer is not None else self._kept
            self._summed = True
        self.denoiser.eval()
        seed = derive(self.seed, 3)
        pruner = Pruner(
            self.denoiser,
            self.process,
            self.sampler,
            self._bins,
            self._curvature,
            self.power or 1.0,
            self.damping,
            Probe(self.denoiser, self.process, self.sampler, self._probe_cond, seed),
            self.seed,
            self._kept,
            self._importance,
            {
                "target": self.target,
                "target_of": self.target_of,
                "calibration": {"of": self.calibration, "sha256": self._images_of_all()},
            },
            self._measured_costs(),
        )
        return {name: pruner.prune(recipe, self.target) for name, recipe in self._recipes().items()}

    def _measured_costs(self) -> Costs | None:
        """Seconds of the first process, or stages would differ; measured once, for a checkpoint to give the same."""
        if self.target_of == "macs":
            return None
        if self._costs is not None:
            return self._costs
        training = self.denoiser.training
        costs = measured_costs(self.denoiser.eval())
        self.denoiser.train(training)
        return costs if self._trainer is None else self.trainer.strategy.broadcast(costs)

    def write_results(self, trainer: pl.Trainer) -> None:
        """Prune, write and log the stages, then let callbacks work on the result."""
        self._calibrated = True
        for name, pruned in self.results().items():
            if trainer.is_global_zero:
                self._write(trainer, name, pruned)
        super().write_results(trainer)

    def _write(self, trainer: pl.Trainer, name: str, pruned: Pruned) -> None:
        folder, stem = Path(trainer.default_root_dir) / "stages", file_stem(name)
        rows, widths = drawings.stage_table(pruned), drawings.widths_table(pruned)
        curve = drawings.cost_error_curve(pruned)
        folder.mkdir(parents=True, exist_ok=True)
        held = pruned.denoiser.facts["parameters"]
        content: dict[str, Any] = {"stages": rows, "widths": widths, "cost_error": curve, "parameters": held}
        content["facts"] = pruned.denoiser.facts
        (folder / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")
        (folder / f"{stem}.svg").write_text(drawings.allocation_svg(pruned, name))
        (folder / f"{stem}-stages.svg").write_text(drawings.stages_svg(pruned, name))
        (folder / f"{stem}-cost-error.svg").write_text(drawings.cost_error_svg(pruned, curve, name))
        parameters = ", ".join(f"{kind} {count / 1e6:.2f} M" for kind, count in held.items())
        Console().print(f"{name}\n{drawings.table_text(rows)}\nparameters: {parameters}", highlight=False)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for key, table in (("stages", rows), ("widths", widths), ("cost_error", curve)):
                    if table:
                        data = [list(row.values()) for row in table]
                        logger.log_table(f"{key}/{stem}", columns=list(table[0]), data=data)

    def variants(self) -> dict[str, Variant]:
        """The dense network, the rivals, the result; before pruning all are dense."""
        dense, results = Variant(self.denoiser), self.results()
        found = {"dense": dense}
        for name in self._recipes():
            found[name] = Variant(results[name].denoiser) if name in results else dense
        return found

    def planned(self) -> Plan:
        """Widths at the target; a recipe that measures is planned as a uniform one."""
        power = self.power or 1.0
        problem, removed = expected_removal(self.denoiser, self.grid, power, self.recipe, self.target)
        wanted = self.recipe.sparsity
        return Plan(
            axis="widths",
            target=f"{self.target:g} of MACs removed" if wanted is None else f"{wanted:g} of units removed",
            touched=tuple(group.name for group in problem.groups),
            macs_kept=problem.macs(removed) / problem.dense_macs,
            parameters_kept=parameters_held(self.denoiser, problem, removed, self.recipe),
        )

    def sample_images(
        self, ids: Tensor, cond: Condition, sampler: Sampler, seed: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Images of the result, or of the dense network before there is one."""
        denoiser = list(self.variants().values())[-1].denoiser
        return sample_images(denoiser, self.process, ids, cond, sampler, seed, on_step)

    def kept_fraction(self) -> dict[str, float]:
        """Share of the dense sampling run's MACs that is left."""
        pruned = self.results().get(self.result_name)
        return {"aten": 1.0 if pruned is None else 1 - pruned.denoiser.facts["macs_removed"]}


def _check_names(rivals: Iterable[str], result: str) -> None:
    """Rows and files are named after rivals."""
    taken = {"dense": "the network they are compared with", file_stem(result): "the result"}
    for name in rivals:
        if not name or name.startswith(".") or "/" in name:
            raise InputError(f"model.rivals: {name!r} cannot name a file of the run folder")
        if (other := taken.get(file_stem(name))) is not None:
            raise InputError(f"model.rivals: {name!r} is the name of {other}")
        taken[file_stem(name)] = "another rival"


def file_stem(name: str) -> str:
    """What the files of a row are called."""
    return name.replace(" ", "-")
