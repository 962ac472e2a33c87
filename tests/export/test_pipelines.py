"""Schedules in stock diffusers pipelines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UNet2DModel

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import begin, gated
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import integrate
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export.gates import GateFile, fingerprint, network_of, read_gates, solver_config
from lightning_prune.export.pipelines import disable_gates, enable_gates
from lightning_prune.metrics.block_costs import traced_costs
from lightning_prune.protocols import InputError
from tests.factories import UNET_CONFIG

PROCESS = Process("linear", "epsilon", clip_sample=False)
SAMPLER = Sampler(steps=4)
BETAS: dict[str, Any] = {k: v for k, v in PROCESS.scheduler_config.items() if k != "clip_sample"}


@pytest.fixture
def pipeline() -> Any:
    return make_pipeline(PROCESS)


def make_pipeline(process: Process) -> Any:
    torch.manual_seed(0)
    denoiser = UNet2D(config=UNET_CONFIG | {"num_class_embeds": None}).eval()
    scheduler = DDIMScheduler(**process.scheduler_config, timestep_spacing="trailing")
    found = DDIMPipeline(unet=denoiser.network, scheduler=scheduler)
    found.set_progress_bar_config(disable=True)
    return found, denoiser


def write(denoiser: UNet2D, folder: Path, gates: Any, process: Process = PROCESS, reuse: Any = "last") -> Path:
    schedule = GateSchedule.of(denoiser.blocks("coarse"), "output", gates, reuse)
    config = solver_config(SAMPLER, process)
    mark = fingerprint(denoiser, config, 4, 1.0)
    file = folder / "gates.json"
    costs = traced_costs(denoiser, "coarse", "output")
    about: dict[str, Any] = {"network": network_of(denoiser), "timesteps": tuple(SAMPLER.visited(process).tolist())}
    found = GateFile(schedule, mark, config, 1.0, 0.7, {"aten": 0.6}, costs, **about)
    file.write_text(found.text())
    return file


def draw(pipeline: Any, steps: int = 4) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images


GATES = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]


@pytest.mark.parametrize("reuse", ["last", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_pipeline_under_gates_gives_what_the_denoiser_gives(prediction: Any, reuse: Any, tmp_path: Path) -> None:
    process = Process("linear", prediction, clip_sample=False)
    pipe, denoiser = make_pipeline(process)
    file = write(denoiser, tmp_path, GATES, process, reuse)
    before = draw(pipe)
    pruned: Any = gated(denoiser, GateSchedule.of(denoiser.blocks("coarse"), "output", GATES, reuse), process)
    begin(pruned, SAMPLER, process)
    noise = torch.randn((2, 1, 32, 32), generator=torch.Generator().manual_seed(3))
    ours = integrate(pruned, process, noise, torch.zeros(2), SAMPLER, lambda index: pruned.at_step(index, 4))
    enable_gates(pipe, file)
    images = draw(pipe)
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    np.testing.assert_array_equal(draw(pipe), images, err_msg="a second trajectory starts afresh")
    assert np.abs(images - before).max() > 1e-3
    disable_gates(pipe)
    np.testing.assert_array_equal(draw(pipe), before)
    assert type(pipe.unet) is UNet2DModel


def test_another_number_of_steps_is_refused_unless_remapped(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    enable_gates(pipe, file)
    with pytest.raises(InputError, match="for 4 network calls, not 6"):
        draw(pipe, 6)
    enable_gates(pipe, file, remap_to=6)
    assert np.isfinite(draw(pipe, 6)).all()


def test_another_process_or_network_is_refused(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    other = DDIMPipeline(unet=pipe.unet, scheduler=scheduler)
    with pytest.raises(
        InputError, match="found for prediction_type epsilon, the pipeline's scheduler has v_prediction"
    ):
        enable_gates(other, file)
    text = file.read_text().replace('"U0"', '"X"')
    file.write_text(text)
    with pytest.raises(InputError, match="are not the network's"):
        enable_gates(pipe, file)
    with pytest.raises(InputError, match="has neither of transformer, unet"):
        enable_gates(object(), file)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"), r"DPM-Solver\+\+\(2M\), trailing"),
        (DDIMScheduler(**BETAS, timestep_spacing="leading", clip_sample=False), "DDIM eta=0, leading"),
        (HeunDiscreteScheduler(**BETAS), "HeunDiscreteScheduler"),
        (DPMSolverMultistepScheduler(**BETAS, solver_order=3), "DPMSolverMultistepScheduler of solver_order 3"),
        (
            DPMSolverMultistepScheduler(**BETAS, euler_at_final=True),
            "DPMSolverMultistepScheduler of euler_at_final True",
        ),
    ],
)
def test_another_solver_is_refused_unless_remapped(pipeline: Any, tmp_path: Path, scheduler: Any, said: str) -> None:
    _, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    pipe = DDIMPipeline(unet=denoiser.network, scheduler=DDIMScheduler())
    pipe.scheduler = scheduler
    with pytest.raises(InputError, match=f"found for DDIM eta=0, trailing, the pipeline's scheduler is {said};"):
        enable_gates(pipe, file)
    enable_gates(pipe, file, remap_to=6)
    disable_gates(pipe)


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_a_solver_that_visits_other_timesteps_is_refused_unless_remapped(name: str, tmp_path: Path) -> None:
    pipe, denoiser = make_pipeline(PROCESS)
    text = write(denoiser, tmp_path, GATES).read_text()
    words = Sampler("dpm-solver++", steps=4).describe()
    (file := tmp_path / "dpm.json").write_text(text.replace(SAMPLER.describe(), words))
    for own, refused in ({}, False), ({name: True}, True):
        pipe.scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", **own)
        enable_gates(pipe, file)
        if refused:
            with pytest.raises(InputError, match=r"timesteps: step \d is at .* found with it at .* remap_to runs it"):
                draw_by(pipe)
        else:
            draw_by(pipe)
    enable_gates(pipe, file, remap_to=4)
    draw_by(pipe)


def draw_by(pipe: Any) -> None:
    """A trajectory of a scheduler that DDIM's pipeline does not take."""
    pipe.scheduler.set_timesteps(4)
    x = torch.randn((1, 1, 32, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample


class Broken(Exception):
    """What breaks a trajectory off."""


def test_after_a_trajectory_that_was_broken_off_the_next_begins_afresh(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    enable_gates(pipe, write(denoiser, tmp_path, GATES))
    whole = draw(pipe)
    step, calls = pipe.scheduler.step, iter([False, False, True])

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if next(calls, False):
            raise Broken
        return step(*args, **kwargs)

    pipe.scheduler.step = breaking
    with pytest.raises(Broken):
        draw(pipe)
    np.testing.assert_array_equal(draw(pipe), whole)


def test_a_part_of_a_trajectory_and_further_calls_are_refused(pipeline: Any, tmp_path: Path) -> None:
    """As image-to-image begins in the middle, and guidance may call twice a step."""
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    enable_gates(pipe, file)
    pipe.scheduler.set_timesteps(4)
    x, (first, second, *_) = torch.randn(2, 1, 32, 32), pipe.scheduler.timesteps
    with pytest.raises(InputError, match=r"timestep: 749 in call 1 of step 0, which is at 999.*calls_a_step"):
        pipe.unet(x, second)
    pipe.unet(x, first)
    with pytest.raises(InputError, match="timestep: 999 in call 1 of step 1, which is at 749"):
        pipe.unet(x, first)
    enable_gates(pipe, file, calls_a_step=2)
    for t in pipe.scheduler.timesteps:
        assert torch.equal(pipe.unet(x, t).sample, pipe.unet(x, t).sample)
    with pytest.raises(InputError, match="calls_a_step: 0"):
        enable_gates(pipe, file, calls_a_step=0)


def test_a_scheduler_that_comes_later_is_checked_too(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    enable_gates(pipe, write(denoiser, tmp_path, GATES))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match=r"found for DDIM eta=0, trailing, the pipeline's scheduler is DPM-Solver\+\+"):
        draw(pipe)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"num_train_timesteps": 500}, "num_train_timesteps 1000"), ({"beta_end": 0.3}, "beta_end 0.02"),
     ({"clip_sample": True}, "clip_sample False")],
)  # fmt: skip
def test_another_noise_schedule_is_refused(pipeline: Any, tmp_path: Path, settings: Any, named: str) -> None:
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(InputError, match=f"found for {named}, the pipeline's scheduler has"):
        enable_gates(pipe, file)


