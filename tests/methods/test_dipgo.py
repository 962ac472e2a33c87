"""DiP-GO in training and after: what trains, what resumes, what it leaves behind and who may use it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_prune
from lightning_prune.blocks import GateSchedule
from lightning_prune.callbacks import ArtifactWriter, EfficiencyReport, GateMap, ImageWriter, SampleGrid
from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export.gates import apply_gates, read_gates
from lightning_prune.methods.dipgo import DiPGO
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError
from lightning_prune.world import World
from tests.factories import fit, tiny_dit, tiny_unet
from tests.test_resume import SaveAt

PROCESS = Process(schedule="cosine", prediction="v")


def tiny_dipgo(**arguments: Any) -> DiPGO:
    """The budgeted search over the halves of the two-block DiT, four steps."""
    settings: dict[str, Any] = {
        "denoiser": tiny_dit(),
        "process": PROCESS,
        "sampler": Sampler(steps=4),
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.3),
        "granularity": "half",
        "budget": 0.5,
        "further_budgets": [0.7],
    }
    return DiPGO(**{**settings, **arguments})


def paper(**arguments: Any) -> DiPGO:
    settings: dict[str, Any] = {
        "denoiser": tiny_unet(), "granularity": "coarse", "cache_mode": "output", "preset": "paper", "loss": "ssim",
        "pruner": "queries", "selection": "greedy", "budget": 0.6, "further_budgets": None, "noises": 1,
    }  # fmt: skip
    return tiny_dipgo(**{**settings, **arguments})


@pytest.mark.parametrize("make", [tiny_dipgo, paper])
def test_only_the_pruner_trains_and_the_checkpoint_holds_nothing_else(make: Any, tmp_path: Path) -> None:
    module, fresh = make(), make()
    trainer = fit(module, tmp_path, max_steps=2)
    assert not any(p.requires_grad for p in module.denoiser.parameters())
    assert not module.denoiser.training
    frozen = fresh.denoiser.state_dict()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in module.denoiser.state_dict().items())
    changed = [not torch.equal(t, fresh.state_dict()[name]) for name, t in module.state_dict().items()]
    assert any(changed)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"pruner"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumed_in_mid_epoch_finds_the_same_scores_and_gates(precision: Any, tmp_path: Path) -> None:
    whole, resumed = tiny_dipgo(lr_schedule="cosine", noises=3), tiny_dipgo(lr_schedule="cosine", noises=3)
    fit(whole, tmp_path / "whole", max_steps=6, precision=precision)
    saving = SaveAt(3, tmp_path / "three.ckpt")
    part = tiny_dipgo(lr_schedule="cosine", noises=3)
    fit(part, tmp_path / "part", max_steps=6, callbacks=[saving], enable_checkpointing=True, precision=precision)
    torch.manual_seed(12345)
    fit(resumed, tmp_path / "resumed", tmp_path / "three.ckpt", max_steps=6, precision=precision)
    assert torch.equal(resumed.state_dict()["pruner.scores"], whole.state_dict()["pruner.scores"])
    assert resumed.schedules() == whole.schedules()


@pytest.mark.parametrize("steps", [4, 6])
def test_a_refined_schedule_is_no_worse_and_found_again_when_resumed(steps: int, tmp_path: Path) -> None:
    """Killed before the last step, or after it."""
    settings: dict[str, Any] = {"refine": 12, "reuse": "linear", "budget": 0.6, "further_budgets": None}
    whole, resumed = tiny_dipgo(**settings), tiny_dipgo(**settings)
    fit(whole, tmp_path / "whole", max_steps=6)
    saving = SaveAt(steps, tmp_path / "part.ckpt")
    fit(tiny_dipgo(**settings), tmp_path / "part", max_steps=6, callbacks=[saving], enable_checkpointing=True)
    fit(resumed, tmp_path / "resumed", tmp_path / "part.ckpt", max_steps=6)
    assert resumed.schedules() == whole.schedules()
    loss = whole.measured(list(whole._recent))
    refined = whole.schedules()["0.6"]
    whole._refined = {}
    assert loss(refined) < loss(whole.schedules()["0.6"])
    assert whole.costs.kept(refined.rows) <= 0.6
    assert refined.reuse == "linear"


def test_full_steps_alone_and_a_part_of_one(tmp_path: Path) -> None:
    module = tiny_dipgo(refine=6, full_steps=True, budget=0.6, further_budgets=None)
    fit(module, tmp_path, max_steps=3)
    rows = module.schedules()["0.6"].rows
    assert sum(any(row) and not all(row) for row in rows) <= 1
    assert module.costs.kept(rows) <= 0.6
    with pytest.raises(InputError, match=r"model\.full_steps: needs model\.refine"):
        tiny_dipgo(full_steps=True)


def test_scores_that_matter_rise(tmp_path: Path) -> None:
    """Feed-forward parts of a network whose attention adds nothing have to be preferred to attention."""
    denoiser = tiny_dit()
    with torch.no_grad():
        for block in denoiser.network.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
            block.attn1.to_out[0].bias.zero_()
            block.ff.net[2].weight.mul_(6)
            block.norm1.linear.bias.add_(1)
    module = tiny_dipgo(denoiser=denoiser, step_gates=False)
    fit(module, tmp_path, max_steps=12)
    scores = module.pruner().detach()[1:]
    assert scores[:, 1::2].mean() > scores[:, ::2].mean() + 0.3


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """Gates belong to samples, so processes that share a batch find what one would."""
    module = tiny_dipgo()
    fit(module, tmp_path, max_steps=1)
    batch = {"x": torch.zeros(4, 1, 32, 32), "cond": torch.arange(4), "id": torch.tensor([7, 3, 9, 1])}
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    module.train()

    def gradient(*parts: Any) -> torch.Tensor:
        module.zero_grad()
        for part in parts:
            (module.loss(part, torch.Generator())[0] / len(parts)).backward()
        found = module.pruner.scores.grad
        assert isinstance(found, torch.Tensor)
        return found.clone()

    whole = gradient(batch)
    # Scores move all gates through tau, whose terms nearly cancel: single precision leaves 1e-6 of the largest.
    torch.testing.assert_close(gradient(*halves), whole, rtol=1e-3, atol=2e-3 * float(whole.abs().max()))
    assert float(whole.abs().max()) > 0


def test_candidates_are_drawn_in_the_precision_of_what_they_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under mixed precision, too, the schedule that runs everything is the teacher's to the bit."""
    found = []

    def look(loss: Any, problem: Any, starts: Any, *_: Any) -> Any:
        found.append(loss(problem.schedule([problem.graph.full()] * problem.steps)))
        return tuple(map(tuple, starts[0]))

    monkeypatch.setattr("lightning_prune.methods.dipgo.module.refined", look)
    module = tiny_dipgo(refine=1, further_budgets=None)
    fit(module, tmp_path, max_steps=1, precision="bf16-mixed")
    assert found == [0.0]


