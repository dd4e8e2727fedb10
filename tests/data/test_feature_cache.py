"""Features that are kept for other evaluations and other runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from classify_support import GRAY, Memory, gray_images, tiny
from process_groups import run_processes
from torch import Tensor

from dinov3_framework.contracts.data import Dataset, Sample, Target
from dinov3_framework.data.feature_cache import FeatureCache
from dinov3_framework.data.features import Features, extract_features


class Files(Memory):
    """Samples with a version, which a changed file changes."""

    state = "as they were"

    def version(self) -> str:
        return f"{self.digest()}, {self.state}"


def data(count: int = 7) -> Files:
    images = gray_images(count)
    images[2] = None
    return Files(images, [index % 3 for index in range(count)])


def extract(backbone: Any, dataset: Dataset, cache: FeatureCache, **options: Any) -> Features:
    known = {"images": GRAY, "size": None, "batch_size": 2, "cache": cache}
    return extract_features(backbone, dataset, **(known | options))


def same(one: Features, other: Features) -> bool:
    assert one.labels is not None
    assert other.labels is not None
    return (
        torch.equal(one.cls, other.cls)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.indices, other.indices)
        and (one.skipped, one.total) == (other.skipped, other.total)
    )


def test_one_cache_extracts_once() -> None:
    backbone, cache = tiny(), FeatureCache()
    first = extract(backbone, data(), cache)
    calls = len(backbone.calls)
    assert same(extract(backbone, data(), cache), first)
    assert len(backbone.calls) == calls
    extract(backbone, data(8), cache)
    assert len(backbone.calls) > calls, "other data are other features"


def test_a_folder_serves_later_runs(tmp_path: Path) -> None:
    first = extract(tiny(), data(), FeatureCache(tmp_path / "kept"))
    later = tiny()
    assert same(extract(later, data(), FeatureCache(tmp_path / "kept")), first)
    assert later.calls == []
    (place,) = (tmp_path / "kept").glob("*/*")
    content = json.loads((place / "features.json").read_text())
    assert content["skipped"] == 1
    assert content["data"] == "7 samples, as they were"


def test_what_states_no_version_is_not_taken_for_another(tmp_path: Path) -> None:
    """As many samples of the same class of dataset: a train and a test split, say."""
    backbone, cache = tiny(), FeatureCache(tmp_path)
    one, other = Memory(gray_images(5)), Memory(gray_images(5, seed=1))
    found = [extract(backbone, dataset, cache) for dataset in (one, other)]
    assert not torch.equal(found[0].cls, found[1].cls)
    calls = len(backbone.calls)
    assert torch.equal(extract(backbone, one, cache).cls, found[0].cls)
    assert len(backbone.calls) == calls, "the same object within a run"
    assert not list(tmp_path.iterdir())


def test_what_another_run_is_writing_is_let_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(tiny(), data(), FeatureCache(tmp_path))
    (place,) = tmp_path.glob("*/*")
    aside = place.with_name(".another.0123abcd")
    aside.mkdir()
    backbone = tiny()
    with caplog.at_level(logging.WARNING):
        extract(backbone, data(), FeatureCache(tmp_path))
    assert backbone.calls == []
    assert aside.is_dir()
    assert "cannot" not in caplog.text


@pytest.mark.parametrize("what", ["weights", "files", "size", "dtype", "classes"])
def test_what_changes_features_is_noticed(tmp_path: Path, what: str) -> None:
    extract(tiny(), data(), FeatureCache(tmp_path), size=4)
    backbone, dataset, options = tiny(seed=int(what == "weights")), data(), {"size": 4}
    if what == "files":
        dataset.state = "one written again"
    if what == "size":
        options = {"size": 4, "resize": 9}
    if what == "dtype":
        backbone = backbone.bfloat16()
    if what == "classes":
        dataset.targets = {"label": Target("class", classes=("a", "b", "c"))}
    extract(backbone, dataset, FeatureCache(tmp_path), **options)
    assert backbone.calls != []
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "content", "missing"])
def test_damaged_features_are_extracted_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = extract(tiny(), data(), FeatureCache(tmp_path))
    (place,) = tmp_path.glob("*/*")
    part = place / "00000.safetensors"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-8])
    elif damage == "content":
        (place / "features.json").write_text("{}")
    else:
        part.unlink()
    backbone = tiny()
    with caplog.at_level(logging.WARNING):
        assert same(extract(backbone, data(), FeatureCache(tmp_path)), first)
    assert backbone.calls != []
    assert "cannot read features" in caplog.text
    again = tiny()
    extract(again, data(), FeatureCache(tmp_path))
    assert again.calls == [], "they were written anew"


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = extract(tiny(), data(), FeatureCache(tmp_path / "file" / "kept"))
    assert len(found) == 6
    assert "cannot keep features" in caplog.text


class Tagged(Dataset):
    """Each image with any number of classes."""

    targets = MappingProxyType({"labels": Target("class", n_classes=4, per_object=True)})
    tags = ([0], [1, 3], [], [2])

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> Sample:
        image = gray_images(4)[index]
        assert image is not None
        return Sample(image, {"labels": torch.tensor(self.tags[index], dtype=torch.int64)})


def test_several_labels_of_an_image_are_a_row_of_marks() -> None:
    labels = extract(tiny(), Tagged(), FeatureCache()).labels
    assert isinstance(labels, Tensor)
    assert labels.dtype == torch.bool
    assert labels.long().tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]


# ---------------------------------------------------------------------------- processes
def shares(folder: str) -> dict[str, Any]:
    backbone = tiny()
    share = extract(backbone, data(), FeatureCache(Path(folder)), gather=False)
    whole = extract(backbone, data(), FeatureCache(Path(folder)))
    return {"indices": share.indices, "whole": whole.cls, "total": share.total, "n": len(share)}


@pytest.mark.slow
def test_processes_share_and_read_what_others_wrote(tmp_path: Path) -> None:
    alone = extract(tiny(), data(), FeatureCache())
    results = run_processes(2, tmp_path / "two", shares, str(tmp_path / "kept"))
    for result in results:
        torch.testing.assert_close(result["whole"], alone.cls)
        assert result["total"] == 6
        assert 0 < result["n"] < 6
    indices = torch.cat([result["indices"] for result in results]).sort().values
    assert indices.tolist() == [0, 1, 3, 4, 5, 6], "each sample once"
    one = tiny()
    again = extract(one, data(), FeatureCache(tmp_path / "kept"))
    assert one.calls == []
    assert torch.equal(again.cls, results[0]["whole"])
    three = run_processes(3, tmp_path / "three", shares, str(tmp_path / "kept"))
    assert sum(result["n"] for result in three) == 6
    assert all(torch.equal(result["whole"], again.cls) for result in three)
