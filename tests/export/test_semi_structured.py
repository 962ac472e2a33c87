"""Packed 2:4 layers: what fits, what is refused and why, and that unpacking gives back every bit."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.diffusion.models.dit import DiT
from lightning_prune.export import packed, save_artifact, semi_structured
from lightning_prune.export.packed import FILE
from lightning_prune.export.semi_structured import accelerate, missing, pack, plan, stored_bytes, unfit, unpack
from lightning_prune.protocols import InputError, Sparsity
from lightning_prune.pruning.masks import MaskSet, effective_state, select_units
from lightning_prune.pruning.nm import nm_mask, violations
from tests.factories import tiny_sparsedm

TWO_FOUR = Sparsity(2, 4)
DTYPES = [torch.float16, torch.bfloat16]


def packable_dit() -> DiT:
    """A transformer all of whose layers have shapes that kernels take."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 1,
    }
    return DiT(config={**settings, "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 10})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    denoiser = packable_dit()
    MaskSet(denoiser.network, select_units(denoiser.anatomy(), None, denoiser.default_dense(), 4), TWO_FOUR)
    return save_artifact(denoiser, tmp_path / "artifact", "sparsedm", {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 64)])
def test_unpacking_gives_back_every_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight * nm_mask(weight, TWO_FOUR)
    weight[0] = 0  # rows with fewer than two values are 2:4 as well
    stored = pack({"a.weight": weight, "b.weight": weight, "n": torch.tensor(3)}, ("a",), dtype)
    assert stored["a.weight.packed"].shape == (shape[0], shape[1] // 2)
    bits = stored["a.weight.meta"].numel() * stored["a.weight.meta"].element_size() * 8
    assert bits == 2 * weight.numel() // 2, "two bits for each value that is kept"
    found = unpack(stored)
    assert found.keys() == {"a.weight", "b.weight", "n"}
    assert torch.equal(found["a.weight"], weight)
    assert torch.equal(found["n"], torch.tensor(3))


@pytest.mark.parametrize("pattern", [Sparsity(1, 4), Sparsity(2, 8), Sparsity(1, 8)])
def test_sparser_weights_are_packed_as_2_4(pattern: Sparsity) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).half()
    weight = weight * nm_mask(weight, pattern)
    assert torch.equal(unpack(pack({"a.weight": weight}, ("a",), torch.float16))["a.weight"], weight)


def test_a_weight_that_is_not_2_4_is_refused() -> None:
    with pytest.raises(InputError, match=r"a\.weight is not 2:4"):
        pack({"a.weight": torch.ones(32, 64)}, ("a",), torch.float16)


@pytest.mark.parametrize(
    ("layer", "sparsity", "dtype", "reason"),
    [
        (nn.Linear(64, 32), TWO_FOUR, torch.float16, None),
        (nn.Linear(64, 32), Sparsity(1, 4), torch.float16, None),
        (nn.Linear(64, 32), Sparsity(2, 8), torch.float16, None),
        (nn.Linear(64, 32), Sparsity(1, 8), torch.float16, None),
        (nn.Linear(64, 32), Sparsity(4, 8), torch.float16, "4:8 may keep more than two of four"),
        (nn.Linear(64, 32), Sparsity(2, 6), torch.float16, "2:6 may keep more than two of four"),
        (nn.Conv2d(64, 32, 1), TWO_FOUR, torch.float16, "a Conv2d; kernels are for linear layers"),
        (nn.Linear(64, 32), TWO_FOUR, torch.float32, "neither float16 nor bfloat16"),
        (nn.Linear(64, 40), TWO_FOUR, torch.float16, "40 x 64 is no multiple of 32 x 64"),
    ],
)
def test_what_fits(layer: nn.Module, sparsity: Sparsity, dtype: torch.dtype, reason: str | None) -> None:
    found = unfit(layer, sparsity, dtype)
    assert found is None if reason is None else reason in str(found)


def test_the_cpu_says_what_it_lacks() -> None:
    assert missing("cpu") == "cpu has no semi-structured kernel; a CUDA device has"
    with pytest.raises(InputError, match="cpu has no semi-structured kernel"):
        accelerate(nn.Sequential(nn.Linear(64, 32)), ("0",), "cpu")


def test_a_device_whose_kernels_fail_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on builds of torch without the library of the kernels, or with kernels for other architectures."""

    def raising(weight: Tensor) -> Tensor:
        raise RuntimeError("cuSPARSELt not supported on your machine.\nMore.")

    def probed(convert: Any) -> str | None:
        monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", convert)
        return semi_structured._failure.__wrapped__(torch.device("cpu"))

    assert probed(lambda weight: weight) is None
    assert probed(lambda weight: 2 * weight) == "a 2:4 product in torch.float16 is wrong"
    assert probed(raising) == "a 2:4 product in torch.float16 fails: cuSPARSELt not supported on your machine."


class Viewing(nn.Linear):
    """Reads rows as torch's semi-structured product does: by a view."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = super().forward(input.view(-1, input.shape[-1]))
        return rows.view(*input.shape[:-1], -1)


@pytest.fixture
def _stand_in_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of `accelerate` but the kernel."""
    monkeypatch.setattr(semi_structured, "missing", lambda device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight)
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_stand_in_kernel")
@pytest.mark.parametrize("compiled", [False, True])
def test_accelerated_layers_read_inputs_that_have_no_view_as_rows(compiled: bool) -> None:
    torch.manual_seed(0)
    layer = Viewing(16, 8)
    network = nn.Sequential(layer)
    names = list(network.state_dict())
    image = torch.randn(2, 16, 4, 4)
    tokens = image.permute(0, 2, 3, 1).reshape(2, 16, 16)  # as before proj_in
    joint = torch.randn(2, 9, 16)[:, :5]  # as before to_out
    with pytest.raises(RuntimeError, match="view"):
        network(tokens)
    expected = [nn.functional.linear(x, layer.weight, layer.bias) for x in (tokens, joint)]
    for _ in range(2):
        accelerate(network, ("0",), "cpu")
    assert list(layer._forward_pre_hooks.values()) == [semi_structured.contiguous_input]
    assert list(layer._forward_hooks.values()) == [semi_structured.contiguous_output]
    assert list(network.state_dict()) == names
    run = torch.compile(deepcopy(network), backend="eager", fullgraph=True) if compiled else network
    for x, wanted in zip((tokens, joint), expected, strict=True):
        assert torch.allclose(run(x), wanted)


class Columns(nn.Linear):
    """Gives its output column after column, as the kernels of some releases do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input).transpose(-1, -2).contiguous().transpose(-1, -2)
        return output


