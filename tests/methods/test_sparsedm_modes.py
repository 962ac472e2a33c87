"""Further modes of SparseDM: frozen masks, fixed floors, several patterns in one set of weights, run-time switches."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.callbacks import MaskInvariant, SparsityRamp
from lightning_prune.callbacks.capability import require
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.methods.sparsedm.calibration import Allocation, Calibration
from lightning_prune.protocols import InputError, PrunableUnit, Sparsity, SparsityControl
from lightning_prune.pruning.masks import MaskSet, effective_state
from lightning_prune.pruning.nm import nm_mask, to_groups
from lightning_prune.sharding import WeightAverage
from tests.factories import fit, tiny_sparsedm
from tests.traffic import Traffic

TWO_FOUR = Sparsity(2, 4)
BATCH = {"x": torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(3)), "cond": torch.arange(4)}


def steep(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)


class Record(Callback):
    """Masks and dense weights after every step."""

    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []
        self.pruned: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layers = pl_module.masks.layers
        self.masks.append(masks_of(pl_module))
        self.pruned.append({n: (layer.weight * (1 - layer.mask)).detach().clone() for n, layer in layers.items()})


def masks_of(module: SparseDM) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in module.masks.masks().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_masks_frozen_from_the_start_stay_and_pruned_weights_rest(tmp_path: Path) -> None:
    record = Record()
    module = tiny_sparsedm(freeze_masks_at=0.0, optimizer=steep, ema_decay=None)
    fit(module, tmp_path, callbacks=[record, MaskInvariant()])
    assert all(same(record.masks[0], later) for later in record.masks[1:])
    assert all(same(record.pruned[0], later) for later in record.pruned[1:])
    magnitudes = {name: nm_mask(layer.weight, TWO_FOUR).float() for name, layer in module.masks.layers.items()}
    assert not same(magnitudes, record.masks[0]), "weights moved far enough that masks of magnitude would differ"


def test_a_late_freeze_follows_the_weights_until_then(tmp_path: Path) -> None:
    record = Record()
    fit(tiny_sparsedm(freeze_masks_at=0.5, optimizer=steep, ema_decay=None), tmp_path, callbacks=[record])
    assert not same(record.masks[0], record.masks[1])
    # Half of four steps: the masks that the second step left are those of all later ones.
    assert same(record.masks[1], record.masks[2])
    assert same(record.masks[2], record.masks[3])


def test_averaged_weights_compute_under_the_frozen_masks(tmp_path: Path) -> None:
    module = tiny_sparsedm(freeze_masks_at=0.0, optimizer=steep, ema_decay=0.5)
    before = masks_of(module)
    fit(module, tmp_path)
    assert same(masks_of(module), before)
    for name, mask in before.items():
        assert torch.equal(effective_state(module.denoiser.network)[f"{name}.weight"] != 0, mask.bool())


def test_a_checkpoint_brings_frozen_masks_back(tmp_path: Path) -> None:
    module = tiny_sparsedm(freeze_masks_at=0.5, optimizer=steep, ema_decay=None)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = tiny_sparsedm(freeze_masks_at=0.5)
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    other.load_state_dict(checkpoint["state_dict"])
    other.on_load_checkpoint(checkpoint)
    other.weights_changed()
    assert same(effective_state(module.denoiser.network), effective_state(other.denoiser.network))


def test_a_frozen_mask_returns_after_other_patterns() -> None:
    module = tiny_sparsedm()
    module.masks.freeze()
    before = masks_of(module)
    with torch.no_grad():
        for layer in module.masks.layers.values():
            layer.weight.copy_(torch.randn_like(layer.weight))
    for pattern in (None, Sparsity(3, 4), TWO_FOUR):
        module.set_sparsity(pattern)
    assert same(masks_of(module), before)


def test_violations_of_a_run_that_was_interrupted_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseDM, "mask_violations", lambda *_: 1)
    trainer = fit(tiny_sparsedm(distill_weight=0), tmp_path, max_steps=2, callbacks=[MaskInvariant(stop=False)])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    further = [MaskInvariant(stop=False)]
    resumed = fit(tiny_sparsedm(distill_weight=0), tmp_path, tmp_path / "two.ckpt", max_steps=3, callbacks=further)
    assert resumed.callback_metrics["mask_violations"] == 3


@pytest.mark.parametrize("kind", ["random", "position"])
def test_fixed_floors_do_not_follow_the_weights(kind: str, tmp_path: Path) -> None:
    record = Record()
    module = tiny_sparsedm(mask_scores=kind, optimizer=steep)
    fit(module, tmp_path, callbacks=[record, MaskInvariant()])
    assert all(same(record.masks[0], later) for later in record.masks[1:])
    mask = next(iter(record.masks[0].values()))
    kept_last = torch.equal(to_groups(mask, 4), torch.tensor([0.0, 0, 1, 1]).expand_as(to_groups(mask, 4)))
    assert kept_last == (kind == "position")


def test_random_masks_are_those_of_the_seed() -> None:
    first, again, other = (tiny_sparsedm(mask_scores="random", seed=seed) for seed in (0, 0, 1))
    masks = [masks_of(module) for module in (first, again, other)]
    assert same(masks[0], masks[1])
    assert not same(masks[0], masks[2])


def test_random_masks_are_those_of_the_run_whose_checkpoint_it_is(tmp_path: Path) -> None:
    run = tiny_sparsedm(mask_scores="random", seed=1, ema_decay=None)
    fit(run, tmp_path, max_steps=1).save_checkpoint(tmp_path / "c.ckpt")
    other, checkpoint = tiny_sparsedm(mask_scores="random", seed=0), torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert any(not torch.equal(m, other.masks.masks()[name]) for name, m in run.masks.masks().items())
    other.load_state_dict(checkpoint["state_dict"])
    other.on_load_checkpoint(checkpoint)
    assert all(torch.equal(m, other.masks.masks()[name]) for name, m in run.masks.masks().items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"layers": [r".*ff.*"]}, r"ckpt_path: was made with model\.layers 12 layers \(.*\), which is 4 layers"),
        ({"mask_scores": "position"}, r"ckpt_path: was made with model\.mask_scores magnitude, which is position now"),
        ({"allocation": Allocation(0.6)}, r"ckpt_path: was made with model\.allocation null"),
    ],
)
def test_a_checkpoint_of_other_masks_is_refused(arguments: dict[str, Any], named: str, tmp_path: Path) -> None:
    fit(tiny_sparsedm(ema_decay=None), tmp_path, max_steps=1).save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(InputError, match=named):
        fit(tiny_sparsedm(ema_decay=None, **arguments), tmp_path, tmp_path / "c.ckpt", max_steps=2)


def test_weights_refitted_for_another_pattern_are_refused() -> None:
    refitted, plain = ({"calibration": Calibration(compensate=on), "mask_scores": "obs"} for on in (True, False))
    checkpoint = {"masks": {"of": tiny_sparsedm(**refitted)._marks(), "scored_by": 0}}
    with pytest.raises(InputError, match=r"ckpt_path: was made with model\.sparsity 2:4, which is 1:4 now"):
        tiny_sparsedm(sparsity="1:4", **refitted).on_load_checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"model\.calibration\.compensate True, which is False now"):
        tiny_sparsedm(sparsity="1:4", **plain).on_load_checkpoint(checkpoint)


def test_an_optimizer_that_unscales_inside_its_step_is_refused() -> None:
    group = {"fused": True}
    trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])], precision="16-mixed")
    module = tiny_sparsedm(decay=2e-4)
    module._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(InputError, match="divides the decay away"):
        module.on_fit_start()


@pytest.mark.parametrize("sparsity", [Sparsity(2, 7), {".*ff.*": Sparsity(2, 7)}, {"typo.*": None}, {"[": None}])
def test_a_pattern_that_no_layer_can_have_changes_nothing(sparsity: Any) -> None:
    module = tiny_sparsedm()
    before = {name: layer.sparsity for name, layer in module.masks.layers.items()}
    with pytest.raises(InputError, match=r"multiple of 7|'typo\.\*' matches no layer|no regular expression"):
        module.set_sparsity(sparsity)
    assert {name: layer.sparsity for name, layer in module.masks.layers.items()} == before


def test_a_ramp_over_a_pattern_that_no_layer_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sparsity 6:7: the input dimension of no masked layer is a multiple of 7"):
        fit(tiny_sparsedm(), tmp_path, callbacks=[SparsityRamp(["6:7", "2:4"], 0.5)])


def test_which_further_pattern_a_step_trains_is_not_read_from_the_device() -> None:
    module = tiny_sparsedm(also=["7:8", "3:4"])
    with Traffic() as traffic:
        module.loss(BATCH, torch.Generator().manual_seed(5))
    assert traffic.reads == 0


def test_the_flip_rate_is_what_a_refresh_changes() -> None:
    module = tiny_sparsedm()
    assert set(module.masks.flips().values()) == {0.0}
    name, layer = next(iter(module.masks.layers.items()))
    before = masks_of(module)[name]
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    expected = module.masks.flips()[name]
    module.masks.refresh()
    assert expected == pytest.approx((before != masks_of(module)[name]).float().mean().item())
    assert expected > 0.1


def test_a_chain_of_frozen_masks_regrows_nothing() -> None:
    """What 3:4 prunes 2:4 prunes too, though the weights that stayed have become the smallest."""
    module = tiny_sparsedm(sparsity="2:4", freeze_masks_at=0.0)
    kept: dict[str, torch.Tensor] = {}
    for pattern in ("3:4", "2:4", "1:4"):
        module.set_sparsity(pattern)
        now = masks_of(module)
        assert all((mask <= kept.get(name, mask)).all() for name, mask in now.items())
        module.masks.freeze()
        with torch.no_grad():
            for name, layer in module.masks.layers.items():
                layer.weight.mul_(1 - 0.99 * now[name])
                kept[name] = now[name]
    assert all(mask.mean() == 0.25 for mask in kept.values())


def test_weights_that_were_kept_go_before_any_that_were_not_comes_back() -> None:
    """Kept weights that have become 0 stay ahead of pruned ones; where patterns are not nested, the largest returns."""
    net: Any = torch.nn.Sequential(torch.nn.Linear(8, 1, bias=False))
    weight = net[0].weight.data
    weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0]]))
    masks = MaskSet(net, [PrunableUnit("0", "linear", ("0.weight",), 8)], Sparsity(3, 4))
    masks.freeze()
    weight[0, 1:3] = 0.0
    masks.set_sparsity(TWO_FOUR)
    assert net[0].mask[0].tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0]]))
    net[0]._frozen = {}
    masks.set_sparsity(Sparsity(5, 8))
    masks.freeze()
    masks.set_sparsity(TWO_FOUR)
    assert net[0].mask[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("sparsity", ["4:4", "2:4"])
def test_a_dense_control_of_frozen_masks_keeps_its_average(sparsity: str, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (average,) = (c for c in trainer.callbacks if isinstance(c, WeightAverage))
            seen.append(int(average._average_model.n_averaged))

    module = tiny_sparsedm(sparsity=sparsity, freeze_masks_at=0.5, optimizer=steep, ema_decay=0.75)
    fit(module, tmp_path, callbacks=[Watch()])
    assert seen == ([0, 1, 2, 3] if sparsity == "4:4" else [0, 1, 0, 1]), "before each step's own"


def test_a_dense_control_can_be_masked() -> None:
    module = tiny_sparsedm(sparsity="4:4")
    module.set_sparsity("2:4")
    with torch.no_grad():
        for layer in module.masks.layers.values():
            layer.weight.copy_(torch.randn_like(layer.weight))
    module.weights_changed()
    assert module.mask_violations(compare=True) == 0
    module.check_sparsity("1:4")


def test_the_average_begins_again_where_masks_freeze(tmp_path: Path) -> None:
    """After two of four steps: the average is then of the last two, and of none before."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append({name: layer.weight.detach().clone() for name, layer in module.masks.layers.items()})

    module = tiny_sparsedm(freeze_masks_at=0.5, optimizer=steep, ema_decay=0.75)
    fit(module, tmp_path, callbacks=[Watch()])
    assert len(seen) == 4
    for name, layer in module.masks.layers.items():
        torch.testing.assert_close(layer.weight, 0.75 * seen[2][name] + 0.25 * seen[3][name])


