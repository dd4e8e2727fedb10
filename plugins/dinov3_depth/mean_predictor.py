"""The mean depth of a data set as the prediction of every pixel: what any head has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from attrs import frozen

from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.metrics import Values
from dinov3_depth.scoring import ImageScore, known_pixels, score_values, truth_of
from dinov3_framework import DataError, Dataset, Sample, collectives
from dinov3_framework.data.inference import InferenceLoader, rank_batches

_PIXELS = 10_000  # of an image, evenly spread over it


def mean_predictor_scores(config: DepthConfig, dataset: Dataset) -> list[ImageScore]:
    """Errors of the mean depth, of at most 10,000 pixels of each image.

    To be called by every process; all get the same.
    """
    loader = InferenceLoader(
        dataset,
        _KnownDepth(config),
        rank_batches(len(dataset), 1),
        collate=_first,
        workers=config.workers,
    )
    mine = [(batch.indices[0], batch.data) for batch in loader if batch.data is not None]
    mine = [(index, values) for index, values in mine if len(values)]
    sums = [(float(values.sum()), len(values)) for _, values in mine]
    shares = cast("list[list[tuple[float, int]]]", collectives.all_gather_object(sums))
    total = sum(value for share in shares for value, _ in share)
    count = sum(number for share in shares for _, number in share)
    if not count:
        raise DataError(f"{dataset.describe()}: depth is known of no pixel that counts")
    mean = total / count
    scores = [
        score_values(config, index, "", np.full(len(values), mean), values)
        for index, values in mine
    ]
    found = cast("list[list[ImageScore]]", collectives.all_gather_object(scores))
    return sorted((each for share in found for each in share), key=lambda each: each.index)


@frozen
class _KnownDepth:
    config: DepthConfig

    def __call__(self, sample: Sample, index: int) -> Values:
        truth = truth_of(self.config, sample.targets)
        values = truth[known_pixels(self.config, truth)].double().numpy()
        step = -(-len(values) // _PIXELS) or 1
        return cast(Values, values[::step].copy())


def _first(items: Sequence[Values]) -> Values:
    return items[0]
