"""Exact search for the nearest neighbors by cosine similarity (no index, no approximation).

Class tokens of a barely trained backbone nearly coincide: with LayerScale at 1e-5 their cosines
differ by about 1e-10, which float32 cannot tell from 1, and neighbors would come out at random.
So similarities are taken about the mean m of the unit vectors b of the training set: for unit
vectors a and b, with a' = a - m and b' = b - m,

    cos(a, b) = a' b' - |b'|^2 / 2 + (terms of a alone),

and what depends on a alone changes neither which neighbors are nearest nor their softmax.

Once some training vectors are seen, few of the others come near enough to matter. So in the
similarities of a block, columns are first reduced to maxima of groups; only groups whose maximum
is above the k-th best so far of its query are looked into. What passes is merged with the k best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_framework import collectives

_ROWS, _COLUMNS = 2048, 16384  # queries by training vectors in one block of similarities: 128 MB
_GROUP = 32  # columns of which the maximum is taken
_SORTED = 4 << 20  # entries that are sorted at once


@torch.no_grad()
def nearest(
    queries: Tensor,
    train: Tensor,
    k: int,
    *,
    places: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k training vectors of highest cosine similarity for each query.

    Returns similarities, float32 [n, k], up to a constant of each query, and places, int64 [n, k],
    nearest first; of equally near ones the lowest place first. ``queries`` [n, D] are the same on
    every process; ``train`` [m, D] are this process's own, whose places among all are ``places``
    [m], increasing (left out: those of a single process). All get the neighbors among all of them.
    There must be at least k in all.

    The work is done on ``device``, or left out where the queries are. Beyond queries and results,
    memory grows with neither set.
    """
    queries = F.normalize(queries.to(device).float(), dim=1)
    mean = _mean(train, queries)
    # A column of ones takes up half the square of each key, so that one product gives it all.
    queries = torch.cat([queries - mean, queries.new_ones(len(queries), 1)], dim=1)
    best = queries.new_full((len(queries), k), -torch.inf)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    buffer = queries.new_empty(min(_ROWS, len(queries)) * _padded(min(_COLUMNS, len(train))))
    start, width = 0, max(k, 1024)  # small at first, as all that is seen first is sorted
    while start < len(train):
        width = min(width, _COLUMNS, len(train) - start)
        keys = _keys(train[start : start + width], mean)
        for first in range(0, len(queries), _ROWS):
            rows = slice(first, first + _ROWS)
            similarity = _product(queries[rows], keys, width, buffer)
            _merge(best[rows], index[rows], similarity, start)
        start, width = start + width, 2 * width
    if places is not None:
        index = places.to(index.device)[index] if len(places) else index
    return _merge_processes(best, index)


def _mean(train: Tensor, queries: Tensor) -> Tensor:
    """The mean of all processes' unit training vectors; in float64, so that their order is none."""
    total = torch.zeros(train.shape[1] + 1, dtype=torch.float64, device=queries.device)
    for part in train.split(_COLUMNS):
        total[:-1] += F.normalize(part.to(queries), dim=1).sum(dim=0, dtype=torch.float64)
    total[-1] = len(train)
    total = collectives.all_reduce_sum(total)
    return (total[:-1] / total[-1]).float()


def _padded(width: int) -> int:
    return math.ceil(width / _GROUP) * _GROUP


def _keys(part: Tensor, mean: Tensor) -> Tensor:
    """[padded width, D + 1]: unit vectors about the mean, and minus half their squares."""
    keys = mean.new_zeros(_padded(len(part)), len(mean) + 1)
    centered = keys[: len(part), :-1]
    torch.sub(F.normalize(part.to(mean), dim=1), mean, out=centered)
    keys[: len(part), -1] = centered.square().sum(dim=1) / -2
    return keys


def _product(queries: Tensor, keys: Tensor, width: int, buffer: Tensor) -> Tensor:
    out = buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
    torch.mm(queries, keys.T, out=out)
    out[:, width:] = -torch.inf
    return out


def _merge(best: Tensor, index: Tensor, similarity: Tensor, start: int) -> None:
    """Bring what is nearer in ``similarity`` [rows, columns] into the k best, in place.

    Columns come after all that were seen before: an equal similarity is no nearer.
    """
    rows, columns = similarity.shape
    groups = similarity.view(rows, _GROUP, columns // _GROUP)  # of columns that lie far apart
    bound = best[:, -1:]
    row, group = (groups.amax(dim=1) > bound).nonzero(as_tuple=True)
    if 4 * _GROUP * len(row) > rows * columns:
        _merge_all(best, index, similarity, start)
        return
    looked_into = groups[row, :, group]
    which, member = (looked_into > bound[row]).nonzero(as_tuple=True)
    row, column = row[which], member * groups.shape[2] + group[which]
    order = (row * columns + column).argsort()
    row, column, value = row[order], column[order], looked_into[which, member][order]
    if len(row) == 0:
        return
    counts = torch.bincount(row, minlength=rows)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    found = best.new_full((rows, int(counts.max())), -torch.inf)
    places = index.new_zeros(found.shape)
    found[row, slot], places[row, slot] = value, column + start
    _keep(best, index, found, places)


def _merge_all(best: Tensor, index: Tensor, similarity: Tensor, start: int) -> None:
    """The same by sorting everything, where most of it may be nearer."""
    columns = similarity.shape[1]
    places = torch.arange(start, start + columns, device=index.device)
    step = max(1, _SORTED // (columns + best.shape[1]))
    for first in range(0, len(best), step):
        rows = slice(first, first + step)
        found = similarity[rows]
        _keep(best[rows], index[rows], found, places.expand(found.shape))


def _keep(best: Tensor, index: Tensor, found: Tensor, places: Tensor) -> None:
    """Of the k best and those found, the k best, in place; of equal ones those that come first."""
    k = best.shape[1]
    ordered, order = torch.cat([best, found], dim=1).sort(dim=1, descending=True, stable=True)
    best.copy_(ordered[:, :k])
    index.copy_(torch.cat([index, places], dim=1).gather(1, order[:, :k]))


def _merge_processes(best: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of all processes' k best."""
    world, k = collectives.world_size(), best.shape[1]
    if world == 1:
        return best, index
    for first in range(0, len(best), _ROWS):
        rows = slice(first, first + _ROWS)
        found, places = (
            collectives.all_gather(part[rows]).view(world, -1, k).transpose(0, 1).flatten(1)
            for part in (best, index)
        )
        places, order = places.sort(dim=1, stable=True)
        ordered, by_value = found.gather(1, order).sort(dim=1, descending=True, stable=True)
        best[rows], index[rows] = ordered[:, :k], places.gather(1, by_value[:, :k])
    return best, index
