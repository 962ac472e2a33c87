"""`bench` from the command line: what the result holds, what is said of it, and what is refused. No seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import validate

from lightning_prune.blocks import GateSchedule
from lightning_prune.cli import bench, bench_text, main
from lightning_prune.cli.bench_networks import Task, load_pair
from lightning_prune.diffusion.gated import MadeFor, gated
from lightning_prune.diffusion.process import Process
from lightning_prune.diffusion.solvers import Sampler
from lightning_prune.export import save_artifact, switchable
from lightning_prune.export.artifact import MANIFEST
from lightning_prune.metrics.latency import Timing
from lightning_prune.protocols import InputError
from lightning_prune.pruning.masks import masked_layers
from tests.factories import DIT_CONFIG, tiny_dit, tiny_sparsedm, tiny_unet

TIMES = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
NETWORK = {
    "type": "object",
    "required": ["median_seconds", "quartiles", "images_per_second", "seconds"],
    "properties": {"quartiles": TIMES, "seconds": TIMES},
}
CELL = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "batch",
        "dtype",
        "mode",
        "dense",
        "pruned",
        "seconds_ratio",
        "verdict",
        "graphs",
        "sparse_layers",
        "peak_memory_bytes",
    ],
    "properties": {
        "batch": {"type": "integer"},
        "dtype": {"enum": ["float32", "bfloat16", "float16"]},
        "mode": {"enum": ["eager", "compiled"]},
        "dense": NETWORK,
        "pruned": NETWORK,
        "seconds_ratio": {"type": "object", "required": ["value", "low", "high"]},
        "verdict": {"enum": ["speed-up", "slower", "no measurable difference"]},
        "graphs": {"type": ["integer", "null"]},
        "sparse_layers": {"type": "integer"},
        "peak_memory_bytes": {"type": "object", "required": ["dense", "pruned"]},
    },
}
KEYS = ["schema", "command", "date", "machine", "versions", "dense", "pruned", "task", "macs", "repeats", "interval"]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [*KEYS, "cells"],
    "properties": {
        **dict.fromkeys(KEYS, True),
        "schema": {"const": 1},
        "machine": {"type": "object", "required": ["cpu", "cores", "threads", "device", "gpu", "load_average"]},
        "versions": {"type": "object", "required": ["lightning_prune", "torch", "diffusers", "python"]},
        "macs": {"type": "object", "required": ["convention", "dense_per_image", "pruned_per_image", "ratio"]},
        "cells": {"type": "array", "minItems": 1, "items": CELL},
    },
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads on a busy machine wait for each other at every layer of so small a network.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_artifact(tiny_dit(), tmp_path / "base", "dense", {})


@pytest.fixture
def artifact(base: Path, tmp_path: Path) -> Path:
    module = tiny_sparsedm()
    module.denoiser.weights = str(base)
    sampler = {"sampler": module.process.scheduler_config}
    return save_artifact(module.denoiser, tmp_path / "artifact", "sparsedm", sampler)


def measured(artifact: Path, *arguments: str) -> dict[str, Any]:
    """Run bench with the fewest turns; return what it stored."""
    file = artifact.parent / "bench.json"
    assert main(["bench", "--artifact", str(artifact), "--repeats", "10", "--json", str(file), *arguments]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    validate(result, SCHEMA)
    return result


def test_a_network_call(artifact: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(artifact, "--batch", "1", "3", "--dtype", "float32", "bfloat16")
    cells = [(c["dtype"], c["batch"], c["mode"]) for c in result["cells"]]
    assert cells == [(d, b, "eager") for d in ("float32", "bfloat16") for b in (1, 3)]
    assert all(len(c[name]["seconds"]) == 10 for c in result["cells"] for name in ("dense", "pruned"))
    assert all(c["graphs"] is None and c["peak_memory_bytes"]["dense"] is None for c in result["cells"])
    assert result["dense"] == str(base)
    assert result["pruned"]["masked"].keys() == {"2:4"}
    assert result["task"] == {"name": "one network call"}
    assert f"--artifact {artifact}" in result["command"]
    out = capsys.readouterr().out
    assert "MACs of masked layers are theoretical" in out
    assert len([text for text in out.splitlines() if " eager " in text]) == 4


def test_macs_are_those_of_the_ledger(artifact: Path) -> None:
    pair = load_pair(artifact, None, None)
    call = pair.macs(Task(Process()))
    assert call["theoretical"]
    assert 0.5 < call["ratio"] < 1
    assert call["pruned_per_image"] == call["ratio"] * call["dense_per_image"]
    guided = pair.macs(Task(Process(), steps=5, guidance=2.0))
    assert guided["dense_per_image"] == 10 * call["dense_per_image"]
    assert guided["ratio"] == call["ratio"]


def test_a_switchable_artifact_is_measured_as_the_other(artifact: Path, base: Path, tmp_path: Path) -> None:
    module = tiny_sparsedm()
    module.denoiser.weights = str(base)
    details = {"sampler": module.process.scheduler_config, switchable.KEY: switchable.released(module.denoiser)}
    pair = load_pair(save_artifact(module.denoiser, tmp_path / "switchable", "sparsedm", details), None, None)
    other, task = load_pair(artifact, None, None), Task(Process())
    assert pair.macs(task) == other.macs(task)
    state = other.pruned.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pair.pruned.state_dict().items())
    assert not masked_layers(pair.pruned), "what is timed multiplies by no mask"


def test_a_trajectory(artifact: Path) -> None:
    result = measured(artifact, "--batch", "2", "--dtype", "bfloat16", "--steps", "2", "--guidance", "1.5")
    task = {"name": "trajectory", "sampler": "DDIM eta=0, trailing", "steps": 2, "guidance": 1.5}
    assert result["task"] == task


def test_a_trajectory_of_another_solver(artifact: Path) -> None:
    result = measured(artifact, "--batch", "1", "--steps", "3", "--sampler", "dpm-solver++")
    assert result["task"]["sampler"].startswith("DPM-Solver++")
    with pytest.raises(InputError, match="--sampler: one network call has none"):
        bench.parse(["--artifact", str(artifact), "--sampler", "plms"])
    assert Task(Process("flow", "flow"), 2).sampler.name == "flow-euler"
    process = load_pair(artifact, None, None).process()
    graph = tiny_dit().blocks("half")
    found = GateSchedule.of(graph, "residual", [[True] * len(graph)] * 3)
    for_ddim = gated(tiny_dit(), found, process, MadeFor.of(Sampler(steps=3), process))
    with pytest.raises(InputError, match="gates: the schedule is for DDIM"):
        Task(process, 3, solver="dpm-solver++").arm(for_ddim, "eager", 1)
    assert Task(process, 3).arm(for_ddim, "eager", 1)().shape == (1, 1, 32, 32)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_trajectory_calls_the_network_once_a_step(artifact: Path, guidance: float | None) -> None:
    pair, batches = load_pair(artifact, None, None), []
    pair.pruned.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    images = Task(pair.process(), 3, guidance).arm(pair.pruned, "eager", 2)()
    assert images.shape == (2, 1, 32, 32)
    assert batches == [4 if guidance else 2] * 3


def test_against_itself_any_family(tmp_path: Path) -> None:
    folder = save_artifact(tiny_unet(), tmp_path / "unet", "dense", {})
    result = measured(folder, "--against", str(folder), "--batch", "1")
    assert result["macs"]["ratio"] == 1
    assert not result["macs"]["theoretical"]


def test_every_cell_compiles_anew(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More cells than torch keeps graphs of one function; here without the compiler's slow half."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    result = measured(artifact, "--batch", *"123456789", "--modes", "eager", "compiled", "--steps", "1")
    assert [c["mode"] for c in result["cells"]] == ["eager", "compiled"] * 9
    assert all(c["graphs"] >= 1 for c in result["cells"][1::2])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_for_real(artifact: Path) -> None:
    result = measured(artifact, "--batch", "2", "--modes", "compiled")
    assert result["cells"][0]["graphs"] >= 1


def test_the_process_is_the_artifacts(artifact: Path) -> None:
    process = load_pair(artifact, None, None).process()
    assert process.describe() == Process(schedule="cosine", prediction="v").describe()
    with pytest.raises(InputError, match="sampler: 'nonsense'"):
        Process.from_scheduler({**process.scheduler_config, "beta_schedule": "nonsense"})


# What is said


def cell_of(ratio: float) -> dict[str, Any]:
    shape = {"batch": 4, "dtype": "float32", "mode": "eager", "peak_memory_bytes": {"dense": None, "pruned": None}}
    return shape | bench.compared(Timing((1.0,) * 7), Timing((ratio,) * 7), batch=4, cells=2)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.5, "speed-up 2.00x"), (1.25, "slower: takes 1.25x the seconds"), (1.0, "no measurable difference")],
)
def test_a_speed_up_is_named_only_where_there_is_one(ratio: float, said: str) -> None:
    text = bench_text.line(cell_of(ratio), {"ratio": 0.6})
    assert text.endswith(said)
    assert ("speed-up" in text) == (ratio < 1)
    assert f"{ratio:.3f} [{ratio:.3f}, {ratio:.3f}]" in text
    assert " 0.600 " in text


def test_images_a_second() -> None:
    assert cell_of(0.5)["pruned"]["images_per_second"] == 8


def test_memory_is_printed_where_it_was_measured() -> None:
    peak = {"peak_memory_bytes": {"dense": 3 << 20, "pruned": 2 << 20}}
    assert bench_text.line(cell_of(1.0) | peak, {"ratio": 1.0}).endswith("; peak memory 3.0 / 2.0 MiB")


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning_prune: error: ")
    return str(line)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "0"], "--batch: 0"),
        (["--batch", "many"], "--batch"),
        (["--repeats", "5"], "--repeats: 5 give no 95 % interval for 3 cells; at least 7"),
        (["--dtype", "float8"], "float8"),
        (["--modes", "fast"], "fast"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "--device: meta"),
        (["--guidance", "2"], "--guidance"),
        (["--steps", "0"], "steps: 0"),
        (["--steps", "100000"], "steps: 100000"),
        (["--nonsense"], "--nonsense"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--json", "."], "--json: . exists already"),
        (["--against", "/no/such"], "/no/such"),
        (["--against", "embedded:nothing"], "embedded:nothing"),
    ],
)
def test_the_line_names_what_is_wrong(
    arguments: list[str], named: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, "--artifact", str(artifact), *arguments)


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--artifact" in refused(capsys)
    assert str(tmp_path / MANIFEST) in refused(capsys, "--artifact", str(tmp_path))


def test_no_base_in_the_manifest(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--artifact", str(base))
    assert MANIFEST in line
    assert "--against" in line


def test_a_base_that_is_gone(artifact: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base.rename(base.with_name("moved"))
    line = refused(capsys, "--artifact", str(artifact))
    assert str(base) in line
    assert MANIFEST in line


def test_another_family(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = save_artifact(tiny_unet(), tmp_path / "unet", "dense", {})
    assert "UNet2DModel" in refused(capsys, "--artifact", str(artifact), "--against", str(unet))


def test_other_images(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = type(tiny_dit())(config={**DIT_CONFIG, "sample_size": 16})
    folder = save_artifact(smaller, tmp_path / "smaller", "dense", {})
    assert "sample_shape (1, 16, 16)" in refused(capsys, "--artifact", str(artifact), "--against", str(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device: cuda" in refused(capsys, "--artifact", str(artifact), "--device", "cuda")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--batch 7"),
        (RuntimeError("\"addmm\" not implemented for 'Half'"), "--dtype float32"),
    ],
)
def test_what_a_machine_cannot_do(
    error: RuntimeError, named: str, artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(bench, "interleaved_seconds", fail)
    file = artifact.parent / "bench.json"
    assert named in refused(capsys, "--artifact", str(artifact), "--batch", "7", "--json", str(file))
    assert not file.exists()


def test_a_compiler_that_is_switched_off(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    line = refused(capsys, "--artifact", str(artifact), "--batch", "1", "--repeats", "6", "--modes", "compiled")
    assert "torch compiled nothing" in line
