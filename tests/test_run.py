"""What one run leaves behind, through the real command line: files, schema, tracking, equality of two runs."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import to_tensor

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import set_sparsity
from lightning_prune.protocols import Sparsity
from lightning_prune.pruning.masks import effective_state
from lightning_prune.pruning.nm import to_groups, violations

CONFIGS = Path(__file__).parents[1] / "configs"
SMOKE = CONFIGS / "smoke" / "sparsedm_dit.yaml"
INTERVAL = {
    "type": "object",
    "properties": {name: {"type": "number"} for name in ("value", "low", "high")}
    | {"samples": {"type": "integer"}, "protocol": {"type": "string"}},
    "required": ["value", "low", "high", "samples", "protocol"],
    "additionalProperties": False,
}
ROW = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "fd_fashion": INTERVAL,
        "macs_per_image": {"type": "integer", "exclusiveMinimum": 0},
        "macs_kept": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "convention": {"const": "aten"},
        "params": {"type": "integer"},
        "nonzero_params": {"type": "integer"},
        "seconds_per_image": {"type": "number", "exclusiveMinimum": 0},
    },
    "additionalProperties": False,
}
ROW["required"] = list(ROW["properties"])  # type: ignore[call-overload]
BOUNDS = {"type": "object", "properties": {k: {"type": "number"} for k in ("value", "low", "high")},
          "required": ["value", "low", "high"], "additionalProperties": False}  # fmt: skip
COMPARISON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "against": {"enum": ["dense", "one-shot 2:4"]}}
    | dict.fromkeys(("fd_fashion", "psnr", "ssim", "mse"), BOUNDS),
    "required": ["name", "against", "fd_fashion"],
    "additionalProperties": False,
}
REPORT = {
    "type": "object",
    "properties": {
        "schema": {"const": 1},
        "method": {"const": "sparsedm"},
        "config": {"type": "object", "required": ["model", "data", "trainer", "seed_everything"]},
        "versions": {"type": "object", "required": ["torch", "lightning_prune"]},
        "protocols": {"type": "object", "minProperties": 1, "maxProperties": 1},
        "rows": {"type": "array", "items": ROW},
        "comparisons": {"type": "array", "items": COMPARISON, "minItems": 3, "maxItems": 3},
    },
    "required": ["schema", "method", "config", "versions", "protocols", "rows", "comparisons"],
}


def report_of(run: Path) -> Any:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one config and seed in one root."""
    root = tmp_path_factory.mktemp("runs")
    for _ in range(2):
        assert main(["fit", "--config", str(SMOKE), "--run.root", str(root), "--run.name", "smoke"]) == 0
    return root


def test_a_second_run_never_overwrites_the_first(runs: Path) -> None:
    assert sorted(p.name for p in runs.iterdir()) == ["smoke", "smoke-2"]


def test_files(runs: Path) -> None:
    names = {p.name for p in (runs / "smoke").iterdir()}
    assert names == {
        "artifact", "checkpoints", "config.yaml", "masks", "metrics.csv", "report-influence.safetensors", "report.json",
        "report.md", "samples", "wandb",
    }  # fmt: skip
    assert {p.name for p in (runs / "smoke" / "samples").iterdir()} >= {"final.png", "step-000002.png"}
    assert not list((runs / "smoke" / "artifact").glob("*.bin"))


def test_report_has_the_schema_and_the_rows(runs: Path) -> None:
    report = report_of(runs / "smoke")
    jsonschema.validate(report, REPORT)
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot 2:4", "sparsedm 2:4"]
    (protocol,) = report["protocols"]
    assert all(row["fd_fashion"]["protocol"] == protocol for row in report["rows"])
    dense, one_shot, pruned = report["rows"]
    assert dense["macs_kept"] == 1
    assert pruned["macs_per_image"] == one_shot["macs_per_image"] < dense["macs_per_image"]
    assert pruned["nonzero_params"] < dense["nonzero_params"]
    assert "one-shot 2:4" in (runs / "smoke" / "report.md").read_text()


