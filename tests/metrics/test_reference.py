"""Reference moments: computed once, exchanged with other tools, refused when they are not what is asked for."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.files import written_whole
from lightning_prune.metrics.extractors import Extracted
from lightning_prune.metrics.frechet import Moments, distance, frechet_distance
from lightning_prune.metrics.reference import (
    Reference,
    cached_reference,
    compute_reference,
    export_adm,
    export_pytorch_fid,
    import_statistics,
    load_reference,
    read_batch,
    save_reference,
)
from lightning_prune.protocols import InputError


class PixelExtractor:
    """Twelve pixels as features, three as spatial features."""

    name = "pixels/12"
    metric = "fd_pixels"
    kernel_metric = "kd_pixels"
    resize = "none"
    dimensions = 12
    channels: tuple[int, ...] = (3,)

    def __init__(self, sha256: str = "0" * 64, spatial: bool = True) -> None:
        self.sha256, self.spatial = sha256, spatial

    def to(self, device: torch.device | str) -> Self:
        return self

    def extract(self, images: Tensor) -> Extracted:
        flat = images.flatten(1).float()
        return Extracted(flat[:, :12], spatial=flat[:, :3] if self.spatial else None)


def pictures(count: int = 50, seed: int = 0) -> Tensor:
    shape = (count, 3, 4, 4)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(a: Moments | None, b: Moments | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance) and a.samples == b.samples


def reference(spatial: bool = True) -> Reference:
    return compute_reference(PixelExtractor(spatial=spatial), pictures(), "fifty pictures")


def test_a_set_is_at_distance_zero_from_its_reference() -> None:
    found = reference()
    features = PixelExtractor().extract(pictures()).features
    assert abs(distance(features, found.moments).value) < 1e-6 * float(found.moments.covariance.trace())


@pytest.mark.parametrize("spatial", [True, False])
def test_what_is_saved_is_read(spatial: bool, tmp_path: Path) -> None:
    saved, extractor = reference(spatial), PixelExtractor(spatial=spatial)
    save_reference(saved, tmp_path / "r.npz")
    read = load_reference(tmp_path / "r.npz", extractor, "fifty pictures")
    assert same(read.moments, saved.moments)
    assert same(read.spatial, saved.spatial)
    assert (read.extractor, read.data, read.resize) == (saved.extractor, saved.data, saved.resize)
    assert [file.name for file in tmp_path.iterdir()] == ["r.npz"]


def test_it_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def images() -> Tensor:
        calls.append(1)
        return pictures()

    first = cached_reference(PixelExtractor(), "fifty pictures", images, tmp_path)
    assert same(cached_reference(PixelExtractor(), "fifty pictures", images, tmp_path).moments, first.moments)
    assert len(calls) == 1
    cached_reference(PixelExtractor(), "other pictures", images, tmp_path)
    cached_reference(PixelExtractor("1" * 64), "fifty pictures", images, tmp_path)
    assert len(calls) == 3
    assert all(file.name.startswith("pixels_12-") for file in tmp_path.iterdir())


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))
    cached_reference(PixelExtractor(), "fifty pictures", pictures)
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 1


def test_pytorch_fid_round_trip(tmp_path: Path) -> None:
    saved = reference()
    export_pytorch_fid(saved, tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as archive:
        assert set(archive) == {"mu", "sigma"}
    read = import_statistics(tmp_path / "p.npz", PixelExtractor(), 50, "somewhere else")
    assert same(read.moments, saved.moments)
    assert read.spatial is None
    assert frechet_distance(read.moments, saved.moments) == pytest.approx(0, abs=1e-6 * 1e5)


def test_the_cache_itself_is_in_pytorch_fids_format(tmp_path: Path) -> None:
    save_reference(reference(), tmp_path / "r.npz")
    assert same(import_statistics(tmp_path / "r.npz", PixelExtractor(), 50, "x").moments, reference().moments)


def test_adm_round_trip(tmp_path: Path) -> None:
    saved = reference()
    export_adm(saved, pictures(10), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert set(archive) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
        assert archive["arr_0"].shape == (10, 4, 4, 3)
    read = import_statistics(tmp_path / "a.npz", PixelExtractor(), 50, "adm")
    assert same(read.moments, saved.moments)
    assert same(read.spatial, saved.spatial)
    assert torch.equal(read_batch(tmp_path / "a.npz"), pictures(10))


def test_adm_needs_spatial_features(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.npz: ADM's format needs spatial features"):
        export_adm(reference(spatial=False), pictures(), tmp_path / "a.npz")


def test_another_extractor_is_refused(tmp_path: Path) -> None:
    save_reference(reference(), tmp_path / "r.npz")
    with pytest.raises(InputError, match=r"r\.npz: extractor_sha256 is 0000"):
        load_reference(tmp_path / "r.npz", PixelExtractor("1" * 64))
    with pytest.raises(InputError, match=r"r\.npz: reference of 'fifty pictures', expected 'others'"):
        load_reference(tmp_path / "r.npz", PixelExtractor(), "others")


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "undescribed", "objects", "text"])
def test_damaged_files_are_refused_by_one_line(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "r.npz"
    save_reference(reference(), file)
    content = dict(np.load(file))
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:700])
    elif damage == "changed":
        np.savez(file, **{**content, "mu": content["mu"] + 1})
    elif damage == "undescribed":
        np.savez(file, mu=content["mu"], sigma=content["sigma"])
    elif damage == "objects":
        np.savez(file, **{**content, "mu": np.array([object()])})
    else:
        file.write_text("no archive")
    with pytest.raises(InputError, match=r"r\.npz: ") as caught:
        load_reference(file, PixelExtractor())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(12)}, "no moments"),
        ({"mu": np.zeros(11), "sigma": np.eye(11)}, "11 dimensions, but pixels/12 has 12"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, "do not fit"),
        ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "not finite"),
        ({"mu": np.zeros(12), "sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
    ],
)
def test_foreign_statistics_are_checked(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(InputError, match=message):
        import_statistics(tmp_path / "f.npz", PixelExtractor(), 50, "x")


def test_a_reference_of_one_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two samples, got 1"):
        import_statistics(tmp_path / "f.npz", PixelExtractor(), 1, "x")


def test_a_batch_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(InputError, match=r"b\.npz: no images"):
        read_batch(tmp_path / "b.npz")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"r\.npz: cannot be written"):
        save_reference(reference(), tmp_path / "file" / "r.npz")


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("complete")

    def interrupted() -> None:
        with written_whole(file) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert file.read_text() == "complete"
    assert list(tmp_path.iterdir()) == [file]
