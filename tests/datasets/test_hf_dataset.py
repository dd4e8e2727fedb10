"""Tables with images: folders of save_to_disk, and Parquet files."""

from __future__ import annotations

import builtins
import io
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_support import picture
from dinov3_datasets.hf_config import HfDatasetConfig
from dinov3_datasets.hf_dataset import HfDataset
from PIL import Image

from dinov3_framework import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

ROWS = 20


def hugging_face(rows: int = ROWS) -> Any:
    """A dataset of Hugging Face: JPEGs of gray values 0, 1, ... in two classes."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["dog", "cat"]),
        caption=datasets.Value("string"),
    )
    columns = {
        "image": [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(rows)],
        "label": [i % 2 for i in range(rows)],
        "caption": [f"number {i}" for i in range(rows)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``alone``, ``splits`` (train, test) of save_to_disk; ``parquet`` with two files."""
    place, data = tmp_path_factory.mktemp("hf"), hugging_face()
    datasets.disable_progress_bars()
    data.save_to_disk(str(place / "alone"), num_shards=3)
    datasets.DatasetDict(train=data, test=data.select([3, 1, 5])).save_to_disk(
        str(place / "splits")
    )
    (place / "parquet").mkdir()
    for number, rows in enumerate((range(12), range(12, ROWS))):
        path = place / "parquet" / f"train-{number:05}-of-00002.parquet"
        data.select(rows).to_parquet(str(path), batch_size=5)
    return place


def build(path: Path, channels: int = 3, **options: Any) -> HfDataset:
    return HfDataset(HfDatasetConfig(path=str(path), **options), channels=channels)


def grays(dataset: HfDataset) -> list[int]:
    return [int(sample.image[0, 0, 0]) for sample in dataset]


class TestFolder(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, folder: Path) -> None:
        self.config = HfDatasetConfig(path=str(folder / "alone"), text="caption")


class TestParquet(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, folder: Path) -> None:
        self.config = HfDatasetConfig(path=str(folder / "parquet"), text="caption", cache_bytes=1)


@pytest.mark.parametrize("kind", ["alone", "parquet"])
def test_rows_are_samples(folder: Path, kind: str) -> None:
    dataset = build(folder / kind, text="caption")
    assert grays(dataset) == list(range(ROWS))
    assert dataset[3].targets == {"label": 1, "text": "number 3"}
    assert dataset.classes == ("dog", "cat")
    assert f"{ROWS} images, 2 classes" in dataset.describe()
    first = {"alone": "alone:13", "parquet": "train-00001-of-00002.parquet:1"}
    assert dataset.name(13) == first[kind]
    assert build(folder / kind, label=None)[0].targets == {}


def test_splits_of_a_folder(folder: Path) -> None:
    assert grays(build(folder / "splits", split="test")) == [3, 1, 5]
    with pytest.raises(DataError, match="several splits, state split: train, test"):
        build(folder / "splits")
    with pytest.raises(DataError, match=r"no such split .* did you mean 'test'"):
        build(folder / "splits", split="tst")
    with pytest.raises(DataError, match="without splits"):
        build(folder / "alone", split="train")


def test_splits_of_parquet_files(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in (folder / "parquet").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    hugging_face(4).to_parquet(str(data / "test-00000-of-00001.parquet"))
    for place in (data, tmp_path):  # as the hub lays them out
        with pytest.raises(DataError, match="several splits, state split: test, train"):
            build(place)
        assert len(build(place, split="test")) == 4
        assert len(build(place, split="train")) == ROWS
        with pytest.raises(DataError, match="only test, train"):
            build(place, split="val")
    assert len(build(data / "train-*.parquet")) == ROWS
    assert len(build(data / "test-00000-of-00001.parquet")) == 4
    with pytest.raises(DataError, match="does not exist"):
        build(data / "none.parquet")


def write(path: Path, group: int = 100, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_plain_tables_need_no_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(i, "png") for i in range(6)]
    path = write(tmp_path / "a.parquet", 4, jpg=images, species=list("babbaa"), note=list("uvwxyz"))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    dataset = build(path, label="species", text="note")
    assert grays(dataset) == list(range(6))
    assert dataset.classes == ("a", "b")
    assert [sample.label for sample in dataset] == [1, 0, 1, 1, 0, 0]
    assert build(path, label="species", classes=("b", "a", "c"))[0].label == 0
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"needs datasets.*dinov3-framework\[hf\]"):
        build(tmp_path)


def test_numbers_are_labels(tmp_path: Path) -> None:
    images = [picture(i, "png") for i in range(3)]
    path = write(tmp_path / "a.parquet", image=images, label=[0, 4, 2])
    assert build(path).n_classes == 5
    with pytest.raises(DataError, match=r"1 of 3 labels are wrong: a\.parquet:1: label 4"):
        build(path, n_classes=3)
    path = write(tmp_path / "b.parquet", image=images, label=[0, None, -1])
    with pytest.raises(DataError, match=r'b\.parquet:2: label -1 .*\n.*label = "none"'):
        build(path)
    path = write(tmp_path / "b.parquet", image=images, label=[0, None, 1])
    with pytest.raises(CorruptSampleError, match=r"b\.parquet:1: has no label"):
        build(path)[1]


