"""Predictions as pictures, and in a few words.

Pixels are uint8 [H, W, 3] throughout.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_framework import Target
from dinov3_framework.data.palettes import palette

Pixels = np.ndarray[Any, Any]

_BAR = 14  # pixels wide
_ROOM = 64  # beside the bar, for its numbers
_IGNORED = (0, 0, 0)


class Drawing(abc.ABC):
    """How the predictions of one kind of target are shown."""

    @abc.abstractmethod
    def over(self, image: Pixels, prediction: Tensor) -> Pixels:
        """A prediction drawn over its image."""

    @abc.abstractmethod
    def words(self, prediction: Tensor) -> Mapping[str, Any]:
        """What a table says of it: flat, by column."""

    def legend(self) -> Mapping[str, tuple[int, int, int]]:
        """Colors, by what they stand for."""
        return {}


class MaskDrawing(Drawing):
    """Colors of classes over the image, more so along their borders."""

    def __init__(self, target: Target, alpha: float) -> None:
        self.count, self.alpha = target.count or 0, alpha
        self.names = target.classes or tuple(f"class {index}" for index in range(self.count))
        self.colors = np.array(
            (target.palette or palette(self.count))[: self.count], dtype=np.float32
        )
        self.seen = np.zeros(self.count, dtype=np.int64)  # pixels of each class

    def over(self, image: Pixels, prediction: Tensor) -> Pixels:
        ids = prediction.numpy()
        inside = ids < self.count
        colors = np.where(inside[..., None], self.colors[np.where(inside, ids, 0)], _IGNORED)
        border = np.zeros(ids.shape, dtype=bool)
        border[:-1] |= ids[:-1] != ids[1:]
        border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
        share = np.where(border, min(1.0, self.alpha + 0.4), self.alpha)[..., None]
        return (image * (1 - share) + colors * share).round().astype(np.uint8)

    def words(self, prediction: Tensor) -> Mapping[str, Any]:
        counts = torch.bincount(prediction.flatten(), minlength=self.count)[: self.count]
        self.seen += counts.numpy()
        order = counts.argsort(descending=True, stable=True)[:5].tolist()
        shares = [
            f"{self.names[i]} {100 * float(counts[i]) / prediction.numel():.1f} %"
            for i in order
            if counts[i]
        ]
        return {"classes": ", ".join(shares)}

    def legend(self) -> Mapping[str, tuple[int, int, int]]:
        """Those of the classes that were seen, the largest first."""
        order = [index for index in np.argsort(-self.seen, kind="stable") if self.seen[index]]
        return {
            self.names[index]: tuple(int(c) for c in self.colors[index])  # type: ignore[misc]
            for index in order
        }


class MapDrawing(Drawing):
    """A color map beside the image, from the 2nd to the 98th percentile, with a bar."""

    def __init__(self, target: Target, colormap: str) -> None:
        import matplotlib

        self.colors, self.unit = matplotlib.colormaps[colormap], target.unit

    def over(self, image: Pixels, prediction: Tensor) -> Pixels:
        values = prediction.numpy()
        known = np.isfinite(values)
        low, high = np.percentile(values[known], (2, 98)) if known.any() else (0.0, 1.0)
        high = max(high, low + 1e-6)
        shares = np.where(known, (values - low) / (high - low), 0)
        drawn = self.colors(shares.clip(0, 1))[..., :3] * 255
        drawn = np.where(known[..., None], drawn, 0).round().astype(np.uint8)
        return np.concatenate([image, drawn, self._bar(len(image), low, high)], 1)

    def _bar(self, height: int, low: float, high: float) -> Pixels:
        from PIL import Image, ImageDraw

        strip = self.colors(np.linspace(1, 0, height))[:, None, :3]
        found = np.full((height, _BAR + _ROOM, 3), 255, dtype=np.uint8)
        found[:, 4 : 4 + _BAR] = (strip * 255).round().astype(np.uint8)
        picture = Image.fromarray(found)
        draw = ImageDraw.Draw(picture)
        for place, value in ((0, high), (max(height - 12, 0), low)):
            draw.text((8 + _BAR, place), f"{value:.3g} {self.unit}".strip(), fill=(31, 35, 40))
        return np.array(picture)

    def words(self, prediction: Tensor) -> Mapping[str, Any]:
        known = prediction[prediction.isfinite()]
        if not len(known):
            return {"least": "", "mean": "", "largest": ""}
        found = {"least": known.min(), "mean": known.mean(), "largest": known.max()}
        return {name: round(float(value), 4) for name, value in found.items()}


class ClassDrawing(Drawing):
    """The image as it is; the surest classes in words. A prediction is probabilities [K]."""

    def __init__(self, target: Target) -> None:
        self.names = target.classes or tuple(f"class {i}" for i in range(target.count or 0))

    def over(self, image: Pixels, prediction: Tensor) -> Pixels:
        return image

    def words(self, prediction: Tensor) -> Mapping[str, Any]:
        shares, order = prediction.topk(min(5, len(prediction)))
        pairs = zip(order.tolist(), shares.tolist(), strict=True)
        named = [f"{self.names[index]} {100 * share:.1f} %" for index, share in pairs]
        return {"class": self.names[int(order[0])], "classes": ", ".join(named)}


def as_pixels(image: Tensor) -> Pixels:
    """An image [C, H, W] as it can be seen: of more than three channels the first three."""
    values = image.float()
    if image.dtype == torch.uint16 or image.dtype == torch.int16:
        values = values / (2**16 - 1 if image.dtype == torch.uint16 else 2**15 - 1) * 255
    elif image.is_floating_point():
        values = values * 255
    shown = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    found: Pixels = shown.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return found