def test_the_pruner_stays_in_single_precision(tmp_path: Path) -> None:
    class Look(Callback):
        kinds: set[torch.dtype]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.kinds = {p.dtype for p in pl_module.pruner.parameters()}
            assert next(pl_module.denoiser.parameters()).dtype == torch.bfloat16

    look = Look()
    fit(tiny_dipgo(), tmp_path, max_steps=1, precision="bf16-true", callbacks=[look])
    assert look.kinds == {torch.float32}


def test_controls_of_two_budgets_that_keep_as_many_steps_stand_beside_each_other() -> None:
    module = tiny_dipgo(sampler=Sampler(steps=8), budget=0.5, further_budgets=[0.6])
    torch.nn.init.normal_(module.pruner.scores)  # type: ignore[arg-type]
    rows = list(module.variants())
    assert [row for row in rows if row.startswith("ddim 4 steps")] == [
        "ddim 4 steps", "ddim 4 steps kept", "ddim 4 steps kept at 0.5",
    ]  # fmt: skip


def test_whole_steps_alone_are_said_in_the_report(tmp_path: Path) -> None:
    module = tiny_dipgo(further_budgets=None, budget=0.5)
    with torch.no_grad():
        module.pruner.scores.fill_(3.0)
        module.pruner.scores[1:3] = -9.0
    assert module.remarks() == [
        "dipgo 0.5 runs 2 of 4 steps in full and none in part: the sampler on these steps is what to beat"
    ]
    with torch.no_grad():
        module.pruner.scores[1, 0] = 20.0
        module.pruner.scores[1, -1] = 20.0
    module.budget = 0.6
    assert not module.schedules()["0.6"].skips_only_whole_steps()
    assert module.remarks() == []


