"""Random generators keyed by what they are for.

A stream of numbers is named by (seed, purpose, step or sample), never by a worker or by how many
processes there are: that is what makes a resumed run repeat the bits of an uninterrupted one.
"""

from __future__ import annotations

import zlib

import numpy as np


def keyed_rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose, key)."""
    entropy = (seed, zlib.crc32(purpose.encode()), *key)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def keyed_seed(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed for (seed, purpose, key), for generators that want a number."""
    entropy = (seed, zlib.crc32(purpose.encode()), *key)
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])
