"""DiP-GO as a LightningModule: plumbing between scores, gates, unrolled trajectories and schedules."""

from __future__ import annotations

import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.blocks import BlockCosts, CacheMode, GateSchedule, Reuse, Row
from lightning_prune.diffusion.conditions import Condition, move
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import OnStep, initial_noise, sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.diffusion.unroll import Unroll
from lightning_prune.diffusion.variants import Variant
from lightning_prune.export.gates import GATES, GateFile, fingerprint, gates_of, network_of, solver_config
from lightning_prune.methods.dipgo.batches import by_process, own_batches, stored
from lightning_prune.methods.dipgo.consistency import ConsistencyLoss, consistency
from lightning_prune.methods.dipgo.controls import (
    Control,
    GateProblem,
    as_whole_steps,
    budget_name,
    control,
    controls,
    rule,
)
from lightning_prune.methods.dipgo.gate_sampling import (
    DrawnGates,
    budgeted_gates,
    budgeted_scores,
    published_gates,
)
from lightning_prune.methods.dipgo.pruner import Encoder, QueryPruner, ScoreTable
from lightning_prune.methods.dipgo.refine import Changes, refined
from lightning_prune.methods.dipgo.teacher import Teacher
from lightning_prune.metrics.block_costs import timed_costs, traced_costs
from lightning_prune.module import Batch, LrSchedule, PruningModule
from lightning_prune.protocols import InputError, Plan
from lightning_prune.pruning.budget import bisect_threshold, greedy_cascades, nested, solve
from lightning_prune.seeds import derive
from lightning_prune.world import World

_NOISE_STREAM = 7  # training noise is never that of an evaluation
_RECENT = 4  # batches of training that a refinement measures on
_OPEN = 2.0  # where scores of blocks begin under gates of steps