def test_rows_keep_their_budgets_and_budgets_are_nested() -> None:
    module = tiny_dipgo(sampler=Sampler(steps=8), budget=0.4)
    torch.nn.init.normal_(module.pruner.scores)  # type: ignore[arg-type]
    rows = module.variants()
    assert list(rows) == [
        "dense",
        *("ddim 5 steps", "ddim 5 steps kept", "dpm-solver++ 5 steps", "dpm-solver++ 5 steps kept"),
        *("uniform-reuse 0.7", "random-gates 0.7"),
        "dipgo 0.7",
        *("ddim 3 steps", "ddim 3 steps kept", "dpm-solver++ 3 steps", "dpm-solver++ 3 steps kept"),
        *("uniform-reuse 0.4", "random-gates 0.4"),
        "dipgo 0.4",
    ]
    dense = trajectory_cost(rows["dense"].denoiser, PROCESS, Sampler(steps=8)).macs()
    for name, row in rows.items():
        kept = trajectory_cost(row.denoiser, PROCESS, row.sampler or Sampler(steps=8)).macs() / dense
        position = list(rows).index(name)
        assert kept <= (1 if position == 0 else 0.7 if position <= 7 else 0.4)
    large, small = (schedule.rows for schedule in module.schedules().values())
    assert all(a or not b for one, other in zip(large, small, strict=True) for a, b in zip(one, other, strict=True))
    assert module.kept_fraction()["aten"] <= 0.4


@pytest.mark.parametrize("selection", ["exact", "bisection", "greedy"])
def test_every_selection_keeps_the_budget(selection: str) -> None:
    module = paper(selection=selection, sampler=Sampler(steps=8))
    module.schedules()  # all scores equal
    torch.nn.init.normal_(module.pruner.heads.weights[-1])
    assert module.kept_fraction()["aten"] <= 0.6


# What it leaves behind


