"""What is distilled: block outputs, timesteps by weight, guided predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.methods.sparsedm.distillation import (
    Distillation,
    draw_scales,
    feature_loss,
    feature_modules,
    predict_guided,
    timestep_weights,
    watching,
)
from lightning_prune.protocols import InputError
from tests.factories import fit, tiny_dit, tiny_sparsedm, tiny_unet

BATCH = {"x": torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(3)), "cond": torch.arange(4)}
PROCESSES = [Process("cosine", "v"), Process("linear", "epsilon"), Process("cosine", "x0"), Process("flow", "flow")]


def losses(module: SparseDM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return module.loss(BATCH, torch.Generator().manual_seed(0))


# Timesteps


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction)
@pytest.mark.parametrize("weighting", ["uniform", "min-snr"])
def test_weights_are_1_on_average_and_never_negative(process: Process, weighting: Any) -> None:
    weights = timestep_weights(process, weighting, 5.0, process.grid())
    assert weights.mean() == pytest.approx(1, rel=1e-4)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction)
def test_min_snr_is_the_capped_weight_of_the_error_of_x0(process: Process) -> None:
    """Weighted errors of a prediction are errors of x_0 times min(SNR, cap), up to one constant."""
    process = Process(**{**vars_of(process), "clip_sample": False})
    t = process.grid()[[50, 300, 600, 900]]
    x0, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    wrong = target + 0.1
    found, _ = process.x0_and_noise(wrong, x_t, t)
    signal, sigma = process.coefficients(t, torch.empty(4))
    expected = (found - x0).square().flatten(1).mean(1) * (signal / sigma).square().clamp(max=5.0)
    weighted = (wrong - target).square().flatten(1).mean(1) * timestep_weights(process, "min-snr", 5.0, t)
    torch.testing.assert_close(weighted / weighted[1], expected / expected[1], rtol=1e-2, atol=1e-5)


def vars_of(process: Process) -> dict[str, Any]:
    schedule = "flow" if process.is_flow else process.scheduler_config["beta_schedule"]
    names = {"squaredcos_cap_v2": "cosine"}
    return {"schedule": names.get(schedule, schedule), "prediction": process.prediction}


def test_a_weighted_distillation_is_the_weighted_mean() -> None:
    module = tiny_sparsedm(distill_weight=2.0, distillation=Distillation(weighting="min-snr"))
    total, values = losses(module)
    x_t, t, cond, target = module.diffuse(BATCH, torch.Generator().manual_seed(0))
    student, teacher = module.denoiser(x_t, t, cond), tiny_dit().eval()(x_t, t, cond)
    weights = timestep_weights(module.process, "min-snr", 5.0, t)
    expected = ((student - teacher).square().mean((1, 2, 3)) * weights).mean()
    torch.testing.assert_close(values["distill_loss"], expected)
    torch.testing.assert_close(total, mse_loss(student, target) + 2 * expected)
    assert weights.std() > 0


# Features


@pytest.mark.parametrize("network", [tiny_dit(), tiny_unet()], ids=["dit", "unet"])
def test_features_are_the_outputs_of_the_familys_blocks(network: Any) -> None:
    modules = feature_modules(network, None)
    graph = network.blocks("block" if "DiT" in type(network).__name__ else "coarse")
    assert modules == [block.modules[-1] for block in graph.blocks]
    x, t, cond = BATCH["x"], torch.full((4,), 500), BATCH["cond"]
    with torch.no_grad(), watching(network.network, modules) as seen:
        network.eval()(x, t, cond)
    assert len(seen) >= len(modules)
    assert len({id(tensor) for tensor in seen}) == len(seen), "a tensor that is given twice counts once"
    before = len(seen)
    with torch.no_grad():
        network(x, t, cond)
    assert len(seen) == before, "nothing is watched afterwards"


def test_feature_loss_is_relative_to_the_teachers_power() -> None:
    teacher = [torch.randn(2, 3), 100 * torch.randn(2, 5)]
    assert feature_loss(teacher, teacher) == 0
    halved = [0.5 * tensor for tensor in teacher]
    assert feature_loss(halved, teacher) == pytest.approx(0.25)


def test_features_enter_the_loss_and_reach_every_masked_layer() -> None:
    module = tiny_sparsedm(distill_weight=1.0, distillation=Distillation(features=3.0))
    plain = tiny_sparsedm(distill_weight=1.0)
    module.train(), plain.train()
    total, values = losses(module)
    base, _ = losses(plain)
    assert values["feature_loss"] > 0
    torch.testing.assert_close(total, base + 3 * values["feature_loss"])
    total.backward()
    assert all(layer.weight.grad is not None for layer in module.masks.layers.values())
    dense = module._dense.value
    assert all(p.grad is None for p in dense.parameters())
    module.set_sparsity(None)
    _, values = losses(module)
    assert values["feature_loss"] == pytest.approx(0, abs=1e-10), "the dense start matches itself"


# Guidance


def test_a_network_without_conditions_is_not_guided() -> None:
    config = {**tiny_unet().config(), "num_class_embeds": None}
    with pytest.raises(InputError, match=r"model\.distillation\.guidance: the network takes no condition"):
        SparseDM(UNet2D(config=config), Process("cosine", "v"), distillation=Distillation(guidance=(1.0, 4.0)))


def test_guided_predictions_follow_the_familys_rule() -> None:
    network, t = tiny_dit().eval(), torch.full((4,), 500)
    scales = draw_scales((1.5, 4.0), 4, torch.Generator().manual_seed(0), BATCH["x"])
    assert ((scales >= 1.5) & (scales <= 4.0)).all()
    assert scales.std() > 0
    conditional, guided = predict_guided(network, network, BATCH["x"], t, BATCH["cond"], scales)
    plain = network(BATCH["x"], t, BATCH["cond"])
    none = network(BATCH["x"], t, network.null_condition(BATCH["cond"]))
    torch.testing.assert_close(conditional, plain)
    torch.testing.assert_close(guided, none + scales * (plain - none))


def test_the_guided_prediction_is_matched_and_the_plain_one_denoises() -> None:
    module = tiny_sparsedm(distill_weight=1.0, distillation=Distillation(guidance=(3.0, 3.0)))
    _, values = losses(module)
    x_t, t, cond, target = module.diffuse(BATCH, torch.Generator().manual_seed(0))
    student = predict_guided(module.denoiser, module.denoiser, x_t, t, cond, 3.0)
    dense = tiny_dit().eval()
    teacher = predict_guided(dense, dense, x_t, t, cond, 3.0)
    torch.testing.assert_close(values["denoise_loss"], mse_loss(student[0], target))
    torch.testing.assert_close(values["distill_loss"], mse_loss(student[1], teacher[1]))


def test_a_scale_of_1_is_the_plain_distillation() -> None:
    guided = losses(tiny_sparsedm(distillation=Distillation(guidance=(1.0, 1.0))))
    plain = losses(tiny_sparsedm())
    torch.testing.assert_close(guided[0], plain[0])


def test_all_switches_train_together(tmp_path: Path) -> None:
    switches = Distillation(weighting="min-snr", features=0.1, guidance=(1.0, 4.0))
    trainer = fit(tiny_sparsedm(distillation=switches, label_dropout=0.1), tmp_path)
    assert {"feature_loss", "distill_loss", "denoise_loss"} <= trainer.logged_metrics.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(snr_cap=0.0), r"model\.distillation\.snr_cap: 0"),
        (lambda: Distillation(features=-1.0), r"model\.distillation\.features: -1"),
        (lambda: Distillation(guidance=(4.0, 1.0)), r"model\.distillation\.guidance: \[4\.0, 1\.0\] is no range"),
        (lambda: tiny_sparsedm(distillation=Distillation(features=1.0, blocks="coarse")), r"granularity: 'coarse'"),
        (lambda: tiny_sparsedm(distillation=Distillation(features=1.0), compile=True), r"model\.compile"),
        (lambda: tiny_sparsedm(distillation=Distillation(features=1.0), also=["7:8"]), r"model\.also"),
        (
            lambda: tiny_sparsedm(distillation=Distillation(weighting="min-snr"), distill_weight=0.0),
            r"model\.distillation: model\.distill_weight is 0",
        ),
    ],
)
def test_bad_settings_name_themselves(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
