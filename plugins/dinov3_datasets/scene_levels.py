"""From the values of scenes to 0..255."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from attrs import frozen

from dinov3_framework.data.rasters import Range, to_8_bits

_SHOWN = 4  # bands, by a check


@frozen
class Levels:
    """Which value of each band becomes 0 and which 255, and what stands where it has no data."""

    low: tuple[float, ...] = ()  # () for what the type of the values holds
    high: tuple[float, ...] = ()
    fill: tuple[int, ...] = ()  # () for 0

    @classmethod
    def between(cls, low: tuple[float, ...], high: tuple[float, ...]) -> Levels:
        """Of given values; a band that has one value alone is 0."""
        pairs = zip(low, high, strict=True)
        return cls(low, tuple(last if last > first else first + 1 for first, last in pairs))

    def with_means(self, means: tuple[float, ...], dtype: np.dtype) -> Levels:
        """The same with the mean of each band where it has no data."""
        values = np.array(means, dtype=np.float32)
        if not self.low:
            # Of 8 and 16 bits, which alone go without a range.
            values = values / np.float32(np.iinfo(dtype).max) * 255
            return Levels(fill=tuple(int(each) for each in np.rint(values)))
        filled = self._scaled("means", values[:, None, None])
        return Levels(self.low, self.high, tuple(int(each) for each in filled.ravel()))

    def apply(self, name: str, values: np.ndarray, valid: np.ndarray, tile: int) -> np.ndarray:
        """uint8 [C, tile, tile] of values [C, h, w], the missing rows and columns filled too.

        Raises ``CorruptSampleError`` for a type that needs a range and has none.
        """
        bands, height, width = values.shape
        fill = np.array(self.fill or (0,) * bands, dtype=np.uint8)[:, None, None]
        image = np.empty((bands, tile, tile), dtype=np.uint8)
        image[:] = fill
        image[:, :height, :width] = np.where(valid, self._scaled(name, values), fill)
        return image

    def _scaled(self, name: str, values: np.ndarray) -> np.ndarray:
        if not self.low:
            return to_8_bits(name, values, None)
        ranges = zip(self.low, self.high, strict=True)
        return np.stack(
            [_to_8_bits(name, band, given) for band, given in zip(values, ranges, strict=True)]
        )

    def __str__(self) -> str:
        if not self.low:
            return "values of the files' type become 0 to 255"
        if len(set(zip(self.low, self.high, strict=True))) == 1:
            return f"values {self.low[0]:g} to {self.high[0]:g} become 0 to 255"
        each = ", ".join(f"{a:g} to {b:g}" for a, b in zip(self.low, self.high, strict=True))
        return f"values by band ({each}) become 0 to 255"


def _to_8_bits(name: str, values: np.ndarray, given: Range) -> np.ndarray:
    if values.dtype not in (np.uint16, np.int16):
        return to_8_bits(name, values, given)
    # By a table it takes a fraction of the time.
    return _table(given, values.dtype.name)[np.ascontiguousarray(values).view(np.uint16)]


@lru_cache(maxsize=64)
def _table(given: Range, dtype: str) -> np.ndarray:
    """What every value of 16 bits becomes, by the bits that it is stored with."""
    return to_8_bits("a table", np.arange(2**16, dtype=np.uint16).view(dtype), given)


def beyond_range(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], bands: Sequence[int], levels: Levels
) -> list[str]:
    """Bands whose values use little of their range, or lie outside it; in words.

    ``parts`` are the values and validity of some windows, both [C, h, w].
    """
    lines: list[str] = []
    for number, band in enumerate(bands if parts else ()):
        values = np.concatenate([each[number][valid[number]] for each, valid in parts])
        if not values.size:
            continue
        if levels.low:
            low, high = levels.low[number], levels.high[number]
        else:
            low, high = 0.0, float(np.iinfo(values.dtype).max)
        least, most = float(values.min()), float(values.max())
        if most - least < (high - low) / 4 and values.dtype != np.uint8:
            lines.append(
                f"band {band} holds {least:g} to {most:g} in {len(parts)} windows, a fraction of "
                f'{low:g} to {high:g}; state it (bits, low and high), or range = "percentile"'
            )
        elif (share := float(((values < low) | (values > high)).mean())) > 0.1:
            lines.append(f"{share:.0%} of band {band} lie outside {low:g} to {high:g}")
    more = [f"so for {len(lines) - _SHOWN:,} more bands"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]
