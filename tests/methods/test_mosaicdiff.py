"""MosaicDiff through `fit`: statistics, recipes, budgets, resuming, artifacts, refusals."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

import lightning_prune
from lightning_prune.callbacks import ArtifactWriter, EfficiencyReport, ImageWriter, LastCheckpoint, SampleGrid
from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import StagedDenoiser
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.methods.mosaicdiff import MosaicDiff, Recipe, seconds
from lightning_prune.methods.mosaicdiff.drawings import _HEIGHT, _TOP
from lightning_prune.methods.mosaicdiff.plan import (
    draw_in_bins,
    refine,
    sampling_grid,
    stages_for,
    timesteps_of,
)
from lightning_prune.methods.mosaicdiff.pruner import parameters_held
from lightning_prune.methods.mosaicdiff.sensitivity import interpolated
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError
from lightning_prune.pruning.curvature import Curvature
from lightning_prune.pruning.stages import Stage, equal_stages
from tests.factories import fit, tiny_dit, tiny_unet

PROCESS = Process(schedule="cosine", prediction="v")
RIVALS = {
    "published": Recipe("published"),
    "uniform": Recipe("uniform"),
    "magnitude": Recipe("uniform", stages=1, criterion="magnitude", compensate=False),
    "taylor": Recipe("uniform", stages=1, criterion="taylor"),
    "random": Recipe("uniform", stages=1, criterion="random"),
    "evolution": Recipe("evolution", stages=2, evaluations=2),
    "learned": Recipe("learned", stages=2, evaluations=1),
    "layers": Recipe(stages=2, sensitivity="layer", nested=True),
    "affine": Recipe(stages=2, sensitivity="output", affine=True),
    "layer by layer": Recipe(stages=2, sensitivity="final", recalibrate=False),
    "least squares": Recipe("uniform", match="none"),
}


def module(**arguments: Any) -> MosaicDiff:
    settings: dict[str, Any] = {"target": 0.25, "steps": 4, "recipe": Recipe(stages=2), "probe_images": 2}
    return MosaicDiff(tiny_dit(), PROCESS, **{**settings, **arguments})


def calibrate(
    pruned: MosaicDiff, folder: Path, batches: int = 2, ckpt: Path | None = None, **trainer: Any
) -> MosaicDiff:
    fit(pruned, folder, ckpt, max_steps=-1, max_epochs=1, limit_train_batches=batches, **trainer)
    return pruned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[MosaicDiff, Path]:
    """One calibration and every recipe made from it."""
    folder = tmp_path_factory.mktemp("run")
    return calibrate(module(rivals=RIVALS), folder, callbacks=[ArtifactWriter()]), folder


def images(denoiser: Any, steps: int = 4) -> Tensor:
    return sample_images(denoiser, PROCESS, torch.arange(3), torch.tensor([1, 5, 9]), Sampler(steps=steps))


@pytest.mark.parametrize("name", [*RIVALS, "mosaicdiff measured"])
def test_every_recipe_meets_the_target_from_below(name: str, run: tuple[MosaicDiff, Path]) -> None:
    pruned, dense = run[0].results()[name], run[0].denoiser
    sampler = Sampler(steps=4)
    before, after = (trajectory_cost(d, PROCESS, sampler).macs() for d in (dense, pruned.denoiser))
    assert after == pruned.denoiser.facts["macs_per_image"], "exported modules cost what was predicted"
    assert after <= 0.75 * before
    for s, row in enumerate(pruned.removed):
        for g, count in enumerate(row):
            unit = pruned.problem.steps[s] * pruned.problem.unit_macs[g]
            assert count == 0 or after + unit > 0.75 * before, "another unit fits"
    assert not torch.equal(images(pruned.denoiser), images(dense))
    assert torch.isfinite(images(pruned.denoiser)).all()


def test_published_stages_have_one_ratio_for_all_layers_but_what_was_given_back(run: tuple[MosaicDiff, Path]) -> None:
    pruned = run[0].results()["published"]
    channels = [g for g, group in enumerate(pruned.problem.groups) if group.kind == "channels"]
    assert sum(len({row[g] for g in channels}) > 1 for row in pruned.removed) <= 1


def test_nested_stages_contain_each_other(run: tuple[MosaicDiff, Path]) -> None:
    pruned = run[0].results()["layers"]
    widths = [network.transformer_blocks[0].ff.net[0].proj.weight for network in pruned.denoiser.networks]
    fewer, more = sorted(widths, key=len)
    rows = {tuple(row.tolist()) for row in more}
    assert all(tuple(row.tolist()) in rows for row in fewer)


def test_the_run_leaves_tables_drawings_and_an_artifact(run: tuple[MosaicDiff, Path]) -> None:
    pruned, folder = run
    names = {p.name for p in (folder / "stages").iterdir()}
    assert names >= {"published.json", "published.svg", "mosaicdiff-measured.json", "mosaicdiff-measured.svg"}
    loaded = lightning_prune.load(folder / "artifact")
    result = list(pruned.variants().values())[-1].denoiser
    assert torch.equal(images(loaded), images(result))
    assert loaded.facts["calibration"] == result.facts["calibration"]
    assert loaded.facts["timesteps"] == [999, 749, 499, 249]
    assert torch.equal(pruned.sample_images(torch.arange(3), torch.tensor([1, 5, 9]), Sampler(steps=4)), images(result))


def test_the_curve_is_drawn_through_its_points_with_the_result_on_it(run: tuple[MosaicDiff, Path]) -> None:
    content = json.loads((run[1] / "stages" / "mosaicdiff-measured.json").read_text())
    root = ElementTree.parse(run[1] / "stages" / "mosaicdiff-measured-cost-error.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    (line,), (circle,) = root.findall(f"{space}polyline"), root.findall(f"{space}circle")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == 1 + len(content["cost_error"])
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True), "more removed, more error"
    width = (xs[-1] - xs[0]) / content["cost_error"][-1]["macs_removed"]
    assert float(circle.attrib["cx"]) == pytest.approx(xs[0] + width * content["facts"]["macs_removed"], abs=0.2)


class Noted(WandbLogger):
    """Takes tables instead of sending them."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    def log_table(self, key: str, columns: Any = None, data: Any = None, *_: Any, **__: Any) -> None:
        self.tables[key] = (columns, data)


