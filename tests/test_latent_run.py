"""Latent and text-conditional networks from captions to a report, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_prune.callbacks import SampleGrid
from lightning_prune.cli import main
from lightning_prune.data import CachedLatents, ImageFolder
from lightning_prune.data.decoder import LatentDecoder
from lightning_prune.diffusion.samplers import initial_noise
from lightning_prune.methods.sparsedm import SparseDM
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError
from tests.data.pictures import write_pictures
from tests.data.text_pipelines import PIXELS, T5_TOKENS, autoencoder, family, save_pipeline
from tests.factories import DIT_CONFIG, fit

pytest.importorskip("transformers")

GUIDANCE, STEPS, COLUMNS = 3.0, 2, 3


def write_source(root: Path, name: str = "sd15") -> Path:
    """Pictures with captions, a pipeline, and what a timm extractor needs."""
    for file in write_pictures(root / "pictures", count=24, classes=0, size=(PIXELS, PIXELS)):
        file.with_suffix(".txt").write_text("ab cde fgh"[: 1 + int(file.stem) % 10])
    save_pipeline(name, root / "pipeline")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), root / "vit.safetensors")
    return root


def pictures_of(root: Path) -> dict[str, Any]:
    arguments = {"root": str(root / "pictures"), "size": PIXELS, "kept": 0.25, "captions": "files"}
    return {"class_path": "lightning_prune.data.ImageFolder", "init_args": arguments}


def cache(root: Path, *more: str) -> Path:
    config = {"pipeline": str(root / "pipeline"), "output": str(root / "latents"), "device": "cpu"}
    (root / "cache.yaml").write_text(yaml.safe_dump({**config, "stored": "float32", "data": pictures_of(root)}))
    assert main(["cache-latents", "--config", str(root / "cache.yaml"), *more]) == 0
    return root / "latents"


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_prune.callbacks.{name}", "init_args": {"steps": STEPS, **arguments}}


def config_of(root: Path) -> dict[str, Any]:
    """SparseDM on a tiny Stable Diffusion, as a user would write it."""
    null = str(root / "latents" / "null_prompt.safetensors")
    measurement = {"extractor": "timm/test_vit", "weights": str(root / "vit.safetensors")}
    diffusion = "lightning_prune.diffusion"
    process = {"schedule": "scaled_linear", "prediction": "epsilon", "beta_start": 0.00085, "beta_end": 0.012}
    return {
        "seed_everything": 0,
        "run": {"root": str(root / "runs"), "name": "sd"},
        "model": {
            "class_path": "lightning_prune.methods.sparsedm.SparseDM",
            "init_args": {
                "denoiser": {
                    "class_path": f"{diffusion}.models.unet2d_condition.UNet2DCondition",
                    "init_args": {"weights": str(root / "pipeline"), "null_prompt": null, "text_tokens": 9},
                },
                "process": {
                    "class_path": f"{diffusion}.process.Process",
                    "init_args": {**process, "clip_sample": False},
                },
                "sparsity": "2:4",
                "ema_decay": 0.5,
            },
        },
        "data": {
            "class_path": "lightning_prune.data.CachedLatents",
            "init_args": {
                "root": str(root / "latents"),
                "batch_size": 4,
                "validation_samples": 4,
                "decoder": {"pipeline": str(root / "pipeline"), "batch_size": 2},
                "pictures": pictures_of(root),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "callbacks": [
                callback("SampleGrid", columns=COLUMNS, guidance=GUIDANCE),
                callback("DistanceEvaluation", samples=4, batch_size=4, measurement=measurement),
                callback(
                    "EfficiencyReport", samples=8, batch_size=3, guidance=GUIDANCE, measurement=measurement,
                    timed_images=2, timed_repeats=1,
                ),
            ],
        },
    }  # fmt: skip


def run(root: Path, config: dict[str, Any], verb: str = "fit", *more: str) -> int:
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return main([verb, "--config", str(root / "config.yaml"), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a tiny Stable Diffusion."""
    root = write_source(tmp_path_factory.mktemp("sd"))
    cache(root)
    assert run(root, config_of(root)) == 0
    return root


def report_of(root: Path, name: str = "report") -> Any:
    return json.loads((root / "runs" / "sd" / f"{name}.json").read_text())


def grid(file: Path) -> Any:
    """Pictures of a grid [rows, columns, H, W, 3], uint8."""
    with Image.open(file) as picture:
        pixels = np.asarray(picture)
    step = PIXELS + 2
    rows, columns = pixels.shape[0] // step, pixels.shape[1] // step
    return np.stack(
        [
            np.stack([pixels[2 + r * step :, 2 + c * step :][:PIXELS, :PIXELS] for c in range(columns)])
            for r in range(rows)
        ]
    )


