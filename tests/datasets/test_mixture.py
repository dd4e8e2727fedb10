"""Several datasets as one: shares, laps, targets, streams that go on."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from composed_support import CountsConfig, GraysConfig, build, grays, registry
from dinov3_datasets.composed_configs import MixtureConfig

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.testing import DatasetSuite, StreamDatasetSuite

LIGHT, DARK = grays(count=30, shade=100), grays(count=10)


def mixture(**options: Any) -> Any:
    return build("mixture", **{"parts": {"light": LIGHT, "dark": DARK}, **options})


def levels(dataset: Any) -> list[int]:
    return [int(dataset[index].image[0, 0, 0]) for index in range(len(dataset))]


# --------------------------------------------------------------------------- with an index
def test_by_size_every_sample_comes_once() -> None:
    dataset = mixture()
    found = levels(dataset)
    assert sorted(found) == [*range(10), *range(100, 130)]
    assert found != sorted(found)
    assert found == levels(mixture())
    assert found != levels(mixture(seed=1))


@pytest.mark.parametrize("weights", [{"light": 1.0, "dark": 1.0}, {"light": 2.0, "dark": 7.5}])
def test_weights_are_the_shares_of_every_stretch(weights: dict[str, float]) -> None:
    dataset = mixture(weights=weights)
    share = weights["dark"] / sum(weights.values())
    is_dark = [level < 100 for level in levels(dataset)]
    for start in range(0, len(is_dark), 7):
        for stop in range(start + 1, len(is_dark) + 1, 5):
            assert abs(sum(is_dark[start:stop]) - share * (stop - start)) < 1.5


def test_the_part_with_the_highest_need_is_seen_once() -> None:
    dataset = mixture(weights={"light": 1.0, "dark": 1.0})
    found = levels(dataset)
    assert len(found) == 60
    light = [level for level in found if level >= 100]
    dark = [level for level in found if level < 100]
    assert sorted(light) == list(range(100, 130))
    laps = [dark[:10], dark[10:20], dark[20:]]
    assert all(sorted(lap) == list(range(10)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 3  # each in another order
    assert "seen in them: light 1 times, dark 3 times" in dataset.describe()


def test_a_length_may_be_stated() -> None:
    dataset = mixture(weights={"light": 1.0, "dark": 3.0}, length=8)
    assert len(dataset) == 8
    assert sum(level < 100 for level in levels(dataset)) == 6
    assert "dark 0.6 times" in dataset.describe()
    assert "light 0.25 (" in dataset.describe()


def test_many_parts_have_their_shares_at_once() -> None:
    weights = {"a": 5.0, "b": 1.0, "c": 3.0, "d": 0.3}
    parts = {name: grays(count=9, shade=20 * n) for n, name in enumerate(weights)}
    dataset = mixture(parts=parts, weights=weights, length=930)
    names = [dataset.place(index)[0] for index in range(930)]
    assert Counter(names) == {"a": 500, "b": 100, "c": 300, "d": 30}
    for stop in range(31, 930, 31):
        counts = Counter(names[:stop])
        for name, weight in weights.items():
            assert abs(counts[name] - weight / 9.3 * stop) < 2


def test_samples_keep_names_labels_and_the_part_of_what_is_corrupt() -> None:
    parts = {"light": LIGHT, "dark": grays(count=10, corrupt=3)}
    dataset = mixture(parts=parts)
    seen = 0
    for index in range(len(dataset)):
        name, own = dataset.place(index)
        assert dataset.name(index) == f"{name}/folder{own % 2}/image{own}"
        assert dataset.label(index) == own % 2
        if (name, own) == ("dark", 3):
            seen += 1
            with pytest.raises(CorruptSampleError, match="dark: image 3: broken"):
                dataset[index]
        else:
            assert dataset[index].label == own % 2
    assert seen == 1
    assert len(list(mixture())) == 40  # ends by IndexError


def test_targets_that_differ_are_left_out_or_refused() -> None:
    parts = {"two": grays(count=4), "three": grays(count=4, label_count=3)}
    dataset = mixture(parts=parts)
    assert dataset.targets == {}
    assert dataset[0].targets == {}
    assert dataset.label(0) is None
    assert "left out, as parts differ in it: label" in dataset.describe()
    with pytest.raises(DataError, match=r"differ in label: two has label \(class, 2 classes\)"):
        mixture(parts=parts, targets="same")
    assert mixture(targets="same").classes == ("a", "b")


def test_digest_and_version_are_those_of_the_parts() -> None:
    datasets = [
        mixture(),
        mixture(seed=1),
        mixture(weights={"light": 1.0, "dark": 1.0}),
        mixture(parts={"light": LIGHT, "dark": grays(count=11)}),
        mixture(parts={"dark": DARK, "light": LIGHT}),
    ]
    assert len({each.digest() for each in datasets}) == 5
    assert len({each.version() for each in datasets}) == 5
    assert mixture(parts={"light": LIGHT, "dark": grays(versioned=False)}).version() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {}}, "at least one dataset"),
        ({"weights": {"light": 1.0}}, "of dark is missing"),
        ({"weights": {"light": 1.0, "dark": 1.0, "odd": 1.0}}, "there is no part odd"),
        ({"weights": {"light": 0.0, "dark": 1.0}}, "above 0 and finite, not those of light"),
        ({"length": 0}, "above 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    parts = {"light": GraysConfig(), "dark": GraysConfig()}
    with pytest.raises(InvalidOption, match=message):
        MixtureConfig(**{"parts": parts, **options})


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="the part 'dark' has no samples"):
        mixture(parts={"light": LIGHT, "dark": grays(count=0)})
    with pytest.raises(DataError, match=r"state weights; .* \(dark\)"):
        mixture(parts={"light": LIGHT, "dark": {"use": "counts"}})
    with pytest.raises(DataError, match="3e\\+19 samples long"):
        mixture(weights={"light": 1e-18, "dark": 1.0})


class TestMixture(DatasetSuite):
    config = MixtureConfig(
        parts={"a": GraysConfig(corrupt=4), "b": GraysConfig(count=3, shade=50)},
        weights={"a": 2.0, "b": 1.0},
    )
    registry = registry()


# --------------------------------------------------------------------------- streams
STREAM = {
    "parts": {"dark": DARK, "counts": {"use": "counts", "depth": True}},
    "weights": {"dark": 1.0, "counts": 3.0},
}


def first(dataset: Any, count: int, part: int = 0, parts: int = 2, state: Any = None) -> list[Any]:
    opened = dataset.open(part=part, parts=parts, seed=3, state=state)
    return list(itertools.islice(opened, count))


def level(found: Any) -> int:
    return 107 if isinstance(found, CorruptSampleError) else int(found.image[0, 0, 0])


def test_a_stream_has_the_shares_and_only_common_targets() -> None:
    dataset = mixture(**STREAM)
    found = [each for each, _ in first(dataset, 400)]
    dark = [level(each) for each in found if level(each) < 100]
    assert 70 < len(dark) < 130
    assert set(dataset.targets) == {"label"}
    assert all(
        each.targets.keys() == {"label"}
        for each in found
        if not isinstance(each, CorruptSampleError)
    )
    assert "left out, as parts differ in it: size" in dataset.describe()


def test_parts_of_a_stream_share_out_what_has_an_index() -> None:
    dataset = mixture(**STREAM)
    dark = [
        [level(each) for each, _ in first(dataset, 200, part) if level(each) < 100]
        for part in (0, 1)
    ]
    # A pass over ten images gives five to each of two parts, and begins anew in another order.
    for lap in range(3):
        of_both = [each[5 * lap : 5 * lap + 5] for each in dark]
        assert sorted(of_both[0] + of_both[1]) == list(range(10))
    assert dark[0][:5] != dark[0][5:10]


def test_a_stream_goes_on_where_it_was() -> None:
    dataset = mixture(**STREAM)
    whole = first(dataset, 60)
    for stop in (1, 17, 40):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        rest = first(mixture(**STREAM), 60 - stop, state=state)
        assert [level(each) for each, _ in rest] == [level(each) for each, _ in whole[stop:]]


def test_corrupt_samples_of_streams_name_their_part() -> None:
    errors = [
        each
        for each, _ in first(mixture(**STREAM), 60, part=1)
        if isinstance(each, CorruptSampleError)
    ]
    assert {str(each) for each in errors} == {"counts: number 107: broken"}
    parts = {"dark": grays(count=2, corrupt=0), "counts": {"use": "counts"}}
    found = first(mixture(parts=parts, weights=STREAM["weights"]), 60, parts=1)
    assert "dark: image 0: broken" in {str(each) for each, _ in found}


def test_a_length_is_nothing_for_a_stream() -> None:
    with pytest.raises(DataError, match="counts is a stream"):
        mixture(**STREAM, length=8)


def test_images_are_of_the_channels_asked_for() -> None:
    found, _ = first(build("mixture", channels=1, **STREAM), 1)[0]
    assert found.image.shape == (1, 2, 2)
    assert found.image.dtype == torch.uint8


class TestMixtureStream(StreamDatasetSuite):
    config = MixtureConfig(
        parts={"a": GraysConfig(corrupt=4), "b": CountsConfig()}, weights={"a": 1.0, "b": 1.0}
    )
    registry = registry()