def test_stages_are_drawn_with_the_score_of_their_steps(run: tuple[MosaicDiff, Path]) -> None:
    pruned = run[0].results()["published"]
    scores, means = pruned.denoiser.facts["step_scores"], pruned.denoiser.facts["stage_scores"]
    for stage, mean in zip(pruned.stages, means, strict=True):
        assert sum(scores[stage.first : stage.end]) / stage.steps == pytest.approx(mean)
    root = ElementTree.parse(run[1] / "stages" / "published-stages.svg").getroot()
    score, kept = (line.attrib["points"].split() for line in root if line.tag.endswith("polyline"))
    assert len(score) == len(scores) == 4
    heights = [float(point.split(",")[1]) for point in kept]
    assert len(heights) == 2 * len(pruned.stages)
    bottom = _TOP + _HEIGHT
    shares = [macs / pruned.problem.call_macs for macs in pruned.denoiser.facts["macs_per_call"]]
    assert heights[::2] == pytest.approx([bottom - _HEIGHT * share for share in shares], abs=0.1)


def test_wandb_gets_the_tables_of_the_run_folder(run: tuple[MosaicDiff, Path], tmp_path: Path) -> None:
    logger, name = Noted(), "mosaicdiff measured"
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, loggers=[logger])
    run[0]._write(trainer, name, run[0].results()[name])
    content = json.loads((tmp_path / "stages" / "mosaicdiff-measured.json").read_text())
    assert set(logger.tables) == {f"{key}/mosaicdiff-measured" for key in ("stages", "widths", "cost_error")}
    for key in ("stages", "widths", "cost_error"):
        columns, data = logger.tables[f"{key}/mosaicdiff-measured"]
        assert [dict(zip(columns, row, strict=True)) for row in data] == content[key]
        assert data


def test_parameters_held_are_counted(run: tuple[MosaicDiff, Path]) -> None:
    counted = 0
    for pruned in run[0].results().values():
        found = pruned.denoiser.facts["parameters"]
        assert found["shared"] <= found["stitched"]
        if all(k > 0 for row in pruned.removed for k in row):  # or stages share what one of them leaves whole
            recipe = Recipe(**pruned.denoiser.facts["recipe"])
            held = parameters_held(run[0].denoiser, pruned.problem, pruned.removed, recipe)
            assert found["shared"] == held < found["dense"] * len(pruned.stages)
            counted += 1
    assert counted > 2


