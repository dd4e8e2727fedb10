"""The grid of windows over scenes, and which of them have enough data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen

from dinov3_datasets.scene_files import Scene, SceneError, open_scene, read_pixels, reading

_LEAST = 16  # pixels of an overview along a window


@frozen
class Grid:
    """Square windows over a scene; the last of a row and of a column ends where the scene does."""

    height: int
    width: int
    tile: int
    stride: int

    @property
    def columns(self) -> int:
        return self._count(self.width)

    def __len__(self) -> int:
        return self._count(self.height) * self.columns

    def window(self, number: int) -> tuple[slice, slice]:
        """Rows and columns of a window; fewer than ``tile`` where the scene has no more."""
        row, column = divmod(number, self.columns)
        return self._span(row, self.height), self._span(column, self.width)

    def _count(self, size: int) -> int:
        return 1 + max(0, -(-(size - self.tile) // self.stride))

    def _span(self, number: int, size: int) -> slice:
        start = max(min(number * self.stride, size - self.tile), 0)
        return slice(start, min(start + self.tile, size))


class Windows:
    """All windows that are used, by index: scenes one after another, 4 bytes a window at most."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        tile: int,
        stride: int,
        kept: list[np.ndarray | None],
    ) -> None:
        """``kept`` are the numbers of the windows of each scene, None for all of them."""
        self.tile, self.stride = tile, stride
        self._sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        grids = [len(self.grid(scene)) for scene in range(len(sizes))]
        counts = [
            grid if each is None else len(each) for grid, each in zip(grids, kept, strict=True)
        ]
        self._ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.left_out = sum(grids) - sum(counts)
        self._kept = None
        if self.left_out:
            numbers = [
                np.arange(grid) if each is None else each
                for grid, each in zip(grids, kept, strict=True)
            ]
            self._kept = np.concatenate(numbers).astype(np.uint32)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[int, tuple[slice, slice]]:
        """(which scene, its rows and columns)."""
        index = range(len(self))[index]
        scene = int(np.searchsorted(self._ends, index, side="right")) - 1
        number = index - int(self._ends[scene]) if self._kept is None else int(self._kept[index])
        return scene, self.grid(scene).window(number)

    def grid(self, scene: int) -> Grid:
        height, width = map(int, self._sizes[scene])
        return Grid(height, width, self.tile, self.stride)

    @property
    def digest(self) -> str:
        """The beginning of a SHA-256 of where the windows lie."""
        kept = b"" if self._kept is None else self._kept.tobytes()
        shape = f"{self.tile} {self.stride} ".encode()
        return hashlib.sha256(shape + self._sizes.tobytes() + kept).hexdigest()[:16]


def windows_with_data(
    path: str, scene: Scene, grid: Grid, bands: Sequence[int], least: float, nodata: float | None
) -> np.ndarray | None:
    """The windows of a scene of which a share of ``least`` or more has data; None for all.

    Pixels that a small scene lacks count as without. Where the scene has overviews, windows that
    one shows wholly with or wholly without data are taken so; all others are read. One that cannot
    be read stays, to be counted as corrupt when it is wanted. Raises ``SceneError``.
    """
    area = grid.tile**2
    if not (scene.has_gaps or nodata is not None):
        if min(scene.height, grid.tile) * min(scene.width, grid.tile) >= least * area:
            return None
        return np.empty(0, dtype=np.uint32)
    kept = []
    with reading():
        seen, factor = _overview(path, scene, grid, bands, nodata)
        source = open_scene(path)
    # NaN spreads in overviews: what looks empty may not be.
    is_sure = scene.dtype.kind != "f"
    with source:
        for number in range(len(grid)):
            window = grid.window(number)
            data = None if seen is None else _whole(seen, factor, window, is_sure)
            if data is None:
                try:
                    with reading():
                        data = _pixels_with_data(read_pixels(source, bands, window, nodata)[1])
                except SceneError:
                    data = area
            if data >= least * area:
                kept.append(number)
    return None if len(kept) == len(grid) else np.array(kept, dtype=np.uint32)


def _pixels_with_data(valid: np.ndarray) -> int:
    """How many pixels have data in a band, of bool [C, h, w]."""
    return int(valid.any(axis=0).sum())


def _overview(
    path: str, scene: Scene, grid: Grid, bands: Sequence[int], nodata: float | None
) -> tuple[np.ndarray | None, int]:
    """Where a scene has data by the coarsest overview that does, bool [h, w], and its factor."""
    fitting = [n for n, factor in enumerate(scene.overviews) if factor * _LEAST <= grid.tile]
    if not fitting:
        return None, 1
    level = max(fitting, key=lambda n: scene.overviews[n])
    with open_scene(path, overview=level) as source:
        found: Any = np.zeros((source.height, source.width), dtype=bool)
        for band in bands:  # one at a time, as all of a large scene may not fit
            found |= read_pixels(source, [band], None, nodata)[1][0]
    return found, scene.overviews[level]


def _whole(seen: np.ndarray, factor: int, window: tuple[slice, slice], is_sure: bool) -> int | None:
    """The pixels with data of a window that has them everywhere or nowhere, with a margin."""
    rows, columns = (
        slice(max(each.start // factor - 1, 0), -(-each.stop // factor) + 1) for each in window
    )
    part = seen[rows, columns]
    if part.all():
        height, width = (each.stop - each.start for each in window)
        return height * width
    return 0 if is_sure and not part.any() else None