def test_a_dense_control_logs_the_flips_its_masks_would_have(tmp_path: Path) -> None:
    module = tiny_sparsedm(sparsity="4:4", optimizer=steep, ema_decay=None)
    before: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            before.append({name: nm_mask(layer.weight, TWO_FOUR) for name, layer in module.masks.layers.items()})

    # A validation after every step reads the average, whose masks are none of these.
    often: dict[str, Any] = {"val_check_interval": 1, "limit_val_batches": 1}
    trainer = fit(module, tmp_path, callbacks=[Watch()], log_every_n_steps=2, **often)
    for name, layer in module.masks.layers.items():
        flipped = (before[3][name] != nm_mask(layer.weight, TWO_FOUR)).float().mean()
        assert float(trainer.logged_metrics[f"flip_rate/{name}"]) == pytest.approx(float(flipped))
    assert float(trainer.logged_metrics["flip_rate"]) > 0


def test_the_flip_rate_is_logged_by_layer(tmp_path: Path) -> None:
    module = tiny_sparsedm(optimizer=steep)
    trainer = fit(module, tmp_path, log_every_n_steps=1)
    rates = {key: float(value) for key, value in trainer.logged_metrics.items() if key.startswith("flip_rate")}
    assert rates.keys() == {"flip_rate", *(f"flip_rate/{name}" for name in module.masks.layers)}
    assert 0 < rates["flip_rate"] < 1


