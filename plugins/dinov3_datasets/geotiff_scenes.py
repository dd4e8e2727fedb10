"""Windows of large satellite scenes as a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.listing import FileList
from dinov3_datasets.scene_configs import GeotiffScenesConfig
from dinov3_datasets.scene_files import (
    OpenScenes,
    Scene,
    SceneError,
    need_rasterio,
    read_header,
    read_pixels,
    reading,
)
from dinov3_datasets.scene_levels import Levels, beyond_range
from dinov3_datasets.scene_listing import list_scenes
from dinov3_datasets.scene_statistics import (
    BandStatistics,
    gather,
    read_statistics,
    sampled,
    write_statistics,
)
from dinov3_datasets.scene_windows import Grid, Windows, windows_with_data
from dinov3_framework import DataError, Dataset, Sample
from dinov3_framework.errors import CorruptSampleError, first_few, printable

_LOOKED_AT = 8  # windows, by a check


class GeotiffScenes(Dataset):
    """Windows of GeoTIFF scenes, uint8 [channels, tile, tile].

    Raises ``DataError`` for a folder without scenes, scenes without the bands or with values that
    need a range, and where no window has enough data.
    """

    def __init__(self, config: GeotiffScenesConfig, *, channels: int) -> None:
        need_rasterio()
        self.config = config
        self.root, names = list_scenes(config)
        self.unreadable: dict[str, str] = {}  # reasons by name
        found = dict(self._headers(names))
        if not found:
            reasons = [f"{name}: {reason}" for name, reason in self.unreadable.items()]
            raise DataError(
                f"geotiff_scenes: not one of {len(reasons):,} scenes in {self.root} can be opened: "
                f"{printable(first_few(reasons, 2), kept='')}"
            )
        self.files = FileList(found)
        scenes = list(found.values())
        self.bands = self._chosen_bands(scenes, channels)
        self._dtypes = {scene.dtype for scene in scenes}
        self._scaled = sum(scene.is_scaled for scene in scenes)
        self._small = sum(min(each.height, each.width) < config.tile for each in scenes)
        # Of which a window decodes several times what it shows.
        self._striped = sum(each.block[1] >= 4 * config.tile for each in scenes)
        self._check_range(scenes)
        self.open_scenes = OpenScenes(config.max_open)
        self.windows = self._find_windows(found)
        self.levels = self._find_levels()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        values, valid = self.read(index)
        return Sample(torch.from_numpy(self.levels.apply(name, values, valid, self.config.tile)))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Values of a window [C, h, w], before they become 0..255, and where they are data.

        Scaled if ``apply_scale`` says so, stored ones otherwise; without padding. Raises
        ``CorruptSampleError``.
        """
        scene, window = self.windows[index]
        path = str(self.root / self.files[scene])
        try:
            with reading():
                source = self.open_scenes.get(path)
                values, valid = read_pixels(source, self.bands, window, self.config.nodata)
                if self.config.apply_scale:
                    scale, offset = (
                        np.array([each[band - 1] for band in self.bands])[:, None, None]
                        for each in (source.scales, source.offsets)
                    )
                    values = (values * scale + offset).astype(np.float32)
        except SceneError as error:
            raise CorruptSampleError(self.name(index), str(error)) from error
        return values, valid

    def name(self, index: int) -> str:
        """The scene, and the first row and column of the window."""
        scene, (rows, columns) = self.windows[index]
        return f"{self.files[scene]}:{rows.start},{columns.start}"

    def describe(self) -> str:
        config, stride = self.config, self._stride
        overlap = "" if stride == config.tile else f" every {stride:,} pixels"
        parts = [
            f"{len(self):,} windows of {config.tile} x {config.tile}{overlap} of "
            f"{len(self.files):,} scenes",
            f"bands {' '.join(map(str, self.bands))}",
        ]
        if self.windows.left_out:
            parts.append(
                f"{self.windows.left_out:,} windows with data on less than {config.min_valid:g} "
                "of them left out"
            )
        if self._small:
            parts.append(f"{self._small:,} scenes are smaller and padded")
        if self.unreadable:
            parts.append(f"{len(self.unreadable):,} scenes that cannot be opened left out")
        parts.append(str(self.levels))
        if any(self.levels.fill):
            parts.append(f"no data becomes the mean {list(self.levels.fill)}")
        return f"geotiff_scenes {self.root}: {'; '.join(parts)}"

    def digest(self) -> str:
        bands = " ".join(map(str, self.bands))
        return (
            f"{len(self):,} windows {self.windows.digest} of the bands {bands} of "
            f"{len(self.files):,} scenes, their names {self.files.digest}"
        )

    def version(self) -> str:
        """The digest, sizes and times of the files, and how values become 0..255."""
        config = self.config
        seen = f"{self.levels!r}, nodata {config.nodata}, scaled {config.apply_scale}"
        return f"{self.digest()}, files {files_stamp(self.root, iter(self.files))}, {seen}"

    def notes(self) -> list[str]:
        found = [f"{name} is left out: {reason}" for name, reason in self.unreadable.items()]
        found = [*found[:4], *([f"and {len(found) - 4:,} more"] if len(found) > 4 else [])]
        if self._scaled and not self.config.apply_scale:
            found.append(
                f"{self._scaled:,} scenes have a scale and offset, which are not applied: low and "
                "high are of stored values (apply_scale = true)"
            )
        if self._striped:
            found.append(
                f"{self._striped:,} scenes are stored in whole rows, which take long to read "
                "windows of: gdal_translate -of COG stores them in tiles"
            )
        found += beyond_range(self._some(), self.bands, self.levels)
        return [printable(line, kept="") for line in found]

    def _some(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What a few windows hold, those of them that can be decoded."""
        parts = []
        for index in sampled(len(self), _LOOKED_AT, 0):
            with suppress(CorruptSampleError):  # counted when it is wanted
                parts.append(self.read(index))
        return parts

    # ------------------------------------------------------------------ statistics
    def statistics(self) -> list[dict[str, float]]:
        """Mean, deviation, extremes and percentiles of each band, a row each, before 0..255.

        Of a seeded sample of the windows (``statistics_windows``, ``statistics_seed``).
        """
        return self.band_statistics().rows()

    def band_statistics(self) -> BandStatistics:
        """The same by column, gathered now."""
        return self._gathered(self.read, "scaled" if self.config.apply_scale else "stored")

    def images_table(self) -> str:
        """``[images]`` for a recipe: the means and deviations of the bands as networks see them."""

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            values, valid = self.read(index)
            _, height, width = values.shape
            side = max(height, width)
            seen = self.levels.apply(self.name(index), values, valid, side)
            return seen[:, :height, :width] / np.float32(255), valid

        found = self._gathered(read, "0..1")
        mean, std = (
            ", ".join(f"{each:.4f}" for each in values) for values in (found.mean, found.std)
        )
        return f"[images]\nchannels = {len(self.bands)}\nmean = [{mean}]\nstd = [{std}]\n"

    def _gathered(
        self, read: Callable[[int], tuple[np.ndarray, np.ndarray]], values: str
    ) -> BandStatistics:
        config = self.config
        return gather(
            read,
            sampled(len(self), config.statistics_windows, config.statistics_seed),
            self.bands,
            values=values,
            seed=config.statistics_seed,
            percentiles=config.percentiles,
        )

    # ------------------------------------------------------------------ finding scenes
    @property
    def _stride(self) -> int:
        return self.config.stride or self.config.tile

    def _headers(self, names: list[str]) -> Iterator[tuple[str, Scene]]:
        for name in names:
            try:
                yield name, read_header(str(self.root / name))
            except SceneError as error:
                self.unreadable[name] = str(error)

    def _chosen_bands(self, scenes: list[Scene], channels: int) -> tuple[int, ...]:
        bands = self.config.bands
        for scene, name in zip(scenes, self.files, strict=True):
            chosen = bands or scene.bands
            if max(chosen) > scene.count:
                raise DataError(
                    f"geotiff_scenes: {printable(name, kept='')} has {scene.count} bands, bands "
                    f"names {max(chosen)}"
                )
            if len(chosen) != channels:
                what = "bands names" if bands else f"{printable(name, kept='')} has"
                raise DataError(
                    f"geotiff_scenes: {what} {len(chosen)} bands, images.channels is {channels}\n"
                    "    choose them with bands, as in bands = [4, 3, 2], or set images.channels"
                )
        return bands or scenes[0].bands

    def _check_range(self, scenes: list[Scene]) -> None:
        """Raise ``DataError`` for values that need a range and have none."""
        config, count = self.config, len(self.bands)
        low, high = config.stated_range(count)
        if low and not len(low) == len(high) == count:
            raise DataError(
                f"geotiff_scenes: band_low and band_high have {len(low)} and {len(high)} numbers "
                f"for {count} bands"
            )
        if low or config.range == "percentile":
            return
        for scene, name in zip(scenes, self.files, strict=True):
            if config.apply_scale or scene.dtype not in (np.uint8, np.uint16):
                what = "scaled values" if config.apply_scale else str(scene.dtype)
                raise DataError(
                    f"geotiff_scenes: {printable(name, kept='')} holds {what}: state the values "
                    "that become 0 and 255 with low and high, or have them gathered with range = "
                    '"percentile"'
                )

    def _find_windows(self, found: dict[str, Scene]) -> Windows:
        config = self.config
        kept: list[np.ndarray | None] = [None] * len(found)
        for number, (name, scene) in enumerate(found.items() if config.min_valid else ()):
            grid = Grid(scene.height, scene.width, config.tile, self._stride)
            path = str(self.root / name)
            try:
                kept[number] = windows_with_data(
                    path, scene, grid, self.bands, config.min_valid, config.nodata
                )
            except SceneError as error:
                self.unreadable[name] = str(error)
                kept[number] = np.empty(0, dtype=np.uint32)
        sizes = [(scene.height, scene.width) for scene in found.values()]
        windows = Windows(sizes, config.tile, self._stride, kept)
        if not len(windows):
            raise DataError(
                f"geotiff_scenes: no window of {config.tile} x {config.tile} in {self.root} has "
                f"data on {config.min_valid:g} of it\n    lower tile or min_valid"
            )
        return windows

    # ------------------------------------------------------------------ values
    def _find_levels(self) -> Levels:
        config = self.config
        stated = config.stated_range(len(self.bands))
        levels = Levels.between(*stated) if stated[0] else Levels()
        if config.statistics is None:
            return levels
        path = Path(config.statistics).expanduser()
        values = "scaled" if config.apply_scale else "stored"
        if not path.exists():
            write_statistics(path, self.band_statistics())
        found = read_statistics(path, self.bands, values)
        if config.range == "percentile":
            if found.percentiles != config.percentiles:
                raise DataError(
                    f"geotiff_scenes: statistics = {str(path)!r} has the percentiles "
                    f"{list(found.percentiles)}, not {list(config.percentiles)}\n    remove the "
                    "file, and the next run gathers them anew"
                )
            levels = Levels.between(found.low, found.high)
        if config.fill == "mean":
            if not levels.low and len(self._dtypes) > 1:
                raise DataError('geotiff_scenes: fill = "mean" of several types needs low and high')
            levels = levels.with_means(found.mean, next(iter(self._dtypes)))
        return levels
