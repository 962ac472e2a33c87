"""Folders of pictures: what is found, how it is split, what a network sees, what bad input says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import ImageFolder
from lightning_prune.data.augment import Draw, ImageTransform
from lightning_prune.data.pictures import DecodedImages, stratified
from lightning_prune.pixels import to_uint8
from lightning_prune.protocols import InputError
from tests.data.pictures import damage, write_pictures


def folder(root: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"size": 8, "batch_size": 4, "seed": 0, "kept": 0.25, **arguments})


def test_class_folders_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = folder(tmp_path)
    assert data.num_classes == 3
    pictures, _ = data.found
    assert all(pictures.name(i).split("class-")[1][0] == str(int(pictures.labels[i])) for i in range(len(pictures)))


def test_folders_are_ignored_where_labels_are_not_wanted(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = folder(tmp_path, labels="none")
    assert data.num_classes == 0
    assert set(data.split("train").labels.tolist()) == {0}


def test_sorting_pictures_into_classes_moves_none(tmp_path: Path) -> None:
    """The order is that of the file names, so the same seed draws the same pictures."""
    write_pictures(tmp_path / "flat", classes=0)
    write_pictures(tmp_path / "sorted", classes=3)
    flat, sorted_ = folder(tmp_path / "flat").found[0], folder(tmp_path / "sorted").found[0]
    assert [Path(flat.name(i)).name for i in range(24)] == [Path(sorted_.name(i)).name for i in range(24)]


def test_class_names_may_be_given(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = folder(tmp_path, classes=["class-2", "nobody", "class-1", "class-0"])
    assert data.num_classes == 4
    assert set(data.split("train").labels.tolist()) == {0, 2, 3}
    with pytest.raises(InputError, match=r"class-0.*data\.classes"):
        _ = folder(tmp_path, classes=["class-1", "class-2"]).num_classes


def test_splits_share_nothing_and_keep_the_proportions_of_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = folder(tmp_path, reference="evaluation")
    positions = [set(data.read(split).positions.tolist()) for split in ("train", "reference", "held_out")]
    assert [len(p) for p in positions] == [18, 5, 1]
    assert len(set.union(*positions)) == 24
    assert torch.bincount(data.split("train").labels).tolist() == [6, 6, 6]


def test_the_reference_is_the_training_set_by_convention(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = folder(tmp_path)
    assert set(data.read("reference").positions.tolist()) == set(data.read("train").positions.tolist())
    assert len(data.split("held_out")) == 6
    assert data.split("reference").images[:3].shape == (3, 3, 8, 8)
    assert data.split("reference").images[:None].dtype == torch.uint8


def test_an_evaluation_folder_leaves_all_others_to_training(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "test", count=6)
    data = folder(tmp_path / "train", evaluation_root=str(tmp_path / "test"))
    assert (len(data.split("train")), len(data.split("held_out"))) == (24, 6)
    with pytest.raises(InputError, match="share pictures"):
        _ = folder(tmp_path, evaluation_root=str(tmp_path / "test")).found


def test_every_beginning_of_a_stratified_order_is_balanced() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified(labels, [str(i) for i in range(100)])
    assert sorted(order.tolist()) == list(range(100))
    for count in (10, 20, 50):
        counts = torch.bincount(labels[order[:count]], minlength=3) / count
        assert torch.allclose(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.11)


def test_a_picture_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    (file, *_) = write_pictures(tmp_path, size=(8, 8))
    pictures, _ = folder(tmp_path).found
    (index,) = [i for i in range(len(pictures)) if pictures.name(i) == str(file)]
    sample = DecodedImages(pictures, torch.tensor([index]), ImageTransform(8))[0]
    expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
    assert torch.equal(to_uint8(sample["x"]), expected)
    assert sample["x"].min() >= -1
    assert sample["x"].max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_mode_have_one_shape(mode: str, channels: int) -> None:
    picture = Image.new("RGB", (20, 11), (200, 200, 200)).convert(mode)
    pixels = ImageTransform(8, channels)(picture)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == torch.uint8


def test_a_box_is_cut_out_first() -> None:
    rows, columns = np.mgrid[0:20, 0:30].astype(np.uint8)
    picture = Image.fromarray(10 * (rows // 4) + columns // 4)
    whole = picture.crop((8, 4, 24, 12))
    for draw in (None, Draw(True, 0.9, 0.9)):
        found = ImageTransform(8, 1, "random", flip=True, cut=(8, 4, 24, 12))(picture, draw)
        assert torch.equal(found, ImageTransform(8, 1, "random", flip=True)(whole, draw))
    with pytest.raises(ValueError, match=r"20 x 10 pixels do not hold"):
        ImageTransform(8, cut=(0, 0, 8, 11))(Image.new("RGB", (20, 10)))
    with pytest.raises(InputError, match=r"data.cut: \[4, 0, 4, 8\]"):
        ImageTransform(8, cut=(4, 0, 4, 8))


def test_transparent_pictures_lie_on_white() -> None:
    assert ImageTransform(4)(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).unique().tolist() == [255]


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    train = folder(tmp_path, crop="random", flip=True).split("train")
    everything = list(range(len(train)))

    def pixels(seed: int, epoch: int, indices: list[int]) -> torch.Tensor:
        return torch.stack([s["x"] for s in train.at_epoch(seed, epoch).__getitems__(indices)])

    assert torch.equal(pixels(0, 0, everything), pixels(0, 0, everything))
    assert torch.equal(pixels(0, 0, everything)[3:5], pixels(0, 0, [3, 4])), "not of what is read beside it"
    assert not torch.equal(pixels(0, 0, everything), pixels(0, 1, everything))
    assert not torch.equal(pixels(0, 0, everything), pixels(1, 0, everything))


def test_mirroring_takes_half_and_crops_reach_both_ends() -> None:
    draws = [Draw.of(0, 0, index) for index in range(400)]
    assert 160 < sum(draw.mirrored for draw in draws) < 240
    wide = Image.fromarray(np.tile(np.arange(11, dtype=np.uint8), (8, 1)))
    left = {int(ImageTransform(8, 1, "random")(wide, draw)[0, 0, 0]) for draw in draws}
    assert left == {0, 1, 2, 3}
    plain, mirrored = (ImageTransform(8, 1, flip=True)(wide, Draw(m, 0, 0)) for m in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))


def test_evaluation_sees_neither_crops_nor_mirrors(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    plain, augmented = folder(tmp_path), folder(tmp_path, crop="random", flip=True)
    first, second = (torch.cat([b["x"] for b in data.val_dataloader()]) for data in (plain, augmented))
    assert torch.equal(first, second)
    first, second = (torch.cat([b["x"] for b in data.calibration_batches(3, seed=5)]) for data in (plain, augmented))
    assert torch.equal(first, second)


def batches(data: ImageFolder, count: int, consumed: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.load_state_dict({"consumed": consumed, "batch_size": data.batch_size, "world": 1})
    found: list[dict[str, Any]] = []
    while len(found) < count:
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize(("workers", "kind"), [(2, "threads"), (1, "processes")])
def test_workers_read_what_one_thread_reads_and_resume_where_it_would(workers: int, kind: Any, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    whole = batches(folder(tmp_path, flip=True, crop="random"), 10)
    assert not torch.equal(whole[0]["id"], whole[4]["id"]), "two epochs"
    read = batches(folder(tmp_path, flip=True, crop="random", workers=workers, worker_kind=kind), 10)
    resumed = batches(folder(tmp_path, flip=True, crop="random", workers=workers, worker_kind=kind), 7, consumed=3)
    for batch, expected in zip([*read, *resumed], [*whole, *whole[3:]], strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in ("x", "cond", "id"))


def test_what_was_read_ahead_is_not_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    loader = folder(tmp_path, workers=2).train_dataloader()
    handed_out = [batch for batch, _ in zip(loader, range(2), strict=False)]
    assert len(handed_out) == 2
    assert loader.state_dict()["consumed"] == 3, "zip takes one more"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_damaged_picture_stops_by_its_name(kind: Any, tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "test", count=3)
    damage(files[7])
    data = folder(tmp_path / "train", evaluation_root=str(tmp_path / "test"), workers=1, worker_kind=kind)
    with pytest.raises(InputError) as stopped:
        batches(data, 6)
    assert str(stopped.value).startswith(f"{files[7]}: damaged picture")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_damaged_picture_can_be_skipped_and_is_counted_once(kind: Any, tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "test", count=3)
    damage(files[7])
    files[3].write_bytes(b"")
    evaluation = str(tmp_path / "test")
    data = folder(tmp_path / "train", evaluation_root=evaluation, on_damage="skip", workers=1, worker_kind=kind)
    read = batches(data, 10)
    assert set(data.damaged) == {str(files[3]), str(files[7])}
    assert {len(batch["x"]) for batch in read} == {4}
    assert "damaged" not in read[0]
    assert len(data.split("reference").images[:None]) == 22, "nothing stands in where pictures are compared"


def test_nothing_but_damaged_pictures(tmp_path: Path) -> None:
    for file in write_pictures(tmp_path):
        damage(file)
    with pytest.raises(InputError, match="every other picture"):
        batches(folder(tmp_path, on_damage="skip"), 1)


def test_pictures_can_be_verified_beforehand(tmp_path: Path) -> None:
    files = write_pictures(tmp_path)
    damage(files[20])
    with pytest.raises(InputError, match="0020"):
        folder(tmp_path, verify=True).prepare_data()
    data = folder(tmp_path, verify=True, on_damage="skip", workers=2)
    data.prepare_data()
    assert set(data.damaged) == {str(files[20])}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 0}, "data.size"),
        ({"channels": 2}, "data.channels"),
        ({"kept": 1.0}, "data.kept"),
        ({"kept": 0.001}, "data.kept"),
        ({"evaluation_root": "/no/such"}, "/no/such"),
        ({"captions": "captions.xml"}, "captions.xml"),
        ({"captions": "captions.csv"}, "captions.csv: no such file"),
        ({"batch_size": 100}, "data.batch_size"),
    ],
)
def test_the_line_names_what_is_wrong(arguments: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with pytest.raises(InputError) as refused:
        folder(tmp_path, **arguments).train_dataloader()
    assert named in str(refused.value)


def test_a_folder_without_pictures_and_pictures_beside_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        _ = folder(tmp_path).found
    with pytest.raises(InputError, match="no such folder"):
        _ = folder(tmp_path / "nothing").found
    write_pictures(tmp_path)
    write_pictures(tmp_path, count=1, classes=0)
    with pytest.raises(InputError, match="beside the class folders"):
        _ = folder(tmp_path).found
    assert folder(tmp_path, labels="none").num_classes == 0