@pytest.fixture(scope="module", params=["dit", "unet"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    module = tiny_dipgo() if request.param == "dit" else paper()
    fit(module, folder, max_steps=1, callbacks=[ArtifactWriter(), GateMap(), SampleGrid(steps=4)])
    return module, folder


def draw(denoiser: Any, steps: int = 4) -> torch.Tensor:
    return sample_images(denoiser, PROCESS, torch.arange(3), torch.arange(3), Sampler(steps=steps))


def test_the_artifact_loads_as_the_result(finished: Any) -> None:
    module, folder = finished
    loaded: Any = lightning_prune.load(folder / "artifact")
    *_, result = module.variants().values()
    assert loaded.schedule == result.denoiser.schedule
    assert torch.equal(draw(loaded), draw(result.denoiser))
    stock = type(module.denoiser).network_class.from_pretrained(folder / "artifact", use_safetensors=True)
    dense = module.denoiser.network.state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in stock.state_dict().items())


def test_gates_json_has_the_schema(finished: Any) -> None:
    module, folder = finished
    content = json.loads((folder / "artifact" / "gates.json").read_text())
    assert content.keys() == {
        "schema", "fingerprint", "scheduler", "num_inference_steps", "guidance", "granularity", "cache_mode", "blocks",
        "gates", "budget", "macs_kept", "reuse", "block_macs", "network", "timesteps",
    }  # fmt: skip
    assert (content["num_inference_steps"], len(content["gates"])) == (4, 4)
    assert all(len(row) == len(content["blocks"]) and set(row) <= {0, 1} for row in content["gates"])
    assert 0 < content["macs_kept"]["aten"] <= content["budget"] == module.budget
    assert content["macs_kept"].keys() == {"aten", "module"}
    assert content["timesteps"] == module.problem.sampler.visited(PROCESS).tolist()


def test_pictures(finished: Any) -> None:
    module, folder = finished
    assert {p.stem for p in (folder / "gates").iterdir()} == {f"{budget:g}" for budget in module.budgets}
    assert (folder / "samples" / "final.png").exists()


def test_another_number_of_steps_is_refused_or_remapped(finished: Any) -> None:
    module, folder = finished
    loaded = lightning_prune.load(folder / "artifact")
    with pytest.raises(InputError, match="for 4 network calls, this sampler makes 6"):
        draw(loaded, 6)
    file = folder / "artifact" / "gates.json"
    with pytest.raises(InputError, match="for 4 network calls, not 6"):
        apply_gates(module.denoiser, file, PROCESS, Sampler(steps=6))
    stretched = apply_gates(module.denoiser, file, PROCESS, Sampler(steps=6), remap=True)
    assert torch.isfinite(draw(stretched, 6)).all()
    assert module.costs.kept(stretched.schedule.rows) <= module.kept_fraction()["aten"]


def test_further_budgets_have_schedules_of_their_own(finished: Any) -> None:
    module, folder = finished
    names = {f"gates-{budget:g}.json" for budget in module.further_budgets}
    assert {file.name for file in (folder / "artifact").glob("gates-*.json")} == names
    for budget in module.further_budgets:
        loaded: Any = lightning_prune.load(folder / "artifact", gates=f"gates-{budget:g}.json")
        assert loaded.schedule == module.schedules()[f"{budget:g}"] != module.schedules()[f"{module.budget:g}"]
        file = read_gates(folder / "artifact" / f"gates-{budget:g}.json")
        assert module.budget < file.macs_kept["aten"] <= file.budget == budget
    with pytest.raises(InputError, match=r"gates-0\.9\.json: no schedule of this artifact"):
        lightning_prune.load(folder / "artifact", gates="gates-0.9.json")


def test_another_network_solver_or_guidance_is_refused(finished: Any) -> None:
    module, folder = finished
    file = folder / "artifact" / "gates.json"
    other = tiny_dit(1) if module.problem.mode == "residual" else tiny_unet(1)
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(other, file, PROCESS, Sampler(steps=4))
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(other, file, PROCESS, Sampler(steps=6), remap=True)
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(module.denoiser, file, Process("linear", "v"), Sampler(steps=6), remap=True)
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(module.denoiser, file, PROCESS, Sampler(steps=4, guidance=2.0))
    with pytest.raises(InputError, match=r"for DDIM eta=0, trailing, not DPM-Solver\+\+"):
        apply_gates(module.denoiser, file, PROCESS, Sampler("dpm-solver++", 4))
    with pytest.raises(InputError, match="the schedule is for DDIM"):
        apply_gates(module.denoiser, file, Process("linear", "epsilon"), Sampler("dpm-solver++", 4))
    assert torch.isfinite(draw(apply_gates(module.denoiser, file, PROCESS, Sampler(steps=4)))).all()


def test_another_solver_of_equally_many_calls_is_refused(finished: Any, tmp_path: Path) -> None:
    module, folder = finished
    loaded = lightning_prune.load(folder / "artifact")
    other = Sampler("dpm-solver++", 4)
    message = r"the schedule is for DDIM eta=0, trailing, not DPM-Solver\+\+\(2M\), trailing"
    with pytest.raises(InputError, match=message):
        sample_images(loaded, PROCESS, torch.arange(2), torch.arange(2), other)
    file = folder / "artifact" / "gates.json"
    remapped = apply_gates(module.denoiser, file, PROCESS, other, remap=True)
    assert torch.isfinite(sample_images(remapped, PROCESS, torch.arange(2), torch.arange(2), other)).all()
    report = EfficiencyReport(sampler="dpm-solver++", steps=4, beside={"other": str(folder / "artifact")})
    with pytest.raises(InputError, match=message):  # before the run begins, not when it has ended
        fit(tiny_dipgo(sampler=other), tmp_path, callbacks=[report])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "newer than this version"),
        ({"gates": [[1, 1, 1, 1]]}, "1 rows of gates for 4 steps"),
        ({"gates": [[0, 1, 1, 1], *[[1] * 4] * 3]}, "first step runs in full"),
        ({"cache_mode": "none"}, "none of output, residual"),
        ({"blocks": ["A0"]}, "block_macs: 4 for 1 blocks|4 gates for 1 blocks"),
        ({"gates": [[1] * 4, [0.3, 1, 1, 1], *[[1] * 4] * 2]}, "gates: "),
        ({"gates": [[1] * 4, ["0", 1, 1, 1], *[[1] * 4] * 2]}, "gates: "),
        ({"gates": [[1] * 4, None, *[[1] * 4] * 2]}, "gates: "),
        ({"gates": 5}, "gates: 5"),
        ({"blocks": 7}, "blocks: 7"),
        ({"scheduler": 3}, "scheduler: 3"),
        ({"budget": float("nan")}, "budget: NaN"),
        ({"guidance": "a"}, 'guidance: "a"'),
        ({"macs_kept": {"aten": None}}, "macs_kept"),
        ({"block_macs": {"blocks": [1, 2]}}, "block_macs: not MACs"),
        ({"network": []}, "network"),
    ],
)
def test_damaged_gates_name_the_file(change: Any, message: str, tmp_path: Path) -> None:
    module = tiny_dipgo()
    file = tmp_path / "gates.json"
    text = module.artifact_files()["gates.json"]
    file.write_text(text)
    assert isinstance(read_gates(file).schedule, GateSchedule)
    file.write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(InputError, match=rf"gates\.json: .*{message}"):
        read_gates(file)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": Sampler(steps=1)}, "1 step leaves nothing to reuse"),
        ({"budget": 1.5}, r"1\.5 is not in \(0, 1\]"),
        ({"budget": 0.1}, r"0\.1 is out of reach"),
        ({"further_budgets": [0.01]}, r"0\.01 is out of reach"),
        ({"granularity": "coarse"}, "'coarse': this transformer has block and half"),
        ({"cache_mode": "output"}, "half has residual"),
        ({"temperature": 0.0}, "temperature"),
        ({"noises": 0}, "noises"),
        ({"collapse_weight": -1.0}, "collapse_weight"),
        ({"collapse_weight": 1.0, "preset": "paper"}, r"collapse_weight: has no gradient"),
        ({"selection": "greedy"}, r"selection: greedy knows neither gates of steps"),
        ({"selection": "bisection", "preset": "paper", "whole_steps": False}, r"selection: bisection knows neither"),
        ({"further_budgets": [2.0]}, r"model\.further_budgets: 2 is not in"),
        ({"budget_range": (0.01, 0.02)}, r"budget_range: ends at 0\.02, but the first step alone takes 0\.25"),
        ({"teacher_steps": 3}, "teacher_steps: 3 is less than the sampler's own 4"),
        ({"teacher_steps": 2000}, "teacher_steps: .*2000 sampling steps, but the process has 1000"),
        ({"collapse_weight": math.nan}, "collapse_weight: nan"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"cost_weight": -5.0}, "cost_weight: -5"),
        ({"refine": -3}, "refine: -3"),
        *[
            ({"budget_range": found}, "budget_range")
            for found in ((0.9, 0.1), (5.0, 7.0), (-1.0, 0.1), (math.nan, 1.0))
        ],
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_dipgo(**arguments)


