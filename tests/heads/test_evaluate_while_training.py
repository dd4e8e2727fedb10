"""Evaluations while training: when they look at what, and what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from classify_support import GRAY, ClustersConfig, FakeRun, knn, registry, tiny
from dinov3_heads import EvaluateWhileTrainingConfig
from dinov3_heads.observer import EvaluateWhileTraining

from dinov3_framework import DataError, Model
from dinov3_framework.contracts.running import StepRecord
from dinov3_framework.errors import RecipeError
from dinov3_framework.runtime.results import Record


def observer(**evaluations: Any) -> EvaluateWhileTraining:
    given = evaluations or {"knn": knn()}
    return EvaluateWhileTraining(EvaluateWhileTrainingConfig(evaluations=given))


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
    built = run.built
    resumed = observer()
    assert resumed.on_start(run, 2) is None
    assert not run.teacher.calls
    assert run.built > built  # yet a dataset that is not there would have been noticed


def test_the_model_is_evaluated_as_it_is_at_each_step(run: FakeRun) -> None:
    watching = observer()
    assert watching.on_start(run, 0)["knn@1"] > 80
    built = run.built
    run.teacher = blind()
    assert watching.on_step(run, StepRecord(2, {}))["knn@1"] < 60
    run.teacher = tiny(1)
    assert watching.on_step(run, StepRecord(4, {}))["knn@1"] > 80
    assert run.built == built  # datasets are built once


def test_the_end_compares_baselines_start_and_end(run: FakeRun) -> None:
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


def test_records_keep_all_that_changes_what_a_number_means(run: FakeRun) -> None:
    records = observer().on_end(run)["records"]["knn"]
    assert all(isinstance(record, Record) for record in records)
    of = {(record.model, record.metric): record for record in records}
    assert len(of) == 6
    trained, before = of["trained teacher", "knn@5"], of["backbone before training", "knn@5"]
    assert trained.protocol["temperature"] == 0.07
    assert trained.data.startswith("clusters, 40 images")
    assert trained.seed == 3
    assert len(trained.weights) == 16
    assert trained.weights != before.weights
    assert of["raw pixels", "knn@5"].weights == ""


def test_the_end_of_a_run_that_was_resumed_after_its_last_step(run: FakeRun) -> None:
    watching = observer()
    watching.on_start(run, 4)
    assert watching.on_end(run)["knn"][2]["knn@1"] > 80


def test_several_evaluations_have_their_names_before_their_metrics(run: FakeRun) -> None:
    watching = observer(near=knn(k=(1,)), far=knn(k=(1, 9)))
    assert list(watching.on_start(run, 0)) == ["near/knn@1", "far/knn@1", "far/knn@9"]
    results = watching.on_end(run)
    assert list(results["far"][0]) == ["features", "knn@1", "knn@9"]
    assert list(results["records"]) == ["near", "far"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (1, 41)}, r"evaluations.knn.k: 41 neighbors are asked for, the training set has 40"),
        (
            {"train": ClustersConfig(labeled=False)},
            "knn.train: needs labels, one of each image; clusters",
        ),
        ({"test": ClustersConfig(names=("a", "b", "c", "e"))}, "d, e in one of them only"),
    ],
)
def test_data_that_do_not_fit_fail_at_the_start(
    run: FakeRun, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        observer(knn=knn(**options)).on_start(run, 3)


def test_a_check_tells_what_is_missing_and_what_does_not_fit_the_model() -> None:
    build = registry().build
    with pytest.raises(DataError, match=r"evaluations.knn: clusters: not on this machine"):
        observer(knn=knn(test=ClustersConfig(there=False))).check(build, GRAY)
    with pytest.raises(RecipeError, match="evaluations: there is nothing to measure"):
        EvaluateWhileTraining(EvaluateWhileTrainingConfig(evaluations={})).check(build, GRAY)
    odd = observer(knn=knn(size=5))
    odd.check(build, GRAY)
    with pytest.raises(RecipeError, match=r"evaluations.knn.size: 5 px are no multiple"):
        odd.check_model(Model(tiny(), GRAY))
