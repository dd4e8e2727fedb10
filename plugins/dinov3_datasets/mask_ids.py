"""From what masks store, ids or colors, to the class ids of a target."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.data.masks import orientation_of, read_mask
from dinov3_framework.data.palettes import Palette
from dinov3_framework.data.rasters import upright
from dinov3_framework.errors import WrongTargetError, first_few

Coding = Literal["auto", "ids", "colors"]


@frozen(eq=False)
class IdTable:
    """Class ids by what is stored: ``values[stored - first]`` where ``known``."""

    first: int
    values: np.ndarray
    known: np.ndarray  # bool
    said: str  # which ids there may be
    of_bytes: bytes = b""  # the same of ids 0 to 255, where class ids are as small
    known_bytes: bytes = b""

    @classmethod
    def of(cls, ids: Mapping[int, int], said: str) -> IdTable:
        """The table of class ids by stored id."""
        first, last = min(ids), max(ids)
        least, most = min(ids.values()), max(ids.values())
        small = least >= 0 and most <= 255
        values = np.zeros(last - first + 1, dtype=np.uint8 if small else np.int32)
        known = np.zeros(len(values), dtype=bool)
        for stored, number in ids.items():
            values[stored - first], known[stored - first] = number, True
        if not small:
            return cls(first, values, known, said)
        of_bytes = bytes(ids.get(stored, 0) for stored in range(256))
        known_bytes = bytes(stored for stored in range(256) if stored in ids)
        return cls(first, values, known, said, of_bytes, known_bytes)

    @classmethod
    def shifted(
        cls, count: int, *, offset: int = 0, ignored: Collection[int] = (), ignore_index: int
    ) -> IdTable:
        """``stored + offset`` is the class; ids below the first and those ``ignored`` are void."""
        ids = {number - offset: number for number in range(count)}
        below = range(max(-offset, 0))
        ids |= dict.fromkeys([*below, *ignored, ignore_index], ignore_index)
        shown = f"{-offset}..{count - 1 - offset}" if offset else f"0..{count - 1}"
        void = first_few(sorted({*below, *ignored, ignore_index}))
        said = f"ids are {shown} for {count} classes, and {void} to be ignored"
        return cls.of(ids, said)

    @classmethod
    def listed(cls, ids: Sequence[int], *, ignored: Collection[int], ignore_index: int) -> IdTable:
        """The stored id of each class is given; those ``ignored`` and no class's are void."""
        void = sorted({*ignored, ignore_index} - set(ids))
        table = dict.fromkeys(void, ignore_index)
        table |= {stored: number for number, stored in enumerate(ids)}
        said = f"ids are {', '.join(map(str, ids))}"
        return cls.of(table, f"{said}, and {first_few(void)} to be ignored" if void else said)

    def apply(self, path: str, stored: np.ndarray, remedy: str) -> Tensor:
        """Class ids [H, W], uint8 where they fit; raises ``WrongTargetError`` for an unknown id."""
        if stored.dtype == np.uint8 and self.of_bytes:
            plain = stored.tobytes()  # takes a quarter of the time of indexing
            if not plain.translate(None, self.known_bytes):
                found = np.frombuffer(bytearray(plain.translate(self.of_bytes)), np.uint8)
                return torch.from_numpy(found.reshape(stored.shape))
        last = len(self.values) - 1
        places = stored.astype(np.int64) - self.first
        clipped = places.clip(0, last)
        wrong = stored[(clipped != places) | ~self.known[clipped]]
        if wrong.size:
            numbers, counts = np.unique(wrong, return_counts=True)
            listed = (f"{n} ({c:,} pixels)" for n, c in zip(numbers, counts, strict=True))
            raise WrongTargetError(path, f"holds id {first_few(listed)}; {self.said}{remedy}")
        return torch.from_numpy(self.values[places])


@frozen(eq=False)
class ColorTable:
    """Class ids by color."""

    keys: np.ndarray  # red * 65536 + green * 256 + blue, increasing
    ids: np.ndarray

    @classmethod
    def of(cls, palette: Palette, ignored: Palette, ignore_index: int) -> ColorTable:
        ids = dict.fromkeys(ignored, ignore_index)
        ids |= {color: number for number, color in reversed(list(enumerate(palette)))}
        found = sorted((_key(color), number) for color, number in ids.items())
        keys = np.array([key for key, _ in found], dtype=np.int32)
        return cls(keys, np.array([number for _, number in found], dtype=np.int64))

    def apply(self, path: str, colors: np.ndarray) -> np.ndarray:
        """Ids [H, W] of uint8 [H, W, 3]; raises ``WrongTargetError`` for a color of no class."""
        wide = colors.astype(np.int32)
        keys = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        if (wrong := keys[self.keys[places] != keys]).size:
            numbers, counts = np.unique(wrong, return_counts=True)
            listed = (
                f"{n >> 16, n >> 8 & 255, n & 255} ({c:,} pixels)"
                for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)
            )
            raise WrongTargetError(
                path,
                f"holds colors that palette lacks: {first_few(listed)}; add them, or name them in "
                "ignore_colors (edges smoothed by resizing have colors of no class)",
            )
        return self.ids[places]


def _key(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


@frozen(eq=False)
class MaskReader:
    """Reads files of masks as class ids."""

    table: IdTable
    max_pixels: int
    remedy: str = ""  # the options that other ids may be due to, in words
    colors: ColorTable | None = None
    coding: Coding = "auto"

    def __call__(self, path: Path, image: Path | None = None) -> Tensor:
        """Class ids [H, W], turned as ``image`` is if one is given.

        Raises ``CorruptSampleError`` for what cannot be read, ``WrongTargetError`` for ids or
        colors of no class.
        """
        name = str(path)
        stored = read_mask(path, self.max_pixels, colors=self.coding == "colors")
        if image is not None:
            turned = upright(np.atleast_3d(stored), orientation_of(image))
            stored = turned if stored.ndim == 3 else turned[:, :, 0]
        if stored.ndim == 3 and (self.colors is None or self.coding == "ids"):
            raise WrongTargetError(
                name,
                "holds colors (3 channels); state palette, the color of each class, or save ids in "
                "one channel",
            )
        if stored.ndim == 3 and self.colors is not None:
            found = torch.from_numpy(self.colors.apply(name, stored))
            return found.to(torch.from_numpy(self.table.values[:0]).dtype)
        return self.table.apply(name, stored, self.remedy)
