"""k-NN classification on frozen features, by a weighted vote (Wu et al. 2018, arXiv:1805.01978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from dinov3_classify.metrics import Classification, check_labels
from dinov3_classify.search import nearest
from dinov3_framework import DataError, collectives

_VOTES = 1 << 24  # test rows by classes in one matrix of votes: 64 MB


@frozen
class LabeledShare:
    """This process's share of a training set; together the shares are the set."""

    features: Tensor  # [m, D]
    places: Tensor  # int64 [m], increasing: which of all images these are
    labels: Tensor  # int64, of all images of all processes, by place

    @classmethod
    def whole(cls, features: Tensor, labels: Tensor) -> LabeledShare:
        """All of it, of a single process."""
        return cls(features, torch.arange(len(features)), labels)

    @classmethod
    def of_indices(cls, features: Tensor, labels: Tensor, indices: Tensor) -> LabeledShare:
        """Of each process's labels and places in a dataset; call it on every process.

        Places are counted among the images that there are, whichever could not be read.
        """
        shares = collectives.all_gather_object((indices.numpy(), labels.numpy()))
        parts = [tuple(map(torch.from_numpy, share)) for share in shares]  # type: ignore[call-overload]
        every, order = torch.cat([found for found, _ in parts]).sort()
        known = torch.cat([found for _, found in parts])[order]
        return cls(features, torch.searchsorted(every, indices), known)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, chosen: Tensor) -> LabeledShare:
        """The images at ``chosen`` alone, increasing places."""
        place = torch.searchsorted(chosen, self.places)
        mine = chosen[place.clamp(max=len(chosen) - 1)] == self.places
        return LabeledShare(self.features[mine], place[mine], self.labels[chosen])


@torch.no_grad()
def knn_classify(
    train: LabeledShare,
    queries: Tensor,
    truth: Tensor,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    weighted: bool = True,
    n_classes: int,
    device: torch.device | None = None,
) -> dict[int, Classification]:
    """How test images are classified with each number of neighbors in ``k``.

    Neighbors are the training features of highest cosine similarity s; of equally near ones those
    that come first. Of the max(k) nearest, each votes for its class with softmax(s / temperature),
    taken over these max(k), or with 1 if not ``weighted``; for each k the votes of the first k are
    counted. Of classes with equal votes the lowest wins. A class without a vote is never right.

    ``queries`` [n, D] and ``truth`` (int64 [n] or bool [n, C]) are the same on every process, and
    so are the results. The work is done on ``device``, or left out where the queries are.

    Raises ``DataError`` with wrong labels, with fewer training features than max(k), or with
    features that are not finite.
    """
    check_labels("training", train.labels, n_classes)
    check_labels("test", truth, n_classes)
    if max(k) > len(train):
        raise DataError(f"k = {max(k)} neighbors of only {len(train)} training images")
    _check_finite("training", train.features)
    _check_finite("test", queries)
    similarity, place = nearest(queries, train.features, max(k), places=train.places, device=device)
    weights = (similarity / temperature).softmax(dim=1)
    if not weighted:
        weights = torch.ones_like(weights)
    labels = train.labels.to(place.device)[place]
    return {
        count: Classification.of_scores(
            _votes(weights[:, :count], labels[:, :count], n_classes), truth, n_classes
        )
        for count in k
    }


def _votes(weights: Tensor, labels: Tensor, n_classes: int) -> Iterator[Tensor]:
    """Votes by class [rows, C], some rows at a time; -inf of a class that no neighbor is of."""
    rows = max(1, _VOTES // n_classes)
    for weight, label in zip(weights.split(rows), labels.split(rows), strict=True):
        votes = weight.new_zeros(len(weight), n_classes).scatter_add_(1, label, weight)
        absent = torch.ones_like(votes, dtype=torch.bool).scatter_(1, label, value=False)
        yield votes.masked_fill_(absent, -torch.inf)


def _check_finite(what: str, features: Tensor) -> None:
    # Told on all processes, whosever features they are.
    if not all(collectives.all_gather_object(bool(features.isfinite().all()))):
        raise DataError(f"features of the {what} set are not finite (NaN or infinity)")