def test_what_is_planned_is_what_a_uniform_recipe_does(run: tuple[MosaicDiff, Path]) -> None:
    planned = module(recipe=RIVALS["magnitude"]).planned()
    pruned = run[0].results()["magnitude"]
    assert planned.axis == "widths"
    assert planned.macs_kept == 1 - pruned.denoiser.facts["macs_removed"]
    assert set(planned.touched) == {group.name for group in pruned.problem.groups}
    assert planned.parameters_kept == sum(p.numel() for p in pruned.denoiser.parameters())


def test_a_target_in_seconds_is_met_where_seconds_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here heads take three quarters of the time and channels none, whatever their MACs are."""

    def medians(arms: Any, repeats: int) -> dict[str, float]:
        return {name: 1.0 - (3 / 16 if "attn" in name else 0.0) for name in arms}

    monkeypatch.setattr(seconds, "interleaved_medians", medians)
    pruned = calibrate(module(target_of="seconds", rivals={"uniform": Recipe("uniform")}), tmp_path)
    for name, result in pruned.results().items():
        kinds = [group.kind for group in result.problem.groups]
        channels = [k for row in result.removed for kind, k in zip(kinds, row, strict=True) if kind == "channels"]
        assert result.denoiser.facts["predicted_seconds_removed"] >= 0.25
        assert name == "uniform" or set(channels) == {0}, "removing what takes no time gains nothing"
        assert (
            result.denoiser.facts["macs_per_image"]
            == trajectory_cost(result.denoiser, PROCESS, Sampler(steps=4)).macs()
        ), "MACs stay MACs"
    impossible = module(target=0.7, target_of="seconds", recipe=Recipe("measured", stages=1))
    with pytest.raises(InputError, match=r"0\.7 of the seconds cannot be removed"):
        calibrate(impossible, tmp_path / "impossible")


def test_a_checkpoint_is_pruned_by_the_seconds_that_its_run_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"target_of": "seconds", "recipe": Recipe("uniform", stages=1)}
    for costly, folder in (("attn", "first"), ("ff", "second")):

        def medians(arms: Any, repeats: int, costly: str = costly) -> dict[str, float]:
            return {name: 1.0 - (3 / 16 if costly in name else 0.0) for name in arms}

        monkeypatch.setattr(seconds, "interleaved_medians", medians)
        saving: dict[str, Any] = {"callbacks": [LastCheckpoint()], "enable_checkpointing": True}
        calibrate(module(**settings), tmp_path / folder, **saving)
    state = torch.load(tmp_path / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    again = module(**settings)
    again.on_load_checkpoint(state)
    again.load_state_dict(state["state_dict"])
    (first,) = again.results().values()
    predicted = first.denoiser.facts["predicted_seconds_removed"]
    heads = [k for group, k in zip(first.problem.groups, first.removed[0], strict=True) if group.kind == "heads"]
    # A head takes three sixteenths of a call, by the first run's clock; by the second's, nothing.
    assert predicted == pytest.approx(sum(heads) * 3 / 16)
    assert predicted > 0


def test_switches_of_recalibration_change_weights_but_not_widths(run: tuple[MosaicDiff, Path]) -> None:
    matched, least = run[0].results()["uniform"], run[0].results()["least squares"]
    assert matched.removed == least.removed
    assert not torch.equal(images(matched.denoiser), images(least.denoiser))
    assert sum(len(x0) for x0, _ in run[0]._kept) == 2 * 8, "every image of two batches of eight"


def test_only_so_many_images_are_kept(tmp_path: Path) -> None:
    pruned = calibrate(module(recalibration_images=11), tmp_path)
    assert [(len(x0), len(cond)) for x0, cond in pruned._kept] == [(8, 8), (3, 3)]
    assert torch.isfinite(images(pruned.results()["mosaicdiff measured"].denoiser)).all()


def test_variants_are_named_before_they_exist() -> None:
    fresh = module(rivals={"published": Recipe("published")})
    assert list(fresh.variants()) == ["dense", "published", "mosaicdiff measured"]
    assert fresh.kept_fraction() == {"aten": 1.0}


def test_nothing_to_remove_is_the_dense_network(tmp_path: Path) -> None:
    pruned = calibrate(module(target=0.0, rivals={"zero": Recipe("published", sparsity=0.0)}), tmp_path)
    for result in pruned.results().values():
        assert torch.equal(images(result.denoiser), images(pruned.denoiser))
        held = {p.data_ptr() for p in result.denoiser.parameters()}
        assert held == {p.data_ptr() for p in pruned.denoiser.parameters()}


class Asking(pl.Callback):
    """Asks for variants in the middle of the calibration, as a grid of samples does on one process."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        assert pl_module.variants()["mosaicdiff measured"].denoiser is pl_module.denoiser


