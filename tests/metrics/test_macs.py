"""The arithmetic behind a ledger: layers counted by hand, and small networks that are really computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.diffusion.models import Denoiser
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d import UNet2D
from lightning_prune.diffusion.samplers import guided
from lightning_prune.metrics.macs import (
    Convention,
    LayerMacs,
    Ledger,
    MacsMismatchError,
    count,
    count_denoiser,
    macs_per_image,
    weight_statistics,
)
from lightning_prune.metrics.macs_trace import trace
from lightning_prune.protocols import InputError, Sparsity


def meta(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="meta")


# Small networks on the CPU, where everything is really computed


def small_dit(device: str = "cpu", heads: int = 2) -> DiT:
    config = {
        "num_layers": 2,
        "num_attention_heads": heads,
        "attention_head_dim": 16 // heads,
        "in_channels": 1,
        "out_channels": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    with torch.device(device):
        return DiT(config=config)


def small_unet(device: str = "cpu") -> UNet2D:
    config = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 11,
    }
    with torch.device(device):
        return UNet2D(config=config)


SMALL: list[Callable[..., Denoiser]] = [small_dit, small_unet]


def one_call(denoiser: Denoiser, batch: int = 1) -> Callable[[], Tensor]:
    t = torch.zeros(batch, dtype=torch.long)
    return lambda: denoiser(torch.zeros(batch, *denoiser.sample_shape), t, t)


@pytest.mark.parametrize("make", SMALL)
def test_small_networks_agree_on_the_cpu_and_count_their_attention(make: Callable[..., Denoiser]) -> None:
    denoiser = make()
    record = trace(denoiser.network, one_call(denoiser))
    assert {s: n for s, n in record.products.items() if n} == dict(record.dispatched)
    ledger = count_denoiser(denoiser)
    assert ledger.macs() == sum(record.dispatched.values())
    kinds = ledger.by_kind()
    assert kinds["attention"] > 0
    assert kinds["other"] == 0
    assert ledger.macs("linear") == kinds["linear"] + kinds["conv"] == ledger.macs() - kinds["attention"]


def test_small_dit_by_hand() -> None:
    ledger, tokens, width = count_denoiser(small_dit()), 16, 16
    assert ledger.inside("transformer_blocks.1.attn1") == tokens * 4 * width**2 + 2 * tokens**2 * width
    assert ledger.by_layer()["transformer_blocks.1.attn1"] == 2 * tokens**2 * width
    assert ledger.by_layer()["pos_embed.proj"] == tokens * width * 4
    # Four projections with a bias each, counted once.
    projections = [f"transformer_blocks.1.attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
    assert [ledger.by_layer("module")[p] for p in projections] == [tokens * width**2 + width] * 4


@pytest.mark.parametrize("make", SMALL)
def test_meta_and_cpu_give_the_same_ledger(make: Callable[..., Denoiser]) -> None:
    assert count_denoiser(make("meta")) == count_denoiser(make("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counting_stays_on_its_device_without_gradients(device: str) -> None:
    class Watch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            assert y.device.type == device
            assert not y.requires_grad
            return y

    assert count(Watch(8, 8, device=device), torch.zeros(3, 8, device=device)).macs() == 3 * 64


def test_names_are_those_of_the_anatomy() -> None:
    denoiser = small_unet()
    weighted = {row.layer for row in count_denoiser(denoiser).rows if row.kind in ("linear", "conv")}
    assert weighted == {unit.name for unit in denoiser.anatomy()}


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_does_not_depend_on_the_width_of_heads(heads: int) -> None:
    """Heads of 16, 8 and 4 channels: kernels that pad narrow heads must not make them dearer."""
    assert count_denoiser(small_dit(heads=heads)).by_kind()["attention"] == 2 * 2 * 16**2 * 16


def test_narrow_heads_are_kept_off_kernels_that_pad() -> None:
    ran: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for channels, fused in ((12, False), (16, True)):
        ran.clear()
        with Names():  # type: ignore[no-untyped-call]
            ledger = count(Attend(), torch.zeros(1, 2, 5, channels), torch.zeros(1, 2, 7, channels))
        assert ledger.by_kind()["attention"] == 2 * 2 * 5 * 7 * channels
        assert any("flash" in name for name in ran) == fused


class Attend(nn.Module):
    def forward(self, q: Tensor, kv: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, kv, value=kv, **options)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(5, 7)}])
def test_cpu_attention_counts_once_whatever_the_kernel(backend: SDPBackend, options: dict[str, Any]) -> None:
    with sdpa_kernel(backend):
        ledger = count(Attend(), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), **options)
    assert ledger.by_kind() == {"linear": 0, "conv": 0, "attention": 2 * 3 * 2 * 5 * 7 * 8, "other": 0}


def test_grouped_query_attention() -> None:
    for device in ("cpu", "meta"):
        q, kv = torch.zeros(1, 6, 5, 8, device=device), torch.zeros(1, 2, 7, 8, device=device)
        assert count(Attend(), q, kv, enable_gqa=True).macs() == 6 * 2 * 5 * 7 * 8


FUSED: list[tuple[str, tuple[Any, ...]]] = [
    ("_scaled_dot_product_flash_attention", ()),
    ("_scaled_dot_product_flash_attention_for_cpu", ()),
    ("_scaled_dot_product_efficient_attention", (None, False)),
    ("_scaled_dot_product_cudnn_attention", (None, False)),
    ("_scaled_dot_product_fused_attention_overrideable", ()),
]


@pytest.mark.parametrize(("name", "options"), FUSED)
def test_dispatcher_knows_every_fused_attention(name: str, options: tuple[Any, ...]) -> None:
    q, kv = meta(2, 3, 16, 8).half(), meta(2, 3, 32, 8).half()
    operation = getattr(torch.ops.aten, name)
    record = trace(nn.Identity(), lambda: operation(q, kv, kv, *options))
    assert sum(record.dispatched.values()) == 2 * 3 * 2 * 16 * 32 * 8


# Layers and products by hand


@pytest.mark.parametrize(
    ("layer", "shape", "products", "bias"),
    [
        (nn.Linear(6, 4), (2, 5, 6), 10 * 24, 4),
        (nn.Linear(6, 4, bias=False), (6,), 24, 0),
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 8 * 6 * 4 * 3, 8 * 6),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 8, 8), 2 * 16 * 6 * 4 * 9, 0),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), (1, 4, 8, 8), 64 * 8 * 1 * 9, 64 * 8),
        (nn.Conv2d(4, 6, 1), (4, 8, 8), 64 * 6 * 4, 64 * 6),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * 3 * 2 * 8, 8 * 3),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (1, 4, 8, 8), 64 * 4 * 6 * 16, 256 * 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False), (1, 4, 3, 3), 9 * 4 * 3 * 4, 0),
    ],
)
def test_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], products: int, bias: int) -> None:
    ledger = count(layer, torch.zeros(shape))
    assert [ledger.macs(c) for c in ("aten", "linear", "module")] == [products, products, products + bias]


@pytest.mark.parametrize(
    ("layer", "operations"),
    [
        (nn.GroupNorm(2, 4), 2),
        (nn.LayerNorm(8), 2),
        (nn.RMSNorm(8), 2),
        (nn.BatchNorm1d(4), 2),
        (nn.LayerNorm(8, elementwise_affine=False), 1),
        (nn.InstanceNorm1d(4), 1),
    ],
)
def test_norms_count_in_the_module_convention_alone(layer: nn.Module, operations: int) -> None:
    ledger = count(layer, torch.zeros(3, 4, 8))
    assert [ledger.macs(c) for c in ("aten", "linear", "module")] == [0, 0, operations * 96]


class Calls(nn.Module):
    """A module without layers that runs a function of its inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return self.function(*inputs, **options)


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.mm, [(3, 4), (4, 5)], 60),
        (torch.matmul, [(2, 3, 4), (2, 4, 5)], 120),
        (torch.matmul, [(3, 4), (4,)], 12),
        (torch.dot, [(4,), (4,)], 4),
        (torch.addmm, [(5,), (3, 4), (4, 5)], 60),
        (torch.addmv, [(3,), (3, 4), (4,)], 12),
        (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [(2, 3, 4), (2, 5, 4)], 120),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_outside_layers(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], macs: int, device: str
) -> None:
    ledger = count(Calls(function), *[torch.zeros(shape, device=device) for shape in shapes])
    assert ledger.by_kind() == {"linear": 0, "conv": 0, "attention": 0, "other": macs}
    assert ledger.macs("linear") == ledger.macs("module") == 0


