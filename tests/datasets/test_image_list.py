"""Lists of images: CSV, TSV and JSON Lines, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from archive_support import picture
from dinov3_datasets.image_list import ImageList
from dinov3_datasets.list_config import ImageListConfig

from dinov3_framework import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images/0.png .. images/4.png, whose gray value is their number."""
    (tmp_path / "images").mkdir()
    for value in range(5):
        (tmp_path / "images" / f"{value}.png").write_bytes(picture(value, "png"))
    return tmp_path


def build(path: Path, content: str, channels: int = 3, **options: Any) -> ImageList:
    path.write_text(content, "utf-8")
    return ImageList(ImageListConfig(path=str(path), **options), channels=channels)


def grays(dataset: ImageList) -> list[int]:
    return [int(sample.image[0, 0, 0]) for sample in dataset]


class TestImageList(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, images: Path) -> None:
        rows = [
            {"path": f"images/{i}.png", "label": "ab"[i % 2], "labels": [i, 4], "text": f"{i}"}
            for i in range(5)
        ]
        (images / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.config = ImageListConfig(path=str(images / "list.jsonl"))


def test_a_csv_with_names_of_classes(images: Path) -> None:
    content = 'path,label,text\nimages/3.png,dog,"a dog, running"\nimages/1.png,cat,\n'
    dataset = build(images / "list.csv", content)
    assert grays(dataset) == [3, 1]
    assert dataset.classes == ("cat", "dog")
    assert [sample.targets for sample in dataset] == [
        {"label": 1, "text": "a dog, running"},
        {"label": 0, "text": ""},
    ]
    assert dataset.name(0) == "images/3.png"
    assert "2 images, label: class, 2 classes; text: text" in dataset.describe()
    chosen = build(images / "list.csv", content, classes=("dog", "bird", "cat"), text=None)
    assert [sample.targets for sample in chosen] == [{"label": 0}, {"label": 2}]
    assert chosen.digest() != dataset.digest()


def test_a_tsv_with_numbers_and_a_root(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    content = "\ufefffile\ttarget\n0.png\t2\n4.png\t0\n\n"
    dataset = build(
        folder / "list.tsv", content, root=str(images / "images"), image="file", label="target"
    )
    assert grays(dataset) == [0, 4]
    assert [sample.label for sample in dataset] == [2, 0]
    assert (dataset.n_classes, dataset.classes) == (3, None)
    assert build(folder / "list.tsv", content, **_of(dataset), n_classes=10).n_classes == 10
    without = build(folder / "list.tsv", content, **(_of(dataset) | {"label": None}))
    assert without[0].targets == {}


def _of(dataset: ImageList) -> dict[str, Any]:
    config = dataset.config
    return {"root": config.root, "image": config.image, "label": config.label}


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (("cat;dog", "bird", ""), ("bird", "cat", "dog")),
        (('"[""cat"", ""dog""]"', '"[""bird""]"', "[]"), ("bird", "cat", "dog")),
        (("1; 2", "0", ""), None),
    ],
)
def test_several_labels(
    images: Path, cells: tuple[str, ...], classes: tuple[str, ...] | None
) -> None:
    lines = [f"images/{i}.png,{cell}" for i, cell in enumerate(cells)]
    dataset = build(images / "list.csv", "\n".join(["path,labels", *lines]))
    assert [sample.targets["labels"].tolist() for sample in dataset] == [[1, 2], [0], []]
    target = dataset.targets["labels"]
    assert (target.kind, target.per_object, target.count) == ("class", True, 3)
    assert target.classes == classes
    assert dataset.n_classes is None


