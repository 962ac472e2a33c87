"""Stages by step index: the right network at every boundary, tensors held once, costs and artifacts of the whole."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

import lightning_prune
from lightning_prune.diffusion.models import Denoiser, families
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.routing import PipelineRouter, StagedDenoiser, stage_of_step
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import save_artifact
from lightning_prune.export.staged import FILE
from lightning_prune.metrics.trajectory import trajectory_cost
from lightning_prune.protocols import InputError, StepAware
from lightning_prune.pruning.masks import baked
from lightning_prune.pruning.structural import Width, slim
from tests.factories import tiny_dit, tiny_unet

PROCESS = Process(schedule="cosine", prediction="v")


def staged(dense: Denoiser, lengths: tuple[int, ...] = (2, 1, 2)) -> StagedDenoiser:
    """Stages that keep ever fewer units; the first keeps all."""
    groups = dense.groups()
    networks = [
        slim(
            dense.network,
            groups,
            {g.name: Width(tuple(range(g.units - min(i, g.units - 1)))) for g in groups} if i else {},
        )
        for i in range(len(lengths))
    ]
    return StagedDenoiser(dense, networks, lengths, {"note": 1}).eval()


def images(denoiser: Denoiser, steps: int = 5, guidance: float = 1.0) -> Tensor:
    ids, labels = torch.arange(3), torch.tensor([1, 5, 9])
    return sample_images(denoiser, PROCESS, ids, labels, Sampler(steps=steps, guidance=guidance))


def test_every_step_belongs_to_its_stage() -> None:
    denoiser = staged(tiny_dit())
    assert isinstance(denoiser, StepAware)
    assert [denoiser.phase(i, 5) for i in range(5)] == [0, 0, 1, 2, 2]
    x, t, cond = torch.randn(2, 1, 32, 32), torch.tensor([10, 900]), torch.tensor([0, 3])
    for index in range(5):
        denoiser.at_step(index, 5)
        expected = denoiser.networks[stage_of_step((2, 1, 2), index, 5)](x, timestep=t, class_labels=cond).sample
        assert torch.equal(denoiser(x, t, cond), expected)
    with pytest.raises(InputError, match="call 5 of a trajectory of 5"):
        denoiser.at_step(5, 5)


@pytest.mark.parametrize("calls", [1, 2, 4, 10])
def test_another_number_of_calls_is_refused_but_of_a_single_stage(calls: int) -> None:
    with pytest.raises(InputError, match=f"for trajectories of 5 network calls, not {calls}"):
        stage_of_step((2, 1, 2), 0, calls)
    with pytest.raises(InputError, match=f"not {calls}"):
        images(staged(tiny_dit()), calls)
    assert [stage_of_step((5,), i, calls) for i in range(calls)] == [0] * calls


def test_sampling_switches_networks() -> None:
    dense = tiny_dit().eval()
    denoiser = staged(dense)
    seen: list[int] = []
    for number, network in enumerate(denoiser.networks):
        network.register_forward_pre_hook(lambda *_, n=number: seen.append(n))
    images(denoiser)
    assert seen == [0, 0, 1, 2, 2]
    seen.clear()
    images(denoiser, guidance=2.0)
    assert seen == [0, 0, 1, 2, 2], "a guided pair is one call"
    whole = StagedDenoiser(dense, [dense.network, dense.network], (3, 2)).eval()
    assert torch.equal(images(whole), images(dense))


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_shared_tensors_are_held_once(make: Any) -> None:
    dense: Denoiser = make()
    denoiser = staged(dense)
    cut = {c.parameter for g in dense.groups() for c in g.cuts}
    own = sum(p.numel() for network in denoiser.networks[1:] for n, p in network.named_parameters() if n in cut)
    total = sum(p.numel() for p in denoiser.parameters())
    assert total == sum(p.numel() for p in dense.parameters()) + own
    stitched = sum(sum(p.numel() for p in network.parameters()) for network in denoiser.networks)
    assert total < stitched
    for copy in (deepcopy(denoiser), baked(denoiser)):
        assert sum(p.numel() for p in copy.parameters()) == total
        # Convolutions without gradients may run another kernel.
        assert torch.allclose(images(copy), images(denoiser), atol=1e-5)


def test_its_cost_is_the_sum_over_stages() -> None:
    dense = tiny_dit()
    denoiser = staged(dense)
    sampler = Sampler(steps=5)
    each = [trajectory_cost(StagedDenoiser(dense, [n], (5,)), PROCESS, sampler).macs() // 5 for n in denoiser.networks]
    assert trajectory_cost(denoiser, PROCESS, sampler).macs() == 2 * each[0] + each[1] + 2 * each[2]
    assert each[0] == trajectory_cost(dense, PROCESS, sampler).macs() // 5


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_a_reloaded_artifact_draws_the_same_images(make: Any, tmp_path: Path) -> None:
    denoiser = staged(make())
    folder = save_artifact(denoiser, tmp_path / "artifact", "mosaicdiff", {})
    loaded = lightning_prune.load(folder)
    assert isinstance(loaded, StagedDenoiser)
    assert loaded.lengths == denoiser.lengths
    assert loaded.facts == {"note": 1}
    assert torch.equal(images(loaded), images(denoiser))
    # Tensors that happen to be equal, such as biases of zeros, are merged.
    assert sum(p.numel() for p in loaded.parameters()) <= sum(p.numel() for p in denoiser.parameters())
    again = save_artifact(loaded, tmp_path / "again", "mosaicdiff", {})
    first, second = (json.loads((f / "pruning.json").read_text()) for f in (folder, again))
    assert first["files"] == second["files"]
    assert first["stages"] == second["stages"]


def test_a_stage_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = save_artifact(staged(tiny_dit()), tmp_path / "artifact", "mosaicdiff", {})
    manifest = json.loads((folder / "pruning.json").read_text())
    manifest["stages"][1]["widths"]["transformer_blocks.0.ff"] = 5
    (folder / "pruning.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"{FILE}.*transformer_blocks\.0\.ff\.net\.0\.proj\.weight has shape"):
        lightning_prune.load(folder)


def test_stages_are_no_family_and_cannot_be_cut_again() -> None:
    assert StagedDenoiser not in families().values()
    with pytest.raises(InputError, match="cut already"):
        staged(tiny_dit()).groups()


def test_the_router_of_a_pipeline_chooses_by_timestep() -> None:
    denoiser = staged(tiny_dit())
    timesteps = Sampler(steps=5).visited(PROCESS).tolist()
    assert timesteps == [999, 799, 599, 399, 199]
    router = PipelineRouter(denoiser, timesteps)
    assert [router.stage(t) for t in (999, 800, 799, 798, 599, 598, 199, 0)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert router.pos_embed is denoiser.networks[0].pos_embed, "what else is asked of it is the first stage's"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        router.nothing  # noqa: B018
    with pytest.raises(InputError, match="keep the artifact"):
        router.save_pretrained("folder")
    with pytest.raises(InputError, match="4 timesteps for stages of 5"):
        PipelineRouter(denoiser, timesteps[:4])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_router_sees_timesteps_as_they_are_rounded_and_scaled(kind: torch.dtype) -> None:
    denoiser = staged(tiny_dit())
    timesteps = [1000.0, 801.3, 633.7, 399.9, 150.1]
    router = PipelineRouter(denoiser, timesteps)
    router.scale = 1000
    given = [torch.tensor([t, t]).to(kind) / 1000 for t in timesteps]
    assert [router.stage(t) for t in given] == [0, 0, 1, 2, 2]


def test_it_drops_into_a_diffusers_pipeline() -> None:
    denoiser = staged(tiny_dit())
    scheduler = DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    router = PipelineRouter(denoiser, scheduler.timesteps.tolist())
    seen: list[int] = []
    for number, network in enumerate(denoiser.networks):
        network.register_forward_pre_hook(lambda *_, n=number: seen.append(n))
    decoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    pipeline = DiTPipeline(denoiser.networks[0], decoder, scheduler)
    pipeline.transformer = router
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found = pipeline(
        class_labels=[1, 2], guidance_scale=1.0, num_inference_steps=5, generator=generator, output_type="np"
    )
    assert found.images.shape == (2, 32, 32, 3)
    assert seen == [0, 0, 1, 2, 2]