def test_the_artifact_in_diffusers_pipeline_draws_the_grid(finished: Path) -> None:
    """From the held-out captions themselves, encoded, sampled and decoded by diffusers alone."""
    found = grid(finished / "runs" / "sd" / "samples" / "final.png")
    assert found.shape == (3, COLUMNS, PIXELS, PIXELS, 3)
    unet = UNet2DConditionModel.from_pretrained(finished / "runs" / "sd" / "artifact")
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "pipeline", unet=unet, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    held_out = ImageFolder(**pictures_of(finished)["init_args"]).split("held_out")
    captions = held_out.conditions(list(range(COLUMNS)))["caption"]
    assert len(set(captions)) == COLUMNS
    drawn = pipeline(
        captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=PIXELS, width=PIXELS, output_type="pt",
        latents=initial_noise(torch.arange(COLUMNS), (4, 8, 8)),
    ).images  # fmt: skip
    expected = (255 * drawn).permute(0, 2, 3, 1).numpy()
    # A grid is cut to 256 levels, not rounded.
    assert np.abs(found[-1] - expected).max() < 2
    assert np.abs(found[0].astype(float) - expected).max() > 2, "the dense network's are others"


def test_the_report_names_prompts_decoder_and_pictures(finished: Path) -> None:
    report = report_of(finished)
    (protocol,) = report["protocols"].values()
    assert protocol["decoder"].startswith("AutoencoderKL, sha256 ")
    assert protocol["decoder"].endswith("scale 0.5, shift 0")
    assert "held-out split, 6 prompts, sha256 " in protocol["prompts"]
    assert protocol["reference"].startswith(f"{finished / 'pictures'} reference split, 18 images, sha256 ")
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot 2:4", "sparsedm 2:4"]
    assert all(row["fd_test_vit"]["value"] > 0 for row in report["rows"])
    assert report["floor"]["samples"] == 6
    text = (finished / "runs" / "sd" / "report.md").read_text()
    assert "* decoder: AutoencoderKL" in text
    assert "decoding them costs every row the same" in text
    assert (finished / "runs" / "sd" / "samples" / "step-000002.png").exists()
    assert "fd_test_vit" in (finished / "runs" / "sd" / "metrics.csv").read_text()


def test_rows_are_paired(finished: Path) -> None:
    """The artifact beside the weights it was made from: the same samples, so no difference and no spread."""
    config = config_of(finished)
    artifact = finished / "runs" / "sd" / "artifact"
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][2:]
    config["trainer"]["callbacks"][0]["init_args"] |= {"beside": {"stored": str(artifact)}, "batch_size": 5}
    checkpoint = finished / "runs" / "sd" / "checkpoints" / "last.ckpt"
    assert run(finished, config, "test", f"--ckpt_path={checkpoint}") == 0
    again, before = report_of(finished, "report-test"), report_of(finished)
    (pair,) = [c for c in again["comparisons"] if c["against"] == "stored"]
    assert [abs(pair["fd_test_vit"][key]) < 1e-3 for key in ("value", "low", "high")] == [True] * 3
    (apart,) = [c for c in again["comparisons"] if c["name"].startswith("sparsedm") and c["against"] == "dense"]
    assert apart["mse"]["value"] > 1e-6
    assert again["protocols"].keys() == before["protocols"].keys()
    values = {row["name"]: row["fd_test_vit"]["value"] for row in before["rows"]}
    for row in again["rows"]:
        if row["name"] in values:  # in batches of another size
            assert row["fd_test_vit"]["value"] == pytest.approx(values[row["name"]], rel=1e-3)


def test_two_processes_draw_the_same(finished: Path) -> None:
    config = config_of(finished)
    config["run"] |= {"root": str(finished / "two")}
    config["trainer"] |= {"callbacks": config["trainer"]["callbacks"][2:], "devices": 2, "strategy": "ddp"}
    (finished / "two.yaml").write_text(yaml.safe_dump(config))
    checkpoint = finished / "runs" / "sd" / "checkpoints" / "last.ckpt"
    command = ["test", "--config", str(finished / "two.yaml"), "--ckpt_path", str(checkpoint)]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune", *command], capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads((finished / "two" / "sd" / "report-test.json").read_text()), report_of(finished)
    assert two["protocols"] == one["protocols"]
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        assert ours["fd_test_vit"]["value"] == pytest.approx(theirs["fd_test_vit"]["value"], rel=1e-4)


def test_predict_writes_pictures(finished: Path) -> None:
    config = config_of(finished)
    config["trainer"]["callbacks"] = []
    checkpoint = finished / "runs" / "sd" / "checkpoints" / "last.ckpt"
    assert run(finished, config, "predict", f"--ckpt_path={checkpoint}") == 0
    written = sorted((finished / "runs" / "sd" / "predictions").iterdir())
    assert [file.name for file in written] == [f"{index:06d}.png" for index in range(4)]
    with Image.open(written[0]) as picture:
        assert picture.size == (PIXELS, PIXELS)