def test_json_lines_hold_numbers_and_lists(images: Path) -> None:
    rows = [{"path": "images/2.png", "label": 1}, {"path": "images/0.png", "label": 0, "more": {}}]
    dataset = build(images / "list.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert grays(dataset) == [2, 0]
    assert [sample.label for sample in dataset] == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "", "lists no images"),
        ("a.csv", "path,label\n", "lists no images"),
        ("a.jsonl", "\n", "lists no images"),
        ("a.txt", "images/0.png\n", r"ends in \.csv, \.tsv or \.jsonl"),
        ("a.csv", "file,label\nimages/0.png,1\n", "image = 'path': .* the columns are file, label"),
        (
            "a.csv",
            "path,label\nimages/0.png,1\nimages/1.png\n",
            "line 3: 1 fields, the header has 2",
        ),
        ("a.csv", "path,label\nimages/0.png,1\n,1\n", "line 3: path is '', not the path of an"),
        ("a.csv", "path,label\nimages/0.png,\n", "line 2: label is '', not a whole number"),
        ("a.csv", 'path,label\n"images/0.png,1\n', "line 2: unexpected end of data"),
        ("a.csv", "path,path\nimages/0.png,1\n", "the header has path more than once"),
        ("a.jsonl", '{"path": "images/0.png"}\n{"path"\n', "line 2: no JSON"),
        ("a.jsonl", "[1]\n", "line 1: list, a row is an object"),
        ("a.jsonl", '{"path": 3}\n', "line 1: path is 3"),
        ("a.jsonl", '{"path": "images/0.png", "label": 1.5}\n', r"line 1: label is 1\.5"),
        ("a.jsonl", '{"path": "images/0.png", "labels": [true]}\n', "not a list of labels"),
        ("a.csv", 'path,labels\nimages/0.png,"[1"\n', "line 2: labels is no JSON list"),
    ],
)
def test_lists_that_are_wrong(images: Path, name: str, content: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        build(images / name, content)


def test_options_that_name_no_column(images: Path) -> None:
    content = "path,label\nimages/0.png,1\n"
    for key in ("label", "labels", "text"):
        with pytest.raises(DataError, match=f"{key} = 'x': .* the columns are path, label"):
            build(images / "a.csv", content, **{key: "x"})
    with pytest.raises(DataError, match="does not exist"):
        ImageList(ImageListConfig(path=str(images / "none.csv")), channels=3)
    (images / "a.csv").write_bytes(b"path\nimages/\xff.png\n")
    with pytest.raises(DataError, match="is not in UTF-8"):
        ImageList(ImageListConfig(path=str(images / "a.csv")), channels=3)


def test_labels_out_of_range_are_counted(images: Path) -> None:
    content = "path,label\nimages/0.png,1\nimages/1.png,7\nimages/2.png,-1\n"
    with pytest.raises(DataError, match=r"2 of 3 labels are wrong: images/1\.png: label 7"):
        build(images / "a.csv", content, n_classes=3)
    content = "path,labels\nimages/0.png,cat;cow\nimages/1.png,cat\n"
    with pytest.raises(DataError, match=r"1 of 3 labels .* images/0\.png: label 'cow' is no class"):
        build(images / "a.csv", content, classes=("cat", "dog"))


def test_missing_files_are_all_counted(images: Path) -> None:
    content = "path\n" + "".join(f"images/{i}.png\n" for i in range(12))
    with pytest.raises(
        DataError, match=r"7 of 12 files are missing below .*5\.png \(line 7\), .*3"
    ):
        build(images / "a.csv", content)
    os.mkfifo(images / "pipe.png")
    with pytest.raises(DataError, match="1 of 1 files are missing"):
        build(images / "a.csv", "path\npipe.png\n")


def test_a_broken_image_is_a_corrupt_sample(images: Path) -> None:
    (images / "images" / "1.png").write_bytes(b"no image")
    dataset = build(images / "a.csv", "path\nimages/0.png\nimages/1.png\n")
    with pytest.raises(CorruptSampleError, match=r"1\.png: cannot identify"):
        dataset[1]


def test_the_version_changes_with_the_files(images: Path) -> None:
    dataset = build(images / "a.csv", "path\nimages/0.png\n")
    os.utime(images / "images" / "0.png", (1, 1))
    again = build(images / "a.csv", "path\nimages/0.png\n")
    assert again.digest() == dataset.digest()
    assert again.version() != dataset.version()
