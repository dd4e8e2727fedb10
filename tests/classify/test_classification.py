"""What is counted of classified images, by hand and beside scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dinov3_classify.findings import Findings
from dinov3_classify.metrics import (
    Classification,
    check_classes,
    class_mean,
    class_mean_interval,
    mean_interval,
)
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from dinov3_framework.errors import DataError


def random_scores(n: int = 400, classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    truth = rng.choice(classes - 2, n)  # of the last two classes there is no image
    scores = rng.normal(0, 1, (n, classes))
    scores[np.arange(n), truth] += 1
    return torch.from_numpy(scores), torch.from_numpy(truth)


def classified(scores: torch.Tensor, truth: torch.Tensor, rows: int = 64) -> Classification:
    return Classification.of_scores(scores.split(rows), truth, scores.shape[1])


def test_it_is_what_scikit_learn_counts() -> None:
    scores, truth = random_scores()
    result = classified(scores, truth)
    labels = np.arange(12)
    for top in (1, 5):
        expected = top_k_accuracy_score(truth, scores, k=top, labels=labels)
        assert float(result.right(top).mean()) == pytest.approx(expected)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(truth, result.predicted)
    assert class_mean(result) == pytest.approx(expected)
    expected = confusion_matrix(truth, result.predicted, labels=labels)
    np.testing.assert_array_equal(result.confusion(), expected)


def test_equal_scores_go_to_the_lowest_class() -> None:
    result = classified(torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 1, 1]]), torch.tensor([0, 1, 2]))
    assert result.predicted.tolist() == [0, 0, 1]
    assert result.rank.tolist() == [0, 1, 1]


@pytest.mark.parametrize("truth", [torch.tensor([0, 1]), torch.eye(3)[:2].bool()])
def test_scores_that_are_no_numbers_are_never_right(truth: torch.Tensor) -> None:
    nan = float("nan")
    result = classified(torch.tensor([[nan, nan, nan], [1.0, nan, 0.0]]), truth)
    assert result.right().tolist() == result.right(top=2).tolist() == [0, 0]
    assert result.predicted.tolist() == [0, 0]


def test_several_true_classes() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0]] * 4)
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    result = classified(scores, truth, rows=3)
    assert result.rank.tolist() == [2, 0, 3]  # the second has none and is left out
    assert result.confusion() is None
    images, hits = result.by_class()
    assert images.tolist() == [1, 0, 2, 2]
    assert hits.tolist() == [1, 0, 1, 0]


def test_intervals_are_those_of_resampled_images() -> None:
    scores, truth = random_scores()
    result = classified(scores, truth)
    right, rng = result.right().numpy(), np.random.default_rng(5)
    draws = rng.integers(0, len(right), (2000, len(right)))
    expected = np.percentile(right[draws].mean(axis=1), [2.5, 97.5])
    assert mean_interval(result.right(), 0, "a") == pytest.approx(expected, abs=0.006)
    assert mean_interval(result.right(), 0, "a") == mean_interval(result.right(), 0, "a")
    hits = np.zeros((2000, 10))
    for label in range(10):
        of = truth.numpy()[draws] == label
        hits[:, label] = (right[draws] * of).sum(axis=1) / of.sum(axis=1)
    expected = np.percentile(hits.mean(axis=1), [2.5, 97.5])
    assert class_mean_interval(result, 0, "a") == pytest.approx(expected, abs=0.006)


def test_all_right_has_an_interval_of_no_width() -> None:
    assert mean_interval(torch.ones(30), 0, "a") == (1, 1)


def test_test_classes_that_training_lacks() -> None:
    with pytest.raises(DataError, match=r"no training image has: cat$"):
        check_classes(torch.tensor([0, 2]), torch.tensor([1, 2]), 3, ("ant", "cat", "dog"))
    with pytest.raises(DataError, match=r"no training image has: 1$"):
        check_classes(torch.tensor([0, 2]), torch.tensor([[1, 1, 0]]).bool(), 3)
    check_classes(torch.tensor([0, 1, 2]), torch.tensor([1, 1]), 3)


# --------------------------------------------------------------------------- what is reported
def test_findings() -> None:
    scores, truth = random_scores()
    names = [f"class {index}" for index in range(12)]
    found = Findings(names, seed=0, with_class_mean=True)
    result = classified(scores, truth)
    found.add("", "knn@1", result)
    found.add("v2", "knn@1", classified(scores[:100], truth[:100]))
    right = 100 * float(result.right().mean())
    assert found.metrics["knn@1"] == pytest.approx(right, abs=1e-4)
    assert list(found.metrics) == [
        f"{test}knn@1{what}" for test in ("", "v2/") for what in ("", "/top5", "/class_mean")
    ]
    details = found.details()
    assert details.intervals.keys() == found.metrics.keys()
    low, high = details.intervals["knn@1"]
    assert low < right < high
    rows = details.tables["classes"]
    assert [row["metric"] for row in rows] == ["knn@1"] * 12 + ["v2/knn@1"] * 12
    assert rows[11] == {
        "metric": "knn@1", "class": 11, "name": "class 11", "images": 0, "accuracy": None,
    }  # fmt: skip
    assert sum(row["images"] * row["accuracy"] for row in rows[:10]) == pytest.approx(
        400 * right, abs=0.1
    )
    confusion = details.arrays["confusion"]
    assert confusion.sum() == 400
    worst = details.tables["confused"][0]
    np.fill_diagonal(off := confusion.copy(), 0)
    assert worst["images"] == off.max()
    assert worst["class"] != worst["taken for"]
    assert details.arrays["v2_confusion"].sum() == 100
    assert found.notes["classes without images in test"] == "class 10, class 11"


def test_the_mean_of_several_tries() -> None:
    truth = torch.zeros(4, dtype=torch.int64)
    tries = [
        classified(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]), truth),
        classified(torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]), truth),
    ]
    found = Findings(None, seed=0)
    found.add_tries("", "knn@1/5-shot", tries)
    deviation = round(100 * float(np.std([0.75, 0.25], ddof=1)), 4)
    assert found.metrics == {"knn@1/5-shot": 50.0, "knn@1/5-shot/deviation": deviation}