def test_products_are_filed_under_the_module_that_makes_them() -> None:
    network = nn.ModuleDict({"score": Calls(torch.matmul), "proj": nn.Linear(5, 2)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = network

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return cast(Tensor, self.parts["proj"](self.parts["score"](a, b)))

    ledger = count(Net(), torch.zeros(3, 4), torch.zeros(4, 5))
    assert ledger.by_layer() == {"parts.score": 60, "parts.proj": 30}
    assert ledger.inside("parts") == 90
    assert ledger.inside("parts.proj", "linear") == 30
    with pytest.raises(InputError, match=r"parts\.pro:"):
        ledger.inside("parts.pro")


def test_functional_layers_count_as_layers_of_their_module() -> None:
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3)
    assert count(Calls(F.conv2d), x, weight=weight).by_kind("linear") == {"linear": 0, "conv": 36 * 6 * 36}
    turned = count(Calls(F.conv_transpose2d), x, torch.zeros(4, 6, 3, 3))
    assert turned.by_kind("linear") == {"linear": 0, "conv": 64 * 4 * 6 * 9}
    linear = count(Calls(F.linear), torch.zeros(3, 4), torch.zeros(5, 4))
    assert linear.by_kind("linear") == {"linear": 60, "conv": 0}


def test_multihead_attention_of_torch_is_counted_in_full() -> None:
    """Its layers are called by function from within, so they belong to no layer, but nothing is lost."""
    network = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 5, 8)
    assert count(network, x, x, x).macs() == 4 * 5 * 64 + 2 * 25 * 8


