"""Parts of a dataset: which samples, which labels, what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from composed_support import GraysConfig, build, grays, registry
from dinov3_datasets.composed_configs import SubsetConfig

from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import CorruptSampleError, DataError, RecipeError
from dinov3_framework.testing import DatasetSuite


def subset(of: dict[str, Any] | None = None, **options: Any) -> Any:
    return build("subset", of=of or grays(count=20, label_count=4), **options)


def taken(dataset: Any) -> list[int]:
    """The indices in the whole, told by the gray of the images."""
    return [int(dataset[index].image[0, 0, 0]) for index in range(len(dataset))]


def test_the_first_keep_labels_names_and_targets() -> None:
    dataset = subset(first=3)
    assert taken(dataset) == [0, 1, 2]
    assert [dataset.label(index) for index in range(3)] == [0, 1, 2]
    assert [dataset[index].label for index in range(3)] == [0, 1, 2]
    assert dataset.name(2) == "folder0/image2"
    assert dataset.classes == ("a", "b", "c", "d")
    assert len(list(dataset)) == 3  # ends by IndexError
    assert "subset of 3 images (the first 3) of " in dataset.describe()


def test_so_many_of_each_class_without_reading_an_image() -> None:
    dataset = subset(per_class=2)
    assert dataset.whole.reads == 0
    found = taken(dataset)
    assert found == sorted(found)
    assert Counter(index % 4 for index in found) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert found == taken(subset(per_class=2))
    assert found != taken(subset(per_class=2, seed=1))


@pytest.mark.parametrize(
    ("key", "values"), [("per_class", (1, 2, 4, 5)), ("percent", (1.0, 30.0, 60.0, 100.0))]
)
def test_more_of_the_same_seed_holds_less(key: str, values: tuple[Any, ...]) -> None:
    parts = [set(taken(subset(**{key: value}))) for value in values]
    assert all(less < more for less, more in pairwise(parts))
    assert parts[-1] == set(range(20))


def test_percent_is_of_each_class_and_at_least_one() -> None:
    found = taken(subset(percent=41.0))
    assert Counter(index % 4 for index in found) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert len(taken(subset(percent=0.5))) == 4
    unlabeled = grays(count=20, label_count=0)
    assert len(taken(subset(unlabeled, percent=41.0))) == 8


def test_classes_select_and_labels_stay() -> None:
    dataset = subset(classes=["d", "b"])
    assert taken(dataset) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert {dataset[index].label for index in range(10)} == {1, 3}
    assert dataset.n_classes == 4
    assert Counter(index % 4 for index in taken(subset(classes=["d"], per_class=3))) == {3: 3}


def test_samples_without_a_label_are_of_no_class() -> None:
    of = grays(count=20, label_count=4, unlabeled=6)
    assert 6 not in taken(subset(of, percent=100.0))
    assert 6 in taken(subset(of, first=7))
    with pytest.raises(DataError, match=r"fewer images: c \(4\)"):
        subset(of, per_class=5)


def test_a_file_lists_names_short_names_and_numbers(tmp_path: Path) -> None:
    listing = tmp_path / "some.txt"
    listing.write_text("folder0/image4\r\n\nimage3\n 17 \nimage3\n")
    dataset = subset(indices_file=str(listing))
    assert taken(dataset) == [3, 4, 17]
    assert dataset.whole.reads == 3
    assert taken(subset(indices_file=str(listing), first=2)) == [3, 4]
    listing.write_text("image3\n20\nfolder1/image4\n-1\n")
    with pytest.raises(DataError, match=r"3 of 4 lines of .* are no sample") as error:
        subset(indices_file=str(listing))
    assert "it has 20 samples, called like 'folder0/image0'" in str(error.value)
    listing.write_text("\n")
    with pytest.raises(DataError, match="lists nothing"):
        subset(indices_file=str(listing))
    with pytest.raises(DataError, match=r"cannot read indices_file .*No such file"):
        subset(indices_file=str(tmp_path / "none.txt"))


def test_digest_and_version_are_of_the_choice_and_the_whole() -> None:
    datasets = [
        subset(first=4),
        subset(first=5),
        subset(per_class=1),
        subset(per_class=1, seed=1),
        subset(grays(count=21, label_count=4), first=4),
    ]
    assert len({each.digest() for each in datasets}) == 5
    assert len({each.version() for each in datasets}) == 5
    assert subset(first=4).digest() == datasets[0].digest()
    assert subset(grays(versioned=False), first=4).version() is None


def test_corrupt_samples_stay_corrupt() -> None:
    dataset = subset(grays(corrupt=3), first=4)
    with pytest.raises(CorruptSampleError, match="image 3: broken"):
        dataset[3]


def test_subsets_of_subsets() -> None:
    inner = {"use": "subset", "of": grays(count=20), "percent": 50.0}
    dataset = subset(inner, first=2)
    assert taken(dataset) == taken(subset(grays(count=20), percent=50.0))[:2]


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        (grays(count=7, label_count=4), {"per_class": 2}, r"1 classes have fewer images: d \(1\)"),
        (grays(label_count=4, named=False), {"per_class": 4}, r"4 classes .*: 0 \(3\), 1 \(3\)"),
        (
            grays(label_count=0),
            {"per_class": 2},
            "per_class needs labels; Grays, 10 images has none",
        ),
        (grays(), {"classes": ["b", "aa"]}, "no class is named 'aa'; did you mean 'a'"),
        (grays(named=False), {"classes": ["a"]}, "needs names of classes, the dataset has none"),
        (grays(), {"first": 11}, "first = 11, there are 10 images"),
        ({"use": "counts"}, {"first": 1}, "needs a dataset with an index; counts without end"),
    ],
)
def test_what_cannot_be_taken(of: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        subset(of, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what is taken"),
        ({"first": 1, "percent": 2.0}, "percent: goes in place of first"),
        ({"percent": 0.0}, "above 0"),
        ({"per_class": 0}, "above 0"),
        ({"classes": ()}, "at least one class"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        SubsetConfig(of=GraysConfig(), **options)


def test_a_mistake_in_the_whole_has_its_place() -> None:
    with pytest.raises(RecipeError, match=r"of\.cuont: unknown key"):
        subset({"use": "grays", "cuont": 3}, first=1)


class TestSubset(DatasetSuite):
    config = SubsetConfig(of=GraysConfig(corrupt=4), percent=80.0)
    registry = registry()
