"""Cached latents: what they hold, that a killed run leaves no trace, that training needs nothing else."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune.cli import main
from lightning_prune.data import CachedLatents, ImageFolder, latent_cache
from lightning_prune.data.decoder import LatentDecoder
from lightning_prune.data.latent_files import write_shard
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.diffusion.models.unet2d_condition import UNet2DCondition
from lightning_prune.diffusion.process import Process
from lightning_prune.methods.dense import Dense
from lightning_prune.protocols import InputError
from tests.data.pictures import damage, losses, write_pictures
from tests.data.pipelines import LATENT_CHANNELS, save_autoencoder, save_text_pipeline, tiny_autoencoder
from tests.factories import DIT_CONFIG


def arguments(root: Path, output: Path, *more: str, pipeline: str = "vae") -> list[str]:
    """The command that caches the pictures in `root/pictures`."""
    data = ["--data=lightning_prune.data.ImageFolder", f"--data.root={root / 'pictures'}", "--data.size=8"]
    where = [f"--pipeline={root / pipeline}", f"--output={output}", "--device=cpu"]
    return ["cache-latents", *data, "--data.kept=0.2", *where, "--shard_size=32", "--batch_size=8", *more]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning_prune: error:")]
    return line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eighty pictures and an autoencoder."""
    write_pictures(tmp_path / "pictures", count=80, size=(8, 8))
    save_autoencoder(tmp_path / "vae")
    return tmp_path


def test_latents_are_those_of_the_autoencoder(source: Path) -> None:
    assert main(arguments(source, source / "out", "--stored=float32")) == 0
    assert {file.name for file in (source / "out").iterdir()} == {
        "latents.json", "train-00000.safetensors", "train-00001.safetensors", "held_out-00000.safetensors",
    }  # fmt: skip
    cached, pictures = CachedLatents(str(source / "out")), ImageFolder(str(source / "pictures"), size=8, kept=0.2)
    vae = tiny_autoencoder().eval()
    for split in ("train", "held_out"):
        samples, expected = cached.read(split), pictures.read(split)
        assert len(samples) == len(expected)
        assert torch.equal(samples.labels, expected.labels)
        for index in (0, len(samples) - 1):
            with torch.no_grad():
                latent = vae.encode(expected[index]["x"][None]).latent_dist.mean[0]
            assert torch.allclose(samples[index]["x"], (latent - 0.5) * 0.25, atol=1e-6)
    assert samples.shape == (LATENT_CHANNELS, 4, 4)
    assert cached.num_classes == 3


KILLED = """
import os, signal, sys
from lightning_prune.cli import main
from lightning_prune.data import latent_cache, latent_files

real = latent_files.save_file
def save(tensors, file):
    real(tensors, file)
    if "train-00012" in str(file):  # written, not yet in its place
        os.kill(os.getpid(), signal.SIGKILL)
latent_files.save_file = save
main(sys.argv[1:])
"""


def test_latents_by_another_factor_are_decoded_by_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """U-ViT on COCO: 0.2301, where the autoencoder's configuration says otherwise."""
    for name, more in (("own", ()), ("other", ("--scale=0.2301",))):
        assert main(arguments(source, source / name, "--stored=float32", *more)) == 0
    own, other = (CachedLatents(str(source / name)).split("held_out")[0]["x"] for name in ("own", "other"))
    factor = tiny_autoencoder().config.scaling_factor
    torch.testing.assert_close(other / 0.2301, own / factor)
    by_own, by_other = LatentDecoder(str(source / "vae")), LatentDecoder(str(source / "vae"))
    by_other.adopt(source / "other", CachedLatents(str(source / "other")).manifest)
    torch.testing.assert_close(by_other.decode(other[None]), by_own.decode(own[None]))
    assert "scale 0.2301" in by_other.describe()
    assert "scale 0.2301" not in by_own.describe()
    assert main(arguments(source, source / "own", "--stored=float32", "--scale=0.2301")) == 2
    assert "made with scale None, not 0.2301" in error_line(capsys)
    for wrong in ("0", "-1"):
        assert main(arguments(source, source / "none", f"--scale={wrong}")) == 2
        assert "is not positive and finite" in error_line(capsys)
    assert not (source / "none").exists()