@pytest.mark.parametrize("make", SMALL)
def test_inference_mode_changes_nothing(make: Callable[..., Denoiser]) -> None:
    denoiser = make()
    expected = count_denoiser(denoiser)
    with torch.inference_mode():
        assert count_denoiser(denoiser) == expected


def test_shared_and_idle_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.idle = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.again(self.first(x)))

    ledger = count(Net(), torch.zeros(3, 4))
    assert ledger.rows == (LayerMacs("first", "linear", 2, 96, 8), LayerMacs("idle", "linear", 0, 0, 0))
    assert ledger.kept({"idle": Sparsity(1, 4)}) == 96
    assert ledger.parameters == 40


class MaskedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * torch.zeros_like(self.weight), self.bias)


class MaskedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(x, self.weight * torch.zeros_like(self.weight), self.bias)
        return output


@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masked_layers_count_as_their_dense_selves(make: Callable[..., Denoiser], device: str) -> None:
    denoiser = make(device)
    dense = count_denoiser(denoiser)
    for layer in denoiser.network.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = MaskedLinear
        elif type(layer) is nn.Conv2d:
            layer.__class__ = MaskedConv2d
    assert count_denoiser(denoiser) == dense


def test_narrowed_layers_are_read_from_their_weights() -> None:
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 4))
    assert count(layer, torch.zeros(3, 4)).macs() == 3 * 6 * 4


def test_a_disagreement_is_an_error_that_names_the_layer() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    with pytest.raises(MacsMismatchError, match=r"1 \(linear\): 48 by its shapes, 96 dispatched"):
        count(nn.Sequential(nn.Linear(4, 4), Twice(4, 4)), torch.zeros(3, 4))


def test_unet2d_of_diffusers_alone() -> None:
    """`count` takes any module, not denoisers only."""
    network: Any = UNet2DModel(**small_unet().config())
    x, ids = torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    assert count(network, x, timestep=ids, class_labels=ids) == count_denoiser(small_unet())


# What is left behind


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    modes = [part.training for part in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    yield
    assert [part.training for part in network.modules()] == modes
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in network.modules())
    assert not any(p._forward_hooks_with_kwargs for p in network.modules())
    after = network.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("make", SMALL)
def test_nothing_is_left_behind(make: Callable[..., Denoiser]) -> None:
    denoiser = make().train()
    next(iter(denoiser.network.children())).eval()
    seed = torch.get_rng_state()
    with unchanged(denoiser):
        count_denoiser(denoiser)
    assert torch.equal(torch.get_rng_state(), seed)


def test_nothing_is_left_behind_by_a_failing_call() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2), nn.Linear(3, 3)).train()
    with unchanged(network), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(network, torch.ones(5, 4))
    assert network[:3](torch.ones(5, 4)).requires_grad


def test_running_statistics_stay() -> None:
    network = nn.BatchNorm1d(4).train()
    with unchanged(network):
        count(network, torch.ones(5, 4))


