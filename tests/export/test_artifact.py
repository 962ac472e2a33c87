"""The artifact: exact zeros, loads here and in diffusers, refuses what it cannot trust."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import lightning_prune
from lightning_prune.export import save_artifact
from lightning_prune.export.artifact import MANIFEST, SCHEMA
from lightning_prune.protocols import InputError
from lightning_prune.pruning.nm import to_groups
from tests.factories import tiny_sparsedm, tiny_unet


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    module = tiny_sparsedm()
    return save_artifact(module.denoiser, tmp_path / "artifact", "sparsedm", {"note": 1}), module


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 32, 32, generator=generator), torch.tensor([1, 500, 999]), torch.tensor([0, 4, 10])


def test_masked_tensors_hold_exactly_n_nonzeros_in_every_group(stored: Any) -> None:
    folder, module = stored
    state = lightning_prune.load(folder).network.state_dict()
    masks = json.loads((folder / MANIFEST).read_text())["masks"]
    assert set(masks) == set(module.masks.layers)
    for name in masks:
        assert ((to_groups(state[f"{name}.weight"], 4) != 0).sum(-1) == 2).all()


def test_loaded_output_equals_the_masked_network(stored: Any) -> None:
    folder, module = stored
    module.denoiser.eval()
    assert torch.equal(lightning_prune.load(folder)(*inputs()), module.denoiser(*inputs()))


def test_diffusers_loads_it_by_itself(stored: Any) -> None:
    folder, module = stored
    network = DiTTransformer2DModel.from_pretrained(folder, use_safetensors=True).eval()
    x, t, cond = inputs()
    assert torch.equal(network(x, timestep=t, class_labels=cond).sample, module.denoiser.eval()(x, t, cond))


def test_a_fresh_process_loads_it(stored: Any) -> None:
    folder, _ = stored
    code = f"import lightning_prune as l; d = l.load({str(folder)!r}); print(d.sample_shape, type(d).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 32, 32) DiT"


def test_unet_round_trip(tmp_path: Path) -> None:
    denoiser = tiny_unet().eval()
    save_artifact(denoiser, tmp_path / "a", "dense", {})
    assert torch.equal(lightning_prune.load(tmp_path / "a")(*inputs()), denoiser(*inputs()))


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_newer_schema_is_refused(stored: Any) -> None:
    edit(stored[0], schema=SCHEMA + 1)
    with pytest.raises(InputError, match="newer than this version"):
        lightning_prune.load(stored[0])


def test_an_unknown_class_is_refused(stored: Any) -> None:
    edit(stored[0], base={"class": "os.system", "weights": None})
    with pytest.raises(InputError, match=r"no backbone is known for os\.system"):
        lightning_prune.load(stored[0])


def test_a_path_out_of_the_folder_is_refused(stored: Any) -> None:
    edit(stored[0], files={"../x": "0"})
    with pytest.raises(InputError, match="is not a file of the artifact"):
        lightning_prune.load(stored[0])


def test_a_changed_file_is_refused(stored: Any) -> None:
    file = stored[0] / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="checksum differs"):
        lightning_prune.load(stored[0])


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pruning\.json: missing"):
        lightning_prune.load(tmp_path)
