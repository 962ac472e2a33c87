"""Every method on one device from fit to bench: through the command line, a few steps.

On a GPU (`make gpu-test`) the networks are the embedded ones, and nothing of it has been run yet. That the bodies are
right the CPU shows on tiny networks: SparseDM's in `make test`, the others in `make slow`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.sparse import SparseSemiStructuredTensor

from lightning_prune.cli import main
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.samplers import sample_images
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import load
from tests.factories import tiny_dit, tiny_unet

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"
PROCESS = {"class_path": "lightning_prune.diffusion.process.Process"}
# Releases of torch and Lightning that a GPU comes with warn of what the pinned ones do not; seen, no failure.
GPU = (pytest.mark.gpu, pytest.mark.filterwarnings("default"))


@dataclass(frozen=True)
class Case:
    """A smoke config, whose network is exchanged for a pretrained one, and the steps its result is sampled with."""

    config: str
    steps: int
    one_call: bool = False  # whether the result is the same network at every step

    def weights(self, device: str, folder: Path) -> str:
        """The embedded network; on a CPU a tiny one in `folder`."""
        unet = "_unet" in self.config
        if device == "cuda":
            return f"embedded:fashion_{'unet' if unet else 'dit'}"
        (tiny_unet() if unet else tiny_dit()).network.save_pretrained(folder / "pretrained")
        return str(folder / "pretrained")


CASES = [
    Case("sparsedm_dit", 2, one_call=True),
    Case("sparsedm_unet", 2, one_call=True),
    Case("mosaicdiff_dit", 4),
    Case("mosaicdiff_unet", 3),
    Case("dipgo_dit", 4),
    Case("dipgo_unet_paper", 4),
]


def on(device: str, case: Case, precision: str) -> Any:
    quick = (case.config, precision) == ("sparsedm_dit", "32-true")
    marks = GPU if device == "cuda" else () if quick else (pytest.mark.slow,)
    return pytest.param(device, case, precision, marks=marks, id=f"{device}-{case.config}-{precision}")


EVERYWHERE = [
    on(device, case, precision)
    for device in ("cpu", "cuda")
    for case in CASES
    for precision in ("32-true", "bf16-mixed")
]


def fit(folder: Path, device: str, case: Case, precision: str, **trainer: Any) -> Path:
    """The folder of a run that ended well."""
    content = yaml.safe_load((SMOKE / f"{case.config}.yaml").read_text())
    content["run"] = {"root": str(folder), "name": "run", "wandb": "disabled"}
    content["model"]["init_args"]["denoiser"]["init_args"] = {"weights": case.weights(device, folder)}
    content["model"]["init_args"]["process"] = PROCESS | {"init_args": {"schedule": "cosine", "prediction": "v"}}
    accelerator = "gpu" if device == "cuda" else "cpu"
    # Lightning warns that its summary of layers does not know half precision.
    settings = {"accelerator": accelerator, "devices": 1, "precision": precision, "enable_model_summary": False}
    content["trainer"] |= settings | trainer
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    return folder / "run"


def images(artifact: Path, device: str, steps: int) -> torch.Tensor:
    ids = torch.arange(4)
    found = sample_images(load(artifact).to(device), Process("cosine", "v"), ids, ids, Sampler(steps=steps))
    assert found.device.type == device
    return found.cpu()


@pytest.mark.parametrize(("device", "case", "precision"), EVERYWHERE)
def test_from_fit_to_bench(device: str, case: Case, precision: str, tmp_path: Path) -> None:
    run = fit(tmp_path, device, case, precision)
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert len(rows) > 1
    assert all(math.isfinite(row["fd_fashion"]["value"]) for row in rows)
    exported, result = tmp_path / "exported", tmp_path / "bench.json"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(exported)]) == 0
    drawn = images(run / "artifact", device, case.steps)
    assert torch.isfinite(drawn).all()
    assert torch.allclose(images(exported, device, case.steps), drawn, atol=1e-3), "a checkpoint holds the result"
    # Convolutions of a GPU round their inputs to 19 bits (TF32).
    assert (images(exported, "cpu", case.steps) - drawn).abs().mean() < 1e-2
    steps = [] if case.one_call else ["--steps", str(case.steps)]
    modes = ["eager", "compiled"] if device == "cuda" and case.one_call else ["eager"]
    asked = ["--device", device, "--batch", "2", "--repeats", "8", "--modes", *modes, "--json", str(result), *steps]
    assert main(["bench", "--artifact", str(run / "artifact"), *asked]) == 0
    cells = json.loads(result.read_text())["cells"]
    assert [cell["mode"] for cell in cells] == modes
    assert all((cell["peak_memory_bytes"]["pruned"] is None) == (device == "cpu") for cell in cells)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_run_goes_on_from_its_checkpoint(device: str, tmp_path: Path) -> None:
    run = fit(tmp_path, device, CASES[0], "32-true", max_steps=2, callbacks=[])
    checkpoint = run / "checkpoints" / "last.ckpt"
    again = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.max_steps", "4"]
    for steps, arguments in ((2, None), (4, [*again, "--ckpt_path", str(checkpoint)])):
        assert arguments is None or main(arguments) == 0
        assert torch.load(checkpoint, weights_only=True)["global_step"] == steps


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_layers_packed_on_a_gpu_compute_what_masked_ones_do(tmp_path: Path) -> None:
    run = fit(tmp_path, "cuda", CASES[0], "bf16-mixed")
    packed = tmp_path / "packed"
    asked = ["--artifact", str(run / "artifact"), "--format", "semi-structured", "--output", str(packed)]
    assert main(["export", *asked]) == 0
    dense, half = load(run / "artifact").to("cuda", torch.bfloat16), load(packed, device="cuda")
    assert any(isinstance(p.data, SparseSemiStructuredTensor) for p in half.parameters())
    x, t, cond = torch.randn(4, *dense.sample_shape).to("cuda", torch.bfloat16), torch.arange(4), torch.arange(4)
    with torch.no_grad():
        wanted, found = (network(x, t.cuda(), cond.cuda()) for network in (dense, half))
    assert torch.allclose(found, wanted, rtol=2e-2, atol=2e-2)
    timed = tmp_path / "timed"
    assert main(["export", *asked[:-1], str(timed), "--device", "cuda", "--tokens", "512"]) == 0
    found = json.loads((timed / "pruning.json").read_text())["semi_structured"]
    assert found["tokens"] == 512
    won = [name for name, pair in found["seconds"].items() if pair["semi_structured"] < pair["dense"]]
    assert found["packed"] == won