# Masks and images


def toy() -> Ledger:
    rows = (
        LayerMacs("conv", "conv", 1, 800, 20),
        LayerMacs("fc1", "linear", 1, 100, 10),
        LayerMacs("fc2", "linear", 1, 60, 0),
        LayerMacs("attn", "attention", 1, 40, 0),
        LayerMacs("norm", "norm", 1, 0, 30),
        LayerMacs("", "other", 0, 5, 0),
    )
    return Ledger(rows, 7)


def test_conventions() -> None:
    ledger = toy()
    assert [ledger.macs(c) for c in ("linear", "module", "aten")] == [960, 1020, 1005]
    assert ledger.by_kind("module") == {"linear": 170, "conv": 820, "norm": 30}
    assert ledger.by_layer() == {"conv": 800, "fc1": 100, "fc2": 60, "attn": 40, "": 5}
    assert ledger.inside("") == ledger.macs()
    for figure in (ledger.macs, partial(ledger.masked, {}), partial(ledger.kept, {})):
        with pytest.raises(InputError, match="'flops' is none of linear, module, aten"):
            figure(cast(Convention, "flops"))


def test_masks_keep_exactly_n_of_m() -> None:
    ledger = toy()
    sparsities = {"conv": Sparsity(1, 4), "fc1": Sparsity(2, 4), "fc2": Sparsity(4, 4)}
    assert ledger.kept({}) == 1005
    assert ledger.kept(sparsities) == 1005 - 600 - 50
    assert ledger.kept(sparsities, "linear") == 960 - 650
    assert ledger.kept(sparsities, "module") == 1020 - 650  # biases and norms stay
    assert ledger.kept_share(sparsities) == Fraction(355, 1005)
    assert ledger.kept({"fc1": Sparsity(1, 3)}) == 1005 - Fraction(200, 3)


def test_masked_and_accelerable() -> None:
    ledger = toy()
    sparsities = {"conv": Sparsity(2, 4), "fc1": Sparsity(2, 4), "fc2": Sparsity(1, 4)}
    assert ledger.masked(sparsities) == 960
    assert ledger.masked_share(sparsities) == Fraction(960, 1005)
    assert ledger.masked({"fc1": Sparsity(4, 4)}) == 0
    # There is no 2:4 kernel for convolutions; 1:4 is 2:4, too, and 3:4 and 4:8 are not.
    assert ledger.accelerable(sparsities) == 160
    for pattern in (Sparsity(3, 4), Sparsity(4, 8)):
        assert ledger.accelerable({**sparsities, "fc2": pattern}) == 100
        assert ledger.accelerable({**sparsities, "fc2": pattern}, "module") == 110


@pytest.mark.parametrize("name", ["fc3", "attn", "norm"])
def test_only_layers_with_weights_can_be_masked(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no linear or convolution layer"):
        toy().kept({name: Sparsity(2, 4)})


def test_images() -> None:
    assert macs_per_image(7, steps=50) == 350
    assert macs_per_image(7, steps=50, guidance=7.5) == 700
    assert macs_per_image(Fraction(1, 3), steps=2, guidance=0.0) == Fraction(4, 3)
    with pytest.raises(InputError, match="0 sampling steps"):
        macs_per_image(7, steps=0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_of_the_sampler_costs_what_the_ledger_says(scale: float) -> None:
    denoiser = small_unet().eval()
    predict = guided(denoiser, denoiser.null_condition, scale)
    x, t = torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    record = trace(denoiser.network, lambda: predict(x, t, t))
    assert sum(record.dispatched.values()) == macs_per_image(count_denoiser(denoiser).macs(), 1, scale)


# Weights


def test_weight_statistics() -> None:
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2).to(torch.bfloat16))
    first, second = cast(list[nn.Linear], list(network))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]]))
        first.bias.fill_(0)
        second.weight.fill_(1)
        second.bias.fill_(1)
    statistics = weight_statistics(network)
    assert (statistics.parameters, statistics.nonzero, statistics.bytes) == (20, 14, 10 * 4 + 10 * 2)


def test_shared_weights_count_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert weight_statistics(nn.Sequential(layer, layer)).parameters == 16


def test_weights_without_values_have_no_statistics() -> None:
    with pytest.raises(InputError, match="meta device"):
        weight_statistics(nn.Linear(2, 2, device="meta"))