def test_callbacks_that_draw_with_another_sampler_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SampleGrid draws by DDIM eta=0, trailing, 10 steps.*model\.sampler is .*4"):
        fit(tiny_dipgo(), tmp_path, callbacks=[SampleGrid()])
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[SampleGrid()], default_root_dir=tmp_path
    )
    with pytest.raises(InputError, match="SampleGrid draws by DDIM eta=0, trailing, 10 steps"):
        trainer.test(tiny_dipgo(), datamodule=EmbeddedFashion(batch_size=8), verbose=False)


def test_predict_draws_the_result_by_its_own_sampler_and_by_no_other(tmp_path: Path) -> None:
    module, data = tiny_dipgo(), EmbeddedFashion(batch_size=8)
    drawn = predictor(tmp_path, ImageWriter()).predict(module, data)
    assert drawn
    ids, images = drawn[0]
    schedule = module.schedules()["0.5"]
    batch = next(iter(data.predict_dataloader()))
    wanted = sample_images(gated(module.denoiser, schedule, PROCESS), PROCESS, ids, batch["cond"], Sampler(steps=4))
    assert torch.equal(images, wanted)
    assert len(list((tmp_path / "predictions").glob("*.png"))) == len(ids)
    for other in (ImageWriter(steps=3), ImageWriter(guidance=2.0), ImageWriter(sampler="dpm-solver++")):
        with pytest.raises(InputError, match=r"trainer\.callbacks: ImageWriter draws by .*model\.sampler is .*4 steps"):
            predictor(tmp_path, other).predict(tiny_dipgo(), data)