@pytest.mark.usefixtures("_stand_in_kernel")
def test_accelerated_layers_give_rows() -> None:
    network, x = nn.Sequential(Columns(16, 8)), torch.randn(2, 5, 16)
    expected = network(x)
    assert not expected.is_contiguous()
    found = accelerate(network, ("0",), "cpu")(x)
    assert found.is_contiguous()
    assert torch.equal(found, expected)


# Torch warns that its kernels are a prototype.
@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_computes_what_the_dense_layer_does(dtype: torch.dtype, compiled: bool) -> None:
    """Both kinds of input that have no view, on the device."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 128).to("cuda", dtype).requires_grad_(False)
    layer.weight.mul_(nm_mask(layer.weight, TWO_FOUR))
    dense = nn.Sequential(layer)
    sparse = accelerate(deepcopy(dense), ("0",), "cuda")
    run = torch.compile(sparse, dynamic=False) if compiled else sparse
    image, joint = torch.randn(2, 64, 8, 8), torch.randn(2, 77, 64)[:, :64]
    with torch.no_grad():
        for x in (image.permute(0, 2, 3, 1).reshape(2, 64, 64), joint):
            x = x.to("cuda", dtype)
            found = run(x)
            assert found.is_contiguous()
            assert torch.allclose(found, dense(x), rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


def test_a_plan_keeps_unfit_layers_dense_with_a_reason() -> None:
    network = nn.ModuleDict({"fits": nn.Linear(64, 64), "small": nn.Linear(16, 16)})
    found = plan(network, {"fits": TWO_FOUR, "small": TWO_FOUR}, torch.bfloat16)
    assert found.packed == ("fits",)
    assert "16 x 16 is no multiple" in found.dense["small"]
    with pytest.raises(InputError, match="no layer can be semi-structured: 16 x 16"):
        plan(network, {"small": TWO_FOUR}, torch.bfloat16)


def test_a_packed_artifact_computes_as_the_masked_network_in_its_type(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "packed"
    arguments = ["--artifact", str(artifact), "--format", "semi-structured", "--dtype", "bfloat16"]
    assert main(["export", *arguments, "--output", str(target)]) == 0
    assert "packed 6 layers" in capsys.readouterr().out
    manifest = json.loads((target / "pruning.json").read_text())
    assert manifest["semi_structured"]["seconds"] == "not measured"
    masked, loaded = lightning_prune.load(artifact).to(torch.bfloat16), lightning_prune.load(target)
    for name in manifest["semi_structured"]["packed"]:
        assert violations(loaded.network.get_submodule(name).weight, TWO_FOUR) == 0
    x, t, cond = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([1, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, cond), masked(x, t, cond))
    dense_bytes = sum(tensor.numel() * 2 for tensor in effective_state(masked.network).values())
    assert (target / FILE).stat().st_size < dense_bytes


@pytest.mark.parametrize("winners", [2, 0])
def test_layers_that_lose_their_measured_pair_stay_dense_and_say_so(
    winners: int, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wins: list[str] = []

    def timed(denoiser: Any, name: str, *_: Any) -> dict[str, float]:
        if len(wins) < winners:
            wins.append(name)
        return {"dense": 2.0, "semi_structured": 1.0 if name in wins else 2.5}

    monkeypatch.setattr(packed, "_timed", timed)
    monkeypatch.setattr(packed, "missing", lambda device: None)
    target = tmp_path / "packed"
    given = ["--artifact", str(artifact), "--format", "semi-structured", "--device", "cuda"]
    assert main(["export", *given, "--output", str(target)]) == 0
    assert "slower than dense in the measured pair" in capsys.readouterr().out
    found = json.loads((target / "pruning.json").read_text())["semi_structured"]
    assert found["packed"] == wins
    assert len(found["dense"]) == 6 - winners
    x, t, cond = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([1, 900]), torch.tensor([0, 3])
    masked = lightning_prune.load(artifact).to(torch.bfloat16)
    assert torch.equal(lightning_prune.load(target)(x, t, cond), masked(x, t, cond))


@pytest.fixture
def packed_artifact(artifact: Path, tmp_path: Path) -> Path:
    target = tmp_path / "packed"
    arguments = ["--artifact", str(artifact), "--format", "semi-structured", "--dtype", "bfloat16"]
    assert main(["export", *arguments, "--output", str(target)]) == 0
    return target


def test_a_device_without_a_kernel_is_refused_and_none_is_not(packed_artifact: Path) -> None:
    with pytest.raises(InputError, match=r"device: cpu has no semi-structured kernel; a CUDA device has; without"):
        lightning_prune.load(packed_artifact, device="cpu")
    lightning_prune.load(packed_artifact)


def test_any_other_artifact_goes_to_a_device(artifact: Path) -> None:
    assert next(lightning_prune.load(artifact, device="meta").parameters()).is_meta


def test_packed_layers_are_run_by_the_kernel_where_there_is_one(
    packed_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converted: list[Tensor] = []
    for module in (semi_structured, packed):
        monkeypatch.setattr(module, "missing", lambda device: None)

    def convert(weight: Tensor) -> Tensor:
        converted.append(weight)
        return weight

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", convert)
    plain, fast = lightning_prune.load(packed_artifact), lightning_prune.load(packed_artifact, device="cpu")
    assert len(converted) == 6
    assert all(violations(weight, TWO_FOUR) == 0 for weight in converted)
    x, t, cond = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([1, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(fast(x, t, cond), plain(x, t, cond))
    dense = packed_artifact.parent / "dense"
    plain.network.save_pretrained(dense)
    result = tmp_path / "bench.json"
    types = ["--dtype", "float32", "bfloat16"]
    timed = ["--batch", "2", "--repeats", "8", "--json", str(result), *types]
    assert main(["bench", "--artifact", str(packed_artifact), "--against", str(dense), *timed]) == 0
    assert [cell["sparse_layers"] for cell in json.loads(result.read_text())["cells"]] == [0, 6]
    assert "a sparse kernel ran 6 layers in bfloat16; the other" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_a_semi_structured_tensor_takes_what_it_is_packed_into() -> None:
    weight = torch.randn(64, 64, dtype=torch.float16)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight * nm_mask(weight, TWO_FOUR))
    sparse = SparseSemiStructuredTensorCUTLASS(weight.shape, values, meta, None, None, None)
    assert stored_bytes(sparse) == values.nbytes + meta.nbytes < weight.nbytes
    assert stored_bytes(weight) == 64 * 64 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "semi-structured"], "--artifact: needed for --format semi-structured"),
        ([], "--ckpt_path: needed for --format dense"),
        (["--ckpt_path", "x.ckpt", "--artifact", "ARTIFACT"], "--artifact: --format dense is made from --ckpt_path"),
        (
            ["--format", "semi-structured", "--artifact", "ARTIFACT", "--device", "nope"],
            "--device: 'nope' is no device",
        ),
        (["--format", "semi-structured", "--artifact", "ARTIFACT", "--device", "cpu"], "--device: cpu has no"),
    ],
)
def test_bad_options_name_themselves(
    arguments: list[str], message: str, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(artifact) if word == "ARTIFACT" else word for word in arguments]
    assert main(["export", *given, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_another_pattern_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = tiny_sparsedm(sparsity="3:4")
    folder = save_artifact(module.denoiser, tmp_path / "artifact", "sparsedm", {})
    command = ["export", "--artifact", str(folder), "--format", "semi-structured", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "no layer can be semi-structured: 3:4 may keep more than two of four" in capsys.readouterr().err