def test_columns_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    for key in ("image", "label", "text"):
        with pytest.raises(
            DataError, match=rf"{key} = 'x': .* columns are image \(struct.*\), label \(int64\)"
        ):
            build(folder / "alone", **{key: "x"})
    with pytest.raises(DataError, match="that column is string, images are encoded bytes"):
        build(folder / "parquet", image="caption")
    path = write(tmp_path / "a.parquet", one=[b"x"], two=[b"x"], weight=[0.5])
    with pytest.raises(DataError, match="several can be: one, two; state image"):
        build(path)
    with pytest.raises(DataError, match="that column is double, labels are whole numbers or names"):
        build(path, image="one", label="weight")
    with pytest.raises(DataError, match="no column image, and none can be"):
        build(write(tmp_path / "b.parquet", weight=[0.5]))


def test_rows_without_an_image_are_corrupt(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"bytes": picture(7), "path": None},
        {"bytes": None, "path": "/etc/passwd"},
        None,
        {"bytes": b"no image", "path": "x.jpg"},
    ]
    dataset = build(write(tmp_path / "a.parquet", image=pa.array(rows, kind)))
    assert int(dataset[0].image[0, 0, 0]) == 7
    for index, complaint in ((1, "holds only the path"), (2, "has no image"), (3, "identify")):
        with pytest.raises(CorruptSampleError, match=complaint) as caught:
            dataset[index]
        assert caught.value.name == f"a.parquet:{index}"


def test_wide_values_are_scaled_and_not_cut(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 1023, dtype=np.uint16)).save(stream, "PNG")
    dataset = build(write(tmp_path / "a.parquet", image=[stream.getvalue()]), channels=1, bits=10)
    assert dataset[0].image.unique().tolist() == [255]


def test_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(i, "png") for i in range(12)]
    path = write(tmp_path / "a.parquet", 3, image=images)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        read.append(group)
        return real(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert grays(build(path)) == list(range(12))
    assert read == [0, 1, 2, 3]
    read.clear()
    small = build(path, cache_bytes=1)
    assert [int(small[i].image.max()) for i in (0, 1, 11, 2)] == [0, 1, 11, 2]
    assert read == [0, 3, 0]
    size = len(pickle.dumps(small))
    assert size == len(pickle.dumps(build(path, cache_bytes=1)))


def test_damaged_tables(tmp_path: Path, folder: Path) -> None:
    images = [picture(i, "png") for i in range(12)]
    path = write(tmp_path / "a.parquet", 3, image=images)
    content = path.read_bytes()
    for damaged in (b"", content[:-100], b"hello" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is no sound Parquet file"):
            build(path)
    # Within a row group: it alone is lost.
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    dataset = build(path)
    with pytest.raises(CorruptSampleError, match=r"a\.parquet:1: its row group cannot be read"):
        dataset[1]
    assert int(dataset[5].image.max()) == 5
    with pytest.raises(DataError, match="no rows"):
        build(write(tmp_path / "b.parquet", image=pa.array([], pa.binary())))
    path.write_bytes(content)
    write(tmp_path / "b.parquet", other=images)
    with pytest.raises(DataError, match="has other columns than"):
        build(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for each in (folder / "alone").iterdir():
        (broken / each.name).write_bytes(each.read_bytes()[:40])
    with pytest.raises(DataError, match="broken cannot be read"):
        build(broken)


def test_offsets_that_lead_elsewhere_do_not_end_the_process(folder: Path, tmp_path: Path) -> None:
    """Arrow itself follows them, out of the mapped file."""
    place = tmp_path / "alone"
    place.mkdir()
    for path in (folder / "alone").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    first = next(place.glob("data-00000-*.arrow"))
    sizes = [len(picture(value)) for value in range(3)]
    offsets = np.cumsum([0, *sizes], dtype="<i4")
    content = first.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    damaged = offsets.copy()
    damaged[2] = 2**31 - 1
    first.write_bytes(content.replace(offsets.tobytes(), damaged.tobytes()))
    with pytest.raises(DataError, match="alone is damaged"):
        build(place)


def test_the_cost_of_large_row_groups_is_stated(tmp_path: Path) -> None:
    images = [picture(i, "png", (64, 64)) for i in range(30)]
    path = write(tmp_path / "a.parquet", 10, image=images)
    assert build(path).notes() == []
    [note] = build(path, cache_bytes=100).notes()
    assert "costs the reading of its row group, as a rule 10 rows" in note


@pytest.mark.parametrize("kind", ["alone", "parquet"])
def test_the_version_changes_with_the_files(folder: Path, kind: str, tmp_path: Path) -> None:
    place = tmp_path / kind
    place.mkdir()
    for path in (folder / kind).iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    dataset = build(place)
    assert dataset.digest() == build(folder / kind).digest()
    for path in itertools.chain(place.glob("*.arrow"), place.glob("*.parquet")):
        os.utime(path, (1, 1))
    assert build(place).digest() == dataset.digest()
    assert build(place).version() != dataset.version()
    assert build(place, bits=8).version() != dataset.version()
