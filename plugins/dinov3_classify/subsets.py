"""Which training images a few-shot evaluation has, and which are held out to choose on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.randomness import keyed_rng


def choose_per_class(labels: Tensor, count: int, seed: int, try_index: int) -> Tensor:
    """``count`` images of each class, or all where there are fewer: increasing places, int64.

    A larger count has those of a smaller one among its own.
    """
    shuffled, rank, _ = _shuffled(labels, seed, "few-shot", try_index)
    return _places(shuffled[rank < count])


def choose_share(labels: Tensor, share: float, seed: int, try_index: int) -> Tensor:
    """That share (0..1) of the images of each class, rounded, at least one: increasing places."""
    shuffled, rank, counts = _shuffled(labels, seed, "few-shot", try_index)
    return _places(shuffled[rank < np.maximum(1, np.floor(share * counts + 0.5))])


def few_shot_draws(
    labels: Tensor,
    n_per_class: Sequence[int],
    percent: Sequence[float],
    tries: int,
    seed: int,
) -> dict[str, list[Tensor]]:
    """The places of each try, by what metrics call them: ``5-shot``, ``1%``."""
    draws = {
        f"{count}-shot": [choose_per_class(labels, count, seed, each) for each in range(tries)]
        for count in n_per_class
    }
    for share in percent:
        draws[f"{share:g}%"] = [
            choose_share(labels, share / 100, seed, each) for each in range(tries)
        ]
    return draws


def hold_out(labels: Tensor, share: float, seed: int, try_index: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the images that are kept and of those held out: a share of all, at least one.

    They are drawn from all classes alike, but the last image of a class is never held out. The
    second is empty if every class has one image alone.
    """
    shuffled, rank, _ = _shuffled(labels, seed, "hold out", try_index)
    free = shuffled[rank > 0]
    rng = keyed_rng(seed, "hold out of all", try_index)
    held = rng.permutation(free)[: max(1, int(share * len(labels) + 0.5))]
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return _places(kept), _places(held)


def _shuffled(
    labels: Tensor, seed: int, purpose: str, try_index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in random order, class by class; the place of each in its class; its class's size."""
    classes = labels.cpu().numpy()
    order = keyed_rng(seed, purpose, try_index).permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    counts = np.bincount(classes)
    first = np.cumsum(counts) - counts
    of = classes[order]
    return order, np.arange(len(order)) - first[of], counts[of]


def _places(found: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(found).astype(np.int64))
