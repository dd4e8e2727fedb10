"""ImageNet-1k: its index is the published one, what is read, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_datasets import imagenet_1k, imagenet_table
from dinov3_datasets.imagenet_1k import Imagenet1k
from dinov3_datasets.imagenet_configs import Imagenet1kConfig
from imagenet_support import IDS, NAMES, TRAIN, published_index, write_tree
from tiny_backbone import Tiny, TinyConfig

from dinov3_framework import extract_features
from dinov3_framework.configs import ImagesConfig, InvalidOption
from dinov3_framework.data.inference import InferenceLoader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("published"))
    for split in ("train", "val", "test"):
        published_index(root, root / "extra", split)
    return root


@pytest.fixture
def tree(published: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    shutil.copytree(published, tmp_path / "imagenet")
    return tmp_path / "imagenet"


def settings(root: Path, **options: Any) -> Imagenet1kConfig:
    return Imagenet1kConfig(root=str(root), **options)


def build(root: Path, **options: Any) -> Imagenet1k:
    return Imagenet1k(settings(root, **options), channels=3)


def names(dataset: Imagenet1k) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


class TestContract(DatasetSuite):
    @pytest.fixture(
        autouse=True,
        params=[
            {},
            {"split": "val"},
            {"split": "val", "scan": True},
            {"split": "val", "real": "real.json", "classes": "names"},
            {"split": "test"},
        ],
        ids=str,
    )
    def _config(self, request: pytest.FixtureRequest, published: Path, tmp_path: Path) -> None:
        options = dict(request.param)
        if "real" in options:
            options["real"] = real(tmp_path, [[1], [], [0, 1]] * 4)
        self.config = settings(published, **options)


# --------------------------------------------------------------------------- the index
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_index_is_the_published_one_byte_by_byte(
    published: Path, tmp_path: Path, split: Any
) -> None:
    expected = published_index(published, tmp_path / "theirs", split)
    config = settings(published, split=split, extra=str(tmp_path / "ours"))
    calls: list[tuple[int, int]] = []
    paths = Imagenet1k.write_index(config, lambda *done: calls.append(done))
    assert {path.name: path.read_bytes() for path in paths} == expected
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(expected)
    assert calls[-1] == ((1, 1) if split == "test" else (3, 3))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_index_gives_what_listing_gives(published: Path, split: Any) -> None:
    by_index, by_listing = build(published, split=split), build(published, split=split, scan=True)
    assert names(by_index) == names(by_listing)
    assert by_index.digest() == by_listing.digest()
    assert by_index.targets == by_listing.targets
    assert by_index.describe() == by_listing.describe()


def test_what_is_read(published: Path) -> None:
    dataset = build(published)
    assert names(dataset)[:4] == [
        f"train/n01440764/n01440764_{number}.JPEG" for number in (10, 100, 2, 9)
    ]
    assert [dataset.label(index) for index in range(len(dataset))] == [0, 0, 0, 0, 1, 2, 2]
    for index in range(len(dataset)):
        sample, number = dataset[index], int(names(dataset)[index].split("_")[-1].split(".")[0])
        assert sample.label == dataset.label(index)
        assert abs(int(sample.image[0, 0, 0]) - number) <= 2
    assert dataset.classes == IDS
    assert build(published, classes="names").classes == NAMES
    assert dataset[-1].label == 2
    with pytest.raises(IndexError):
        dataset[7]
    assert dataset.describe() == f"imagenet_1k {published}, train: 7 images, 3 classes"
    assert list(dataset.notes()) == ["7 images; the whole split has 1,281,167"]


def test_images_of_test_have_no_label(published: Path) -> None:
    dataset = build(published, split="test")
    assert names(dataset) == [f"test/ILSVRC2012_test_{number:08}.JPEG" for number in (1, 2)]
    assert dataset.n_classes is None
    assert dataset.label(0) is dataset[0].label is None


def test_workers_read_it(published: Path) -> None:
    dataset = build(published, split="val")
    loader: InferenceLoader[Any, Any] = InferenceLoader(
        dataset,
        lambda sample, index: (index, sample.label),
        [[0, 1], [2, 3]],
        collate=list,
        workers=2,
    )
    found = [item for batch in loader for item in batch.data]
    assert found == [(0, 0), (1, 0), (2, 1), (3, 2)]


def test_without_an_index_small_folders_are_listed_and_large_ones_are_not(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tree / "extra")
    assert len(build(tree)) == 7
    monkeypatch.setattr(imagenet_1k, "COUNTED", 6)
    with pytest.raises(DataError) as error:
        build(tree)
    command = f"dinov3-run index dataset.use=imagenet_1k dataset.root={tree} dataset.split=train"
    assert command in str(error.value)
    assert len(build(tree, scan=True)) == 7


def test_a_missing_labels_file_is_needed_for_names_alone(tree: Path) -> None:
    (tree / "labels.txt").unlink()
    assert build(tree, scan=True, classes="names").classes == IDS
    assert build(tree, classes="names").classes == NAMES
    with pytest.raises(DataError, match=r"labels\.txt is missing"):
        Imagenet1k.write_index(settings(tree))


# --------------------------------------------------------------------------- ReaL
def real(folder: Path, labels: Any) -> str:
    path = folder / "real.json"
    path.write_text(json.dumps(labels))
    return str(path)


def test_real_labels_go_by_the_numbers_of_the_images(published: Path, tmp_path: Path) -> None:
    labels = [[] for _ in range(12)]
    labels[0], labels[2], labels[11] = [1], [0, 2], [2]  # of the images 1, 3 and 12
    dataset = build(published, split="val", real=real(tmp_path, labels))
    assert [name[-6:-5] for name in names(dataset)] == ["3", "2", "1"]
    samples = [dataset[index] for index in range(3)]
    assert [sample.targets["labels"].tolist() for sample in samples] == [[0, 2], [2], [1]]
    assert [sample.label for sample in samples] == [0, 0, 1]
    assert dataset.targets["labels"].classes == IDS
    assert "left out: 1 images that ReaL has no label for" in dataset.notes()
    labels[11] = [1]
    other = build(published, split="val", real=real(tmp_path, labels))
    assert other.digest() != dataset.digest()


def test_features_have_all_labels_that_are_right(published: Path, tmp_path: Path) -> None:
    labels = [[0, 2], [], [1]] * 4
    dataset = build(published, split="val", real=real(tmp_path, labels))
    backbone = Tiny(TinyConfig())
    backbone.init_weights()
    features = extract_features(backbone, dataset, images=ImagesConfig(), size=4)
    assert features.labels is not None
    # The images 3, 12 and 1: number 2 has no label.
    assert features.labels.int().tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[0]] * 11, "1 to 12"),
        ([[0]] * 11 + [[3]], "labels out of range: 3"),
        ([[0]] * 11 + [["0"]], "list of lists"),
        ({"a": 1}, "list of lists"),
        ([[]] * 12, "no label for any"),
    ],
)
def test_wrong_real_labels(published: Path, tmp_path: Path, labels: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        build(published, split="val", real=real(tmp_path, labels))


def test_real_labels_are_for_val() -> None:
    with pytest.raises(InvalidOption, match='split = "val"'):
        Imagenet1kConfig(root="x", real="real.json")


# --------------------------------------------------------------------------- what is refused
def change(tree: Path, name: str, function: Callable[[np.ndarray], Any]) -> None:
    path = tree / "extra" / f"{name}-TRAIN.npy"
    array = np.load(path)
    changed = function(array)
    np.save(path, array if changed is None else changed)


def out_of_range(tree: Path) -> None:
    change(tree, "entries", lambda array: array["class_index"].__setitem__(0, 3))


def other_ids(tree: Path) -> None:
    change(tree, "class-ids", lambda array: array[[1, 0, 2]])


def fewer_names(tree: Path) -> None:
    change(tree, "class-names", lambda array: array[:2])


def empty_class(tree: Path) -> None:
    change(tree, "entries", lambda array: array[array["class_index"] != 1])


def a_path_as_id(tree: Path) -> None:
    change(tree, "class-ids", lambda array: np.array(["../../etc", *array[1:]]))


def no_id(tree: Path) -> None:
    change(tree, "class-ids", lambda array: np.array(["", *array[1:]]))


def nothing(tree: Path) -> None:
    change(tree, "entries", lambda array: array[:0])


def other_fields(tree: Path) -> None:
    change(tree, "entries", lambda array: array["class_index"])


def objects(tree: Path) -> None:
    np.save(tree / "extra" / "class-ids-TRAIN.npy", np.array([{}, 1], dtype=object))


def cut(tree: Path) -> None:
    path = tree / "extra" / "entries-TRAIN.npy"
    path.write_bytes(path.read_bytes()[:-9])


def no_array(tree: Path) -> None:
    (tree / "extra" / "entries-TRAIN.npy").write_text("entries")


def missing(tree: Path) -> None:
    (tree / "extra" / "class-names-TRAIN.npy").unlink()


def image_gone(tree: Path) -> None:
    (tree / "train" / IDS[0] / f"{IDS[0]}_9.JPEG").unlink()


def image_more(tree: Path) -> None:
    (tree / "train" / IDS[0] / f"{IDS[0]}_11.JPEG").touch()


def class_gone(tree: Path) -> None:
    shutil.rmtree(tree / "train" / IDS[1])


def class_more(tree: Path) -> None:
    shutil.copytree(tree / "train" / IDS[0], tree / "train" / "n00000001")
    for path in (tree / "train" / "n00000001").iterdir():
        path.rename(path.with_name(path.name.replace(IDS[0], "n00000001")))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (out_of_range, "labels out of range: 3 where there are 3"),
        (other_ids, "other ids than class-ids-TRAIN.npy"),
        (fewer_names, "has 3 classes, class-names-TRAIN.npy 2"),
        (empty_class, "1 classes have no image: n01443537"),
        (a_path_as_id, "no usable id"),
        (no_id, "no usable id"),
        (nothing, "names no image"),
        (other_fields, "not a table of actual_index"),
        (objects, "no array of NumPy"),
        (cut, "no array of NumPy"),
        (no_array, "no array of NumPy"),
        (missing, "class-names-TRAIN.npy is missing"),
        (image_gone, "holds 6 images, its index 7; 1 of those are not there"),
        (image_more, "holds 8 images, its index 7"),
        (class_gone, "lacks the folders of 1 of 3 classes of its index: n01443537"),
        (class_more, "1 class folders that its index does not know: n00000001"),
    ],
)
def test_an_index_that_is_wrong_is_refused_with_the_command_that_writes_it(
    tree: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(tree)
    with pytest.raises(DataError) as error:
        build(tree)
    assert words in str(error.value)
    command = f"dinov3-run index dataset.use=imagenet_1k dataset.root={tree} dataset.split=train"
    assert f"{command} replace=true" in str(error.value)


def test_a_subset_keeps_the_labels_of_the_index(tree: Path) -> None:
    class_gone(tree)
    image_gone(tree)
    dataset = build(tree, subset=True)
    assert len(dataset) == 5
    assert [dataset[index].label for index in range(5)] == [0, 0, 0, 2, 2]
    assert dataset.classes == IDS
    assert "left out: 2 of 7 images of the index, not here" in dataset.notes()


def test_of_many_images_only_the_folders_are_compared(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet_table, "COUNTED", 6)
    image_gone(tree)
    dataset = build(tree)
    gone = names(dataset).index("train/n01440764/n01440764_9.JPEG")
    with pytest.raises(CorruptSampleError, match=r"n01440764_9\.JPEG: .*No such file"):
        dataset[gone]
    class_gone(tree)
    with pytest.raises(DataError, match="lacks the folders of 1"):
        build(tree)


@pytest.mark.parametrize("name", ["n01440764_07.JPEG", "cat.jpg", "n01440764_7.jpeg"])
def test_images_with_other_names_are_refused(tree: Path, name: str) -> None:
    (tree / "train" / IDS[0] / name).touch()
    with pytest.raises(DataError, match="is not named as ImageNet's"):
        Imagenet1k.write_index(settings(tree))


def test_other_files_are_passed_over(tree: Path) -> None:
    for name in (".DS_Store", "Thumbs.db"):
        (tree / "train" / IDS[0] / name).touch()
    (tree / "train" / "readme.txt").touch()
    dataset = build(tree, scan=True)
    assert len(dataset) == sum(map(len, TRAIN.values()))
    assert "1 other files passed over" in dataset.notes()


def test_empty_class_folders_are_refused(tree: Path) -> None:
    (tree / "train" / "n00000001").mkdir()
    with pytest.raises(DataError, match="1 class folders have no image: n00000001"):
        Imagenet1k.write_index(settings(tree))


def test_val_images_outside_class_folders(tree: Path) -> None:
    for path in sorted((tree / "val").glob("*/*")):
        path.rename(tree / "val" / path.name)
    for folder in sorted((tree / "val").glob("n*")):
        folder.rmdir()
    with pytest.raises(DataError, match=r"no class folders .* 4 images lie in it"):
        build(tree, split="val", scan=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [("n01440764", "line 1"), ("n01440764,a\nn01440764,b", "line 2"), ("n1,a", "does not name")],
)
def test_wrong_labels_files(tree: Path, text: str, words: str) -> None:
    (tree / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        Imagenet1k.write_index(settings(tree))


def test_folders_that_are_missing(tree: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build(tree / "nowhere")
    shutil.rmtree(tree / "train")
    for options in ({}, {"scan": True}, {"subset": True}):
        with pytest.raises(DataError, match="root is the folder above it"):
            build(tree, **options)


def test_the_version_changes_with_the_files_and_the_digest_with_the_names(tree: Path) -> None:
    dataset = build(tree, split="val")
    before = dataset.digest(), dataset.version()
    path = tree / dataset.name(0)
    os.utime(path, ns=(1, 1))
    assert (dataset.digest(), dataset.version()) != before
    assert dataset.digest() == before[0]
    assert build(tree, split="val", max_pixels=29).version() != dataset.version()
    elsewhere = tree.rename(tree.with_name("moved"))
    assert build(elsewhere, split="val").digest() == before[0]