class DiPGO(PruningModule):
    """Learn which blocks to run at which sampling step, by gradients through whole trajectories.

    Only the gates' scores train, in float32; the denoiser is frozen. An optimizer step is one unrolled trajectory of
    a batch, whose samples are compared with the dense network's from the same noise.

    Args:
        denoiser: the pretrained network.
        process: its forward process.
        sampler: the trajectory that gates are for; at least two network calls.
        optimizer: callable that makes the optimizer from the pruner's parameters.
        granularity: what a gate is for: "coarse" or "fine" parts of a U-Net, "block" or "half" of a transformer.
        cache_mode: what a skipped block gives: its last "output", or its input and the "residual" it last added.
        budget: fraction of the dense trajectory's MACs that the result may keep.
        further_budgets: budgets of further schedules from the same search, nested with the first under the selection
            "exact" unless refined.
        budget_of: what budgets are fractions of: MACs, or seconds of calls for a training batch, as measured on this
            machine when the run starts.
        preset: "budgeted" draws gates at a budget, "paper" shuts them by the published sparsity loss.
        budget_range: budgets that training draws from; null goes from two thirds of the smallest, or the first step
            alone, to 1.2 of the largest.
        temperature: of the gates that "budgeted" draws; lower is closer to hard thresholds.
        loss: consistency of samples: "mse", "l1", "ssim" or "ssim+l1", on what the sampler gives.
        teacher_steps: steps in which the dense samples that others are compared with are drawn; null is the sampler's
            own. More of them leave less of its error in what is searched for.
        decode: whether the loss is of the pictures that the data's decoder makes of latents, as published.
        collapse_weight: weight of the expected share of steps skipped as a whole; "budgeted" only.
        whole_steps: whether the result may skip whole steps.
        cost_weight: weight alpha of the published sparsity loss; "paper" only.
        cost_floor: kept fraction of MACs below which that loss is left out; "paper" only.
        cascades: whether a block's weight in that loss counts what it drags along; if not, all weigh the same.
        pruner: "table" is a free score a gate, "queries" the published network.
        encoder: of the published network.
        selection: from scores to a schedule: "exact", or the published "bisection" or "greedy".
        reuse: what skipped blocks and steps give: what they gave "last", or the line through the last two ("linear").
        step_gates: whether steps have gates of their own above those of their blocks; "budgeted" only.
        refine: changes of the schedule found that are tried after the last step; the best is the result.
        full_steps: refine among schedules that run a step in full or not at all, but for one that spends what is left
            of the budget.
        noises: how many different starting noises training sees; null gives every sample its own.
        compare: rows to report beside the result, see `controls.control`; null is all there are for the sampler and
            the process, "whole-steps" with linear reuse alone.
        checkpoint_blocks: recompute blocks inside recomputed steps, too.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        seed: seed of noise and gates; null takes that of `seed_everything`.
    """

    whole_for = "to call its blocks one by one, and trains scores alone"
    takes_half = True
    steps_between_checks = 1  # they take seconds each, and a score that is no number would never be one again

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        sampler: Sampler,
        optimizer: OptimizerCallable = torch.optim.Adam,
        granularity: str = "block",
        cache_mode: CacheMode = "residual",
        budget: float = 0.5,
        further_budgets: list[float] | None = None,
        budget_of: Literal["macs", "seconds"] = "macs",
        preset: Literal["budgeted", "paper"] = "budgeted",
        budget_range: tuple[float, float] | None = None,
        temperature: float = 1.0,
        loss: ConsistencyLoss = "mse",
        teacher_steps: int | None = None,
        decode: bool = False,
        collapse_weight: float = 0.0,
        whole_steps: bool = True,
        cost_weight: float = 1.0,
        cost_floor: float = 0.2,
        cascades: bool = True,
        pruner: Literal["table", "queries"] = "table",
        encoder: Encoder = "self",
        selection: Literal["exact", "bisection", "greedy"] = "exact",
        reuse: Reuse = "last",
        step_gates: bool = True,
        refine: int = 0,
        full_steps: bool = False,
        noises: int | None = None,
        compare: list[Control] | None = None,
        checkpoint_blocks: bool = False,
        lr_schedule: LrSchedule = "constant",
        warmup_steps: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(denoiser, process, optimizer, lr_schedule, warmup_steps, ema_decay=None, seed=seed)
        self.denoiser.requires_grad_(False).eval()
        # It stays in evaluation mode, which is what Lightning warns of.
        warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode at the start of training")
        self.budget, self.further_budgets = budget, sorted(further_budgets or [], reverse=True)
        self.budget_of: Literal["macs", "seconds"] = budget_of
        self._seconds: BlockCosts | None = None
        self.preset, self.consistency_loss, self.decode = preset, loss, decode
        self.temperature, self.collapse_weight, self.whole_steps = temperature, collapse_weight, whole_steps
        self.cost_weight, self.cost_floor, self.cascades = cost_weight, cost_floor, cascades
        self.selection, self.noises, self.refine, self.full_steps = selection, noises, refine, full_steps
        if full_steps and not (refine and whole_steps):
            raise InputError("model.full_steps: needs model.refine, and model.whole_steps to skip the others")
        self.step_gates = step_gates and preset == "budgeted"
        if selection != "exact" and (self.step_gates or not whole_steps):
            raise InputError(
                f"model.selection: {selection} knows neither gates of steps nor steps that must not be skipped; set "
                "model.step_gates: false and model.whole_steps: true"
            )
        if collapse_weight and preset == "paper":
            raise InputError('model.collapse_weight: has no gradient under model.preset "paper"')
        _check(sampler, process, self.budgets, budget_range, noises, budget)
        numbers = {"temperature": temperature, "collapse_weight": collapse_weight, "cost_weight": cost_weight}
        _check_numbers(numbers | {"cost_floor": cost_floor, "refine": refine}, positive=("temperature",))
        self.predict_sampler = sampler
        self.taught_by = sampler if teacher_steps is None else _in_steps(sampler, process, teacher_steps)
        self.compare = controls(compare, sampler, process, reuse)
        least = 1 / sampler.calls(process)  # the first step runs in full
        usual = (max(least, min(self.budgets) * 2 / 3), min(1.0, max(self.budgets) * 1.2))
        self.budget_range = usual if budget_range is None else budget_range
        graph = denoiser.blocks(granularity).in_mode(cache_mode)
        self.costs = traced_costs(denoiser, granularity, cache_mode)
        self.problem = GateProblem(graph, cache_mode, self.costs, process, sampler, reuse)
        self.unroll = Unroll(
            denoiser, granularity, cache_mode, process, sampler, checkpoint_blocks=checkpoint_blocks, reuse=reuse
        )
        self._check_reach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, 3))
            self.pruner = ScoreTable(*self._shape) if pruner == "table" else QueryPruner(*self._shape, encoder=encoder)
        self.teacher = Teacher(lambda ids, cond: self._dense_images(ids, cond))
        self._recent: deque[Batch] = deque(maxlen=_RECENT)
        self._refined: dict[float, tuple[Row, ...]] = {}
        self._searched = self._search_of()

    @property
    def budgets(self) -> list[float]:
        """All budgets, falling; the result's own is `budget`."""
        return sorted({self.budget, *self.further_budgets}, reverse=True)

    # Training

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids, cond = batch["id"], batch["cond"]
        noise_ids = self._noise_ids(ids)
        if self.training and self.refine:
            self._recent.append({"id": ids, "cond": cond})
        noise = initial_noise(noise_ids, self.denoiser.sample_shape, self._noise_seed).to(self.device)
        drawn = self._gates(ids) if self.training else None
        gates = (self._chosen(), None) if drawn is None else (drawn.run, drawn.steps)
        dense = self.teacher.images(noise_ids, ids, cond)
        kept = self._consistency(self.unroll(noise, cond, *gates), dense)
        if drawn is None:
            return kept, {}
        values = {"consistency": kept.detach(), "kept": drawn.cost.detach(), "skipped_steps": drawn.skipped_steps}
        return kept + self._penalty(drawn), {key: value.detach() for key, value in values.items()}

    def _gates(self, ids: Tensor) -> DrawnGates:
        graph, costs = self.problem.graph, self.problem.costs
        with torch.autocast(self.device.type, enabled=False):
            # Dropout in the encoder of queries; the same on every process.
            torch.manual_seed(derive(self.seed, 5, self._index))
            if self.preset == "paper":
                return published_gates(self._scores(), graph, costs, self.cascades)
            draws = torch.stack([self._uniforms(int(i)) for i in ids.tolist()]).to(self.device)
            low, high = self.budget_range
            budgets = low + (high - low) * draws[:, 0]
            uniforms = draws[:, 1:].view(len(ids), *self._shape)
            return budgeted_gates(self._scores(), budgets, uniforms, graph, costs, self.temperature)

    def _scores(self) -> Tensor:
        """Scores [T, N], or [T, N + 1] with those of steps last; there, blocks of a step that runs mostly run, too."""
        scores: Tensor = self.pruner()
        if not self.step_gates:
            return scores
        return scores + _OPEN * (torch.arange(scores.shape[1], device=scores.device) < scores.shape[1] - 1)

    def _penalty(self, drawn: DrawnGates) -> Tensor:
        penalty = self.collapse_weight * drawn.skipped_steps
        if self.preset == "paper":
            hard = drawn.run.detach()
            shares = hard.new_tensor(self.problem.costs.blocks) / self.problem.costs.dense
            if float((hard * shares).sum() / len(hard)) >= self.cost_floor:
                penalty = penalty + self.cost_weight * drawn.cost
        return penalty

    def _uniforms(self, sample: int) -> Tensor:
        """Random numbers of a sample at this step: of its budget and of its gates, whichever process it is on."""
        generator = torch.Generator().manual_seed(derive(self.seed, 4, self._index, sample))
        count = 1 + self._shape[0] * self._shape[1]
        return torch.rand(count, generator=generator, dtype=torch.float32)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.problem.steps, len(self.problem.graph) + self.step_gates

    @property
    def _index(self) -> int:
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    @property
    def _noise_seed(self) -> int:
        return derive(self.seed, _NOISE_STREAM)

    def _chosen(self) -> Tensor:
        """The result's gates as they stand, [T, N]."""
        return torch.tensor(self.schedules()[budget_name(self.budget)].rows, dtype=torch.float32, device=self.device)

    def _dense_images(self, noise_ids: Tensor, cond: Condition) -> Tensor:
        return sample_images(self.denoiser, self.process, noise_ids, cond, self.taught_by, self._noise_seed)

    def train(self, mode: bool = True) -> DiPGO:
        """The denoiser stays in evaluation mode."""
        super().train(mode)
        self.denoiser.eval()
        return self

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse any but the sampler that gates are searched for."""
        if sampler != self.problem.sampler:
            raise InputError(f"draws by {_words(sampler)}, but model.sampler is {_words(self.problem.sampler)}")

    def on_fit_start(self) -> None:
        if self.decode and getattr(self.trainer.datamodule, "decoder", None) is None:  # type: ignore[attr-defined]
            raise InputError("model.decode: the data has no decoder, which latents have as data.decoder")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.budget_of == "seconds" and self._seconds is None:
            batch = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
            schedule = self.problem.schedule([self.problem.graph.full()])
            own = timed_costs(self.denoiser, schedule, self.process, batch)
            self._pay_by(World.current().gather(own)[0])  # the first process' for all
            self._check_reach()
        last, end = self.trainer.max_steps, self.trainer.estimated_stepping_batches
        if self.refine and last < 1:
            raise InputError("model.refine: follows the last step, so trainer.max_steps has to say which that is")
        if self.refine and end < last:
            raise InputError(f"model.refine: follows step {last}, but trainer.max_epochs ends the fit at step {end:g}")
        self._refined = {}  # a finished search that goes on is refined anew

    def on_train_end(self) -> None:
        if self.refine and not self._refined:
            steps = f"step {self.trainer.global_step} of {self.trainer.max_steps}"
            rank_zero_warn(f"model.refine: the fit ended at {steps}, so the result is not refined")
        super().on_train_end()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Within the step, so that the checkpoint behind it holds the result.
        if self.refine and self.trainer.global_step + 1 >= self.trainer.max_steps:
            # In the context of a training step: the teacher's images are drawn there, so candidates are, too.
            with self.trainer.precision_plugin.train_step_context():
                self._refined = self._refine()

    def _pay_by(self, seconds: BlockCosts) -> None:
        self._seconds, self.problem = seconds, replace(self.problem, costs=seconds)

    def _check_reach(self) -> None:
        """Raise `InputError` where the smallest budget does not pay for what has to run."""
        problem = self.problem
        scores = [[0.0] * len(problem.graph)] * problem.steps
        solve(scores, problem.graph, problem.costs, min(self.budgets), whole_steps=self.whole_steps)

    def _refine(self) -> dict[float, tuple[Row, ...]]:
        chosen = {float(budget): schedule.rows for budget, schedule in self.schedules().items()}
        loss = self.measured([self._on_device(batch) for batch in self._recent])
        found = {}
        for budget, rows in chosen.items():
            chance = random.Random(derive(self.seed, 8, round(1e6 * budget)))
            whole = self._whole(rows, budget) if self.whole_steps else []
            starts = whole if self.full_steps else [rows, *whole]
            allowed = Changes(skip_steps=self.whole_steps, trade_gates=not self.full_steps)
            with self.progress(f"refining at {budget:g}", self.refine) as advance:
                found[budget] = refined(loss, self.problem, starts, budget, self.refine, chance, allowed, advance)
        return found

    def _whole(self, rows: Sequence[Row], budget: float) -> list[tuple[Row, ...]]:
        """Schedules of whole steps: those that `rows` keeps most of, and even ones."""
        with torch.no_grad():
            scores = self._scores()[:, : len(self.problem.graph)].float().cpu().tolist()
        even = rule("whole-steps", self.problem, budget).rows
        return [as_whole_steps(self.problem, found, scores, budget) for found in (rows, even)]

    def measured(self, batches: Sequence[Batch]) -> Callable[[GateSchedule], float]:
        """The consistency of a schedule's samples, a mean over the batches of all processes."""

        @torch.no_grad()
        def loss(schedule: GateSchedule) -> float:
            network = gated(self.denoiser, schedule, self.process)
            losses = torch.stack([self._of_batch(network, batch) for batch in batches])
            gathered: Any = self.all_gather(losses.mean())
            return float(gathered.mean())

        return loss

    def _of_batch(self, network: Denoiser, batch: Batch) -> Tensor:
        noise_ids, cond = self._noise_ids(batch["id"]), batch["cond"]
        images = sample_images(network, self.process, noise_ids.cpu(), cond, self.problem.sampler, self._noise_seed)
        return self._consistency(images, self.teacher.images(noise_ids, batch["id"], cond))

    def _consistency(self, samples: Tensor, dense: Tensor) -> Tensor:
        if self.decode:
            decoder = self.trainer.datamodule.decoder.to(self.device)  # type: ignore[attr-defined]
            samples, dense = decoder.decode(samples, gradients=True), decoder.decode(dense)
        return consistency(samples, dense, self.consistency_loss)

    def _noise_ids(self, ids: Tensor) -> Tensor:
        return ids if self.noises is None else ids % self.noises

    def _on_device(self, batch: Batch) -> Batch:
        return {"id": batch["id"].to(self.device), "cond": move(batch["cond"], self.device)}

    # The checkpoint holds the pruner and the teacher's images; the frozen network is where it came from.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The pruner's tensors."""
        whole: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if not name.startswith("denoiser.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore the pruner."""
        return super().load_state_dict({**super().state_dict(), **state_dict}, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Of every process, whose batches and images are its own; all of them come here together.
        world = World.current()
        checkpoint["teacher"] = world.gather(self.teacher.state())
        checkpoint["recent"] = world.gather(stored(self._recent))
        checkpoint["refined"] = self._refined
        checkpoint["searched"] = self._searched
        checkpoint["nanoseconds"] = self._seconds and (self._seconds.blocks, self._seconds.shell)

    def _search_of(self) -> str | None:
        """What the teacher's images, gates and scores of a checkpoint are of, as given: precisions come later."""
        if any(parameter.is_meta for parameter in self.denoiser.parameters()):
            return None  # a plan has shapes alone
        problem, sampler = self.problem, self.problem.sampler
        scheduler = solver_config(sampler, self.process)
        denoiser = fingerprint(self.denoiser, scheduler, problem.steps, sampler.guidance)
        own = (problem.graph.granularity, problem.mode, problem.reuse, self.taught_by, self.noises, self._noise_seed)
        return " ".join(map(str, (denoiser, *own)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("searched", self._searched) != self._searched:
            raise InputError(
                "ckpt_path: the checkpoint is of a search over another network, sampler, noise, seed, granularity, "
                "cache_mode or reuse"
            )
        for state in by_process(checkpoint.get("teacher")):
            self.teacher.restore(state)
        self._recent.extend(own_batches(checkpoint.get("recent")))
        self._refined = dict(checkpoint.get("refined", {}))
        if self.budget_of == "seconds" and checkpoint.get("nanoseconds"):
            self._pay_by(BlockCosts(*checkpoint["nanoseconds"]))

    # Planned

    def planned(self) -> Plan:
        """Gates at the budget; which blocks they skip is for the search to find."""
        return Plan(
            axis="gates",
            target=f"budget {self.budget:g}" + (" of seconds" if self.budget_of == "seconds" else ""),
            touched=self.problem.graph.names,
            macs_kept=self.kept_fraction()["aten"],
            parameters_kept=sum(p.numel() for p in self.denoiser.parameters()),
        )

    # Results

    def schedules(self) -> dict[str, GateSchedule]:
        """The schedule of every budget as scores stand now, by budget; the result is last.

        Raises:
            InputError: a budget that the refinement of a checkpoint was not for.
        """
        with torch.no_grad():
            self.pruner.eval()
            scores = self._scores().float().cpu()
        self.pruner.train(self.training)
        if not torch.isfinite(scores).all():
            raise InputError("model.pruner: its scores are not finite, so they rank no gates")
        chosen = self._of_refined() if self._refined else self._select(scores)
        found = {budget_name(budget): self.problem.schedule(rows) for budget, rows in chosen.items()}
        result = found.pop(budget_name(self.budget))
        return {**found, budget_name(self.budget): result}

    def _of_refined(self) -> dict[float, tuple[Row, ...]]:
        by_name = {budget_name(budget): rows for budget, rows in self._refined.items()}
        for budget in self.budgets:
            if budget_name(budget) not in by_name:
                key = "model.budget" if budget == self.budget else "model.further_budgets"
                raise InputError(f"{key}: {budget:g} is none of the budgets that were refined, {', '.join(by_name)}")
        return {budget: by_name[budget_name(budget)] for budget in self.budgets}

    def _select(self, scores: Tensor) -> dict[float, Any]:
        graph, costs = self.problem.graph, self.problem.costs
        if self.selection == "bisection":
            keep = torch.sigmoid(scores).tolist()
            return {budget: bisect_threshold(keep, graph, costs, budget) for budget in self.budgets}
        if self.selection == "greedy":
            found = {b: greedy_cascades(torch.sigmoid(-scores).tolist(), graph, costs, 1 - b) for b in self.budgets}
            # The published rule stops just above the budget.
            return {b: solve(scores.tolist(), graph, costs, b, within=rows) for b, rows in found.items()}
        if self.step_gates:
            blocks, steps = budgeted_scores(scores, self.budget, graph, costs, self.temperature)
            whole = None if steps is None else steps.tolist()
            return nested(blocks.tolist(), graph, costs, self.budgets, self.whole_steps, whole)
        return nested(scores.tolist(), graph, costs, self.budgets, self.whole_steps)

    def variants(self) -> dict[str, Variant]:
        """The dense network, then for every budget what its schedule is compared with, and the schedule."""
        rows = {"dense": Variant(self.denoiser)}
        for budget, schedule in self.schedules().items():
            for name in self.compare:
                row, variant = control(name, self.denoiser, self.problem, float(budget), schedule, self.seed)
                # The steps kept are another budget's where the name is taken; all else of that name is the same.
                rows[f"{row} at {budget}" if row in rows and row.endswith(" kept") else row] = variant
            rows[self.result_name(budget)] = Variant(gated(self.denoiser, schedule, self.process))
        return rows

    def result_name(self, budget: str) -> str:
        """Name of the row of a budget's schedule."""
        return f"dipgo {budget}"

    def remarks(self) -> list[str]:
        """Which schedules skip nothing but whole steps."""
        found = []
        for budget, schedule in self.schedules().items():
            if schedule.skips_only_whole_steps():
                runs = f"{len(schedule.kept_steps())} of {schedule.steps} steps in full and none in part"
                found.append(f"{self.result_name(budget)} runs {runs}: the sampler on these steps is what to beat")
        return found

    def sample_images(
        self, ids: Tensor, cond: Condition, sampler: Sampler, seed: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Images of the result as it stands, drawn with the sampler it is for."""
        result = gated(self.denoiser, self.schedules()[budget_name(self.budget)], self.process)
        return sample_images(result, self.process, ids, cond, self.problem.sampler, seed, on_step)

    def kept_fraction(self) -> dict[str, float]:
        """Share of the dense trajectory's MACs that the result keeps, by convention."""
        rows = self.schedules()[budget_name(self.budget)].rows
        return {"aten": self.costs.kept(rows)}

    def artifact_files(self) -> dict[str, str]:
        """`gates.json` of the result, and `gates-<budget>.json` of every further budget."""
        sampler, schedules = self.problem.sampler, self.schedules()
        result, scheduler = schedules[budget_name(self.budget)], solver_config(sampler, self.process)
        module = traced_costs(self.denoiser, result.granularity, result.cache_mode, "module")
        origin = fingerprint(self.denoiser, scheduler, result.steps, sampler.guidance)
        files = {}
        for budget, schedule in schedules.items():
            file = GateFile(
                schedule=schedule,
                fingerprint=origin,
                scheduler=scheduler,
                guidance=sampler.guidance,
                budget=float(budget),
                macs_kept={"aten": self.costs.kept(schedule.rows), "module": module.kept(schedule.rows)},
                costs=self.costs,
                network=network_of(self.denoiser),
                timesteps=tuple(sampler.visited(self.process).tolist()),
                seconds_kept=None if self._seconds is None else self._seconds.kept(schedule.rows),
            )
            files[GATES if schedule is result else gates_of(budget)] = file.text()
        return files


def _words(sampler: Sampler) -> str:
    return f"{sampler.describe()}, {sampler.steps} steps, guidance {sampler.guidance:g}"


def _check(
    sampler: Sampler,
    process: Process,
    budgets: list[float],
    budget_range: tuple[float, float] | None,
    noises: int | None,
    own: float,
) -> None:
    if sampler.draws_noise:
        raise InputError(f"model.sampler: {sampler.name} draws noise at every step, under which no value can be reused")
    if sampler.calls(process) < 2:
        raise InputError("model.sampler.steps: 1 step leaves nothing to reuse; at least 2 are needed")
    for budget in budgets:
        if not 0 < budget <= 1:
            key = "model.budget" if budget == own else "model.further_budgets"
            raise InputError(f"{key}: {budget:g} is not in (0, 1]")
    if budget_range is not None and not 0 < budget_range[0] <= budget_range[1] <= 1:
        low, high = budget_range
        raise InputError(f"model.budget_range: {low:g} to {high:g} is no range of fractions in (0, 1]")
    if budget_range is not None and budget_range[1] < 1 / sampler.calls(process):
        first = 1 / sampler.calls(process)
        raise InputError(f"model.budget_range: ends at {budget_range[1]:g}, but the first step alone takes {first:g}")
    if noises is not None and noises < 1:
        raise InputError(f"model.noises: {noises} is not positive")


def _in_steps(sampler: Sampler, process: Process, steps: int) -> Sampler:
    if steps < sampler.steps:
        raise InputError(f"model.teacher_steps: {steps} is less than the sampler's own {sampler.steps}")
    found = replace(sampler, steps=steps, timesteps=None)
    try:
        found.calls(process)
    except InputError as error:
        raise InputError(f"model.teacher_steps: {error}") from error
    return found


def _check_numbers(numbers: Mapping[str, float], positive: tuple[str, ...]) -> None:
    for key, value in numbers.items():
        if not math.isfinite(value) or value < 0:
            raise InputError(f"model.{key}: {value:g} is not a number of at least 0")
        if key in positive and value == 0:
            raise InputError(f"model.{key}: {value:g} is not positive")
