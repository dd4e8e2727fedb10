"""Logistic regression: the optimum of scikit-learn's objective, however it is got to."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from classify_support import Labels, clothes, clouds
from dinov3_classify.configs import published_strengths
from dinov3_classify.logistic import Solution, solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def solved(data: Labels, classes: int, *strengths: float, **options: float) -> list[Solution]:
    return list(solve(data.features, data.labels, classes, strengths, **options))  # type: ignore[arg-type]


def theirs(data: Labels, c: float, iterations: int = 10_000) -> LogisticRegression:
    features = data.features.double().numpy()  # of float32 it would give float32 coefficients
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        made = LogisticRegression(C=c, tol=1e-12, max_iter=iterations)
        return made.fit(features, data.labels.numpy())


def objective(data: Labels, coefficients: np.ndarray, intercepts: np.ndarray, c: float) -> float:
    """By its definition, divided by C n."""
    scores = data.features.double().numpy() @ coefficients.T + intercepts
    top = scores.max(axis=1, keepdims=True)
    totals = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
    losses = totals - scores[np.arange(len(scores)), data.labels.numpy()]
    return float(losses.mean() + (coefficients**2).sum() / (2 * c * len(scores)))


def small_clothes() -> tuple[Labels, Labels]:
    """Every other pixel of every other row, so that scikit-learn converges in a second."""
    train, test = clothes("train", 700), clothes("test", 300)

    def thin(data: Labels) -> Labels:
        pixels = data.features.view(-1, 28, 28)[:, ::3, ::3].flatten(1)
        return Labels(pixels, data.labels)

    return thin(train), thin(test)


def test_the_optimum_is_scikit_learns() -> None:
    train, test = small_clothes()
    strengths = (1e-4, 1e-2, 1.0)
    for found, c in zip(solved(train, 10, *strengths), strengths, strict=True):
        other = theirs(train, c)
        assert found.converged
        assert found.c == c
        np.testing.assert_allclose(found.coefficients.numpy(), other.coef_, atol=2e-5)
        np.testing.assert_allclose(found.intercepts.numpy(), other.intercept_, atol=2e-5)
        best = objective(train, other.coef_, other.intercept_, c)
        assert found.objective == pytest.approx(best, rel=1e-10)
        expected = other.predict(test.features.double().numpy())
        assert found.scores(test.features).argmax(dim=1).tolist() == expected.tolist()


def test_its_objective_is_the_definition() -> None:
    train, _ = small_clothes()
    (found,) = solved(train, 10, 0.1)
    own = objective(train, found.coefficients.numpy(), found.intercepts.numpy(), 0.1)
    assert found.objective == pytest.approx(own, rel=1e-12)
    assert found.gradient < 1e-7


def test_no_published_strength_is_reached_worse_than_by_scikit_learn() -> None:
    """In their few iterations; where these do not converge, ours may be the lower."""
    train, test = small_clothes()
    strengths = published_strengths()
    found = solved(train, 10, *strengths)
    assert all(each.converged for each in found)
    for each in found[::11]:
        other = theirs(train, each.c, iterations=300)
        own = objective(train, other.coef_, other.intercept_, each.c)
        assert each.objective <= own + 1e-13
        predicted = each.scores(test.features).argmax(dim=1).numpy()
        expected = other.predict(test.features.double().numpy())
        assert np.mean(predicted == expected) > 0.98


def test_fewer_images_than_features() -> None:
    data = clouds(40, 1, dim=300)
    (found,) = solved(data, 5, 0.1)
    other = theirs(data, 0.1)
    np.testing.assert_allclose(found.coefficients.numpy(), other.coef_, atol=1e-6)
    np.testing.assert_allclose(found.intercepts.numpy(), other.intercept_, atol=1e-6)


def test_features_far_from_zero_and_of_unlike_scales() -> None:
    data = clouds(200, 1)
    data = Labels(data.features * torch.logspace(-2, 2, 8) + 100, data.labels)
    (found,) = solved(data, 5, 1.0)
    assert found.converged
    other = theirs(data, 1.0, iterations=100_000)
    assert found.objective <= objective(data, other.coef_, other.intercept_, 1.0) + 1e-12


def test_features_that_say_nothing_and_one_class_alone() -> None:
    data = Labels(torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]))
    (found,) = solved(data, 3, 1.0)
    shares = found.scores(data.features).softmax(dim=1)[0]
    torch.testing.assert_close(shares, torch.tensor([3, 2, 1]).double() / 6)
    alone = Labels(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    (found,) = solved(alone, 1, 1.0)
    assert found.converged
    assert found.objective == 0


def test_where_it_begins_does_not_matter() -> None:
    train, _ = small_clothes()
    (cold,) = solved(train, 10, 0.1)
    (first,) = solved(train, 10, 1e-3)
    (warm,) = solve(train.features, train.labels, 10, [0.1], start=first)
    torch.testing.assert_close(warm.coefficients, cold.coefficients, rtol=0, atol=1e-6)
    (again,) = solve(train.features, train.labels, 10, [0.1], start=cold)
    assert again.iterations < cold.iterations / 2


def test_too_few_iterations_are_no_convergence() -> None:
    train, _ = small_clothes()
    (found,) = solved(train, 10, 1.0, max_iterations=3)
    assert not found.converged
    assert found.iterations == 3
