"""crops.png: what student and teacher get to see of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dinov3_figures.pixels import Pixels, fit, to_rgb
from dinov3_figures.sheet import Block, Sheet, compose, draw_sheet
from dinov3_framework import DataError, ImagesConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLEST, _LARGEST = 168, 256  # pixels that a global crop is shown with
_SHADE, _LINE = np.array([176, 184, 196]), np.array([64, 70, 80])
_PLACES = {"global": 0, "local": 1}  # other views come after these
_COVER = 0.72  # how much of a masked patch the shade hides


def crops_figure(batch: Mapping[str, Tensor], spec: ImagesConfig, patch_size: int) -> Figure:
    """The sheet of a batch as ``Run.sample_batch`` gives it; errors as in :func:`crops_sheet`."""
    sheet = crops_sheet(batch, spec, patch_size)
    note = "Each row is one image of the training stream."
    if "masks" in batch:
        note += " Hatched: patches that the student does not see."
    return draw_sheet(sheet, "Crops and masks", note)


def crops_sheet(batch: Mapping[str, Tensor], spec: ImagesConfig, patch_size: int) -> Sheet:
    """Rows are images; columns the global crops with their masks, local and other crops.

    ``batch`` holds crops [G, B, C, size, size] by view and, if any, ``masks`` bool [G, B, P] of
    the global crops. Local crops keep their size relative to the global ones. Raises ``DataError``
    where there are no global crops, or masks do not fit them.
    """
    views = {name: crops for name, crops in batch.items() if name != "masks"}
    if "global" not in views:
        raise DataError(f"the augmentation makes {', '.join(views)} crops, no global ones to show")
    size = views["global"].shape[-1]
    side = size * max(round(_SMALLEST / size), 1) if size <= _LARGEST else _LARGEST
    blocks: list[Block] = []
    for name in sorted(views, key=lambda view: _PLACES.get(view, len(_PLACES))):
        shown = to_rgb(views[name], spec)  # [G, B, s, s, 3]
        pixels = shown.shape[-2]
        if name == "local":
            small = fit(shown, max(round(side * pixels / size), 1))
            blocks.append(Block(f"{len(small)} local crops\n{pixels} px", small.swapaxes(0, 1)))
            continue
        large = fit(shown, side)
        if name == "global" and "masks" in batch:
            large = cover(large, _grids(batch["masks"], size // patch_size))
        blocks += [
            Block(f"{name} crop {index}\n{pixels} px", crop[:, None])
            for index, crop in enumerate(large, start=1)
        ]
    return compose(blocks)


def _grids(masks: Tensor, side: int) -> np.ndarray:
    """Masks [G, B, P] as [G, B, side, side]."""
    if masks.shape[-1] != side * side:
        raise DataError(
            f"masks of {masks.shape[-1]} patches do not fit global crops of {side} x {side} patches"
        )
    return masks.cpu().numpy().reshape(*masks.shape[:-1], side, side)


def cover(pixels: Pixels, masks: np.ndarray) -> Pixels:
    """Hatch the masked patches of images [..., side, side, 3]; masks are bool [..., g, g].

    What is masked can still be made out, so that one sees what the student has to infer.
    """
    side, grid = pixels.shape[-2], masks.shape[-1]
    place = np.arange(side)
    patch = place * grid // side  # which patch a row or column of pixels belongs to
    hidden = masks[..., patch[:, None], patch[None, :]][..., None]
    step = max(math.ceil(side / grid / 3), 4)
    stripes = ((place[:, None] + place[None, :]) % step < max(step // 5, 1))[..., None]
    paint = np.where(stripes, _LINE, _SHADE)
    blended = (pixels * (1 - _COVER) + paint * _COVER).round().astype(np.uint8)
    return np.where(hidden, blended, pixels)
