"""Which image stands at which place of the training stream."""

from __future__ import annotations

import numpy as np

from dinov3_framework.randomness import keyed_seed

_ROUNDS = 4


class ShuffledStream:
    """An endless stream of passes over ``size`` samples, each pass in another order.

    Any place can be asked for at once, which is what resuming needs, and nothing of the size of
    the dataset is kept: the order of a pass is a Feistel network on the smallest power of four
    that holds the indices, and a result outside them is encrypted again until it falls inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys_of: tuple[int, np.ndarray] | None = None

    def __getitem__(self, place: int) -> int:
        """The index of the sample at ``place`` (from 0)."""
        epoch, value = divmod(place, self.size)
        keys = self._keys(epoch)
        while True:
            value = self._encrypt(value, keys)
            if value < self.size:
                return value

    def _keys(self, epoch: int) -> np.ndarray:
        if self._keys_of is None or self._keys_of[0] != epoch:
            rng = np.random.default_rng(keyed_seed(self.seed, "order", epoch))
            keys = rng.integers(1, 1 << 62, size=_ROUNDS, dtype=np.int64)
            self._keys_of = (epoch, keys)
        return self._keys_of[1]

    def _encrypt(self, value: int, keys: np.ndarray) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ int(key)) & self._mask)
        return (left << self._half_bits) | right


def _mix(value: int) -> int:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
