"""What datasets with depth can be told."""

from __future__ import annotations

import math
from typing import Literal

from dinov3_datasets.configs import IMAGE_EXTENSIONS, PicturesConfig
from dinov3_datasets.configs import extensions_complaint as _extensions
from dinov3_framework import config, option

_DEPTH = (".png", ".tif", ".tiff", ".npy", ".pgm")


def _scale(value: float) -> str | None:
    return None if 0 < value < math.inf else f"must be above 0, is {value:g}"


@config
class DepthFolderConfig(PicturesConfig):
    """Images and their depth, or another number by pixel, in two folders.

    Files are paired by equal paths without the endings: PNG of 16 bits, TIFF or .npy. The target is
    ``depth``, float32, NaN where it is not known: where the file has NaN, an infinite value, one of
    ``invalid``, or one below 0.
    """

    images: str = option("the folder of the images, at any depth", is_place=True)
    depth: str = option("the folder of the files with depth", is_place=True)
    image_suffix: str = option("what the stems of images end with, such as _rgb", default="")
    depth_suffix: str = option("what the stems of depth files end with, such as _depth", default="")
    scale: float | None = option(
        "what a stored 1 is in the unit: 0.001 for millimeters in m; required where files hold "
        "integers, 1 for floats if left out",
        default=None,
        check=_scale,
    )
    unit: str = option("the unit of the target", default="m")
    invalid: tuple[float, ...] = option(
        "stored values that mean that nothing is known", default=(0.0,)
    )
    negative: bool = option("values below 0 are values like others, such as heights", default=False)
    skip_unpaired: bool = option("leave out images that have no depth", default=False)
    extensions: tuple[str, ...] = option(
        "endings of images, upper case included", default=IMAGE_EXTENSIONS, check=_extensions
    )
    depth_extensions: tuple[str, ...] = option(
        "endings of depth files, upper case included", default=_DEPTH, check=_extensions
    )


@config
class NyuDepthConfig(PicturesConfig):
    """NYU Depth v2: indoor images of 640 x 480 pixels with depth up to 10 m.

    ``root`` is a folder with the reference's split files nyu_train.txt and nyu_test.txt and the
    PNGs they name (24,231 and 654 images; depth in millimeters), or with the labeled set
    nyu_depth_v2_labeled.mat (1,449 images) and its splits.mat. The target is ``depth`` in meters,
    NaN where it is not known. The images keep their white frame: evaluations crop it.
    """

    root: str = option("the folder", is_place=True)
    split: Literal["train", "test", "all"] = option(
        "train, test, or all that the labeled set has", default="train"
    )
    source: Literal["auto", "files", "labeled"] = option(
        "the split files, the labeled set, or the first of them that is there (auto)",
        default="auto",
    )
    depth: Literal["filled", "raw"] = option(
        "of the labeled set: depth with its holes filled in, or as the camera gave it",
        default="filled",
    )
