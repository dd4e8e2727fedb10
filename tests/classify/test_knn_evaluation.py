"""The evaluation ``knn``: which images it looks at, what it is worth, what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from classify_support import GRAY, ClustersConfig, knn, registry, tiny
from dinov3_classify.configs import KnnConfig
from dinov3_classify.evaluation import KnnEvaluation

from dinov3_framework import Model
from dinov3_framework.configs import InvalidOption
from dinov3_framework.data import workers as loader_workers
from dinov3_framework.errors import DataError, RecipeError
from dinov3_framework.testing import EvaluationSuite


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
    made.test.images = made.test.images.clone()
    read = type(made.test).__getitem__
    from dinov3_framework import CorruptSampleError

    class Broken(type(made.test)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise CorruptSampleError("3", "broken on purpose")
            return read(self, index)

    made.test.__class__ = Broken
    model = Model(tiny(1), GRAY)
    made.run(model)
    assert made.protocol(model)["unreadable in test"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (1, 41)}, "k: 41 neighbors are asked for, the training set has 40 images: clusters"),
        ({"train": ClustersConfig(labeled=False)}, "train: k-NN needs labels; clusters"),
        ({"test": ClustersConfig(labeled=False)}, "test: k-NN needs labels"),
        ({"test": ClustersConfig(names=("a", "b", "c", "e"))}, "d, e in one of them only"),
        ({"test": ClustersConfig(names=("b", "a", "c", "d"))}, "in another order"),
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
