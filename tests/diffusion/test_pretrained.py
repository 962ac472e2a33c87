"""Where networks are found and how their weights are read; what is wrong is one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.pixart import PixArt
from lightning_prune.diffusion.models.unet2d_condition import UNet2DCondition
from lightning_prune.diffusion.pretrained import without_weights
from lightning_prune.protocols import InputError
from tests.backbones import BACKBONES, PIXART_CONFIG, SD_CONFIG, SDXL_CONFIG

DIT = next(b for b in BACKBONES if b.name == "dit")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return DIT.save(tmp_path / "pipeline")


def same_weights(denoiser: DiT) -> bool:
    expected = DIT.network().state_dict()
    return all(torch.equal(value, expected[name]) for name, value in denoiser.network.state_dict().items())


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_pth(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.pth")
    (folder / WEIGHTS).unlink()


def as_half(folder: Path) -> None:
    """Exact in half precision, so that nothing is lost on the way."""
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / WEIGHTS).unlink()


def as_shards(folder: Path) -> None:
    DIT.network().save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1


def as_pickled_shards(folder: Path) -> None:
    as_shards(folder)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file.replace("safetensors", "bin") for name, file in content["weight_map"].items()}
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(content))
    index.unlink()
    for file in folder.glob("*-of-*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


@pytest.mark.parametrize("store", [as_pickle, as_pth, as_shards, as_pickled_shards])
def test_every_form_of_weights(store: Callable[[Path], None], pipeline: Path) -> None:
    store(pipeline / "transformer")
    assert same_weights(DiT(weights=str(pipeline)))


def test_half_precision_where_there_is_nothing_else(pipeline: Path) -> None:
    as_half(pipeline / "transformer")
    weight = DiT(weights=str(pipeline)).network.get_parameter("proj_out_2.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, DIT.network().proj_out_2.weight.half().float())


def test_safetensors_come_before_pickles(pipeline: Path) -> None:
    (pipeline / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    assert same_weights(DiT(weights=str(pipeline)))


@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_component_or_pipeline(subfolder: str | None, pipeline: Path) -> None:
    assert same_weights(DiT(weights=str(pipeline / "transformer")))
    assert same_weights(DiT(weights=str(pipeline), subfolder=subfolder))


def test_one_weight_file_with_a_config(pipeline: Path) -> None:
    file = pipeline / "transformer" / WEIGHTS
    assert same_weights(DiT(weights=str(file), config=dict(DIT.config)))
    with pytest.raises(InputError, match=r"denoiser\.config: .*safetensors holds weights alone"):
        DiT(weights=str(file))


def test_the_class_of_early_releases(pipeline: Path) -> None:
    """Published DiT and PixArt-alpha pipelines still name it."""
    config, index = pipeline / "transformer" / "config.json", pipeline / "model_index.json"
    early = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_vector_embeds": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | early))
    index.write_text(index.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert same_weights(DiT(weights=str(pipeline)))
    with pytest.raises(InputError, match=r"config\.json: holds a Transformer2DModel, expected PixArt"):
        PixArt(weights=str(pipeline))


def cached(pipeline: Path, hub: Path) -> None:
    """A pipeline where the hub's client keeps what it has fetched."""
    repository = hub / "models--somebody--tiny-dit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(pipeline, repository / "snapshots" / ("0" * 40))


def test_hub_id(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(pipeline, tmp_path / "hub")
    assert same_weights(DiT(weights="somebody/tiny-dit"))
    with pytest.raises(InputError, match="somebody/other: neither a folder nor reachable on the hub"):
        DiT(weights="somebody/other")


def test_a_skeleton_needs_only_the_configuration(pipeline: Path) -> None:
    (pipeline / "transformer" / WEIGHTS).unlink()
    with without_weights():
        assert next(DiT(weights=str(pipeline)).parameters()).is_meta
    with pytest.raises(InputError, match=WEIGHTS):
        DiT(weights=str(pipeline))


# What is wrong


def remove_component(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "transformer")


def remove_entry(pipeline: Path) -> None:
    index = pipeline / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "transformer"}))


def break_index(pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text("[1")


def break_config(pipeline: Path) -> None:
    (pipeline / "transformer" / "config.json").write_text("[]")


def other_class(pipeline: Path) -> None:
    file = pipeline / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UNet2DModel"}))


def unknown_key(pipeline: Path) -> None:
    file = pipeline / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"no_such_key": 1}))