def predictor(folder: Path, writer: ImageWriter) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder}
    return pl.Trainer(accelerator="cpu", limit_predict_batches=1, callbacks=[writer], **quiet)  # type: ignore[arg-type]


# Controls that a sampler or a process does not have

FLOW: dict[str, Any] = {"process": Process("flow", "flow", clip_sample=False), "sampler": Sampler("flow-euler", 4)}
PLMS: dict[str, Any] = {"process": Process("linear", "epsilon", clip_sample=False), "sampler": Sampler("plms", 7)}


def test_controls_are_those_there_are() -> None:
    rules = ["uniform-reuse", "random-gates"]
    # Lines are drawn through even steps, too.
    assert tiny_dipgo(reuse="linear").compare[-1] == "whole-steps"
    assert tiny_dipgo(sampler=Sampler("dpm-solver++", 4)).compare == ["fewer-steps", "kept-steps", *rules]
    assert tiny_dipgo(**FLOW).compare == ["fewer-steps", *rules]
    assert tiny_dipgo(**PLMS).compare == ["fewer-steps", "dpm-solver++", *rules]
    assert len(tiny_dipgo().compare) == 6


@pytest.mark.parametrize(
    ("setting", "name", "message"),
    [
        (FLOW, "kept-steps", "flow-euler takes no list of timesteps"),
        (FLOW, "dpm-solver++", r"dpm-solver\+\+ cannot sample a flow process"),
        (FLOW, "dpm-solver++-kept", ""),
        (PLMS, "kept-steps", "plms takes no list of timesteps"),
        (PLMS, "dpm-solver++-kept", "plms takes no list of timesteps"),
    ],
)
def test_a_control_that_there_is_not_is_refused_at_once(setting: Any, name: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.compare: {re.escape(name)}: .*{message}"):
        tiny_dipgo(**setting, compare=[name])


def test_a_flow_is_searched_to_its_end(tmp_path: Path) -> None:
    module = tiny_dipgo(**FLOW)
    fit(module, tmp_path, max_steps=1, callbacks=[ArtifactWriter()])
    names = [name for budget in ("0.7", "0.5") for name in (f"uniform-reuse {budget}", f"random-gates {budget}")]
    assert {*names, "flow-euler 2 steps", "dipgo 0.5"} <= {*module.variants()}
    assert (tmp_path / "artifact" / "gates.json").exists()


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_fewer_steps_cost_no_more_than_the_budget_where_calls_are_more_than_steps(budget: float) -> None:
    module = tiny_dipgo(**PLMS, budget=budget, further_budgets=None, compare=["fewer-steps"])
    dense, fewer, _ = module.variants().values()
    assert fewer.sampler is not None
    calls = fewer.sampler.calls(PLMS["process"])
    assert calls <= budget * PLMS["sampler"].calls(PLMS["process"]) < calls + 2
    assert fewer.denoiser is dense.denoiser


# Refinement that does not come about, or was for something else


def test_a_budget_that_was_not_refined_is_named(tmp_path: Path) -> None:
    module = tiny_dipgo(refine=1)
    fit(module, tmp_path, max_steps=1)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    other, fewer = tiny_dipgo(budget=0.6, further_budgets=[0.5]), tiny_dipgo(budget=0.7, further_budgets=None)
    other.on_load_checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"model\.budget: 0\.6 is none of the budgets that were refined, 0\.7, 0\.5"):
        other.variants()
    fewer.on_load_checkpoint(checkpoint)
    assert fewer.schedules() == {"0.7": module.schedules()["0.7"]}


