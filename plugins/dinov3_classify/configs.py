"""What the evaluations can be told."""

from __future__ import annotations

import attrs

from dinov3_framework import (
    BackboneTaskConfig,
    DatasetConfig,
    ObserverConfig,
    config,
    not_negative,
    option,
    positive,
)


def _neighbour_counts(value: tuple[int, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers above 0, is {list(value)}"


# Without slots, since Python cannot lay out a class with two bases that both have them.
mixin = attrs.frozen(kw_only=True, slots=False)


@mixin
class KnnSettings:
    """What a k-NN evaluation needs to know, while training or on its own."""

    train: DatasetConfig = option("labelled images among which neighbours are sought")
    test: DatasetConfig = option("labelled images to classify")
    k: tuple[int, ...] = option(
        "numbers of neighbours, each a metric of its own", default=(10, 20), check=_neighbour_counts
    )
    temperature: float = option(
        "temperature of the softmax over similarities that weighs the votes",
        default=0.07,
        check=positive,
    )
    batch_size: int = option("images at a time in each process", default=256, check=positive)
    workers: int = option("loader workers of each process", default=0, check=not_negative)
    raw_pixels_limit: int = option(
        "report k-NN on raw pixels as a baseline if they take at most so many MB; 0 leaves it out",
        default=1024,
        check=not_negative,
    )


@config
class KnnConfig(ObserverConfig, KnnSettings):
    """k-NN accuracy of the momentum teacher while it trains, in percent, as ``knn@<k>``.

    At the end raw pixels, the backbone before training and the trained teacher are compared.
    """

    every: int = option("iterations between two evaluations", default=1000, check=positive)
    size: int | None = option(
        "side of the evaluation images in pixels; left out, images are used as they are and must "
        "share one shape",
        default=None,
        check=positive,
    )


@config
class KnnTaskConfig(BackboneTaskConfig, KnnSettings):
    """k-NN accuracy of a backbone with weights, or of a randomly initialised one.

    Either ``weights`` or ``backbone`` is given.
    """

    size: int | None = option(
        "side of the evaluation images in pixels; left out, the size of the weights' training, "
        "and with backbone images are used as they are and must share one shape",
        default=None,
        check=positive,
    )
