"""U-ViT: the public checkpoints' names and sizes, and an independent computation of its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.diffusion.models.uvit import UViT
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.export import load, save_artifact
from lightning_prune.metrics.macs import count_denoiser
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import select_units
from tests.backbones import BACKBONES

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 2, "embed_dim": 512, "depth": 12, "num_heads": 8}
LATENT: dict[str, Any] = {"img_size": 32, "patch_size": 2, "in_chans": 4, "conv": False, "num_classes": 1001}
MID: dict[str, Any] = {"embed_dim": 768, "depth": 16, "num_heads": 12}
PUBLIC = {
    "cifar10 small": SMALL,
    "celeba64 small": SMALL | {"img_size": 64, "patch_size": 4},
    "coco small": SMALL | {"in_chans": 4, "clip_dim": 768, "num_clip_token": 77},
    "coco small deep": SMALL | {"in_chans": 4, "clip_dim": 768, "num_clip_token": 77, "depth": 16},
    "imagenet64 mid": MID | {"img_size": 64, "patch_size": 4, "num_classes": 1001},
    "imagenet256 large": LATENT | {"embed_dim": 1024, "depth": 20, "num_heads": 16},
    "imagenet256 huge": LATENT | {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}  # fmt: skip


def public(name: str) -> UViT:
    with without_weights():
        return UViT(config=PUBLIC[name])


def names_in_the_checkpoint(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public checkpoint, written down from its layout."""
    width, patch, channels = config["embed_dim"], config["patch_size"], config.get("in_chans", 3)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_pred.weight": (patch * patch * channels, width),
        "decoder_pred.bias": (patch * patch * channels,),
    }
    extras = 1
    if config.get("conv", True):
        shapes |= {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}
    if "num_classes" in config:
        extras += 1
        shapes["label_emb.weight"] = (config["num_classes"], width)
    if "clip_dim" in config:
        extras += config["num_clip_token"]
        shapes |= {"context_embed.weight": (width, config["clip_dim"]), "context_embed.bias": (width,)}
    shapes["pos_embed"] = (1, extras + (config["img_size"] // patch) ** 2, width)
    half = config["depth"] // 2
    blocks = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for block in blocks:
        layers = {"norm1": (), "norm2": (), "attn.proj": (width,), "mlp.fc1": (width,), "mlp.fc2": (4 * width,)}
        outputs = {"mlp.fc1": 4 * width}
        if block.startswith("out"):
            layers["skip_linear"] = (2 * width,)
        for layer, inputs in layers.items():
            shapes[f"{block}.{layer}.weight"] = (outputs.get(layer, width), *inputs)
            shapes[f"{block}.{layer}.bias"] = (outputs.get(layer, width),)
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
    return shapes


@pytest.mark.parametrize("name", PUBLIC)
def test_names_and_shapes_of_the_public_checkpoints(name: str) -> None:
    found = {key: tuple(value.shape) for key, value in public(name).network.state_dict().items()}
    assert found == names_in_the_checkpoint(PUBLIC[name])


# Parameters; tensors and weights that SparseDM masks; products without attention, where the specification has them.
SIZES = {
    "cifar10 small": (44_255_328, 52, 40_894_464, 11.3216),
    "coco small deep": (58_346_000, 68, 53_477_376, 19.298),
    "imagenet256 large": (286_763_000, 84, 264_241_152, 73.593),
    "imagenet256 huge": (None, 116, 461_832_192, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    parameters, tensors, weights, giga = SIZES[name]
    denoiser = public(name)
    units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
    masked = [denoiser.network.get_parameter(unit.parameters[0]) for unit in units]
    assert (len(masked), sum(weight.numel() for weight in masked)) == (tensors, weights)
    total = sum(p.numel() for p in denoiser.parameters())
    if name == "cifar10 small":
        assert total == parameters
    elif parameters is not None:
        assert round(total / 1e6, 2) == round(parameters / 1e6, 2)
    if giga is not None:
        counted = round(count_denoiser(denoiser).macs("linear") / 1e9, len(str(giga).partition(".")[2]))
        assert counted == giga


def test_macs_under_two_of_four() -> None:
    """The released layer set keeps 6.067 of 11.3216 G without attention."""
    denoiser = public("cifar10 small")
    units = select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4)
    kept = count_denoiser(denoiser).kept({unit.name: Sparsity(2, 4) for unit in units}, "linear")
    assert round(float(kept) / 1e9, 3) == 6.067


# An independent computation in float64 from tensors by name, with attention and embedding written out


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state.get(f"{name}.bias", 0)


def reference_block(x: Tensor, state: dict[str, Tensor], name: str, heads: int) -> Tensor:
    batch, length, width = x.shape
    qkv = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
    q, k, v = qkv.reshape(batch, length, 3, heads, width // heads).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, width)
    x = x + linear(mixed, state, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def reference(state: dict[str, Tensor], config: dict[str, Any], x: Tensor, t: Tensor, cond: Any) -> Tensor:
    width, patch, heads = config["embed_dim"], config["patch_size"], config["num_heads"]
    frequencies = torch.tensor([10000.0 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], -1)
    if config.get("mlp_time_embed"):
        hidden = linear(time, state, "time_embed.0")
        time = linear(hidden * hidden.sigmoid(), state, "time_embed.2")
    before, behind = [], []
    if "num_classes" in config:
        before = [state["label_emb.weight"][cond][:, None]]
    if "clip_dim" in config:
        behind = [linear(cond["prompt_embeds"].double(), state, "context_embed")]
    rows = F.unfold(x, patch, stride=patch).mT
    kernel = state["patch_embed.proj.weight"].flatten(1)
    patches = rows @ kernel.T + state["patch_embed.proj.bias"]
    tokens = torch.cat([*before, time[:, None], *behind, patches], 1) + state["pos_embed"]
    half, skips = config["depth"] // 2, []
    for i in range(half):
        tokens = reference_block(tokens, state, f"in_blocks.{i}", heads)
        skips.append(tokens)
    tokens = reference_block(tokens, state, "mid_block", heads)
    for i in range(half):
        merged = linear(torch.cat([tokens, skips[-1 - i]], -1), state, f"out_blocks.{i}.skip_linear")
        tokens = reference_block(merged, state, f"out_blocks.{i}", heads)
    decoded = linear(layer_norm(tokens, state, "norm"), state, "decoder_pred")[:, -patches.shape[1] :]
    # Rows of a patch run (row, column, channel); folding wants (channel, row, column).
    columns = decoded.unflatten(-1, (patch * patch, -1)).mT.flatten(-2)
    image = F.fold(columns.mT, x.shape[-2:], patch, stride=patch)
    if config.get("conv", True):
        image = F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return image


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if b.family is UViT], ids=lambda b: b.name)
@torch.no_grad()
def test_output_equals_an_independent_computation(backbone: Any) -> None:
    config = {**backbone.config, "depth": 4}
    torch.manual_seed(0)
    denoiser = UViT(config=config, **backbone.arguments).eval()
    for name, parameter in denoiser.network.named_parameters():
        # Weights as initialised leave every block near the identity, which would hide a mistake in it.
        parameter.normal_(std=0.3 if "norm" not in name else 1.0)
    batch, t = backbone.batch(denoiser), torch.tensor([3, 871])
    state = {name: value.double() for name, value in denoiser.network.state_dict().items()}
    expected = reference(state, config, batch["x"].double(), t, batch["cond"])
    exact = denoiser.double()(batch["x"].double(), t, batch["cond"])
    scale = expected.abs().max()
    assert ((exact - expected).abs().max() / scale) < 1e-5
    single = denoiser.float()(batch["x"], t, batch["cond"])
    assert ((single - expected).abs().max() / scale) < 1e-5


def test_a_public_checkpoint_loads_with_its_config(tmp_path: Path) -> None:
    backbone = next(b for b in BACKBONES if b.name == "uvit_classes")
    network = backbone.network()
    torch.save(network.state_dict(), tmp_path / "nnet_ema.pth")
    denoiser = UViT(weights=str(tmp_path / "nnet_ema.pth"), config=dict(backbone.config))
    assert torch.equal(denoiser.network.get_parameter("pos_embed"), network.pos_embed)
    with pytest.raises(InputError, match=r"nnet_ema\.pth: .* has shape"):
        UViT(weights=str(tmp_path / "nnet_ema.pth"), config={**backbone.config, "img_size": 16})


def test_projections_may_get_a_bias_that_a_checkpoint_has_not(tmp_path: Path) -> None:
    backbone = next(b for b in BACKBONES if b.name == "uvit_classes")
    torch.save(backbone.network().state_dict(), tmp_path / "plain.pth")
    plain = UViT(weights=str(tmp_path / "plain.pth"), config=dict(backbone.config)).eval()
    biased = UViT(weights=str(tmp_path / "plain.pth"), config={**backbone.config, "qkv_bias": True}).eval()
    added = biased.state_dict().keys() - plain.state_dict().keys()
    assert added
    assert all(name.endswith("attn.qkv.bias") and not biased.state_dict()[name].any() for name in added)
    given = torch.randn(2, *plain.sample_shape), torch.tensor([0, 999]), torch.tensor([1, 2])
    torch.testing.assert_close(biased(*given), plain(*given))


def test_checkpoints_that_count_from_one_are_told_so_and_stay_so(tmp_path: Path) -> None:
    backbone = next(b for b in BACKBONES if b.name == "uvit_classes")
    denoiser = UViT(config=dict(backbone.config), first_timestep=1).eval()
    x, t, cond = torch.randn(2, *denoiser.sample_shape), torch.tensor([0, 999]), torch.tensor([1, 2])
    torch.testing.assert_close(denoiser(x, t, cond), denoiser.network(x, t + 1, labels=cond), atol=0, rtol=0)
    again = load(save_artifact(denoiser, tmp_path / "artifact", "dense", {}))
    torch.testing.assert_close(again(x, t, cond), denoiser(x, t, cond), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"img_size": 9}, "img_size 9"),
        ({"depth": 3}, "depth 3"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"num_classes": 10, "clip_dim": 8}, "num_classes and clip_dim"),
    ],
)
def test_a_configuration_that_is_no_network(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        UViT(config={"img_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2} | change)
