"""patch_pca.png: the principal components of patch features as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_figures.components import principal_components, to_colours
from dinov3_figures.pixels import Pixels, fit, to_rgb
from dinov3_figures.sheet import Block, Sheet, compose, draw_sheet
from dinov3_framework import Backbone, ImagesConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 200  # pixels that an image is shown with, about


@attrs.frozen
class PatchMap:
    """Patch features of the shown images at one size, as colours."""

    colours: Pixels  # uint8 [n, h, w, 3]
    explained: float  # share of the variance that the three components hold
    size: int  # pixels along a side of what the backbone saw


@torch.no_grad()
def patch_features(backbone: Backbone, images: Tensor, scale: int) -> Tensor:
    """Normalised patch tokens [n, h, w, D] of normalised images [n, C, H, W], enlarged ``scale``x.

    Where the backbone is sharded, call it on every process with the same images.
    """
    parameter = next(backbone.parameters(), None)
    if parameter is not None:
        images = images.to(parameter.device, parameter.dtype)
    if scale > 1:
        images = F.interpolate(
            images, scale_factor=scale, mode="bicubic", antialias=False, align_corners=False
        )
    height, width = (side // backbone.patch_size for side in images.shape[-2:])
    # One by one: enlarged images may be far larger than those of training.
    maps = [
        backbone.forward_features(image[None])["x_norm_patchtokens"].float() for image in images
    ]
    features: Tensor = torch.cat(maps).unflatten(1, (height, width))
    return features


def patch_map(features: Tensor, size: int) -> PatchMap:
    """Colours of patch features [n, h, w, D]: red, green and blue are the first three components.

    They are computed over the patches of all images together, so that a colour means the same in
    each.
    """
    found = principal_components(features.flatten(0, 2))
    colours = to_colours(found.scores).unflatten(0, features.shape[:3])
    return PatchMap(colours.cpu().numpy(), found.explained, size)


def pca_sheet(images: Pixels, maps: Sequence[PatchMap]) -> Sheet:
    """Rows are images [n, s, s, 3]; columns the image and its maps."""
    side = images.shape[-2] * max(round(_SIDE / images.shape[-2]), 1)
    side = side if side <= 2 * _SIDE else _SIDE
    blocks = [Block(f"image\n{images.shape[-2]} px", fit(images, side)[:, None])]
    for each in maps:
        height, width = each.colours.shape[1:3]
        title = f"{height} x {width} patches of {each.size} px\n{each.explained:.0%}"
        blocks.append(Block(title, _enlarge(each.colours, side)[:, None]))
    return compose(blocks)


def _enlarge(colours: Pixels, side: int) -> Pixels:
    """Maps [n, h, w, 3] at ``side`` pixels without blending neighbours: a patch is a square."""
    flat = torch.from_numpy(colours).permute(0, 3, 1, 2).float()
    nearest = F.interpolate(flat, (side, side), mode="nearest-exact")
    return nearest.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def pca_figure(images: Tensor, maps: Sequence[PatchMap], spec: ImagesConfig) -> Figure:
    """The sheet of images [n, C, s, s] (uint8 or normalised) and maps, with its titles."""
    note = (
        "Red, green and blue are the first three principal components of all patches in a column;\n"
        "per cent: their share of the variance."
    )
    sheet = pca_sheet(to_rgb(images, spec), maps)
    return draw_sheet(sheet, "The momentum teacher's patch features", note)
