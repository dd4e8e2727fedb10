"""The evaluation ``knn``: which images it looks at, what it is worth, what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from classify_processes import measure_knn
from classify_support import GRAY, ClustersConfig, knn, registry, tiny
from dinov3_classify.configs import KnnConfig
from dinov3_classify.knn_evaluation import KnnEvaluation

from dinov3_framework import Model
from dinov3_framework.configs import InvalidOption
from dinov3_framework.data import workers as loader_workers
from dinov3_framework.errors import DataError, RecipeError
from dinov3_framework.testing import EvaluationSuite
from dinov3_framework.testing.toy_backbone import ToyBackbone


class TestContract(EvaluationSuite):
    config = knn()
    registry = registry()
    images = GRAY

    @property
    def model(self) -> Model:  # type: ignore[override]
        return Model(tiny(1).eval(), GRAY)


def evaluation(**options: Any) -> KnnEvaluation:
    made = KnnEvaluation(knn(**options))
    made.prepare(registry().build, GRAY)
    return made


@pytest.mark.parametrize(("limit", "names"), [(0, []), (1, ["raw pixels"])])
def test_raw_pixels_have_a_limit(limit: int, names: list[str]) -> None:
    assert list(evaluation(raw_pixels_limit=limit).baselines(Model(tiny(1), GRAY))) == names


def test_a_size_of_its_own_comes_before_that_of_the_training() -> None:
    small, seen = tiny(1, size=2), []
    small.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert evaluation().run(Model(small, GRAY, size=2))["knn@1"] > 25
    assert evaluation(size=2).run(Model(small, GRAY, size=4))["knn@1"] > 25
    assert set(seen) == {2}
    as_they_are = evaluation().protocol(Model(tiny(1), GRAY))
    assert as_they_are["size"] == "as they are"


def test_images_that_cannot_be_read_are_in_the_protocol() -> None:
    made = evaluation()
    test = made.data_sets.tests[""]
    read = type(test).__getitem__
    from dinov3_framework import CorruptSampleError

    class Broken(type(test)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise CorruptSampleError("3", "broken on purpose")
            return read(self, index)

    test.__class__ = Broken
    model = Model(tiny(1), GRAY)
    made.run(model)
    assert made.protocol(model)["unreadable in test"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (1, 41)}, "k: 41 neighbors are asked for, the training set has 40 images: clusters"),
        (
            {"train": ClustersConfig(labeled=False)},
            "train: needs labels, one of each image; clusters",
        ),
        ({"test": ClustersConfig(labeled=False)}, "test: needs labels of known classes; clusters"),
        ({"test": ClustersConfig(names=("a", "b", "c", "e"))}, "d, e in one of them only"),
        ({"test": ClustersConfig(names=("b", "a", "c", "d"))}, "in another order"),
        ({"tests": {"v2": ClustersConfig(labeled=False)}}, "tests.v2: needs labels"),
        ({"k": (5,), "n_per_class": (1,)}, "n_per_class: 1 images of each of 4 classes are fewer"),
    ],
)
def test_datasets_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluation(**options)


def test_a_size_that_is_no_multiple_of_the_patch() -> None:
    problems = evaluation(size=5).problems(Model(tiny(), GRAY))
    assert [str(problem.where) for problem in problems] == ["size"]
    assert "take 4 or 6" in str(problems[0])
    assert not evaluation(size=6).problems(Model(tiny(), GRAY))


def test_batches_that_do_not_fit_into_shared_memory_are_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_workers, "free_shared_memory", lambda: 1000)
    model = Model(tiny(), GRAY, size=8)
    assert not evaluation(workers=1, batch_size=15).problems(model)
    with pytest.raises(DataError, match="worker memory: 1 batches"):
        evaluation(workers=1, batch_size=16).problems(model)


@pytest.mark.parametrize("k", [(), (0,), (-3, 5), (5, 5)])
def test_numbers_of_neighbors_that_make_no_sense(k: tuple[int, ...]) -> None:
    with pytest.raises(InvalidOption, match="k: must be different numbers above 0"):
        KnnConfig(train=ClustersConfig(), test=ClustersConfig(), k=k)


def test_metrics_are_rounded_percentages() -> None:
    metrics = evaluation(test=ClustersConfig(count=7, seed=1)).run(Model(tiny(1), GRAY))
    assert set(metrics) == {"knn@1", "knn@5"}
    for value in metrics.values():
        assert value == round(100 * round(value / 100 * 7) / 7, 4)
    assert torch.tensor(list(metrics.values())).le(100).all()


# --------------------------------------------------------------------------- few-shot, several sets
def test_few_shots_and_several_test_sets() -> None:
    found = measure_knn()
    ends = ["", "/class_mean", "/1-shot", "/1-shot/deviation", "/2-shot", "/2-shot/deviation"]
    ends += ["/50%", "/50%/deviation"]
    names = {f"{test}knn@1{end}" for test in ("", "v2/") for end in ends}
    # Of five neighbors there is none among four images.
    names |= {name.replace("@1", "@5") for name in names if "1-shot" not in name}
    assert found["metrics"].keys() == names
    assert found["metrics"]["knn@1"] >= found["metrics"]["knn@1/1-shot"]
    assert np.sum(found["arrays"]["confusion"]) == 80
    assert np.sum(found["arrays"]["v2_confusion"]) == 11
    assert {name for name in names if "deviation" not in name} == found["intervals"].keys()


def test_the_seed_decides_on_draws() -> None:
    first, again, other = measure_knn(), measure_knn(), measure_knn(seed=1)
    assert first["metrics"] == again["metrics"]
    assert first["metrics"]["knn@1"] == other["metrics"]["knn@1"]
    assert first["metrics"]["knn@1/1-shot/deviation"] != other["metrics"]["knn@1/1-shot/deviation"]


def test_images_of_several_classes() -> None:
    single, several = (
        evaluation(test=ClustersConfig(count=20, seed=1, noise=150.0, several=each))
        for each in (False, True)
    )
    model = Model(tiny(1), GRAY)
    right, any_right = single.run(model)["knn@1"], several.run(model)["knn@1"]
    assert right < any_right  # each image has the next class, too
    assert "confusion" not in several.details().arrays


def test_features_of_patches() -> None:
    both = evaluation(features="both", raw_pixels_limit=0)
    model = Model(ToyBackbone(1).eval(), GRAY, size=8)
    assert both.run(model).keys() == {"knn@1", "knn@5"}
    assert both.protocol(model)["features"] == "both"


def test_test_classes_that_training_lacks_are_an_error() -> None:
    with pytest.raises(DataError, match="classes of test images that no training image has: d"):
        evaluation(train=ClustersConfig(count=3), k=(1,)).run(Model(tiny(1), GRAY))
