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


def _region(value: tuple[int, int, int, int]) -> str | None:
    top, left, bottom, right = value
    if 0 <= top < bottom and 0 <= left < right:
        return None
    return f"must be top, left, bottom, right, is {list(value)}"


@config
class JointConfig(TransformConfig):
    """Image and targets together, in the order in which the options stand here.

    As it stands it only normalizes; ``scale``, ``area``, ``turn``, ``flip``, ``distort``, ``shade``
    and ``crop_at = "random"`` are for training. Masks and maps are resized to the nearest value;
    boxes are clamped to a crop, and objects of which less than a pixel is left are taken out.
    """

    region: tuple[int, int, int, int] | None = option(
        "top, left, bottom and right in pixels of the part of each image that is kept at first, "
        "such as without the white border of NYU's",
        default=None,
        check=_region,
    )
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
    turn: float = option(
        "probability of a turn around the center; what comes into the image has its mean color and "
        "no known truth",
        default=0.0,
        check=fraction,
    )
    turn_by: float = option(
        "degrees of a turn at most, to either side", default=2.5, check=positive
    )
    crop: int | None = option(
        "side in pixels of the square that is cut out; smaller images are padded",
        default=None,
        check=positive,
    )
    crop_width: int | None = option(
        "width of what is cut out where it is no square, and crop its height",
        default=None,
        check=positive,
    )
    crop_at: Literal["center", "random"] = option("where the square is", default="center")
    crop_max_share: float | None = option(
        "share of the known pixels of a crop that no class of a mask should reach: up to 10 other "
        "places are tried; left out, any place will do",
        default=None,
        check=fraction,
    )
    flip: float = option("probability of a mirror image", default=0.0, check=fraction)
    distort: float = option(
        "probability of each change of brightness, contrast, saturation and hue, and of swapped "
        "channels; of images of 1 or 3 channels",
        default=0.0,
        check=fraction,
    )
    distort_as: Literal["torchvision", "mmsegmentation"] = option(
        "whose changes these are; mmsegmentation's, of the published trainings on masks, are "
        "stronger in hue and swap no channels",
        default="torchvision",
    )
    shade: float = option(
        "probability of a change of gamma, brightness and color, as published for depth",
        default=0.0,
        check=fraction,
    )
    gamma: tuple[float, float] = option(
        "exponents of values in 0..255, between which one is drawn; above 1 makes brighter",
        default=(0.9, 1.1),
        check=_range,
    )
    brightness: tuple[float, float] = option(
        "factors of all channels, between which one is drawn", default=(0.9, 1.1), check=_range
    )
    color: tuple[float, float] = option(
        "factors of the channels, between which one is drawn for each",
        default=(0.9, 1.1),
        check=_range,
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
        if self.crop_max_share is not None and (self.crop is None or self.crop_at == "center"):
            raise InvalidOption("crop_max_share", 'needs crop, and crop_at = "random"')
        if self.crop_width is not None and self.crop is None:
            raise InvalidOption("crop_width", "needs crop, the height of what is cut out")


@hookimpl
def dinov3_transforms() -> list[Component]:
    return [Component("joint", JointConfig, "dinov3_transforms.joint:Joint")]
