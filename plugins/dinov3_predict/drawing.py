"""Predictions as pictures and in a few words; a class for each kind of target.

Pixels are uint8 [H, W, 3] throughout.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dinov3_framework import Target
from dinov3_framework.data.palettes import palette
from dinov3_predict.canvas import Color, Pixels, beside, color_bar, color_list

Row = Mapping[str, Any]

_FIRST = 5  # classes that are named in one line


class Drawing(abc.ABC):
    """How the predictions of one kind of target are shown, and what a table says of them."""

    has_files: ClassVar[bool] = True  # whether predictions are files, and can be drawn
    absent: ClassVar[Any] = ""  # what a column that a row lacks stands for

    @abc.abstractmethod
    def picture(self, image: Pixels, prediction: Tensor) -> Pixels:
        """A prediction, to be seen beside its image."""

    @abc.abstractmethod
    def sheet(self, image: Pixels, prediction: Tensor) -> Pixels:
        """A prediction and its image, with all that explains the picture."""

    @abc.abstractmethod
    def row(self, prediction: Tensor) -> Row:
        """What a table says of it, by column."""

    @abc.abstractmethod
    def columns(self) -> Sequence[str]:
        """All columns that there may be, in their order."""

    @abc.abstractmethod
    def caption(self, row: Row) -> str:
        """A row in one line."""

    def legend(self, rows: Sequence[Row]) -> Mapping[str, Color]:
        """What colors stand for, in pictures of predictions with these rows."""
        return {}

    def notes(self) -> Sequence[str]:
        """What else there is to know of the pictures, a line each."""
        return ()

    def resized(self, prediction: Tensor, height: int, width: int) -> Tensor:
        """A prediction [H, W] for a smaller picture."""
        rows = torch.arange(height) * prediction.shape[0] // height
        columns = torch.arange(width) * prediction.shape[1] // width
        return prediction[rows][:, columns]


class MaskDrawing(Drawing):
    """Colors of classes over the image, and lines between them."""

    absent = 0

    def __init__(self, target: Target, alpha: float) -> None:
        self.alpha, self.names = alpha, _names(target)
        colors = [*(target.palette or ())][: len(self.names)]
        colors += palette(len(self.names))[len(colors) :]
        self.colors = np.array(colors, dtype=np.uint8)

    def picture(self, image: Pixels, prediction: Tensor) -> Pixels:
        ids = prediction.numpy()
        colors = self.colors[ids.clip(0, len(self.colors) - 1)]
        blended = image + (colors.astype(np.float32) - image) * np.float32(self.alpha)
        border = np.zeros(ids.shape, dtype=bool)
        border[:-1] |= ids[:-1] != ids[1:]
        border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
        return np.where(border[..., None], colors, blended.round().astype(np.uint8))

    def sheet(self, image: Pixels, prediction: Tensor) -> Pixels:
        row = self.row(prediction)
        legend = self.legend([row])
        lines = [
            (color, f"{name} {_percent(row[_column(name)])}") for name, color in legend.items()
        ]
        over = self.picture(image, prediction)
        return beside(over, color_list(lines, over.shape[0]))

    def row(self, prediction: Tensor) -> Row:
        count = len(self.names)
        counts = torch.bincount(prediction.flatten(), minlength=count)[:count].tolist()
        return {
            _column(name): round(pixels / prediction.numel(), 6)
            for name, pixels in zip(self.names, counts, strict=True)
            if pixels
        }

    def columns(self) -> Sequence[str]:
        return [_column(name) for name in self.names]

    def caption(self, row: Row) -> str:
        shares = [(row[_column(name)], name) for name in self.names if _column(name) in row]
        shares.sort(key=lambda each: -each[0])
        return ", ".join(f"{name} {_percent(share)}" for share, name in shares[:_FIRST])

    def legend(self, rows: Sequence[Row]) -> Mapping[str, Color]:
        """Those of the classes that there are, the largest first."""
        sums = [sum(row.get(_column(name), 0) for row in rows) for name in self.names]
        order = sorted(range(len(sums)), key=lambda index: -sums[index])
        colors = self.colors.tolist()
        return {self.names[i]: tuple(colors[i]) for i in order if sums[i]}


class MapDrawing(Drawing):
    """A color map, from the 2nd to the 98th percentile of each image, with a bar.

    Black is where nothing is known.
    """

    def __init__(self, target: Target, colormap: str) -> None:
        import matplotlib

        self.colors, self.unit = matplotlib.colormaps[colormap], target.unit

    def picture(self, image: Pixels, prediction: Tensor) -> Pixels:
        values = prediction.numpy()
        known = np.isfinite(values)
        low, high = np.percentile(values[known], (2, 98)) if known.any() else (0.0, 1.0)
        high = max(high, low + 1e-6)
        shares = np.where(known, (values - low) / (high - low), 0).clip(0, 1)
        drawn = self.colors(shares, bytes=True)[..., :3] * known[..., None]
        strip = self.colors(np.linspace(1, 0, 256), bytes=True)[:, :3]
        ticks = [f"{value:.3g} {self.unit}".strip() for value in np.linspace(high, low, 3)]
        return beside(drawn.astype(np.uint8), color_bar(strip, ticks, len(drawn)))

    def sheet(self, image: Pixels, prediction: Tensor) -> Pixels:
        return beside(image, self.picture(image, prediction))

    def notes(self) -> Sequence[str]:
        return ["Colors reach from the 2nd to the 98th percentile of each image."]

    def row(self, prediction: Tensor) -> Row:
        known = prediction[prediction.isfinite()].double()
        if not len(known):
            return {}
        found = (known.min(), known.mean(), known.max())
        values = (float(f"{float(value):.6g}") for value in found)
        return dict(zip(self.columns(), values, strict=True))

    def columns(self) -> Sequence[str]:
        unit = f" ({self.unit})" if self.unit else ""
        return [f"{name}{unit}" for name in ("min", "mean", "max")]

    def caption(self, row: Row) -> str:
        if not row:
            return "nothing is known"
        low, mean, high = (f"{value:.3g}" for value in row.values())
        return f"{low} to {high} {self.unit}, mean {mean} {self.unit}".replace(" ,", ",").strip()


class ClassDrawing(Drawing):
    """The image as it is, and the likeliest classes. A prediction is probabilities [classes]."""

    has_files = False

    def __init__(self, target: Target) -> None:
        self.names = _names(target)

    def picture(self, image: Pixels, prediction: Tensor) -> Pixels:
        return image

    def sheet(self, image: Pixels, prediction: Tensor) -> Pixels:
        return image

    def row(self, prediction: Tensor) -> Row:
        scores, order = prediction.topk(min(_FIRST, len(prediction)))
        found = zip(self._pairs(), order.tolist(), scores.tolist(), strict=False)
        named = [((name, self.names[i]), (key, round(s, 6))) for (name, key), i, s in found]
        return dict(pair for pairs in named for pair in pairs)

    def columns(self) -> Sequence[str]:
        return [column for pair in self._pairs() for column in pair]

    def caption(self, row: Row) -> str:
        pairs = [pair for pair in self._pairs() if pair[0] in row]
        return ", ".join(f"{row[name]} {_percent(row[score])}" for name, score in pairs)

    def resized(self, prediction: Tensor, height: int, width: int) -> Tensor:
        return prediction

    @staticmethod
    def _pairs() -> list[tuple[str, str]]:
        return [(f"class {place}", f"probability {place}") for place in range(1, _FIRST + 1)]


def _names(target: Target) -> tuple[str, ...]:
    """A name of its own for each class."""
    names = target.classes or tuple(f"class {index}" for index in range(target.count or 0))
    if len(set(names)) == len(names):
        return names
    return tuple(f"{name} ({index})" for index, name in enumerate(names))


def _column(name: str) -> str:
    return f"share of {name}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
