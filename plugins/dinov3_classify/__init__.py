"""Evaluations of class tokens as classifiers."""

from __future__ import annotations

from dinov3_framework import (
    Component,
    DatasetConfig,
    EvaluationConfig,
    config,
    hookimpl,
    not_negative,
    option,
    positive,
)


def _neighbor_counts(value: tuple[int, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers above 0, is {list(value)}"


@config
class KnnConfig(EvaluationConfig):
    """k-NN accuracy of class tokens, in percent, as ``knn@<k>``; beside it that of raw pixels."""

    train: DatasetConfig = option("labeled images among which neighbors are sought")
    test: DatasetConfig = option("labeled images to classify")
    k: tuple[int, ...] = option(
        "numbers of neighbors, each a metric of its own", default=(10, 20), check=_neighbor_counts
    )
    temperature: float = option(
        "temperature of the softmax over similarities that weighs the votes",
        default=0.07,
        check=positive,
    )
    size: int | None = option(
        "side of the evaluation images in pixels; left out, that of the backbone's training, and "
        "for a backbone without training images are used as they are and must share one shape",
        default=None,
        check=positive,
    )
    batch_size: int = option("images at a time in each process", default=256, check=positive)
    workers: int = option("loader workers of each process", default=0, check=not_negative)
    raw_pixels_limit: int = option(
        "report k-NN on raw pixels as a baseline if they take at most so many MB; 0 leaves it out",
        default=1024,
        check=not_negative,
    )


@hookimpl
def dinov3_evaluations() -> list[Component]:
    return [Component("knn", KnnConfig, "dinov3_classify.evaluation:KnnEvaluation")]
