"""SparseDM calibrated: masks that follow scaled weights, one-shot with compensation, patterns by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune import load
from lightning_prune.callbacks import LastCheckpoint, MaskInvariant, SparsityRamp
from lightning_prune.cli import main
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.methods.sparsedm.calibration import Allocation, Calibration, Statistics, logarithmic_weights
from lightning_prune.methods.sparsedm.distillation import Distillation
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import effective_state
from lightning_prune.pruning.nm import nm_mask, violations
from tests.factories import fit, tiny_dit, tiny_sparsedm, tiny_unet

TWO_FOUR = Sparsity(2, 4)
SHORT = Calibration(batches=2)
REFIT = Calibration(batches=2, compensate=True)


def steep(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)


def one_shot(folder: Path, **arguments: Any) -> Any:
    module = tiny_sparsedm(one_shot=True, **arguments)
    fit(module, folder, max_steps=-1, max_epochs=1, limit_train_batches=3)
    return module


def output_error(module: Any) -> float:
    """Squared change of the prediction against the dense start, on data of the training distribution."""
    generator = torch.Generator().manual_seed(9)
    batch = {"x": torch.randn(32, 1, 32, 32, generator=generator).clamp(-1, 1), "cond": torch.arange(32) % 10}
    x_t, t, cond, _ = module.diffuse(batch, generator)
    dense, *_, result = module.variants().values()
    with torch.no_grad():
        return float((dense.denoiser.eval()(x_t, t, cond) - result.denoiser.eval()(x_t, t, cond)).square().mean())


@pytest.mark.parametrize("scores", ["wanda", "obs"])
def test_calibrated_masks_follow_the_scaled_weights(scores: Any, tmp_path: Path) -> None:
    module = tiny_sparsedm(mask_scores=scores, calibration=SHORT, optimizer=steep, ema_decay=None)
    fit(module, tmp_path, callbacks=[MaskInvariant()])
    differing = 0
    for layer in module.masks.layers.values():
        assert torch.equal(layer.mask.bool(), nm_mask(layer.weight * layer.scale, TWO_FOUR))
        differing += int((layer.mask.bool() != nm_mask(layer.weight, TWO_FOUR)).sum())
    assert differing > 0, "the scale matters"


def test_calibrated_masks_can_be_frozen_from_the_start(tmp_path: Path) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.masks: list[dict[str, torch.Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.masks.append({name: mask.clone() for name, mask in pl_module.masks.masks().items()})

    look = Look()
    module = tiny_sparsedm(mask_scores="wanda", calibration=SHORT, optimizer=steep, freeze_masks_at=0.0, ema_decay=None)
    fit(module, tmp_path, callbacks=[look])
    start = tiny_dit().network.state_dict()
    for name, layer in module.masks.layers.items():
        assert torch.equal(look.masks[0][name].bool(), nm_mask(start[f"{name}.weight"] * layer.scale, TWO_FOUR))
        assert torch.equal(look.masks[0][name], look.masks[-1][name])


def test_the_same_batches_give_the_same_scales_and_training_is_not_moved_on(tmp_path: Path) -> None:
    first, again = (tiny_sparsedm(mask_scores="obs", calibration=SHORT, optimizer=steep) for _ in range(2))
    fit(first, tmp_path)
    fit(again, tmp_path)
    assert all(torch.equal(a.scale, b.scale) for a, b in pairs(first, again))
    # With the scale of magnitudes put back, a calibrated run is a plain one: it drew nothing of the run's own.
    plain = tiny_sparsedm(optimizer=steep)
    calibrated = tiny_sparsedm(calibration=SHORT, mask_scores="wanda", optimizer=steep)
    calibrated.masks.set_scales = lambda scales: None  # type: ignore[method-assign]
    fit(plain, tmp_path)
    fit(calibrated, tmp_path)
    assert all(torch.equal(a.weight, b.weight) for a, b in pairs(plain, calibrated))


def pairs(first: Any, second: Any) -> Any:
    return zip(first.masks.layers.values(), second.masks.layers.values(), strict=True)


def test_timesteps_count_as_the_loss_weighs_them(tmp_path: Path) -> None:
    """A distillation that looks at other timesteps calibrates on other moments."""
    uniform = one_shot(tmp_path, mask_scores="wanda", noise_weight=0.0, distill_weight=1.0)
    weighted = one_shot(
        tmp_path,
        mask_scores="wanda",
        noise_weight=0.0,
        distill_weight=1.0,
        distillation=Distillation(weighting="min-snr"),
    )
    assert any(not torch.allclose(a.scale, b.scale, rtol=1e-3) for a, b in pairs(uniform, weighted))


def test_logarithmic_weights_fall_from_the_noisiest_on(tmp_path: Path) -> None:
    grid = torch.arange(999, -1, -1)
    weights = logarithmic_weights(grid, grid)
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(1 - math.log(1000) / math.log(1001), abs=1e-6)
    assert (weights.diff() < 0).all()
    assert weights[9] == pytest.approx(1 - math.log(10) / math.log(1001), abs=1e-6)
    shifted = Process("flow", "flow", shift=3.0).grid().flip(0)
    assert torch.equal(logarithmic_weights(shifted, shifted), weights)
    plain = one_shot(tmp_path, mask_scores="wanda")
    early = one_shot(tmp_path, mask_scores="wanda", calibration=Calibration(weighting="logarithmic"))
    assert any(not torch.allclose(a.scale, b.scale, rtol=1e-3) for a, b in pairs(plain, early))


def test_magnitudes_alone_look_at_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Statistics, "see", None)
    module = one_shot(tmp_path)
    assert module.masks.violations(compare=True) == 0
    assert module.masks.masks()


def test_a_ramp_leads_nowhere_where_weights_are_refitted(tmp_path: Path) -> None:
    module = tiny_sparsedm(calibration=Calibration(batches=2, compensate=True))
    with pytest.raises(InputError, match=r"calibration\.compensate: refits for 2:4, so 3:4 cannot come first"):
        fit(module, tmp_path, callbacks=[SparsityRamp(["3:4", "2:4"], 0.5)])


def test_one_shot_trains_nothing_and_compensation_brings_the_output_back(tmp_path: Path) -> None:
    plain = one_shot(tmp_path, mask_scores="wanda")
    start = tiny_dit().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in plain.denoiser.state_dict().items())
    refitted = one_shot(tmp_path, mask_scores="obs", calibration=REFIT)
    magnitude = one_shot(tmp_path)
    assert list(refitted.variants()) == ["dense", "one-shot 2:4", "calibrated one-shot at 2:4"]
    assert output_error(refitted) < output_error(plain)
    assert output_error(refitted) < output_error(magnitude)
    for name, layer in refitted.masks.layers.items():
        assert violations(layer.weight, TWO_FOUR) == 0, name
    assert refitted.mask_violations(compare=True) == 0


def test_fine_tuning_can_start_from_compensated_weights(tmp_path: Path) -> None:
    module = tiny_sparsedm(mask_scores="obs", calibration=REFIT, optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    fit(module, tmp_path, callbacks=[MaskInvariant()], max_steps=2)
    plain = tiny_sparsedm(optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    fit(plain, tmp_path, max_steps=2)
    assert output_error(module) < output_error(plain), "averaged weights are the compensated ones too"


# Patterns by layer


@pytest.mark.parametrize("sensitivity", ["measured", "second-order"])
def test_allocation_keeps_the_budget_and_is_reported(sensitivity: Any, tmp_path: Path) -> None:
    module = one_shot(tmp_path, allocation=Allocation(0.6, sensitivity=sensitivity))
    kept = module.kept_fraction()["aten"]
    assert 0.5 < kept <= 0.6
    patterns = {name: str(layer.sparsity or "4:4") for name, layer in module.masks.layers.items()}
    assert len(set(patterns.values())) > 1
    written = json.loads(module.artifact_files()["allocation.json"])
    assert written["macs_kept"] == kept
    assert {n: p for n, p in written["patterns"].items() if p != "4:4"} == {
        n: p for n, p in patterns.items() if p != "4:4"
    }
    ledger = count_denoiser(tiny_dit())
    chosen = {name: Sparsity.parse(text) for name, text in patterns.items()}
    assert kept == float(ledger.kept_share(chosen))


def test_allocation_loses_less_than_one_pattern_for_all(tmp_path: Path) -> None:
    uniform = one_shot(tmp_path)
    budget = uniform.kept_fraction()["aten"]
    allocated = one_shot(tmp_path, allocation=Allocation(budget))
    assert allocated.kept_fraction()["aten"] <= budget
    assert output_error(allocated) < output_error(uniform)


def test_a_ramp_ends_at_the_allocated_patterns_and_never_below_them(tmp_path: Path) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.patterns: list[dict[str, Sparsity]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layers = pl_module.masks.layers.items()
            self.patterns.append({name: layer.sparsity or Sparsity(4, 4) for name, layer in layers})

    look, module = Look(), tiny_sparsedm(allocation=Allocation(0.55), calibration=SHORT)
    fit(module, tmp_path, callbacks=[SparsityRamp(["3:4", "2:4"], 0.5), look, MaskInvariant()])
    final = look.patterns[-1]
    assert final == {name: own if not own.is_dense else Sparsity(4, 4) for name, own in module._patterns.items()}
    assert all(now.density == max(0.75, final[name].density) for name, now in look.patterns[0].items())


def test_on_the_way_layers_that_a_stage_does_not_divide_stay_dense(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append({name: layer.sparsity for name, layer in pl_module.masks.layers.items()})

    denoiser = tiny_unet()
    module = SparseDM(
        denoiser, Process("cosine", "v"), allocation=Allocation(0.7, sensitivity="second-order"), calibration=SHORT
    )
    fit(module, tmp_path, callbacks=[SparsityRamp(["15:16", "2:4"], 0.5), Look(), MaskInvariant()])
    widths = {name: layer.weight.shape[1] for name, layer in module.masks.layers.items()}
    odd = [name for name, width in widths.items() if width % 16]
    assert odd
    assert all(seen[0][name] is None for name in odd)
    assert seen[-1] == {name: None if own.is_dense else own for name, own in module._patterns.items()}


@pytest.mark.parametrize("allocation", [None, Allocation(0.6)])
def test_a_checkpoint_brings_the_calibrated_network_back(allocation: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"mask_scores": "obs", "calibration": REFIT, "allocation": allocation}
    module = tiny_sparsedm(**arguments, ema_decay=None)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = tiny_sparsedm(**arguments, ema_decay=None)
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    other.load_state_dict(checkpoint["state_dict"])
    other.on_load_checkpoint(checkpoint)
    other.weights_changed()
    first, second = (effective_state(m.denoiser.network) for m in (module, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    resumed = tiny_sparsedm(**arguments, ema_decay=None)
    resumed._calibrate = None  # type: ignore[assignment, method-assign]
    fit(resumed, tmp_path, ckpt_path=tmp_path / "c.ckpt", max_steps=6)


@pytest.mark.parametrize("last", [1, 2])
def test_an_interrupted_calibration_goes_on(last: int, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"mask_scores": "obs", "calibration": REFIT, "allocation": Allocation(0.6)}
    whole = one_shot(tmp_path, **arguments)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == last:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    first = tiny_sparsedm(one_shot=True, **arguments)
    fit(first, tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=3, callbacks=[Stop()])
    resumed = tiny_sparsedm(one_shot=True, **arguments)
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 3}
    fit(resumed, tmp_path, ckpt_path=tmp_path / "half.ckpt", **options)
    for other in (first, resumed):
        assert other._patterns == whole._patterns
        assert all(torch.equal(a.weight, b.weight) for a, b in pairs(whole, other))
    if last == 1:
        with pytest.raises(InputError, match="its calibration has not ended"):  # as `export` reads it
            tiny_sparsedm(one_shot=True, **arguments).on_load_checkpoint(torch.load(tmp_path / "half.ckpt"))
        shorter = tiny_sparsedm(one_shot=True, **arguments)
        fit(shorter, tmp_path, ckpt_path=tmp_path / "half.ckpt", **(options | {"limit_train_batches": 2}))
        assert shorter._ready, "there was no batch left"


@pytest.mark.parametrize("every", [2, 3])
def test_the_last_checkpoint_of_a_one_shot_run_holds_the_pruned_network(every: int, tmp_path: Path) -> None:
    module = tiny_sparsedm(one_shot=True, mask_scores="obs", calibration=REFIT)
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 3}
    fit(module, tmp_path, callbacks=[LastCheckpoint(every_n_steps=every)], enable_checkpointing=True, **options)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert "calibrated" in checkpoint
    assert "statistics" not in checkpoint
    saved, found = checkpoint["state_dict"], module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": Allocation(0.6), "also": ["7:8"]}, r"model\.also: several patterns have no allocation"),
        ({"sparsity": "4:4", "mask_scores": "obs"}, r"model\.sparsity: 4:4 is dense"),
        ({"one_shot": True, "freeze_masks_at": 0.0}, r"model\.freeze_masks_at: with model\.one_shot"),
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_sparsedm(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Calibration(batches=0), r"model\.calibration\.batches: 0"),
        (lambda: Calibration(damping=-1.0), r"model\.calibration\.damping: -1"),
        (lambda: Calibration(damping=float("nan")), r"model\.calibration\.damping: nan"),
        (lambda: Distillation(features=float("nan")), r"model\.distillation\.features: nan"),
        (lambda: Distillation(blocks="block"), r"model\.distillation\.blocks: model\.distillation\.features is 0"),
        (lambda: Allocation(0.0), r"model\.allocation\.budget: 0"),
        (lambda: Allocation(0.5, ()), r"model\.allocation\.patterns"),
        (lambda: Allocation(0.5, ("5:4",)), r"5:4"),
    ],
)
def test_bad_settings_name_themselves(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_budget_out_of_reach_stops_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.allocation\.budget: 0\.1 is out of reach"):
        fit(tiny_sparsedm(allocation=Allocation(0.1), calibration=SHORT), tmp_path)


def test_one_shot_that_would_see_the_data_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set trainer\.max_epochs: 1"):
        fit(tiny_sparsedm(one_shot=True), tmp_path, max_steps=-1, max_epochs=2, limit_train_batches=1)


def test_the_baseline_runs_through_the_command_line(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "baselines" / "calibrated-one-shot.yaml"
    report = "--trainer.callbacks.init_args"
    status = main(
        [
            *("fit", "--config", str(config), "--run.root", str(tmp_path), "--run.name", "run"),
            *("--data.batch_size=8", "--trainer.limit_train_batches=2"),
            *(f"{report}.samples=120", f"{report}.steps=2", f"{report}.timed_images=4", f"{report}.timed_repeats=1"),
            f"{report}.fewer_steps=false",
        ]
    )
    assert status == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "one-shot 2:4", "calibrated one-shot at 2:4"]
    artifact = load(tmp_path / "run" / "artifact")
    manifest = json.loads((tmp_path / "run" / "artifact" / "pruning.json").read_text())
    assert set(manifest["masks"].values()) == {"2:4"}
    state = artifact.network.state_dict()
    assert all(violations(state[f"{name}.weight"], TWO_FOUR) == 0 for name in manifest["masks"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
