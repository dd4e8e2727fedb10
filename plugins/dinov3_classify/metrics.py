"""What is counted of classified images: accuracies, their confidence, and which classes are taken
for which.

The letters in shapes: n images, C classes. The truth is a class of each image, int64 [n], or
several, bool [n, C], of which any counts as right (ImageNet-ReaL).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework import DataError
from dinov3_framework.randomness import keyed_rng

_RESAMPLES = 10_000
_CLASS_RESAMPLES = 2_000  # of all classes each
_MATRIX = 4096  # classes up to which there is a confusion matrix: 128 MB
_CONFUSED = 20  # pairs in the table of the most confused classes


@frozen
class Classification:
    """How images were classified. Images without any true class are left out."""

    predicted: Tensor  # int64 [n]
    rank: Tensor  # int64 [n]: how many classes come before the best true one; C if it got nothing
    truth: Tensor  # int64 [n] or bool [n, C]
    n_classes: int

    @classmethod
    def of_scores(cls, chunks: Iterable[Tensor], truth: Tensor, n_classes: int) -> Classification:
        """From scores by class [rows, C], some images at a time, in the order of ``truth``.

        Of classes with equal scores the lowest comes first. A class that got nothing has -inf, or
        NaN: where the true one did, an image is not rightly classified, whatever else it got.
        """
        predicted, ranks, start = [], [], 0
        for scores in chunks:
            part = truth[start : start + len(scores)].to(scores.device)
            start += len(scores)
            first, rank = _rank(scores, part)
            predicted.append(first.cpu())
            ranks.append(rank.cpu())
        found = cls(torch.cat(predicted), torch.cat(ranks), truth.cpu(), n_classes)
        if truth.ndim == 1 or bool(truth.any(dim=1).all()):
            return found
        known = truth.cpu().any(dim=1)
        return cls(found.predicted[known], found.rank[known], found.truth[known], n_classes)

    def __len__(self) -> int:
        return len(self.rank)

    def right(self, top: int = 1) -> Tensor:
        """Whether a true class is among the first ``top``: float64 [n], 0 or 1."""
        return (self.rank < top).double()

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Images, and those classified rightly, of each class: int64 [C] each.

        An image of several classes counts for each of them.
        """
        right = self.rank == 0
        if self.truth.ndim == 2:
            return self.truth.sum(dim=0).numpy(), self.truth[right].sum(dim=0).numpy()
        counts = (
            torch.bincount(each, minlength=self.n_classes)
            for each in (self.truth, self.truth[right])
        )
        images, hits = (count.numpy() for count in counts)
        return images, hits

    def confusion(self) -> np.ndarray | None:
        """int64 [C, C], rows the truth, columns what was predicted.

        None where images have several classes, and where there are more than 4,096.
        """
        if self.truth.ndim == 2 or self.n_classes > _MATRIX:
            return None
        cells = self.truth * self.n_classes + self.predicted
        counts = torch.bincount(cells, minlength=self.n_classes**2)
        return counts.view(self.n_classes, self.n_classes).numpy()