def test_a_fit_that_ends_before_its_refinement_is_refused_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_prune.methods.dipgo.module.rank_zero_warn", said.append)
    with pytest.raises(
        InputError, match=r"model\.refine: follows step 9, but trainer\.max_epochs ends the fit at step 2"
    ):
        fit(tiny_dipgo(refine=1), tmp_path, max_steps=9, max_epochs=1, limit_train_batches=2)

    class Enough(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    fit(tiny_dipgo(refine=1), tmp_path, max_steps=3, callbacks=[Enough()])
    assert said == ["model.refine: the fit ended at step 1 of 3, so the result is not refined"]
    fit(tiny_dipgo(refine=1), tmp_path, max_steps=1)
    assert len(said) == 1


# Processes


def test_every_process_gets_back_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_dipgo(refine=1)
    fit(module, tmp_path, max_steps=3)
    own = [batch["id"].tolist() for batch in module._recent]

    def both(self: World, part: Any) -> list[Any]:
        """This process' part and that of another, whose batches came in another order and whose images differ."""
        if isinstance(part, list):
            return [part, part[::-1]]
        return [part, {"keys": part["keys"] + 100_000, "images": -part["images"]}]

    checkpoint: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(World, "gather", both)
        module.on_save_checkpoint(checkpoint)

    def restored(rank: int, size: int) -> DiPGO:
        fresh = tiny_dipgo(refine=1)
        with monkeypatch.context() as patch:
            patch.setattr(World, "current", lambda: World(rank, size))
            fresh.on_load_checkpoint(checkpoint)
        return fresh

    found = [restored(rank, 2) for rank in (0, 1)]
    assert [[batch["id"].tolist() for batch in one._recent] for one in found] == [own, own[::-1]]
    assert found[0].teacher._kept.keys() == module.teacher._kept.keys()
    assert found[0].teacher._kept.keys().isdisjoint(found[1].teacher._kept)
    alone = restored(0, 1)
    assert len(alone.teacher._kept) == 2 * len(module.teacher._kept)
    assert [batch["id"].tolist() for batch in alone._recent] == [own[1], own[1], own[2], own[0]]
    assert [[batch["id"].tolist() for batch in restored(rank, 3)._recent] for rank in range(3)] == [
        [own[0], own[1]], [own[2], own[2]], [own[1], own[0]],
    ]  # fmt: skip


def test_plms_that_visits_a_timestep_twice_is_searched_by_its_calls(tmp_path: Path) -> None:
    process = Process("linear", "epsilon", clip_sample=False)
    module = tiny_dipgo(process=process, sampler=Sampler("plms", 4), compare=["random-gates"])
    fit(module, tmp_path, max_steps=1)
    *_, result = module.variants().values()
    assert len(result.denoiser.schedule.rows) == 5  # type: ignore[arg-type]
    images = module.sample_images(torch.arange(2), torch.arange(2), Sampler("plms", 4))
    assert torch.isfinite(images).all()


def test_a_teacher_of_more_steps_draws_what_is_compared_with() -> None:
    module, ids = tiny_dipgo(teacher_steps=9), torch.arange(2)
    wanted = sample_images(module.denoiser, PROCESS, ids, ids, Sampler(steps=9), module._noise_seed)
    assert torch.equal(module.teacher.images(ids, ids, ids), wanted)
    assert not torch.equal(wanted, tiny_dipgo().teacher.images(ids, ids, ids))


# What a checkpoint, a budget and a sampler are of


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 5},
        {"denoiser": tiny_dit(3)},
        {"sampler": Sampler("dpm-solver++", 4)},
        {"reuse": "linear"},
        {"noises": 2},
    ],
)
def test_a_checkpoint_of_another_search_is_refused(other: Any) -> None:
    checkpoint: dict[str, Any] = {}
    tiny_dipgo().on_save_checkpoint(checkpoint)
    tiny_dipgo(budget=0.6).on_load_checkpoint(checkpoint)
    with pytest.raises(InputError, match="ckpt_path: the checkpoint is of a search over another network"):
        tiny_dipgo(**other).on_load_checkpoint(checkpoint)


def test_scores_that_are_no_numbers_rank_nothing(tmp_path: Path) -> None:
    module = tiny_dipgo()
    with torch.no_grad():
        module.pruner.scores.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        module.schedules()
    broken = tiny_dipgo()
    broken.denoiser.network.proj_out_2.bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="loss is nan at step 0"):
        fit(broken, tmp_path, max_steps=1)


def test_a_budget_keeps_its_value(tmp_path: Path) -> None:
    """A third of thirty steps is ten, whatever its name."""
    module = tiny_dipgo(sampler=Sampler(steps=30), budget=1 / 3, further_budgets=[1 / 3 + 1e-9])
    assert len(module.schedules()) == 2
    assert "ddim 10 steps" in module.variants()
    files = module.artifact_files()
    assert json.loads(files["gates.json"])["budget"] == 1 / 3
    assert all(json.loads(text)["macs_kept"]["aten"] <= json.loads(text)["budget"] for text in files.values())


