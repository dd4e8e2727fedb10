"""Folders of images and masks: how they are paired, what ids mean, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dinov3_datasets.image_mask_folder import ImageMaskFolder
from dinov3_datasets.mask_configs import MaskFolderConfig
from mask_trees import SIZE, ids, write_image, write_mask, write_mask_folder
from PIL import Image

from dinov3_framework import CorruptSampleError, DataError, InvalidOption, Registry
from dinov3_framework.data.samples import sample_complaints
from dinov3_framework.errors import WrongTargetError
from dinov3_framework.testing import DatasetSuite


def build(root: Path, **options: Any) -> ImageMaskFolder:
    places = {"images": str(root / "images"), "masks": str(root / "masks")}
    return ImageMaskFolder(MaskFolderConfig(**places | options), channels=3)


def ids_of(dataset: ImageMaskFolder, index: int = 0) -> list[int]:
    return sorted(dataset[index].targets["mask"].unique().tolist())


class TestContract(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        write_mask_folder(tmp_path)
        self.config = MaskFolderConfig(
            images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), n_classes=4
        )


def test_images_and_masks_by_name(tmp_path: Path) -> None:
    write_mask_folder(tmp_path)
    write_image(tmp_path / "images/deep/er/a.b.jpeg")
    write_mask(tmp_path / "masks/deep/er/a.b.png", ids(2))
    (tmp_path / "masks/classes.txt").write_text("sky\nsea\n\nland\nice\n")
    dataset = build(tmp_path)
    assert [dataset.name(i) for i in range(4)] == ["0.jpg", "1.jpg", "2.jpg", "deep/er/a.b.jpeg"]
    assert dataset[2].targets["mask"].tolist() == ids(0, 1, 2, 255).tolist()
    assert dataset[2].targets["mask"].dtype == torch.uint8
    assert dataset[3].targets["mask"].tolist() == ids(2).tolist()
    target = dataset.targets["mask"]
    assert target.classes == ("sky", "sea", "land", "ice")
    assert target.palette is not None
    assert len(target.palette) == 4
    assert "4 images; mask: mask, 4 classes" in dataset.describe()


@pytest.mark.parametrize("ending", ["png", "tif", "npy", "bmp"])
def test_formats_of_masks(tmp_path: Path, ending: str) -> None:
    write_image(tmp_path / "images/a.jpg")
    path = tmp_path / f"masks/a.{ending}"
    path.parent.mkdir()
    values = ids(0, 3, 1)
    if ending == "npy":
        np.save(path, values.astype(np.int64))
    else:
        write_mask(path, values, with_palette=ending != "tif")
    assert build(tmp_path, n_classes=4)[0].targets["mask"].tolist() == values.tolist()


def test_many_classes_take_sixteen_bits(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.jpg")
    values = ids(0, 1).astype(np.uint16) * 299
    values[0, 0] = 65535
    write_mask(tmp_path / "masks/a.png", values)
    mask = build(tmp_path, n_classes=300, ignore_index=65535)[0].targets["mask"]
    assert mask.dtype == torch.int32
    assert mask.tolist() == values.tolist()
    with pytest.raises(DataError, match="ignore_index = 255 is an id of one of the 300 classes"):
        build(tmp_path, n_classes=300)
    write_mask(tmp_path / "masks/a.png", ids(0, 200))
    assert ids_of(build(tmp_path, n_classes=300, ignore_index=65535)) == [0, 200]
    with pytest.raises(WrongTargetError, match="holds id 200"):
        build(tmp_path, n_classes=30, ignore_index=65535)[0]


def test_offset_and_ids_that_count_for_nothing(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 0, a=ids(0, 1, 4, 9, 255))
    assert ids_of(build(tmp_path, n_classes=4, offset=-1, ignore=(9,))) == [0, 3, 255]
    assert ids_of(build(tmp_path, n_classes=11, offset=1)) == [1, 2, 5, 10, 255]
    with pytest.raises(WrongTargetError, match=r"holds id 9 \(9 pixels\); ids are 1\.\.4 for 4"):
        build(tmp_path, n_classes=4, offset=-1)[0]


def test_black_and_white_masks(tmp_path: Path) -> None:
    """255 is ignored by default, of which a check warns; as a class it is stated."""
    write_mask_folder(tmp_path, 0, a=ids(0, 255), b=ids(0))
    (note,) = build(tmp_path, n_classes=2).notes()
    assert "the first masks hold 0 and 255 alone" in note
    stated = build(tmp_path, ids=(0, 255), classes=("ground", "roof"))
    assert ids_of(stated) == [0, 1]
    assert stated.notes() == []
    write_mask(tmp_path / "masks/b.png", ids(0, 128))
    with pytest.raises(WrongTargetError, match=r"holds id 128 .*; ids are 0, 255: is offset"):
        stated[1]
    assert build(tmp_path, n_classes=129).notes() == []


def test_negative_ids_in_numpy_files(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.jpg")
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks/a.npy", ids(0, 1, 2).astype(np.int32) - 1)
    assert ids_of(build(tmp_path, n_classes=2, ignore_index=-1)) == [-1, 0, 1]
    with pytest.raises(WrongTargetError, match="holds id -1"):
        build(tmp_path, n_classes=2)[0]


def test_an_id_above_the_classes_is_told_with_its_file(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 1, bad=ids(0, 4, 7))
    dataset = build(tmp_path, n_classes=4)
    assert ids_of(dataset, 0) == [0, 1, 255]
    with pytest.raises(CorruptSampleError) as caught:
        dataset[1]
    assert "masks/bad.png: holds id 4 (16 pixels), 7 (16 pixels)" in str(caught.value)
    assert "is offset, ignore, ignore_index or n_classes meant?" in str(caught.value)


# --------------------------------------------------------------------------- colors
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def colored(root: Path, *colors: tuple[int, int, int]) -> Path:
    write_image(root / "images/a.jpg")
    values = np.array([colors[i % len(colors)] for i in range(SIZE[0] * SIZE[1])], np.uint8)
    write_mask(root / "masks/a.png", values.reshape(SIZE[1], SIZE[0], 3))
    return root


def test_colors_stand_for_classes(tmp_path: Path) -> None:
    colored(tmp_path, RED, WHITE, BLUE)
    dataset = build(tmp_path, palette=(BLUE, RED), ignore_colors=(WHITE,))
    assert dataset[0].targets["mask"][0, :3].tolist() == [1, 255, 0]
    assert dataset.targets["mask"].palette == (BLUE, RED)
    with pytest.raises(WrongTargetError, match=r"palette lacks: \(255, 255, 255\) \(16 pixels\)"):
        build(tmp_path, palette=(BLUE, RED))[0]
    with pytest.raises(WrongTargetError, match=r"holds colors \(3 channels\); state palette"):
        build(tmp_path, n_classes=2)[0]


def test_a_labelmap_names_classes_and_colors(tmp_path: Path) -> None:
    colored(tmp_path, RED, BLUE)
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,255::\nroof:255,0,0::\n"
    )
    dataset = build(tmp_path)
    assert dataset.targets["mask"].classes == ("background", "roof")
    assert dataset[0].targets["mask"][0, :2].tolist() == [1, 0]


def test_a_palette_png_that_is_meant_as_colors(tmp_path: Path) -> None:
    """As editors save RGB masks with few colors, in an order of their own."""
    colored(tmp_path, RED, BLUE)
    image = Image.open(tmp_path / "masks/a.png").quantize(2)
    image.save(tmp_path / "masks/a.png")
    found = build(tmp_path, palette=(BLUE, RED), coding="colors")[0].targets["mask"]
    assert found[0, :2].tolist() == [1, 0]


# --------------------------------------------------------------------------- pairs
def test_suffixes_in_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png")
        write_mask(tmp_path / f"{name}_mask.png", ids(1))
    both = {"images": str(tmp_path), "masks": str(tmp_path), "n_classes": 2}
    dataset = build(tmp_path, **both, mask_suffix="_mask")
    assert [dataset.name(i) for i in range(len(dataset))] == ["a.png", "b.png"]
    assert ids_of(dataset) == [1]
    with pytest.raises(DataError, match=r"are one folder.*\(mask_suffix\)"):
        build(tmp_path, **both)


def test_what_has_no_partner(tmp_path: Path) -> None:
    write_mask_folder(tmp_path)
    for name in "xyz":
        write_image(tmp_path / f"images/{name}.jpg")
    write_mask(tmp_path / "masks/spare.png", ids(0))
    with pytest.raises(DataError) as caught:
        build(tmp_path, n_classes=4)
    assert "3 images have no file of masks: x.jpg, y.jpg, z.jpg" in str(caught.value)
    assert "skip_unpaired = true" in str(caught.value)
    dataset = build(tmp_path, n_classes=4, skip_unpaired=True)
    assert len(dataset) == 3
    assert dataset.notes() == [
        "3 images have no file of masks: x.jpg, y.jpg, z.jpg (left out)",
        "1 files of masks are of no image: spare.png",
    ]


@pytest.mark.parametrize(
    ("images", "masks", "options", "message"),
    [
        (["a.jpg"], ["b_mask.png"], {}, r"1 images have no file of masks.*\n.*mask_suffix"),
        (["a.jpg"], ["a.jpg"], {}, "no masks in .*1 .jpg\n.*are to be kept as PNG"),
        ([], ["a.png"], {}, "no images in"),
        (["a.jpg", "a.png"], ["a.png"], {}, "a.jpg and a.png in .* belong to one file of masks"),
        (["a.jpg"], ["a.png", "a.tif"], {}, "a.png and a.tif in .* are of one image"),
        (["a.jpg"], ["a.png"], {"n_classes": None}, "which classes there are is not known"),
        (["a.jpg"], ["a.png"], {"images": "nowhere"}, "images = 'nowhere' does not exist"),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, images: list[str], masks: list[str], options: Any, message: str
) -> None:
    for folder, names in (("images", images), ("masks", masks)):
        (tmp_path / folder).mkdir()
        for name in names:
            write_image(tmp_path / folder / name)
    with pytest.raises(DataError, match=message):
        build(tmp_path, **{"n_classes": 2} | options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "names more than once: a"),
        ("a\t1\t2\n", "line 1: .* is neither a name nor"),
        ("a\t1\t2\t256\n", "line 1: "),
        ("# nothing\n", "names no class"),
        ("a\nb\n", "numbers of classes differ: names of classes: 2, n_classes: 3"),
    ],
)
def test_files_of_classes_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write_mask_folder(tmp_path)
    (tmp_path / "names.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        build(tmp_path, classes_file=str(tmp_path / "names.tsv"), n_classes=3)


def test_options_that_contradict_each_other() -> None:
    places = {"images": "a", "masks": "b"}
    with pytest.raises(InvalidOption, match="numbers of classes differ: classes 2, n_classes 3"):
        MaskFolderConfig(**places, classes=("a", "b"), n_classes=3)
    with pytest.raises(InvalidOption, match="numbers of classes differ: n_classes 3, ids 2"):
        MaskFolderConfig(**places, ids=(0, 255), n_classes=3)
    with pytest.raises(InvalidOption, match="offset: is given in place of ids"):
        MaskFolderConfig(**places, ids=(0, 255), n_classes=2, offset=1)
    with pytest.raises(InvalidOption, match=r"palette: has \[1, 2, 3\] more than once"):
        MaskFolderConfig(**places, palette=((1, 2, 3), (1, 2, 3)))


# --------------------------------------------------------------------------- sizes and turns
def test_a_mask_of_another_size(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 0, a=ids(0, size=(7, 6)))
    with pytest.raises(WrongTargetError, match=r"a\.png: is 7 x 6 pixels, its image a\.jpg 8 x 6"):
        build(tmp_path, n_classes=2)[0]


def test_an_image_that_its_camera_turned(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.jpg", orientation=6)
    values = ids(0, 1)
    values[0] = 2
    write_mask(tmp_path / "masks/a.png", values)
    with pytest.raises(
        WrongTargetError, match=r"8 x 6.*6 x 8.*turned by the orientation in its EX"
    ):
        build(tmp_path, n_classes=3)[0]
    sample = build(tmp_path, n_classes=3, orientation="image")[0]
    assert sample.image.shape == (3, 8, 6)
    assert sample.targets["mask"].tolist() == values[::-1].T.tolist()


# --------------------------------------------------------------------------- in a registry
def test_parts_and_mixtures_keep_the_classes(tmp_path: Path) -> None:
    registry = Registry.load()
    roots = [write_mask_folder(tmp_path / name) for name in "ab"]

    def folder(root: Path, count: int) -> dict[str, Any]:
        places = {"images": str(root / "images"), "masks": str(root / "masks")}
        return {"use": "image_mask_folder", "n_classes": count, **places}

    def mixture(*counts: int) -> Any:
        parts = {root.name: folder(root, n) for root, n in zip(roots, counts, strict=True)}
        return registry.build("dataset", "mixture", channels=3, parts=parts)

    part = registry.build("dataset", "subset", channels=3, of=folder(roots[0], 4), first=2)
    assert len(part) == 2
    assert part[1].targets["mask"].shape == (6, 8)
    alike = mixture(4, 4)
    assert alike.targets["mask"].count == 4
    assert alike[0].targets["mask"].shape == (6, 8)
    other = mixture(4, 5)
    assert other.targets == {}
    assert "mask" in other.describe()


def test_a_wrong_mask_in_a_mixture_is_told_with_its_part(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 0, a=ids(9))
    places = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    part = {"use": "image_mask_folder", "n_classes": 2, **places}
    dataset = Registry.load().build("dataset", "mixture", channels=3, parts={"own": part})
    (complaint,) = sample_complaints(dataset)
    assert complaint.startswith(f"own: {tmp_path}/masks/a.png: holds id 9")


def test_the_version_names_pixels_and_options(tmp_path: Path) -> None:
    write_mask_folder(tmp_path)
    version = build(tmp_path, n_classes=4).version()
    assert version == build(tmp_path, n_classes=4).version()
    assert version != build(tmp_path, n_classes=4, ignore=(3,)).version()
    write_mask(tmp_path / "masks/0.png", ids(0, size=SIZE))
    assert version != build(tmp_path, n_classes=4).version()