def _rank(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The first class [rows], and how many come before the best true one."""
    # A comparison with NaN is false, and no class would come before a true one that has it.
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best = scores.amax(dim=1, keepdim=True)
    predicted = (scores == best).int().argmax(dim=1)  # the first of equal ones
    if truth.ndim == 2:
        among = scores.masked_fill(~truth, -torch.inf)
        own = among.amax(dim=1, keepdim=True)
        true = (truth & (among == own)).int().argmax(dim=1, keepdim=True)
    else:
        true = truth[:, None]
        own = scores.gather(1, true)
    lower = torch.arange(scores.shape[1], device=scores.device) < true
    before = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    return predicted, before.masked_fill(own[:, 0] == -torch.inf, scores.shape[1])


# --------------------------------------------------------------------------- labels
def check_labels(what: str, labels: Tensor | None, n_classes: int) -> Tensor:
    """The labels of the set that ``what`` names; ``DataError`` where they are missing or wrong."""
    if labels is None:
        raise DataError(f"the {what} set has no labels, and needs them")
    if len(labels) == 0:
        raise DataError(f"the {what} set is empty")
    if labels.ndim == 2:
        if labels.shape[1] != n_classes:
            raise DataError(
                f"the {what} set has labels of {labels.shape[1]} classes where {n_classes} are "
                f"expected"
            )
        if not bool(labels.any()):
            raise DataError(f"not one image of the {what} set has a label")
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise DataError(
            f"the {what} set has labels {low}..{high} where {n_classes} classes are expected"
        )
    return labels


def check_classes(
    train: Tensor, test: Tensor, n_classes: int, names: Sequence[str] | None = None
) -> None:
    """Raise ``DataError`` if test images are of a class that no training image has."""
    known = torch.bincount(train.cpu(), minlength=n_classes) > 0
    test = test.cpu()
    asked = test.any(dim=0) if test.ndim == 2 else torch.bincount(test, minlength=n_classes) > 0
    if lacking := (asked & ~known).nonzero()[:, 0].tolist():
        shown = ", ".join(class_name(names, each) for each in lacking[:5])
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise DataError(f"classes of test images that no training image has: {shown}{more}")


def class_name(names: Sequence[str] | None, index: int) -> str:
    return str(index) if names is None else names[index]


# --------------------------------------------------------------------------- confidence
def mean_interval(values: Tensor, seed: int, name: str) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of ``values`` [n], the same for the same seed and name.

    How often each of the different values is drawn in a resample is multinomial, so that 10,000
    resamples cost no more for many images than for few.
    """
    found, counts = np.unique(values.cpu().double().numpy(), return_counts=True)
    draws = keyed_rng(seed, f"bootstrap {name}").multinomial(
        counts.sum(), counts / counts.sum(), size=_RESAMPLES
    )
    return _middle(draws @ found / counts.sum())


def class_mean(result: Classification) -> float:
    """The mean over classes of their accuracies; classes without images are left out."""
    images, hits = result.by_class()
    there = images > 0
    return float((hits[there] / images[there]).mean())


def class_mean_interval(result: Classification, seed: int, name: str) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`class_mean`; images are drawn from all classes alike."""
    images, hits = result.by_class()
    cells = np.concatenate([hits, images - hits])
    draws = keyed_rng(seed, f"bootstrap {name}").multinomial(
        cells.sum(), cells / cells.sum(), size=_CLASS_RESAMPLES
    )
    right, wrong = np.split(draws, 2, axis=1)
    drawn = right + wrong
    shares = np.divide(right, drawn, out=np.zeros(right.shape), where=drawn > 0)
    return _middle(shares.sum(axis=1) / (drawn > 0).sum(axis=1))


def _middle(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------- tables
def class_rows(
    result: Classification, names: Sequence[str] | None, **labels: str
) -> list[dict[str, Any]]:
    """A row for each class, beginning with ``labels``; the accuracy is None without images."""
    return [
        {
            **labels,
            "class": index,
            "name": class_name(names, index),
            "images": int(images),
            "accuracy": round(100 * float(hits / images), 4) if images else None,
        }
        for index, (images, hits) in enumerate(zip(*result.by_class(), strict=True))
    ]


def confused_rows(
    confusion: np.ndarray, names: Sequence[str] | None, **labels: str
) -> list[dict[str, Any]]:
    """The pairs of a class and another that its images are most often taken for."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    truths, others = wrong.nonzero()
    order = np.argsort(-wrong[truths, others], kind="stable")[:_CONFUSED]
    images = confusion.sum(axis=1)
    return [
        {
            **labels,
            "class": class_name(names, truth),
            "taken for": class_name(names, other),
            "images": int(wrong[truth, other]),
            "of": int(images[truth]),
        }
        for truth, other in zip(truths[order].tolist(), others[order].tolist(), strict=True)
    ]
