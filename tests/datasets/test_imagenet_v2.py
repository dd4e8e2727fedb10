"""ImageNet-V2: folders are numbers, classes are those of ImageNet-1k."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_datasets.imagenet_1k import Imagenet1k
from dinov3_datasets.imagenet_configs import Imagenet1kConfig, ImagenetV2Config
from dinov3_datasets.imagenet_v2 import ImagenetV2
from imagenet_support import IDS, NAMES, jpeg, write_labels, write_tree

from dinov3_framework.errors import DataError
from dinov3_framework.testing import DatasetSuite

MANY = [f"n{number:08}" for number in range(12)]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Twelve classes, in no order."""
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{each},name {each}\n" for each in reversed(MANY)))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label in range(12):
        folder = tmp_path / "v2" / str(label)
        folder.mkdir(parents=True)
        (folder / f"{7 * label:x}.jpeg").write_bytes(jpeg(10 * label))
    return tmp_path / "v2"


def build(root: Path, imagenet: Path, **options: Any) -> ImagenetV2:
    config = ImagenetV2Config(root=str(root), imagenet=str(imagenet), **options)
    return ImagenetV2(config, channels=3)


class TestContract(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _config(self, root: Path, classes: Path) -> None:
        self.config = ImagenetV2Config(root=str(root), imagenet=str(classes))


def test_folders_are_labels_and_sort_as_numbers(root: Path, classes: Path) -> None:
    dataset = build(root, classes)
    assert [dataset.label(index) for index in range(12)] == list(range(12))
    assert dataset.name(10) == "10/46.jpeg"
    for index in range(12):
        sample = dataset[index]
        assert sample.label == index
        assert abs(int(sample.image[0, 0, 0]) - 10 * index) <= 2
    assert dataset.classes == tuple(MANY)
    assert build(root, classes, classes="names").classes[0] == "name n00000000"


@pytest.mark.parametrize("indexed", [False, True])
def test_classes_are_those_of_imagenet_1k(root: Path, tmp_path: Path, indexed: bool) -> None:
    imagenet = write_tree(tmp_path / "imagenet")
    config = Imagenet1kConfig(root=str(imagenet))
    if indexed:
        Imagenet1k.write_index(config)
        (imagenet / "labels.txt").unlink()
    for label in range(3, 12):
        (root / str(label) / f"{7 * label:x}.jpeg").unlink()
        (root / str(label)).rmdir()
    assert build(root, imagenet).targets == Imagenet1k(config, channels=3).targets
    assert build(root, imagenet, classes="names").classes == NAMES


def test_folders_that_are_no_label(root: Path, tmp_path: Path) -> None:
    write_labels(tmp_path)  # of three classes alone
    with pytest.raises(DataError, match=r"no label of 0 to 2: 10, 11, 3, 4 and 5 more"):
        build(root, tmp_path)


def test_an_empty_class(root: Path, classes: Path) -> None:
    (root / "4" / "1c.jpeg").unlink()
    with pytest.raises(DataError, match="no image for 1 of 12 classes: 4"):
        build(root, classes)
    dataset = build(root, classes, subset=True)
    assert [dataset.label(index) for index in range(11)] == [*range(4), *range(5, 12)]
    assert "1 classes have no image: 4" in dataset.notes()


def test_without_a_list_of_classes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither class-ids-TRAIN\.npy nor labels\.txt"):
        build(root, tmp_path / "nowhere")
    np.save(tmp_path / "class-ids-VAL.npy", np.array(IDS))
    with pytest.raises(DataError, match=r"class-names-VAL\.npy is missing"):
        build(root, tmp_path)


def test_the_version_changes_with_the_files(root: Path, classes: Path) -> None:
    dataset = build(root, classes)
    before = dataset.digest(), dataset.version()
    os.utime(root / "0" / "0.jpeg", ns=(1, 1))
    assert dataset.digest() == before[0]
    assert dataset.version() != before[1]
