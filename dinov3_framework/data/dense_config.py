"""How a head that predicts pixels looks at images: resized, in windows, at several scales."""

from __future__ import annotations

from typing import Literal

from dinov3_framework.configs import InvalidOption, config, option, positive


def _scales(value: tuple[float, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers above 0, is {list(value)}"


@config
class DenseInferenceConfig:
    """How the pixels of images of any size are predicted; the truth is never resized."""

    resize: int | None = option(
        "pixels that a side of an image is resized to; left out, images keep their size",
        default=None,
        check=positive,
    )
    side: Literal["shorter", "longer", "both"] = option(
        "the side that resize concerns; both changes the shape to a square", default="shorter"
    )
    mode: Literal["whole", "slide"] = option(
        "whole images at once, or windows that overlap and whose scores are averaged",
        default="whole",
    )
    window: int | None = option(
        "side of a window in pixels; left out, that of the images of the model's training",
        default=None,
        check=positive,
    )
    stride: int | None = option(
        "pixels from one window to the next; left out, two thirds of a window, rounded down",
        default=None,
        check=positive,
    )
    scales: tuple[float, ...] = option(
        "factors of the resized size at which an image is looked at; probabilities are averaged",
        default=(1.0,),
        check=_scales,
    )
    flip: bool = option("look at the mirror image of each, too", default=False)
    interpolation: Literal["bilinear", "bicubic"] = option(
        "how images are resized, with antialias", default="bilinear"
    )
    batch_size: int = option("windows side by side at a time", default=4, check=positive)

    def __attrs_post_init__(self) -> None:
        if self.mode == "whole" and self.window is not None:
            raise InvalidOption("window", 'has no effect with mode = "whole"')
        if self.mode == "whole" and self.stride is not None:
            raise InvalidOption("stride", 'has no effect with mode = "whole"')
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise InvalidOption(
                "stride", f"leaves gaps between windows: {self.stride} is above {self.window}"
            )