def other_shape(pipeline: Path) -> None:
    file = pipeline / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_embeds_ada_norm": 12}))


def cut(pipeline: Path) -> None:
    file = pipeline / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:500])


def lose_a_shard(pipeline: Path) -> None:
    as_shards(pipeline / "transformer")
    next((pipeline / "transformer").glob("*-00002-of-*")).unlink()


def lose_a_tensor(pipeline: Path) -> None:
    as_shards(pipeline / "transformer")
    shard = next((pipeline / "transformer").glob("*-00002-of-*"))
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)


def leave_the_folder(pipeline: Path) -> None:
    as_shards(pipeline / "transformer")
    index = pipeline / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def harmful_pickle(pipeline: Path) -> None:
    torch.save({"proj_out_2.weight": Harmful()}, pipeline / "transformer" / "diffusion_pytorch_model.bin")
    (pipeline / "transformer" / WEIGHTS).unlink()


def no_tensors(pipeline: Path) -> None:
    torch.save({"epoch": 3}, pipeline / "transformer" / "diffusion_pytorch_model.bin")
    (pipeline / "transformer" / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_component, r"pipeline/transformer: no such component; .* holds vae"),
        (remove_entry, r"model_index\.json: lists no DiTTransformer2DModel; .*vae \(AutoencoderKL\)"),
        (break_index, r"model_index\.json"),
        (break_config, r"transformer/config\.json"),
        (other_class, r"config\.json: holds a UNet2DModel, expected DiTTransformer2DModel"),
        (unknown_key, r"config\.json.*no_such_key"),
        (other_shape, rf"{WEIGHTS}: .* has shape"),
        (cut, WEIGHTS),
        (lose_a_shard, r"-00002-of-.*: missing"),
        (lose_a_tensor, r"no counterpart in the shards"),
        (leave_the_folder, r"elsewhere\.safetensors: missing"),
        (harmful_pickle, r"diffusion_pytorch_model\.bin: damaged, or not tensors alone"),
        (no_tensors, r"diffusion_pytorch_model\.bin: is no dictionary of tensors"),
    ],
)
def test_one_line_names_what_is_wrong(
    damage: Callable[[Path], None], named: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(pipeline)
    with pytest.raises(InputError, match=named) as raised:
        DiT(weights=str(pipeline))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_a_component_of_another_name(pipeline: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline/unet: no such component; .* holds transformer, vae"):
        DiT(weights=str(pipeline), subfolder="unet")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"in_channels": 9}, "takes 9 channels and predicts 4"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ({"addition_embed_type": "text", "encoder_hid_dim": 8}, "encoder_hid_dim_type"),
    ],
)
def test_u_nets_that_see_more_than_a_noisy_sample_and_a_prompt(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        UNet2DCondition(config=SD_CONFIG | change)


def test_sdxl_is_told_the_size_it_is_given() -> None:
    """Sizes in the condition count; without them it is the sample's own."""
    torch.manual_seed(0)
    denoiser = UNet2DCondition(config=SDXL_CONFIG, text_tokens=5).eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    cond: Any = denoiser.blank_condition(1, "cpu")
    told = {**cond, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    other = {**cond, "time_ids": torch.tensor([[64, 64, 16, 0, 64, 64]])}
    assert torch.equal(denoiser(x, t, cond), denoiser(x, t, told))
    assert not torch.equal(denoiser(x, t, cond), denoiser(x, t, other))
    assert torch.equal(denoiser.null_condition(other)["time_ids"], other["time_ids"])


def test_pixart_of_the_large_size_is_told_it() -> None:
    torch.manual_seed(0)
    # The embedding of the size is split in three.
    sized = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
    denoiser = PixArt(config=PIXART_CONFIG | sized, text_tokens=5).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    cond: Any = denoiser.blank_condition(2, "cpu")
    told = {**cond, "resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    torch.nn.init.normal_(denoiser.network.get_parameter("adaln_single.linear.weight"))
    assert torch.equal(denoiser(x, t, cond), denoiser(x, t, told))
    other = {**told, "aspect_ratio": torch.full((2, 1), 0.5)}
    assert not torch.equal(denoiser(x, t, cond), denoiser(x, t, other))