def test_a_thousand_latents_killed_half_way_are_the_bytes_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", count=1000, size=(8, 8))
    save_autoencoder(tmp_path / "vae")
    assert main(arguments(tmp_path, tmp_path / "whole", "--flip=true")) == 0
    command = arguments(tmp_path, tmp_path / "killed", "--flip=true")
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = set(content(tmp_path / "killed"))
    assert len(left) == 14, "twelve shards, one partial, the progress"
    assert any(name.endswith(".partial") for name in left)
    with pytest.raises(InputError, match=r"latents\.json: missing"):
        CachedLatents(str(tmp_path / "killed")).read("train")
    assert main(command) == 0
    whole = content(tmp_path / "whole")
    assert content(tmp_path / "killed") == whole
    assert (
        sum(shard["samples"] for shards in json.loads(whole["latents.json"])["splits"].values() for shard in shards)
        == 1000
    )


def test_finished_shards_are_not_encoded_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def write(root: Path, file: str, *rest: Any) -> Any:
        written.append(file)
        return write_shard(root, file, *rest)

    monkeypatch.setattr(latent_cache, "write_shard", write)
    command = arguments(source, source / "out")
    assert main(command) == 0
    first, before = written.copy(), content(source / "out")
    assert main(command) == 0
    assert written == first, "all is there"
    (source / "out" / "train-00001.safetensors").unlink()
    assert main(command) == 0
    assert written == [*first, "train-00001.safetensors"]
    assert content(source / "out") == before


