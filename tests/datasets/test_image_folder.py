"""Folders of images: what is found, how it is labeled, what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.image_folder import ImageFolder
from dinov3_datasets.listing import FileList
from PIL import Image

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import CorruptSampleError, DataError


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, value, value)).save(path)
    return path


def build(root: Path, channels: int = 3, **options: Any) -> ImageFolder:
    return ImageFolder(ImageFolderConfig(root=str(root), **options), channels=channels)


def listed(dataset: ImageFolder) -> list[str]:
    return list(dataset.files)


def labels(dataset: ImageFolder) -> list[int | None]:
    return [dataset[index].label for index in range(len(dataset))]


def test_a_flat_folder_has_no_labels_and_is_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", "10.png", "9.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = build(tmp_path)
    assert listed(dataset) == ["10.png", "9.png", "a.JPG", "b.png", "c.webp"]
    assert labels(dataset) == [None] * 5
    assert dataset.n_classes is None
    assert dataset.describe() == f"image_folder {tmp_path}: 5 images, no labels"


def test_class_folders_give_labels_at_any_depth(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "2.png", 20)
    save(tmp_path / "cat" / "young" / "black" / "1.png", 10)
    save(tmp_path / "cat" / "z.png", 11)
    save(tmp_path / "ant" / "0.png", 1)
    dataset = build(tmp_path)
    assert listed(dataset) == ["ant/0.png", "cat/young/black/1.png", "cat/z.png", "dog/2.png"]
    assert labels(dataset) == [0, 1, 1, 2]
    assert [int(dataset[index].image[0, 0, 0]) for index in range(4)] == [1, 10, 11, 20]
    assert dataset.classes == ("ant", "cat", "dog")
    assert dataset.n_classes == 3
    assert dataset.describe() == f"image_folder {tmp_path}: 4 images, 3 classes"


def test_labels_can_be_switched_off(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "1.png")
    dataset = build(tmp_path, labels="none")
    assert labels(dataset) == [None]
    assert dataset.n_classes is None


def test_an_image_outside_every_class_folder(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "1.png")
    stray = save(tmp_path / "stray.png")
    dataset = build(tmp_path)
    assert labels(dataset) == [None, None]
    assert "no labels (stray.png lies in no class folder)" in dataset.describe()
    with pytest.raises(DataError, match=f"{stray} lies in no class folder"):
        build(tmp_path, labels="folders")


def test_classes_fix_labels_and_select_folders(tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        save(tmp_path / name / "1.png")
    (tmp_path / "eel").mkdir()
    dataset = build(tmp_path, classes=("dog", "eel", "ant"))
    assert listed(dataset) == ["dog/1.png", "ant/1.png"]
    assert labels(dataset) == [0, 2]
    assert dataset.n_classes == 3
    with pytest.raises(DataError, match="no class folder 'fly'"):
        build(tmp_path, classes=("ant", "fly"))


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / ".thumbnails" / "a.png")
    save(tmp_path / ".b.png")
    assert listed(build(tmp_path)) == ["a.png"]


def test_extensions_decide(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.bmp")
    assert listed(build(tmp_path, extensions=(".bmp",))) == ["b.bmp"]


def test_links_are_followed_without_going_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "deep" / "x.png")
    root = tmp_path / "root"
    save(root / "a" / "1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").mkdir()
    (root / "c" / "again").symlink_to(root / "a")
    (root / "c" / "2.png").symlink_to(root / "a" / "1.png")
    dataset = build(root)
    assert listed(dataset) == ["a/1.png", "b/deep/x.png", "c/2.png", "c/again/1.png"]
    assert labels(dataset) == [0, 1, 2, 2]


def test_a_broken_link_is_a_corrupt_sample(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    dataset = build(tmp_path)
    assert len(dataset) == 2
    with pytest.raises(CorruptSampleError, match=r"b\.png: .*No such file"):
        dataset[1]


def test_names_that_are_no_utf8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        save(tmp_path / "ok.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system demands UTF-8")
    dataset = build(tmp_path)
    assert listed(dataset) == [name]
    assert dataset[0].image.shape == (3, 3, 4)


def test_indices_behave_like_a_sequences(tmp_path: Path) -> None:
    for value in range(3):
        save(tmp_path / f"{value}.png", value)
    dataset = build(tmp_path)
    assert [int(sample.image.max()) for sample in dataset] == [0, 1, 2]  # ends by IndexError
    assert int(dataset[-1].image.max()) == 2


def test_it_pickles(tmp_path: Path) -> None:
    for value in range(3):
        save(tmp_path / str(value % 2) / f"{value}.png", value)
    dataset = build(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert listed(copy) == listed(dataset)
    assert labels(copy) == labels(dataset) == [0, 0, 1]


def test_many_files_cross_the_buffer_of_the_listing() -> None:
    names = [f"n{index:07d}.jpg" for index in range(200_000)]
    files = FileList(iter(names))
    assert len(files) == len(names)
    assert [files[i] for i in (0, 65535, 65536, 131_072, 199_999)] == [
        names[i] for i in (0, 65535, 65536, 131_072, 199_999)
    ]
    per_file = len(pickle.dumps(files)) / len(names)
    assert per_file < len(names[0]) + 9  # the name and an offset


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text(""), "is not a folder"),
        (lambda root: root.mkdir(), r"no images in .* \(looked for \.jpg .*\.npy"),
        (lambda root: save(root / ".hidden.png"), "no images in"),
    ],
    ids=["missing", "file", "empty", "hidden only"],
)
def test_a_folder_without_images(tmp_path: Path, prepare: Any, message: str) -> None:
    root = tmp_path / "images"
    prepare(root)
    with pytest.raises(DataError, match=message):
        build(root)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a" / "1.png")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path) == tmp_path / "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=f"cannot read the folder {tmp_path}/a/?: Permission"):
        build(tmp_path)


def test_pipes_are_passed_over_aloud(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("b.png")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    dataset = build(tmp_path)
    assert listed(dataset) == ["a.png", "gone.png", "loop.png"]
    assert dataset.notes() == ["3 other files passed over: 3 that are pipes, sockets or devices"]


def test_a_check_says_what_is_left_out(tmp_path: Path) -> None:
    assert build_with(tmp_path / "a.png").notes() == []
    for name in ("b.heic", "c.HEIC", "notes.txt", "README"):
        (tmp_path / name).touch()
    (note,) = build(tmp_path).notes()
    assert note == "4 other files passed over: 2 .heic, 1 without an ending, 1 .txt"
    np.save(tmp_path / "d.npy", np.full((6, 7, 3), 900, np.uint16))
    assert "bits = 10" in build(tmp_path).notes()[-1]
    dataset = build(tmp_path, bits=10)
    assert dataset[1].image.unique().tolist() == [round(900 * 255 / 1023)]


def build_with(path: Path) -> Any:
    save(path)
    return build(path.parent)


def test_more_channels_than_a_picture_has(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((6, 7, 5), np.uint8))
    dataset = build(tmp_path, channels=5)
    assert dataset[1].image.shape == (5, 6, 7)
    with pytest.raises(CorruptSampleError, match=r"images\.channels is 5; none is made up"):
        dataset[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extensions": ("png",)}, "start with a dot"),
        ({"extensions": ()}, "at least one"),
        ({"classes": ("a", "a")}, "more than once"),
        ({"classes": ("a/b",)}, "right below root"),
        ({"classes": ()}, "at least one folder"),
        ({"classes": ("a",), "labels": "none"}, "needs labels"),
        ({"max_pixels": 0}, "above 0"),
        ({"bits": 0}, "1 to 32"),
        ({"low": 1.0}, "go together"),
        ({"bits": 12, "low": 0.0, "high": 1.0}, "in place of bits"),
        ({"low": 2.0, "high": 2.0}, "not below high"),
        ({"background": (0, 0, 256)}, "0 to 255"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        ImageFolderConfig(root="images", **options)
