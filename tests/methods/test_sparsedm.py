"""SparseDM in training: masks under averaging, decay, ramp, teacher, reported networks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from PIL import Image

from lightning_prune.callbacks import MaskInvariant, MaskMap, SparsityRamp
from lightning_prune.data import EmbeddedFashion
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import MaskSet, effective_state, masked_layers
from lightning_prune.pruning.nm import nm_mask, to_groups, violations
from lightning_prune.sharding import WeightAverage
from tests.factories import fit, tiny_dit, tiny_sparsedm

TWO_FOUR = Sparsity(2, 4)


def test_masks_of_the_averaged_weights_are_in_place_while_validating(tmp_path: Path) -> None:
    class Look(Callback):
        checked = 0

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            averaged = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))
            online = dict(averaged._average_model.module.denoiser.network.named_parameters())
            for name, layer in masked_layers(pl_module.denoiser.network).items():
                assert not torch.equal(layer.weight, online[f"{name}.weight"]), "averaged weights are swapped in"
                assert torch.equal(layer.mask.bool(), nm_mask(layer.weight, TWO_FOUR))
                self.checked += 1

    look, module = Look(), tiny_sparsedm(ema_decay=0.5, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05))
    fit(module, tmp_path, callbacks=[look], val_check_interval=2, limit_val_batches=1)
    assert look.checked > 0
    for layer in module.masks.layers.values():
        assert torch.equal(layer.mask.bool(), nm_mask(layer.weight, TWO_FOUR))


def test_effective_weights_hold_exactly_n_and_shadow_weights_stay_dense(tmp_path: Path) -> None:
    module = tiny_sparsedm()
    fit(module, tmp_path)
    state = effective_state(module.denoiser.network)
    for name, layer in module.masks.layers.items():
        assert ((to_groups(state[f"{name}.weight"], 4) != 0).sum(-1) == 2).all()
        assert violations(layer.weight, TWO_FOUR) > 0, "the shadow weight is dense"


def test_the_checkpoint_holds_dense_weights_and_no_teacher(tmp_path: Path) -> None:
    module = tiny_sparsedm(distill_weight=1.0)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"denoiser.{name}" for name in tiny_dit().state_dict()}
    name = next(iter(module.masks.layers))
    assert violations(state[f"denoiser.network.{name}.weight"], TWO_FOUR) > 0


def test_decay_is_its_strength_times_the_pruned_weights() -> None:
    module = tiny_sparsedm(decay=2e-4)
    batch = {"x": torch.randn(4, 1, 32, 32), "cond": torch.arange(4)}
    loss, _ = module.loss(batch, torch.Generator().manual_seed(0))
    loss.backward()
    before = {n: layer.weight.grad.clone() for n, layer in module.masks.layers.items()}
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters(), lr=0.1))
    for name, layer in module.masks.layers.items():
        added = layer.weight.grad - before[name]
        torch.testing.assert_close(added, 2e-4 * (1 - layer.mask) * layer.weight, rtol=0, atol=1e-6)
        assert added.abs().sum() > 0


def test_decay_is_added_once_per_optimizer_step(tmp_path: Path) -> None:
    calls: list[float] = []
    module = tiny_sparsedm(decay=0.1)
    original = module.masks.add_decay

    def counting(strength: float) -> None:
        calls.append(strength)
        original(strength)

    module.masks.add_decay = counting  # type: ignore[method-assign]
    fit(module, tmp_path, max_steps=3, accumulate_grad_batches=2)
    assert calls == [0.1, 0.1, 0.1]


def test_the_ramp_keeps_optimizer_and_average(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.patterns: list[str] = []
            self.optimizers: set[int] = set()
            self.moments: list[float] = []
            self.averaged: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.patterns.append(str(next(iter(masked_layers(pl_module.denoiser.network).values())).sparsity))
            self.optimizers.add(id(trainer.optimizers[0]))
            state = trainer.optimizers[0].state[next(iter(pl_module.parameters()))]
            self.moments.append(float(state["step"]))
            (average,) = (c for c in trainer.callbacks if isinstance(c, WeightAverage))
            self.averaged.append(int(average._average_model.n_averaged))

    watch = Watch()
    fit(
        tiny_sparsedm(ema_decay=0.75),
        tmp_path,
        callbacks=[SparsityRamp(["7:8", "3:4", "2:4"], 0.5), MaskInvariant(), watch],
    )
    assert watch.patterns == ["7:8", "3:4", "2:4", "2:4"]
    assert watch.moments == [1, 2, 3, 4]
    assert watch.averaged == [0, 1, 2, 3], "before each step's own"
    assert len(watch.optimizers) == 1


def test_the_invariant_stops_a_run_whose_masks_break(tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            next(iter(pl_module.masks.layers.values())).mask.fill_(1)

    with pytest.raises(RuntimeError, match="do not hold their sparsity pattern"):
        fit(tiny_sparsedm(), tmp_path, callbacks=[Break(), MaskInvariant()])


def test_the_map_of_flips_has_a_row_a_layer_and_a_column_a_step(tmp_path: Path) -> None:
    module, drawn = tiny_sparsedm(), MaskMap()
    trainer = fit(module, tmp_path, max_steps=4, log_every_n_steps=2, callbacks=[drawn])
    assert drawn.state_dict()["steps"] == [2, 4]
    assert [set(at) for at in drawn.state_dict()["rates"]] == [set(module.masks.layers)] * 2
    assert drawn.state_dict()["rates"][-1] == {
        name: float(trainer.callback_metrics[f"flip_rate/{name}"]) for name in module.masks.layers
    }
    with Image.open(tmp_path / "masks" / "flips.png") as picture:
        assert picture.size == (2 * 8, len(module.masks.layers) * 8)
    again = MaskMap()
    again.load_state_dict(drawn.state_dict())
    assert again.state_dict() == drawn.state_dict()


def test_the_reported_networks(tmp_path: Path) -> None:
    module = tiny_sparsedm()
    fit(module, tmp_path)
    variants = module.variants()
    assert list(variants) == ["dense", "one-shot 2:4", "sparsedm 2:4"]
    start = tiny_dit().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in variants["dense"].denoiser.state_dict().items())
    assert not masked_layers(variants["dense"].denoiser.network)
    one_shot = effective_state(variants["one-shot 2:4"].denoiser.network)
    name = next(iter(module.masks.layers))
    weight = start[f"network.{name}.weight"]
    assert torch.equal(one_shot[f"{name}.weight"], weight * nm_mask(weight, TWO_FOUR))


def test_rows_share_weights_and_are_made_when_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = tiny_sparsedm(also=["3:4"]), []

    def masked(*given: Any) -> MaskSet:
        made.append(given)
        return MaskSet(*given)

    monkeypatch.setattr("lightning_prune.methods.sparsedm.module.MaskSet", masked)
    variants = module.variants()
    names = ["dense", "one-shot 2:4", "sparsedm at dense", "sparsedm at 3:4", "sparsedm 2:4"]
    assert list(variants) == names
    assert made == []
    dense, one_shot, _, further, result = (variants[name].denoiser for name in names)
    assert len(made) == 3
    for copy, owner in ((one_shot, dense), (further, result)):
        assert [id(p) for p in copy.parameters()] == [id(p) for p in owner.parameters()]
    patterns = [{str(s.sparsity) for s in masked_layers(n.network).values()} for n in (one_shot, further, result)]
    assert patterns == [{"2:4"}, {"3:4"}, {"2:4"}]
    assert variants["one-shot 2:4"].denoiser is one_shot


def test_half_precision_predicts_images_of_single_precision(tmp_path: Path) -> None:
    def predicted(precision: Any) -> torch.Tensor:
        settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_predict_batches": 1}
        trainer = pl.Trainer(accelerator="cpu", precision=precision, default_root_dir=tmp_path, **settings)
        data = EmbeddedFashion(batch_size=2, validation_samples=16)
        found: Any = trainer.predict(tiny_sparsedm(), datamodule=data)
        images: torch.Tensor = found[0][1]
        return images

    half, single = predicted("bf16-true"), predicted("32-true")
    assert half.dtype == single.dtype == torch.float32
    assert not torch.equal(half, single)
    assert float((half - single).abs().mean()) < 0.1


def test_default_layers_are_the_blocks_attention_and_feed_forward() -> None:
    names = list(tiny_sparsedm().masks.layers)
    assert all(".attn1." in name or ".ff.net." in name for name in names)
    assert len(names) == 2 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "5:4"}, "5:4"),
        ({"layers": ["no_such_layer"]}, "no_such_layer"),
        ({"decay": -1.0}, "decay"),
        ({"noise_weight": 0.0, "distill_weight": 0.0}, "nothing to learn from"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_bad_arguments_name_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_sparsedm(**arguments)


def test_a_ramp_that_ends_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends at 3:4, but model\.sparsity is 2:4"):
        fit(tiny_sparsedm(), tmp_path, callbacks=[SparsityRamp(["7:8", "3:4"])])


def test_n_equal_to_m_is_the_dense_control(tmp_path: Path) -> None:
    module = tiny_sparsedm(sparsity="4:4")
    assert list(module.variants()) == ["dense", "dense fine-tuned"]
    assert not masked_layers(module.denoiser.network)
    fit(module, tmp_path)
    assert module.kept_fraction() == {"aten": 1.0}
    start, trained = (variant.denoiser.network.state_dict() for variant in module.variants().values())
    assert any(not torch.equal(start[name], trained[name]) for name in start)
