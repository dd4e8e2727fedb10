"""Who comes at which place where several share a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def split_length(length: int, weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers that sum to ``length``, in proportion to ``weights`` by largest remainders."""
    total = sum(weights)
    exact = [length * weight / total for weight in weights]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for place in by_remainder[: length - sum(counts)]:
        counts[place] += 1
    return counts


def place_of(index: int, counts: Sequence[int]) -> tuple[int, int]:
    """(which, the how manieth of it) at ``index`` of a sequence that has ``counts`` of each.

    Each is spread evenly: the first over the whole sequence, the others over what it leaves free,
    and so on. Of any stretch the j-th (from 1) has its share within j, whatever the length.
    """
    total = sum(counts)
    for which, count in enumerate(counts):
        before = index * count // total
        if (index + 1) * count // total > before:
            return which, before
        index, total = index - before, total - count
    raise IndexError("no such place")
