"""The vote itself, against a brute-force spelling, scikit-learn, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from classify_support import Labels, clothes, clouds, labeled
from dinov3_classify.knn import LabeledShare, knn_classify
from dinov3_classify.metrics import Classification
from sklearn.neighbors import KNeighborsClassifier

from dinov3_framework.errors import DataError


def classify(train: Labels, test: Labels, **options: Any) -> dict[int, Classification]:
    share = LabeledShare.whole(train.features, train.labels)
    return knn_classify(share, test.features, test.labels, **{"n_classes": 5, **options})


def accuracies(train: Labels, test: Labels, **options: Any) -> dict[int, float]:
    found = classify(train, test, **options)
    return {k: float(result.right().mean()) for k, result in found.items()}


def brute_force(
    train: Labels, test: Labels, k: Sequence[int], temperature: float, classes: int
) -> dict[int, np.ndarray]:
    """Votes [n, classes], one test image at a time, in float64."""
    keys = train.features.double().numpy()
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    votes = {count: np.zeros((len(test.labels), classes)) for count in k}
    for row, query in enumerate(test.features.double().numpy()):
        similarity = keys @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[: max(k)]
        weights = np.exp(similarity[nearest] / temperature)
        weights /= weights.sum()
        for count in k:
            for neighbor, weight in zip(nearest[:count], weights, strict=False):
                votes[count][row, int(train.labels[neighbor])] += weight
    return votes


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_it_is_the_brute_force_vote(temperature: float) -> None:
    train, test, k = clouds(150, 1), clouds(90, 2), (20, 1, 5)
    found = classify(train, test, k=k, temperature=temperature)
    votes = brute_force(train, test, k, temperature, 5)
    for count in k:
        assert found[count].predicted.tolist() == votes[count].argmax(axis=1).tolist()
        own = votes[count][np.arange(90), test.labels]
        rank = np.where(own > 0, (votes[count] > own[:, None]).sum(axis=1), 5)
        assert found[count].rank.tolist() == rank.tolist()
    assert len({float(result.right().mean()) for result in found.values()}) > 1
    assert list(found) == [20, 1, 5]


@pytest.mark.parametrize("vote", ["softmax", "uniform"])
@pytest.mark.parametrize("k", [1, 20])
def test_it_is_what_scikit_learn_predicts_of_clothes(vote: str, k: int) -> None:
    train, test = clothes("train", 1500), clothes("test", 300)

    def weights(distances: np.ndarray) -> np.ndarray:  # cosine distances, nearest first
        powers = np.exp((1 - distances) / 0.07)
        return powers / powers.sum(axis=1, keepdims=True)

    theirs = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=weights if vote == "softmax" else "uniform",
    ).fit(train.features.double().numpy(), train.labels.numpy())
    expected = theirs.predict(test.features.double().numpy())
    found = classify(train, test, k=(k,), n_classes=10, weighted=vote == "softmax")[k]
    assert np.mean(found.predicted.numpy() == expected) >= 0.995  # pixels make some exact ties
    assert 0.7 < float(found.right().mean()) < 0.95


def test_features_that_nearly_coincide_are_told_apart() -> None:
    """As those of a backbone at its random initialization are."""
    rng = np.random.default_rng(8)
    common = torch.from_numpy(rng.normal(0, 1, 32)).float()
    train, test = (
        Labels(common + 1e-5 * part.features, part.labels)
        for part in (clouds(150, 1, dim=32), clouds(90, 2, dim=32))
    )
    votes = brute_force(train, test, (5,), 0.07, 5)[5]
    right = float((votes.argmax(axis=1) == test.labels.numpy()).mean())
    found = accuracies(train, test, k=(5,))
    assert found[5] == pytest.approx(right, abs=0.03)
    assert found[5] > 0.7


def at_angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_by_hand_one_near_neighbor_against_two_far_ones() -> None:
    train = labeled(at_angles(10, 40, 45), [0, 1, 1])
    test = labeled(at_angles(0), [0])
    # cosines 0.985, 0.766, 0.707: at T = 0.07 the first weighs e^(0.22 / 0.07) = 23 times the
    # second, at T = 1 the two others outvote it, and so they do if all weigh the same.
    assert accuracies(train, test, k=(1, 3), temperature=0.07) == {1: 1.0, 3: 1.0}
    assert accuracies(train, test, k=(1, 3), temperature=1.0) == {1: 1.0, 3: 0.0}
    assert accuracies(train, test, k=(1, 3), weighted=False) == {1: 1.0, 3: 0.0}


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    train = labeled(at_angles(0, 1, 90), [3, 3, 0])
    found = classify(train, labeled(at_angles(0, 0), [3, 0]), k=(2, 3))
    assert found[2].right(top=5).tolist() == [1, 0]
    assert found[3].right(top=5).tolist() == [1, 1]


def test_any_of_several_classes_counts_as_right() -> None:
    train = labeled(at_angles(0, 2, 90), [1, 2, 0])
    truth = torch.tensor([[0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    test = Labels(labeled(at_angles(0, 0, 0, 0), [0] * 4).features, truth.bool())
    found = classify(train, test, k=(1, 3))
    assert found[1].right().tolist() == [0, 1, 0]  # the third has no class and is left out
    assert found[3].rank.tolist() == [1, 0, 2]


def test_lengths_do_not_matter() -> None:
    train, test = clouds(60, 3), clouds(30, 4)
    scaled = Labels(train.features * torch.linspace(0.01, 100, 60)[:, None], train.labels)
    known = accuracies(train, test, k=(5,))
    assert accuracies(scaled, test, k=(5,)) == known
    assert 0.2 < known[5] < 1


def test_equal_votes_go_to_the_lowest_class() -> None:
    train = labeled(at_angles(30, -30), [1, 0])
    assert accuracies(train, labeled(at_angles(0), [0]), k=(2,)) == {2: 1.0}


def test_a_set_finds_itself() -> None:
    train = clouds(80, 5)
    assert accuracies(train, train, k=(1,)) == {1: 1.0}


def test_a_subset_is_a_set_of_its_own() -> None:
    train, test, chosen = clouds(150, 1), clouds(90, 2), torch.arange(3, 150, 7)
    few = LabeledShare.whole(train.features, train.labels).subset(chosen)
    found = knn_classify(few, test.features, test.labels, k=(5,), n_classes=5)[5]
    alone = Labels(train.features[chosen], train.labels[chosen])
    assert torch.equal(found.rank, classify(alone, test, k=(5,))[5].rank)


def test_as_many_neighbors_as_there_are_and_no_more() -> None:
    train, test = clouds(12, 6), clouds(9, 7)
    votes = brute_force(train, test, (12,), 0.07, 5)[12]
    assert classify(train, test, k=(12,))[12].predicted.tolist() == votes.argmax(axis=1).tolist()
    with pytest.raises(DataError, match="k = 13 neighbors of only 12 training images"):
        classify(train, test, k=(3, 13))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (labeled(at_angles(0, 1), [0, 2]), labeled(at_angles(0), [0]), r"labels 0\.\.2 where 2"),
        (labeled(at_angles(0, 1), [0, 1]), labeled(at_angles(0), [-1]), "test set has labels -1"),
        (labeled([[np.nan, 1], [0, 1]], [0, 1]), labeled(at_angles(0), [0]), "not finite"),
        (labeled(at_angles(0, 1), [0, 1]), labeled([[np.inf, 1]], [0]), "test set are not"),
    ],
)
def test_what_cannot_be_classified(train: Labels, test: Labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classify(train, test, k=(1,), n_classes=2)
