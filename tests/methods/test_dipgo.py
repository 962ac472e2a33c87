"""DiP-GO in training and after: what trains, what resumes, what it leaves behind and who may use it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_prune
from lightning_prune.blocks import GateSchedule
from lightning_prune.callbacks import ArtifactWriter, GateMap, SampleGrid
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export.gates import apply_gates, read_gates
from lightning_prune.methods.dipgo import DiPGO
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError
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


def test_resumed_in_mid_epoch_finds_the_same_scores_and_gates(tmp_path: Path) -> None:
    whole, resumed = tiny_dipgo(lr_schedule="cosine", noises=3), tiny_dipgo(lr_schedule="cosine", noises=3)
    fit(whole, tmp_path / "whole", max_steps=6)
    saving = SaveAt(3, tmp_path / "three.ckpt")
    part = tiny_dipgo(lr_schedule="cosine", noises=3)
    fit(part, tmp_path / "part", max_steps=6, callbacks=[saving], enable_checkpointing=True)
    torch.manual_seed(12345)
    fit(resumed, tmp_path / "resumed", tmp_path / "three.ckpt", max_steps=6)
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
        "gates", "budget", "macs_kept", "reuse",
    }  # fmt: skip
    assert (content["num_inference_steps"], len(content["gates"])) == (4, 4)
    assert all(len(row) == len(content["blocks"]) and set(row) <= {0, 1} for row in content["gates"])
    assert 0 < content["macs_kept"]["aten"] <= content["budget"] == module.budget
    assert content["macs_kept"].keys() == {"aten", "module"}


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


def test_another_network_solver_or_guidance_is_refused(finished: Any) -> None:
    module, folder = finished
    file = folder / "artifact" / "gates.json"
    other = tiny_dit(1) if module.problem.mode == "residual" else tiny_unet(1)
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(other, file, PROCESS, Sampler(steps=4))
    with pytest.raises(InputError, match="other weights, another process or another kind of guidance"):
        apply_gates(module.denoiser, file, PROCESS, Sampler(steps=4, guidance=2.0))
    with pytest.raises(InputError, match=r"for DDIM eta=0, trailing, not DPM-Solver\+\+"):
        apply_gates(module.denoiser, file, PROCESS, Sampler("dpm-solver++", 4))
    with pytest.raises(InputError, match="the schedule is for DDIM"):
        apply_gates(module.denoiser, file, Process("linear", "epsilon"), Sampler("dpm-solver++", 4))
    assert torch.isfinite(draw(apply_gates(module.denoiser, file, PROCESS, Sampler(steps=4)))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "newer than this version"),
        ({"gates": [[1, 1, 1, 1]]}, "1 rows of gates for 4 steps"),
        ({"gates": [[0, 1, 1, 1], *[[1] * 4] * 3]}, "first step runs in full"),
        ({"cache_mode": "none"}, "none of output, residual"),
        ({"blocks": ["A0"]}, "4 gates for 1 blocks"),
    ],
)
def test_damaged_gates_name_the_file(change: Any, message: str, tmp_path: Path) -> None:
    module = tiny_dipgo()
    file = tmp_path / "gates.json"
    (text,) = module.artifact_files().values()
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
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_dipgo(**arguments)


def test_callbacks_that_draw_with_another_sampler_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SampleGrid draws by DDIM eta=0, trailing, 10 steps.*model\.sampler is .*4"):
        fit(tiny_dipgo(), tmp_path, callbacks=[SampleGrid()])


def test_plms_that_visits_a_timestep_twice_is_searched_by_its_calls(tmp_path: Path) -> None:
    process = Process("linear", "epsilon", clip_sample=False)
    module = tiny_dipgo(process=process, sampler=Sampler("plms", 4), compare=["random-gates"])
    fit(module, tmp_path, max_steps=1)
    *_, result = module.variants().values()
    assert len(result.denoiser.schedule.rows) == 5  # type: ignore[arg-type]
    images = module.sample_images(torch.arange(2), torch.arange(2), Sampler("plms", 4))
    assert torch.isfinite(images).all()
