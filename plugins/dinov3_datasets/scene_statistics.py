"""What values the bands of scenes have, over a seeded sample of windows; kept in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, fields, frozen

from dinov3_framework import DataError
from dinov3_framework.errors import CorruptSampleError, printable
from dinov3_framework.randomness import keyed_rng
from dinov3_framework.runtime.durable import written_aside

_FORMAT = "band statistics 1"
_PIXELS = 4096  # of a window, for percentiles


@frozen
class BandStatistics:
    """Of each band, in the order of the channels; of values with data alone."""

    bands: tuple[int, ...]
    values: str  # "stored", or "scaled" by the files' scale and offset
    windows: int  # that were read
    seed: int
    percentiles: tuple[float, float]
    low: tuple[float, ...]  # at the first of the percentiles
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    valid: tuple[float, ...]  # share of the pixels with data

    def rows(self) -> list[dict[str, float]]:
        """A flat row for each band."""
        first, last = (f"percentile_{each:g}" for each in self.percentiles)
        columns = {
            "band": self.bands, "mean": self.mean, "std": self.std, "min": self.min,
            first: self.low, last: self.high, "max": self.max, "valid": self.valid,
        }  # fmt: skip
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class _Moments:
    """Mean and deviation of what came so far, merged part by part (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.min, self.max = float("inf"), float("-inf")

    def add(self, values: np.ndarray) -> None:
        if not values.size:
            return
        values = values.astype(np.float64)
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        total, apart = self.count + values.size, mean - self.mean
        self.squares += squares + apart**2 * self.count * values.size / total
        self.mean += apart * values.size / total
        self.count = total
        self.min = min(self.min, float(values.min()))
        self.max = max(self.max, float(values.max()))

    @property
    def std(self) -> float:
        return float((self.squares / self.count) ** 0.5)


def sampled(total: int, count: int, seed: int) -> list[int]:
    """``count`` windows of ``total`` at random, in order; all where there are no more."""
    if count >= total:
        return list(range(total))
    found = keyed_rng(seed, "scene statistics").choice(total, count, replace=False)
    return sorted(found.tolist())


def gather(
    read: Callable[[int], tuple[np.ndarray, np.ndarray]],
    windows: Iterable[int],
    bands: Sequence[int],
    *,
    values: str,
    seed: int,
    percentiles: tuple[float, float],
) -> BandStatistics:
    """Statistics of what ``read`` gives of each window: values and validity, both [C, h, w].

    Windows that cannot be decoded are passed over.
    Means, deviations and extremes are of all pixels of these windows, percentiles of 4,096 of each.
    """
    moments = [_Moments() for _ in bands]
    some: list[list[np.ndarray]] = [[] for _ in bands]
    pixels = windows_read = 0
    for index in windows:
        try:
            found, valid = read(index)
        except CorruptSampleError:
            continue
        windows_read += 1
        pixels += valid[0].size
        rng = keyed_rng(seed, "scene statistics pixels", index)
        picked = rng.choice(valid[0].size, min(_PIXELS, valid[0].size), replace=False)
        for band in range(len(bands)):
            moments[band].add(found[band][valid[band]])
            some[band].append(found[band].ravel()[picked][valid[band].ravel()[picked]])
    if empty := [bands[n] for n, each in enumerate(moments) if not each.count]:
        raise DataError(f"geotiff_scenes: band {empty[0]} has no data in {windows_read} windows")
    levels = [
        np.percentile(np.concatenate(each or [np.zeros(0)]).astype(np.float64), percentiles)
        if sum(part.size for part in each)
        else np.array([moments[n].min, moments[n].max])
        for n, each in enumerate(some)
    ]
    return BandStatistics(
        bands=tuple(bands),
        values=values,
        windows=windows_read,
        seed=seed,
        percentiles=percentiles,
        low=tuple(float(low) for low, _ in levels),
        high=tuple(float(high) for _, high in levels),
        mean=tuple(each.mean for each in moments),
        std=tuple(each.std for each in moments),
        min=tuple(each.min for each in moments),
        max=tuple(each.max for each in moments),
        valid=tuple(each.count / pixels for each in moments),
    )


# --------------------------------------------------------------------------- the file
def write_statistics(path: Path, found: BandStatistics) -> None:
    """Write the file at once; raises ``DataError``."""
    text = json.dumps({"format": _FORMAT} | asdict(found), indent=1)
    try:
        with written_aside(path) as aside:
            aside.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise DataError(
            f"geotiff_scenes: cannot write statistics = {str(path)!r}: {error.strerror}"
        ) from error


def read_statistics(path: Path, bands: Sequence[int], values: str) -> BandStatistics:
    """Read the file, and see that it is of these bands; raises ``DataError``."""

    def wrong(what: str) -> DataError:
        return DataError(
            f"geotiff_scenes: statistics = {str(path)!r} {printable(what, kept='')}\n"
            "    remove the file, and the next run gathers them anew"
        )

    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise wrong(f"is no JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise wrong(f"is not of the format {_FORMAT!r}")
    names = {each.name for each in fields(BandStatistics)}
    if odd := sorted(names ^ data.keys()):
        raise wrong(f"lacks, or has besides, {', '.join(odd)}")
    by_band = names - {"values", "windows", "seed", "percentiles"}
    for name in sorted(by_band | {"percentiles"}):
        count = 2 if name == "percentiles" else len(bands)
        if not _are_numbers(data[name], count):
            raise wrong(f"has no {count} numbers as {name}, for bands {list(bands)}")
        data[name] = tuple(data[name])
    if data["bands"] != tuple(bands):
        raise wrong(f"is of the bands {list(data['bands'])}, not {list(bands)}")
    if data["values"] != values:
        raise wrong(f"is of {data['values']} values, apply_scale makes them {values}")
    return BandStatistics(**data)


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, int | float) and np.isfinite(each) for each in value)
    )
