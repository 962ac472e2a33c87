"""Extractors: Inception against an independent copy, the others against their own definition, refusals by one line."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor

from lightning_prune.data import EmbeddedFashion
from lightning_prune.metrics.extractors import load_extractor
from lightning_prune.metrics.extractors.base import FeatureExtractor, tensors_sha256
from lightning_prune.metrics.extractors.fashion import load_classifier
from lightning_prune.metrics.extractors.inception import InceptionExtractor
from lightning_prune.metrics.extractors.timm import TimmExtractor
from lightning_prune.protocols import InputError
from tests.inception import oracle_features, oracle_spatial, weights_in


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_in(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> InceptionExtractor:
    return InceptionExtractor(inception_file)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    return file


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_inception_gives_the_features_of_the_independent_copy(inception: InceptionExtractor) -> None:
    """32 images: clothes, noise smaller and larger than the input of the network, wider than high."""
    clothes = EmbeddedFashion().split("held_out").images[:16].expand(-1, 3, -1, -1)
    for images in (clothes, noise(8, 3, 48, 64), noise(8, 3, 320, 310)):
        found, expected = inception.extract(images).features, oracle_features(images)
        assert found.shape == (len(images), 2048)
        difference = float((found - expected).abs().max())
        assert difference < 1e-4


def test_spatial_features_are_those_of_the_layer_adm_names(inception: InceptionExtractor) -> None:
    images = noise(2, 3, 64, 64, seed=1)
    spatial = inception.extract(images).spatial
    assert spatial is not None
    assert spatial.shape == (2, 2023)
    assert float((spatial - oracle_spatial(images)).abs().max()) < 1e-4


def test_grey_images_are_repeated(inception: InceptionExtractor) -> None:
    grey = noise(2, 1, 32, 32, seed=2)
    assert torch.equal(inception.extract(grey).features, inception.extract(grey.repeat(1, 3, 1, 1)).features)


def test_without_a_class_layer_there_are_no_scores(inception: InceptionExtractor) -> None:
    assert inception.extract(noise(2, 3, 32, 32)).logits is None


def test_class_scores_leave_out_the_bias(inception_file: Path, tmp_path: Path) -> None:
    weight = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    tensors = {**load_file(inception_file), "fc.weight": weight, "fc.bias": torch.ones(1008)}
    save_file(tensors, tmp_path / "with_fc.safetensors")
    found = InceptionExtractor(tmp_path / "with_fc.safetensors").extract(noise(2, 3, 32, 32))
    torch.testing.assert_close(found.logits, found.features @ weight.T, rtol=1e-4, atol=1e-3)


def test_an_early_layer_is_not_called_fid(inception_file: Path) -> None:
    extractor = InceptionExtractor(inception_file, layer="64")
    found = extractor.extract(noise(2, 3, 32, 32))
    assert extractor.metric == "fid_64"
    assert found.features.shape == (2, 64)
    assert found.spatial is None


def test_inception_weights_that_were_changed(inception_file: Path, tmp_path: Path) -> None:
    tensors = load_file(inception_file)
    tensors["Conv2d_1a_3x3.bn.bias"] = tensors["Conv2d_1a_3x3.bn.bias"] + 1
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(InputError, match=r"changed\.safetensors: not the Inception weights"):
        InceptionExtractor(tmp_path / "changed.safetensors")


def test_missing_inception_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"inception-2015-12-05\.safetensors: .*prefetch inception --from PATH"):
        load_extractor("inception-2015-12-05")


def test_the_checksum_depends_on_names_shapes_and_values_alone(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1)}
    digest = tensors_sha256(tensors)
    save_file(tensors, tmp_path / "t.safetensors", metadata={"note": "another container"})
    assert tensors_sha256(load_file(tmp_path / "t.safetensors")) == digest
    assert tensors_sha256({**tensors, "b": tensors["b"].view(3, 2)}) != digest
    assert tensors_sha256({"c": tensors["b"], "a": tensors["a"]}) != digest
    assert tensors_sha256({**tensors, "a": torch.tensor(2)}) != digest


def test_the_embedded_classifier_gives_what_it_gave() -> None:
    images = EmbeddedFashion().split("held_out").images[:20]
    extractor = load_extractor("fashion_classifier")
    found = extractor.extract(images)
    classifier = load_classifier()
    features, logits = classifier.features(images), classifier(images)
    assert torch.equal(found.features, features)
    assert found.logits is not None
    assert torch.equal(found.logits, logits)
    assert (extractor.metric, extractor.dimensions) == ("fd_fashion", 96)


def test_timm_features_come_from_the_networks_own_input_settings(vit_file: Path) -> None:
    extractor = load_extractor("timm/test_vit", vit_file)
    images = noise(3, 3, 160, 160)
    network = timm.create_model("test_vit", pretrained=False, num_classes=0)
    network.load_state_dict(load_file(vit_file), strict=False)
    config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.eval()((images / 255 - mean) / std)
    torch.testing.assert_close(extractor.extract(images).features, expected, rtol=1e-4, atol=1e-4)
    assert extractor.metric == "fd_test_vit"
    assert extractor.dimensions == expected.shape[1]
    assert extractor.resize == "bicubic with antialiasing, to 160x160, no crop"


def test_timm_takes_a_folder_and_grey_images_of_any_size(vit_file: Path) -> None:
    assert TimmExtractor("test_vit", vit_file.parent).extract(noise(2, 1, 40, 50)).features.shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", None, "extractor 'resnet'"),
        ("timm/", None, "extractor 'timm/'"),
        ("timm/no_such_network", "x", "timm/no_such_network"),
        ("timm/test_vit", None, "give its weights"),
        ("timm/test_vit", "/no/such/file", "/no/such/file"),
        ("inception-2015-12-05", "/no/such/file", "/no/such/file"),
        ("fashion_classifier", "/no/such/folder", "/no/such/folder"),
    ],
)
def test_bad_names_and_paths(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_extractor(name, weights)
    assert "\n" not in str(caught.value)


def test_timm_weights_of_another_network(vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights of another network"):
        load_extractor("timm/test_resnet", vit_file)
    tensors = load_file(vit_file)
    save_file({**tensors, "norm.weight": torch.ones(3)}, tmp_path / "shape.safetensors")
    with pytest.raises(InputError, match=r"shape\.safetensors: weights of another shape"):
        load_extractor("timm/test_vit", tmp_path / "shape.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(vit_file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut\.safetensors: .*cannot be read"):
        load_extractor("timm/test_vit", tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 2, 32, 32, dtype=torch.uint8),
        torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
    ],
    ids=["float", "three-dimensional", "two channels", "none"],
)
def test_bad_images(images: Tensor, vit_file: Path) -> None:
    with pytest.raises(InputError, match=r"images: timm/test_vit takes uint8 \[N, 1 or 3, H, W\], got"):
        load_extractor("timm/test_vit", vit_file).extract(images)


def test_images_of_another_size_than_the_embedded_classifiers() -> None:
    extractor = load_extractor("fashion_classifier")
    with pytest.raises(InputError, match=r"takes uint8 \[N, 1, 32, 32\], got uint8 \[2, 1, 28, 28\]"):
        extractor.extract(noise(2, 1, 28, 28))


def test_extractors_satisfy_the_protocol(inception: InceptionExtractor, vit_file: Path) -> None:
    extractors: list[FeatureExtractor] = [
        inception, load_extractor("fashion_classifier"), load_extractor("timm/test_vit", vit_file)
    ]  # fmt: skip
    assert all(isinstance(extractor, FeatureExtractor) for extractor in extractors)
    assert len({extractor.metric for extractor in extractors}) == 3
    assert len({extractor.sha256 for extractor in extractors}) == 3
