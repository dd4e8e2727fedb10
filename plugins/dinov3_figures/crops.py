"""crops.png: what student and teacher get to see of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinov3_figures.sheet import Pixels, Tile, draw_sheet, fit, pixels_of, to_rgb
from dinov3_framework import DataError, ImagesConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLEST, _LARGEST = 168, 256  # pixels that a global crop is shown with
_TALLEST = 1700  # pixels of all rows
_SHADE, _LINE = torch.tensor([176, 184, 196]), torch.tensor([64, 70, 80])
_PLACES = {"global": 0, "local": 1}  # other views come after these
_COVER = 0.72  # how much of a masked patch the shade hides


def crops_figure(batch: Mapping[str, Tensor], spec: ImagesConfig) -> Figure:
    """The sheet of a batch: rows are images, columns global crops, local and other crops.

    ``batch`` holds crops [G, B, C, size, size] by view and, if any, ``masks`` bool [G, B, P] of
    the global crops, as ``Run.sample_batch`` gives them. Local crops keep their size relative to
    the global ones. Raises ``DataError`` where there are no global crops, or masks do not fit them.
    """
    views = {name: crops for name, crops in batch.items() if name != "masks"}
    if "global" not in views:
        raise DataError(f"the augmentation makes {', '.join(views)} crops, no global ones to show")
    size = views["global"].shape[-1]
    side = size * max(round(_SMALLEST / size), 1) if size <= _LARGEST else _LARGEST
    side = min(side, _TALLEST // views["global"].shape[1])
    heads: list[str] = []
    columns: list[list[Tile | None]] = []
    for name in sorted(views, key=lambda view: _PLACES.get(view, len(_PLACES))):
        shown, pixels = to_rgb(views[name], spec), views[name].shape[-1]  # [G, B, 3, s, s]
        if name == "local":
            small = fit(shown, max(round(side * pixels / size), 1))
            heads.append(f"{len(small)} local crops\n{pixels} px")
            columns.append([Tile(_grid(crops, side)) for crops in small.transpose(0, 1)])
            continue
        large = fit(shown, side)
        if name == "global" and "masks" in batch:
            large = cover(large, _square(batch["masks"], size))
        heads += [f"{name} crop {index}\n{pixels} px" for index in range(1, len(large) + 1)]
        columns += [[Tile(pixels_of(crop)) for crop in crops] for crops in large]
    note = "Each row is one image of the training stream."
    if "masks" in batch:
        note += " Hatched: patches that the student does not see."
    rows = list(zip(*columns, strict=True))
    return draw_sheet("Crops and masks", note, rows, heads=heads, narrowest=100)


def _grid(crops: Tensor, height: int) -> Pixels:
    """Crops [n, 3, s, s] in a grid about as high as ``height`` allows."""
    from torchvision.utils import make_grid

    count, gap = len(crops), 6
    high = min(max(round(height / crops.shape[-1]), 1), count)
    grid = make_grid(crops, math.ceil(count / high), padding=gap, pad_value=255)
    return pixels_of(grid[:, gap:-gap, gap:-gap])


def _square(masks: Tensor, size: int) -> Tensor:
    """Masks [G, B, P] of square crops as [G, B, side, side]."""
    side = math.isqrt(masks.shape[-1])
    if side**2 != masks.shape[-1] or size % side:
        raise DataError(f"masks of {masks.shape[-1]} patches do not fit global crops of {size} px")
    return masks.cpu().unflatten(-1, (side, side))


def cover(images: Tensor, masks: Tensor) -> Tensor:
    """Hatch the masked patches of images [..., 3, side, side]; masks are bool [..., g, g].

    What is masked can still be made out, so that one sees what the student has to infer.
    """
    side, grid = images.shape[-1], masks.shape[-1]
    place = torch.arange(side)
    patch = place * grid // side  # which patch a row or column of pixels belongs to
    hidden = masks[..., patch[:, None], patch[None, :]].unsqueeze(-3)
    step = max(math.ceil(side / grid / 3), 4)
    stripes = (place[:, None] + place) % step < max(step // 5, 1)
    paint = torch.where(stripes, _LINE[:, None, None], _SHADE[:, None, None])
    blended = (images * (1 - _COVER) + paint * _COVER).round().to(torch.uint8)
    return torch.where(hidden, blended, images)
