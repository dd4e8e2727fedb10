"""Shards of WebDataset as streams: what is promised of orders, parts and resuming."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from archive_support import (
    first,
    gray,
    stream,
    write_shards,
    write_tar,
)
from dinov3_datasets.webdataset_config import WebDatasetConfig

from dinov3_framework import DataError
from dinov3_framework.testing import StreamDatasetSuite


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, nine and five samples, each of a gray value of its own."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [7, 9, 5])
    return folder


class TestStream(StreamDatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, shards: Path) -> None:
        self.config = WebDatasetConfig(shards=str(shards), mode="stream", text="txt", shuffle=4)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shuffle", [0, 1, 4, 100])
def test_parts_cover_an_epoch_exactly(shards: Path, parts: int, shuffle: int) -> None:
    dataset, epochs = stream(shards, shuffle=shuffle), 3
    seen = [Counter[int]() for _ in range(epochs)]
    for part in range(parts):
        for sample, state in dataset.open(part=part, parts=parts, seed=3):
            epoch = state["place"]["epoch"]
            if epoch >= epochs:
                break
            seen[epoch][gray(sample)] += 1
    assert [dict(each) for each in seen] == [dict.fromkeys(range(21), 1)] * epochs


def test_orders_differ_by_epoch_seed_and_mixing(shards: Path) -> None:
    def order(count: int, seed: int = 3, **options: Any) -> list[int]:
        samples = stream(shards, **options).open(part=0, parts=1, seed=seed)
        return [gray(sample) for sample, _ in itertools.islice(samples, count)]

    whole = order(42)
    assert whole == order(42)
    assert sorted(whole[:21]) == sorted(whole[21:]) == list(range(21))
    assert whole[:21] != whole[21:]
    assert whole[:21] != order(21, seed=4)
    kept = order(10 * 21, shuffle=0)
    epochs = {tuple(kept[start : start + 21]) for start in range(0, len(kept), 21)}
    runs = itertools.permutations([range(7), range(7, 16), range(16, 21)])
    assert epochs <= {tuple(itertools.chain(*each)) for each in runs}
    assert len(epochs) > 2


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_stream_goes_on_from_every_state(shards: Path, parts: int) -> None:
    dataset = stream(shards, shuffle=4, text="json:name")
    part = parts - 1
    whole = first(dataset, 30, part, parts)
    for place in range(24):
        state = json.loads(json.dumps(whole[place][1]))
        assert len(json.dumps(state)) < 200
        found, expected = first(dataset, 4, part, parts, state=state), whole[place + 1 : place + 5]
        assert [(gray(each), after) for each, after in found] == [
            (gray(each), after) for each, after in expected
        ]


def test_states_of_other_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [7, 9, 15])
    [*_, (_, state)] = first(stream(shards), 3)
    with pytest.raises(DataError, match="shards are not those that this run has read from"):
        first(stream(tmp_path), 1, state=state)


def test_more_parts_than_samples_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    assert len(first(stream(tmp_path), 9, part=1, parts=2)) == 9
    with pytest.raises(DataError, match="too few samples for 5 parts"):
        first(stream(tmp_path), 1, part=4, parts=5)


def test_data_that_cannot_be_decoded_end_a_stream(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"no image"), ("b.jpg", b"no image")])
    with pytest.raises(DataError, match="1,000 samples in a row could not be decoded"):
        first(stream(tmp_path), 5000)


def test_a_stream_says_what_it_promises(shards: Path) -> None:
    text = stream(shards, n_classes=3).describe()
    for part in ("3 shards", "3 classes", "each sample once an epoch", "processes x loader"):
        assert part in text
