"""Areas by class of predictions and truths, and the metrics that are made of them.

The letters in shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from torch import Tensor

from dinov3_framework import DataError, keyed_rng

_RESAMPLES = 1_000
_AT_ONCE = 2**22  # numbers of a chunk of resamples

Counts = NDArray[np.int64]
_Shares = NDArray[np.float64]


def confusion_of(predicted: Tensor, truth: Tensor, count: int, ignored: int | None) -> Counts:
    """Pixels of an image [H, W] by class, int64 [C, C]: rows the truth, columns the prediction.

    Pixels that the truth ignores are left out. Raises ``DataError`` for ids of no class.
    """
    found, there = predicted.cpu().numpy().ravel(), truth.cpu().numpy().ravel()
    if len(found) != len(there):
        shapes = f"{list(predicted.shape)} where the truth has {list(truth.shape)}"
        raise DataError(f"a prediction of {shapes} pixels")
    if ignored is not None:
        known = there != ignored
        found, there = found[known], there[known]
    found, there = found.astype(np.int64), there.astype(np.int64)
    for what, ids in (("the truth", there), ("a prediction", found)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < count:
            odd = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(f"{what} has the id {odd}, the classes are 0 to {count - 1}")
    cells = np.bincount(there * count + found, minlength=count * count)
    return cells.reshape(count, count).astype(np.int64)


@frozen(eq=False)
class Areas:
    """Pixels by class: in both prediction and truth, predicted, and true; [..., C] each."""

    both: NDArray[Any]
    predicted: NDArray[Any]
    true: NDArray[Any]

    @classmethod
    def of(cls, confusion: Counts) -> Areas:
        """Of confusion matrices [..., C, C]."""
        return cls(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-2), confusion.sum(-1))

    @property
    def iou(self) -> _Shares:
        """Intersection over union, NaN of a class that is in neither."""
        return _share(self.both, self.predicted + self.true - self.both)

    @property
    def recall(self) -> _Shares:
        """Share of the true pixels that were found, NaN without any: the class's accuracy."""
        return _share(self.both, self.true)

    @property
    def precision(self) -> _Shares:
        """Share of the predicted pixels that are right, NaN without any."""
        return _share(self.both, self.predicted)

    @property
    def dice(self) -> _Shares:
        """Twice the intersection over the sum of both areas, NaN of a class that is in neither."""
        return _share(2 * self.both, self.predicted + self.true)

    @property
    def fscore(self) -> _Shares:
        """Harmonic mean of precision and recall; NaN where both are 0, as the reference has it."""
        precision, recall = self.precision, self.recall
        return _share(2 * precision * recall, precision + recall)

    def metrics(self) -> dict[str, float]:
        """In percent; means over classes leave out NaN."""
        return {
            "mIoU": _percent(mean_of_known(self.iou)),
            "accuracy": _percent(float(_share(self.both.sum(), self.true.sum()))),
            "class_accuracy": _percent(mean_of_known(self.recall)),
            "dice": _percent(mean_of_known(self.dice)),
            "fscore": _percent(mean_of_known(self.fscore)),
            "precision": _percent(mean_of_known(self.precision)),
            "recall": _percent(mean_of_known(self.recall)),
        }

    def rows(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """A row for each class; what a class has not is None."""
        columns = {
            "iou": self.iou,
            "accuracy": self.recall,
            "precision": self.precision,
            "dice": self.dice,
        }
        return [
            {
                "class": index,
                "name": str(index) if names is None else names[index],
                "pixels": int(self.true[index]),
                "predicted": int(self.predicted[index]),
                **{
                    name: None if np.isnan(values[index]) else _percent(float(values[index]))
                    for name, values in columns.items()
                },
            }
            for index in range(len(self.true))
        ]


@frozen(eq=False)
class ImageAreas:
    """Areas of one image by class, few numbers: of those classes that are in it."""

    index: int
    classes: NDArray[np.int32] = field(eq=False)
    counts: NDArray[np.int64]  # [3, classes]: in both, predicted, true

    @classmethod
    def of(cls, index: int, confusion: Counts) -> ImageAreas:
        areas = Areas.of(confusion)
        there = np.flatnonzero(areas.predicted + areas.true).astype(np.int32)
        stacked = np.stack([areas.both, areas.predicted, areas.true])
        return cls(index, there, stacked[:, there])


def miou_interval(images: Iterable[ImageAreas], n_classes: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mIoU, in percent; images are drawn, the same for a seed."""
    ordered = sorted(images, key=lambda each: each.index)
    table = np.zeros((len(ordered), 3, n_classes))
    for row, each in zip(table, ordered, strict=True):
        row[:, each.classes] = each.counts
    rng, found = keyed_rng(seed, "bootstrap mIoU"), []
    step = max(_AT_ONCE // len(ordered), 1)
    for start in range(0, _RESAMPLES, step):
        size = min(step, _RESAMPLES - start)
        draws = rng.multinomial(len(ordered), np.full(len(ordered), 1 / len(ordered)), size=size)
        sums = (draws @ table.reshape(len(ordered), -1)).reshape(size, 3, n_classes)
        found += [mean_of_known(Areas(*each).iou) for each in sums]
    low, high = np.percentile(found, [2.5, 97.5])
    return _percent(float(low)), _percent(float(high))


def mean_of_known(values: _Shares) -> float:
    """The mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _share(part: Any, whole: Any) -> _Shares:
    """part / whole in float64, NaN where both are 0."""
    whole = np.asarray(whole, dtype=np.float64)
    nothing = np.full(whole.shape, np.nan)
    return np.divide(np.asarray(part, dtype=np.float64), whole, out=nothing, where=whole > 0)


def _percent(value: float) -> float:
    return round(100 * value, 4)
