"""Shards of WebDataset, by index and as streams."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_support import (
    first,
    gray,
    indexed,
    picture,
    stream,
    write_index,
    write_shards,
    write_tar,
)
from dinov3_datasets.webdataset_config import WebDatasetConfig
from run_support import run_here

from dinov3_framework import CorruptSampleError, DataError, InvalidOption, OutputError, Sample
from dinov3_framework.testing import DatasetSuite

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, nine and five samples, each of a gray value of its own."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [7, 9, 5])
    return folder


class TestIndexed(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, shards: Path) -> None:
        self.config = WebDatasetConfig(shards=str(shards), text="txt")


# --------------------------------------------------------------------------- by index
def test_samples_have_labels_texts_and_names(shards: Path) -> None:
    dataset = indexed(shards, text="txt")
    assert [gray(sample) for sample in dataset] == list(range(21))
    assert [sample.label for sample in dataset] == [value % 3 for value in range(21)]
    assert dataset[7].targets["text"] == "a picture of 7"
    assert (dataset.n_classes, dataset.classes) == (3, None)
    assert dataset.name(7) == "train-001.tar:part/01_0000.png"
    assert "21 images in 3 shards, 3 classes" in dataset.describe()
    assert not dataset.notes()


@pytest.mark.parametrize(
    ("options", "classes", "count"),
    [
        ({"label": "json:label"}, None, 3),
        ({"label": "json:name"}, ("class 0", "class 1", "class 2"), 3),
        ({"label": "json:name", "classes": ("class 0", "class 1", "class 2", "x")}, None, 4),
        ({"label": "cls", "n_classes": 10}, None, 10),
        ({"label": None}, None, None),
    ],
)
def test_labels_come_from_any_member(
    shards: Path, options: dict[str, Any], classes: tuple[str, ...] | None, count: int | None
) -> None:
    dataset = indexed(shards, **options)
    assert dataset.n_classes == count
    assert dataset.classes == options.get("classes", classes)
    expected = [None if count is None else value % 3 for value in range(21)]
    assert [sample.label for sample in dataset] == expected


def test_labels_that_are_no_class_are_counted(shards: Path) -> None:
    with pytest.raises(DataError, match=r"7 of 21 labels are wrong: .*label 2 is not in 0\.\.1"):
        indexed(shards, n_classes=2)
    with pytest.raises(DataError, match="is no class"):
        indexed(shards, label="json:name", classes=("class 0", "class 1"))


@pytest.mark.parametrize(
    "pattern", ["train-{000..002}.tar", "train-*.tar", "train-00{0,1,2}.tar", "train-{0..2}.tar"]
)
def test_patterns_mean_shards(shards: Path, pattern: str) -> None:
    if "{0.." in pattern:
        pattern = pattern.replace("train-", "train-00")
    assert indexed(shards / pattern).digest() == indexed(shards).digest()


def test_missing_shards_are_all_counted(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 of the 5 files of shards .* missing: .*003\.tar, .*004\.tar"
    ):
        indexed(shards / "train-{000..004}.tar")
    with pytest.raises(DataError, match="matches no file"):
        indexed(shards / "val-*.tar")
    with pytest.raises(DataError, match="does not exist"):
        indexed(shards / "none.tar")
    with pytest.raises(DataError, match=r"no \*\.tar file in this folder; it is empty"):
        indexed(tmp_path)


@pytest.mark.parametrize("url", ["pipe:curl http://x/a.tar", "https://x/{00..11}.tar", "s3://b/a"])
def test_urls_and_commands_are_refused(url: str) -> None:
    with pytest.raises(InvalidOption, match="files here are local"):
        WebDatasetConfig(shards=url)


def test_an_index_file_takes_the_place_of_the_scan(tmp_path: Path) -> None:
    write_shards(tmp_path, [4, 3])
    scanned = indexed(tmp_path, text="txt")
    calls: list[tuple[int, int]] = []
    written = write_index(tmp_path, lambda *done: calls.append(done))
    names = ["train-000.tar.idx.npy", "train-001.tar.idx.npy"]
    assert sorted(path.name for path in tmp_path.iterdir() if "idx" in path.name) == names
    assert [path.name for path in written] == names
    assert calls == [(1, 2), (2, 2)]
    for label in ("cls", "json:label"):
        dataset = indexed(tmp_path, text="txt", label=label)
        assert dataset.digest() == scanned.digest()
        assert not dataset.notes()
        assert [gray(sample) for sample in dataset] == list(range(7))
        assert dataset[6].targets == {"label": 0, "text": "a picture of 6"}
    # Headers are not read again: damage to one that is not the first goes unseen.
    damaged = tmp_path / "train-001.tar"
    state = os.stat(damaged)
    content = bytearray(damaged.read_bytes())
    place = content.index(b"part/01_0001.png")
    content[place] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(indexed(tmp_path)) == 7


def test_an_index_file_of_another_state_is_not_used(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    first_version = indexed(tmp_path).version()
    [path] = write_index(tmp_path)
    write_shards(tmp_path, [6])
    dataset = indexed(tmp_path)
    assert len(dataset) == 6
    assert "1 index files not used" in dataset.notes()[0]
    assert "another state" in dataset.notes()[0]
    assert dataset.version() != first_version
    os.utime(tmp_path / "train-000.tar", (1, 1))
    write_index(tmp_path)
    os.utime(tmp_path / "train-000.tar", (2, 2))
    assert "another state" in indexed(tmp_path).notes()[0]
    for content in (b"", b"no array", path.read_bytes()[:-40]):
        path.write_bytes(content)
        assert len(indexed(tmp_path)) == 6
        assert "not used" in indexed(tmp_path).notes()[0]
    np.save(path, np.zeros(5))
    assert "is not of this format" in indexed(tmp_path).notes()[0]
    write_index(tmp_path)
    assert not indexed(tmp_path).notes()
    rows = np.load(path)
    rows["offset"][-1] = 2**40
    np.save(path, rows)
    assert "beyond the shard" in indexed(tmp_path).notes()[0]
    assert len(indexed(tmp_path)) == 6


def test_the_task_index_writes_what_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [3, 2])
    data = ("dataset.use=webdataset", f"dataset.shards={tmp_path / 'shards'}")
    for number in range(2):
        done = run_here(tmp_path / f"run{number}", *data, recipe=RECIPES / "index.toml")
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / f"run{number}" / "results.json").read_text())
        assert [Path(path).name for path in results["written"]] == (
            [] if number else ["train-000.tar.idx.npy", "train-001.tar.idx.npy"]
        )
    os.utime(tmp_path / "shards" / "train-001.tar", (1, 1))
    refused = run_here(tmp_path / "run2", *data, recipe=RECIPES / "index.toml")
    assert refused.returncode == 2
    assert "train-001.tar.idx.npy is there already" in refused.stderr
    done = run_here(tmp_path / "run3", *data, "replace=true", recipe=RECIPES / "index.toml")
    assert done.returncode == 0, done.stderr
    assert not indexed(tmp_path / "shards").notes()


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match="disk full"):
        write_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000.tar"]


def test_the_version_changes_with_times_and_options(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    dataset = indexed(tmp_path)
    assert indexed(tmp_path, background=(0, 0, 0)).version() != dataset.version()
    assert indexed(tmp_path, text="txt").version() != dataset.version()
    os.utime(tmp_path / "train-000.tar", (1, 1))
    assert indexed(tmp_path).digest() == dataset.digest()
    assert indexed(tmp_path).version() != dataset.version()


def test_it_pickles_while_shards_are_open(shards: Path) -> None:
    dataset = indexed(shards)
    assert gray(dataset[20]) == gray(pickle.loads(pickle.dumps(dataset))[20]) == 20


def test_many_shards_are_not_all_kept_open(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 80)
    dataset = indexed(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [gray(sample) for sample in dataset] == list(range(80))
    assert len(os.listdir("/proc/self/fd")) - before <= 64


# --------------------------------------------------------------------------- samples
def test_groups_are_those_of_webdataset(tmp_path: Path) -> None:
    image = picture(9)
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("./dir/a.JPG", image),
            ("dir/._a.cls", b"as a Mac's tar writes it"),
            ("dir/a.cls", b"1\n"),  # ./dir/a and dir/a are one
            ("other/a.jpg", image),
            ("other/a.cls", b"0"),
            ("v1.2/b.jpg", image),  # the first dot of the file name, not of the path
            ("v1.2/b.seg.png", picture(200, "png")),
            ("v1.2/b.cls", b"1"),
            ("__meta__", b"{}"),
            ("._hidden.jpg", b"no image"),
            ("noending", b"x"),
            ("only.json", b"{}"),
            ("dir/a.jpg", image),  # not with those of its key before
            ("dir/a.cls", b"2"),
        ],
    )
    dataset = indexed(shard)
    assert [dataset.name(index) for index in range(4)] == [
        "a.tar:dir/a.JPG",
        "a.tar:other/a.jpg",
        "a.tar:v1.2/b.jpg",
        "a.tar:dir/a.jpg",
    ]
    assert [sample.label for sample in dataset] == [1, 0, 1, 2]
    assert dataset.notes() == [
        "1 samples without an image passed over",
        "4 hidden or without an ending passed over",
    ]
    masks = indexed(shard, images=("seg.png", "jpg"))
    assert gray(masks[2]) == 200


def test_samples_that_lack_something_are_corrupt(tmp_path: Path) -> None:
    image = picture(1)
    write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", image),
            ("a.cls", b"0"),
            ("b.jpg", image),
            ("c.jpg", image),
            ("c.jpg", image),
            ("c.cls", b"0"),
            ("d.jpg", image[:100]),
            ("d.cls", b"0"),
            ("e.jpg", image),
            ("e.cls", b"dog"),
            ("f.jpg", image),
            ("f.cls", b"-1"),
            ("g.jpg", image + bytes(9000)),
            ("g.cls", b"0"),
        ],
    )
    with pytest.raises(DataError, match=r"1 of 7 labels are wrong: a\.tar:f\.jpg: label -1"):
        indexed(tmp_path)
    options: dict[str, Any] = {"label": None, "max_bytes": 9000}
    dataset = indexed(tmp_path, **options)
    complaints = {2: "two members 'jpg'", 3: "(?i)truncated", 6: "max_bytes = 9,000"}
    for index in range(7):
        if index not in complaints:
            assert gray(dataset[index]) == 1
            continue
        with pytest.raises(CorruptSampleError, match=complaints[index]) as caught:
            dataset[index]
        assert caught.value.name == dataset.name(index)
    mixed = [each for each, _ in first(stream(tmp_path, shuffle=0, **options), 7)]
    assert ["" if isinstance(each, Sample) else each.name for each in mixed] == [
        "",
        "",
        "a.tar:c.jpg",
        "a.tar:d.jpg",
        "",
        "",
        "a.tar:g.jpg",
    ]
    with pytest.raises(DataError, match=r"f\.jpg: label -1 is not in"):
        first(stream(tmp_path), 7)


def test_a_label_that_is_missing_is_corrupt(tmp_path: Path) -> None:
    image = picture(1)
    write_tar(tmp_path / "a.tar", [("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image)])
    dataset = indexed(tmp_path)
    assert dataset[0].label == 0
    with pytest.raises(CorruptSampleError, match=r"a\.tar:b\.jpg: .*no label: cls is missing"):
        dataset[1]
    found = [each for each, _ in first(stream(tmp_path, shuffle=0), 2)]
    assert isinstance(found[1], CorruptSampleError)


def test_what_the_first_sample_lacks_is_said_at_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.0001.jpg", picture(1)), ("a.0001.cls", b"0")])
    for build in (indexed, stream):
        with pytest.raises(DataError, match=r"no image in .*members end in 0001\.cls, 0001\.jpg"):
            build(tmp_path)
    write_tar(tmp_path / "a.tar", [("a.jpg", picture(1)), ("a.txt", b"0")])
    for build in (indexed, stream):
        with pytest.raises(
            DataError, match=r"label = .cls., but the first sample, a of .*jpg, txt"
        ):
            build(tmp_path, label="cls")
        with pytest.raises(DataError, match=r"no member json"):
            build(tmp_path, text="json:caption")
        with pytest.raises(DataError, match="classes are stated"):
            build(tmp_path, n_classes=3)


def test_many_members_of_one_key_are_names_with_dots(tmp_path: Path) -> None:
    members = [(f"frame.{number}.jpg", b"x") for number in range(300)]
    write_tar(tmp_path / "a.tar", [("a.jpg", picture(1)), *members])
    with pytest.raises(DataError, match="256 members have the key 'frame'"):
        indexed(tmp_path)
