"""ImageNet-22k in tar files: its index is the published one, what is read, what is refused."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dinov3_datasets.imagenet_22k import Imagenet22k
from dinov3_datasets.imagenet_configs import Imagenet22kConfig
from imagenet_support import jpeg, write_tar

from dinov3_framework.data.inference import InferenceLoader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite

IDS = ("n00004475", "n00005787", "n06470073")
MEMBERS = {
    "n00004475": {"n00004475_32.JPEG": jpeg(10), "n00004475_6590.JPEG": jpeg(20)},
    # Some images of the published files are compressed once more.
    "n00005787": {"n00005787_13.JPEG": gzip.compress(jpeg(30))},
    # The first is no image in the published files, and has no entry.
    "n06470073": {"n06470073_47249.JPEG": b"no image", "n06470073_3.JPEG": jpeg(40)},
}
KEPT = [(0, "n00004475_32.JPEG"), (0, "n00004475_6590.JPEG"), (1, "n00005787_13.JPEG")]
KEPT += [(2, "n06470073_3.JPEG")]


def published_index(folder: Path) -> dict[str, bytes]:
    """The index by its published layout, with offsets of blocks counted by hand."""
    rows = []
    for label, (class_id, members) in enumerate(MEMBERS.items()):
        start = 0
        for name, content in members.items():
            end = start + 512 + -(-len(content) // 512) * 512
            if (label, name) in KEPT:
                rows.append((label, class_id, start, end, name))
            start = end
    dtype = [
        ("class_index", "<u4"),
        ("class_id", "U9"),
        ("start_offset", "<u4"),
        ("end_offset", "<u4"),
        ("filename", f"U{max(len(row[4]) for row in rows)}"),
    ]
    folder.mkdir()
    np.save(folder / "entries.npy", np.array(rows, dtype))
    np.save(folder / "class-ids.npy", np.array(IDS))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "imagenet22k"
    for class_id, members in MEMBERS.items():
        write_tar(folder / f"{class_id}.tar", members.items())
    published_index(folder / "extra")
    return folder


def settings(root: Path, **options: Any) -> Imagenet22kConfig:
    return Imagenet22kConfig(root=str(root), **options)


def build(root: Path, **options: Any) -> Imagenet22k:
    return Imagenet22k(settings(root, **options), channels=3)


class TestContract(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _config(self, root: Path) -> None:
        self.config = settings(root, open_tars=1)


def write_logs(root: Path) -> None:
    """What tar -tRf prints of each tar."""
    (root / "blocks").mkdir()
    for class_id, members in MEMBERS.items():
        lines, block = [], 0
        for name, content in members.items():
            lines.append(f"block {block}: {name}\n")
            block += 1 + -(-len(content) // 512)
        lines.append(f"block {block}: ** Block of NULs **\n")
        (root / "blocks" / f"{class_id}.log").write_text("".join(lines))


@pytest.mark.parametrize("logs", [False, True])
def test_the_index_is_the_published_one_byte_by_byte(
    root: Path, tmp_path: Path, logs: bool
) -> None:
    if logs:
        write_logs(root)
    calls: list[tuple[int, int]] = []
    paths = Imagenet22k.write_index(
        settings(root, extra=str(tmp_path / "ours")), lambda *done: calls.append(done)
    )
    expected = {path.name: path.read_bytes() for path in (root / "extra").iterdir()}
    assert {path.name: path.read_bytes() for path in paths} == expected
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_what_is_read(root: Path) -> None:
    dataset = build(root)
    assert [dataset.label(index) for index in range(4)] == [0, 0, 1, 2]
    assert [dataset.name(index) for index in range(4)] == [f"{IDS[i]}/{name}" for i, name in KEPT]
    for index, value in enumerate((10, 20, 30, 40)):
        sample = dataset[index]
        assert sample.image.shape == (3, 5, 6)
        assert abs(int(sample.image[0, 0, 0]) - value) <= 2
        assert sample.label == dataset.label(index)
    assert dataset.classes == IDS
    assert dataset.describe() == f"imagenet_22k {root}: 4 images, 3 classes"


def test_workers_read_it_with_few_files_open(root: Path) -> None:
    dataset = build(root, open_tars=1)
    assert dataset[0].label == 0  # the parent has a file open that the workers come by
    asked = [[3, 0], [2, 1], [0, 3], [1, 2]]
    loader: InferenceLoader[Any, Any] = InferenceLoader(
        dataset, lambda sample, _: int(sample.image[0, 0, 0]), asked, collate=list, workers=2
    )
    found = [batch.data for batch in loader]
    expected = [[10 + 10 * index for index in batch] for batch in asked]
    assert np.abs(np.subtract(found, expected)).max() <= 2
    assert [dataset[index].label for index in range(4)] == [0, 0, 1, 2]
    opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    assert [each for each in opened if each.startswith(f"{root}/n")] == [f"{root}/{IDS[2]}.tar"]


# --------------------------------------------------------------------------- what is refused
def change(root: Path, name: str, function: Callable[[np.ndarray], Any]) -> None:
    path = root / "extra" / f"{name}.npy"
    array = np.load(path)
    changed = function(array)
    np.save(path, array if changed is None else changed)


def tar_gone(root: Path) -> None:
    (root / "n00005787.tar").unlink()


def tar_cut(root: Path) -> None:
    os.truncate(root / "n00004475.tar", 2000)


def out_of_range(root: Path) -> None:
    change(root, "entries", lambda array: array["class_index"].__setitem__(3, 3))


def other_ids(root: Path) -> None:
    change(root, "class-ids", lambda array: array[[1, 0, 2]])


def empty_class(root: Path) -> None:
    change(root, "entries", lambda array: array[array["class_index"] != 1])


def backwards(root: Path) -> None:
    change(root, "entries", lambda array: array["end_offset"].__setitem__(1, 0))


def a_path_as_id(root: Path) -> None:
    change(root, "class-ids", lambda array: np.array(["/etc/passwd", *array[1:]]))


def nothing(root: Path) -> None:
    change(root, "entries", lambda array: array[:0])


def no_index(root: Path) -> None:
    shutil.rmtree(root / "extra")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tar_gone, "lacks 1 of 3 tar files: n00005787.tar"),
        (tar_cut, "n00004475.tar: cut off"),
        (out_of_range, "labels out of range: 3 where there are 3"),
        (other_ids, "other ids than class-ids.npy"),
        (empty_class, "1 classes have no image: n00005787"),
        (backwards, "end before they begin"),
        (a_path_as_id, "no usable id"),
        (nothing, "3 classes have no image"),
        (no_index, "class-ids.npy is missing"),
    ],
)
def test_an_index_that_is_wrong_is_refused_with_the_command_that_writes_it(
    root: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(root)
    with pytest.raises(DataError) as error:
        build(root)
    assert words in str(error.value)
    assert f"dinov3-run index dataset.use=imagenet_22k dataset.root={root}" in str(error.value)


def test_a_tar_that_changed_since_gives_corrupt_samples(root: Path) -> None:
    dataset = build(root)
    members = MEMBERS["n00004475"]
    swapped = dict(zip(members, reversed(members.values()), strict=True))
    write_tar(root / "n00004475.tar", reversed(swapped.items()))
    assert dataset[2].label == 1
    with pytest.raises(CorruptSampleError, match=r"its tar has n00004475_6590\.JPEG in its place"):
        dataset[0]
    (root / "n06470073.tar").write_bytes(b"x" * 10240)
    with pytest.raises(CorruptSampleError, match="its index is not of"):
        dataset[3]
    os.truncate(root / "n06470073.tar", 100)
    with pytest.raises(CorruptSampleError):
        dataset[3]


def test_a_damaged_gzip_image_is_a_corrupt_sample(root: Path) -> None:
    content = bytearray(MEMBERS["n00005787"]["n00005787_13.JPEG"])
    content[20:40] = bytes(20)
    write_tar(root / "n00005787.tar", [("n00005787_13.JPEG", bytes(content))])
    with pytest.raises(CorruptSampleError, match="gzip"):
        build(root)[2]


@pytest.mark.parametrize("where", ["content", "header", "between", "end"])
def test_a_tar_that_is_cut_off_is_not_indexed(root: Path, where: str) -> None:
    tar, first = root / "n00004475.tar", 512 + -(-len(jpeg(10)) // 512) * 512
    lengths = {"content": first + 600, "header": first + 200, "between": first, "end": 2 * first}
    os.truncate(tar, lengths[where])
    with pytest.raises(DataError, match=r"n00004475\.tar is damaged"):
        Imagenet22k.write_index(settings(root))


def test_a_damaged_header_is_noticed(root: Path) -> None:
    tar, first = root / "n00004475.tar", 512 + -(-len(jpeg(10)) // 512) * 512
    content = bytearray(tar.read_bytes())
    content[first + 130] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"no header where one should be, at byte {first:,}"):
        Imagenet22k.write_index(settings(root))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("block 0", "blok 0"), "line 1: is no line of tar -tRf"),
        (lambda text: text[: text.rindex("block")], "is not whole"),
        (lambda text: text.replace("block ", "block 9"), "is cut off, or"),
    ],
)
def test_wrong_block_logs(root: Path, change: Callable[[str], str], words: str) -> None:
    write_logs(root)
    log = root / "blocks" / "n00004475.log"
    log.write_text(change(log.read_text()))
    with pytest.raises(DataError, match=words):
        Imagenet22k.write_index(settings(root))


def test_tar_files_without_images_and_no_tar_files(root: Path) -> None:
    write_tar(root / "n00005787.tar", [])
    with pytest.raises(DataError, match=r"n00005787\.tar in .*: no image in it"):
        Imagenet22k.write_index(settings(root))
    (root / "none").mkdir()
    with pytest.raises(DataError, match="no tar files in"):
        Imagenet22k.write_index(settings(root / "none"))


def test_the_version_changes_with_the_tar_files(root: Path) -> None:
    dataset = build(root)
    before = dataset.digest(), dataset.version()
    os.utime(root / "n00005787.tar", ns=(1, 1))
    assert dataset.digest() == before[0]
    assert dataset.version() != before[1]