def test_two_runs_with_one_seed_report_the_same(runs: Path) -> None:
    first, second = report_of(runs / "smoke"), report_of(runs / "smoke-2")
    for report in (first, second):
        del report["versions"]
        for row in report["rows"]:
            del row["seconds_per_image"]
    assert first == second


def test_the_recorded_config_is_reusable_and_in_the_checkpoint(runs: Path) -> None:
    text = (runs / "smoke" / "config.yaml").read_text()
    checkpoint = torch.load(runs / "smoke" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["config"] == text
    assert yaml.safe_load(text)["model"]["init_args"]["sparsity"] == "2:4"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(runs / "smoke" / "config.yaml"), "--print_config"])
    assert stop.value.code == 0


def test_metrics_file(runs: Path) -> None:
    with (runs / "smoke" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    violations = [float(row["mask_violations"]) for row in rows if row.get("mask_violations")]
    assert len(violations) == 4
    assert set(violations) == {0.0}
    assert {float(row["sparsity"]) for row in rows if row.get("sparsity")} == {0.25, 0.5}
    assert any(row.get("fd_fashion") for row in rows)
    assert 0 < min(float(row["macs_kept_aten"]) for row in rows if row.get("macs_kept_aten")) < 1


def offline_records(run: Path) -> list[dict[str, Any]]:
    (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    program = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [program, "leet", "inspect", "--json", str(record)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_offline_wandb_record_holds_what_was_logged(runs: Path) -> None:
    records = offline_records(runs / "smoke")
    history = [r["history"].get("item", r["history"]) for r in records if r["type"] == "history"]
    with (runs / "smoke" / "metrics.csv").open() as stream:
        logged = [row for row in csv.DictReader(stream) if row.get("loss")]
    tracked = {int(item["trainer/global_step"]): item["loss"] for item in history if "loss" in item}
    assert tracked == pytest.approx({int(row["step"]): float(row["loss"]) for row in logged})
    text = json.dumps(records)
    assert '"sparsity": "2:4"' in text, "the resolved config"
    assert list((runs / "smoke" / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))
    assert "density" in text
    assert [r["exit"].get("exit_code", 0) for r in records if r["type"] == "exit"] == [0]


def test_the_artifact_loads(runs: Path) -> None:
    denoiser = lightning_prune.load(runs / "smoke" / "artifact")
    assert denoiser.sample_shape == (1, 32, 32)
    manifest = json.loads((runs / "smoke" / "artifact" / "pruning.json").read_text())
    assert manifest["results"]["name"] == "sparsedm 2:4"
    state = denoiser.network.state_dict()
    assert len(manifest["masks"]) == 12
    for name, pattern in manifest["masks"].items():
        assert pattern == "2:4"
        assert ((to_groups(state[f"{name}.weight"], 4) != 0).sum(-1) == 2).all()


def test_the_checkpoint_keeps_dense_shadow_weights(runs: Path) -> None:
    checkpoint = torch.load(runs / "smoke" / "checkpoints" / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        for name in json.loads((runs / "smoke" / "artifact" / "pruning.json").read_text())["masks"]:
            assert violations(checkpoint[key][f"denoiser.network.{name}.weight"], Sparsity(2, 4)) > 0


def test_export_of_the_checkpoint_equals_the_artifact(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "smoke" / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "out")]) == 0
    ours = lightning_prune.load(tmp_path / "out").state_dict()
    theirs = lightning_prune.load(runs / "smoke" / "artifact").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_switchable_export_is_the_artifact_and_the_dense_weights(runs: Path, tmp_path: Path) -> None:
    checkpoint, out = runs / "smoke" / "checkpoints" / "last.ckpt", tmp_path / "out"
    assert main(["export", "--ckpt_path", str(checkpoint), "--format", "switchable", "--output", str(out)]) == 0
    found, artifact = lightning_prune.load(out), lightning_prune.load(runs / "smoke" / "artifact")
    ours, theirs = effective_state(found.network), artifact.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    set_sparsity(found, None)
    averaged = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in effective_state(found.network).items():
        assert torch.equal(tensor, averaged[f"denoiser.network.{name}"])


def test_predict_draws_images(runs: Path) -> None:
    checkpoint = runs / "smoke" / "checkpoints" / "last.ckpt"
    arguments = ["--config", str(SMOKE), "--run.root", str(runs), "--run.name", "smoke", "--ckpt_path", str(checkpoint)]
    assert main(["predict", *arguments]) == 0
    assert len(list((runs / "smoke" / "predictions").glob("*.png"))) == 16
    assert sorted(p.name for p in runs.iterdir()) == ["smoke", "smoke-2"]


def test_predict_draws_by_the_sampler_that_is_asked_for(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "smoke" / "checkpoints" / "last.ckpt"
    arguments = ["--config", str(SMOKE), "--run.root", str(runs), "--run.name", "smoke", "--ckpt_path", str(checkpoint)]
    arguments += [
        "--trainer.callbacks+=lightning_prune.callbacks.ImageWriter",
        f"--trainer.callbacks.folder={tmp_path}",
    ]
    arguments += ["--trainer.callbacks.sampler=dpm-solver++", "--trainer.callbacks.steps=3"]
    arguments += ["--trainer.callbacks.guidance=2"]
    assert main(["predict", *arguments]) == 0
    first = min(tmp_path.glob("*.png"))
    ids, label = torch.tensor([int(first.name[:6])]), torch.tensor([int(first.stem.rpartition("-")[2])])
    denoiser, process = lightning_prune.load(runs / "smoke" / "artifact"), Process(schedule="cosine", prediction="v")
    expected = sample_images(denoiser, process, ids, label, Sampler("dpm-solver++", 3, 2.0))
    drawn = 2 * to_tensor(Image.open(first))[:1] - 1
    assert (drawn - expected[0].clamp(-1, 1)).abs().max() < 0.01


def test_another_runs_artifact_is_a_row_beside(runs: Path) -> None:
    checkpoint = runs / "smoke" / "checkpoints" / "last.ckpt"
    config = yaml.safe_load(SMOKE.read_text())
    (report,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("EfficiencyReport")]
    report["init_args"]["beside"] = {"other run": str(runs / "smoke-2" / "artifact")}
    config["trainer"]["callbacks"] = [report]
    config["trainer"]["limit_test_batches"] = 2
    (runs / "beside.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(runs / "beside.yaml"), "--run.root", str(runs), "--run.name", "smoke"]
    assert main(["test", *arguments, "--ckpt_path", str(checkpoint), "--gate", "fd_fashion<=other run+1e-6"]) == 0
    found = json.loads((runs / "smoke" / "report-test.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["dense", "one-shot 2:4", "other run", "sparsedm 2:4"]
    (pair,) = [c for c in found["comparisons"] if (c["name"], c["against"]) == ("sparsedm 2:4", "other run")]
    assert pair["fd_fashion"]["value"] == pytest.approx(0, abs=1e-9)
    report["init_args"]["rows"] = []
    (runs / "beside.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", *arguments, "--ckpt_path", str(checkpoint)]) == 0
    alone = json.loads((runs / "smoke" / "report-test.json").read_text())
    assert (alone["rows"][0]["macs_kept"], alone["comparisons"]) == (found["rows"][-1]["macs_kept"], [])
    assert alone["rows"][0]["fd_fashion"] == found["rows"][-1]["fd_fashion"]
    (runs / "beside.yaml").unlink()
    for name in ("report-test.json", "report-test.md"):
        (runs / "smoke" / name).unlink()


def test_a_run_stopped_before_its_report_leaves_the_same_one_when_resumed(runs: Path) -> None:
    first, copy = runs / "smoke", runs / "stopped"
    shutil.copytree(first, copy)
    shutil.rmtree(copy / "artifact")
    (copy / "report.json").unlink()
    checkpoint = str(copy / "checkpoints" / "last.ckpt")
    arguments = ["--config", str(SMOKE), "--run.root", str(runs), "--run.name", "stopped", "--ckpt_path", checkpoint]
    assert main(["fit", *arguments]) == 0
    assert report_of(copy)["comparisons"] == report_of(first)["comparisons"]
    ours, theirs = (lightning_prune.load(run / "artifact").state_dict() for run in (copy, first))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    shutil.rmtree(copy)
