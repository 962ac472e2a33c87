"""Schedules in stock diffusers pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from lightning_prune.blocks import GateSchedule
from lightning_prune.diffusion.gated import gated
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import integrate
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export.gates import GateFile, fingerprint, solver_config
from lightning_prune.export.pipelines import disable_gates, enable_gates
from lightning_prune.protocols import InputError
from tests.factories import UNET_CONFIG

PROCESS = Process("linear", "epsilon", clip_sample=False)
SAMPLER = Sampler(steps=4)


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
    file.write_text(GateFile(schedule, mark, config, 1.0, 0.7, {"aten": 0.6}).text())
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
    assert type(pipe.unet).__name__ == "UNet2DModel"


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
    other = DDIMPipeline(unet=pipe.unet, scheduler=DDIMScheduler(prediction_type="v_prediction"))
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
        (DPMSolverMultistepScheduler(timestep_spacing="trailing"), r"DPM-Solver\+\+\(2M\), trailing"),
        (DDIMScheduler(timestep_spacing="leading"), "DDIM eta=0, leading"),
        (HeunDiscreteScheduler(), "HeunDiscreteScheduler"),
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
