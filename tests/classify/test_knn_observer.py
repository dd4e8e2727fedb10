"""k-NN while training: when it looks at what, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from classify_support import ClustersConfig, FakeRun, tiny
from dinov3_classify.configs import KnnConfig
from dinov3_classify.observer import KnnObserver

from dinov3_framework.contracts.running import StepRecord
from dinov3_framework.errors import RecipeError


def observer(**options: Any) -> KnnObserver:
    given = {"train": ClustersConfig(count=40), "test": ClustersConfig(count=20, seed=1)}
    return KnnObserver(KnnConfig(**{**given, "k": (1, 5), **options}))


def blind() -> Any:
    """A backbone that sees the same in every image."""
    backbone = tiny()
    backbone.linear.weight.data.fill_(1e-9)
    return backbone


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path, teacher=tiny(1), initial=blind())


def test_it_looks_before_the_first_step_and_not_when_resuming(run: FakeRun) -> None:
    metrics = observer().on_start(run, 0)
    assert metrics is not None
    assert list(metrics) == ["knn@1", "knn@5"]
    assert run.teacher.calls
    run.teacher.calls.clear()
    resumed = observer()
    assert resumed.on_start(run, 2) is None
    assert not run.teacher.calls
    assert run.built == 4  # yet a dataset that is not there would have been noticed


def test_the_teacher_is_evaluated_as_it_is_at_each_step(run: FakeRun) -> None:
    watching = observer()
    assert watching.on_start(run, 0)["knn@1"] > 80
    run.teacher = blind()
    assert watching.on_step(run, StepRecord(2, {}))["knn@1"] < 60
    run.teacher = tiny(1)
    assert watching.on_step(run, StepRecord(4, {}))["knn@1"] > 80
    assert run.built == 2  # datasets are built once


def test_the_end_compares_pixels_start_and_teacher(run: FakeRun) -> None:
    watching = observer()
    watching.on_start(run, 0)
    last = watching.on_step(run, StepRecord(4, {}))
    run.teacher.calls.clear()
    rows = watching.on_end(run)["knn"]
    assert not run.teacher.calls  # the last step has just been evaluated
    assert [row["features"] for row in rows] == [
        "raw pixels",
        "backbone before training",
        "trained teacher",
    ]
    assert all(list(row) == ["features", "knn@1", "knn@5"] for row in rows)
    assert rows[2]["knn@1"] == round(last["knn@1"], 1)
    assert rows[1]["knn@1"] < 60 < rows[2]["knn@1"]
    assert rows[0]["knn@1"] > 80


def test_the_end_of_a_run_that_was_resumed_after_its_last_step(run: FakeRun) -> None:
    watching = observer()
    watching.on_start(run, 4)
    assert watching.on_end(run)["knn"][2]["knn@1"] > 80


@pytest.mark.parametrize(("limit", "rows"), [(0, 2), (1, 3)])
def test_raw_pixels_have_a_limit(run: FakeRun, limit: int, rows: int) -> None:
    assert len(observer(raw_pixels_limit=limit).on_end(run)["knn"]) == rows


def test_images_may_be_resized(run: FakeRun) -> None:
    run.teacher = tiny(1, size=2)
    metrics = observer(size=2).on_start(run, 0)
    assert metrics is not None
    assert metrics["knn@1"] > 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (1, 41)}, "41 neighbours are asked for, the training set has 40 images: clusters"),
        ({"train": ClustersConfig(labelled=False)}, "train: k-NN needs labels; clusters"),
        ({"test": ClustersConfig(labelled=False)}, "test: k-NN needs labels"),
        ({"test": ClustersConfig(names=("a", "b", "c", "e"))}, "d, e in one of them only"),
        ({"test": ClustersConfig(names=("b", "a", "c", "d"))}, "in another order"),
    ],
)
def test_datasets_that_do_not_fit_fail_at_the_start(
    run: FakeRun, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        observer(**options).on_start(run, 3)
