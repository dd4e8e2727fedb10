"""Drawn shapes, and the class of every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import tv_tensors

from dinov3_framework import Dataset, Sample, Target
from dinov3_framework.randomness import keyed_rng
from dinov3_toy_heads import ShapesConfig

CLASSES = ("ground", "disc", "box", "triangle")
_IGNORED = 255
_COLORS = ((90, 90, 90), (200, 60, 60), (60, 190, 80), (70, 80, 210))


class Shapes(Dataset):
    """A disc, a box and a triangle on gray ground, at random places; the first row is ignored."""

    def __init__(self, config: ShapesConfig) -> None:
        self.config = config
        self.targets = {"mask": Target("mask", classes=CLASSES, ignore_index=_IGNORED)}

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Sample:
        side, rng = self.config.size, keyed_rng(self.config.seed, "shapes", index)
        image = Image.new("RGB", (side, side), _COLORS[0])
        mask = Image.new("L", (side, side), 0)
        for shape in (int(each) + 1 for each in rng.permutation(3)[: 1 + index % 3]):
            left, top = (int(each) for each in rng.integers(0, side // 2, 2))
            reach = side * int(rng.integers(30, 50)) // 100
            for picture, fill in ((image, _COLORS[shape]), (mask, shape)):
                _draw(ImageDraw.Draw(picture), shape, left, top, reach, fill)
        pixels = np.asarray(image).astype(np.int16) + rng.integers(-20, 20, (side, side, 3))
        ids = torch.from_numpy(np.array(mask))
        ids[0] = _IGNORED
        shown = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
        return Sample(shown.contiguous(), {"mask": tv_tensors.Mask(ids)})

    def describe(self) -> str:
        return f"{len(self)} pictures of shapes"


def _draw(pen: Any, shape: int, left: int, top: int, reach: int, fill: Any) -> None:
    box = (left, top, left + reach, top + reach)
    if shape == 1:
        pen.ellipse(box, fill=fill)
    elif shape == 2:
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(left, top + reach), (left + reach, top + reach), (left, top)], fill=fill)


def build_shapes(config: ShapesConfig, *, channels: int) -> Shapes:
    return Shapes(config)