def test_an_interrupted_run_leaves_whole_shards_only(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupted(root: Path, file: str, *rest: Any) -> Any:
        if file == "train-00001.safetensors":
            raise KeyboardInterrupt
        return write_shard(root, file, *rest)

    monkeypatch.setattr(latent_cache, "write_shard", interrupted)
    assert main(arguments(source, source / "out")) == 130
    assert set(content(source / "out")) == {"progress.json", "train-00000.safetensors"}


def test_the_command_takes_a_config(source: Path) -> None:
    assert main(arguments(source, source / "out")) == 0
    data = {"class_path": "lightning_prune.data.ImageFolder"}
    arguments_of_data = {"root": str(source / "pictures"), "size": 8, "kept": 0.2, "workers": 1}
    config = {"pipeline": str(source / "vae"), "output": str(source / "second"), "batch_size": 8, "shard_size": 32}
    file = source / "cache.yaml"
    file.write_text(yaml.safe_dump({**config, "device": "cpu", "data": {**data, "init_args": arguments_of_data}}))
    assert main(["cache-latents", "--config", str(file)]) == 0
    assert content(source / "second") == content(source / "out")


@pytest.mark.parametrize(
    ("more", "key"), [("--stored=float32", "stored"), ("--data.kept=0.25", "data"), ("--batch_size=4", "batch_size")]
)
def test_a_cache_is_not_continued_with_other_settings(
    more: str, key: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(source, source / "out")) == 0
    before = content(source / "out")
    assert main(arguments(source, source / "out", more)) == 2
    line = error_line(capsys)
    assert f"made with {key}" in line
    assert "latents.json" in line
    assert content(source / "out") == before


def test_how_pictures_are_read_is_no_setting(source: Path) -> None:
    assert main(arguments(source, source / "out")) == 0
    before = content(source / "out")
    (source / "out" / "train-00000.safetensors").unlink()
    assert main(arguments(source, source / "out", "--data.workers=2")) == 0
    assert content(source / "out") == before


def latent_dit(num_classes: int = 3, size: int = 4) -> Dense:
    torch.manual_seed(0)
    shape = {"sample_size": size, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    network = DiT(config={**DIT_CONFIG, **shape, "patch_size": 2, "num_embeds_ada_norm": num_classes})
    return Dense(network, Process(clip_sample=False), seed=0, label_dropout=0.1)


def test_training_needs_the_cache_alone(source: Path) -> None:
    assert main(arguments(source, source / "out", "--flip=true")) == 0
    shutil.rmtree(source / "vae")
    shutil.rmtree(source / "pictures")

    def data(workers: int) -> CachedLatents:
        return CachedLatents(str(source / "out"), flip=True, batch_size=8, seed=1, workers=workers)

    first = losses(latent_dit(), data(0), source / "run", steps=10)
    assert losses(latent_dit(), data(2), source / "run", steps=10) == first
    assert len(set(first)) == 10


def test_draws_are_of_the_distribution_and_addressed_by_epoch(source: Path) -> None:
    assert main(arguments(source, source / "out", "--stored=float32")) == 0
    train = CachedLatents(str(source / "out")).read("train")
    drawn = torch.stack([train.at_epoch(0, epoch)[5]["x"] for epoch in range(400)])
    (stored,) = train.reader.rows(["mean", "std"], [5])
    assert torch.equal(train.at_epoch(0, 3)[5]["x"], drawn[3])
    assert torch.allclose(drawn.mean(0), (stored["mean"] - 0.5) * 0.25, atol=0.1)
    assert torch.allclose(drawn.std(0), stored["std"] * 0.25, atol=0.05)
    means = CachedLatents(str(source / "out"), draw=False).read("train")
    assert torch.equal(means.at_epoch(0, 3)[5]["x"], train[5]["x"])


def test_mirrored_latents_are_those_of_mirrored_pictures(source: Path) -> None:
    assert main(arguments(source, source / "out", "--stored=float32", "--flip=true")) == 0
    train = CachedLatents(str(source / "out"), flip=True, draw=False).read("train")
    pictures = ImageFolder(str(source / "pictures"), size=8, kept=0.2, flip=True).read("train")
    vae = tiny_autoencoder().eval()
    for index in range(8):
        with torch.no_grad():
            latent = vae.encode(pictures.at_epoch(0, 0)[index]["x"][None]).latent_dist.mean[0]
        assert torch.allclose(train.at_epoch(0, 0)[index]["x"], (latent - 0.5) * 0.25, atol=1e-6)


def test_flipping_needs_a_cache_with_mirror_images(source: Path) -> None:
    assert main(arguments(source, source / "out")) == 0
    with pytest.raises(InputError, match=r"data\.flip"):
        CachedLatents(str(source / "out"), flip=True).read("train")


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "manifest"])
def test_damage_is_named_before_training(harm: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(source, source / "out")) == 0
    file = source / "out" / ("latents.json" if harm == "manifest" else "train-00001.safetensors")
    harmed = bytearray(file.read_bytes())
    harmed[-3] ^= 0xFF
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(harmed[: len(harmed) // 2] if harm in ("cut", "manifest") else harmed)
    before = sorted(source.rglob("*"))
    smoke = str(Path(__file__).parents[2] / "configs" / "smoke" / "dense_dit.yaml")
    shape = "{sample_size: 4, patch_size: 2, in_channels: 2, out_channels: 2, num_layers: 1, num_attention_heads: 2, " \
            "attention_head_dim: 16, num_embeds_ada_norm: 3}"  # fmt: skip
    command = ["fit", "--config", smoke, f"--run.root={source / 'runs'}", "--trainer.callbacks=null",
               "--data=lightning_prune.data.CachedLatents", f"--data.root={source / 'out'}",
               f"--model.init_args.denoiser.init_args.config={shape}"]  # fmt: skip
    assert main(command) == 2
    assert str(file) in error_line(capsys)
    assert sorted(source.rglob("*")) == before


def test_without_verification_a_cut_shard_is_named_all_the_same(source: Path) -> None:
    assert main(arguments(source, source / "out")) == 0
    file = source / "out" / "train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="train-00001"):
        CachedLatents(str(source / "out"), verify=False).read("train")


def test_latents_have_no_pictures_to_compare_with(source: Path) -> None:
    assert main(arguments(source, source / "out")) == 0
    with pytest.raises(InputError, match=r"measurement\.reference"):
        _ = CachedLatents(str(source / "out")).split("reference").images


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--data.channels=1"], "cannot take pictures of 1x8x8"),
        (["--pipeline=/no/such/pipeline"], "/no/such/pipeline"),
        (["--shard_size=0"], "shard_size"),
        (["--data.root=/no/such/folder"], "/no/such/folder"),
        (["--no_such_option=1"], "no_such_option"),
    ],
)
def test_bad_input_writes_nothing(
    more: list[str], named: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(source.rglob("*"))
    assert main(arguments(source, source / "out", *more)) == 2
    assert named in error_line(capsys)
    assert sorted(source.rglob("*")) == before


def test_a_folder_with_something_else_in_it_is_left_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(source, source / "pictures")) == 2
    assert "holds no latents" in error_line(capsys)


