"""The vote itself, against a brute-force spelling and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dinov3_classify import knn
from dinov3_classify.knn import knn_classify

from dinov3_framework.data.features import Features
from dinov3_framework.errors import DataError


def features(cls: Any, labels: Any) -> Features:
    given = None if labels is None else torch.as_tensor(labels)
    return Features({"class": torch.as_tensor(cls, dtype=torch.float32)}, given)


def clouds(count: int, seed: int, classes: int = 5, dim: int = 8) -> Features:
    """Overlapping clouds, so that votes are contested."""
    centers = np.random.default_rng(0).normal(0, 1, (classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return features(centers[labels] + rng.normal(0, 1.2, (count, dim)), labels)


def brute_force(
    train: Features, test: Features, k: tuple[int, ...], temperature: float, classes: int
) -> dict[int, float]:
    """One test image at a time, in float64."""
    assert train.labels is not None
    assert test.labels is not None
    keys = train.cls.double().numpy()
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    right = dict.fromkeys(k, 0)
    for query, truth in zip(test.cls.double().numpy(), test.labels.tolist(), strict=True):
        similarity = keys @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[: max(k)]
        weights = np.exp(similarity[nearest] / temperature)
        weights /= weights.sum()
        for count in k:
            votes = np.zeros(classes)
            for neighbor, weight in zip(nearest[:count], weights, strict=False):
                votes[int(train.labels[neighbor])] += weight
            right[count] += int(votes.argmax() == truth)
    return {count: hits / len(test.cls) for count, hits in right.items()}


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_it_is_the_brute_force_vote(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_CHUNK", chunk)
    train, test, k = clouds(150, 1), clouds(90, 2), (20, 1, 5)
    found = knn_classify(train, test, k=k, temperature=temperature, n_classes=5)
    assert found == pytest.approx(brute_force(train, test, k, temperature, 5), abs=1e-9)
    assert len(set(found.values())) > 1  # the choice of k matters here
    assert list(found) == [20, 1, 5]


def test_features_that_nearly_coincide_are_told_apart() -> None:
    """As those of a backbone at its random initialization are."""
    rng = np.random.default_rng(8)
    common = torch.from_numpy(rng.normal(0, 1, 32)).float()
    train, test = (
        Features({"class": common + 1e-5 * part.cls}, part.labels)
        for part in (clouds(150, 1, dim=32), clouds(90, 2, dim=32))
    )
    found = knn_classify(train, test, k=(5,), n_classes=5)
    assert found == pytest.approx(brute_force(train, test, (5,), 0.07, 5), abs=0.03)
    assert found[5] > 0.7


def at_angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_by_hand_one_near_neighbor_against_two_far_ones() -> None:
    train = features(at_angles(10, 40, 45), [0, 1, 1])
    test = features(at_angles(0), [0])
    # cosines 0.985, 0.766, 0.707: at T = 0.07 the first weighs e^(0.22 / 0.07) = 23 times the
    # second, at T = 1 the two others outvote it.
    sharp = knn_classify(train, test, k=(1, 3), temperature=0.07, n_classes=2)
    flat = knn_classify(train, test, k=(1, 3), temperature=1.0, n_classes=2)
    assert sharp == {1: 1.0, 3: 1.0}
    assert flat == {1: 1.0, 3: 0.0}


def test_lengths_do_not_matter() -> None:
    train, test = clouds(60, 3), clouds(30, 4)
    scales = torch.linspace(0.01, 100, 60)[:, None]
    scaled = Features({"class": train.cls * scales}, train.labels)
    known = knn_classify(train, test, k=(5,), n_classes=5)
    assert knn_classify(scaled, test, k=(5,), n_classes=5) == known
    assert 0.2 < known[5] < 1


def test_equal_votes_go_to_the_lowest_class() -> None:
    train = features(at_angles(30, -30), [1, 0])
    assert knn_classify(train, features(at_angles(0), [0]), k=(2,), n_classes=2) == {2: 1.0}


def test_a_set_finds_itself() -> None:
    train = clouds(80, 5)
    assert knn_classify(train, train, k=(1,), n_classes=5) == {1: 1.0}


def test_as_many_neighbors_as_there_are_and_no_more() -> None:
    train, test = clouds(12, 6), clouds(9, 7)
    expected = brute_force(train, test, (12,), 0.07, 5)
    assert knn_classify(train, test, k=(12,), n_classes=5) == pytest.approx(expected)
    with pytest.raises(DataError, match="k = 13 neighbors of only 12 training images"):
        knn_classify(train, test, k=(3, 13), n_classes=5)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (features(at_angles(0, 1), None), features(at_angles(0), [0]), "needs labels"),
        (features(at_angles(0, 1), [0, 1]), features(at_angles(0), None), "needs labels"),
        (features(at_angles(0, 1), [0, 2]), features(at_angles(0), [0]), r"labels 0\.\.2 where 2"),
        (features(at_angles(0, 1), [0, 1]), features(at_angles(0), [-1]), "test set has labels -1"),
        (features([[np.nan, 1], [0, 1]], [0, 1]), features(at_angles(0), [0]), "not finite"),
        (features(at_angles(0, 1), [0, 1]), features([[np.inf, 1]], [0]), "test set are not"),
    ],
)
def test_what_cannot_be_classified(train: Features, test: Features, message: str) -> None:
    with pytest.raises(DataError, match=message):
        knn_classify(train, test, k=(1,), n_classes=2)
