"""Training and validation parts of folders, natural order, and what a version tells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.image_folder import ImageFolder
from PIL import Image

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import DataError
from dinov3_framework.testing import DatasetSuite


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, value, value)).save(path)
    return path


def build(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(ImageFolderConfig(root=str(root), **options), channels=3)


def names(root: Path, split: str, **options: Any) -> set[str]:
    return set(build(root, split=split, **options).files)


def labels(dataset: ImageFolder) -> list[int | None]:
    return [dataset.label(index) for index in range(len(dataset))]


# --------------------------------------------------------------------------- subfolders
@pytest.mark.parametrize("folder", ["val", "valid", "validation", "test"])
def test_subfolders_are_the_splits_and_share_the_classes_of_train(
    tmp_path: Path, folder: str
) -> None:
    for name in ("ant", "bee", "cat"):
        save(tmp_path / "train" / name / "1.png")
    save(tmp_path / folder / "cat" / "2.png")
    train, val = build(tmp_path, split="train"), build(tmp_path, split="val")
    assert list(train.files) == ["ant/1.png", "bee/1.png", "cat/1.png"]
    assert list(val.files) == ["cat/2.png"]
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert labels(val) == [2] == [val[0].label]
    assert val.describe() == f"image_folder {tmp_path / folder}: 1 images, 3 classes"
    assert val.notes() == ["2 of 3 classes have no image here: ant, bee"]
    # Without a split the folders are what any others are, and a check says so.
    whole = build(tmp_path)
    assert whole.classes == tuple(sorted(["train", folder]))
    assert whole.notes() == [
        f'images of train and {folder} are taken together; split = "train" parts them'
    ]


def test_val_is_taken_before_test(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        save(tmp_path / part / "ant" / f"{part}.png")
    assert names(tmp_path, "val") == {"ant/val.png"}


def test_classes_that_train_lacks_are_named(tmp_path: Path) -> None:
    save(tmp_path / "train" / "ant" / "1.png")
    (tmp_path / "train" / "bee").mkdir()
    for name in ("ant", "bee", "cow"):
        save(tmp_path / "val" / name / "1.png")
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: bee, cow"):
        build(tmp_path, split="val")
    assert build(tmp_path, split="train").notes() == ["folders without images are no classes: bee"]
    val = build(tmp_path, split="val", classes=("bee", "ant"))
    assert labels(val) == [0, 1]


def test_chosen_classes_may_lack_a_folder_in_val(tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "val/ant"):
        save(tmp_path / name / "1.png")
    val = build(tmp_path, split="val", classes=("bee", "ant"))
    assert labels(val) == [1]
    with pytest.raises(DataError, match=r"no class folder .fly. in .*train"):
        build(tmp_path, split="val", classes=("fly",))


def test_val_has_labels_only_where_train_has(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "val" / "ant" / "1.png")
    val = build(tmp_path, split="val")
    assert val.n_classes is None
    assert "(1.png lies in no class folder)" in val.describe()
    with pytest.raises(DataError, match=r"train/1\.png lies in no class folder"):
        build(tmp_path, split="val", labels="folders")


# --------------------------------------------------------------------------- a seeded split
@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of 1, 2, 3, 10 and 40 images."""
    root = tmp_path_factory.mktemp("images")
    for count in (1, 2, 3, 10, 40):
        for index in range(count):
            save(root / f"of{count:02}" / f"{index}.png")
    return root


def per_class(found: set[str]) -> dict[str, int]:
    folders = [name.partition("/")[0] for name in sorted(found)]
    return {folder: folders.count(folder) for folder in folders}


def test_a_seeded_split_takes_its_share_of_every_class(folders: Path) -> None:
    train, val = names(folders, "train"), names(folders, "val")
    assert train.isdisjoint(val)
    assert train | val == set(build(folders).files)
    assert per_class(val) == {"of02": 1, "of03": 1, "of10": 2, "of40": 8}
    assert per_class(train) == {"of01": 1, "of02": 1, "of03": 2, "of10": 8, "of40": 32}
    datasets = [build(folders, split=split) for split in ("train", "val")]
    assert datasets[0].classes == datasets[1].classes == build(folders).classes
    assert sorted(datasets[1].files) == list(datasets[1].files)
    assert labels(datasets[1])[:2] == [1, 2]
    assert datasets[1].describe() == (
        f"image_folder {folders}: 12 images, 5 classes; val of a seeded split, 0.2 of each class "
        "for val (seed 0)"
    )
    assert datasets[0].digest() != datasets[1].digest()


def test_seed_and_fraction_decide(folders: Path) -> None:
    assert names(folders, "val") == names(folders, "val")
    assert names(folders, "val") != names(folders, "val", split_seed=1)
    half = names(folders, "val", val_fraction=0.5)
    assert per_class(half)["of40"] == 20
    assert names(folders, "val") < half  # the same ranks, cut elsewhere
    most = names(folders, "val", val_fraction=0.99)
    assert per_class(most) == {"of02": 1, "of03": 2, "of10": 9, "of40": 39}


def test_without_labels_all_files_are_one_group(tmp_path: Path) -> None:
    for index in range(10):
        save(tmp_path / f"{index}.png")
    assert len(build(tmp_path, split="val")) == 2
    assert "0.2 of all for val" in build(tmp_path, split="train").describe()
    for path in list(tmp_path.iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="1 images cannot be split"):
        build(tmp_path, split="val")


def test_a_new_file_moves_at_most_one_other(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / "a" / f"{index}.png")
    before = names(tmp_path, "val")
    for index in range(5):
        save(tmp_path / "a" / f"new{index}.png")
        after = names(tmp_path, "val")
        assert len(before - after) <= 1
        assert len(after - before - {f"a/new{index}.png"}) <= 1
        before = after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "between 0 and 1"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"split_seed": -1}, "negative"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        ImageFolderConfig(root="images", **options)


# --------------------------------------------------------------------------- order, version
def test_numbers_count_as_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "100", "0", "09", "9a"):
        save(tmp_path / name / "b2.png")
        save(tmp_path / name / "b10.png")
    assert build(tmp_path).classes == ("0", "09", "10", "100", "9", "9a")
    dataset = build(tmp_path, sort="number")
    assert dataset.classes == ("0", "09", "9", "9a", "10", "100")
    assert list(dataset.files)[:3] == ["0/b2.png", "0/b10.png", "09/b2.png"]


def test_a_version_notices_changed_files_and_options(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    seen = {build(tmp_path).version()}
    assert build(tmp_path).version() in seen
    digest = build(tmp_path).digest()
    os.utime(path, ns=(1, 1))
    changed = build(tmp_path)
    assert changed.digest() == digest
    seen.add(changed.version())
    seen.add(build(tmp_path, bits=12).version())
    seen.add(build(tmp_path, background=(0, 0, 0)).version())
    seen.add(build(tmp_path, classes=("b", "a")).version())
    assert len(seen) == 5
    (tmp_path / "a" / "2.png").symlink_to("nowhere")
    assert build(tmp_path).version() not in seen


class TestSplitSuite(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _images(self, folders: Path) -> None:
        self.config = ImageFolderConfig(root=str(folders), split="val")