def test_without_pictures_decoded_latents_are_the_reference_and_the_protocol_says_so(finished: Path) -> None:
    config = config_of(finished)
    config["run"]["name"] = "decoded"
    del config["data"]["init_args"]["pictures"]
    config["data"]["init_args"]["decoder"]["tiled"] = True
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][2:]
    assert run(finished, config) == 0
    report = json.loads((finished / "runs" / "decoded" / "report.json").read_text())
    (protocol,) = report["protocols"].values()
    assert protocol["reference"].startswith("decoded latents of ")
    assert "18 images, sha256 of latents " in protocol["reference"]
    assert protocol["decoder"] in protocol["reference"]
    assert protocol["decoder"].endswith("in tiles")
    assert protocol.keys() == next(iter(report_of(finished)["protocols"].values())).keys()
    assert report["protocols"].keys() != report_of(finished)["protocols"].keys()


def test_decoded_pictures_are_those_of_the_autoencoder(finished: Path) -> None:
    data = CachedLatents(str(finished / "latents"), decoder=LatentDecoder(str(finished / "pipeline"), batch_size=4))
    real = data.real_images("held_out")
    network = AutoencoderKL.from_pretrained(finished / "pipeline", subfolder="vae").eval()
    latents = load_file(finished / "latents" / "held_out-00000.safetensors")["mean"]
    with torch.no_grad():
        expected = to_uint8(network.decode(latents).sample)
    assert len(real.images) == 6
    assert (real.images[:5].int() - expected[:5].int()).abs().max() <= 1  # in batches of another size
    assert real.identity is not None
    assert str(finished) not in real.identity, "the same wherever it lies"


DIPGO = {"sampler": {"name": "ddim", "steps": STEPS, "guidance": GUIDANCE}, "granularity": "coarse",
         "cache_mode": "output", "budget": 0.75, "compare": []}  # fmt: skip
MOSAICDIFF = {"steps": STEPS, "guidance": GUIDANCE, "target": 0.05, "probe_images": 1,
              "recipe": {"allocation": "uniform", "stages": 1}}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings", "length"),
    [
        ("dipgo.DiPGO", DIPGO, {"max_steps": 1}),
        ("mosaicdiff.MosaicDiff", MOSAICDIFF, {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 1}),
    ],
    ids=["dipgo", "mosaicdiff"],
)
def test_the_other_methods_report_too(
    method: str, settings: dict[str, Any], length: dict[str, int], finished: Path
) -> None:
    config = config_of(finished)
    model, name = config["model"], method.partition(".")[0]
    kept = {key: model["init_args"][key] for key in ("denoiser", "process")}
    config["model"] = {"class_path": f"lightning_prune.methods.{method}", "init_args": {**kept, **settings}}
    config["run"]["name"] = name
    config["trainer"] |= {**length, "val_check_interval": None, "limit_val_batches": 0}
    del config["trainer"]["callbacks"][1]
    assert run(finished, config) == 0
    report = json.loads((finished / "runs" / name / "report.json").read_text())
    (ours,), (theirs,) = (found["protocols"].values() for found in (report, report_of(finished)))
    assert [ours[key] == theirs[key] for key in ("prompts", "decoder", "reference")] == [True] * 3
    assert all(row["fd_test_vit"]["value"] > 0 for row in report["rows"])
    assert report["comparisons"][0]["mse"]["value"] > 0
    assert grid(finished / "runs" / name / "samples" / "final.png").shape[1] == COLUMNS


# What is refused, before anything is computed or written


def refused(
    root: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str], verb: str = "fit", *more: str
) -> str:
    config["run"]["name"] = "refused"
    assert run(root, config, verb, *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning_prune: error:")]
    assert not (root / "runs" / "refused").exists()
    return line


@pytest.mark.parametrize("only", [0, 1, 2])
def test_latents_without_a_decoder(only: int, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(finished)
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][only]]
    del config["data"]["init_args"]["decoder"]
    line = refused(finished, config, capsys)
    assert "data.decoder" in line
    assert config["trainer"]["callbacks"][0]["class_path"].rpartition(".")[2] in line


def test_prediction_without_a_decoder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(finished)
    config["trainer"]["callbacks"] = []
    del config["data"]["init_args"]["decoder"]
    assert "data.decoder: ImageWriter" in refused(finished, config, capsys, "predict")


def test_training_alone_needs_no_decoder(finished: Path) -> None:
    config = config_of(finished)
    config["run"]["name"] = "plain"
    config["trainer"]["callbacks"] = []
    del config["data"]["init_args"]["decoder"]
    assert run(finished, config) == 0


