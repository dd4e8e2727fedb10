"""Transforms of images together with their targets, over torchvision's."""

from __future__ import annotations

from typing import Literal

from dinov3_framework import (
    Component,
    InvalidOption,
    TransformConfig,
    config,
    fraction,
    hookimpl,
    option,
    positive,
)


def _range(value: tuple[float, float]) -> str | None:
    return None if 0 < value[0] <= value[1] else f"must be two increasing numbers above 0: {value}"


@config
class JointConfig(TransformConfig):
    """Image and targets together: resized, cropped, flipped, distorted, normalized, padded.

    In this order. As it stands it only normalizes; ``scale``, ``area``, ``flip``, ``distort`` and
    ``crop_at = "random"`` are for training. Masks and maps are resized to the nearest value; boxes
    are clamped to a crop, and objects of which less than a pixel is left are taken out.
    """

    resize: int | None = option(
        "pixels that a side is resized to; left out, images keep their size",
        default=None,
        check=positive,
    )
    side: Literal["shorter", "longer", "both"] = option(
        "the side that resize concerns; both changes the shape to a square", default="shorter"
    )
    scale: tuple[float, float] = option(
        "factors of the resized size, between which one is drawn", default=(1.0, 1.0), check=_range
    )
    area: tuple[float, float] | None = option(
        "shares of the image's area, between which that of a random part is drawn; the part is "
        "resized to crop x crop, in place of resize",
        default=None,
        check=_range,
    )
    aspect: tuple[float, float] = option(
        "width over height of such a part, between which it is drawn",
        default=(3 / 4, 4 / 3),
        check=_range,
    )
    crop: int | None = option(
        "side in pixels of the square that is cut out; smaller images are padded",
        default=None,
        check=positive,
    )
    crop_at: Literal["center", "random"] = option("where the square is", default="center")
    flip: float = option("probability of a mirror image", default=0.0, check=fraction)
    distort: float = option(
        "probability of each change of brightness, contrast, saturation and hue, and of swapped "
        "channels; of images of 1 or 3 channels",
        default=0.0,
        check=fraction,
    )
    multiple_of: int = option(
        "number of pixels, multiples of which images are padded to", default=1, check=positive
    )
    interpolation: Literal["bilinear", "bicubic"] = option(
        "how images are resized, with antialias", default="bicubic"
    )

    def __attrs_post_init__(self) -> None:
        if self.area is not None and self.crop is None:
            raise InvalidOption("area", "needs crop, the size of what is cut out")
        if self.area is not None and self.resize is not None:
            raise InvalidOption("area", "and resize: give one of them")


@hookimpl
def dinov3_transforms() -> list[Component]:
    return [Component("joint", JointConfig, "dinov3_transforms.joint:Joint")]
