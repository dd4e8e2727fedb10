"""What the dataset of satellite scenes can be told."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    DatasetConfig,
    InvalidOption,
    config,
    fraction,
    not_negative,
    option,
    positive,
)


def _bands(value: tuple[int, ...]) -> str | None:
    if not value:
        return "must name at least one band"
    return None if min(value) >= 1 else f"count from 1, found {min(value)}"


def _bits(value: int) -> str | None:
    return None if 1 <= value <= 32 else f"must be 1 to 32, not {value}"


def _percentiles(value: tuple[float, float]) -> str | None:
    low, high = value
    return None if 0 <= low < high <= 100 else f"must be two increasing numbers in 0..100: {value}"


@config
class GeotiffScenesConfig(DatasetConfig):
    """Windows of the GeoTIFF scenes below a folder, on a grid, each read by itself.

    The last window of a row and of a column is pulled back to the scene's edge; a scene smaller
    than a window is padded. Needs ``pip install 'dinov3-framework[geo]'``. There are no labels.
    """

    root: str = option("the folder of the scenes, at any depth, or one scene", is_place=True)
    pattern: str | None = option(
        "which of them, by their path below root: * stands for anything, as in 2024/*_SR.tif; "
        "left out, all that end in .tif or .tiff",
        default=None,
    )
    scenes: tuple[str, ...] | None = option(
        "in place of pattern, the paths below root, in this order", default=None
    )
    bands: tuple[int, ...] | None = option(
        "bands by their number from 1, in the order of the channels; left out, all but an alpha "
        "band; there must be images.channels of them",
        default=None,
        check=_bands,
    )
    tile: int = option("side of a window in pixels", default=512, check=positive)
    stride: int | None = option(
        "pixels from one window to the next; left out, tile", default=None, check=positive
    )
    min_valid: float = option(
        "share of a window's pixels that must have data in one of the bands, or it is left out; 0 "
        "keeps all and looks at none",
        default=0.5,
        check=fraction,
    )
    nodata: float | None = option(
        "the stored value that means no data, beside what the files say of it", default=None
    )
    fill: Literal["low", "mean"] = option(
        "what stands where a band has no data: the lowest value (0), or the band's mean, which "
        "needs statistics",
        default="low",
    )
    apply_scale: bool = option(
        "multiply by the files' scale and add their offset first, so that all values here are "
        "physical ones; off, they are those stored",
        default=False,
    )
    bits: int | None = option(
        "bits that the values of wider files really have, such as 10 or 12; left out, 16 of 16",
        default=None,
        check=_bits,
    )
    low: float | None = option("in place of bits, the value that becomes 0", default=None)
    high: float | None = option("and the value that becomes 255", default=None)
    band_low: tuple[float, ...] | None = option("in place of low, one for each band", default=None)
    band_high: tuple[float, ...] | None = option("and of high", default=None)
    range: Literal["stated", "percentile"] = option(
        "where those values come from: bits or low and high (stated), or percentiles of each band, "
        "the same for all windows, from statistics (percentile)",
        default="stated",
    )
    percentiles: tuple[float, float] = option(
        "percentiles that become 0 and 255", default=(2.0, 98.0), check=_percentiles
    )
    statistics: str | None = option(
        "a JSON file with the statistics of the bands; where there is none yet, they are gathered "
        "from a seeded sample of the windows and written to it",
        default=None,
        is_place=True,
    )
    statistics_windows: int = option("windows of that sample", default=256, check=positive)
    statistics_seed: int = option("seed of that sample", default=0, check=not_negative)
    max_open: int = option("scenes that a process holds open at a time", default=16, check=positive)

    def __attrs_post_init__(self) -> None:
        if self.scenes is not None and self.pattern is not None:
            raise InvalidOption("scenes", "goes in place of pattern, not with it")
        for lowest, highest in (("low", "high"), ("band_low", "band_high")):
            if (getattr(self, lowest) is None) != (getattr(self, highest) is None):
                raise InvalidOption(lowest, f"{lowest} and {highest} go together")
        stated = [self.bits is not None, self.low is not None, self.band_low is not None]
        if sum(stated) > 1:
            raise InvalidOption(
                "bits", "state the range once: bits, low and high, or those by band"
            )
        if self.range == "percentile" and any(stated):
            raise InvalidOption("range", '"percentile" goes without bits, low and high')
        needs = 'range = "percentile"' if self.range == "percentile" else ""
        needs = needs or ('fill = "mean"' if self.fill == "mean" else "")
        if needs and self.statistics is None:
            raise InvalidOption("statistics", f"{needs} needs a file to keep statistics in")
        lows, highs = self.stated_range(1)
        if len(lows) != len(highs):
            raise InvalidOption("band_low", f"has {len(lows)} numbers, band_high {len(highs)}")
        for low, high in zip(lows, highs, strict=True):
            if not low < high:
                raise InvalidOption("low", f"is {low:g}, not below high = {high:g}")

    def stated_range(self, bands: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The values that become 0 and 255 of each band, if they are stated; () otherwise."""
        if self.bits is not None:
            return (0.0,) * bands, (2.0**self.bits - 1,) * bands
        if self.low is not None and self.high is not None:
            return (self.low,) * bands, (self.high,) * bands
        return self.band_low or (), self.band_high or ()
