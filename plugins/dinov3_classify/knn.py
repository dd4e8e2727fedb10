"""Weighted k-NN classification on frozen features (Wu et al. 2018, arXiv:1805.01978).

Class tokens of a barely trained backbone nearly coincide: with LayerScale at 1e-5 their cosines
differ by about 1e-10, which float32 cannot tell from 1, and neighbors would come out at random.
So similarities are taken about the mean m of the unit vectors b of the training set: for unit
vectors a and b, with a' = a - m and b' = b - m,

    cos(a, b) = a' b' - |b'|^2 / 2 + (terms of a alone),

and what depends on a alone changes neither which neighbors are nearest nor their softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_framework import DataError, Features

_CHUNK = 4096  # test rows by training rows in one similarity matrix: 64 MB


@torch.no_grad()
def knn_classify(
    train: Features,
    test: Features,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    n_classes: int,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Accuracy in 0..1 for each number of neighbors in ``k``.

    Neighbors are the training features of highest cosine similarity s. Of the max(k) nearest,
    each votes for its class with softmax(s / temperature), taken over these max(k); accuracy@k
    counts the votes of the first k. Of classes with equal votes the lowest wins.

    The work is done on ``device``, or left out where the features are, in chunks: beyond the test
    features, memory does not grow with either set.

    Raises ``DataError`` without labels, with labels outside 0..n_classes - 1, with fewer training
    features than max(k), or with features that are not finite.
    """
    _check(train, test, k, n_classes)
    labels = _labels(train).to(device)
    queries = F.normalize(test.cls.to(device), dim=1)
    similarity, index = _neighbors(queries, train.cls, max(k))
    weights = (similarity / temperature).softmax(dim=1)
    predicted = _vote(weights, labels[index], k, n_classes)
    truth = _labels(test).to(device)
    return {count: float((predicted[count] == truth).double().mean()) for count in k}


def _neighbors(queries: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each unit query [n, D]: similarities (up to a constant of the query) and
    indices in ``train``, [n, k], nearest first."""
    chunks = range(0, len(train), _CHUNK)

    def unit(start: int) -> Tensor:
        return F.normalize(train[start : start + _CHUNK].to(queries.device), dim=1)

    mean = torch.stack([unit(start).sum(dim=0) for start in chunks]).sum(dim=0) / len(train)
    queries = queries - mean
    best = queries.new_full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in chunks:
        keys = unit(start) - mean
        half_square = keys.square().sum(dim=1) / 2
        for first in range(0, len(queries), _CHUNK):
            rows = slice(first, first + _CHUNK)
            similarity = queries[rows] @ keys.T - half_square
            found, place = similarity.topk(min(k, len(keys)), dim=1)
            candidates = torch.cat([best[rows], found], dim=1)
            indices = torch.cat([index[rows], place + start], dim=1)
            best[rows], order = candidates.topk(k, dim=1)
            index[rows] = indices.gather(1, order)
    return best, index


def _vote(weights: Tensor, labels: Tensor, k: Sequence[int], n_classes: int) -> dict[int, Tensor]:
    """The winning class [n] after the first k of the neighbors, nearest first, for each k."""
    winners: dict[int, list[Tensor]] = {count: [] for count in k}
    rows = max(1, _CHUNK * _CHUNK // n_classes)
    for start in range(0, len(weights), rows):
        part, votes_for = weights[start : start + rows], labels[start : start + rows]
        votes = part.new_zeros(len(part), n_classes)
        done = 0
        for count in sorted(k):
            votes.scatter_add_(1, votes_for[:, done:count], part[:, done:count])
            done = count
            winners[count].append(votes.argmax(dim=1))
    return {count: torch.cat(parts) for count, parts in winners.items()}


def _labels(features: Features) -> Tensor:
    if features.labels is None:
        raise DataError("k-NN needs labels, and the dataset has none")
    labels: Tensor = features.labels
    return labels


def _check(train: Features, test: Features, k: Sequence[int], n_classes: int) -> None:
    for what, features in (("training", train), ("test", test)):
        labels = _labels(features)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_classes:
            raise DataError(
                f"the {what} set has labels {low}..{high} where {n_classes} classes are expected"
            )
        if not features.cls.isfinite().all():
            raise DataError(f"features of the {what} set are not finite (NaN or infinity)")
    if max(k) > len(train.cls):
        raise DataError(f"k = {max(k)} neighbors of only {len(train.cls)} training images")