def test_damaged_pictures_are_recorded(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((source / "pictures").rglob("*.png"))
    damage(files[4])
    assert main(arguments(source, source / "out")) == 2
    assert str(files[4]) in error_line(capsys)
    shutil.rmtree(source / "out", ignore_errors=True)
    assert main(arguments(source, source / "out", "--data.on_damage=skip")) == 0
    assert "1 damaged" in capsys.readouterr().out
    assert CachedLatents(str(source / "out")).manifest.damaged == [str(files[4])]


# Captions


@pytest.fixture
def captioned(source: Path) -> Path:
    """The same pictures with captions, and a pipeline that encodes them."""
    pytest.importorskip("transformers")
    for file in (source / "pictures").rglob("*.png"):
        file.with_suffix(".txt").write_text("abc"[: 1 + int(file.stem) % 3])
    save_text_pipeline(source / "pipeline")
    return source


def cached_captions(root: Path, *more: str) -> int:
    return main(arguments(root, root / "out", "--data.captions=files", *more, pipeline="pipeline"))


def test_captions_are_encoded_as_the_pipeline_does(captioned: Path) -> None:
    from diffusers import StableDiffusionPipeline

    assert cached_captions(captioned, "--stored=float32") == 0
    data = CachedLatents(str(captioned / "out"), batch_size=4)
    assert data.condition_shapes == {"prompt_embeds": (12, 8)}
    pipeline = StableDiffusionPipeline.from_pretrained(captioned / "pipeline", safety_checker=None)
    pictures = ImageFolder(str(captioned / "pictures"), size=8, kept=0.2, captions="files").read("train")

    def embedded(caption: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = pipeline.encode_prompt(caption, "cpu", 1, False)[0][0]
            return found

    for index in (0, 1, 60):
        expected = embedded(pictures[index]["caption"])
        assert torch.allclose(data.read("train")[index]["cond"]["prompt_embeds"], expected, atol=1e-6)
    from safetensors.torch import load_file

    assert data.null_prompt is not None
    assert torch.allclose(load_file(data.null_prompt)["prompt_embeds"], embedded(""), atol=1e-6)
    batch = next(iter(data.train_dataloader()))
    assert batch["cond"]["prompt_embeds"].shape == (4, 12, 8)
    assert data.prompts(3)["cond"]["prompt_embeds"].shape == (3, 12, 8)


def text_network(root: Path) -> Dense:
    null = root / "out" / "null_prompt.safetensors"
    network = UNet2DCondition(weights=str(root / "pipeline"), null_prompt=str(null))
    return Dense(network, Process(clip_sample=False), seed=0, label_dropout=0.5)


def test_a_text_network_trains_on_cached_captions(captioned: Path) -> None:
    assert cached_captions(captioned) == 0
    shutil.rmtree(captioned / "pictures")
    data = CachedLatents(str(captioned / "out"), batch_size=8, seed=1)
    found = losses(text_network(captioned), data, captioned / "run", steps=4)
    assert len(set(found)) == 4
    assert all(map(math.isfinite, found))


def test_a_text_network_is_not_given_labels_or_pictures(captioned: Path) -> None:
    assert cached_captions(captioned) == 0
    pictures = ImageFolder(str(captioned / "pictures"), size=8, kept=0.2, captions="files", batch_size=8)
    with pytest.raises(InputError, match="samples of 3x8x8"):
        losses(text_network(captioned), pictures, captioned / "run")
    assert main(arguments(captioned, captioned / "labels")) == 0
    with pytest.raises(InputError, match="takes embedded prompts"):
        losses(text_network(captioned), CachedLatents(str(captioned / "labels"), batch_size=8), captioned / "run")
    with pytest.raises(InputError, match="comes with embedded prompts"):
        losses(latent_dit(), CachedLatents(str(captioned / "out"), batch_size=8), captioned / "run")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_pipeline_without_a_part_says_so(part: str, captioned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = captioned / "pipeline" / "model_index.json"
    stored = json.loads(index.read_text())
    stored[part] = [None, None]
    index.write_text(json.dumps(stored))
    assert cached_captions(captioned) == 2
    line = error_line(capsys)
    assert f"no {part} in it" in line
    assert str(captioned / "pipeline") in line
    assert not (captioned / "out").exists()


def test_captions_need_more_than_an_autoencoder(captioned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(captioned, captioned / "out", "--data.captions=files")) == 2
    assert "captions are encoded for StableDiffusionPipeline" in error_line(capsys)


def test_a_damaged_autoencoder_is_named(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert main(arguments(source, source / "out")) == 2
    assert str(source / "vae") in error_line(capsys)