def test_logged_flips_are_those_of_the_step_that_logs_them(tmp_path: Path) -> None:
    module, steps, total = tiny_sparsedm(optimizer=steep), list[int](), 6
    flips = module.masks.flips

    def spy() -> dict[str, float]:
        steps.append(module.global_step)
        return flips()

    module.masks.flips = spy  # type: ignore[method-assign]
    logger = CSVLogger(tmp_path)
    fit(module, tmp_path, max_steps=total, log_every_n_steps=3, logger=logger)
    assert steps == [2, 5]  # counted from 0, and Lightning's rows are numbered by the same
    with (Path(logger.log_dir) / "metrics.csv").open() as rows:
        assert [int(row["step"]) for row in csv.DictReader(rows) if row["flip_rate"]] == [2, 5]


def test_weights_of_a_checkpoint_bring_their_masks(tmp_path: Path) -> None:
    module, other = tiny_sparsedm(), tiny_sparsedm()
    with torch.no_grad():
        for layer in module.masks.layers.values():
            layer.weight.copy_(torch.randn_like(layer.weight))
    module.masks.refresh()
    other.load_state_dict(module.state_dict())
    assert same(masks_of(other), masks_of(module))


def test_a_ramped_run_that_stops_early_ends_at_its_target(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 1

    module = tiny_sparsedm()
    fit(module, tmp_path, max_steps=8, callbacks=[SparsityRamp(["7:8", "2:4"], 0.9), Stop()])
    assert {str(layer.sparsity) for layer in module.masks.layers.values()} == {"2:4"}


@pytest.mark.parametrize(
    ("arguments", "ramps", "message"),
    [
        ({}, 2, "trainer.callbacks: 2 times SparsityRamp"),
        ({"one_shot": True}, 1, "with model.one_shot nothing is trained"),
    ],
)
def test_ramps_that_make_no_sense_are_refused(arguments: Any, ramps: int, message: str, tmp_path: Path) -> None:
    callbacks: list[Any] = [SparsityRamp(["3:4", "2:4"], 0.5) for _ in range(ramps)]
    with pytest.raises(InputError, match=message):
        fit(tiny_sparsedm(**arguments), tmp_path, callbacks=callbacks)


def test_weights_that_diverged_are_the_learning_rates_fault(tmp_path: Path) -> None:
    def diverging(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=float("inf"))

    with pytest.raises(InputError, match="weights are not finite at step 1; lower the learning rate"):
        fit(tiny_sparsedm(optimizer=diverging, ema_decay=None), tmp_path, callbacks=[MaskInvariant()])
    with pytest.raises(InputError, match=r"model\.optimizer: Invalid learning rate: -1"):
        fit(tiny_sparsedm(optimizer=lambda p: torch.optim.AdamW(p, lr=-1.0)), tmp_path)
    with pytest.raises(InputError, match=r"trainer\.precision: 64-true"):
        fit(tiny_sparsedm(), tmp_path, precision="64-true")


def test_several_patterns_learn_from_the_dense_path_in_one_step() -> None:
    module = tiny_sparsedm(also=["7:8", "3:4"], decay=0.0)
    module.train()
    seen: list[str] = []
    denoise = module.denoise

    def spy(*args: Any) -> torch.Tensor:
        seen.append(str(next(iter(module.masks.layers.values())).sparsity))
        return denoise(*args)

    module.denoise = spy  # type: ignore[method-assign, assignment]
    loss, values = module.loss(BATCH, torch.Generator().manual_seed(0))
    loss.backward()
    assert seen[0] == "None"
    assert seen[1] in ("7:8", "3:4")
    assert seen[2] == "2:4"
    assert {"dense_denoise_loss", "denoise_loss", "distill_loss"} <= values.keys()
    assert next(iter(module.masks.layers.values())).sparsity == TWO_FOUR
    assert all(layer.weight.grad is not None for layer in module.masks.layers.values())


def test_the_loss_of_several_patterns_by_hand() -> None:
    """The dense path learns from the target and the teacher, the masked ones from the target and the dense path."""
    module = tiny_sparsedm(also=["3:4"], distill_weight=0.7, noise_weight=0.3)
    with torch.no_grad():  # or the teacher is what the dense path is
        for layer in module.masks.layers.values():
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    module.masks.refresh()
    module.train()
    x_t, t, cond, target = module.diffuse(BATCH, torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = module._dense.on(torch.device("cpu"))(x_t, t, cond)
    paths = {}
    for pattern in (None, Sparsity(3, 4), TWO_FOUR):
        module.set_sparsity(pattern)
        paths[str(pattern)] = module.denoiser(x_t, t, cond)
    mse = torch.nn.functional.mse_loss
    expected = 0.3 * mse(paths["None"], target) + 0.7 * mse(paths["None"], teacher)
    for name in ("3:4", "2:4"):
        expected = expected + 0.3 * mse(paths[name], target) + 0.7 * mse(paths[name], paths["None"].detach())
    weight = next(iter(module.masks.layers.values())).weight
    (wanted,) = torch.autograd.grad(expected / 3, weight)
    loss, _ = module.loss(BATCH, torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss, expected / 3)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("pattern", ["3:4", "6:8", "7:8", "15:16"])
def test_masks_of_several_patterns_are_nested(pattern: str) -> None:
    tiny_sparsedm(also=[pattern])
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    assert not (nm_mask(weight, TWO_FOUR) & ~nm_mask(weight, Sparsity.parse(pattern))).any()


def test_several_patterns_are_reported_each(tmp_path: Path) -> None:
    module = tiny_sparsedm(also=["6:8"])
    fit(module, tmp_path)
    variants = module.variants()
    assert list(variants) == ["dense", "one-shot 2:4", "sparsedm at dense", "sparsedm at 6:8", "sparsedm 2:4"]
    states = {name: effective_state(variant.denoiser.network) for name, variant in variants.items()}
    name = f"{next(iter(module.masks.layers))}.weight"
    shadow = module.denoiser.network.state_dict()[name]
    assert torch.equal(states["sparsedm at dense"][name], shadow)
    assert torch.equal(states["sparsedm at 6:8"][name], shadow * nm_mask(shadow, Sparsity(6, 8)))


def test_switching_at_run_time_is_exact() -> None:
    module = tiny_sparsedm()
    x, t, cond = BATCH["x"], torch.full((4,), 500), BATCH["cond"]
    module.eval()

    def output(pattern: Any) -> torch.Tensor:
        module.set_sparsity(pattern)
        with torch.no_grad():
            prediction: torch.Tensor = module.denoiser(x, t, cond)
        return prediction

    dense, pruned = output(None), output(TWO_FOUR)
    assert not torch.equal(dense, pruned)
    assert torch.equal(output(None), dense)
    assert torch.equal(output(TWO_FOUR), pruned)
    layers = list(module.masks.layers)
    module.set_sparsity({r".*\.ff\..*": None})
    patterns = {name: module.masks.layers[name].sparsity for name in layers}
    assert all((pattern is None) == (".ff." in name) for name, pattern in patterns.items())
    require(module, SparsityControl, MaskInvariant())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_masks_at": 1.0}, r"freeze_masks_at: 1\.0"),
        ({"also": ["1:4"]}, "also: 1:4 does not lie between"),
        ({"also": ["4:4"]}, "also: 4:4 does not lie between"),
        ({"also": ["9:8"]}, "9:8"),
        ({"also": ["6:7"]}, "also: 2:4 may keep what 6:7 prunes"),
        ({"also": ["5:8"]}, "also: 2:4 may keep what 5:8 prunes"),
        ({"also": ["255:256"]}, "sparsity 255:256: .* no masked layer is a multiple of 256"),
        ({"decay": float("nan")}, "model.decay: nan is negative or not finite"),
        ({"noise_weight": float("inf")}, "model.noise_weight: inf is negative or not finite"),
        ({"warmup_steps": -5}, "model.warmup_steps: -5 is negative"),
        ({"also": ["3:4"], "freeze_masks_at": 0.5}, r"model\.also: masks of several patterns follow"),
        ({"also": ["3:4"], "mask_scores": "random"}, r"model\.also: masks of several patterns follow"),
        ({"also": ["3:4"], "one_shot": True}, r"model\.also: with model\.one_shot nothing is trained"),
        ({"also": ["3:4"], "calibration": Calibration(compensate=True)}, r"compensate: writes zeros into the weights"),
        ({"calibration": Calibration(weighting="logarithmic")}, r"calibration\.weighting: nothing is calibrated"),
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_sparsedm(**arguments)
