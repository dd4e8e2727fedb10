"""ADE20K, Cityscapes and PASCAL VOC: their layouts, classes and what their ids become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_datasets.class_names import packaged_classes
from dinov3_datasets.mask_configs import Ade20kConfig, CityscapesConfig, PascalVocConfig
from dinov3_datasets.published_masks import open_ade20k, open_cityscapes, open_pascal_voc
from mask_trees import ids, write_ade20k, write_image, write_mask

from dinov3_framework import DataError, Dataset
from dinov3_framework.data.palettes import palette
from dinov3_framework.errors import WrongTargetError
from dinov3_framework.testing import DatasetSuite

CITY = "zurich/zurich_000001_000019"


def ade20k(root: Path, **options: Any) -> Dataset:
    return open_ade20k(Ade20kConfig(root=str(root), **options), channels=3)


def write_cityscapes(root: Path) -> Path:
    for split in ("train", "val"):
        write_image(root / f"leftImg8bit/{split}/{CITY}_leftImg8bit.png")
        write_mask(root / f"gtFine/{split}/{CITY}_gtFine_labelIds.png", ids(*range(34)))
        write_mask(root / f"gtFine/{split}/{CITY}_gtFine_instanceIds.png", ids(0))
    return root


def cityscapes(root: Path, **options: Any) -> Dataset:
    return open_cityscapes(CityscapesConfig(root=str(root), **options), channels=3)


def write_voc(root: Path) -> Path:
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        write_image(root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"SegmentationClass/{name}.png", ids(0, 20, 255), with_palette=True)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000063\n")
    return root


def voc(root: Path, **options: Any) -> Dataset:
    return open_pascal_voc(PascalVocConfig(root=str(root), **options), channels=3)


class TestAde20k(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        self.config = Ade20kConfig(root=str(write_ade20k(tmp_path)))


class TestCityscapes(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        self.config = CityscapesConfig(root=str(write_cityscapes(tmp_path)))


class TestPascalVoc(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        self.config = PascalVocConfig(root=str(write_voc(tmp_path)))


# --------------------------------------------------------------------------- ADE20K
def test_ade20k_ids_shift_by_one(tmp_path: Path) -> None:
    dataset = ade20k(write_ade20k(tmp_path))
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "images/training/ADE_train_1.jpg",
        "images/training/ADE_train_2.jpg",
    ]
    assert dataset[1].targets["mask"][0, :4].tolist() == [255, 0, 149, 1]
    target = dataset.targets["mask"]
    assert (target.count, target.ignore_index) == (150, 255)
    assert target.classes is not None
    assert target.classes[0] == "wall"
    assert target.classes[149] == "flag"
    assert len(ade20k(tmp_path, split="val")) == 1


def test_ade20k_with_all_its_ids(tmp_path: Path) -> None:
    dataset = ade20k(write_ade20k(tmp_path), reduce_zero_label=False)
    assert dataset[1].targets["mask"][0, :4].tolist() == [0, 1, 150, 2]
    assert dataset.targets["mask"].count == 151
    assert dataset.version() != ade20k(tmp_path).version()


def test_ade20k_as_the_reference_lists_it(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    listed = tmp_path / "ADE20K_object150_train.txt"
    listed.write_text("training/ADE_train_2.jpg\n")
    dataset = ade20k(tmp_path)
    assert [dataset.name(i) for i in range(len(dataset))] == ["images/training/ADE_train_2.jpg"]
    listed.write_text("training/ADE_train_2.jpg\ntraining/gone.jpg\n")
    with pytest.raises(DataError, match=r"1 of 2 images are missing in .*: images/training/gone"):
        ade20k(tmp_path)


def test_ade20k_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder images/training; it is empty"):
        ade20k(tmp_path)
    write_ade20k(tmp_path)
    (tmp_path / "annotations/training/ADE_train_1.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 2 masks are missing in .*: annotations/training/ADE"
    ):
        ade20k(tmp_path)
    write_mask(tmp_path / "annotations/training/ADE_train_1.png", ids(151))
    with pytest.raises(
        WrongTargetError, match=r"holds id 151 .*; ids are 1\.\.150 for 150 classes"
    ):
        ade20k(tmp_path)[0]


# --------------------------------------------------------------------------- Cityscapes
def test_cityscapes_scores_19_of_its_ids(tmp_path: Path) -> None:
    """Label ids and train ids as its scripts pair them."""
    dataset = cityscapes(write_cityscapes(tmp_path))
    found = dataset[0].targets["mask"].flatten()[:34].tolist()
    void = 255
    assert found == [
        *[void] * 7, 0, 1, void, void, 2, 3, 4, void, void, void, 5, void, 6, 7, 8, 9, 10, 11, 12,
        13, 14, 15, void, void, 16, 17, 18,
    ]  # fmt: skip
    assert dataset.name(0) == f"leftImg8bit/train/{CITY}_leftImg8bit.png"
    trained = np.array(found + [255] * 14, dtype=np.uint8).reshape(6, 8)
    write_mask(tmp_path / f"gtFine/train/{CITY}_gtFine_labelTrainIds.png", trained)
    again = cityscapes(tmp_path)
    assert again[0].targets["mask"].flatten()[:34].tolist() == found
    assert again.digest() != dataset.digest()
    assert cityscapes(tmp_path, masks="label_ids").digest() == dataset.digest()
    with pytest.raises(DataError, match="1 of 1 masks are missing"):
        cityscapes(tmp_path, split="val", masks="train_ids")


def test_cityscapes_ids_that_are_none(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    write_mask(tmp_path / f"gtFine/val/{CITY}_gtFine_labelIds.png", ids(34))
    with pytest.raises(WrongTargetError, match=r"holds id 34 .*; ids of Cityscapes are 0\.\.33"):
        cityscapes(tmp_path, split="val")[0]


# --------------------------------------------------------------------------- PASCAL VOC
def test_voc_reads_palette_indices(tmp_path: Path) -> None:
    dataset = voc(write_voc(tmp_path / "VOCdevkit" / "VOC2012").parent)
    assert [dataset.name(i) for i in range(2)] == [
        "JPEGImages/2007_000039.jpg",
        "JPEGImages/2007_000032.jpg",
    ]
    assert dataset[0].targets["mask"][0, :3].tolist() == [0, 20, 255]
    assert dataset.targets["mask"].count == 21


def test_voc_with_a_list_of_another(tmp_path: Path) -> None:
    """The extended list has paths in some copies, and masks without a palette."""
    write_voc(tmp_path)
    write_mask(tmp_path / "SegmentationClassAug/2007_000063.png", ids(5))
    listed = tmp_path / "ImageSets/Segmentation/trainaug.txt"
    listed.write_text("/JPEGImages/2007_000063.jpg /SegmentationClassAug/2007_000063.png\n")
    assert voc(tmp_path, split="trainaug")[0].targets["mask"].unique().tolist() == [5]
    listed.write_text("2007_000063\n")
    assert voc(tmp_path, split="trainaug")[0].targets["mask"].unique().tolist() == [5]
    (tmp_path / "mine.txt").write_text("\ufeff2007_000063\r\n\r\na b c\r\n")
    with pytest.raises(DataError, match=r"mine\.txt, line 3: 'a b c' is neither a name nor"):
        voc(tmp_path, list_file=str(tmp_path / "mine.txt"))
    with pytest.raises(DataError, match=r"cannot read .*trainval\.txt"):
        voc(tmp_path, split="trainval")


# --------------------------------------------------------------------------- tables
@pytest.mark.parametrize(
    ("name", "count"), [("ade20k", 150), ("cityscapes", 19), ("pascal_voc", 21)]
)
def test_tables_of_classes(name: str, count: int) -> None:
    table = packaged_classes(name)
    assert len(table.names) == len(set(table.names)) == count
    assert table.palette is not None
    assert len(table.palette) == count
    if name == "pascal_voc":
        assert table.palette == palette(21)
