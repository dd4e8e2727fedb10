"""Training and validation parts of a folder of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TRAIN = "train"
VAL = ("val", "valid", "validation", "test")  # the first that is there


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The subfolders for training and validation, if ``root`` has both."""
    if not (root / TRAIN).is_dir():
        return None
    found = next((name for name in VAL if (root / name).is_dir()), None)
    return None if found is None else (root / TRAIN, root / found)


def choose_val(
    names: Iterable[str], groups: np.ndarray | None, fraction: float, seed: int
) -> np.ndarray:
    """Which of some files are for validation, bool [n]: ``fraction`` of each group, at random.

    ``groups`` [n] are labels, or None for one group. A group of two files or more has at least one
    on each side, a single file is for training. The files of a group are ranked by a hash of seed
    and name, so that a file that comes or goes moves at most one other.
    """
    ranks = np.array([_rank(name, seed) for name in names], dtype=np.uint64)
    groups = np.zeros(len(ranks), dtype=np.int64) if groups is None else groups
    order = np.lexsort((ranks, groups))
    chosen = np.zeros(len(ranks), dtype=bool)
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        count = len(members)
        if count >= 2:
            chosen[members[: min(max(round(count * fraction), 1), count - 1)]] = True
    return chosen


def _rank(name: str, seed: int) -> int:
    key = b"%d\0%b" % (seed, os.fsencode(name))
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