def harm(root: Path, what: str) -> Path:
    """An autoencoder that cannot decode these latents."""
    folder = root / "harmed" / what
    network = autoencoder()
    if what == "scale":
        network.register_to_config(scaling_factor=0.18215)
    if what == "channels":
        network.register_to_config(latent_channels=16)
    network.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    if what == "cut":
        file.write_bytes(file.read_bytes()[:500])
    if what == "missing":
        file.unlink()
    if what == "nothing":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("scale", r"scale [0.18215], but latents in"),
        ("channels", "channels 16, but latents in"),
        ("cut", "damaged weight file"),
        ("missing", "no diffusion_pytorch_model.safetensors in it"),
        ("nothing", ""),
    ],
)
def test_a_decoder_that_does_not_fit(what: str, words: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = config_of(finished), harm(finished, what)
    line = refused(finished, config, capsys, "fit", f"--data.decoder.pipeline={folder}")
    assert "data.decoder.pipeline: " in line
    assert str(folder) in line
    assert words in line


def test_pictures_of_another_size(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(finished)
    config["data"]["init_args"]["pictures"]["init_args"]["size"] = 32
    assert "data.pictures: pictures of 3x32x32, but decoded latents are 3x64x64" in refused(finished, config, capsys)


def test_guidance_without_the_empty_prompt(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(finished)
    del config["model"]["init_args"]["denoiser"]["init_args"]["null_prompt"]
    assert "denoiser.null_prompt" in refused(finished, config, capsys)


def test_a_solver_of_another_process(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(finished)
    config["trainer"]["callbacks"][0]["init_args"]["sampler"] = "flow-euler"
    assert "sampler: flow-euler cannot sample" in refused(finished, config, capsys)


# Other families


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "flux"])
def test_a_grid_of_every_text_family(name: str, tmp_path: Path) -> None:
    write_source(tmp_path, name)
    latents = cache(tmp_path, *([] if name == "sdxl" else [f"--max_tokens={T5_TOKENS}"]))
    backbone = family(name)
    arguments: dict[str, Any] = {k: v for k, v in backbone.arguments.items() if k == "sample_size"}
    if name != "sdxl":
        arguments["null_prompt"] = str(latents / "null_prompt.safetensors")
    denoiser = backbone.family(weights=str(tmp_path / "pipeline"), **arguments)
    module = SparseDM(denoiser, backbone.process(), sparsity="2:4", ema_decay=None, seed=0)
    data = CachedLatents(str(latents), LatentDecoder(str(tmp_path / "pipeline")), batch_size=4, seed=0)
    sampler: Any = "flow-euler" if backbone.is_flow else "ddim"
    shown = SampleGrid(COLUMNS, STEPS, GUIDANCE, sampler=sampler)
    fit(module, tmp_path / "run", data=data, max_steps=1, callbacks=[shown])
    found = grid(tmp_path / "run" / "samples" / "final.png").astype(int)
    assert found.shape[1:] == (COLUMNS, PIXELS, PIXELS, 3)
    assert np.abs(found[0] - found[-1]).max() > 1, "dense and pruned"
    assert np.abs(found[0, 0] - found[0, 1]).max() > 1, "two samples"
    _, predicted = module.predict_step(data.prompts(2), 0)
    assert torch.isfinite(predicted).all()
    assert predicted.shape == (2, 4, 8, 8)


def test_a_report_of_a_latent_network_with_classes(tmp_path: Path) -> None:
    write_source(tmp_path)
    shutil.move(tmp_path / "pictures", tmp_path / "plain")
    write_pictures(tmp_path / "pictures", count=24, size=(PIXELS, PIXELS))
    (tmp_path / "pipeline").rename(tmp_path / "whole")
    (tmp_path / "whole" / "vae").rename(tmp_path / "pipeline")
    cache(tmp_path, "--data.captions=null")
    config = config_of(tmp_path)
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 3}
    network = {"class_path": "lightning_prune.diffusion.models.dit.DiT", "init_args": {"config": DIT_CONFIG | shape}}
    config["model"]["init_args"]["denoiser"] = network
    config["data"]["init_args"]["pictures"]["init_args"]["captions"] = None
    assert run(tmp_path, config) == 0
    (protocol,) = report_of(tmp_path)["protocols"].values()
    assert "decoder" in protocol
    assert "prompts" not in protocol
    assert grid(tmp_path / "runs" / "sd" / "samples" / "final.png").shape[:2] == (3, COLUMNS)


def test_a_hub_id_of_an_autoencoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--tiny-vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    autoencoder().save_pretrained(repository / "snapshots" / ("0" * 40))
    decoder = LatentDecoder("somebody/tiny-vae")
    decoder.fetch()
    assert decoder.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, PIXELS, PIXELS)
    with pytest.raises(InputError, match=r"data\.decoder\.pipeline: somebody/other"):
        LatentDecoder("somebody/other").fetch()