def test_asking_too_early_changes_nothing(tmp_path: Path) -> None:
    asked = calibrate(module(), tmp_path / "asked", callbacks=[Asking()])
    plain = calibrate(module(), tmp_path / "plain")
    assert (
        asked.results()["mosaicdiff measured"].denoiser.facts == plain.results()["mosaicdiff measured"].denoiser.facts
    )
    assert isinstance(asked.variants()["mosaicdiff measured"].denoiser, StagedDenoiser)


class SaveAfter(Checkpoint):
    """Writes a checkpoint after a batch."""

    def __init__(self, batch: int, file: Path) -> None:
        self.batch, self.file = batch, file

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if arguments[-1] == self.batch:
            trainer.save_checkpoint(self.file)


def test_another_seed_where_it_is_cut_again_changes_nothing(tmp_path: Path) -> None:
    recipe = Recipe("uniform", stages=2, criterion="random")
    pruned = calibrate(module(recipe=recipe, seed=1), tmp_path, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    again, other = module(recipe=recipe, seed=0), calibrate(module(recipe=recipe, seed=0), tmp_path / "other")
    again.load_state_dict(stored["state_dict"])
    again.on_load_checkpoint(stored)
    first, second, third = (images(m.results()["mosaicdiff uniform"].denoiser) for m in (pruned, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third), "the seed matters"


class Negated:
    """The same ids, other images."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return ({**batch, "x": -batch["x"]} for batch in self.batches)


class OtherImages(EmbeddedFashion):
    def train_dataloader(self) -> Any:
        return Negated(super().train_dataloader())


def test_the_hash_is_of_the_images_however_they_are_batched(tmp_path: Path) -> None:
    def found(batches: int, data: Any) -> str:
        facts = calibrate(module(), tmp_path, batches, data=data).results()["mosaicdiff measured"].denoiser.facts
        digest: str = facts["calibration"]["sha256"]
        return digest

    alike = {found(2, EmbeddedFashion(batch_size=8, seed=3)), found(4, EmbeddedFashion(batch_size=4, seed=3))}
    assert len(alike) == 1
    assert len(alike | {found(2, EmbeddedFashion(batch_size=8, seed=4))}) == 2
    assert len(alike | {found(2, OtherImages(batch_size=8, seed=3))}) == 2


def test_resumed_in_mid_epoch_equals_uninterrupted(tmp_path: Path) -> None:
    whole = calibrate(module(), tmp_path / "whole", 3)
    file = tmp_path / "one.ckpt"
    calibrate(module(), tmp_path / "first", 3, callbacks=[SaveAfter(0, file)], enable_checkpointing=True)
    torch.manual_seed(12345)
    resumed = calibrate(module(), tmp_path / "second", 3, file)
    first, second = (m.results()["mosaicdiff measured"] for m in (whole, resumed))
    assert first.removed == second.removed
    assert first.denoiser.facts == second.denoiser.facts
    assert torch.equal(images(first.denoiser), images(second.denoiser))


def test_the_last_checkpoint_holds_the_statistics(tmp_path: Path) -> None:
    pruned = calibrate(module(), tmp_path, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    file = tmp_path / "checkpoints" / "last.ckpt"
    again = module()
    again.on_load_checkpoint(torch.load(file, weights_only=True))
    again.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    assert again.results()["mosaicdiff measured"].removed == pruned.results()["mosaicdiff measured"].removed
    other = module(recipe=Recipe(stages=3))
    with pytest.raises(InputError, match="other stages"):
        other.on_load_checkpoint(torch.load(file, weights_only=True))
    first_order = module(recipe=Recipe(stages=2, criterion="taylor"))
    with pytest.raises(InputError, match="calibrated without gradients"):
        first_order.on_load_checkpoint(torch.load(file, weights_only=True))


def test_what_one_process_knows_is_not_copied_to_be_summed_or_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []

    def counted(self: Curvature, *_: Any) -> None:
        copied.append(1)

    monkeypatch.setattr(Curvature, "load", counted)
    monkeypatch.setattr(Curvature, "sum_over", counted)
    pruned = calibrate(module(), tmp_path)
    assert not copied
    checkpoint: dict[str, Any] = {}
    pruned.on_save_checkpoint(checkpoint)
    assert pruned._curvature is not None
    for name, sums in pruned._curvature.sums.items():
        assert checkpoint["mosaicdiff"]["sums"][name].data_ptr() == sums.data_ptr()


def test_checkpoints_are_written_without_being_in_memory(tmp_path: Path) -> None:
    trainer = fit(module(), tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=1)
    io = trainer.strategy.checkpoint_io
    content = {"sums": torch.arange(1 << 20)}
    tracemalloc.start()
    try:
        io.save_checkpoint(content, tmp_path / "folder" / "large.ckpt")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < content["sums"].nbytes / 8
    assert torch.equal(torch.load(tmp_path / "folder" / "large.ckpt", weights_only=True)["sums"], content["sums"])
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["large.ckpt"]


def test_saving_what_all_processes_know_leaves_what_one_knows(tmp_path: Path) -> None:
    """Sums over processes on a CPU overwrite what they are given."""
    pruned = calibrate(module(rivals={"taylor": RIVALS["taylor"]}), tmp_path)
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor.mul_(3))
    pruned._trainer = SimpleNamespace(world_size=3, strategy=strategy)  # type: ignore[assignment]
    pruned._summed = False
    assert pruned._curvature is not None
    before = {name: sums.clone() for name, sums in pruned._curvature.sums.items()}
    importance = {name: values.clone() for name, values in pruned._importance.items()}
    for _ in range(2):
        checkpoint: dict[str, Any] = {}
        pruned.on_save_checkpoint(checkpoint)
    for name, sums in before.items():
        assert torch.equal(pruned._curvature.sums[name], sums)
        assert torch.equal(checkpoint["mosaicdiff"]["sums"][name], 3 * sums)
        assert torch.equal(pruned._importance[name], importance[name])
        assert torch.equal(checkpoint["mosaicdiff"]["importance"][name], 3 * importance[name])
        assert importance[name].any()


def test_a_checkpoint_is_pruned_in_a_test_run_too(tmp_path: Path) -> None:
    rivals = {"learned": RIVALS["learned"]}
    pruned = calibrate(module(rivals=rivals), tmp_path, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    again = module(rivals=rivals)
    again.on_load_checkpoint(state)
    again.load_state_dict(state["state_dict"])
    with torch.inference_mode():
        results = again.results()
    assert {name: found.removed for name, found in results.items()} == {
        name: found.removed for name, found in pruned.results().items()
    }
    assert all(p.grad is None for p in again.denoiser.parameters())


class Empty(EmbeddedFashion):
    """Data with no training batch."""

    def train_dataloader(self) -> Any:
        return []


def test_data_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no training batch \(trainer\.limit_train_batches\)"):
        fit(module(), tmp_path, data=Empty(batch_size=8), max_steps=-1, max_epochs=1)


def test_callbacks_that_draw_in_another_number_of_calls_are_refused(tmp_path: Path) -> None:
    for callback in (SampleGrid(steps=3), EfficiencyReport(steps=3), SampleGrid(steps=4, sampler="plms")):
        with pytest.raises(InputError, match=rf"trainer\.callbacks: {type(callback).__name__} draws in [35] network"):
            calibrate(module(), tmp_path, 1, callbacks=[callback])
    for alike in (SampleGrid(steps=4, guidance=2.0, sampler="dpm-solver++"), SampleGrid(steps=3, sampler="plms")):
        calibrate(module(), tmp_path / f"alike-{alike.sampler.name}", 1, callbacks=[alike])
    plain = [ArtifactWriter(), SampleGrid(steps=4)]
    calibrate(module(), tmp_path / "staged", 1, callbacks=plain)
    beside = EfficiencyReport(steps=3, beside={"staged": str(tmp_path / "staged" / "artifact")})
    one = module(recipe=Recipe("uniform", stages=1))
    with pytest.raises(InputError, match=r"beside: staged: steps: the stages are for trajectories of 4 .* not 3"):
        beside.setup(SimpleNamespace(datamodule=EmbeddedFashion()), one, "fit")  # type: ignore[arg-type]
    calibrate(one, tmp_path / "one", 1, callbacks=[SampleGrid(steps=3)])


def test_predict_draws_in_the_steps_that_stages_were_made_for(tmp_path: Path) -> None:
    data = EmbeddedFashion(batch_size=8)
    pruned = calibrate(module(), tmp_path, 1, limit_predict_batches=1, callbacks=[ImageWriter()])
    drawn = pruned.trainer.predict(pruned, data)
    assert drawn
    ids, found = drawn[0]
    labels = next(iter(data.predict_dataloader()))["cond"]
    stages = pruned.variants()[pruned.result_name].denoiser
    assert torch.equal(found, sample_images(stages, PROCESS, ids, labels, Sampler(steps=4)))
    pruned.trainer.callbacks = [ImageWriter(steps=20)]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"trainer\.callbacks: ImageWriter draws in 20 network calls"):
        pruned.trainer.predict(pruned, data)


def test_guidance_and_own_states_fill_every_stage(tmp_path: Path) -> None:
    plain = calibrate(module(guidance=2.0), tmp_path / "plain", 1)
    weighted = calibrate(module(guidance=2.0, guidance_weighted=True), tmp_path / "weighted", 1)
    own = calibrate(module(calibration="sampler"), tmp_path / "own", 1)
    assert plain._curvature is not None
    assert weighted._curvature is not None
    assert own._curvature is not None
    assert plain._curvature.rows[:, 0].tolist() == [2 * 4 * 16] * 2, "8 samples in 2 stages, twice, of 16 tokens"
    assert own._curvature.rows[:, 0].tolist() == [2 * 8 * 16] * 2, "2 steps of 8 samples in each stage"
    name = own._curvature.groups[0].name
    # The last entry is the sum of weights: w^2 + (w - 1)^2 for each pair.
    assert float(weighted._curvature.sums[name][0, -1, -1]) == pytest.approx(4 * 16 * (4 + 1))
    assert float(plain._curvature.sums[name][0, -1, -1]) == 2 * 4 * 16


@pytest.mark.parametrize(("steps", "lengths"), [(1, (1,)), (2, (1, 1)), (3, (2, 1))])
def test_few_steps(steps: int, lengths: tuple[int, ...], tmp_path: Path) -> None:
    few = module(steps=steps, recipe=Recipe("published"), rivals={"uniform": Recipe("uniform")})
    pruned = calibrate(few, tmp_path).results()["mosaicdiff published"]
    assert pruned.denoiser.lengths == lengths
    assert pruned.denoiser.facts["macs_removed"] >= 0.25
    assert torch.isfinite(images(pruned.denoiser, steps)).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target": 1.0}, r"model\.target: 1"),
        ({"damping": -1.0}, r"model\.damping"),
        ({"damping": float("nan")}, r"model\.damping"),
        ({"power": 0.0}, r"model\.power"),
        ({"power": float("inf")}, r"model\.power"),
        ({"rivals": {"dense": Recipe()}}, r"model\.rivals: 'dense' is the name of the network"),
        ({"rivals": {"mosaicdiff measured": Recipe()}}, r"model\.rivals: .* is the name of the result"),
        ({"rivals": {"a b": Recipe(), "a-b": Recipe()}}, r"model\.rivals: 'a-b' is the name of another rival"),
        ({"rivals": {"w/o refit": Recipe()}}, r"model\.rivals: 'w/o refit' cannot name a file"),
        ({"rivals": {"": Recipe()}}, r"model\.rivals: '' cannot name a file"),
        ({"probe_images": 0}, r"model\.probe_images"),
        ({"recalibration_images": 0}, r"model\.recalibration_images"),
        ({"guidance_weighted": True}, r"model\.guidance_weighted"),
        ({"calibration": "sampler", "recipe": Recipe(criterion="taylor")}, r"model\.calibration: .*'taylor'"),
        ({"calibration": "sampler", "rivals": {"first": RIVALS["taylor"]}}, r"model\.calibration: .*'taylor'"),
        ({"recipe": Recipe(stages=5)}, "5 stages of 4 sampling steps"),
        ({"steps": 0}, "0 sampling steps"),
        ({"steps": 2000}, "2000 sampling steps"),
        ({"sampler": "flow-euler"}, "flow-euler cannot sample"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        module(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sparsity": 0.3}, "takes model.target instead"),
        ({"allocation": "uniform", "sparsity": 33.0}, r"recipe\.sparsity: 33 is not in \[0, recipe\.maximum = 0\.9\]"),
        ({"allocation": "published", "sparsity": -0.5}, r"recipe\.sparsity: -0\.5"),
        ({"allocation": "uniform", "sparsity": float("nan")}, r"recipe\.sparsity: nan"),
        ({"profile": (1.0, 0.5), "stages": 2}, r"recipe\.profile: goes with the 'uniform' allocation"),
        ({"allocation": "uniform", "profile": (1.0, 0.5)}, r"recipe\.profile: 2 values, but recipe\.stages is None"),
        ({"allocation": "uniform", "profile": (1.0, 0.0), "stages": 2}, r"recipe\.profile: its values"),
        ({"snr_weight": 1.0}, r"recipe\.snr_weight: 1 is not in \[0, 0\.1\]"),
        ({"snr_weight": -0.1}, r"recipe\.snr_weight"),
        ({"affine": True, "compensate": False}, "set compensate"),
        ({"maximum": 1.0}, "maximum"),
        ({"stages": 0}, "stages"),
        ({"threshold": 0.0}, "threshold"),
        ({"evaluations": 0}, "evaluations"),
    ],
)
def test_recipes_that_contradict_themselves(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Recipe(**arguments)


def test_a_network_without_widths_is_refused() -> None:
    unet = tiny_unet()
    unet.groups = list  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no width that can be cut"):
        MosaicDiff(unet, PROCESS)


# Where stages lie


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_stages_cover_every_training_timestep_once(schedule: Any, steps: int) -> None:
    process = Process(schedule=schedule, prediction="flow" if schedule == "flow" else "epsilon")
    sampler = Sampler("flow-euler" if schedule == "flow" else "ddim", steps)
    visited = sampler.visited(process)
    stages = stages_for(Recipe("published"), sampling_grid(process, sampler), 1.0)
    covered = torch.cat([timesteps_of(stage, visited, process) for stage in stages])
    expected = process.grid()[process.grid() <= float(visited[0])]
    assert torch.equal(covered.sort().values, expected.sort().values)
    for stage in [] if process.is_flow else stages:  # a flow's steps lie between whole timesteps
        inside = timesteps_of(stage, visited, process)
        assert set(visited[stage.first : stage.end].tolist()) <= set(inside.tolist())


def test_bins_refine_all_partitions_and_are_filled_in_turn() -> None:
    bins = refine([equal_stages(20, 2), equal_stages(20, 5), [Stage(0, 7), Stage(7, 13)]])
    assert [b.steps for b in bins] == [4, 3, 1, 2, 2, 4, 4]
    visited = Sampler(steps=20).visited(PROCESS)
    bin_of, t = draw_in_bins(bins, visited, PROCESS, 70, torch.Generator().manual_seed(0))
    assert bin_of.bincount().tolist() == [10] * 7
    for number, stage in enumerate(bins):
        assert set(t[bin_of == number].tolist()) <= set(timesteps_of(stage, visited, PROCESS).tolist())


def test_measured_errors_pass_through_what_was_measured() -> None:
    errors = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    found = interpolated(errors, [1.0, 9.0], [0.5, 0.9])
    assert found[0] == 0
    assert found[1] == pytest.approx(0.5)
    assert found[3] == pytest.approx(0.9)
    assert 0.5 < float(found[2]) < 0.9
