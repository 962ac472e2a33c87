"""Numeric checks of SparseDM's specification (section 14) that need no full-size training and stand nowhere else.

Masks (1, 3, 4) are in tests/pruning/test_nm.py, gradients and switching (2, 5, 7) in tests/pruning/test_masks.py and
tests/methods/test_sparsedm_modes.py, decay over processes (6) in tests/distributed/test_two_processes.py, masks of the
average (8) in tests/methods/test_sparsedm.py, sizes (9, 10) also in tests/diffusion/test_uvit.py, packed layers (17) in
tests/export/test_semi_structured.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss

from lightning_prune.data import EmbeddedFashion
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.models.uvit import UViT
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.module import lr_factor
from lightning_prune.protocols import PrunableUnit, Sparsity
from lightning_prune.pruning.masks import MaskSet, select_units
from lightning_prune.pruning.nm import nm_mask
from lightning_prune.pruning.ramps import staged
from lightning_prune.sharding.average import _Average
from tests.diffusion.test_uvit import PUBLIC, public
from tests.factories import fit, tiny_dit, tiny_sparsedm

TWO_FOUR = Sparsity(2, 4)
CONFIGS = Path(__file__).parents[2] / "configs"


# 2: the defect of the released code


def test_decay_added_before_unscaling_would_be_divided_away() -> None:
    """W = (1, -2, 3, -4): with a scale of 65536 the added part is 3.05e-9 and -6.10e-9, not 2e-4 and -4e-4."""
    net: Any = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2, 3, -4]]))
    masks = MaskSet(net, [PrunableUnit("0", "linear", ("0.weight",), 4)], TWO_FOUR)
    scale = 65536.0
    net[0].weight.grad = torch.full((1, 4), 0.1 * scale, dtype=torch.float64)
    masks.add_decay(2e-4)
    added = net[0].weight.grad[0] / scale - 0.1
    torch.testing.assert_close(added[:2], torch.tensor([3.05e-9, -6.10e-9]).double(), rtol=2e-3, atol=1e-13)
    assert (added[2:].abs() < 1e-15).all()


# 3: a layer of three channels


def test_the_last_convolution_of_three_channels_is_left_dense() -> None:
    net: Any = nn.Sequential(nn.Conv2d(8, 3, 3), nn.Conv2d(3, 3, 3))
    units = [PrunableUnit(str(i), "conv", (f"{i}.weight",), net[i].in_channels) for i in range(2)]
    assert net[1].weight.numel() == 81
    assert [unit.name for unit in select_units(units, None, [], 4)] == ["0"]


# 6: decay under precision, accumulation and processes


class Added(Callback):
    """What the hook before the first optimizer step adds to gradients, and the weights it saw."""

    def __init__(self) -> None:
        self.added: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.added:  # callbacks come before the module
            self.before = {n: layer.weight.grad.clone() for n, layer in pl_module.masks.layers.items()}

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        layers = pl_module.masks.layers
        if not self.added and hasattr(self, "before") and all(x.weight.grad is not None for x in layers.values()):
            self.added = {n: layer.weight.grad - self.before[n] for n, layer in layers.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_decay_is_the_same_under_precision_and_accumulation(precision: Any, accumulated: int, tmp_path: Path) -> None:
    look, module = Added(), tiny_sparsedm(decay=0.5, ema_decay=None)
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": accumulated, "max_steps": 2}
    if precision == "16-mixed":  # which Lightning gives GPUs alone; scaled by 65536 as there
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        options = {**options, "precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    fit(module, tmp_path, callbacks=[look], **options)
    assert look.added
    start = tiny_dit().network.state_dict()
    for name, added in look.added.items():
        weight = start[f"{name}.weight"]
        expected = 0.5 * weight * ~nm_mask(weight, TWO_FOUR)
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)


# 8: evaluation sees mask(average of W)


@pytest.mark.parametrize(("steps", "share"), [(1_000, 0.9048), (6_931, 0.5), (10_000, 0.3679), (50_000, 0.0067)])
def test_the_average_forgets_its_start_at_the_published_rate(steps: int, share: float) -> None:
    online = nn.Linear(1, 1, bias=False)
    nn.init.ones_(online.weight)
    averaged = _Average(online, torch.device("cpu"), 0.9999)
    averaged.update_parameters(online)  # the first one copies
    nn.init.zeros_(online.weight)
    for _ in range(steps):
        averaged.update_parameters(online)
    assert averaged.module.weight.item() == pytest.approx(share, abs=2e-4)


# 9 and 10: sizes, and MACs in each convention

# Millions of parameters; GMACs of linear layers and convolutions, of attention products, and of all.
ABOUT: dict[str, tuple[float, float, float, float]] = {
    "cifar10 small": (44.255, 11.3216, 0.879, 12.201),
    "celeba64 small": (44.292, 11.331, 0.879, 12.211),
    "coco small": (44.693, 14.745, 1.485, 16.230),
    "coco small deep": (58.346, 19.298, 1.942, 21.240),
    "imagenet256 large": (286.763, 73.593, 2.863, 76.456),
}
RATIOS = {  # of CIFAR-10 S/2: released layers, skips too, all times N/M, released layers with attention
    "31:32": (10.993, 10.968, 10.968, 11.872),
    "15:16": (10.665, 10.614, 10.614, 11.544),
    "7:8": (10.008, 9.907, 9.906, 10.887),
    "3:4": (8.694, 8.492, 8.491, 9.573),
    "2:4": (6.067, 5.662, 5.661, 6.946),
    "1:4": (3.439, 2.833, 2.830, 4.318),
}


def giga(macs: Any, digits: int = 3) -> float:
    return round(float(macs) / 1e9, digits)


@pytest.mark.parametrize("name", ABOUT)
def test_macs_of_published_networks_with_and_without_attention(name: str) -> None:
    denoiser, (parameters, linear, attention, both) = public(name), ABOUT[name]
    ledger = count_denoiser(denoiser)
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6, 3) == parameters
    assert giga(ledger.macs("linear"), 4 if linear == 11.3216 else 3) == linear
    assert giga(ledger.macs() - ledger.macs("linear")) == attention
    assert giga(ledger.macs()) == both


@pytest.mark.parametrize("pattern", RATIOS)
def test_macs_of_every_ratio_in_each_convention(pattern: str) -> None:
    denoiser, sparsity = public("cifar10 small"), Sparsity.parse(pattern)
    ledger = count_denoiser(denoiser)
    released = select_units(denoiser.anatomy(), None, denoiser.default_dense(), sparsity.m)
    with without_weights():
        dense = UViT(config=PUBLIC["cifar10 small"], mask_skip_linear=True).default_dense()
    skips_too = select_units(denoiser.anatomy(), None, dense, sparsity.m)
    assert (len(released), len(skips_too)) == (52, 58)
    a, b = ({unit.name: sparsity for unit in units} for units in (released, skips_too))
    plain = ledger.macs("linear") * sparsity.n / sparsity.m
    found = (ledger.kept(a, "linear"), ledger.kept(b, "linear"), plain, ledger.kept(a))
    assert tuple(map(giga, found)) == RATIOS[pattern]


def test_masks_of_the_small_network_leave_half_and_skips_are_their_own() -> None:
    denoiser = public("cifar10 small")
    sizes = {u.name: denoiser.network.get_parameter(u.parameters[0]).numel() for u in denoiser.anatomy()}
    masked = [u.name for u in select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)]
    assert sum(sizes[name] for name in masked) * TWO_FOUR.fraction == 20_447_232
    assert sum(size for name, size in sizes.items() if "skip" in name) == 3_145_728
    with without_weights():
        biased = UViT(config={**PUBLIC["cifar10 small"], "qkv_bias": True})
    more = sum(p.numel() for p in biased.parameters()) - sum(p.numel() for p in denoiser.parameters())
    assert more == 19_968


@pytest.mark.parametrize(("size", "linear"), [(32, 4.986), (64, 19.92)])
def test_the_ddpm_unet_of_112_channels(size: int, linear: float) -> None:
    config = {
        "sample_size": size,
        "layers_per_block": 2,
        "block_out_channels": [112, 224, 224, 448, 448],
        "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * 3,
        "attention_head_dim": 112,
        "norm_num_groups": 16,
        "resnet_time_scale_shift": "scale_shift",
    }
    with without_weights():
        denoiser = UNet2D(config=config)
    # Diffusers' attention and norms have 0.02 M parameters more than the authors' network.
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6, 1) == 92.7
    ledger = count_denoiser(denoiser)
    assert giga(ledger.macs("linear"), len(str(linear).partition(".")[2])) == linear
    if size == 32:
        assert (giga(ledger.macs() - ledger.macs("linear")), giga(ledger.macs())) == (0.001, 4.987)


# 11 and 12: diffusion and optimizer


def test_the_schedule_of_stable_diffusion() -> None:
    process = Process("scaled_linear", "epsilon", beta_start=0.00085, beta_end=0.012)
    first, middle, last = (float(process.alphas_cumprod[n - 1]) for n in (1, 500, 1000))
    assert first == pytest.approx(0.99915, abs=5e-6)
    assert middle == pytest.approx(0.27767, abs=5e-6)
    assert last == pytest.approx(0.00466010, abs=5e-8)


@pytest.mark.parametrize(("time", "expected"), [(0.1, 0.896282), (0.5, 0.079064), (1.0, 4.319e-5)])
def test_the_linear_schedule_is_the_continuous_one_at_its_timesteps(time: float, expected: float) -> None:
    """a(t) = exp(-(0.1 t + 9.95 t^2)); the discrete process has it up to its step of a thousandth."""
    times = (torch.arange(1000) + 0.5) / 1000
    abar = Process("linear", "epsilon").alphas_cumprod
    exact = torch.exp(-(0.1 * time + 9.95 * torch.tensor(time) ** 2))
    assert float(exact) == pytest.approx(expected, rel=1e-3)
    nearest = int((times - time + 0.0005).abs().argmin())
    assert float(abar[nearest].log()) == pytest.approx(float(exact.log()), rel=0.02)


def test_the_learning_rate_of_cifar10() -> None:
    """2e-4 min(k / 2500, 1) at step k, the first one at 0."""
    for step in (0, 1, 1250, 2500, 3000):
        found = 2e-4 * lr_factor(step, float("inf"), 2500, "constant-from-zero")
        assert found == pytest.approx(2e-4 * min(step / 2500, 1))
    config = yaml.safe_load((CONFIGS / "sparsedm" / "cifar10_uvit.yaml").read_text())
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert (model["optimizer"]["init_args"]["lr"], model["warmup_steps"]) == (2e-4, 2500)
    assert model["lr_schedule"] == "constant-from-zero"
    assert trainer["max_steps"] * config["data"]["init_args"]["batch_size"] / 50_000 == 1280


@pytest.mark.parametrize(
    ("chain", "stages"),
    [("step31", ("31:32", "15:16", "7:8", "3:4", "2:4")), ("step7", ("7:8", "6:8", "5:8", "4:8", "2:4"))],
)
def test_stages_of_the_published_chains(chain: str, stages: tuple[str, ...]) -> None:
    """100,000 steps each, whose last one is 2:4; but for the chain the runs are the one at a fixed ratio."""
    config = yaml.safe_load((CONFIGS / "sparsedm" / f"cifar10_uvit_{chain}.yaml").read_text())
    fixed = yaml.safe_load((CONFIGS / "sparsedm" / "cifar10_uvit.yaml").read_text())
    ramp = config["trainer"]["callbacks"].pop(0)["init_args"]
    ratios = [Sparsity.parse(pattern) for pattern in ramp["chain"]]
    for stage, ratio in enumerate(stages):
        for step in (100_000 * stage, 100_000 * stage + 99_999):
            found = staged(step, config["trainer"]["max_steps"], ratios, ramp["reached_at"])
            assert found == Sparsity.parse(ratio)
    assert config | {"run": fixed["run"]} == fixed


# 14: without training


def test_masks_without_training_are_catastrophic_and_the_fixed_pattern_most() -> None:
    batch = next(iter(data().train_dataloader()))
    error = {}
    for scores in ("magnitude", "position"):
        module = SparseDM(DiT(weights="embedded:fashion_dit"), Process("cosine", "v"), mask_scores=scores, seed=0)
        x_t, t, cond, target = module.diffuse(batch, torch.Generator().manual_seed(0))
        with torch.no_grad():
            error[scores] = float(mse_loss(module.denoiser.eval()(x_t, t, cond), target))
            error["dense"] = float(mse_loss(module._dense.value(x_t, t, cond), target))
    assert error["dense"] * 1.5 < error["magnitude"] < error["position"]


def data() -> EmbeddedFashion:
    module = EmbeddedFashion(batch_size=32)
    module.setup("fit")
    return module
