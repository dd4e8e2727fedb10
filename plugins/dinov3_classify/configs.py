"""Configs of the evaluations that classify by features of a frozen backbone."""

from __future__ import annotations

from dinov3_framework import (
    DatasetConfig,
    EvaluationConfig,
    config,
    not_negative,
    one_of,
    option,
    positive,
)

OUTPUTS = {"class": ("class",), "mean_patch": ("mean_patch",), "both": ("class", "mean_patch")}


def _different_counts(value: tuple[int, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers above 0, is {list(value)}"


def _counts_or_none(value: tuple[int, ...]) -> str | None:
    return _different_counts(value) if value else None


def _percentages(value: tuple[float, ...]) -> str | None:
    if all(0 < each < 100 for each in value) and len(set(value)) == len(value):
        return None
    return f"must be different numbers between 0 and 100, is {list(value)}"


def _strengths(value: tuple[float, ...]) -> str | None:
    if value and min(value) > 0 and list(value) == sorted(set(value)):
        return None
    return f"must be increasing numbers above 0, is {list(value)}"


def _share(value: float) -> str | None:
    return None if 0 < value < 1 else f"must lie between 0 and 1, is {value}"


def _test_names(value: dict[str, DatasetConfig]) -> str | None:
    odd = [name for name in value if not name or "/" in name]
    return f"names must have letters and no '/': {odd[0]!r}" if odd else None


def published_strengths() -> tuple[float, ...]:
    """The 45 values of C that DINOv2 and DINOv3 choose among: 10^-6 to 10^5."""
    return tuple(10 ** (-6 + 11 * step / 44) for step in range(45))


@config
class MeasuredConfig(EvaluationConfig):
    """How images are seen, and what is reported of their classes."""

    size: int | None = option(
        "side of the evaluation images in pixels; left out, that of the backbone's training, and "
        "for a backbone without training images are used as they are and must share one shape",
        default=None,
        check=positive,
    )
    resize: int | None = option(
        "pixels of the shorter side before the square is cut out of the middle; left out, 256 for "
        "a size of 224, and so in proportion",
        default=None,
        check=positive,
    )
    batch_size: int = option("images at a time in each process", default=256, check=positive)
    workers: int = option("loader workers of each process", default=0, check=not_negative)
    top5: bool = option(
        "report whether the class is among the first five, too, as METRIC/top5, where there are "
        "more than five",
        default=True,
    )
    class_mean: bool = option(
        "report the mean of the classes' accuracies, too, as METRIC/class_mean", default=False
    )


@config
class ClassifyConfig(MeasuredConfig):
    """What the evaluations have in common."""

    train: DatasetConfig = option("labeled images to learn from")
    test: DatasetConfig = option("labeled images to classify")
    tests: dict[str, DatasetConfig] = option(
        "further sets to classify, by names that begin those of their metrics: NAME/METRIC",
        factory=dict,
        check=_test_names,
    )
    features: str = option(
        "class (the class token), mean_patch (the mean of the patch tokens), or both, one after "
        "the other",
        default="class",
        check=one_of(*OUTPUTS),
    )
    n_per_class: tuple[int, ...] = option(
        "few-shot: numbers of training images of each class, each a metric METRIC/N-shot beside "
        "that of all images",
        default=(),
        check=_counts_or_none,
    )
    percent: tuple[float, ...] = option(
        "few-shot: percentages of the training images, of each class alike and at least one, each "
        "a metric METRIC/P%",
        default=(),
        check=_percentages,
    )
    tries: int = option(
        "few-shot: how often the images are drawn; metrics are means over the tries, with their "
        "standard deviation as METRIC/.../deviation",
        default=5,
        check=positive,
    )
    seed: int = option(
        "seed of few-shot draws, held-out images and confidence intervals",
        default=0,
        check=not_negative,
    )


@config
class KnnConfig(ClassifyConfig):
    """k-NN accuracy of features, in percent, as ``knn@<k>``; beside it that of raw pixels."""

    k: tuple[int, ...] = option(
        "numbers of neighbors, each a metric of its own", default=(10, 20), check=_different_counts
    )
    temperature: float = option(
        "temperature of the softmax over similarities that weighs the votes",
        default=0.07,
        check=positive,
    )
    vote: str = option(
        "softmax (votes are weighed by similarity) or uniform",
        default="softmax",
        check=one_of("softmax", "uniform"),
    )
    raw_pixels_limit: int = option(
        "report k-NN on raw pixels as a baseline if they take at most so many MB; 0 leaves it out",
        default=1024,
        check=not_negative,
    )


@config
class LogisticRegressionConfig(ClassifyConfig):
    """Accuracy of a logistic regression on features, in percent, by the published protocol."""

    size: int | None = option(
        "side of the evaluation images in pixels; 0 as that of the backbone's training",
        default=224,
        check=not_negative,
    )
    resize: int | None = option(
        "pixels of the shorter side before the square is cut out of the middle; left out, as size",
        default=None,
        check=positive,
    )
    c: tuple[float, ...] = option(
        "inverse strengths of the L2 penalty to choose among, increasing; of a single one nothing "
        "is chosen",
        factory=published_strengths,
        check=_strengths,
    )
    val: DatasetConfig | None = option(
        "labeled images to choose C on; left out, a part of the training images", default=None
    )
    held_out: float = option(
        "share of the training images to choose C on, where there is no val",
        default=0.1,
        check=_share,
    )
    held_out_few_shot: float = option(
        "the same of few-shot training images, at least one of them", default=0.01, check=_share
    )
    tolerance: float = option(
        "largest element of the gradient at which the regression has converged",
        default=1e-12,
        check=positive,
    )
    max_iterations: int = option("iterations for each C at most", default=1000, check=positive)
