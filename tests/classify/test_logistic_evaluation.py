"""The evaluation ``logistic_regression``: what it fits to what, and what it says of it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from classify_processes import measure_regression
from classify_support import GRAY, ClustersConfig, registry, regression, tiny
from dinov3_classify.configs import LogisticRegressionConfig
from dinov3_classify.logistic_evaluation import LogisticRegressionEvaluation
from sklearn.linear_model import LogisticRegression

from dinov3_framework import Model, extract_features
from dinov3_framework.configs import InvalidOption
from dinov3_framework.errors import DataError, RecipeError
from dinov3_framework.testing import EvaluationSuite


class TestContract(EvaluationSuite):
    config = regression()
    registry = registry()
    images = GRAY

    @property
    def model(self) -> Model:  # type: ignore[override]
        return Model(tiny(1).eval(), GRAY)


def evaluation(**options: Any) -> LogisticRegressionEvaluation:
    made = LogisticRegressionEvaluation(regression(**options))
    made.prepare(registry().build, GRAY)
    return made


def model() -> Model:
    return Model(tiny(1).eval(), GRAY)


def features(config: ClustersConfig) -> tuple[np.ndarray, np.ndarray]:
    dataset = registry().build(config, channels=1)
    found = extract_features(model().backbone, dataset, images=GRAY, size=None)
    assert found.labels is not None
    return found.cls.double().numpy(), found.labels.numpy()


def test_it_chooses_and_refits_as_by_scikit_learn() -> None:
    train, val = ClustersConfig(count=40), ClustersConfig(count=24, seed=3)
    test = ClustersConfig(count=80, seed=1)
    strengths = (1e-4, 1e-2, 1.0)
    made = evaluation(train=train, val=val, test=test, c=strengths)
    accuracy = made.run(model())["logistic_regression"]
    (x, y), (xv, yv), (xt, yt) = features(train), features(val), features(test)
    options: dict[str, Any] = {"tol": 1e-12, "max_iter": 10_000}
    held = [LogisticRegression(C=c, **options).fit(x, y).score(xv, yv) for c in strengths]
    losses = [row["loss on held-out"] for row in made.details().tables["sweep"][:3]]
    best = strengths[max(range(3), key=lambda place: (held[place], -losses[place]))]
    whole = np.concatenate([x, xv]), np.concatenate([y, yv])
    refit = LogisticRegression(C=best, **options).fit(*whole)
    assert accuracy == pytest.approx(100 * refit.score(xt, yt), abs=1e-3)
    sweep = made.details().tables["sweep"]
    assert [row["accuracy on held-out"] for row in sweep[:3]] == pytest.approx(
        [100 * each for each in held], abs=1e-3
    )
    assert [row["C"] for row in sweep] == [*strengths, best]
    assert all(row["converged"] for row in sweep)
    assert made.protocol(model())["C"] == f"{best:g}"
    assert made.protocol(model())["C chosen on"] == "val"


def test_a_part_of_the_training_set_is_held_out() -> None:
    made = evaluation()
    made.run(model())
    protocol = made.protocol(model())
    assert protocol["C chosen on"] == "0.1 of train"
    assert protocol["converged"] == "yes"
    of_four = {row["accuracy on held-out"] for row in made.details().tables["sweep"][:2]}
    assert of_four <= {0.0, 25.0, 50.0, 75.0, 100.0}


def test_of_a_single_c_nothing_is_chosen() -> None:
    made = evaluation(c=(0.5,))
    made.run(model())
    assert [row["C"] for row in made.details().tables["sweep"]] == [0.5]
    assert made.protocol(model())["C chosen on"] == "nothing, it is given"


def test_few_shots_and_several_test_sets() -> None:
    metrics = measure_regression()["metrics"]
    ends = ["", "/2-shot", "/2-shot/deviation", "/5-shot", "/5-shot/deviation"]
    assert metrics.keys() == {
        f"{test}logistic_regression{end}" for test in ("", "v2/") for end in ends
    }
    assert measure_regression(seed=5)["metrics"] != metrics


def test_of_equally_accurate_ones_that_of_lower_cross_entropy_is_chosen() -> None:
    made = evaluation(c=(1e-6, 1e-5, 1.0), n_per_class=(3,), tries=1)
    made.run(model())
    rows = [row for row in made.details().tables["sweep"] if row["fit"] == "3-shot 0"]
    *tried, last = rows
    top = max(row["accuracy on held-out"] for row in tried)
    equal = [row for row in tried if row["accuracy on held-out"] == top]
    assert last["C"] == min(equal, key=lambda row: row["loss on held-out"])["C"]


def test_a_c_at_the_end_of_the_range_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evaluation(c=(1e-9, 1e-8)).run(model())
    assert "the chosen C is the largest of those tried" in caplog.text


def test_what_has_not_converged_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = evaluation(max_iterations=1, tolerance=1e-15)
        made.run(model())
    assert "not converged within 1 iterations" in caplog.text
    assert made.protocol(model())["converged"].startswith("not")


def test_one_shot_needs_something_to_choose_on() -> None:
    with pytest.raises(RecipeError, match="n_per_class: of one image of each class none can be"):
        evaluation(n_per_class=(1,))
    evaluation(n_per_class=(1,), c=(1.0,)).run(model())
    evaluation(n_per_class=(1,), val=ClustersConfig(count=8, seed=4)).run(model())
    with pytest.raises(DataError, match="none can be held out"):
        evaluation(train=ClustersConfig(count=4)).run(model())


def test_images_are_224_px_by_default() -> None:
    shown: list[int] = []
    small = tiny(1, size=224)
    small.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].shape[-1]))
    made = evaluation(size=224)
    made.run(Model(small.eval(), GRAY, size=4))
    assert set(shown) == {224}
    protocol = made.protocol(Model(small, GRAY, size=4))
    assert (protocol["size"], protocol["resize"]) == (224, 224)


@pytest.mark.parametrize("c", [(), (0.0, 1.0), (1.0, 0.1)])
def test_values_of_c_that_make_no_sense(c: tuple[float, ...]) -> None:
    with pytest.raises(InvalidOption, match="c: must be increasing numbers above 0"):
        regression(c=c)


def test_the_published_values_of_c() -> None:
    made = LogisticRegressionConfig(train=ClustersConfig(), test=ClustersConfig())
    np.testing.assert_allclose(made.c, 10 ** np.linspace(-6, 5, 45))