def test_another_architecture_with_blocks_of_the_same_names_is_refused(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    wide = UNET_CONFIG | {"num_class_embeds": None, "block_out_channels": [32, 64]}
    other = DDIMPipeline(unet=UNet2D(config=wide).network, scheduler=pipe.scheduler)
    with pytest.raises(InputError, match=r"found for a network of block_out_channels .*, not \[32, 64\]"):
        enable_gates(other, file)
    content = json.loads(file.read_text())
    content["network"]["config"]["a_key_of_another_version"] = 3
    file.write_text(json.dumps(content))
    enable_gates(pipe, file)


def test_hooks_that_hide_the_gates_are_refused(pipeline: Any, tmp_path: Path) -> None:
    """As offloading to the CPU replaces `forward` of what it moves."""
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    for part in (pipe.unet, pipe.unet.mid_block):
        part.forward = part.forward
        with pytest.raises(InputError, match="something has hooked its forward"):
            enable_gates(pipe, file)
        assert type(pipe.unet) is UNet2DModel
        del part.forward
    enable_gates(pipe, file)
    pipe.unet.forward = pipe.unet.forward
    with pytest.raises(InputError, match="remove those hooks first"):
        disable_gates(pipe)
    del pipe.unet.forward
    disable_gates(pipe)
    assert type(pipe.unet) is UNet2DModel


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"rescale_betas_zero_snr": True}, {}])
def test_steps_skipped_as_a_whole_leave_the_plain_sampler_on_the_others(
    prediction: Any, settings: Any, tmp_path: Path
) -> None:
    """With diffusers' own DDIM, which clips x_0 and goes on with the noise from before."""
    if prediction == "epsilon" and "rescale_betas_zero_snr" in settings:
        return  # at zero signal noise says nothing of x_0
    process = Process("linear", prediction, clip_sample=settings.get("clip_sample", False))
    pipe, denoiser = make_pipeline(process)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    rows = [[1] * 5, [0] * 5, [1] * 5, [0] * 5, [0] * 5]
    schedule = GateSchedule.of(denoiser.blocks("coarse"), "output", rows)
    file = tmp_path / "gates.json"
    config = {**solver_config(SAMPLER, process)}
    file.write_text(GateFile(schedule, "", config, 1.0, 0.5, {"aten": 0.4}).text())
    enable_gates(pipe, file)
    images = draw(pipe, 5)
    disable_gates(pipe)
    scheduler, x = pipe.scheduler, torch.randn((2, 1, 32, 32), generator=torch.Generator().manual_seed(3))
    alphas, visited = scheduler.alphas_cumprod, [*scheduler.timesteps.tolist()]
    for now, following in ((visited[0], visited[2]), (visited[2], None)):
        with torch.no_grad():
            output = denoiser.network(x, now).sample
        a, s = alphas[now].sqrt(), (1 - alphas[now]).sqrt()
        x0 = a * x - s * output if prediction == "v" else (x - s * output) / a
        noise = a * output + s * x if prediction == "v" else output
        x0 = x0.clamp(-1, 1) if scheduler.config.clip_sample else x0
        x = x0 if following is None else alphas[following].sqrt() * x0 + (1 - alphas[following]).sqrt() * noise
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=2e-4)


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@torch._dynamo.config.patch(recompile_limit=8)  # which some libraries raise when they are imported
@pytest.mark.parametrize("whole", [True, False])
def test_a_pipeline_compiles_a_graph_for_every_pattern(tmp_path: Path, whole: bool) -> None:
    """In more steps than the compiler makes graphs of one function; a network compiled as a whole runs uncompiled."""
    pipe, denoiser = make_pipeline(PROCESS)
    rows = [[1] * 5, *[[1, 0, 0, 0, 1], [0] * 5, [1, 1, 0, 1, 1], [1] * 5] * 5]
    schedule = GateSchedule.of(denoiser.blocks("coarse"), "output", rows)
    file = tmp_path / "gates.json"
    file.write_text(GateFile(schedule, "", solver_config(SAMPLER, PROCESS), 1.0, 0.9, {"aten": 0.8}).text())
    enable_gates(pipe, file)
    eager = draw(pipe, 21)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if whole:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile_paths(backend="eager", fullgraph=True)
    np.testing.assert_allclose(draw(pipe, 21), eager, atol=1e-5)
    # A pattern's first call may see fewer stored values than those after it.
    assert compiled_graphs() == 0 if whole else 3 <= compiled_graphs() <= 5
    before = compiled_graphs()
    draw(pipe, 21)
    assert compiled_graphs() == before
    disable_gates(pipe)
    assert type(getattr(pipe.unet, "_orig_mod", pipe.unet)) is UNet2DModel


def test_files_without_costs_say_so_when_they_are_remapped(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    file = write(denoiser, tmp_path, GATES)
    content = json.loads(file.read_text())
    costs = traced_costs(denoiser, "coarse", "output")
    enable_gates(pipe, file, remap_to=7)
    assert costs.kept(pipe.unet.schedule.rows) <= costs.kept(read_gates(file).schedule.rows)
    del content["block_macs"]
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="does not say what blocks cost"):
        enable_gates(pipe, file, remap_to=7)


def test_what_is_saved_under_gates_has_the_name_of_its_class(pipeline: Any, tmp_path: Path) -> None:
    pipe, denoiser = pipeline
    enable_gates(pipe, write(denoiser, tmp_path, GATES))
    pipe.save_pretrained(tmp_path / "saved")
    assert type(DDIMPipeline.from_pretrained(tmp_path / "saved").unet) is UNet2DModel