def test_an_artifact_knows_its_guidance_and_process(finished: Any) -> None:
    _, folder = finished
    loaded = lightning_prune.load(folder / "artifact")
    ids = torch.arange(2)
    with pytest.raises(InputError, match=r"for no guidance \(scale 1\), not guidance"):
        sample_images(loaded, PROCESS, ids, ids, Sampler(steps=4, guidance=7.5))
    with pytest.raises(InputError, match="the schedule is for beta_schedule"):
        sample_images(loaded, Process("linear", "v"), ids, ids, Sampler(steps=4))


def test_gates_nothing_reads_are_refused(finished: Any, tmp_path: Path) -> None:
    module, folder = finished
    if module.problem.graph.independent:
        return
    content = json.loads((folder / "artifact" / "gates.json").read_text())
    content["gates"][1] = [*[1] * (len(content["blocks"]) - 1), 0]
    file = tmp_path / "gates.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="gates of step 1 are open for blocks that nothing reads"):
        apply_gates(module.denoiser, file, PROCESS)


# Budgets of seconds


def slow_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention parts take nine times as long as the others, by a clock that counts what runs."""

    def medians(arms: Any, repeats: int) -> dict[str, float]:
        return {name: 1.0 if not name else 0.55 if name.startswith("A") else 0.95 for name in arms}

    monkeypatch.setattr("lightning_prune.metrics.block_costs.interleaved_medians", medians)


def test_budgets_of_seconds_are_kept_and_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_attention(monkeypatch)
    settings: dict[str, Any] = {"budget_of": "seconds", "refine": 4, "reuse": "linear", "step_gates": False}
    module = tiny_dipgo(**settings)
    saving = SaveAt(1, tmp_path / "one.ckpt")
    fit(module, tmp_path / "whole", max_steps=2, callbacks=[saving, ArtifactWriter()], enable_checkpointing=True)
    content = json.loads((tmp_path / "whole" / "artifact" / "gates.json").read_text())
    share = {"A": 0.45, "F": 0.05}
    spent = sum(share[n[0]] for row in content["gates"] for n, gate in zip(content["blocks"], row, strict=True) if gate)
    assert content["seconds_kept"] == pytest.approx(spent / 4, abs=1e-6)
    assert 0.5 - 0.45 / 4 < content["seconds_kept"] <= 0.5
    assert content["macs_kept"]["aten"] == module.costs.kept(module.schedules()["0.5"].rows) != content["seconds_kept"]
    monkeypatch.setattr("lightning_prune.methods.dipgo.module.timed_costs", None)  # another day it would say another
    resumed = tiny_dipgo(**settings)
    fit(resumed, tmp_path / "resumed", tmp_path / "one.ckpt", max_steps=2)
    assert resumed.schedules() == module.schedules()


def test_seconds_are_measured_of_real_calls(tmp_path: Path) -> None:
    module = tiny_dipgo(
        budget_of="seconds", budget=1.0, further_budgets=None
    )  # in reach, whatever a busy machine times
    fit(module, tmp_path, max_steps=1)
    costs = module.problem.costs
    assert costs.dense > 0
    assert costs != module.costs
    assert sum(costs.blocks) <= costs.dense


# Latents


class Halving(EmbeddedFashion):
    """Images for latents, with a decoder that shows their left halves alone."""

    class Decoder:
        def to(self, device: Any) -> Any:
            return self

        def decode(self, latents: torch.Tensor, gradients: bool = False) -> torch.Tensor:
            with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                return latents[..., :16] * 1.0

    decoder = Decoder()


def test_the_loss_may_be_of_decoded_pictures(tmp_path: Path) -> None:
    module = tiny_dipgo(decode=True)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=1, default_root_dir=tmp_path
    )
    trainer.fit(module, datamodule=Halving(batch_size=4))
    samples, dense = torch.zeros(2, 1, 32, 32, requires_grad=True), torch.ones(2, 1, 32, 32)
    (gradient,) = torch.autograd.grad(module._consistency(samples, dense), samples)
    assert gradient[..., :16].abs().min() > 0
    assert not gradient[..., 16:].any()
    with pytest.raises(InputError, match=r"model\.decode: the data has no decoder"):
        fit(tiny_dipgo(decode=True), tmp_path, max_steps=1)
